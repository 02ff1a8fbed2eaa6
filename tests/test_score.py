"""examples/score.py with a small random model: figures, kinds of input, continuing, Dask."""

import bz2
import codecs
import contextlib
import gzip
import io
import json
import lzma
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import (
    DATA_DIR,
    ROOT,
    SMALL_HPARAMS,
    Terminal,
    bash,
    float64_gpt2,
    random_params,
    random_variables,
    tiktoken_encoding,
    write_vocabulary,
)
from make_score_reference import END, N_CTX, expected

from examples import score

WORDS = ["the", "and", "there", "in", "another", "range", "of", "inner", "é", "漢字", "🙂", "\0"]
FIGURES = {"n_tokens", "nats", "perplexity", "bits_per_byte"}

# Models, inputs, runs


def their_name(name):
    """Hugging Face's name of a variable."""
    name = re.sub(r"^h(\d)", r"h.\1", name.removeprefix("model/")).replace("/", ".")
    if name in ("wte", "wpe"):
        return name + ".weight"
    name, _, kind = name.rpartition(".")
    return name + {"w": ".weight", "g": ".weight", "b": ".bias"}[kind]


def write_folder(folder, seed=0, dtype=np.float32):
    """Write the random model of helpers in Hugging Face's layout, which needs no TensorFlow."""
    write_vocabulary(folder)
    (folder / "encoder.json").rename(folder / "vocab.json")
    (folder / "vocab.bpe").rename(folder / "merges.txt")
    config = {"model_type": "gpt2"} | SMALL_HPARAMS
    config["vocab_size"] = config.pop("n_vocab")
    config["n_positions"] = config.pop("n_ctx")
    (folder / "config.json").write_text(json.dumps(config))
    header = {}
    data = b""
    for name, array in random_variables(SMALL_HPARAMS, seed).items():
        array = array.astype(dtype).reshape(array.shape[-2:])
        offsets = [len(data), len(data) + array.nbytes]
        kind = {4: "F32", 2: "F16"}[array.itemsize]
        entry = {"dtype": kind, "shape": array.shape, "data_offsets": offsets}
        header[their_name(name)] = entry
        data += array.tobytes()
    text = json.dumps(header).encode()
    new_file = folder / "model.new"
    new_file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    new_file.replace(folder / "model.safetensors")


def edit(path, function):
    path.write_bytes(function(path.read_bytes()))


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with the model "small", its float16 "twin", and "other" with other weights."""
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder / "small")
    write_folder(folder / "twin", dtype=np.float16)
    write_folder(folder / "other", seed=1)
    return folder


@pytest.fixture
def run(models_dir, capfd):
    """run(arguments) -> (exit status, the lines of standard error), in this process"""

    def run_main(*arguments, model="small", models_dir=models_dir):
        arguments = [*map(str, arguments), "--models_dir", str(models_dir), "--model_size", model]
        capfd.readouterr()
        status = score.main(arguments)
        return status, capfd.readouterr().err.splitlines()

    return run_main


@pytest.fixture
def score_file(run, tmp_path):
    """score_file(path, options) -> the documents of the output"""

    def score_it(path, *options, **kwargs):
        output = tmp_path / "scores.jsonl"
        output.unlink(missing_ok=True)
        status, _ = run(path, "--output", output, *options, **kwargs)
        lines = read_lines(output.read_bytes())
        assert status == any("error" in line for line in lines)
        return lines

    return score_it


def read_lines(output: bytes):
    assert not output or output.endswith(b"\n")
    return [json.loads(line) for line in output.splitlines()]


def random_texts(n, seed=0, longest=30):
    """n texts of different lengths; some outgrow the context of 32 tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_one_line(result, status, *words):
    assert result[0] == status, result
    (line,) = result[1]
    assert line.startswith("score.py: ")
    assert all(word in line for word in words), line


# Figures


def assert_figures(line, wanted, text):
    """text: what counts for bits_per_byte"""
    nats = line["nats"]
    np.testing.assert_allclose(line["token_nats"], wanted["token_nats"], atol=1e-4)
    assert line["n_tokens"] == len(wanted["token_nats"]) == len(line["tokens"])
    assert nats == pytest.approx(sum(wanted["token_nats"]), abs=1e-4 * N_CTX)
    assert line["end_nats"] == pytest.approx(wanted["end_nats"], abs=1e-4)
    if line["n_tokens"] == 0:
        assert (line["perplexity"], line["bits_per_byte"]) == (None, None)
    else:
        assert line["perplexity"] == pytest.approx(math.exp(nats / line["n_tokens"]), rel=1e-6)
        bits_per_byte = nats / math.log(2) / len(text.encode())
        assert line["bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-6)


def test_figures_of_texts_equal_a_computation_in_float64(score_file, tmp_path):
    params = random_params(SMALL_HPARAMS)
    write_vocabulary(tmp_path / "small")
    encode = tiktoken_encoding(tmp_path, "small").encode_ordinary

    def predict(ids):
        logits = float64_gpt2(ids, params, SMALL_HPARAMS["n_head"])
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    texts = [*random_texts(8), "the " * 100]
    texts += [" the" * n for n in range(N_CTX - 1, N_CTX + 3)]  # where the end just fits, or not
    rows = [{"id": i, "text": text, "nats": "?"} for i, text in enumerate(texts)]
    path = write_json_lines(tmp_path / "texts.jsonl", rows)
    lines = score_file(path, "--end", "--tokens")
    backwards = score_file(write_json_lines(path, rows[::-1]))[::-1]
    for row, line, other in zip(rows, lines, backwards, strict=True):
        assert_figures(line, expected("", row["text"], encode, predict), row["text"])
        assert line["id"] == other["id"] == row["id"]
        assert other["nats"] == pytest.approx(line["nats"], abs=1e-3)
        assert list(other) == ["id", "n_tokens", "nats", "perplexity", "bits_per_byte"]


def test_texts_after_contexts_are_scored_as_by_transformers(score_file, tmp_path):
    rows = list(map(json.loads, (DATA_DIR / "score.json").read_text().splitlines()))
    assert 20 < sum(row["greedy"] for row in rows) < len(rows) - 100
    inputs = [{"before": row["context"], "text": row["text"]} for row in rows]
    path = write_json_lines(tmp_path / "pairs", inputs)
    lines = score_file(path, "--context_field", "before", "--tokens", "--end")
    for line, row in zip(lines, rows, strict=True):
        context = row["context"]
        assert_figures(line, row, context[len(context.rstrip()) :] + row["text"])
        assert line["greedy"] == row["greedy"]


# Kinds of input

MARKS = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}
UTF_16 = "the\nrain\n".encode("utf-16-le")
PLAIN = b"\xef\xbb\xbfthe\r\n\n\xff\nNaN\nand\rthe\n\xe2\x80\xa8\n{the"
PLAIN_TEXTS = ["the", "", ("invalid UTF-8",), "NaN", "and\rthe", "\u2028", "{the"]
JSON_LINES = '{"text": "the"}\n{"text": "\u0a0a \u0a41\u0100 Ċ 🙂", "id": "é"}\r\n{"text": "and"}'
JSON_TEXTS = ["the", "\u0a0a \u0a41\u0100 Ċ 🙂", "and"]
NO_JSON = ("invalid JSON",)
INPUTS = [  # the name, the content, and of each line the text or the beginning of its error
    ("texts.jsonl", b"", []),
    ("texts.txt", PLAIN, PLAIN_TEXTS),
    ("texts", PLAIN, PLAIN_TEXTS),
    ("texts", b'\n \r\n\n{"text": "the"}', [NO_JSON] * 3 + ["the"]),
    ("texts", b'\xef\xbb\xbf\n  {"text": "the"}', [NO_JSON, "the"]),
    (
        "texts.txt",
        b"the\n\xe9\nthe\0\n" + UTF_16 + b"\nand" + b"\nthe" * 5,
        ["the", ("invalid UTF-8",), "the\0", *[("invalid UTF-8",)] * 3, "and", *["the"] * 5],
    ),
    (
        "texts.txt",
        codecs.BOM_UTF16_LE + UTF_16 + b"\x00\xd8" + UTF_16 + b"\x00",
        ["the", "rain", ("invalid UTF-16",), "rain", ("invalid UTF-16",)],
    ),
]
for encoding, mark in MARKS.items():
    content = mark + JSON_LINES.encode(encoding)
    INPUTS += [("-", content, JSON_TEXTS), ("texts", content, JSON_TEXTS)]
    INPUTS += [("texts.txt", content, JSON_LINES.replace("\r", "").split("\n"))]


@pytest.mark.parametrize(("name", "content", "texts"), INPUTS)
def test_the_lines_of_an_input(score_file, tmp_path, monkeypatch, name, content, texts):
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    else:
        (tmp_path / name).write_bytes(content)
        name = tmp_path / name
    lines = score_file(name, "--tokens")
    for line, text in zip(lines, texts, strict=True):
        if isinstance(text, tuple):
            assert line["error"].startswith(*text)
        else:  # the small vocabulary has no characters of several bytes
            shown = text.encode().decode("ascii", "backslashreplace")
            assert "".join(line["tokens"]) == shown


NO_TEXT = {
    "UTF-16": "the rain\nthe king\n".encode("utf-16-le"),
    "Chinese UTF-16": "漢字 the\n漢字\n".encode("utf-16-le"),
    "Latin-1": "é\nè\n".encode("latin-1"),
    "gzip": gzip.compress(b"the rain\n" * 1000, mtime=0),
    "a mix": b"\x00\x80the\nthe\n\x81\x00\n\x90\n",
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_file_that_is_no_text(run, tmp_path, kind):
    (tmp_path / "texts").write_bytes(NO_TEXT[kind])
    assert_one_line(run(tmp_path / "texts"), 1, "texts is not text", "byte order mark")


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pytest.importorskip("zstandard").compress(content),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_input(run, tmp_path, suffix):
    rows = [{"id": i, "text": text} for i, text in enumerate(random_texts(60, longest=3))]
    plain = write_json_lines(tmp_path / "texts.jsonl", rows)
    packed = tmp_path / f"texts.JSONL{suffix}"
    compress = COMPRESSORS[suffix]
    first, second = plain.read_bytes()[:1000], plain.read_bytes()[1000:]
    content = compress(first) + compress(second)  # such files may have several parts
    packed.write_bytes(content)
    outputs = [tmp_path / "plain.out", tmp_path / "packed.out"]
    assert run(plain, "--output", outputs[0]) == (0, [])
    for _ in range(2):
        assert run(packed, "--output", outputs[1]) == (0, [])
        assert outputs[0].read_bytes() == outputs[1].read_bytes()
        os.truncate(outputs[1], 2000)
    for damaged in (content[:-7], content[: len(content) // 3], b"the rain"):
        packed.write_bytes(damaged)
        assert_one_line(run(packed), 1, packed.name, "damaged")


HOSTILE = [  # line, part of the error or None, fields that are kept
    (b'{"text": "the", "id": 1, "tokens": 2}', None, {"id": 1, "tokens": 2}),
    (b'{"text": "\\ud800 the", "tag": "\\udfff"}', None, {"tag": "\udfff"}),
    (b'{"text": "a\\u0000b\\n"}', None, {}),
    (b'{"text": ""}', None, {}),
    (b'{"text": "the", "error": 1, "nats": [2], "perplexity": NaN}', None, {}),
    (b'{"text": "the", "big": 12345678901234567890}', None, {"big": 12345678901234567890}),
    (b'  {"text": "<|endoftext|>"}  \r', None, {}),
    (b"   ", "invalid JSON", {}),
    (b'{"text": "a\x00b"}', "invalid JSON", {}),
    (b'\xff\xfe{\x00"\x00', "invalid UTF-8", {}),
    (b'{"text": "the", "x": [1e999]}', "JSON", {}),
    (b'{"text": "the", "x": ' + b"9" * 5000 + b"}", "digits", {}),
    (b'{"text": ' + b"[" * 200_000, "invalid JSON", {}),
    (b'{"id": 5, "Text": "the"}', 'no field "text"', {"id": 5, "Text": "the"}),
    (b'{"id": 6, "text": null, "error": 3}', '"text" is not a string', {"id": 6}),
    (b"null", "not a JSON object", {}),
    (b'{"text": "' + b"the " * 5000 + b'"}', None, {}),
]


def test_hostile_lines(run, tmp_path):
    path, output = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _, _ in HOSTILE))
    n_errors = sum(error is not None for _, error, _ in HOSTILE)
    message = f"{n_errors} of {len(HOSTILE)} texts could not be scored"
    for _ in range(2):  # the second run continues a complete output
        assert_one_line(run(path, "--output", output), 1, message)
        for line, (_, error, kept) in zip(read_lines(output.read_bytes()), HOSTILE, strict=True):
            assert error is None or error in line["error"]
            assert set(line) - set(kept) == (FIGURES if error is None else {"error"})
            assert kept.items() <= line.items()
        assert not re.search(b"NaN|Infinity", output.read_bytes())  # which are no JSON


def test_fields(score_file, tmp_path):
    rows = [{"nats": "and and", "text": "the"}, {"text": "the"}]
    path = write_json_lines(tmp_path / "texts.txt", rows)
    line, error = score_file(path, "--field", "nats")
    assert (line["text"], line["n_tokens"]) == ("the", 2)
    assert error == {"text": "the", "error": 'no field "nats"'}
    line, error = score_file(path, "--context_field", "nats")
    assert set(line) == FIGURES | {"greedy"}
    assert error == {"error": 'no field "nats"'}


def test_a_character_that_the_vocabulary_lacks(score_file, tmp_path):
    write_folder(tmp_path / "small")
    edit(tmp_path / "small" / "vocab.json", lambda content: content.replace(b'"z"', b'"zzz"'))
    (tmp_path / "texts.txt").write_text("the\nzoo\nand\n")
    first, second, third = score_file(tmp_path / "texts.txt", models_dir=tmp_path)
    assert "'z'" in second["error"]
    assert set(first) == set(third) == FIGURES


# Errors


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, ["input"]),
        (["x.txt", "--worker", "2"], 2, ["--worker"]),
        (["x.txt", "--workers", "0"], 2, ["--workers", "1 or more"]),
        (["x.txt", "--workers", "2", "--scheduler", "tcp://a:1"], 2, ["not allowed"]),
        (["x.txt", "--context_field", "text"], 2, ["--context_field", "--field"]),
        (["no/such.txt"], 1, ["no/such.txt", "No such file"]),
        (["."], 1, ["directory"]),
        (["README.md", "--output", "no/such/folder.jsonl"], 1, ["no/such/folder.jsonl"]),
        (["README.md", "--output", "/dev/full"], 1, ["No space left"]),
        (["README.md", "--workers", "1"], 1, ["pip install distributed"]),
        (["texts.zst"], 1, ["pip install zstandard"]),
    ],
)
def test_errors(run, tmp_path, monkeypatch, arguments, status, words):
    if "/dev/full" in arguments and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    monkeypatch.setitem(sys.modules, "distributed", None)  # as if they were not installed
    monkeypatch.setitem(sys.modules, "zstandard", None)
    monkeypatch.chdir(tmp_path)
    for name in ("README.md", "texts.zst"):
        (tmp_path / name).write_text("the\n")
    assert_one_line(run(*arguments), status, *words)


@pytest.mark.parametrize(
    ("file", "function", "message"),
    [
        ("config.json", lambda content: b"", "small"),
        ("vocab.json", lambda content: content.replace(b"<|end", b"<|the end"), "<|endoftext|>"),
        ("model.safetensors", lambda content: content[:-4] + struct.pack("<f", math.nan), "finite"),
    ],
)
def test_models_that_cannot_score(run, tmp_path, file, function, message):
    path = tmp_path / "texts.txt"
    path.write_text("the")
    write_folder(tmp_path / "small")
    edit(tmp_path / "small" / file, function)
    assert_one_line(run(path, models_dir=tmp_path), 1, message)


# Continuing

LINE_BYTES = 1024
WINDOW = score.WINDOW_BYTES // LINE_BYTES  # how many lines of the corpus are read at once
N_TEXTS = 3 * WINDOW - 30
FAILED = f"1 of {N_TEXTS} texts could not be scored"


def start(models_dir, *arguments, shell="exec", **kwargs):
    """Start score.py as a file, from another folder, with one thread."""
    options = ["--models_dir", models_dir, "--model_size", "small"]
    words = [sys.executable, ROOT / "examples" / "score.py", *arguments, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    kwargs = {"stderr": subprocess.PIPE, "cwd": models_dir, "env": environment} | kwargs
    return subprocess.Popen(["sh", "-c", f'{shell} "$@"', "sh", *map(str, words)], **kwargs)


@contextlib.contextmanager
def killed_at_the_end(process):
    with process:
        try:
            yield process
        finally:
            process.kill()


def feed(process, content):
    process.stdin.write(content)
    process.stdin.flush()


def wait_for(condition, seconds=300):
    end = time.monotonic() + seconds
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
    texts[0] = texts[600] = "the " * 100
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    lines = [f"{line[:-1]:<{LINE_BYTES - 2}}}}\n" for line in lines]
    path.write_text("".join([*lines, "no JSON\n"]))
    output = path.with_name("scores.jsonl")
    options = ["--output", str(output), "--models_dir", str(models_dir), "--model_size", "small"]
    assert score.main([str(path), *options]) == 1
    whole = output.read_bytes()
    assert [line.get("id") for line in read_lines(whole)] == [*range(N_TEXTS - 1), None]
    return path, whole


@pytest.fixture
def written(corpus, tmp_path):
    """(path of the input, path of its output with a record), to be changed"""
    for name in ("scores.jsonl", "scores.jsonl.run"):
        shutil.copy(corpus[0].with_name(name), tmp_path)
    return shutil.copy(corpus[0], tmp_path / "texts.jsonl"), tmp_path / "scores.jsonl"


def test_windows_of_short_lines():
    lines = [score.Line(i, b"the\n", 0) for i in range(5000)]
    assert [len(window) for window in score.windows(lines)] == [2048, 2048, 904]


def test_closed_streams(models_dir):
    with killed_at_the_end(start(models_dir, "-", shell="exec <&- >&-")) as process:
        assert process.communicate(timeout=300)[1] == b""
    assert process.returncode == 0


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 5))]
)
def test_kills_at_random_points(models_dir, run, corpus, tmp_path, seed):
    path, whole = corpus
    output, rng = tmp_path / "scores.jsonl", random.Random(seed)
    for _ in range(2):
        target = size(output) + rng.randint(1, len(whole) // 3)
        with killed_at_the_end(start(models_dir, path, "--output", output)) as process:
            wait_for(lambda target=target: process.poll() is not None or size(output) >= target)
        assert whole.startswith(output.read_bytes())
    assert_one_line(run(path, "--output", output), 1, FAILED)
    assert output.read_bytes() == whole


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("workers", [[], pytest.param(["--workers", "2"], marks=pytest.mark.slow)])
def test_ctrl_c(models_dir, run, corpus, tmp_path, workers):
    if workers:
        pytest.importorskip("distributed", reason="needs Dask")
    path, whole = corpus
    options = ["--output", tmp_path / "scores.jsonl", *workers]
    pipe = {"start_new_session": True, "stdin": subprocess.PIPE}
    with killed_at_the_end(start(models_dir, "-", *options, **pipe)) as process:
        feed(process, path.read_bytes()[:-100])
        wait_for(lambda: size(options[1]))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers, too
        _, stderr = process.communicate(timeout=300)
    message = b"score.py: interrupted; the same command continues\n"
    assert (process.returncode, stderr) == (130, message)
    with killed_at_the_end(start(models_dir, path, *options)) as process:
        _, stderr = process.communicate(timeout=300)
    assert (process.returncode, stderr.decode()) == (1, f"score.py: {FAILED}\n")
    assert options[1].read_bytes() == whole


def test_every_kind_of_cut(run, corpus, written):
    path, output = written
    whole = corpus[1]
    lines = whole.splitlines(keepends=True)
    window = len(b"".join(lines[:WINDOW]))
    anywhere = random.Random(3).randrange(len(whole))
    cuts = [(15, True), (len(lines[0]), True), (window - 1, True)]
    cuts += [(window, True), (anywhere, False), (len(whole), False)]
    for n_bytes, has_record in cuts:
        output.write_bytes(whole[:n_bytes])
        if not has_record:
            os.remove(f"{output}.run")
        assert run(path, "--output", output)[0] == 1
        assert output.read_bytes() == whole, n_bytes
        assert os.path.isfile(f"{output}.run")


def test_later_lines_of_the_input_may_change(run, written):
    path, output = written
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[: WINDOW + 9], b'{"text": "new"}\n', *lines[WINDOW + 99 :]]))
    first = b"".join(output.read_bytes().splitlines(keepends=True)[: WINDOW + 9])
    output.write_bytes(first)
    assert_one_line(run(path, "--output", output), 1, "1 of ")
    assert output.read_bytes().startswith(first)
    ids = [line.get("id") for line in read_lines(output.read_bytes())]
    assert ids == [*range(WINDOW + 9), None, *range(WINDOW + 99, N_TEXTS - 1), None]


def assert_refused(run, path, output, *options, **kwargs):
    """The run stops with one line and changes nothing."""
    files = [output, output.with_name(output.name + ".run")]
    before = [file.exists() and file.read_bytes() for file in files]
    assert_one_line(run(path, "--output", output, *options, **kwargs), 1, "another --output")
    assert [file.exists() and file.read_bytes() for file in files] == before


@pytest.mark.parametrize("cut", ["no", "after a line", "in a line"])
def test_another_model_option_or_input_is_refused(run, corpus, written, tmp_path, cut):
    path, output = written
    n_written = N_TEXTS if cut == "no" else 2 * WINDOW + 50
    lines = corpus[1].splitlines(keepends=True)
    torn = lines[n_written][:17] if cut == "in a line" else b""
    output.write_bytes(b"".join([*lines[:n_written], torn]))
    for model in ("twin", "other"):
        assert_refused(run, path, output, model=model)
    for option in (["--tokens"], ["--end"], ["--field", "id"], ["--context_field", "id"]):
        assert_refused(run, path, output, *option)
    lines = path.read_bytes().splitlines(keepends=True)
    last = n_written - 2  # the last line of the corpus is no JSON
    changed = lines[last].replace(b'": "', b'": " ')
    others = [
        [*lines[:last], changed, *lines[last + 1 :]],
        [lines[0].replace(b'": "', b'": "z'), *lines[1:]],
        [lines[1], lines[0], *lines[2:]],
        [*lines[:100], b"\n", *lines[100:]],
        lines[1:],
        lines[: n_written - 1],
    ]
    for i, other in enumerate(others):
        (tmp_path / str(i)).write_bytes(b"".join(other))
        assert_refused(run, tmp_path / str(i), output)
    os.remove(f"{output}.run")  # then all lines are scored again
    assert_refused(run, tmp_path / "0", output)
    assert_refused(run, path, output, model="twin")


def test_an_output_that_belongs_to_something_else_is_not_touched(run, corpus, written):
    path, output = written
    whole = corpus[1]
    first, second, third = whole.splitlines(keepends=True)[:3]
    other = first.replace(b'"nats": ', b'"nats": 1')
    contents = [b"notes\n", first + third[:40], other, b"notes", second]
    contents += [whole + first, whole + b"{", b"\xff\n", first + b"\n"]
    for content in contents:
        output.write_bytes(content)
        assert_refused(run, path, output)
    os.remove(f"{output}.run")
    for content in contents[:3]:
        output.write_bytes(content)
        assert_refused(run, path, output)
    assert_refused(run, path, path)  # the input is not overwritten


def test_a_damaged_record_is_refused(run, written):
    path, output = written
    record = output.with_name("scores.jsonl.run")
    whole = record.read_bytes()
    header, entries = whole.split(b"\n", 1)
    reversed_entries = header + entries[::-1] + b"\n"
    for damaged in (b"", b"[]\n", whole[1:], header + b"\n" + entries[:99], reversed_entries):
        record.write_bytes(damaged)
        assert_refused(run, path, output)


# The identity of the model


def test_a_batch_is_scored_with_its_model_or_not_at_all(tmp_path):
    """A worker has a model in memory, and the files of the folder change."""
    folder = tmp_path / "small"
    write_folder(folder)
    load = score.load("small", str(tmp_path))
    batch = score.Batch("small", str(tmp_path), load.identity, [[END, 1, 2]], [2])
    first = score.score(batch)
    write_folder(folder, seed=1)
    with pytest.raises(ValueError, match="another model"):
        score.score(batch)
    other = batch._replace(identity=score.load("small", str(tmp_path)).identity)
    assert np.abs(score.score(other).nats - first.nats).max() > 1e-3
    content = (folder / "model.safetensors").read_bytes()
    write_folder(folder)  # in a worker that holds the other one
    np.testing.assert_array_equal(score.score(batch).nats, first.nats)
    (folder / "model.safetensors").write_bytes(content)  # in place: the mapped weights change
    with pytest.raises(ValueError, match="another model"):
        score.score(batch)
    score.score(other)


def test_the_files_of_the_bundled_model_are_watched_from_any_folder(tmp_path):
    (path,) = score.load("tiny", str(tmp_path)).files
    assert os.path.samefile(path, ROOT / "models" / "tiny" / "model.ckpt.data-00000-of-00001")


CHANGES = [
    ("merges.txt", lambda content: content.replace(b"h e\n", b"").replace(b"re\n", b"re\nh e\n")),
    ("vocab.json", lambda content: content.replace(b'"a": 64, "b": 65', b'"b": 64, "a": 65')),
    ("config.json", lambda content: content.replace(b"{", b'{"layer_norm_epsilon": 1e-6, ')),
    ("config.json", lambda content: content.replace(b"{", b'{"activation_function": "gelu", ')),
    ("model.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1])),
]


def test_the_identity_depends_on_all_that_matters(models_dir, tmp_path):
    names = ["small", "twin", "other"]
    identities = [score.load(name, str(models_dir)).identity for name in names]
    for i, (file, function) in enumerate([*CHANGES, ("config.json", lambda content: content)]):
        shutil.copytree(models_dir / "small", tmp_path / str(i))
        edit(tmp_path / str(i) / file, function)
        identities.append(score.load(str(i), str(tmp_path)).identity)
    assert identities.pop() == identities[0]
    assert len(set(identities)) == 3 + len(CHANGES)


# Dask

CURRENT_DIR = "/proc/self/cwd"  # as the models_dir, so that each process may have its own


class Cluster:
    """A scheduler and workers that belong to the test."""

    def __init__(self, folder, processes):
        self.folder = folder
        self.processes = processes
        self.file = folder / "scheduler.json"

    def start(self, program, *arguments, cwd):
        words = [sys.executable, "-m", f"distributed.cli.dask_{program}", "--no-dashboard"]
        words += ["--scheduler-file", str(self.file), *arguments]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(words, cwd=cwd, **quiet)
        return self.processes.enter_context(killed_at_the_end(process))

    def scheduler(self):
        self.file.unlink(missing_ok=True)
        process = self.start("scheduler", "--host", "127.0.0.1", "--port", "0", cwd=self.folder)
        wait_for(self.address)
        return process

    def address(self):
        """The address of the scheduler, or None before its file is there and whole."""
        with contextlib.suppress(OSError, ValueError):
            return json.loads(self.file.read_text())["address"]

    def worker(self, cwd, n_threads=1):
        return self.start("worker", "--no-nanny", "--nthreads", str(n_threads), cwd=cwd)

    def score(self, path, output, cwd):
        """Run score.py -> (exit status, the last line of standard error)"""
        options = ["--output", output, "--scheduler", self.address()]
        with killed_at_the_end(start(CURRENT_DIR, path, *options, cwd=cwd)) as process:
            _, stderr = process.communicate(timeout=300)
        return process.returncode, stderr.decode().splitlines()[-1]


@pytest.fixture
def cluster(tmp_path):
    pytest.importorskip("distributed", reason="needs Dask")
    if not os.path.exists(CURRENT_DIR):
        pytest.skip("needs /proc")
    with contextlib.ExitStack() as processes:
        yield Cluster(tmp_path, processes)


def test_a_worker_with_another_model_or_more_threads(models_dir, corpus, cluster):
    path, whole = corpus
    worker_dir = cluster.folder / "worker"
    write_folder(worker_dir / "small", dtype=np.float16)
    cluster.scheduler()
    cluster.worker(worker_dir, n_threads=2)  # BLAS would use two for each of them
    output = cluster.folder / "scores.jsonl"
    status, message = cluster.score(path, output, cwd=models_dir)
    assert status == 1
    assert re.match("score.py: worker tcp://.* another model", message)
    assert size(output) == 0
    write_folder(worker_dir / "small")  # now the worker loads it again
    assert cluster.score(path, output, cwd=models_dir) == (1, f"score.py: {FAILED}")
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_workers_and_schedulers_come_and_go(models_dir, corpus, cluster):
    """The test writes the input piece by piece, so that all this happens in the middle."""
    path, whole = corpus
    content = path.read_bytes()
    output = cluster.folder / "scores.jsonl"
    scheduler = cluster.scheduler()
    first = cluster.worker(models_dir)
    options = ["--output", output, "--scheduler", cluster.address()]
    process = start(models_dir, "-", *options, stdin=subprocess.PIPE)
    with killed_at_the_end(process):
        n_bytes = LINE_BYTES * (WINDOW + 50)
        feed(process, content[:n_bytes])
        wait_for(lambda: size(output))
        cluster.worker(models_dir)
        first.kill()
        feed(process, content[n_bytes : 2 * n_bytes])
        first_window = len(b"".join(whole.splitlines(keepends=True)[:WINDOW]))
        wait_for(lambda: size(output) >= first_window)
        scheduler.kill()
        _, stderr = process.communicate(content[2 * n_bytes :], timeout=300)
    assert process.returncode == 1
    assert stderr.splitlines()[-1].startswith(b"score.py: no connection to the Dask scheduler")
    assert first_window <= size(output) < len(whole)
    cluster.scheduler()
    cluster.worker(models_dir)
    assert cluster.score(path, output, cwd=models_dir) == (1, f"score.py: {FAILED}")
    assert output.read_bytes() == whole


@pytest.mark.slow
def test_a_scheduler_that_is_lost_before_its_workers_are_counted(cluster):
    scheduler = cluster.scheduler()

    def count_after_the_loss():
        with score.dask_workers(None, cluster.address(), 1) as pool:
            scheduler.kill()
            scheduler.wait()
            pool.count_slots()

    with pytest.raises(ConnectionError, match="^no connection to the Dask scheduler"):
        count_after_the_loss()


def test_a_scheduler_that_is_not_there(run):
    pytest.importorskip("distributed", reason="needs Dask")
    assert_one_line(run(ROOT / "README.md", "--scheduler", "nonsense"), 1, "nonsense")


@pytest.mark.slow
def test_memory_stays_flat(models_dir, tmp_path):
    """The client needs as much for 50,000 lines as for 5,000."""
    psutil = pytest.importorskip("psutil", reason="comes with distributed")
    peaks = []
    for n_lines in (5_000, 50_000):
        path = tmp_path / f"{n_lines}.txt"
        path.write_text("the other\n" * n_lines)
        output = tmp_path / f"{n_lines}.jsonl"
        peaks.append(0)
        with killed_at_the_end(start(models_dir, path, "--output", output)) as process:
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    peaks[-1] = max(peaks[-1], psutil.Process(process.pid).memory_info().rss)
                time.sleep(0.05)
        assert len(output.read_bytes().splitlines()) == n_lines
    assert peaks[1] < peaks[0] + 10_000_000


# The manual and the terminal

README_BLOCKS = re.findall(
    r"^```(sh|python)\n((?:(?!```).)*)^```\n\n```\n(.*?)^```",  # a block without output is left out
    (ROOT / "examples" / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("language", "code", "shown"), README_BLOCKS)
def test_the_readme_shows_what_is_printed(tmp_path, language, code, shown):
    for name in ("gpt2.py", "encoder.py", "utils.py", "examples", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    if language == "sh":
        printed = bash(code, cwd=tmp_path)
    else:
        command = [sys.executable, "-c", code]
        printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert printed.stderr == ""
    number = r"\d+\.\d+(?:e-\d+)?"
    assert re.split(number, printed.stdout) == re.split(number, shown)
    numbers = [list(map(float, re.findall(number, text))) for text in (printed.stdout, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_progress_bar(run, corpus, tmp_path, monkeypatch, suffix):
    path = tmp_path / f"texts.jsonl{suffix}"
    content = corpus[0].read_bytes()
    path.write_bytes(gzip.compress(content) if suffix else content)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("COLUMNS", "100")
    assert run(path, "--output", tmp_path / "scores.jsonl")[0] == 1
    shown = sys.stderr.getvalue()
    assert "100%|" in shown
    assert f"{N_TEXTS} texts, " in shown
    assert "tokens/s" in shown
