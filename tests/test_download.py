"""download_gpt2_files against a server with every kind of fault.

Whatever happens, each file is intact or absent, any error is one clear line, and the next call
downloads what is missing.
"""

import errno
import fcntl
import functools
import gzip
import hashlib
import io
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from helpers import FILES, ROOT
from server import ALWAYS, DATE, Fault, Server

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

slow = functools.partial(pytest.param, marks=pytest.mark.slow)


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
    clock = SimpleNamespace(sleep=naps.append, monotonic=time.monotonic, time=time.time)
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(utils, "time", clock)
    monkeypatch.setattr("urllib3.util.retry.time", clock)
    return naps


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "355M"


def download(folder, model_size="355M"):
    utils.download_gpt2_files(model_size, str(folder))


def download_fails(folder, message, model_size="355M", error_class=OSError):
    """Expect an error of a documented class, in one line that matches a regular expression."""
    with pytest.raises(error_class) as caught:
        download(folder, model_size)
    assert not isinstance(caught.value, requests.RequestException)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
    return caught.value


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def is_resumed(request, kept):
    """The last byte may be requested again, so that there always is a range to request."""
    return (request.start or 0) in (kept, max(kept - 1, 0))


def missing(folder):
    return [name for name in SIZES if not (folder / name).exists()]


def check_complete(folder, files):
    assert sorted(os.listdir(folder)) == sorted(SIZES)  # and nothing else
    for name in SIZES:
        assert (folder / name).read_bytes() == files[name], name


def check_completes(folder, server):
    """Each missing file takes one request, which resumes a partial file.

    Then all files are intact, and a third download has nothing to do.
    """
    expected = missing(folder)
    kept = {}
    for name in SIZES:
        part = folder / f"{name}.part"
        kept[name] = size_of(part) if size_of(folder / f"{name}.part.version") else 0
    server.heal()
    download(folder)
    assert [request.name for request in server.requests] == expected
    for request in server.requests:
        assert is_resumed(request, kept[request.name])
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
    assert [request.name for request in server.requests] == [
        n for n in SIZES if n != "hparams.json"
    ]
    assert {request.size for request in server.requests} == {"355M"}
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}
    for name in ("hparams.json", "notes.txt"):
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()
    check_completes(folder, server)


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
    "http://a host|http://" + 70 * "a" + ".example"
)


@pytest.mark.parametrize("address", UNUSABLE.split("|"))
def test_unusable_addresses_raise(tmp_path, monkeypatch, address):
    """A download that fails at once leaves no empty folder."""
    monkeypatch.setenv("GPT2_BASE_URL", address)
    message = re.escape(address.rstrip("/").removeprefix("http://"))
    download_fails(tmp_path / "new" / "355M", message, error_class=(ConnectionError, ValueError))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_size", ["", "345M", "tiny"])
def test_unknown_sizes_raise(server, folder, model_size):
    download_fails(folder, r"124M, 355M, 774M, 1558M", model_size, ValueError)
    assert not folder.exists()
    assert server.requests == []


# Faults of the server


def works(n_requests, *faults, times=1, naps=None, **settings):
    """The server has these faults when DATA is requested. The download takes n_requests for it.

    `times` is the number of the last fault, naps are the sleeps in seconds, and settings are other
    values of constants in utils. None stands for any number and for any sleeps.
    """
    return n_requests, None, naps, faults, times, settings


def fails(n_requests, message, *faults, naps=None, **settings):
    """The last fault stays, and the error has this message."""
    return n_requests, message, naps, faults, ALWAYS, settings


def cut(n_bytes=N // 2, then="close", headers=""):
    return Fault(headers=headers, sends=n_bytes, then=then)


def later(value):
    return Fault(429, f"Retry-After: {value}")


def other_bytes(body):
    return body[:-1] + bytes([body[-1] ^ 1])


HINT = "; --model_size tiny needs no network$"
NO_HINT = "without response$"
NO_VERSION = cut(headers="ETag\nLast-Modified")
OTHER_VERSION = Fault(headers='ETag: "other"', ignores_if_range=True)
OTHER_MD5 = "AAAAAAAAAAAAAAAAAAAAAA=="
SILENCE = Fault(silent=True, then="close")
RESET = Fault(silent=True, then="reset")
SILENT_STALL = Fault(silent=True, then="stall")
STALL = cut(then="stall")
NO_BODY_STALL = cut(0, then="stall")
LONGER = Fault(change=lambda body: body + b"!", headers=f"Content-Length: {N}")
GZIP = Fault(change=gzip.compress, headers="Content-Encoding: gzip")
RANGE_OF_50 = f"Content-Range: bytes {{start}}-{N // 2 + 49}/{N}"
FIFTY_BYTES = Fault(change=lambda body: body[:50], headers=RANGE_OF_50)
FAULTS = {
    "206": fails(1, "HTTP status 206", 206),
    "404": fails(1, "HTTP status 404", 404),
    "416": fails(1, "HTTP status 416", 416),
    "416 when resuming": works(3, cut(), 416),
    "some statuses": works(5, 408, 425, 500, 502),
    "503 and resets": works(8, 503, RESET, 504, RESET, 503, RESET, 503),
    "503 for ever": fails(5, "HTTP status 503", 503, naps=[1, 2, 4]),
    "later": works(2, later("7"), naps=[7]),
    "much later": works(2, later("99999"), naps=[30]),
    "at a later date": works(2, later("Wed, 06 Nov 2999 00:00:00 GMT"), naps=[30]),
    "at an earlier date": works(2, later("Wed, 06 Nov 2019 00:00:00 GMT"), naps=[]),
    "at an impossible date": works(2, later("Wed, 06 Nov 99999 00:00:00 GMT"), naps=[]),
    "at too large a number": works(2, later("9" * 5000), naps=[]),
    "soon": works(2, later("soon"), naps=[]),
    "redirects in a circle": fails(31, "redirects", Fault(302, f"Location: {DATA}")),
    "redirect to ftp": fails(1, "ftp", Fault(302, "Location: ftp://127.0.0.1/")),
    "no answer": fails(5, HINT, SILENCE, naps=[0.5, 1, 2, 4]),
    "no answer after PATIENCE": fails(1, HINT, SILENCE, PATIENCE=-1),
    "no answer after PATIENCE, but bytes": fails(5, NO_HINT, cut(), SILENCE, PATIENCE=-1),
    "silence": fails(1, f"timed out.*{HINT}", SILENT_STALL, TIMEOUT=(10, 0.3), PATIENCE=0.2),
    "stall": works(None, STALL, TIMEOUT=(10, 0.5)),
    "stall without a body": fails(1, "timed out", NO_BODY_STALL, TIMEOUT=(10, 0.3), PATIENCE=0.2),
    "few bytes each time": works(None, cut(N // 20), times=ALWAYS),
    "a byte long": works(1, LONGER),
    "other bytes when resuming": fails(2, "md5", cut(), Fault(change=other_bytes)),
    "other MD5": fails(1, "md5", f"Content-MD5: {OTHER_MD5}"),
    "other MD5 of Azure": fails(1, "md5", f"x-ms-blob-content-md5: {OTHER_MD5}"),
    "MD5 of the rest": works(2, cut(), f"x-ms-blob-content-md5\nContent-MD5: {OTHER_MD5}"),
    "no MD5": works(1, "Content-MD5"),
    "not an MD5": fails(1, "", "Content-MD5: abc"),
    "web page": fails(1, "web page", "Content-Type: TEXT/HTML; charset=utf-8"),
    "gzip": fails(1, "compressed", GZIP),
    "no length": fails(1, "state the length", "Content-Length"),
    "not a length": fails(None, "", cut(None, headers="Content-Length: long")),
    "chunks and a length": fails(1, "length", "Transfer-Encoding: chunked"),
    "range ignored": works(2, cut(), Fault(ignores_range=True)),
    "other range": works(3, cut(), f"Content-Range: bytes 0-{N - 1}/{N}"),
    "no range": works(3, cut(), "Content-Range"),
    "other total": works(None, cut(), f"Content-Range: bytes {{start}}-{N - 1}/{N + 9}"),
    "fifty bytes": works(3, cut(), FIFTY_BYTES),
    "no version for ever": fails(5, f"of {N}|{N // 2} more", NO_VERSION),
    "other version": works(3, cut(), OTHER_VERSION),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_server(server, folder, naps, monkeypatch, case):
    """The files before DATA are there, so that it is the first that the server is asked for."""
    expected_requests, message, expected_naps, faults, times, settings = FAULTS[case]
    folder.mkdir()
    there = list(SIZES)[:3]
    for name in there:
        (folder / name).write_bytes(server.files[name])
    server.misbehave(DATA, *faults, times=times)
    with monkeypatch.context() as patch:
        for setting, value in settings.items():
            patch.setattr(utils, setting, value)
        if message is None:
            download(folder)
            check_complete(folder, server.files)
        else:
            download_fails(folder, f"{DATA}: .*{message}", error_class=ConnectionError)
            assert missing(folder) == [name for name in SIZES if name not in there]
    n_requests = len(server.asked(DATA))
    assert expected_requests in (n_requests, None)
    assert n_requests <= 31
    assert expected_naps in (naps, None)
    assert len(naps) < len(server.requests)  # no sleep without a retry
    check_completes(folder, server)


FAULTS_OF_FILES = zip(SIZES, 2 * [404, cut(0), Fault(change=other_bytes), RESET], strict=False)


@pytest.mark.parametrize(("name", "fault"), list(FAULTS_OF_FILES))
def test_faults_for_any_file(server, folder, name, fault):
    server.misbehave(name, fault, times=ALWAYS)
    download_fails(folder, re.escape(name))
    check_completes(folder, server)


# Resuming

THE_FILE = random_files()[DATA]
OTHER_FILE = random.Random(1).randbytes(N + 999)
THE_ETAG = f'"{hashlib.md5(THE_FILE).hexdigest()}"'


@pytest.mark.parametrize("offset", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, N // 2, N - 1])
@pytest.mark.parametrize(
    ("then", "omitted", "version"),
    [("close", "", THE_ETAG), ("reset", "", THE_ETAG), ("close", "ETag", DATE)],
)
def test_resumes_where_the_connection_was_cut(server, folder, offset, then, omitted, version):
    server.misbehave(DATA, cut(offset, then, omitted), omitted)
    download(folder)
    first, second = server.asked(DATA)
    assert (first.start, first.status, first.sent) == (None, 200, offset)
    if then == "close":  # a reset can lose bytes in transit
        whole_chunks = offset // CHUNK * CHUNK  # a new urllib3 returns no others
        assert is_resumed(second, whole_chunks) or is_resumed(second, offset)
    start = second.start or 0
    assert start <= offset
    assert start + second.sent == N
    if start:
        assert second.status == 206
        assert second.headers["If-Range"] == version
    check_complete(folder, server.files)


def test_an_interruption_loses_little(server, folder, monkeypatch):
    """With the real size of chunks, an interruption loses at most one. The next run resumes."""
    monkeypatch.setattr(utils, "CHUNK_BYTES", REAL_CHUNK)
    server.files = random_files(**{DATA: 1_200_000})
    server.misbehave(DATA, cut(250_000), cut(250_000), 404)
    download_fails(folder, "404")
    kept = (folder / f"{DATA}.part").read_bytes()
    assert 2 * (250_000 - REAL_CHUNK) - 1 <= len(kept) <= 500_000
    assert kept == server.files[DATA][: len(kept)]
    check_completes(folder, server)


@pytest.mark.parametrize(
    ("part", "version", "n_requests", "sent"),
    [
        (THE_FILE, THE_ETAG, 1, 1),  # killed before the verification
        (THE_FILE[: N // 2], THE_ETAG, 1, N - N // 2 + 1),
        (THE_FILE + b"!", THE_ETAG, 2, N),
        (b"whatever", None, 1, N),  # a power cut may leave such files
        (b"whatever", "", 1, N),
        (b"", THE_ETAG, 1, N),
        (OTHER_FILE[: N // 2], '"other"', 1, N),
        (OTHER_FILE, '"other"', 1, N),
    ],
)
@pytest.mark.parametrize("ignores_if_range", [False, True])
def test_leftovers(server, folder, part, version, n_requests, sent, ignores_if_range):
    """Parts of two versions are never joined, even if the server ignores If-Range."""
    folder.mkdir()
    (folder / "hparams.json").write_bytes(server.files["hparams.json"])
    (folder / "hparams.json.part.version").write_text("killed before this file is deleted")
    (folder / f"{DATA}.part").write_bytes(part)
    if version is not None:
        (folder / f"{DATA}.part.version").write_text(version)
    server.misbehave(DATA, Fault(ignores_if_range=ignores_if_range), times=ALWAYS)
    download(folder)
    check_complete(folder, server.files)
    asked = server.asked(DATA)
    assert len(asked) == n_requests + (ignores_if_range and version == '"other"')
    assert asked[-1].sent == sent


@pytest.mark.parametrize(
    ("variable", "message"), [("GPT2_BASE_URL", "refused"), ("http_proxy", "the proxy: .*refused")]
)
def test_nobody_listens(server, folder, naps, monkeypatch, variable, message):
    for name in ("no_proxy", "http_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        monkeypatch.setenv(variable, f"http://127.0.0.1:{bound.getsockname()[1]}")
        message = f"http://.*checkpoint: .*{message}.*{HINT}"
        download_fails(folder, message, error_class=ConnectionError)
    assert len(naps) == 4
    assert server.requests == []


def test_a_silent_server_takes_ten_seconds():
    """A first request that is not answered in time is the last one, see FAULTS."""
    assert utils.PATIENCE < utils.TIMEOUT[1] <= 10


# Redirects


def test_redirect_to_another_host(server, folder):
    """The other host is asked for everything, with Range where a download resumes."""
    with Server(server.files) as other:
        there = other.address.replace("127.0.0.1", "localhost")
        for name in SIZES:
            server.misbehave(name, Fault(302, f"Location: {there}/355M/{name}"), times=ALWAYS)
        other.misbehave(DATA, cut())
        download(folder)
        check_complete(folder, server.files)
        assert [request.status for request in other.asked(DATA)] == [200, 206]
        assert server.sent < 10_000


@pytest.mark.parametrize("scheme", ["https", "http", "HTTP"])
def test_redirect_from_https_stays_https(server, folder, monkeypatch, scheme):
    """Requests to an https address are sent with http, because the server has no certificate."""
    send = requests.adapters.HTTPAdapter.send

    def send_with_http(adapter, request, **how):
        request.url = request.url.replace("https", "http", 1)
        return send(adapter, request, **how)

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send_with_http)
    monkeypatch.setenv("GPT2_BASE_URL", server.address.replace("http", "https"))
    location = server.address.replace("http", scheme) + "/355M/vocab.bpe"
    server.misbehave("checkpoint", Fault(302, f"Location: {location}"))
    if scheme == "https":
        download(folder)
        assert (folder / "checkpoint").read_bytes() == server.files["vocab.bpe"]
    else:
        message = "https://.*/355M/checkpoint: .*http://127.0.0.1"
        download_fails(folder, message, error_class=ConnectionError)
        assert len(server.requests) == 1


# SHA-256


@pytest.mark.parametrize(
    ("value", "model_size"), [(None, "124M"), ("", "124M"), ("0", "124M"), (None, "1558M")]
)
def test_sha256_is_checked_by_default(server, folder, monkeypatch, model_size, value, capfd):
    """All SHA-256 are known for 124M, for other sizes only those of the shared vocabulary."""
    known = {name: hashlib.sha256(body).hexdigest() for name, body in server.files.items()}
    monkeypatch.setattr(utils, "FILES", known)
    monkeypatch.delenv("GPT2_ALLOW_UNVERIFIED")
    if value is not None:
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", value)
    checked = SIZES if model_size == "124M" else ("encoder.json", "vocab.bpe")
    for name, original in list(server.files.items()):
        server.files[name] = other_bytes(original)
        if name in checked:
            download_fails(folder, f"{name}.*sha256", model_size)
            assert name in missing(folder)
            assert not list(folder.glob("*.part*"))
            server.files[name] = original
    download(folder, model_size)
    check_complete(folder, server.files)
    assert capfd.readouterr() == ("", "")  # no progress bar without a terminal


def test_published_sha256_of_the_vocabulary(server, folder, monkeypatch, real_vocabulary, capfd):
    """GPT-2's vocabulary passes the check. Random files do not, unless the user allows them."""
    monkeypatch.delenv("GPT2_ALLOW_UNVERIFIED")
    download_fails(folder, r"encoder\.json.*sha256")
    random_vocabulary = server.files["vocab.bpe"]
    for name in ("encoder.json", "vocab.bpe"):
        server.files[name] = Path(*real_vocabulary, name).read_bytes()
    check_completes(folder, server)
    assert capfd.readouterr().err == ""
    (folder / "vocab.bpe").unlink()
    server.files["vocab.bpe"] = random_vocabulary
    monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
    check_completes(folder, server)
    assert re.fullmatch(r"warning: GPT2_ALLOW_UNVERIFIED .*\n", capfd.readouterr().err)


def test_progress_bars_end_at_100_percent(server, folder, monkeypatch):
    shown = io.StringIO()
    shown.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", shown)
    server.misbehave("model.ckpt.meta", cut(20_000))  # its second bar continues the first one
    download(folder)
    bars = re.split(r"[\r\n]+", shown.getvalue())
    for name, size in SIZES.items():
        last = [bar for bar in bars if bar.startswith(name)][-1]
        assert "100%" in last
        assert f"{size:,}".split(",")[0] in last


# The disk


@pytest.mark.parametrize("room", [0, 40, 101_234])
def test_a_file_that_cannot_grow(server, folder, room):
    """The kernel's limit for the size of a file acts like a full disk: it writes what fits."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        error = download_fails(folder, r"File too large: .*/355M/.*\.part")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.errno == errno.EFBIG
    if room:
        assert [part.stat().st_size for part in folder.glob("*.part")] == [room]
    check_completes(folder, server)


def test_a_file_in_place_of_the_folder(server, folder):
    folder.write_text("a file")
    download_fails(folder, "355M")
    download_fails(folder / "below", "355M")
    assert folder.read_text() == "a file"
    assert server.sent == 0


def test_a_folder_that_cannot_be_written(server, folder):
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("root can write everywhere")
    download_fails(folder, "checkpoint", error_class=PermissionError)
    folder.chmod(0o700)
    check_completes(folder, server)


# The lock


def test_a_folder_that_cannot_be_locked(server, folder, monkeypatch):
    """Some network file systems have no locks. The download works without one."""

    def flock(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    check_completes(folder, server)


@pytest.mark.parametrize("function", [(os, "open"), (fcntl, "flock")])
@pytest.mark.parametrize("times", [2, 3])
def test_a_folder_that_another_process_removes(server, tmp_path, monkeypatch, function, times):
    """A process whose download failed removes the folders between two steps of this one."""
    folder = tmp_path / "models" / "355M"
    original = getattr(*function)
    n_removed = 0

    def remove_before(*args, **how):
        nonlocal n_removed
        if n_removed < times and folder.is_dir():
            n_removed += 1
            folder.rmdir()
            folder.parent.rmdir()
        return original(*args, **how)

    monkeypatch.setattr(utils, "LOCK_ATTEMPTS", 3)
    monkeypatch.setattr(*function, remove_before)
    if times == 3:
        download_fails(folder, "No such file or directory: .*355M")
    else:
        download(folder)
        check_complete(folder, server.files)
    assert n_removed == times


# Processes


@pytest.mark.parametrize("nth", [7, 16, *map(slow, range(0, 30, 3))])
def test_killed(server, folder, nth):
    """SIGINT and SIGKILL in turn, at points spread over the whole download."""
    server.files = random_files(seed=nth, **{DATA: 3_000_000, "model.ckpt.meta": 500_000})
    how = (signal.SIGINT, signal.SIGKILL)[nth % 2]
    server.gate.clear()
    with subprocess.Popen([*DOWNLOAD, str(folder)], cwd=ROOT, stderr=subprocess.DEVNULL) as process:

        def kill():
            process.send_signal(how)
            process.wait()

        server.after(sum(map(len, server.files.values())) * nth // 30 + 1, kill)
        server.gate.set()
    assert process.returncode == -how
    for path in folder.glob("*.part"):
        assert server.files[path.stem].startswith(path.read_bytes())
    assert missing(folder)
    check_completes(folder, server)


@pytest.mark.parametrize(("n_processes", "n_fail"), [(3, 1), slow(8, 0)])
def test_processes_wait_for_each_other(server, folder, n_processes, n_fail, tmp_path):
    """The server holds its answer back until all processes but one wait for the lock.

    If that one fails and removes the folder, the next one downloads.
    """
    if n_fail:
        server.misbehave("checkpoint", 404)
    server.gate.clear()
    logs = [tmp_path / f"{i}.log" for i in range(n_processes)]
    processes = []
    try:
        for log in logs:
            with log.open("w") as file:
                processes.append(subprocess.Popen([*DOWNLOAD, str(folder)], cwd=ROOT, stderr=file))
        deadline = time.monotonic() + 200
        while sum("waiting" in log.read_text() for log in logs) < n_processes - 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        server.gate.set()
        exit_codes = sorted(process.wait() for process in processes)
    assert exit_codes == [0] * (n_processes - n_fail) + [1] * n_fail
    assert [request.name for request in server.requests] == ["checkpoint"] * n_fail + list(SIZES)
    check_complete(folder, server.files)
