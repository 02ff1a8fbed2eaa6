"""Hugging Face folders, intact and damaged, and checkpoints that load without TensorFlow.

make_hugging_face.py made the folders in tests/data/hugging_face and the results of transformers
and tokenizers.
"""

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
from hugging_face_kinds import (
    CONFIGS,
    END_PROMPT,
    KIND_TEXTS,
    REMOVE,
    TOKENIZERS,
    edit,
)

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
N_FLIPS = int(os.environ.get("NPGPT_FLIPS", 40))  # a long run by hand: 5000
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
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


@pytest.mark.parametrize("name", CONFIGS)
def test_variants_of_the_model_are_computed_as_transformers_does(model_dir, name, expected):
    edit(model_dir, {"config.json": CONFIGS[name]})
    _, hparams, params = load(model_dir)
    logits = expected[f"{name}/logits"]
    found = gpt2(expected["whole/ids"], **params, n_head=hparams["n_head"])[:, ::LOGITS_STEP]
    np.testing.assert_allclose(found, logits, rtol=0, atol=1e-5 * np.abs(logits).max())
    greedy = expected[f"{name}/greedy"].tolist()
    ids = expected["whole/ids"][:4].tolist()
    assert generate(ids, params, hparams["n_head"], len(greedy)) == greedy


def test_params_of_gpt2_itself_hold_arrays_alone():
    assert all(isinstance(array, np.ndarray) for array in flat(load(FOLDER / "whole")[2]).values())


@pytest.mark.parametrize("name", EXPECTED["ends"])
def test_the_ids_that_end_a_text_are_those_of_transformers(model_dir, name):
    case = EXPECTED["ends"][name]
    edit(model_dir, case["edits"])
    encoder, hparams, params = load(model_dir)
    ids = generate(END_PROMPT, params, hparams["n_head"], len(case["all"]))
    assert ids == case["all"]
    ends = [i for i, token_id in enumerate(ids) if token_id in encoder.end_ids]
    assert ids[: ends[0] + 1 if ends else None] == case["new"]


@pytest.mark.parametrize(
    ("config", "generation", "start", "ends"),
    [
        ({"bos_token_id": 3, "eos_token_id": 4}, {}, 3, {4}),
        ({"bos_token_id": None, "eos_token_id": [4, 5]}, {}, 4, {4, 5}),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"bos_token_id": 6, "eos_token_id": 7}, 6, {7}),
        ({"bos_token_id": 3, "eos_token_id": 4}, {"eos_token_id": None}, 3, {4}),
        ({"bos_token_id": REMOVE, "eos_token_id": REMOVE}, {}, 279, {279}),  # 50256 has no row
        ({"bos_token_id": 280, "eos_token_id": 5}, {}, 5, {5}),
        ({"bos_token_id": None, "eos_token_id": None}, {}, 279, set()),
    ],
)
def test_the_ids_that_start_and_end_a_text(model_dir, config, generation, start, ends):
    edit(model_dir, {"config.json": config, "generation_config.json": generation})
    encoder = load(model_dir)[0]
    assert encoder.decode([279]) == "<|endoftext|>"
    assert (encoder.start_id, encoder.end_ids) == (start, ends)


@pytest.mark.parametrize("name", VOCABULARIES)
def test_ids_are_those_of_tokenizers(name):
    encoder = get_encoder(name, str(FOLDER))
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"][name], strict=True):
        assert encoder.encode(text) == ids, text
        assert encoder.decode(ids) == text


@pytest.mark.parametrize("name", TOKENIZERS)
def test_each_setting_of_a_tokenizer_is_obeyed_or_refused(copy, name):
    """The ids are those of transformers or, where it ignores its own file, of tokenizers."""
    kind = TOKENIZERS[name]
    model_dir = copy(kind.base)
    edit(model_dir, kind.edits)
    if kind.refused:
        with pytest.raises(ValueError, match=re.escape(kind.refused)) as error:
            get_encoder(model_dir.name, str(model_dir.parent))
        assert re.search(r"token\w+\.json|vocab\.json", str(error.value))
        return
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    oracle = EXPECTED["tokenizers"][name]
    found = [encoder.encode(text, allowed_special="all") for text in KIND_TEXTS]
    assert found == oracle.get("transformers", oracle.get("tokenizers"))


def test_most_settings_of_a_tokenizer_are_obeyed():
    assert len(TOKENIZERS) >= 60
    assert sum(kind.refused is None for kind in TOKENIZERS.values()) >= 40


@pytest.mark.parametrize("name", MODELS)
def test_hparams_and_params_are_those_of_the_files(name):
    encoder, hparams, params = load(FOLDER / name)
    config = json.loads((FOLDER / name / "config.json").read_text())
    sizes = {key: config[key] for key in ("n_embd", "n_head", "n_layer")}
    assert hparams == {"n_vocab": len(encoder.decoder), "n_ctx": config["n_positions"]} | sizes
    assert_params(params, stored_tensors(FOLDER / name), hparams["n_vocab"])


# The vocabulary


def test_rows_of_added_tokens_stay():
    encoder, hparams, params = load(FOLDER / "added_tokens")
    assert hparams["n_vocab"] == len(params["wte"]) == 289
    assert encoder.decode([286, 287, 288]) == "<|endoftext|><sep><|user name|>"


def test_rows_without_a_token_are_cut_off(capsys):
    """vocab_size is 320, but there are 280 tokens: other ids are neither generated nor accepted."""
    encoder, hparams, params = load(FOLDER / "padded")
    assert hparams["n_vocab"] == len(params["wte"]) == 280
    assert is_mapped(params["wte"])
    with pytest.raises(ValueError, match="280"):
        encoder.decode([280])
    with pytest.raises(ValueError, match="280"):
        gpt2([280], **params, n_head=hparams["n_head"])
    assert capsys.readouterr().err == ""


def write_rows(model_dir, n_rows):
    """Give wte another number of rows."""
    wte = np.resize(TENSORS["wte.weight"], (n_rows, 8))
    write_tensors(model_dir / WEIGHTS, TENSORS | {"wte.weight": wte})
    edit(model_dir, {"config.json": {"vocab_size": n_rows}})


@pytest.mark.parametrize(
    ("n_rows", "n_vocab", "warns"),
    [(407, 280, False), (408, 280, True), (279, 279, False), (153, 153, False), (152, 152, True)],
)
def test_rows_and_tokens_that_do_not_match(model_dir, capsys, n_rows, n_vocab, warns):
    write_rows(model_dir, n_rows)
    encoder, hparams, params = load(model_dir)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == warns
    assert all(f"{n_rows} rows" in line and "280 tokens" in line for line in lines)
    assert hparams["n_vocab"] == len(params["wte"]) == n_vocab
    ids = encoder.encode("<|endoftext|>", allowed_special="all")
    assert ids == [279]
    if n_rows < 280:
        with pytest.raises(ValueError, match=f"279 is not a token id.*{n_rows}"):
            gpt2(ids, **params, n_head=hparams["n_head"])


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
    """Write a tokenizer.json with the 256 bytes, the tokens of the merges, and added tokens."""
    content = json.loads((FOLDER / "tokenizer_json" / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [token for token, token_id in content["model"]["vocab"].items() if token_id < 256]
    tokens += ["".join(merge) for merge in merges]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    content["model"] |= {"vocab": vocabulary, "merges": merges} | options
    added = enumerate(added_tokens, len(tokens))
    content["added_tokens"] = [{"content": token, "id": i} for i, token in added]
    (model_dir / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    return get_encoder(model_dir.name, str(model_dir.parent))


@pytest.mark.parametrize(("ignored", "tokens"), [(False, ["a", "bc"]), (True, ["abc"])])
def test_merges_of_a_word_that_is_a_token(tmp_path, ignored, tokens):
    """tokenizers joins "b c" first and never makes "abc", unless ignore_merges is set."""
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    encoder = write_tokenizer(tmp_path, merges, ignore_merges=ignored)
    assert encoder.encode("abc") == [encoder.encoder[token] for token in tokens]


@pytest.mark.parametrize("token", ["the", "the end", "t h", "\n<sep>", "你好"])
def test_an_added_token_may_be_any_text(tmp_path, token):
    """tokenizer.add_tokens(["the"]) of transformers: it is made wherever the text has it."""
    encoder = write_tokenizer(tmp_path, [["t", "h"]], added_tokens=[token])
    assert encoder.encode(f"x{token}y") == [encoder.encoder["x"], 257, encoder.encoder["y"]]
    assert encoder.decode([257]) == token


def test_the_older_form_of_tokenizer_json(copy):
    """As in openai-community/gpt2: each merge is one text, and use_regex is absent."""
    model_dir = copy("tokenizer_json")

    def change(content):
        content["model"]["merges"] = list(map(" ".join, content["model"]["merges"]))
        del content["pre_tokenizer"]["use_regex"], content["model"]["ignore_merges"]

    edit_json(model_dir / "tokenizer.json", change)
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    assert list(map(encoder.encode, EXPECTED["texts"])) == EXPECTED["ids"]["tokenizer_json"]


def reorder(tokens):
    """The ids of a vocabulary in another order: special tokens and bytes anywhere."""
    return dict(zip(sorted(tokens, key=lambda token: token[::-1]), range(len(tokens)), strict=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda merges: merges.removeprefix("#version: 0.2\n"),
        lambda merges: merges.replace("\n", "\r\n"),
        lambda merges: merges + "\n",
        lambda merges: "\ufeff" + merges,
    ],
    ids=["no version", "CRLF", "empty line", "byte order mark"],
)
def test_other_forms_of_merges(model_dir, change):
    path = model_dir / "merges.txt"
    path.write_bytes(change(path.read_text(encoding="utf-8")).encode())
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    assert list(map(encoder.encode, EXPECTED["texts"])) == EXPECTED["ids"]["whole"]


def test_tokens_in_any_order(model_dir):
    path = model_dir / "vocab.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    new = reorder(old)
    path.write_text("\ufeff" + json.dumps(new), encoding="utf-8")
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    new_ids = {old[token]: new[token] for token in old}
    for text, ids in zip(EXPECTED["texts"], EXPECTED["ids"]["whole"], strict=True):
        assert encoder.encode(text) == [new_ids[i] for i in ids]


def without_z(content):
    del content["model"]["vocab"]["z"]
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)
    content["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    content["added_tokens"] = []


def test_a_missing_byte_is_an_error_only_where_it_is_needed(copy):
    model_dir = copy("tokenizer_json")
    edit_json(model_dir / "tokenizer.json", without_z)
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    assert encoder.decode(encoder.encode("the end")) == "the end"
    with pytest.raises(ValueError, match="'z'"):
        encoder.encode("a zoo")
    edit(model_dir, {"tokenizer.json": {"model.unk_token": "!"}})
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    assert [encoder.decoder[i] for i in encoder.encode("azzb")] == ["a", "!", "!", "b"]
    edit(model_dir, {"tokenizer.json": {"model.fuse_unk": True}})
    with pytest.raises(ValueError, match="'z'"):
        get_encoder(model_dir.name, str(model_dir.parent)).encode("azzb")


def test_tokenizer_json_comes_before_vocab_json(copy):
    """As AutoTokenizer of transformers 5 has it."""
    model_dir = copy("tokenizer_json")
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FOLDER / "special_tokens_first" / name, model_dir)
    encoder = get_encoder(model_dir.name, str(model_dir.parent))
    assert list(map(encoder.encode, EXPECTED["texts"])) == EXPECTED["ids"]["tokenizer_json"]


def edit_json(path, change):
    content = json.loads(path.read_text(encoding="utf-8"))
    change(content)
    path.write_text(json.dumps(content), encoding="utf-8")


TOKENIZER_FAULTS = {
    "no model": {"model": REMOVE},
    "no merges": {"model.merges": REMOVE},
    "merges of numbers": {"model.merges": [[1, 2]]},
    "merges of lists": {"model.merges": [[["t"], ["h"]]]},
    "merges of three": {"model.merges": [["t", "h", ""]]},
    "merges of one": {"model.merges": [["th"]]},
    "merges of nothing": {"model.merges": [None]},
    "merges are no list": {"model.merges": 3},
    "merges of unknown tokens": {"model.merges": [["q", "u"]]},
    "a merge twice": {"model.merges": [["t", "h"], ["t", "h"]]},
    "ids are text": {"model.vocab.th": "256"},
    "an id twice": {"model.vocab.th": 257},
    "an id beyond the count": {"model.vocab.th": 300},
    "vocabulary is a list": {"model.vocab": []},
    "added tokens are numbers": {"added_tokens": [1]},
    "added token with another id": {"added_tokens.0.id": 5},
    "added token is half a character": {"added_tokens.1.content": "\ud800"},
    "template without its token": {"post_processor": {"type": "TemplateProcessing", "single": [1]}},
}


@pytest.mark.parametrize("fault", TOKENIZER_FAULTS)
def test_a_damaged_tokenizer_is_refused(copy, fault):
    model_dir = copy("tokenizer_json")
    edit(model_dir, {"tokenizer.json": TOKENIZER_FAULTS[fault]})
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


def test_an_output_layer_in_place_of_wte(model_dir):
    """transformers ties the two, whichever is there."""
    tensors = dict(TENSORS)
    tensors["lm_head.weight"] = tensors.pop("wte.weight")
    write_tensors(model_dir / WEIGHTS, tensors)
    assert_params(load(model_dir)[2], TENSORS)


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


@pytest.mark.parametrize(
    "changes", [{"n_ctx": 64, "n_positions": REMOVE}, {"n_ctx": 32}], ids=["old", "both"]
)
def test_the_old_name_of_n_positions(model_dir, changes):
    edit(model_dir, {"config.json": changes})
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
        *(("activation_function", value) for value in ("gelu_fast", "tanh", None, ["gelu_new"], 1)),
        *(("layer_norm_epsilon", value) for value in (0, -1e-5, "1e-05", None, math.nan, math.inf)),
        *(("scale_attn_weights", value) for value in (0, None, "true")),
        *(("scale_attn_by_inverse_layer_idx", value) for value in (1, "false")),
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


JUNK = {
    "empty": b"",
    "spaces": b"   ",
    "html": b"<html>",
    "list": b"[]",
    "null": b"null",
    "number": b"1e400",
    "text": b'"text"',
    "cut": b'{"n_embd": {"dtype": "F32", "sh',
    "two objects": b"{}{}",
    "not UTF-8": b'{"n_embd": "\xff"}',
    "half a character": b'{"\xed\xa0\x80": 1}',
    "UTF-16": '{"n_embd": 8}'.encode("utf-16"),
    "deep nesting": b'{"a":' * 100_000,
    "long number": b'{"n_embd": ' + b"9" * 5000 + b"}",
    "control character": b'{"a\nb": 1}',
    "zeros": bytes(800),
}


@pytest.mark.parametrize("content", JUNK)
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "vocab.json"])
def test_junk_in_place_of_json(model_dir, name, content):
    (model_dir / name).write_bytes(JUNK[content])
    assert_one_line(model_dir, ValueError, name)


# Damage to the weights


def assert_one_line(model_dir, kind, *words):
    with pytest.raises(kind) as error:
        load(model_dir)
    message = str(error.value)
    assert "\n" not in message
    for word in (model_dir, *words):
        assert str(word) in message
    return message


N = 1024  # bytes of C_FC, float32 [8, 32]
MOVES = [  # of the two offsets
    *((-4, -4), (0, 4), (4, 4), (10**6, 10**6), (2**62, 2**62), (2**64, 2**64), (0, 2**64)),
    *((2**32, 2**32), (0, -N), (N, -N)),
]
VALUES = {
    "data_offsets": [
        *([-N, 0], [0, -N], [0.0, float(N)], [False, True], ["0", str(N)], [None, None]),
        *(
            [math.nan, math.nan],
            [0, math.inf],
            [[0], [N]],
            [0],
            [0, N, 2 * N],
            [],
            {"0": 1, "1": 2},
        ),
        *(None, REMOVE),
    ],
    "shape": [
        *([32, 8], [256], [8, 31], [8, 33], [-8, -32], [8, 32 + 2**61], [10**30, 10**30], [0, 32]),
        *([8.0, 32], [True, 256], [8, math.nan], "8,32", None, REMOVE, [1] * 1000 + [8, 32]),
    ],
    "dtype": ["F31", "F16", "I32", "F64", "", None, ["F32"], {}, "F32\n", REMOVE],
}
NAMES = [  # in place of C_FC
    *("transformer.h.1.mlp.c_fc.Weight", "transformer.h.2.mlp.c_fc.weight", "transformer." + C_FC),
    *("a\nb", "__metadata__"),
]
HEADER_FAULTS = {
    **{f"moved by {move}": {"move": move} for move in MOVES},
    **{f"{key} {i}": {key: value} for key in VALUES for i, value in enumerate(VALUES[key])},
    **{f"called {name!r}": {"name": name} for name in NAMES},
    **{f"entry {i}": {"entry": entry} for i, entry in enumerate([None, [1, 2], "data_offsets"])},
    "missing": {"entry": REMOVE},
    "at another tensor": {"like": "transformer.h.0.mlp.c_fc.weight"},
}


@pytest.mark.parametrize("fault", HEADER_FAULTS)
def test_a_faulty_header(model_dir, fault):
    header, data = read_safetensors(model_dir / WEIGHTS)
    entry = header.pop(C_FC)
    change = dict(HEADER_FAULTS[fault])
    begin, end = change.pop("move", (0, 0))
    entry["data_offsets"] = [entry["data_offsets"][0] + begin, entry["data_offsets"][1] + end]
    name = change.pop("name", C_FC)
    if "entry" in change:
        entry = change["entry"]
    elif "like" in change:
        entry = header[change["like"]]
    else:
        entry |= change
        entry = {key: value for key, value in entry.items() if value != REMOVE}
    if entry != REMOVE:
        header[name] = entry
    write_safetensors(model_dir / WEIGHTS, header, data)
    assert_one_line(model_dir, ValueError)


HEADERS = JUNK | {
    "no tensors": b"{}",
    "byte order mark": b"\xef\xbb\xbf{}",
    "a deep shape": b'{"a": {"data_offsets": [0, 4], "shape": ' + b"[" * 900 + b"]" * 900 + b"}}",
    "deep offsets": b'{"a": {"data_offsets": ' + b"[" * 900 + b"]" * 900 + b"}}",
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
def test_a_name_in_two_files(copy, prefix):
    model_dir = copy("sharded")
    path = max(model_dir.glob("*.safetensors"))
    add_tensors(path, **{f"{prefix}wte.weight": ("F32", TENSORS["wte.weight"])})
    assert_one_line(model_dir, ValueError, "wte.weight")


def test_files_that_nobody_names_are_not_read(model_dir):
    (model_dir / "model.fp16.safetensors").write_bytes(b"damaged")
    shutil.copy(FOLDER / "sharded" / INDEX, model_dir)  # model.safetensors comes before it
    assert_params(load(model_dir)[2], TENSORS)
    (model_dir / WEIGHTS).unlink()
    assert_one_line(model_dir, FileNotFoundError, "model-00001-of-00003.safetensors")
    (model_dir / INDEX).unlink()
    assert_one_line(model_dir, FileNotFoundError, WEIGHTS, "save_pretrained")


@pytest.mark.parametrize("content", ["{}", "[]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_a_damaged_index(copy, content):
    model_dir = copy("sharded")
    (model_dir / INDEX).write_text(content)
    assert_one_line(model_dir, (ValueError, FileNotFoundError))


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


def assert_refused_or_right(model_dir, name, damaged, right, check):
    """Replace a file by each of the damaged ones in turn, and last by the intact one.

    Whatever is not refused must pass the check. The intact file does, and at least `right` others.
    """
    path = model_dir / name
    intact = path.read_bytes()
    accepted = 0
    for content in damaged:
        path.write_bytes(content)
        try:
            found = check(model_dir)
        except (ValueError, OSError) as error:
            message = str(error)
            assert "\n" not in message
            assert str(model_dir) in message or "character" in message
        else:
            assert found, content[:200]
            accepted += 1
    assert accepted >= right
    path.write_bytes(intact)
    assert check(model_dir)


def has_params(tensors):
    def check(model_dir):
        _, hparams, params = load(model_dir)
        assert_params(params, tensors, hparams["n_vocab"])
        return True

    return check


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
    damaged = [header + content[end:] for header in flips(content[:end], N_FLIPS, rng)]
    assert_refused_or_right(model_dir, path.name, damaged, 0, has_params(tensors))


def test_no_cut_file_loads(model_dir):
    path, rng = model_dir / WEIGHTS, random.Random(0)
    content = path.read_bytes()
    lengths = [*range(12), len(content) - 4, len(content) - 1]
    for length in lengths + rng.sample(range(len(content)), N_FLIPS):
        path.write_bytes(content[:length])
        assert_one_line(model_dir, ValueError, WEIGHTS)


@pytest.mark.parametrize(
    ("model", "name", "right"),
    [
        ("whole", "config.json", N_FLIPS // 10),
        ("added_tokens", "added_tokens.json", N_FLIPS // 10),
        ("special_tokens_first", "vocab.json", 0),
        ("special_tokens_first", "merges.txt", 0),
        ("tokenizer_json", "tokenizer.json", 0),
    ],
)
def test_damaged_json_and_merges_give_one_line(copy, model, name, right):
    model_dir, rng = copy(model), random.Random(model + name)
    intact = (model_dir / name).read_bytes()
    damaged = [*flips(intact, N_FLIPS, rng), *[intact[: len(intact) * i // 30] for i in range(30)]]
    assert_refused_or_right(model_dir, name, damaged, right, has_params(stored_tensors(model_dir)))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("whole", "vocab.json"),
        ("whole", "merges.txt"),
        ("special_tokens_first", "vocab.json"),
        ("special_tokens_first", "merges.txt"),
        ("tokenizer_json", "tokenizer.json"),
    ],
)
def test_no_flipped_bit_in_a_vocabulary_gives_wrong_ids(copy, model, name):
    model_dir, rng = copy(model), random.Random(name)
    intact = (model_dir / name).read_bytes()

    def has_ids(model_dir):
        encoder = get_encoder(model_dir.name, str(model_dir.parent))
        return list(map(encoder.encode, EXPECTED["texts"])) == EXPECTED["ids"][model]

    # Without the newline after "#version: 0.2", transformers skips the first merge, too.
    head = b"#version: 0.2\n" if name == "merges.txt" else b""
    damaged = [head + rest for rest in flips(intact[len(head) :], N_FLIPS, rng)]
    assert_refused_or_right(model_dir, name, damaged, 0, has_ids)


# Pickles


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


OPENED = """
import os, sys
opened = []
def watch(event, args):
    if event == "open":
        opened.append(os.path.basename(str(args[0])))
sys.addaudithook(watch)
import utils
try:
    utils.load_encoder_hparams_and_params(sys.argv[1], sys.argv[2])
except FileNotFoundError as error:
    print(error)
names = {"config.json", "pytorch_model.bin", "model.safetensors"}
print("opened:", *sorted(names.intersection(opened)))
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
    """A checkpoint in OpenAI's layout whose SHA-256 is known, with the values of `whole`.

    TensorFlow writes the variables sorted by name. Nothing but TensorFlow reads the index.
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


@pytest.mark.parametrize("content", JUNK)
def test_a_record_of_something_else_does_no_harm(known, no_tensorflow, content):
    (known / RECORD).write_bytes(JUNK[content])
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
