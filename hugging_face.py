"""Models in the layout of Hugging Face's transformers: config.json, *.safetensors and a vocabulary.

The format of safetensors: https://huggingface.co/docs/safetensors. The weights lie in the file as
NumPy needs them, so float32 weights are memory-mapped, not copied.
"""

import glob
import json
import math
import mmap
import os
import re
from typing import NamedTuple

import numpy as np

from encoder import Encoder, get_encoder
from utils import HPARAMS, REPLACE, check_hparams, check_shapes, nest, read_json, variable_shapes

CONFIG_SIZES = {  # the names of HPARAMS in config.json, and the defaults of GPT2Config
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
}
SUPPORTED = {  # the supported values of config.json; the first is the default
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package


class Tensor(NamedTuple):
    """A tensor in a file: where it lies and what it is."""

    path: str
    content: mmap.mmap
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def load_hugging_face(model_dir: str) -> tuple[Encoder, dict, dict]:
    """Load the model in the folder model_dir -> (encoder, hparams, params).

    The rows of wte after the last token are cut off.

    Raises ValueError for a model that is not supported and for damaged files, FileNotFoundError for
    a missing file.
    """
    config, hparams = read_config(os.path.join(model_dir, "config.json"))
    variables = read_variables(model_dir, hparams, config.get("n_inner"))
    params = nest(variables, hparams)
    encoder = get_encoder(os.path.basename(model_dir), os.path.dirname(model_dir))
    n_tokens = len(encoder.decoder)
    if n_tokens > hparams["n_vocab"]:
        rows = f"wte has {hparams['n_vocab']} rows"
        raise ValueError(f"{model_dir}: the vocabulary has {n_tokens} tokens, but {rows}")
    params["wte"] = params["wte"][:n_tokens]
    return encoder, hparams | {"n_vocab": n_tokens}, params


def read_config(path: str) -> tuple[dict, dict[str, int]]:
    """Read config.json -> (all of it, hparams)."""
    config = read_json(path)
    for key, values in SUPPORTED.items():
        value = config.get(key, values[0])
        if value not in values:
            raise ValueError(f"{path}: {key} {value!r} is not supported, only {values[0]!r}")
    sizes = CONFIG_SIZES | {"n_positions": config.get("n_ctx", CONFIG_SIZES["n_positions"])}
    hparams = {}
    for name, key in zip(HPARAMS, CONFIG_SIZES, strict=True):
        hparams[name] = config.get(key, sizes[key])
    check_hparams(hparams, path)
    return config, hparams


# The weights


def read_variables(model_dir: str, hparams: dict, n_inner: int | None) -> dict[str, np.ndarray]:
    """Read GPT-2's variables from all *.safetensors in the folder -> {our name: float32 array}."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(model_dir), "*.safetensors"))):
        for name, tensor in read_safetensors(path).items():
            name = name.removeprefix("transformer.")
            if name in tensors:
                raise ValueError(
                    f"{path} holds the tensor {name}, which occurs twice in {model_dir}"
                )
            tensors[name] = tensor
    if not tensors:  # a pickle is never opened: it can run code
        raise FileNotFoundError(
            f"{os.path.abspath(model_dir)} holds no *.safetensors; convert a pickle (*.bin) with "
            "transformers: AutoModelForCausalLM.from_pretrained(F).save_pretrained(F)"
        )
    shapes = {}
    for name, _ in variable_shapes(hparams, n_inner):
        if their_name(name) in tensors:
            shapes[name] = tensors[their_name(name)].shape
    extra = f"h.{hparams['n_layer']}.ln_1.weight"
    if extra in tensors:
        raise ValueError(f"{model_dir} has more layers than n_layer, which is {hparams['n_layer']}")
    names = check_shapes(shapes, hparams, model_dir, n_inner)
    variables = {name: to_array(tensors[their_name(name)]) for name in names}
    head = tensors.get("lm_head.weight")
    if head and not np.array_equal(to_array(head), variables["model/wte"]):
        raise ValueError(
            f"{head.path}: lm_head.weight differs from wte.weight, which is not supported"
        )
    return variables


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
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = 8 + int.from_bytes(content[:8], "little")
        if start > min(len(content), MAX_HEADER_BYTES):
            raise ValueError(f"a header of {start - 8} bytes does not fit")
        header = json.loads(content[8:start].decode("utf-8"))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            tensors[name] = Tensor(path, content, entry["dtype"], shape, start + begin, start + end)
        check_offsets(tensors, start, len(content))
        return tensors
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: its header is not valid: {error}; {REPLACE}"
        ) from None


def check_offsets(tensors: dict[str, Tensor], start: int, end: int) -> None:
    """Raise ValueError unless the tensors fill the bytes from start to end, without overlaps."""
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1][4:]):
        if tensor.begin != position or tensor.end < position:
            raise ValueError(f"a gap or an overlap at {name!r}")
        for number in (tensor.begin, tensor.end, *tensor.shape):
            if type(number) is not int or number < 0:
                raise ValueError(f"{number!r} in the entry of {name!r}")
        position = tensor.end
    if position != end:
        raise ValueError("the tensors do not fill the file")


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor as a float32 array, mapped if it is stored as aligned float32."""
    if tensor.dtype not in list(DTYPES):
        types = ", ".join(DTYPES)
        raise ValueError(f"{tensor.path}: type {tensor.dtype!r} is not supported, only {types}")
    dtype = DTYPES[tensor.dtype]
    n_bytes = tensor.end - tensor.begin
    if n_bytes != math.prod(tensor.shape) * dtype.itemsize:
        shape = list(tensor.shape)
        raise ValueError(
            f"{tensor.path} is damaged: a tensor of shape {shape} has {n_bytes} bytes; {REPLACE}"
        )
    array = np.frombuffer(tensor.content, dtype, math.prod(tensor.shape), tensor.begin)
    if tensor.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array.reshape(tensor.shape), np.float32, "A")
