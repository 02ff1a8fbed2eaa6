"""What several tests need: small vocabularies and checkpoints in OpenAI's layout, made on the spot."""

import json
import os
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
SHARED = os.environ.get("NPGPT_SHARED")  # a folder with gpt2-vocab/ and text/, if there is one
REAL_MODELS_DIR = ROOT / "models"

# GPT-2's byte characters, written out: the printable ones of Latin-1 as they are, the others from U+0100 on.
PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]
BYTE_TO_CHAR = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}

SMALL_MERGES = ["Ġ t", "h e", "Ġt he", "i n", "a n", "r e", "an d", "Ġ and", "Ġ a", "o n", "e r", "in g"]
SMALL_HPARAMS = {"n_vocab": 257 + len(SMALL_MERGES), "n_ctx": 32, "n_embd": 12, "n_head": 3, "n_layer": 2}
REFERENCE_MODELS = {  # sizes at which the wrong axis, head or layer order would show
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


def write_vocabulary(folder, merges=SMALL_MERGES):
    """Write encoder.json and vocab.bpe as OpenAI's are: bytes, merges, <|endoftext|>."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokens = [BYTE_TO_CHAR[byte] for byte in PRINTABLE + OTHERS]
    tokens += [merge.replace(" ", "") for merge in merges] + ["<|endoftext|>"]
    (folder / "encoder.json").write_text(json.dumps({token: id for id, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


def random_variables(hparams, seed=0):
    """{name: array} of every variable of a GPT-2, random but for the order of magnitude."""
    rng = np.random.RandomState(seed)  # its numbers are the same in every NumPy, as stored results need
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
            variables |= {f"{name}/{norm}/g": normal(n_embd, mean=1.0), f"{name}/{norm}/b": normal(n_embd)}
        for projection, n_in, n_out in (
            ("attn/c_attn", 1, 3),
            ("attn/c_proj", 1, 1),
            ("mlp/c_fc", 1, 4),
            ("mlp/c_proj", 4, 1),
        ):
            variables[f"{name}/{projection}/w"] = normal(1, n_in * n_embd, n_out * n_embd, std=0.4)
            variables[f"{name}/{projection}/b"] = normal(n_out * n_embd)
    return variables


def save_variables(prefix, variables):
    """Save {name: array} as a TensorFlow checkpoint (V2), and the `checkpoint` file that names it."""
    import tensorflow as tf

    prefix, names = Path(prefix), sorted(variables)
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=names,
        shape_and_slices=[""] * len(names),
        tensors=[tf.constant(variables[name]) for name in names],
    )
    lines = [f'{key}: "{prefix.name}"\n' for key in ("model_checkpoint_path", "all_model_checkpoint_paths")]
    (prefix.parent / "checkpoint").write_text("".join(lines))


def write_model(model_dir, hparams=SMALL_HPARAMS, seed=0, prefix="model.ckpt", merges=SMALL_MERGES, extra=()):
    """Write the seven files of a random model, plus `extra` variables, into model_dir."""
    model_dir = Path(model_dir)
    write_vocabulary(model_dir, merges)
    (model_dir / "hparams.json").write_text(json.dumps(hparams, indent=2) + "\n")
    save_variables(model_dir / prefix, random_variables(hparams, seed) | dict(extra))
    (model_dir / f"{prefix}.meta").write_bytes(b"not read by anyone")
    return model_dir
