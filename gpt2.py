"""GPT-2 in NumPy: first the model, bottom-up, one formula per function; then generation, scoring, the command line.

The formulas are those of openai/gpt-2's model.py. The paper is "Language Models are Unsupervised Multitask Learners"
(Radford et al., 2019). All arrays are float32. Dimensions:

    n_vocab, n_ctx, n_embd, n_head, n_layer    the sizes of the model, as in hparams.json
    d_head                                     n_embd / n_head, the width of one attention head
    n_seq                                      the number of tokens in this call
    n_kv                                       n_seq plus the number of tokens in the key/value cache
    ...                                        nothing, or leading axes for several sequences at once
"""

import contextlib
import functools
import inspect
import io
import math
import os
import re
import sys

import numpy as np

BLOCK_ROWS = 32  # rows per block in gelu and layer_norm: the temporaries fit into the CPU's cache
ATTENTION_ROWS = (
    128  # queries per block: large enough for fast products, small enough to skip most future keys
)
FEW_ROWS = 64  # with fewer rows than this, (w.T @ x.T).T is faster than x @ w in OpenBLAS

# glibc returns freed memory to the system, and new pages must be zeroed again. Freeing one large block first raises its
# threshold, so later temporaries are reused: a long prompt takes 8% less time.
np.empty(32_000_000, np.uint8)


def in_blocks_of_rows(function):
    """Decorator: apply a function that works on each row (last axis) to BLOCK_ROWS rows at a time."""

    @functools.wraps(function)
    def in_blocks(x, *args, **kwargs):
        x = np.asarray(x)
        if x.ndim < 2 or x.size <= BLOCK_ROWS * x.shape[-1]:
            return function(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        y = np.empty(rows.shape, np.result_type(x, np.float32))
        for start in range(0, len(rows), BLOCK_ROWS):
            y[start : start + BLOCK_ROWS] = function(
                rows[start : start + BLOCK_ROWS], *args, **kwargs
            )
        return y.reshape(x.shape)

    return in_blocks


@in_blocks_of_rows
def gelu(x):
    """Gaussian error linear unit in its tanh approximation (Hendrycks & Gimpel, 2016), elementwise."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis. Subtracting the maximum prevents overflow and changes nothing else."""
    exp_x = np.exp(x - x.max(axis=-1, keepdims=True))
    exp_x /= exp_x.sum(axis=-1, keepdims=True)
    return exp_x


@in_blocks_of_rows
def layer_norm(x, g, b, eps=1e-5):
    """Normalize x [..., n_embd] to mean 0 and variance 1, then scale by g and shift by b [n_embd] (Ba et al., 2016)."""
    n_embd = x.shape[-1]
    x = x - x.sum(axis=-1, keepdims=True) / n_embd
    variance = (x * x).sum(axis=-1, keepdims=True) / n_embd
    return g * x / np.sqrt(variance + eps) + b


def matmul(x, w):
    """x @ w as one product for all leading axes: x [..., n_in], w [n_in, n_out] -> [..., n_out]."""
    rows = x.reshape(-1, x.shape[-1])
    y = np.ascontiguousarray((w.T @ rows.T).T) if 1 < len(rows) < FEW_ROWS else rows @ w
    return y.reshape(*x.shape[:-1], w.shape[-1])


def linear(x, w, b):
    """x @ w + b: x [..., n_in], w [n_in, n_out], b [n_out] -> [..., n_out]."""
    y = matmul(x, w)
    return np.add(y, b, out=y if y.dtype == b.dtype else None)  # in place, except with integers


def ffn(x, c_fc, c_proj):
    """Feed-forward network, applied to each position: [..., n_embd] -> [..., 4 * n_embd] -> [..., n_embd]."""
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask=0.0):
    """Scaled dot-product attention (Vaswani et al., 2017): the mean of v, weighted by how well k matches q.

    q [..., n_q, d_head], k and v [..., n_kv, d_head], mask [n_q, n_kv] -> [..., n_q, d_head].
    """
    weights = softmax(q / math.sqrt(q.shape[-1]) @ k.swapaxes(-1, -2) + mask)  # [..., n_q, n_kv]
    return weights @ v


@functools.lru_cache(maxsize=8)  # all layers use the same masks
def causal_mask(n_q, n_kv):
    """Mask [n_q, n_kv] for the last n_q of n_kv positions: 0 up to the query's own position, -1e10 after it.

    causal_mask(2, 3) is [[0, 0, -1e10], [0, 0, 0]]. The array is read-only.
    """
    mask = np.triu(np.full((n_q, n_kv), -1e10, np.float32), k=n_kv - n_q + 1)
    mask.flags.writeable = False
    return mask


def causal_attention(q, k, v):
    """attention with a causal mask, for the last n_q of n_kv positions, ATTENTION_ROWS queries at a time."""
    n_q, n_kv = q.shape[-2], k.shape[-2]
    parts = []
    for start in range(0, n_q, ATTENTION_ROWS):
        end = min(start + ATTENTION_ROWS, n_q)
        n_seen = n_kv - n_q + end  # later keys are in the future of every query in this block
        mask = causal_mask(end - start, n_seen)
        parts.append(attention(q[..., start:end, :], k[..., :n_seen, :], v[..., :n_seen, :], mask))
    return np.concatenate(parts, axis=-2)


def mha(x, c_attn, c_proj, n_head, kv=None, n_out=None):
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> [..., n_out, n_embd], for the last n_out positions.

    kv: this layer's part of a KVCache, [2, ..., n_head, n_kv, d_head]. mha fills its last n_seq positions.
    n_out: the number of last positions to compute (1 or more); all by default.
    Example: in 124M, 10 tokens are x [10, 768]. c_attn turns it into qkv [10, 2304]: for each token 3 * 12 heads * 64.
    So q, k, v and the result of attention are [12, 10, 64] each. Joining the heads gives [10, 768] again.
    """
    *batch, n_seq, n_embd = x.shape
    qkv = linear(x, **c_attn)  # [..., n_seq, 3 * n_embd]
    qkv = qkv.reshape(*batch, n_seq, 3, n_head, n_embd // n_head).swapaxes(
        -4, -2
    )  # [..., n_head, 3, n_seq, d_head]
    q, k, v = (
        qkv[..., 0, :, :],
        qkv[..., 1, :, :],
        qkv[..., 2, :, :],
    )  # [..., n_head, n_seq, d_head] each
    if kv is not None:
        kv[0][..., -n_seq:, :], kv[1][..., -n_seq:, :] = k, v
        k, v = kv  # [..., n_head, n_kv, d_head] each
    if n_out is not None:
        q = q[..., -n_out:, :]
    y = causal_attention(q, k, v)  # [..., n_head, n_out, d_head]
    y = y.swapaxes(-3, -2).reshape(*batch, -1, n_embd)  # [..., n_out, n_embd]
    return linear(y, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, kv=None, n_out=None):
    """One layer: [..., n_seq, n_embd] -> [..., n_out, n_embd], with kv and n_out as in mha."""
    y = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv=kv, n_out=n_out)
    x = x[..., -y.shape[-2] :, :] + y
    return x + ffn(layer_norm(x, **ln_2), **mlp)


class KVCache:
    """The keys and values of the tokens that the model has processed, so that it need not process them again.

    params, n_head: of the model. n_max: how many tokens fit, n_ctx by default. batch: the shape of the leading axes.
    kv is float32 [n_layer, 2, *batch, n_head, n_max, d_head]. Its first n_past tokens are valid.
    """

    def __init__(self, params, n_head, n_max=None, batch=()):
        n_ctx, n_embd = params["wpe"].shape
        self.kv = np.empty(
            (len(params["blocks"]), 2, *batch, n_head, n_max or n_ctx, n_embd // n_head), np.float32
        )
        self.n_past = 0


@np.errstate(under="ignore")  # softmax may underflow, whatever np.seterr is set to
def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, n_out=None):
    """Predict the token after each position: token ids [..., n_seq] -> float32 logits [..., n_out, n_vocab].

    cache: a KVCache. The inputs continue the tokens in it and are added to it.
    n_out: the number of last positions to compute logits for (1 or more); all by default.

    Raises TypeError if the inputs are not integers. Raises ValueError if there are none, if one is not in the
    vocabulary, or if the tokens exceed n_ctx or the cache's n_max.
    """
    inputs = _checked_ids(inputs, len(wte))
    n_past = cache.n_past if cache else 0
    n_kv = n_past + inputs.shape[-1]
    n_positions = min(len(wpe), cache.kv.shape[-2]) if cache else len(wpe)
    if n_kv > n_positions:
        raise ValueError(f"{n_kv} tokens do not fit: there are {n_positions} positions")
    x = wte[inputs] + wpe[n_past:n_kv]  # token and position embeddings, [..., n_seq, n_embd]
    for layer, block in enumerate(blocks):
        kv = cache.kv[layer][..., :n_kv, :] if cache else None
        is_last = (
            layer == len(blocks) - 1
        )  # n_out applies to the last layer; the others need all positions
        x = transformer_block(x, **block, n_head=n_head, kv=kv, n_out=n_out if is_last else None)
    if cache:
        cache.n_past = n_kv
    return matmul(
        layer_norm(x, **ln_f), wte.T
    )  # weight tying: the embeddings are the output weights, too


def _checked_ids(ids, n_vocab, max_ndim=32):
    ids = np.asarray(ids)
    if ids.size == 0:
        raise ValueError("expected at least one token id, got none")
    if ids.dtype.kind not in "iu" or not 1 <= ids.ndim <= max_ndim:
        raise TypeError(
            f"expected a sequence of integers as token ids, got {ids.dtype.type.__name__} {ids.shape}"
        )
    if len(wrong := ids[(ids < 0) | (ids >= n_vocab)]):
        raise ValueError(f"{wrong[0]} is not a token id: the vocabulary has {n_vocab} tokens")
    return ids


def token_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """The probabilities from which `sample` draws the next token: logits [n_vocab] -> float32 [n_vocab].

    They are softmax(logits / temperature). top_k keeps only the k most likely tokens (0: all), top_p only the smallest
    set of most likely tokens with at least this total probability (nucleus sampling, Holtzman et al., 2020). Ties with
    the last kept token are kept. All others have probability 0. Raises ValueError for values out of range.
    """
    _check(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = np.asarray(logits, np.float32)
    with np.errstate(
        over="ignore", under="ignore"
    ):  # a low temperature may turn unlikely tokens into -inf
        scaled = (logits - logits.max()) / max(temperature, 1e-30)
        if 0 < top_k < len(logits):
            scaled[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
        probs = softmax(scaled)
    if top_p < 1:
        descending = np.sort(probs)[::-1]
        cumulative = np.cumsum(
            descending.astype(np.float64)
        )  # float64 keeps the sum of small terms exact
        probs[probs < descending[np.searchsorted(cumulative[:-1], top_p)]] = 0
        probs /= probs.sum()
    return probs


def sample(logits, rng, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the next token from logits [n_vocab] with a NumPy Generator -> its id. At temperature 0, the most likely."""
    if temperature == 0:
        return int(np.argmax(logits))
    cumulative = np.cumsum(token_probs(logits, temperature, top_k, top_p).astype(np.float64))
    return int(np.searchsorted(cumulative, rng.random() * cumulative[-1], side="right"))


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """Continue the token ids `inputs` -> list of the new ids. `inputs` is not modified.

    temperature, top_k, top_p: see token_probs. Temperature 0, the default, always takes the most likely token.
    seed: the same random seed gives the same ids. n_samples: how many continuations to draw -> list of lists.
    stop_id: a token id that ends a continuation and is not part of it.

    The model sees the last n_ctx tokens. When the text outgrows the context, it goes on with the last n_ctx // 2.
    Shows a progress bar on a terminal. Raises ValueError for invalid options, and what `gpt2` raises for inputs.
    """
    from utils import progress_bar

    steps = stream(inputs, params, n_head, n_tokens_to_generate, **options)
    steps = list(progress_bar(steps, "generating", total=n_tokens_to_generate, leave=False))
    n_samples = options.get("n_samples")
    return (
        steps
        if n_samples is None
        else [[row[i] for row in steps if row[i] is not None] for i in range(n_samples)]
    )


def stream(
    inputs,
    params,
    n_head,
    n_tokens_to_generate,
    *,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=None,
    n_samples=None,
    stop_id=None,
):
    """Generate as `generate` does -> iterator over ids. With n_samples, over lists of ids, None for ended samples."""
    sampling = _check(temperature=temperature, top_k=top_k, top_p=top_p)
    _check(n_tokens_to_generate=n_tokens_to_generate, seed=seed, n_samples=n_samples)
    prompt, n_ctx = _checked_ids(list(inputs), len(params["wte"]), max_ndim=1), len(params["wpe"])
    rngs = np.random.default_rng(seed).spawn(n_samples or 1)

    def steps():
        window = prompt[None, -n_ctx:]  # the tokens that the model sees, [n_samples, n_window]
        cache = KVCache(
            params, n_head, min(n_ctx, window.shape[1] + n_tokens_to_generate), batch=(1,)
        )
        running = np.ones(len(rngs), bool)
        for _ in range(n_tokens_to_generate):
            # 1. Feed the tokens that are not in the cache: the prompt, then one token per step.
            logits = gpt2(window[:, cache.n_past :], **params, n_head=n_head, cache=cache, n_out=1)[
                :, -1
            ]
            # 2. After the prompt, give each sample its own copy.
            if len(window) < len(rngs):
                cache.kv = cache.kv.repeat(len(rngs), axis=2)
                window, logits = window.repeat(len(rngs), axis=0), logits.repeat(len(rngs), axis=0)
            # 3. Choose the next token of each sample.
            if not np.isfinite(logits).all():
                raise ValueError("the logits are not finite: the parameters are damaged")
            new_ids = np.array(
                [sample(row, rng, **sampling) for row, rng in zip(logits, rngs, strict=True)]
            )
            running &= new_ids != stop_id
            if not running.any():
                return
            row = [
                new_id if runs else None
                for new_id, runs in zip(new_ids.tolist(), running, strict=True)
            ]
            yield row if n_samples else row[0]
            # 4. Append the tokens. If the window outgrows the context, keep its second half and recompute the cache.
            window = np.concatenate([window, new_ids[:, None]], axis=1)
            if window.shape[1] > n_ctx:
                window, cache.n_past = window[:, -max(1, n_ctx // 2) :], 0

    return steps()


@np.errstate(under="ignore")
def log_probs(ids, params, n_head):
    """Natural log-probability of each token id but the first, given those before it -> float32 [len(ids) - 1].

    The perplexity is exp(-mean). A text of more than n_ctx + 1 ids is scored in windows of n_ctx ids that move by
    n_ctx // 2: each id once, with the context in its window. This is the method of transformers' guide "Perplexity of
    fixed-length models", with a stride of n_ctx // 2. Raises what `gpt2` raises.
    """
    ids, n_ctx = _checked_ids(list(ids), len(params["wte"]), max_ndim=1), len(params["wpe"])
    n_window = n_ctx + 1 if len(ids) <= n_ctx + 1 else max(n_ctx, 2)
    parts, start, n_scored = [np.empty(0, np.float32)], 0, 1  # the first id has no context
    while n_scored < len(ids):
        window, targets = ids[start : start + n_window], ids[n_scored : start + n_window]
        logits = gpt2(window[:-1], **params, n_head=n_head, n_out=len(targets))
        logits -= logits.max(axis=-1, keepdims=True)
        chosen = logits[np.arange(len(targets)), targets]
        parts.append(
            chosen - np.log(np.exp(logits, out=logits).sum(axis=-1))
        )  # log(softmax(logits))
        n_scored, start = n_scored + len(targets), start + max(n_ctx // 2, 1)
    return np.concatenate(parts)


_OPTIONS = {  # name: (type, requirement, test)
    "n_tokens_to_generate": (int, "a whole number, 0 or more", lambda n: n >= 0),
    "temperature": (float, "a number, 0 or more", lambda temperature: temperature >= 0),
    "top_k": (int, "a whole number, 0 or more", lambda k: k >= 0),
    "top_p": (float, "above 0 and at most 1", lambda p: 0 < p <= 1),
    "seed": (int, "a whole number, 0 or more", lambda seed: seed is None or seed >= 0),
    "n_samples": (int, "a whole number from 1 to 100000", lambda n: n is None or 1 <= n <= 100_000),
    "stop": (str, "a non-empty text", lambda text: text is None or text),
}


def _check(prefix="", /, **options):
    """Return the options, each converted to its type. Raise ValueError if one is invalid."""
    for name, value in options.items():
        kind, words, is_valid = _OPTIONS[name]
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            options[name] = value if value is None else kind(value)
            if is_valid(options[name]) and (isinstance(value, str) or options[name] == value):
                continue
        raise ValueError(
            f"{prefix}{name} must be {words}, got {options[name] if isinstance(value, str) else value!r}"
        )
    return options


def continuation(prompt, model, n_tokens_to_generate=40, *, n_samples=1, stop=None, **options):
    """Continue a text -> iterator over pieces of new text, as they come. Several samples follow one another.

    model: (encoder, hparams, params). The other arguments are those of `main`.
    """
    _check(n_samples=n_samples, stop=stop)
    encoder, hparams, params = model
    end_id, n_samples = encoder.encoder.get("<|endoftext|>"), n_samples or 1
    if not prompt and end_id is None:
        raise ValueError(
            "the prompt is empty, and the vocabulary has no <|endoftext|> to start from"
        )
    ids = encoder.encode(prompt) or [end_id]
    from encoder import TextDecoder

    decoders, samples = [TextDecoder(encoder, stop) for _ in range(n_samples)], [""] * n_samples
    options |= {"n_samples": n_samples, "stop_id": end_id}
    for row in stream(ids, params, hparams["n_head"], n_tokens_to_generate, **options):
        for i, token_id in enumerate(row):
            samples[i] += "" if token_id is None else decoders[i].decode([token_id])
        if n_samples == 1:
            yield samples[0]
            samples[0] = ""
        if all(
            decoder.stopped or token_id is None
            for decoder, token_id in zip(decoders, row, strict=True)
        ):
            break
    for i, decoder in enumerate(decoders):
        heading = f"{'=' * 40} SAMPLE {i + 1} {'=' * 40}\n" * (n_samples > 1)
        yield heading + samples[i] + decoder.decode([], final=True) + "\n" * (i + 1 < n_samples)


def main(
    prompt: str,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = "models",
    *,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seed=None,
    n_samples=1,
    stop=None,
) -> str:
    """python gpt2.py PROMPT [N_TOKENS_TO_GENERATE [MODEL_SIZE [MODELS_DIR]]] [OPTIONS]    continue a text with GPT-2

    PROMPT                       the text, in quotes. - reads standard input (without the final newline), "" is an empty
                                 prompt; use --prompt="-x" for a text that starts with a dash
    --n_tokens_to_generate 40    the maximum number of new tokens
    --model_size 124M            124M, 355M, 774M or 1558M (downloaded on first use), or a folder in models_dir
    --models_dir models          the folder that holds the models
    --temperature 0.0            0 always takes the most likely token; 1 draws from the model's probabilities
    --top_k 0                    draw from only the k most likely tokens; 0 means all
    --top_p 1.0                  draw from the smallest set of most likely tokens with this total probability
    --seed                       random seed: the same seed gives the same text
    --n_samples 1                the number of continuations (the options above and this one need a temperature above 0)
    --stop                       stop before this text appears
    --interactive                ask for prompts, one per line
    --help                       show this help

    From Python, main returns what the command prints. It raises what `generate` and utils.py raise.
    """
    options = _check(
        n_tokens_to_generate=n_tokens_to_generate, n_samples=n_samples, seed=seed, stop=stop
    )
    options |= _check(temperature=temperature, top_k=top_k, top_p=top_p)
    from utils import load_encoder_hparams_and_params

    model = load_encoder_hparams_and_params(model_size, models_dir)
    return "".join(continuation(prompt, model, **options))


# The command line


def parse_arguments(arguments):
    """Bind the words of the command line to main's signature, as fire does -> {name: value}. Raises ValueError."""
    import fire

    flag, options = "--|-[a-zA-Z]", {}
    for word, following in zip(
        arguments, [*arguments[1:], "--"], strict=False
    ):  # fire would read --seed alone as True
        if re.match(flag, word) and "=" not in word and re.match(flag, following):
            raise ValueError(f"{word} needs a value, or is not an option")

    @fire.decorators.SetParseFn(str)  # else fire would convert the prompt 1984 to a number
    @functools.wraps(main)
    def bind(*args, **kwargs):
        options.update(inspect.signature(main).bind(*args, **kwargs).arguments)

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # fire reports an error on many lines
            fire.Fire(
                bind, [*arguments, "--", "--separator=\0"]
            )  # the default, -, is a prompt here
    except fire.core.FireExit as error:
        raise ValueError(
            error.trace.elements[-1].ErrorAsStr().replace("Could not consume", "unknown")
        ) from None
    return options | _check(
        "--", **{name: options[name] for name in options.keys() & _OPTIONS.keys()}
    )


def show(pieces):
    """Print pieces of text as they come, then a newline -> exit status 0, even if the reader has closed the pipe."""
    try:
        for piece in pieces:
            print(piece, end="", flush=True)
        print(flush=True)
    except BrokenPipeError:
        sys.exit(0)
    return 0


def complain(message, status=0):
    """Print one line on standard error -> status."""
    with contextlib.suppress(OSError):
        print("gpt2.py:", str(message).replace("\n", " "), file=sys.stderr, flush=True)
    return status


def answer_prompts(model, options):
    """Continue each input line -> exit status: 1 if a prompt from a pipe failed, else 0."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  gives input() line editing and a history
    status, at_terminal = 0, sys.stdin.isatty() and sys.stdout.isatty()
    if at_terminal:
        print(
            "Each line is a prompt of its own. Ctrl-C stops an answer, Ctrl-D exits.",
            file=sys.stderr,
        )
    while True:
        try:
            if prompt := input("> " * at_terminal).removesuffix("\r"):
                show(continuation(model=model, **options | {"prompt": prompt}))
        except EOFError:
            print(end="\n" * at_terminal)
            return status
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            status = complain(error, int(not at_terminal))


@np.errstate(
    over="ignore", invalid="ignore"
)  # damaged parameters give one error, not many warnings
def command_line(arguments):
    """Run the command line -> exit status: 0, 1 after an error, 2 for unusable arguments, 130 after Ctrl-C."""
    from utils import load_encoder_hparams_and_params, robust_streams

    status = 2  # if parsing fails
    with robust_streams():
        try:
            if {"-h", "--help"} & set(arguments):
                return show([inspect.getdoc(main)])
            arguments = [os.fsencode(word).decode("utf-8") for word in arguments]
            if interactive := "--interactive" in arguments:  # the prompts come later
                arguments = [*(word for word in arguments if word != "--interactive"), "--prompt="]
            options, status = parse_arguments(arguments), 1
            if options["prompt"] == "-":
                options["prompt"] = re.sub("\r?\n\\Z", "", sys.stdin.buffer.read().decode("utf-8"))
            unused = [
                f"--{name}" for name in ("top_k", "top_p", "seed", "n_samples") if name in options
            ]
            if unused and not options.get("temperature"):
                complain(
                    f"warning: at temperature 0, these options have no effect: {', '.join(unused)}"
                )
            model = load_encoder_hparams_and_params(
                options.pop("model_size"), options.pop("models_dir")
            )
            return (
                answer_prompts(model, options)
                if interactive
                else show(continuation(model=model, **options))
            )
        except KeyboardInterrupt:
            return 130
        except UnicodeDecodeError as error:
            return complain(f"the prompt is not UTF-8: {error}", status)
        except ValueError as error:
            return complain(
                f"{error}{' (is the prompt in quotes? --help lists the options)' * (status == 2)}",
                status,
            )
        except (OSError, ImportError, MemoryError, OverflowError) as error:
            return complain(str(error) or "out of memory", 1)


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
