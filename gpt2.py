"""GPT-2 in NumPy: the model, the generation loop, the command line.

n_seq: tokens in this call      n_past: tokens before them, in the cache      n_kv: n_past + n_seq
n_vocab, n_ctx, n_embd, n_head, n_layer: the model's sizes, as in hparams.json      d_head: n_embd / n_head
...: no axis or leading ones, for several sequences at once

The formulas are those of openai/gpt-2's model.py; "Language Models are Unsupervised Multitask Learners" (Radford et
al., 2019) describes the model. Everything is float32: Python's floats keep it so, a NumPy float64 would not.
"""

import math
import sys

import numpy as np

CHUNK = 256  # tokens of a prompt that are computed at once: enough for the BLAS, few enough for the CPU's caches


def gelu(x):
    """Gaussian error linear unit, in the tanh approximation (Hendrycks & Gimpel, 2016). Any shape."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis, any shape; the largest x is taken off so that no exp overflows."""
    exp_x = np.exp(x - np.max(x, axis=-1, keepdims=True))
    return exp_x / np.sum(exp_x, axis=-1, keepdims=True)


def layer_norm(x, g, b, eps=1e-5):
    """Layer normalization (Ba et al., 2016) of x [..., n_embd] over its last axis, with gain g and bias b [n_embd]."""
    centred = x - np.mean(x, axis=-1, keepdims=True)
    variance = np.mean(centred * centred, axis=-1, keepdims=True)
    return centred / np.sqrt(variance + eps) * g + b


def linear(x, w, b):
    """[..., n_in] -> [..., n_out], with w [n_in, n_out] and b [n_out]."""
    return (x.reshape(-1, w.shape[0]) @ w + b).reshape(*x.shape[:-1], -1)  # as one matrix, for one call of the BLAS


def ffn(x, c_fc, c_proj):
    """Position-wise feed-forward network: [..., n_embd] -> [..., 4*n_embd] -> [..., n_embd]."""
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask):
    """Scaled dot-product attention ("Attention Is All You Need", Vaswani et al., 2017, section 3.2.1).

    q [..., n_seq, d_head], k and v [..., n_kv, d_head], mask [n_seq, n_kv] added to the scores -> [..., n_seq, d_head]
    """
    return softmax(q @ np.swapaxes(k, -1, -2) / math.sqrt(q.shape[-1]) + mask) @ v


def causal_mask(n_seq, n_kv):
    """[n_seq, n_kv]: 0 where a query may look, -1e10 at the keys after it. The last query sees the last key."""
    return np.triu(np.full((n_seq, n_kv), -1e10, dtype=np.float32), k=1 + n_kv - n_seq)


class KVCache:
    """The keys and values of the tokens that a model has seen, so that it need not see them again.

    params, n_head: the model's; n_max: how many tokens it can hold, n_ctx unless told otherwise; batch: the shape of
    the leading axes. k and v are [n_layer, ..., n_head, n_max, d_head] float32, and hold n_past tokens.
    """

    def __init__(self, params, n_head, n_max=None, batch=()):
        n_ctx, n_embd = params["wpe"].shape
        shape = (len(params["blocks"]), *batch, n_head, n_max or n_ctx, n_embd // n_head)
        self.k, self.v = np.empty(shape, np.float32), np.empty(shape, np.float32)
        self.n_past = 0

    def __getitem__(self, layer):
        return self.k[layer], self.v[layer], self.n_past


def mha(x, c_attn, c_proj, n_head, past=None):
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> the same. past: one layer of a KVCache, added to."""
    *batch, n_seq, n_embd = x.shape
    qkv = linear(x, **c_attn).reshape(*batch, n_seq, 3, n_head, n_embd // n_head)
    q, k, v = np.moveaxis(qkv, (-3, -2), (0, -3))  # each [..., n_head, n_seq, d_head]
    if past is not None:
        past_k, past_v, n_past = past
        past_k[..., n_past : n_past + n_seq, :] = k
        past_v[..., n_past : n_past + n_seq, :] = v
        k, v = past_k[..., : n_past + n_seq, :], past_v[..., : n_past + n_seq, :]  # [..., n_head, n_kv, d_head]
    heads = attention(q, k, v, causal_mask(n_seq, k.shape[-2]))  # [..., n_head, n_seq, d_head]
    return linear(np.swapaxes(heads, -2, -3).reshape(x.shape), **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, past=None):
    """One layer: attention, then the feed-forward network, each on normalized x and added to it."""
    x = x + mha(layer_norm(x, **ln_1), **attn, n_head=n_head, past=past)
    return x + ffn(layer_norm(x, **ln_2), **mlp)


def hidden_states(inputs, wte, wpe, blocks, ln_f, n_head, cache=None):
    """Run the model up to its output head: ids [..., n_seq] -> float32 [..., n_seq, n_embd].

    With a KVCache, inputs are the tokens that follow those in it, and are added to it.
    Raises ValueError for more tokens than the model, or the cache, has positions.
    """
    inputs = np.asarray(inputs)
    n_past = cache.n_past if cache else 0
    n_kv, n_max = n_past + inputs.shape[-1], min(len(wpe), cache.k.shape[-2]) if cache else len(wpe)
    if n_kv > n_max:
        raise ValueError(f"{n_kv} tokens are more than the {n_max} positions there are")
    x = wte[inputs] + wpe[n_past:n_kv]
    for layer, block in enumerate(blocks):
        x = transformer_block(x, **block, n_head=n_head, past=cache and cache[layer])
    if cache:
        cache.n_past = n_kv
    return layer_norm(x, **ln_f)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None):
    """Logits of the token after each: ids [..., n_seq] -> float32 [..., n_seq, n_vocab]. See hidden_states."""
    return hidden_states(inputs, wte, wpe, blocks, ln_f, n_head, cache) @ wte.T


def stream(inputs, params, n_head, n_tokens_to_generate):
    """Generate greedily, as `generate` does, one id at a time: an iterator. It checks its arguments at once."""
    inputs = list(inputs)
    n_vocab, n_ctx = len(params["wte"]), len(params["wpe"])
    if n_tokens_to_generate < 0:
        raise ValueError(f"n_tokens_to_generate is {n_tokens_to_generate}, it must be 0 or more")
    if not inputs:
        raise ValueError("the prompt has 0 tokens, it needs 1 or more")
    for id in inputs:
        if not 0 <= id < n_vocab:
            raise ValueError(f"the prompt holds the id {id}, but the vocabulary has {n_vocab} tokens")
    if len(inputs) + n_tokens_to_generate - 1 > n_ctx:  # the last token is never an input
        raise ValueError(
            f"{len(inputs)} prompt tokens and {n_tokens_to_generate} new ones are more than the model can hold:"
            f" together at most {n_ctx + 1}"
        )
    return _stream(inputs, params, n_head, n_tokens_to_generate)


def _stream(inputs, params, n_head, n_tokens_to_generate):
    cache = KVCache(params, n_head, len(inputs) + n_tokens_to_generate)
    for _ in range(n_tokens_to_generate):
        for start in range(0, len(inputs), CHUNK):
            x = hidden_states(inputs[start : start + CHUNK], **params, n_head=n_head, cache=cache)
        logits = params["wte"] @ x[-1]  # [n_vocab]
        next_id = int(np.argmax(logits))
        if not math.isfinite(logits[next_id]):
            raise ValueError("the model's logits are not finite: its parameters are damaged")
        yield next_id
        inputs = [next_id]


def generate(inputs, params, n_head, n_tokens_to_generate):
    """Continue the token ids `inputs` greedily, each time by the likeliest next token -> list of the new ids.

    Shows its progress on a terminal. Raises ValueError where inputs are empty or not ids of the vocabulary, and where
    len(inputs) + n_tokens_to_generate - 1 exceeds n_ctx. inputs is left as it is.
    """
    from tqdm import tqdm

    ids = stream(inputs, params, n_head, n_tokens_to_generate)
    return list(tqdm(ids, "generating", total=n_tokens_to_generate, leave=False, disable=None))


def main(prompt: str, n_tokens_to_generate: int = 40, model_size: str = "124M", models_dir: str = "models") -> str:
    """Continue a text. An empty prompt starts from <|endoftext|>, the sign between the texts GPT-2 learned from."""
    from utils import load_encoder_hparams_and_params

    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    ids = encoder.encode(prompt) or [encoder.encoder["<|endoftext|>"]]
    return encoder.decode(generate(ids, params, hparams["n_head"], n_tokens_to_generate))


def command_line(arguments):
    """Run main with the command line's arguments and print the text; exit status 0, 1 (it failed) or 2 (misused)."""
    import contextlib
    import io

    import fire

    @fire.decorators.SetParseFn(str)  # or fire would read "1984" and "1, 2" as Python
    def options(*words, prompt=None, n_tokens_to_generate="40", model_size="124M", models_dir="models", **unknown):
        """Sort the arguments; fire calls this."""
        if unknown:
            raise ValueError(f"unknown option --{next(iter(unknown))}")
        prompts = [*words, *([] if prompt is None else [prompt])]
        if len(prompts) != 1:
            raise ValueError(f"one prompt is needed, in quotes, but there are {len(prompts)}")
        try:
            n = int(n_tokens_to_generate)
        except ValueError:
            raise ValueError(f"n_tokens_to_generate is {n_tokens_to_generate!r}, not a whole number") from None
        return {"prompt": prompts[0], "n_tokens_to_generate": n, "model_size": model_size, "models_dir": models_dir}

    for stream_ in sys.stdout, sys.stderr:
        stream_.reconfigure(errors="replace")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # fire explains on many lines
            chosen = fire.Fire(options, [*arguments, "--", "--separator=\0"], serialize=lambda _: None)
    except fire.core.FireExit as error:
        print("gpt2.py: " + error.trace.elements[-1].ErrorAsStr(), file=sys.stderr)
        return 2
    except ValueError as error:
        print(f"gpt2.py: {error}", file=sys.stderr)
        return 2
    try:
        print(main(**chosen))
    except (ValueError, OSError, ImportError, KeyError) as error:
        print(f"gpt2.py: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
