"""examples/score.py as a subprocess, with a small random model: figures, order, hostile lines, kills, Dask."""

import contextlib
import json
import math
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import BYTE_TO_CHAR, ROOT, read_terminal, write_model

import gpt2
from utils import load_encoder_hparams_and_params

WITHOUT_DISTRIBUTED = "needs Dask: pip install distributed"
WORDS = [
    "the",
    "and",
    "there",
    "in",
    "another",
    "range",
    "of",
    "inner",
    "thing",
    "é",
    "漢字",
    "🙂",
    "\0",
]
N_TEXTS = 4500  # three windows of the input


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(models_dir, encoder, hparams, params) of a small model, loaded once so that TensorFlow is not needed again."""
    models_dir = write_model(tmp_path_factory.mktemp("score") / "small").parent
    return models_dir, *load_encoder_hparams_and_params("small", str(models_dir))


def command(model, *arguments):
    options = ["--models_dir", str(model[0]), "--model_size", "small"]
    return [sys.executable, "-m", "examples.score", *map(str, arguments), *options]


def run(model, *arguments, **kwargs):
    return subprocess.run(
        command(model, *arguments), cwd=ROOT, capture_output=True, timeout=100, **kwargs
    )


def score(model, path, *arguments, status=0):
    """Run without --output -> the lines of standard output, as documents."""
    result = run(model, path, *arguments)
    assert result.returncode == status, result.stderr
    return read_lines(result.stdout)


def read_lines(output: bytes):
    def reject(constant):
        raise AssertionError(f"{constant} is no JSON")

    assert not output or output.endswith(b"\n")
    return [json.loads(line, parse_constant=reject) for line in output.splitlines()]


def texts(n, seed=0, longest=30):
    """Return n texts of different lengths; some outgrow the context of 32 tokens."""
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, longest))) for _ in range(n)]


def write_json_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_one_line(result, status, *words):
    lines = result.stderr.decode().splitlines()
    assert (result.returncode, len(lines)) == (status, 1), result.stderr
    assert lines[0].startswith("score.py: ")
    assert all(word in lines[0] for word in words), lines


@contextlib.contextmanager
def running(arguments, **kwargs):
    """Start a process. It is killed at the end if it still runs."""
    with subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, **kwargs) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_for(condition, seconds=30):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def size(path):
    return path.stat().st_size if path.exists() else 0


# Figures


def float64_nats(ids, params, n_head):
    """-log(p) of the tokens after the first, computed in float64 by other code than the library's."""
    p = {name: np.asarray(params[name], np.float64) for name in ("wte", "wpe")}

    def norm(x, g, b):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * np.float64(
            g
        ) + np.float64(b)

    def dense(x, w, b):
        return x @ np.float64(w) + np.float64(b)

    x = p["wte"][ids[:-1]] + p["wpe"][: len(ids) - 1]
    for block in params["blocks"]:
        heads = []
        for part in np.split(
            dense(norm(x, **block["ln_1"]), **block["attn"]["c_attn"]), 3, axis=-1
        ):
            heads.append(np.split(part, n_head, axis=-1))
        mixed = []
        for q, k, v in zip(*heads, strict=True):
            weights = np.exp(q @ k.T / math.sqrt(q.shape[-1])) * np.tri(len(q))
            mixed.append(weights / weights.sum(-1, keepdims=True) @ v)
        x = x + dense(np.concatenate(mixed, -1), **block["attn"]["c_proj"])
        h = dense(norm(x, **block["ln_2"]), **block["mlp"]["c_fc"])
        h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
        x = x + dense(h, **block["mlp"]["c_proj"])
    logits = norm(x, **params["ln_f"]) @ p["wte"].T
    return np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]


def test_figures_equal_log_probs_and_a_computation_in_float64(model, tmp_path):
    _, encoder, hparams, params = model
    rows = [{"id": i, "text": text, "n_tokens": "theirs"} for i, text in enumerate(texts(300))]
    rows[7]["text"] = "the " * 500
    lines = score(model, write_json_lines(tmp_path / "texts.jsonl", rows))
    n_long = 0
    for row, line in zip(rows, lines, strict=True):
        assert list(line) == ["id", "n_tokens", "nats", "perplexity", "bits_per_byte"]
        ids = [encoder.encoder["<|endoftext|>"], *encoder.encode(row["text"])]
        n_tokens, nats = line["n_tokens"], line["nats"]
        assert (line["id"], n_tokens) == (row["id"], len(ids) - 1)
        assert (
            abs(nats + gpt2.log_probs(ids, params, hparams["n_head"]).sum(dtype=np.float64))
            <= 1e-4 * n_tokens
        )
        if len(ids) <= hparams["n_ctx"] + 1:
            assert abs(nats - float64_nats(ids, params, hparams["n_head"]).sum()) <= 1e-4 * n_tokens
        else:
            n_long += 1
        assert line["perplexity"] == pytest.approx(math.exp(nats / n_tokens), rel=1e-6)
        n_bytes = len(row["text"].encode())
        assert line["bits_per_byte"] == pytest.approx(nats / math.log(2) / n_bytes, rel=1e-6)
    assert 10 < n_long < 290


def test_figures_do_not_depend_on_the_order_of_the_texts(model, tmp_path):
    rows = [{"id": i, "text": text} for i, text in enumerate(texts(200, seed=1))]
    lines = score(model, write_json_lines(tmp_path / "a.jsonl", rows))
    backwards = score(model, write_json_lines(tmp_path / "b.jsonl", rows[::-1]))[::-1]
    for line, other in zip(lines, backwards, strict=True):
        assert line["id"] == other["id"]
        assert abs(line["nats"] - other["nats"]) <= 1e-4 * line["n_tokens"]


# Lines of all kinds


@pytest.mark.parametrize("name", ["texts.txt", "texts", "-"])
def test_plain_text(model, tmp_path, name):
    raw = b"\xef\xbb\xbfthe\r\n\n\xff\nNaN\nand\rthe\n\xe2\x80\xa8\n{the"
    (tmp_path / "texts").write_bytes(raw)
    (tmp_path / "texts.txt").write_bytes(raw)
    result = run(model, *(["-"] if name == "-" else [tmp_path / name]), input=raw)
    assert_one_line(result, 1, "1 of 7 texts could not be scored")
    lines = read_lines(result.stdout)
    assert lines[1] == {"n_tokens": 0, "nats": 0.0, "perplexity": None, "bits_per_byte": None}
    assert lines[2] == {"error": "invalid UTF-8: invalid start byte at byte 0"}
    encode = model[1].encode
    assert [line.get("n_tokens") for line in lines] == [
        *(len(encode("the")), 0, None, len(encode("NaN"))),
        *(len(encode("and\rthe")), len(encode("\u2028")), len(encode("{the"))),
    ]


HOSTILE = [  # line, part of the error or None, fields that are kept
    (b'{"text": "the", "id": 1}', None, {"id": 1}),
    (b'{"text": "\\ud800 the", "tag": "\\udfff"}', None, {"tag": "\udfff"}),
    (b'{"text": "a\\u0000b\\n"}', None, {}),
    (b'{"text": ""}', None, {}),
    (b'{"text": "the", "error": 1, "nats": [2], "perplexity": NaN}', None, {}),
    (
        b'{"text": "the", "big": 123456789012345678901234567890}',
        None,
        {"big": 123456789012345678901234567890},
    ),
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


def test_hostile_lines(model, tmp_path):
    path, output = tmp_path / "texts.jsonl", tmp_path / "scores.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(line for line, _, _ in HOSTILE))
    n_errors = sum(error is not None for _, error, _ in HOSTILE)
    result = run(model, path, "--output", output)
    assert_one_line(result, 1, f"{n_errors} of {len(HOSTILE)} texts could not be scored")
    for line, (_, error, kept) in zip(read_lines(output.read_bytes()), HOSTILE, strict=True):
        if error is None:
            assert set(line) - set(kept) == {"n_tokens", "nats", "perplexity", "bits_per_byte"}
        else:
            assert error in line["error"]
            assert set(line) - set(kept) == {"error"}
        assert kept.items() <= line.items()
    before = output.read_bytes()
    assert_one_line(run(model, path, "--output", output), 1, f"{n_errors} of {len(HOSTILE)}")
    assert output.read_bytes() == before


def test_another_field(model, tmp_path):
    path = write_json_lines(
        tmp_path / "texts.txt", [{"nats": "the and", "text": "kept"}, {"text": "the"}]
    )
    line, error = score(model, path, "--field", "nats", status=1)
    assert (line["text"], line["n_tokens"]) == ("kept", len(model[1].encode("the and")))
    assert error == {"text": "the", "error": 'no field "nats"'}


def test_an_empty_input(model, tmp_path):
    (tmp_path / "texts.jsonl").touch()
    assert score(model, tmp_path / "texts.jsonl") == []


# Errors


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ([], 2, ["input"]),
        (["x.txt", "--worker", "2"], 2, ["--worker"]),
        (["x.txt", "--workers", "0"], 2, ["--workers", "1 or more"]),
        (["x.txt", "--workers", "2", "--scheduler", "tcp://a:1"], 2, ["not allowed"]),
        (["no/such.txt"], 1, ["no/such.txt", "No such file"]),
        (["."], 1, ["directory"]),
        (["README.md", "--output", "no/such/folder.jsonl"], 1, ["no/such/folder.jsonl"]),
        (["README.md", "--output", "/dev/full"], 1, ["No space left"]),
        (["README.md", "--scheduler", "nonsense"], 1, ["nonsense"]),
    ],
)
def test_errors(model, arguments, status, words):
    if "/dev/full" in arguments and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    assert_one_line(run(model, *arguments), status, *words)


def test_a_missing_model(tmp_path):
    result = run([tmp_path], "README.md")
    assert_one_line(result, 1, "small")


def test_a_vocabulary_without_endoftext(model, tmp_path):
    hparams = model[2] | {"n_vocab": 256}
    folder = write_model(tmp_path / "small", hparams, merges=[])
    vocabulary = {
        BYTE_TO_CHAR[byte]: i for i, byte in enumerate(sorted(BYTE_TO_CHAR, key=BYTE_TO_CHAR.get))
    }
    (folder / "encoder.json").write_text(json.dumps(vocabulary))
    assert_one_line(run([tmp_path], "README.md"), 1, "<|endoftext|>")


def test_damaged_parameters(model, tmp_path):
    ln_f = {"model/ln_f/g": np.full(model[2]["n_embd"], np.nan, np.float32)}
    write_model(tmp_path / "small", extra=ln_f)
    assert_one_line(run([tmp_path], "README.md"), 1, "not finite")


def test_without_distributed(model):
    blocked = "import sys; sys.modules['distributed'] = None; from examples.score import main; sys.exit(main())"
    arguments = command(model, "README.md", "--workers", "2")[3:]
    result = subprocess.run(
        [sys.executable, "-c", blocked, *arguments], cwd=ROOT, capture_output=True, timeout=100
    )
    assert_one_line(result, 1, "pip install distributed")


# Continuing


@pytest.fixture(scope="module")
def corpus(model, tmp_path_factory):
    """(path of an input of several windows, its undisturbed output)."""
    folder = tmp_path_factory.mktemp("corpus")
    rows = [{"id": i, "text": text} for i, text in enumerate(texts(N_TEXTS - 1, seed=2, longest=6))]
    rows[1000]["text"] = rows[4000]["text"] = "the " * 1000
    path = write_json_lines(folder / "texts.jsonl", rows)
    with open(path, "ab") as file:
        file.write(b"no JSON\n")
    assert_one_line(
        run(model, path, "--output", folder / "scores.jsonl"), 1, f"1 of {N_TEXTS} texts"
    )
    return path, (folder / "scores.jsonl").read_bytes()


def test_order(corpus):
    assert [line.get("id") for line in read_lines(corpus[1])] == [*range(N_TEXTS - 1), None]


@pytest.mark.parametrize("seed", range(2))
def test_kills_at_random_points(model, corpus, tmp_path, seed):
    path, expected = corpus
    output, rng = tmp_path / "scores.jsonl", random.Random(seed)
    for _ in range(3):
        before, target = size(output), rng.randint(1, len(expected) // 4)
        with running(command(model, path, "--output", output)) as process:
            while process.poll() is None and size(output) < before + target:
                time.sleep(0.01)
        assert expected.startswith(output.read_bytes())
    assert_one_line(
        run(model, path, "--output", output), 1, f"1 of {N_TEXTS} texts could not be scored"
    )
    assert output.read_bytes() == expected


def test_every_kind_of_cut(model, corpus, tmp_path):
    path, expected = corpus
    lines = expected.splitlines(keepends=True)
    window = len(b"".join(lines[:2048]))  # the end of the first window
    output = tmp_path / "scores.jsonl"
    for n_bytes in (0, 15, len(lines[0]), window - 1, window, window + 1, len(expected) - 1):
        output.write_bytes(expected[:n_bytes])
        assert run(model, path, "--output", output).returncode == 1
        assert output.read_bytes() == expected, n_bytes


def test_an_output_that_belongs_to_something_else_is_not_touched(model, corpus, tmp_path):
    path, expected = corpus
    lines = expected.splitlines(keepends=True)
    output = tmp_path / "scores.jsonl"
    other_model = lines[0].replace(b'"nats": ', b'"nats": 1')
    for content in (
        *(b"notes", b"notes\n", lines[1], lines[0] + lines[2][:40], other_model),
        *(expected + lines[0], expected + b"{", b"\xff\n"),
    ):
        output.write_bytes(content)
        result = run(model, path, "--output", output)
        assert_one_line(result, 1, "output")
        assert output.read_bytes() == content


def test_the_input_is_not_overwritten(model, corpus):
    before = corpus[0].read_bytes()
    assert_one_line(run(model, corpus[0], "--output", corpus[0]), 1, "output")
    assert corpus[0].read_bytes() == before


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
@pytest.mark.parametrize("workers", [0, 2])
def test_ctrl_c(model, corpus, tmp_path, workers):
    if workers:
        pytest.importorskip("distributed", reason=WITHOUT_DISTRIBUTED)
    path, expected = corpus
    output = tmp_path / "scores.jsonl"
    arguments = command(
        model, path, "--output", output, *(["--workers", workers] if workers else [])
    )
    with running(arguments, start_new_session=True) as process:
        wait_for(lambda: size(output))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to the workers, too
        _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (
        130,
        b"score.py: interrupted; the same command continues\n",
    )
    assert run(model, path, "--output", output).returncode == 1
    assert output.read_bytes() == expected


# Dask


def test_a_local_cluster_whose_workers_are_killed(model, corpus, tmp_path):
    pytest.importorskip("distributed", reason=WITHOUT_DISTRIBUTED)
    psutil = pytest.importorskip("psutil", reason="comes with distributed")
    path, expected = corpus
    output = tmp_path / "scores.jsonl"
    arguments = command(model, path, "--output", output, "--workers", 2)
    with running(arguments) as process:

        def kill_a_worker():
            for child in psutil.Process(process.pid).children():
                with contextlib.suppress(psutil.Error):  # it is already dead
                    if "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
                        return True
            return False

        for part in (0, 3):
            wait_for(lambda part=part: size(output) > len(expected) * part // 8)
            wait_for(kill_a_worker)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (1, b"score.py: 1 of 4500 texts could not be scored\n")
    assert output.read_bytes() == expected


def test_a_scheduler_that_goes_away(model, corpus, tmp_path):
    """The scheduler and the worker run in another folder. The output is completed without them."""
    pytest.importorskip("distributed", reason=WITHOUT_DISTRIBUTED)
    path, expected = corpus
    output = tmp_path / "scores.jsonl"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    start = [
        sys.executable,
        "-m",
        "distributed.cli.dask_scheduler",
        "--host",
        address,
        "--no-dashboard",
    ]
    join = [
        sys.executable,
        "-m",
        "distributed.cli.dask_worker",
        address,
        "--no-nanny",
        "--no-dashboard",
    ]
    quiet = {"cwd": tmp_path, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(start, **quiet) as scheduler, subprocess.Popen(join, **quiet) as worker:
        try:
            arguments = command(model, path, "--output", output, "--scheduler", address)
            with running(arguments) as process:
                wait_for(lambda: size(output))
                scheduler.kill()
                _, stderr = process.communicate(timeout=60)
        finally:
            scheduler.kill()
            worker.kill()
    *waiting, lost = stderr.decode().splitlines()
    assert (process.returncode, lost) == (1, "score.py: no connection to the Dask scheduler")
    assert waiting in ([], ["score.py: the scheduler has no workers yet; waiting for them"])
    assert run(model, path, "--output", output).returncode == 1
    assert output.read_bytes() == expected


# The terminal


def test_the_progress_bar(model, corpus, tmp_path):
    pty = pytest.importorskip("pty", reason="needs a terminal")
    ours, theirs = pty.openpty()
    termios = pytest.importorskip("termios", reason="needs a terminal")
    pytest.importorskip("fcntl").ioctl(
        theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0)
    )
    arguments = command(model, corpus[0], "--output", tmp_path / "scores.jsonl")
    with subprocess.Popen(arguments, cwd=ROOT, stderr=theirs) as process:
        os.close(theirs)
        shown = read_terminal(ours)
    assert process.returncode == 1
    assert b"100%|" in shown
    assert b"4,500 texts, " in shown
    assert b"tokens/s" in shown
