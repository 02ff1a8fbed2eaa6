"""Known answers of OpenAI's weights. Each test is skipped if its model is not in models/."""

import pytest
from helpers import REAL_MODELS_DIR

import gpt2

ANSWERS = [
    (
        "124M",
        "Alan Turing theorized that computers would one day become",
        40,
        " the most powerful machines on the planet.\n\nThe computer is a machine that can perform "
        "complex calculations, and it can perform these calculations in a way that is very similar "
        "to the human brain.\n",
    ),
    (
        "124M",
        "Every effort moves you",
        15,
        " forward.\n\nThe first step is to understand the importance of your work",
    ),
    (
        "355M",
        "What is the answer to life, the universe, and everything?",
        10,
        "\n\nThe answer is that we are all one",
    ),
    ("1558M", "Transformers are the", 8, " most popular toy line in the world,"),
]


@pytest.mark.real
@pytest.mark.parametrize(("model_size", "prompt", "n", "answer"), ANSWERS)
def test_known_answers(model_size, prompt, n, answer):
    if not (REAL_MODELS_DIR / model_size / "model.ckpt.index").exists():
        pytest.skip(f"needs OpenAI's {model_size} in models/{model_size}")
    assert gpt2.main(prompt, n, model_size, str(REAL_MODELS_DIR)) == answer
