"""Efficiency alone: work in blocks, on threads of our own. It knows no formulas.

BLAS's threads wait for one another in a loop that does nothing. On a busy machine, this costs more
time than the work. So while a prompt is processed, BLAS has one thread, and the blocks of a product
are spread over threads of our own. The products of a single token are left to BLAS's threads, or
to one thread while the machine is busy.
"""

import collections
import contextlib
import contextvars
import functools
import os
import queue
import threading
import time
from typing import Any

import numpy as np

BLOCK = 100_000  # elements at a time in functions of rows: they fit into the CPU's cache
PROMPT_ROWS = 64  # a call with at least this many tokens uses our own threads
FEW_ROWS = 64  # with fewer rows than this, (w.T @ x.T).T is faster than x @ w in OpenBLAS
COLUMNS = 192  # of a product per block: fewer than 64 are slow, more than 384 are no faster
MAX_WAIT = 0.016  # seconds. A call that waits longer for a core shows that the machine is busy
BUSY_TIME = 4.0  # seconds after such a call in which single tokens have one thread

# glibc returns freed memory to the system, and new pages must be zeroed again. Freeing one large
# block first raises its threshold, so later temporaries are reused: a prompt takes 8% less time.
np.empty(32_000_000, np.uint8)


def matmul(x, w):
    """x @ w as one product for all leading axes: x [..., d_in], w [d_in, d_out]."""
    rows = x.reshape(-1, x.shape[-1])
    if this_thread.n_threads > 1:
        y = np.empty((len(rows), w.shape[-1]), np.result_type(x, w))

        def multiply(start, end):
            np.matmul(rows, w[:, start:end], out=y[:, start:end])

        for_blocks(multiply, w.shape[-1], COLUMNS)
    elif 1 < len(rows) < FEW_ROWS:
        y = np.ascontiguousarray((w.T @ rows.T).T)
    else:
        y = rows @ w
    return y.reshape(*x.shape[:-1], w.shape[-1])


def in_blocks(function):
    """Decorator: apply a function of each row (last axis) to about BLOCK elements at a time."""

    @functools.wraps(function)
    def blockwise(x, *args, **kwargs):
        if np.size(x) <= BLOCK:
            return function(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        y = np.empty(rows.shape, np.result_type(x, np.float32))

        def apply(start, end):
            y[start:end] = function(rows[start:end], *args, **kwargs)

        for_blocks(apply, len(rows), max(1, BLOCK // x.shape[-1]))
        return y.reshape(x.shape)

    return blockwise


def for_blocks(function, n, size):
    """Call function(start, end) for blocks of this size that together make up range(n).

    Inside `own_threads`, they are spread over threads. A thread that is free takes the next block.
    """
    if n <= size:
        function(0, n)
        return
    starts = collections.deque(range(0, n, size))
    n_blocks = len(starts)
    done = queue.SimpleQueue()  # for each block, None or an error

    def work():
        while starts:
            try:
                start = starts.popleft()
            except IndexError:  # another thread has taken the last one
                return
            try:
                function(start, min(start + size, n))
                done.put(None)
            except BaseException as error:
                done.put(error)

    ask_helpers(work, min(this_thread.n_threads, n_blocks) - 1)
    work()
    for _ in range(n_blocks):
        error = done.get()
        if error is not None:
            raise error


# Threads. They are not a ThreadPoolExecutor's, because Ctrl-C can leave its locks locked.


class ThisThread(threading.local):
    n_threads = 0  # that for_blocks may use, inside `own_threads`


this_thread = ThisThread()
helpers = []
tasks = queue.SimpleQueue()  # functions for the helpers to call
one_prompt = threading.RLock()  # a prompt uses all cores, and BLAS has one setting for all threads
limiter = None  # of BLAS's threads, while a call has limited them
busy_until = 0.0  # on the clock of time.perf_counter


def ask_helpers(task, n):
    """Let n threads call the task, or fewer if no more can be started."""
    while len(helpers) < n:
        helper = threading.Thread(target=serve, daemon=True)
        try:
            helper.start()
        except RuntimeError:  # a limit of the system, or the program is about to end
            break
        helpers.append(helper)
    for _ in range(min(n, len(helpers))):
        context = contextvars.copy_context()  # NumPy's errstate
        tasks.put(functools.partial(context.run, task))


def serve():
    this_thread.n_threads = 1
    while True:
        tasks.get()()  # a variable would keep the arrays of the last task alive


@contextlib.contextmanager
def own_threads(n_rows):
    """Give BLAS one thread, and `for_blocks` as many as BLAS had.

    For few rows, BLAS keeps its threads, or has one thread while the machine is busy. Does nothing
    for a caller that is inside already, and where BLAS has one thread.
    """
    global busy_until, limiter
    is_prompt = n_rows >= PROMPT_ROWS
    if this_thread.n_threads > 0:
        yield
    elif not is_prompt and time.perf_counter() >= busy_until:
        start = waiting_clock()
        yield
        if waiting_clock() - start > MAX_WAIT:
            busy_until = time.perf_counter() + BUSY_TIME
    elif blas_threads() == 1 and (limiter is None or not is_prompt):
        yield
    else:
        with one_prompt:
            n_threads = blas_threads() if is_prompt else 1
            try:
                with blas().limit(limits=1, user_api="blas") as limiter:
                    this_thread.n_threads = n_threads
                    yield
            finally:
                this_thread.n_threads = 0
                limiter = None


def waiting_clock():
    """Return a time in seconds that advances only while this thread does not run.

    Waits for a core, for the disk and for a lock all count.
    """
    return time.perf_counter() - time.thread_time()


def blas_threads():
    """Return how many threads BLAS has, or 1 if this cannot be set."""
    controller = blas()
    if controller is None:
        return 1
    return min([library.num_threads for library in controller.lib_controllers], default=1)


@functools.cache
def blas() -> Any:
    """Return a controller of OpenBLAS with threads of its own, or None without threadpoolctl."""
    try:
        import threadpoolctl
    except ImportError:
        return None
    return threadpoolctl.ThreadpoolController().select(threading_layer="pthreads")


def forget_threads():
    """In a forked process, only the thread that forked is left."""
    global one_prompt, tasks
    helpers.clear()
    tasks = queue.SimpleQueue()
    one_prompt = threading.RLock()
    if limiter is not None and not this_thread.n_threads:  # another thread had limited them
        limiter.restore_original_limits()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=forget_threads)
