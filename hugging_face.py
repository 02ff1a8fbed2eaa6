"""Models in the layout of Hugging Face's transformers -> (encoder, hparams, params).

A folder holds config.json, the weights in *.safetensors, and a vocabulary: tokenizer.json, or
vocab.json and merges.txt. Whatever its files say is done as transformers does it, or refused with a
message that names the setting. The weights lie in the file as NumPy needs them, so float32 weights
are memory-mapped, not copied. The format: https://huggingface.co/docs/safetensors
"""

import contextlib
import glob
import json
import math
import mmap
import os
import re
import shutil
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from encoder import BYTE_CHARS, Encoder, check_vocabulary, read_json, read_merges
from utils import (
    REPLACE,
    check_shape,
    check_size,
    check_sizes,
    complain,
    is_equal_by_bits,
    nest,
    refuse_pointer,
    variable_shapes,
)

SIZES = {  # hparams and their names in config.json
    "n_vocab": "vocab_size",
    "n_ctx": "n_positions",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "n_layer": "n_layer",
}
DEFAULT_CONFIG = {  # of transformers' GPT2Config
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
ALIASES = {  # GPT2Config.attribute_map; an alias comes before the name that it stands for
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
DEFAULT_TOKEN = "<|endoftext|>"  # bos, eos and unk of transformers' GPT2Tokenizer
DEFAULT_TOKEN_ID = 50256  # bos and eos of GPT2Config

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_PADDING = 127  # more rows than tokens than this look like a mistake

WEIGHTS = "model.safetensors"
SMALL_FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    WEIGHTS + ".index.json",
]
CONVERT = "convert other weights with transformers: from_pretrained(F).save_pretrained(F)"


def load_hugging_face(model_dir: str) -> tuple[Encoder, dict, dict]:
    """Load the model in the folder model_dir -> (encoder, hparams, params).

    Rows of wte after the last token are cut off. If a model differs from GPT-2 in its activation
    function, the scale of attention or the epsilon of layer_norm, params holds these beside the
    arrays, under the keyword names of the functions that take them.

    Raises ValueError for a model that is not supported and for damaged files, FileNotFoundError for
    a missing file.
    """
    config = read_config(os.path.join(model_dir, "config.json"))
    hparams = {name: config[key] for name, key in SIZES.items()}
    params = nest(read_variables(model_dir, config, hparams), hparams)
    set_variants(params, config)
    encoder = read_encoder(model_dir)
    n_rows = hparams["n_vocab"]
    n_tokens = len(encoder.decoder)
    if abs(n_rows - n_tokens) > MAX_PADDING:
        counts = f"wte has {n_rows} rows, but the vocabulary has {n_tokens} tokens"
        complain("warning", f"{model_dir}: {counts}; do they belong together?")
    params["wte"] = params["wte"][:n_tokens]
    return encoder, hparams | {"n_vocab": len(params["wte"])}, params


# The configuration


def read_config(path: str) -> dict[str, Any]:
    """Read and check config.json. Absent keys get their defaults, and aliases their real names."""
    content = read_json(path)
    config = DEFAULT_CONFIG | {"n_positions": content.get("n_ctx", 1024)} | content
    for alias, key in ALIASES.items():
        if alias in content:
            config[key] = content[alias]
    check_config(config, path)
    return config


def check_config(config: dict[str, Any], path: str) -> None:
    """Raise ValueError, naming the setting, for a model that gpt2.py cannot run."""
    from gpt2 import ACTIVATIONS

    supported = {
        "model_type": ["gpt2"],
        "activation_function": list(ACTIVATIONS),
        "scale_attn_weights": [True, False],
        "scale_attn_by_inverse_layer_idx": [True, False],
        "add_cross_attention": [False],
        "tie_word_embeddings": [True, False],
    }
    for key, values in supported.items():
        value = config[key]
        if type(value) is not type(values[0]) or value not in values:
            raise unsupported(path, key, value, " or ".join(map(repr, values)))
    eps = config["layer_norm_epsilon"]
    if type(eps) is not float or not 0 <= eps < math.inf:
        raise unsupported(path, "layer_norm_epsilon", eps, "a float, 0 or more")
    check_sizes({key: config[key] for key in SIZES.values()}, path)
    if config["n_inner"] is not None:
        check_size("n_inner", config["n_inner"], path)


def unsupported(path: str, setting: str, value: object, supported: str) -> ValueError:
    return ValueError(f"{path}: {setting} {value!r} is not supported, only {supported}")


def set_variants(params: dict[str, Any], config: dict[str, Any]) -> None:
    """Put into params what differs from GPT-2 in the functions of gpt2.py."""
    from gpt2 import ACTIVATIONS, gelu

    activation = ACTIVATIONS[config["activation_function"]]
    eps = config["layer_norm_epsilon"]
    scale = 1.0
    if config["scale_attn_weights"]:
        scale = (config["n_embd"] // config["n_head"]) ** -0.5
    norms = [params["ln_f"]]
    for layer, block in enumerate(params["blocks"]):
        norms += [block["ln_1"], block["ln_2"]]
        if activation is not gelu:
            block["mlp"]["activation"] = activation
        if config["scale_attn_by_inverse_layer_idx"]:
            block["attn"]["scale"] = scale / (layer + 1)
        elif not config["scale_attn_weights"]:
            block["attn"]["scale"] = scale
    if eps != DEFAULT_CONFIG["layer_norm_epsilon"]:
        for norm in norms:
            norm["eps"] = eps


# The weights


class Tensor(NamedTuple):
    """A tensor in a file: what it is and where it lies."""

    path: str
    content: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_variables(model_dir: str, config: dict, hparams: dict) -> dict[str, np.ndarray]:
    """Read GPT-2's variables -> {our name: float32 array}."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(model_dir):
        for name, tensor in read_safetensors(path).items():
            name = name.removeprefix("transformer.")  # which some files have, and others have not
            if name in tensors:
                raise ValueError(f"{path}: the tensor {name} occurs twice in {model_dir}")
            tensors[name] = tensor
    tie_weights(tensors, config["tie_word_embeddings"], model_dir)
    n_layer = hparams["n_layer"]
    if any(name.startswith(f"h.{n_layer}.") for name in tensors):
        raise ValueError(f"{model_dir} has more layers than n_layer, which is {n_layer}")
    variables = {}
    for our_name, shape in variable_shapes(hparams, config["n_inner"]):
        name = their_name(our_name)
        found = tensors[name].shape if name in tensors else None
        check_shape(model_dir, name, found, shape[-2:])
        variables[our_name] = to_array(tensors[name])
    return variables


def weight_files(model_dir: str) -> list[str]:
    """Return the paths of the files that hold the weights, as transformers chooses them.

    A pickle (*.bin) is never opened: it can run code.
    """
    path = os.path.join(model_dir, WEIGHTS)
    if os.path.isfile(path):
        return [path]
    index_path = path + ".index.json"
    if not os.path.isfile(index_path):
        folder = os.path.abspath(model_dir)
        raise FileNotFoundError(
            f"{folder} holds neither {WEIGHTS} nor {WEIGHTS}.index.json; {CONVERT}"
        )
    paths = [os.path.join(model_dir, name) for name in shard_names(index_path)]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing, which {index_path} names")
    return paths


def shard_names(index_path: str) -> list[str]:
    """Return the names of the files that model.safetensors.index.json lists."""
    files = read_json(index_path).get("weight_map")
    if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{index_path} is damaged: weight_map names no files; {REPLACE}")
    return sorted(set(files.values()))


def tie_weights(tensors: dict[str, Tensor], is_tied: bool, model_dir: str) -> None:
    """Make wte the output weights, too. Raises ValueError if the model has others."""
    wte = tensors.get("wte.weight")
    head = tensors.get("lm_head.weight")
    if head is None and not is_tied:
        path = os.path.join(model_dir, "config.json")
        raise unsupported(path, "tie_word_embeddings", False, "with an lm_head.weight like wte's")
    if head is not None and wte is None and is_tied:
        tensors["wte.weight"] = head
    if head is not None and wte is not None and not is_equal_by_bits(to_array(head), to_array(wte)):
        raise ValueError(
            f"{head.path}: lm_head.weight differs from wte.weight, which is not supported"
        )


def their_name(name: str) -> str:
    """model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight."""
    name = name.removeprefix("model/")
    name = re.sub(r"^h(\d+)/", r"h.\1.", name).replace("/", ".")
    if name.endswith(".b"):
        return name.removesuffix("b") + "bias"
    return re.sub(r"\.[wg]$", "", name) + ".weight"


def read_safetensors(path: str) -> dict[str, Tensor]:
    """Read the header of a file -> {name: tensor}.

    A file is 8 bytes with the length of the header, the header in JSON, and the data. Raises
    ValueError unless the header describes the data exactly.
    """
    refuse_pointer(path)
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(content[:8], "little")
        if start > min(len(content), MAX_HEADER_BYTES):
            raise ValueError(f"its length would be {start - 8} bytes")
        header = json.loads(content[8:start].decode("utf-8"))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[name] = Tensor(path, content, entry["dtype"], shape, start + begin, start + end)
        check_offsets(tensors, start, len(content))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: in its header, {error}; {REPLACE}") from None
    return tensors


def check_offsets(tensors: dict[str, Tensor], start: int, end: int) -> None:
    """Raise ValueError unless the tensors fill the bytes from start to end, without overlaps."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        for number in (tensor.begin, tensor.end, *tensor.shape):
            if type(number) is not int or number < 0:
                raise ValueError(f"{name!r} has the number {number!r}")
        if tensor.begin != position or tensor.end < position:
            raise ValueError(f"there is a gap or an overlap at {name!r}")
        position = tensor.end
    if position != end:
        raise ValueError("the tensors do not end where the file ends")


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a float32 array, mapped if it is stored as aligned float32."""
    if tensor.dtype not in list(DTYPES):
        types = ", ".join(DTYPES)
        raise ValueError(f"{tensor.path}: type {tensor.dtype!r} is not supported, only {types}")
    dtype = DTYPES[tensor.dtype]
    n_bytes = tensor.end - tensor.begin
    if n_bytes != math.prod(tensor.shape) * dtype.itemsize:
        problem = f"a tensor of shape {list(tensor.shape)} has {n_bytes} bytes"
        raise ValueError(f"{tensor.path} is damaged: {problem}; {REPLACE}")
    array = np.frombuffer(tensor.content, dtype, math.prod(tensor.shape), tensor.begin)
    if tensor.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array.reshape(tensor.shape), np.float32, "A")


# The vocabulary


def read_encoder(model_dir: str) -> Encoder:
    """Read the vocabulary of a folder, from tokenizer.json if that is there."""
    path = os.path.join(model_dir, "tokenizer.json")
    settings = read_settings(model_dir)
    try:
        if os.path.isfile(path):
            tokenizer = read_json(path)
            check_tokenizer(tokenizer, settings, path)
        else:
            path = vocabulary_path(model_dir)
            tokenizer = tokenizer_from_vocabulary(path, settings)
        return encoder_from_tokenizer(tokenizer, settings, path)
    except (AttributeError, IndexError, KeyError, TypeError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; {REPLACE}") from None


def read_settings(model_dir: str) -> dict[str, Any]:
    """Read tokenizer_config.json, and special_tokens_map.json where it counts."""
    settings = read_optional(model_dir, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_optional(model_dir, "special_tokens_map.json")
    return settings


def read_optional(model_dir: str, name: str) -> dict[str, Any]:
    """Read a JSON file. Returns {} if there is none."""
    path = os.path.join(model_dir, name)
    return read_json(path) if os.path.isfile(path) else {}


def vocabulary_path(model_dir: str) -> str:
    """Return the path of vocab.json. Without it, say what the folder holds instead."""
    for name in ("vocab.json", "encoder.json"):
        if os.path.isfile(os.path.join(model_dir, name)):
            return os.path.join(model_dir, name)
    folder = os.path.abspath(model_dir)
    needed = "tokenizer.json, or vocab.json and merges.txt"
    if glob.glob("*.model", root_dir=model_dir):
        needed += " (its *.model is a SentencePiece vocabulary, which is not supported)"
    if os.path.isfile(os.path.join(model_dir, "vocab.txt")):
        needed += " (its vocab.txt is a WordPiece vocabulary, which is not supported)"
    raise FileNotFoundError(f"{folder} holds no vocabulary: it needs {needed}")


def tokenizer_from_vocabulary(path: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Read vocab.json, merges.txt and added_tokens.json -> what a tokenizer.json would hold."""
    model_dir = os.path.dirname(path)
    config_path = os.path.join(model_dir, "tokenizer_config.json")
    tokenizer_class = settings.get("tokenizer_class")
    if tokenizer_class not in (None, "GPT2Tokenizer", "GPT2TokenizerFast"):
        only = "'GPT2Tokenizer', or any with a tokenizer.json"
        raise unsupported(config_path, "tokenizer_class", tokenizer_class, only)
    if settings.get("add_eos_token"):
        raise unsupported(config_path, "add_eos_token", settings["add_eos_token"], "False")
    merges_name = "vocab.bpe" if path.endswith("encoder.json") else "merges.txt"
    vocabulary = read_json(path)
    added = read_optional(model_dir, "added_tokens.json")
    tokenizer = {
        "model": {"vocab": vocabulary, "merges": read_merges(os.path.join(model_dir, merges_name))},
        "pre_tokenizer": {"add_prefix_space": settings.get("add_prefix_space", False)},
        "added_tokens": [{"content": token, "id": token_id} for token, token_id in added.items()],
    }
    bos = token_entry(settings.get("bos_token", DEFAULT_TOKEN))
    if settings.get("add_bos_token") and bos:
        name = bos["content"]
        tokenizer["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": name}}, {"Sequence": {"id": "A"}}],
            "special_tokens": {name: {"ids": [(vocabulary | added)[name]]}},
        }
    return tokenizer


def check_tokenizer(tokenizer: dict[str, Any], settings: dict[str, Any], path: str) -> None:
    """Raise ValueError, naming the setting, for a tokenizer.json that Encoder cannot do."""
    model = tokenizer["model"]
    splitter = tokenizer.get("pre_tokenizer") or {}
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    supported = {  # setting: (its value, the supported values)
        "model.type": (kind, ["BPE"]),
        "normalizer": (tokenizer.get("normalizer"), [None]),
        "pre_tokenizer.type": (splitter.get("type"), ["ByteLevel"]),
        "pre_tokenizer.use_regex": (splitter.get("use_regex", True), [True]),
        "model.dropout": (model.get("dropout"), [None, 0.0]),
        "model.continuing_subword_prefix": (model.get("continuing_subword_prefix"), [None, ""]),
        "model.end_of_word_suffix": (model.get("end_of_word_suffix"), [None, ""]),
    }
    if model.get("unk_token") is not None and not set(BYTE_CHARS) <= set(model["vocab"]):
        supported["model.fuse_unk"] = (model.get("fuse_unk", False), [False])
        supported["model.byte_fallback"] = (model.get("byte_fallback", False), [False])
    for setting, (value, values) in supported.items():
        if value not in values:
            raise unsupported(path, setting, value, " or ".join(map(repr, values)))
    prefix = splitter.get("add_prefix_space", False)
    if settings.get("add_prefix_space", prefix) not in (prefix, None):
        problem = f"pre_tokenizer.add_prefix_space is {prefix}, but tokenizer_config.json differs"
        raise ValueError(f"{path}: {problem}")


def encoder_from_tokenizer(
    tokenizer: dict[str, Any], settings: dict[str, Any], path: str
) -> Encoder:
    """Make an Encoder that does what a tokenizer.json says. path is for error messages."""
    model = tokenizer["model"]
    merges = [read_merge(merge, path) for merge in model["merges"]]
    named = named_tokens(settings)
    added = merge_added_tokens(tokenizer.get("added_tokens") or [], settings, path)
    vocabulary = dict(model["vocab"])
    for name, entry in added.items():
        if vocabulary.setdefault(name, entry["id"]) != entry["id"]:
            raise ValueError(f"{path} is damaged: the token {name!r} has two ids; {REPLACE}")
    check_vocabulary(vocabulary, merges, path, path)
    special_tokens = {}
    added_tokens = {}
    for name, entry in (named | added).items():
        trims = [key for key in ("lstrip", "rstrip", "single_word") if entry.get(key)]
        if name not in vocabulary:
            continue
        if not entry.get("special") and name not in named:
            if trims:
                raise unsupported(path, f"{trims[0]} of the added token {name!r}", True, "False")
            added_tokens[name] = vocabulary[name]
        elif not trims:  # else it is decoded, but never made from text
            special_tokens[name] = vocabulary[name]
    model_dir = os.path.dirname(path)
    n_rows = min(
        len(vocabulary), read_optional(model_dir, "config.json").get("vocab_size", math.inf)
    )
    return Encoder(
        vocabulary,
        merges,
        ignore_merges=bool(model.get("ignore_merges")),
        special_tokens=special_tokens,
        added_tokens=added_tokens,
        add_prefix_space=bool(tokenizer["pre_tokenizer"].get("add_prefix_space")),
        first_ids=tuple(first_ids(tokenizer.get("post_processor"), path)),
        unknown_id=vocabulary.get(model.get("unk_token")),
        start_id=find_start_id(model_dir, n_rows),
        end_ids=find_end_ids(model_dir, n_rows),
    )


def read_merge(merge: Any, path: str) -> tuple[str, str]:
    """Read a merge of a tokenizer.json: two tokens in a list or, in older files, in one text."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2 or not all(isinstance(part, str) and part for part in parts):
        raise ValueError(f"{path} is damaged: the merge {merge!r} is not two tokens; {REPLACE}")
    return parts[0], parts[1]


def named_tokens(settings: dict[str, Any]) -> dict[str, dict]:
    """Return the special tokens that settings name, as in "bos_token": "<s>" -> {name: entry}."""
    values = [DEFAULT_TOKEN]
    for key, value in settings.items():
        if key.endswith("_token"):
            values.append(value)
        elif key in ("extra_special_tokens", "additional_special_tokens"):
            values += value.values() if isinstance(value, dict) else value or []
    entries = [entry for value in values if (entry := token_entry(value))]
    return {entry["content"]: entry for entry in entries}


def token_entry(value: Any) -> dict | None:
    """Return {"content": name, ...} of a token given as a name or as a dict. Else None."""
    if isinstance(value, str):
        return {"content": value}
    return value if isinstance(value, dict) and "content" in value else None


def merge_added_tokens(entries: list[dict], settings: dict[str, Any], path: str) -> dict[str, dict]:
    """Join the added tokens of tokenizer.json and tokenizer_config.json -> {name: entry}.

    Raises ValueError if they disagree about a token.
    """
    added = {}
    for entry in entries:
        entry["content"].encode("utf-8")  # raises UnicodeError for half a character
        added[entry["content"]] = entry
    for token_id, other in settings.get("added_tokens_decoder", {}).items():
        other = {"id": int(token_id)} | other
        entry = added.setdefault(other["content"], other)
        for key in ("id", "special", "lstrip", "rstrip", "single_word"):
            if entry.get(key, other.get(key)) != other.get(key):
                name = other["content"]
                problem = f"{key} of the added token {name!r} differs in tokenizer_config.json"
                raise ValueError(f"{path}: {problem}")
    return added


def first_ids(processor: dict[str, Any] | None, path: str) -> list[int]:
    """Return the ids that a post-processor puts before each text."""
    kind = processor["type"] if processor else None
    if processor is None or kind == "ByteLevel":
        return []
    if kind == "Sequence":
        return [i for part in processor["processors"] for i in first_ids(part, path)]
    if kind != "TemplateProcessing":
        raise unsupported(path, "post_processor.type", kind, "'TemplateProcessing' or 'ByteLevel'")
    *first, text = processor["single"]
    if "Sequence" not in text or any("Sequence" in piece for piece in first):
        raise unsupported(
            path, "post_processor.single", processor["single"], "tokens before a text"
        )
    names = [piece["SpecialToken"]["id"] for piece in first]
    return [i for name in names for i in processor["special_tokens"][name]["ids"]]


def find_start_id(model_dir: str, n_rows: int) -> int | None:
    """Return the id to start a text with: bos, else eos. None if the model has neither."""
    ids = configured_ids(model_dir, "bos_token_id") + configured_ids(model_dir, "eos_token_id")
    return next((token_id for token_id in ids if token_id < n_rows), None)


def find_end_ids(model_dir: str, n_rows: int) -> frozenset[int] | None:
    """Return the ids that end a text. None if the configured ones have no row in wte."""
    ids = configured_ids(model_dir, "eos_token_id")
    with_row = frozenset(token_id for token_id in ids if token_id < n_rows)
    return None if ids and not with_row else with_row


def configured_ids(model_dir: str, key: str) -> list[int]:
    """Read a token id or a list of them. generation_config.json comes before config.json."""
    path = os.path.join(model_dir, "generation_config.json")
    value = read_optional(model_dir, "generation_config.json").get(key)
    if value is None:
        path = os.path.join(model_dir, "config.json")
        value = read_optional(model_dir, "config.json").get(key, DEFAULT_TOKEN_ID)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if not all(type(token_id) is int for token_id in ids):
        raise unsupported(path, key, value, "a token id or a list of them")
    return [token_id for token_id in ids if token_id >= 0]


# The Hub


def download_from_hub(name: str, model_dir: str) -> None:
    """Download the model owner/name from the Hugging Face Hub into the folder model_dir.

    The package huggingface_hub does the work. It reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE from
    the environment, and it resumes an interrupted download, which is kept in model_dir + ".part".

    Raises ConnectionError if the model cannot be downloaded, FileNotFoundError or ValueError,
    before its weights are downloaded, if it is not a GPT-2 in safetensors, and ImportError if the
    package is missing.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        needed = f"to download {name}, install the package huggingface_hub"
        raise ImportError(f"{needed}: pip install huggingface_hub") from None
    part = model_dir + ".part"
    with explained(name):
        info = HfApi().repo_info(name, revision="main")
    names = {sibling.rfilename for sibling in info.siblings or []}

    def fetch(files: list[str]) -> None:
        with explained(name):
            snapshot_download(name, revision=info.sha, local_dir=part, allow_patterns=files)

    try:
        for needed in (["config.json"], [WEIGHTS, WEIGHTS + ".index.json"]):
            if names.isdisjoint(needed):
                raise FileNotFoundError(f"{name} on the Hub has no {needed[0]}; {CONVERT}")
        fetch(SMALL_FILES)
        read_config(os.path.join(part, "config.json"))
        read_encoder(part)
        files = [WEIGHTS]
        if WEIGHTS not in names:
            files = shard_names(os.path.join(part, WEIGHTS + ".index.json"))
        fetch(files)
        os.replace(part, model_dir)
    except (ValueError, FileNotFoundError):
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(model_dir))  # of the owner, if there is no other model
        raise


@contextlib.contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn the errors of huggingface_hub, which have many types and lines, into one type and line."""
    try:
        yield
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if status in (401, 403):
            reason = "it is private or does not exist; for a private model, set HF_TOKEN"
        if status == 404:
            reason = "it does not exist"
        raise ConnectionError(f"cannot download {name} from the Hub: {reason}") from None
