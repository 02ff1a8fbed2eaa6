"""Files: download a published GPT-2, verify it, load it -> (encoder, hparams, params).

A model is a folder in one of two layouts: OpenAI's (a TensorFlow checkpoint) or Hugging Face's
(safetensors). In both, the weights lie in the file as NumPy needs them. So float32 weights are
memory-mapped, not copied.
"""

import base64
import contextlib
import errno
import glob
import hashlib
import io
import itertools
import json
import math
import mmap
import operator
import os
import re
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np

from encoder import Encoder, get_encoder

if TYPE_CHECKING:  # imported by the functions that need it: a model on disk is loaded without it
    import requests

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
FILES = {  # of a published model, with their SHA-256 for 124M; the other sizes have none published
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.data-00000-of-00001": (
        "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118"
    ),
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
IN_EVERY_SIZE = ("encoder.json", "vocab.bpe")


class Sizes(NamedTuple):
    """The values of hparams.json, which determine the shape of every variable."""

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int


HPARAMS = Sizes._fields
_sizes = operator.itemgetter(*HPARAMS)
MODEL_SIZES = {
    "124M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12),
    "355M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=1024, n_head=16, n_layer=24),
    "774M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=1280, n_head=20, n_layer=36),
    "1558M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48),
}
_TINY = Sizes(n_vocab=1024, n_ctx=256, n_embd=128, n_head=4, n_layer=4)
_DATA = ".data-00000-of-00001"  # suffix of a checkpoint's data file
_RECORD = ".verified.json"  # suffix of its verification record
KNOWN_DATA = {  # SHA-256 of the data file
    MODEL_SIZES["124M"]: FILES["model.ckpt" + _DATA],
    _TINY: "02ce5e2c9d75fd413b78a0123dfc08a2033169d137308353d6cebc8f0762d895",
}

CHUNK_BYTES = 1 << 13  # read at a time; an interruption loses at most this
TIMEOUT = (4, 10)  # seconds to connect, and between two pieces of an answer
PATIENCE = 8  # seconds: give up on a server that has sent nothing by then
RETRIES = 4  # consecutive retries without progress
LOCK_ATTEMPTS = 100  # while other processes remove the folder
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one
MAX_WAIT = 30  # seconds: upper limit for Retry-After
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which a retry may help

_REPLACE = "replace it with an intact copy (delete a published model's file to download it again)"


# Downloading


def download_gpt2_files(model_size: str, model_dir: str) -> None:
    """Download the files of a published model that are missing in model_dir.

    Creates model_dir if necessary. A file gets its final name only after its length, its MD5 (if
    the server sends one) and its SHA-256 (if published) are verified. An interrupted download
    leaves `*.part` files, and the next call resumes them. If several processes download at once,
    one does the work and the others wait for it (not on Windows).

    Environment variables: GPT2_BASE_URL is the address of a mirror, with files at
    $GPT2_BASE_URL/{model_size}/{file}. GPT2_ALLOW_UNVERIFIED=1 skips SHA-256, for a server that
    has other weights under a published name.

    Raises ValueError for an unknown model_size or an unusable GPT2_BASE_URL, ConnectionError if a
    file cannot be downloaded or is wrong, and another OSError if a file cannot be written.
    """
    if model_size not in MODEL_SIZES:
        names = ", ".join(MODEL_SIZES)
        raise ValueError(f"there is no published model {model_size!r}, only {names}")
    if not missing_files(model_dir):
        return
    base_url = get_base_url()
    if is_unverified():
        note(f"warning: GPT2_ALLOW_UNVERIFIED is set: SHA-256 is not checked in {model_dir}")
    import requests

    with locked(model_dir), new_session(base_url) as session:
        for name in FILES:
            url = f"{base_url}/{model_size}/{name}"
            path = os.path.join(model_dir, name)
            try:
                if not os.path.isfile(path):
                    download_file(session, url, path, known_sha256(model_size, name))
            except (ConnectionError, requests.RequestException, ValueError) as error:
                raise ConnectionError(f"cannot download {url}: {reason(error)}") from None
            discard(path + ".part")


def missing_files(model_dir: str) -> list[str]:
    """Return the names of a published model's files that are not in model_dir."""
    return [name for name in FILES if not os.path.isfile(os.path.join(model_dir, name))]


def get_base_url() -> str:
    """Return the address under which the models are, without a slash at its end."""
    base_url = (os.environ.get("GPT2_BASE_URL") or BASE_URL).rstrip("/")
    if not base_url.lower().startswith(("https://", "http://")):
        raise ValueError(f"GPT2_BASE_URL must begin with https:// or http://, got {base_url!r}")
    return base_url


def is_unverified() -> bool:
    """Return whether the user allows files with another SHA-256 than the published one."""
    return os.environ.get("GPT2_ALLOW_UNVERIFIED", "0") not in ("", "0")


def known_sha256(model_size: str, name: str) -> str | None:
    """Return the SHA-256 that a file must have, None if none is published or the user skips it."""
    if is_unverified():
        return None
    if model_size == "124M" or name in IN_EVERY_SIZE:
        return FILES[name]
    return None


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Create the folder and lock it against other processes (not on Windows).

    If it is empty at the end, it is removed again with the parent folders that were created.
    """
    for attempt in itertools.count(1):
        created = [path for path in (Path(folder), *Path(folder).parents) if not path.is_dir()]
        try:
            os.makedirs(folder, exist_ok=True)
            descriptor = lock(folder)
            break
        except FileNotFoundError:  # another process, whose download failed, removed the folder
            if attempt == LOCK_ATTEMPTS:
                raise
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                path.rmdir()
        if descriptor is not None:
            os.close(descriptor)


def lock(folder: str) -> int | None:
    """Lock a folder, if necessary wait for it. Returns the descriptor that holds the lock.

    Returns None if folders cannot be opened, as on Windows. Raises FileNotFoundError if the folder
    does not exist or was removed while this waited.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)  # a lock on the folder itself leaves no file
    except (ImportError, PermissionError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        note(f"waiting for another download into {folder}")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # some network file systems have no locks
        return descriptor
    if not is_folder(descriptor, folder):
        os.close(descriptor)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)
    return descriptor


def is_folder(descriptor: int, folder: str) -> bool:
    """Return whether the folder that was opened still has this name."""
    return os.path.isdir(folder) and os.path.samestat(os.fstat(descriptor), os.stat(folder))


def new_session(base_url: str) -> "requests.Session":
    """Return a session that asks again when a server answers "later", and never leaves https.

    It retries statuses alone. `fetch` continues connections that broke off; retries here, too,
    would multiply its own.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry

    class CappedRetry(Retry):
        def parse_retry_after(self, retry_after: str) -> float:
            try:
                return min(super().parse_retry_after(retry_after), MAX_WAIT)
            except (InvalidHeader, ValueError, OverflowError):
                return 0  # wait as if there were no such header

    retries = CappedRetry(
        total=RETRIES,
        connect=0,
        read=0,
        other=0,
        status_forcelist=TRANSIENT,
        backoff_factor=BACKOFF,
        raise_on_status=False,
    )
    session = requests.Session()
    session.headers["Accept-Encoding"] = "identity"  # ranges and lengths count the file's own bytes
    session.mount("https://", HTTPAdapter(max_retries=retries))
    session.mount("http://", HTTPAdapter(max_retries=retries))
    if base_url.lower().startswith("https://"):
        del session.adapters["http://"]  # no redirect may lead from https to http
    return session


def download_file(
    session: "requests.Session", url: str, path: str, sha256: str | None = None
) -> None:
    """Download url to path and verify it."""
    part = path + ".part"
    try:
        md5 = fetch(session, url, part)
    except OSError as error:
        if error.errno and not error.filename:  # a failed write does not name the file
            error.filename = part
        raise
    verify(part, "md5", md5)
    verify(part, "sha256", sha256)
    os.replace(part, path)


def fetch(session: "requests.Session", url: str, part: str) -> str | None:
    """Download url to part. Returns the MD5 that the server states, in hex.

    Asks again after a connection broke off, as long as this makes progress. Raises ConnectionError
    if it makes none, and for an answer that is not the file.
    """
    import requests
    from requests.exceptions import ChunkedEncodingError

    longest = size_of(part)
    has_progressed = False
    n_failures = 0  # in a row, the last one with progress included
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return receive(session, url, part)
        except (requests.ConnectionError, requests.Timeout, ChunkedEncodingError) as error:
            if size_of(part) > longest:
                longest = size_of(part)
                has_progressed = True
                n_failures = 0
            n_failures += 1
            is_silent = not has_progressed and time.monotonic() > deadline
            if n_failures > RETRIES or is_silent:
                hint = "" if has_progressed else "; --model_size tiny needs no network"
                raise ConnectionError(f"{reason(error)}{hint}") from None
        time.sleep(BACKOFF * 2 ** (n_failures - 1))


def receive(session: "requests.Session", url: str, part: str) -> str | None:
    """Request what part lacks and append it. Returns the MD5 of the whole file, if stated."""
    with request_rest(session, url, part) as response:
        problem = problem_with(response)
        if problem:
            raise ConnectionError(problem)
        append_body(response, part)
        return stated_md5(response)


def request_rest(session: "requests.Session", url: str, part: str) -> "requests.Response":
    """Request the rest of the file that part begins, or all of it where that is impossible."""
    version = read_version(part)
    if version:
        start = resume_at(part)
        headers = {"Range": f"bytes={start}-", "If-Range": version}
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
        if is_rest(response, start, version) or response.status_code not in (206, 416):
            return response
        response.close()
        discard(part)
    return session.get(url, stream=True, timeout=TIMEOUT)


def resume_at(part: str) -> int:
    """Return the offset of the last byte, which is requested again.

    So a complete part, too, has a range to request and an answer that can be checked.
    """
    return max(size_of(part) - 1, 0)


def is_rest(response: "requests.Response", start: int, version: str) -> bool:
    """Return whether the body continues the same version of the file at the requested offset."""
    content_range = response.headers.get("Content-Range", "")
    return (
        response.status_code == 206
        and re.fullmatch(rf"bytes {start}-\d+/\d+", content_range, re.IGNORECASE) is not None
        and version_of(response) in (None, version)
    )


def content_range(response: "requests.Response", start: int) -> re.Match | None:
    """Match a Content-Range that begins at start. Its group is the length of the whole file."""
    value = response.headers.get("Content-Range", "")
    return re.fullmatch(rf"bytes {start}-\d+/(\d+)", value, re.IGNORECASE)


def problem_with(response: "requests.Response") -> str | None:
    """Return why an answer is not the file or the requested rest of it, None if it is."""
    headers = response.headers
    if response.status_code == 206 and "Range" in response.request.headers:
        return None  # is_rest has checked it
    if response.status_code != 200:
        return f"HTTP status {response.status_code} ({response.reason})"
    if headers.get("Content-Type", "").lower().startswith("text/html"):
        return "the answer is a web page (does this network require a login?)"
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        return "the answer is compressed, which was not requested"
    if "Transfer-Encoding" in headers or not headers.get("Content-Length", "").isdecimal():
        return "the server does not state the length"
    return None


def length_of_file(response: "requests.Response") -> int:
    """Return the length of the whole file, of which the body may be the rest."""
    if response.status_code == 206:
        return int(response.headers["Content-Range"].rpartition("/")[2])
    return int(response.headers["Content-Length"])


def append_body(response: "requests.Response", part: str) -> None:
    """Write the body to part: behind what is there if it is the rest, else in its place."""
    import requests

    if response.status_code == 200:
        discard(part)
        write_version(response, part)
    start = resume_at(part)
    length = length_of_file(response)
    name = os.path.basename(part).removesuffix(".part")
    bar = progress_bar(desc=name, initial=start, total=length, unit="B", unit_scale=True)
    with open(part, "ab") as file, bar:
        file.truncate(start)
        for chunk in response.iter_content(CHUNK_BYTES):
            file.write(chunk)
            file.flush()
            bar.update(len(chunk))
        os.fsync(file.fileno())
    if size_of(part) != length:  # urllib3 1.26 does not count the bytes
        raise requests.ConnectionError(f"received {size_of(part)} of {length} bytes")


def version_of(response: "requests.Response") -> str | None:
    """Return what tells the versions of a file on the server apart: its ETag, or else its date."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def write_version(response: "requests.Response", part: str) -> None:
    """Remember the version of which part is a part, so that two are never joined."""
    version = version_of(response)
    if version:
        with open(part + ".version", "w", encoding="latin-1") as file:
            file.write(version)


def read_version(part: str) -> str | None:
    """Return the version of which part holds the beginning, None if there is nothing to resume."""
    if size_of(part) == 0 or not os.path.isfile(part + ".version"):
        return None
    with open(part + ".version", encoding="latin-1") as file:
        return file.read()


def stated_md5(response: "requests.Response") -> str | None:
    """Return the MD5 of the whole file in hex, None if the server does not state it."""
    md5 = response.headers.get("x-ms-blob-content-md5")
    if response.status_code == 200:  # of a 206 it is that of the body (RFC 2616, 14.15)
        md5 = md5 or response.headers.get("Content-MD5")
    return base64.b64decode(md5).hex() if md5 else None


def verify(part: str, algorithm: str, expected: str | None) -> None:
    """Compare the digest of part, if one is expected. Deletes a wrong part: ConnectionError."""
    if expected is None:
        return
    found = digest(part, algorithm)
    if found != expected:
        discard(part)
        raise ConnectionError(
            f"it is damaged or not the expected file: its {algorithm} is {found}, not {expected}"
        )


def reason(error: Exception) -> str:
    """Return the message of the innermost error, without the names of urllib3's objects."""
    inner = getattr(error, "reason", None)
    if inner is None and error.args:
        inner = error.args[-1]
    if isinstance(inner, Exception):
        prefix = "the proxy: " if hasattr(error, "original_error") else ""
        return prefix + reason(inner)
    return re.sub(r"^(<.*?>|\w+\(.*?\)): ", "", str(error))


def size_of(path: str) -> int:
    """Return the size of a file, 0 if there is none."""
    return os.path.getsize(path) if os.path.exists(path) else 0


def digest(path: str, algorithm: str) -> str:
    """Return the digest of a file in hex."""
    result = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            result.update(chunk)
    return result.hexdigest()


def discard(part: str) -> None:
    """Delete a partial file and the file with its version."""
    for path in (part, part + ".version"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


_unverified = is_unverified  # the loading half still uses these names
_digest = digest


# Loading


def load_encoder_hparams_and_params(model_size: str, models_dir: str) -> tuple[Encoder, dict, dict]:
    """Load the model in the folder models_dir/model_size -> (encoder, hparams, params).

    A published model is downloaded first. Any other folder holds a TensorFlow checkpoint in OpenAI's layout (fine-tuned
    ones are often named model-1000) or a Hugging Face model. hparams is a dict of n_vocab, n_ctx, n_embd, n_head and
    n_layer. For params see load_gpt2_params_from_tf_ckpt.

    Raises ValueError for an unknown model and for files that are damaged or do not fit together, FileNotFoundError for
    a missing file, ImportError if TensorFlow is needed and missing, and what download_gpt2_files raises.
    """
    if model_size in ("", ".", "..") or re.search(r"[/\\:\0]", model_size):
        raise ValueError(
            f"model_size must name a folder in {os.path.abspath(models_dir)}, got {model_size!r}"
        )
    model_dir = os.path.join(models_dir, model_size)
    tf_ckpt_path, config_path = _checkpoint_path(model_dir), os.path.join(model_dir, "config.json")
    is_published = model_size in MODEL_SIZES and tf_ckpt_path in (
        None,
        os.path.join(model_dir, "model.ckpt"),
    )
    params = None
    if tf_ckpt_path is None and os.path.isfile(config_path):
        hparams, params = _load_hugging_face(config_path)
        encoder = get_encoder(model_size, models_dir)
        params["wte"] = params["wte"][: len(encoder.decoder)]  # drop padding rows without a token
        hparams["n_vocab"] = len(params["wte"])
    else:
        if is_published:
            download_gpt2_files(model_size, model_dir)
            tf_ckpt_path = _checkpoint_path(model_dir)
        if tf_ckpt_path is None:
            if os.path.isdir(model_dir):
                raise FileNotFoundError(
                    f"{os.path.abspath(model_dir)} holds neither a checkpoint nor a config.json"
                )
            files = glob.glob("*/checkpoint", root_dir=models_dir) + glob.glob(
                "*/config.json", root_dir=models_dir
            )
            names = ", ".join(sorted({os.path.dirname(path) for path in files})) or "none"
            names += f"; published: {', '.join(MODEL_SIZES)}"
            raise ValueError(
                f"there is no model {os.path.abspath(model_dir)}; models there: {names}"
            )
        encoder, path = get_encoder(model_size, models_dir), os.path.join(model_dir, "hparams.json")
        hparams = _checked_hparams(_read_json(path), path)
        if is_published and not _unverified() and _sizes(hparams) != MODEL_SIZES[model_size]:
            raise ValueError(
                f"{path} does not have the values of the published {model_size}; {_REPLACE}"
            )
    if (n_tokens := len(encoder.decoder)) != hparams["n_vocab"]:
        raise ValueError(
            f"{model_dir}: the vocabulary has {n_tokens} tokens, but n_vocab is {hparams['n_vocab']}"
        )
    return encoder, hparams, params or load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)


def _checkpoint_path(model_dir: str) -> str | None:
    """Return the path of the checkpoint in model_dir, without suffix. None if there is no `checkpoint` file.

    It is TensorFlow's CheckpointState in protobuf's text format. It may hold a path on the machine that saved it.
    """
    path, string = (
        os.path.join(model_dir, "checkpoint"),
        rb"""("(?:[^"\\]|\\.)+"|'(?:[^'\\]|\\.)+')""",
    )
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as file:
        named = re.search(rb"^\s*model_checkpoint_path\s*:\s*" + string, file.read(), re.MULTILINE)
    try:
        name = os.path.basename(
            named[1][1:-1].decode("unicode_escape").encode("latin-1").decode("utf-8")
        )
    except (TypeError, ValueError):
        raise ValueError(f"{path} does not name a checkpoint; {_REPLACE}") from None
    is_there = os.path.isfile(os.path.join(model_dir, name + ".index"))
    return os.path.join(
        model_dir, name if is_there else name.rpartition("\\")[2]
    )  # it was saved on Windows


def _read_json(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            return dict(json.load(file).items())
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}; {_REPLACE}") from None


def _checked_hparams(hparams: dict, path: str) -> dict:
    for name in HPARAMS:
        if name not in hparams:
            raise ValueError(f"{path} has no {name}; {_REPLACE}")
        if type(hparams[name]) is not int or hparams[name] < 1:
            raise ValueError(
                f"{path}: {name} must be a whole number, 1 or more, got {hparams[name]!r}"
            )
    if hparams["n_embd"] % hparams["n_head"]:
        raise ValueError(
            f"{path}: n_embd {hparams['n_embd']} is not a multiple of n_head {hparams['n_head']}"
        )
    return hparams


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str, hparams: dict) -> dict:
    """Load the parameters of the checkpoint tf_ckpt_path (`.index`, `.data-*`) -> nested dict of float32 arrays:

    {"wte": [n_vocab, n_embd], "wpe": [n_ctx, n_embd], "blocks": [{"ln_1": {"g", "b"}, "attn": {"c_attn": {"w", "b"},
    "c_proj": {"w", "b"}}, "ln_2": {"g", "b"}, "mlp": {"c_fc": {"w", "b"}, "c_proj": {"w", "b"}}}, ...],
    "ln_f": {"g", "b"}}, each w [n_in, n_out]. The arrays are read-only, and mapped from the file if possible.

    The first load verifies the data file by its SHA-256 if that is known, else through TensorFlow. A record beside it
    (`.verified.json`, which can be deleted) lets later loads skip this until a file changes. A checkpoint with other
    variables (an optimizer's, which are ignored) or several data files has no record: each load needs TensorFlow.

    Raises ValueError for a variable that is missing, has another shape than hparams say, or fails TensorFlow's
    checksum, and FileNotFoundError for a missing file.
    """
    tf_ckpt_path = os.fspath(tf_ckpt_path)
    data_paths = glob.glob(glob.escape(tf_ckpt_path) + ".data-*") or [tf_ckpt_path + _DATA]
    for path in tf_ckpt_path + ".index", *data_paths:
        open(path, "rb").close()  # raises an OSError that names the file
    mapped, record, known = {}, None, KNOWN_DATA.get(_sizes(hparams))
    if data_paths == [tf_ckpt_path + _DATA]:
        mapped, record = _map_checkpoint(tf_ckpt_path, hparams)
    with (
        contextlib.suppress(OSError, ValueError, RecursionError),
        open(tf_ckpt_path + _RECORD) as file,
    ):
        if mapped and json.load(file) == record:
            return _nested(mapped, hparams)
    variables = mapped
    if not mapped or not known or _digest(tf_ckpt_path + _DATA, "sha256") != known:
        variables = _read_with_tensorflow(tf_ckpt_path, hparams, mapped)
    if all(array is mapped.get(name) for name, array in variables.items()):
        with contextlib.suppress(OSError), open(tf_ckpt_path + _RECORD, "w") as file:
            json.dump(record, file)  # if this fails or is interrupted, the next load verifies again
    return _nested(variables, hparams)


def _map_checkpoint(tf_ckpt_path: str, hparams: dict) -> tuple[dict, dict]:
    """Map the data file -> ({name: array}, its record). There are no arrays if the file size does not match hparams.

    TensorFlow writes the variables one after another, sorted by name, so hparams determine the offset of each.
    """
    n_vocab, n_ctx, n_embd, _, n_layer = _sizes(hparams)
    with open(tf_ckpt_path + _DATA, "rb") as file:
        files = {"index": os.stat(tf_ckpt_path + ".index"), "data": os.fstat(file.fileno())}
        record = {
            name: [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
            for name, status in files.items()
        }
        record["hparams"] = list(_sizes(hparams))
        if files["data"].st_size != 4 * n_embd * (
            n_vocab + n_ctx + 2 + n_layer * (12 * n_embd + 13)
        ):
            return {}, record
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays, offset = {}, 0
    for name, shape in sorted(_variable_shapes(hparams)):
        arrays[name] = np.frombuffer(mapped, np.float32, math.prod(shape), offset).reshape(shape)
        offset += arrays[name].nbytes
    return arrays, record


def _variable_shapes(hparams: dict, n_inner: int | None = None):
    """Yield the (name, shape) of each variable of openai/gpt-2's model.py. n_inner is 4 * n_embd by default."""
    n_vocab, n_ctx, n, _, n_layer = _sizes(hparams)
    n_inner = n_inner or 4 * n
    yield from {
        "model/wte": (n_vocab, n),
        "model/wpe": (n_ctx, n),
        "model/ln_f/g": (n,),
        "model/ln_f/b": (n,),
    }.items()
    block = {
        "ln_1/g": (n,),
        "ln_1/b": (n,),
        "attn/c_attn/w": (1, n, 3 * n),
        "attn/c_attn/b": (3 * n,),
    }
    block |= {"attn/c_proj/w": (1, n, n), "attn/c_proj/b": (n,), "ln_2/g": (n,), "ln_2/b": (n,)}
    block |= {
        "mlp/c_fc/w": (1, n, n_inner),
        "mlp/c_fc/b": (n_inner,),
        "mlp/c_proj/w": (1, n_inner, n),
    }
    block |= {"mlp/c_proj/b": (n,)}
    for layer in range(n_layer):
        yield from ((f"model/h{layer}/{name}", shape) for name, shape in block.items())


def _checked_names(found: dict, hparams: dict, where: str, n_inner: int | None = None) -> list[str]:
    """Return the names of GPT-2's variables. Raise ValueError if found, {name: shape}, does not have them all."""
    names = []
    for name, shape in _variable_shapes(hparams, n_inner):
        if name not in found or tuple(found[name]) not in (shape, shape[-2:]):
            problem = f"has shape {list(found[name])}" if name in found else "is missing"
            raise ValueError(
                f"{where}: {name} {problem}, expected shape {list(shape)} from the model's sizes"
            )
        names.append(name)
    if any(name.startswith(f"model/h{hparams['n_layer']}/") for name in found):
        raise ValueError(f"{where} has more layers than n_layer, which is {hparams['n_layer']}")
    return names


def _nested(variables: dict, hparams: dict) -> dict:
    """{"model/h0/attn/c_attn/w": array, ...} -> {"blocks": [{"attn": {"c_attn": {"w": array, ...}}}]}."""
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, array in variables.items():
        _, *keys, last = name.split("/")
        place = params
        for key in keys:
            place = (
                params["blocks"][int(key[1:])]
                if re.fullmatch(r"h\d+", key)
                else place.setdefault(key, {})
            )
        array.flags.writeable = False
        place[last] = array.reshape(array.shape[-2:])  # a w is [1, n_in, n_out] in a checkpoint
    return params


# TensorFlow


def _read_with_tensorflow(tf_ckpt_path: str, hparams: dict, mapped: dict) -> dict[str, np.ndarray]:
    """Read GPT-2's variables through TensorFlow, which verifies them -> {name: array}, mapped arrays where equal."""
    for name, value in (
        ("TF_CPP_MIN_LOG_LEVEL", "3"),
        ("TF_ENABLE_ONEDNN_OPTS", "0"),
    ):  # else it prints many lines
        os.environ.setdefault(name, value)
    try:
        import tensorflow as tf
    except ImportError as error:
        needed = f"TensorFlow must verify {tf_ckpt_path} on its first load, but cannot be imported ({error})"
        raise ImportError(f"{needed}; install it with: pip install -r requirements.txt") from None
    damaged, variables = tf_ckpt_path + ".index", {}
    try:
        with _without_wildcards(tf_ckpt_path) as path:
            reader = tf.train.load_checkpoint(path)
            names = _checked_names(reader.get_variable_to_shape_map(), hparams, tf_ckpt_path)
            damaged = " or ".join(sorted(glob.glob(glob.escape(tf_ckpt_path) + ".data-*")))
            for name in progress_bar(names, "first load"):
                variables[name] = np.asarray(reader.get_tensor(name), np.float32)
                if name in mapped and np.array_equal(
                    variables[name].view(np.uint32), mapped[name].view(np.uint32)
                ):
                    variables[name] = mapped[name]
    except (
        tf.errors.OpError,
        RuntimeError,
        IndexError,
    ) as error:  # IndexError: the data ends too early
        reason = str(error).splitlines()[0]
        if "No such file" in reason:  # one of several data files
            raise FileNotFoundError(reason) from None
        raise ValueError(f"{damaged} is damaged: {reason}; {_REPLACE}") from None
    return variables


@contextlib.contextmanager
def _without_wildcards(path: str):
    """Yield path, or the path of symlinks to its files if TensorFlow would treat path as a pattern."""
    if not re.search(r"[*?\[\]\\]", path.replace(os.sep, "/")):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in glob.glob(glob.escape(path) + ".*"):
            os.symlink(os.path.abspath(file), os.path.join(folder, "model" + file[len(path) :]))
        yield os.path.join(folder, "model")


# Hugging Face

# The supported values of config.json. The first is the default.
_CONFIG = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}
_CONFIG_SIZES = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
}  # the defaults
_DTYPES = {
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
}  # BF16 is the upper half of a float32
_CONVERT = "convert a pickle (*.bin) with transformers: AutoModelForCausalLM.from_pretrained(F).save_pretrained(F)"


def _load_hugging_face(config_path: str) -> tuple[dict, dict]:
    """Load config.json and the *.safetensors beside it -> (hparams, params). Maps float32, converts other types."""
    config, model_dir = _read_json(config_path), os.path.dirname(config_path)
    for key, values in _CONFIG.items():
        if config.get(key, values[0]) not in values:
            raise ValueError(
                f"{config_path}: {key} {config[key]!r} is not supported, only {values[0]!r}"
            )
    config = {"n_positions": config.get("n_ctx", 1024)} | config
    sizes = [config.get(key, default) for key, default in _CONFIG_SIZES.items()]
    hparams = _checked_hparams(dict(zip(HPARAMS, sizes, strict=True)), config_path)
    tensors = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(model_dir), "*.safetensors"))):
        for name, tensor in _read_safetensors(path).items():
            if tensors.setdefault(_our_name(name), tensor) is not tensor:
                raise ValueError(
                    f"{path} holds the tensor {name}, which occurs twice in this folder"
                )
    if not tensors:  # a pickle is never opened: it can run code
        raise FileNotFoundError(f"{os.path.abspath(model_dir)} holds no *.safetensors; {_CONVERT}")
    shapes = {name: tensor[3] for name, tensor in tensors.items()}
    names = _checked_names(shapes, hparams, model_dir, config.get("n_inner"))
    variables = {name: _array(*tensors[name]) for name in names}
    head = tensors.get("lm_head/w")
    if head and not np.array_equal(_array(*head), variables["model/wte"]):
        raise ValueError(
            f"{head[0]}: lm_head.weight differs from wte.weight, which is not supported"
        )
    return hparams, _nested(variables, hparams)


def _our_name(name: str) -> str:
    """h.0.attn.c_attn.weight, with or without transformer. before it -> model/h0/attn/c_attn/w."""
    name = (
        re.sub(r"^(transformer\.)?(h\.|wte|wpe|ln_f)", r"model.\2", name)
        .replace(".h.", ".h")
        .replace(".", "/")
    )
    name = re.sub(r"(wte|wpe)/weight$", r"\1", name).removesuffix("eight").removesuffix("ias")
    return re.sub(r"(ln_.)/w$", r"\1/g", name)


def _read_safetensors(path: str) -> dict[str, tuple]:
    """Read the header of a file -> {name: (path, content, dtype, shape, begin, end)}. Every field is checked."""
    try:
        with open(path, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        start = end = 8 + int.from_bytes(
            content[:8], "little"
        )  # 8 bytes: the length of the JSON after them
        is_valid, tensors = 8 < start <= min(len(content), 100_000_000), {}
        text = content[8:start].decode("utf-8") if is_valid else "{}"
        header = json.loads(
            text,
            object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else 0,
        )
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, stop), shape = entry["data_offsets"], entry["shape"]
            is_valid &= (
                set(map(type, (begin, stop, *shape))) == {int} and min(stop - begin, *shape, 0) >= 0
            )
            is_valid &= start + begin == end  # no gap, no overlap
            end = start + stop
            tensors[name] = path, content, entry["dtype"], tuple(shape), start + begin, end
        if is_valid and end == len(content):
            return tensors
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged: its header is not valid; {_REPLACE}")


def _array(
    path: str, content: mmap.mmap, dtype: str, shape: tuple, begin: int, end: int
) -> np.ndarray:
    """Return a tensor as a float32 array, mapped if it is stored as aligned float32."""
    if dtype not in tuple(_DTYPES):
        raise ValueError(
            f"{path}: tensors of type {dtype!r} are not supported, only {', '.join(_DTYPES)}"
        )
    if end - begin != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
        raise ValueError(
            f"{path} is damaged: a tensor of shape {list(shape)} has {end - begin} bytes; {_REPLACE}"
        )
    array = np.frombuffer(content, _DTYPES[dtype], math.prod(shape), begin).reshape(shape)
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array, np.float32, "A")


# The terminal, shared by gpt2.py and the examples

PACKAGES = ("fire", "huggingface_hub", "numpy", "regex", "requests", "threadpoolctl", "tqdm")


class UsageError(ValueError):
    """The arguments of a command are unusable."""


def run_command(
    program: str, command: Callable[[list[str]], int | None], arguments: list[str]
) -> int:
    """Run command(arguments) -> exit status. An error becomes one line on standard error.

    The status is what the command returns (0 for None), 0 if the reader of its output has closed
    the pipe, 1 after an error, 2 after a UsageError and 130 after Ctrl-C. SystemExit is passed on.
    """
    with robust_streams():
        try:
            status = run_and_flush(command, arguments)
            return status or 0
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 0
        except UsageError as error:
            complain(program, str(error))
            return 2
        except ModuleNotFoundError as error:
            complain(program, missing_package(error))
            return 1
        except (ValueError, OSError, ImportError, MemoryError, OverflowError) as error:
            complain(program, str(error) or "out of memory")
            return 1


def run_and_flush(command: Callable[[list[str]], int | None], arguments: list[str]) -> int | None:
    """Run command(arguments). Raises OSError if its output, or that of --help, is not written."""
    try:
        status = command(arguments)
    except SystemExit:
        sys.stdout.flush()
        raise
    sys.stdout.flush()
    return status


def missing_package(error: ModuleNotFoundError) -> str:
    """Return a message with the command that installs the package, if it is one that we need."""
    package = (error.name or "").partition(".")[0]
    if package not in PACKAGES:
        return str(error)
    return f"the package {package} is not installed; install it with: pip install {package}"


def complain(program: str, message: str) -> None:
    """Print one line on standard error that begins with the program's name."""
    note(f"{program}: {message}")


def note(message: str) -> None:
    """Print one line on standard error. Does nothing if that is closed or cannot be written."""
    if sys.stderr is None:  # print would take None for standard output
        return
    line = " ".join(message.splitlines())
    with contextlib.suppress(OSError, ValueError):
        print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def robust_streams() -> Iterator[None]:
    """Make a command work with standard streams that are closed or cannot encode a character.

    A stream whose output cannot be written is led to the null device at the end. Otherwise, Python
    would try again when it exits, and change the exit status.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        open_stream(name, mode)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, or if it is redirected
            with contextlib.suppress(io.UnsupportedOperation):  # input that was read before
                stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            flush_or_discard(stream)


def open_stream(name: str, mode: str) -> None:
    """Replace a standard stream that is closed by the null device.

    Otherwise the next file that is opened would get its descriptor, and messages would be written
    into that file.
    """
    stream = getattr(sys, name)
    if stream is None or getattr(stream, "closed", False):
        descriptor = os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115


def flush_or_discard(stream: TextIO) -> None:
    """Write out what a stream holds, or lead it to the null device if that is impossible."""
    try:
        stream.flush()
    except (OSError, ValueError):  # ValueError: the command has closed it
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as null:
            os.dup2(null.fileno(), stream.fileno())


def read_text(path: str) -> str:
    """Read a UTF-8 text without its byte order mark. The path "-" means standard input.

    Raises ValueError if the text is not UTF-8, and OSError if it cannot be read.
    """
    name = "standard input" if path == "-" else path
    content = read_standard_input() if path == "-" else Path(path).read_bytes()
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def read_standard_input() -> bytes:
    """Read standard input, which may be closed (then it is empty) or replaced by a text."""
    if sys.stdin is None:
        return b""
    if hasattr(sys.stdin, "buffer"):
        return sys.stdin.buffer.read()
    return sys.stdin.read().encode("utf-8", "surrogateescape")


def progress_bar(*args, **kwargs):
    """Return a tqdm bar that is shown in a notebook and on a terminal, but not in a log file."""
    if "ipykernel" not in sys.modules:
        from tqdm import tqdm

        return tqdm(*args, disable=not is_terminal(sys.stderr), **kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without ipywidgets, tqdm warns and shows plain text
        from tqdm.auto import tqdm as notebook_tqdm
    return notebook_tqdm(*args, **kwargs)


def is_terminal(stream: TextIO | None) -> bool:
    """Return whether a stream, which may be closed or of another kind, is a terminal."""
    try:
        return stream is not None and stream.isatty()
    except (AttributeError, ValueError):
        return False
