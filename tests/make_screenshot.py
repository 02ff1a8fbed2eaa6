"""Make the README's first picture, tests/look.png: a page of examples/look.py for models/tiny.

    python -m pip install selenium && python tests/make_screenshot.py

Chromium and its driver are in the packages chromium and chromium-driver of Debian and Ubuntu.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from browser import open_browser, open_page, set_screen

ROOT = Path(__file__).parent.parent
TEXT = """\
ROMEO:
Good night, good night! I come to thee, my love.

JULIET:
O gentle Romeo, what say'st thou of my father?

ROMEO:
I do not know, my lady; but I fear
That he will be the death of me and thee.

JULIET:
My lord, I pray thee, speak no more of death.
"""


def main(folder):
    page = Path(folder) / "look.html"
    command = [sys.executable, "-m", "examples.look", "-", "--model_size", "tiny"]
    command += ["--html", str(page)]
    subprocess.run(command, cwd=ROOT, input=TEXT, text=True, check=True)
    with open_browser(folder) as browser:
        set_screen(browser, width=1280, height=2000)
        # "night" for the second time, which only the last layer finds.
        open_page(browser, page, "#9")
        height = browser.execute_script("return document.body.offsetHeight")
        set_screen(browser, width=1280, height=height)
        browser.save_screenshot(str(ROOT / "tests" / "look.png"))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
