"""GPT-2 in NumPy: the model, one formula per function; then generation, scoring, the command line.

The formulas are those of openai/gpt-2's model.py. The paper is "Language Models are Unsupervised
Multitask Learners" (Radford et al., 2019). All arrays but token ids are float32. Dimensions:

    n_vocab, n_ctx, n_embd, n_head, n_layer    the sizes of the model, as in hparams.json
    d_head                                     n_embd / n_head, the width of one attention head
    n_seq                                      the number of tokens in this call
    n_kv                                       n_seq plus the number of tokens in the cache
    n_q, n_out                                 the number of the last positions to compute
    ...                                        nothing, or leading axes for several sequences
"""

import collections
import contextlib
import difflib
import functools
import inspect
import itertools
import math
import os
import queue
import re
import sys
import threading
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple, TypeVar, cast

if __name__ == "__main__":
    # OpenBLAS reads this when NumPy loads it. Its idle threads then sleep sooner, which makes
    # single tokens faster on a busy machine.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "8")

import numpy as np

BLOCK = 100_000  # elements at a time in gelu and layer_norm: they fit into the CPU's cache
ATTENTION_ROWS = 128  # queries per block: enough for fast products, few enough to skip keys
FEW_ROWS = 64  # with fewer rows than this, (w.T @ x.T).T is faster than x @ w in OpenBLAS
PROMPT_ROWS = 64  # a call with at least this many token ids uses our own threads: see "Threads"
MIN_COLUMNS = 64  # columns of a product per block: fewer are slow,
MAX_COLUMNS = 384  # and more are no faster
LOGITS = 1 << 20  # logits per block in score_targets: 4 MB
MAX_SAMPLES = 100_000  # more would only exhaust the memory

# glibc returns freed memory to the system, and new pages must be zeroed again. Freeing one large
# block first raises its threshold, so later temporaries are reused: a prompt takes 8% less time.
np.empty(32_000_000, np.uint8)

Array = np.ndarray
Function = TypeVar("Function", bound=Callable)  # a decorated function keeps its type


# The next two decorators serve speed alone. What they call stands below, under "What speed needs"
# and "Threads". The model begins with gelu.


def in_blocks_of_rows(function: Function) -> Function:
    """Decorator: apply a function of each row (last axis) to some rows at a time."""

    @functools.wraps(function)
    def in_blocks(x, *args, **kwargs):
        return apply_to_rows(function, np.asarray(x), *args, **kwargs)

    return cast(Function, in_blocks)


def with_own_threads(function: Function) -> Function:
    """Decorator: spread the work of a call with PROMPT_ROWS or more token ids over threads.

    The token ids are the first argument of the function.
    """
    first_name = next(iter(inspect.signature(function).parameters))

    @functools.wraps(function)
    def spread(*args, **kwargs):
        ids = args[0] if args else kwargs.get(first_name, ())
        if np.size(ids) < PROMPT_ROWS:
            return function(*args, **kwargs)
        with own_threads():
            return function(*args, **kwargs)

    return cast(Function, spread)


@in_blocks_of_rows
def gelu(x: Array) -> Array:
    """Gaussian error linear unit in its tanh approximation (Hendrycks & Gimpel, 2016)."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: Array) -> Array:
    """exp(x) / sum(exp(x)) over the last axis. Subtracting the maximum only prevents overflow."""
    exp_x = np.exp(x - x.max(axis=-1, keepdims=True))
    exp_x /= exp_x.sum(axis=-1, keepdims=True)
    return exp_x


@in_blocks_of_rows
def layer_norm(x: Array, g: Array, b: Array, eps: float = 1e-5) -> Array:
    """Normalize x [..., n_embd] to mean 0 and variance 1, then scale by g and shift by b [n_embd].

    See "Layer Normalization" (Ba et al., 2016).
    """
    n_embd = x.shape[-1]
    x = x - x.sum(axis=-1, keepdims=True) / n_embd
    variance = (x * x).sum(axis=-1, keepdims=True) / n_embd
    return g * x / np.sqrt(variance + eps) + b


def linear(x: Array, w: Array, b: Array) -> Array:
    """x @ w + b: x [..., d_in], w [d_in, d_out], b [d_out] -> [..., d_out]."""
    return matmul(x, w, b)


def ffn(x: Array, c_fc: dict, c_proj: dict, activation: Callable | None = None) -> Array:
    """Feed-forward network, applied to each position: x [..., n_embd] -> [..., n_embd].

    c_fc makes the states 4 * n_embd wide, c_proj makes them n_embd wide again.
    activation: gelu by default.
    """
    activation = activation or gelu
    return linear(activation(linear(x, **c_fc)), **c_proj)


def attention(
    q: Array, k: Array, v: Array, mask: Array | float = 0.0, scale: float | None = None
) -> Array:
    """Scaled dot-product attention (Vaswani et al., 2017): the mean of v, weighted by q @ k.

    q [..., n_q, d_head], k and v [..., n_kv, d_head], mask [n_q, n_kv] -> [..., n_q, d_head].
    scale: 1 / sqrt(d_head) by default.
    """
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    weights = softmax(scale * q @ k.swapaxes(-1, -2) + mask)  # [..., n_q, n_kv]
    return weights @ v


@functools.lru_cache(maxsize=16)  # all layers use the same masks
def causal_mask(n_q: int, n_kv: int) -> Array:
    """Mask [n_q, n_kv] for the last n_q of n_kv positions. The array is read-only.

    It is 0 up to the query's own position and -1e10 after it: causal_mask(2, 3) is
    [[0, 0, -1e10], [0, 0, 0]].
    """
    mask = np.triu(np.full((n_q, n_kv), -1e10, np.float32), k=n_kv - n_q + 1)
    mask.flags.writeable = False
    return mask


def causal_attention(q: Array, k: Array, v: Array, scale: float | None = None) -> Array:
    """Attention for the last n_q of n_kv positions. Each sees itself and those before it."""
    n_q = q.shape[-2]
    n_kv = k.shape[-2]
    y = np.empty_like(q)

    def attend(start, end):
        n_seen = n_kv - n_q + end  # later keys are in the future of every query in this block
        mask = causal_mask(end - start, n_seen)
        seen_k = k[..., :n_seen, :]
        seen_v = v[..., :n_seen, :]
        y[..., start:end, :] = attention(q[..., start:end, :], seen_k, seen_v, mask, scale)

    for_blocks(attend, n_q, ATTENTION_ROWS)
    return y


def mha(
    x: Array,
    c_attn: dict,
    c_proj: dict,
    n_head: int,
    kv: Array | None = None,
    n_out: int | None = None,
    scale: float | None = None,
) -> Array:
    """Causal multi-head self-attention: [..., n_seq, n_embd] -> [..., n_out, n_embd].

    kv: this layer's part of a KVCache, [2, ..., n_head, n_kv, d_head]. mha fills its last n_seq
    positions. n_out: compute only the last n_out positions; all by default. scale: see attention.

    In 124M, 10 tokens are x [10, 768]. c_attn turns it into qkv [10, 2304]: for each token q, k
    and v with 12 heads of 64 each. So q, k, v and the result of attention are [12, 10, 64].
    Joining the heads gives [10, 768] again.
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
    y = causal_attention(q, k, v, scale)  # [..., n_head, n_out, d_head]
    y = y.swapaxes(-3, -2).reshape(*batch, -1, n_embd)  # [..., n_out, n_embd]
    return linear(y, **c_proj)


def transformer_block(
    x: Array,
    mlp: dict,
    attn: dict,
    ln_1: dict,
    ln_2: dict,
    n_head: int,
    kv: Array | None = None,
    n_out: int | None = None,
) -> Array:
    """One layer: [..., n_seq, n_embd] -> [..., n_out, n_embd], with kv and n_out as in mha."""
    y = mha(layer_norm(x, **ln_1), **attn, n_head=n_head, kv=kv, n_out=n_out)
    x = x[..., -y.shape[-2] :, :] + y  # y may have only the last n_out positions
    return x + ffn(layer_norm(x, **ln_2), **mlp)


class KVCache:
    """The keys and values of the tokens that the model has seen, so that it can go on after them.

    params, n_head: of the model. n_max: how many tokens fit, n_ctx by default. batch: the shape of
    the leading axes of the inputs.

    kv is float32 [n_layer, 2, *batch, n_head, n_max, d_head]. Its first n_past tokens are valid.
    """

    def __init__(self, params: dict, n_head: int, n_max: int | None = None, batch: tuple = ()):
        n_ctx, n_embd = params["wpe"].shape
        check_n_head(n_head, n_embd)
        shape = (len(params["blocks"]), 2, *batch, n_head, n_max or n_ctx, n_embd // n_head)
        self.kv = np.empty(shape, np.float32)
        self.n_past = 0


@with_own_threads
def gpt2(
    inputs: Any,
    wte: Array,
    wpe: Array,
    blocks: list[dict],
    ln_f: dict,
    n_head: int,
    cache: KVCache | None = None,
    n_out: int | None = None,
) -> Array:
    """Predict each next token: ids [..., n_seq] -> float32 logits [..., n_out, n_vocab].

    inputs: token ids, of any integer type. n_head: as in hparams; params does not contain it.
    cache: a KVCache. The inputs continue the tokens in it and are added to it.
    n_out: compute logits for only the last n_out positions; all by default.

    Raises TypeError if the inputs are not integers. Raises ValueError if there are none, if one is
    not in the vocabulary, if the tokens exceed n_ctx or the cache's n_max, or if n_head, n_out or
    the cache does not fit. The cache is then unchanged.
    """
    x = final_states(inputs, wte, wpe, blocks, ln_f, n_head, cache, n_out)
    return matmul(x, wte.T)  # weight tying: the embeddings are the output weights, too


@with_own_threads
@np.errstate(under="ignore")  # softmax may underflow, whatever np.seterr is set to
def final_states(
    inputs: Any,
    wte: Array,
    wpe: Array,
    blocks: list[dict],
    ln_f: dict,
    n_head: int,
    cache: KVCache | None = None,
    n_out: int | None = None,
) -> Array:
    """`gpt2` without its last product: ids [..., n_seq] -> float32 [..., n_out, n_embd]."""
    inputs = check_ids(inputs, len(wte))
    check_n_head(n_head, wte.shape[1])
    check_n_out(n_out)
    n_past = 0
    if cache is not None:
        check_cache(cache, inputs.shape[:-1], len(blocks), n_head, wte.shape[1])
        n_past = cache.n_past
    n_kv = n_past + inputs.shape[-1]
    check_n_kv(n_kv, len(wpe), cache)

    x = wte[inputs] + wpe[n_past:n_kv]  # token and position embeddings, [..., n_seq, n_embd]
    for layer, block in enumerate(blocks):
        kv = None if cache is None else cache.kv[layer][..., :n_kv, :]
        is_last = layer == len(blocks) - 1  # the layers before it need all positions
        x = transformer_block(x, **block, n_head=n_head, kv=kv, n_out=n_out if is_last else None)
    x = layer_norm(x, **ln_f)
    if cache is not None:
        cache.n_past = n_kv  # at the end: after an error, the cache is as it was
    return x


# Other activations, which the config.json of a Hugging Face folder may name


@in_blocks_of_rows
def exact_gelu(x: Array) -> Array:
    """x times the standard normal distribution function of x (Hendrycks & Gimpel, 2016)."""
    return 0.5 * x * (1 + erf(x / math.sqrt(2)))


def erf(x: Array) -> Array:
    """The error function, to 1.5e-7: formula 7.1.26 of Abramowitz & Stegun (1964)."""
    t = 1 / (1 + 0.3275911 * np.abs(x))
    series = 0.254829592 + t * (
        -0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))
    )
    return np.sign(x) * (1 - t * series * np.exp(-x * x))


@in_blocks_of_rows
def relu(x: Array) -> Array:
    """Rectified linear unit."""
    return np.maximum(x, 0)


@in_blocks_of_rows
def silu(x: Array) -> Array:
    """x * sigmoid(x), with the sigmoid as a tanh, which cannot overflow."""
    return 0.5 * x * (1 + np.tanh(0.5 * x))


ACTIVATIONS = {  # by their names in transformers
    "gelu_new": gelu,
    "gelu_pytorch_tanh": gelu,
    "gelu": exact_gelu,
    "relu": relu,
    "silu": silu,
    "swish": silu,
}


# What speed needs. The formulas above call these functions and do not depend on how they work.


def apply_to_rows(function: Callable, x: Array, *args, **kwargs) -> Array:
    """function(x), computed for some rows (last axis) at a time: BLOCK elements or a bit less."""
    if x.size <= BLOCK:
        return function(x, *args, **kwargs)
    rows = x.reshape(-1, x.shape[-1])
    y = np.empty(rows.shape, np.result_type(x, np.float32))

    def apply(start, end):
        y[start:end] = function(rows[start:end], *args, **kwargs)

    for_blocks(apply, len(rows), max(1, BLOCK // x.shape[-1]))
    return y.reshape(x.shape)


def matmul(x: Array, w: Array, b: Array | None = None) -> Array:
    """x @ w (+ b) as one product for all leading axes: x [..., d_in], w [d_in, d_out]."""
    rows = x.reshape(-1, x.shape[-1])
    if n_own_threads() > 1:
        y = matmul_in_blocks(rows, w)
    elif 1 < len(rows) < FEW_ROWS:
        y = np.ascontiguousarray((w.T @ rows.T).T)
    else:
        y = rows @ w
    if b is not None:
        y = np.add(y, b, out=y if y.dtype == b.dtype else None)  # in place if the types agree
    return y.reshape(*x.shape[:-1], w.shape[-1])


def matmul_in_blocks(x: Array, w: Array) -> Array:
    """x @ w, computed for some columns of w at a time: two blocks or more for each thread."""
    n_columns = w.shape[-1]
    size = min(MAX_COLUMNS, max(MIN_COLUMNS, n_columns // (2 * n_own_threads())))
    y = np.empty((len(x), n_columns), np.result_type(x, w))

    def multiply(start, end):
        np.matmul(x, w[:, start:end], out=y[:, start:end])

    for_blocks(multiply, n_columns, size)
    return y


# Threads. While a prompt is processed, BLAS has one thread, and its work is spread over as many
# threads of our own. BLAS's threads wait for one another in a loop that does nothing; on a busy
# machine, this costs more time than the work. A single token is left to BLAS's threads.


def for_blocks(function: Callable[[int, int], None], n: int, size: int) -> None:
    """Call function(start, end) for blocks of this size that together make up range(n).

    Inside `own_threads`, they are spread over threads. A thread that is free takes the next block.
    """
    n_threads = n_own_threads()
    if n_threads == 1 or n <= size:
        for start in range(0, n, size):
            function(start, min(start + size, n))
        return
    starts = collections.deque(range(0, n, size))
    n_left = len(starts)  # blocks that this thread has not computed
    results: queue.SimpleQueue = queue.SimpleQueue()  # of the other threads: an error or None
    settings: dict[str, Any] = np.geterr() | {"call": np.geterrcall()}  # threads inherit neither

    def help_out():
        with np.errstate(**settings):
            for start in drain(starts):
                try:
                    function(start, min(start + size, n))
                    results.put(None)
                except BaseException as error:
                    results.put(error)

    try:
        _helpers.ask(help_out, min(n_threads, n_left) - 1)
        for start in drain(starts):
            function(start, min(start + size, n))
            n_left -= 1
        for _ in range(n_left):
            error = results.get()
            if error:
                raise error
    finally:
        starts.clear()  # after an error, nobody needs the other blocks


def drain(items: collections.deque) -> Iterator:
    """Take items from the left until there are none. Several threads may do so at once."""
    while True:
        try:
            item = items.popleft()
        except IndexError:
            return
        yield item


class _Helpers:
    """Threads that start when they are needed. They wait for functions to call.

    This is not a ThreadPoolExecutor, because Ctrl-C inside `submit` can leave its locks locked,
    and because it refuses work once the main thread has ended.
    """

    def __init__(self) -> None:
        self.functions: queue.SimpleQueue = queue.SimpleQueue()
        self.threads: list[threading.Thread] = []

    def ask(self, function: Callable[[], None], n_threads: int) -> None:
        """Let this many threads call the function, or fewer if no more can be started."""
        while len(self.threads) < n_threads:
            thread = threading.Thread(target=self.work, daemon=True)
            try:
                thread.start()
            except RuntimeError:  # a limit of the system, or the program is about to end
                break
            self.threads.append(thread)
        for _ in range(n_threads):
            self.functions.put(function)

    def work(self) -> None:
        while True:
            self.functions.get()()  # a variable would keep the arrays of the last call alive


class _Blas:
    """BLAS's number of threads. It is one while `users` has a member."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.users: set[object] = set()  # not a count: removing a user twice does no harm
        self.before: list[int] = []  # the number of threads of each library, while there is a user

    def add(self, user: object) -> int:
        """Return the number of threads that BLAS had before the first user came."""
        with self.lock:
            self.users.add(user)
            if not self.before:
                self.before = [library.num_threads for library in blas_libraries()]
                set_blas_threads([1] * len(self.before))
            return min(self.before, default=1)

    def remove(self, user: object) -> None:
        with self.lock:
            self.users.discard(user)
            if not self.users:
                set_blas_threads(self.before)
                self.before = []


@functools.cache
def blas_libraries() -> list:
    """The BLAS libraries, or none if threadpoolctl is missing or a library uses OpenMP.

    With OpenMP, each thread has its own number of BLAS threads, so one setting is not enough.
    """
    try:
        import threadpoolctl
    except ImportError:
        return []
    libraries = threadpoolctl.ThreadpoolController().select(user_api="blas").lib_controllers
    layers = {library.info().get("threading_layer") for library in libraries}
    return [] if "openmp" in layers else libraries


def set_blas_threads(numbers: list[int]) -> None:
    """Set each library's number of threads, whichever thread has set it before."""
    for library, number in zip(blas_libraries(), numbers, strict=False):
        # In threadpoolctl 3.8, the first thread that sets the number locks out the others until
        # its control is cleared.
        clear = getattr(library, "clear_controlling_thread", lambda force: None)
        clear(force=True)
        library.set_num_threads(number)
        clear(force=True)


class _ThisThread(threading.local):
    n_threads = 1  # that for_blocks may use
    user: object = None  # the member of _blas.users that the outermost own_threads added


def n_own_threads() -> int:
    """How many threads for_blocks may use."""
    return _this_thread.n_threads


_helpers = _Helpers()
_blas = _Blas()
_this_thread = _ThisThread()


@contextlib.contextmanager
def own_threads(n_threads: int | None = None) -> Iterator[None]:
    """Give BLAS one thread and for_blocks n_threads: by default, as many as BLAS was set to.

    This may be nested and used in several threads at once. In each thread, the outermost n_threads
    counts. The last one to leave restores BLAS's threads.
    """
    user = object()
    is_outermost = _this_thread.user is None
    try:
        n_blas_threads = _blas.add(user)
        if is_outermost:
            _this_thread.user = user
            _this_thread.n_threads = n_threads or n_blas_threads
        yield
    finally:
        if is_outermost:
            _this_thread.user = None
            _this_thread.n_threads = 1
        try:
            _blas.remove(user)
        except BaseException:  # Ctrl-C at this moment
            _blas.remove(user)
            raise


def one_blas_thread() -> contextlib.AbstractContextManager:
    """Compute in the calling thread alone, for programs that have threads of their own."""
    return own_threads(1)


def _forget_threads() -> None:
    """In a forked process, only the thread that forked is left."""
    global _helpers
    _helpers = _Helpers()
    _blas.lock = threading.Lock()
    _blas.users &= {_this_thread.user}
    _blas.remove(None)  # restores BLAS's threads if no user is left


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_forget_threads)


# Checks of arguments


def check_ids(ids: Any, n_vocab: int, max_ndim: int = 32) -> Array:
    """Return token ids of any integer type as an int64 array with 1 to max_ndim axes.

    Raises TypeError or ValueError.
    """
    if isinstance(ids, Iterator):
        ids = list(ids)
    if isinstance(ids, list):  # NumPy would turn a mix of uint64 and int into float64
        ids = [int(token_id) if isinstance(token_id, np.integer) else token_id for token_id in ids]
    ids = np.asarray(ids)
    if ids.size == 0:
        raise ValueError("expected at least one token id, got none")
    if ids.dtype.kind not in "iu" or not 1 <= ids.ndim <= max_ndim:
        name = ids.dtype.type.__name__
        raise TypeError(f"expected a sequence of integers as token ids, got {name} {ids.shape}")
    wrong = ids[(ids < 0) | (ids >= n_vocab)]
    if len(wrong):
        raise ValueError(f"{wrong[0]} is not a token id: the model has {n_vocab} tokens")
    return ids.astype(np.int64)


def check_n_head(n_head: int, n_embd: int) -> None:
    if n_head < 1 or n_embd % n_head:
        raise ValueError(f"n_head must be a divisor of n_embd, which is {n_embd}, got {n_head!r}")


def check_n_out(n_out: int | None) -> None:
    if n_out is not None and n_out < 1:
        raise ValueError(f"n_out must be 1 or more, got {n_out!r}")


def check_cache(cache: KVCache, batch: tuple, n_layer: int, n_head: int, n_embd: int) -> None:
    """Raise ValueError unless the cache was made for this model and these leading axes."""
    n_max = cache.kv.shape[-2]
    expected = (n_layer, 2, *batch, n_head, n_max, n_embd // n_head)
    if cache.kv.shape != expected:
        raise ValueError(
            f"the cache was made for another model or batch: its shape is {cache.kv.shape}, "
            f"expected {expected}"
        )


def check_n_kv(n_kv: int, n_ctx: int, cache: KVCache | None) -> None:
    """Raise ValueError unless n_kv tokens fit into the context and into the cache."""
    n_positions = n_ctx if cache is None else min(n_ctx, cache.kv.shape[-2])
    if n_kv > n_positions:
        raise ValueError(f"{n_kv} tokens do not fit: there are {n_positions} positions")


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """Return a number, or the text of one, as an int. Raises ValueError if it is out of range."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        number = int(value)
        is_whole = isinstance(value, str) or number == value  # 2.5 is not a whole number
        if is_whole and number >= least and (most is None or number <= most):
            return number
    limits = f", {least} or more" if most is None else f" from {least} to {most}"
    raise ValueError(f"{name} must be a whole number{limits}, got {value!r}")


def real_number(value: Any) -> float:
    """Return a number, or the text of one, as a float. For anything else, return NaN."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return math.nan


# Choosing a token


class Sampling(NamedTuple):
    """How to choose the next token. See token_probs."""

    temperature: float
    top_k: int
    top_p: float


def check_sampling(temperature: Any, top_k: Any, top_p: Any) -> Sampling:
    """Return the options, converted to numbers. Raises ValueError if one is out of range."""
    chosen_temperature = real_number(temperature)
    if not chosen_temperature >= 0:  # NaN fails this, too
        raise ValueError(f"temperature must be a number, 0 or more, got {temperature!r}")
    chosen_top_p = real_number(top_p)
    if not 0 < chosen_top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p!r}")
    return Sampling(chosen_temperature, whole_number("top_k", top_k, 0), chosen_top_p)


def token_probs(logits: Any, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Array:
    """The probabilities from which `sample` draws: logits [n_vocab] -> float32 [n_vocab].

    They are softmax(logits / temperature). top_k keeps only the k most likely tokens (0: all),
    top_p only the smallest set of most likely tokens with at least this total probability (nucleus
    sampling, Holtzman et al., 2020). Tokens that tie with the last one are kept. All others have
    probability 0.

    Raises ValueError for options out of range, and if the largest logit is not a finite number.
    """
    return _token_probs(logits, check_sampling(temperature, top_k, top_p))


def sample(
    logits: Any,
    rng: np.random.Generator,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> int:
    """Draw the next token's id from logits [n_vocab]. At temperature 0, take the most likely one.

    Raises what token_probs raises.
    """
    return _sample(logits, rng, check_sampling(temperature, top_k, top_p))


def _sample(logits: Any, rng: np.random.Generator, options: Sampling) -> int:
    if options.temperature == 0:
        _check_largest(np.max(logits))
        return int(np.argmax(logits))
    cumulative = np.cumsum(_token_probs(logits, options), dtype=np.float64)
    total = cumulative[-1]
    # The draw stays below the total: rounding must not select a token after the last possible one.
    drawn = min(rng.random() * total, np.nextafter(total, 0))
    return int(np.searchsorted(cumulative, drawn, side="right"))


@np.errstate(all="ignore")  # at extreme temperatures, unlikely tokens become -inf or NaN
def _token_probs(logits: Any, options: Sampling) -> Array:
    logits = np.asarray(logits, np.float32)
    largest = logits.max()
    _check_largest(largest)
    # A lower temperature would give the same: only the most likely tokens remain.
    scaled = (logits - largest) / max(options.temperature, 1e-30)
    scaled[np.isnan(scaled)] = -np.inf  # it was -inf / inf
    if 0 < options.top_k < len(logits):
        least = np.partition(logits, -options.top_k)[-options.top_k]
        scaled[logits < least] = -np.inf
    probs = softmax(scaled)
    if options.top_p < 1:
        descending = np.sort(probs)[::-1]
        cumulative = np.cumsum(descending, dtype=np.float64)  # float64: many small terms
        # Without the last sum, the index stays in range if rounding keeps the total below top_p.
        n_before_last = np.searchsorted(cumulative[:-1], options.top_p)
        probs[probs < descending[n_before_last]] = 0
        probs /= probs.sum()
    return probs


def _check_largest(logit: float) -> None:
    if not np.isfinite(logit):
        raise ValueError(f"the largest logit must be finite, got {logit}")


# Generation. From here on, functions import utils.py when they are called: `import gpt2` needs only
# NumPy.


def names_its_options(function: Function) -> Function:
    """Decorator: make the TypeError for an unknown option list the options that exist."""
    parameters = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args, **kwargs):
        for name in kwargs:
            if name not in parameters:
                options = ", ".join(parameters)
                raise TypeError(f"{function.__name__} has no option {name!r}, only {options}")
        return function(*args, **kwargs)

    return cast(Function, checked)


@names_its_options
def generate(
    inputs: Iterable[int],
    params: dict,
    n_head: int,
    n_tokens_to_generate: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    n_samples: int | None = None,
    stop_id: int | Collection[int] | None = None,
) -> list:
    """Continue the token ids `inputs` -> list of the new ids. `inputs` is not modified.

    temperature, top_k, top_p: see token_probs. Temperature 0 always takes the most likely token.
    seed: the same random seed gives the same ids.
    n_samples: how many continuations to draw. The result is then a list of lists.
    stop_id: a token id that ends a continuation and is not part of it, or several such ids.

    The model sees the last n_ctx tokens. When the text outgrows the context, generation continues
    from its last n_ctx // 2 tokens. Shows a progress bar on a terminal. Raises TypeError or
    ValueError for invalid options or inputs, and ValueError if the logits are not finite.
    """
    from utils import progress_bar

    steps = stream(
        inputs,
        params,
        n_head,
        n_tokens_to_generate,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        n_samples=n_samples,
        stop_id=stop_id,
    )
    rows = list(progress_bar(steps, "generating", total=int(n_tokens_to_generate), leave=False))
    if n_samples is None:
        return rows
    return [[row[i] for row in rows if row[i] is not None] for i in range(int(n_samples))]


@names_its_options
def stream(
    inputs: Iterable[int],
    params: dict,
    n_head: int,
    n_tokens_to_generate: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int | None = None,
    n_samples: int | None = None,
    stop_id: int | Collection[int] | None = None,
) -> Iterator:
    """Generate as `generate` does -> iterator over ids.

    With n_samples, it is an iterator over lists of ids, with None for each sample that has ended.
    """
    n_vocab, n_embd = params["wte"].shape
    check_n_head(n_head, n_embd)
    n_steps = whole_number("n_tokens_to_generate", n_tokens_to_generate, 0)
    options = check_sampling(temperature, top_k, top_p)
    if seed is not None:
        seed = whole_number("seed", seed, 0)
    n_rows = 1
    if n_samples is not None:
        n_rows = whole_number("n_samples", n_samples, 1, MAX_SAMPLES)
    prompt = check_ids(list(inputs), n_vocab, max_ndim=1)
    stop_ids = check_stop_ids(stop_id, n_vocab)
    rngs = np.random.default_rng(seed).spawn(n_rows)
    rows = _stream_rows(prompt, params, n_head, n_steps, options, rngs, stop_ids)
    if n_samples is None:
        return (row[0] for row in rows)
    return rows


def check_stop_ids(stop_id: Any, n_vocab: int) -> list[int]:
    """Return the ids that end a text as a list. stop_id: None, an id or a collection of ids."""
    if stop_id is None:
        return []
    if isinstance(stop_id, str | bytes):
        raise TypeError(f"stop_id must be a token id or several, got {stop_id!r}")
    stop_ids = list(stop_id) if isinstance(stop_id, Iterable) else [stop_id]
    if not stop_ids:
        return []
    return check_ids(stop_ids, n_vocab, max_ndim=1).tolist()


def _stream_rows(
    prompt: Array,
    params: dict,
    n_head: int,
    n_steps: int,
    options: Sampling,
    rngs: list[np.random.Generator],
    stop_ids: list[int],
) -> Iterator[list[int | None]]:
    """Yield the new ids of all samples, step by step. There are as many samples as rngs."""
    n_ctx = len(params["wpe"])
    window = prompt[None, -n_ctx:]  # the tokens that the model sees, [n_samples, n_window]
    cache = KVCache(params, n_head, min(n_ctx, window.shape[1] + n_steps), batch=(1,))
    is_running = np.ones(len(rngs), bool)
    for _ in range(n_steps):
        # 1. Feed the tokens that are not in the cache: the prompt, then one token per step.
        new_tokens = window[:, cache.n_past :]
        logits = gpt2(new_tokens, **params, n_head=n_head, cache=cache, n_out=1)[:, -1]
        # 2. After the prompt, give each sample its own copy.
        if len(window) < len(rngs):
            cache.kv = cache.kv.repeat(len(rngs), axis=2)
            window = window.repeat(len(rngs), axis=0)
            logits = logits.repeat(len(rngs), axis=0)
        # 3. Choose the next token of each sample.
        if not np.isfinite(logits).all():
            raise ValueError("the logits are not finite: the parameters are damaged")
        ids = [_sample(row, rng, options) for row, rng in zip(logits, rngs, strict=True)]
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


@with_own_threads
def log_probs(ids: Iterable[int], params: dict, n_head: int) -> Array:
    """The natural log-probability of each token id but the first, given those before it.

    Returns float32 [len(ids) - 1]. The perplexity is exp(-mean). A text of more than n_ctx + 1 ids
    is scored in windows of n_ctx ids that move by n_ctx // 2: each id once, with the context in its
    window. This is the method of transformers' guide "Perplexity of fixed-length models", with a
    stride of n_ctx // 2. Raises what `gpt2` raises.
    """
    ids = check_ids(list(ids), len(params["wte"]), max_ndim=1)
    n_ctx = len(params["wpe"])
    n_window = n_ctx + 1  # the last id is only a target
    if len(ids) > n_window:
        n_window = max(n_ctx, 2)  # as in the guide
    parts = [np.empty(0, np.float32)]
    start = 0
    n_scored = 1  # the first id has no context
    while n_scored < len(ids):
        window = ids[start : start + n_window]
        targets = ids[n_scored : start + n_window]
        states = final_states(window[:-1], **params, n_head=n_head, n_out=len(targets))
        parts.append(score_targets(states, targets, params["wte"]).log_probs)
        n_scored += len(targets)
        start += max(n_ctx // 2, 1)
    return np.concatenate(parts)


class Scores(NamedTuple):
    """How well the model predicted each target."""

    log_probs: Array  # float32, natural logarithms
    is_likeliest: Array  # bool: whether no token is more likely


@np.errstate(under="ignore")
def score_targets(states: Array, targets: Array, wte: Array) -> Scores:
    """Score targets [n], given the final states [n, n_embd] before them -> Scores of [n] each.

    log(softmax(logits)) is logits - log(sum(exp(logits))). The sum goes over the vocabulary in
    blocks, so only some of the logits are in memory at a time. To prevent overflow, each block's
    sum is relative to its own maximum. At the end, all are made relative to the largest one.
    """
    size = max(1, LOGITS // len(targets))  # tokens of the vocabulary per block
    n_blocks = math.ceil(len(wte) / size)
    chosen = np.empty(len(targets), np.float32)  # the logits of the targets
    maxima = np.empty((n_blocks, len(targets)), np.float32)
    sums = np.empty((n_blocks, len(targets)), np.float32)  # of exp(logits - maximum)

    def score(start, end):
        logits = states @ wte[start:end].T
        rows = np.flatnonzero((targets >= start) & (targets < end))
        chosen[rows] = logits[rows, targets[rows] - start]
        maximum = logits.max(axis=-1)
        logits -= maximum[:, None]
        block = start // size
        maxima[block] = maximum
        sums[block] = np.exp(logits, out=logits).sum(axis=-1)

    for_blocks(score, len(wte), size)
    largest = maxima.max(axis=0)
    total = (sums * np.exp(maxima - largest)).sum(axis=0)
    return Scores(chosen - largest - np.log(total), chosen == largest)


@np.errstate(under="ignore")
def log_softmax(x: Array) -> Array:
    """log(softmax(x)) over the last axis, also where softmax(x) would underflow."""
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


# From text to text


def continuation(
    prompt: str,
    model: tuple,
    n_tokens_to_generate: int = 40,
    *,
    n_samples: int | None = 1,
    stop: str | list[str] | None = None,
    allowed_special: Collection[str] = (),
    **options: Any,
) -> Iterator[str]:
    """Continue a text -> iterator over pieces of new text, as they come.

    model: (encoder, hparams, params), as load_encoder_hparams_and_params returns it.
    n_samples: several samples are generated first and then follow one another under headings.
    stop: a text that ends the continuation, or several.
    allowed_special: see Encoder.encode.
    options: those of `generate`.

    Raises what `generate` and Encoder.encode raise, and ValueError if the prompt is empty and the
    model has no token that starts a text.
    """
    from encoder import TextDecoder

    n_rows = 1 if n_samples is None else whole_number("n_samples", n_samples, 1, MAX_SAMPLES)
    check_stop(stop)
    encoder, hparams, params = model
    decoders = [TextDecoder(encoder, stop) for _ in range(n_rows)]
    rows = stream(
        encode_prompt(prompt, encoder, allowed_special),
        params,
        hparams["n_head"],
        n_tokens_to_generate,
        n_samples=n_rows,
        stop_id=encoder.end_ids,
        **options,
    )
    pieces = _decode_rows(rows, decoders)
    if n_rows == 1:
        return ("".join(row) for row in pieces)
    return _samples_with_headings(pieces, n_rows)


def encode_prompt(prompt: str, encoder: Any, allowed_special: Collection[str]) -> list[int]:
    """Encode the prompt. An empty one becomes the id that starts a text."""
    ids = encoder.encode(prompt, allowed_special)
    if ids:
        return ids
    if encoder.start_id is None:
        raise ValueError("the prompt is empty, and the model has no token that starts a text")
    return [encoder.start_id]


def check_stop(stop: Any) -> None:
    """Raise ValueError unless stop is None, a non-empty text, or a collection of such texts."""
    if stop is None:
        return
    for text in [stop] if isinstance(stop, str) else stop:
        if not isinstance(text, str) or not text:
            raise ValueError(f"stop must be a non-empty text, got {text!r}")


def _decode_rows(rows: Iterator, decoders: list) -> Iterator[list[str]]:
    """Turn the ids of each step into text, until all samples have ended -> lists of texts."""
    for row in rows:
        texts = []
        for token_id, decoder in zip(row, decoders, strict=True):
            texts.append("" if token_id is None else decoder.decode([token_id]))
        yield texts
        if all(d.stopped or i is None for i, d in zip(row, decoders, strict=True)):
            break
    yield [decoder.decode([], final=True) for decoder in decoders]


def _samples_with_headings(rows: Iterator[list[str]], n_samples: int) -> Iterator[str]:
    """Collect the texts of each sample and yield one sample after the other."""
    samples = [""] * n_samples
    for row in rows:
        samples = [old + new for old, new in zip(samples, row, strict=True)]
    line = "=" * 40
    for number, text in enumerate(samples, 1):
        end = "\n" if number < n_samples else ""
        yield f"{line} SAMPLE {number} {line}\n{text}{end}"


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
    stop: str | list[str] | None = None,
    special_tokens: bool = False,
) -> str:
    """Load a model and continue the prompt -> the text that the command line prints.

    special_tokens: whether names such as <|endoftext|> in the prompt are special tokens. For the
    other options see `generate` and `continuation`. Raises what `generate` and utils.py raise.
    """
    from utils import load_encoder_hparams_and_params

    options: dict[str, Any] = {
        "n_tokens_to_generate": n_tokens_to_generate,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "n_samples": n_samples,
        "stop": stop,
    }
    check_options(options)  # before the model is loaded, which may include a download
    model = load_encoder_hparams_and_params(model_size, models_dir)
    allowed_special = "all" if special_tokens else ()
    return "".join(continuation(prompt, model, allowed_special=allowed_special, **options))


def check_options(options: dict[str, Any]) -> None:
    """Raise ValueError if an option of `main` is out of range. Missing ones have their defaults."""
    whole_number("n_tokens_to_generate", options.get("n_tokens_to_generate", 40), 0)
    check_sampling(
        options.get("temperature", 0.0), options.get("top_k", 0), options.get("top_p", 1.0)
    )
    if options.get("seed") is not None:
        whole_number("seed", options["seed"], 0)
    if options.get("n_samples") is not None:
        whole_number("n_samples", options["n_samples"], 1, MAX_SAMPLES)
    check_stop(options.get("stop"))


# The command line

INSTALL = "python -m pip install numpy requests tqdm regex fire threadpoolctl"
USAGE = """\
gpt2.py continues a text with GPT-2.
An example that needs no download: python gpt2.py "ROMEO:" --model_size tiny
python gpt2.py --help lists the options."""

HELP = """\
python gpt2.py PROMPT [N_TOKENS_TO_GENERATE [MODEL_SIZE [MODELS_DIR]]] [OPTIONS]

Continue a text with GPT-2. An example that needs no download:

    python gpt2.py "ROMEO:" --model_size tiny

PROMPT                       the text, in quotes. Without it, or as -, it is read from standard
                             input, without the final newline. "" is an empty prompt. Write
                             --prompt="-x" for a text that starts with a dash
--n_tokens_to_generate 40    the maximum number of new tokens
--model_size 124M            124M, 355M, 774M or 1558M (downloaded on first use), the name of a
                             folder in models_dir, or of a GPT-2 on the Hugging Face Hub
                             (openai-community/gpt2)
--models_dir models          the folder that holds the models
--temperature 0.0            0 always takes the most likely token; 1 draws from the model's
                             probabilities
--top_k 0                    draw from only the k most likely tokens; 0 means all
--top_p 1.0                  draw from the smallest set of most likely tokens with this total
                             probability, such as 0.9
--seed                       random seed: the same seed gives the same text
--n_samples 1                the number of continuations. They are all equal at temperature 0, where
                             top_k, top_p and seed have no effect
--stop                       stop before this text appears. \\n is a newline, \\t a tab, \\\\ a
                             backslash. Give it several times to stop before any of several texts
--special_tokens             read the names of special tokens in the prompt, such as <|endoftext|>,
                             as these tokens; otherwise they are ordinary text
--interactive                ask for prompts, one per line; PROMPT, if it is given, is the first
--help                       show this help"""

POSITIONAL = ("prompt", "n_tokens_to_generate", "model_size", "models_dir")
SWITCHES = ("interactive", "special_tokens")  # options without a value
OTHER_NAMES = {  # what other programs call our options
    "text": "prompt",
    "input": "prompt",
    "start": "prompt",
    "length": "n_tokens_to_generate",
    "max_length": "n_tokens_to_generate",
    "max_tokens": "n_tokens_to_generate",
    "max_new_tokens": "n_tokens_to_generate",
    "num_tokens": "n_tokens_to_generate",
    "n_tokens": "n_tokens_to_generate",
    "n_predict": "n_tokens_to_generate",
    "model": "model_size",
    "model_name": "model_size",
    "model_name_or_path": "model_size",
    "model_dir": "models_dir",
    "temp": "temperature",
    "k": "top_k",
    "nucleus": "top_p",
    "random_seed": "seed",
    "num_samples": "n_samples",
    "nsamples": "n_samples",
    "num_return_sequences": "n_samples",
    "stop_token": "stop",
    "stop_sequence": "stop",
    "reverse_prompt": "stop",
    "chat": "interactive",
}
QUOTES = "put the prompt in quotes"


class Arguments(NamedTuple):
    """The values on the command line, as text, by the name of the option. `stop` is a list."""

    named: dict[str, Any]  # given with a name, switches included
    positional: dict[str, str]  # given without one


def parse_arguments(words: list[str]) -> Arguments:
    """Split the command line into values with fire. Raises UsageError."""
    import fire

    texts: list[str] = []
    named: dict[str, Any] = {}

    @fire.decorators.SetParseFn(str)  # fire would turn the prompt 1984 into a number
    def collect(*args, **kwargs):
        texts.extend(args)
        named.update(kwargs)

    words = with_full_names(words)
    separator = "--separator=\0"  # the default one, -, is a prompt here
    fire.Fire(collect, [*words, "--", separator])
    stop_names = [name for name in named if name.startswith("stop")]  # see with_full_names
    stops = [named.pop(name) for name in stop_names]
    if stops:
        named["stop"] = [unescape(decoded(stop)) for stop in stops]
    free_names = [name for name in POSITIONAL if name not in named]
    return Arguments(named, name_texts(texts, free_names))


def with_full_names(words: list[str]) -> list[str]:
    """Complete the names of options: ["-p", "a"] becomes ["--prompt", "a"]. Raises UsageError."""
    from utils import UsageError

    result: list[str] = []
    for word, next_word in itertools.pairwise([*words, "--"]):  # "--": no value follows
        if is_option(word):
            typed, equals, value = word.partition("=")
            name = option_name(typed)
            if name in SWITCHES:
                if equals:
                    raise UsageError(f"{typed} takes no value")
                equals = "="
                value = "True"  # or fire would take the next word as its value
            if not equals and is_option(next_word):
                raise UsageError(
                    f"{typed} needs a value; write {typed}=-x if it starts with a dash"
                )
            if name == "stop":  # fire keeps only the last value of each name
                name = f"stop{len(result)}"
            word = f"--{name}{equals}{value}"
        result.append(word)
    return result


def is_option(word: str) -> bool:
    """Return whether fire takes a word for an option: not a lone dash or a negative number."""
    return re.match("--|-[a-zA-Z]", word) is not None


def option_name(typed: str) -> str:
    """Return the option that a word such as --top-k or -p means. Raises UsageError if none."""
    from utils import UsageError

    known = [*inspect.signature(main).parameters, "interactive"]
    name = typed.lstrip("-").replace("-", "_")
    if name in known:
        return name
    possible = [option for option in known if option[0] == name]
    if len(possible) == 1:
        return possible[0]
    if possible:
        names = [f"--{option}" for option in possible]
        raise UsageError(
            f"{typed} is ambiguous: it can mean {', '.join(names[:-1])} or {names[-1]}"
        )
    meanings = OTHER_NAMES | {option: option for option in known}
    similar = difflib.get_close_matches(name, meanings, 1)
    if " " in typed:
        hint = 'write --prompt="-x" for a prompt that starts with a dash'
    elif similar:
        hint = f"did you mean --{meanings[similar[0]]}?"
    else:
        hint = "--help lists the options"
    raise UsageError(f"there is no option {typed}; {hint}")


def name_texts(texts: list[str], names: list[str]) -> dict[str, str]:
    """Assign the names to the positional texts, in order. Raises UsageError."""
    from utils import UsageError

    if len(texts) > len(names):
        raise UsageError(f"{QUOTES}; {texts[len(names)]!r} is one word too many")
    options = dict(zip(names, texts, strict=False))
    number = options.get("n_tokens_to_generate", "0")
    if not number.lstrip("-").isdecimal():
        raise UsageError(
            f"{QUOTES}; {number!r} is taken for n_tokens_to_generate, which must be a whole number"
        )
    return options


def decoded(word: str) -> str:
    """Decode a word of the command line as UTF-8, whatever the locale. Raises UsageError."""
    from utils import UsageError

    try:
        return os.fsencode(word).decode("utf-8")
    except UnicodeError as error:
        raise UsageError(f"an argument is not UTF-8: {error}") from None


def unescape(text: str) -> str:
    r"""Read \n as a newline, \t as a tab and \\ as a backslash."""
    characters = {"n": "\n", "t": "\t", "\\": "\\"}
    return re.sub(r"\\([nt\\])", lambda match: characters[match[1]], text)


@np.errstate(over="ignore", invalid="ignore")  # damaged parameters give one error, not many lines
def run(words: list[str]) -> int:
    """Do what the command line asks -> exit status. Raises UsageError and what `main` raises."""
    from utils import note

    if {"-h", "--help"} & set(words):
        print(HELP)
        return 0
    arguments = parse_arguments(words)
    options: dict[str, Any] = arguments.named | arguments.positional
    check_usage(options)
    is_interactive = options.pop("interactive", False)
    prompt = given_prompt(options.pop("prompt", None), is_interactive)
    if prompt is None:
        for line in USAGE.splitlines():
            note(line)
        return 2
    warn_of_options_without_effect(options)
    model = load_model(
        options.pop("model_size", "124M"),
        options.pop("models_dir", "models"),
        is_positional="model_size" in arguments.positional,
    )
    if options.pop("special_tokens", False):
        options["allowed_special"] = "all"
    if is_interactive:
        return answer_prompts(prompt, model, options)
    show(continuation(prompt, model, **options))
    return 0


def check_usage(options: dict[str, Any]) -> None:
    """Raise UsageError if an option is out of range."""
    from utils import UsageError

    try:
        check_options(options)
    except ValueError as error:
        hint = "; 90% is 0.9" if str(error).startswith("top_p") else ""
        raise UsageError(f"--{error}{hint}") from None


def given_prompt(word: str | None, is_interactive: bool) -> str | None:
    """Return the prompt of the command line or of standard input, or None if there is none."""
    from utils import is_terminal

    if word == "-":
        return read_prompt()
    if word is not None:
        return decoded(word)
    if is_interactive:
        return ""
    if is_terminal(sys.stdin):
        return None
    return read_prompt() or None  # empty input is no prompt


def read_prompt() -> str:
    """Read the prompt from standard input, without the final newline."""
    from utils import read_text

    return re.sub("\r?\n\\Z", "", read_text("-"))


def warn_of_options_without_effect(options: dict[str, Any]) -> None:
    """Warn if the temperature is 0 and options were given that need another."""
    from utils import complain

    if float(options.get("temperature", 0)) > 0:
        return
    unused = [f"--{name}" for name in ("top_k", "top_p", "seed") if name in options]
    if unused:
        names = ", ".join(unused)
        complain("gpt2.py", f"warning: at temperature 0, these options have no effect: {names}")
    if int(options.get("n_samples", 1)) > 1:
        complain("gpt2.py", "warning: at temperature 0, all samples are equal")


def load_model(model_size: str, models_dir: str, is_positional: bool) -> tuple:
    """Load a model. If there is none, the error says that the name may belong to the prompt."""
    from utils import MODEL_SIZES, load_encoder_hparams_and_params

    try:
        return load_encoder_hparams_and_params(model_size, models_dir)
    except ValueError as error:
        exists = model_size in MODEL_SIZES or os.path.exists(os.path.join(models_dir, model_size))
        if exists or not is_positional:
            raise
        hint = f"if it belongs to the prompt, {QUOTES}"
        raise ValueError(f"{model_size!r} is taken for model_size ({hint}): {error}") from None


def show(pieces: Iterable[str]) -> None:
    """Print pieces of text as they come, then a newline."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def answer_prompts(prompt: str, model: tuple, options: dict[str, Any]) -> int:
    """Continue the prompt and then each input line, but not empty ones -> exit status.

    The status is 1 if a prompt from a pipe failed, else 0.
    """
    from utils import complain, is_terminal, note

    status = 0
    at_terminal = is_terminal(sys.stdin) and is_terminal(sys.stdout)
    if at_terminal:
        note("Each line is a prompt of its own. Ctrl-C stops an answer, Ctrl-D exits.")
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401  gives input() line editing and a history
    while True:
        try:
            text = prompt
            prompt = ""  # so that it is not repeated after Ctrl-C or an error
            if text:
                show(continuation(text, model, **options))
            prompt = read_line("> " if at_terminal else "")
        except EOFError:
            if at_terminal:
                print()
            return status
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print()
        except ValueError as error:
            complain("gpt2.py", str(error))
            if not at_terminal:
                status = 1


def read_line(sign: str) -> str:
    """Show a sign and read a line. Raises EOFError at the end, ValueError if it is not UTF-8."""
    line = input(sign).removeprefix("\ufeff").removesuffix("\r")
    if "\ufffd" in line:  # utils.robust_streams puts it in place of bytes that are not UTF-8
        raise ValueError("the prompt is not UTF-8")
    return line


def command_line(arguments: list[str]) -> int:
    """Run the command line -> status: 0, 1 after an error, 2 for wrong usage, 130 after Ctrl-C."""
    try:
        from utils import run_command
    except ModuleNotFoundError as error:  # encoder.py needs regex
        print(f"gpt2.py: {error}; install it with: {INSTALL}", file=sys.stderr)
        return 1
    return run_command("gpt2.py", run, arguments)


if __name__ == "__main__":
    sys.exit(command_line(sys.argv[1:]))
