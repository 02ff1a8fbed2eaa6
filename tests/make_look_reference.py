"""Make tests/data/look.npz for test_look.py: what transformers (on torch) computes inside a GPT-2.

    pip install torch transformers && python tests/make_look_reference.py

The models are the random ones of helpers.random_variables, so only the results need to be stored.
"""

import numpy as np
import torch
from helpers import DATA_DIR, REFERENCE_MODELS, random_variables
from make_reference import torch_model


def inside(hparams, ids):
    """Return the attention weights and the logit lens.

    They are [n_layer, n_head, n_seq, n_seq] and [n_layer + 1, n_seq, n_vocab].
    """
    model = torch_model(hparams, random_variables(hparams))
    model.set_attn_implementation("eager")  # the others do not return their weights
    with torch.no_grad():
        output = model(
            torch.from_numpy(ids)[None], output_attentions=True, output_hidden_states=True
        )
        *states, last = output.hidden_states  # ln_f is already applied to the last one
        lens = [model.lm_head(model.transformer.ln_f(state)) for state in states]
        lens.append(model.lm_head(last))
    return torch.cat(output.attentions).numpy(), torch.cat(lens).numpy()


if __name__ == "__main__":
    results = {}
    for name, hparams in REFERENCE_MODELS.items():
        ids = np.random.RandomState(3).randint(0, hparams["n_vocab"], 12)
        attention, lens = inside(hparams, ids)
        results |= {f"{name}/ids": ids, f"{name}/attention": attention, f"{name}/lens": lens}
    np.savez_compressed(DATA_DIR / "look.npz", **results)
