"""Files: download a published GPT-2, verify it, load it -> (encoder, hparams, params).

A model is a folder in OpenAI's layout: a TensorFlow checkpoint with a vocabulary. The weights lie
in the file as NumPy needs them, so they are memory-mapped, not copied. hugging_face.py reads the
other layout.
"""

import base64
import contextlib
import errno
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import math
import mmap
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

import numpy as np

from encoder import GIT_LFS_POINTER, Encoder, get_encoder, read_json

if TYPE_CHECKING:  # imported by the functions that need it: a model on disk is loaded without it
    import requests


class Sizes(NamedTuple):
    """The values of hparams.json, which determine the shape of every variable."""

    n_vocab: int
    n_ctx: int
    n_embd: int
    n_head: int
    n_layer: int


HPARAMS = Sizes._fields
MAX_SIZE = 1_000_000  # no size in hparams.json may be larger
MODEL_SIZES = {
    "124M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=768, n_head=12, n_layer=12),
    "355M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=1024, n_head=16, n_layer=24),
    "774M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=1280, n_head=20, n_layer=36),
    "1558M": Sizes(n_vocab=50257, n_ctx=1024, n_embd=1600, n_head=25, n_layer=48),
}
OLD_NAMES = {  # other names of the published sizes
    "117m": "124M",
    "345m": "355M",
    "762m": "774M",
    "1542m": "1558M",
    "1.5b": "1558M",
}
BUNDLED = "tiny"  # the model in this repository's own folder models
TINY_SIZES = Sizes(n_vocab=1024, n_ctx=256, n_embd=128, n_head=4, n_layer=4)

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
FILES = {  # the files of a published model -> SHA-256 for 124M; no others are published
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
IN_EVERY_SIZE = ("encoder.json", "vocab.bpe")  # these are the same in all sizes
DATA_SUFFIX = ".data-00000-of-00001"  # of a checkpoint's only data file
RECORD_SUFFIX = ".verified.json"  # of the record of its verification
KNOWN_DATA = {  # SHA-256 of the data file
    MODEL_SIZES["124M"]: FILES["model.ckpt" + DATA_SUFFIX],
    TINY_SIZES: "02ce5e2c9d75fd413b78a0123dfc08a2033169d137308353d6cebc8f0762d895",
}
HUB_NAMES = {  # the published models on the Hugging Face Hub
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
HUB_FILES = [  # of a model on the Hub, without its weights
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "model.safetensors.index.json",
]

CHUNK_BYTES = 1 << 13  # read at a time; an interruption loses at most this
TIMEOUT = (4, 10)  # seconds to connect, and between two pieces of an answer
PATIENCE = 8  # seconds: give up on a server that has sent nothing by then
RETRIES = 4  # consecutive retries without progress
LOCK_ATTEMPTS = 100  # each fails if another process removes the folder in the meantime
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one
MAX_WAIT = 30  # seconds: upper limit for Retry-After
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which a retry may help

REPLACE = "replace it with an intact copy (delete a published model's file to download it again)"


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
    if allows_unverified():
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
    """Return the address of the folder of models, without a trailing slash."""
    base_url = (os.environ.get("GPT2_BASE_URL") or BASE_URL).rstrip("/")
    if not base_url.lower().startswith(("https://", "http://")):
        raise ValueError(f"GPT2_BASE_URL must begin with https:// or http://, got {base_url!r}")
    return base_url


def allows_unverified() -> bool:
    """Return whether the user allows files with another SHA-256 than the published one."""
    return os.environ.get("GPT2_ALLOW_UNVERIFIED", "0") not in ("", "0")


def known_sha256(model_size: str, name: str) -> str | None:
    """Return the SHA-256 that a file must have, None if none is published or the user skips it."""
    if allows_unverified():
        return None
    if model_size == "124M" or name in IN_EVERY_SIZE:
        return FILES[name]
    return None


@contextlib.contextmanager
def locked(folder: str) -> Iterator[None]:
    """Create the folder and lock it against other processes (not on Windows).

    At the end, the folders that this created are removed again if they are empty.
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
    """Lock a folder, waiting if necessary. Returns the descriptor that holds the lock.

    Returns None if folders cannot be opened, as on Windows. Raises FileNotFoundError if the folder
    does not exist or was removed in the meantime.
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

    It retries only after the statuses in TRANSIENT. `fetch` resumes broken connections; retrying
    them here as well would multiply the attempts.
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


def download_file(session: "requests.Session", url: str, path: str, sha256: str | None) -> None:
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

    Resumes after a broken connection. Raises ConnectionError after too many attempts without
    progress, and for an answer that is not the file.
    """
    import requests
    from requests.exceptions import ChunkedEncodingError

    longest = size_of(part)
    has_progressed = False
    n_failures = 0  # since the last progress
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
    """Request what part lacks, or the whole file if part cannot be resumed."""
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

    Otherwise a complete part would leave nothing to request, and no answer to check.
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
    """Write the body to part: append it if it is the rest of the file, else replace part."""
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
    """Return what identifies the file's version on the server: its ETag, or else its date."""
    return response.headers.get("ETag") or response.headers.get("Last-Modified")


def write_version(response: "requests.Response", part: str) -> None:
    """Store the version that part belongs to, so that two versions are never joined."""
    version = version_of(response)
    if version:
        with open(part + ".version", "w", encoding="latin-1") as file:
            file.write(version)


def read_version(part: str) -> str | None:
    """Return the version that part belongs to, None if there is nothing to resume."""
    if size_of(part) == 0 or not os.path.isfile(part + ".version"):
        return None
    with open(part + ".version", encoding="latin-1") as file:
        return file.read()


def stated_md5(response: "requests.Response") -> str | None:
    """Return the MD5 of the whole file in hex, None if the server does not state it."""
    md5 = response.headers.get("x-ms-blob-content-md5")
    if response.status_code == 200:  # in a 206 it covers only the body (RFC 2616, 14.15)
        md5 = md5 or response.headers.get("Content-MD5")
    return base64.b64decode(md5).hex() if md5 else None


def verify(part: str, algorithm: str, expected: str | None) -> None:
    """Delete part and raise ConnectionError if its digest is not the expected one, if any."""
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


# Loading


def load_encoder_hparams_and_params(model_size: str, models_dir: str) -> tuple[Encoder, dict, dict]:
    """Load the model in the folder models_dir/model_size -> (encoder, hparams, params).

    The folder holds a TensorFlow checkpoint in OpenAI's layout (fine-tuned ones are often named
    model-1000) or a Hugging Face model. If it does not exist, a published model is downloaded from
    OpenAI, owner/name from the Hugging Face Hub, and tiny is taken from this repository. hparams is
    a dict of n_vocab, n_ctx, n_embd, n_head and n_layer. For params see
    load_gpt2_params_from_tf_ckpt.

    Raises ValueError for an unknown model and for files that are damaged or do not fit together,
    FileNotFoundError for a missing file, ImportError if TensorFlow or huggingface_hub is needed and
    missing, and what download_gpt2_files raises.
    """
    model_dir = find_model_dir(model_size, models_dir)
    tf_ckpt_path = find_checkpoint(model_dir)
    if is_hugging_face(model_dir, tf_ckpt_path):
        from hugging_face import load_hugging_face

        return load_hugging_face(model_dir)
    # A fine-tuned model, such as model-1000, may lie in a folder with a published name.
    is_published = model_size in MODEL_SIZES and (
        tf_ckpt_path is None or os.path.basename(tf_ckpt_path) == "model.ckpt"
    )
    if is_published:
        check_tensorflow(model_size, model_dir)
        download_gpt2_files(model_size, model_dir)
        tf_ckpt_path = find_checkpoint(model_dir)
    if tf_ckpt_path is None:
        raise missing_model(model_dir, model_size)
    folder, name = os.path.split(model_dir)
    encoder = get_encoder(name, folder)
    hparams = read_hparams(os.path.join(model_dir, "hparams.json"))
    if is_published and not allows_unverified():
        check_published(model_size, hparams, model_dir)
    n_tokens = len(encoder.decoder)
    if n_tokens != hparams["n_vocab"]:
        problem = f"the vocabulary has {n_tokens} tokens, but n_vocab is {hparams['n_vocab']}"
        raise ValueError(f"{model_dir}: {problem}")
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)


def find_model_dir(model_size: str, models_dir: str) -> str:
    """Return the folder of a model. A model of the Hub is downloaded into it first.

    model_size is the name of a folder, or owner/name as on the Hub.
    """
    is_name = model_size not in ("", ".", "..") and not re.search(r"[/\\:\0]", model_size)
    is_hub_name = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model_size)
    if not is_name and not is_hub_name:
        folder = os.path.abspath(models_dir)
        raise ValueError(f"model_size must name a folder in {folder}, got {model_size!r}")
    model_dir = os.path.join(models_dir, model_size)
    if not os.path.isdir(model_dir):
        if model_size == BUNDLED:
            return os.path.join(os.path.dirname(os.path.abspath(__file__)), "models", BUNDLED)
        if is_hub_name:
            download_from_hub(model_size, model_dir)
    return model_dir


def is_hugging_face(model_dir: str, tf_ckpt_path: str | None) -> bool:
    """Return whether to load a folder as a Hugging Face model. Warns if it holds two models."""
    if not os.path.isfile(os.path.join(model_dir, "config.json")):
        return False
    if tf_ckpt_path is None:
        return True
    weights = sorted(glob.glob("*.safetensors", root_dir=model_dir))
    if not weights:
        return False
    if not all(map(os.path.isfile, [tf_ckpt_path + ".index", *data_files(tf_ckpt_path)])):
        return True
    taken = f"{model_dir} holds two models; the TensorFlow checkpoint is loaded"
    note(f"warning: {taken}. To load {weights[0]}, move the file `checkpoint` away")
    return False


def check_tensorflow(model_size: str, model_dir: str) -> None:
    """Raise ImportError if only TensorFlow could verify the download, and it is not installed."""
    is_known = MODEL_SIZES[model_size] in KNOWN_DATA
    is_there = os.path.isfile(os.path.join(model_dir, "model.ckpt" + DATA_SUFFIX))
    if is_known or is_there or importlib.util.find_spec("tensorflow"):
        return
    raise ImportError(
        f"TensorFlow is not installed, and it must verify {model_size} after the download; install "
        f"it with: pip install -r requirements.txt, or load {HUB_NAMES[model_size]}, the same "
        "model without TensorFlow, which needs: pip install huggingface_hub"
    )


def missing_model(model_dir: str, model_size: str) -> Exception:
    """Return an error: what model_dir holds or, if it does not exist, which models do."""
    model_dir = os.path.abspath(model_dir)
    if os.path.isdir(model_dir):
        return FileNotFoundError(f"{model_dir} holds {what_is_there(model_dir)}")
    hint = ""
    size = published_size(model_size)
    if size:
        hint = f" (did you mean {size}, or {HUB_NAMES[size]} from the Hugging Face Hub?)"
    models_dir = os.path.dirname(model_dir)
    files = []
    for pattern in ("*/checkpoint", "*/config.json", "*/*/config.json"):
        files += glob.glob(pattern, root_dir=models_dir)
    names = ", ".join(sorted({os.path.dirname(file) for file in files})) or "none"
    sizes = ", ".join(MODEL_SIZES)
    known = f"models there: {names}; published: {sizes}; bundled: {BUNDLED}"
    return ValueError(f"there is no model {model_dir}{hint}; {known}")


def what_is_there(model_dir: str) -> str:
    """Describe a folder that holds no model."""
    indices = sorted(glob.glob("*.index", root_dir=model_dir))
    if indices:
        line = f'model_checkpoint_path: "{indices[-1].removesuffix(".index")}"'
        names = ", ".join(indices)
        return f"{names}, but no file named checkpoint; create it, with the line {line}"
    if os.path.isfile(os.path.join(model_dir, "adapter_config.json")):
        return (
            "a LoRA adapter, which is not a whole model; merge it with its base model first, with "
            "merge_and_unload() and save_pretrained() of the package peft"
        )
    return "neither a checkpoint nor a config.json"


def published_size(model_size: str) -> str | None:
    """Return the published size that another name or spelling means, None if there is none."""
    spelling = model_size.lower()
    for size, hub_name in HUB_NAMES.items():
        if spelling in (size.lower(), hub_name.lower().rpartition("/")[2]):
            return size
    return OLD_NAMES.get(spelling)


def find_checkpoint(model_dir: str) -> str | None:
    """Return the path of the checkpoint in model_dir, without suffix.

    The file `checkpoint` names it, in the text format of TensorFlow's CheckpointState. It may hold
    a path on the machine that saved it, which may have been a Windows machine. Returns None if
    there is no such file.
    """
    path = os.path.join(model_dir, "checkpoint")
    if not os.path.isfile(path):
        return None
    content = Path(path).read_text(encoding="utf-8", errors="replace")
    quoted = r"""(?:"((?:[^"\\]|\\.)+)"|'((?:[^'\\]|\\.)+)')"""
    match = re.search(r"^\s*model_checkpoint_path\s*:\s*" + quoted, content, re.MULTILINE)
    if not match:
        raise ValueError(f"{path} does not name a checkpoint; {REPLACE}")
    name = re.sub(r"\\(.)", r"\1", match[1] or match[2]).rpartition("/")[2]
    if not os.path.isfile(os.path.join(model_dir, name + ".index")):
        name = name.rpartition("\\")[2]
    return os.path.join(model_dir, name)


def read_hparams(path: str) -> dict[str, Any]:
    """Read and check hparams.json."""
    hparams = read_json(path)
    for name in HPARAMS:
        if name not in hparams:
            raise ValueError(f"{path} has no {name}; {REPLACE}")
    check_sizes({name: hparams[name] for name in HPARAMS}, path)
    return hparams


def check_sizes(sizes: dict[str, Any], path: str) -> None:
    """Raise ValueError, naming the file, unless all sizes are possible and fit together."""
    for name, value in sizes.items():
        check_size(name, value, path)
    n_embd = sizes["n_embd"]
    n_head = sizes["n_head"]
    if n_embd % n_head:
        raise ValueError(f"{path}: n_embd {n_embd} is not a multiple of n_head {n_head}")


def check_size(name: str, value: object, path: str) -> None:
    if type(value) is not int or not 1 <= value <= MAX_SIZE:
        rule = f"must be a whole number from 1 to {MAX_SIZE}"
        raise ValueError(f"{path}: {name} {rule}, got {value!r}")


def check_published(model_size: str, hparams: dict, model_dir: str) -> None:
    """Raise ValueError unless a model under a published name has the published sizes."""
    if sizes_of(hparams) != MODEL_SIZES[model_size]:
        path = os.path.join(model_dir, "hparams.json")
        raise ValueError(
            f"{path} does not have the values of the published {model_size}; {REPLACE}"
        )


def sizes_of(hparams: dict) -> Sizes:
    """Return the five values of hparams, which may hold others, too."""
    return Sizes(*[hparams[name] for name in HPARAMS])


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str | os.PathLike, hparams: dict) -> dict[str, Any]:
    """Load the checkpoint tf_ckpt_path (without `.index`) -> nested dict of float32 arrays:

    {"wte": [n_vocab, n_embd], "wpe": [n_ctx, n_embd], "blocks": [{"ln_1": {"g", "b"}, "attn":
    {"c_attn": {"w", "b"}, "c_proj": {"w", "b"}}, "ln_2": {"g", "b"}, "mlp": {"c_fc": {"w", "b"},
    "c_proj": {"w", "b"}}}, ...], "ln_f": {"g", "b"}}, each w [d_in, d_out]. The arrays are
    read-only, and mapped from the file if possible.

    The first load verifies the data file by its SHA-256 if that is known, else through TensorFlow.
    A record beside it (`.verified.json`, which can be deleted) lets later loads skip this until a
    file changes. A checkpoint with other variables (an optimizer's, which are ignored) or several
    data files has no record: each load needs TensorFlow.

    Raises ValueError for a variable that is missing, has another shape than hparams say, or fails
    TensorFlow's checksum, and FileNotFoundError for a missing file.
    """
    tf_ckpt_path = os.fspath(tf_ckpt_path)
    record = new_record(tf_ckpt_path, hparams)
    mapped = map_data_file(tf_ckpt_path, hparams)
    if mapped and read_record(tf_ckpt_path) == record:
        return nest(mapped, hparams)
    if mapped and is_known_data(tf_ckpt_path, hparams):
        variables = mapped
    else:
        variables = read_with_tensorflow(tf_ckpt_path, hparams, mapped)
    if all(array is mapped.get(name) for name, array in variables.items()):
        write_record(tf_ckpt_path, record)
    return nest(variables, hparams)


def data_files(tf_ckpt_path: str) -> list[str]:
    """Return the paths of a checkpoint's data files. If there are none, return the usual path."""
    return sorted(glob.glob(glob.escape(tf_ckpt_path) + ".data-*")) or [tf_ckpt_path + DATA_SUFFIX]


def map_data_file(tf_ckpt_path: str, hparams: dict) -> dict[str, np.ndarray]:
    """Map the data file -> {name: array}.

    Returns {} unless there is one data file, whose size is that of GPT-2's variables. TensorFlow
    writes them one after another, sorted by name. So hparams determine the size of the file and the
    place of each variable in it.
    """
    if data_files(tf_ckpt_path) != [tf_ckpt_path + DATA_SUFFIX]:
        return {}
    n_vocab, n_ctx, n_embd, _, n_layer = sizes_of(hparams)
    # In closed form, because a damaged hparams.json may name a million layers.
    n_parameters = n_embd * (n_vocab + n_ctx + 2 + n_layer * (12 * n_embd + 13))
    with open(tf_ckpt_path + DATA_SUFFIX, "rb") as file:
        if os.fstat(file.fileno()).st_size != 4 * n_parameters:
            return {}
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    offset = 0
    for name, shape in sorted(variable_shapes(hparams)):
        array = np.frombuffer(content, np.float32, math.prod(shape), offset)
        arrays[name] = array.reshape(shape)
        offset += array.nbytes
    return arrays


def is_known_data(tf_ckpt_path: str, hparams: dict) -> bool:
    """Return whether the data file is one whose SHA-256 is known."""
    known = KNOWN_DATA.get(sizes_of(hparams))
    return known is not None and digest(tf_ckpt_path + DATA_SUFFIX, "sha256") == known


def new_record(tf_ckpt_path: str, hparams: dict) -> dict[str, list[int]]:
    """Describe a checkpoint. Any change of its files or of hparams changes the record."""
    record = {"hparams": list(sizes_of(hparams))}
    for path in [tf_ckpt_path + ".index", *data_files(tf_ckpt_path)]:
        refuse_pointer(path)
        status = os.stat(path)
        kind = path.removeprefix(tf_ckpt_path)
        record[kind] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return record


def refuse_pointer(path: str) -> None:
    """Raise ValueError if a file is only Git LFS's pointer to it, and OSError if it is missing."""
    with open(path, "rb") as file:
        if file.read(100).startswith(GIT_LFS_POINTER.encode()):
            pointer = "is a Git LFS pointer, not the file itself"
            raise ValueError(f"{path} {pointer}; fetch the file with `git lfs pull`")


def read_record(tf_ckpt_path: str) -> object:
    """Return the record of the last verification. None if there is none or it is damaged."""
    try:
        return json.loads(Path(tf_ckpt_path + RECORD_SUFFIX).read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def write_record(tf_ckpt_path: str, record: dict) -> None:
    """Write the record. If this fails or is interrupted, the next load verifies again."""
    with contextlib.suppress(OSError):
        Path(tf_ckpt_path + RECORD_SUFFIX).write_text(json.dumps(record), encoding="utf-8")


def variable_shapes(hparams: dict, n_inner: int | None = None) -> Iterator[tuple[str, tuple]]:
    """Yield the (name, shape) of each variable, as openai/gpt-2's model.py names them.

    n_inner, the width of the hidden layer of mlp, is 4 * n_embd by default.
    """
    n_vocab, n_ctx, n_embd, _, n_layer = sizes_of(hparams)
    n_inner = n_inner or 4 * n_embd
    yield "model/wte", (n_vocab, n_embd)
    yield "model/wpe", (n_ctx, n_embd)
    yield "model/ln_f/g", (n_embd,)
    yield "model/ln_f/b", (n_embd,)
    block = {
        "ln_1/g": (n_embd,),
        "ln_1/b": (n_embd,),
        "attn/c_attn/w": (1, n_embd, 3 * n_embd),
        "attn/c_attn/b": (3 * n_embd,),
        "attn/c_proj/w": (1, n_embd, n_embd),
        "attn/c_proj/b": (n_embd,),
        "ln_2/g": (n_embd,),
        "ln_2/b": (n_embd,),
        "mlp/c_fc/w": (1, n_embd, n_inner),
        "mlp/c_fc/b": (n_inner,),
        "mlp/c_proj/w": (1, n_inner, n_embd),
        "mlp/c_proj/b": (n_embd,),
    }
    for layer in range(n_layer):
        for name, shape in block.items():
            yield f"model/h{layer}/{name}", shape


def check_shapes(found: dict, hparams: dict, where: str) -> list[str]:
    """Return the names of GPT-2's variables.

    Raises ValueError, naming `where`, unless found, {name: shape}, has all of them.
    """
    names = []
    for name, shape in variable_shapes(hparams):
        check_shape(where, name, found.get(name), shape)
        names.append(name)
    n_layer = hparams["n_layer"]
    if any(name.startswith(f"model/h{n_layer}/") for name in found):
        raise ValueError(f"{where} has more layers than n_layer, which is {n_layer}")
    return names


def check_shape(where: str, name: str, found: Sequence[int] | None, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless a variable was found with its shape. A leading 1 does not count."""
    expected = f"expected shape {list(shape)} from the model's sizes"
    if found is None:
        raise ValueError(f"{where}: {name} is missing, {expected}")
    if tuple(found) not in (shape, shape[-2:]):
        raise ValueError(f"{where}: {name} has shape {list(found)}, {expected}")


def nest(variables: dict[str, np.ndarray], hparams: dict) -> dict[str, Any]:
    """Turn {"model/h0/ln_1/g": array, ...} into {"blocks": [{"ln_1": {"g": array, ...}}, ...]}."""
    params: dict[str, Any] = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, array in variables.items():
        _, *keys, last = name.split("/")
        place = params
        for key in keys:
            if re.fullmatch(r"h\d+", key):
                place = params["blocks"][int(key[1:])]
            else:
                place = place.setdefault(key, {})
        array.flags.writeable = False
        place[last] = array.reshape(array.shape[-2:])  # a w is [1, d_in, d_out] in a checkpoint
    return params


# TensorFlow


def read_with_tensorflow(tf_ckpt_path: str, hparams: dict, mapped: dict) -> dict[str, np.ndarray]:
    """Read GPT-2's variables through TensorFlow, which verifies them -> {name: array}.

    Arrays in mapped that are equal are taken instead.
    """
    tf = import_tensorflow(tf_ckpt_path)
    suspect = tf_ckpt_path + ".index"  # the file to name in an error
    variables = {}
    try:
        with plain_path(tf_ckpt_path) as path:
            reader = tf.train.load_checkpoint(path)
            names = check_shapes(reader.get_variable_to_shape_map(), hparams, tf_ckpt_path)
            suspect = " or ".join(data_files(tf_ckpt_path))
            for name in progress_bar(names, "first load"):
                array = np.asarray(reader.get_tensor(name), np.float32)
                if name in mapped and is_equal_by_bits(array, mapped[name]):
                    array = mapped[name]
                variables[name] = array
    except (tf.errors.OpError, RuntimeError, IndexError) as error:  # IndexError: the data is cut
        problem = str(error).splitlines()[0]
        if "No such file" in problem:  # one of several data files
            raise FileNotFoundError(problem) from None
        raise ValueError(f"{suspect} is damaged: {problem}; {REPLACE}") from None
    return variables


def is_equal_by_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


def import_tensorflow(tf_ckpt_path: str) -> Any:
    """Return the module. Raises ImportError that says why it is needed and how to install it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # without these, it prints many lines
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            f"TensorFlow must verify {tf_ckpt_path} on its first load, but cannot be imported "
            f"({error}); install it with: pip install -r requirements.txt"
        ) from None
    return tensorflow


@contextlib.contextmanager
def plain_path(path: str) -> Iterator[str]:
    """Yield path, or the path of links to its files if TensorFlow cannot use it as it is.

    TensorFlow treats path as a pattern, and accepts only UTF-8.
    """
    if not re.search(r"[*?\[\]\\\ud800-\udfff]", path.replace(os.sep, "/")):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in glob.glob(glob.escape(path) + ".*"):
            os.symlink(os.path.abspath(file), os.path.join(folder, "model" + file[len(path) :]))
        yield os.path.join(folder, "model")


# The Hugging Face Hub


def download_from_hub(name: str, model_dir: str) -> None:
    """Download the model owner/name from the Hugging Face Hub into the folder model_dir.

    The package huggingface_hub does the work. It reads HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE
    from the environment, and it resumes an interrupted download, which is kept in model_dir.part.

    Raises ConnectionError if the model cannot be downloaded, FileNotFoundError or ValueError,
    before its weights are downloaded, if it is not a GPT-2 in safetensors, and ImportError if the
    package is missing.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        problem = f"{name} is downloaded with the package huggingface_hub; install it with"
        raise ImportError(f"{problem}: pip install huggingface_hub") from None
    from hugging_face import CONVERT, INDEX, WEIGHTS, read_config, read_encoder

    if not is_terminal(sys.stderr):
        disable_progress_bars()  # they would fill a log file
    part = model_dir + ".part"
    info = ask_hub(HfApi().repo_info, name, revision="main")
    files = {sibling.rfilename for sibling in info.siblings or []}
    options = {"revision": info.sha, "local_dir": part}
    try:
        for needed in (["config.json"], [WEIGHTS, INDEX]):
            if files.isdisjoint(needed):
                raise FileNotFoundError(f"{name} on the Hub has no {needed[0]}; {CONVERT}")
        ask_hub(snapshot_download, name, allow_patterns=HUB_FILES, **options)
        read_config(os.path.join(part, "config.json"))
        read_encoder(part)
    except (ValueError, FileNotFoundError):
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.rmdir(os.path.dirname(model_dir))  # the owner's folder, if it is empty
        raise
    weights = [WEIGHTS] if WEIGHTS in files else ["model-*.safetensors"]
    ask_hub(snapshot_download, name, allow_patterns=weights, **options)
    os.replace(part, model_dir)


def ask_hub(function: Callable, name: str, **options: Any) -> Any:
    """Call a function of huggingface_hub. Any error becomes a ConnectionError of one line."""
    try:
        return function(name, **options)
    except Exception as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        problem = (str(error).strip() or type(error).__name__).splitlines()[0]
    if status in (401, 403):
        problem = "it does not exist, or it is private or gated and needs a token in HF_TOKEN"
    elif status == 404:
        problem = "it does not exist"
    raise ConnectionError(f"cannot download {name} from the Hugging Face Hub: {problem}")


# The terminal, shared by gpt2.py and the examples

PACKAGES = (
    "distributed",
    "fire",
    "huggingface_hub",
    "numpy",
    "regex",
    "requests",
    "threadpoolctl",
    "tqdm",
)


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
            return run_and_flush(command, arguments) or 0
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

    A stream whose output cannot be written is redirected to the null device at the end. Otherwise,
    Python would try again when it exits, and change the exit status.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        open_stream(name, mode)
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, or if it was replaced
            with contextlib.suppress(io.UnsupportedOperation):  # input that was read before
                stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            flush_or_discard(stream)


def open_stream(name: str, mode: str) -> None:
    """Open the null device in place of a standard stream that is closed.

    Otherwise the next file that is opened would get its descriptor, and messages would be written
    into that file.
    """
    stream = getattr(sys, name)
    if stream is None or getattr(stream, "closed", False):
        descriptor = os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115


def flush_or_discard(stream: TextIO) -> None:
    """Flush a stream. If that is impossible, redirect it to the null device."""
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


def progress_bar(*args: Any, **kwargs: Any) -> Any:
    """Return a tqdm bar that is shown in a notebook and on a terminal, but not in a log file."""
    if "ipykernel" not in sys.modules:
        from tqdm import tqdm

        class Bar(tqdm):
            monitor_interval = 0  # tqdm's own thread is for bars that stand still; we need none

        return Bar(*args, disable=not is_terminal(sys.stderr), **kwargs)
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
