"""examples/score.py with a small random model: figures, kinds of input, continuing, Dask."""

import contextlib
import errno
import functools
import gzip
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import (
    DATA_DIR,
    ROOT,
    SMALL_HPARAMS,
    bash,
    float64_gpt2,
    load,
    random_params,
    tiktoken_encoding,
    write_model,
)
from make_score_reference import N_CTX, expected

import fast
import terminal
from examples import score

WORDS = ["the", "and", "there", "in", "another", "range", "of", "inner", "é", "漢字", "🙂"]
FIGURES = {"n_tokens", "nats", "perplexity", "bits_per_byte"}

# Models, inputs, runs


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with the models "small" and "other", which can be loaded without TensorFlow."""
    folder = tmp_path_factory.mktemp("models")
    load(write_model(folder / "small"))
    load(write_model(folder / "other", seed=1))
    yield folder
    if fast.blas():
        fast.blas().limit(limits=score.N_THREADS, user_api="blas")


@pytest.fixture
def run(models_dir, capfd):
    """run(words) -> (exit status, the lines of standard error), in this process"""

    def run_command(*words, model="small", models_dir=models_dir):
        words = [*words, "--models_dir", models_dir, "--model_size", model]
        capfd.readouterr()
        status = terminal.run(score.command, list(map(str, words)))
        return status, capfd.readouterr().err.splitlines()

    return run_command


@pytest.fixture
def score_rows(run, tmp_path):
    """score_rows(rows or bytes, options) -> the documents of the output"""

    def score_it(rows, *options, name="texts.jsonl"):
        path = tmp_path / name
        path.write_bytes(rows if isinstance(rows, bytes) else json_lines(rows))
        output = tmp_path / "scores.jsonl"
        status, _ = run(path, "--output", output, *options)
        documents = read_lines(output.read_bytes())
        assert status == any("error" in document for document in documents)
        return documents

    return score_it


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_lines(output):
    assert not output or output.endswith(b"\n")
    return [json.loads(line) for line in output.splitlines()]


def random_texts(n, seed=0, longest=30):
    """n texts of different lengths; some outgrow the context of 32 tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


def assert_one_line(result, status, *words):
    assert result[0] == status, result
    (line,) = result[1]
    assert line.startswith("score.py: ")
    assert all(word in line for word in words), line


# Figures


@pytest.fixture(scope="module")
def encoding(models_dir):
    return tiktoken_encoding(models_dir, "small")


def predict(ids):
    logits = float64_gpt2(ids, random_params(SMALL_HPARAMS), SMALL_HPARAMS["n_head"])
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def assert_figures(document, wanted, text):
    """text: what counts for bits_per_byte"""
    nats = document["nats"]
    n_tokens = document["n_tokens"]
    np.testing.assert_allclose(document["token_nats"], wanted["token_nats"], atol=1e-4)
    assert n_tokens == len(wanted["token_nats"]) == len(document["tokens"])
    assert nats == pytest.approx(sum(wanted["token_nats"]), abs=1e-4 * N_CTX)
    assert document["end_nats"] == pytest.approx(wanted["end_nats"], abs=1e-4)
    means = [document["perplexity"], document["bits_per_byte"]]
    if n_tokens == 0:
        assert means == [None, None]
    else:
        assert means == approximate_means(nats, n_tokens, len(text.encode()))


def approximate_means(nats, n_tokens, n_bytes):
    """The perplexity and the bits per byte."""
    return pytest.approx([math.exp(nats / n_tokens), nats / math.log(2) / n_bytes], rel=1e-6)


def test_figures_of_texts_equal_a_computation_in_float64(score_rows, encoding):
    texts = [*random_texts(8), "the<|endoftext|>", "the " * 100]
    texts += [" the" * n for n in range(N_CTX - 1, N_CTX + 3)]  # where the end just fits, or not
    rows = [{"id": i, "text": text, "nats": "?"} for i, text in enumerate(texts)]
    for row, document in zip(rows, score_rows(rows, "--end", "--tokens"), strict=True):
        wanted = expected("", row["text"], encoding.encode_ordinary, predict)
        assert_figures(document, wanted, row["text"])
        assert document["id"] == row["id"]


def test_texts_after_contexts_are_scored_as_by_transformers(score_rows):
    rows = list(map(json.loads, (DATA_DIR / "score.json").read_text().splitlines()))
    assert 20 < sum(row["greedy"] for row in rows) < len(rows) - 100
    inputs = [{"before": row["context"], "nats": row["text"], "text": 1} for row in rows]
    options = ["--field", "nats", "--context_field", "before", "--tokens", "--end"]
    for document, row in zip(score_rows(inputs, *options), rows, strict=True):
        context = row["context"]
        assert_figures(document, row, context[len(context.rstrip()) :] + row["text"])
        assert (document["greedy"], document["text"]) == (row["greedy"], 1)


def test_a_field_without_a_name(score_rows, encoding):
    options = ["--field=", "--context_field=text", "--end", "--tokens"]
    (document,) = score_rows([{"": " and", "text": "the"}], *options)
    assert_figures(document, expected("the", " and", encoding.encode_ordinary, predict), " and")


def test_a_token_with_parts_of_context_and_text_is_an_error(score_rows):
    """The rule would give the first text no token: 0 nats, and always greedy."""
    pairs = {" t": "he", " an": "d the", "th": "e", "the": " he", "he": ""}
    rows = [{"context": context, "text": text} for context, text in pairs.items()]
    *merged, apart, empty = score_rows(rows, "--context_field", "context")
    for number, document in enumerate(merged, 1):
        assert document.keys() == {"error"}
        assert re.match(f"line {number}: .*both context and text", document["error"])
    assert (apart["n_tokens"], empty["n_tokens"]) == (2, 0)


def test_special_tokens(score_rows, encoding):
    row = {"context": "the<|endoftext|>", "text": " and<|endoftext|>in"}
    options = ["--special_tokens", "--context_field", "context", "--end", "--tokens"]
    (document,) = score_rows([row], *options)
    encode = functools.partial(encoding.encode, allowed_special="all")
    assert_figures(document, expected(*row.values(), encode, predict), row["text"])
    assert document["tokens"] == [" and", "<|endoftext|>", "in"]


# Kinds of input

PLAIN = b"\xef\xbb\xbfthe\r\n\n\xff\nNaN\nand\rthe\n\xe2\x80\xa8\n{the\nt\0h\0"
PLAIN_TEXTS = ["the", "", 3, "NaN", "and\rthe", "\u2028", "{the", 8]
ROWS = b'\xef\xbb\xbf\n  {"text": "the"}\n{"text": "\xe0\xa9\x81\xc4\x80 \xf0\x9f\x99\x82"}\r\nnull'
ROW_TEXTS = [1, "the", "\u0a41\u0100 🙂", 4]
INPUTS = [  # the name, the content, and of each line the text or the number of a line with an error
    ("texts.jsonl", b"", []),
    ("texts", PLAIN, PLAIN_TEXTS),
    ("texts.TXT.gz", gzip.compress(PLAIN), PLAIN_TEXTS),
    ("texts", ROWS, ROW_TEXTS),
    ("texts.gz", gzip.compress(ROWS[:30]) + gzip.compress(ROWS[30:]), ROW_TEXTS),
    ("texts", b"\n" * 9000 + b'{"text": "the"}', [*range(1, 9001), "the"]),
    ("texts.jsonl", b"[]\n", [1]),
    ("texts.txt", b'{"text": "the"}', ['{"text": "the"}']),
    ("utf-16.txt", "the\n漢字\n".encode("utf-16"), [1, 2, 3]),
]


@pytest.mark.parametrize(("name", "content", "texts"), INPUTS)
def test_the_lines_of_an_input(score_rows, name, content, texts):
    for document, text in zip(score_rows(content, "--tokens", name=name), texts, strict=True):
        if isinstance(text, int):
            assert document["error"].startswith(f"line {text}: ")
        else:  # the small vocabulary has no characters of several bytes
            shown = text.encode().decode("ascii", "backslashreplace")
            assert "".join(document["tokens"]) == shown


def test_a_damaged_input(run, tmp_path):
    for content in (gzip.compress(b"the rain\n" * 9)[:-7], b"the rain"):
        (tmp_path / "texts.gz").write_bytes(content)
        assert_one_line(run(tmp_path / "texts.gz"), 1, "texts.gz is damaged")


def test_other_compressions_are_piped(run):
    for suffix, program in {"bz2": "bzip2", "xz": "xz", "zst": "zstd"}.items():
        pipe = f"{program} -dc x.{suffix} | python examples/score.py -"
        assert_one_line(run(f"x.{suffix}"), 1, pipe)


HOSTILE = [  # line, part of the error or None, fields that are kept
    (b'{"text": "\\ud800 the", "tag": "\\udfff"}', None, {"tag": "\udfff"}),
    (b'{"text": "the", "error": 1, "nats": [2], "tokens": 3}', None, {}),
    (b'{"text": "the", "big": 12345678901234567890}', None, {"big": 12345678901234567890}),
    (b'  {"text": "the"}  \r', None, {}),
    (b"   ", "invalid JSON", {}),
    (b'{"text": "a\x00b"}', "NUL", {}),
    (b'\xff\xfe{\x00"\x00', "not UTF-8", {}),
    (b'{"text": "the", "x": NaN}', "JSON", {}),
    (b'{"text": "the", "x": ' + b"9" * 5000 + b"}", "digits", {}),
    (b'{"text": ' + b"[" * 200_000, "recursion", {}),
    (b'{"id": 6, "text": null, "nats": 3}', '"text"', {"id": 6}),
    (b'{"text": "' + b"the " * 5000 + b'"}', None, {}),
]


def test_hostile_lines(score_rows):
    documents = score_rows(b"\n".join(line for line, _, _ in HOSTILE))
    for number, (document, hostile) in enumerate(zip(documents, HOSTILE, strict=True), 1):
        _, error, kept = hostile
        assert set(document) - set(kept) == (FIGURES if error is None else {"error"})
        assert kept.items() <= document.items()
        if error:
            assert document["error"].startswith(f"line {number}: ")
            assert error in document["error"]


def test_the_summary_counts_all_texts(run, tmp_path):
    (tmp_path / "texts.jsonl").write_bytes(json_lines([{"text": "the rain"}, {}, {"text": "in"}]))
    output = tmp_path / "scores.jsonl"
    for _ in range(2):  # the second run finds all of them written
        status, (line,) = run(tmp_path / "texts.jsonl", "--output", output)
        first, _, last = read_lines(output.read_bytes())
        n_tokens = first["n_tokens"] + last["n_tokens"]
        means = approximate_means(first["nats"] + last["nats"], n_tokens, 10)
        numbers = r"perplexity: (\d+\.\d+), bits per byte: (\d+\.\d+)"
        summary = (
            f"score.py: texts: 3, tokens: {n_tokens}, {numbers}, errors: 1, the first in line 2"
        )
        found = re.fullmatch(summary, line).groups()
        assert status == 1
        assert list(map(float, found)) == means


# Errors


@pytest.mark.parametrize(
    ("words", "status", "parts"),
    [
        (["x.txt", "--workers", "0"], 2, ["--workers", "from 1 to 1000"]),
        (["x.txt", f"--workers={2**70}"], 2, ["--workers", "from 1 to 1000"]),
        ([ROOT / "LICENSE", "--context_field", "text"], 2, ["--context_field", "--field"]),
        ([ROOT / "LICENSE", "--context_field=", "--field="], 2, ["--context_field", "--field"]),
        ([ROOT / "LICENSE", "--output", "/dev/full"], 1, ["No space left"]),
        ([ROOT / "LICENSE", "--workers", "1"], 1, ["pip install distributed"]),
    ],
)
def test_errors(run, monkeypatch, words, status, parts):
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if it were not installed
    assert_one_line(run(*words), status, *parts)


def test_a_model_that_is_damaged(run, tmp_path):
    (tmp_path / "texts.txt").write_text("the")
    write_model(tmp_path / "small", extra={"model/ln_f/b": np.full(12, np.nan, np.float32)})
    assert_one_line(run(tmp_path / "texts.txt", models_dir=tmp_path), 1, "finite")


# Windows and batches


@pytest.mark.parametrize(
    ("n_embd", "n_layer", "line", "n_texts"),
    [
        (768, 12, "the and", 11_800 / 4),  # each text has 4 ids, of which the first is its start
        (1600, 48, "the and", 680 / 4),
        (12, 2, "the and", (1 << 16) / 4),
        (12, 2, " " * 100_000, 6),  # long lines need memory
    ],
)
def test_a_window_is_20_seconds_of_work_or_less(n_embd, n_layer, line, n_texts, models_dir):
    """124M scores 600 to 900 tokens a second on two cores, 1558M a twelfth of that."""
    hparams = {"n_ctx": 1024, "n_embd": n_embd, "n_layer": n_layer}
    model = score.load("small", str(models_dir))._replace(hparams=hparams)
    job = score.Job("", "text" if line.isspace() else None, None, False, False, False)
    source = score.Input("texts", None, iter([line.encode()] * 99_999))
    assert len(score.read_texts(source, job, model)) == pytest.approx(n_texts, 0.01)


def test_the_bar_advances_with_every_batch(run, tmp_path, monkeypatch):
    path = tmp_path / "texts.txt"
    path.write_bytes(b"the and in\n" * 2000)
    bar = Mock(n=0)
    bar.update.side_effect = lambda n: setattr(bar, "n", bar.n + n)
    progress_bar = Mock(return_value=contextlib.nullcontext(bar))
    monkeypatch.setattr(score, "progress_bar", progress_bar)
    monkeypatch.setattr(score, "WINDOW_TOKENS", 2048)
    assert run(path)[0] == 0
    steps = [call.args[0] for call in bar.update.call_args_list]
    assert len(steps) >= 2000 * 4 / 512  # of at most 512 tokens each
    assert min(steps) > 0
    assert max(steps) < path.stat().st_size / 10
    assert sum(steps) == pytest.approx(path.stat().st_size)
    assert progress_bar.call_args.kwargs["total"] == path.stat().st_size


# Continuing

LINE_BYTES = 4096
WINDOW = score.WINDOW_TOKENS * score.BYTES_PER_TOKEN // LINE_BYTES  # lines of the corpus
N_TEXTS = 3 * WINDOW - 30


@contextlib.contextmanager
def started(command, **kwargs):
    """A process that ends with the block at the latest."""
    with subprocess.Popen(list(map(str, command)), **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


def start(models_dir, *words, env=(), **kwargs):
    """Start score.py as a file, from another folder, with one thread."""
    options = ["--models_dir", models_dir, "--model_size", "small"]
    command = [sys.executable, ROOT / "examples" / "score.py", *words, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env)
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": models_dir}
    return started(command, env=environment, **pipes | kwargs)


def feed(process, content):
    process.stdin.write(content)
    process.stdin.flush()


def wait_for(condition):
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def size(path):
    return path.stat().st_size if path.exists() else 0


@pytest.fixture(scope="module")
def corpus(models_dir, tmp_path_factory):
    """(path of an input of three windows, its undisturbed output)"""
    path = tmp_path_factory.mktemp("corpus") / "texts.jsonl"
    texts = random_texts(N_TEXTS - 1, seed=2, longest=8)
    texts[0] = texts[WINDOW + 9] = "the " * 100
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    lines = [f"{line[:-1]:<{LINE_BYTES - 2}}}}\n" for line in lines]
    path.write_text("".join([*lines, "no JSON\n"]))
    output = path.with_name("scores.jsonl")
    words = [path, "--output", output, "--models_dir", models_dir, "--model_size", "small"]
    assert terminal.run(score.command, list(map(str, words))) == 1
    whole = output.read_bytes()
    assert [line.get("id") for line in read_lines(whole)] == [*range(N_TEXTS - 1), None]
    return path, whole


@pytest.fixture
def written(corpus, tmp_path):
    """(path of the input, of its output, of its record), to be changed"""
    names = ("texts.jsonl", "scores.jsonl", "scores.jsonl.run")
    return [shutil.copy(corpus[0].with_name(name), tmp_path / name) for name in names]


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        (signal.SIGKILL, []),
        (signal.SIGINT, []),
        pytest.param(signal.SIGINT, ["--workers", "2"], marks=pytest.mark.slow),
    ],
)
def test_interruptions_at_random_points(models_dir, run, corpus, tmp_path, how, workers):
    path = tmp_path / "texts.jsonl"
    path.write_bytes(2 * corpus[0].read_bytes())
    output = tmp_path / "scores.jsonl"
    target = random.randint(1, len(corpus[1]))
    words = ["-", "--output", output, *workers]
    with start(models_dir, *words, start_new_session=True) as process:
        feed(process, path.read_bytes()[:-100])
        wait_for(lambda: size(output) >= target)
        os.killpg(process.pid, how)  # as a terminal does, to the workers, too
        _, stderr = process.communicate(timeout=300)
    n_lines = output.read_bytes().count(b"\n")
    if how == signal.SIGINT:
        message = f"score.py: interrupted; {n_lines} lines are saved in {output}; the same"
        assert (process.returncode, stderr.decode()) == (130, f"{message} command continues\n")
        assert WINDOW <= n_lines < 2 * N_TEXTS
    undisturbed = tmp_path / "undisturbed.jsonl"
    for each in (output, undisturbed):
        assert run(path, "--output", each)[0] == 1
    assert output.read_bytes() == undisturbed.read_bytes()


def test_a_power_failure(run, corpus, written):
    """The record may end anywhere, but the output never ends before what it says."""
    path, output, record = written
    header, first, second, _ = record.read_bytes().splitlines(keepends=True)
    first_window = b"".join(corpus[1].splitlines(keepends=True)[:WINDOW])
    for tail, n_more in {b"": 0, b"\0" * 99: 40, second[:50]: 9000, b"{}": 1}.items():
        record.write_bytes(header + first + tail)
        output.write_bytes(corpus[1][: len(first_window) + n_more])
        for _ in range(2):
            assert run(path, "--output", output)[0] == 1
            assert output.read_bytes() == corpus[1]
    # Lines of the input that were not scored may change.
    path.write_bytes(path.read_bytes()[: WINDOW * LINE_BYTES] + b'{"text": "new"}')
    record.write_bytes(header + first)
    output.write_bytes(first_window)
    status, (line,) = run(path, "--output", output)
    assert status == 0
    assert f"texts: {WINDOW + 1}," in line
    assert output.read_bytes().startswith(first_window)


def assert_refused(run, path, output, *words, model="small"):
    """The run stops with one line, which names the files, and changes nothing."""
    files = [output, output.with_name(output.name + ".run")]
    before = [file.exists() and file.read_bytes() for file in files]
    result = run(path, "--output", output, *words, model=model)
    assert_one_line(result, 1, "another --output", str(files[1]))
    assert [file.exists() and file.read_bytes() for file in files] == before


def test_another_model_or_option_is_refused(run, written):
    path, output, _ = written
    assert_refused(run, path, output, model="other")
    for option in ("--tokens", "--end", "--special_tokens", "--field=id", "--context_field=id"):
        assert_refused(run, path, output, option)


def test_changed_files_are_refused_and_not_touched(run, written):
    path, output, record = written
    intact = {file: file.read_bytes() for file in written}
    whole = intact[output]
    header = intact[record].splitlines()[0]
    lines = intact[path].splitlines(keepends=True)
    changes = {
        path: [
            b"".join([*lines[:-1], b"no JSON\r\n"]),
            b"".join([lines[1], lines[0], *lines[2:]]),
            b"".join(lines[:-1]),
        ],
        output: [
            b"notes\n",
            whole.replace(b'"nats": ', b'"nats": 1', 1),
            whole + b"{",
            whole[:-9],
            whole[:-1] + b"\r\n",
        ],
        record: [b"", b"{}", header[:9], b"notes\n" + header],
    }
    for file, contents in changes.items():
        for content in contents:
            file.write_bytes(content)
            assert_refused(run, path, output)
        file.write_bytes(intact[file])
    record.write_bytes(b"notes\n")
    output.write_bytes(b"")
    assert_refused(run, path, output)  # an empty output needs no record, but this is not ours
    assert_refused(run, path, path)  # the input is not overwritten


def test_one_of_two_runs_with_the_same_output_works(models_dir, run, corpus, tmp_path):
    pytest.importorskip("fcntl")
    path, whole = corpus
    output = tmp_path / "scores.jsonl"
    with start(models_dir, "-", "--output", output) as process:
        lines = path.read_bytes().splitlines(keepends=True)
        feed(process, lines[0])
        wait_for(lambda: size(output.with_name("scores.jsonl.run")))
        assert_one_line(run(path, "--output", output), 1, "another run is writing")
        process.communicate(b"".join(lines[1:]), timeout=300)
    assert output.read_bytes() == whole


def test_a_file_system_without_locks(run, corpus, tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", Mock(side_effect=OSError(errno.ENOSYS, "not implemented")))
    assert run(corpus[0], "--output", tmp_path / "scores.jsonl")[0] == 1
    assert (tmp_path / "scores.jsonl").read_bytes() == corpus[1]


def test_standard_output_may_be_a_file(models_dir, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("the rain\n")
    for n_runs in (1, 2):
        with (
            open(tmp_path / "log", "a") as log,
            start(models_dir, path, "--output", "/dev/stdout", stdout=log) as process,
        ):
            assert end_of(process)[0] == 0
        assert len(read_lines((tmp_path / "log").read_bytes())) == n_runs


def test_the_identity_of_a_model_depends_on_its_vocabulary(models_dir, tmp_path):
    """The tests of another model and of workers show that it depends on weights, not on places."""
    shutil.copytree(models_dir / "small", tmp_path / "merges")
    path = tmp_path / "merges" / "vocab.bpe"
    path.write_bytes(path.read_bytes().replace(b"i n\na n", b"a n\ni n"))
    original = score.load("small", str(models_dir)).identity
    assert score.load("merges", str(tmp_path)).identity != original


# Dask

CURRENT_DIR = "/proc/self/cwd"  # as the models_dir, so that each process may have its own


class Cluster:
    """A scheduler and workers that belong to the test."""

    def __init__(self, folder, processes):
        self.processes = processes
        self.file = folder / "scheduler.json"
        self.output = folder / "scores.jsonl"

    def start(self, program, *words, cwd="."):
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", "--no-dashboard"]
        command += ["--scheduler-file", self.file, *words]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return self.processes.enter_context(started(command, cwd=cwd, **quiet))

    def scheduler(self):
        self.file.unlink(missing_ok=True)
        process = self.start("scheduler", "--host", "127.0.0.1", "--port", "0")
        wait_for(self.address)
        return process

    def address(self):
        """The address of the scheduler, or None before its file is there and whole."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.file.read_text())["address"]

    def worker(self, cwd, n_threads="1"):
        return self.start("worker", "--no-nanny", "--nthreads", n_threads, cwd=cwd)

    def score(self, path, models_dir):
        """Start score.py with the workers. - as the path means a pipe."""
        words = [path, "--output", self.output, "--scheduler", self.address()]
        return start(CURRENT_DIR, *words, cwd=models_dir)


def end_of(process, content=b""):
    """Wait until score.py ends, with this rest of its input -> (exit status, its last line)."""
    _, stderr = process.communicate(content, timeout=300)
    return process.returncode, stderr.decode().splitlines()[-1]


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip("distributed", reason="needs Dask")
    if not os.path.exists(CURRENT_DIR):
        pytest.skip("needs /proc")
    with contextlib.ExitStack() as processes:
        yield Cluster(tmp_path, processes)


def test_a_worker_with_another_model_or_more_threads(models_dir, corpus, cluster, tmp_path):
    path, whole = corpus
    shutil.copytree(models_dir / "other", tmp_path / "small")
    cluster.scheduler()
    worker = cluster.worker(tmp_path)
    with cluster.score(path, models_dir) as process:
        status, message = end_of(process)
    assert status == 1
    assert re.match("score.py: worker tcp://.* another model", message)
    assert size(cluster.output) == 0
    worker.kill()
    cluster.worker(models_dir, n_threads="2")  # BLAS would use two for each of them
    with cluster.score(path, models_dir) as process:
        assert end_of(process)[0] == 1
    assert cluster.output.read_bytes() == whole


def test_local_workers_beside_another_package_called_examples(models_dir, corpus, tmp_path):
    pytest.importorskip("distributed", reason="needs Dask")
    path, whole = corpus
    output = tmp_path / "scores.jsonl"
    (tmp_path / "examples").mkdir()
    (tmp_path / "examples" / "__init__.py").touch()
    env = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
    with start(models_dir, path, "--output", output, "--workers", "1", env=env) as process:
        assert "errors: 1" in end_of(process)[1]
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_workers_and_schedulers_come_and_go(models_dir, run, corpus, cluster, tmp_path):
    """The test writes the input piece by piece, so that all this happens in the middle."""
    path, whole = corpus
    content = path.read_bytes()
    scheduler = cluster.scheduler()
    first = cluster.worker(models_dir)
    with cluster.score("-", models_dir) as process:
        feed(process, content)
        wait_for(lambda: size(cluster.output))
        cluster.worker(models_dir)
        first.kill()
        feed(process, content)
        wait_for(lambda: size(cluster.output) > len(whole))
        scheduler.kill()
        status, message = end_of(process, content)
    assert status == 1
    lost = "score.py: (no connection to the Dask scheduler|Timed out trying to connect)"
    assert re.match(lost, message)
    assert read_lines(cluster.output.read_bytes())  # ends with a whole line
    (tmp_path / "texts.jsonl").write_bytes(content * 3)
    assert run(tmp_path / "texts.jsonl", "--output", cluster.output)[0] == 1
    assert len(read_lines(cluster.output.read_bytes())) == 3 * N_TEXTS


def test_a_scheduler_that_is_not_there(run):
    pytest.importorskip("distributed", reason="needs Dask")
    assert_one_line(run(ROOT / "README.md", "--scheduler", "nonsense"), 1, "nonsense")


# The manual

README_BLOCKS = re.findall(
    r"^```(sh|python)\n((?:(?!```).)*)^```\n\n```\n(.*?)^```",  # a block without output is left out
    (ROOT / "examples" / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("language", "code", "shown"), README_BLOCKS)
def test_the_readme_shows_what_is_printed(tmp_path, language, code, shown):
    for path in [*ROOT.glob("*.py"), ROOT / "examples", ROOT / "models"]:
        (tmp_path / path.name).symlink_to(path)
    if language == "python":
        code = f"python -c '{code}'"
    printed = bash(code, cwd=tmp_path)
    assert re.fullmatch(r"(score\.py: texts: .*, errors: 0\n)?", printed.stderr)
    number = r"\d+\.\d+(?:e-\d+)?"
    assert re.split(number, printed.stdout) == re.split(number, shown)
    numbers = [list(map(float, re.findall(number, text))) for text in (printed.stdout, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)
