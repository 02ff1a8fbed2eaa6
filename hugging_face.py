"""Models in the layout of Hugging Face's transformers -> (encoder, hparams, params).

A folder holds config.json, the weights in *.safetensors, and a vocabulary: tokenizer.json, or
vocab.json and merges.txt. Every setting in its files is interpreted as transformers 5 does, or
refused with a message that names it. The weights lie in the file as NumPy needs them, so float32
weights are memory-mapped, not copied. The format: https://huggingface.co/docs/safetensors
"""

import json
import math
import mmap
import os
import re
from typing import Any

import numpy as np

import utils
from encoder import END_OF_TEXT, Encoder, check_vocabulary, read_json, read_merges

Json = dict[str, Any]  # an object in a JSON file

SIZES = ["vocab_size", "n_positions", "n_embd", "n_head", "n_layer"]  # utils.HPARAMS in this layout
DEFAULTS = {  # of transformers' GPT2Config
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
DEFAULT_END = 50256  # GPT2Config's bos_token_id and eos_token_id
ALIASES = {  # GPT2Config.attribute_map: an alias takes precedence over its name
    "hidden_size": "n_embd",
    "max_position_embeddings": "n_positions",
    "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}
VOCABULARY_SETTINGS: dict[str, list] = {  # of tokenizer_config.json without a tokenizer.json
    "tokenizer_class": [None, "GPT2Tokenizer", "GPT2TokenizerFast"],
    "add_eos_token": [None, False],
}
TOKENIZER_SETTINGS: dict[str, list] = {  # of tokenizer.json. None means that a setting is absent
    "normalizer": [None],
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.use_regex": [None, True],
    "model.type": [None, "BPE"],
    "model.dropout": [None, 0.0],
    "model.continuing_subword_prefix": [None, ""],
    "model.end_of_word_suffix": [None, ""],
}
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
}
MASKS = (".attn.bias", ".attn.masked_bias")  # stored by old versions; not parameters
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_PADDING = 127  # a larger difference between rows and tokens looks like a mistake
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONVERT = (
    "convert *.bin with transformers: AutoModelForCausalLM.from_pretrained(FOLDER)"
    ".save_pretrained(FOLDER)"
)


def load_hugging_face(model_dir: str) -> tuple[Encoder, dict, dict]:
    """Load the model in the folder model_dir -> (encoder, hparams, params).

    Rows of wte after the last token are cut off. If a model differs from GPT-2 in its activation
    function, the scale of attention or the epsilon of layer_norm, params holds these beside the
    arrays, under the keyword names of the functions that take them.

    Raises ValueError for a model that is not supported and for damaged files, FileNotFoundError for
    a missing file.
    """
    config = read_config(os.path.join(model_dir, "config.json"))
    hparams = {name: config[key] for name, key in zip(utils.HPARAMS, SIZES, strict=True)}
    params = utils.nest(read_variables(model_dir, config, hparams), hparams)
    set_variants(params, config)
    encoder = read_encoder(model_dir)
    n_rows = hparams["n_vocab"]
    n_tokens = len(encoder.decoder)
    if abs(n_rows - n_tokens) > MAX_PADDING:
        problem = f"wte has {n_rows} rows, but the vocabulary has {n_tokens} tokens"
        utils.note(f"warning: {model_dir}: {problem}")
    params["wte"] = params["wte"][:n_tokens]
    hparams["n_vocab"] = len(params["wte"])
    return encoder, hparams, params


def unsupported(path: str, setting: str, value: object, values: list) -> ValueError:
    supported = " or ".join(map(repr, values))
    return ValueError(f"{path}: {setting} {value!r} is not supported, only {supported}")


# The configuration


def read_config(path: str) -> Json:
    """Read and check config.json. Absent keys get their defaults, and aliases their real names."""
    content = read_json(path)
    n_positions = content.get("n_ctx", DEFAULTS["n_positions"])  # old files have only n_ctx
    config = DEFAULTS | {"n_positions": n_positions} | content
    for alias, key in ALIASES.items():
        if alias in content:
            config[key] = content[alias]
    check_config(config, path)
    return config


def check_config(config: Json, path: str) -> None:
    """Raise ValueError, naming the setting, for a model that gpt2.py cannot run."""
    from gpt2 import ACTIVATIONS

    supported: dict[str, list] = {
        "model_type": ["gpt2"],
        "activation_function": list(ACTIVATIONS),
        "scale_attn_weights": [True, False],
        "scale_attn_by_inverse_layer_idx": [True, False],
        "add_cross_attention": [False],
        "tie_word_embeddings": [True],
    }
    for key, values in supported.items():
        value = config[key]
        if type(value) is not type(values[0]) or value not in values:
            raise unsupported(path, key, value, values)
    eps = config["layer_norm_epsilon"]
    if type(eps) is not float or not 0 <= eps < math.inf:
        raise ValueError(f"{path}: layer_norm_epsilon must be a float, 0 or more, got {eps!r}")
    utils.check_sizes({key: config[key] for key in SIZES}, path)
    if config["n_inner"] is not None:
        utils.check_size("n_inner", config["n_inner"], path)


def set_variants(params: Json, config: Json) -> None:
    """Add to params the arguments of gpt2.py's functions that differ from GPT-2's."""
    from gpt2 import ACTIVATIONS

    mlp: Json = {}
    activation = ACTIVATIONS[config["activation_function"]]
    if activation is not ACTIVATIONS["gelu_new"]:
        mlp["activation"] = activation
    norm: Json = {}
    if config["layer_norm_epsilon"] != DEFAULTS["layer_norm_epsilon"]:
        norm["eps"] = config["layer_norm_epsilon"]
    scale = 1.0
    if config["scale_attn_weights"]:
        scale = (config["n_embd"] // config["n_head"]) ** -0.5
    params["ln_f"] |= norm
    for layer, block in enumerate(params["blocks"]):
        block["ln_1"] |= norm
        block["ln_2"] |= norm
        block["mlp"] |= mlp
        if config["scale_attn_by_inverse_layer_idx"]:
            block["attn"]["scale"] = scale / (layer + 1)
        elif not config["scale_attn_weights"]:
            block["attn"]["scale"] = scale


# The weights


def read_variables(model_dir: str, config: Json, hparams: Json) -> dict[str, np.ndarray]:
    """Read GPT-2's variables -> {our name: float32 array}."""
    tensors: dict[str, np.ndarray] = {}
    for path in weight_files(model_dir):
        for name, array in read_safetensors(path).items():
            name = name.removeprefix("transformer.")  # only some files have it
            if name in tensors:
                raise ValueError(f"{path}: the tensor {name} occurs twice in {model_dir}")
            tensors[name] = array
    if "lm_head.weight" in tensors:
        head = tensors["lm_head.weight"]
        wte = tensors.setdefault("wte.weight", head)  # a file may hold only one of the two
        if not utils.is_equal_by_bits(head, wte):
            problem = "lm_head.weight differs from wte.weight, which is not supported"
            raise ValueError(f"{model_dir}: {problem}")
    n_layer = hparams["n_layer"]
    if any(name.startswith(f"h.{n_layer}.") for name in tensors):
        raise ValueError(f"{model_dir} has more layers than n_layer, which is {n_layer}")
    variables = {}
    for our_name, shape in utils.variable_shapes(hparams, config["n_inner"]):
        name = their_name(our_name)
        found = tensors[name].shape if name in tensors else None
        utils.check_shape(model_dir, name, found, shape[-2:])
        variables[our_name] = tensors[name]
    return variables


def weight_files(model_dir: str) -> list[str]:
    """Return the paths of the files that hold the weights, as transformers chooses them.

    A pickle (*.bin) is never opened: it can run code.
    """
    names = [WEIGHTS]
    if not os.path.isfile(os.path.join(model_dir, WEIGHTS)):
        index = read_optional(model_dir, INDEX).get("weight_map")
        if not isinstance(index, dict):
            raise FileNotFoundError(f"{model_dir} has no {WEIGHTS} or valid {INDEX}; {CONVERT}")
        names = sorted({str(name) for name in index.values()})
    return [os.path.join(model_dir, name) for name in names]


def their_name(name: str) -> str:
    """model/h0/attn/c_attn/w -> h.0.attn.c_attn.weight."""
    name = name.removeprefix("model/")
    name = re.sub(r"^h(\d+)/", r"h.\1.", name)
    name = name.replace("/", ".")
    if name.endswith(".b"):
        return name.removesuffix("b") + "bias"
    return re.sub(r"\.[wg]$", "", name) + ".weight"


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Read a file -> {name: float32 array}.

    A file is 8 bytes with the length of the header, the header in JSON, and the data.
    """
    utils.refuse_pointer(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            if start > MAX_HEADER_BYTES:
                raise ValueError(f"a header of {start - 8} bytes is too long")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = json.loads(content[8:start].decode("utf-8"))
            header.pop("__metadata__", None)
            return read_tensors(header, memoryview(content)[start:])
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            problem = f"is damaged or not supported: {type(error).__name__}: {error}"
        except RecursionError:
            problem = "is damaged: its header is nested too deeply"
    raise ValueError(f"{path} {problem}; {utils.REPLACE}")


def read_tensors(header: Json, data: memoryview) -> dict[str, np.ndarray]:
    """Return the tensors that a header describes.

    Raises ValueError unless they fill the data exactly, one after another.
    """
    tensors = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position:
            raise ValueError(f"a gap or an overlap at {name!r}")
        if not name.endswith(MASKS):
            tensors[name] = to_array(data[begin:end], entry["dtype"], entry["shape"])
        position = end
    if position != len(data):
        raise ValueError("the tensors do not end where the file ends")
    return tensors


def to_array(data: memoryview, dtype: str, shape: list[int]) -> np.ndarray:
    """Return a tensor as a float32 array, mapped if it is stored as aligned float32."""
    if dtype not in DTYPES:
        raise ValueError(f"type {dtype!r} is not one of {', '.join(DTYPES)}")
    array = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array, np.float32, "A")


# The vocabulary


def read_encoder(model_dir: str) -> Encoder:
    """Read the vocabulary of a folder. tokenizer.json takes precedence over the other files."""
    path = os.path.join(model_dir, "tokenizer.json")
    settings = read_optional(model_dir, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # saved by an old version
        settings |= read_optional(model_dir, "special_tokens_map.json")
    try:
        if os.path.isfile(path):
            tokenizer = read_json(path)
            check_tokenizer(tokenizer, settings, path)
        else:
            path = os.path.join(model_dir, "vocab.json")
            tokenizer = tokenizer_from_vocabulary(path, settings)
        return encoder_from_tokenizer(tokenizer, settings, path)
    except (AttributeError, LookupError, TypeError, UnicodeError) as error:
        raise ValueError(f"{path} is damaged: {error!r}; {utils.REPLACE}") from None


def read_optional(model_dir: str, name: str) -> Json:
    """Read a JSON file. Return {} if there is none."""
    path = os.path.join(model_dir, name)
    if not os.path.isfile(path):
        return {}
    return read_json(path)


def tokenizer_from_vocabulary(path: str, settings: Json) -> Json:
    """Read vocab.json, merges.txt and added_tokens.json -> what a tokenizer.json would hold."""
    folder = os.path.dirname(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(
            f"{folder} has no vocabulary: it needs tokenizer.json, or vocab.json "
            "and merges.txt (not SentencePiece's *.model or WordPiece's vocab.txt)"
        )
    for setting, values in VOCABULARY_SETTINGS.items():
        value = settings.get(setting)
        if value not in values:
            config_path = os.path.join(folder, "tokenizer_config.json")
            raise unsupported(config_path, setting, value, values)
    merges_path = os.path.join(folder, "merges.txt")
    added = read_optional(folder, "added_tokens.json")
    template = [{"Sequence": {"id": "A"}}]
    bos = token_entry(settings.get("bos_token", END_OF_TEXT))
    if settings.get("add_bos_token") and bos:
        template = [{"SpecialToken": {"id": bos["content"]}}, *template]
    return {
        "model": {"vocab": read_json(path), "merges": read_merges(merges_path)},
        "merges_path": merges_path,  # not a key of tokenizer.json: the file to name in errors
        "pre_tokenizer": {"add_prefix_space": settings.get("add_prefix_space")},
        "added_tokens": [{"content": name, "id": token_id} for name, token_id in added.items()],
        "post_processor": {"type": "TemplateProcessing", "single": template},
    }


def check_tokenizer(tokenizer: Json, settings: Json, path: str) -> None:
    """Raise ValueError, naming the setting, for a tokenizer.json that Encoder does not support."""
    for setting, values in TOKENIZER_SETTINGS.items():
        value: Any = tokenizer
        for key in setting.split("."):
            value = (value or {}).get(key)
        if value not in values:
            raise unsupported(path, setting, value, values)
    prefix = tokenizer["pre_tokenizer"].get("add_prefix_space")
    if settings.get("add_prefix_space") not in (None, prefix):
        problem = f"pre_tokenizer.add_prefix_space is {prefix}"
        raise ValueError(f"{path}: {problem}, but tokenizer_config.json says the opposite")


def encoder_from_tokenizer(tokenizer: Json, settings: Json, path: str) -> Encoder:
    """Make an Encoder that does what a tokenizer.json says.

    path is the file to name in errors. The configuration in its folder says which ids start and
    end a text.
    """
    model = tokenizer["model"]
    merges = [read_merge(merge, path) for merge in model["merges"]]
    vocabulary = dict(model["vocab"])
    special_tokens = {}
    added_tokens = {}
    for name, token in named_tokens(tokenizer, settings).items():
        token_id = token.get("id", vocabulary.get(name))
        if token_id is None:
            continue
        if vocabulary.setdefault(name, token_id) != token_id:
            raise ValueError(f"{path} is damaged: {name!r} has two ids; {utils.REPLACE}")
        flags = [key for key in ("lstrip", "rstrip", "single_word") if token.get(key)]
        if not token["special"]:
            added_tokens[name] = token_id
            if flags:
                raise unsupported(path, f"{flags[0]} of the added token {name!r}", True, [False])
        elif not flags:  # else it is decoded, but never made from text
            special_tokens[name] = token_id
    check_vocabulary(vocabulary, merges, path, tokenizer.get("merges_path", path))
    bos_ids = configured_ids(os.path.dirname(path), "bos_token_id", len(vocabulary))
    eos_ids = configured_ids(os.path.dirname(path), "eos_token_id", len(vocabulary))
    start_ids = bos_ids or eos_ids
    unknown = model.get("unk_token")
    if model.get("fuse_unk") or model.get("byte_fallback"):
        unknown = None  # there, an unknown byte is not always one unknown token
    return Encoder(
        vocabulary,
        merges,
        ignore_merges=bool(model.get("ignore_merges")),
        special_tokens=special_tokens,
        added_tokens=added_tokens,
        add_prefix_space=bool(tokenizer["pre_tokenizer"].get("add_prefix_space")),
        first_ids=[vocabulary[name] for name in first_tokens(tokenizer, path)],
        unknown_id=vocabulary.get(unknown),
        start_id=start_ids[0] if start_ids else None,
        end_ids=eos_ids,
    )


def read_merge(merge: Any, path: str) -> tuple[str, str]:
    """Read a merge of a tokenizer.json: two tokens in a list or, in older files, in one text."""
    parts = merge.split(" ") if isinstance(merge, str) else merge
    if len(parts) != 2:
        raise ValueError(f"{path} is damaged: {merge!r} is not a merge; {utils.REPLACE}")
    return parts[0], parts[1]


def named_tokens(tokenizer: Json, settings: Json) -> dict[str, Json]:
    """Return the added tokens of tokenizer.json and the tokens that tokenizer_config.json names.

    The result is {name: {"special": ..., "id": ..., and other flags}}. tokenizer.json wins.
    """
    tokens = list(tokenizer.get("added_tokens") or [])
    for token_id, token in settings.get("added_tokens_decoder", {}).items():
        tokens.append(token | {"id": int(token_id)})
    special: list[Any] = [END_OF_TEXT]
    for key, value in settings.items():
        if key.endswith("_token"):  # also add_bos_token, whose value token_entry ignores
            special.append(value)
        elif key in ("extra_special_tokens", "additional_special_tokens"):
            special += value.values() if isinstance(value, dict) else value or []
    for value in special:
        token = token_entry(value)
        if token:
            tokens.append(token | {"special": True})
    named: dict[str, Json] = {}
    for token in tokens:
        name = token["content"]
        name.encode("utf-8")  # raises UnicodeError for a lone surrogate
        known = named.get(name, {})
        is_special = known.get("special", False) or token.get("special", False)
        named[name] = token | known | {"special": is_special}
    return named


def token_entry(value: Any) -> Json:
    """Return {"content": name, ...} of a token that is given as a name or as a dict, else {}."""
    if isinstance(value, str):
        return {"content": value}
    return value if isinstance(value, dict) else {}


def first_tokens(tokenizer: Json, path: str) -> list[str]:
    """Return the tokens that a post-processor puts before each text."""
    processor = tokenizer.get("post_processor") or {}
    kind = processor.get("type")
    if kind in (None, "ByteLevel"):
        return []
    if kind != "TemplateProcessing":
        raise unsupported(path, "post_processor.type", kind, ["TemplateProcessing"])
    template = processor["single"]
    if "Sequence" not in template[-1]:
        raise ValueError(f"{path}: post_processor.single adds tokens after the text: {template!r}")
    return [piece["SpecialToken"]["id"] for piece in template[:-1]]


def configured_ids(model_dir: str, key: str, n_tokens: int) -> list[int] | None:
    """Read an id or a list of them, from generation_config.json or else config.json.

    Returns [] for null. Returns None if none of the ids has a row in wte: Encoder then takes its
    default.
    """
    config = read_optional(model_dir, "config.json")
    value = read_optional(model_dir, "generation_config.json").get(key)
    if value is None:
        value = config.get(key, DEFAULT_END)
    if value is None:
        return []
    n_rows = config.get("vocab_size", DEFAULTS["vocab_size"])
    limit = min(n_rows, n_tokens)
    ids = value if isinstance(value, list) else [value]
    return [i for i in ids if type(i) is int and 0 <= i < limit] or None
