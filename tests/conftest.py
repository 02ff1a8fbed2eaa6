import os

import pytest
from helpers import REAL_MODELS_DIR, SHARED, write_model


@pytest.fixture(scope="session")
def real_vocabulary():
    """(models_dir, model_name) of a folder with GPT-2's real encoder.json and vocab.bpe."""
    for models_dir, name in ((SHARED, "gpt2-vocab"), (REAL_MODELS_DIR, "124M")):
        if models_dir and os.path.isfile(os.path.join(models_dir, name, "vocab.bpe")):
            return str(models_dir), name
    pytest.skip("needs GPT-2's vocabulary: models/124M, or gpt2-vocab/ in the folder that NPGPT_SHARED names")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """The folder of a small random model in OpenAI's layout, not to be written to."""
    return write_model(tmp_path_factory.mktemp("models") / "small")
