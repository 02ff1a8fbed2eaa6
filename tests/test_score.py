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
import socket
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import (
    BYTE_TO_CHAR,
    DATA_DIR,
    ROOT,
    SMALL_HPARAMS,
    float64_gpt2,
    map_arrays,
    random_params,
    random_variables,
    read_terminal,
    tiktoken_encoding,
    write_vocabulary,
)
from make_score_reference import END, N_CTX, expected, random_pairs

from examples import score

WITHOUT_DISTRIBUTED = "needs Dask: pip install distributed"
WORDS = ["the", "and", "there", "in", "another", "range", "of", "inner", "é", "漢字", "🙂", "\0"]
FIGURES = {"n_tokens", "nats", "perplexity", "bits_per_byte"}


# Models, inputs, runs


def write_folder(folder, seed=0, dtype="F32", vocabulary=True):
    """Write the random model of helpers in Hugging Face's layout, which needs no TensorFlow."""
    write_vocabulary(folder)
    tokens = json.loads((folder / "encoder.json").read_text())
    if not vocabulary:
        tokens = {token: i for i, token in enumerate(sorted(BYTE_TO_CHAR.values()))}
        (folder / "vocab.bpe").write_text("#version: 0.2\n")
    (folder / "encoder.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(tokens))
    (folder / "vocab.bpe").rename(folder / "merges.txt")
    sizes = SMALL_HPARAMS | {"n_vocab": len(tokens)}
    config = {"model_type": "gpt2", "vocab_size": len(tokens), "n_positions": sizes["n_ctx"]}
    config |= {name: sizes[name] for name in ("n_embd", "n_head", "n_layer")}
    (folder / "config.json").write_text(json.dumps(config))
    header = {}
    data = b""
    for name, array in random_variables(sizes, seed).items():
        name = name.replace("model/h", "h.").removeprefix("model/").replace("/", ".")
        name = name + ".weight" if name in ("wte", "wpe") else name
        name = name.removesuffix(".w").removesuffix(".g") + ".weight" * name.endswith((".w", ".g"))
        name = name.removesuffix(".b") + ".bias" * name.endswith(".b")
        array = array.astype({"F32": np.float32, "F16": np.float16}[dtype])
        array = array[0] if array.ndim == 3 else array
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    new_file = folder / "model.new"
    new_file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    new_file.replace(folder / "model.safetensors")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A folder with the model "small", its float16 "twin", and "other" with other weights."""
    folder = tmp_path_factory.mktemp("models")
    write_folder(folder / "small")
    write_folder(folder / "twin", dtype="F16")
    write_folder(folder / "other", seed=1)
    return folder


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    """tiktoken's encoder for the small vocabulary"""
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(folder / "small")
    return tiktoken_encoding(folder, "small").encode_ordinary


@pytest.fixture(scope="module")
def predict():
    """ids -> float64 log-probabilities, computed by other code than the library's"""
    params = random_params(SMALL_HPARAMS)

    def log_probs(ids):
        logits = float64_gpt2(ids, params, SMALL_HPARAMS["n_head"])
        return logits - np.log(np.exp(logits).sum(-1, keepdims=True))

    return log_probs


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

    def score_it(path, *options, status=0, **kwargs):
        output = tmp_path / "scores.jsonl"
        output.unlink(missing_ok=True)
        assert run(path, "--output", output, *options, **kwargs)[0] == status
        return read_lines(output.read_bytes())

    return score_it


def read_lines(output: bytes):
    def reject(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert not output or output.endswith(b"\n")
    return [json.loads(line, parse_constant=reject) for line in output.splitlines()]


def random_texts(n, seed=0, longest=30):
    """n texts of different lengths; some outgrow the context of 32 tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_one_line(result, status, *words):
    assert result[0] == status, result
    assert len(result[1]) == 1, result
    line = result[1][0]
    assert line.startswith("score.py: ")
    assert all(word in line for word in words), line


# Figures


def test_figures_of_texts_equal_a_computation_in_float64(score_file, encode, predict, tmp_path):
    rows = [{"id": i, "text": text, "nats": "?"} for i, text in enumerate(random_texts(80))]
    rows[7]["text"] = "the " * 500
    path = write_json_lines(tmp_path / "texts.jsonl", rows)
    lines = score_file(path, "--end", "--tokens")
    backwards = score_file(write_json_lines(path, rows[::-1]))[::-1]
    for row, line, other in zip(rows, lines, backwards, strict=True):
        wanted = expected("", row["text"], encode, predict)
        n_tokens, nats = line["n_tokens"], line["nats"]
        assert line["id"] == other["id"] == row["id"]
        np.testing.assert_allclose(line["token_nats"], wanted["token_nats"], atol=1e-4)
        assert line["end_nats"] == pytest.approx(wanted["end_nats"], abs=1e-4)
        for found in (nats, other["nats"]):
            assert found == pytest.approx(sum(wanted["token_nats"]), abs=1e-4 * n_tokens)
        assert n_tokens == len(encode(row["text"])) == len(line["tokens"])
        assert line["perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-6)
        n_bytes = len(row["text"].encode())
        assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
        assert list(other) == ["id", "n_tokens", "nats", "perplexity", "bits_per_byte"]
    assert 10 < sum(line["n_tokens"] > N_CTX for line in lines) < 70


def assert_scores(lines, wanted):
    for line, row in zip(lines, wanted, strict=True):
        np.testing.assert_allclose(line["token_nats"], row["token_nats"], atol=1e-4)
        assert line["nats"] == pytest.approx(sum(row["token_nats"]), abs=1e-4 * N_CTX)
        assert line["greedy"] == row["greedy"]
        assert line["end_nats"] == pytest.approx(row["end_nats"], abs=1e-4)


def test_texts_after_contexts_are_scored_as_by_transformers(score_file, tmp_path):
    rows = list(map(json.loads, (DATA_DIR / "score.json").read_text().splitlines()))
    assert 20 < sum(row["greedy"] for row in rows) < len(rows) - 100
    inputs = [{"context": row["context"], "text": row["text"]} for row in rows]
    path = write_json_lines(tmp_path / "pairs", inputs)
    options = ["--context_field", "context", "--tokens", "--end"]
    assert_scores(score_file(path, *options), rows)


def test_texts_after_contexts_follow_the_rule(score_file, encode, predict, tmp_path):
    pairs = random_pairs(200, seed=2)
    rows = [{"text": text, "before": context} for context, text in pairs]
    path = write_json_lines(tmp_path / "pairs.jsonl", rows)
    lines = score_file(path, "--context_field", "before", "--tokens", "--end")
    assert_scores(lines, [expected(*pair, encode, predict) for pair in pairs])
    for (context, text), line in zip(pairs, lines, strict=True):
        n_bytes = len((context[len(context.rstrip()) :] + text).encode())
        if line["n_tokens"]:
            bits = line["nats"] / math.log(2)
            assert line["bits_per_byte"] == pytest.approx(bits / n_bytes, rel=1e-6)
        else:
            assert (line["perplexity"], line["bits_per_byte"]) == (None, None)


@pytest.mark.parametrize("n_tokens", [N_CTX - 1, N_CTX, N_CTX + 1, N_CTX + 2])
def test_the_end_of_a_text_that_just_fits(score_file, encode, predict, tmp_path, n_tokens):
    path = tmp_path / "text.txt"
    path.write_text(" the" * n_tokens)
    (line,) = score_file(path, "--end")
    wanted = expected("", " the" * n_tokens, encode, predict)
    assert line["n_tokens"] == n_tokens
    assert line["end_nats"] == pytest.approx(wanted["end_nats"], abs=1e-4)
    assert score_file(path)[0]["nats"] == pytest.approx(line["nats"], abs=1e-4)


def test_tokens_are_text_and_parts_of_characters_are_bytes(score_file, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text('the "other"\\ \t and\n🙂', encoding="utf-8")
    first, second = score_file(path, "--tokens")
    assert "".join(first["tokens"]) == 'the "other"\\ \t and'
    assert second["tokens"] == ["\\xf0", "\\x9f", "\\x99", "\\x82"]


# Kinds of input


TEXT = '{"text": "the"}\n{"text": "\u0a0a \u0a41\u0100 Ċ 🙂", "id": "é"}\r\n{"text": "and"}'
MARKED = {
    "utf-8": b"",
    "utf-8-sig": b"",
    "utf-16-le": codecs.BOM_UTF16_LE,
    "utf-16-be": codecs.BOM_UTF16_BE,
    "utf-32-le": codecs.BOM_UTF32_LE,
    "utf-32-be": codecs.BOM_UTF32_BE,
}


@pytest.mark.parametrize("encoding", MARKED)
@pytest.mark.parametrize("name", ["texts.jsonl", "texts.txt", "texts", "-"])
def test_encodings(score_file, tmp_path, monkeypatch, encoding, name):
    content = MARKED[encoding] + TEXT.encode(encoding)
    (tmp_path / "texts.utf8.txt").write_text(TEXT, encoding="utf-8", newline="")
    path = "-" if name == "-" else tmp_path / name
    if name == "-":
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    else:
        path.write_bytes(content)
    lines = score_file(path)
    if name == "texts.txt":
        assert lines == score_file(tmp_path / "texts.utf8.txt")
    else:
        assert [line.get("id") for line in lines] == [None, "é", None]
    assert len(lines) == 3


@pytest.mark.parametrize("beginning", [b"", b"\xef\xbb\xbf", b"\n \r\n\n", b"\xef\xbb\xbf\n  "])
def test_json_lines_are_recognized(score_file, tmp_path, beginning):
    path = tmp_path / "texts.unknown"
    path.write_bytes(beginning + b'{"text": "the", "id": 3}')
    n_blank = beginning.count(b"\n")
    *blank, line = score_file(path, status=int(n_blank > 0))
    assert line["id"] == 3
    assert ["invalid JSON" in each["error"] for each in blank] == [True] * n_blank


NO_TEXT = {
    "UTF-16": "the rain\nthe king\n".encode("utf-16-le"),
    "UTF-16-BE": "the rain\nthe king\n".encode("utf-16-be"),
    "Chinese UTF-16": "漢字 the\n漢字\n".encode("utf-16-le"),
    "UTF-32": "the rain\n".encode("utf-32-le"),
    "Latin-1": "é\nè\n".encode("latin-1"),
    "gzip": gzip.compress(b"the rain\n" * 1000, mtime=0),
    "a mix": b"\x00\x80the\nthe\n\x81\x00\n\x90\n",
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_file_that_is_no_text(run, tmp_path, kind):
    for name in ("texts.txt", "texts.jsonl"):
        (tmp_path / name).write_bytes(NO_TEXT[kind])
        assert_one_line(run(tmp_path / name), 1, name, "is not text", "byte order mark")


def test_lines_in_another_encoding(score_file, tmp_path):
    path = tmp_path / "texts.txt"
    utf_16 = "the\nrain\n".encode("utf-16-le")
    path.write_bytes(b"the\n\xe9\nthe\0\n" + utf_16 + b"\nand" + b"\nthe" * 5)
    lines = score_file(path, status=1)
    errors = [line.get("error", "")[:13] for line in lines]
    assert errors == ["", "invalid UTF-8", "", *["invalid UTF-8"] * 3, *[""] * 6]
    path.write_bytes(codecs.BOM_UTF16_LE + utf_16 + b"\x00\xd8" + utf_16 + b"\x00")
    lines = score_file(path, status=1)
    errors = [line.get("error", "")[:14] for line in lines]
    assert errors == ["", "", "invalid UTF-16", "", "invalid UTF-16"]


COMPRESSORS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pytest.importorskip("zstandard").compress(content),
}


@pytest.mark.parametrize("suffix", COMPRESSORS)
def test_compressed_input(run, tmp_path, suffix):
    rows = [{"id": i, "text": text} for i, text in enumerate(random_texts(600, longest=3))]
    plain = write_json_lines(tmp_path / "texts.jsonl", rows)
    packed = tmp_path / f"texts.JSONL{suffix}"
    half = len(plain.read_bytes()) // 2  # in two parts, which such files may have
    compress = COMPRESSORS[suffix]
    content = compress(plain.read_bytes()[:half]) + compress(plain.read_bytes()[half:])
    packed.write_bytes(content)
    outputs = [tmp_path / "plain.out", tmp_path / "packed.out"]
    for path, output in zip((plain, packed), outputs, strict=True):
        assert run(path, "--output", output) == (0, [])
    assert len(read_lines(outputs[0].read_bytes())) == 600
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    os.truncate(outputs[1], 20_000)
    assert run(packed, "--output", outputs[1]) == (0, [])
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    for damaged in (content[:-7], content[: len(content) // 3], b"the rain"):
        packed.write_bytes(damaged)
        assert_one_line(run(packed), 1, packed.name, "damaged")


def test_zst_without_zstandard(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (tmp_path / "texts.zst").touch()
    assert_one_line(run(tmp_path / "texts.zst"), 1, "pip install zstandard")


@pytest.mark.parametrize("name", ["texts.txt", "texts"])
def test_plain_text(score_file, encode, tmp_path, name):
    raw = b"\xef\xbb\xbfthe\r\n\n\xff\nNaN\nand\rthe\n\xe2\x80\xa8\n{the"
    (tmp_path / name).write_bytes(raw)
    lines = score_file(tmp_path / name, status=1)
    assert lines[1] == {"n_tokens": 0, "nats": 0.0, "perplexity": None, "bits_per_byte": None}
    assert lines[2] == {"error": "invalid UTF-8: invalid start byte at byte 0"}
    scored = [line["n_tokens"] for line in lines if "error" not in line]
    texts = ["the", "", "NaN", "and\rthe", "\u2028", "{the"]
    assert scored == [len(encode(text)) for text in texts]


HOSTILE = [  # line, part of the error or None, fields that are kept
    (b'{"text": "the", "id": 1, "tokens": 2}', None, {"id": 1, "tokens": 2}),
    (b'{"text": "\\ud800 the", "tag": "\\udfff"}', None, {"tag": "\udfff"}),
    (b'{"text": "a\\u0000b\\n"}', None, {}),
    (b'{"text": ""}', None, {}),
    (b'{"text": "the", "error": 1, "nats": [2], "perplexity": NaN}', None, {}),
    (b'{"text": "the", "big": 12345678901234567890}', None, {"big": 12345678901234567890}),
    (b'{"text": "the"}\r', None, {}),
    (b'  {"text": "<|endoftext|>"}  ', None, {}),
    (b"", "invalid JSON", {}),
    (b"   ", "invalid JSON", {}),
    (b'{"text": "the"', "invalid JSON", {}),
    (b'{"text": "the"} {}', "invalid JSON", {}),
    (b'{"text": "a\x00b"}', "invalid JSON", {}),
    (b'{"text": "\xff"}', "invalid UTF-8", {}),
    (b'\xff\xfe{\x00"\x00', "invalid UTF-8", {}),
    (b'{"text": "the", "x": NaN}', "JSON", {}),
    (b'{"text": "the", "x": [1e999]}', "JSON", {}),
    (b'{"text": "the", "x": ' + b"9" * 5000 + b"}", "digits", {}),
    (b'{"text": ' + b"[" * 200_000, "invalid JSON", {}),
    (b'{"id": 5, "Text": "the"}', 'no field "text"', {"id": 5, "Text": "the"}),
    (b'{"id": 6, "text": null, "error": 3}', '"text" is not a string', {"id": 6}),
    (b'{"text": ["the"]}', '"text" is not a string', {}),
    (b'"the"', "not a JSON object", {}),
    (b"null", "not a JSON object", {}),
    (b'{"text": "' + b"the " * 20_000 + b'"}', None, {}),
]


def test_hostile_lines(run, tmp_path):
    path, output = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _, _ in HOSTILE))
    n_errors = sum(error is not None for _, error, _ in HOSTILE)
    message = f"{n_errors} of {len(HOSTILE)} texts could not be scored"
    assert_one_line(run(path, "--output", output), 1, message)
    before = output.read_bytes()
    for line, (_, error, kept) in zip(read_lines(before), HOSTILE, strict=True):
        assert error is None or error in line["error"]
        assert set(line) - set(kept) == (FIGURES if error is None else {"error"})
        assert kept.items() <= line.items()
    assert_one_line(run(path, "--output", output), 1, message)
    assert output.read_bytes() == before


def test_fields(score_file, run, encode, tmp_path):
    rows = [{"nats": "the and", "text": "kept"}, {"text": "the"}]
    path = write_json_lines(tmp_path / "texts.txt", rows)
    line, error = score_file(path, "--field", "nats", status=1)
    assert (line["text"], line["n_tokens"]) == ("kept", len(encode("the and")))
    assert error == {"text": "the", "error": 'no field "nats"'}
    line, error = score_file(path, "--context_field", "nats", status=1)
    assert set(line) == FIGURES | {"greedy"}
    assert error == {"error": 'no field "nats"'}


def test_a_character_that_the_vocabulary_lacks(score_file, tmp_path):
    write_folder(tmp_path / "small")
    vocabulary = tmp_path / "small" / "vocab.json"
    tokens = json.loads(vocabulary.read_text())
    tokens["zzz"] = tokens.pop("z")
    vocabulary.write_text(json.dumps(tokens))
    path = tmp_path / "texts.txt"
    path.write_text("the\nzoo\nand\n")
    first, second, third = score_file(path, status=1, models_dir=tmp_path)
    assert "'z'" in second["error"]
    assert set(first) == set(third) == FIGURES


def test_an_empty_input(score_file, tmp_path):
    (tmp_path / "texts.jsonl").touch()
    assert score_file(tmp_path / "texts.jsonl") == []


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
    ],
)
def test_errors(run, monkeypatch, arguments, status, words):
    if "/dev/full" in arguments and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    monkeypatch.chdir(ROOT)
    assert_one_line(run(*arguments), status, *words)


def test_models_that_cannot_score(run, tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("the")
    assert_one_line(run(path, models_dir=tmp_path), 1, "small")
    write_folder(tmp_path / "bytes", vocabulary=False)
    assert_one_line(run(path, models_dir=tmp_path, model="bytes"), 1, "<|endoftext|>")
    write_folder(tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + struct.pack("<f", math.nan))
    assert_one_line(run(path, models_dir=tmp_path, model="damaged"), 1, "not finite")


def test_without_distributed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    assert_one_line(run("README.md", "--workers", "2"), 1, "pip install distributed")


def start(models_dir, *arguments, model="small", **kwargs):
    """Start score.py as a file, from another folder."""
    options = ["--models_dir", models_dir, "--model_size", model]
    words = [sys.executable, ROOT / "examples" / "score.py", *arguments, *options]
    kwargs = {"stderr": subprocess.PIPE, "cwd": models_dir} | kwargs
    return subprocess.Popen(list(map(str, words)), **kwargs)


@contextlib.contextmanager
def killed_at_the_end(process):
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_closed_streams(models_dir):
    for stream in (0, 1):
        process = start(models_dir, "-", preexec_fn=lambda stream=stream: os.close(stream))
        assert process.communicate(timeout=60)[1] == b""
        assert process.returncode == 0


# Continuing


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def size(path):
    return path.stat().st_size if path.exists() else 0


N_TEXTS = 4500  # three windows of the input


@pytest.fixture(scope="module")
def corpus(models_dir, tmp_path_factory):
    """(path of an input of several windows, its undisturbed output)"""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": i, "text": text} for i, text in enumerate(random_texts(N_TEXTS - 1, 2, 3))]
    rows[1000]["text"] = rows[4000]["text"] = "the " * 1000
    path = write_json_lines(folder / "texts.jsonl", rows)
    with open(path, "ab") as file:
        file.write(b"no JSON\n")
    process = start(models_dir, path, "--output", folder / "scores.jsonl")
    assert b"1 of 4500 texts" in process.communicate(timeout=60)[1]
    return path, (folder / "scores.jsonl").read_bytes()


def test_order(corpus):
    assert [line.get("id") for line in read_lines(corpus[1])] == [*range(N_TEXTS - 1), None]


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
    assert_one_line(run(path, "--output", output), 1, "1 of 4500 texts")
    assert output.read_bytes() == whole


@pytest.fixture
def written(corpus, tmp_path):
    """(path of the input, path of its output with a record), to be changed"""
    for name in ("scores.jsonl", "scores.jsonl.run"):
        shutil.copy(corpus[0].with_name(name), tmp_path)
    return shutil.copy(corpus[0], tmp_path / "texts.jsonl"), tmp_path / "scores.jsonl"


@pytest.mark.parametrize("has_record", [True, False])
def test_every_kind_of_cut(run, corpus, written, has_record):
    path, output = written
    whole = corpus[1]
    lines = whole.splitlines(keepends=True)
    window = len(b"".join(lines[:2048]))  # the end of the first window
    cuts = [15, len(lines[0]), window - 1, window, len(whole)]
    rng = random.Random(3)
    if not has_record:
        cuts = rng.sample(cuts, 1)
    for n_bytes in [*cuts, rng.randrange(len(whole))]:
        output.write_bytes(whole[:n_bytes])
        if not has_record:
            os.remove(f"{output}.run")
        assert run(path, "--output", output)[0] == 1
        assert output.read_bytes() == whole, n_bytes
        assert os.path.isfile(f"{output}.run")


def assert_refused(run, path, output, *options, **kwargs):
    """The run stops with one line and changes nothing."""
    before = output.read_bytes()
    record = output.with_name(output.name + ".run")
    record_before = record.read_bytes() if record.exists() else None
    assert_one_line(run(path, "--output", output, *options, **kwargs), 1, "another --output")
    assert output.read_bytes() == before
    assert (record.read_bytes() if record.exists() else None) == record_before


CUTS = ["no", "line", "torn"]


@pytest.mark.parametrize("cut", CUTS)
def test_another_model_or_option_is_refused(run, corpus, written, cut):
    path, output = written
    os.truncate(output, {"no": len(corpus[1]), "line": 97, "torn": 50_000}[cut])
    for model in ("twin", "other"):
        assert_refused(run, path, output, model=model)
    for option in (["--tokens"], ["--end"], ["--field", "id"], ["--context_field", "id"]):
        assert_refused(run, path, output, *option)
    os.remove(f"{output}.run")  # then all lines are scored again
    assert_refused(run, path, output, model="twin")


@pytest.mark.parametrize("cut", CUTS)
def test_another_input_is_refused(run, corpus, written, tmp_path, cut):
    path, output = written
    lines = path.read_bytes().splitlines(keepends=True)
    n_written = {"no": N_TEXTS, "line": 3000, "torn": 3000}[cut]
    whole = b"".join(corpus[1].splitlines(keepends=True)[:n_written])
    output.write_bytes(whole + b'{"id": 3000, "n_t' * (cut == "torn"))
    changed = tmp_path / "changed.jsonl"
    others = [
        [lines[0].replace(b'"text": "', b'"text": "z'), *lines[1:]],
        [lines[1], lines[0], *lines[2:]],  # reordered
        [*lines[:2000], lines[2000].replace(b"the", b"eht"), *lines[2001:2500], *lines[2500:]],
        [*lines[:100], b"\n", *lines[100:]],
        lines[1:],
        lines[:2999],
    ]
    others[2] = [
        line.replace(b'": "', b'": " ') if i == 2999 else line for i, line in enumerate(lines)
    ]
    for other in others:
        changed.write_bytes(b"".join(other))
        assert_refused(run, changed, output)
    os.remove(f"{output}.run")
    changed.write_bytes(b"".join(others[2]))
    assert_refused(run, changed, output)


def test_later_lines_of_the_input_may_change(run, written, tmp_path):
    path, output = written
    lines = path.read_bytes().splitlines(keepends=True)
    first = b"".join(output.read_bytes().splitlines(keepends=True)[:2100])
    output.write_bytes(first)
    path.write_bytes(b"".join([*lines[:2100], b'{"text": "new"}\n', *lines[2200:]]))
    assert run(path, "--output", output)[0] == 1
    assert output.read_bytes().startswith(first)
    fresh = tmp_path / "fresh.jsonl"
    assert run(path, "--output", fresh)[0] == 1
    for line, other in zip(
        *map(read_lines, (output.read_bytes(), fresh.read_bytes())), strict=True
    ):
        assert line.get("id") == other.get("id")
        assert line.get("nats") == pytest.approx(other.get("nats"), abs=1e-3)


def test_an_output_that_belongs_to_something_else_is_not_touched(run, corpus, written):
    path, output = written
    whole = corpus[1]
    lines = whole.splitlines(keepends=True)
    other = lines[0].replace(b'"nats": ', b'"nats": 1')
    contents = [b"notes", b"notes\n", lines[1], lines[0] + lines[2][:40], other]
    contents += [whole + lines[0], whole + b"{", b"\xff\n", lines[0] + b"\n"]
    for content in contents:
        output.write_bytes(content)
        assert_refused(run, path, output)
    os.remove(f"{output}.run")
    for content in (b"notes\n", lines[0] + lines[2][:40], other):
        output.write_bytes(content)
        assert_refused(run, path, output)
    assert_refused(run, path, path)  # the input is not overwritten


def test_a_damaged_record(run, written):
    path, output = written
    record = output.with_name(output.name + ".run")
    whole = record.read_bytes()
    header = whole.index(b"\n") + 1
    for damaged in (
        b"",
        b"[]\n",
        whole[1:],
        whole[: header + 99],
        whole[:header] + whole[header:][::-1],
    ):
        record.write_bytes(damaged)
        assert_refused(run, path, output)
    record.write_bytes(whole)
    assert run(path, "--output", output)[0] == 1


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("workers", [[], pytest.param(["--workers", "2"], marks=pytest.mark.slow)])
def test_ctrl_c(models_dir, run, corpus, tmp_path, workers):
    if workers:
        pytest.importorskip("distributed", reason=WITHOUT_DISTRIBUTED)
    path, whole = corpus
    output = tmp_path / "scores.jsonl"
    process = start(
        models_dir, "-", "--output", output, *workers, start_new_session=True, stdin=subprocess.PIPE
    )
    with killed_at_the_end(process):
        process.stdin.write(b"".join(path.read_bytes().splitlines(keepends=True)[:4400]))
        process.stdin.flush()
        wait_for(lambda: size(output))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers, too
        _, stderr = process.communicate(timeout=60)
    message = b"score.py: interrupted; the same command continues\n"
    assert (process.returncode, stderr) == (130, message)
    assert run(path, "--output", output)[0] == 1
    assert output.read_bytes() == whole


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


def test_the_identity_depends_on_all_that_matters(tmp_path, models_dir):
    def identity(change=None, model="small"):
        folder = tmp_path / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(models_dir / model, folder)
        if change:
            change(folder)
        score.read_model.cache_clear()
        return score.load("model", str(tmp_path)).identity

    def swap_merges(folder):
        lines = (folder / "merges.txt").read_text().splitlines(keepends=True)
        (folder / "merges.txt").write_text("".join([*lines[:1], lines[2], lines[1], *lines[3:]]))

    def swap_ids(folder):
        tokens = json.loads((folder / "vocab.json").read_text())
        tokens["a"], tokens["b"] = tokens["b"], tokens["a"]
        (folder / "vocab.json").write_text(json.dumps(tokens))

    def change_epsilon(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-6}))

    def change_activation(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"activation_function": "gelu"}))

    def flip_a_bit(folder):
        weights = bytearray((folder / "model.safetensors").read_bytes())
        weights[-4] ^= 1
        (folder / "model.safetensors").write_bytes(weights)

    changes = [swap_merges, swap_ids, flip_a_bit]
    with contextlib.suppress(ValueError):  # where the library does not refuse them
        identity(change_epsilon)
        changes += [change_epsilon, change_activation]
    assert identity() == identity()
    identities = {identity(), identity(model="twin"), identity(model="other")}
    identities |= {identity(change) for change in changes}
    assert len(identities) == 3 + len(changes)
    params = score.load("model", str(tmp_path)).params
    copied = map_arrays(np.array, {"a": params["wte"]})
    assert copied["a"].flags.owndata


# Dask


@contextlib.contextmanager
def dask_process(program, *arguments, cwd):
    """Run a part of Dask that belongs to the test."""
    words = [sys.executable, "-m", f"distributed.cli.dask_{program}", *arguments, "--no-dashboard"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with killed_at_the_end(subprocess.Popen(words, cwd=cwd, **quiet)) as process:
        yield process


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{free.getsockname()[1]}"


class Cluster:
    """A scheduler and workers that belong to the test, and score.py on them.

    The models_dir is the current folder of a process, so that each worker may have its own.
    """

    def __init__(self, folder, output, processes):
        self.folder = folder
        self.output = output
        self.processes = processes
        self.address = free_address()

    def scheduler(self):
        process = dask_process("scheduler", "--host", self.address, cwd=self.folder)
        return self.processes.enter_context(process)

    def worker(self, folder=None, n_threads=1):
        options = ["--no-nanny", "--nthreads", str(n_threads)]
        process = dask_process("worker", self.address, *options, cwd=folder or self.folder)
        return self.processes.enter_context(process)

    def score_stdin(self):
        options = ["--output", self.output, "--scheduler", self.address]
        pipe = {"stdin": subprocess.PIPE, "cwd": self.folder}
        process = start("/proc/self/cwd", "-", *options, **pipe)
        return self.processes.enter_context(killed_at_the_end(process))


@pytest.fixture
def cluster(models_dir, tmp_path):
    pytest.importorskip("distributed", reason=WITHOUT_DISTRIBUTED)
    if not os.path.exists("/proc/self/cwd"):
        pytest.skip("needs /proc")
    with contextlib.ExitStack() as processes:
        yield Cluster(models_dir, tmp_path / "scores.jsonl", processes)


def assert_ended(process, *words, content=None):
    _, stderr = process.communicate(content, timeout=100)
    last = stderr.decode().splitlines()[-1]
    assert process.returncode == 1
    assert last.startswith("score.py: ")
    assert all(word in last for word in words), stderr


def test_workers_with_another_model_or_more_threads(models_dir, corpus, cluster, tmp_path):
    path, whole = corpus
    (tmp_path / "wrong").mkdir()
    shutil.copytree(models_dir / "twin", tmp_path / "wrong" / "small")
    cluster.scheduler()
    wrong = cluster.worker(tmp_path / "wrong")
    process = cluster.score_stdin()
    assert_ended(process, "worker tcp://", "another model", content=path.read_bytes())
    assert size(cluster.output) == 0
    wrong.kill()
    cluster.worker(n_threads=2)  # and its BLAS would use two threads for each of them
    process = cluster.score_stdin()
    assert_ended(process, "1 of 4500 texts could not be scored", content=path.read_bytes())
    assert cluster.output.read_bytes() == whole


@pytest.mark.slow
def test_workers_and_schedulers_come_and_go(corpus, cluster):
    """The test writes the input piece by piece, so that all this happens in the middle."""
    path, whole = corpus
    lines = path.read_bytes().splitlines(keepends=True)
    scheduler = cluster.scheduler()
    first = cluster.worker()
    process = cluster.score_stdin()
    process.stdin.write(b"".join(lines[:2500]))
    process.stdin.flush()
    wait_for(lambda: size(cluster.output))
    cluster.worker()
    first.kill()
    process.stdin.write(b"".join(lines[2500:4200]))
    process.stdin.flush()
    n_bytes = len(b"".join(whole.splitlines(keepends=True)[:2048]))
    wait_for(lambda: size(cluster.output) >= n_bytes)
    scheduler.kill()
    process.stdin.write(b"".join(lines[4200:]))
    assert_ended(process, "no connection to the Dask scheduler")
    assert n_bytes <= size(cluster.output) < len(whole)
    cluster.scheduler()
    cluster.worker()
    process = cluster.score_stdin()
    assert_ended(process, "1 of 4500 texts could not be scored", content=path.read_bytes())
    assert cluster.output.read_bytes() == whole


@pytest.mark.slow
def test_a_local_cluster_whose_workers_are_killed(models_dir, corpus, tmp_path):
    pytest.importorskip("distributed", reason=WITHOUT_DISTRIBUTED)
    psutil = pytest.importorskip("psutil", reason="comes with distributed")
    path, whole = corpus
    lines = path.read_bytes().splitlines(keepends=True)
    output = tmp_path / "scores.jsonl"
    options = ["-", "--output", output, "--workers", "2"]

    def kill_a_worker(process):
        for child in psutil.Process(process.pid).children():
            with contextlib.suppress(psutil.Error):  # it is already dead
                if "spawn_main" in " ".join(child.cmdline()):
                    child.kill()
                    return True
        return False

    with killed_at_the_end(start(models_dir, *options, stdin=subprocess.PIPE)) as process:
        process.stdin.write(b"".join(lines[:4300]))
        process.stdin.flush()
        wait_for(lambda: size(output))
        wait_for(lambda: kill_a_worker(process))
        _, stderr = process.communicate(b"".join(lines[4300:]), timeout=100)
    assert (process.returncode, stderr) == (1, b"score.py: 1 of 4500 texts could not be scored\n")
    assert output.read_bytes() == whole


def test_a_scheduler_that_is_not_there(run):
    pytest.importorskip("distributed", reason=WITHOUT_DISTRIBUTED)
    assert_one_line(run(ROOT / "README.md", "--scheduler", "nonsense"), 1, "nonsense")


@pytest.mark.slow
def test_memory_stays_flat(models_dir, tmp_path):
    """The client needs as much for 200,000 lines as for 20,000."""
    psutil = pytest.importorskip("psutil", reason="comes with distributed")
    peaks = []
    for n_lines in (20_000, 200_000):
        path = tmp_path / f"{n_lines}.txt"
        path.write_text("the other\n" * n_lines)
        peak = 0
        output = tmp_path / f"{n_lines}.jsonl"
        with killed_at_the_end(start(models_dir, path, "--output", output)) as process:
            measured = psutil.Process(process.pid)
            while process.poll() is None:
                with contextlib.suppress(psutil.Error):
                    peak = max(peak, measured.memory_info().rss)
                time.sleep(0.05)
        assert process.returncode == 0
        assert len(output.read_bytes().splitlines()) == n_lines
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 20_000_000


# The manual

README_BLOCKS = re.findall(
    r"^```(sh|python)\n((?:(?!```).)*)^```\n\n```\n(.*?)^```",  # a block without output is left out
    (ROOT / "examples" / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


@pytest.mark.parametrize(("language", "code", "shown"), README_BLOCKS)
def test_the_readme_shows_what_is_printed(tmp_path, language, code, shown):
    for name in ("gpt2.py", "encoder.py", "utils.py", "examples", "models"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = re.sub(r"(^|\| )python ", rf"\1{sys.executable} ", code, flags=re.MULTILINE)
    program = ["sh", "-c", code]
    if language == "python":
        program = [sys.executable, "-c", code]
    printed = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert printed.stderr == ""
    number = r"\d+\.\d+(?:e-\d+)?"
    assert re.split(number, printed.stdout) == re.split(number, shown)
    numbers = [list(map(float, re.findall(number, text))) for text in (printed.stdout, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


# The terminal


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_the_progress_bar(models_dir, corpus, tmp_path, suffix):
    pty = pytest.importorskip("pty", reason="needs a terminal")
    termios = pytest.importorskip("termios", reason="needs a terminal")
    ours, theirs = pty.openpty()
    window_size = struct.pack("HHHH", 24, 100, 0, 0)
    pytest.importorskip("fcntl").ioctl(theirs, termios.TIOCSWINSZ, window_size)
    path = tmp_path / f"texts.jsonl{suffix}"
    content = corpus[0].read_bytes()
    path.write_bytes(gzip.compress(content) if suffix else content)
    output = tmp_path / "scores.jsonl"
    with start(models_dir, path, "--output", output, stderr=theirs) as process:
        os.close(theirs)
        shown = read_terminal(ours)
    assert process.returncode == 1
    assert b"100%|" in shown
    assert b"4,500 texts, " in shown
    assert b"tokens/s" in shown
