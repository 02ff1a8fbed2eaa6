"""Our threads and BLAS's: how many, forks, errors and Ctrl-C, the results.

The oracle is the model in float64. Watcher is an activation, so it sees the threads from inside.
"""

import math
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import ROOT, float64_gpt2, float64_softmax, python, random_params

import fast
import gpt2

threadpoolctl = pytest.importorskip("threadpoolctl")
BLAS = threadpoolctl.ThreadpoolController().select(user_api="blas")
LAYERS = {library.get("threading_layer") for library in BLAS.info()}
if not BLAS or LAYERS & {"openmp", "disabled"}:
    pytest.skip("threadpoolctl cannot set the threads of this BLAS", allow_module_level=True)

HPARAMS = {"n_vocab": 300, "n_ctx": 1024, "n_embd": 64, "n_head": 4, "n_layer": 2}
N_HEAD = HPARAMS["n_head"]
IDS = np.random.default_rng(0).integers(0, HPARAMS["n_vocab"], 1000)


def blas_threads():
    return [library["num_threads"] for library in BLAS.info()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let the small model have blocks for several threads in every function.

    Other programs on this machine do not change what happens.
    """
    monkeypatch.setattr(fast, "BLOCK", 2000)
    monkeypatch.setattr(gpt2, "ROWS", 32)
    monkeypatch.setattr(fast, "MAX_WAIT", math.inf)
    monkeypatch.setattr(fast, "busy_until", 0.0)


@pytest.fixture(autouse=True)
def n_threads(request):
    """BLAS is set to this number of threads, and each test leaves it so."""
    n = getattr(request, "param", 3)
    with threadpoolctl.threadpool_limits(n, user_api="blas"):
        yield n
        assert set(blas_threads()) == {n}


several_numbers = pytest.mark.parametrize("n_threads", [1, 2, 3, 5], indirect=True)


@pytest.fixture(scope="module")
def params():
    return random_params(HPARAMS)


@pytest.fixture(scope="module")
def exact(params):
    """The logits of 1000 ids. The first n rows are those of a prompt of n ids."""
    return float64_gpt2(IDS, params, N_HEAD)


def logits_of(n, params):
    return gpt2.gpt2(IDS[:n], **params, n_head=N_HEAD)


def assert_exact(logits, exact):
    """The logits are those of the first len(logits) ids."""
    assert logits.dtype == np.float32
    exact = exact[: len(logits)]
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


class Watcher:
    """An activation. The first n calls wait for one another, so they must be in n threads at once.

    It calls then(x), and records its threads and the settings of NumPy and BLAS.
    """

    def __init__(self, n=1, then=None):
        self.barrier = threading.Barrier(n)
        self.then = then
        self.lock = threading.Lock()
        self.threads = set()
        self.blas = set()
        self.settings = []

    def __call__(self, x):
        with self.lock:
            self.threads.add(threading.get_ident())
            self.blas.update(blas_threads())
            self.settings.append(np.geterr())
            is_early = len(self.settings) <= self.barrier.parties
        if is_early:
            self.barrier.wait(300)
        if self.then:
            self.then(x)
        return gpt2.gelu(x)


def watched(params, watcher):
    """The same parameters, with this activation in the first layer."""
    first, *others = params["blocks"]
    first = first | {"mlp": first["mlp"] | {"activation": fast.in_blocks(watcher)}}
    return params | {"blocks": [first, *others]}


# How many threads there are, and the results


@several_numbers
def test_a_prompt_has_as_many_threads_as_blas_was_set_to(n_threads, params, exact):
    watcher = Watcher(n_threads)
    logits = logits_of(129, watched(params, watcher))
    assert len(watcher.threads) == n_threads
    assert watcher.blas == {1}
    assert_exact(logits, exact)


@several_numbers
def test_logits_log_probs_and_bits(n_threads, params, exact):
    for n in (1, 2, 31, 64, 65, 127, 128, 129, 1000):
        logits = logits_of(n, params)
        assert logits.shape == (n, HPARAMS["n_vocab"])
        assert_exact(logits, exact)
        np.testing.assert_array_equal(logits, logits_of(n, params))
    log_probs = np.log(float64_softmax(exact[:128]))[np.arange(128), IDS[1:129]]
    assert_exact(gpt2.log_probs(IDS[:129], params, N_HEAD), log_probs)


def test_where_there_are_no_threads_of_ours(params):
    """A call with few ids leaves the rest to BLAS. Where BLAS has one thread, nobody is asked."""
    few_ids = Watcher()
    logits_of(63, watched(params, few_ids))
    assert (len(few_ids.threads), few_ids.blas) == (1, {3})
    alone = Watcher()
    one_thread = threadpoolctl.threadpool_limits(1, user_api="blas")
    with one_thread, fast.one_prompt, ThreadPoolExecutor(1) as pool:  # it does not need the lock
        pool.submit(logits_of, 129, watched(params, alone)).result(300)
    assert (len(alone.threads), alone.blas) == (1, {1})


def test_a_token_on_a_busy_machine_has_one_thread(params, exact, monkeypatch):
    """A thread that sleeps has no core, like one that waits for other programs."""
    monkeypatch.setattr(fast, "MAX_WAIT", 0.016)
    logits_of(1, watched(params, Watcher(then=lambda x: time.sleep(0.02))))
    monkeypatch.setattr(fast, "MAX_WAIT", math.inf)
    busy = Watcher()
    assert_exact(logits_of(63, watched(params, busy)), exact)
    assert (len(busy.threads), busy.blas) == (1, {1})
    prompt = Watcher(3)
    logits_of(129, watched(params, prompt))
    assert (len(prompt.threads), prompt.blas) == (3, {1})
    with ThreadPoolExecutor(1) as pool:  # beside a prompt, a token does not wait for its end
        inside = Watcher(then=lambda x: pool.submit(logits_of, 1, params).result(300))
        logits_of(129, watched(params, inside))
    monkeypatch.setattr(fast, "busy_until", time.perf_counter())
    calm = Watcher()
    logits_of(63, watched(params, calm))
    assert calm.blas == {3}


def test_where_no_thread_can_be_started(params, exact, monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(fast, "helpers", [])
    monkeypatch.setattr(threading.Thread, "start", fail)
    assert_exact(logits_of(129, params), exact)


def test_callers_in_a_pool_get_the_bits_of_one_caller(params, exact):
    barrier = threading.Barrier(6)

    def call(n):
        barrier.wait(300)
        return logits_of(n, params)

    fast.blas()  # or the pool's threads would look for it at the same time
    with ThreadPoolExecutor(6) as pool:
        for logits in pool.map(call, range(123, 129)):
            assert_exact(logits, exact)


def test_a_call_inside_a_call(params, exact):
    """A finalizer or a signal handler may call the model while the caller's lock is held."""
    nested = []
    inside = Watcher(then=lambda _: nested.append(logits_of(100, params)) if not nested else None)
    assert_exact(logits_of(129, watched(params, inside)), exact)
    assert_exact(nested[0], exact)


# NumPy's settings, errors, Ctrl-C


def test_the_callers_errstate_holds_in_all_threads(params):
    kinds = []
    overflow = Watcher(3, then=lambda x: np.exp(x + np.float32(1000)))
    settings = {"over": "call", "divide": "ignore", "invalid": "print"}
    with np.errstate(**settings, call=lambda kind, flag: kinds.append(kind)):
        expected = np.geterr() | {"under": "ignore"}
        logits_of(129, watched(params, overflow))
    assert all(each == expected for each in overflow.settings)
    assert kinds == ["overflow"] * len(overflow.settings)


class FalsyError(Exception):
    """An error that is no error to a careless `if error:`."""

    def __bool__(self):
        return False


def fail_falsely():
    raise FalsyError


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("is_caller", [False, True])
@pytest.mark.parametrize(
    ("fail", "error"), [(fail_falsely, FalsyError), (press_ctrl_c, KeyboardInterrupt)]
)
def test_an_error_in_any_thread_ends_the_call(params, exact, fail, error, is_caller):
    """The first call of the activation in the caller's thread fails, or that in another one."""
    caller = threading.current_thread()
    first = iter([True])

    def fail_once(_):
        if (threading.current_thread() is caller) == is_caller and next(first, False):
            fail()

    with pytest.raises(error):
        logits_of(129, watched(params, Watcher(3, fail_once)))
    assert set(blas_threads()) == {3}
    assert_exact(logits_of(129, params), exact)


# Whole programs

START = f"""\
import os, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np
import threadpoolctl

def n_system_threads():
    return len(os.listdir("/proc/self/task"))

n_before = n_system_threads()
import fast, gpt2
assert n_system_threads() == n_before
assert threading.active_count() == 1
from helpers import float64_gpt2, random_params
fast.BLOCK = 2000
params = random_params({HPARAMS})
ids = np.random.default_rng(0).integers(0, 300, 129)
exact = float64_gpt2(ids, params, {N_HEAD})

def blas_threads():
    return threadpoolctl.ThreadpoolController().select(user_api="blas").info()[0]["num_threads"]

def is_exact(logits):
    return np.abs(logits - exact[:len(logits)]).max() < 1e-5 * np.abs(exact).max()

def logits_of(n=129):
    return gpt2.gpt2(ids[:n], **params, n_head={N_HEAD})
"""


def run_program(text, **variables):
    """What a new process prints. It must not fail."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    status, out, err = python("-c", START + text, env=environment | variables)
    assert (status, "Traceback" in err) == (0, False), err
    return out


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc, and forks")


@linux
def test_a_token_after_a_short_prompt_starts_no_thread():
    run_program(f"""
assert list(gpt2.stream(ids[:10], params, {N_HEAD}, 1)) == [exact[9].argmax()]
assert n_system_threads() == n_before
gpt2.generate(ids[:10], params, {N_HEAD}, 1)
assert threading.active_count() == 1
""")


@linux
@pytest.mark.parametrize(("name", "n"), [("OPENBLAS_NUM_THREADS", 1), ("OMP_NUM_THREADS", 2)])
def test_the_variables_for_blas_count_for_our_threads(name, n):
    text = """
n = blas_threads()
with fast.own_threads(64):
    assert fast.this_thread.n_threads == (n if n > 1 else 0)
assert is_exact(logits_of())
assert blas_threads() == n
assert n > 1 or n_system_threads() == 1
print(n)
"""
    assert run_program(text, **{name: str(n)}) == f"{min(n, len(os.sched_getaffinity(0)))}\n"


@linux
def test_without_threadpoolctl():
    run_program("""
sys.modules["threadpoolctl"] = None
assert is_exact(logits_of())
assert threading.active_count() == 1
assert n_system_threads() == n_before
""")


@linux
def test_forks_before_after_and_inside_a_prompt_and_while_another_thread_is_inside():
    run_program("""
def check_in_child(n):
    child = os.fork()
    if not child:
        try:
            is_right = blas_threads() == n and is_exact(logits_of()) and is_exact(logits_of(5))
            os._exit(0 if is_right and blas_threads() == n else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0

n = blas_threads()
check_in_child(n)
logits_of()
check_in_child(n)
is_inside, may_leave = threading.Event(), threading.Event()
def stay_inside():
    with fast.own_threads(64):
        is_inside.set()
        assert may_leave.wait(300)

thread = threading.Thread(target=stay_inside)
thread.start()
assert is_inside.wait(300)
assert blas_threads() == 1
check_in_child(n)
assert blas_threads() == 1
may_leave.set()
thread.join()
assert blas_threads() == n
assert is_exact(logits_of())
""")


@pytest.mark.parametrize("first", ["", "logits_of()"])
def test_a_thread_that_goes_on_after_the_main_thread(first):
    text = f"""
def call():
    threading.main_thread().join()
    print(is_exact(logits_of()))

{first}
threading.Thread(target=call).start()
"""
    assert run_program(text) == "True\n"


@pytest.mark.slow
@linux
@pytest.mark.parametrize("call", ["logits_of(70)", "log_probs()"])
def test_ctrl_c_at_3000_random_moments(call):
    """Nothing hangs, and BLAS's threads are restored nearly each time."""
    run_program(f"""
import random, signal, time

def log_probs():
    return gpt2.log_probs(ids[:71], params, {N_HEAD})

{call}
start = time.perf_counter()
for _ in range(10):
    {call}
seconds = (time.perf_counter() - start) / 10
signal.signal(signal.SIGALRM, signal.default_int_handler)
n = blas_threads()
draw = random.Random(0)
n_interrupted = 0
n_changed = 0
for _ in range(3000):
    try:
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(0.05, 1.5) * seconds)
        {call}
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        n_interrupted += 1
    if blas_threads() != n:
        n_changed += 1
        threadpoolctl.threadpool_limits(n, user_api="blas")
assert n_interrupted > 500
print(n_interrupted, n_changed)
assert n_changed <= 6
assert is_exact(logits_of())
""")
