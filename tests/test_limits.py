"""Arguments at their limits give the right result or one clear error, and leave no trace."""

import itertools
import math
import re

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, assert_close, random_params

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


# Options


DRAWN = {"temperature": 1.5, "seed": 2}
WRONG = {
    "n_tokens_to_generate": ["x", math.nan, -1, 2.5, None],
    "temperature": ["x", math.nan, -1e-9, -math.inf, [1, 2], 1j],
    "top_k": ["x", math.nan, -1, 2.5],
    "top_p": ["x", math.nan, 0.0, 1.5, math.inf, None],
    "seed": ["x", math.nan, -1, 2.5],
    "n_samples": ["x", math.nan, 0, -1, 2.5],
    "stop_id": ["5", 1.5, math.nan, -1, N_VOCAB, 2**64, [N_VOCAB], {-1, 3}, ["a"]],
    "temprature": [1.0],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name):
    for value in WRONG[name]:
        with pytest.raises((ValueError, TypeError)) as error:
            generate(**DRAWN | {name: value})
        assert "\n" not in str(error.value)
    for value in (-1, math.nan):
        if name in gpt2.Options.__annotations__:
            with pytest.raises(ValueError, match=f"^{name} must be .* got {value}$"):
                stream(**DRAWN | {name: value})  # at once, not with the first token


def test_numbers_of_numpys_types():
    for name, values in {"top_k": (2, np.int8(2)), "top_p": (0.5, np.float32(0.5))}.items():
        python, numpy = (
            generate(n_tokens_to_generate=9, **DRAWN | {name: value}) for value in values
        )
        assert python == numpy


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


@pytest.mark.parametrize("call", CALLS)
def test_huge_ids(call):
    for wrong in ([2**63], [2**64 - 1], [2**70], [1, -(2**70)]):
        with pytest.raises(ValueError, match=f"{wrong[-1]} is not a token id"):
            call(wrong)


# Sizes


@pytest.mark.parametrize("n_out", [0, -1])
def test_n_out_below_one(n_out):
    for cache in None, gpt2.KVCache(PARAMS, N_HEAD):
        with pytest.raises(ValueError, match="n_out must be .*1"):
            model(PROMPT, n_out=n_out, cache=cache)


@pytest.mark.parametrize("n_head", [0, -5, 4, 20])
def test_n_head_that_does_not_divide_n_embd(n_head):
    for call in model, generate, log_probs, lambda n_head: gpt2.KVCache(PARAMS, n_head):
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


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_shapes_of_logits(temperature):
    """`gpt2` with n_out=1 returns [1, n_vocab]."""
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    rng = np.random.default_rng
    one = gpt2.sample(logits, rng(0), temperature, 2)
    assert gpt2.sample(logits[None], rng(0), temperature, 2) == one
    for wrong in (np.stack([logits, logits]), logits[None, None], logits[0]):
        with pytest.raises(ValueError, match=re.escape(f"got {wrong.shape}")):
            gpt2.sample(wrong, rng(0), temperature)


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
