"""OpenAI's weights, if they are in models/, against the results that others have published.

    python -m pytest -m real tests/test_real_weights.py

data/published.json holds the results and their sources. Each is checked with OpenAI's checkpoint
(models/124M) and with the Hub's folder (models/openai-community/gpt2), or skipped where a folder is
missing. Nothing is downloaded, and the command needs only pytest and the library's own packages.
The tests at the end check the checks, with a small random model. They are always run.
"""

import functools
import json
import math
import shutil

import numpy as np
import pytest
from helpers import (
    DATA_DIR,
    REAL_MODELS_DIR,
    copy_model,
    float64_gpt2,
    random_params,
    tiktoken_encoding,
)

import gpt2
import utils
from encoder import get_encoder

PUBLISHED = json.loads((DATA_DIR / "published.json").read_text(encoding="utf-8"))
ANSWERS = [
    (case["model"], case["input"], case["n_tokens"], case["output"]) for case in PUBLISHED["greedy"]
]
CASES = [(kind, case) for kind, cases in PUBLISHED.items() for case in cases]

# The absolute differences that are allowed. The logits of GPT-2 are near -100, where float32 has
# steps of 8e-6. Two programs add up in different orders: their logits differ by a few 1e-4, and the
# logarithms of their probabilities by less than 1e-3. The published logits have four decimals, and
# their own test allows 1e-4 of each one, which is 3e-3 to 9e-3.
TOLERANCE = {"nats": 1e-3, "bits": 1.5e-3, "logits": 5e-3}


@functools.cache
def load(folder):
    """Load a model by its path. Only names are downloaded."""
    return utils.load_encoder_hparams_and_params(str(folder), "")


def real_model(name):
    """Return the model in models/name. Skip the test if it is not there, or not yet complete."""
    folder = REAL_MODELS_DIR / name
    last_file = "config.json" if "/" in name else "vocab.bpe"
    if not (folder / last_file).exists():
        command = f'python gpt2.py "" --model_size {name}'
        pytest.skip(f"models/{name} is missing; this command downloads it: {command}")
    return load(folder)


def check_greedy(model, case):
    """The most likely tokens after the input, as text. An empty input means <|endoftext|>."""
    pieces = gpt2.continuation(case["input"], model, case["n_tokens"])
    assert "".join(pieces) == case["output"], case["source"]


def check_surprisal(model, case):
    """-log p of each token, or the mean. If "start" is true, <|endoftext|> precedes the input."""
    encoder, hparams, params = model
    ids = encoder.encode(case["input"])
    if case["start"]:
        ids = [encoder.start_id, *ids]
    values = -gpt2.log_probs(ids, params, hparams["n_head"])
    if case["unit"] == "bits":
        values = values / math.log(2)
    if case["is_mean"]:
        values = values.mean()
    assert_near(values, case)


def check_logits(model, case):
    """Ten logits in each of four places.

    They are the first ones at the first token and the last ones at the last token, then the first
    and the last ones at the most likely next token.
    """
    encoder, hparams, params = model
    cache = gpt2.KVCache(params, hparams["n_head"])
    options = {"n_head": hparams["n_head"], "cache": cache}
    logits = gpt2.gpt2(encoder.encode(case["input"]), **params, **options)
    next_logits = gpt2.gpt2([logits[-1].argmax()], **params, **options)[0]
    values = [
        *logits[0, :10],
        *logits[-1, -10:],
        *next_logits[:10],
        *next_logits[-10:],
    ]
    assert_near(values, case)


def assert_near(values, case):
    atol = TOLERANCE[case["unit"]]
    np.testing.assert_allclose(values, case["values"], rtol=0, atol=atol, err_msg=case["source"])


CHECKS = {"greedy": check_greedy, "surprisal": check_surprisal, "logits": check_logits}


@pytest.mark.real
@pytest.mark.parametrize(("kind", "case"), CASES)
@pytest.mark.parametrize("source", ["OpenAI", "Hub"])
def test_published_result(source, kind, case):
    name = case["model"]
    if source == "Hub":
        name = utils.MODEL_SIZES[name]
    check = CHECKS[kind]
    check(real_model(name), case)


# Do the checks accept right results and refuse wrong ones? A small random model stands in for the
# real ones, and results that a float64 model computes for it stand in for the published ones.


@pytest.fixture(scope="module")
def tokens(real_vocabulary):
    return tiktoken_encoding(*real_vocabulary)


@pytest.fixture(scope="module")
def random_model(real_vocabulary):
    """(encoder, hparams, params) with GPT-2's vocabulary."""
    models_dir, name = real_vocabulary
    hparams = {"n_vocab": 50257, "n_ctx": 128, "n_embd": 8, "n_head": 2, "n_layer": 2}
    params = random_params(hparams)
    params["ln_f"]["g"] *= 6  # as with real weights, few tokens are likely
    return get_encoder(name, models_dir), hparams, params


def made_up(kind, case, model, tokens):
    """The case with right results for the random model. One token is enough as an output."""
    _, hparams, params = model
    ids = [tokens.eot_token] if case["start"] else []
    ids += tokens.encode_ordinary(case["input"])
    logits = float64_gpt2(ids, params, hparams["n_head"])
    likeliest = int(logits[-1].argmax())
    if kind == "greedy":
        return case | {"n_tokens": 1, "output": tokens.decode([likeliest])}
    if kind == "logits":
        longer = float64_gpt2([*ids, likeliest], params, hparams["n_head"])
        values = [
            *longer[0, :10],
            *longer[-2, -10:],
            *longer[-1, :10],
            *longer[-1, -10:],
        ]
        return case | {"values": values}
    probs = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    probs = probs[np.arange(len(ids) - 1), ids[1:]]
    values = -np.log2(probs) if case["unit"] == "bits" else -np.log(probs)
    return case | {"values": [values.mean()] if case["is_mean"] else list(values)}


def wrong_changes(kind, case):
    """Changes that make a right case wrong."""
    if kind == "greedy":
        return [{"output": case["output"] + "."}, {"n_tokens": 2}]
    *others, last = case["values"]
    changes = [{"values": [*others, last + 2 * TOLERANCE[case["unit"]]]}]
    if kind == "surprisal":
        other_unit = "nats" if case["unit"] == "bits" else "bits"
        changes += [{"unit": other_unit}, {"start": not case["start"]}]
    return changes


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_right_results_pass_and_wrong_ones_fail(kind, case, random_model, tokens):
    check = CHECKS[kind]
    right = made_up(kind, case, random_model, tokens)
    check(random_model, right)
    for change in [case, *wrong_changes(kind, right)]:
        with pytest.raises(AssertionError):
            check(random_model, right | change)


def test_as_many_results_as_tokens(tokens):
    """Mistakes in copying the results would often change the number of tokens."""

    def count(text):
        return len(tokens.encode_ordinary(text))

    for _, prompt, n_tokens, answer in ANSWERS:
        assert count(prompt + answer) == count(prompt) + n_tokens
    for case in PUBLISHED["surprisal"]:
        assert case["is_mean"] or count(case["input"]) == 1 + len(case["values"])


def test_a_model_is_loaded_or_its_test_skipped(tmp_path, monkeypatch):
    copy_model(REAL_MODELS_DIR / "tiny", tmp_path / "124M")
    whole = DATA_DIR / "hugging_face" / "whole"
    shutil.copytree(whole, tmp_path / "openai-community" / "gpt2")
    monkeypatch.setattr("test_real_weights.REAL_MODELS_DIR", tmp_path)
    assert real_model("124M")[1]["n_vocab"] == 1024
    assert real_model("openai-community/gpt2")[1]["n_vocab"] == 280
    with pytest.raises(pytest.skip.Exception, match="models/355M is missing; .* --model_size 355M"):
        real_model("355M")
