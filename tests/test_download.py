"""download_gpt2_files against a server with every kind of fault.

Whatever happens, each file is intact or absent, any error is one clear line, and the next call fetches what is missing.
"""

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
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import urllib3
from helpers import ROOT, read_terminal
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
REAL_CHUNK, SMALL_CHUNK = utils.CHUNK_BYTES, 4096  # small chunks for small files
N_KILLS = 30
OLD_URLLIB3 = urllib3.__version__ < "2"  # it does not count the bytes of an answer


def random_files(seed=0, **sizes):
    rng = random.Random(seed)
    return {name: rng.randbytes(size) for name, size in (SIZES | sizes).items()}


@pytest.fixture
def server(monkeypatch):
    """A server with seven random files, which download_gpt2_files takes for OpenAI's. SHA-256 is not checked."""
    with Server(random_files()) as server:
        monkeypatch.setenv("GPT2_BASE_URL", server.address)
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
        monkeypatch.setattr(utils, "CHUNK_BYTES", SMALL_CHUNK)
        yield server


@pytest.fixture(autouse=True)
def naps(monkeypatch):
    """The seconds of each sleep between requests, which these tests skip."""
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
    """Expect an error of a documented class, in one line that matches `message` (a regular expression)."""
    with pytest.raises((OSError, ValueError)) as caught:
        download(folder, model_size)
    assert not isinstance(caught.value, requests.RequestException)
    assert re.search(message, str(caught.value))
    assert "\n" not in str(caught.value)
    return caught.value


def resume_points(kept):
    """Where a request may resume. The last byte may be requested again, in case the partial file is complete."""
    return kept, max(kept - 1, 0)


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def missing(folder):
    return [name for name in SIZES if not (folder / name).exists()]


def check_intact(folder, files):
    """Every file with its final name is complete."""
    for name in set(SIZES) - set(missing(folder)):
        assert (folder / name).read_bytes() == files[name], name


def check_complete(folder, files):
    check_intact(folder, files)
    assert sorted(os.listdir(folder)) == sorted(SIZES)  # and nothing else


def check_completes(folder, server):
    """When the server works again, each missing file takes one request, which resumes where the last one ended."""
    check_intact(folder, server.files)
    expected = missing(folder)
    kept = {
        name: size_of(folder / f"{name}.part")
        for name in SIZES
        if size_of(folder / f"{name}.part.version")
    }
    server.heal()
    download(folder)
    assert [request.name for request in server.requests] == expected
    assert all(
        (request.start or 0) in resume_points(kept.get(request.name, 0))
        for request in server.requests
    )
    check_complete(folder, server.files)
    server.heal()
    download(folder)
    assert server.requests == []


# Requests


def test_missing_files_are_downloaded(server, folder):
    download(folder)
    assert [request.name for request in server.requests] == list(SIZES)
    assert server.sizes == {"355M"}
    assert server.sent == sum(SIZES.values())
    check_complete(folder, server.files)
    for name in SIZES:
        (folder / name).unlink()
        check_completes(folder, server)


def test_existing_files_are_kept(server, folder):
    folder.mkdir()
    (folder / "hparams.json").write_text("mine")
    (folder / "notes.txt").write_text("also mine")
    download(folder)
    assert (folder / "hparams.json").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "also mine"
    assert server.asked("hparams.json") == []


def test_a_trailing_slash_in_the_address(server, folder, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", server.address + "/")
    download(folder)
    check_complete(folder, server.files)


def test_an_empty_address_means_the_default(server, folder, monkeypatch):
    monkeypatch.setattr(utils, "BASE_URL", server.address)
    monkeypatch.setenv("GPT2_BASE_URL", "")
    download(folder)
    check_complete(folder, server.files)


def test_the_scheme_of_the_address_in_capitals(server, folder, monkeypatch):
    monkeypatch.setenv("GPT2_BASE_URL", server.address.replace("http", "HTTP"))
    download(folder)
    check_complete(folder, server.files)


@pytest.mark.parametrize("parents", [[], ["new"]])
def test_a_download_that_fails_at_once_leaves_no_empty_folder(server, tmp_path, parents):
    folder = tmp_path.joinpath(*parents, "355M")
    server.misbehave("checkpoint", Fault(404), times=ALWAYS)
    download_fails(folder, "404")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("model_size", ["", "124m", "345M", "../124M", "tiny"])
def test_unknown_sizes_raise(server, folder, model_size):
    error = download_fails(folder, r"124M, 355M, 774M, 1558M", model_size)
    assert isinstance(error, ValueError)
    assert not folder.exists()
    assert server.requests == []


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1:8080",
            "ftp://127.0.0.1/",
            "file:///etc",
            "http://",
            "https:",
            "http://[::1",
            "http://host:port",
        ),
        *("http://127.0.0.1:99999", "http://.host", "http://a host", f"http://{'a' * 70}.example"),
    ],
)
def test_unusable_addresses_raise(server, folder, monkeypatch, address):
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


@dataclass
class Case:
    """What the server does when DATA is requested, and what must follow."""

    faults: list  # of the first requests, one each
    n_requests: int | None  # how often DATA is requested; None: not checked
    error: str | None = None  # a pattern of the message; None: the download succeeds
    times: int = ALWAYS  # how often the last fault occurs


FAULTS = {
    "204": Case([Fault(204)], n_requests=1, error="HTTP status 204"),
    "206-unasked": Case([Fault(206)], n_requests=1, error="HTTP status 206"),
    "302-nowhere": Case([Fault(302)], n_requests=1, error="HTTP status 302"),
    "302-loop": Case([Fault(302, {"Location": DATA})], n_requests=31, error="redirects"),
    "302-ftp": Case([Fault(302, {"Location": "ftp://127.0.0.1/"})], n_requests=1, error="ftp"),
    "302-bad-address": Case([Fault(302, {"Location": "http://[::1"})], n_requests=1, error=""),
    "400": Case([Fault(400)], n_requests=1, error="HTTP status 400"),
    "403": Case([Fault(403)], n_requests=1, error="HTTP status 403"),
    "404": Case([Fault(404)], n_requests=1, error="HTTP status 404"),
    "416": Case([Fault(416)], n_requests=1, error="HTTP status 416"),
    "416-when-resuming": Case([cut(), Fault(416)], n_requests=3, times=1),
    "416-for-ever": Case([cut(), Fault(416)], n_requests=3, error="HTTP status 416"),
    "429": Case([Fault(429)], n_requests=2, times=1),
    "500": Case([Fault(500)], n_requests=2, times=1),
    "503-twice": Case([Fault(503)], n_requests=3, times=2),
    "503-four-times": Case([Fault(503)], n_requests=5, times=4),
    "503-for-ever": Case([Fault(503)], n_requests=5, error="HTTP status 503"),
    "503-when-resuming": Case([cut(), Fault(503)], n_requests=6, times=4),
    "no-answer-once": Case([Fault(silent=True, then="close")], n_requests=2, times=1),
    "no-answer": Case([Fault(silent=True, then="close")], n_requests=5, error=""),
    "reset-once": Case([Fault(silent=True, then="reset")], n_requests=2, times=1),
    "reset": Case([Fault(silent=True, then="reset")], n_requests=5, error="reset"),
    "no-body": Case([cut(0)], n_requests=5, error=f"of {N}|{N} more"),
    "a-byte-short": Case([cut(N - 1)], n_requests=2, times=1),
    "a-byte-short-in-its-length": Case(
        [Fault(change=lambda body: body[:-1])], n_requests=1, error="md5"
    ),
    "a-byte-long": Case(
        [Fault(change=lambda body: body + b"!", headers={"Content-Length": N})], n_requests=1
    ),
    "a-byte-long-in-its-length": Case(
        [Fault(change=lambda body: body + b"!")], n_requests=1, error="md5"
    ),
    "a-byte-more-promised": Case(
        [Fault(headers={"Content-Length": N + 1}, then="close")], n_requests=None, error=""
    ),
    "other-bytes": Case([Fault(change=other_bytes)], n_requests=1, error="md5"),
    "other-bytes-when-resuming": Case(
        [cut(), Fault(change=other_bytes)], n_requests=2, error="md5"
    ),
    "other-md5": Case([Fault(headers={"Content-MD5": OTHER_MD5})], n_requests=1, error="md5"),
    "other-md5-of-azure": Case(
        [Fault(headers={"x-ms-blob-content-md5": OTHER_MD5})], n_requests=1, error="md5"
    ),
    "no-md5": Case([Fault(headers={"Content-MD5": None})], n_requests=1),
    "not-an-md5": Case([Fault(headers={"Content-MD5": "abc"})], n_requests=1, error=""),
    "web-page": Case(
        [Fault(change=lambda body: b"<html>log in", headers=HTML)], n_requests=1, error="web page"
    ),
    "gzip": Case(
        [Fault(change=gzip.compress, headers={"Content-Encoding": "gzip"})],
        n_requests=1,
        error="compressed",
    ),
    "web-page-in-capitals": Case(
        [Fault(change=lambda body: b"<html>log in", headers={"Content-Type": "TEXT/HTML"})],
        n_requests=1,
        error="web page",
    ),
    "identity-in-capitals": Case([Fault(headers={"Content-Encoding": "Identity"})], n_requests=1),
    "chunked": Case([Fault(chunked=True)], n_requests=1, error="state the length"),
    "chunked-with-a-length": Case(
        [Fault(chunked=True, headers={"Content-Length": N})], n_requests=1, error="length"
    ),
    "no-length": Case(
        [Fault(headers={"Content-Length": None})], n_requests=1, error="state the length"
    ),
    "not-a-length": Case(
        [Fault(headers={"Content-Length": "long"}, then="close")], n_requests=None, error=""
    ),
    "range-ignored": Case([cut(), Fault(ignores_range=True)], n_requests=2, times=1),
    "other-range": Case(
        [cut(), Fault(headers={"Content-Range": f"bytes 0-{N - 1}/{N}"})], n_requests=3, times=1
    ),
    "other-range-for-ever": Case(
        [cut(), Fault(headers={"Content-Range": f"bytes 0-9/{N}"})], n_requests=3, times=1
    ),
    "not-a-range": Case(
        [cut(), Fault(headers={"Content-Range": "all of it"})], n_requests=3, times=1
    ),
    "no-range": Case([cut(), Fault(headers={"Content-Range": None})], n_requests=3, times=1),
    "other-total": Case([cut(), Fault(headers=MORE)], n_requests=None, times=1),
    "little-of-the-rest": Case(
        [cut(), Fault(change=lambda body: body[:50], headers=FIFTY)], n_requests=3, times=1
    ),
    "weak-etag": Case([cut(headers=WEAK), Fault(headers=WEAK)], n_requests=2, times=1),
    "no-etag": Case(
        [cut(headers={"ETag": None}), Fault(headers={"ETag": None})], n_requests=2, times=1
    ),
    "no-version": Case([cut(headers=NO_VERSION)], n_requests=2, times=1),
    "no-version-for-ever": Case(
        [cut(headers=NO_VERSION)], n_requests=6, error=f"of {N}|{N // 2} more"
    ),
    "other-version": Case(
        [cut(), Fault(headers={"ETag": '"other"'}, ignores_if_range=True)], n_requests=3, times=1
    ),
}
if OLD_URLLIB3:  # asked for the last byte again, the server announces and sends the right length
    del FAULTS["a-byte-more-promised"]


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_the_server(server, folder, naps, name):
    case = FAULTS[name]
    server.misbehave(DATA, *case.faults, times=case.times)
    if case.error is None:
        download(folder)
        check_complete(folder, server.files)
    else:
        error = download_fails(folder, rf"{DATA}.*{case.error}|{case.error}.*{DATA}")
        assert isinstance(error, (ConnectionError, ValueError))
        assert missing(folder) == [name for name in SIZES if name not in BEFORE_DATA]
    n_requests = len(server.asked(DATA))
    assert case.n_requests in (n_requests, None)
    assert n_requests <= 31
    assert len(naps) <= n_requests - 1  # no sleep without a retry
    check_completes(folder, server)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize(
    "fault", [Fault(404), cut(0), Fault(change=other_bytes), Fault(silent=True, then="reset")]
)
def test_faults_for_any_file(server, folder, name, fault):
    server.misbehave(name, fault, times=ALWAYS)
    download_fails(folder, re.escape(name))
    check_completes(folder, server)


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize(
    "offset", [0, 1, 17, 4095, 4096, 4097, 50_000, N // 2, 150_000, N - 4097, N - 2, N - 1]
)
def test_resumes_where_the_connection_was_cut(server, folder, offset, then):
    server.misbehave(DATA, cut(offset, then))
    download(folder)
    first, second = server.asked(DATA)
    assert (first.start, first.status, first.sent) == (None, 200, offset)
    kept = (
        offset if OLD_URLLIB3 else offset // SMALL_CHUNK * SMALL_CHUNK
    )  # only whole chunks are kept
    start = second.start or 0
    assert (
        start in resume_points(kept) if then == "close" else start <= kept
    )  # a reset can lose bytes in transit
    assert start + second.sent == N
    if start:
        assert second.status == 206
        assert second.headers["If-Range"] == '"' + hashlib.md5(server.files[DATA]).hexdigest() + '"'
    check_completes(folder, server)


def test_resumes_in_the_next_run(server, folder):
    server.misbehave(DATA, cut(150_000), Fault(404))
    download_fails(folder, "404")
    kept = (folder / f"{DATA}.part").read_bytes()
    assert 145_000 < len(kept) <= 150_000
    assert kept == server.files[DATA][: len(kept)]
    check_completes(folder, server)


def test_resumes_by_date(server, folder):
    server.misbehave(DATA, cut(headers=WEAK), Fault(headers=WEAK))
    download(folder)
    assert server.asked(DATA)[1].headers["If-Range"] == "Wed, 06 Nov 2019 00:00:00 GMT"
    assert server.asked(DATA)[1].status == 206


def test_requests_uncompressed_bytes(server, folder):
    download(folder)
    assert {request.headers["Accept-Encoding"] for request in server.requests} == {"identity"}


def test_any_number_of_interruptions_with_progress(server, folder):
    server.misbehave(DATA, cut(N // 20), times=ALWAYS)
    download(folder)
    assert len(server.asked(DATA)) > 20
    check_completes(folder, server)


@pytest.mark.parametrize("then", ["stall", "reset"])
def test_an_interruption_loses_little(server, folder, monkeypatch, then):
    """With the real chunk size, an interruption loses at most one chunk."""
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


def test_a_connection_that_is_cut_after_every_250_000_bytes(server, folder, monkeypatch):
    monkeypatch.setattr(utils, "CHUNK_BYTES", REAL_CHUNK)
    server.files = random_files(**{DATA: 1_200_000})
    server.misbehave(DATA, cut(250_000), times=ALWAYS)
    download(folder)
    assert len(server.asked(DATA)) <= 6
    check_completes(folder, server)


@pytest.mark.parametrize("ignores_if_range", [False, True])
@pytest.mark.parametrize("new_size", [N, N // 3, N + 999])
def test_a_file_that_changed_on_the_server(server, folder, ignores_if_range, new_size):
    """Parts of two versions are never joined."""
    server.misbehave(DATA, cut(), Fault(404))
    download_fails(folder, "404")
    server.heal()
    server.files = random_files(seed=1, **{DATA: new_size}) | {
        name: server.files[name] for name in BEFORE_DATA
    }
    server.misbehave(DATA, Fault(ignores_if_range=ignores_if_range), times=ALWAYS)
    download(folder)
    check_complete(folder, server.files)
    assert len(server.asked(DATA)) == 1 + ignores_if_range


@pytest.mark.parametrize("extra", [0, 1, 5000])
def test_a_partial_file_that_is_complete_or_too_long(server, folder, extra):
    """The process was killed after the last byte but before the verification, or the partial file is another one."""
    server.misbehave(DATA, cut(), Fault(404))
    download_fails(folder, "404")
    (folder / f"{DATA}.part").write_bytes(server.files[DATA] + bytes(extra))
    server.heal()
    download(folder)
    check_complete(folder, server.files)
    assert len(server.asked(DATA)) == (2 if extra else 1)
    assert server.asked(DATA)[-1].sent == (N if extra else 1)


@pytest.mark.parametrize("version", [None, ""])
def test_a_partial_file_of_unknown_version(server, folder, version):
    """A power cut may leave such files."""
    folder.mkdir()
    (folder / f"{DATA}.part").write_bytes(b"whatever")
    if version is not None:
        (folder / f"{DATA}.part.version").write_text(version)
    server.misbehave(DATA, Fault(ignores_if_range=True), times=ALWAYS)
    download(folder)
    check_complete(folder, server.files)


def test_killed_before_the_version_file_is_deleted(server, folder):
    """A file got its final name, but the file with its version still exists."""
    folder.mkdir()
    (folder / "hparams.json").write_bytes(server.files["hparams.json"])
    (folder / "hparams.json.part.version").write_text('"1"')
    check_completes(folder, server)


def test_md5_of_the_rest_is_not_taken_for_the_whole_file(server, folder):
    """RFC 2616, 14.15: the Content-MD5 of a 206 is that of the bytes it contains."""
    rest_md5 = {"x-ms-blob-content-md5": None, "Content-MD5": OTHER_MD5}
    server.misbehave(DATA, cut(), Fault(headers=rest_md5))
    download(folder)
    check_completes(folder, server)


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [("7", 7), ("0", 0.5), ("99999", 30), ("Wed, 06 Nov 2019 00:00:00 GMT", 0.5), ("", 0.5)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_waits_for_retry_after(server, folder, naps, status, retry_after, expected):
    server.misbehave(DATA, Fault(status, {"Retry-After": retry_after}))
    download(folder)
    assert naps == [expected]
    check_completes(folder, server)


def test_waits_double_with_each_retry(server, folder, naps):
    server.misbehave(DATA, Fault(503), times=ALWAYS)
    download_fails(folder, "503")
    assert naps == [0.5, 1, 2, 4]


# Redirects


def test_redirect_to_another_host(server, folder):
    """The other host is asked for everything, with Range where a download resumes."""
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
    """Stands for an https server that redirects every request."""

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
def test_redirect_from_https_to_http_raises(server, folder, monkeypatch, scheme):
    class Session(requests.Session):
        def __init__(self):
            super().__init__()
            self.mount("https://", RedirectingAdapter())

    monkeypatch.setattr(
        RedirectingAdapter, "location", server.address.replace("http", scheme) + "/355M/checkpoint"
    )
    monkeypatch.setattr(requests, "Session", Session)
    monkeypatch.setenv("GPT2_BASE_URL", "https://example.invalid/models")
    error = download_fails(folder, "https://example.invalid/models/355M/checkpoint.*127.0.0.1")
    assert isinstance(error, ConnectionError)
    assert server.requests == []
    assert missing(folder) == list(SIZES)


# No answer


def test_nothing_listens_at_the_address(folder, naps, monkeypatch):
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


@pytest.fixture
def late(monkeypatch, naps):
    """A clock on which more than PATIENCE passes with every look at it."""
    clock = iter(range(0, 10**6, utils.PATIENCE + 1))
    monkeypatch.setattr(
        utils, "time", SimpleNamespace(sleep=naps.append, monotonic=lambda: next(clock))
    )


SILENCE = Fault(silent=True, then="close")
HINT = "--model_size tiny needs no network$"


def test_gives_up_a_server_that_never_answers_when_patience_ends(server, folder, late):
    server.misbehave("checkpoint", SILENCE, times=ALWAYS)
    download_fails(folder, HINT)
    assert len(server.requests) == 1


def test_retries_a_server_that_never_answers_while_patience_lasts(server, folder):
    server.misbehave("checkpoint", SILENCE, times=ALWAYS)
    download_fails(folder, HINT)
    assert len(server.requests) == 1 + utils.RETRIES


@pytest.mark.parametrize(
    ("answer", "n_requests"), [(Fault(503), 5), (cut(), 6)], ids=["status", "bytes"]
)
def test_retries_a_server_that_has_answered_after_patience_ends(
    server, folder, late, answer, n_requests
):
    """An error status is an answer and a failure. Bytes are an answer and progress."""
    server.misbehave(DATA, answer, SILENCE, times=ALWAYS)
    error = download_fails(folder, DATA)
    assert not re.search(HINT, str(error))
    assert len(server.asked(DATA)) == n_requests


def test_resumes_after_a_stall(server, folder, monkeypatch):
    monkeypatch.setattr(utils, "TIMEOUT", (10, 0.5))
    server.misbehave(DATA, cut(then="stall"))
    download(folder)
    assert server.asked(DATA)[1].start > N // 2 - 5000
    check_completes(folder, server)


def test_gives_up_when_every_body_stalls(server, folder, monkeypatch):
    monkeypatch.setattr(utils, "TIMEOUT", (10, 0.3))
    monkeypatch.setattr(utils, "PATIENCE", 0.5)
    server.misbehave(DATA, cut(0, then="stall"), times=ALWAYS)
    download_fails(folder, f"{DATA}: .*timed out")
    assert 2 <= len(server.asked(DATA)) <= 3
    monkeypatch.setattr(utils, "TIMEOUT", (10, 10))
    check_completes(folder, server)


def test_error_message_while_handling_another_exception(server, folder):
    """The message is about the download, not about the exception that the caller handles."""
    server.misbehave(DATA, Fault(silent=True, then="reset"), times=ALWAYS)
    try:
        raise KeyError("something else")
    except KeyError:
        download_fails(folder, f"{DATA}: .*reset")


# SHA-256


@pytest.fixture
def verified(server, monkeypatch):
    """The server, with its files as the published ones: their SHA-256 are known."""
    monkeypatch.delenv("GPT2_ALLOW_UNVERIFIED")
    monkeypatch.setattr(
        utils,
        "FILES",
        {name: hashlib.sha256(body).hexdigest() for name, body in server.files.items()},
    )
    return server


@pytest.mark.parametrize("value", [None, "", "0"])
def test_sha256_is_checked_by_default(verified, folder, monkeypatch, value):
    if value is not None:
        monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", value)
    download(folder, "124M")
    check_complete(folder, verified.files)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("model_size", ["124M", "1558M"])
def test_other_bytes_raise(verified, folder, model_size, name):
    """All SHA-256 are known for 124M, for other sizes only those of the shared vocabulary."""
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


def test_published_sha256_of_the_vocabulary(server, folder, monkeypatch, real_vocabulary):
    """GPT-2's vocabulary passes the check. Random files do not."""
    monkeypatch.delenv("GPT2_ALLOW_UNVERIFIED")
    download_fails(folder, r"encoder\.json.*sha256")
    for name in ("encoder.json", "vocab.bpe"):
        server.files[name] = Path(*real_vocabulary, name).read_bytes()
    check_completes(folder, server)


def test_unverified_downloads_give_a_warning(verified, folder, monkeypatch, capfd):
    monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
    verified.files["vocab.bpe"] = b"mine"
    download(folder)
    assert re.fullmatch(r"warning: GPT2_ALLOW_UNVERIFIED .*\n", capfd.readouterr().err)
    check_complete(folder, verified.files)


# Standard error


def test_no_progress_bar_without_a_terminal(verified, folder, capfd):
    download(folder)
    assert capfd.readouterr() == ("", "")


def test_progress_bars_end_at_100_percent(server, folder):
    server.misbehave(
        "model.ckpt.meta", cut(20_000)
    )  # its second bar starts where the first one ended
    leader, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # rows, columns
    with subprocess.Popen([*DOWNLOAD, str(folder)], cwd=ROOT, stderr=terminal) as process:
        os.close(terminal)
        shown = read_terminal(leader)
    assert process.returncode == 0
    states = re.split(r"[\r\n]+", shown.decode())
    for name, size in SIZES.items():
        last = [state for state in states if state.startswith(name)][-1]
        assert "100%" in last
        assert f"{size:,}".split(",")[0] in last


# The disk


class FullDisk:
    """open() for files on a disk with `room` bytes left."""

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
    assert room < 100 or list(folder.glob("*.part"))  # the bytes that arrived are kept
    check_completes(folder, server)


def test_full_tmpfs(server, folder):
    folder.mkdir()

    def mount(*options):
        try:
            return (
                subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode
                == 0
            )
        except FileNotFoundError:
            return False

    if not mount("-t", "tmpfs", "-o", "size=128k", "tmpfs"):
        pytest.skip("needs permission to mount a tmpfs")
    try:
        error = download_fails(folder, r"No space left on device: .*/355M/.*\.part")
        assert error.errno == errno.ENOSPC
        assert list(folder.glob("*.part"))
        assert mount("-o", "remount,size=2m")
        check_completes(folder, server)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


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
    error = download_fails(folder, "checkpoint")
    assert isinstance(error, PermissionError)
    folder.chmod(0o700)
    check_completes(folder, server)


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_file_permissions_follow_the_umask(server, folder, umask, expected):
    before = os.umask(umask)
    try:
        download(folder)
    finally:
        os.umask(before)
    assert {stat.S_IMODE((folder / name).stat().st_mode) for name in SIZES} == {expected}


@pytest.mark.parametrize("error_number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_folder_that_cannot_be_locked(server, folder, monkeypatch, error_number):
    """Some network file systems have no locks. The download works without one."""

    def flock(*args):
        raise OSError(error_number, os.strerror(error_number))

    monkeypatch.setattr(fcntl, "flock", flock)
    check_completes(folder, server)


# Processes

# SIGINT is ignored in processes that a shell started in the background. The long timeouts are for a busy machine.
DOWNLOAD = (
    sys.executable,
    "-c",
    "import signal, sys, utils; signal.signal(signal.SIGINT, signal.default_int_handler); utils.TIMEOUT = (60, 60); "
    f"utils.CHUNK_BYTES = {SMALL_CHUNK}; utils.download_gpt2_files('355M', sys.argv[1])",
)


@pytest.mark.parametrize("nth", range(N_KILLS))
def test_killed(server, folder, nth):
    """SIGINT and SIGKILL in turn, at points spread over the whole download."""
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
def test_processes_wait_for_each_other(server, folder, n_processes, tmp_path):
    """One process downloads. The server holds its answer back until all others wait for the lock."""
    server.gate.clear()
    logs = [tmp_path / f"{i}.log" for i in range(n_processes)]
    processes = []
    try:
        for log in logs:
            with log.open("w") as file:
                processes.append(subprocess.Popen([*DOWNLOAD, str(folder)], cwd=ROOT, stderr=file))
        deadline = time.monotonic() + 50
        while (
            sum("waiting" in log.read_text() for log in logs) < n_processes - 1
            and time.monotonic() < deadline
        ):
            time.sleep(0.02)
    finally:
        server.gate.set()
        exit_codes = [process.wait() for process in processes]
    assert sum("waiting" in log.read_text() for log in logs) == n_processes - 1
    assert exit_codes == [0] * n_processes
    assert [request.name for request in server.requests] == list(SIZES)
    check_complete(folder, server.files)
