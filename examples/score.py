"""Score every text of a corpus with GPT-2, on one core or on many machines.

    python examples/score.py texts.jsonl --model_size 124M --output scores.jsonl

README.md in this folder is the manual. The data take this way through the file: each line of the
input becomes a Text, and the ids of a Text become one or more Rows. A Window has the texts that are
written together, and its Rows of similar length share a batch. Threads, or the processes of Dask,
score the batches. Output writes the windows in order.
"""

import contextlib
import functools
import gzip
import hashlib
import itertools
import json
import logging
import math
import os
import sys
import zlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PROJECT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, PROJECT)

import numpy as np

import fast
import gpt2
from encoder import Encoder
from terminal import UsageError, decoded, note, progress_bar, run
from utils import load_encoder_hparams_and_params

N_THREADS = fast.blas_threads()  # as many as cores, or as OMP_NUM_THREADS says
BATCH_TOKENS = 512  # padding included: fewer are slower, more need more memory and are no faster
WINDOW_WORK = 1e12  # tokens times parameters of all layers: 20 seconds of 124M on slow cores
WINDOW_TOKENS = 1 << 16  # at most, however small the model is
BYTES_PER_TOKEN = 8  # other fields of a line need memory, too: they count as so many tokens
DECOMPRESSORS = {".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
FIGURES = ["n_tokens", "nats", "perplexity", "bits_per_byte", "greedy", "end_nats"]
FIGURES += ["tokens", "token_nats", "error"]
RECORD_SUFFIX = ".run"


def command(
    input: str,
    *,
    output: str = "-",
    field: str | None = None,
    context_field: str | None = None,
    tokens: bool = False,
    end: bool = False,
    special_tokens: bool = False,
    model_size: str = "124M",
    models_dir: str = "models",
    workers: int | None = None,
    scheduler: str | None = None,
) -> None:
    """python examples/score.py INPUT [OPTIONS]

    Score every text of a corpus with GPT-2. For each line of the input, write a line of JSON with
    the nats, the perplexity and the bits per byte of its text. An example that needs no download:

        python examples/score.py README.md --model_size tiny

    INPUT                plain text with one text per line, or JSON Lines, in UTF-8; .gz is read
                         directly. - is standard input
    --output FILE        write there, or continue an earlier run; otherwise to standard output
    --field NAME         the field of the text in JSON Lines, instead of "text"
    --context_field NAME the field of a context in JSON Lines. All figures are those of the text
                         after it. Adds "greedy": whether each token was the most likely one
    --tokens             add each token and its nats
    --end                add the nats of the end of the text
    --special_tokens     read the names of special tokens, such as <|endoftext|>, as these tokens;
                         otherwise they are ordinary text
    --model_size 124M    the model, as for gpt2.py
    --models_dir models  the folder that holds the models
    --workers N          use N processes on this machine, with Dask
    --scheduler ADDRESS  use the workers of a Dask scheduler, such as tcp://host:8786
    --help               show this help

    The manual is examples/README.md.
    """
    if workers is not None and (not 1 <= workers <= 1000 or scheduler):
        raise UsageError("--workers must be from 1 to 1000, and there must be no --scheduler")
    if output == "/dev/stdout":  # which may be a file, but has no place for a record
        output = "-"
    models_dir = os.path.abspath(os.path.expanduser(models_dir))  # workers may run elsewhere
    with open_input(input) as source:
        if field is None and (context_field is not None or source.is_json_lines()):
            field = "text"
        if field is not None and field == context_field:
            raise UsageError("--context_field and --field must be different fields")
        model = load(model_size, models_dir)
        if end and not model.end_ids:
            raise ValueError("--end: the vocabulary has no token for the end of a text")
        job = Job(model.identity, field, context_field, tokens, end, special_tokens)
        with dask_workers(workers, scheduler) if workers or scheduler else threads() as pool:
            submit = functools.partial(pool.submit, model_size, models_dir, model.identity)
            windows = score_windows(source, job, model, submit, pool.count_slots)
            report(write(windows, output, job, source, model.encoder))


class Job(NamedTuple):
    """What the output depends on, besides the input. A run continues only with the same Job."""

    model: str  # its identity
    field: str | None  # of the text in JSON Lines; None for plain text
    context_field: str | None
    tokens: bool
    end: bool
    special_tokens: bool


# The input


@dataclass
class Input:
    """The lines of a corpus. They are counted, and added to a checksum, as they are read."""

    path: str
    raw: BinaryIO  # the file on the disk
    file: Any  # its content, decompressed
    n_lines: int = 0
    n_bytes: int = 0
    crc: int = 0

    def is_json_lines(self):
        """Decide by the name, or else by the first character that is not white space."""
        name = self.path.lower().removesuffix(".gz")
        if name.endswith((".txt", ".json", ".jsonl", ".ndjson")):
            return not name.endswith(".txt")
        lines = []  # they are read again
        beginning = b""
        for line in self.file:
            lines.append(line)
            beginning = line.lstrip(b"\xef\xbb\xbf\r\n\t ")
            if beginning:
                break
        self.file = itertools.chain(lines, self.file)
        return beginning.startswith(b"{")

    def lines(self):
        for line in self.file:
            self.n_lines += 1
            self.n_bytes += len(line)
            self.crc = zlib.crc32(line, self.crc)
            yield line

    def position(self):
        """Return how much of the file on the disk is read, or of a pipe."""
        return self.raw.tell() if self.raw.seekable() else self.n_bytes


@contextlib.contextmanager
def open_input(path):
    """Open the input. Raises ValueError if it is damaged, or compressed otherwise than as .gz."""
    suffix = Path(path).suffix.lower()
    if suffix in DECOMPRESSORS:
        raise ValueError(
            f"{path}: only .gz is read directly; use a pipe: "
            f"{DECOMPRESSORS[suffix]} -dc {path} | python examples/score.py -"
        )
    try:
        with sys.stdin.buffer if path == "-" else open(path, "rb") as raw:
            yield Input(path, raw, gzip.GzipFile(fileobj=raw) if suffix == ".gz" else raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from None


# The model


class Model(NamedTuple):
    """A model, and what score.py derives from it."""

    encoder: Encoder
    hparams: dict[str, int]
    params: dict[str, Any]
    identity: str  # a digest of all that the scores depend on
    start_ids: list[int]  # before a text without a context: a template's, or <|endoftext|>
    end_ids: list[int]  # that end a text; last the one that also starts texts


@functools.lru_cache(maxsize=1)
def load(model_size, models_dir):
    """Load a model, once per process, and give BLAS one thread: each batch has its own."""
    if fast.blas():
        fast.blas().limit(limits=1, user_api="blas")
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    start_ids = encoder.encode("") or [encoder.start_id]
    if start_ids == [None]:
        raise ValueError("the vocabulary has no <|endoftext|>, which goes before each text")
    end_ids = sorted(encoder.end_ids, key=start_ids.__contains__)
    parts = [encoder.identity(), hparams, params]
    content = json.dumps(parts, sort_keys=True, default=fingerprint).encode()
    return Model(encoder, hparams, params, fingerprint(content), start_ids, end_ids)


def fingerprint(value):
    """Return what stands for bytes, an array or a function in the identity of a model."""
    if callable(value):
        return value.__name__
    return hashlib.blake2b(np.ascontiguousarray(value)).hexdigest()


# From a line to a Text


@dataclass
class Row:
    """Ids for the model, which predicts the last n_targets of them."""

    ids: Sequence[int]
    n_targets: int
    scores: np.ndarray | None = None  # [2, n_targets], see `score`


@dataclass
class Text:
    """A line of the input on its way to the output. If there is an error, there are no rows."""

    fields: dict[str, Any] = field(default_factory=dict)  # all others, copied to the output
    error: str | None = None
    n_bytes: int = 0
    ids: Sequence[int] = ()  # of the text, without what stands before it
    rows: Sequence[Row] = ()


def to_text(line, number, job, model):
    """Parse and encode a line of the input -> Text."""
    text = Text()
    context = ""
    try:
        content = decode(line)
        if job.field is not None:
            document = parse(content)
            names = {*FIGURES, job.field, job.context_field}
            text.fields = {name: document[name] for name in document if name not in names}
            content = string_field(document, job.field)
            if job.context_field is not None:
                context = string_field(document, job.context_field)
        encode(text, context, content, job, model)
    except (ValueError, RecursionError) as error:
        text.error = f"line {number}: {error}"
    return text


def decode(line):
    """Decode a line without its end. Raises ValueError unless it is text in UTF-8."""
    text = decoded(line, "it")
    if "\0" in text:
        raise ValueError("it has NUL characters, as a file in UTF-16 has")
    return text.removesuffix("\n").removesuffix("\r")


def parse(content):
    """Parse a JSON object. Raises ValueError."""
    try:
        document = json.loads(content)
        json.dumps(document, allow_nan=False)  # Python also reads NaN, which is not JSON
    except ValueError as error:
        raise ValueError(f"invalid JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError("it is not a JSON object")
    return document


def string_field(document, name):
    """Return a field of a JSON object. Raises ValueError unless it is a string."""
    if not isinstance(document.get(name), str):
        raise ValueError(f"it has no field {json.dumps(name)} that is a string")
    return document[name]


def encode(text, context, content, job, model):
    """Encode a text after its context by the rule of lm-evaluation-harness.

    White space at the end of the context belongs to the text, and both are encoded together.
    Raises ValueError if a token has parts of both.
    """
    allowed = "all" if job.special_tokens else ()
    whole = context + content
    context = context.rstrip()
    before = model.encoder.encode(context, allowed)
    ids = model.encoder.encode(whole, allowed)
    if ids[: len(before)] != before:
        raise ValueError("a token has parts of both context and text; put a space between them")
    text.ids = ids[len(before) :]
    text.n_bytes = len(whole[len(context) :].encode("utf-8", "surrogatepass"))
    end = model.end_ids[-1:] if job.end else []
    text.rows = to_rows(before if context else model.start_ids, text.ids, end, model)


def to_rows(before, ids, end, model):
    """Return the Rows for the ids of a text after others, and for the id of its end, if any."""
    n_ctx = model.hparams["n_ctx"]
    before = before[-(n_ctx + 1 - len(ids)) :]
    if len(ids) > n_ctx:  # no context fits
        before = model.start_ids
    whole = [*before, *ids]
    last = []
    if end and len(whole) == n_ctx + 1:  # the end needs a row of its own
        last = [Row([*whole[1:], *end], 1)]
        end = []
    windows = gpt2.windows([*whole, *end], n_ctx, len(before))
    return [Row(window, n_targets) for window, n_targets in windows] + last


# Scoring


@np.errstate(all="ignore")  # damaged parameters cause one error, not many warnings
def score(model_size, models_dir, identity, rows):
    """Score the targets of a batch of Rows, the longest first -> float32 [2, n].

    They are the nats of each target, and whether no other token was more likely. This runs in a
    thread of a worker. Raises ValueError if the worker's model is another one, or not intact.
    """
    model = load(model_size, models_dir)
    if model.identity != identity:
        raise ValueError(f"{model_size} is another model here; replace it and restart the worker")
    ids = np.zeros((len(rows), len(rows[0].ids)), np.int64)  # the longest row comes first
    is_target = np.zeros(ids.shape, bool)
    for i, row in enumerate(rows):
        end = len(row.ids)
        ids[i, :end] = row.ids
        is_target[i, end - row.n_targets : end] = True
    states = gpt2.final_states(ids[:, :-1], **model.params, n_head=model.hparams["n_head"])
    scores = gpt2.score(states[is_target[:, 1:]], ids[is_target], model.params["wte"])
    if not np.isfinite(scores.log_probs).all():
        raise ValueError("the logits are not finite: the parameters are damaged")
    return np.stack([abs(scores.log_probs), scores.is_likeliest])


class Pool(NamedTuple):
    """Threads of this process, or the workers of Dask."""

    submit: Callable[..., Future]  # takes the arguments of `score`
    count_slots: Callable[[], int]  # how many batches are scored at once


@contextlib.contextmanager
def threads():
    executor = ThreadPoolExecutor(N_THREADS)
    try:
        yield Pool(functools.partial(executor.submit, score), lambda: N_THREADS)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def dask_workers(n_workers, scheduler):
    """Join the workers of a Dask scheduler, or start some with their share of the cores."""
    import distributed
    from dask import config

    logging.disable()  # Dask logs tracebacks; one line is enough
    # Dask's default makes malloc return memory at once: a batch would take a quarter longer.
    config.set({"distributed.nanny.pre-spawn-environ": {}})
    config.set({"distributed.scheduler.allowed-failures": 20})
    options = {}
    if scheduler is None:
        options = {
            "n_workers": n_workers,
            "threads_per_worker": max(1, N_THREADS // n_workers),
            "memory_limit": 0,  # the mapped checkpoint would count for each worker
            "preload": ["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],
            "dashboard_address": "127.0.0.1:0",  # any free port
            "silence_logs": "CRITICAL",
        }
    lost = (CancelledError, RuntimeError, distributed.KilledWorker, distributed.TimeoutError)
    lost += (distributed.client.ClosedClientError, distributed.comm.CommClosedError)
    try:
        with distributed.Client(scheduler, timeout=10, **options) as client:
            if not client.nthreads():
                note("score.py: the scheduler has no workers yet; waiting for them")
            executor = client.get_executor(pure=False)
            submit = functools.partial(executor.submit, score_remotely, PROJECT)
            yield Pool(submit, lambda: sum(client.nthreads().values()))
    except lost as error:
        raise ConnectionError(f"no connection to the Dask scheduler: {error!r}") from None


def score_remotely(project, *batch):
    """Call `score` on a Dask worker. Dask sends this function as code, not as a name to import."""
    if sys.path[0] != project:
        sys.path.insert(0, project)
    try:
        from examples import score as this_file  # when imported, its cache of the model lasts

        return this_file.score(*batch)
    except (ValueError, OSError, ImportError) as error:
        from distributed import get_worker

        raise ValueError(f"worker {get_worker().address}: {error}") from None


# Windows


class Window(NamedTuple):
    """Texts that are written together, and what is read of the input up to their end."""

    texts: list[Text]
    crc: int
    position: int
    running: dict[Future, list[Row]]  # the batches, by their scores


def read_texts(source, job, model):
    """Read the texts of the next window, which depends on the input and the model's size alone."""
    n_params = 12 * model.hparams["n_layer"] * model.hparams["n_embd"] ** 2
    n_left = min(WINDOW_TOKENS, WINDOW_WORK / n_params)
    texts = []
    for line in source.lines():
        text = to_text(line, source.n_lines, job, model)
        texts.append(text)
        n_ids = sum(len(row.ids) for row in text.rows)
        n_left -= max(1, n_ids, len(line) // BYTES_PER_TOKEN)
        if n_left <= 0:
            break
    return texts


def to_batches(texts):
    """Group the rows of similar length into batches of about BATCH_TOKENS, the longest first."""
    rows = [row for text in texts for row in text.rows]
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    while rows:
        n_rows = max(1, BATCH_TOKENS // (len(rows[0].ids) - 1))
        yield rows[:n_rows]
        rows = rows[n_rows:]


def score_windows(source, job, model, submit, count_slots):
    """Read windows and score them -> iterator over them, in order.

    So many batches of the next windows are under way that all slots of the pool stay busy.
    """
    waiting = deque()
    size = os.fstat(source.raw.fileno()).st_size or None  # 0 for a pipe
    with progress_bar(total=size, initial=source.position(), unit="B", unit_scale=True) as bar:
        while texts := read_texts(source, job, model):
            running = {submit(rows): rows for rows in to_batches(texts)}
            waiting.append(Window(texts, source.crc, source.position(), running))
            if len(waiting) > count_slots():
                yield finished(waiting.popleft(), bar)
        for window in waiting:
            yield finished(window, bar)


def finished(window, bar):
    """Wait for the batches of a window. The bar advances with each of them."""
    n_bytes = window.position - bar.n
    for future, rows in window.running.items():
        scores = future.result()
        for row in rows:
            row.scores = scores[:, : row.n_targets]
            scores = scores[:, row.n_targets :]
        bar.update(n_bytes / len(window.running))
    return window


# The output


def figures(text, job, encoder):
    """Return the figures of a text."""
    n_tokens = len(text.ids)
    scores = [row.scores for row in text.rows]
    nats, is_likeliest = np.hstack([np.empty((2, 0)), *scores])
    rounded = nats.round(6).tolist()
    total = round(float(nats[:n_tokens].sum()), 6)
    result = {"n_tokens": n_tokens, "nats": total} | averages(total, n_tokens, text.n_bytes)
    if job.context_field is not None:
        result["greedy"] = bool(is_likeliest[:n_tokens].all())
    if job.end:
        result["end_nats"] = rounded[-1]
    if job.tokens:
        tokens = [encoder.decode_bytes([token_id]) for token_id in text.ids]
        result["tokens"] = [token.decode("utf-8", "backslashreplace") for token in tokens]
        result["token_nats"] = rounded[:n_tokens]
    return result


def averages(nats, n_tokens, n_bytes):
    """Return the perplexity and the bits per byte, to 8 digits."""
    if n_tokens == 0:
        return {"perplexity": None, "bits_per_byte": None}
    perplexity = None
    if nats / n_tokens < 700:  # else it is too large for a float
        perplexity = float(f"{math.exp(nats / n_tokens):.8g}")
    return {"perplexity": perplexity, "bits_per_byte": float(f"{nats / math.log(2) / n_bytes:.8g}")}


@dataclass
class Progress:
    """What is written."""

    lines: int = 0
    input: int = 0  # the checksum of these lines of the input
    output: int = 0  # and of the output
    tokens: int = 0
    nats: float = 0.0
    bytes: int = 0  # of the texts
    errors: int = 0
    first_error: int = 0  # its line


def add_window(progress, window, job, encoder):
    """Return the lines of the output for a window, and the Progress with them."""
    progress = replace(progress, input=window.crc)
    lines = []
    for text in window.texts:
        result = {"error": text.error} if text.error else figures(text, job, encoder)
        lines.append(json.dumps(text.fields | result) + "\n")
        progress.lines += 1
        progress.tokens += len(text.ids)
        progress.nats += result.get("nats", 0)
        progress.bytes += text.n_bytes
        if text.error:
            progress.errors += 1
            progress.first_error = progress.first_error or progress.lines
    content = "".join(lines).encode()
    progress.output = zlib.crc32(content, progress.output)
    return content, progress


def report(progress):
    """Print a summary. It is an error if a text could not be scored."""
    mean = averages(progress.nats, progress.tokens, progress.bytes)
    summary = (
        f"texts: {progress.lines}, tokens: {progress.tokens}, "
        f"perplexity: {mean['perplexity']}, bits per byte: {mean['bits_per_byte']}"
    )
    if progress.errors:
        raise ValueError(
            f"{summary}, errors: {progress.errors}, the first in line {progress.first_error}"
        )
    note(f"score.py: {summary}, errors: 0")


def write(windows, path, job, source, encoder):
    """Write windows as they come, and continue an earlier run -> Progress.

    The record beside a file says what its lines belong to. It begins with the Job. Then come
    Progresses, each of which is added when all that it counts is safe on the disk. What an earlier
    run wrote after the last one is not changed, but it must be what this run writes.
    """
    progress = Progress()
    rest = b""
    record = None
    other_lines = (
        f"{path} has other lines than this run; use another --output, or delete it and {path}.run"
    )
    is_file = path != "-" and (os.path.isfile(path) or not os.path.exists(path))
    with contextlib.ExitStack() as stack:
        file = sys.stdout.buffer
        if path != "-":
            file = stack.enter_context(open(path, "a+b" if is_file else "wb"))
        if is_file:
            progress = resume(file, path, job, source)
            rest = file.read()
            record = stack.enter_context(open(path + RECORD_SUFFIX, "ab"))
        try:
            for window in windows:
                content, later = add_window(progress, window, job, encoder)
                if not content.startswith(rest[: len(content)]):
                    raise ValueError(other_lines)
                file.write(content[len(rest) :])
                rest = rest[len(content) :]
                file.flush()
                if record:
                    os.fsync(file.fileno())
                    record.write(b"\n" + json.dumps(asdict(later)).encode())
                    record.flush()
                    os.fsync(record.fileno())
                progress = later
            if rest:
                raise ValueError(other_lines)
        except KeyboardInterrupt:
            hint = f" in {path}; the same command continues" if is_file else ""
            note(f"score.py: interrupted; {progress.lines} lines are saved{hint}")
            raise
    return progress


def lock(file, path):
    """Raise ValueError if another run writes this file."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"another run is writing {path}; use another --output") from None
    except (ImportError, OSError):  # there are no locks on Windows and some network file systems
        pass


def resume(file, path, job, source):
    """Pass over what an earlier run has written. If there is nothing, begin a record -> Progress.

    Raises ValueError if another run writes this file, or something does not belong to this run.
    """
    lock(file, path)
    record = Path(path + RECORD_SUFFIX)
    header = json.dumps({"record": "score.py"} | job._asdict()).encode()
    content = record.read_bytes() if record.exists() else b""
    if content and not content.startswith(header[:20]):
        raise ValueError(f"{record} is no record of score.py; rename it, or use another --output")
    progress = Progress()
    if file.seek(0, os.SEEK_END) == 0:
        record.write_bytes(header)
        return progress
    for line in content.splitlines()[1:]:
        with contextlib.suppress(ValueError, TypeError):  # a line may be torn
            progress = Progress(**json.loads(line))
    file.seek(0)
    crc = 0
    for line in itertools.islice(file, progress.lines):
        crc = zlib.crc32(line, crc)
    for _ in itertools.islice(source.lines(), progress.lines):
        pass
    problem = None
    if not content.startswith(header):
        problem = f"{record} does not say that {path} has this model and these options"
    elif crc != progress.output:
        problem = f"{path} has changed since it was written"
    elif source.crc != progress.input:
        problem = f"{source.path} has changed since {path} was written"
    if problem:
        raise ValueError(
            f"{problem}; use another --output, or rename or delete {path} and {record}"
        )
    return progress


if __name__ == "__main__":
    os._exit(run(command, sys.argv[1:]))  # without waiting for batches that nobody needs
