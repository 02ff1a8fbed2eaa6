"""Sampling and generation against exact probabilities, transformers, and a loop without a cache."""

import itertools
import math

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, WARPS, float64_gpt2, random_params

import gpt2

PARAMS, N_HEAD = random_params(REFERENCE_MODELS["three_heads"]), 3
PROMPT = [5, 100, 7]
HOT = {"temperature": 1.5, "seed": 11}


# The choice of one token


@pytest.mark.parametrize(("i", "options"), list(enumerate(WARPS)))
def test_token_probs_match_transformers(reference, i, options):
    probs = gpt2.token_probs(reference["warped/logits"][i], *options)
    expected = reference["warped/probs"][i]
    assert probs.dtype == np.float32
    np.testing.assert_array_equal(probs > 0, expected > 0)
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-7)


def standard_deviations(chi_squared, freedom):
    """How many standard deviations chi_squared is above its mean (Wilson & Hilferty: its cube root is near normal)."""
    variance = 2 / (9 * freedom)
    return ((chi_squared / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)


@pytest.mark.parametrize(
    "options", [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 4, 1.0), (1.0, 0, 0.7), (1.5, 6, 0.8)]
)
def test_samples_have_the_exact_probabilities(options):
    """Chi-squared test over a vocabulary of eight. A correct sampler fails it once in a million runs."""
    temperature, top_k, top_p = options
    logits = np.array([1.0, 3.0, 2.0, -1.0, 2.5, 0.0, 2.2, -8.0], np.float32)
    weights = {i: math.exp(float(logit) / temperature) for i, logit in enumerate(logits)}
    ranked = sorted(weights, key=weights.get, reverse=True)[: top_k or None]
    total, share, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if share < top_p:
            kept.append(i)
        share += weights[i] / total
    exact = {i: weights[i] / sum(weights[other] for other in kept) for i in kept}

    n, rng = 20_000, np.random.default_rng()
    counts = np.bincount([gpt2.sample(logits, rng, *options) for _ in range(n)], minlength=8)
    assert set(np.flatnonzero(counts)) <= set(kept)
    frequent = [i for i in kept if n * exact[i] >= 5]
    chi_squared = sum((counts[i] - n * exact[i]) ** 2 / (n * exact[i]) for i in frequent)
    assert standard_deviations(chi_squared, len(frequent) - 1) < 4.8


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
def test_ties_and_extreme_options_keep_the_likeliest_tokens(options, possible):
    rng = np.random.default_rng(0)
    assert {gpt2.sample(LOGITS, rng, **options) for _ in range(300)} == possible


def test_huge_logits():
    logits = np.array([3e38, -3e38, 1.0], np.float32)
    with np.errstate(over="ignore"):
        assert gpt2.sample(logits, np.random.default_rng(0), 0.7) == 0


def test_sample_does_not_modify_its_logits():
    before = LOGITS.copy()
    gpt2.sample(LOGITS, np.random.default_rng(0), 0.7, 3, 0.9)
    np.testing.assert_array_equal(LOGITS, before)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", -0.1, "a number, 0 or more"),
        ("temperature", math.nan, "a number, 0 or more"),
        ("top_k", -1, "a whole number, 0 or more"),
        ("top_p", 0, "above 0 and at most 1"),
        ("top_p", 2.0, "above 0 and at most 1"),
        ("top_p", math.nan, "above 0 and at most 1"),
        ("seed", -1, "a whole number, 0 or more"),
        ("n_samples", 0, "a whole number from 1 to 100000"),
        ("n_tokens_to_generate", -1, "a whole number, 0 or more"),
    ],
)
def test_options_out_of_range_raise_at_once(name, value, words):
    options = {"n_tokens_to_generate": 0} | {name: value}
    for function in gpt2.stream, gpt2.generate:
        with pytest.raises(ValueError, match=f"^{name} must be {words}, got {value}$"):
            function(PROMPT, PARAMS, N_HEAD, **options)


# Generation


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_greedy_ids_match_transformers(reference, name):
    params, n_head = random_params(REFERENCE_MODELS[name]), REFERENCE_MODELS[name]["n_head"]
    prompt, greedy = reference[f"{name}/ids"][:5], reference[f"{name}/greedy"].tolist()
    ids = prompt.tolist()
    assert gpt2.generate(ids, params, n_head, len(greedy)) == greedy
    assert ids == prompt.tolist()
    assert gpt2.generate(ids, params, n_head, 0) == []
    from_array = gpt2.generate(prompt, params, n_head, 3)
    assert from_array == greedy[:3]
    assert {type(i) for i in from_array} == {int}


def loop(prompt, params, n_head, n, rng, stop_id=None, **options):
    """The documented rule of generation: the float64 model on the whole window for each token, without a cache."""
    n_ctx = len(params["wpe"])
    window, new_ids = list(prompt)[-n_ctx:], []
    for _ in range(n):
        new_id = gpt2.sample(
            float64_gpt2(window, params, n_head)[-1], rng, **{"temperature": 0} | options
        )
        if new_id == stop_id:
            break
        new_ids.append(new_id)
        window.append(new_id)
        if len(window) > n_ctx:
            window = window[-max(1, n_ctx // 2) :]
    return new_ids


@pytest.mark.parametrize("n_prompt", [1, 7, 8, 9, 30])
@pytest.mark.parametrize("n_ctx", [1, 2, 7, 8])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 1.2}, {"temperature": 0.9, "top_k": 20, "top_p": 0.9}],
    ids=["greedy", "sampled", "top_k and top_p"],
)
def test_generation_beyond_the_context_follows_the_documented_rule(n_ctx, n_prompt, options):
    params = random_params(
        {"n_vocab": 50, "n_ctx": n_ctx, "n_embd": 12, "n_head": 3, "n_layer": 2}, seed=n_ctx
    )
    prompt, n = np.random.default_rng(n_prompt).integers(0, 50, n_prompt).tolist(), 30
    rngs = [np.random.default_rng(seed) for seed in np.random.SeedSequence(4).spawn(3)]
    expected = [loop(prompt, params, 3, n, rng, **options) for rng in rngs]
    seed = {"seed": 4} if options else {}
    assert gpt2.generate(prompt, params, 3, n, **options, **seed) == expected[0]
    assert gpt2.generate(prompt, params, 3, n, **options, **seed, n_samples=3) == expected
    stop_id = expected[0][n // 2]
    stopped = [ids[: ids.index(stop_id)] if stop_id in ids else ids for ids in expected]
    assert (
        gpt2.generate(prompt, params, 3, n, **options, **seed, n_samples=3, stop_id=stop_id)
        == stopped
    )


def test_memory_does_not_grow_beyond_the_context(monkeypatch):
    """Every call of the model gets at most n_ctx tokens, and the cache never has more places."""
    calls = count_calls(monkeypatch)
    params = random_params(REFERENCE_MODELS["one_layer"])  # n_ctx is 16
    gpt2.generate(list(range(40)), params, 1, 100)
    assert max(n_seq for n_seq, _ in calls) == 16
    assert {n_max for _, n_max in calls} == {16}
    assert [n_seq for n_seq, _ in calls[:12]] == [16, 8, *[1] * 8, 8, 1]


def test_same_seed_gives_same_ids():
    first = gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, **HOT)
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, **HOT) == first
    assert list(gpt2.stream(PROMPT, PARAMS, N_HEAD, 20, **HOT)) == first
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, **HOT | {"seed": 12}) != first
    unseeded = [tuple(gpt2.generate(PROMPT, PARAMS, N_HEAD, 20, temperature=1.5)) for _ in range(3)]
    assert len(set(unseeded)) == 3


def test_samples_are_independent_and_have_the_exact_probabilities():
    """The first and second token of each of 2000 samples."""
    samples = gpt2.generate(PROMPT, PARAMS, N_HEAD, 2, temperature=0.7, seed=3, n_samples=2000)
    probs = float64_softmax_at(PROMPT, 0.7)
    counts = np.bincount([ids[0] for ids in samples], minlength=len(probs))
    likely = probs * 2000 >= 5
    deviations = (counts - 2000 * probs)[likely] / np.sqrt(2000 * probs * (1 - probs))[likely]
    assert np.abs(deviations).max() < 5
    for ids in samples[:5]:  # the second token follows the sample's own first token
        assert float64_softmax_at([*PROMPT, ids[0]], 0.7)[ids[1]] > 1e-6
    assert len({tuple(ids) for ids in samples}) > 100


def float64_softmax_at(ids, temperature):
    """The exact probabilities of the token after ids."""
    weights = np.exp(float64_gpt2(ids, PARAMS, N_HEAD)[-1] / temperature)
    return weights / weights.sum()


def test_greedy_samples_are_all_equal():
    one = gpt2.generate(PROMPT, PARAMS, N_HEAD, 15)
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 15, n_samples=3) == [one] * 3
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 15, n_samples=1) == [one]
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 0, n_samples=2) == [[], []]


def test_streams_do_not_affect_each_other():
    one = gpt2.generate(PROMPT, PARAMS, N_HEAD, 10)
    streams = [gpt2.stream(PROMPT, PARAMS, N_HEAD, 10, n_samples=n) for n in (None, None, 2)]
    for expected, first, second, pair in zip(one, *streams, strict=True):
        assert [first, second, *pair] == [expected] * 4


def test_each_sample_stops_on_its_own():
    options = HOT | {"n_samples": 4}
    full = gpt2.generate(PROMPT, PARAMS, N_HEAD, 25, **options)
    stop_id = full[2][3]
    stopped = [ids[: ids.index(stop_id)] if stop_id in ids else ids for ids in full]
    assert len({len(ids) for ids in stopped}) > 1
    steps = list(gpt2.stream(PROMPT, PARAMS, N_HEAD, 25, **options, stop_id=stop_id))
    assert [[row[i] for row in steps if row[i] is not None] for i in range(4)] == stopped
    for row, later in itertools.pairwise(steps):  # a sample does not continue after its end
        assert all(
            after is None for before, after in zip(row, later, strict=True) if before is None
        )


def count_calls(monkeypatch):
    """A list that grows by (n_seq, n_max of the cache) with each call of the model."""
    calls, model = [], gpt2.gpt2

    def counted(inputs, *args, cache, **kwargs):
        calls.append((np.shape(inputs)[-1], cache.kv.shape[-2]))
        return model(inputs, *args, cache=cache, **kwargs)

    monkeypatch.setattr(gpt2, "gpt2", counted)
    return calls


def test_no_work_after_the_stop_id(monkeypatch):
    ids = gpt2.generate(PROMPT, PARAMS, N_HEAD, 10, **HOT)
    calls, n = count_calls(monkeypatch), ids.index(ids[4])
    assert gpt2.generate(PROMPT, PARAMS, N_HEAD, 10, **HOT, stop_id=ids[4]) == ids[:n]
    assert len(calls) == n + 1


def test_streaming_does_only_the_work_that_is_asked_for(monkeypatch):
    calls = count_calls(monkeypatch)
    ids = gpt2.stream(PROMPT, PARAMS, N_HEAD, 20)
    assert calls == []
    for n in range(1, 4):
        next(ids)
        assert [n_seq for n_seq, _ in calls] == [3, 1, 1][:n]
