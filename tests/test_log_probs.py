"""Log-probabilities against transformers (see make_reference.py) and a float64 loop over windows."""

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, float64_gpt2, random_params

import gpt2


def exact_log_probs(ids, params, n_head):
    """The documented method in float64: windows of n_ctx ids, moved by n_ctx // 2, that score each id once."""
    n_ctx = len(params["wpe"])
    size, scores = (max(n_ctx, 2) if len(ids) > n_ctx + 1 else n_ctx + 1), [None]
    for start in range(0, len(ids), max(1, n_ctx // 2)):
        window = ids[start : start + size]
        logits = float64_gpt2(window[:-1], params, n_head) if window[1:] else []
        for i, row in enumerate(logits, start + 1):  # row predicts ids[i]
            if i == len(scores):
                scores.append(row[ids[i]] - np.log(np.exp(row).sum()))
    return np.array(scores[1:])


def assert_log_probs(ids, params, n_head, exact):
    result = gpt2.log_probs(ids, params, n_head)
    assert result.dtype == np.float32
    assert result.shape == (len(ids) - 1,)
    np.testing.assert_allclose(
        result, exact, rtol=0, atol=1e-4 * max(1, np.abs(exact).max(initial=0))
    )


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_one_window_matches_transformers_logits(reference, name):
    params, n_head = random_params(REFERENCE_MODELS[name]), REFERENCE_MODELS[name]["n_head"]
    ids, logits = reference[f"{name}/ids"].tolist(), reference[f"{name}/logits"].astype(np.float64)
    exact = logits[np.arange(len(ids)), [*ids[1:], 3]] - np.log(np.exp(logits).sum(-1))
    assert_log_probs(
        [*ids, 3], params, n_head, exact
    )  # n_ctx + 1 ids, of which the last is not an input
    assert_log_probs(ids[:1], params, n_head, exact[:0])
    assert_log_probs(np.array(ids), params, n_head, exact[:-1])


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_long_texts_match_transformers(reference, name):
    params, n_head = random_params(REFERENCE_MODELS[name]), REFERENCE_MODELS[name]["n_head"]
    ids = reference[f"{name}/long_ids"].tolist()
    assert len(ids) > 4 * REFERENCE_MODELS[name]["n_ctx"]
    assert_log_probs(ids, params, n_head, reference[f"{name}/long_log_probs"])


@pytest.mark.parametrize("n_ctx", [1, 2, 3, 8, 9, 40])
def test_every_length_matches_the_float64_loop(n_ctx):
    params = random_params(
        {"n_vocab": 50, "n_ctx": n_ctx, "n_embd": 12, "n_head": 3, "n_layer": 1}, seed=n_ctx
    )
    text = np.random.default_rng(n_ctx).integers(0, 50, 3 * n_ctx + 4).tolist()
    for n in {
        1,
        2,
        3,
        *range(max(1, n_ctx - 1), n_ctx + 5),
        *range(2 * n_ctx - 2, 3 * n_ctx + 5),
    } - {0}:
        assert_log_probs(text[:n], params, 3, exact_log_probs(text[:n], params, 3))


def test_more_targets_than_a_block_of_rows():
    params = random_params({"n_vocab": 50, "n_ctx": 200, "n_embd": 8, "n_head": 2, "n_layer": 2})
    ids = np.random.default_rng(0).integers(0, 50, 431).tolist()
    assert_log_probs(ids, params, 2, exact_log_probs(ids, params, 2))
    assert_log_probs(ids[:201], params, 2, exact_log_probs(ids[:201], params, 2))
