"""Arguments at their limits give the right result or one clear error, and leave no trace."""

import math
import re
import sys

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


def generate(prompt=PROMPT, n_tokens_to_generate=3, n_head=N_HEAD, **options):
    return gpt2.generate(prompt, PARAMS, n_head, n_tokens_to_generate, **options)


def log_probs(ids=PROMPT, n_head=N_HEAD):
    return gpt2.log_probs(ids, PARAMS, n_head)


def model(inputs=PROMPT, **options):
    options = PARAMS | {"n_head": N_HEAD} | options
    return gpt2.gpt2(inputs, **options)


# Options


DRAWN = {"temperature": 1.5, "seed": 2}
WRONG = {
    "n_tokens_to_generate": [2.5, None],
    "temperature": [-1e-9, [1, 2], 1j],
    "top_k": ["x", 2.5],
    "top_p": [0.0, 1.5, None],
    "seed": ["x", 2.5],
    "n_samples": [0, 2.5],
    "stop_id": ["5", 1.5, -1, N_VOCAB, 2**64, {-1, 3}],
    "temprature": [1.0],
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name):
    for value in WRONG[name]:
        with pytest.raises((ValueError, TypeError)) as error:
            generate(**DRAWN | {name: value})
        assert "\n" not in str(error.value)
    if name in gpt2.Options.__annotations__:
        for value in (-1, math.nan):
            options = {"n_tokens_to_generate": 3, **DRAWN, name: value}
            with pytest.raises(ValueError, match=f"^{name} must be .* got {value}$"):
                gpt2.stream(PROMPT, PARAMS, N_HEAD, **options)  # at once, not with the first token


def test_numbers_of_numpys_types():
    python = {"n_tokens_to_generate": 9, "top_k": 9, "top_p": 0.5}
    for nine in np.int8(9), np.uint8(9), np.uint64(9):
        numpy = {"n_tokens_to_generate": nine, "top_k": nine, "top_p": np.float32(0.5)}
        assert generate(**DRAWN | python) == generate(**DRAWN | numpy)
    for temperature in np.float16(0.5), np.float64(0.5), np.array(0.5):
        probs = gpt2.token_probs(np.arange(5), temperature)
        assert probs.dtype == np.float32
        assert probs.tolist() == gpt2.token_probs(np.arange(5), 0.5).tolist()


@pytest.mark.parametrize("n", [10**12, sys.maxsize, 2**70])
def test_a_huge_number_of_tokens_means_until_the_stop(n, ids, greedy):
    assert generate(ids[:5], n, stop_id=greedy[4]) == greedy[:4]


@pytest.mark.parametrize("collection", [set, list, iter, np.array])
def test_any_of_several_stop_ids_ends_the_text(collection, ids, greedy):
    stop_ids = collection([greedy[4], greedy[2], greedy[2]])
    assert generate(ids[:5], 9, stop_id=stop_ids) == greedy[:2]
    assert generate(ids[:5], 9, stop_id=collection([])) == greedy[:9]


# Ids


@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
def test_ids_of_any_integer_type(dtype, ids, greedy, reference):
    array = np.array(ids, dtype)
    for inputs in array, list(array):
        assert_close(model(inputs), reference["eleven_layers/logits"])
        assert generate(inputs[:5], 6) == greedy[:6]
    assert generate(ids[:5], 9, stop_id=dtype.type(greedy[4])) == greedy[:4]


@pytest.mark.parametrize("call", [model, generate, log_probs])
def test_huge_ids(call):
    for wrong in ([2**63], [2**64 - 1], [1, -(2**70)]):
        with pytest.raises(ValueError, match=f"{wrong[-1]} is not a token id"):
            call(wrong)


# Sizes


def new_cache(n_head):
    return gpt2.KVCache(PARAMS, n_head)


def test_n_out_below_one():
    with pytest.raises(ValueError, match="n_out must be 1 or more, got 0"):
        model(n_out=0)


@pytest.mark.parametrize("n_head", [0, -5, 4, 20])
@pytest.mark.parametrize("call", [model, generate, log_probs, new_cache])
def test_n_head_that_does_not_divide_n_embd(call, n_head):
    with pytest.raises(ValueError, match=f"n_head must be .*{n_head}"):
        call(n_head=n_head)


def test_the_smallest_model():
    """One token, one position, one number: the only token is certain."""
    params = random_params(dict.fromkeys(HPARAMS, 1))
    assert gpt2.gpt2([0], **params, n_head=1).shape == (1, 1)
    samples = gpt2.generate([0, 0], params, 1, 3, temperature=1, n_samples=2)
    assert samples == [[0, 0, 0], [0, 0, 0]]
    assert not gpt2.log_probs([0, 0, 0], params, 1).any()


# Logits


class Extreme:
    """A generator that draws the same number each time."""

    def __init__(self, number):
        self.number = number

    def random(self):
        return self.number


RNGS = [np.random.default_rng(0), Extreme(0.0), Extreme(1 - 2**-53)]
TEMPERATURES = [5e-324, 1e-30, 1.0, 1e30, math.inf]


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("top_k", [0, 1, 4])
@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.5])
def test_a_token_of_probability_zero_is_never_drawn(temperature, top_k, top_p):
    for logits in (
        [NO, 1.0, NO, 3.0, NO],
        [2.0, NO],
        [NO, 3e38, -3e38, NO],
        [3.0, 3.0, 1.0, NO],
        [-1e300, 1.0],  # in float32: -infinity
    ):
        logits = np.array(logits)
        probs = gpt2.token_probs(logits, temperature, top_k, top_p)
        assert probs.dtype == np.float32
        assert (probs >= 0).all()
        assert probs.sum(dtype=np.float64) == pytest.approx(1, abs=1e-6)
        assert probs[logits.argmax()] == probs.max()
        assert not probs[logits <= -1e300].any()
        drawn = {gpt2.sample(logits, rng, temperature, top_k, top_p) for rng in RNGS}
        assert drawn <= set(np.flatnonzero(probs))


@pytest.mark.parametrize("temperature", [0, *TEMPERATURES])
@pytest.mark.parametrize(
    ("logits", "largest"),
    [
        ([math.nan], "nan"),
        ([1.0, math.nan, 2.0], "nan"),
        ([math.nan, NO, math.inf], "nan"),
        ([NO, NO], "-inf"),
        ([math.inf, 1.0, math.inf], "inf"),
        ([1e300, -1e300], "inf"),  # in float32
    ],
)
def test_logits_that_say_nothing(logits, largest, temperature):
    message = f"the logits are not finite: the largest one is {largest}$"
    with pytest.raises(ValueError, match=message):
        gpt2.sample(logits, RNGS[0], temperature)
    if temperature:
        with pytest.raises(ValueError, match=message):
            gpt2.token_probs(logits, temperature)


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_shapes_of_logits(temperature):
    """`gpt2` with n_out=1 returns [1, n_vocab]."""
    logits = np.array([1.0, 3.0, 2.0], np.float32)
    drawn = set()
    for accepted in (logits, logits[None]):
        drawn.add(gpt2.sample(accepted, np.random.default_rng(0), temperature, 2))
    assert len(drawn) == 1
    for shape in ((2, 3), (1, 1, 3), ()):
        with pytest.raises(ValueError, match=re.escape(f"got {shape}")):
            gpt2.sample(np.zeros(shape), RNGS[0], temperature)


# The cache


def content(cache):
    return cache.n_past, cache.kv[..., : cache.n_past, :].tobytes()


@pytest.mark.parametrize(
    ("change", "batch", "shape"),
    [
        ({}, (2,), (1, 3)),
        ({}, (), (1, 3)),
        ({"n_embd": 20}, (), (3,)),
        ({"n_layer": 2}, (), (3,)),
        ({"n_head": 2}, (), (3,)),
    ],
)
def test_a_cache_for_another_model_or_batch_is_refused(change, batch, shape):
    other = HPARAMS | change
    cache = gpt2.KVCache(random_params(other), other["n_head"], batch=batch)
    with pytest.raises(ValueError, match="cache"):
        model(np.full(shape, 7), cache=cache)
    assert cache.n_past == 0


*BLOCKS, LAST_BLOCK = PARAMS["blocks"]


@pytest.mark.parametrize(
    ("inputs", "options"),
    [
        ([N_VOCAB], {}),
        ([1] * 20, {}),
        ([1, 2], {"blocks": [*BLOCKS, LAST_BLOCK | {"mlp": {}}]}),
    ],
    ids=["id", "too long", "block"],
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
