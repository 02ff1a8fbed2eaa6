"""Sampling against exact probabilities and transformers' warpers; several samples, streaming, log-probabilities."""

import math
from pathlib import Path

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, WARPS
from test_model import REFERENCE, nested

import gpt2

PARAMS, N_HEAD = nested(REFERENCE_MODELS["three_heads"]), 3
PROMPT = [5, 100, 7]
HOT = {"temperature": 1.5, "seed": 11}


@pytest.mark.parametrize(("i", "options"), list(enumerate(WARPS)))
def test_what_is_drawn_from_is_what_transformers_draws_from(i, options):
    probs = gpt2.token_probs(REFERENCE["warped/logits"][i], *options)
    expected = REFERENCE["warped/probs"][i]
    assert probs.dtype == np.float32
    np.testing.assert_array_equal(probs > 0, expected > 0)
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("options", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.7), (1.5, 6, 0.8)])
def test_draws_have_the_exact_probabilities(options):
    """Chi-squared over a vocabulary of eight, at a level that a right sampler misses once in a million runs."""
    temperature, top_k, top_p = options
    logits = np.array([1.0, 3.0, 2.0, -1.0, 2.5, 0.0, 2.2, -8.0], np.float32)
    weights = {id: math.exp(float(logit) / temperature) for id, logit in enumerate(logits)}
    ranked = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
    total, share, kept = sum(weights[id] for id in ranked), 0.0, []
    for id in ranked:
        if share < top_p:
            kept.append(id)
        share += weights[id] / total
    exact = {id: weights[id] / sum(weights[other] for other in kept) for id in kept}

    n, rng = 20_000, np.random.default_rng()
    counts = np.bincount([gpt2.sample(logits, rng, *options) for _ in range(n)], minlength=8)
    assert set(np.flatnonzero(counts)) <= set(kept)
    frequent = [id for id in kept if n * exact[id] >= 5]
    chi_squared = sum((counts[id] - n * exact[id]) ** 2 / (n * exact[id]) for id in frequent)
    freedom = len(frequent) - 1  # Wilson and Hilferty: its cube root is close to normal
    deviation = ((chi_squared / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert deviation < 4.8


LOGITS = np.array([1.0, 5.0, 5.0, -3.0, 0.0], np.float32)


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"temperature": 0}, {1}),
        ({"temperature": 1e-30}, {1, 2}),
        ({"temperature": 5e-324}, {1, 2}),
        ({"temperature": math.inf}, {0, 1, 2, 3, 4}),
        ({"temperature": math.inf, "top_k": 2}, {1, 2}),
        ({"temperature": 1e30, "top_k": 1}, {1, 2}),
        ({"top_p": 5e-324}, {1, 2}),
        ({"top_k": 3, "temperature": 1e6}, {0, 1, 2}),
        ({"top_k": 10**9, "temperature": 1e6}, {0, 1, 2, 3, 4}),
    ],
)
def test_ties_and_extremes_keep_at_least_one_token(options, possible):
    rng = np.random.default_rng(0)
    assert {gpt2.sample(LOGITS, rng, **options) for _ in range(300)} == possible


def test_huge_logits():
    logits = np.array([3e38, -3e38, 1.0], np.float32)
    with np.errstate(over="ignore"):
        assert gpt2.sample(logits, np.random.default_rng(0), 0.7) == 0


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.1, "0 or more"),
        ("temperature", math.nan, "0 or more"),
        ("top_k", -1, "0 or more"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 1.01, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("seed", -1, "0 or more"),
        ("n_samples", 0, "1 or more"),
    ],
)
def test_a_value_out_of_its_range_is_named_at_once(name, value, words):
    with pytest.raises(ValueError, match=f"^{name} is {value}, it must be {words}$"):
        gpt2.stream(PROMPT, PARAMS, N_HEAD, 0, **{name: value})


def test_sample_changes_nothing():
    before = LOGITS.copy()
    gpt2.sample(LOGITS, np.random.default_rng(0), 0.7, 3, 0.9)
    np.testing.assert_array_equal(LOGITS, before)


def test_the_same_seed_gives_the_same_ids_streamed_or_not():
    first = gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, **HOT)
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, **HOT) == first
    assert list(gpt2.stream(PROMPT, PARAMS, N_HEAD, 20, **HOT)) == first
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, **HOT | {"seed": 12}) != first
    unseeded = [tuple(gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, temperature=1.5)) for _ in range(3)]
    assert len(set(unseeded)) == 3


def test_samples_are_drawn_independently_from_the_right_distribution():
    """Of each sample's first and second token, over many samples at once: exact probabilities, no repetition."""
    samples = gpt2.generate(PROMPT, PARAMS, N_HEAD, 2, temperature=0.7, seed=3, n_samples=2000)
    probs = gpt2.token_probs(gpt2.gpt2(PROMPT, **PARAMS, n_head=N_HEAD)[-1], 0.7)
    counts = np.bincount([ids[0] for ids in samples], minlength=len(probs))
    likely = probs * 2000 >= 5
    deviations = (counts - 2000 * probs)[likely] / np.sqrt(2000 * probs * (1 - probs))[likely]
    assert np.abs(deviations).max() < 5
    for ids in samples[:5]:  # the second token comes from the context of the sample's own first
        after = gpt2.token_probs(gpt2.gpt2([*PROMPT, ids[0]], **PARAMS, n_head=N_HEAD)[-1], 0.7)
        assert after[ids[1]] > 1e-6
    assert len({tuple(ids) for ids in samples}) > 100


def test_several_greedy_samples_are_all_the_greedy_one():
    one = gpt2.generate(PROMPT, PARAMS, N_HEAD, 15)
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 15, n_samples=3) == [one] * 3
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 15, n_samples=1) == [one]
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 0, n_samples=2) == [[], []]


def test_each_sample_stops_for_itself():
    options = HOT | {"n_samples": 4}
    full = gpt2.generate(PROMPT, PARAMS, N_HEAD, 25, **options)
    stop_id = full[2][3]
    stopped = gpt2.generate(PROMPT, PARAMS, N_HEAD, 25, **options, stop_id=stop_id)
    assert stopped == [ids[: ids.index(stop_id)] if stop_id in ids else ids for ids in full]
    steps = list(gpt2.stream(PROMPT, PARAMS, N_HEAD, 25, **options, stop_id=stop_id))
    assert [[row[i] for row in steps if row[i] is not None] for i in range(4)] == stopped


def count_calls(monkeypatch):
    """A list that grows by one with each call of the model."""
    calls, function = [], gpt2.hidden_states
    monkeypatch.setattr(gpt2, "hidden_states", lambda *args, **kwargs: calls.append(1) or function(*args, **kwargs))
    return calls


def test_stopping_ends_the_work(monkeypatch):
    ids = gpt2.generate(PROMPT, PARAMS, N_HEAD, 10, **HOT)
    calls, hidden_states = [], gpt2.hidden_states
    monkeypatch.setattr(
        gpt2, "hidden_states", lambda *args, **kwargs: calls.append(1) or hidden_states(*args, **kwargs)
    )
    n = ids.index(ids[4])
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 10, **HOT, stop_id=ids[4]) == ids[:n]
    assert len(calls) == n + 1


def test_streaming_does_only_the_work_that_is_asked_for(monkeypatch):
    calls, hidden_states = [], gpt2.hidden_states
    monkeypatch.setattr(
        gpt2, "hidden_states", lambda *args, **kwargs: calls.append(1) or hidden_states(*args, **kwargs)
    )
    ids = gpt2.stream(PROMPT, PARAMS, N_HEAD, 20)
    assert calls == []
    for n in range(1, 4):
        next(ids)
        assert len(calls) == n


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_log_probs_are_those_of_transformers_logits(name):
    params, n_head = nested(REFERENCE_MODELS[name]), REFERENCE_MODELS[name]["n_head"]
    ids, logits = REFERENCE[f"{name}/ids"].tolist(), REFERENCE[f"{name}/logits"].astype(np.float64)
    exact = [logits[i, id] - np.log(np.exp(logits[i]).sum()) for i, id in enumerate(ids[1:])]
    result = gpt2.log_probs(ids, params, n_head)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, exact, atol=1e-4 * np.abs(logits).max())
    assert gpt2.log_probs(ids[:1], params, n_head).shape == (0,)
    one_more = gpt2.log_probs([*ids, 0], params, n_head)  # the last is no input
    np.testing.assert_allclose(one_more[:-1], result, atol=1e-5)
    with pytest.raises(ValueError, match="in all"):
        gpt2.log_probs([*ids, 0, 0], params, n_head)


def test_log_probs_of_a_long_text_in_parts():
    params = nested({"n_vocab": 50, "n_ctx": 200, "n_embd": 8, "n_head": 2, "n_layer": 2})
    ids = np.random.default_rng(0).integers(0, 50, 201).tolist()
    logits = gpt2.gpt2(ids[:-1], **params, n_head=2).astype(np.float64)
    exact = logits[np.arange(200), ids[1:]] - np.log(np.exp(logits).sum(-1))
    np.testing.assert_allclose(gpt2.log_probs(ids, params, 2), exact, atol=1e-4)


def test_the_reference_values_are_small():
    assert (Path(__file__).parent / "reference.npz").stat().st_size < 200_000
