"""Files: download a published GPT-2, verify it, load it -> (encoder, hparams, params).

A model is a folder in OpenAI's layout: a TensorFlow checkpoint with a vocabulary. The weights lie
in the file as NumPy needs them, so they are memory-mapped, not copied. hugging_face.py reads the
other layout.
"""

import base64
import contextlib
import glob
import hashlib
import importlib.util
import io
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
from typing import Any

import numpy as np

from encoder import GIT_LFS_POINTER, Encoder, get_encoder, read_json

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
FILES = {  # of a published model, with their SHA-256 for 124M; the other sizes have none published
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.data-00000-of-00001": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
IN_EVERY_SIZE = ("encoder.json", "vocab.bpe")
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
BUNDLED = "tiny"  # the model in this repository's own folder models
HUB_NAMES = {  # the published models on the Hugging Face Hub
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
OLD_NAMES = {  # other names of the published sizes
    "117m": "124M",
    "345m": "355M",
    "762m": "774M",
    "1542m": "1558M",
    "1.5b": "1558M",
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
DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # the upper half of a float32
}
MASKS = (".attn.bias", ".attn.masked_bias")  # stored by old versions; not parameters
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
MAX_SIZE = 1_000_000  # no size in hparams.json may be larger
MODEL_SIZES = {
    "124M": (50257, 1024, 768, 12, 12),
    "355M": (50257, 1024, 1024, 16, 24),
    "774M": (50257, 1024, 1280, 20, 36),
    "1558M": (50257, 1024, 1600, 25, 48),
}
DATA_SUFFIX = ".data-00000-of-00001"  # of a checkpoint's only data file
RECORD_SUFFIX = ".verified.json"  # of the record of its verification
KNOWN_DATA: dict[
    tuple[int, ...], str
] = {  # hparams -> SHA-256 of the data file: 124M and models/tiny
    MODEL_SIZES["124M"]: FILES["model.ckpt" + DATA_SUFFIX],
    (1024, 256, 128, 4, 4): "02ce5e2c9d75fd413b78a0123dfc08a2033169d137308353d6cebc8f0762d895",
}

CHUNK_BYTES = 1 << 13  # read at a time; an interruption loses at most this
TIMEOUT = (4, 10)  # seconds to connect, and between two pieces of an answer
PATIENCE = 8  # seconds: give up on a server that has not answered at all by then
RETRIES = 4  # consecutive retries without progress
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one
MAX_WAIT = 30  # seconds: upper limit for Retry-After
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which a retry may help

REPLACE = "replace it with an intact copy (delete a published model's file to download it again)"


# Downloading


def download_gpt2_files(model_size: str, model_dir: str) -> None:
    """Download the files of a published model that are missing in model_dir. Creates model_dir if necessary.

    A file gets its final name only after its length, its MD5 (if the server sends one) and its SHA-256 (if published)
    are verified. An interrupted download leaves `*.part` files, and the next call resumes them. If several processes
    download at once, one does the work and the others wait for it (not on Windows).

    Environment variables: GPT2_BASE_URL is the address of a mirror, with files at $GPT2_BASE_URL/{model_size}/{file}.
    GPT2_ALLOW_UNVERIFIED=1 skips SHA-256, for a server that has other weights under a published name.

    Raises ValueError for an unknown model_size, ConnectionError if a file cannot be downloaded or is wrong, and another
    OSError if a file cannot be written.
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(
            f"there is no published model {model_size!r}, only {', '.join(MODEL_SIZES)}"
        )
    if all(os.path.isfile(os.path.join(model_dir, name)) for name in FILES):
        return
    import requests

    base_url = (os.environ.get("GPT2_BASE_URL") or BASE_URL).rstrip("/")
    if not base_url.lower().startswith(("https://", "http://")):
        raise ValueError(f"GPT2_BASE_URL must begin with https:// or http://, got {base_url!r}")
    if _unverified():
        print(
            f"warning: GPT2_ALLOW_UNVERIFIED is set: SHA-256 is not checked in {model_dir}",
            file=sys.stderr,
        )
    with _locked(model_dir), requests.Session() as session:
        if base_url.lower().startswith("https://"):
            del session.adapters["http://"]  # no redirect may lead from https to http
        for name in FILES:
            is_known = not _unverified() and (model_size == "124M" or name in IN_EVERY_SIZE)
            path = os.path.join(model_dir, name)
            if not os.path.isfile(path):
                _fetch(
                    session,
                    f"{base_url}/{model_size}/{name}",
                    path,
                    sha256=FILES[name] if is_known else None,
                )
            _discard(path + ".part")


def _unverified() -> bool:
    return os.environ.get("GPT2_ALLOW_UNVERIFIED", "0") not in ("", "0")


@contextlib.contextmanager
def _locked(folder: str):
    """Create the folder and lock it against other processes (not on Windows). Remove it at the end if it is empty."""
    created = [
        path for path in (folder, os.path.dirname(folder)) if path and not os.path.isdir(path)
    ]
    os.makedirs(folder, exist_ok=True)
    descriptor = None
    try:
        with contextlib.suppress(
            ImportError, OSError
        ):  # Windows has no fcntl, some file systems have no locks
            import fcntl

            descriptor = os.open(
                folder, os.O_RDONLY
            )  # the lock is on the folder itself and leaves no file
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another download into {folder}", file=sys.stderr)
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty
            for path in created:
                os.rmdir(path)


def _fetch(session, url: str, path: str, sha256: str | None) -> None:
    """Download url to path and verify it. Retries as long as requests make progress."""
    import requests

    part = path + ".part"
    started, failures, size, answered = time.monotonic(), 0, _size(part), False
    while True:
        try:
            md5 = _request(session, url, part)
            break
        except requests.RequestException as error:
            progress = _size(part) > size
            answered = answered or progress or error.response is not None
            failures, size = 0 if progress else failures + 1, max(size, _size(part))
            if failures > RETRIES or (not answered and time.monotonic() - started > PATIENCE):
                hint = "" if answered else "; --model_size tiny needs no network"
                raise ConnectionError(f"cannot download {url}: {_reason(error)}{hint}") from None
            wait = (
                error.response.headers.get("Retry-After", "") if error.response is not None else ""
            )
            wait = min(int(wait), MAX_WAIT) if wait.isdecimal() else 0
            time.sleep(max(wait, BACKOFF * 2 ** max(failures - 1, 0)))
        except OSError as error:
            if error.errno and not error.filename:  # a failed write does not name the file
                error.filename = part
            raise
    for algorithm, expected in ("md5", md5), ("sha256", sha256):
        if expected and (found := _digest(part, algorithm)) != expected:
            _discard(part)
            raise ConnectionError(
                f"{url} is damaged or not the expected file: its {algorithm} is {found}, not {expected}"
            )
    os.replace(part, path)


def _request(session, url: str, part: str) -> str | None:
    """Request the missing rest of url once and append it to part. Returns the MD5 that the server states, in hex.

    part.version holds the ETag or date of the file on the server (for If-Range), so two versions are never joined.
    Raises requests.RequestException if a retry may help, ConnectionError if not.
    """
    import requests

    # Request the last byte again: a complete part then still has a range to request and an answer to check.
    offset, version, headers = max(_size(part) - 1, 0), None, {"Accept-Encoding": "identity"}
    if offset and os.path.isfile(part + ".version"):
        with open(part + ".version", encoding="latin-1") as file:
            version = file.read()
    if version:
        headers |= {"Range": f"bytes={offset}-", "If-Range": version}
    try:
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            length = _expected_length(response, url, part, offset, version)
            if response.status_code == 200:
                offset = 0
                _discard(part)
                if _version(response):
                    with open(part + ".version", "w", encoding="latin-1") as file:
                        file.write(_version(response))
            name = os.path.basename(part).removesuffix(".part")
            bar = progress_bar(desc=name, initial=offset, total=length, unit="B", unit_scale=True)
            with open(part, "ab") as file, bar:
                file.truncate(offset)
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    file.flush()
                    bar.update(len(chunk))
                os.fsync(file.fileno())
            if _size(part) != length:
                raise requests.ConnectionError(
                    f"received {_size(part)} of {length} bytes", response=response
                )
            md5 = response.headers.get("x-ms-blob-content-md5")
            if (
                response.status_code == 200
            ):  # Content-MD5 of a 206 covers only the range (RFC 2616, 14.15)
                md5 = md5 or response.headers.get("Content-MD5")
            return base64.b64decode(md5).hex() if md5 else None
    except (
        requests.TooManyRedirects,
        ValueError,
    ) as error:  # ValueError: an unusable address or header
        raise ConnectionError(f"cannot download {url}: {error}") from None


def _expected_length(response, url: str, part: str, offset: int, version: str | None) -> int:
    """Return the length of the whole file. Raises as _request does for any other answer."""
    import requests

    status, headers = response.status_code, response.headers
    if status in (206, 416) and version:
        content_range = re.fullmatch(
            rf"bytes {offset}-\d+/(\d+)", headers.get("Content-Range", ""), re.IGNORECASE
        )
        if status == 206 and content_range and _version(response) in (None, version):
            return int(content_range[1])
        _discard(part)
        raise requests.HTTPError(
            "the server did not resume at the requested offset", response=response
        )
    if status in TRANSIENT:
        raise requests.HTTPError(f"HTTP status {status}", response=response)
    if status != 200:
        problem = f"HTTP status {status} ({response.reason})"
    elif headers.get("Content-Type", "").lower().startswith("text/html"):
        problem = "the answer is a web page (does this network require a login?)"
    elif headers.get("Content-Encoding", "identity").lower() != "identity":
        problem = "the answer is compressed, which was not requested"
    elif not headers.get("Content-Length", "").isdecimal() or "Transfer-Encoding" in headers:
        problem = "the server does not state the length"
    else:
        return int(headers["Content-Length"])
    raise ConnectionError(f"cannot download {url}: {problem}")


def _version(response) -> str | None:
    etag = response.headers.get("ETag", "")  # a weak one, W/"...", does not promise the same bytes
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _reason(error) -> str:
    """Return the message of an error without urllib3's object names."""
    inner = error.args[0] if error.args else error
    inner = getattr(inner, "reason", inner)
    inner, proxy = (
        getattr(inner, "original_error", inner),
        "the proxy: " * hasattr(inner, "original_error"),
    )
    return proxy + re.sub(r"^\w+\(.*?\): ", "", str(inner))


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _digest(path: str, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _discard(part: str) -> None:
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
    if is_published and not _unverified():
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
    """Return whether to load a folder as a Hugging Face model. If it holds both, say so."""
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
    complain("warning", f"{taken}. To load {weights[0]}, move the file `checkpoint` away")
    return False


def check_tensorflow(model_size: str, model_dir: str) -> None:
    """Raise ImportError before a download that only TensorFlow, which is missing, could verify."""
    is_known = MODEL_SIZES[model_size] in KNOWN_DATA
    is_there = os.path.isfile(os.path.join(model_dir, "model.ckpt" + DATA_SUFFIX))
    if is_known or is_there or importlib.util.find_spec("tensorflow"):
        return
    raise ImportError(
        f"TensorFlow is not installed, and it must verify {model_size} after the download; install "
        f"it with: pip install -r requirements.txt, or load {HUB_NAMES[model_size]}, the same "
        "model, which needs no TensorFlow but: pip install huggingface_hub"
    )


def missing_model(model_dir: str, model_size: str) -> Exception:
    """Return an error that says what is in the place of the model, or which models are there."""
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
        return f"{', '.join(indices)}, but no file named checkpoint, with the line {line}"
    if os.path.isfile(os.path.join(model_dir, "adapter_config.json")):
        return (
            "a LoRA adapter, which is not a whole model; merge it with its base model first, with "
            "merge_and_unload() and save_pretrained() of the package peft"
        )
    return "neither a checkpoint nor a config.json"


def published_size(model_size: str) -> str | None:
    """Return the published name of a size that is known under another name, too."""
    spelling = model_size.lower()
    for size, hub_name in HUB_NAMES.items():
        if spelling in (size.lower(), hub_name.lower().rpartition("/")[2]):
            return size
    return OLD_NAMES.get(spelling)


def find_checkpoint(model_dir: str) -> str | None:
    """Return the path of the checkpoint in model_dir, without suffix.

    The file `checkpoint` names it, in TensorFlow's CheckpointState in protobuf's text format. It may
    hold a path on the machine that saved it, which may have been a Windows machine. Returns None if
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


def sizes_of(hparams: dict) -> tuple[int, ...]:
    """Return the values of hparams in the order of HPARAMS, as in MODEL_SIZES."""
    return tuple(hparams[name] for name in HPARAMS)


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str | os.PathLike, hparams: dict) -> dict[str, Any]:
    """Load the checkpoint tf_ckpt_path (without `.index`) -> nested dict of float32 arrays:

    {"wte": [n_vocab, n_embd], "wpe": [n_ctx, n_embd], "blocks": [{"ln_1": {"g", "b"}, "attn":
    {"c_attn": {"w", "b"}, "c_proj": {"w", "b"}}, "ln_2": {"g", "b"}, "mlp": {"c_fc": {"w", "b"},
    "c_proj": {"w", "b"}}}, ...], "ln_f": {"g", "b"}}, each w [n_in, n_out]. The arrays are
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
    return known is not None and _digest(tf_ckpt_path + DATA_SUFFIX, "sha256") == known


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
            raise ValueError(f"{path} is a Git LFS pointer; get the file itself with: git lfs pull")


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
        place[last] = array.reshape(array.shape[-2:])  # a w is [1, n_in, n_out] in a checkpoint
    return params


# TensorFlow


def read_with_tensorflow(tf_ckpt_path: str, hparams: dict, mapped: dict) -> dict[str, np.ndarray]:
    """Read GPT-2's variables through TensorFlow, which verifies them -> {name: array}.

    Where an array of mapped is equal, it is taken instead.
    """
    tf = import_tensorflow(tf_ckpt_path)
    damaged = tf_ckpt_path + ".index"
    variables = {}
    try:
        with plain_path(tf_ckpt_path) as path:
            reader = tf.train.load_checkpoint(path)
            names = check_shapes(reader.get_variable_to_shape_map(), hparams, tf_ckpt_path)
            damaged = " or ".join(data_files(tf_ckpt_path))
            for name in progress_bar(names, "first load"):
                array = np.asarray(reader.get_tensor(name), np.float32)
                if name in mapped and is_equal_by_bits(array, mapped[name]):
                    array = mapped[name]
                variables[name] = array
    except (tf.errors.OpError, RuntimeError, IndexError) as error:  # IndexError: the data is cut
        reason = str(error).splitlines()[0]
        if "No such file" in reason:  # one of several data files
            raise FileNotFoundError(reason) from None
        raise ValueError(f"{damaged} is damaged: {reason}; {REPLACE}") from None
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

    It would treat path as a pattern, and it only takes UTF-8.
    """
    if not re.search(r"[*?\[\]\\\ud800-\udfff]", path.replace(os.sep, "/")):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in glob.glob(glob.escape(path) + ".*"):
            os.symlink(os.path.abspath(file), os.path.join(folder, "model" + file[len(path) :]))
        yield os.path.join(folder, "model")


# safetensors


def read_safetensors(path: str) -> dict[str, np.ndarray]:
    """Read a file -> {name: float32 array}.

    A file is 8 bytes with the length of the header, the header in JSON, and the data.
    """
    refuse_pointer(path)
    with open(path, "rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        try:
            if start > MAX_HEADER_BYTES:
                raise ValueError(f"its header cannot have {start - 8} bytes")
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            header = json.loads(content[8:start].decode("utf-8"))
            header.pop("__metadata__", None)
            return read_tensors(header, memoryview(content)[start:])
        except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError) as error:
            problem = f"is damaged or not supported: {type(error).__name__}: {error}"
        except RecursionError:
            problem = "is damaged: its header is nested too deeply"
    raise ValueError(f"{path} {problem}; {REPLACE}")


def read_tensors(header: dict[str, Any], data: memoryview) -> dict[str, np.ndarray]:
    """Return the tensors that a header describes.

    Raises ValueError unless they fill the data exactly, one after another.
    """
    tensors = {}
    position = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        if begin != position:
            raise ValueError(f"a gap or an overlap at {name!r}")
        if not name.endswith(MASKS):
            tensors[name] = to_array(data[begin:end], entry["dtype"], entry["shape"])
        position = end
    if position != len(data):
        raise ValueError("the tensors end elsewhere than the file")
    return tensors


def to_array(data: memoryview, dtype: str, shape: list[int]) -> np.ndarray:
    """Return a tensor as a float32 array, mapped if it is stored as aligned float32."""
    if dtype not in list(DTYPES):
        raise ValueError(f"type {dtype!r} is not one of {', '.join(DTYPES)}")
    array = np.frombuffer(data, DTYPES[dtype]).reshape(shape)
    if dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return np.require(array, np.float32, "A")


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
    from hugging_face import CONVERT, WEIGHTS, read_config, read_encoder

    if not sys.stderr.isatty():
        disable_progress_bars()  # they would fill a log file
    part = model_dir + ".part"
    info = ask_hub(HfApi().repo_info, name, revision="main")
    files = {sibling.rfilename for sibling in info.siblings or []}
    options = {"revision": info.sha, "local_dir": part}
    try:
        for needed in (["config.json"], [WEIGHTS, WEIGHTS + ".index.json"]):
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
    """Call a function of huggingface_hub. Its errors have many types; make them one line of one."""
    try:
        return function(name, **options)
    except Exception as error:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None)
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    if status in (401, 403):
        reason = "it does not exist, or it is private or gated and needs a token in HF_TOKEN"
    elif status == 404:
        reason = "it does not exist"
    raise ConnectionError(f"cannot download {name} from the Hugging Face Hub: {reason}")


# The terminal, shared by gpt2.py and the examples


class UsageError(ValueError):
    """The arguments of a command are unusable."""


def run_command(
    program: str, command: Callable[[list[str]], int | None], arguments: list[str]
) -> int:
    """Run command(arguments) -> exit status. An error becomes one line on standard error.

    The status is what the command returns (0 for None), 0 if the reader of its output has closed
    the pipe, 1 after an error, 2 after a UsageError and 130 after Ctrl-C.
    """
    with robust_streams():
        try:
            status = command(arguments)
            sys.stdout.flush()
            return status or 0
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 0
        except UsageError as error:
            complain(program, str(error))
            return 2
        except (ValueError, OSError, ImportError, MemoryError, OverflowError) as error:
            complain(program, str(error) or "out of memory")
            return 1


def complain(program: str, message: str) -> None:
    """Print one line on standard error. Does nothing if that cannot be written."""
    line = " ".join(message.splitlines())
    with contextlib.suppress(OSError):
        print(f"{program}: {line}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def robust_streams() -> Iterator[None]:
    """Make a command work with standard streams that are closed or cannot encode a character.

    A closed stream is replaced by an empty one; otherwise the next file that is opened would get
    its descriptor, and messages would be written into that file.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            descriptor = os.open(os.devnull, os.O_RDWR)
            stream = open(descriptor, mode, closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, or if it is redirected
            stream.reconfigure(errors="replace")
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:  # the flush at exit would fail, too, and change the exit status
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def read_text(path: str) -> str:
    """Read a UTF-8 text without its byte order mark. The path "-" means standard input.

    Raises ValueError if the text is not UTF-8.
    """
    name = "standard input" if path == "-" else path
    if path != "-":
        content = Path(path).read_bytes()
    elif isinstance(sys.stdin, io.TextIOWrapper):
        content = sys.stdin.buffer.read()
    else:
        content = sys.stdin.read().encode("utf-8", "surrogateescape")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name} is not UTF-8: {error.reason} at byte {error.start}") from None


def progress_bar(*args, **kwargs):
    """Return a tqdm bar that is shown in a notebook and on a terminal, but not in a log file."""
    if "ipykernel" in sys.modules:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without ipywidgets, tqdm warns and shows plain text
            from tqdm.auto import tqdm
        is_shown = True
    else:
        from tqdm import tqdm

        is_shown = sys.stderr is not None and not sys.stderr.closed and sys.stderr.isatty()
    return tqdm(*args, disable=not is_shown, **kwargs)
