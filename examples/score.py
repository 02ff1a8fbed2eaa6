"""Score every text of a corpus with GPT-2: its perplexity, on one core or on many machines.

    python examples/score.py texts.jsonl --model_size 124M --output scores.jsonl
    python examples/score.py texts.txt --workers 4
    python examples/score.py texts.jsonl --scheduler tcp://host:8786

The manual is examples/README.md. The data take this way through the file: each line of the input
becomes a Text, the ids of a Text become one or more Rows, and Rows of similar length become a
Batch. Threads or other processes score the batches. Output writes the results in order.
"""

import argparse
import bz2
import codecs
import collections
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

PROJECT = str(Path(__file__).resolve().parent.parent)
sys.path.insert(0, PROJECT)

import numpy as np

import gpt2
from encoder import Encoder
from utils import (
    UsageError,
    complain,
    find_model_dir,
    load_encoder_hparams_and_params,
    progress_bar,
    run_command,
)

BATCH_TOKENS = 512  # padding included: fewer are slower, more need more memory and are no faster
WINDOW_LINES = 2048  # texts are sorted by length within windows of this many lines
WINDOW_BYTES = 1 << 18  # or of this many bytes, if that is less
HEAD_BYTES = 1 << 16  # the beginning of the input, which shows its format
CHUNK_BYTES = 1 << 16
CONNECT_SECONDS = 10
RECORD_SUFFIX = ".run"
BYTE_ORDER_MARKS = {  # UTF-32 stands before UTF-16, because its first mark begins like UTF-16's
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


@dataclass(frozen=True)
class Job:
    """What the output depends on, besides the input. A run continues only with the same Job."""

    model: str  # its identity
    field: str | None  # of the text in JSON Lines; None for plain text
    context_field: str | None
    tokens: bool
    end: bool

    def our_fields(self) -> set[str]:
        """Return the names of the fields that the output may hold for this job."""
        names = {"n_tokens", "nats", "perplexity", "bits_per_byte", "error"}
        if self.context_field is not None:
            names.add("greedy")
        if self.tokens:
            names.update({"tokens", "token_nats"})
        if self.end:
            names.add("end_nats")
        return names


# The input


class OpenFiles(contextlib.ExitStack):
    """Files that are closed together, at the end of a with block."""

    def open(self, path: str, mode: str) -> Any:
        return self.enter_context(open(path, mode))


class Line(NamedTuple):
    number: int  # from 0
    content: bytes  # with its end
    position: int  # after this line in the file on disk


class Input:
    """The lines of a corpus and their encoding. Raises ValueError if the file is not text."""

    def __init__(self, path: str, open_files: OpenFiles):
        if path == "-":
            self.name = "standard input"
            self.raw: BinaryIO = sys.stdin.buffer
            self.file: Any = self.raw
        else:
            self.name = path
            self.raw = open_files.open(path, "rb")
            self.file = open_files.enter_context(decompressed(self.raw, path))
        self.encoding = "utf-8"
        self.head: list[bytes] = []  # the first lines
        first = self.read_line()
        for mark, encoding in BYTE_ORDER_MARKS.items():
            if first.startswith(mark):
                self.encoding = encoding
                first = self.read_line(first).removeprefix(mark)
                break
        n_bytes = 0
        for line in itertools.chain([first], iter(self.read_line, b"")):
            self.head.append(line)
            n_bytes += len(line)
            if n_bytes >= HEAD_BYTES:
                break
        self.check_head()

    def check_head(self) -> None:
        lines = [line for line in self.head if line.strip(b"\0\r\n \t")]
        n_valid = sum(is_text(line, self.encoding) for line in lines)
        has_nul = any(b"\0" in line for line in lines)
        is_mostly_invalid = has_nul and n_valid < len(lines) / 2
        if lines and (n_valid == 0 or is_mostly_invalid):
            encodings = "UTF-8, or UTF-16 or UTF-32 with a byte order mark"
            raise ValueError(f"{self.name} is not text in {encodings}")

    def read_line(self, line: bytes = b"") -> bytes:
        """Read a line with its end, or the rest of a line. In UTF-16 not each byte 10 ends one."""
        newline = "\n".encode(self.encoding)
        try:
            while True:
                line += self.file.read(-len(line) % len(newline))  # up to a whole character
                if line.endswith(newline):
                    return line
                piece = self.file.readline()
                if not piece:
                    return line
                line += piece
        except Exception as error:  # each compression has its own kinds
            if isinstance(error, OSError) and error.errno:
                raise
            raise ValueError(f"{self.name} is damaged: {error}") from None

    def lines(self) -> Iterator[Line]:
        n_bytes = 0
        contents = itertools.chain(filter(None, self.head), iter(self.read_line, b""))
        for number, content in enumerate(contents):
            n_bytes += len(content)
            position = n_bytes if self.file is self.raw else self.raw.tell()
            yield Line(number, content, position)

    def is_json_lines(self) -> bool:
        """Decide by the name, or else by the first character that is not white space."""
        name = self.name.lower()
        for suffix in (".gz", ".bz2", ".xz", ".zst"):
            name = name.removesuffix(suffix)
        if name.endswith((".json", ".jsonl", ".ndjson")):
            return True
        beginning = b"".join(self.head).decode(self.encoding, "replace").lstrip()
        return not name.endswith(".txt") and beginning.startswith("{")

    def size(self) -> int | None:
        """Return the size of the file on disk, or None if it is empty or standard input."""
        if self.raw is sys.stdin.buffer:
            return None
        return os.fstat(self.raw.fileno()).st_size or None


def decompressed(file: BinaryIO, path: str) -> Any:
    """Return a file that reads the decompressed content of another, by the suffix of its name."""
    suffix = os.path.splitext(path.lower())[1]
    if suffix == ".gz":
        return gzip.open(file)
    if suffix == ".bz2":
        return bz2.open(file)
    if suffix == ".xz":
        return lzma.open(file)
    if suffix == ".zst":
        return io.BufferedReader(ZstdFile(file))
    return file


class ZstdFile(io.RawIOBase):
    """Decompress a file. zstandard's own reader takes a truncated file for a complete one."""

    def __init__(self, file: BinaryIO):
        try:
            import zstandard
        except ImportError:
            message = "reading a .zst file needs zstandard: pip install zstandard"
            raise ImportError(message) from None
        self.file = file
        self.new_frame = zstandard.ZstdDecompressor().decompressobj
        self.frame: Any = None
        self.compressed = b""
        self.content = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.content:
            self.compressed = self.compressed or self.file.read(CHUNK_BYTES)
            if self.compressed:
                self.decompress()
            elif self.frame:
                raise EOFError("it ends too early")
            else:
                return 0
        n_bytes = min(len(buffer), len(self.content))
        buffer[:n_bytes] = self.content[:n_bytes]
        self.content = self.content[n_bytes:]
        return n_bytes

    def decompress(self) -> None:
        """Decompress what was read, up to the end of its frame: a file may hold several."""
        self.frame = self.frame or self.new_frame()
        self.content = memoryview(self.frame.decompress(self.compressed))
        self.compressed = b""
        if self.frame.eof:
            self.compressed = self.frame.unused_data
            self.frame = None


def windows(lines: Iterable[Line]) -> Iterator[list[Line]]:
    """Group lines: WINDOW_LINES of them, or as many as have WINDOW_BYTES."""
    window = []
    n_bytes = 0
    for line in lines:
        window.append(line)
        n_bytes += len(line.content)
        if len(window) == WINDOW_LINES or n_bytes >= WINDOW_BYTES:
            yield window
            window = []
            n_bytes = 0
    if window:
        yield window


# The model


@dataclass(frozen=True)
class Model:
    """A model, its folder and mapped files, and its identity.

    The identity is a digest of all that the scores depend on.
    """

    encoder: Encoder
    hparams: dict[str, int]
    params: dict[str, Any]
    identity: str
    folder: str
    files: dict[str, list[int]]

    def is_unchanged(self) -> bool:
        """Tell whether the mapped files are still those that were loaded."""
        return self.files == weight_files(self.folder)

    @property
    def start_ids(self) -> list[int]:
        """The ids that go before a text without a context."""
        if self.encoder.first_ids or self.encoder.start_id is None:
            return self.encoder.first_ids
        return [self.encoder.start_id]

    @property
    def end_id(self) -> int:
        """The id that ends a text: if there are several, the one that also starts texts."""
        if self.encoder.start_id in self.encoder.end_ids:
            return self.encoder.start_id
        return min(self.encoder.end_ids)


LOAD_LOCK = threading.Lock()


def load(model_size: str, models_dir: str, identity: str | None = None) -> Model:
    """Load the model, once per process; again if its files changed or the identity differs.

    Raises ValueError if the identity differs even then.
    """
    with LOAD_LOCK:
        model = read_model(model_size, models_dir)
        if not model.is_unchanged() or identity not in (None, model.identity):
            read_model.cache_clear()
            model = read_model(model_size, models_dir)
    if identity not in (None, model.identity):
        raise ValueError(f"{model.folder} holds another model than this run began with")
    return model


@functools.lru_cache(maxsize=1)
def read_model(model_size: str, models_dir: str) -> Model:
    folder = find_model_dir(model_size, models_dir)
    files = weight_files(folder)
    encoder, hparams, params = load_encoder_hparams_and_params(model_size, models_dir)
    if encoder.start_id is None and not encoder.first_ids:
        raise ValueError("the vocabulary has no <|endoftext|>, which goes before each text")
    digest = hashlib.sha256()
    for value in (hparams, vocabulary(encoder), params):
        add_to_digest(digest, value)
    return Model(encoder, hparams, params, digest.hexdigest(), folder, files)


def weight_files(folder: str) -> dict[str, list[int]]:
    """Return the size, times and inode of each file with weights.

    The weights are mapped: if a file is overwritten, those in memory change, too.
    """
    files = {}
    for pattern in ("*.data-*", "*.safetensors"):
        for path in sorted(glob.glob(os.path.join(glob.escape(folder), pattern))):
            status = os.stat(path)
            files[path] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    return files


def vocabulary(encoder: Encoder) -> dict[str, Any]:
    """Return what decides how an Encoder encodes."""
    names = ("encoder", "bpe_ranks", "ignore_merges", "special_tokens", "added_tokens")
    names += ("add_prefix_space", "first_ids", "unknown_id", "start_id", "end_ids")
    return {name: repr(getattr(encoder, name)) for name in names}


def add_to_digest(digest: Any, value: Any) -> None:
    """Add nested dicts and lists of arrays, numbers and functions to a digest."""
    if isinstance(value, dict):
        for name in sorted(value):
            digest.update(f"{name}: ".encode())
            add_to_digest(digest, value[name])
    elif isinstance(value, list):
        for item in value:
            add_to_digest(digest, item)
    elif isinstance(value, np.ndarray):
        digest.update(f"{value.dtype} {value.shape} ".encode())
        digest.update(np.ascontiguousarray(value))
    else:
        digest.update(f"{getattr(value, '__name__', value)} ".encode())


# From a line to a Text


def is_text(line: bytes, encoding: str) -> bool:
    try:
        return "\0" not in decode(line, encoding)
    except ValueError:
        return False


def decode(line: bytes, encoding: str) -> str:
    """Decode a line and remove its end. Raises ValueError with a reason."""
    name = encoding[:6].upper()  # without the order of the bytes
    try:
        text = line.decode(encoding)
    except UnicodeDecodeError as error:
        reason = f"invalid {name}: {error.reason} at byte {error.start}"
        raise ValueError(reason) from None
    if text.count("\0") > 0.4 * len(text):  # UTF-16 without a mark is valid UTF-8
        raise ValueError(f"invalid {name}: too many NUL characters")
    return text.removesuffix("\n").removesuffix("\r")


@dataclass
class Parsed:
    """The content of a line. If there is an error, there is no text."""

    fields: dict[str, Any] = field(default_factory=dict)  # all others, copied to the output
    text: str = ""
    context: str = ""
    error: str | None = None


def parse(line: bytes, encoding: str, job: Job) -> Parsed:
    """Parse a line of the input."""
    parsed = Parsed()
    try:
        content = decode(line, encoding)
        if job.field is None:
            parsed.text = content
        else:
            parse_json(content, job, parsed)
    except RecursionError:
        parsed.error = "invalid JSON: too deeply nested"
    except json.JSONDecodeError as error:
        parsed.error = f"invalid JSON: {error}"
    except ValueError as error:
        parsed.error = str(error)
    return parsed


def parse_json(content: str, job: Job, parsed: Parsed) -> None:
    document = json.loads(content)
    if not isinstance(document, dict):
        raise ValueError("the line is not a JSON object")
    names = job.our_fields() | {job.field, job.context_field}
    others = {name: value for name, value in document.items() if name not in names}
    json.dumps(others, allow_nan=False)  # Python also reads NaN and Infinity, which JSON forbids
    parsed.fields = others
    assert job.field is not None
    parsed.text = string_field(document, job.field)
    if job.context_field is not None:
        parsed.context = string_field(document, job.context_field)


def string_field(document: dict, name: str) -> str:
    """Return a field of a JSON object. Raises ValueError unless it is a string."""
    if name not in document:
        raise ValueError(f"no field {json.dumps(name)}")
    if not isinstance(document[name], str):
        raise ValueError(f"{json.dumps(name)} is not a string")
    return document[name]


@dataclass(eq=False)
class Row:
    """Ids for the model, which predicts the last n_targets of them."""

    ids: list[int]
    n_targets: int
    is_written: bool = False  # by an earlier run; it may still be needed to fill a batch
    scores: "Scores | None" = None


@dataclass(eq=False)
class Text:
    """A line of the input on its way to the output."""

    line: Line
    is_written: bool  # by an earlier run
    parsed: Parsed
    ids: list[int] = field(default_factory=list)  # of the text, without what stands before it
    rows: list[Row] = field(default_factory=list)

    def is_scored(self) -> bool:
        return all(row.scores is not None for row in self.rows)


def to_text(line: Line, is_written: bool, encoding: str, job: Job, model: Model) -> Text:
    """Parse and encode a line."""
    text = Text(line, is_written, parse(line.content, encoding, job))
    if text.parsed.error is None:
        try:
            encode(text, job, model)
        except ValueError as error:  # a character that the vocabulary lacks
            text.parsed.error = str(error)
    return text


def encode(text: Text, job: Job, model: Model) -> None:
    """Encode a text after its context by the rule of lm-evaluation-harness.

    White space at the end of the context belongs to the text, and both are encoded together.
    """
    parsed = text.parsed
    context = parsed.context.rstrip()
    parsed.text = parsed.context[len(context) :] + parsed.text
    context_ids = model.encoder.encode(context)
    text.ids = model.encoder.encode(context + parsed.text)[len(context_ids) :]
    if not context:
        context_ids = model.start_ids
    text.rows = to_rows(context_ids, text.ids, job.end, model)
    for row in text.rows:
        row.is_written = text.is_written


def to_rows(context_ids: list[int], ids: list[int], with_end: bool, model: Model) -> list[Row]:
    """Return the Rows for a text after its context, and for end-of-text after it."""
    n_ctx = model.hparams["n_ctx"]
    end = [model.end_id] if with_end else []
    if len(ids) > n_ctx:  # no context fits
        return split([*model.start_ids, *ids, *end], len(model.start_ids), n_ctx)
    whole = [*context_ids, *ids][-(n_ctx + 1) :]
    if len(whole) + len(end) <= n_ctx + 1:
        rows = [Row(whole + end, len(ids) + len(end))]
    else:  # the end gets a row of its own, so that it does not change the scores of the text
        rows = [Row(whole, len(ids)), Row(whole[-n_ctx:] + end, 1)]
    return [row for row in rows if row.n_targets]


def split(ids: list[int], n_context: int, n_ctx: int) -> list[Row]:
    """Split ids, of which all but the first n_context are scored, as `gpt2.log_probs` does."""
    n_window = max(n_ctx, 2)
    rows = []
    start = 0
    n_scored = n_context
    while n_scored < len(ids):
        window = ids[start : start + n_window]
        n_targets = start + len(window) - n_scored
        rows.append(Row(window, n_targets))
        n_scored += n_targets
        start += max(n_ctx // 2, 1)
    return rows


# Scoring


class Batch(NamedTuple):
    """Rows to score, and the model to score them with."""

    model_size: str
    models_dir: str
    identity: str
    ids: list[list[int]]  # of each row
    n_targets: list[int]  # of each row


class Scores(NamedTuple):
    """The scores of targets, one after another."""

    nats: np.ndarray  # float32: -log(p)
    is_likeliest: np.ndarray  # bool: no other token was more likely


def batches(texts: Iterable[Text]) -> Iterator[list[Row]]:
    """Group rows of similar length into batches of about BATCH_TOKENS, the longest first."""
    rows = [row for text in texts for row in text.rows]
    rows.sort(key=lambda row: len(row.ids), reverse=True)
    start = 0
    while start < len(rows):
        end = start + max(1, BATCH_TOKENS // (len(rows[start].ids) - 1))
        yield rows[start:end]
        start = end


@np.errstate(all="ignore")  # damaged parameters cause one error, not many warnings
def score(batch: Batch) -> Scores:
    """Score the rows of a batch. This runs in a thread of a worker, which loads the model itself.

    Raises ValueError if the model is not the batch's, or not intact.
    """
    model = load(batch.model_size, batch.models_dir, batch.identity)
    n_seq = max(len(ids) - 1 for ids in batch.ids)
    inputs = np.zeros((len(batch.ids), n_seq), np.int64)  # padded after the end, which is not seen
    for row, ids in zip(inputs, batch.ids, strict=True):
        row[: len(ids) - 1] = ids[:-1]
    targets = []
    with gpt2.one_blas_thread():
        states = gpt2.final_states(inputs, **model.params, n_head=model.hparams["n_head"])
        target_states = []
        for row, ids, n_targets in zip(states, batch.ids, batch.n_targets, strict=True):
            targets += ids[len(ids) - n_targets :]
            target_states.append(row[len(ids) - 1 - n_targets : len(ids) - 1])
        wte = model.params["wte"]
        found = gpt2.score_targets(np.concatenate(target_states), np.array(targets), wte)
    scores = Scores(-found.log_probs, found.is_likeliest)
    if not np.isfinite(scores.nats).all():
        raise ValueError("the logits are not finite: the parameters are damaged")
    if not model.is_unchanged():
        raise ValueError(f"the files of {batch.model_size} were changed during the run")
    return scores


def set_scores(rows: list[Row], scores: Scores) -> None:
    """Give each row its part of the scores of a batch."""
    start = 0
    for row in rows:
        part = slice(start, start + row.n_targets)
        row.scores = Scores(scores.nats[part], scores.is_likeliest[part])
        start += row.n_targets


# Where batches are scored


class Pool(NamedTuple):
    """Threads of this process, or the workers of Dask."""

    submit: Callable[[Batch], Future]
    count_slots: Callable[[], int]  # how many batches are scored at once


@contextlib.contextmanager
def threads(n_threads: int) -> Iterator[Pool]:
    executor = ThreadPoolExecutor(n_threads)
    try:
        yield Pool(functools.partial(executor.submit, score), lambda: n_threads)
    finally:
        executor.shutdown(wait=False, cancel_futures=True)


@contextlib.contextmanager
def dask_workers(n_workers: int | None, scheduler: str | None, n_threads: int) -> Iterator[Pool]:
    """Start a local Dask cluster of n_workers, or join the one of a scheduler."""
    try:
        import dask
        import distributed
    except ImportError:
        raise ImportError("--workers and --scheduler need Dask: pip install distributed") from None
    logging.disable()  # Dask logs tracebacks; one line is enough
    # Dask's default makes malloc return memory at once: a batch would take a quarter longer.
    dask.config.set({"distributed.nanny.pre-spawn-environ": {}})
    dask.config.set({"distributed.worker.profile.enabled": False})
    dask.config.set({"distributed.scheduler.allowed-failures": 20})
    with contextlib.ExitStack() as stack:
        try:
            if scheduler is None:
                scheduler = stack.enter_context(local_cluster(n_workers or 1, n_threads))
            client = stack.enter_context(distributed.Client(scheduler, timeout=CONNECT_SECONDS))
        except (OSError, RuntimeError) as error:
            raise ConnectionError(f"no connection to the Dask scheduler: {error}") from None
        count_slots = functools.partial(count_worker_threads, client)
        if not count_slots():
            complain("score.py", "the scheduler has no workers yet; waiting for them")
        submit = functools.partial(client.get_executor(pure=False).submit, score_remotely, PROJECT)
        lost = (
            CancelledError,
            distributed.TimeoutError,
            distributed.client.ClosedClientError,
            distributed.comm.CommClosedError,
        )
        try:
            yield Pool(submit, count_slots)
        except lost:
            raise ConnectionError("no connection to the Dask scheduler") from None
        except (RuntimeError, distributed.KilledWorker) as error:
            raise ConnectionError(f"Dask failed: {error}") from None


def local_cluster(n_workers: int, n_threads: int) -> Any:
    """Start workers, each with its share of the threads."""
    import distributed

    return distributed.LocalCluster(
        n_workers=n_workers,
        threads_per_worker=max(1, n_threads // n_workers),
        memory_limit=0,  # the mapped checkpoint would count for each worker
        preload=["import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)"],  # it is for us
        dashboard_address="127.0.0.1:0",  # any free port
        silence_logs="CRITICAL",
    )


def count_worker_threads(client: Any) -> int:
    """Return the number of threads of all workers."""
    from distributed import TimeoutError  # in Python 3.10, this is not an OSError

    try:
        return sum(client.nthreads().values())
    except (OSError, TimeoutError) as error:
        raise ConnectionError(f"no connection to the Dask scheduler: {error}") from None


def score_remotely(project: str, batch: Batch) -> Scores:
    """Call `score` on a Dask worker. Dask sends this function as code, not as a name to import."""
    if project not in sys.path:
        sys.path.insert(0, project)
    try:
        from examples import score as this_file  # when imported, its cache of the model lasts

        return this_file.score(batch)
    except (ValueError, OSError, ImportError) as error:
        from distributed import get_worker

        raise ValueError(f"worker {get_worker().address}: {error}") from None


class Running(NamedTuple):
    rows: list[Row]
    future: Future


def scored_texts(
    text_windows: Iterable[list[Text]],
    pool: Pool,
    to_batch: Callable[[list[Row]], Batch],
) -> Iterator[Text]:
    """Score the texts that are not written yet -> iterator over them, in order.

    As many batches are under way as keep all slots of the pool busy.
    """
    waiting: collections.deque[Text] = collections.deque()
    running: collections.deque[Running] = collections.deque()

    def finished(max_running: int) -> Iterator[Text]:
        """Wait until at most max_running batches are left, then yield the complete texts."""
        while len(running) > max_running:
            oldest = running.popleft()
            set_scores(oldest.rows, oldest.future.result())
        while waiting and waiting[0].is_scored():
            yield waiting.popleft()

    for texts in text_windows:
        max_running = 4 * max(1, pool.count_slots())
        waiting.extend(text for text in texts if not text.is_written)
        for rows in batches(texts):
            if not all(row.is_written for row in rows):
                running.append(Running(rows, pool.submit(to_batch(rows))))
                yield from finished(max_running)
        if len(waiting) >= max_running * BATCH_TOKENS:  # lines without a text fill no batch
            max_running = 0
        yield from finished(max_running)
    yield from finished(0)


# The output


def output_line(text: Text, job: Job, encoder: Encoder) -> bytes:
    """Return the line of the output for a text that is scored."""
    fields = dict(text.parsed.fields)
    if text.parsed.error is None:
        fields |= figures(text, job, encoder)
    else:
        fields["error"] = text.parsed.error
    return (json.dumps(fields) + "\n").encode()


def figures(text: Text, job: Job, encoder: Encoder) -> dict[str, Any]:
    n_tokens = len(text.ids)
    empty = Scores(np.empty(0, np.float32), np.empty(0, bool))
    all_scores = [row.scores or empty for row in text.rows] or [empty]
    nats = np.concatenate([scores.nats for scores in all_scores])
    total = rounded(nats[:n_tokens].sum(dtype=np.float64))
    result = {"n_tokens": n_tokens, "nats": total, "perplexity": None, "bits_per_byte": None}
    if n_tokens:
        n_bytes = len(text.parsed.text.encode("utf-8", "surrogatepass"))
        result["bits_per_byte"] = float(f"{total / math.log(2) / n_bytes:.8g}")
        if total / n_tokens < 700:  # else it is too large for a float
            result["perplexity"] = float(f"{math.exp(total / n_tokens):.8g}")
    if job.context_field is not None:
        is_likeliest = np.concatenate([scores.is_likeliest for scores in all_scores])
        result["greedy"] = bool(is_likeliest[:n_tokens].all())
    if job.end:
        result["end_nats"] = rounded(nats[-1])
    if job.tokens:
        result["tokens"] = [token_text(token_id, encoder) for token_id in text.ids]
        result["token_nats"] = [rounded(each) for each in nats[:n_tokens]]
    return result


def rounded(nats: float) -> float:
    return round(float(nats), 6) + 0.0  # turns -0.0 into 0.0


def token_text(token_id: int, encoder: Encoder) -> str:
    """Return a token as text, with parts of a character as in `look`: \\xf0."""
    return encoder.decode_bytes([token_id]).decode("utf-8", "backslashreplace")


class Output:
    """The lines that are written, and a record beside them that tells what they belong to.

    The first line of the record is the Job. Then each line of the output has 8 hexadecimal digits:
    the beginning of a digest of the lines of the input and of the output up to there. Without the
    record, the lines of an earlier run are scored again and compared.
    """

    def __init__(self, path: str, job: Job, open_files: OpenFiles):
        self.path = path
        self.job = job
        self.open_files = open_files
        self.digest = hashlib.blake2b()
        self.new_entries: list[bytes] = []  # of the record, until it is opened for writing
        self.n_lines = 0
        self.n_bytes = 0
        self.n_errors = 0
        self.earlier = b""  # the next line of an earlier run, perhaps torn
        self.record: Any = None
        self.is_started = False
        self.is_file = path != "-" and (os.path.isfile(path) or not os.path.exists(path))
        if path == "-":
            self.file: BinaryIO = sys.stdout.buffer
        else:
            self.file = open_files.open(path, "a+b" if self.is_file else "ab")
        if self.is_file:
            self.file.seek(0)
            self.earlier = self.file.readline()
        if self.earlier and os.path.isfile(path + RECORD_SUFFIX):
            self.record = open_files.open(path + RECORD_SUFFIX, "r+b")
            self.check_job(self.record.readline())

    def check_job(self, header: bytes) -> None:
        try:
            earlier = dict(json.loads(header))
        except (ValueError, TypeError):
            raise self.refusal(f"{self.path}{RECORD_SUFFIX} is damaged") from None
        for name, value in asdict(self.job).items():
            if earlier.get(name) != value:
                what = "another model" if name == "model" else f"another --{name}"
                raise self.refusal(f"{self.path} was written with {what}")

    def refusal(self, problem: str) -> ValueError:
        return ValueError(f"{problem}; use another --output")

    def check(self, line: Line) -> bool:
        """Tell whether an earlier run wrote the result of this line.

        Raises ValueError if it wrote the result of another line.
        """
        if self.record is None or not self.earlier.endswith(b"\n"):
            return False
        if self.record.readline() != self.entry(line, self.earlier):
            raise self.refusal(f"line {line.number + 1} of {self.path} is for another input")
        self.pass_over()
        return True

    def entry(self, line: Line, result: bytes) -> bytes:
        """Return the line of the record for a line of the input and its line of the output."""
        self.digest.update(line.content.rstrip(b"\0\r\n"))
        self.digest.update(b"\n")
        self.digest.update(result)
        return self.digest.hexdigest()[:8].encode() + b"\n"

    def pass_over(self) -> None:
        """Go to the next line of the earlier run."""
        self.count(self.earlier)
        self.earlier = self.file.readline()

    def count(self, result: bytes) -> None:
        self.n_lines += 1
        self.n_bytes += len(result)
        if result.endswith(b'"}\n'):  # only the line of an error ends with a string
            self.n_errors += 1

    def write(self, line: Line, result: bytes) -> None:
        """Write a line. If an earlier run left no record, compare its line instead."""
        if self.earlier.endswith(b"\n"):
            if result != self.earlier:
                place = f"line {line.number + 1} of {self.path}"
                raise self.refusal(f"{place} is for another input or model")
            self.new_entries.append(self.entry(line, result))
            self.pass_over()
            return
        if not self.is_started:
            self.start(result)
        if self.record is not None:
            self.record.write(self.entry(line, result))
            self.record.flush()
        self.file.write(result)
        self.file.flush()
        self.count(result)

    def start(self, result: bytes = b"") -> None:
        """Remove an incomplete last line, and open the record. result: the complete line."""
        head = result.partition(b', "nats"')[0]  # the figures may differ in their last digits
        if not self.earlier.startswith(head) and not head.startswith(self.earlier):
            raise self.refusal(f"the last line of {self.path} is for another input")
        if self.earlier:
            self.file.truncate(self.n_bytes)
            self.earlier = b""
        if self.record is not None:
            self.record.truncate(self.record.tell())
        elif self.is_file:
            self.record = self.open_files.open(self.path + RECORD_SUFFIX, "wb")
            header = json.dumps(asdict(self.job)) + "\n"
            self.record.writelines([header.encode(), *self.new_entries])
        self.is_started = True

    def finish(self) -> None:
        """Check that an earlier run did not write more."""
        if self.earlier:
            raise self.refusal(f"{self.path} has more lines than the input")
        if self.new_entries and not self.is_started:
            self.start()


# The command line


def read_texts(
    source: Input, output: Output, job: Job, model: Model, bar: Any
) -> Iterator[list[Text]]:
    """Read windows of texts. Those that an earlier run has written are passed over."""
    for window in windows(source.lines()):
        are_written = [output.check(line) for line in window]
        if all(are_written):
            # What an earlier run has written does not count for the estimated time.
            position = window[-1].position
            bar.n = bar.initial = bar.last_print_n = position
            continue
        yield [
            to_text(line, is_written, source.encoding, job, model)
            for line, is_written in zip(window, are_written, strict=True)
        ]


def write_texts(
    texts: Iterable[Text], output: Output, job: Job, encoder: Encoder, bar: Any
) -> None:
    """Write the texts and show the progress."""
    n_tokens = 0
    start = time.monotonic()
    for text in texts:
        output.write(text.line, output_line(text, job, encoder))
        n_tokens += len(text.ids)
        speed = n_tokens / max(time.monotonic() - start, 1e-3)
        progress = f"{text.line.number + 1:,} texts, {speed:,.0f} tokens/s"
        bar.set_postfix_str(progress, refresh=False)
        bar.update(max(0, text.line.position - bar.n))
    output.finish()


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UsageError(f"{message} (--help lists the options)")


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    summary = "Score every text of a corpus with GPT-2. examples/README.md is the manual."
    parser = Parser("score.py", description=summary, allow_abbrev=False)
    add = parser.add_argument
    add("input", help="JSON Lines, or plain text with one text a line; - is standard input")
    add("--output", default="-", help="continued if it exists (default: standard output)")
    add("--field", help='the field of the text in JSON Lines (default: "text")')
    add("--context_field", help="the field of a context in JSON Lines, which is not scored")
    add("--tokens", action="store_true", help="also write each token and its nats")
    add("--end", action="store_true", help="also write the nats of the end of each text")
    add("--model_size", default="124M", help="the model's folder in models_dir (default: 124M)")
    add("--models_dir", default="models", help="the folder of the models (default: models)")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--workers", type=int, metavar="N", help="start N processes (needs Dask)")
    group.add_argument("--scheduler", metavar="ADDRESS", help="use the workers of tcp://host:8786")
    options = parser.parse_args(arguments)
    if options.workers is not None and options.workers < 1:
        raise UsageError(f"--workers must be 1 or more, got {options.workers}")
    if options.context_field is not None and options.context_field == (options.field or "text"):
        raise UsageError("--context_field and --field must be different fields")
    return options


def make_job(options: argparse.Namespace, source: Input, model: Model) -> Job:
    text_field = options.field
    if text_field is None and (options.context_field is not None or source.is_json_lines()):
        text_field = "text"
    if options.end and not model.encoder.end_ids:
        raise ValueError("--end: the vocabulary has no token for the end of a text")
    return Job(model.identity, text_field, options.context_field, options.tokens, options.end)


def count_threads() -> int:
    """Return OMP_NUM_THREADS, or else the number of cores for this process."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdecimal() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def run(options: argparse.Namespace, open_files: OpenFiles) -> Output:
    """Score the input. open_files keeps the files that this opens."""
    source = Input(options.input, open_files)
    models_dir = os.path.abspath(options.models_dir)  # workers may run in another folder
    model = load(options.model_size, models_dir)
    job = make_job(options, source, model)
    output = Output(options.output, job, open_files)

    def to_batch(rows: list[Row]) -> Batch:
        ids = [row.ids for row in rows]
        n_targets = [row.n_targets for row in rows]
        return Batch(options.model_size, models_dir, model.identity, ids, n_targets)

    if options.workers or options.scheduler:
        workers = dask_workers(options.workers, options.scheduler, count_threads())
    else:
        workers = threads(count_threads())
    bar_format = "{l_bar}{bar}| {elapsed}<{remaining}{postfix}"
    with workers as pool, progress_bar(total=source.size(), bar_format=bar_format) as bar:
        windows_of_texts = read_texts(source, output, job, model, bar)
        texts = scored_texts(windows_of_texts, pool, to_batch)
        write_texts(texts, output, job, model.encoder, bar)
    return output


def command(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    try:
        with OpenFiles() as open_files:
            output = run(options, open_files)
    except KeyboardInterrupt:
        hint = "" if options.output == "-" else "; the same command continues"
        complain("score.py", f"interrupted{hint}")
        raise
    if output.n_errors:
        complain("score.py", f"{output.n_errors} of {output.n_lines} texts could not be scored")
        return 1
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line -> exit status."""
    return run_command("score.py", command, sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    os._exit(main())  # without waiting for batches that nobody needs
