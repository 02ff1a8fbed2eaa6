"""Models in the layout of Hugging Face's transformers, in a folder or on the Hub.

A folder holds config.json, the weights in *.safetensors, and a vocabulary: tokenizer.json, or
vocab.json and merges.txt. Every setting in its files is interpreted as transformers 5 does, or
refused with a message that names it. The weights lie in the file as NumPy needs them, so float32
weights are memory-mapped, not copied. The format: https://huggingface.co/docs/safetensors
"""

import json
import math
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex

from encoder import (
    END_OF_TEXT,
    Encoder,
    Merges,
    Vocabulary,
    check_vocabulary,
    read_json,
    read_merges,
    valid_text,
)
from fast import in_blocks

Json = dict[str, Any]  # an object in a JSON file

DTYPES = {
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",  # the upper half of a float32
}
MASKS = (".attn.bias", ".attn.masked_bias")  # stored by old versions; not parameters
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SMALL_FILES = (  # of a model on the Hub, without its weights
    r"(generation_|tokenizer_)?config\.json|tokenizer\.json|special_tokens_map\.json|"
    r"added_tokens\.json|vocab\.json|merges\.txt|model\.safetensors\.index\.json"
)
CONVERT = (
    "save the model (merged, if it is an adapter) with transformers: "
    "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(FOLDER)"
)


# Activations that GPT-2 does not have


@in_blocks
def exact_gelu(x):
    """x times the standard normal distribution function of x (Hendrycks & Gimpel, 2016)."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def erf(x):
    """The error function, to 1.5e-7: formula 7.1.26 of Abramowitz & Stegun (1964)."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = 0.254829592 + t * (
        -0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    )
    return np.sign(x) * (1 - t * series * np.exp(-x * x))


@in_blocks
def relu(x):
    """Rectified linear unit."""
    return np.maximum(x, 0)


@in_blocks
def silu(x):
    """x * sigmoid(x), with the sigmoid as a tanh, which cannot overflow."""
    return 0.5 * x * (1 + np.tanh(0.5 * x))


ACTIVATIONS: dict[str | None, Callable | None] = {  # None is GPT-2's own
    None: None,
    "gelu_new": None,
    "gelu_pytorch_tanh": None,
    "gelu": exact_gelu,
    "relu": relu,
    "silu": silu,
    "swish": silu,
}


# The settings. An absent one is None.

EPS = 1e-5  # of GPT-2
SIZES = {  # GPT-2's, and the names in config.json: the first one that is there counts
    "n_vocab": (50257, "vocab_size"),
    "n_ctx": (1024, "max_position_embeddings", "n_positions", "n_ctx"),
    "n_embd": (768, "hidden_size", "n_embd"),
    "n_head": (12, "num_attention_heads", "n_head"),
    "n_layer": (12, "num_hidden_layers", "n_layer"),
}
REBUILT = [None, "GPT2Tokenizer", "GPT2TokenizerFast"]  # classes that ignore most of tokenizer.json
CLASSES = [*REBUILT, "PreTrainedTokenizerFast", "TokenizersBackend"]
DTYPE_NAMES = [None, "float32", "float16", "bfloat16"]
CONFIG_SETTINGS = {  # each with the values that are supported
    "model_type": [None, "gpt2"],
    "activation_function": list(ACTIVATIONS),
    "scale_attn_weights": [True, False],
    "scale_attn_by_inverse_layer_idx": [None, True, False],
    "add_cross_attention": [None, False],
    "tie_word_embeddings": [None, True],
    "quantization_config": [None],
    "torch_dtype": DTYPE_NAMES,
    "dtype": DTYPE_NAMES,
    "tokenizer_class": CLASSES,
}
TOKENIZER_SETTINGS = {  # of tokenizer.json
    "normalizer": [None],
    "pre_tokenizer.type": ["ByteLevel"],
    "pre_tokenizer.use_regex": [None, True],
    "model.type": [None, "BPE"],
    "model.dropout": [None, 0.0],
    "model.continuing_subword_prefix": [None, ""],
    "model.end_of_word_suffix": [None, ""],
    "post_processor.type": [None, "ByteLevel", "TemplateProcessing"],
    "decoder.type": ["ByteLevel"],
}
GPT2_TOKENIZER = dict.fromkeys(["bos_token", "eos_token", "unk_token"], END_OF_TEXT)  # by default
DEFAULT_ID = 50256  # GPT2Config's bos_token_id and eos_token_id
VOCABULARY_SETTINGS = {  # of tokenizer_config.json without a tokenizer.json
    "tokenizer_class": REBUILT,
    "add_bos_token": [None, False],
    "add_eos_token": [None, False],
}


def check_settings(content, settings, path):
    """Raise ValueError, naming the setting, unless each one has a value that is supported."""
    for setting, values in settings.items():
        value: Any = content
        for key in setting.split("."):
            value = (value or {}).get(key)
        if value not in values:
            raise ValueError(f"{path}: {setting} {value!r} is not supported, only {values}")


def read_optional(path):
    """Read a JSON file. Return {} if there is none."""
    return read_json(path) if path.is_file() else {}


class Folder(NamedTuple):
    """A model, as its folder describes it.

    hparams: n_vocab, n_ctx, n_embd, n_head and n_layer.
    n_inner: the width of the hidden layer of mlp, or None for 4 * n_embd.
    variables: {name as in OpenAI's checkpoints: float32 array}, not checked against hparams.
    ffn, layer_norm: the arguments of these functions that differ from GPT-2's.
    """

    encoder: Encoder
    hparams: dict[str, int]
    n_inner: int | None
    variables: dict[str, np.ndarray]
    ffn: dict[str, Callable]
    layer_norm: dict[str, float]


def read_folder(model_dir: str | Path) -> Folder:
    """Read the model in the folder model_dir.

    Raises ValueError for a model that is not supported and for damaged files, FileNotFoundError for
    a missing file. The shapes of the variables are left to the caller.
    """
    folder = Path(model_dir)
    config = read_config(folder)
    activation = ACTIVATIONS[config.get("activation_function")]
    eps = config["layer_norm_epsilon"]
    return Folder(
        encoder=read_encoder(folder, config),
        hparams={name: config[name] for name in SIZES},
        n_inner=config.get("n_inner"),
        variables=read_variables(folder, config),
        ffn={"activation": activation} if activation else {},
        layer_norm={"eps": eps} if eps != EPS else {},
    )


def read_config(folder):
    """Read and check config.json. The sizes get the names of hparams."""
    path = folder / "config.json"
    config = {"layer_norm_epsilon": EPS, "scale_attn_weights": True} | read_json(path)
    check_settings(config, CONFIG_SETTINGS, path)
    eps = config["layer_norm_epsilon"]
    if type(eps) is not float:
        raise ValueError(f"{path}: layer_norm_epsilon must be a float, got {eps!r}")
    sizes = {}
    for name, (default, *keys) in SIZES.items():
        size = next((config[key] for key in keys if key in config), default)
        if type(size) is not int or size < 1:
            rule = "must be a whole number, 1 or more"
            raise ValueError(f"{path}: {' or '.join(keys)} {rule}, got {size!r}")
        sizes[name] = size
    return config | sizes


# The weights


def read_variables(folder, config):
    """Read all tensors -> {our name: float32 array}.

    Attention divides by the square root of d_head. If a model does not, or divides by the number
    of the layer as well, this is folded into the columns of c_attn that make q.
    """
    variables = {}
    for path in weight_files(folder):
        for name, array in read_safetensors(path).items():
            name = our_name(name)
            scale = 1.0
            if "/attn/c_attn/" in name:
                if not config["scale_attn_weights"]:
                    scale = math.sqrt(config["n_embd"] / config["n_head"])
                if config.get("scale_attn_by_inverse_layer_idx"):
                    scale /= 1 + int(re.sub(r"\D", "", name))
            if scale != 1:
                array = np.atleast_1d(array).copy()
                array[..., : config["n_embd"]] *= scale
            variables[name] = array
    head = variables.pop("model/lm_head/w", None)
    if head is not None:
        wte = variables.setdefault("model/wte", head)  # a file may hold only one of the two
        if not np.array_equal(head, wte, equal_nan=True):
            problem = "lm_head.weight differs from wte.weight, which is not supported"
            raise ValueError(f"{path}: {problem}")
    return variables


def weight_files(folder):
    """Return the paths of the files that hold the weights, as transformers chooses them.

    A pickle (*.bin) is never opened: it can run code.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = read_optional(folder / INDEX).get("weight_map")
    if not isinstance(index, dict):
        found = ", ".join(sorted(path.name for path in folder.iterdir()))
        raise FileNotFoundError(f"{folder} has no {WEIGHTS}, only {found}; {CONVERT}")
    return [folder / name for name in sorted(set(map(str, index.values())))]


def our_name(name):
    """h.0.attn.c_attn.weight -> model/h0/attn/c_attn/w."""
    module, _, kind = name.removeprefix("transformer.").rpartition(".")
    place = "model/" + re.sub(r"^h\.", "h", module).replace(".", "/")
    if kind == "weight" and module in ("wte", "wpe"):
        return place
    letters = {"weight": "w", "bias": "b"}
    if "/ln_" in place:
        letters["weight"] = "g"
    return f"{place}/{letters.get(kind, kind)}"


def read_safetensors(path):
    """Read a file -> {name: float32 array}, mapped if it is stored as aligned float32.

    A file is 8 bytes with the length of the header, the header in JSON, and the tensors, one after
    another.
    """
    try:
        content = np.asarray(np.memmap(path, np.uint8, "r"))
        if content[:7].tobytes() == b"version":
            raise ValueError("it is a Git LFS pointer; fetch the file with `git lfs pull`")
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        header.pop("__metadata__", None)
        tensors = {}
        position = 0
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, end = entry["data_offsets"]
            if begin != position:
                raise ValueError(f"there is a gap or an overlap before {name!r}")
            position = end
            if not name.endswith(MASKS):
                tensors[name] = to_array(content[start + begin : start + end], **entry)
        if start + position != len(content):
            raise ValueError("the tensors do not end where the file ends")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
    return tensors


def to_array(data, dtype, shape, data_offsets):
    """Return a tensor, whose entry in the header has these keys, as a float32 array."""
    if dtype not in DTYPES:
        raise ValueError(f"a tensor has the type {dtype!r}, not one of {list(DTYPES)}")
    array = data.view(DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array, np.float32, "A")


# The tokenizer. An added token is a dict with these keys: content, its name; special, it is only
# made where it is allowed; normalized, it is looked for in a second pass; lstrip and rstrip, it
# includes the white space before or after it; single_word, no letter or digit may be beside it.

FLAGS = dict.fromkeys(["special", "normalized", "lstrip", "rstrip", "single_word"], False)
IN_ORDER = dict.fromkeys(
    f"{name}_token" for name in ["bos", "eos", "unk", "sep", "pad", "cls", "mask"]
)
SPACE_BEFORE = regex.compile(r"(?r)\s*")  # (?r) searches backwards
SPACE_AFTER = regex.compile(r"\s*")
LETTER = regex.compile(r"\w")


class FolderEncoder(Encoder):
    """An Encoder that also makes added tokens, {name: token}. Their ids are in the vocabulary."""

    def __init__(self, vocabulary: Vocabulary, merges: Merges, added: dict[str, Json]):
        super().__init__(vocabulary, merges)
        self.added = added
        self.special_tokens = {n: vocabulary[n] for n, token in added.items() if token["special"]}
        self.whole_words = {}
        self.first_ids = []  # ids that `encode` puts before those of every text
        self.add_prefix_space = False  # to each text, also to one after a token
        self.patterns = []  # of the names in each pass; where two start alike, the longest counts
        for normalized in (False, True):
            names = [name for name, token in added.items() if token["normalized"] == normalized]
            names.sort(key=len, reverse=True)
            self.patterns.append(re.compile("|".join(map(re.escape, names)) or "(?!)"))

    def encode(self, text: str, allowed_special: Iterable[str] = ()) -> list[int]:
        """Return the ids of a text, with special tokens as in `Encoder.encode`."""
        forbidden = self.special_tokens.keys() - self.allowed_names(allowed_special)
        return self.first_ids + self.encode_part(valid_text(text), self.patterns, forbidden)

    def encode_part(self, text, patterns, forbidden):
        """Return the ids of a text in which only these patterns are left to look for."""
        if not patterns:
            if self.add_prefix_space and text and not text.startswith(" "):
                text = " " + text
            return self.encode_ordinary(text)
        ids = []
        start = 0
        for match in patterns[0].finditer(text):
            begin, end = match.span()
            token = self.added[match[0]]
            beside = text[begin - 1 : begin] + text[end : end + 1]
            if match[0] in forbidden or (token["single_word"] and LETTER.search(beside)):
                continue
            if token["lstrip"]:
                begin = max(start, next(SPACE_BEFORE.finditer(text, start, begin)).start())
            if token["rstrip"]:
                end = next(SPACE_AFTER.finditer(text, end)).end()
            ids += self.encode_part(text[start:begin], patterns[1:], forbidden)
            if begin < end:  # else it is white space that belongs to the token before it
                ids.append(self.encoder[match[0]])
            start = end
        return ids + self.encode_part(text[start:], patterns[1:], forbidden)


def read_encoder(folder, config):
    """Read the vocabulary of a folder. Ids that have no row in wte do not start or end a text."""
    settings = read_optional(folder / "tokenizer_config.json")
    if not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens", None)
    if "added_tokens_decoder" not in settings:  # saved by an old version
        settings |= read_optional(folder / "special_tokens_map.json")
    try:
        tokenizer = read_tokenizer(folder, settings)
        if (settings.get("tokenizer_class") or config.get("tokenizer_class")) in REBUILT:
            settings = GPT2_TOKENIZER | settings
            rebuild(tokenizer, settings)
        encoder = make_encoder(tokenizer, added_tokens(folder, settings, tokenizer))
        names = [as_token(settings.get(key))["content"] for key in ("bos_token", "eos_token")]
        starts: list[Any] = [encoder.encoder.get(name) for name in names]
    except (AttributeError, LookupError, TypeError, UnicodeError) as error:
        files = "tokenizer.json, vocab.json or tokenizer_config.json"
        raise ValueError(f"{folder}: {files} is damaged: {error!r}") from None
    generation = read_optional(folder / "generation_config.json")
    config = config | {key: value for key, value in generation.items() if value is not None}
    ends = config.get("eos_token_id", DEFAULT_ID)
    if not isinstance(ends, list):
        ends = [ends]
    starts += [config.get("bos_token_id", DEFAULT_ID), *ends]
    rows = range(min(config["n_vocab"], len(encoder.encoder)))
    encoder.start_id = next((int(i) for i in starts if i in rows), None)  # a file may have 5.0
    encoder.end_ids = frozenset(int(i) for i in ends if i in rows)
    return encoder


def read_tokenizer(folder, settings):
    """Read tokenizer.json, or the same from vocab.json and merges.txt. Check all settings."""
    path = folder / "tokenizer.json"
    merges_path = path
    if path.is_file():
        tokenizer = read_json(path)
        check_settings(tokenizer, TOKENIZER_SETTINGS, path)
        check_settings(settings, {"tokenizer_class": CLASSES}, folder / "tokenizer_config.json")
    else:
        path = folder / "vocab.json"
        merges_path = folder / "merges.txt"
        check_settings(settings, VOCABULARY_SETTINGS, folder / "tokenizer_config.json")
        tokenizer = {"model": {"vocab": read_json(path), "merges": read_merges(merges_path)}}
    model = tokenizer["model"]
    merges = []
    for merge in model["merges"]:
        if isinstance(merge, str):  # in older files
            merge = merge.split(" ")
        merges.append(tuple(merge))
    model["merges"] = merges
    check_vocabulary(model["vocab"], merges, path, merges_path)
    template = (tokenizer.get("post_processor") or {}).get("single")
    if template and "Sequence" not in template[-1]:
        raise ValueError(f"{path}: post_processor.single adds tokens after the text: {template}")
    return tokenizer


def rebuild(tokenizer, settings):
    """Remove from a tokenizer what transformers' class GPT2Tokenizer ignores."""
    tokenizer["pre_tokenizer"] = settings  # add_prefix_space counts there
    for key in ("ignore_merges", "unk_token"):
        tokenizer["model"].pop(key, None)
    if "added_tokens_decoder" in settings:
        tokenizer["added_tokens"] = []


def make_encoder(tokenizer, added):
    """Make the Encoder that does what tokenizer.json says, with these added tokens."""
    model = tokenizer["model"]
    vocabulary = dict(model["vocab"])
    for name in added:
        vocabulary.setdefault(name, len(vocabulary))  # the next free id
    encoder = FolderEncoder(vocabulary, model["merges"], added)
    encoder.add_prefix_space = tokenizer["pre_tokenizer"].get("add_prefix_space")
    if model.get("ignore_merges"):
        encoder.whole_words = model["vocab"]
    if not model.get("fuse_unk") and not model.get("byte_fallback"):
        encoder.unknown_id = vocabulary.get(model.get("unk_token"))
    processor = tokenizer.get("post_processor") or {}
    for piece in processor.get("single", [])[:-1]:
        encoder.first_ids += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
    return encoder


def added_tokens(folder, settings, tokenizer):
    """Return {name: token}, in the order in which new ones get ids.

    added_tokens_decoder of tokenizer_config.json wins over the other lists. Tokens that are only
    named there come last.
    """
    extra = settings.get("extra_special_tokens") or []
    if isinstance(extra, dict):
        settings = settings | extra
        extra = []
    named = {}
    for key, value in (IN_ORDER | settings).items():
        if key.endswith("_token") and isinstance(value, str | dict):
            token = as_token(value)
            named[token["content"]] = token
    entries = list(tokenizer.get("added_tokens") or [])
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"]
        for token_id in sorted(listed, key=lambda token_id: token_id.zfill(9)):  # as numbers
            entries.append(listed[token_id])
    else:
        listed = read_optional(folder / "added_tokens.json")  # {name: id}
        names = sorted(listed, key=listed.__getitem__)
        others = []
        for name in names:
            special = name in named or name in extra
            others.append({"content": name, "special": special, "normalized": not special})
        entries = [*entries, *others, *entries]  # what tokenizer.json says of a token wins
    special_names = set(named)
    added = {}
    for token in map(as_token, entries):
        name = token["content"]
        if token["special"]:
            special_names.add(name)
        added[name] = token | {"special": name in special_names}
    for token in map(as_token, extra or settings.get("additional_special_tokens") or []):
        named[token["content"]] = token
    for name, token in named.items():
        added.setdefault(name, token | {"special": True})
    added.pop("", None)
    "".join(added).encode("utf-8")  # a lone surrogate raises UnicodeError
    return added


def as_token(value) -> Json:
    """Return a token with all its keys. It is given as a dict, or as its name."""
    return FLAGS | (value if isinstance(value, dict) else {"content": value})


# The Hub


def download(name: str, model_dir: str) -> None:
    """Download the model owner/name from the Hugging Face Hub into the folder model_dir.

    The package huggingface_hub does the work. It reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
    from the environment, and it resumes an interrupted download, which is kept beside model_dir.
    If several processes download at once, one does the work and the others wait for it.

    Raises ConnectionError if the model cannot be downloaded, ValueError, before its weights are
    downloaded, if it is not a GPT-2 in safetensors, and ImportError if the package is missing.
    """
    try:
        from huggingface_hub import hf_hub_download, model_info
        from huggingface_hub.utils import WeakFileLock
    except ImportError:
        problem = f"{name} is downloaded with the package huggingface_hub; install it with"
        raise ImportError(f"{problem}: pip install huggingface_hub") from None

    info = ask_hub(model_info, name, revision="main")
    folder = Path(model_dir)
    part = folder.with_name(f".{folder.name}.{info.sha}.part")  # revisions never mix
    folder.parent.mkdir(parents=True, exist_ok=True)

    def fetch(file):
        ask_hub(hf_hub_download, name, filename=file, revision=info.sha, local_dir=part)

    with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.is_dir():  # another process has downloaded it
            return
        try:
            # One file at a time, in this thread: Ctrl-C would wait for the package's own threads.
            files = [sibling.rfilename for sibling in info.siblings or []]
            for file in files:
                if re.fullmatch(SMALL_FILES, file):
                    fetch(file)
            read_encoder(part, read_config(part))
            if WEIGHTS in files:
                fetch(WEIGHTS)
            else:
                for path in weight_files(part):
                    fetch(path.name)
            read_folder(part)
        except (ValueError, FileNotFoundError) as error:
            shutil.rmtree(part, ignore_errors=True)
            raise ValueError(f"{name} from the Hugging Face Hub: {error}") from None
        part.rename(folder)
        for old in folder.parent.glob(f".{folder.name}.{'?' * 40}.part"):  # of other revisions
            shutil.rmtree(old)


def ask_hub(function, name, **options):
    """Call a function of huggingface_hub. Any error becomes a ConnectionError of one line."""
    try:
        return function(name, **options)
    except Exception as error:
        problem = " ".join(str(error).split()) or type(error).__name__
        problem = re.sub(r"\?[^\s']+=[^\s']+", "", problem)  # the signature of an address
        raise ConnectionError(f"cannot download {name} from the Hub: {problem}") from None
