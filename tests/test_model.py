"""The model against transformers' answers (reference.npz, see make_reference.py), and what must hold of any GPT-2."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import REFERENCE_MODELS, ROOT, random_variables

import gpt2

REFERENCE = dict(np.load(Path(__file__).parent / "reference.npz"))


def nested(hparams):
    """The params dict of a random model, put together here without utils.py."""
    variables = random_variables(hparams)

    def part(name, **keys):
        return {key: variables[f"model/{name}/{key}"].reshape(shape) for key, shape in keys.items()}

    n = hparams["n_embd"]
    blocks = [
        {
            "ln_1": part(f"h{i}/ln_1", g=n, b=n),
            "attn": {
                "c_attn": part(f"h{i}/attn/c_attn", w=(n, 3 * n), b=3 * n),
                "c_proj": part(f"h{i}/attn/c_proj", w=(n, n), b=n),
            },
            "ln_2": part(f"h{i}/ln_2", g=n, b=n),
            "mlp": {
                "c_fc": part(f"h{i}/mlp/c_fc", w=(n, 4 * n), b=4 * n),
                "c_proj": part(f"h{i}/mlp/c_proj", w=(4 * n, n), b=n),
            },
        }
        for i in range(hparams["n_layer"])
    ]
    return {
        "wte": variables["model/wte"],
        "wpe": variables["model/wpe"],
        "blocks": blocks,
        "ln_f": part("ln_f", g=n, b=n),
    }


@pytest.fixture(scope="module", params=REFERENCE_MODELS)
def model(request):
    """(params, n_head, ids, logits, greedy continuation of the first five ids)"""
    hparams = REFERENCE_MODELS[request.param]
    ids, logits, greedy = (REFERENCE[f"{request.param}/{key}"] for key in ("ids", "logits", "greedy"))
    return nested(hparams), hparams["n_head"], ids.tolist(), logits, greedy.tolist()


def assert_close(logits, expected):
    """Equal to float32 rounding: within 1e-4 of the logits' scale."""
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_logits_are_those_of_transformers(model):
    params, n_head, ids, logits, _ = model
    assert_close(gpt2.gpt2(ids, **params, n_head=n_head), logits)


@pytest.mark.parametrize("chunks", [[1] * 16, [5, 1, 1, 9], [15, 1], [2, 14], [16]])
def test_logits_with_a_cache_are_the_same(model, chunks):
    params, n_head, ids, logits, _ = model
    cache = gpt2.KVCache(params, n_head)
    parts, done = [], 0
    for n in chunks:
        parts.append(gpt2.gpt2(ids[done : done + n], **params, n_head=n_head, cache=cache))
        done += n
        assert cache.n_past == done
    assert_close(np.concatenate(parts), logits[:done])


@pytest.mark.parametrize("cached", [False, True])
def test_several_sequences_at_once(model, cached):
    params, n_head, ids, logits, _ = model
    rows = np.array([[ids[:6], ids[6:12]], [ids[3:9], ids[:6]]])  # [2, 2, 6]
    cache = gpt2.KVCache(params, n_head, batch=rows.shape[:-1]) if cached else None
    parts = [gpt2.gpt2(rows[..., :4], **params, n_head=n_head, cache=cache)] if cached else []
    parts.append(gpt2.gpt2(rows[..., 4:] if cached else rows, **params, n_head=n_head, cache=cache))
    together = np.concatenate(parts, axis=-2)
    assert_close(together[0, 0], logits[:6])
    assert_close(together[1, 1], logits[:6])
    assert_close(together[1, 0], gpt2.gpt2(ids[3:9], **params, n_head=n_head))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("n_out", [1, 3])
def test_the_last_positions_alone(model, n_out, cached, monkeypatch):
    monkeypatch.setattr(gpt2, "ATTENTION_ROWS", 2)
    params, n_head, ids, logits, _ = model
    rows = np.array([ids[:9], ids[:9]])
    cache = gpt2.KVCache(params, n_head, batch=(2,)) if cached else None
    x = gpt2.hidden_states(rows, **params, n_head=n_head, cache=cache, n_out=n_out)
    assert_close(x @ params["wte"].T, np.stack([logits[9 - n_out : 9]] * 2))
    if cached:  # which has all positions
        assert_close(gpt2.gpt2(np.array([ids[9:11]] * 2), **params, n_head=n_head, cache=cache)[1], logits[9:11])


def test_no_token_sees_what_comes_after_it(model):
    params, n_head, ids, logits, _ = model
    changed = [*ids[:7], *((id + 1) % logits.shape[1] for id in ids[7:])]
    answers = gpt2.gpt2(changed, **params, n_head=n_head)
    assert_close(answers[:7], logits[:7])
    assert not np.allclose(answers[7], logits[7], atol=1e-2)


def test_the_model_changes_neither_its_inputs_nor_its_parameters(model):
    params, n_head, ids, logits, _ = model
    read_only = nested_map(lambda array: array.view(), params)
    nested_map(lambda array: array.setflags(write=False), read_only)
    inputs = np.array(ids)
    inputs.setflags(write=False)
    assert_close(gpt2.gpt2(inputs, **read_only, n_head=n_head), logits)


def nested_map(function, value):
    if isinstance(value, dict):
        return {key: nested_map(function, item) for key, item in value.items()}
    return [nested_map(function, item) for item in value] if isinstance(value, list) else function(value)


X = np.linspace(-12, 12, 3 * 4 * 6, dtype=np.float32).reshape(3, 4, 6)


def float64_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def float64_softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def float64_layer_norm(x, g, b):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b


G, B = np.linspace(0.5, 2, 6, dtype=np.float32), np.linspace(-1, 1, 6, dtype=np.float32)
W = np.linspace(-1, 1, 30, dtype=np.float32).reshape(6, 5)
C_FC = {"w": np.sin(np.arange(6 * 24, dtype=np.float32)).reshape(6, 24), "b": np.zeros(24, np.float32)}
C_PROJ = {"w": np.cos(np.arange(24 * 6, dtype=np.float32)).reshape(24, 6), "b": B}


@pytest.mark.parametrize(
    ("function", "exact", "arguments"),
    [
        (gpt2.gelu, float64_gelu, ()),
        (gpt2.softmax, float64_softmax, ()),
        (gpt2.layer_norm, float64_layer_norm, (G, B)),
        (gpt2.linear, lambda x, w, b: x @ w + b, (W, B[:5])),
        (gpt2.ffn, lambda x, f, p: float64_gelu(x @ f["w"] + f["b"]) @ p["w"] + p["b"], (C_FC, C_PROJ)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_each_function_is_its_formula_and_stays_float32(function, exact, arguments):
    before = X.copy()
    result = function(X, *arguments)
    assert result.dtype == np.float32
    np.testing.assert_array_equal(X, before)
    np.testing.assert_allclose(result, exact(X.astype(np.float64), *arguments), rtol=2e-5, atol=2e-5)


def test_attention_is_its_formula_and_stays_float32():
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 2, 4, 8)).astype(np.float32)
    mask = np.triu(np.full((4, 4), -1e10, np.float32), 1)
    result = gpt2.attention(q, k, v, mask)
    assert result.dtype == np.float32
    for head in range(2):
        for i in range(4):
            scores = [math.exp(float(q[head, i] @ k[head, j]) / math.sqrt(8)) for j in range(i + 1)]
            expected = sum(score * v[head, j].astype(np.float64) for j, score in enumerate(scores)) / sum(scores)
            np.testing.assert_allclose(result[head, i], expected, rtol=1e-5, atol=1e-6)


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
        "layer_norm",
        "linear",
        "ffn",
        "attention",
        "mha",
        "transformer_block",
        "hidden_states",
    ]
    for name in stages:
        monkeypatch.setattr(gpt2, name, watched(getattr(gpt2, name)))
    cache = gpt2.KVCache(params, n_head)
    assert cache.kv.dtype == np.float32
    assert gpt2.gpt2(ids, **params, n_head=n_head, cache=cache).dtype == np.float32
    assert {name for name, _ in seen} == set(stages)
    assert {dtype for _, dtype in seen} == {np.dtype(np.float32)}


def test_more_tokens_than_positions_are_refused(model):
    params, n_head, ids, _, _ = model
    with pytest.raises(ValueError, match=f"{len(ids) + 1} tokens .* {len(ids)} positions"):
        gpt2.gpt2([*ids, 0], **params, n_head=n_head)
    cache = gpt2.KVCache(params, n_head, 4)
    gpt2.gpt2(ids[:3], **params, n_head=n_head, cache=cache)
    with pytest.raises(ValueError, match="5 tokens .* 4 positions"):
        gpt2.gpt2(ids[3:5], **params, n_head=n_head, cache=cache)
    assert cache.n_past == 3


def test_greedy_ids_are_those_of_transformers(model):
    params, n_head, ids, _, greedy = model
    prompt = ids[:5]
    assert gpt2.generate(prompt, params, n_head, len(greedy)) == greedy
    assert prompt == ids[:5]
    assert gpt2.generate(prompt, params, n_head, 0) == []
    assert all(type(id) is int for id in gpt2.generate(np.array(prompt), params, n_head, 3))


def test_a_prompt_in_chunks_gives_the_same_ids(model, monkeypatch):
    params, n_head, ids, _, greedy = model
    monkeypatch.setattr(gpt2, "PROMPT_ROWS", 3)
    monkeypatch.setattr(gpt2, "ATTENTION_ROWS", 2)
    assert gpt2.generate(ids[:5], params, n_head, 10) == greedy[:10]


def test_two_streams_in_turns_do_not_disturb_each_other(model):
    params, n_head, ids, _, greedy = model
    streams = [gpt2.stream(ids[:5], params, n_head, 10, n_samples=n) for n in (None, None, 2)]
    for id, other_id, pair in zip(*streams, strict=True):
        assert [id, id] == [other_id] * 2 == pair
    assert gpt2.generate(ids[:5], params, n_head, 10) == greedy[:10]


def test_the_exact_bound_of_the_context(model):
    params, n_head, ids, logits, _ = model
    n_ctx = len(ids)
    assert gpt2.generate(ids, params, n_head, 1) == [int(logits[-1].argmax())]
    with pytest.raises(ValueError, match=f"{n_ctx} tokens and 2 new ones .* {n_ctx + 1} in all"):
        gpt2.generate(ids, params, n_head, 2)


@pytest.mark.parametrize(
    ("prompt", "n", "message"),
    [([], 1, "0 token ids"), ([-1], 1, "-1 is"), ([3, 10**6], 1, "1000000 is .* 50 tokens"), ([1], -1, "is -1")],
)
def test_bad_arguments_are_named(prompt, n, message):
    params = nested(REFERENCE_MODELS["one_layer"])
    with pytest.raises(ValueError, match=message):
        gpt2.generate(prompt, params, 1, n)


def test_an_id_that_is_no_whole_number():
    with pytest.raises(TypeError, match="integer"):
        gpt2.generate([1.5], nested(REFERENCE_MODELS["one_layer"]), 1, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_damaged_parameters_give_an_error_and_no_token(value):
    params = nested(REFERENCE_MODELS["one_layer"])
    params["blocks"][0]["mlp"]["c_proj"]["b"] = np.full(8, value, np.float32)
    with pytest.raises(ValueError, match="not finite"), np.errstate(invalid="ignore"):
        gpt2.generate([1], params, 1, 1)


@pytest.mark.parametrize("module", ["gpt2", "encoder"])
def test_importing_stays_light(module):
    code = (
        f"import sys, {module}; print(sorted({{'tensorflow', 'requests', 'fire', 'tqdm', 'utils'}} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
