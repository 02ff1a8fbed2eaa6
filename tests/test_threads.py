"""The threads of a prompt: how many, what BLAS is set to, forks, errors and Ctrl-C, the results.

The oracle is the model in float64. Watcher is an activation, so it sees the threads from inside.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers import ROOT, float64_gpt2, float64_softmax, random_params

import gpt2

threadpoolctl = pytest.importorskip("threadpoolctl")
BLAS = threadpoolctl.ThreadpoolController().select(user_api="blas")
if not BLAS:
    pytest.skip("threadpoolctl cannot set the threads of this BLAS", allow_module_level=True)

HPARAMS = {"n_vocab": 300, "n_ctx": 1024, "n_embd": 64, "n_head": 4, "n_layer": 2}
N_HEAD = HPARAMS["n_head"]
IDS = np.random.default_rng(0).integers(0, HPARAMS["n_vocab"], 1000)
LENGTHS = [1, 2, 31, 64, 65, 127, 128, 129]


def blas_threads():
    return [library["num_threads"] for library in BLAS.info()]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Let the small model have blocks for several threads in every function."""
    monkeypatch.setattr(gpt2, "BLOCK", 2000)
    monkeypatch.setattr(gpt2, "LOGITS", 2000)
    monkeypatch.setattr(gpt2, "ATTENTION_ROWS", 32)


@pytest.fixture(autouse=True)
def three_blas_threads():
    """Set BLAS to a number of its own, and see that each test leaves it so."""
    with threadpoolctl.threadpool_limits(3, user_api="blas"):
        yield
        assert set(blas_threads()) == {3}


@pytest.fixture(scope="module")
def params():
    return random_params(HPARAMS)


@pytest.fixture(scope="module")
def exact(params):
    """The logits of the first 129 ids. The first n rows are those of a prompt of n ids."""
    return float64_gpt2(IDS[:129], params, N_HEAD)


def logits_of(n, params, **options):
    return gpt2.gpt2(IDS[:n], **params, n_head=N_HEAD, **options)


def assert_exact(logits, exact):
    assert logits.dtype == np.float32
    assert logits.shape == exact.shape
    np.testing.assert_allclose(logits, exact, rtol=0, atol=1e-5 * np.abs(exact).max())


class Watcher:
    """An activation. The first n calls wait for one another, so they must be in n threads at once.

    It then calls then(x), and records what each of its threads is called and how many there were.
    """

    def __init__(self, n=1, then=None):
        self.barrier = threading.Barrier(n)
        self.then = then
        self.lock = threading.Lock()
        self.n_calls = 0
        self.inside = set()
        self.most = 0
        self.blas = set()
        self.settings = []
        self.threads = set()

    def __call__(self, x):
        with self.lock:
            self.n_calls += 1
            is_early = self.n_calls <= self.barrier.parties
            self.inside.add(threading.get_ident())
            self.most = max(self.most, len(self.inside))
            self.blas.update(blas_threads())
            self.settings.append(np.geterr())
            self.threads.add(threading.current_thread())
        if is_early:
            self.barrier.wait(30)
        if self.then:
            self.then(x)
        with self.lock:
            self.inside.discard(threading.get_ident())
        return gpt2.gelu(x)


def watched(params, watcher):
    """The same parameters, with this activation in the first layer."""
    first, *others = params["blocks"]
    first = first | {"mlp": first["mlp"] | {"activation": gpt2.in_blocks_of_rows(watcher)}}
    return params | {"blocks": [first, *others]}


# How many threads there are, and the results


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_a_prompt_has_as_many_threads_as_blas_was_set_to(params, exact, n_threads):
    watcher = Watcher(n_threads)
    with threadpoolctl.threadpool_limits(n_threads, user_api="blas"):
        logits = logits_of(129, watched(params, watcher))
        assert set(blas_threads()) == {n_threads}
    assert watcher.most == n_threads
    assert watcher.blas == {1}
    assert_exact(logits, exact)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
@pytest.mark.parametrize("n", LENGTHS)
def test_logits_and_bits(params, exact, n_threads, n):
    with threadpoolctl.threadpool_limits(n_threads, user_api="blas"):
        logits = logits_of(n, params)
        again = logits_of(n, params)
    assert_exact(logits, exact[:n])
    np.testing.assert_array_equal(logits, again)


@pytest.mark.slow
def test_logits_of_1000_tokens(params):
    exact = float64_gpt2(IDS, params, N_HEAD)
    for n_threads in (1, 2, 3, 5):
        with threadpoolctl.threadpool_limits(n_threads, user_api="blas"):
            logits = logits_of(1000, params)
            np.testing.assert_array_equal(logits, logits_of(1000, params))
        assert_exact(logits, exact)


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_greedy_ids_match_transformers(tiny, reference, n_threads):
    """60 ids with the cache, after a prompt that is long enough for threads."""
    _, hparams, params = tiny
    ids = [*reference["tiny/ids"], *reference["tiny/greedy"]]
    with threadpoolctl.threadpool_limits(n_threads, user_api="blas"):
        new_ids = gpt2.generate(ids[:70], params, hparams["n_head"], len(ids) - 70)
    assert new_ids == ids[70:]


@pytest.mark.parametrize("n_threads", [1, 2, 3, 5])
def test_log_probs(params, exact, n_threads):
    log_probs = np.log(float64_softmax(exact))[np.arange(128), IDS[1:129]]
    with threadpoolctl.threadpool_limits(n_threads, user_api="blas"):
        assert_exact(gpt2.log_probs(IDS[:129], params, N_HEAD), log_probs)


def test_a_call_with_few_ids_leaves_everything_to_blas(params):
    watcher = Watcher()
    logits_of(63, watched(params, watcher))
    assert watcher.most == 1
    assert watcher.blas == {3}


# Several callers


def call_at_once(params, n_callers, context=gpt2.own_threads):
    """The logits of prompts of several lengths, each in a thread that is inside the context."""
    barrier = threading.Barrier(n_callers)

    def call(n):
        barrier.wait(30)
        with context():
            barrier.wait(30)
            return logits_of(n, params)

    with ThreadPoolExecutor(n_callers) as pool:
        return list(pool.map(call, range(129 - n_callers, 129)))


def test_callers_in_a_pool_get_the_bits_of_one_caller(params, exact):
    for logits in call_at_once(params, 6):
        n = len(logits)
        assert_exact(logits, exact[:n])
        np.testing.assert_array_equal(logits, logits_of(n, params))


def test_one_blas_thread_in_several_callers_gives_the_bits_of_one_caller(params, exact):
    for logits in call_at_once(params, 6, gpt2.one_blas_thread):
        n = len(logits)
        assert_exact(logits, exact[:n])
        with gpt2.one_blas_thread():
            np.testing.assert_array_equal(logits, logits_of(n, params))


def test_one_blas_thread_is_one_thread(params):
    watcher = Watcher()
    with gpt2.one_blas_thread():
        assert set(blas_threads()) == {1}
        for n in (3, 129):
            logits_of(n, watched(params, watcher))
    assert watcher.threads == {threading.current_thread()}
    assert watcher.blas == {1}


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]])
def test_the_last_caller_to_leave_restores_blas(params, exact, order):
    """The callers enter in the order 0, 1, 2, and leave in this one."""
    entered = [threading.Event() for _ in range(3)]
    may_leave = [threading.Event() for _ in range(3)]

    def call(i):
        def wait(_):
            entered[i].set()
            assert may_leave[i].wait(30)

        return logits_of(129, watched(params, Watcher(then=wait)))

    with ThreadPoolExecutor(3) as pool:
        calls = []
        settings = []
        for i in range(3):
            calls.append(pool.submit(call, i))
            assert entered[i].wait(30)
        for i in order:
            settings.append(blas_threads())
            may_leave[i].set()
            assert_exact(calls[i].result(30), exact)
    assert settings == 3 * [[1]]


# NumPy's settings, errors, Ctrl-C


def test_the_callers_errstate_holds_in_all_threads(params):
    watcher = Watcher(3)
    with np.errstate(over="raise", divide="ignore", invalid="print"):
        expected = np.geterr() | {"under": "ignore"}
        logits_of(129, watched(params, watcher))
    assert all(settings == expected for settings in watcher.settings)
    broken = Watcher(3, then=lambda x: np.exp(x + np.float32(1000)))
    with np.errstate(over="raise"), pytest.raises(FloatingPointError):
        logits_of(129, watched(params, broken))


def test_the_callers_error_function_is_called_in_all_threads(params):
    kinds = []
    overflow = Watcher(3, then=lambda x: np.exp(x + np.float32(1000)))
    with np.errstate(over="call", call=lambda kind, flag: kinds.append(kind)):
        logits_of(129, watched(params, overflow))
    assert len(kinds) == overflow.n_calls
    assert set(kinds) == {"overflow"}


@pytest.mark.parametrize("is_caller", [False, True])
def test_an_exception_in_any_thread_ends_the_call(params, exact, is_caller):
    caller = threading.current_thread()

    def fail(_):
        if (threading.current_thread() is caller) == is_caller:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        logits_of(129, watched(params, Watcher(3, fail)))
    assert set(blas_threads()) == {3}
    assert_exact(logits_of(129, params), exact)


@pytest.mark.parametrize("is_caller", [False, True])
def test_ctrl_c(params, exact, is_caller):
    """A signal while the caller computes, and while another thread does."""
    caller = threading.current_thread()

    first = iter([True])  # one signal

    def interrupt(_):
        if (threading.current_thread() is caller) == is_caller and next(first, False):
            signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            logits_of(129, watched(params, Watcher(3, interrupt)))
    finally:
        signal.signal(signal.SIGINT, handler)
    assert set(blas_threads()) == {3}
    assert_exact(logits_of(129, params), exact)


def test_an_asynchronous_exception_in_a_thread_of_the_user(params):
    def stop(_):
        ident = ctypes.c_ulong(threading.get_ident())
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))

    # Another caller stays inside.
    with ThreadPoolExecutor(1) as pool, gpt2.one_blas_thread():
        call = pool.submit(logits_of, 129, watched(params, Watcher(then=stop)))
        assert isinstance(call.exception(30), KeyboardInterrupt)
        assert set(blas_threads()) == {1}


# Whole programs

START = f"""\
import os, sys, threading
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np

def n_system_threads():
    return len(os.listdir("/proc/self/task"))

n_before = n_system_threads()
import gpt2
assert n_system_threads() == n_before
assert threading.active_count() == 1
from helpers import float64_gpt2, random_params
gpt2.BLOCK = 2000
params = random_params({HPARAMS})
ids = np.random.default_rng(0).integers(0, 300, 129)

def blas_threads():
    import threadpoolctl
    return threadpoolctl.ThreadpoolController().select(user_api="blas").info()[0]["num_threads"]

def is_exact(logits):
    exact = float64_gpt2(ids[:len(logits)], params, {N_HEAD})
    return np.abs(logits - exact).max() < 1e-5 * np.abs(exact).max()

def logits_of(n=129):
    return gpt2.gpt2(ids[:n], **params, n_head={N_HEAD})
"""


def run_program(text, **variables):
    """What a new process prints. It must not fail."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "MKL_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", START + text]
    result = subprocess.run(
        command, env=environment | variables, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    return result.stdout


linux = pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")


@linux
def test_one_token_after_a_short_prompt_starts_no_thread():
    run_program(f"""
new_ids = list(gpt2.stream(ids[:10].tolist(), params, {N_HEAD}, 1))
assert new_ids == [float64_gpt2(ids[:10], params, {N_HEAD})[-1].argmax()]
assert threading.active_count() == 1
assert n_system_threads() == n_before
""")


def test_generate_starts_no_thread():
    run_program(f"""
gpt2.generate(ids[:10].tolist(), params, {N_HEAD}, 1)
assert threading.active_count() == 1
""")


@linux
@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"])
def test_one_thread_in_all(name):
    text = "assert is_exact(logits_of())\nassert n_system_threads() == 1"
    run_program(text, **{name: "1"})


@linux
@pytest.mark.parametrize("name", ["OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"])
def test_the_variables_for_blas_count_for_our_threads(name):
    run_program(
        """
n = blas_threads()
assert n == min(2, os.cpu_count())
with gpt2.own_threads():
    assert gpt2.n_own_threads() == n
assert is_exact(logits_of())
assert blas_threads() == n
""",
        **{name: "2"},
    )


@linux
def test_without_threadpoolctl():
    run_program("""
sys.modules["threadpoolctl"] = None
assert is_exact(logits_of())
with gpt2.one_blas_thread():
    assert is_exact(logits_of())
assert threading.active_count() == 1
assert n_system_threads() == n_before
""")


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
IN_CHILD = """
def check_in_child(n):
    child = os.fork()
    if not child:
        try:
            is_right = blas_threads() == n and is_exact(logits_of()) and is_exact(logits_of(5))
            os._exit(0 if is_right and blas_threads() == n else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
"""


@needs_fork
def test_after_a_fork():
    run_program(f"""{IN_CHILD}
n = blas_threads()
check_in_child(n)
logits_of()
check_in_child(n)
assert is_exact(logits_of())
""")


@needs_fork
def test_a_fork_while_another_thread_is_inside_a_prompt():
    run_program(f"""{IN_CHILD}
n = blas_threads()
is_inside, may_leave = threading.Event(), threading.Event()

@gpt2.in_blocks_of_rows
def wait(x):
    is_inside.set()
    assert may_leave.wait(30)
    return gpt2.gelu(x)

results = []
mlp = params["blocks"][0]["mlp"]
def call():
    blocks = [params["blocks"][0] | {{"mlp": mlp | {{"activation": wait}}}}, params["blocks"][1]]
    results.append(gpt2.gpt2(ids, **params | {{"blocks": blocks}}, n_head={N_HEAD}))

thread = threading.Thread(target=call)
thread.start()
assert is_inside.wait(30)
assert blas_threads() == 1
check_in_child(n)
assert blas_threads() == 1
may_leave.set()
thread.join()
assert blas_threads() == n
assert is_exact(results[0])
""")


@needs_fork
def test_a_fork_inside_one_blas_thread():
    run_program(f"""{IN_CHILD}
with gpt2.one_blas_thread():
    check_in_child(1)
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


def test_when_no_thread_can_be_started():
    run_program("""
def fail(self):
    raise RuntimeError("can't start new thread")

threading.Thread.start = fail
assert is_exact(logits_of())
""")


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there is no timer here")
def test_ctrl_c_at_3000_random_moments():
    """Nothing hangs, and BLAS's threads are restored each time."""
    run_program("""
import faulthandler, random, signal, time
faulthandler.dump_traceback_later(50, exit=True)
is_armed = False

def interrupt(*_):
    global is_armed
    if is_armed:
        is_armed = False
        raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
n = blas_threads()
start = time.perf_counter()
for _ in range(20):
    logits_of(70)
seconds = (time.perf_counter() - start) / 20
draw = random.Random(0)
for _ in range(3000):
    try:
        is_armed = True
        signal.setitimer(signal.ITIMER_REAL, draw.uniform(5e-5, seconds))
        logits_of(70)
    except KeyboardInterrupt:
        pass
    is_armed = False
    assert blas_threads() == n
assert is_exact(logits_of())
""")
