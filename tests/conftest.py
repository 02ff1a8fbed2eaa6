import signal
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    DATA_DIR,
    REAL_MODELS_DIR,
    copy_model,
    gpt2_merges,
    load,
    write_model,
    write_vocabulary,
)

# A shell ignores Ctrl-C in what it runs in the background, and child processes inherit that. They
# do not inherit a handler, so with one here Ctrl-C works in the processes that the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def real_vocabulary(tmp_path_factory):
    """(models_dir, model_name) of a folder with GPT-2's two vocabulary files, as published.

    test_download.py checks their SHA-256.
    """
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder / "gpt2", gpt2_merges())
    return str(folder), "gpt2"


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The folder of a small random model in OpenAI's layout. Tests must not write to it."""
    return write_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory):
    """A folder with a copy of the tiny model, so that no record is left in the repository."""
    folder = tmp_path_factory.mktemp("models")
    copy_model(REAL_MODELS_DIR / "tiny", folder / "tiny")
    return str(folder)


@pytest.fixture(scope="session")
def tiny(models_dir):
    """(encoder, hparams, params) of the tiny model."""
    return load(Path(models_dir, "tiny"))


@pytest.fixture(scope="session")
def reference():
    """{name: array}: the results of transformers that make_reference.py stored."""
    with np.load(DATA_DIR / "reference.npz") as arrays:
        return dict(arrays)
