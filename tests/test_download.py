"""download_gpt2_files against a server with every kind of fault.

Whatever happens, each file is intact or absent, any error is one clear line, and the next call
downloads what is missing.
"""

import base64
import contextlib
import errno
import fcntl
import gzip
import hashlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import requests
from helpers import FILES, ROOT, Terminal
from server import ALWAYS, Fault, Server

import utils

SIZES = dict(zip(FILES, (77, 30_000, 90, 200_000, 5_000, 40_000, 20_000), strict=True))
DATA = "model.ckpt.data-00000-of-00001"
N = SIZES[DATA]
REAL_CHUNK = utils.CHUNK_BYTES
CHUNK = 4096  # small chunks for small files

DOWNLOAD = (
    sys.executable,
    "-c",
    f"import sys, utils; utils.TIMEOUT = (300, 300); utils.CHUNK_BYTES = {CHUNK}; "
    "utils.download_gpt2_files('355M', sys.argv[1])",
)


def random_files(seed=0, **sizes):
    rng = random.Random(seed)
    return {name: rng.randbytes(size) for name, size in (SIZES | sizes).items()}


@pytest.fixture
def server(monkeypatch):
    """A server with seven random files in place of OpenAI's. SHA-256 is not checked.

    Long timeouts are for a busy machine.
    """
    with Server(random_files()) as server:
        monkeypatch.setenv("GPT2_BASE_URL", server.address)
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
        monkeypatch.setattr(utils, "CHUNK_BYTES", CHUNK)
        monkeypatch.setattr(utils, "TIMEOUT", (60, 60))
        monkeypatch.setattr(utils, "PATIENCE", 60)
        yield server


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """The seconds of each sleep between requests, which these tests skip."""
    naps = []
    clock = SimpleNamespace(sleep=naps.append, monotonic=time.monotonic)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(utils, "time", clock)
    return naps


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "355M"


def download(folder, model_size="355M"):
    utils.download_gpt2_files(model_size, str(folder))


def download_fails(folder, message, model_size="355M", error_class=OSError):
    """Expect an error of a documented class, in one line that matches a regular expression."""
    with pytest.raises(error_class, match=message) as caught:
        download(folder, model_size)
    assert not isinstance(caught.value, requests.RequestException)
    assert "\n" not in str(caught.value)
    return caught.value


def missing(folder):
    return [name for name in SIZES if not (folder / name).exists()]


def check_complete(folder, files):
    """These files are there, and nothing else."""
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == files


def check_completes(folder, server):
    """Each missing file takes one request, which resumes a partial file.

    Its last byte is requested again, so that there always is a range to request. Then all files are
    intact, and a third download has nothing to do.
    """
    expected = []
    for name in missing(folder):
        part = folder / f"{name}.part"
        kept = part.stat().st_size if part.exists() else 0
        expected.append((name, max(kept - 1, 0)))
    server.heal()
    download(folder)
    assert [(request.name, request.start) for request in server.requests] == expected
    check_complete(folder, server.files)
    server.heal()
    download(folder)
    assert server.requests == []


# Requests


def test_missing_files_are_downloaded(server, folder):
    folder.mkdir()
    for name in ("hparams.json", "notes.txt"):
        (folder / name).write_text("mine")
    download(folder)
    expected = [("355M", name) for name in SIZES if name != "hparams.json"]
    assert [(request.size, request.name) for request in server.requests] == expected
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}
    server.files |= {"hparams.json": b"mine", "notes.txt": b"mine"}
    check_complete(folder, server.files)


@pytest.mark.parametrize(
    ("address", "name"), [("", "[x]*"), ("http{}/", "%20 ?#"), ("HTTP{}", os.fsdecode(b"\xff"))]
)
def test_unusual_addresses_and_folders(server, folder, monkeypatch, address, name):
    """None means the default. A slash at the end and capitals make no difference."""
    monkeypatch.setattr(utils, "BASE_URL", server.address)
    monkeypatch.setenv("GPT2_BASE_URL", address.format(server.address.removeprefix("http")))
    check_completes(folder / name, server)


UNUSABLE = (
    "127.0.0.1:80|ftp://127.0.0.1/|http://|http://[::1|http://host:port|http://127.0.0.1:99999|"
    "http://a host|http://127.0.0.1:9|http://" + 70 * "a" + ".example"
)


@pytest.mark.parametrize("address", UNUSABLE.split("|"))
@pytest.mark.parametrize("secret", ["", "user:pass@"])
def test_unusable_addresses_raise(tmp_path, monkeypatch, capfd, address, secret):
    """A download that fails at once leaves no empty folder, and no message shows a password."""
    monkeypatch.setenv("GPT2_BASE_URL", address.replace("//", f"//{secret}"))
    error = download_fails(
        tmp_path / "new" / "355M", ".", error_class=(ConnectionError, ValueError)
    )
    assert list(tmp_path.iterdir()) == []
    assert not re.search("user|pass", f"{error} {capfd.readouterr().err}")


def test_a_user_and_a_password(server, folder, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", server.address.replace("//", "//user:pass@"))
    download(folder)
    credentials = "Basic " + base64.b64encode(b"user:pass").decode()
    assert {request.headers["Authorization"] for request in server.requests} == {credentials}


def test_unknown_sizes_raise(server, folder):
    for model_size in ("", "345M", "tiny"):
        download_fails(folder, "124M, 355M, 774M, 1558M", model_size, ValueError)
    assert not folder.exists()
    assert server.requests == []


# Faults of the server


class Case(NamedTuple):
    """What comes of faults of the server when DATA is requested."""

    n_requests: int | None  # that the download takes for DATA; None: any number
    error: str | None  # the message; None if the download works
    faults: tuple  # see Server.misbehave
    times: int  # of the last fault
    naps: list | None  # the sleeps in seconds; None: any
    settings: dict  # other values of constants in utils


def works(n_requests, *faults, times=1, naps=None, **settings):
    return Case(n_requests, None, faults, times, naps, settings)


def fails(n_requests, error, *faults, naps=None, **settings):
    """The last fault stays."""
    return Case(n_requests, error, faults, ALWAYS, naps, settings)


def cut(n_bytes=N // 2, then="close"):
    return Fault(sends=n_bytes, then=then)


def later(value):
    return Fault(429, f"Retry-After: {value}")


SILENCE = Fault(silent=True, then="close")
RESET = Fault(silent=True, then="reset")
STALL = Fault(silent=True, then="stall")
GZIP = Fault(change=gzip.compress, headers="Content-Encoding: gzip")
IGNORES_RANGE = Fault(ignores_range=True)
CUT_AGAIN = Fault(ignores_range=True, sends=N // 2, then="close")
FAULTS = {
    "206": fails(1, "HTTP status 206", 206),
    "404": fails(1, "HTTP status 404", 404),
    "416 when resuming": works(3, cut(), 416),
    "some statuses": works(5, 408, 425, 500, 502),
    "503 and cuts": works(8, 503, cut(50_000), 504, RESET, 503, cut(50_000), 503),
    "503 for ever": fails(5, "HTTP status 503", 503, naps=[0.5, 1, 2, 4]),
    "later": works(2, later("7"), naps=[7]),
    "at too large a number": works(2, later("9" * 5000), naps=[30]),
    "at a later date": works(2, later("Wed, 06 Nov 2999 00:00:00 GMT"), naps=[0.5]),
    "redirects in a circle": fails(31, "redirects", Fault(302, f"Location: {DATA}")),
    "no answer": fails(5, "without response", SILENCE, naps=[0.5, 1, 2, 4]),
    "no answer after PATIENCE": fails(1, "without response", SILENCE, PATIENCE=-1),
    "no answer after PATIENCE, but bytes": fails(5, "without resp", cut(), SILENCE, PATIENCE=-1),
    "silence": fails(1, "timed out", STALL, TIMEOUT=(10, 0.3), PATIENCE=0.2),
    "stall": works(None, cut(then="stall"), TIMEOUT=(10, 0.5)),
    "few bytes each time": works(None, cut(N // 20), times=ALWAYS),
    "web page": fails(1, "web page", "Content-Type: TEXT/HTML; charset=utf-8"),
    "gzip": fails(1, "state the length", GZIP),
    "no length": fails(1, "state the length", "Content-Length"),
    "range ignored": works(2, cut(), IGNORES_RANGE),
    "range ignored for ever": fails(5, "more expected", CUT_AGAIN),
    "other range": works(3, cut(), f"Content-Range: bytes 0-{N - 1}/{N}"),
    "other total": fails(6, "of", cut(), f"Content-Range: bytes {{start}}-{N - 1}/{N + 9}"),
}


for offset in (0, 1, CHUNK - 1, CHUNK, CHUNK + 1, N - 1):
    FAULTS[f"cut at {offset}"] = works(2, cut(offset))
    FAULTS[f"reset at {offset}"] = works(2, cut(offset, "reset"))


@pytest.mark.parametrize("case", FAULTS.values(), ids=FAULTS)
def test_faults_of_the_server(server, folder, naps, monkeypatch, case):
    """The files before DATA are there, so that it is the first that the server is asked for."""
    folder.mkdir()
    there = list(SIZES)[:3]
    for name in there:
        (folder / name).write_bytes(server.files[name])
    server.misbehave(DATA, *case.faults, times=case.times)
    with monkeypatch.context() as patch:
        for setting, value in case.settings.items():
            patch.setattr(utils, setting, value)
        if case.error is None:
            download(folder)
            check_complete(folder, server.files)
        else:
            download_fails(folder, f"{DATA}: .*{case.error}", error_class=ConnectionError)
            assert missing(folder) == list(SIZES)[3:]
    n_requests = len(server.asked(DATA))
    assert case.n_requests in (n_requests, None)
    assert n_requests <= 31
    assert case.naps in (naps, None)
    assert len(naps) < len(server.requests)  # no sleep without a retry
    check_completes(folder, server)


# Resuming


def test_an_interruption_loses_little(server, folder, monkeypatch):
    """With the real size of chunks, an interruption loses at most one. The next run resumes."""
    monkeypatch.setattr(utils, "CHUNK_BYTES", REAL_CHUNK)
    server.files = random_files(**{DATA: 1_200_000})
    server.misbehave(DATA, cut(250_000), 404)
    download_fails(folder, "404")
    kept = (folder / f"{DATA}.part").read_bytes()
    assert len(kept) >= 250_000 - REAL_CHUNK
    assert server.files[DATA].startswith(kept)
    check_completes(folder, server)


def test_leftovers(server, folder):
    """A whole file of a run that was killed before the verification, and one that is too long."""
    folder.mkdir()
    for more, expected in {b"": [(206, 1)], b"!!": [(416, 0), (200, N)]}.items():
        (folder / DATA).unlink(missing_ok=True)
        (folder / f"{DATA}.part").write_bytes(server.files[DATA] + more)
        server.heal()
        download(folder)
        check_complete(folder, server.files)
        assert [(request.status, request.sent) for request in server.asked(DATA)] == expected


# Redirects


@pytest.mark.parametrize("scheme", ["https", "HTTP"])
def test_redirect_from_https_stays_https(server, folder, monkeypatch, scheme):
    """Requests to an https address are sent with http, because the server has no certificate."""
    send = requests.adapters.HTTPAdapter.send

    def send_with_http(adapter, request, **how):
        request.url = request.url.replace("https", "http", 1)
        return send(adapter, request, **how)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send_with_http)
    monkeypatch.setenv("GPT2_BASE_URL", server.address.replace("http", "https"))
    location = server.address.replace("http", scheme) + "/355M/checkpoint"
    server.misbehave("checkpoint", Fault(302, f"Location: {location}"))
    if scheme == "https":
        download(folder)
        check_complete(folder, server.files)
    else:
        message = "https://.*/355M/checkpoint: .*http://127.0.0.1"
        download_fails(folder, message, error_class=ConnectionError)
        assert len(server.requests) == 1


# SHA-256


@pytest.mark.parametrize(("model_size", "allowed"), [("124M", ""), ("124M", "0"), ("1558M", "")])
def test_sha256_is_checked_by_default(server, folder, monkeypatch, capfd, model_size, allowed):
    """All SHA-256 are known for 124M, for other sizes only those of the shared files."""
    intact = server.files
    known = {name: hashlib.sha256(body).hexdigest() for name, body in intact.items()}
    monkeypatch.setattr(utils, "FILES", known)
    monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", allowed)
    server.files = {name: body[1:] for name, body in intact.items()}
    for name in SIZES if model_size == "124M" else ("checkpoint", "encoder.json", "vocab.bpe"):
        download_fails(folder, f"{name}.*SHA-256", model_size)
        assert not list(folder.glob(f"{name}*"))
        server.files[name] = intact[name]
    download(folder, model_size)
    check_complete(folder, server.files)
    lines = capfd.readouterr().err.splitlines()  # no progress bar without a terminal
    assert set(lines) == {f"downloading {model_size} from {server.address}"}


def test_published_sha256(real_vocabulary):
    published = {
        name: Path(*real_vocabulary, name).read_bytes() for name in ("encoder.json", "vocab.bpe")
    }
    published["checkpoint"] = (
        b'model_checkpoint_path: "model.ckpt"\nall_model_checkpoint_paths: "model.ckpt"\n'
    )
    for name, content in published.items():
        assert utils.FILES[name] == hashlib.sha256(content).hexdigest()


def test_progress_bars_end_at_100_percent(server, folder, monkeypatch):
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    server.misbehave("model.ckpt.meta", cut(20_000))  # its second bar continues the first one
    download(folder)
    bars = re.split(r"[\r\n]+", shown.getvalue())
    for name, size in SIZES.items():
        *_, last = [bar for bar in bars if bar.startswith(name)]
        assert "100%" in last
        assert f"{size // 1000 or size}" in last


# The disk and the lock


def test_a_file_that_cannot_grow(server, folder):
    """The kernel's limit for the size of a file acts like a full disk: it writes what fits."""
    room = 101_234
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        error = download_fails(folder, r"File too large: .*/355M/.*\.part")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.errno == errno.EFBIG
    assert [part.stat().st_size for part in folder.glob("*.part")] == [room]
    check_completes(folder, server)


def test_a_file_in_place_of_the_folder(server, folder):
    folder.write_text("a file")
    download_fails(folder, "355M")
    download_fails(folder / "below", "355M")
    assert folder.read_text() == "a file"


def test_a_folder_that_cannot_be_written(server, folder):
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("root can write everywhere")
    download_fails(folder, "checkpoint", error_class=PermissionError)
    folder.chmod(0o700)
    check_completes(folder, server)


def test_a_folder_that_cannot_be_locked(server, folder, monkeypatch):
    """Some network file systems have no locks. The download works without one."""

    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    check_completes(folder, server)


# Processes


@contextlib.contextmanager
def processes(folder, n):
    """n processes that download the same files."""
    quiet = {"cwd": ROOT, "stderr": subprocess.DEVNULL}
    started = [subprocess.Popen([*DOWNLOAD, str(folder)], **quiet) for _ in range(n)]
    yield started
    for process in started:
        process.wait(300)


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("n_bytes", [1, N // 2, N])
def test_killed(server, folder, how, n_bytes):
    server.misbehave(DATA, cut(n_bytes, "stall"))
    with processes(folder, 1) as (process,):
        while not any(request.sent == n_bytes for request in server.asked(DATA)):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(how)
    assert process.returncode == -how
    for path in folder.glob("*.part"):
        assert server.files[path.stem].startswith(path.read_bytes())
    assert missing(folder)
    check_completes(folder, server)


@pytest.mark.parametrize("is_right", [True, False])
def test_processes_wait_for_each_other(server, folder, is_right):
    """All but one wait for the lock of the large file, and then find the file or its rest."""
    if not is_right:  # the first one to get the lock is cut off
        server.misbehave(DATA, *[cut(N // 2)] * 3)
    server.gate.clear()
    with processes(folder, 3) as started:
        while len(server.requests) < 3:
            assert not any(process.poll() for process in started)
            time.sleep(0.01)
        server.gate.set()
    assert [process.returncode for process in started] == [0, 0, 0]
    check_complete(folder, server.files)
