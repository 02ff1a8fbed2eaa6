"""GPT-2 in NumPy: the model, one formula per function; then generation, scoring, texts, main.

gpt2_pico.py has the same model on one screen. fast.py has what speed needs; no formula depends on
it. The formulas are those of openai/gpt-2's model.py. The paper is "Language Models are
Unsupervised Multitask Learners" (Radford et al., 2019). All arrays but ids are float32.

params of 124M, by the names of the functions' arguments:

    wte [50257, 768]    wpe [1024, 768]    ln_f: g [768], b [768]    blocks: 12 of
        ln_1, ln_2: g [768], b [768]
        attn: c_attn: w [768, 2304], b [2304]    c_proj: w [768, 768], b [768]
        mlp: c_fc: w [768, 3072], b [3072]       c_proj: w [3072, 768], b [768]

Dimensions:

    n_vocab, n_ctx, n_embd, n_head, n_layer    the sizes of the model, as in hparams.json
    d_head                                     n_embd / n_head, the width of one attention head
    n_seq                                      the number of tokens in this call
    n_kv                                       n_seq plus the number of tokens in the cache
    n_out                                      the number of the last positions to compute
    ...                                        nothing, or leading axes for several sequences
"""

import functools
import math
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

if __name__ == "__main__":  # OpenBLAS reads this when it is loaded. Its idle threads sleep sooner.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # for PYTHONSAFEPATH

import numpy as np

from fast import for_blocks, in_blocks, matmul, own_threads

ROWS = 128  # of attention and logits per block: enough for fast products, few enough to skip keys


@in_blocks  # this changes the speed, not the result
def gelu(x):
    """Gaussian error linear unit in its tanh approximation (Hendrycks & Gimpel, 2016)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis. Subtracting the maximum only prevents overflow."""
    exp_x = np.exp(x - x.max(axis=-1, keepdims=True))
    exp_x /= exp_x.sum(axis=-1, keepdims=True)
    return exp_x


@in_blocks
def layer_norm(x, g, b, eps=1e-5):
    """Normalize x [..., n_embd] to mean 0 and variance 1, then scale by g and shift by b [n_embd].

    See "Layer Normalization" (Ba et al., 2016).
    """
    n_embd = x.shape[-1]
    x = x - x.sum(axis=-1, keepdims=True) / n_embd
    variance = (x * x).sum(axis=-1, keepdims=True) / n_embd
    return g * x / np.sqrt(variance + eps) + b


def linear(x, w, b):
    """x @ w + b: x [..., d_in], w [d_in, d_out], b [d_out] -> [..., d_out]."""
    y = matmul(x, w)
    y += b
    return y


def ffn(x, c_fc, c_proj, activation=gelu):
    """Feed-forward network, applied to each position: x [..., n_embd] -> [..., n_embd].

    c_fc makes the states 4 * n_embd wide, c_proj makes them n_embd wide again.
    """
    return linear(activation(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask: np.ndarray | float = 0.0):
    """Scaled dot-product attention (Vaswani et al., 2017): the mean of v, weighted by q @ k.

    q [..., n_q, d_head], k and v [..., n_kv, d_head], mask [n_q, n_kv] -> [..., n_q, d_head].
    """
    q = q / math.sqrt(q.shape[-1])
    weights = softmax(q @ k.swapaxes(-1, -2) + mask)  # [..., n_q, n_kv]
    return weights @ v


@functools.lru_cache(maxsize=16)  # all layers use the same masks
def causal_mask(n_q, n_kv):
    """Mask [n_q, n_kv] for the last n_q of n_kv positions. The array is read-only.

    It is 0 up to the query's own position and -1e10 after it: causal_mask(2, 3) is
    [[0, 0, -1e10], [0, 0, 0]].
    """
    mask = np.triu(np.full((n_q, n_kv), -1e10, np.float32), k=n_kv - n_q + 1)
    mask.flags.writeable = False
    return mask


def causal_attention(q, k, v):
    """Attention for the last n_q of n_kv positions. Each sees itself and those before it."""
    n_q = q.shape[-2]
    n_before = k.shape[-2] - n_q
    y = np.empty_like(q)

    def attend(start, end):
        n_seen = n_before + end  # later keys are in the future of every query in this block
        mask = causal_mask(end - start, n_seen)
        y[..., start:end, :] = attention(
            q[..., start:end, :], k[..., :n_seen, :], v[..., :n_seen, :], mask
        )

    for_blocks(attend, n_q, ROWS)
    return y


def mha(x, c_attn, c_proj, n_head, kv=None, n_out=None):
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> [..., n_out, n_embd].

    kv: this layer's part of a KVCache, [2, ..., n_head, n_kv, d_head]. mha fills its last n_seq
    positions. n_out: compute only the last n_out positions; all by default.

    In 124M, 10 tokens are x [10, 768]. c_attn makes qkv [10, 2304] of it: for each token q, k and v
    with 12 heads of 64 each. So q, k, v and the result of attention are [12, 10, 64].
    """
    *batch, n_seq, n_embd = x.shape
    qkv = linear(x, **c_attn)  # [..., n_seq, 3 * n_embd]
    qkv = qkv.reshape(*batch, n_seq, 3, n_head, n_embd // n_head)
    qkv = qkv.swapaxes(-4, -2)  # [..., n_head, 3, n_seq, d_head]
    q = qkv[..., 0, :, :]  # [..., n_head, n_seq, d_head], and so are k and v
    k = qkv[..., 1, :, :]
    v = qkv[..., 2, :, :]
    if kv is not None:
        kv[0][..., -n_seq:, :] = k
        kv[1][..., -n_seq:, :] = v
        k, v = kv  # [..., n_head, n_kv, d_head] each
    if n_out is not None:
        q = q[..., -n_out:, :]
    y = causal_attention(q, k, v)  # [..., n_head, n_out, d_head]
    y = y.swapaxes(-3, -2).reshape(*batch, -1, n_embd)  # [..., n_out, n_embd]
    return linear(y, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kv=None, n_out=None):
    """One layer: [..., n_seq, n_embd] -> [..., n_out, n_embd], with kv and n_out as in mha."""
    y = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv=kv, n_out=n_out)
    x = x[..., -y.shape[-2] :, :] + y  # y may have only the last n_out positions
    return x + ffn(layer_norm(x, **ln_2), **mlp)


class KVCache:
    """The keys and values of the tokens that the model has seen, so that it can go on after them.

    params, n_head: of the model. n_max: how many tokens fit, n_ctx by default. batch: the shape of
    the leading axes of the inputs. kv: float32 [n_layer, 2, *batch, n_head, n_max, d_head], of
    which the first n_past tokens are valid.
    """

    def __init__(self, params, n_head, n_max=None, batch=()):
        n_ctx, n_embd = params["wpe"].shape
        check_n_head(n_head, n_embd)
        shape = (len(params["blocks"]), 2, *batch, n_head, n_max or n_ctx, n_embd // n_head)
        self.kv = np.empty(shape, np.float32)
        self.n_past = 0


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, n_out=None):
    """Predict each next token: ids [..., n_seq] -> float32 logits [..., n_out, n_vocab].

    inputs: token ids, of any integer type. n_head: as in hparams; params does not contain it.
    cache: a KVCache. The inputs continue the tokens in it and are added to it.
    n_out: compute logits for only the last n_out positions; all by default.

    Raises TypeError if the inputs are not integers, and ValueError for no inputs, ids outside the
    vocabulary, more tokens than n_ctx or the cache's n_max, and an n_head, n_out or cache that does
    not fit. The cache is then unchanged.
    """
    ids = check_ids(inputs, len(wte))
    with own_threads(ids.size):
        x = final_states(ids, wte, wpe, blocks, ln_f, n_head, cache, n_out)
        return matmul(x, wte.T)  # weight tying: the embeddings are the output weights, too


@np.errstate(under="ignore")  # softmax may underflow, whatever np.seterr is set to
def final_states(ids, wte, wpe, blocks, ln_f, n_head, cache=None, n_out=None):
    """`gpt2` without its last product: int64 ids [..., n_seq] -> float32 [..., n_out, n_embd]."""
    check_n_head(n_head, wte.shape[1])
    n_past = 0
    n_max = len(wpe)
    if cache is not None:
        check_cache(cache, (len(blocks), 2, *ids.shape[:-1], n_head), wte.shape[1] // n_head)
        n_past = cache.n_past
        n_max = min(n_max, cache.kv.shape[-2])
    n_kv = n_past + ids.shape[-1]
    if n_kv > n_max:
        raise ValueError(f"{n_kv} tokens do not fit: there are {n_max} positions")
    if n_out is not None and n_out < 1:
        raise ValueError(f"n_out must be 1 or more, got {n_out}")
    x = wte[ids] + wpe[n_past:n_kv]  # token and position embeddings, [..., n_seq, n_embd]
    for layer, block in enumerate(blocks):
        kv = None if cache is None else cache.kv[layer][..., :n_kv, :]
        is_last = layer == len(blocks) - 1  # the layers before it need all positions
        x = transformer_block(x, **block, n_head=n_head, kv=kv, n_out=n_out if is_last else None)
    x = layer_norm(x, **ln_f)
    if cache is not None:
        cache.n_past = n_kv  # at the end: after an error, the cache is as it was
    return x


def check_ids(ids, n_vocab, max_ndim=32):
    """Return token ids as an int64 array of 1 to max_ndim axes. Raises TypeError or ValueError."""
    if isinstance(ids, str):
        raise TypeError("expected token ids, got a text; encode it first: encoder.encode(text)")
    try:
        ids = np.asarray(ids)
    except ValueError:
        raise ValueError("the sequences of a batch must have one length") from None
    if ids.size == 0:
        raise ValueError("expected at least one token id, got none")
    # Integers that are too large for NumPy are objects: they are out of range.
    are_integers = ids.dtype.kind in "iu" or all(isinstance(each, int) for each in ids.flat)
    if not are_integers or not 1 <= ids.ndim <= max_ndim:
        name = ids.dtype.type.__name__
        raise TypeError(f"expected a sequence of integers as token ids, got {name} {ids.shape}")
    wrong = ids[(ids < 0) | (ids >= n_vocab)]
    if len(wrong):
        raise ValueError(f"{wrong[0]} is not a token id: the model has {n_vocab} tokens")
    return ids.astype(np.int64)


def check_n_head(n_head, n_embd):
    if n_head < 1 or n_embd % n_head:
        raise ValueError(f"n_head must be a divisor of n_embd, which is {n_embd}, got {n_head}")


def check_cache(cache, axes, d_head):
    """Raise ValueError unless the cache was made for this model and these leading axes."""
    shape = cache.kv.shape
    if shape[:-2] != axes or shape[-1] != d_head:
        problem = f"its shape is {shape}, expected {(*axes, shape[-2], d_head)}"
        raise ValueError(f"the cache was made for another model or batch: {problem}")


# Choosing a token


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to generate text. Raises ValueError if a value is out of range.

    temperature, top_k, top_p: see token_probs. Temperature 0 always takes the most likely token.
    seed: the same random seed gives the same ids. n_samples: how many continuations to draw.
    """

    n_tokens_to_generate: int = 40
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    n_samples: int | None = None

    def __post_init__(self):
        for name, value in vars(self).items():
            least = 1 if name == "n_samples" else 0
            if value is not None and not value >= least:  # NaN fails this, too
                raise ValueError(f"{name} must be {least} or more, got {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, got {self.top_p}")


@np.errstate(all="ignore")  # at extreme temperatures, unlikely tokens become -inf or NaN
def token_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities from which `sample` draws: logits [n_vocab] -> float32 [n_vocab].

    They are softmax(logits / temperature). top_k keeps only the k most likely tokens (0: all),
    top_p only the smallest set of most likely tokens with at least this total probability (nucleus
    sampling, Holtzman et al., 2020). Tokens that tie with the last one are kept. All others have
    probability 0.

    Raises ValueError for options out of range, and if the largest logit is not finite.
    """
    Options(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = check_logits(logits)
    # A lower temperature would give the same: only the most likely tokens remain.
    scaled = (logits - logits.max()) / max(float(temperature), 1e-30)
    scaled[np.isnan(scaled)] = -np.inf  # it was -inf / inf
    if 0 < top_k < len(logits):
        scaled[-logits > np.partition(-logits, top_k - 1)[top_k - 1]] = -np.inf
    probs = softmax(scaled)
    if top_p < 1:
        descending = np.sort(probs)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)  # float64: many small terms
        # Without the last sum, the index stays in range if rounding keeps the total below top_p.
        n_before_last = np.searchsorted(cumulative[:-1], top_p)
        probs[probs < descending[n_before_last]] = 0
        probs /= probs.sum()
    return probs


@np.errstate(over="ignore")
def check_logits(logits):
    """Return logits [n_vocab] or [1, n_vocab] as float32 [n_vocab].

    Raises ValueError for another shape, and if the largest logit is not finite.
    """
    logits = np.asarray(logits, np.float32)
    if logits.ndim == 2 and len(logits) == 1:
        logits = logits[0]
    if logits.ndim != 1:
        raise ValueError(f"expected the logits of one token, [n_vocab], got {logits.shape}")
    if not np.isfinite(logits.max()):
        raise ValueError(f"the logits are not finite: the largest one is {logits.max()}")
    return logits


def sample(logits, rng, temperature=1.0, *others, **options):
    """Draw the next token's id from logits [n_vocab], or take the most likely one at temperature 0.

    rng: a numpy.random.Generator. The other arguments are those of token_probs.
    """
    if temperature == 0:
        return int(check_logits(logits).argmax())
    probs = token_probs(logits, temperature, *others, **options)
    cumulative = np.cumsum(probs, dtype=np.float64)
    total = cumulative[-1]
    # The draw stays below the total: rounding must not select a token after the last possible one.
    drawn = min(rng.random() * total, np.nextafter(total, 0))
    return int(np.searchsorted(cumulative, drawn, side="right"))


# Generation


@overload
def generate(
    inputs, params, n_head, n_tokens_to_generate, *, n_samples: int, **options
) -> list[list[int]]: ...
@overload
def generate(
    inputs, params, n_head, n_tokens_to_generate, *, n_samples: None = None, **options
) -> list[int]: ...
def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """Continue the token ids `inputs` -> list of the new ids. `inputs` is not modified.

    options: those of `stream`. With n_samples, the result is a list of lists. Shows a progress bar
    on a terminal. Raises what `stream` raises.
    """
    from terminal import progress_bar

    steps = stream(inputs, params, n_head, n_tokens_to_generate, **options)
    # Without iter, list would ask the bar for its total, and reserve memory for it.
    rows = list(iter(progress_bar(steps, "generating", total=n_tokens_to_generate, leave=False)))
    n_samples = options.get("n_samples")
    if n_samples is None:
        return rows
    return [[row[i] for row in rows if row[i] is not None] for i in range(n_samples)]


@overload
def stream(
    inputs, params, n_head, n_tokens_to_generate, stop_id=..., *, n_samples: int, **options
) -> Iterator[list[int | None]]: ...
@overload
def stream(
    inputs, params, n_head, n_tokens_to_generate, stop_id=..., *, n_samples: None = None, **options
) -> Iterator[int]: ...
def stream(inputs, params, n_head, n_tokens_to_generate, stop_id=(), **options) -> Iterator[Any]:
    """Continue token ids -> iterator over the new ids, as they are chosen.

    stop_id: a token id that ends a continuation and is not part of it, or several such ids.
    options: see Options. With n_samples, it yields lists of ids, None for a sample that has ended.

    The model sees the last n_ctx tokens. When the text outgrows the context, generation continues
    from its last n_ctx // 2 tokens. Raises TypeError or ValueError for invalid options or inputs,
    and ValueError if the logits are not finite.
    """
    chosen = Options(n_tokens_to_generate=n_tokens_to_generate, **options)
    n_vocab = len(params["wte"])
    prompt = check_ids(inputs, n_vocab, max_ndim=1)
    stop_ids = list(stop_id) if isinstance(stop_id, Iterable) else [stop_id]
    if stop_ids:
        check_ids(stop_ids, n_vocab)
    rows = steps(prompt, params, n_head, chosen, stop_ids)
    if chosen.n_samples is None:
        return (row[0] for row in rows)
    return rows


def steps(prompt, params, n_head, options, stop_ids):
    """Yield the new ids of all samples, step by step."""
    n_ctx = len(params["wpe"])
    rngs = np.random.default_rng(options.seed).spawn(options.n_samples or 1)
    window = prompt[None, -n_ctx:]  # the tokens that the model sees, [n_samples, n_window]
    n_max = min(n_ctx, window.shape[1] + options.n_tokens_to_generate)
    cache = KVCache(params, n_head, n_max, batch=(1,))
    is_running = np.ones(len(rngs), bool)
    for _ in range(options.n_tokens_to_generate):
        # 1. Feed the tokens that are not in the cache: the prompt, then one token per step.
        new_tokens = window[:, cache.n_past :]
        logits = gpt2(new_tokens, **params, n_head=n_head, cache=cache, n_out=1)[:, -1]
        # 2. After the prompt, give each sample its own copy.
        if len(window) < len(rngs):
            cache.kv = cache.kv.repeat(len(rngs), axis=2)
            window = window.repeat(len(rngs), axis=0)
            logits = logits.repeat(len(rngs), axis=0)
        # 3. Choose the next token of each sample.
        warps = (options.temperature, options.top_k, options.top_p)
        ids = [sample(row, rng, *warps) for row, rng in zip(logits, rngs, strict=True)]
        is_running &= ~np.isin(ids, stop_ids)
        if not is_running.any():
            return
        yield [new_id if runs else None for new_id, runs in zip(ids, is_running, strict=True)]
        # 4. Append the tokens. If they outgrow the context, keep half of it and compute it again.
        window = np.concatenate([window, np.array(ids)[:, None]], axis=1)
        if window.shape[1] > n_ctx:
            window = window[:, -max(1, n_ctx // 2) :]
            cache.n_past = 0


# Scoring


def log_probs(ids, params, n_head):
    """The natural log-probability of each token id but the first, given those before it.

    Returns float32 [len(ids) - 1]. The perplexity is exp(-mean). A text of more than n_ctx + 1 ids
    is scored in windows of n_ctx ids that move by n_ctx // 2: each id once, with the context in its
    window. This is the method of transformers' guide "Perplexity of fixed-length models", with a
    stride of n_ctx // 2. To include the first token of a text, put the id that starts a text
    (encoder.start_id) before it. Raises what `gpt2` raises.
    """
    ids = check_ids(ids, len(params["wte"]), max_ndim=1)
    parts = [np.empty(0, np.float32)]
    with own_threads(len(ids)):
        for window, n_targets in windows(ids, len(params["wpe"])):
            states = final_states(window[:-1], **params, n_head=n_head, n_out=n_targets)
            parts.append(score(states, window[-n_targets:], params["wte"]).log_probs)
    return np.concatenate(parts)


def windows(ids, n_ctx, n_context=1):
    """Yield (window, n_targets): a part of ids, and how many of its last ids to score.

    Together, the targets are all ids but the first n_context.
    """
    size = n_ctx + 1  # the last id is only a target
    if len(ids) > size:
        size = max(n_ctx, 2)  # as in the guide
    start = 0
    n_scored = n_context
    while n_scored < len(ids):
        end = min(start + size, len(ids))
        yield ids[start:end], end - n_scored
        n_scored = end
        start += max(n_ctx // 2, 1)


class Scores(NamedTuple):
    """How well the model predicted each target."""

    log_probs: np.ndarray  # float32, natural logarithms
    is_likeliest: np.ndarray  # bool: whether no token is more likely


def score(states, targets, wte):
    """Score targets [n], given the final states [n, n_embd] before them, ROWS at a time."""
    starts = range(0, len(targets), ROWS)
    parts = [score_block(states[i : i + ROWS], targets[i : i + ROWS], wte) for i in starts]
    return Scores(*map(np.concatenate, zip(*parts, strict=True)))


@np.errstate(under="ignore")
def score_block(states, targets, wte):
    """`score`: log(softmax(logits)) is logits - log(sum(exp(logits))), but for overflow."""
    logits = matmul(states, wte.T)
    scores = Scores(np.empty(len(targets), np.float32), np.empty(len(targets), bool))

    def score_rows(start, end):
        rows = logits[start:end]
        rows -= rows.max(axis=-1, keepdims=True)
        chosen = rows[np.arange(end - start), targets[start:end]]
        np.exp(rows, out=rows)
        scores.log_probs[start:end] = chosen - np.log(rows.sum(axis=-1))
        scores.is_likeliest[start:end] = chosen == 0

    for_blocks(score_rows, len(targets), 4)  # few rows stay in the CPU's cache
    return scores


# From text to text


def token_log_probs(text, model, context=""):
    """Return [(token, its natural log-probability), ...] of a text, after a context.

    Without a context, the token that starts a text predicts the first one. A token that is only
    part of a character is shown as U+FFFD. Raises ValueError if no token starts a text, and if a
    token is part of both texts, as " king" is of "The kin" and "g".
    """
    encoder, hparams, params = model
    before = encoder.encode(context)
    ids = encoder.encode(context + text)
    if ids[: len(before)] != before:
        raise ValueError(f"a token joins the end of the context to the text: {context[-20:]!r}")
    if not before:
        if encoder.start_id is None:
            raise ValueError("the model has no token that starts a text; give a context")
        before = [encoder.start_id]
        ids = before + ids
    scores = log_probs(ids, params, hparams["n_head"])[len(before) - 1 :]
    tokens = [encoder.decode([token_id]) for token_id in ids[len(before) :]]
    return list(zip(tokens, scores.tolist(), strict=True))


def continuation(prompt, model, n_tokens_to_generate=40, **options):
    """Continue a text -> iterator over pieces of the new text. options: see `continue_text`."""
    rows = continue_text(prompt, model, n_tokens_to_generate, 1, **options)
    return (text for (text,) in rows)


def continuations(prompt, model, n_samples, n_tokens_to_generate=40, **options):
    """Continue a text n_samples times -> list of new texts. options: see `continue_text`."""
    rows = continue_text(prompt, model, n_tokens_to_generate, n_samples, **options)
    return ["".join(pieces) for pieces in zip(*rows, strict=True)]


def continue_text(
    prompt, model, n_tokens_to_generate, n_samples, stop=(), allowed_special=(), **options
):
    """Yield a list of the next piece of each sample's text, until all samples have ended.

    model: (encoder, hparams, params), as load_encoder_hparams_and_params returns it. stop: a text
    that ends a continuation, or several. allowed_special: see Encoder.encode. options: see Options.

    Raises what `stream` and Encoder.encode raise, and ValueError if no token starts a text.
    """
    from encoder import TextDecoder

    encoder, hparams, params = model
    ids = encoder.encode(prompt, allowed_special) or [encoder.start_id]
    if ids == [None]:
        raise ValueError("the prompt is empty, and the model has no token that starts a text")
    options |= {"n_samples": n_samples, "stop_id": encoder.end_ids}
    stops = [stop] if isinstance(stop, str) else list(() if stop is None else stop)
    decoders = [TextDecoder(encoder, stops) for _ in range(n_samples)]
    for row in stream(ids, params, hparams["n_head"], n_tokens_to_generate, **options):
        pairs = list(zip(row, decoders, strict=True))
        yield [decoder.decode([] if i is None else [i]) for i, decoder in pairs]
        if all(i is None or decoder.stopped for i, decoder in pairs):
            break
    yield [decoder.decode([], final=True) for decoder in decoders]


def printed(prompt, model, n_tokens_to_generate, n_samples=None, **options):
    """Yield what the command line prints: a text in pieces, or several texts under headings."""
    if n_samples in (None, 1):
        yield from continuation(prompt, model, n_tokens_to_generate, **options)
        return
    texts = continuations(prompt, model, n_samples, n_tokens_to_generate, **options)
    line = "=" * 40
    yield "\n".join([f"{line} SAMPLE {i} {line}\n{text}" for i, text in enumerate(texts, 1)])


def main(prompt, n_tokens_to_generate=40, model_size="124M", models_dir="models", **options):
    """Load a model and continue the prompt -> the text that the command prints.

    options: see `continue_text`. Raises what `continue_text` and utils.py raise.
    """
    from utils import load_encoder_hparams_and_params

    others = {name: options[name] for name in options if name not in ("stop", "allowed_special")}
    Options(n_tokens_to_generate=n_tokens_to_generate, **others)  # before a download
    model = load_encoder_hparams_and_params(model_size, models_dir)
    return "".join(printed(prompt, model, n_tokens_to_generate, **options))


# The command line


def command(
    prompt: str | None = None,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = "models",
    *,
    stop: tuple[str, ...] = (),
    interactive: bool = False,
    special_tokens: bool = False,
    **options: Any,
) -> Iterable[str] | None:
    r"""python gpt2.py PROMPT [N_TOKENS_TO_GENERATE [MODEL_SIZE [MODELS_DIR]]] [OPTIONS]

    Continue a text with GPT-2. An example that needs no download:

        python gpt2.py "ROMEO:" --model_size tiny

    PROMPT                       the text, in quotes. Without it, or as -, it is read from standard
                                 input. --prompt="-x" is for a text that starts with a dash
    --n_tokens_to_generate 40    the maximum number of new tokens
    --model_size 124M            124M, 355M, 774M or 1558M (downloaded on first use), a folder in
                                 models_dir or its path, or owner/name on the Hugging Face Hub
    --models_dir models          the folder that holds the models
    --temperature 0.0            0 always takes the most likely token; 1 draws by probability
    --top_k 0                    draw from only the k most likely tokens; 0 means all
    --top_p 1.0                  draw from the fewest tokens with this total probability
    --seed                       random seed: the same seed gives the same text
    --n_samples 1                the number of continuations, which are printed under headings
    --stop                       stop before this text; \n is a newline. It may be given repeatedly
    --special_tokens             read names such as <|endoftext|> in the prompt as special tokens
    --interactive                ask for prompts, one per line; PROMPT, if it is given, is the first
    --help                       show this help
    """
    from terminal import UsageError, answer_lines, given_text, note
    from utils import load_encoder_hparams_and_params

    text = None
    if prompt is not None:
        text = given_text(prompt)
    elif not interactive and not sys.stdin.isatty():
        text = given_text("-") or None  # nothing on standard input is no prompt
    if text is None and not interactive:
        raise UsageError('there is no prompt; try: python gpt2.py "ROMEO:" --model_size tiny')
    unused = options.keys() - {"temperature"}
    if unused and not options.get("temperature"):
        names = ", ".join(sorted(unused))
        note(f"gpt2.py: warning: at temperature 0, the text does not depend on {names}")
    options["stop"] = [each.replace("\\n", "\n") for each in stop]
    options["allowed_special"] = "all" if special_tokens else ()
    model = load_encoder_hparams_and_params(model_size, models_dir)

    def answer(text):
        n_left_out = len(model[0].encode(text, options["allowed_special"])) - model[1]["n_ctx"]
        if n_left_out > 0:
            note(f"gpt2.py: warning: the first {n_left_out} tokens of the prompt do not fit")
        yield from printed(text, model, n_tokens_to_generate, **options)
        yield "\n"

    return answer_lines(answer, text) if interactive else answer(text)


if __name__ == "__main__":
    from terminal import run

    np.seterr(over="ignore", invalid="ignore")  # damaged parameters give one error, no warnings
    sys.exit(run(command, sys.argv[1:], Options))
