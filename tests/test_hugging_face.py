"""Hugging Face folders, intact and damaged, and checkpoints that load without TensorFlow.

make_hugging_face.py made the folders in tests/data/hugging_face and the results of transformers and tokenizers.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import utils
from encoder import get_encoder
from gpt2 import generate, gpt2
from utils import load_encoder_hparams_and_params

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "tests" / "data" / "hugging_face"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
MODELS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
VOCABULARIES = sorted(EXPECTED["ids"])
LOGITS_STEP = 19  # of make_hugging_face.py
N_FLIPS = int(os.environ.get("NPGPT_FLIPS", 100))  # a long run by hand: 5000
WEIGHTS = "model.safetensors"
C_FC = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def copy(tmp_path):
    return lambda name: shutil.copytree(FOLDER / name, tmp_path / name)


@pytest.fixture
def model_dir(copy):
    """A copy of the folder `whole`, to do anything with."""
    return copy("whole")


def load(model_dir):
    return load_encoder_hparams_and_params(model_dir.name, str(model_dir.parent))


# An independent reader and writer of safetensors


def read_safetensors(path):
    """(header, data) of a file."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def write_safetensors(path, header, data):
    """Write a header, JSON or bytes, and data. Nothing is padded."""
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_tensors(path, tensors):
    """Write {name: array}. Arrays of uint16 become BF16."""
    names = {
        "float32": "F32",
        "float16": "F16",
        "uint16": "BF16",
        "uint8": "U8",
        "bool": "BOOL",
        "int64": "I64",
    }
    header, data = {}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {
            "dtype": names[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": offsets,
        }
        data += array.tobytes()
    write_safetensors(path, header, data)


def stored_tensors(model_dir):
    """{name without prefix: float32 array} of all files in a folder."""
    tensors = {}
    for path in model_dir.glob("*.safetensors"):
        header, data = read_safetensors(path)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                dtype = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}[entry["dtype"]]
                array = np.frombuffer(data[begin:end], dtype)
                if entry["dtype"] == "BF16":
                    array = np.stack([np.zeros_like(array), array], axis=-1).view(np.float32)
                tensors[name.removeprefix("transformer.")] = array.astype(np.float32).reshape(
                    entry["shape"]
                )
    return tensors


def flat(params, path=""):
    """{transformers' name: array} of a params dict."""
    if isinstance(params, np.ndarray):
        name = re.sub(r"^blocks", "h", path.removeprefix("."))
        return {re.sub(r"\.b$", ".bias", re.sub(r"\.[wg]$|(?<=^w.e)$", ".weight", name)): params}
    items = params.items() if isinstance(params, dict) else enumerate(params)
    return {
        name: array for key, value in items for name, array in flat(value, f"{path}.{key}").items()
    }


def assert_params(params, tensors, n_vocab=None):
    found = flat(params)
    assert found.keys() == tensors.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert not array.flags.writeable
        np.testing.assert_array_equal(
            array, tensors[name][: n_vocab if name == "wte.weight" else None]
        )


def is_mapped(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base is not None


TENSORS = stored_tensors(FOLDER / "whole")


# What transformers and tokenizers compute


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_ids_are_transformers(name, expected):
    _, hparams, params = load(FOLDER / name)
    ids, logits, greedy = (expected[f"{name}/{key}"] for key in ("ids", "logits", "greedy"))
    found = gpt2(ids, **params, n_head=hparams["n_head"])[:, ::LOGITS_STEP][:, : logits.shape[1]]
    assert len(ids) == hparams["n_ctx"]
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert generate(ids[:4].tolist(), params, hparams["n_head"], len(greedy)) == greedy.tolist()


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_tokenizers(name):
    encoder = get_encoder(name, str(FOLDER))
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][name], strict=True):
        assert encoder.encode(text) == ids, text
        assert encoder.decode(ids) == text


@pytest.mark.parametrize("name", MODELS)
def test_hparams_and_params_are_those_of_the_files(name):
    encoder, hparams, params = load(FOLDER / name)
    config = json.loads((FOLDER / name / "config.json").read_text())
    sizes = {"n_ctx": config["n_positions"]} | {
        key: config[key] for key in ("n_embd", "n_head", "n_layer")
    }
    assert hparams == {"n_vocab": len(encoder.encoder)} | sizes
    assert_params(params, stored_tensors(FOLDER / name), hparams["n_vocab"])


# The vocabulary


def test_tokens_of_added_tokens_json_are_read_or_cut_off():
    encoder, hparams, params = load(FOLDER / "added_tokens")
    n_vocab = hparams["n_vocab"]
    assert n_vocab == len(params["wte"]) == len(encoder.encoder)
    assert [encoder.decode([i]) for i in range(286, n_vocab)] in (
        ["<|endoftext|>"],
        ["<|endoftext|>", "<sep>", "<|user name|>"],
    )


def test_the_padding_of_a_vocabulary_is_cut_off():
    """vocab_size is 320, but there are 280 tokens: other ids are neither generated nor accepted."""
    encoder, hparams, params = load(FOLDER / "padded")
    assert hparams["n_vocab"] == len(params["wte"]) == 280
    assert is_mapped(params["wte"])
    with pytest.raises(ValueError, match="280"):
        encoder.decode([280])
    with pytest.raises(ValueError, match="280"):
        gpt2([280], **params, n_head=hparams["n_head"])


def test_a_vocabulary_that_is_too_large_is_refused(copy, model_dir):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FOLDER / "special_tokens_first" / name, model_dir)
    with pytest.raises(ValueError, match="290 tokens, but .*280"):
        load(model_dir)


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("special_tokens_first", {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}),
        ("added_tokens", {"<|endoftext|>": 286}),
        ("tokenizer_json", {"<|endoftext|>": 286, "<|user name|>": 287}),
    ],
)
def test_special_tokens_are_decoded_as_written(name, tokens):
    encoder = get_encoder(name, str(FOLDER))
    for token, token_id in tokens.items():
        assert encoder.decode([token_id]) == token
        assert token_id not in encoder.encode(token)  # in a text, it is ordinary text


def write_tokenizer(model_dir, merges, added_tokens=(), **options):
    """Write a tokenizer.json with the 256 bytes, the tokens that the merges make, and added tokens."""
    content = json.loads((FOLDER / "tokenizer_json" / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [token for token, token_id in content["model"]["vocab"].items() if token_id < 256]
    tokens += ["".join(merge) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    content["model"] |= {"vocab": vocabulary, "merges": merges} | options
    content["added_tokens"] = [
        {"content": token, "id": len(tokens) + i} for i, token in enumerate(added_tokens)
    ]
    (model_dir / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return lambda: get_encoder(model_dir.name, str(model_dir.parent))


def test_merges_apply_to_a_word_that_is_a_token(tmp_path):
    """transformers joins "b c" first and never makes "abc", although that is in the vocabulary."""
    encoder = write_tokenizer(tmp_path, [["b", "c"], ["a", "b"], ["ab", "c"]])()
    assert encoder.encode("abc") == [encoder.encoder["a"], encoder.encoder["bc"]]


def test_a_tokenizer_that_ignores_merges_for_whole_words(tmp_path):
    """With ignore_merges, tokenizers takes such a word whole. This must be refused or done."""
    read = write_tokenizer(tmp_path, [["b", "c"], ["a", "b"], ["ab", "c"]], ignore_merges=True)
    with contextlib.suppress(ValueError):
        assert read().encode("abc") == [258]


def test_a_special_token_of_vocab_json_may_contain_a_space(copy):
    """ByteLevelBPETokenizer(...).train(..., special_tokens=["<|user name|>"]), then save_model."""
    model_dir = copy("special_tokens_first")
    text = (model_dir / "vocab.json").read_text(encoding="utf-8")
    (model_dir / "vocab.json").write_text(
        text.replace('"<mask>"', '"<|user name|>"'), encoding="utf-8"
    )
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    assert encoder.decode([4]) == "<|user name|>"


def test_the_older_form_of_tokenizer_json(copy):
    """As in openai-community/gpt2: each merge is one text, and use_regex is absent."""
    model_dir = copy("tokenizer_json")

    def change(content):
        content["model"]["merges"] = list(map(" ".join, content["model"]["merges"]))
        del content["pre_tokenizer"]["use_regex"], content["model"]["ignore_merges"]

    edit_json(model_dir / "tokenizer.json", change)
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    assert list(map(encoder.encode, EXPECTED["texts"])) == EXPECTED["ids"]["tokenizer_json"]


@pytest.mark.parametrize("token", ["the", "the end", "t h", "\n<sep>", "你好"])
def test_an_added_token_may_be_any_text(tmp_path, token):
    """tokenizer.add_tokens(["the"]) of transformers. No merge makes it, so it is only decoded."""
    encoder = write_tokenizer(tmp_path, [["t", "h"]], added_tokens=[token])()
    assert encoder.decode([257]) == token
    assert encoder.encode("the") == [256, encoder.encoder["e"]]


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


TOKENIZER_FAULTS = {
    "lower case": lambda content: content.update(normalizer={"type": "Lowercase"}),
    "another splitter": lambda content: content.update(pre_tokenizer={"type": "Whitespace"}),
    "no splitter": lambda content: content.update(pre_tokenizer=None),
    "a space in front": lambda content: content["pre_tokenizer"].update(add_prefix_space=True),
    "words are not split": lambda content: content["pre_tokenizer"].update(use_regex=False),
    "no model": lambda content: content.pop("model"),
    "no merges": lambda content: content["model"].pop("merges"),
    "merges of numbers": lambda content: content["model"].update(merges=[[1, 2]]),
    "merges of lists": lambda content: content["model"].update(merges=[[["t"], ["h"]]]),
    "merges of three": lambda content: content["model"]["merges"][0].append(""),
    "merges of one": lambda content: content["model"].update(merges=[["th"]]),
    "merges of nothing": lambda content: content["model"].update(merges=[None]),
    "merges are no list": lambda content: content["model"].update(merges=3),
    "ids are text": lambda content: content["model"]["vocab"].update(th="256"),
    "an id twice": lambda content: content["model"]["vocab"].update(th=257),
    "a byte missing": lambda content: content["model"]["vocab"].pop("!"),
    "vocabulary is a list": lambda content: content["model"].update(vocab=[]),
    "added tokens are numbers": lambda content: content.update(added_tokens=[1]),
    "added token without id": lambda content: content["added_tokens"][0].pop("id"),
    "added token is half a character": lambda content: content["added_tokens"][0].update(
        content="\ud800"
    ),
}


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_another_tokenizer_is_refused(copy, fault):
    model_dir = copy("tokenizer_json")
    edit_json(model_dir / "tokenizer.json", TOKENIZER_FAULTS[fault])
    assert_one_line(model_dir, ValueError, "tokenizer.json")


# The weights


@pytest.mark.parametrize("name", ["whole", "sharded", "no_prefix", "six_layers", "padded"])
def test_aligned_float32_is_mapped(name):
    assert all(map(is_mapped, flat(load(FOLDER / name)[2]).values()))


@pytest.mark.parametrize("n_spaces", range(1, 8))
def test_a_file_that_is_not_aligned_is_copied(model_dir, n_spaces):
    header, data = read_safetensors(model_dir / WEIGHTS)
    header = json.dumps(header)
    header += " " * ((n_spaces - len(header)) % 8)
    write_safetensors(model_dir / WEIGHTS, header.encode(), data)
    params = load(model_dir)[2]
    assert_params(params, TENSORS)
    assert {array.flags.aligned for array in flat(params).values()} == {True}
    assert {is_mapped(array) for array in flat(params).values()} == {n_spaces == 4}


def add_tensors(path, **tensors):
    """Write the file anew, with further tensors at its end."""
    header, data = read_safetensors(path)
    for name, (dtype, array) in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    write_safetensors(path, header, data)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_an_output_layer_that_equals_wte(model_dir, dtype):
    wte = TENSORS["wte.weight"].astype(np.float16)
    write_tensors(model_dir / WEIGHTS, TENSORS | {"wte.weight": wte})
    head = wte.astype(np.float32 if dtype == "F32" else np.float16)
    add_tensors(model_dir / WEIGHTS, **{"lm_head.weight": (dtype, head)})
    assert_params(load(model_dir)[2], TENSORS | {"wte.weight": wte.astype(np.float32)})


def test_an_output_layer_of_its_own_is_refused(model_dir):
    head = TENSORS["wte.weight"].copy()
    head[-1, -1] += 1
    add_tensors(model_dir / WEIGHTS, **{"lm_head.weight": ("F32", head)})
    assert_one_line(model_dir, ValueError, "lm_head.weight")


def test_stored_masks_are_ignored(model_dir):
    ones, minus = np.tril(np.ones((1, 1, 64, 64))), np.array(-1e4)
    add_tensors(
        model_dir / WEIGHTS,
        **{
            "transformer.h.0.attn.bias": ("U8", ones.astype(np.uint8)),
            "transformer.h.1.attn.bias": ("BOOL", ones.astype(bool)),
            "transformer.h.0.attn.masked_bias": ("F32", minus.astype(np.float32)),
            "transformer.h.1.attn.masked_bias": ("F64", minus),
        },
    )
    assert_params(load(model_dir)[2], TENSORS)


def test_mixed_types_and_prefixes(model_dir):
    tensors = {}
    for i, (name, array) in enumerate(TENSORS.items()):
        half = array.view(np.uint32) >> 16
        changed = [array, array.astype(np.float16), half.astype(np.uint16)][i % 3]
        tensors["transformer." * (i % 2) + name] = changed
    write_tensors(model_dir / WEIGHTS, tensors)
    assert_params(load(model_dir)[2], stored_tensors(model_dir))


def test_float16_infinity_nan_and_subnormal_numbers(model_dir):
    half = TENSORS["wpe.weight"].astype(np.float16)
    half.reshape(-1)[:4] = np.inf, -np.inf, np.nan, 6e-8
    write_tensors(model_dir / WEIGHTS, TENSORS | {"wpe.weight": half})
    assert_params(load(model_dir)[2], TENSORS | {"wpe.weight": half.astype(np.float32)})


def test_a_tensorflow_checkpoint_in_the_same_folder_comes_first(tiny):
    (tiny / "config.json").write_text("{}")
    (tiny / WEIGHTS).write_bytes(b"")
    assert load(tiny)[1]["n_vocab"] == 1024


def test_a_published_name_may_be_a_hugging_face_folder(tmp_path):
    shutil.copytree(FOLDER / "whole", tmp_path / "124M")
    assert_params(load(tmp_path / "124M")[2], TENSORS)


def test_a_folder_with_brackets_and_spaces(tmp_path):
    folder = shutil.copytree(FOLDER / "sharded", tmp_path / "models [1]" / "my run*[2]")
    assert_params(load(folder)[2], stored_tensors(folder))


# config.json


def test_absent_keys_have_the_defaults_of_gpt2config(model_dir):
    sizes = {"vocab_size": 50257, "n_positions": 1024, "n_embd": 12, "n_layer": 12}
    tensors = {
        "wte.weight": (50257, 12),
        "wpe.weight": (1024, 12),
        "ln_f.weight": (12,),
        "ln_f.bias": (12,),
    }
    for i in range(12):
        shapes = {"ln_1": (12,), "ln_2": (12,), "attn.c_attn": (12, 36), "attn.c_proj": (12, 12)}
        for name, shape in (shapes | {"mlp.c_fc": (12, 48), "mlp.c_proj": (48, 12)}).items():
            tensors |= {f"h.{i}.{name}.weight": shape, f"h.{i}.{name}.bias": shape[-1:]}
    write_tensors(
        model_dir / WEIGHTS, {name: np.zeros(shape, np.float32) for name, shape in tensors.items()}
    )
    (model_dir / "config.json").write_text('{"n_embd": 12}')
    _, hparams, params = load(model_dir)
    assert hparams | {"n_vocab": 0} == {
        "n_vocab": 0,
        "n_ctx": 1024,
        "n_embd": 12,
        "n_head": 12,
        "n_layer": 12,
    }
    assert len(params["blocks"]) == sizes["n_layer"]
    (model_dir / "config.json").write_text("{}")
    assert_one_line(model_dir, ValueError, "[50257, 768]")


def test_the_old_name_of_n_positions(model_dir):
    edit_json(
        model_dir / "config.json", lambda config: config.update(n_ctx=config.pop("n_positions"))
    )
    assert load(model_dir)[1]["n_ctx"] == 64


def test_n_positions_comes_before_n_ctx(model_dir):
    edit_json(model_dir / "config.json", lambda config: config.update(n_ctx=32))
    assert load(model_dir)[1]["n_ctx"] == 64


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("activation_function", "gelu_pytorch_tanh"),
        ("layer_norm_epsilon", 0.00001),
        ("n_inner", 32),
        ("n_inner", None),
        ("reorder_and_upcast_attn", True),
        ("torch_dtype", "float16"),
        ("resid_pdrop", 0.9),
        ("anything", {"nested": [1]}),
    ],
)
def test_a_configuration_of_the_same_computation(model_dir, key, value):
    edit_json(model_dir / "config.json", lambda config: config.update({key: value}))
    assert_params(load(model_dir)[2], TENSORS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            ("activation_function", value)
            for value in ("gelu", "relu", "gelu_fast", None, ["gelu_new"], 1)
        ),
        *(("layer_norm_epsilon", value) for value in (1e-6, 0, "1e-05", None, math.nan, math.inf)),
        *(("scale_attn_weights", value) for value in (False, None, "true")),
        *(("scale_attn_by_inverse_layer_idx", value) for value in (True, "false")),
        *(("add_cross_attention", value) for value in (True, [])),
        *(("tie_word_embeddings", value) for value in (False, None)),
        *(("model_type", value) for value in ("gptj", "gpt_neo", None, {})),
        *(("n_head", value) for value in (3, 0, -2, 2.0, True, "2", None, [2], math.nan)),
        *(("n_layer", value) for value in (1, 3, 0, -1, 10**9, 2.0, "2", None)),
        *(("n_embd", value) for value in (4, 16, 0, 8.0, 10**30, None)),
        *(("n_positions", value) for value in (63, 65, 0, 10**30, "64", None)),
        *(("vocab_size", value) for value in (279, 281, 0, -280, 10**30, 280.0, None)),
        *(("n_inner", value) for value in (31, 33, -32, "32", True, [32], 10**30, math.nan)),
    ],
)
def test_another_configuration_is_refused_with_its_value(model_dir, key, value):
    edit_json(model_dir / "config.json", lambda config: config.update({key: value}))
    message = assert_one_line(model_dir, ValueError)
    if not (
        key == "n_inner" or (type(value) is int and value > 0)
    ):  # else a tensor has another shape
        assert str(model_dir / "config.json") in message
        assert key in message.replace("n_vocab", "vocab_size").replace("n_ctx", "n_positions")
        assert repr(value) in message


CONFIGS = {
    "empty": b"",
    "html": b"<html>",
    "list": b"[]",
    "null": b"null",
    "number": b"1e400",
    "cut": b'{"n_embd": 8',
    "two objects": b"{}{}",
    "not UTF-8": b'{"n_embd": "\xff"}',
    "UTF-16": '{"n_embd": 8}'.encode("utf-16"),
    "deep nesting": b'{"a":' * 100_000,
    "long number": b'{"n_embd": ' + b"9" * 5000 + b"}",
    "control character": b'{"a\nb": 1}',
    "zeros": bytes(800),
}


@pytest.mark.parametrize("content", CONFIGS)
def test_a_damaged_config(model_dir, content):
    (model_dir / "config.json").write_bytes(CONFIGS[content])
    assert_one_line(model_dir, ValueError, "config.json")


# Damage to the weights


def assert_one_line(model_dir, kind, *words):
    with pytest.raises(kind) as error:
        load(model_dir)
    message = str(error.value)
    assert "\n" not in message
    for word in (model_dir, *words):
        assert str(word) in message
    return message


def change_offsets(*offsets):
    return lambda header: header[C_FC].update(data_offsets=list(offsets))


def move(begin, end):
    def change(header):
        old = header[C_FC]["data_offsets"]
        header[C_FC]["data_offsets"] = [old[0] + begin, old[1] + end]

    return change


def put(**entry):
    return lambda header: header[C_FC].update(entry)


def rename(name):
    return lambda header: header.update({name: header.pop(C_FC)})


N = 1024  # bytes of C_FC, float32 [8, 32]
HEADER_FAULTS = {
    "overlap": move(-4, -4),
    "overlap at the end": move(0, 4),
    "gap": move(4, 4),
    "offsets of another tensor": lambda header: header[C_FC].update(
        header["transformer.h.0.mlp.c_fc.weight"]
    ),
    "far outside": move(10**6, 10**6),
    "far outside, huge": move(2**62, 2**62),
    "wrapping around": move(2**64, 2**64),
    "wrapping around at the end": move(0, 2**64),
    "wrapping around 32 bits": move(2**32, 2**32),
    "negative": change_offsets(-N, 0),
    "negative end": change_offsets(0, -N),
    "backwards": lambda header: header[C_FC]["data_offsets"].reverse(),
    "empty": lambda header: header[C_FC].update(data_offsets=header[C_FC]["data_offsets"][:1] * 2),
    "offsets of float": change_offsets(0.0, float(N)),
    "offsets of bool": change_offsets(False, True),
    "offsets of text": change_offsets("0", str(N)),
    "offsets of null": change_offsets(None, None),
    "offsets of NaN": change_offsets(math.nan, math.nan),
    "offsets of infinity": change_offsets(0, math.inf),
    "offsets of lists": change_offsets([0], [N]),
    "one offset": change_offsets(0),
    "three offsets": change_offsets(0, N, 2 * N),
    "no offsets": change_offsets(),
    "offsets missing": lambda header: header[C_FC].pop("data_offsets"),
    "offsets are an object": put(data_offsets={"0": 1, "1": 2}),
    "shape swapped": put(shape=[32, 8]),
    "shape flat": put(shape=[256]),
    "shape smaller": put(shape=[8, 31]),
    "shape larger": put(shape=[8, 33]),
    "shape negative": put(shape=[-8, -32]),
    "shape wrapping around": put(shape=[8, 32 + 2**61]),
    "shape huge": put(shape=[10**30, 10**30]),
    "shape zero": put(shape=[0, 32]),
    "shape of float": put(shape=[8.0, 32]),
    "shape of bool": put(shape=[True, 256]),
    "shape of NaN": put(shape=[8, math.nan]),
    "shape of text": put(shape="8,32"),
    "shape null": put(shape=None),
    "shape missing": lambda header: header[C_FC].pop("shape"),
    "shape with many axes": put(shape=[1] * 1000 + [8, 32]),
    "type unknown": put(dtype="F31"),
    "type of another size": put(dtype="F16"),
    "type of integers": put(dtype="I32"),
    "type F64": put(dtype="F64"),
    "type empty": put(dtype=""),
    "type null": put(dtype=None),
    "type is a list": put(dtype=["F32"]),
    "type is an object": put(dtype={}),
    "type with a newline": put(dtype="F32\n"),
    "type missing": lambda header: header[C_FC].pop("dtype"),
    "entry null": lambda header: header.update({C_FC: None}),
    "entry a list": lambda header: header.update({C_FC: [1, 2]}),
    "entry a text": lambda header: header.update({C_FC: "data_offsets"}),
    "tensor missing": lambda header: header.pop(C_FC),
    "tensor of another name": rename("transformer.h.1.mlp.c_fc.Weight"),
    "tensor of a third layer": rename("transformer.h.2.mlp.c_fc.weight"),
    "prefix twice": rename("transformer." + C_FC),
    "more layers": lambda header: header.update(
        {"h.2.ln_1.weight": header.pop("transformer.h.1.ln_1.weight")}
    ),
    "name with a newline": rename("a\nb"),
    "faulty entry of a name with a newline": lambda header: header.update(
        {"a\nb": header[C_FC] | {"shape": [-1]}}
    ),
    "metadata is a tensor": rename("__metadata__"),
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_faulty_header(model_dir, fault):
    header, data = read_safetensors(model_dir / WEIGHTS)
    HEADER_FAULTS[fault](header)
    write_safetensors(model_dir / WEIGHTS, header, data)
    assert_one_line(model_dir, ValueError)


HEADERS = {
    "empty": b"",
    "no tensors": b"{}",
    "spaces": b"   ",
    "list": b"[]",
    "null": b"null",
    "number": b"7",
    "text": b'"text"',
    "cut": b'{"transformer.wte.weight": {"dtype": "F32", "sh',
    "not UTF-8": b'{"\xff\xfe": 1}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "UTF-8 of half a character": b'{"\xed\xa0\x80": 1}',
    "byte order mark": b"\xef\xbb\xbf{}",
    "deep nesting": b"[" * 100_000,
    "deep nesting of objects": b'{"a":' * 100_000,
    "deep nesting of a shape": b'{"a": {"data_offsets": [0, 4], "shape": '
    + b"[" * 900
    + b"]" * 900
    + b"}}",
    "deep nesting of offsets": b'{"a": {"data_offsets": ' + b"[" * 900 + b"]" * 900 + b"}}",
    "long number": b'{"a": {"dtype": "F32", "shape": ['
    + b"9" * 5000
    + b'], "data_offsets": [0, 4]}}',
    "zeros": bytes(100),
}


@pytest.mark.parametrize("content", HEADERS)
def test_a_header_of_something_else(model_dir, content):
    _, data = read_safetensors(model_dir / WEIGHTS)
    write_safetensors(model_dir / WEIGHTS, HEADERS[content], data)
    assert_one_line(model_dir, ValueError, WEIGHTS)


@pytest.mark.parametrize("change", [-(2**31), -100, -1, 1, 8, 2**20, 2**31, 2**32, 2**62, 2**63])
def test_a_wrong_header_length(model_dir, change):
    content = (model_dir / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little") + change
    (model_dir / WEIGHTS).write_bytes((length % 2**64).to_bytes(8, "little") + content[8:])
    assert_one_line(model_dir, ValueError, WEIGHTS)


def test_headers_are_100_megabytes_at_most(model_dir):
    with open(model_dir / WEIGHTS, "wb") as file:
        file.write((200_000_000).to_bytes(8, "little") + b"{}")
        file.truncate(300_000_000)  # a sparse file
    assert_one_line(model_dir, ValueError, WEIGHTS)


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_a_name_in_two_files(model_dir, prefix):
    write_tensors(model_dir / "other.safetensors", {f"{prefix}ln_f.bias": TENSORS["ln_f.bias"]})
    assert_one_line(model_dir, ValueError, "ln_f.bias")


def test_a_name_with_and_without_prefix_in_one_file(model_dir):
    add_tensors(model_dir / WEIGHTS, **{"ln_f.bias": ("F32", TENSORS["ln_f.bias"])})
    assert_one_line(model_dir, ValueError, "ln_f.bias")


@pytest.mark.parametrize("name", ["wte.weight", "ln_f.bias", "h.1.mlp.c_fc.weight"])
@pytest.mark.parametrize("n", [0, 2])
def test_a_tensor_with_another_axis(model_dir, name, n):
    write_tensors(model_dir / WEIGHTS, TENSORS | {name: np.stack([TENSORS[name]] * 2)[:n]})
    assert_one_line(model_dir, ValueError)


def test_extra_bytes_at_the_end(model_dir):
    with open(model_dir / WEIGHTS, "ab") as file:
        file.write(bytes(4))
    assert_one_line(model_dir, ValueError, WEIGHTS)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_part(copy, number):
    model_dir = copy("sharded")
    (model_dir / f"model-0000{number}-of-00003.safetensors").unlink()
    assert_one_line(model_dir, (ValueError, FileNotFoundError))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "config.json", WEIGHTS])
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    named = {"vocab.json": r"vocab\.json|encoder\.json", WEIGHTS: r"safetensors"}.get(
        name, re.escape(name)
    )
    message = assert_one_line(model_dir, FileNotFoundError)
    assert re.search(named, message)


def fails_or_is_right(model_dir, tensors):
    """Whether the folder loads. If so, the parameters must be right, if not, one line must name the file."""
    try:
        _, hparams, params = load(model_dir)
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        assert_params(params, tensors, hparams["n_vocab"])
        return True
    assert "\n" not in message
    assert str(model_dir) in message
    return False


def flips(intact, n, rng):
    """n copies of intact, each with one other bit that is changed."""
    for _ in range(n):
        damaged = bytearray(intact)
        damaged[rng.randrange(len(intact))] ^= 1 << rng.randrange(8)
        yield bytes(damaged)


@pytest.mark.parametrize("model", ["whole", "bfloat16", "sharded"])
def test_no_flipped_bit_in_a_header_gives_wrong_parameters(copy, model):
    model_dir, rng = copy(model), random.Random(model)
    tensors = stored_tensors(model_dir)
    path = max(model_dir.glob("*.safetensors"))
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    for header in flips(content[:end], N_FLIPS, rng):
        path.write_bytes(header + content[end:])
        fails_or_is_right(model_dir, tensors)


def test_no_cut_file_loads(model_dir):
    path, rng = model_dir / WEIGHTS, random.Random(0)
    content = path.read_bytes()
    for length in [
        *range(12),
        len(content) - 1,
        len(content) - 4,
        *rng.sample(range(len(content)), N_FLIPS),
    ]:
        path.write_bytes(content[:length])
        assert_one_line(model_dir, ValueError, WEIGHTS)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("whole", name) for name in ("config.json", "vocab.json", "merges.txt")),
        *(("special_tokens_first", name) for name in ("vocab.json", "merges.txt")),
        ("added_tokens", "added_tokens.json"),
        ("tokenizer_json", "tokenizer.json"),
    ],
)
def test_damaged_json_and_merges_give_one_line(copy, model, name):
    model_dir, rng = copy(model), random.Random(model + name)
    tensors, path = stored_tensors(model_dir), model_dir / name
    intact = path.read_bytes()
    cuts = [intact[: len(intact) * i // 30] for i in range(30)]
    for damaged in [*flips(intact, N_FLIPS, rng), *cuts]:
        path.write_bytes(damaged)
        fails_or_is_right(model_dir, tensors)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(
            (model, name)
            for model in ("whole", "special_tokens_first")
            for name in ("vocab.json", "merges.txt")
        ),
        ("tokenizer_json", "tokenizer.json"),
    ],
)
def test_no_flipped_bit_in_a_vocabulary_gives_wrong_ids(copy, model, name):
    model_dir, rng = copy(model), random.Random(name)
    intact = (model_dir / name).read_bytes()
    for damaged in flips(intact, N_FLIPS, rng):
        (model_dir / name).write_bytes(damaged)
        with contextlib.suppress(ValueError):
            encoder = get_encoder(model_dir.name, str(model_dir.parent))
            assert list(map(encoder.encode, EXPECTED["texts"])) == EXPECTED["ids"][model]


# Pickles


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


OPENED = """
import os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(os.path.basename(str(args[0]))) if event == "open" else None)
import utils
try:
    utils.load_encoder_hparams_and_params(sys.argv[1], sys.argv[2])
except FileNotFoundError as error:
    print(error)
print("opened:", *sorted({"config.json", "pytorch_model.bin", "model.safetensors"}.intersection(opened)))
"""


def python(code, *arguments, cwd=ROOT):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("alone", [True, False])
def test_a_pickle_is_never_opened(model_dir, alone):
    (model_dir / "pytorch_model.bin").write_bytes(pickle.dumps(Malicious()))
    if alone:
        (model_dir / WEIGHTS).unlink()
    result = python(OPENED, model_dir.name, model_dir.parent, cwd=model_dir)
    *error, opened = result.stdout.splitlines()
    assert (result.stderr, result.returncode) == ("", 0)
    assert opened == "opened: config.json" + " model.safetensors" * (not alone)
    assert not (model_dir / "executed").exists()
    assert len(error) == alone
    assert all(".bin" in line and "save_pretrained" in line for line in error)


# Without TensorFlow

TINY_RECORDS = shutil.ignore_patterns("*.verified.json", "*.layout.json")
LOAD = """
import sys
sys.modules["tensorflow"] = None
from utils import load_encoder_hparams_and_params
encoder, _, params = load_encoder_hparams_and_params(sys.argv[1], sys.argv[2])
print(encoder.decode(encoder.encode("ROMEO")), params["wte"].shape)
"""
DATA, RECORD = "model.ckpt.data-00000-of-00001", "model.ckpt.verified.json"
SIZES = {"n_vocab": 280, "n_ctx": 64, "n_embd": 8, "n_head": 2, "n_layer": 2}


@pytest.fixture
def tiny(tmp_path):
    """A copy of models/tiny that was never loaded."""
    return shutil.copytree(ROOT / "models" / "tiny", tmp_path / "tiny", ignore=TINY_RECORDS)


@pytest.fixture
def known(tmp_path, monkeypatch):
    """A checkpoint in OpenAI's layout whose SHA-256 is known, with the values of the folder `whole`. Not loaded yet.

    TensorFlow writes the variables sorted by name, one after another. Nothing but TensorFlow reads the index.
    """
    folder = tmp_path / "known"
    folder.mkdir()
    for old, new in ("vocab.json", "encoder.json"), ("merges.txt", "vocab.bpe"):
        shutil.copy(FOLDER / "whole" / old, folder / new)
    (folder / "hparams.json").write_text(json.dumps(SIZES))
    (folder / "checkpoint").write_text('model_checkpoint_path: "model.ckpt"\n')
    (folder / "model.ckpt.index").write_bytes(b"not read")
    variables = {}
    for name, array in TENSORS.items():
        last = "b" if name.endswith("bias") else "g" if "ln_" in name else "w"
        path = re.sub(r"^h/(\d+)", r"h\1", name.replace(".", "/"))
        variables[re.sub(r"(?<=w[tp]e)/w$", "", re.sub(r"(weight|bias)$", last, path))] = (
            array.tobytes()
        )
    data = b"".join(variables[name] for name in sorted(variables))
    (folder / DATA).write_bytes(data)
    monkeypatch.setitem(utils.KNOWN_DATA, tuple(SIZES.values()), hashlib.sha256(data).hexdigest())
    return folder


@pytest.fixture
def no_tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)


def test_tiny_needs_no_tensorflow(tiny):
    for is_recorded in (False, True):
        assert (tiny / RECORD).exists() == is_recorded
        result = python(LOAD, tiny.name, tiny.parent)
        assert (result.stdout, result.stderr, result.returncode) == ("ROMEO (1024, 128)\n", "", 0)


def test_a_known_data_file_needs_no_tensorflow(known, no_tensorflow):
    for is_recorded in (False, True):
        assert (known / RECORD).exists() == is_recorded
        params = load(known)[2]
        assert_params(params, TENSORS)
        assert all(map(is_mapped, flat(params).values()))


@pytest.mark.parametrize("recorded", [False, True])
def test_one_wrong_byte_needs_tensorflow(known, no_tensorflow, recorded):
    if recorded:
        load(known)
    data = (known / DATA).read_bytes()
    for damaged in [*flips(data, 30, random.Random(0)), data[:-1] + b"x"]:
        (known / DATA).write_bytes(damaged)
        with pytest.raises(ImportError, match="pip install .*") as error:
            load(known)
        assert "\n" not in str(error.value)
        assert str(known) in str(error.value)
    (known / DATA).write_bytes(data)
    assert_params(load(known)[2], TENSORS)


def test_tensorflow_refuses_a_wrong_byte(tiny):
    data = bytearray((tiny / DATA).read_bytes())
    data[len(data) // 2] ^= 1
    (tiny / DATA).write_bytes(data)
    assert_one_line(tiny, ValueError, DATA)
    assert not (tiny / RECORD).exists()


RECORDS = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "object": b"{}",
    "not UTF-8": b"\xff",
    "deep nesting": b"[" * 100_000,
    "long number": b"9" * 5000,
    "zeros": bytes(100),
}


@pytest.mark.parametrize("content", RECORDS)
def test_a_record_of_something_else_does_no_harm(known, no_tensorflow, content):
    (known / RECORD).write_bytes(RECORDS[content])
    assert_params(load(known)[2], TENSORS)


def test_a_damaged_record_does_no_harm(known, no_tensorflow):
    load(known)
    intact = (known / RECORD).read_bytes()
    cuts = [intact[:length] for length in range(len(intact))]
    for damaged in [*flips(intact, N_FLIPS, random.Random(0)), *cuts]:
        (known / RECORD).write_bytes(damaged)
        assert_params(load(known)[2], TENSORS)
    assert (known / RECORD).read_bytes() == intact


def test_the_record_of_another_file_does_no_harm(known, no_tensorflow):
    load(known)
    record = (known / RECORD).read_bytes()
    data = (known / DATA).read_bytes()
    (known / DATA).write_bytes(data[::-1])
    (known / RECORD).write_bytes(record)
    with pytest.raises(ImportError, match="pip install"):
        load(known)
