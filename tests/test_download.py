"""download_gpt2_files against a server that does everything wrong that a server can do.

Whatever happens, there is an intact file or none, one clear error or none, and the next call fetches what is missing.
"""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import io
import os
import pty
import random
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import urllib3
from helpers import ROOT
from server import ALWAYS, Fault, Server

import utils

SIZES = {
    "checkpoint": 77,
    "encoder.json": 30_000,
    "hparams.json": 90,
    "model.ckpt.data-00000-of-00001": 200_000,
    "model.ckpt.index": 5_000,
    "model.ckpt.meta": 40_000,
    "vocab.bpe": 20_000,
}
DATA = "model.ckpt.data-00000-of-00001"
N = SIZES[DATA]
BEFORE_DATA = list(SIZES)[:3]
REAL_CHUNK, SMALL_CHUNK = utils.CHUNK_BYTES, 4096  # the latter is to the small files as the former to real ones
N_KILLS = 30
OLD_URLLIB3 = urllib3.__version__ < "2"  # does not count the bytes of an answer


def random_files(seed=0, **sizes):
    rng = random.Random(seed)
    return {name: rng.randbytes(size) for name, size in (SIZES | sizes).items()}


@pytest.fixture
def server(monkeypatch):
    """A server with seven random files, which download_gpt2_files takes for OpenAI's and does not verify by SHA-256."""
    with Server(random_files()) as server:
        monkeypatch.setenv("GPT2_BASE_URL", server.address)
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
        monkeypatch.setattr(utils, "CHUNK_BYTES", SMALL_CHUNK)
        yield server


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """How long download_gpt2_files would have slept, each time; it does not."""
    naps = []
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(utils, "time", SimpleNamespace(sleep=naps.append, monotonic=time.monotonic))
    return naps


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "355M"


def download(folder, model_size="355M"):
    utils.download_gpt2_files(model_size, str(folder))


def download_fails(folder, message, model_size="355M"):
    """Expect the one error: of the documented classes, a single line, with what `message` (regular expression) says."""
    with pytest.raises((OSError, ValueError)) as caught:
        download(folder, model_size)
    assert not isinstance(caught.value, requests.RequestException)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
    return caught.value


def goes_on_from(kept):
    """Where to go on. The last byte may come twice: then there is something to ask for if a file lacks nothing."""
    return kept, max(kept - 1, 0)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def missing(folder):
    return [name for name in SIZES if not (folder / name).exists()]


def check_intact(folder, files):
    """Every file that stands under its name is whole."""
    for name in set(SIZES) - set(missing(folder)):
        assert (folder / name).read_bytes() == files[name], name


def check_complete(folder, files):
    check_intact(folder, files)
    assert sorted(os.listdir(folder)) == sorted(SIZES)  # nothing else is left


def check_completes(folder, server):
    """From here on, with a server in order, each missing file takes one request, which goes on from what is there."""
    check_intact(folder, server.files)
    expected = missing(folder)
    kept = {name: size_of(folder / f"{name}.part") for name in SIZES if size_of(folder / f"{name}.part.version")}
    server.heal()
    download(folder)
    assert [request.name for request in server.requests] == expected
    assert all((request.start or 0) in goes_on_from(kept.get(request.name, 0)) for request in server.requests)
    check_complete(folder, server.files)
    server.heal()
    download(folder)
    assert server.requests == []


# What is asked for


def test_downloads_what_is_missing(server, folder):
    download(folder)
    assert [request.name for request in server.requests] == list(SIZES)
    assert server.sizes == {"355M"}
    assert server.sent == sum(SIZES.values())
    check_complete(folder, server.files)
    for name in SIZES:
        (folder / name).unlink()
        check_completes(folder, server)


def test_leaves_what_is_there(server, folder):
    folder.mkdir()
    (folder / "hparams.json").write_text("mine")
    (folder / "notes.txt").write_text("mine, too")
    download(folder)
    assert (folder / "hparams.json").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine, too"
    assert server.asked("hparams.json") == []


def test_a_slash_after_the_address(server, folder, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", server.address + "/")
    download(folder)
    check_complete(folder, server.files)


@pytest.mark.parametrize("model_size", ["", "124m", "345M", "../124M", "tiny"])
def test_unknown_size(server, folder, model_size):
    error = download_fails(folder, r"124M, 355M, 774M, 1558M", model_size)
    assert isinstance(error, ValueError)
    assert not folder.exists()
    assert server.requests == []


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1:8080", "ftp://127.0.0.1/", "file:///etc", "http://", "https:", "http://[::1", "http://host:port"),
        *("http://127.0.0.1:99999", "http://.host", "http://a host", f"http://{'a' * 70}.example"),
    ],
)
def test_bad_address(server, folder, monkeypatch, address):
    monkeypatch.setenv("GPT2_BASE_URL", address)
    download_fails(folder, re.escape(address.rstrip("/").removeprefix("http://")))
    assert missing(folder) == list(SIZES)


# Faults of the server


def cut(n_bytes=N // 2, then="close", **how):
    return Fault(sends=n_bytes, then=then, **how)


def other_bytes(body):
    return body[:-1] + bytes([body[-1] ^ 1])


OTHER_MD5 = "AAAAAAAAAAAAAAAAAAAAAA=="
HTML = {"Content-Type": "text/html; charset=utf-8"}
WEAK = {"ETag": 'W/"1"'}
FIFTY = {"Content-Range": lambda request: f"bytes {request.start}-{request.start + 49}/{N}"}
MORE = {"Content-Range": lambda request: f"bytes {request.start}-{N - 1}/{N + 9}"}
NO_VERSION = {"ETag": None, "Last-Modified": None}

# {name: (what the server does, how many times the last of it, how often the file is asked for, the error if any)}
FAULTS = {
    "204": ([Fault(204)], ALWAYS, 1, "HTTP status 204"),
    "206-unasked": ([Fault(206)], ALWAYS, 1, "HTTP status 206"),
    "302-nowhere": ([Fault(302)], ALWAYS, 1, "HTTP status 302"),
    "302-loop": ([Fault(302, {"Location": DATA})], ALWAYS, 31, "redirects"),
    "302-ftp": ([Fault(302, {"Location": "ftp://127.0.0.1/"})], ALWAYS, 1, "ftp"),
    "302-bad-address": ([Fault(302, {"Location": "http://[::1"})], ALWAYS, 1, ""),
    "400": ([Fault(400)], ALWAYS, 1, "HTTP status 400"),
    "403": ([Fault(403)], ALWAYS, 1, "HTTP status 403"),
    "404": ([Fault(404)], ALWAYS, 1, "HTTP status 404"),
    "416": ([Fault(416)], ALWAYS, 1, "HTTP status 416"),
    "416-when-resuming": ([cut(), Fault(416)], 1, 3, None),
    "416-for-ever": ([cut(), Fault(416)], ALWAYS, 3, "HTTP status 416"),
    "429": ([Fault(429)], 1, 2, None),
    "500": ([Fault(500)], 1, 2, None),
    "503-twice": ([Fault(503)], 2, 3, None),
    "503-four-times": ([Fault(503)], 4, 5, None),
    "503-for-ever": ([Fault(503)], ALWAYS, 5, "HTTP status 503"),
    "503-when-resuming": ([cut(), Fault(503)], 4, 6, None),
    "no-answer-once": ([Fault(silent=True, then="close")], 1, 2, None),
    "no-answer": ([Fault(silent=True, then="close")], ALWAYS, 5, ""),
    "reset-once": ([Fault(silent=True, then="reset")], 1, 2, None),
    "reset": ([Fault(silent=True, then="reset")], ALWAYS, 5, "reset"),
    "no-body": ([cut(0)], ALWAYS, 5, f"of {N}|{N} more"),
    "a-byte-short": ([cut(N - 1)], 1, 2, None),
    "a-byte-short-in-its-length": ([Fault(change=lambda body: body[:-1])], ALWAYS, 1, "md5"),
    "a-byte-long": ([Fault(change=lambda body: body + b"!", headers={"Content-Length": N})], ALWAYS, 1, None),
    "a-byte-long-in-its-length": ([Fault(change=lambda body: body + b"!")], ALWAYS, 1, "md5"),
    "a-byte-more-promised": ([Fault(headers={"Content-Length": N + 1}, then="close")], ALWAYS, None, ""),
    "other-bytes": ([Fault(change=other_bytes)], ALWAYS, 1, "md5"),
    "other-bytes-when-resuming": ([cut(), Fault(change=other_bytes)], ALWAYS, 2, "md5"),
    "other-md5": ([Fault(headers={"Content-MD5": OTHER_MD5})], ALWAYS, 1, "md5"),
    "other-md5-of-azure": ([Fault(headers={"x-ms-blob-content-md5": OTHER_MD5})], ALWAYS, 1, "md5"),
    "no-md5": ([Fault(headers={"Content-MD5": None})], ALWAYS, 1, None),
    "not-an-md5": ([Fault(headers={"Content-MD5": "abc"})], ALWAYS, 1, ""),
    "web-page": ([Fault(change=lambda body: b"<html>log in", headers=HTML)], ALWAYS, 1, "web page"),
    "gzip": ([Fault(change=gzip.compress, headers={"Content-Encoding": "gzip"})], ALWAYS, 1, "compressed"),
    "chunked": ([Fault(chunked=True)], ALWAYS, 1, None),
    "chunked-and-cut": ([cut(chunked=True)], 1, 2, None),
    "chunked-and-reset": ([cut(chunked=True, then="reset")], 1, 2, None),
    "no-length": ([Fault(headers={"Content-Length": None})], ALWAYS, 1, "how long"),
    "not-a-length": ([Fault(headers={"Content-Length": "long"}, then="close")], ALWAYS, None, ""),
    "range-ignored": ([cut(), Fault(ignores_range=True)], 1, 2, None),
    "other-range": ([cut(), Fault(headers={"Content-Range": f"bytes 0-{N - 1}/{N}"})], 1, 3, None),
    "other-range-for-ever": ([cut(), Fault(headers={"Content-Range": f"bytes 0-9/{N}"})], 1, 3, None),
    "not-a-range": ([cut(), Fault(headers={"Content-Range": "all of it"})], 1, 3, None),
    "no-range": ([cut(), Fault(headers={"Content-Range": None})], 1, 3, None),
    "other-total": ([cut(), Fault(headers=MORE)], 1, None, None),
    "little-of-the-rest": ([cut(), Fault(change=lambda body: body[:50], headers=FIFTY)], 1, 3, None),
    "weak-etag": ([cut(headers=WEAK), Fault(headers=WEAK)], 1, 2, None),
    "no-etag": ([cut(headers={"ETag": None}), Fault(headers={"ETag": None})], 1, 2, None),
    "no-version": ([cut(headers=NO_VERSION)], 1, 2, None),
    "no-version-for-ever": ([cut(headers=NO_VERSION)], ALWAYS, 6, f"of {N}|{N // 2} more"),
    "other-version": ([cut(), Fault(headers={"ETag": '"other"'}, ignores_if_range=True)], 1, 3, None),
}
if OLD_URLLIB3:  # asked for the last byte once more, the server promises and gives the right length
    del FAULTS["a-byte-more-promised"]


@pytest.mark.parametrize("fault", FAULTS)
def test_fault(server, folder, naps, fault):
    faults, times, n_requests, message = FAULTS[fault]
    server.misbehave(DATA, *faults, times=times)
    if message is None:
        download(folder)
        check_complete(folder, server.files)
    else:
        error = download_fails(folder, rf"{DATA}.*{message}|{message}.*{DATA}")
        assert isinstance(error, (ConnectionError, ValueError))
        assert missing(folder) == [name for name in SIZES if name not in BEFORE_DATA]
    n_asked = len(server.asked(DATA))
    assert n_asked == n_requests or n_requests is None
    assert n_asked <= 31
    assert len(naps) <= n_asked - 1  # and no more than a retry each
    check_completes(folder, server)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("fault", [Fault(404), cut(0), Fault(change=other_bytes), Fault(silent=True, then="reset")])
def test_fault_of_any_file(server, folder, name, fault):
    server.misbehave(name, fault, times=ALWAYS)
    download_fails(folder, re.escape(name))
    check_completes(folder, server)


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("offset", [0, 1, 17, 4095, 4096, 4097, 50_000, N // 2, 150_000, N - 4097, N - 2, N - 1])
def test_goes_on_where_it_was_cut(server, folder, offset, then):
    server.misbehave(DATA, cut(offset, then))
    download(folder)
    first, second = server.asked(DATA)
    assert (first.start, first.status, first.sent) == (None, 200, offset)
    kept = offset if OLD_URLLIB3 else offset // SMALL_CHUNK * SMALL_CHUNK  # of what comes too early to an end
    start = second.start or 0
    assert start in goes_on_from(kept) if then == "close" else start <= kept  # a reset can lose what was on its way
    assert start + second.sent == N
    if start:
        assert second.status == 206
        assert second.headers["If-Range"] == '"' + hashlib.md5(server.files[DATA]).hexdigest() + '"'
    check_completes(folder, server)


def test_goes_on_in_the_next_run(server, folder):
    server.misbehave(DATA, cut(150_000), Fault(404))
    download_fails(folder, "404")
    kept = (folder / f"{DATA}.part").read_bytes()
    assert 145_000 < len(kept) <= 150_000
    assert kept == server.files[DATA][: len(kept)]
    check_completes(folder, server)


def test_goes_on_by_date(server, folder):
    server.misbehave(DATA, cut(headers=WEAK), Fault(headers=WEAK))
    download(folder)
    assert server.asked(DATA)[1].headers["If-Range"] == "Wed, 06 Nov 2019 00:00:00 GMT"
    assert server.asked(DATA)[1].status == 206


def test_asks_for_the_bytes_as_they_are(server, folder):
    download(folder)
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}


def test_as_long_as_it_gets_on(server, folder):
    """Any number of interruptions, if each request brings something."""
    server.misbehave(DATA, cut(N // 20), times=ALWAYS)
    download(folder)
    assert len(server.asked(DATA)) > 20
    check_completes(folder, server)


@pytest.mark.parametrize("then", ["stall", "reset"])
def test_keeps_what_came(server, folder, monkeypatch, then):
    """An interruption loses little of what came before it, in a real chunk's size."""
    monkeypatch.setattr(utils, "CHUNK_BYTES", REAL_CHUNK)
    monkeypatch.setattr(utils, "TIMEOUT", (10, 1))
    server.files = random_files(**{DATA: 1_200_000})
    server.seconds_per_piece = 0.002
    server.misbehave(DATA, cut(1_000_000, then))
    download(folder)
    _, second = server.asked(DATA)
    assert second.start is not None
    assert second.start >= 1_000_000 - (1 << 18)
    check_completes(folder, server)


@pytest.mark.parametrize("ignores_if_range", [False, True])
@pytest.mark.parametrize("new_size", [N, N // 3, N + 999])
def test_changed_on_the_server(server, folder, ignores_if_range, new_size):
    """The two versions are never joined."""
    server.misbehave(DATA, cut(), Fault(404))
    download_fails(folder, "404")
    server.heal()
    server.files = random_files(seed=1, **{DATA: new_size}) | {name: server.files[name] for name in BEFORE_DATA}
    server.misbehave(DATA, Fault(ignores_if_range=ignores_if_range), times=ALWAYS)
    download(folder)
    check_complete(folder, server.files)
    assert len(server.asked(DATA)) == 1 + ignores_if_range


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_partial_file_that_lacks_nothing(server, folder, extra):
    """Killed when all had come but before it was checked; or a longer one, which is not of this file."""
    server.misbehave(DATA, cut(), Fault(404))
    download_fails(folder, "404")
    (folder / f"{DATA}.part").write_bytes(server.files[DATA] + bytes(extra))
    server.heal()
    download(folder)
    check_complete(folder, server.files)
    assert len(server.asked(DATA)) == (2 if extra else 1)
    assert server.asked(DATA)[-1].sent == (N if extra else 1)


@pytest.mark.parametrize("version", [None, ""])
def test_partial_file_of_unknown_version(server, folder, version):
    """As a power cut may leave it."""
    folder.mkdir()
    (folder / f"{DATA}.part").write_bytes(b"whatever")
    if version is not None:
        (folder / f"{DATA}.part.version").write_text(version)
    server.misbehave(DATA, Fault(ignores_if_range=True), times=ALWAYS)
    download(folder)
    check_complete(folder, server.files)


def test_killed_just_before_the_end(server, folder):
    """A file got its name, but what stood beside it while it was incomplete is still there."""
    folder.mkdir()
    (folder / "hparams.json").write_bytes(server.files["hparams.json"])
    (folder / "hparams.json.part.version").write_text('"1"')
    check_completes(folder, server)


def test_resumed_with_the_md5_of_the_rest(server, folder):
    """RFC 2616, 14.15: the Content-MD5 of a 206 is that of the bytes it has, not of the whole file."""
    rest_md5 = {"x-ms-blob-content-md5": None, "Content-MD5": OTHER_MD5}
    server.misbehave(DATA, cut(), Fault(headers=rest_md5))
    download(folder)
    check_completes(folder, server)


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [("7", 7), ("0", 0.5), ("99999", 30), ("Wed, 06 Nov 2019 00:00:00 GMT", 0.5), ("", 0.5)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_waits_as_told(server, folder, naps, status, retry_after, expected):
    server.misbehave(DATA, Fault(status, {"Retry-After": retry_after}))
    download(folder)
    assert naps == [expected]
    check_completes(folder, server)


def test_waits_longer_each_time(server, folder, naps):
    server.misbehave(DATA, Fault(503), times=ALWAYS)
    download_fails(folder, "503")
    assert naps == [0.5, 1, 2, 4]


# Redirects


def test_redirect_to_another_host(server, folder):
    """All is fetched there, Range and all."""
    with Server(server.files) as other:
        there = other.address.replace("127.0.0.1", "localhost")
        for name in SIZES:
            server.misbehave(name, Fault(302, {"Location": f"{there}/355M/{name}"}), times=ALWAYS)
        other.misbehave(DATA, cut())
        download(folder)
        check_complete(folder, server.files)
        assert [request.status for request in other.asked(DATA)] == [200, 206]
        assert server.sent < 10_000


class RedirectingAdapter(requests.adapters.BaseAdapter):
    """Stands for a server that is asked over https and sends elsewhere."""

    location = None

    def send(self, request, **how):
        response = requests.Response()
        response.status_code, response.url, response.request = 302, request.url, request
        response.headers["Location"] = self.location
        response.raw = io.BytesIO()
        return response

    def close(self):
        """It holds nothing open."""


@pytest.mark.parametrize("scheme", ["http", "HTTP"])
def test_redirect_from_https_to_http_is_refused(server, folder, monkeypatch, scheme):
    class Session(requests.Session):
        def __init__(self):
            super().__init__()
            self.mount("https://", RedirectingAdapter())

    monkeypatch.setattr(RedirectingAdapter, "location", server.address.replace("http", scheme) + "/355M/checkpoint")
    monkeypatch.setattr(requests, "Session", Session)
    monkeypatch.setenv("GPT2_BASE_URL", "https://example.invalid/models")
    error = download_fails(folder, "https://example.invalid/models/355M/checkpoint.*127.0.0.1")
    assert isinstance(error, ConnectionError)
    assert server.requests == []
    assert missing(folder) == list(SIZES)


# No answer


def test_nothing_listens(folder, naps, monkeypatch):
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # but does not listen
        monkeypatch.setenv("GPT2_BASE_URL", f"http://127.0.0.1:{bound.getsockname()[1]}")
        error = download_fails(folder, "http://127.0.0.1.*checkpoint: .*refused")
    assert isinstance(error, ConnectionError)
    assert len(naps) == utils.RETRIES


def test_never_answers(folder, naps, monkeypatch):
    monkeypatch.setattr(utils, "TIMEOUT", (10, 0.3))
    monkeypatch.setattr(utils, "PATIENCE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listening:  # the kernel accepts, nobody reads
        monkeypatch.setenv("GPT2_BASE_URL", f"http://127.0.0.1:{listening.getsockname()[1]}")
        started = time.monotonic()
        error = download_fails(folder, "checkpoint: .*timed out")
    assert isinstance(error, ConnectionError)
    assert len(naps) == 1
    assert 0.5 < time.monotonic() - started < 10


def test_stalls_once(server, folder, monkeypatch):
    monkeypatch.setattr(utils, "TIMEOUT", (10, 0.5))
    server.misbehave(DATA, cut(then="stall"))
    download(folder)
    assert server.asked(DATA)[1].start > N // 2 - 5000
    check_completes(folder, server)


def test_stalls_before_every_body(server, folder, monkeypatch):
    monkeypatch.setattr(utils, "TIMEOUT", (10, 0.3))
    monkeypatch.setattr(utils, "PATIENCE", 0.5)
    server.misbehave(DATA, cut(0, then="stall"), times=ALWAYS)
    download_fails(folder, f"{DATA}: .*timed out")
    assert 2 <= len(server.asked(DATA)) <= 3
    monkeypatch.setattr(utils, "TIMEOUT", (10, 10))
    check_completes(folder, server)


def test_error_inside_an_error(server, folder):
    """What the caller is busy with does not get into the message."""
    server.misbehave(DATA, Fault(silent=True, then="reset"), times=ALWAYS)
    try:
        raise KeyError("something else")
    except KeyError:
        download_fails(folder, f"{DATA}: .*reset")


# SHA-256


@pytest.fixture
def verified(server, monkeypatch):
    """The served files are those whose SHA-256 is known."""
    monkeypatch.delenv("GPT2_ALLOW_UNVERIFIED")
    monkeypatch.setattr(utils, "FILES", {name: hashlib.sha256(body).hexdigest() for name, body in server.files.items()})
    return server


@pytest.mark.parametrize("value", [None, "", "0"])
def test_verified(verified, folder, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", value)
    download(folder, "124M")
    check_complete(folder, verified.files)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("model_size", ["124M", "1558M"])
def test_other_bytes_are_refused(verified, folder, model_size, name):
    """Of 124M all digests are known, of the others those of the shared vocabulary."""
    original = verified.files[name]
    verified.files[name] = other_bytes(original)
    if model_size != "124M" and name not in ("encoder.json", "vocab.bpe"):
        download(folder, model_size)
        return check_complete(folder, verified.files)
    download_fails(folder, f"{name}.*sha256", model_size)
    assert name in missing(folder)
    assert not list(folder.glob("*.part*"))
    verified.files[name] = original
    check_completes(folder, verified)


def test_published_digests(server, folder, monkeypatch, real_vocabulary):
    """GPT-2's own vocabulary passes; the random bytes that the server has do not."""
    monkeypatch.delenv("GPT2_ALLOW_UNVERIFIED")
    download_fails(folder, r"encoder\.json.*sha256")
    for name in ("encoder.json", "vocab.bpe"):
        server.files[name] = Path(*real_vocabulary, name).read_bytes()
    check_completes(folder, server)


def test_unverified_is_said(verified, folder, monkeypatch, capfd):
    monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
    verified.files["vocab.bpe"] = b"mine"
    download(folder)
    assert re.fullmatch(r"warning: GPT2_ALLOW_UNVERIFIED .*\n", capfd.readouterr().err)
    check_complete(folder, verified.files)


# Standard error


def test_nothing_is_printed_without_a_terminal(verified, folder, capfd):
    download(folder)
    assert capfd.readouterr() == ("", "")


def test_bars_end_at_100_percent(server, folder):
    server.misbehave("model.ckpt.meta", cut(20_000))  # its second bar goes on from the first
    leader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
    with subprocess.Popen([*DOWNLOAD, str(folder)], cwd=ROOT, stderr=terminal) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # how Linux says that the other end is closed
            while piece := os.read(leader, 1 << 16):
                shown += piece
        os.close(leader)
    assert process.returncode == 0
    states = re.split(r"[\r\n]+", shown.decode())
    for name, size in SIZES.items():
        last = [state for state in states if state.startswith(name)][-1]
        assert "100%" in last
        assert f"{size:,}".split(",")[0] in last


# The disk


class FullDisk:
    """open() for files on a disk with so many bytes of room."""

    def __init__(self, room):
        self.room = room

    def open(self, path, mode="r", **how):
        if mode not in ("w", "ab"):
            return open(path, mode, **how)
        disk = self

        class File(io.FileIO):
            def write(self, data):
                if not disk.room:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                written = super().write(bytes(data)[: disk.room])
                disk.room -= written
                return written

        file = io.BufferedWriter(File(path, mode.removesuffix("b")))
        return file if mode == "ab" else io.TextIOWrapper(file, **how)


@pytest.mark.parametrize("room", [0, 10, 40, 100, 101_234, 150_000, sum(SIZES.values()) // 2])
def test_full_disk(server, folder, monkeypatch, room):
    with monkeypatch.context() as patch:
        patch.setattr(utils, "open", FullDisk(room).open, raising=False)
        error = download_fails(folder, r"No space left on device: .*/355M/.*\.part")
    assert error.errno == errno.ENOSPC
    assert sum(path.stat().st_size for path in folder.iterdir()) <= room
    assert room < 100 or list(folder.glob("*.part"))  # what had come is kept
    check_completes(folder, server)


def test_full_disk_for_real(server, folder):
    folder.mkdir()

    def mount(*options):
        try:
            return subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode == 0
        except FileNotFoundError:
            return False

    if not mount("-t", "tmpfs", "-o", "size=128k", "tmpfs"):
        pytest.skip("needs the right to mount a tmpfs")
    try:
        error = download_fails(folder, r"No space left on device: .*/355M/.*\.part")
        assert error.errno == errno.ENOSPC
        assert list(folder.glob("*.part"))
        assert mount("-o", "remount,size=2m")
        check_completes(folder, server)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_file_where_the_folder_should_be(server, folder):
    folder.write_text("a file")
    download_fails(folder, "355M")
    download_fails(folder / "below", "355M")
    assert folder.read_text() == "a file"
    assert server.sent == 0


def test_folder_that_cannot_be_written(server, folder):
    folder.mkdir(mode=0o500)
    if os.access(folder, os.W_OK):
        pytest.skip("root may write everywhere")
    error = download_fails(folder, "checkpoint")
    assert isinstance(error, PermissionError)
    folder.chmod(0o700)
    check_completes(folder, server)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions(server, folder, umask, expected):
    before = os.umask(umask)
    try:
        download(folder)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in SIZES} == {expected}


@pytest.mark.parametrize("error_number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_folder_that_cannot_be_locked(server, folder, monkeypatch, error_number):
    """Some network file systems have no locks; the download goes on without."""

    def flock(*args):
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(fcntl, "flock", flock)
    check_completes(folder, server)


# Processes

# Ctrl-C has to work in tests that run in the background, too. The patience is for a busy machine.
DOWNLOAD = (
    sys.executable,
    "-c",
    "import signal, sys, utils; signal.signal(signal.SIGINT, signal.default_int_handler); utils.TIMEOUT = (60, 60); "
    f"utils.CHUNK_BYTES = {SMALL_CHUNK}; utils.download_gpt2_files('355M', sys.argv[1])",
)


@pytest.mark.parametrize("nth", range(N_KILLS))
def test_killed(server, folder, nth):
    """SIGINT and SIGKILL in turn, at points spread over all that has to come."""
    server.files = random_files(seed=nth, **{DATA: 3_000_000, "model.ckpt.meta": 500_000})
    server.piece, server.seconds_per_piece = 1 << 15, 0.003
    how = (signal.SIGINT, signal.SIGKILL)[nth % 2]
    point = sum(map(len, server.files.values())) * nth // N_KILLS + 1
    server.gate.clear()
    with subprocess.Popen([*DOWNLOAD, str(folder)], cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        server.at_byte = point, lambda: process.send_signal(how)
        server.gate.set()
    server.wait_for_nobody()
    assert process.returncode == -how
    for path in folder.glob("*.part"):
        assert server.files[path.stem].startswith(path.read_bytes())
    server.seconds_per_piece = 0
    assert missing(folder)
    check_completes(folder, server)


@pytest.mark.parametrize("n_processes", [2, 8])
def test_at_once(server, folder, n_processes, tmp_path):
    """One downloads, the others wait for it: held up by the server until they all do."""
    server.gate.clear()
    logs = [tmp_path / f"{i}.log" for i in range(n_processes)]
    processes = []
    try:
        for log in logs:
            with log.open("w") as file:
                processes.append(subprocess.Popen([*DOWNLOAD, str(folder)], cwd=ROOT, stderr=file))
        deadline = time.monotonic() + 50
        while sum("waiting" in log.read_text() for log in logs) < n_processes - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        server.gate.set()
        exit_codes = [process.wait() for process in processes]
    assert sum("waiting" in log.read_text() for log in logs) == n_processes - 1
    assert exit_codes == [0] * n_processes
    assert [request.name for request in server.requests] == list(SIZES)
    check_complete(folder, server.files)
