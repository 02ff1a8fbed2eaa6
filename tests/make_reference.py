"""Make tests/reference.npz: what transformers (torch, float32) answers for small models, and draws from.

    pip install torch transformers && python tests/make_reference.py

The models are those of helpers.random_variables, and models/tiny, so that only their answers need to be stored.
"""

import json
from pathlib import Path

import numpy as np
from helpers import REFERENCE_MODELS, TINY_PROMPT, WARPS, random_variables


def torch_model(hparams, variables):
    """The transformers model with these variables. Its Conv1D weights are [n_in, n_out], as in the checkpoint."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=hparams["n_vocab"],
        n_positions=hparams["n_ctx"],
        n_embd=hparams["n_embd"],
        n_head=hparams["n_head"],
        n_layer=hparams["n_layer"],
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2LMHeadModel(config).eval()
    state = {}
    for name, array in variables.items():
        key = name.replace("model/h", "h.", 1) if name.startswith("model/h") else name.removeprefix("model/")
        key = "transformer." + key.replace("/", ".")
        if name.endswith(("wte", "wpe", "/g", "/w")):
            key = key.removesuffix(".g").removesuffix(".w") + ".weight"
        else:
            key = key.removesuffix(".b") + ".bias"
        state[key] = torch.from_numpy(array[0] if array.ndim == 3 else array)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model


def greedy(model, ids, n):
    import torch

    ids = list(ids)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(ids) - n :]


def warped(logits, temperature, top_k, top_p):
    """The probabilities that transformers draws with, after its logits warpers in OpenAI's order."""
    import torch
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return torch.softmax(scores[0], -1).numpy()


def tiny_model():
    """hparams and variables of models/tiny, read by TensorFlow."""
    import tensorflow as tf

    folder = Path(__file__).parent.parent / "models" / "tiny"
    reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    hparams = json.loads((folder / "hparams.json").read_text())
    return hparams, {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def main():
    import torch

    rng = np.random.RandomState(2)
    results = {"warped/logits": (3 * rng.standard_normal((len(WARPS), 500))).astype(np.float32)}
    results["warped/probs"] = np.stack(
        [warped(row, *options) for row, options in zip(results["warped/logits"], WARPS, strict=True)]
    )
    with torch.no_grad():
        for name, hparams in REFERENCE_MODELS.items():
            model = torch_model(hparams, random_variables(hparams))
            rng = np.random.RandomState(1)
            ids = rng.randint(0, hparams["n_vocab"], hparams["n_ctx"])
            results[f"{name}/ids"] = ids.astype(np.int32)
            results[f"{name}/logits"] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
            results[f"{name}/greedy"] = np.array(greedy(model, ids[:5], hparams["n_ctx"] + 1 - 5), dtype=np.int32)
        hparams, variables = tiny_model()
        model = torch_model(hparams, variables)
        results["tiny/ids"] = np.array(TINY_PROMPT, np.int32)
        results["tiny/greedy"] = np.array(greedy(model, TINY_PROMPT, 100), np.int32)
        results["tiny/logits"] = model(torch.tensor([TINY_PROMPT])).logits[0].numpy()
    np.savez_compressed(Path(__file__).parent / "reference.npz", **results)


if __name__ == "__main__":
    main()
