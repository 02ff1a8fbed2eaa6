"""Programs built on the library's public functions. README.md in this folder is their manual."""
