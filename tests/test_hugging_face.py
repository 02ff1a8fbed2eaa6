"""Hugging Face folders, intact and damaged.

make_hugging_face.py made the folders in tests/data/hugging_face and the results of transformers
and tokenizers.
"""

import json
import math
import os
import random
import re
import shutil

import numpy as np
import pytest
from helpers import DATA_DIR, flat, is_mapped, load
from hugging_face_kinds import (
    CONFIGS,
    END_PROMPT,
    FAST,
    KIND_TEXTS,
    N_RANDOM,
    ODD,
    REMOVE,
    TOKENIZERS,
    edit,
    random_tokenizer,
)

from encoder import TextDecoder
from gpt2 import generate, gpt2
from hugging_face import CONFIG_SETTINGS, DEFAULT_ID, read_config, read_encoder

FOLDER = DATA_DIR / "hugging_face"
EXPECTED = json.loads((FOLDER / "expected.json").read_text())
MODELS = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
LOGITS_STEP = 19  # of make_hugging_face.py
N_FLIPS = int(os.environ.get("NPGPT_FLIPS", 40))
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def expected():
    with np.load(FOLDER / "expected.npz") as arrays:
        return dict(arrays)


@pytest.fixture
def copy(tmp_path):
    return lambda name, *to: shutil.copytree(FOLDER / name, tmp_path.joinpath(name, *to))


@pytest.fixture
def model_dir(copy):
    """A copy of the folder `whole`, to do anything with."""
    return copy("whole")


def load_encoder(model_dir):
    return read_encoder(model_dir, read_config(model_dir))


def assert_one_line(model_dir, kind, *words, load=load):
    with pytest.raises(kind) as error:
        load(model_dir)
    message = str(error.value)
    assert "\n" not in message
    for word in (model_dir, *words):
        assert str(word) in message
    return message


# An independent reader and writer of safetensors

TYPES = {"F32": "float32", "F16": "float16", "BF16": "uint16", "U8": "uint8", "F64": "float64"}


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
    header, data = {}, b""
    for name, array in tensors.items():
        (dtype,) = [key for key, value in TYPES.items() if value == array.dtype.name]
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    write_safetensors(path, header, data)


def stored_tensors(model_dir):
    """{name without prefix: float32 array} of all files in a folder."""
    tensors = {}
    for path in model_dir.glob("*.safetensors"):
        header, data = read_safetensors(path)
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            array = np.frombuffer(data[begin:end], TYPES[entry["dtype"]])
            if entry["dtype"] == "BF16":
                array = np.stack([np.zeros_like(array), array], axis=-1).view(np.float32)
            array = array.astype(np.float32).reshape(entry["shape"])
            tensors[name.removeprefix("transformer.")] = array
    return tensors


def our_name(name):
    """h.0.ln_1.weight -> model/h0/ln_1/g."""
    *parts, last = re.sub(r"^h\.", "h", name).split(".")
    if name not in ("wte.weight", "wpe.weight"):
        norm = parts[-1].startswith("ln_")
        parts.append("b" if last == "bias" else "g" if norm else "w")
    return "/".join(["model", *parts])


def assert_params(params, tensors, n_vocab=None):
    """The params are these tensors and nothing else. n_vocab: the rows of wte that stay."""
    tensors = {our_name(name): array for name, array in tensors.items()}
    tensors["model/wte"] = tensors["model/wte"][:n_vocab]
    found = flat(params)
    assert found.keys() == tensors.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, tensors[name])


TENSORS = stored_tensors(FOLDER / "whole")
HEADER, DATA = read_safetensors(FOLDER / "whole" / WEIGHTS)


# What transformers and tokenizers compute


@pytest.mark.parametrize("name", [*MODELS, *CONFIGS])
def test_logits_and_greedy_ids_are_those_of_transformers(copy, name, expected):
    folder = "whole" if name in CONFIGS else name
    model_dir = copy(folder)
    edit(model_dir, {"config.json": CONFIGS.get(name, {})})
    _, hparams, params = load(model_dir)
    ids = expected[f"{folder}/ids"]
    logits = expected[f"{name}/logits"]
    greedy = expected[f"{name}/greedy"].tolist()
    assert len(ids) == hparams["n_ctx"]
    found = gpt2(ids, **params, n_head=hparams["n_head"])[:, ::LOGITS_STEP][:, : logits.shape[1]]
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    assert generate(ids[:4].tolist(), params, hparams["n_head"], len(greedy)) == greedy


@pytest.mark.parametrize("name", MODELS)
def test_hparams_and_params_are_those_of_the_files(name):
    _, hparams, params = load(FOLDER / name)
    config = json.loads((FOLDER / name / "config.json").read_text())
    n_vocab = 280 if name == "padded" else config["vocab_size"]
    sizes = {key: config[key] for key in ("n_embd", "n_head", "n_layer")}
    assert hparams == {"n_vocab": n_vocab, "n_ctx": config["n_positions"]} | sizes
    assert_params(params, stored_tensors(FOLDER / name), n_vocab)
    is_float32 = name not in ("float16", "bfloat16")
    assert {is_mapped(array) for array in flat(params).values()} == {is_float32}


@pytest.mark.parametrize("name", EXPECTED["ends"])
def test_the_ids_that_end_a_text_are_those_of_transformers(model_dir, name):
    case = EXPECTED["ends"][name]
    edit(model_dir, case["edits"])
    encoder, hparams, params = load(model_dir)
    ids = generate(END_PROMPT, params, hparams["n_head"], len(case["all"]))
    assert ids == case["all"]
    ends = [i for i, token_id in enumerate(ids) if token_id in encoder.end_ids]
    assert ids[: ends[0] + 1 if ends else None] == case["new"]


NO_BOS = {"bos_token": None}
NO_EOS = NO_BOS | {"eos_token": None}


@pytest.mark.parametrize(
    ("settings", "config", "generation", "start", "ends"),
    [
        ({}, (3, 4), {}, 279, {4}),
        ({"bos_token": "<new>"}, (3, 4), {}, 279, {4}),  # it has no row
        (NO_BOS | {"eos_token": "h"}, (3, 4), {}, 71, {4}),
        (NO_EOS, (3, [4, 5]), {}, 3, {4, 5}),
        (NO_EOS, (None, [4, 5]), {"eos_token_id": None}, 4, {4, 5}),
        (NO_EOS, (3.0, [4.0, True]), {}, 3, {4, 1}),  # numbers of another type
        (NO_EOS, (3, 4), {"bos_token_id": 6, "eos_token_id": 7}, 6, {7}),
        ({}, (REMOVE, REMOVE), {}, 279, set()),  # the default, 50256, has no row
        (NO_EOS, (280, None), {}, None, set()),
    ],
)
def test_the_ids_that_start_and_end_a_text(model_dir, settings, config, generation, start, ends):
    config = dict(zip(("bos_token_id", "eos_token_id"), config, strict=True))
    edit(model_dir, {"config.json": config, "generation_config.json": generation})
    edit(model_dir, {"tokenizer_config.json": settings})
    encoder = load_encoder(model_dir)
    assert encoder.decode([279]) == "<|endoftext|>"
    assert (encoder.start_id, encoder.end_ids) == (start, ends)
    assert {type(token_id) for token_id in {start or 0, *encoder.end_ids}} == {int}


def assert_ids(model_dir, name):
    """The texts get the ids that transformers gives them with the vocabulary of a folder."""
    encoder = load_encoder(model_dir)
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][name], strict=True):
        assert encoder.encode(text) == ids, text
        assert encoder.decode(ids) == text


@pytest.mark.parametrize("name", EXPECTED["ids"])
def test_ids_are_those_of_transformers(name):
    assert_ids(FOLDER / name, name)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_setting_of_a_tokenizer_is_obeyed(copy, name):
    edits = TOKENIZERS[name]
    model_dir = copy("tokenizer_json" if "tokenizer.json" in edits else "added_tokens")
    edit(model_dir, edits)
    encoder = load_encoder(model_dir)
    ids, special = EXPECTED["tokenizers"][name]
    assert [encoder.encode(text, allowed_special="all") for text in KIND_TEXTS] == ids
    assert sorted(encoder.special_tokens.values()) == special


@pytest.mark.parametrize(("file", "setting", "value"), ODD)
def test_what_is_not_supported_is_refused_by_name(copy, file, setting, value):
    model_dir = copy("tokenizer_json")
    edit(model_dir, {file: {setting: value}})
    assert_one_line(model_dir, ValueError, model_dir / file, setting, load=load_encoder)


@pytest.mark.parametrize("first", range(0, N_RANDOM, 50))
def test_random_tokenizers_are_obeyed_or_refused(copy, first):
    """Ids and texts are those of transformers, or one line names the file and the setting."""
    n_refused = 0
    for seed in range(first, first + 50):
        edits, texts = random_tokenizer(seed)
        model_dir = copy("tokenizer_json", str(seed))
        edit(model_dir, edits)
        try:
            encoder = load_encoder(model_dir)
        except ValueError:
            assert_one_line(model_dir, ValueError, "/tokenizer", ".json: ", load=load_encoder)
            n_refused += 1
            continue
        for text, answer in zip(texts, EXPECTED["random"][seed], strict=True):
            if answer is None:  # tokenizers cannot do it, either
                continue
            ids, without_special, decoded = answer
            assert encoder.encode(text, allowed_special="all") == ids, (seed, text)
            assert encoder.encode(text) == without_special, (seed, text)
            decoder = TextDecoder(encoder)
            pieces = [decoder.decode([token_id]) for token_id in ids]
            assert "".join(pieces) + decoder.decode([], final=True) == decoded
            assert encoder.decode(ids) == decoded
    assert n_refused <= 12


# The vocabulary


@pytest.mark.parametrize(("n_rows", "n_vocab"), [(281, 280), (408, 280), (279, 279), (152, 152)])
def test_rows_and_tokens_that_do_not_match(model_dir, n_rows, n_vocab):
    """There are 280 tokens. Ids without a row or a token are neither generated nor accepted."""
    wte = np.resize(TENSORS["wte.weight"], (n_rows, 8))
    write_tensors(model_dir / WEIGHTS, TENSORS | {"wte.weight": wte})
    edit(model_dir, {"config.json": {"vocab_size": n_rows}})
    encoder, hparams, params = load(model_dir)
    assert hparams["n_vocab"] == len(params["wte"]) == n_vocab
    assert encoder.encode("<|endoftext|>", allowed_special="all") == [279]
    with pytest.raises(ValueError, match="280"):
        encoder.decode([280])
    with pytest.raises(ValueError, match=f"{n_vocab} is not a token id"):
        gpt2([n_vocab], **params, n_head=hparams["n_head"])


@pytest.mark.parametrize("setting", [None, "fuse_unk", "byte_fallback"])
def test_a_missing_byte_is_unknown_or_an_error(copy, setting):
    model_dir = copy("tokenizer_json")
    changes = {"model.vocab.z": REMOVE, "model.vocab.<|endoftext|>": 89, "added_tokens": []}
    edit(model_dir, {"tokenizer.json": changes, "tokenizer_config.json": FAST})
    with pytest.raises(ValueError, match="no tokens for a character of 'azzb'"):
        load_encoder(model_dir).encode("azzb")
    edit(model_dir, {"tokenizer.json": {"model.unk_token": "!", f"model.{setting}": True}})
    encoder = load_encoder(model_dir)
    if setting is None:
        assert [encoder.decoder[i] for i in encoder.encode("azzb")] == ["a", "!", "!", "b"]
    else:  # there, unknown bytes are not always one token each
        with pytest.raises(ValueError, match="azzb"):
            encoder.encode("azzb")


TOKENIZER_FAULTS = {
    "no model": {"model": REMOVE},
    "no merges": {"model.merges": REMOVE},
    "merges of lists": {"model.merges": [[["t"], ["h"]]]},
    "merges of one": {"model.merges": [["th"]]},
    "merges of nothing": {"model.merges": [None]},
    "merges of unknown tokens": {"model.merges": [["q", "u"]]},
    "an id beyond the count": {"model.vocab.th": 300},
    "vocabulary is a list": {"model.vocab": []},
    "added tokens are numbers": {"added_tokens": [1]},
    "added token is half a character": {"added_tokens.1.content": "\ud800"},
    "template without its token": {"post_processor": {"type": "TemplateProcessing", "single": [1]}},
}


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_a_damaged_tokenizer_is_refused(copy, fault):
    model_dir = copy("tokenizer_json")
    edit(model_dir, {"tokenizer.json": TOKENIZER_FAULTS[fault]})
    assert_one_line(model_dir, ValueError, "tokenizer.json")


@pytest.mark.parametrize("token", [["x"], {}, {"content": 5}, "\ud800"])
def test_a_damaged_start_token_is_refused(model_dir, token):
    edit(model_dir, {"tokenizer_config.json": {"bos_token": token}})
    assert_one_line(model_dir, ValueError, "tokenizer_config.json is damaged")


# config.json


def test_absent_keys_have_the_defaults_of_gpt2config(model_dir):
    (model_dir / "config.json").write_text("{}")
    config = read_config(model_dir)
    defaults = EXPECTED["defaults"]
    assert (config["n_vocab"], config["n_ctx"]) == (defaults["vocab_size"], defaults["n_positions"])
    for key in ("n_embd", "n_head", "n_layer", "layer_norm_epsilon"):
        assert config[key] == defaults[key]
    assert defaults["bos_token_id"] == defaults["eos_token_id"] == DEFAULT_ID
    plain = {"n_layer": 2, "n_embd": 8, "n_head": 2, "n_positions": 64, "vocab_size": 280}
    for settings in (plain, {key: defaults.get(key) for key in CONFIG_SETTINGS} | plain):
        (model_dir / "config.json").write_text(json.dumps(settings))
        assert_params(load(model_dir)[2], TENSORS)


def test_settings_that_do_not_change_the_computation(model_dir):
    changes = {"n_inner": 32, "reorder_and_upcast_attn": True, "anything": {"nested": [1]}}
    edit(model_dir, {"config.json": changes | {"n_ctx": 64, "n_positions": REMOVE}})
    _, hparams, params = load(model_dir)
    assert hparams["n_ctx"] == 64
    assert_params(params, TENSORS)


REFUSED = {
    "activation_function": ["gelu_fast", ["gelu_new"], 1],
    "layer_norm_epsilon": [0, "1e-05", None],
    "scale_attn_weights": ["true"],
    "scale_attn_by_inverse_layer_idx": ["false"],
    "add_cross_attention": [True, []],
    "tie_word_embeddings": [False],
    "model_type": ["gptj", {}],
    "quantization_config": [{"load_in_8bit": True}],
    "torch_dtype": ["float64", "int8"],
    "dtype": ["float8_e4m3fn"],
    "tokenizer_class": ["BertTokenizer"],
    "n_head": [3, 0, -2, 2.0, True, "2", None, [2], math.nan],
    "n_layer": [1, 3, 0, 10**9],
    "n_embd": [4, 16, 0, None],
    "n_positions": [63, 65, 10**30, None],
    "vocab_size": [279, 281, -280, 280.0],
    "n_inner": [31, 33],
}


@pytest.mark.parametrize("key", REFUSED)
def test_another_configuration_is_refused_with_its_value(model_dir, key):
    for value in REFUSED[key]:
        edit(model_dir, {"config.json": {key: value}})
        message = assert_one_line(model_dir, ValueError)
        if type(value) is not int or value <= 0:  # else a tensor has another shape
            name = {"vocab_size": "n_vocab", "n_positions": "n_ctx"}.get(key, key)
            assert str(model_dir / "config.json") in message
            assert key in message or name in message
            assert repr(value) in message


# The weights


@pytest.mark.parametrize("n_spaces", [1, 2, 4, 7])
def test_a_file_that_is_not_aligned_is_copied(model_dir, n_spaces):
    header = json.dumps(HEADER)
    header += " " * ((n_spaces - len(header)) % 8)
    write_safetensors(model_dir / WEIGHTS, header.encode(), DATA)
    params = load(model_dir)[2]
    assert_params(params, TENSORS)
    assert {array.flags.aligned for array in flat(params).values()} == {True}
    assert {is_mapped(array) for array in flat(params).values()} == {n_spaces == 4}


WTE = TENSORS["wte.weight"]
HALF_WTE = WTE.astype(np.float16)
HALF_WTE.reshape(-1)[:3] = np.inf, -np.inf, 6e-8
NAN_WPE = TENSORS["wpe.weight"].astype(np.float16)
NAN_WPE[0, 0] = np.nan
WITHOUT_WTE = {name: array for name, array in TENSORS.items() if name != "wte.weight"}
BF16 = {"transformer.wte.weight": (WTE.view(np.uint32) >> 16).astype(np.uint16)}
MASKS = {"transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 64, 64), np.uint8))}
MASKS |= {"h.1.attn.masked_bias": np.array(-1e4, np.float32)}
FORMS = {
    "mixed types and prefixes": WITHOUT_WTE | BF16 | {"wpe.weight": NAN_WPE},
    "stored masks": TENSORS | MASKS,
    "an output layer": TENSORS | {"lm_head.weight": WTE},
    "an output layer in place of wte": WITHOUT_WTE | {"lm_head.weight": WTE},
    "an output layer of another type": WITHOUT_WTE
    | {"wte.weight": HALF_WTE, "lm_head.weight": HALF_WTE.astype(np.float32)},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_weights(model_dir, form):
    """transformers ties the output layer and wte, whichever is there, and drops the masks."""
    write_tensors(model_dir / WEIGHTS, FORMS[form])
    tensors = stored_tensors(model_dir)
    head = tensors.pop("lm_head.weight", None)
    tensors.setdefault("wte.weight", head)
    for name in MASKS:
        tensors.pop(name.removeprefix("transformer."), None)
    assert_params(load(model_dir)[2], tensors)


@pytest.mark.parametrize("name", ["124M", "models [1]/my run*[2]"])
def test_names_of_folders(tmp_path, name):
    folder = shutil.copytree(FOLDER / "sharded", tmp_path / name)
    assert_params(load(folder)[2], stored_tensors(folder))


def test_files_that_nobody_names_are_not_read(model_dir):
    (model_dir / "model.fp16.safetensors").write_bytes(b"damaged")
    shutil.copy(FOLDER / "sharded" / INDEX, model_dir)  # model.safetensors comes before it
    assert_params(load(model_dir)[2], TENSORS)
    (model_dir / WEIGHTS).unlink()
    assert_one_line(model_dir, FileNotFoundError, "model-00001-of-00003.safetensors")
    (model_dir / INDEX).unlink()
    assert_one_line(model_dir, FileNotFoundError, WEIGHTS, "save_pretrained")


@pytest.mark.parametrize(
    ("model", "name"),
    [
        *(("whole", "vocab.json"), ("whole", "merges.txt"), ("whole", "config.json")),
        *(("whole", WEIGHTS), ("sharded", "model-00002-of-00003.safetensors")),
    ],
)
def test_a_missing_file_is_named(copy, model, name):
    model_dir = copy(model)
    (model_dir / name).unlink()
    assert_one_line(model_dir, (FileNotFoundError, ValueError), name)


# Damage

HEAD = WTE.copy()
HEAD[-1, -1] += 1
BIAS = TENSORS["ln_f.bias"]
WRONG_TENSORS = {
    "model.safetensors: lm_head.weight differs": TENSORS | {"lm_head.weight": HEAD},
    "model/wte is missing": WITHOUT_WTE,
    "n_layer": TENSORS | {"h.2.ln_1.bias": BIAS},
    "model/ln_f/b has shape [2, 8]": TENSORS | {"ln_f.bias": np.stack([BIAS, BIAS])},
    "model/wte has shape [0, 8]": TENSORS | {"wte.weight": WTE[:0]},
    "model.safetensors cannot be read: ValueError: a tensor has the type 'F64'": TENSORS
    | {"ln_f.bias": BIAS.astype(np.float64)},
}


@pytest.mark.parametrize("message", WRONG_TENSORS)
def test_wrong_tensors_are_refused(model_dir, message):
    write_tensors(model_dir / WEIGHTS, WRONG_TENSORS[message])
    assert_one_line(model_dir, ValueError, message)


def test_a_damaged_index(copy):
    model_dir = copy("sharded")
    for content in ("{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'):
        (model_dir / INDEX).write_text(content)
        assert_one_line(model_dir, (ValueError, FileNotFoundError))


C_FC = "transformer.h.1.mlp.c_fc.weight"  # float32 [8, 32]
BEGIN, STOP = HEADER[C_FC]["data_offsets"]
HEADER_FAULTS = {
    "data_offsets": [
        *([BEGIN - 4, STOP - 4], [BEGIN, STOP + 4], [BEGIN + 4, STOP + 4], [BEGIN, BEGIN]),
        *([BEGIN, STOP + 2**64], [STOP, BEGIN], [float(BEGIN), float(STOP)], [None, None]),
        *([BEGIN, math.inf], [BEGIN], [BEGIN, STOP, STOP], {}, None),
    ],
    "shape": [[32, 8], [8, 31], [-8, -32], [8, 32 + 2**61], [8.0, 32], "8,32", None],
    "dtype": ["F31", "F16", "I32", "", None, ["F32"]],
}


def test_a_faulty_header(model_dir):
    right = HEADER[C_FC]
    entries = [right | {key: value} for key in HEADER_FAULTS for value in HEADER_FAULTS[key]]
    for key in HEADER_FAULTS:
        entries.append({name: value for name, value in right.items() if name != key})
    another = HEADER[C_FC.replace("h.1", "h.0")]
    headers = [HEADER | {C_FC: entry} for entry in (*entries, None, [1, 2], "text", another)]
    others = {name: entry for name, entry in HEADER.items() if name != C_FC}
    headers.append(others)
    for name in (C_FC.replace("w", "W"), C_FC.replace("h.1", "h.2"), "transformer." + C_FC, "a\nb"):
        headers.append(others | {name: right})
    for header in headers:
        write_safetensors(model_dir / WEIGHTS, header, DATA)
        assert_one_line(model_dir, ValueError)


JUNK = [
    *(b"", b"   ", b"<html>", b"[]", b"null", b"1e400", b'"text"', b"{}{}", bytes(800)),
    *(b'{"n_embd": {"dtype": "F32", "sh', b'{"n_embd": "\xff"}', b'{"\xed\xa0\x80": 1}'),
    *('{"n_embd": 8}'.encode("utf-16"), b'{"a\nb": 1}', b'{"n_embd": ' + b"9" * 5000 + b"}"),
    b'{"a":' * 100_000,
]
NESTED = b"[" * 900 + b"]" * 900
JUNK_HEADERS = [
    *(b"{}", b"\xef\xbb\xbf{}", b'{"a": {"data_offsets": ' + NESTED + b"}}"),
    b'{"a": {"data_offsets": [0, 4], "shape": ' + NESTED + b"}}",
]


def test_junk_in_place_of_json(model_dir):
    for name in ("tokenizer.json", "vocab.json", "config.json"):
        for content in JUNK:
            (model_dir / name).write_bytes(content)
            assert_one_line(model_dir, ValueError, name)
        (model_dir / name).unlink()
        if name == "vocab.json":
            shutil.copy(FOLDER / "whole" / name, model_dir)


def test_damaged_weights_are_refused(model_dir):
    """Cut files, files with more bytes, and headers of something else."""
    path = model_dir / WEIGHTS
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    cuts = [0, 7, 8, 9, 8 + length, len(content) - 1]
    cuts += random.Random(0).sample(range(len(content)), N_FLIPS // 2)
    damaged = [content[:cut] for cut in cuts] + [content + bytes(4)]
    for wrong in (0, length - 1, length + 8, length + 2**63):
        damaged.append(wrong.to_bytes(8, "little") + content[8:])
    for header in JUNK + JUNK_HEADERS:
        damaged.append(len(header).to_bytes(8, "little") + header + DATA)
    for wrong in damaged:
        path.write_bytes(wrong)
        assert_one_line(model_dir, ValueError, WEIGHTS)


def flip(content, rng, start=0, end=None):
    """The content with one other bit between start and end."""
    damaged = bytearray(content)
    damaged[rng.randrange(start, end or len(content))] ^= 1 << rng.randrange(8)
    return bytes(damaged)


@pytest.mark.parametrize(
    ("model", "name", "least"),
    [
        *(("whole", WEIGHTS, 0), ("bfloat16", WEIGHTS, 0)),
        *(("sharded", "model-00003-of-00003.safetensors", 0), ("sharded", INDEX, N_FLIPS // 10)),
        ("whole", "config.json", N_FLIPS // 10),
        ("added_tokens", "added_tokens.json", N_FLIPS // 10),
        *(("special_tokens_first", "vocab.json", 0), ("special_tokens_first", "merges.txt", 0)),
        *(("whole", "vocab.json", 0), ("tokenizer_json", "tokenizer.json", 0)),
    ],
)
def test_damaged_files_are_refused_or_right(copy, model, name, least):
    """Whatever loads has the right parameters and ids: the intact file and some others."""
    model_dir = copy(model)
    tensors = stored_tensors(model_dir)
    path = model_dir / name
    intact = path.read_bytes()
    start, end = 0, None
    if path.suffix == ".safetensors":  # the data has no checksum
        end = 8 + int.from_bytes(intact[:8], "little")
    if name == "merges.txt":  # without its first newline, transformers skips the first merge, too
        start = intact.index(b"\n") + 1
    rng = random.Random(model + name)
    damaged = [flip(intact, rng, start, end) for _ in range(N_FLIPS)]
    if name != "merges.txt":  # fewer merges are merges, too
        damaged += [intact[: len(intact) * i // 10] for i in range(10)]
    n_right = 0
    for content in [*damaged, intact]:
        path.write_bytes(content)
        try:
            _, hparams, params = load(model_dir)
            for norm in (*params["blocks"], {"ln_1": params["ln_f"]}):
                norm["ln_1"].pop("eps", None)  # 1e-07 is as possible as 1e-05
                norm.get("ln_2", {}).pop("eps", None)
            assert_params(params, tensors, hparams["n_vocab"])
            assert_ids(model_dir, model if model in EXPECTED["ids"] else "whole")
            n_right += 1
        except (ValueError, OSError) as error:
            message = str(error)
            assert "\n" not in message
            assert str(model_dir) in message or "no tokens for a character" in message
    assert n_right > least


def test_a_pickle_is_never_opened(model_dir):
    (model_dir / "pytorch_model.bin").mkdir()  # so to open it is an error
    (model_dir / "adapter_config.json").write_text("{}")
    load(model_dir)
    (model_dir / WEIGHTS).unlink()
    found = ("pytorch_model.bin", "adapter_config.json")
    assert_one_line(model_dir, FileNotFoundError, *found, "save_pretrained")
    (model_dir / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n")
    assert_one_line(model_dir, ValueError, WEIGHTS, "git lfs pull")


def test_encoders_that_encode_differently_have_another_identity(copy):
    model_dir = copy("tokenizer_json")
    identities = {load_encoder(model_dir).identity()}
    edit(model_dir, {"tokenizer_config.json": {"add_prefix_space": True}})
    identities.add(load_encoder(model_dir).identity())
    edit(model_dir, {"tokenizer.json": {"added_tokens.1.lstrip": True}})
    identities.add(load_encoder(model_dir).identity())
    assert len(identities) == 3
    assert load_encoder(model_dir).identity() in identities
