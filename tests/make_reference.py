"""Make tests/data/reference.npz: results of transformers (torch, float32) for the tests.

    pip install torch transformers && python tests/make_reference.py

The models are models/tiny and the random ones of helpers.random_variables, so only the results are
stored.
"""

import json
import re

import numpy as np
from helpers import (
    DATA_DIR,
    REAL_MODELS_DIR,
    REFERENCE_MODELS,
    TINY_PROMPT,
    WARPS,
    held_out_text,
    random_variables,
    tiktoken_encoding,
)


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


def greedy(model, ids, n):
    """The n likeliest next ids, one after the other."""
    import torch

    ids = list(ids)
    for _ in range(n):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(ids) - n :]


def windowed_log_probs(model, ids, n_ctx, stride):
    """The log-probability of each id but the first, in the windows of transformers' documentation.

    "Perplexity of fixed-length models": each window has n_ctx ids and begins `stride` ids after the
    one before. It scores only the ids that no earlier window has scored.
    """
    import torch

    scores, n_scored = [], 1
    for begin in range(0, len(ids), stride):
        end = min(begin + n_ctx, len(ids))
        log_probs = model(torch.tensor([ids[begin:end]])).logits[0].double().log_softmax(-1)
        scores += [float(log_probs[i - 1 - begin, ids[i]]) for i in range(n_scored, end)]
        n_scored = end
        if end == len(ids):
            return np.array(scores, np.float32)


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


def main():
    import torch

    rng = np.random.RandomState(2)
    results = {"warped/logits": (3 * rng.standard_normal((len(WARPS), 500))).astype(np.float32)}
    pairs = zip(results["warped/logits"], WARPS, strict=True)
    results["warped/probs"] = np.stack([warped(row, *options) for row, options in pairs])

    def score(name, model, ids, n_ctx):
        results[f"{name}/long_ids"] = np.array(ids, np.int32)
        results[f"{name}/long_log_probs"] = windowed_log_probs(model, ids, n_ctx, n_ctx // 2)

    with torch.no_grad():
        for name, hparams in REFERENCE_MODELS.items():
            model, n_ctx = torch_model(hparams, random_variables(hparams)), hparams["n_ctx"]
            rng = np.random.RandomState(1)
            ids = rng.randint(0, hparams["n_vocab"], n_ctx)
            results[f"{name}/ids"] = ids.astype(np.int32)
            results[f"{name}/logits"] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
            results[f"{name}/greedy"] = np.array(greedy(model, ids[:5], n_ctx - 4), np.int32)
            score(name, model, rng.randint(0, hparams["n_vocab"], 5 * n_ctx + 3).tolist(), n_ctx)
        hparams, variables = tiny_model()
        model = torch_model(hparams, variables)
        results["tiny/ids"] = np.array(TINY_PROMPT, np.int32)
        results["tiny/greedy"] = np.array(greedy(model, TINY_PROMPT, 100), np.int32)
        results["tiny/logits"] = model(torch.tensor([TINY_PROMPT])).logits[0].numpy()
        encoding = tiktoken_encoding(REAL_MODELS_DIR, "tiny")
        score("tiny", model, encoding.encode_ordinary(held_out_text())[:1500], hparams["n_ctx"])
    np.savez_compressed(DATA_DIR / "reference.npz", **results)


if __name__ == "__main__":
    main()
