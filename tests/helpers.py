"""Shared by the tests: small models in OpenAI's layout, independent oracles, comparisons."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
DATA_DIR = ROOT / "tests" / "data"
REAL_MODELS_DIR = ROOT / "models"

# GPT-2's byte characters: printable Latin-1 characters stand for themselves, the other bytes
# are U+0100 and up.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE} | {
    byte: chr(256 + i) for i, byte in enumerate(OTHERS)
}
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"

FILES = (
    *("checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001"),
    *("model.ckpt.index", "model.ckpt.meta", "vocab.bpe"),
)
SMALL_MERGES = [
    "Ġ t",
    "h e",
    "Ġt he",
    "i n",
    "a n",
    "r e",
    "an d",
    "Ġ and",
    "Ġ a",
    "o n",
    "e r",
    "in g",
]
SMALL_HPARAMS = {
    "n_vocab": 257 + len(SMALL_MERGES),
    "n_ctx": 32,
    "n_embd": 12,
    "n_head": 3,
    "n_layer": 2,
}
REFERENCE_MODELS = {  # these sizes expose a wrong axis, head or layer order
    "three_heads": SMALL_HPARAMS,
    "one_layer": {"n_vocab": 50, "n_ctx": 16, "n_embd": 8, "n_head": 1, "n_layer": 1},
    "eleven_layers": {"n_vocab": 60, "n_ctx": 24, "n_embd": 10, "n_head": 5, "n_layer": 11},
}
TINY_PROMPT = [813, 25, 198, 467, 357, 350]  # "ROMEO:\nWhat light" in the vocabulary of models/tiny
WARPS = [  # temperature, top_k, top_p
    *((1.0, 0, 1.0), (0.7, 0, 1.0), (2.5, 0, 1.0), (0.01, 0, 0.5), (50.0, 0, 0.9)),
    *((1.0, 1, 1.0), (1.0, 40, 1.0), (1.0, 499, 1.0), (1.0, 1000, 1.0)),
    *((1.0, 0, 0.9), (1.0, 0, 0.5), (1.0, 0, 0.01), (1.0, 0, 0.999)),
    *((0.8, 40, 0.95), (1.3, 100, 0.3), (0.5, 3, 0.5), (3.0, 200, 0.7)),
]


def held_out_text():
    """The last tenth of tiny Shakespeare, which models/tiny was not trained on."""
    return (DATA_DIR / "shakespeare_held_out.txt").read_text(encoding="utf-8")


# Files in OpenAI's layout


def gpt2_merges():
    """The 50,000 merges of GPT-2's vocabulary."""
    return (DATA_DIR / "vocab.bpe").read_text(encoding="utf-8").split("\n")[1:-1]


def write_vocabulary(folder, merges=SMALL_MERGES):
    """Write encoder.json and vocab.bpe in OpenAI's order: bytes, merges, <|endoftext|>."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [BYTE_TO_CHAR[byte] for byte in PRINTABLE + OTHERS]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def random_variables(hparams, seed=0):
    """Random values for every variable of a GPT-2 -> {name: array}."""
    # RandomState gives the same numbers in every NumPy version, as stored results need.
    rng = np.random.RandomState(seed)
    n_embd = hparams["n_embd"]

    def normal(*shape, mean=0.0, std=0.1):
        return (mean + std * rng.standard_normal(shape)).astype(np.float32)

    variables = {
        "model/wte": normal(hparams["n_vocab"], n_embd, std=0.3),
        "model/wpe": normal(hparams["n_ctx"], n_embd),
        "model/ln_f/g": normal(n_embd, mean=1.0),
        "model/ln_f/b": normal(n_embd),
    }
    for layer in range(hparams["n_layer"]):
        name = f"model/h{layer}"
        for norm in ("ln_1", "ln_2"):
            variables[f"{name}/{norm}/g"] = normal(n_embd, mean=1.0)
            variables[f"{name}/{norm}/b"] = normal(n_embd)
        for projection, n_in, n_out in (
            ("attn/c_attn", n_embd, 3 * n_embd),
            ("attn/c_proj", n_embd, n_embd),
            ("mlp/c_fc", n_embd, 4 * n_embd),
            ("mlp/c_proj", 4 * n_embd, n_embd),
        ):
            variables[f"{name}/{projection}/w"] = normal(1, n_in, n_out, std=0.4)
            variables[f"{name}/{projection}/b"] = normal(n_out)
    return variables


def save_data(prefix, variables):
    """Save {name: array} as the data file and the index of a TensorFlow checkpoint."""
    import tensorflow as tf

    names = sorted(variables)
    tensors = [tf.constant(variables[name]) for name in names]
    slices = [""] * len(names)
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=names, shape_and_slices=slices, tensors=tensors
    )


def save_variables(prefix, variables):
    """Save {name: array} as a TensorFlow checkpoint, with the file `checkpoint` that names it."""
    save_data(prefix, variables)
    lines = [
        f'{key}: "{prefix.name}"\n'
        for key in ("model_checkpoint_path", "all_model_checkpoint_paths")
    ]
    (prefix.parent / "checkpoint").write_text("".join(lines))


def write_model(
    model_dir, hparams=SMALL_HPARAMS, seed=0, prefix="model.ckpt", merges=SMALL_MERGES, extra=()
):
    """Write the seven files of a random model -> model_dir. `extra`: further variables."""
    model_dir = Path(model_dir)
    write_vocabulary(model_dir, merges)
    (model_dir / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")
    save_variables(model_dir / prefix, random_variables(hparams, seed) | dict(extra))
    (model_dir / f"{prefix}.meta").write_bytes(b"not read by anyone")
    return model_dir


def copy_model(model_dir, target):
    """Copy the seven files of a model, without the record that a load leaves -> target."""
    target.mkdir(parents=True)
    for name in FILES:
        shutil.copy(model_dir / name, target)
    return target


# Parameters


def random_params(hparams, seed=0):
    """The params dict of a random model, built without utils.py."""
    params = {}
    for name, array in random_variables(hparams, seed).items():
        *keys, last = name.split("/")[1:]
        place = params
        for key in keys:
            place = place.setdefault(key, {})
        place[last] = array.reshape(array.shape[-2:])
    params["blocks"] = [params.pop(f"h{layer}") for layer in range(hparams["n_layer"])]
    return params


def map_arrays(function, params):
    """The same nested dicts and lists, with function(array) in place of each array."""
    if isinstance(params, dict):
        return {key: map_arrays(function, value) for key, value in params.items()}
    if isinstance(params, list):
        return [map_arrays(function, value) for value in params]
    return function(params)


def flat(value, name="model"):
    """{variable name: array} of a params dict."""
    if not isinstance(value, dict):
        return {name: value}
    result = {}
    for key, part in value.items():
        if key == "blocks":
            for layer, block in enumerate(part):
                result |= flat(block, f"{name}/h{layer}")
        else:
            result |= flat(part, f"{name}/{key}")
    return result


# Oracles


def tiktoken_encoding(models_dir, name):
    """tiktoken's encoding of the vocabulary in models_dir/name."""
    import tiktoken
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    os.environ["TIKTOKEN_CACHE_DIR"] = ""  # or it would keep old vocabularies, by their path

    folder = Path(models_dir, name)
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    special = {"<|endoftext|>": len(ranks)}
    return tiktoken.Encoding(
        name, pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


def float64_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def float64_softmax(x):
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


def float64_layer_norm(x, g, b):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * g + b


def float64_linear(x, w, b):
    return x @ w + b


def float64_gpt2(ids, params, n_head):
    """The logits [n_seq, n_vocab] of a GPT-2 in float64, one head and one query at a time."""
    params = map_arrays(lambda array: array.astype(np.float64, copy=False), params)
    x = params["wte"][ids] + params["wpe"][: len(ids)]
    for block in params["blocks"]:
        x = float64_block(x, n_head, **block)
    return float64_layer_norm(x, **params["ln_f"]) @ params["wte"].T


def float64_block(x, n_head, ln_1, attn, ln_2, mlp):
    n_seq, n_embd = x.shape
    qkv = float64_linear(float64_layer_norm(x, **ln_1), **attn["c_attn"])
    q, k, v = qkv.reshape(n_seq, 3, n_head, -1).transpose(1, 2, 0, 3)
    heads = np.empty_like(q)
    for head in range(n_head):
        for i in range(n_seq):
            weights = float64_softmax(k[head, : i + 1] @ q[head, i] / math.sqrt(q.shape[-1]))
            heads[head, i] = weights @ v[head, : i + 1]
    heads = heads.swapaxes(0, 1).reshape(n_seq, n_embd)
    x = x + float64_linear(heads, **attn["c_proj"])
    hidden = float64_gelu(float64_linear(float64_layer_norm(x, **ln_2), **mlp["c_fc"]))
    return x + float64_linear(hidden, **mlp["c_proj"])


# Processes


def bash(script, **options):
    """Run a bash script in which `python` is this Python -> the finished process."""
    environment = os.environ | {"PYTHON": sys.executable}
    environment.pop("PYTHONUNBUFFERED", None)  # it would hide a missing flush
    command = ["bash", "-c", f'python() {{ "$PYTHON" "$@"; }}; {script}']
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, **options
    )


def python(*words, **options):
    """Run Python in the project's folder -> (exit status, standard output, standard error)."""
    command = [sys.executable, *map(str, words)]
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300} | options
    result = subprocess.run(command, **options)
    return result.returncode, result.stdout, result.stderr


# Comparisons


def assert_close(logits, expected):
    """Equal up to float32 rounding: within 1e-4 of the logits' scale."""
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def load(model_dir):
    """(encoder, hparams, params) of the model in a folder."""
    from utils import load_encoder_hparams_and_params

    return load_encoder_hparams_and_params(model_dir.name, str(model_dir.parent))


def is_mapped(array):
    """Whether an array lies in a mapped file, not in memory of its own."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base is not None


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self):
        return True
