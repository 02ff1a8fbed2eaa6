"""Score every text of a corpus with GPT-2: its perplexity, on one core or on many machines.

    python -m examples.score texts.jsonl --model_size 124M --output scores.jsonl
    python -m examples.score texts.txt --workers 4
    python -m examples.score texts.jsonl --scheduler tcp://host:8786

Input: JSON Lines, with the text in the field "text" (or --field NAME), or plain text, one text per line. A name that
ends in .txt is plain text; .json, .jsonl and .ndjson, or --field, mean JSON Lines. For all others, `-` (standard input)
included, a first line that starts with { means JSON Lines.

Output: JSON Lines, one line for each line of the input, in the same order. A line has the other fields of its input
line (those named like ours are replaced), followed by

    n_tokens        the number of tokens of the text. <|endoftext|> goes first, so that every token of the text counts
    nats            the sum of -log(p) over these tokens, to 6 decimals
    perplexity      exp(nats / n_tokens), to 8 digits; null for an empty text, or if it is too large for a float
    bits_per_byte   nats / log(2), divided by the number of UTF-8 bytes of the text; null for an empty text

or by "error" if the text cannot be scored: invalid UTF-8 or JSON, a blank line in JSON Lines, no such field, a field
that is not a string. In plain text, a blank line is an empty text. A text longer than the context is scored in windows,
as `gpt2.log_probs` does it. A lone surrogate ("\\ud800") counts as U+FFFD.

The exit status is 0 if every text was scored, 1 if some could not be or the run failed (the last line on standard
error says which), 2 for wrong arguments, and 130 after Ctrl-C. After any of these, or a crash, the same command
continues after the last whole line of --output. It first computes that line again, and stops if the input or the
model is a different one. The result equals that of an undisturbed run, byte for byte on the same kind of processor: the
batches depend on the input alone, and one thread computes each. At most one window of the input (WINDOW_BYTES) has to
be computed again. Do not run the same command twice at the same time.

Threads: one process computes one batch per core at a time, or as many as OMP_NUM_THREADS says. With --workers N, each
worker has its share of the cores.

Several machines. Dask (`pip install distributed`) needs a scheduler and workers. The project and the models must lie at
the same path on every machine. Turn off the memory limit of the workers: the mapped checkpoint, which all workers of a
machine share, would count for each of them. With ssh:

    dask-ssh --hostfile hosts.txt --remote-python /path/to/python --nworkers 16 --nthreads 1 --memory-limit 0

Dask tells malloc to return memory at once, which costs a quarter of the speed. This line in ~/.config/dask/dask.yaml on
the machines of the workers prevents it:

    distributed: {nanny: {pre-spawn-environ: {MALLOC_TRIM_THRESHOLD_: 1000000000, MALLOC_MMAP_THRESHOLD_: 33000000}}}

On a batch system, use dask-jobqueue: `SLURMCluster(cores=16, processes=16, memory="32GB", worker_extra_args=
["--memory-limit", "0"])`, then `.scale(jobs=8)`, and its `scheduler_address` for --scheduler. On Kubernetes, use a
`KubeCluster` of dask-kubernetes with an image that contains the project and the models. Batches of a worker that dies
are computed again.

What it costs. 124M scored 980 tokens per second on two cores of a Xeon with AVX-512. A billion tokens then take about
570 core-hours: 12 days on these two cores, or four and a half hours on 128 cores (30 dollars at 5 cents per core and
hour), if those are as fast. Only two cores were measured. A worker of one thread needs 200 MB besides the mapped
checkpoint, and 430 MB while it scores a text of 1000 tokens or more.
"""

import argparse
import collections
import contextlib
import functools
import itertools
import json
import logging
import math
import os
import sys
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass

THREAD_VARIABLES = (
    "OPENBLAS_NUM_THREADS",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
if __name__ == "__main__":
    # Each thread computes its own batch, because much of NumPy uses one thread only. So the BLAS needs no more threads.
    # It reads these variables when NumPy is imported.
    n_threads_wanted = next(
        (n for n in map(os.environ.get, THREAD_VARIABLES) if n and n.isdecimal()), None
    )
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))

import numpy as np  # noqa: E402

import gpt2  # noqa: E402
from utils import load_encoder_hparams_and_params, progress_bar  # noqa: E402

BATCH_ROWS = 512  # tokens of a batch, padding included: fewer are slower, more need more memory and are no faster
WINDOW_TEXTS, WINDOW_BYTES = (
    2048,
    1 << 18,
)  # texts are sorted by length within so many lines of the input
BLOCK_ROWS = 32  # rows of logits for the softmax: they stay in the CPU's cache
OUR_FIELDS = ("n_tokens", "nats", "perplexity", "bits_per_byte", "error")
CONNECT_SECONDS = 10


@dataclass(eq=False)
class Text:
    """One line of the input. `head` is its output line without what the model adds."""

    number: int  # of the line, from 0
    end: int  # the offset of the next line in the input
    head: str
    ids: list[int]
    n_bytes: int = 0
    nats: float | None = None

    def line(self) -> str:
        """Return the line of the output."""
        if not self.n_bytes:
            return self.head + "}\n"
        nats, n_tokens = round(self.nats, 6) + 0.0, len(self.ids) - 1  # + 0.0 turns -0.0 into 0.0
        per_token = nats / n_tokens
        figures = {
            "nats": nats,
            "perplexity": float(f"{math.exp(per_token):.8g}") if per_token < 700 else None,
            "bits_per_byte": float(f"{nats / math.log(2) / self.n_bytes:.8g}"),
        }
        return f"{self.head}, {json.dumps(figures)[1:]}\n"


# Input


def is_json_lines(path: str, field: str | None, first_line: bytes) -> bool:
    """Decide the format of the input as described above."""
    name = path.lower()
    if field is not None or name.endswith((".json", ".jsonl", ".ndjson")):
        return True
    return not name.endswith(".txt") and first_line.lstrip().startswith(b"{")


def parse(line: bytes, field: str | None) -> tuple[dict, str | None]:
    """Split a line of the input (plain text if field is None) -> (other fields, text).

    If there is no text, it is None, and the last field is "error" with the reason.
    """
    fields = {}
    try:
        text = line.decode("utf-8")
        if field is None:
            return fields, text
        document = json.loads(text)
        if not isinstance(document, dict):
            raise ValueError("the line is not a JSON object")
        others = {
            name: value
            for name, value in document.items()
            if name != field and name not in OUR_FIELDS
        }
        json.dumps(
            others, allow_nan=False
        )  # Python reads NaN, and 1e999 as infinity, but JSON has neither
        fields = others
        if field not in document:
            raise ValueError(f"no field {json.dumps(field)}")
        if not isinstance(document[field], str):
            raise ValueError(f"{json.dumps(field)} is not a string")
        return fields, document[field]
    except UnicodeDecodeError as error:
        reason = f"invalid UTF-8: {error.reason} at byte {error.start}"
    except RecursionError:
        reason = "invalid JSON: too deeply nested"
    except ValueError as error:
        reason = f"invalid JSON: {error}" if isinstance(error, json.JSONDecodeError) else str(error)
    return fields | {"error": reason}, None


def to_text(number: int, end: int, line: bytes, field: str | None, encoder) -> Text:
    """Parse and encode one line of the input."""
    fields, text = parse(line, field)
    if text is None:
        return Text(number, end, json.dumps(fields)[:-1], [])
    ids = [encoder.encoder["<|endoftext|>"], *encoder.encode(text)]
    figures = {"n_tokens": len(ids) - 1} | (
        {} if text else {"nats": 0.0, "perplexity": None, "bits_per_byte": None}
    )
    return Text(
        number,
        end,
        json.dumps(fields | figures)[:-1],
        ids,
        len(text.encode("utf-8", "surrogatepass")),
    )


def windows(lines):
    """Group (number, end, line) of the input -> iterator over lists: WINDOW_TEXTS lines, or WINDOW_BYTES and a line."""
    window, start = [], 0
    for number, end, line in lines:
        window.append((number, end, line))
        if len(window) == WINDOW_TEXTS or end - start >= WINDOW_BYTES:
            yield window
            window, start = [], end
    if window:
        yield window


def number_lines(file, first_line: bytes):
    """Iterate over (number, end, line without its end). A byte order mark before the first line is left out."""
    end = 0
    for number, line in enumerate(itertools.chain([first_line] if first_line else [], file)):
        end += len(line)
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
        yield number, end, line.removesuffix(b"\n").removesuffix(b"\r")


# Scoring


def batches(texts: list[Text], n_ctx: int):
    """Group texts of similar length into batches of about BATCH_ROWS rows, the longest first -> iterator over lists.

    A text longer than the context is alone.
    """
    texts = sorted(
        (text for text in texts if text.n_bytes), key=lambda text: len(text.ids), reverse=True
    )
    start = 0
    while start < len(texts):
        longest = len(texts[start].ids) - 1
        end = start + (max(1, BATCH_ROWS // longest) if longest <= n_ctx else 1)
        yield texts[start:end]
        start = end


@functools.lru_cache(maxsize=1)
def load(model_size: str, models_dir: str):
    """Load the model, once per process."""
    return load_encoder_hparams_and_params(model_size, models_dir)


@np.errstate(all="ignore")  # damaged parameters give one error, not many warnings
def score(batch: list[list[int]], model_size: str, models_dir: str) -> list[float]:
    """Return the nats of each text in a batch. This runs in a thread of a worker, which loads the model itself."""
    _, hparams, params = load(model_size, models_dir)
    if len(batch) == 1:
        nats = [-gpt2.log_probs(batch[0], params, hparams["n_head"]).sum(dtype=np.float64)]
    else:
        padded = np.zeros(
            (len(batch), max(map(len, batch))), np.int64
        )  # on the right, where nothing depends on it
        for row, ids in zip(padded, batch, strict=True):
            row[: len(ids)] = ids
        logits = gpt2.gpt2(padded[:, :-1], **params, n_head=hparams["n_head"])
        nats = [
            sum_of_nats(rows, np.array(ids[1:])) for rows, ids in zip(logits, batch, strict=True)
        ]
    if not np.isfinite(nats).all():
        raise ValueError("the logits are not finite: the parameters are damaged")
    return [float(each) for each in nats]


def score_remotely(folder: str, *args) -> list[float]:
    """Call `score` on a Dask worker. Dask sends this function as code, so that it finds the project in its folder."""
    if folder not in sys.path:
        sys.path.insert(0, folder)
    from examples import score as this_file  # imported, its cache of the model lasts

    return this_file.score(*args)


def sum_of_nats(logits, targets) -> float:
    """Sum -log(softmax(logits)) of the targets. The logits [n_seq, n_vocab] are overwritten."""
    nats = 0.0
    for start in range(0, len(targets), BLOCK_ROWS):
        ids = targets[start : start + BLOCK_ROWS]
        rows = logits[start : start + len(ids)]
        rows -= rows.max(axis=-1, keepdims=True)
        chosen = rows[np.arange(len(ids)), ids]
        nats += (np.log(np.exp(rows, out=rows).sum(axis=-1)) - chosen).sum(dtype=np.float64)
    return nats


def scored_texts(text_windows, submit, count_slots, n_ctx: int, first: int):
    """Score the texts with the numbers from `first` on -> iterator over them, in order.

    submit(ids of a batch) -> future. As many batches are under way as keep all slots busy.
    """
    waiting, running = collections.deque(), collections.deque()

    def collect(n_running):
        while len(running) > n_running:
            batch, future = running.popleft()
            for text, nats in zip(batch, future.result(), strict=True):
                text.nats = nats
        while waiting and (waiting[0].nats is not None or not waiting[0].n_bytes):
            yield waiting.popleft()

    for texts in text_windows:
        n_running = 4 * max(1, count_slots())
        waiting.extend(text for text in texts if text.number >= first)
        for batch in batches(texts, n_ctx):
            if any(text.number >= first for text in batch):
                running.append((batch, submit([text.ids for text in batch])))
                yield from collect(n_running)
        # Many lines without a text would wait for batches that no later batch pushes out.
        yield from collect(n_running if len(waiting) < n_running * BATCH_ROWS else 0)
    yield from collect(0)


@contextlib.contextmanager
def threads(n_threads: int):
    """Start threads -> (submit, count_slots)."""
    pool = ThreadPoolExecutor(n_threads)
    try:
        yield functools.partial(pool.submit, score), lambda: n_threads
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def dask_workers(n_workers: int | None, scheduler: str | None, n_threads: int):
    """Start a local Dask cluster, or join a running one -> (submit, count_slots)."""
    try:
        import dask
        import distributed
    except ImportError:
        raise ImportError("--workers and --scheduler need Dask: pip install distributed") from None
    logging.disable()  # Dask logs tracebacks; one line is enough
    # Dask's default also makes malloc return memory at once: a batch would take a quarter longer.
    dask.config.set({"distributed.nanny.pre-spawn-environ": dict.fromkeys(THREAD_VARIABLES, 1)})
    dask.config.set(
        {"distributed.worker.profile.enabled": False, "distributed.scheduler.allowed-failures": 20}
    )
    local = {
        "n_workers": n_workers,
        "threads_per_worker": max(1, n_threads // (n_workers or 1)),
        "memory_limit": 0,  # the mapped checkpoint would count for each worker
        "preload": [
            "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"
        ],  # Ctrl-C is for this process
        "dashboard_address": "127.0.0.1:0",  # any free port
        "silence_logs": "CRITICAL",
    }
    cluster = contextlib.nullcontext(scheduler) if scheduler else distributed.LocalCluster(**local)
    try:
        with cluster as address, distributed.Client(address, timeout=CONNECT_SECONDS) as client:
            if not client.nthreads():
                complain("the scheduler has no workers yet; waiting for them")
            project = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
            yield (
                functools.partial(client.submit, score_remotely, project, pure=False),
                lambda: sum(client.nthreads().values()),
            )
    except (CancelledError, OSError) as error:
        if isinstance(error, OSError) and (
            error.errno or type(error) not in (OSError, distributed.comm.CommClosedError)
        ):
            raise  # it is not Dask's
        raise ConnectionError("no connection to the Dask scheduler") from None
    except (RuntimeError, distributed.scheduler.KilledWorker) as error:
        raise ConnectionError(f"Dask failed: {error}") from None


# Output


@dataclass
class Written:
    """What an earlier run left in the output: whole lines, and perhaps a torn one."""

    n_lines: int = 0
    n_errors: int = 0
    n_bytes: int = 0  # of the whole lines
    last: bytes = b""
    torn: bytes = b""


def read_written(path: str) -> Written:
    """Read the output of an earlier run, if there is one."""
    written = Written()
    if os.path.isfile(path):
        with open(path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    written.torn = line
                    break
                written.n_lines += 1
                written.n_bytes += len(line)
                written.last = line
                written.n_errors += line.endswith(b'"}\n')  # only an error is a string
    return written


def belongs(line: bytes, text: Text) -> bool:
    """Tell whether a line of an earlier output, perhaps torn, is for this text (and this model, if it is whole)."""
    head = text.head.encode()
    if not line.endswith(b"\n"):
        return head.startswith(line) or line.startswith(head)
    if line == text.line().encode():
        return True
    try:
        return line.startswith(head) and abs(json.loads(line)["nats"] - text.nats) < 1e-3 * len(
            text.ids
        )
    except (ValueError, TypeError, KeyError):
        return False


def write(texts, file, written: Written, bar) -> tuple[int, int]:
    """Write the lines that are missing -> (number of texts, number of errors), with those of earlier runs."""
    n_texts, n_errors, n_tokens, start = 0, written.n_errors, 0, time.monotonic()
    for text in texts:
        expected = {written.n_lines - 1: written.last, written.n_lines: written.torn}.get(
            text.number
        )
        if expected and not belongs(expected, text):
            raise ValueError(
                f"line {text.number + 1} of the output is for another input or model: use another --output"
            )
        n_texts = text.number + 1
        if n_texts <= written.n_lines:
            bar.n = bar.initial = bar.last_print_n = text.end
            continue
        if expected:
            file.truncate(written.n_bytes)
        file.write(text.line().encode())
        file.flush()
        n_tokens += max(0, len(text.ids) - 1)
        n_errors += not text.ids
        bar.set_postfix_str(
            f"{n_texts:,} texts, {n_tokens / (time.monotonic() - start):,.0f} tokens/s",
            refresh=False,
        )
        bar.update(text.end - bar.n)
    if n_texts < written.n_lines + bool(written.torn):
        raise ValueError("the output has more lines than the input: use another --output")
    return n_texts, n_errors


# The command line


def parse_arguments(arguments):
    summary = "Score every text of a corpus with GPT-2. The beginning of this file describes input and output."
    parser = argparse.ArgumentParser(
        "python -m examples.score", description=summary, allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(
        2, f"score.py: {message} (--help lists the options)\n"
    )
    parser.add_argument(
        "input", help="JSON Lines, or plain text with one text per line; - is standard input"
    )
    parser.add_argument(
        "--output", default="-", help="continued if it exists; - (the default) is standard output"
    )
    parser.add_argument("--field", help='the field of the text in JSON Lines (default: "text")')
    parser.add_argument(
        "--model_size", default="124M", help="the model's folder in models_dir (default: 124M)"
    )
    parser.add_argument(
        "--models_dir", default="models", help="the folder of the models (default: models)"
    )
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--workers", type=int, metavar="N", help="start N local processes (needs Dask)"
    )
    group.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="use the workers of a Dask scheduler, tcp://host:8786",
    )
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be 1 or more, got {options.workers}")
    return options


def n_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def complain(message):
    with contextlib.suppress(OSError):
        print(
            "score.py:",
            " ".join(str(message).split("\n")) or "out of memory",
            file=sys.stderr,
            flush=True,
        )


def run(options, n_threads: int) -> tuple[int, int]:
    """Score the input -> (number of texts, number of errors)."""
    model = (
        options.model_size,
        os.path.abspath(options.models_dir),
    )  # workers may run in another folder
    encoder, hparams, _ = load(*model)
    if "<|endoftext|>" not in encoder.encoder:
        raise ValueError("the vocabulary has no <|endoftext|>, which goes before each text")
    is_distributed = options.workers or options.scheduler
    workers = (
        dask_workers(options.workers, options.scheduler, n_threads)
        if is_distributed
        else threads(n_threads)
    )
    from_stdin, to_stdout = options.input == "-", options.output == "-"
    written = Written() if to_stdout else read_written(options.output)
    first = max(0, written.n_lines - 1)  # the last line is scored again, to compare
    with (
        contextlib.nullcontext(sys.stdin.buffer)
        if from_stdin
        else open(options.input, "rb") as file,
        contextlib.nullcontext(sys.stdout.buffer)
        if to_stdout
        else open(options.output, "ab") as output,
        workers as (submit, count_slots),
        progress_bar(
            total=None if from_stdin else os.path.getsize(options.input) or None,
            bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}",
        ) as bar,
    ):
        first_line = file.readline()
        field = None
        if is_json_lines(options.input, options.field, first_line):
            field = "text" if options.field is None else options.field
        text_windows = (
            [to_text(*line, field, encoder) for line in window]
            for window in windows(number_lines(file, first_line))
            if window[-1][0] >= first
        )
        texts = scored_texts(
            text_windows, lambda ids: submit(ids, *model), count_slots, hparams["n_ctx"], first
        )
        return write(texts, output, written, bar)


def main(arguments=None, n_threads: int = 1) -> int:
    """Run the command line -> exit status."""
    options = parse_arguments(arguments)
    try:
        n_texts, n_errors = run(options, n_threads)
    except KeyboardInterrupt:
        complain(
            "interrupted; the same command continues" if options.output != "-" else "interrupted"
        )
        return 130
    except (OSError, ValueError, ImportError, MemoryError) as error:
        complain(error)
        return 1
    if n_errors:
        complain(f"{n_errors} of {n_texts} texts could not be scored")
    return int(n_errors > 0)


if __name__ == "__main__":
    os._exit(
        main(None, int(n_threads_wanted or 0) or n_cores())
    )  # do not wait for batches that nobody needs
