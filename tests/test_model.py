"""The model against transformers (see make_reference.py) and float64 formulas."""

import math
import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    REFERENCE_MODELS,
    ROOT,
    assert_close,
    float64_gelu,
    float64_gpt2,
    float64_layer_norm,
    float64_softmax,
    map_arrays,
    random_params,
)

import gpt2


@pytest.fixture(scope="module", params=REFERENCE_MODELS)
def model(request, reference):
    """(params, n_head, ids, logits, greedy continuation of the first five ids)"""
    hparams = REFERENCE_MODELS[request.param]
    ids, logits, greedy = (
        reference[f"{request.param}/{key}"] for key in ("ids", "logits", "greedy")
    )
    return random_params(hparams), hparams["n_head"], ids.tolist(), logits, greedy.tolist()


def test_logits_match_transformers(model):
    params, n_head, ids, logits, _ = model
    assert_close(gpt2.gpt2(ids, **params, n_head=n_head), logits)


def test_float64_oracle_matches_transformers(model):
    params, n_head, ids, logits, _ = model
    np.testing.assert_allclose(
        float64_gpt2(ids, params, n_head), logits, rtol=0, atol=1e-5 * np.abs(logits).max()
    )


def test_logits_of_a_long_text_match_the_oracle():
    """n_seq above ATTENTION_ROWS and FEW_ROWS, and not a multiple of BLOCK_ROWS."""
    params = random_params({"n_vocab": 50, "n_ctx": 300, "n_embd": 12, "n_head": 2, "n_layer": 2})
    ids = np.random.default_rng(0).integers(0, 50, 300)
    exact = float64_gpt2(ids, params, 2)
    assert_close(gpt2.gpt2(ids, **params, n_head=2), exact)
    cache = gpt2.KVCache(params, 2)
    parts = [
        gpt2.gpt2(part, **params, n_head=2, cache=cache) for part in np.split(ids, [1, 140, 203])
    ]
    assert_close(np.concatenate(parts), exact)


@pytest.mark.parametrize("chunks", [[1] * 16, [5, 1, 1, 9], [15, 1], [2, 14], [16]])
def test_cached_logits_match_transformers(model, chunks):
    params, n_head, ids, logits, _ = model
    cache = gpt2.KVCache(params, n_head)
    parts, done = [], 0
    for n in chunks:
        parts.append(gpt2.gpt2(ids[done : done + n], **params, n_head=n_head, cache=cache))
        done += n
        assert cache.n_past == done
    assert_close(np.concatenate(parts), logits[:done])


@pytest.mark.parametrize("cached", [False, True])
def test_several_sequences_in_one_call(model, cached):
    params, n_head, ids, logits, _ = model
    rows = np.array([[ids[:6], ids[6:12]], [ids[3:9], ids[:6]]])  # [2, 2, 6]
    cache = gpt2.KVCache(params, n_head, batch=rows.shape[:-1]) if cached else None
    parts = [gpt2.gpt2(rows[..., :4], **params, n_head=n_head, cache=cache)] if cached else []
    parts.append(gpt2.gpt2(rows[..., 4:] if cached else rows, **params, n_head=n_head, cache=cache))
    together = np.concatenate(parts, axis=-2)
    assert_close(together[0, 0], logits[:6])
    assert_close(together[1, 1], logits[:6])
    assert_close(together[1, 0], float64_gpt2(ids[3:9], params, n_head))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("n_out", [1, 3, 9])
def test_logits_of_the_last_positions(model, n_out, cached, monkeypatch):
    monkeypatch.setattr(gpt2, "ATTENTION_ROWS", 2)
    params, n_head, ids, logits, _ = model
    rows = np.array([ids[:9], ids[:9]])
    cache = gpt2.KVCache(params, n_head, batch=(2,)) if cached else None
    last = gpt2.gpt2(rows, **params, n_head=n_head, cache=cache, n_out=n_out)
    assert_close(last, np.stack([logits[9 - n_out : 9]] * 2))
    if cached:  # the cache holds all positions
        assert_close(
            gpt2.gpt2(np.array([ids[9:11]] * 2), **params, n_head=n_head, cache=cache)[1],
            logits[9:11],
        )


def test_tokens_do_not_see_later_tokens(model):
    params, n_head, ids, logits, _ = model
    changed = [*ids[:7], *((i + 1) % logits.shape[1] for i in ids[7:])]
    answers = gpt2.gpt2(changed, **params, n_head=n_head)
    assert_close(answers[:7], logits[:7])
    assert not np.allclose(answers[7], logits[7], atol=1e-2)


def test_inputs_and_parameters_are_not_modified(model):
    params, n_head, ids, logits, _ = model
    read_only = map_arrays(lambda array: array.view(), params)
    map_arrays(lambda array: array.setflags(write=False), read_only)
    inputs = np.array(ids)
    inputs.setflags(write=False)
    assert_close(gpt2.gpt2(inputs, **read_only, n_head=n_head), logits)


X = np.linspace(-12, 12, 3 * 35 * 6, dtype=np.float32).reshape(
    3, 35, 6
)  # 105 rows: three blocks of 32 and one of 9
G, B = np.linspace(0.5, 2, 6, dtype=np.float32), np.linspace(-1, 1, 6, dtype=np.float32)
W = np.linspace(-1, 1, 30, dtype=np.float32).reshape(6, 5)
C_FC = {
    "w": np.sin(np.arange(6 * 24, dtype=np.float32)).reshape(6, 24),
    "b": np.zeros(24, np.float32),
}
C_PROJ = {"w": np.cos(np.arange(24 * 6, dtype=np.float32)).reshape(24, 6), "b": B}
FORMULAS = {
    "gelu": (float64_gelu, ()),
    "softmax": (float64_softmax, ()),
    "layer_norm": (float64_layer_norm, (G, B)),
    "linear": (lambda x, w, b: x @ w + b, (W, B[:5])),
    "ffn": (lambda x, f, p: float64_gelu(x @ f["w"] + f["b"]) @ p["w"] + p["b"], (C_FC, C_PROJ)),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("x", [X, X[:, :1], X[0], X[1, :33], X[0, 7]], ids=lambda x: str(x.shape))
def test_functions_match_their_formulas_in_float32(name, x):
    exact, arguments = FORMULAS[name]
    before = x.copy()
    result = getattr(gpt2, name)(x, *arguments)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(x, before)
    np.testing.assert_allclose(
        result, exact(x.astype(np.float64), *arguments), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("shape", [(6,), (2, 6), (50, 6)])
def test_functions_take_integers(name, shape):
    exact, arguments = FORMULAS[name]
    x = np.arange(math.prod(shape)).reshape(shape) % 11 - 5
    np.testing.assert_allclose(
        getattr(gpt2, name)(x, *arguments), exact(x, *arguments), rtol=1e-5, atol=1e-6
    )


def test_softmax_does_not_overflow():
    np.testing.assert_allclose(gpt2.softmax(np.array([3e4, 3e4, -3e4], np.float32)), [0.5, 0.5, 0])


def test_attention_matches_its_formula_in_float32():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 8)).astype(np.float32)
    result = gpt2.attention(q, k, v, np.triu(np.full((4, 4), -1e10, np.float32), 1))
    assert result.dtype == np.float32
    for head in range(2):
        for i in range(4):
            scores = [math.exp(float(q[head, i] @ k[head, j]) / math.sqrt(8)) for j in range(i + 1)]
            expected = sum(
                score * v[head, j].astype(np.float64) for j, score in enumerate(scores)
            ) / sum(scores)
            np.testing.assert_allclose(result[head, i], expected, rtol=1e-5, atol=1e-6)
    all_visible = gpt2.attention(
        q, k, v
    )  # the last query sees the same keys with and without the mask
    np.testing.assert_allclose(all_visible[:, -1], result[:, -1], rtol=1e-6)
    assert np.abs(all_visible[:, 0] - result[:, 0]).max() > 0.1


@pytest.mark.parametrize(("n_q", "n_kv"), [(1, 1), (1, 5), (2, 4), (4, 4), (3, 300)])
def test_causal_mask_hides_the_future_alone(n_q, n_kv):
    mask = gpt2.causal_mask(n_q, n_kv)
    assert mask.dtype == np.float32
    hidden = [[j > n_kv - n_q + i for j in range(n_kv)] for i in range(n_q)]
    np.testing.assert_array_equal(mask, np.where(hidden, np.float32(-1e10), np.float32(0)))


def test_every_stage_is_float32(model, monkeypatch):
    params, n_head, ids, _, _ = model
    seen = []

    def watched(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            seen.append((function.__name__, result.dtype))
            return result

        return call

    stages = [
        "gelu",
        "softmax",
        "layer_norm",
        "linear",
        "ffn",
        "attention",
        "mha",
        "transformer_block",
    ]
    for name in stages:
        monkeypatch.setattr(gpt2, name, watched(getattr(gpt2, name)))
    cache = gpt2.KVCache(params, n_head)
    assert cache.kv.dtype == np.float32
    assert gpt2.gpt2(ids, **params, n_head=n_head, cache=cache).dtype == np.float32
    assert {name for name, _ in seen} == set(stages)
    assert {dtype for _, dtype in seen} == {np.dtype(np.float32)}


def test_more_tokens_than_positions_raise(model):
    params, n_head, ids, _, _ = model
    with pytest.raises(ValueError, match=f"{len(ids) + 1} tokens .* {len(ids)} positions"):
        gpt2.gpt2([*ids, 0], **params, n_head=n_head)
    cache = gpt2.KVCache(params, n_head, 4)
    gpt2.gpt2(ids[:3], **params, n_head=n_head, cache=cache)
    with pytest.raises(ValueError, match="5 tokens .* 4 positions"):
        gpt2.gpt2(ids[3:5], **params, n_head=n_head, cache=cache)
    assert cache.n_past == 3


BAD_IDS = {
    "none": ([], ValueError, "at least one token id, got none"),
    "negative": ([3, -1], ValueError, "-1 is not a token id: .* 50 tokens"),
    "the first too large": ([49, 50], ValueError, "50 is not a token id: .* 50 tokens"),
    "huge": ([3, 10**6], ValueError, "1000000 is not a token id"),
    "float": ([1.5], TypeError, "integers .*float64"),
    "boolean": ([True], TypeError, "integers .*bool"),
    "text": ("hello", TypeError, "integers .*str"),
}


@pytest.mark.parametrize("name", BAD_IDS)
@pytest.mark.parametrize(
    "call",
    [
        lambda ids, params: gpt2.gpt2(ids, **params, n_head=1),
        lambda ids, params: gpt2.generate(ids, params, 1, 3),
        lambda ids, params: gpt2.stream(ids, params, 1, 3),
        lambda ids, params: gpt2.log_probs(ids, params, 1),
    ],
    ids=["gpt2", "generate", "stream", "log_probs"],
)
def test_bad_ids_raise_at_once(call, name):
    ids, kind, message = BAD_IDS[name]
    with pytest.raises(kind, match=message):
        call(ids, random_params(REFERENCE_MODELS["one_layer"]))


def test_callers_numpy_error_settings_do_not_matter(model):
    params, n_head, ids, logits, greedy = model
    with np.errstate(all="raise"):
        assert_close(gpt2.gpt2(ids, **params, n_head=n_head), logits)
        assert gpt2.generate(ids[:5], params, n_head, len(greedy)) == greedy
        assert (
            gpt2.generate(ids[:5], params, n_head, 3, temperature=1e-30, top_p=0.5, top_k=9, seed=0)
            == greedy[:3]
        )
        assert np.isfinite(gpt2.log_probs(ids * 3, params, n_head)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_parameters_raise(value):
    params = random_params(REFERENCE_MODELS["one_layer"])
    params["blocks"][0]["mlp"]["c_proj"]["b"] = np.full(8, value, np.float32)
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        gpt2.generate([1], params, 1, 1)


@pytest.mark.parametrize("module", ["gpt2", "encoder"])
def test_importing_stays_light(module):
    heavy = {"tensorflow", "requests", "fire", "tqdm", "utils"}
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "[]\n"
