"""Make tests/data/reference.npz: results of transformers (torch, float32) for the tests.

    pip install torch transformers && python tests/make_reference.py

The models are models/tiny and the random ones of helpers.random_variables, so only the results are
stored.
"""

import functools
import json
import re

import numpy as np
from helpers import (
    DATA_DIR,
    REAL_MODELS_DIR,
    REFERENCE_MODELS,
    TINY_PROMPT,
    WARPS,
    random_variables,
)
from make_score_reference import score


def their_name(name):
    """model/h0/ln_1/g -> transformer.h.0.ln_1.weight."""
    *modules, last = re.sub(r"/h(\d+)/", r"/h/\1/", name).split("/")[1:]
    if last in ("wte", "wpe"):
        modules.append(last)
    suffix = "bias" if last == "b" else "weight"
    return ".".join(["transformer", *modules, suffix])


def torch_model(hparams, variables):
    """The transformers model with these variables.

    Its Conv1D weights are [n_in, n_out], as in the checkpoint.
    """
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
        state[their_name(name)] = torch.from_numpy(array[0] if array.ndim == 3 else array)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    return model


def predict(model, ids):
    """The log-probabilities [n_seq, n_vocab] after each of the ids."""
    import torch

    return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def greedy(model, ids, n):
    """The n likeliest next ids, one after the other."""
    new_ids = []
    for _ in range(n):
        new_ids.append(int(predict(model, [*ids, *new_ids])[-1].argmax()))
    return np.array(new_ids, np.int32)


def warped(logits, temperature, top_k, top_p):
    """The probabilities that transformers samples from, after its warpers in OpenAI's order."""
    import torch
    from transformers.generation.logits_process import (
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits)[None])
    scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    return torch.softmax(scores[0], -1).numpy()


def tiny_model():
    """hparams and variables of models/tiny, read by TensorFlow."""
    import tensorflow as tf

    folder = REAL_MODELS_DIR / "tiny"
    reader = tf.train.load_checkpoint(str(folder / "model.ckpt"))
    hparams = json.loads((folder / "hparams.json").read_text())
    return hparams, {name: reader.get_tensor(name) for name in reader.get_variable_to_shape_map()}


def results_of(model, ids, prompt, n):
    """The logits of ids, and n greedy ids after the prompt."""
    import torch

    return {
        "ids": np.array(ids, np.int32),
        "logits": model(torch.tensor([ids])).logits[0].numpy(),
        "greedy": greedy(model, prompt, n),
    }


def main():
    import torch

    rng = np.random.RandomState(2)
    results = {"warped/logits": (3 * rng.standard_normal((len(WARPS), 500))).astype(np.float32)}
    pairs = zip(results["warped/logits"], WARPS, strict=True)
    results["warped/probs"] = np.stack([warped(row, *options) for row, options in pairs])
    with torch.no_grad():
        found = {"tiny": results_of(torch_model(*tiny_model()), TINY_PROMPT, TINY_PROMPT, 100)}
        for name, hparams in REFERENCE_MODELS.items():
            model = torch_model(hparams, random_variables(hparams))
            n_ctx = hparams["n_ctx"]
            rng = np.random.RandomState(1)
            ids = rng.randint(0, hparams["n_vocab"], n_ctx).tolist()
            long_ids = rng.randint(0, hparams["n_vocab"], 5 * n_ctx + 3).tolist()
            scores = score(long_ids, functools.partial(predict, model), n_ctx)
            found[name] = results_of(model, ids, ids[:5], n_ctx - 4) | {
                "long_ids": np.array(long_ids, np.int32),
                "long_log_probs": -np.array([nats for nats, _ in scores], np.float32),
            }
    for name, arrays in found.items():
        results |= {f"{name}/{key}": array for key, array in arrays.items()}
    np.savez_compressed(DATA_DIR / "reference.npz", **results)


if __name__ == "__main__":
    main()
