"""The model against transformers (see make_reference.py) and float64 formulas."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import (
    REFERENCE_MODELS,
    assert_close,
    float64_block,
    float64_gelu,
    float64_gpt2,
    float64_layer_norm,
    float64_softmax,
    map_arrays,
    random_params,
)

import gpt2
import gpt2_pico


@dataclass
class Model:
    params: dict
    n_head: int
    ids: list
    logits: np.ndarray
    greedy: list  # transformers' continuation of the first five ids

    def run(self, ids, **options):
        return gpt2.gpt2(ids, **self.params, n_head=self.n_head, **options)

    def cache(self, **options):
        return gpt2.KVCache(self.params, self.n_head, **options)


@pytest.fixture(scope="module", params=REFERENCE_MODELS)
def model(request, reference):
    name = request.param
    return Model(
        random_params(REFERENCE_MODELS[name]),
        REFERENCE_MODELS[name]["n_head"],
        reference[f"{name}/ids"].tolist(),
        reference[f"{name}/logits"],
        reference[f"{name}/greedy"].tolist(),
    )


# Logits


def test_the_model_on_one_screen(model):
    """gpt2_pico.py has the logits and the ids of transformers, and gpt2.py has those of both."""
    pico = gpt2_pico.gpt2(model.ids, **model.params, n_head=model.n_head)
    atol = 1e-5 * np.abs(model.logits).max()
    np.testing.assert_allclose(pico, model.logits, rtol=0, atol=atol)
    assert_close(model.run(model.ids), pico)
    # As an index, NumPy takes a tuple for a row and a column.
    pair = gpt2_pico.gpt2(tuple(model.ids[:2]), **model.params, n_head=model.n_head)
    np.testing.assert_allclose(pair, pico[:2], rtol=0, atol=atol)
    n = len(model.params["wpe"]) - 5
    ids = gpt2_pico.generate(model.ids[:5], model.params, model.n_head, n)
    assert ids == model.greedy[:n]
    assert ids == gpt2.generate(model.ids[:5], model.params, model.n_head, n)


def test_float64_oracle_matches_transformers(model):
    exact = float64_gpt2(model.ids, model.params, model.n_head)
    atol = 1e-5 * np.abs(model.logits).max()
    np.testing.assert_allclose(exact, model.logits, rtol=0, atol=atol)


@pytest.mark.parametrize("chunks", [[1] * 16, [5, 1, 1, 9], [2, 14]])
def test_logits_match_transformers(model, chunks):
    assert_close(model.run(model.ids), model.logits)
    cache = model.cache()
    parts = []
    for n in chunks:
        end = cache.n_past + n
        parts.append(model.run(model.ids[cache.n_past : end], cache=cache))
        assert cache.n_past == end
    assert_close(np.concatenate(parts), model.logits[:16])


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("n_out", [1, 3, 9])
def test_several_sequences_and_their_last_positions(model, n_out, cached):
    starts = np.array([[0, 1], [4, 3]])
    rows = np.array(model.ids)[starts[..., None] + np.arange(11)]  # [2, 2, 11]
    exact = [float64_gpt2(row, model.params, model.n_head) for row in rows.reshape(4, 11)]
    exact = np.array(exact).reshape(2, 2, 11, -1)
    cache = model.cache(batch=(2, 2)) if cached else None
    last = model.run(rows[..., :9], cache=cache, n_out=n_out)
    assert_close(last, exact[..., 9 - n_out : 9, :])
    if cached:  # the cache holds all positions
        assert_close(model.run(rows[..., 9:], cache=cache), exact[..., 9:, :])


def test_long_texts_match_the_float64_oracle():
    """More positions than the model handles at once, and not a multiple of any block."""
    params = random_params({"n_vocab": 50, "n_ctx": 601, "n_embd": 12, "n_head": 2, "n_layer": 2})
    ids = np.random.default_rng(0).integers(0, 50, 601)
    exact = float64_gpt2(ids, params, 2)
    for n_out in 601, 300, 67, 1:
        assert_close(gpt2.gpt2(ids, **params, n_head=2, n_out=n_out), exact[-n_out:])
    cache = gpt2.KVCache(params, 2)
    parts = []
    for part in np.split(ids, [1, 280, 343, 350]):
        parts.append(gpt2.gpt2(part, **params, n_head=2, cache=cache))
    assert_close(np.concatenate(parts), exact)


def test_arguments_are_not_modified_and_numpys_settings_do_not_matter(model):
    params = map_arrays(np.copy, model.params)
    map_arrays(lambda array: array.setflags(write=False), params)
    inputs = np.array(model.ids)
    inputs.setflags(write=False)
    cold = {"temperature": 1e-30, "top_p": 0.5, "top_k": 9, "seed": 0}
    with np.errstate(all="raise"):
        assert_close(gpt2.gpt2(inputs, **params, n_head=model.n_head), model.logits)
        for options in {}, cold:
            ids = gpt2.generate(inputs[:5], params, model.n_head, 3, **options)
            assert ids == model.greedy[:3]
        assert np.isfinite(gpt2.log_probs(model.ids * 3, params, model.n_head)).all()


# The functions


X = 12 * np.sin(np.arange(3 * 115 * 6, dtype=np.float32)).reshape(3, 115, 6)
G = np.linspace(0.5, 2, 6, dtype=np.float32)
B = np.linspace(-1, 1, 6, dtype=np.float32)
W = np.linspace(-1, 1, 30, dtype=np.float32).reshape(6, 5)
WAVE = np.sin(np.arange(6 * 24, dtype=np.float32))
C_FC = {"w": WAVE.reshape(6, 24), "b": np.zeros(24, np.float32)}
C_PROJ = {"w": WAVE[::-1].reshape(24, 6), "b": B}
FORMULAS = {
    "gelu": (float64_gelu, ()),
    "softmax": (float64_softmax, ()),
    "layer_norm": (float64_layer_norm, (G, B)),
    "linear": (lambda x, w, b: x @ w + b, (W, B[:5])),
    "ffn": (lambda x, f, p: float64_gelu(x @ f["w"] + f["b"]) @ p["w"] + p["b"], (C_FC, C_PROJ)),
}
WHOLE = np.arange(300).reshape(50, 6) % 11 - 5


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize(
    "x",
    [X, X[:, :1], X[1, :33], X[0, 7], WHOLE, WHOLE[1]],
    ids=lambda x: f"{x.dtype}{list(x.shape)}",
)
def test_functions_match_their_formulas(name, x):
    exact, arguments = FORMULAS[name]
    before = x.copy()
    result = getattr(gpt2, name)(x, *arguments)
    expected = exact(x.astype(np.float64), *arguments)
    np.testing.assert_allclose(result, expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(x, before)
    if x.dtype == np.float32:
        assert result.dtype == np.float32


def test_a_block_and_its_parts_match_the_formula():
    block = random_params(REFERENCE_MODELS["three_heads"])["blocks"][0]
    x = np.sin(np.arange(240, dtype=np.float32)).reshape(20, 12)
    exact = float64_block(x.astype(np.float64), 3, **block)
    assert_close(gpt2.transformer_block(x, **block, n_head=3), exact)
    y = x + gpt2.mha(gpt2.layer_norm(x, **block["ln_1"]), **block["attn"], n_head=3)
    assert_close(y + gpt2.ffn(gpt2.layer_norm(y, **block["ln_2"]), **block["mlp"]), exact)


def test_softmax_does_not_overflow():
    np.testing.assert_allclose(gpt2.softmax(np.array([3e4, 3e4, -3e4], np.float32)), [0.5, 0.5, 0])


def test_attention_matches_its_formula_in_float32():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 8)).astype(np.float32)
    result = gpt2.attention(q, k, v, np.triu(np.full((4, 4), -1e10, np.float32), 1))
    all_visible = gpt2.attention(q, k, v)
    assert result.dtype == np.float32
    for head in range(2):
        scores = q[head].astype(np.float64) @ k[head].T.astype(np.float64) / math.sqrt(8)
        for i in range(4):
            seen = float64_softmax(scores[i, : i + 1]) @ v[head, : i + 1]
            np.testing.assert_allclose(result[head, i], seen, rtol=1e-5, atol=1e-6)
        every = float64_softmax(scores) @ v[head]
        np.testing.assert_allclose(all_visible[head], every, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_q", "n_kv"), [(1, 5), (4, 4), (3, 300)])
def test_causal_mask_hides_the_future_alone(n_q, n_kv):
    mask = gpt2.causal_mask(n_q, n_kv)
    assert mask.dtype == np.float32
    hidden = [[j > n_kv - n_q + i for j in range(n_kv)] for i in range(n_q)]
    np.testing.assert_array_equal(mask, np.where(hidden, np.float32(-1e10), np.float32(0)))


# Errors


def test_more_tokens_than_positions_raise(model):
    n_ctx = len(model.ids)
    with pytest.raises(ValueError, match=f"{n_ctx + 1} tokens .* {n_ctx} positions"):
        model.run([*model.ids, 0])
    cache = model.cache(n_max=4)
    model.run(model.ids[:3], cache=cache)
    with pytest.raises(ValueError, match="5 tokens .* 4 positions"):
        model.run(model.ids[3:5], cache=cache)
    assert cache.n_past == 3


BAD_IDS = [
    ([], ValueError, "at least one token id, got none"),
    ([3, -1], ValueError, "-1 is not a token id: .* 50 tokens"),
    ([49, 50], ValueError, "50 is not a token id: .* 50 tokens"),
    ([1.5], TypeError, "integers .*float64"),
    ([True], TypeError, "integers .*bool"),
    ("hello", TypeError, "got a text; encode it first"),
    ([[1, 2], [3]], ValueError, "one length"),
    ((i for i in [1]), TypeError, "integers .*object"),
]
CALLS = {
    "gpt2": lambda ids, params: gpt2.gpt2(ids, **params, n_head=1),
    "generate": lambda ids, params: gpt2.generate(ids, params, 1, 3),
    "stream": lambda ids, params: gpt2.stream(ids, params, 1, 3),
    "log_probs": lambda ids, params: gpt2.log_probs(ids, params, 1),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_ids_raise_at_once(name):
    params = random_params(REFERENCE_MODELS["one_layer"])
    for ids, kind, message in BAD_IDS:
        with pytest.raises(kind, match=message):
            CALLS[name](ids, params)
    if name != "gpt2":  # which takes several sequences
        with pytest.raises(TypeError, match=r"sequence of integers .*\(1, 2\)"):
            CALLS[name]([[1, 2]], params)
