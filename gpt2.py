"""GPT-2 in NumPy: the model, the generation loop, the command line.

n_seq: tokens in this call      n_past: tokens before them, in the cache      n_kv: n_past + n_seq
n_vocab, n_ctx, n_embd, n_head, n_layer: the model's sizes, as in hparams.json      d_head: n_embd / n_head
...: no axis or leading ones, for several sequences at once

The formulas are those of openai/gpt-2's model.py; "Language Models are Unsupervised Multitask Learners" (Radford et
al., 2019) describes the model. Everything is float32: Python's floats keep it so, a NumPy float64 would not.
"""

import contextlib
import math
import operator
import os
import re
import sys

import numpy as np

# Many positions are computed in pieces: enough of them for the BLAS, few enough for the CPU's caches.
PROMPT_ROWS, ATTENTION_ROWS = 512, 128

# glibc returns freed memory to the system, which zeroes it before the next use, once more of it is free than twice the
# largest block that was ever freed. After this one the model's temporaries stay.
np.empty(32_000_000, np.uint8)

# A function may work in place (+=) on arrays that it made itself, never on its arguments, but for a KVCache.


def gelu(x):
    """Gaussian error linear unit, in the tanh approximation (Hendrycks & Gimpel, 2016), any shape:

    0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))
    """
    y = x * x
    y *= 0.044715 * math.sqrt(2 / math.pi)
    y += math.sqrt(2 / math.pi)
    y *= x
    np.tanh(y, out=y)
    y += 1.0
    y *= x
    y *= 0.5
    return y


def softmax(x):
    """exp(x) / sum(exp(x)) over the last axis, any shape; the largest x is taken off so that no exp overflows."""
    y = x - x.max(axis=-1, keepdims=True)
    np.exp(y, out=y)
    y /= y.sum(axis=-1, keepdims=True)
    return y


def layer_norm(x, g, b, eps=1e-5):
    """Layer normalization (Ba et al., 2016) of x [..., n_embd] over its last axis, with gain g and bias b [n_embd]."""
    n_embd = x.shape[-1]
    y = x - x.sum(axis=-1, keepdims=True) / n_embd
    variance = (y * y).sum(axis=-1, keepdims=True) / n_embd
    y /= np.sqrt(variance + eps)
    y *= g
    y += b
    return y


def linear(x, w, b):
    """x @ w + b: [..., n_in] -> [..., n_out], with w [n_in, n_out] and b [n_out]."""
    if x.ndim > 2:  # all sequences at once, or w would be read for each
        return linear(x.reshape(-1, x.shape[-1]), w, b).reshape(*x.shape[:-1], -1)
    if 1 < len(x) < 64:  # for so few rows OpenBLAS takes less time to compute the same from the other side
        return np.add((w.T @ x.T).T, b, order="C")
    y = x @ w
    y += b
    return y


def ffn(x, c_fc, c_proj):
    """Position-wise feed-forward network: [..., n_embd] -> [..., 4*n_embd] -> [..., n_embd]."""
    return linear(gelu(linear(x, **c_fc)), **c_proj)


def attention(q, k, v, mask=None):
    """Scaled dot-product attention: softmax(q @ k.T / sqrt(d_head) + mask) @ v.

    q [..., n_seq, d_head], k and v [..., n_kv, d_head] -> [..., n_seq, d_head]. mask [n_seq, m] is for the last m keys.
    "Attention Is All You Need" (Vaswani et al., 2017), section 3.2.1.
    """
    scores = (q * (1 / math.sqrt(q.shape[-1]))) @ k.swapaxes(-1, -2)  # [..., n_seq, n_kv]
    if mask is not None:
        scores[..., -mask.shape[-1] :] += mask
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    y = scores @ v
    y /= scores.sum(axis=-1, keepdims=True)  # the division of softmax, of fewer numbers here
    return y


def causal_mask(n_seq):
    """[n_seq, n_seq] to add to scores: 0 where the key is not later than the query, -1e10 where it is."""
    return np.triu(np.full((n_seq, n_seq), -1e10, np.float32), k=1)


class KVCache:
    """The keys and values of the tokens that a model has seen, so that it need not see them again.

    params, n_head: the model's; n_max: how many tokens it can hold, n_ctx unless told otherwise; batch: the shape of
    the leading axes. kv is [n_layer, ..., n_head, 2, n_max, d_head] float32, and holds n_past tokens.
    """

    def __init__(self, params, n_head, n_max=None, batch=()):
        n_ctx, n_embd = params["wpe"].shape
        n_max = n_ctx if n_max is None else n_max
        self.kv = np.empty((len(params["blocks"]), *batch, n_head, 2, n_max, n_embd // n_head), np.float32)
        self.n_past = 0


def mha(x, c_attn, c_proj, n_head, past=None, n_out=None):
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> [..., n_out, n_embd], the last n_out or all.

    past: (kv of one layer of a KVCache, n_past), added to.
    """
    *batch, n_seq, n_embd = x.shape
    qkv = linear(x, **c_attn).reshape(*batch, n_seq, 3, n_head, n_embd // n_head)
    qkv = qkv.swapaxes(-4, -2)  # [..., n_head, 3, n_seq, d_head]
    q, kv = qkv[..., 0, :, :], qkv[..., 1:, :, :]
    if past is not None:
        past, n_past = past
        past[..., n_past : n_past + n_seq, :] = kv
        kv = past[..., : n_past + n_seq, :]
    k, v = kv[..., 0, :, :], kv[..., 1, :, :]  # [..., n_head, n_kv, d_head]
    if n_out:
        q = q[..., -n_out:, :]
    n_q, n_kv = q.shape[-2], k.shape[-2]
    y = np.empty((*batch, n_q, n_embd), np.float32)
    heads = y.reshape(*batch, n_q, n_head, -1).swapaxes(-3, -2)  # a view: what the heads give stands side by side
    for start in range(0, n_q, ATTENTION_ROWS):
        end = min(start + ATTENTION_ROWS, n_q)
        seen = n_kv - n_q + end
        mask = causal_mask(end - start) if end - start > 1 else None
        heads[..., start:end, :] = attention(q[..., start:end, :], k[..., :seen, :], v[..., :seen, :], mask)
    return linear(y, **c_proj)


def transformer_block(x, mlp, attn, ln_1, ln_2, n_head, past=None, n_out=None):
    """One layer: attention, then the feed-forward network, each on normalized x and added to it. See mha."""
    y = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, past=past, n_out=n_out)
    y += x[..., -n_out:, :] if n_out else x
    return y + ffn(layer_norm(y, **ln_2), **mlp)


def hidden_states(inputs, wte, wpe, blocks, ln_f, n_head, cache=None, n_out=None):
    """Run the model up to its output head: ids [..., n_seq] -> float32 [..., n_seq, n_embd].

    With a KVCache, inputs are the tokens that follow those in it, and are added to it. n_out: give, and in the last
    layer compute, only so many of the last positions. Raises ValueError for more tokens than the model, or the cache,
    has positions.
    """
    inputs = np.asarray(inputs)
    n_past = cache.n_past if cache else 0
    n_kv, n_max = n_past + inputs.shape[-1], min(len(wpe), cache.kv.shape[-2]) if cache else len(wpe)
    if n_kv > n_max:
        raise ValueError(f"{n_kv} tokens are more than the {n_max} positions there are")
    x = wte[inputs] + wpe[n_past:n_kv]
    for layer, block in enumerate(blocks):
        past = (cache.kv[layer], n_past) if cache else None
        n_rows = n_out if layer + 1 == len(blocks) else None
        x = transformer_block(x, **block, n_head=n_head, past=past, n_out=n_rows)
    if cache:
        cache.n_past = n_kv
    return layer_norm(x, **ln_f)


def gpt2(inputs, wte, wpe, blocks, ln_f, n_head, cache=None):
    """Logits of the token after each: ids [..., n_seq] -> float32 [..., n_seq, n_vocab]. See hidden_states."""
    x = hidden_states(inputs, wte, wpe, blocks, ln_f, n_head, cache)
    return (x.reshape(-1, x.shape[-1]) @ wte.T).reshape(*x.shape[:-1], -1)


def log_probs(ids, params, n_head):
    """Log-probability (natural) of each id but the first, given those before it -> float32 [len(ids) - 1].

    exp(-mean) of them is the perplexity. Takes 64 positions at a time, so that the logits stay small. Raises
    ValueError where ids are none, not of the vocabulary, or more than n_ctx + 1.
    """
    ids = _checked_ids(ids, params, 0)
    cache, parts = KVCache(params, n_head), [np.empty(0, np.float32)]
    for start in range(0, len(ids) - 1, 64):
        inputs, targets = ids[start : start + 64], ids[start + 1 : start + 65]
        logits = gpt2(inputs[: len(targets)], **params, n_head=n_head, cache=cache)  # [len(targets), n_vocab]
        logits -= np.max(logits, axis=-1, keepdims=True)
        chosen = logits[np.arange(len(targets)), targets]
        parts.append(chosen - np.log(np.sum(np.exp(logits, out=logits), axis=-1)))
    return np.concatenate(parts)


def token_probs(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Probabilities to draw the next token with: logits [n_vocab] -> float32 [n_vocab], 0 for what is ruled out.

    Of the softmax of logits / temperature it leaves the top_k likeliest tokens (0: all), and of these the fewest that
    together have the share top_p (nucleus sampling, Holtzman et al., 2020). What ties with the last one stays, too.
    """
    _check_options(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = np.asarray(logits, np.float32)
    scaled = logits - np.max(logits)
    with np.errstate(over="ignore"):  # a low temperature takes the others to -inf, as it should
        scaled /= max(temperature, 1e-30)
    if 0 < top_k < len(logits):
        scaled[logits < np.partition(logits, -top_k)[-top_k]] = -np.inf
    probs = softmax(scaled)
    if top_p < 1:
        candidates = probs[probs > (1 - top_p) / 2 / len(probs)]  # the others together have less than 1 - top_p
        candidates = np.sort(candidates)[::-1]
        shares = np.cumsum(candidates.astype(np.float64))  # thousands of small terms
        probs[probs < candidates[np.searchsorted(shares[:-1], top_p)]] = 0
        probs /= np.sum(probs)
    return probs


def sample(logits, rng, temperature=1.0, top_k=0, top_p=1.0):
    """Draw the next token from logits [n_vocab] with a NumPy Generator -> its id. Temperature 0: the likeliest."""
    if temperature == 0:
        return int(np.argmax(logits))
    shares = np.cumsum(token_probs(logits, temperature, top_k, top_p).astype(np.float64))
    return int(np.searchsorted(shares, rng.random() * shares[-1], side="right"))


_RANGES = {  # what the options of generation must be
    "n_tokens_to_generate": ("0 or more", lambda n: n >= 0),
    "temperature": ("0 or more", lambda temperature: temperature >= 0),
    "top_k": ("0 or more", lambda k: k >= 0),
    "top_p": ("above 0 and at most 1", lambda p: 0 < p <= 1),
    "seed": ("0 or more", lambda seed: seed is None or seed >= 0),
    "n_samples": ("1 or more", lambda n: n is None or n >= 1),
}


def _check_options(**options):
    for name, value in options.items():
        words, holds = _RANGES[name]
        if not holds(value):  # nor does it for NaN
            raise ValueError(f"{name} is {value}, it must be {words}")


def _checked_ids(ids, params, n_new):
    """Return ids as a list when n_new tokens can follow them, else raise ValueError."""
    ids, n_vocab, n_ctx = [operator.index(id) for id in ids], len(params["wte"]), len(params["wpe"])
    if not ids:
        raise ValueError("there are 0 token ids, it takes 1 or more")
    for id in ids:
        if not 0 <= id < n_vocab:
            raise ValueError(f"{id} is not a token id: the vocabulary has {n_vocab} tokens")
    if len(ids) + n_new - 1 > n_ctx:  # the last token is never an input
        new = f" and {n_new} new ones" if n_new else ""
        raise ValueError(f"{len(ids)} tokens{new} are more than the model can take, {n_ctx + 1} in all")
    return ids


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
    """Generate as `generate` does, one token at a time -> iterator over ids.

    With n_samples each item is a list of as many ids, None for a sample that has stopped.
    """
    _check_options(
        n_tokens_to_generate=n_tokens_to_generate,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        n_samples=n_samples,
    )
    inputs = _checked_ids(inputs, params, n_tokens_to_generate)
    seeds = np.random.SeedSequence(seed).spawn(n_samples or 1)
    rngs = [np.random.default_rng(one) for one in seeds]

    def steps():
        if n_tokens_to_generate == 0:
            return
        n_kv = len(inputs) + n_tokens_to_generate - 1
        cache, batch = KVCache(params, n_head, n_kv), ()
        for start in range(0, len(inputs), PROMPT_ROWS):
            x = hidden_states(inputs[start : start + PROMPT_ROWS], **params, n_head=n_head, cache=cache, n_out=1)
        if len(rngs) > 1:  # one prompt for all samples
            prompt, batch = cache, (len(rngs),)
            cache = KVCache(params, n_head, n_kv, batch)
            cache.n_past = n = prompt.n_past
            cache.kv[..., :n, :] = prompt.kv[:, None, ..., :n, :]
        ids = [0] * len(rngs)
        for n_left in range(n_tokens_to_generate, 0, -1):
            logits = x[..., -1, :] @ params["wte"].T  # [n_vocab] or [n_samples, n_vocab]
            if not np.isfinite(logits).all():
                raise ValueError("the logits are not finite: the parameters are damaged")
            rows = np.broadcast_to(logits, (len(rngs), logits.shape[-1]))
            for i, rng in enumerate(rngs):
                if ids[i] is not None:
                    ids[i] = sample(rows[i], rng, temperature, top_k, top_p)
                    ids[i] = None if ids[i] == stop_id else ids[i]
            if all(id is None for id in ids):
                return
            yield ids[0] if n_samples is None else list(ids)
            if n_left > 1:
                inputs_now = np.reshape([id or 0 for id in ids], (*batch, 1))
                x = hidden_states(inputs_now, **params, n_head=n_head, cache=cache)

    return steps()


def generate(inputs, params, n_head, n_tokens_to_generate, **options):
    """Continue the token ids `inputs` -> list of the n_tokens_to_generate new ids.

    Each is the likeliest next token unless options say otherwise (keyword only, as of `stream`):
    temperature, top_k, top_p: see token_probs; temperature 0 (the default) is greedy
    seed: the same seed draws the same ids
    n_samples: how many continuations to draw at once, each from a random stream of its own -> list of lists
    stop_id: the id that ends a continuation, and is not part of it; without it all are n_tokens_to_generate long

    Shows its progress on a terminal, and leaves inputs as they are. Raises ValueError for a value out of its range,
    for inputs that are none or not ids of the vocabulary, and where len(inputs) + n_tokens_to_generate - 1 > n_ctx;
    TypeError for inputs that are no whole numbers.
    """
    from tqdm import tqdm

    ids = stream(inputs, params, n_head, n_tokens_to_generate, **options)
    ids = list(tqdm(ids, "generating", total=n_tokens_to_generate, leave=False, disable=None))
    n_samples = options.get("n_samples")
    return ids if n_samples is None else [[row[i] for row in ids if row[i] is not None] for i in range(n_samples)]


def continuation(prompt, model, n_tokens_to_generate=40, n_samples=1, **options):
    """Yield what continues a text, in pieces as they come; several samples one after the other, under headings.

    model: (encoder, hparams, params); the other arguments are those of main.
    """
    encoder, hparams, params = model
    end = encoder.encoder.get("<|endoftext|>")
    ids = encoder.encode(prompt) or [end]
    if ids == [None]:
        raise ValueError("the prompt is empty, and the vocabulary has no <|endoftext|> to start from")
    arguments = ids, params, hparams["n_head"], n_tokens_to_generate
    if n_samples != 1:
        samples = generate(*arguments, n_samples=n_samples, stop_id=end, **options)
        for i, sample_ids in enumerate(samples, 1):
            yield f"{'=' * 40} SAMPLE {i} {'=' * 40}\n{encoder.decode(sample_ids)}" + "\n" * (i < n_samples)
        return
    waiting = []
    for id in stream(*arguments, stop_id=end, **options):
        waiting.append(id)
        if not (text := encoder.decode(waiting)).endswith("\ufffd"):  # which may be the half of a character
            yield text
            waiting = []
    yield encoder.decode(waiting)


def main(
    prompt: str,
    n_tokens_to_generate: int = 40,
    model_size: str = "124M",
    models_dir: str = "models",
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    n_samples: int = 1,
) -> str:
    """Continue a text as the command line does (its HELP describes the arguments), up to <|endoftext|> -> new text."""
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "n_samples": n_samples}
    _check_options(n_tokens_to_generate=n_tokens_to_generate, **options)
    from utils import load_encoder_hparams_and_params

    model = load_encoder_hparams_and_params(model_size, models_dir)
    return "".join(continuation(prompt, model, n_tokens_to_generate, **options))


# The command line

HELP = """\
python gpt2.py PROMPT [OPTIONS]    continue a text with GPT-2

PROMPT                       the text, in quotes; - reads it from standard input, less its last line end; "" starts
                             a text from nothing; --prompt="-x" gives one that begins with a dash
--n_tokens_to_generate 40    0 or more: the most tokens to add; the prompt's and these must fit the model's context
--model_size 124M            124M, 355M, 774M or 1558M, downloaded when first used, or a folder's name in models_dir
--models_dir models          the folder with the models
--temperature 0.0            0 or more: 0 takes the likeliest token each time, 1 draws by the model's probabilities
--top_k 0                    0 or more: draw among so many of the likeliest tokens only, 0 among all
--top_p 1.0                  above 0, at most 1: draw among the fewest likeliest tokens that have this probability
--seed                       0 or more: draw the same again; without it each run is different
--n_samples 1                1 or more: how many continuations
--interactive                ask for prompts, one a line; Ctrl-C stops an answer, Ctrl-D leaves
--help                       this page

python gpt2.py "Alan Turing theorized that computers would one day become" --temperature 0.8 --top_p 0.9 --seed 1
"""


def parse_arguments(arguments):
    """Words of the command line -> (interactive, keyword arguments of main); ValueError for what is none of them."""
    import inspect
    import io
    import itertools

    import fire

    parameters = inspect.signature(main).parameters
    for word, following in itertools.pairwise([*arguments, "--"]):  # fire would guess: --seed is "True", --nope no "pe"
        if not re.match("-[^0-9.]", word):
            continue
        name, equals, _ = word.partition("=")
        if name[:2] != "--" or name[2:].replace("-", "_") not in (*parameters, "interactive"):
            raise ValueError(
                f"there is no option {name}; --help shows those that there are, --prompt=-x gives a text -x"
            )
        if not equals and name != "--interactive" and re.match("-[^0-9.]", following):
            raise ValueError(f"{name} needs a value, after a = if it begins with a dash")

    @fire.decorators.SetParseFn(str)  # or fire would read "1984" and "1, 2" as Python
    def sort_out(*words, **named):
        return list(words), named

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # fire explains itself on many lines
            # The end is for fire itself: without a separator of its own it would cut the arguments at a -.
            words, named = fire.Fire(sort_out, [*arguments, "--", "--separator=\0"], serialize=lambda _: None)
    except fire.core.FireExit as error:
        raise ValueError(error.trace.elements[-1].ErrorAsStr()) from None
    interactive = named.pop("interactive", "False")
    if interactive not in ("True", "False"):
        raise ValueError(f"--interactive takes no value, and the prompts come later: {interactive!r}")
    words += [named.pop("prompt")] if "prompt" in named else []
    if len(words) != (interactive == "False"):
        raise ValueError(f"one prompt is needed, in quotes (none with --interactive), but there are {len(words)}")
    for name, text in named.items():
        kind = int if name == "seed" else type(parameters[name].default)
        try:
            named[name] = kind(text)
        except ValueError:
            raise ValueError(f"--{name} needs a {'whole ' * (kind is int)}number, not {text!r}") from None
    _check_options(**{name: value for name, value in named.items() if name in _RANGES})
    chosen = inspect.signature(main).bind("".join(words), **named)
    chosen.apply_defaults()
    return interactive == "True", chosen.arguments


def show(pieces):
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def answer_prompts(model, options):
    """Continue one line after the other, until the end of the input."""
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  input() has line editing and a history then
    at_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            show(continuation(input("> " if at_terminal else "").removesuffix("\r"), model, **options))
        except EOFError:
            return
        except KeyboardInterrupt:
            print()
        except ValueError as error:
            complain(error)


def complain(error):
    with contextlib.suppress(OSError):
        print("gpt2.py: " + (" ".join(str(error).split("\n")) or "there is not enough memory"), file=sys.stderr)


@np.errstate(over="ignore", invalid="ignore")  # infinite logits are one error, not many warnings
def command_line(arguments):
    """Do what the command line says -> exit status: 0, 1 it went wrong, 2 it was misused, 130 interrupted."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        if getattr(sys, name) is None:  # closed: the next file that is opened would be taken for it
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")
    try:
        if {"-h", "--help"} & set(arguments):
            print(HELP, end="", flush=True)
            return 0
        try:
            interactive, options = parse_arguments(arguments)
        except ValueError as error:
            complain(error)
            return 2
        if (prompt := options.pop("prompt")) == "-":
            try:
                prompt = sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
            except UnicodeDecodeError as error:
                raise ValueError(f"standard input is not UTF-8: {error}") from None
        from utils import load_encoder_hparams_and_params

        model = load_encoder_hparams_and_params(options.pop("model_size"), options.pop("models_dir"))
        if interactive:
            answer_prompts(model, options)
        else:
            show(continuation(prompt, model, **options))
    except BrokenPipeError:  # whoever reads has enough
        return 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError, MemoryError, OverflowError) as error:
        complain(error)
        return 1
    finally:
        with contextlib.suppress(OSError):  # nobody is there to read the rest
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    os._exit(command_line(sys.argv[1:]))  # all is written; to tidy up would take longer than to load the parameters
