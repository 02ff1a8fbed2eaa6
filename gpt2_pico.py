"""The whole algorithm of GPT-2. gpt2.py has the same formulas with what a real run needs."""

import numpy as np


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def softmax(x):
    exp_x = np.exp(x - x.max(-1, keepdims=True))
    return exp_x / exp_x.sum(-1, keepdims=True)


def layer_norm(x, g, b):
    return g * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) + b


def linear(x, w, b):  # [n_seq, n_in] @ [n_in, n_out] + [n_out] -> [n_seq, n_out]
    return x @ w + b


def ffn(x, c_fc, c_proj):  # [n_seq, n_embd] -> [n_seq, 4 * n_embd] -> [n_seq, n_embd]
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):  # [n_seq, d_head] each, mask [n_seq, n_seq] -> [n_seq, d_head]
    return softmax(q @ k.T / np.sqrt(q.shape[-1]) + mask) @ v


def mha(x, c_attn, c_proj, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    qkv = np.split(linear(x, **c_attn), 3, axis=-1)  # q, k and v, [n_seq, n_embd] each
    heads = [np.split(part, n_head, axis=-1) for part in qkv]  # 3 * n_head of [n_seq, d_head]
    mask = np.triu(np.full((len(x), len(x)), -1e10), k=1)  # hides what comes later
    outputs = [attention(q, k, v, mask) for q, k, v in zip(*heads, strict=True)]
    return linear(np.concatenate(outputs, axis=-1), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head):  # [n_seq, n_embd] -> [n_seq, n_embd]
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head):  # [n_seq] ids -> [n_seq, n_vocab] logits
    x = wte[list(inputs)] + wpe[: len(inputs)]  # what and where each token is, [n_seq, n_embd]
    for block in blocks:
        x = transformer_block(x, **block, n_head=n_head)
    return layer_norm(x, **ln_f) @ wte.T


def generate(inputs, params, n_head, n_tokens_to_generate):
    ids = list(inputs)
    for _ in range(n_tokens_to_generate):
        logits = gpt2(ids, **params, n_head=n_head)
        ids.append(int(np.argmax(logits[-1])))  # the likeliest token after the last one
    return ids[len(inputs) :]


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models"):
    from utils import load_encoder_hparams_and_params

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    new_ids = generate(encoder.encode(prompt), params, hparams["n_head"], n_tokens_to_generate)
    return encoder.decode(new_ids)


if __name__ == "__main__":
    from fire import Fire, decorators

    Fire(decorators.SetParseFns(prompt=str)(main))
