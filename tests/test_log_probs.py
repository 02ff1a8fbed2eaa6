"""Log-probabilities against transformers (see make_reference.py) and a float64 loop."""

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, float64_gpt2, float64_softmax, random_params

import gpt2


def exact_log_probs(ids, params, n_head):
    """The documented method in float64: windows that move by n_ctx // 2 score each id once."""
    n_ctx = len(params["wpe"])
    size = n_ctx + 1
    if len(ids) > size:
        size = max(n_ctx, 2)
    scores = [None]
    for start in range(0, len(ids) - 1, max(1, n_ctx // 2)):
        window = ids[start : start + size]
        probs = float64_softmax(float64_gpt2(window[:-1], params, n_head))
        for i in range(len(scores), start + len(window)):
            scores.append(np.log(probs[i - start - 1, ids[i]]))
    return np.array(scores[1:])


def assert_log_probs(ids, params, n_head, exact):
    result = gpt2.log_probs(ids=ids, params=params, n_head=n_head)
    assert result.dtype == np.float32
    assert result.shape == (len(ids) - 1,)
    atol = 1e-4 * max(1, np.abs(exact).max(initial=0))
    np.testing.assert_allclose(result, exact, rtol=0, atol=atol)


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_log_probs_match_transformers(reference, name):
    params = random_params(REFERENCE_MODELS[name])
    n_head = REFERENCE_MODELS[name]["n_head"]
    ids = reference[f"{name}/ids"].tolist()
    ids.append(3)  # n_ctx + 1 ids, of which the last is not an input
    probs = float64_softmax(reference[f"{name}/logits"].astype(np.float64))
    exact = np.log(probs[np.arange(len(ids) - 1), ids[1:]])
    assert_log_probs(ids, params, n_head, exact)
    assert_log_probs(np.array(ids[:-1]), params, n_head, exact[:-1])
    long_ids = reference[f"{name}/long_ids"].tolist()
    assert len(long_ids) > 4 * len(params["wpe"])
    assert_log_probs(long_ids, params, n_head, reference[f"{name}/long_log_probs"])


@pytest.mark.parametrize("n_ctx", [1, 2, 3, 8, 9])
def test_every_length_matches_the_float64_loop(n_ctx):
    sizes = {"n_vocab": 50, "n_ctx": n_ctx, "n_embd": 12, "n_head": 3, "n_layer": 1}
    params = random_params(sizes, seed=n_ctx)
    text = np.random.default_rng(n_ctx).integers(0, 50, 3 * n_ctx + 4).tolist()
    around_one_window = range(n_ctx - 1, n_ctx + 5)
    around_several = range(2 * n_ctx - 2, 3 * n_ctx + 5)
    for n in {1, 2, 3, *around_one_window, *around_several} - {0}:
        assert_log_probs(text[:n], params, 3, exact_log_probs(text[:n], params, 3))


@pytest.mark.parametrize("n_ids", [431, 201])
def test_more_targets_than_a_block_of_rows(n_ids):
    params = random_params({"n_vocab": 50, "n_ctx": 200, "n_embd": 8, "n_head": 2, "n_layer": 2})
    ids = np.random.default_rng(0).integers(0, 50, n_ids).tolist()
    assert_log_probs(ids, params, 2, exact_log_probs(ids, params, 2))
