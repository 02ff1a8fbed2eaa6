"""Sampling and generation against exact probabilities, transformers, and a loop without a cache."""

import itertools
import math

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, WARPS, float64_gpt2, float64_softmax, random_params

import gpt2

PARAMS = random_params(REFERENCE_MODELS["three_heads"])
N_HEAD = 3
PROMPT = [5, 100, 7]
WARM = {"temperature": 0.9, "top_k": 20, "top_p": 0.9}
HOT = {"temperature": 1.5, "seed": 11}


def generate(n, **options):
    return gpt2.generate(PROMPT, PARAMS, N_HEAD, n, **options)


def stream(n, **options):
    return gpt2.stream(PROMPT, PARAMS, N_HEAD, n, **options)


# The choice of one token


@pytest.mark.parametrize("i", range(len(WARPS)))
def test_token_probs_match_transformers(reference, i):
    probs = gpt2.token_probs(reference["warped/logits"][i], *WARPS[i])
    expected = reference["warped/probs"][i]
    assert probs.dtype == np.float32
    np.testing.assert_array_equal(probs > 0, expected > 0)
    np.testing.assert_allclose(probs, expected, rtol=1e-4, atol=1e-7)


def standard_deviations(counts, probs):
    """How many standard deviations the chi-squared statistic of counts is above its mean.

    Wilson & Hilferty: its cube root is near normal. Only frequent values count.
    """
    expected = probs * counts.sum()
    frequent = expected >= 5
    deviations = (counts - expected)[frequent]
    chi_squared = (deviations**2 / expected[frequent]).sum()
    freedom = frequent.sum() - 1
    variance = 2 / (9 * freedom)
    return ((chi_squared / freedom) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)


@pytest.mark.parametrize("i", [1, 2, 6, 9, 13, 16])  # temperature, top_k, top_p, all of them
def test_samples_have_the_exact_probabilities(reference, i):
    """Chi-squared test. A correct sampler fails it with one seed in a million."""
    logits = reference["warped/logits"][i]
    exact = reference["warped/probs"][i]
    rng = np.random.default_rng(0)
    drawn = [gpt2.sample(logits, rng, *WARPS[i]) for _ in range(2000)]
    counts = np.bincount(drawn, minlength=len(exact))
    assert not counts[exact == 0].any()
    assert standard_deviations(counts, exact) < 4.8


LOGITS = np.array([1.0, 5.0, 5.0, -3.0, 0.0], np.float32)
LOGITS.flags.writeable = False
ALL = set(range(5))


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({"temperature": 0}, {1}),
        ({"temperature": 5e-324}, {1, 2}),
        ({"temperature": math.inf}, ALL),
        ({"temperature": math.inf, "top_k": 2}, {1, 2}),
        ({"top_p": 5e-324}, {1, 2}),
        ({"top_p": 1 - 1e-9, "temperature": 3}, ALL),
    ],
)
def test_ties_and_extreme_options_keep_the_likeliest_tokens(options, possible):
    rng = np.random.default_rng(0)
    assert {gpt2.sample(LOGITS, rng, **options) for _ in range(300)} == possible


# Generation


@pytest.mark.parametrize("name", REFERENCE_MODELS)
def test_greedy_samples_match_transformers(reference, name):
    """test_model.py compares the ids without samples."""
    params = random_params(REFERENCE_MODELS[name])
    n_head = REFERENCE_MODELS[name]["n_head"]
    prompt = reference[f"{name}/ids"][:5]
    greedy = reference[f"{name}/greedy"].tolist()
    for n in 0, len(greedy):
        samples = gpt2.generate(prompt, params, n_head, n, n_samples=3)
        assert samples == [greedy[:n]] * 3
        assert {type(i) for i in samples[0]} <= {int}


def loop(prompt, params, n, rng, options):
    """The documented rule: for each token, the float64 model on the whole window, no cache."""
    n_ctx = len(params["wpe"])
    window = prompt[-n_ctx:]
    new_ids = []
    for _ in range(n):
        logits = float64_gpt2(window, params, N_HEAD)[-1]
        new_id = gpt2.sample(logits, rng, **{"temperature": 0, **options})
        new_ids.append(new_id)
        window = [*window, new_id]
        if len(window) > n_ctx:
            window = window[-max(1, n_ctx // 2) :]
    return new_ids


def samples_of_loop(prompt, params, n, n_samples, seed, **options):
    rngs = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(n_samples))
    return [loop(prompt, params, n, rng, options) for rng in rngs]


def until(stop_id, ids):
    return ids[: ids.index(stop_id)] if stop_id in ids else ids


@pytest.mark.parametrize(
    ("n_ctx", "n_prompt"),
    [
        (1, 1),
        (1, 9),
        (2, 3),
        (7, 6),
        (7, 7),
        (8, 8),
        (8, 30),
    ],
)
@pytest.mark.parametrize("options", [{}, WARM], ids=str)
def test_generation_beyond_the_context_follows_the_documented_rule(n_ctx, n_prompt, options):
    hparams = REFERENCE_MODELS["three_heads"] | {"n_vocab": 50, "n_ctx": n_ctx}
    params = random_params(hparams, seed=n_ctx)
    prompt = np.random.default_rng(n_prompt).integers(0, 50, n_prompt).tolist()
    before = list(prompt)
    options = {"seed": 4, **options}
    expected = samples_of_loop(prompt, params, 20, 3, **options)
    assert gpt2.generate(prompt, params, N_HEAD, 20, **options) == expected[0]
    assert gpt2.generate(prompt, params, N_HEAD, 20, **options, n_samples=3) == expected
    assert prompt == before


def test_same_seed_gives_same_ids():
    first = generate(20, **HOT)
    assert generate(20, **HOT) == first
    assert generate(20, **HOT | {"seed": 12}) != first
    unseeded = {tuple(generate(20, temperature=1.5)) for _ in range(3)}
    assert len(unseeded) == 3


def test_first_tokens_of_samples_have_the_exact_probabilities():
    samples = generate(2, temperature=0.7, seed=3, n_samples=1000)
    probs = float64_softmax(float64_gpt2(PROMPT, PARAMS, N_HEAD)[-1] / 0.7)
    counts = np.bincount([ids[0] for ids in samples], minlength=len(probs))
    assert standard_deviations(counts, probs) < 4.8
    assert len(set(map(tuple, samples))) > 100


def test_streams_do_not_affect_each_other():
    greedy = loop(PROMPT, PARAMS, 10, None, {})
    streams = [stream(10), stream(10), stream(10, n_samples=2)]
    steps = list(zip(*streams, strict=True))
    assert steps == [(new_id, new_id, [new_id, new_id]) for new_id in greedy]


def test_each_sample_stops_on_its_own():
    full = samples_of_loop(PROMPT, PARAMS, 25, 4, **HOT)
    stop_id = full[2][3]
    stopped = [until(stop_id, ids) for ids in full]
    assert len(set(map(len, stopped))) > 1
    steps = stream(25, **HOT, n_samples=4, stop_id=stop_id)
    assert list(map(tuple, steps)) == list(itertools.zip_longest(*stopped))


# The work that is done


@pytest.fixture
def calls(monkeypatch):
    """A list that grows by (n_seq, n_max of the cache) with each call of the model."""
    calls = []
    model = gpt2.gpt2

    def counted(inputs, *args, cache, **kwargs):
        calls.append((np.shape(inputs)[-1], cache.kv.shape[-2]))
        return model(inputs, *args, cache=cache, **kwargs)

    monkeypatch.setattr(gpt2, "gpt2", counted)
    return calls


def test_memory_does_not_grow_beyond_the_context(calls):
    """Every call of the model gets at most n_ctx tokens, and the cache never has more places."""
    params = random_params(REFERENCE_MODELS["one_layer"])  # n_ctx is 16
    gpt2.generate(list(range(40)), params, 1, 20)
    assert {n_max for _, n_max in calls} == {16}
    half = [8] + [1] * 8  # half of the context again, then single tokens
    assert [n_seq for n_seq, _ in calls] == [16, *half, *half, 8]


def test_the_model_does_only_the_work_that_is_asked_for(calls):
    ids = stream(20, **HOT)
    assert calls == []
    new_ids = [next(ids) for _ in range(5)]
    assert [n_seq for n_seq, _ in calls] == [3, 1, 1, 1, 1]
    before = until(new_ids[4], new_ids)
    calls.clear()
    assert generate(20, **HOT, stop_id=new_ids[4]) == before
    assert len(calls) == len(before) + 1
