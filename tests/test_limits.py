"""Arguments at their limits give the right result or one clear error, and leave no trace."""

import inspect
import itertools
import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, assert_close, float64_softmax, random_params

import gpt2

HPARAMS = REFERENCE_MODELS["eleven_layers"]
PARAMS = random_params(HPARAMS)
N_HEAD = HPARAMS["n_head"]
N_VOCAB = HPARAMS["n_vocab"]
PROMPT = [5, 49, 7]
INTEGERS = [np.dtype(f"{kind}{size}") for kind in "iu" for size in (1, 2, 4, 8)]
NO = -math.inf


@pytest.fixture(scope="module")
def ids(reference):
    return reference["eleven_layers/ids"].tolist()


@pytest.fixture(scope="module")
def greedy(reference):
    """The tokens that transformers generates after ids[:5]."""
    return reference["eleven_layers/greedy"].tolist()


def generate(prompt=PROMPT, n_tokens_to_generate=3, *, n_head=N_HEAD, **options):
    return gpt2.generate(prompt, PARAMS, n_head, n_tokens_to_generate, **options)


def stream(prompt=PROMPT, n_tokens_to_generate=3, *, n_head=N_HEAD, **options):
    return gpt2.stream(prompt, PARAMS, n_head, n_tokens_to_generate, **options)


def log_probs(ids=PROMPT, n_head=N_HEAD):
    return gpt2.log_probs(ids, PARAMS, n_head)


def model(inputs=PROMPT, **options):
    return gpt2.gpt2(inputs, **{**PARAMS, "n_head": N_HEAD, **options})


CALLS = [model, generate, stream, log_probs]


def result_or_error(function):
    """(what the function returns, ""), or (None, what its error says)."""
    try:
        return function(), ""
    except (ValueError, TypeError) as error:
        return None, str(error)


# Options of generate and stream


@pytest.mark.parametrize(
    "function", [gpt2.generate, gpt2.stream, gpt2.main, gpt2.token_probs, gpt2.sample]
)
def test_the_signature_shows_the_options(function):
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if function in (gpt2.generate, gpt2.stream):
        defaults |= {"temperature": 0.0, "seed": None, "n_samples": None, "stop_id": None}
    if function is gpt2.main:
        defaults |= {"temperature": 0.0, "seed": None, "n_samples": 1, "stop": None}
        defaults["special_tokens"] = False
    parameters = inspect.signature(function).parameters
    assert {
        name: parameters[name].default for name in list(parameters)[-len(defaults) :]
    } == defaults
    with pytest.raises(TypeError, match="temprature") as error:
        function(PROMPT, PARAMS, N_HEAD, 1, temprature=1)
    if function in (gpt2.generate, gpt2.stream):
        assert all(name in str(error.value) for name in defaults)


DRAWN = {"temperature": 1.5, "seed": 2}
WHOLE_NUMBERS = ["n_tokens_to_generate", "top_k", "seed", "n_samples"]


@pytest.mark.parametrize("name", [*WHOLE_NUMBERS, "temperature", "top_p"])
def test_numbers_of_any_type(name):
    """Those of usual types have their value; unusual ones have it, too, or are refused."""
    number = 2 if name in WHOLE_NUMBERS else 0.5
    types = [np.float16, np.float32, np.float64]
    if name in WHOLE_NUMBERS:
        types = [float, *(dtype.type for dtype in INTEGERS)]
    expected = generate(**DRAWN | {name: number})
    for kind in types:
        assert generate(**DRAWN | {name: kind(number)}) == expected
    expected = generate(**DRAWN | {name: 1})
    for value in (True, "1", b"1", Decimal(1), Fraction(1), np.float16(1), np.array(1)):
        ids, error = result_or_error(lambda value=value: generate(**DRAWN | {name: value}))
        assert ids == expected or f"{name} must be " in error


NO_NUMBERS = ["x", "", math.nan, "nan", -1, -1e-9, [1, 2], np.arange(2), 1j]
NO_WHOLE_NUMBERS = [*NO_NUMBERS, 2.5, Decimal("2.5"), math.inf, "2.5"]
WRONG = {
    "n_tokens_to_generate": [*NO_WHOLE_NUMBERS, None, Decimal("nan")],
    "temperature": [*NO_NUMBERS, None, -math.inf],
    "top_k": [*NO_WHOLE_NUMBERS, None],
    "top_p": [*NO_NUMBERS, None, 0.0, 1.5, math.inf],
    "seed": NO_WHOLE_NUMBERS,
    "n_samples": [*NO_WHOLE_NUMBERS, 0, 100_001],
    "stop_id": ["5", "", b"5", 1.5, math.nan, -1, N_VOCAB, 2**64, [N_VOCAB], {-1, 3}, ["a"], [[3]]],
}


@pytest.mark.parametrize("function", [generate, stream])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_options_raise_at_once(function, name):
    for value in WRONG[name]:
        with pytest.raises((ValueError, TypeError), match=f"{name} must be |token id") as error:
            function(**DRAWN | {name: value})
        assert "\n" not in str(error.value)


def test_an_infinite_temperature_draws_evenly():
    samples = generate(n_tokens_to_generate=1, temperature=math.inf, seed=0, n_samples=1000)
    assert len({new_id for (new_id,) in samples}) == N_VOCAB


@pytest.mark.parametrize("collection", [set, frozenset, list, tuple, np.array])
def test_any_of_several_stop_ids_ends_the_text(collection, ids, greedy):
    stop_ids = collection([greedy[4], greedy[2], greedy[2]])
    assert generate(ids[:5], 9, stop_id=stop_ids) == greedy[:2]
    assert generate(ids[:5], 9, stop_id=stop_ids, n_samples=2) == [greedy[:2]] * 2
    assert generate(ids[:5], 9, stop_id=collection([])) == greedy[:9]


# Ids


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_type(dtype, ids, greedy, reference):
    array = np.array(ids, dtype)
    for inputs in array, list(array), array[::-1][::-1]:
        assert_close(model(inputs), reference["eleven_layers/logits"])
        assert generate(inputs[:5], 6) == greedy[:6]
    assert generate(ids[:5], 9, stop_id=dtype.type(greedy[4])) == greedy[:4]


@pytest.mark.parametrize(
    "convert",
    [iter, tuple, lambda ids: (i for i in ids), lambda ids: [np.uint64(ids[0]), *ids[1:]]],
)
def test_iterators_and_mixed_types(convert, ids, greedy, reference):
    assert generate(convert(ids[:5]), len(greedy)) == greedy
    assert list(stream(convert(ids[:5]), len(greedy))) == greedy
    exact = np.log(float64_softmax(reference["eleven_layers/logits"].astype(np.float64)))
    exact = exact[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(log_probs(convert(ids)), exact, rtol=0, atol=1e-3)


@pytest.mark.parametrize("call", CALLS)
def test_huge_ids(call):
    for wrong in ([2**63], [2**64 - 1], [2**70], [1, -(2**70)]):
        with pytest.raises((ValueError, TypeError), match="token id"):
            call(wrong)


# Sizes


@pytest.mark.parametrize("n_out", [0, -1])
def test_n_out_below_one(n_out):
    for cache in None, gpt2.KVCache(PARAMS, N_HEAD):
        with pytest.raises(ValueError, match="n_out must be .*1"):
            model(PROMPT, n_out=n_out, cache=cache)


@pytest.mark.parametrize("n_head", [0, -5, 4, 20])
def test_n_head_that_does_not_divide_n_embd(n_head):
    for call in [*CALLS, lambda n_head: gpt2.KVCache(PARAMS, n_head)]:
        with pytest.raises(ValueError, match=f"n_head must be .*{n_head}"):
            call(n_head=n_head)


def test_the_smallest_model():
    """One token, one position, one number: the only token is certain."""
    params = random_params({"n_vocab": 1, "n_ctx": 1, "n_embd": 1, "n_head": 1, "n_layer": 1})
    assert gpt2.gpt2([0], **params, n_head=1).shape == (1, 1)
    assert gpt2.generate([0, 0], params, 1, 3) == [0, 0, 0]
    assert gpt2.generate([0], params, 1, 2, temperature=1, n_samples=2) == [[0, 0], [0, 0]]
    np.testing.assert_array_equal(gpt2.log_probs([0, 0, 0], params, 1), [0, 0])


# Logits


class Extreme:
    """A generator that draws the same number each time."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


RNGS = [*map(np.random.default_rng, range(5)), Extreme(0.0), Extreme(1 - 2**-53)]


def assert_draws_what_is_possible(logits, *options):
    probs = gpt2.token_probs(logits, *options)
    assert (probs >= 0).all()
    assert probs.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
    assert {gpt2.sample(logits, rng, *options) for rng in RNGS} <= set(np.flatnonzero(probs))
    return probs


TEMPERATURES = [5e-324, 1e-30, 1.0, 1e30, math.inf]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize(
    "logits",
    [[NO, 1.0, NO, 3.0, NO], [2.0, NO], [NO, 3e38, -3e38, NO], [3.0, 3.0, 1.0, 1.0, NO]],
)
def test_a_token_of_probability_zero_is_never_drawn(logits, temperature):
    logits = np.array(logits, np.float32)
    for top_k, top_p in itertools.product([0, 1, 4], [1.0, 0.99, 0.5]):
        probs = assert_draws_what_is_possible(logits, temperature, top_k, top_p)
        assert probs.dtype == np.float32
        assert not probs[np.isneginf(logits)].any()
        assert probs[logits.argmax()] == probs.max()


@pytest.mark.parametrize("temperature", [0, *TEMPERATURES])
def test_logits_that_say_nothing(temperature):
    for logits in ([math.nan], [1.0, math.nan, 2.0], [math.nan, NO, math.inf], [NO], [NO, NO]):
        logits = np.array(logits, np.float32)
        message = "nan" if np.isnan(logits).any() else "logit"
        with pytest.raises(ValueError, match=message):
            gpt2.sample(logits, RNGS[0], temperature)
        if temperature:
            with pytest.raises(ValueError, match=message):
                gpt2.token_probs(logits, temperature)


@pytest.mark.parametrize("temperature", [0, *TEMPERATURES])
@pytest.mark.parametrize(
    ("logits", "likeliest"),
    [
        ([5, 1], {0}),
        ([1e300, 1.0], {0}),
        ([math.inf, 1.0, math.inf], {0, 2}),
        ([-1e300, 1.0], {1}),
        ([1e300, -1e300], {0}),
    ],
)
def test_huge_logits_give_a_distribution_or_an_error(logits, likeliest, temperature):
    logits = np.array(logits)
    id_, error = result_or_error(lambda: gpt2.sample(logits, RNGS[0], temperature))
    if error:
        assert logits.max() > 1e38
        assert "logit" in error
    elif temperature == 0:
        assert id_ in likeliest
    else:
        probs = assert_draws_what_is_possible(logits, temperature)
        assert probs[list(likeliest)].max() == probs.max()


# The cache


def content(cache):
    return cache.n_past, cache.kv[..., : cache.n_past, :].tobytes()


@pytest.mark.parametrize(
    ("change", "batch", "shape"),
    [
        ({}, (2,), (1, 3)),
        ({}, (2,), (3,)),
        ({}, (), (1, 3)),
        ({}, (1,), (2, 3)),
        ({}, (2, 3), (2, 1, 3)),
        ({"n_embd": 20}, (), (3,)),
        ({"n_layer": 2}, (), (3,)),
        ({"n_head": 2}, (), (3,)),
    ],
)
def test_a_cache_for_another_model_or_batch_is_refused(change, batch, shape):
    other = HPARAMS | change
    params = random_params(other)
    cache = gpt2.KVCache(params, other["n_head"], batch=batch)
    for n_past in 0, 3:
        before = content(cache)
        with pytest.raises(ValueError, match="cache"):
            model(np.full(shape, 7), cache=cache)
        assert content(cache) == before
        gpt2.gpt2(np.full((*batch, 3), 5), **params, n_head=other["n_head"], cache=cache)
        assert cache.n_past == n_past + 3


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ([N_VOCAB], {}),
        ([1] * 20, {}),
        ([1], {"n_out": 0}),
        ([1], {"n_head": 3}),
        ([1], {"ln_f": {"g": np.ones(3), "b": np.ones(3)}}),
        ([1, 2], {"blocks": [*PARAMS["blocks"][:10], PARAMS["blocks"][10] | {"mlp": {}}]}),
    ],
    ids=repr,
)
def test_an_error_leaves_the_cache_as_it_was(inputs, options, ids, reference):
    logits = reference["eleven_layers/logits"]
    cache = gpt2.KVCache(PARAMS, N_HEAD)
    assert_close(model(ids[:5], cache=cache), logits[:5])
    before = content(cache)
    with pytest.raises((ValueError, TypeError)):
        model(inputs, cache=cache, **options)
    assert content(cache) == before
    assert_close(model(ids[5:], cache=cache), logits[5:])
