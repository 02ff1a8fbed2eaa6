"""Files: download a published GPT-2, verify it, load it -> (encoder, hparams, params).

A model is a folder with the seven files that OpenAI's TensorFlow wrote (FILES). TensorFlow reads a checkpoint once and
shows how its data file is laid out; from then on NumPy maps that file, and the parameters are the file itself.
"""

import base64
import contextlib
import glob
import hashlib
import json
import math
import mmap
import os
import re
import sys
import tempfile
import time

import numpy as np

from encoder import Encoder, get_encoder

BASE_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models"
MODEL_SIZES = ("124M", "355M", "774M", "1558M")
# {file: its SHA-256 in 124M}. encoder.json and vocab.bpe are the same in every size; no digest of the rest is known.
FILES = {
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    "model.ckpt.data-00000-of-00001": "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
IN_EVERY_SIZE = ("encoder.json", "vocab.bpe")

CHUNK_BYTES = 1 << 18  # requests hands over whole ones: an interruption loses up to so much
TIMEOUT = (4, 10)  # seconds to connect, and between two pieces of an answer
PATIENCE = 8  # seconds after which a server that has not answered yet is not asked again
RETRIES = 4  # so many failures in a row that brought nothing new are borne, the next is the last
BACKOFF = 0.5  # seconds before the first retry, doubled for each one after it
MAX_WAIT = 30  # seconds, at most, that a server's Retry-After is heeded
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses that may be gone when asked again


_DATA = ".data-00000-of-00001"  # after the checkpoint's name: the one file of data that OpenAI's have
_RECORD = ".layout.json"  # after the checkpoint's name: how its data file was found to be laid out; can be deleted
_REPLACE = "delete it and run again (a published size is then downloaded anew), or put an intact one in its place"


# Downloading


class _Retry(Exception):
    """A failure that the next request may not meet. `wait`: seconds until then, None if the server did not answer."""

    def __init__(self, reason: str, wait: float | None = 0):
        super().__init__(reason)
        self.wait = wait


def download_gpt2_files(model_size: str, model_dir: str) -> None:
    """Download what is missing of a published model's seven files into model_dir, which is made if need be.

    A file stands under its name only when it is whole and verified: by its length, by Content-MD5 where the server
    sends it, by SHA-256 where one is published. What an interruption leaves (`*.part`) the next call goes on from.
    Of several processes at once one downloads and the others wait for it (not on Windows).

    Environment: GPT2_BASE_URL, the address of a mirror ($GPT2_BASE_URL/{model_size}/{file}) instead of OpenAI's;
    GPT2_ALLOW_UNVERIFIED=1, no SHA-256, for a server that holds other weights under a published name.

    Raises ValueError for another model_size, ConnectionError where the server does not give a file, or not the right
    one, and another OSError where it cannot be written.
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(f"no model {model_size!r} is published, only {', '.join(MODEL_SIZES)}")
    if all(os.path.isfile(os.path.join(model_dir, name)) for name in FILES):
        return
    import requests

    base_url = os.environ.get("GPT2_BASE_URL", BASE_URL).rstrip("/")
    if not base_url.startswith(("https://", "http://")):
        raise ValueError(f"GPT2_BASE_URL is {base_url!r}; it must begin with https:// or http://")
    verified = os.environ.get("GPT2_ALLOW_UNVERIFIED", "0") in ("", "0")
    if not verified:
        print(f"warning: GPT2_ALLOW_UNVERIFIED is set, SHA-256 is not checked in {model_dir}", file=sys.stderr)
    os.makedirs(model_dir, exist_ok=True)
    with _alone_in(model_dir), requests.Session() as session:
        if base_url.startswith("https://"):
            del session.adapters["http://"]  # so that no redirect leaves https
        for name in FILES:
            known = verified and (model_size == "124M" or name in IN_EVERY_SIZE)
            path = os.path.join(model_dir, name)
            if not os.path.isfile(path):
                _fetch(session, f"{base_url}/{model_size}/{name}", path, sha256=FILES[name] if known else None)
            _discard(path + ".part")


@contextlib.contextmanager
def _alone_in(folder: str):
    """Keep other processes waiting here for the same folder. The lock is on the folder itself: it leaves no file."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another download into {folder}", file=sys.stderr)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def _fetch(session, url: str, path: str, sha256: str | None) -> None:
    """Download url to path in as many requests as it takes, as long as they get on."""
    part = path + ".part"
    started, failures, size = time.monotonic(), 0, _size(part)
    answered = False
    while True:
        try:
            md5 = _request(session, url, part)
            break
        except OSError as error:
            if error.errno and not error.filename:  # a write that fails when the file is closed does not say where
                error.filename = part
            raise
        except _Retry as error:
            answered = answered or error.wait is not None or _size(part) > size
            failures = 0 if _size(part) > size else failures + 1
            size = max(size, _size(part))
            if failures > RETRIES or (not answered and time.monotonic() - started > PATIENCE):
                hint = "" if answered else "; --model_size tiny needs no network"
                raise ConnectionError(f"cannot download {url}: {error}{hint}") from None
            time.sleep(max(error.wait or 0, BACKOFF * 2 ** max(failures - 1, 0)))
    for algorithm, expected in ("md5", md5), ("sha256", sha256):
        if expected and (found := _digest(part, algorithm)) != expected:
            _discard(part)
            raise ConnectionError(f"{url} is damaged or another file: its {algorithm} is {found}, not {expected}")
    os.replace(part, path)


def _request(session, url: str, part: str) -> str | None:
    """Ask once for what part lacks of url and append it. Returns the MD5 that the server states, in hexadecimal.

    The version that part is of (its ETag or date, for If-Range) stands beside it, so that two are never joined.
    """
    import requests

    # The last byte once more: then there is something to ask for, and an answer to check, if part lacks nothing.
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
                _discard(part)
                if _version(response):
                    with open(part + ".version", "w", encoding="latin-1") as file:
                        file.write(_version(response))
            else:
                os.truncate(part, offset)
            _append(response.iter_content(CHUNK_BYTES), part, length)
            md5 = response.headers.get("x-ms-blob-content-md5")
            if response.status_code == 200:  # that of a 206 is of the rest only (RFC 2616, 14.15)
                md5 = md5 or response.headers.get("Content-MD5")
            md5 = base64.b64decode(md5).hex() if md5 else None
    except (requests.TooManyRedirects, ValueError) as error:  # ValueError: an address or a header that makes no sense
        raise ConnectionError(f"cannot download {url}: {error}") from None
    except requests.RequestException as error:
        inner = error.args[0] if error.args else error
        inner = getattr(inner, "reason", inner)
        inner, proxy = getattr(inner, "original_error", inner), "the proxy: " * hasattr(inner, "original_error")
        raise _Retry(proxy + re.sub(r"^\w+\(.*?\): ", "", str(inner)), wait=None) from None  # less the object's name
    if length not in (None, _size(part)):
        raise _Retry(f"{_size(part)} bytes came of {length}")
    return md5


def _expected_length(response, url: str, part: str, offset: int, version: str | None) -> int | None:
    """Return how long the whole file is, None where only the end of the answer will tell.

    Raises _Retry or ConnectionError where the answer is not (the rest of) the file.
    """
    status, headers = response.status_code, response.headers
    if status in (206, 416) and version:
        goes_on = re.fullmatch(rf"bytes {offset}-\d+/(\d+)", headers.get("Content-Range", ""))
        if status == 206 and goes_on and _version(response) in (None, version):
            return int(goes_on[1])
        _discard(part)
        raise _Retry("the server does not go on from where an earlier answer ended")
    if status in TRANSIENT:
        retry_after = headers.get("Retry-After", "")
        raise _Retry(f"HTTP status {status}", wait=min(int(retry_after), MAX_WAIT) if retry_after.isdecimal() else 0)
    if status != 200:
        raise ConnectionError(f"cannot download {url}: HTTP status {status} ({response.reason})")
    if headers.get("Content-Type", "").startswith("text/html"):
        raise ConnectionError(f"cannot download {url}: a web page came in its place; does this network want a login?")
    if headers.get("Content-Encoding", "identity") != "identity":
        raise ConnectionError(f"cannot download {url}: it came compressed though asked for as it is")
    if "Content-Length" in headers:
        return int(headers["Content-Length"])
    if headers.get("Transfer-Encoding") != "chunked":
        raise ConnectionError(f"cannot download {url}: the server does not say how long it is")
    return None


def _version(response) -> str | None:
    etag = response.headers.get("ETag", "")  # W/"..." would not promise the same bytes
    return etag if etag.startswith('"') else response.headers.get("Last-Modified")


def _append(chunks, part: str, length: int | None) -> None:
    from tqdm import tqdm

    name, done = os.path.basename(part).removesuffix(".part"), _size(part)
    with (
        open(part, "ab") as file,
        tqdm(desc=name, initial=done, total=length, unit="B", unit_scale=True, disable=None) as bar,
    ):
        for chunk in chunks:
            file.write(chunk)
            file.flush()
            bar.update(len(chunk))
        os.fsync(file.fileno())


def _size(path: str) -> int:
    return os.path.getsize(path) if os.path.exists(path) else 0


def _digest(path: str, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _discard(part: str) -> None:
    for path in (part, part + ".version"):
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


# Loading


def load_encoder_hparams_and_params(model_size: str, models_dir: str) -> tuple[Encoder, dict, dict]:
    """Load the model in models_dir/model_size -> (encoder, hparams, params), downloaded first if it is a published one.

    Any folder that holds a checkpoint is loaded, whatever its name; a fine-tuned one (`model-1000.*`) too. hparams is
    what hparams.json says, a dict; params is described at load_gpt2_params_from_tf_ckpt.

    Raises ValueError for a name that is neither there nor published and for files that do not fit together,
    FileNotFoundError for one that is missing, and what download_gpt2_files raises.
    """
    if model_size in ("", ".", "..") or re.search(r"[/\\:\0]", model_size):
        raise ValueError(f"{model_size!r} cannot be a model's name: it must be that of a folder in {models_dir!r}")
    model_dir = os.path.join(models_dir, model_size)
    tf_ckpt_path = _checkpoint_path(model_dir)
    if model_size in MODEL_SIZES and tf_ckpt_path in (None, os.path.join(model_dir, "model.ckpt")):
        download_gpt2_files(model_size, model_dir)
        tf_ckpt_path = _checkpoint_path(model_dir)
    if tf_ckpt_path is None:
        if os.path.isdir(model_dir):
            raise FileNotFoundError(
                f"{os.path.join(model_dir, 'checkpoint')} is missing: is {model_dir} a model's folder?"
            )
        found = glob.glob(os.path.join("*", "checkpoint"), root_dir=models_dir)
        there = ", ".join(sorted(map(os.path.dirname, found))) or "none"
        raise ValueError(
            f"there is no model {model_size!r}: found in {models_dir!r}: {there}; published: {', '.join(MODEL_SIZES)}"
        )
    encoder = get_encoder(model_size, models_dir)
    hparams = _read_hparams(os.path.join(model_dir, "hparams.json"))
    if len(encoder.encoder) != hparams["n_vocab"]:
        n_vocab = f"n_vocab is {hparams['n_vocab']} in hparams.json"
        raise ValueError(
            f"{model_dir}: encoder.json has {len(encoder.encoder)} tokens, but {n_vocab}: one is not its own"
        )
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)


def _checkpoint_path(model_dir: str) -> str | None:
    """Return the path, without its endings, of the checkpoint in model_dir; None if the `checkpoint` file is missing.

    That file is a text-format CheckpointState of TensorFlow. The folders it may name are those of whoever saved it.
    """
    path = os.path.join(model_dir, "checkpoint")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8", errors="replace") as file:
        named = re.search(r'^model_checkpoint_path: "(?:.*[/\\])?(.+)"$', file.read(), re.MULTILINE)
    if not named:
        raise ValueError(f"{path} does not name a checkpoint; {_REPLACE}")
    return os.path.join(model_dir, named[1])


def _read_hparams(path: str) -> dict:
    try:
        with open(path, encoding="utf-8") as file:
            hparams = json.load(file)
        for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
            if type(hparams[name]) is not int or hparams[name] < 1:
                raise ValueError(f"{name} is {hparams[name]!r}, not a whole number above 0")
        if hparams["n_embd"] % hparams["n_head"]:
            raise ValueError(f"n_embd {hparams['n_embd']} is not a multiple of n_head {hparams['n_head']}")
    except KeyError as error:
        raise ValueError(f"{path} has no {error}; {_REPLACE}") from None
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is not right: {error}; {_REPLACE}") from None
    return hparams


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str, hparams: dict) -> dict:
    """Load the parameters of the checkpoint tf_ckpt_path (`.index`, `.data-*`) -> nested dict of float32 arrays:

    {"wte": [n_vocab, n_embd], "wpe": [n_ctx, n_embd], "blocks": [{"ln_1": {"g", "b"}, "attn": {"c_attn": {"w", "b"},
    "c_proj": {"w", "b"}}, "ln_2": {"g", "b"}, "mlp": {"c_fc": {"w", "b"}, "c_proj": {"w", "b"}}}, ...],
    "ln_f": {"g", "b"}}, each w [n_in, n_out]. The arrays are read-only: most often they are the file itself.

    Variables that GPT-2 has no place for (an optimizer's) are left out. Raises ValueError for a variable that is
    missing or has another shape than hparams say, or that does not pass TensorFlow's checksum.
    """
    data_paths = glob.glob(glob.escape(tf_ckpt_path) + ".data-*")
    for path in tf_ckpt_path + ".index", *(data_paths or [tf_ckpt_path + _DATA]):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} is missing; put it there")
    variables = _map_as_recorded(tf_ckpt_path, hparams) or _read_with_tensorflow(tf_ckpt_path, hparams)
    params = {"blocks": [{} for _ in range(hparams["n_layer"])]}
    for name, array in variables.items():
        _, *keys, last = name.split("/")  # model/wte, model/ln_f/g, model/h0/attn/c_attn/w
        place = params
        for key in keys:
            place = params["blocks"][int(key[1:])] if re.fullmatch(r"h\d+", key) else place.setdefault(key, {})
        place[last] = array.reshape(array.shape[-2:])  # a w is [1, n_in, n_out] in the file
    return params


def _variable_shapes(hparams: dict):
    """Yield the (name, shape) of each variable that openai/gpt-2's model.py makes."""
    n_embd = hparams["n_embd"]
    yield "model/wte", (hparams["n_vocab"], n_embd)
    yield "model/wpe", (hparams["n_ctx"], n_embd)
    yield from _norm_shapes("model/ln_f", n_embd)
    for block in (f"model/h{layer}" for layer in range(hparams["n_layer"])):
        yield from _norm_shapes(f"{block}/ln_1", n_embd)
        yield from _norm_shapes(f"{block}/ln_2", n_embd)
        for projection, n_in, n_out in (
            ("attn/c_attn", n_embd, 3 * n_embd),
            ("attn/c_proj", n_embd, n_embd),
            ("mlp/c_fc", n_embd, 4 * n_embd),
            ("mlp/c_proj", 4 * n_embd, n_embd),
        ):
            yield f"{block}/{projection}/w", (1, n_in, n_out)
            yield f"{block}/{projection}/b", (n_out,)


def _norm_shapes(name: str, n_embd: int):
    yield f"{name}/g", (n_embd,)
    yield f"{name}/b", (n_embd,)


def _gpt2_variables(found: dict, hparams: dict, tf_ckpt_path: str) -> list[str]:
    """Return the names of GPT-2's variables when all are in found ({name: shape}); raise ValueError at the first that
    is not, before wrong hparams can ask for more than there is."""
    names = []
    for name, shape in _variable_shapes(hparams):
        if name not in found:
            raise ValueError(
                f"{tf_ckpt_path} has no variable {name}, of shape {list(shape)} by hparams.json; {_REPLACE}"
            )
        if tuple(found[name]) != shape:
            wrong = f"{tf_ckpt_path}: the variable {name} has shape {list(found[name])}"
            raise ValueError(f"{wrong}, but {list(shape)} by hparams.json; {_REPLACE}")
        names.append(name)
    return names


def _read_with_tensorflow(tf_ckpt_path: str, hparams: dict) -> dict[str, np.ndarray]:
    """Read GPT-2's variables through TensorFlow, which verifies the checksum of each -> {name: array}.

    Each that stands in the data file where a plain concatenation of all variables, in the order of their names, has
    it is taken from the mapped file instead. If that is true of all of them it is recorded for the next load.
    """
    from tqdm import tqdm

    try:
        with _no_stderr():
            import tensorflow as tf
    except ImportError as error:
        raise ImportError(f"the first load of a checkpoint needs TensorFlow ({error}): see requirements.txt") from None
    damaged = tf_ckpt_path + ".index"
    try:
        with _without_wildcards(tf_ckpt_path) as path:
            with _no_stderr():
                reader = tf.train.load_checkpoint(path)
            found, types = reader.get_variable_to_shape_map(), reader.get_variable_to_dtype_map()
            dtypes = {name: np.dtype(types[name].as_numpy_dtype).name for name in sorted(found)}
            layout = {name: " ".join([dtype, *map(str, found[name])]) for name, dtype in dtypes.items()}
            identity, mapped = _map_variables(tf_ckpt_path + _DATA, layout)
            variables, damaged = {}, tf_ckpt_path + _DATA
            for name in tqdm(_gpt2_variables(found, hparams, tf_ckpt_path), desc="first load", disable=None):
                variables[name] = np.asarray(reader.get_tensor(name), np.float32)
                variables[name].flags.writeable = False
                if name in mapped and np.array_equal(variables[name].view(np.uint32), mapped[name].view(np.uint32)):
                    variables[name] = mapped[name]
    except (tf.errors.OpError, RuntimeError, IndexError) as error:  # IndexError: the data ends too early
        raise ValueError(f"{damaged} is damaged: {str(error).splitlines()[0]}; {_REPLACE}") from None
    if all(array is mapped.get(name) for name, array in variables.items()):
        _write_record(tf_ckpt_path, {"data_file": identity, "variables": layout})
    return variables


@contextlib.contextmanager
def _no_stderr():
    """Send what is written to file descriptor 2 nowhere: TensorFlow's start-up chatter comes from C++, past Python."""
    if sys.stderr is None:  # closed
        yield
        return
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


@contextlib.contextmanager
def _without_wildcards(path: str):
    """Lead to path by a link where it holds a [ or *, which TensorFlow would take for a wildcard."""
    if glob.escape(path) == path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        os.symlink(os.path.dirname(os.path.abspath(path)), os.path.join(folder, "link"))
        yield os.path.join(folder, "link", os.path.basename(path))


def _map_variables(data_path: str, layout: dict[str, str]) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """Map the data file, read-only -> (what tells it from another, {name: array}).

    layout: {name: "dtype size ..."}, with the sizes of the variable's axes. The variables come one after another in
    the order of layout; where the file can't be so, there are none.
    """
    identity, variables, offset = {}, {}, 0
    try:
        with open(data_path, "rb") as file:
            status = os.fstat(file.fileno())
            identity = {"bytes": status.st_size, "mtime_ns": status.st_mtime_ns, "ctime_ns": status.st_ctime_ns}
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        for name, description in layout.items():
            dtype, *sizes = description.split()
            shape = tuple(map(int, sizes))
            variables[name] = np.frombuffer(mapped, dtype, math.prod(shape), offset).reshape(shape)
            offset += variables[name].nbytes
    except (OSError, TypeError, ValueError):
        return identity, {}
    return identity, variables if offset == len(mapped) else {}


def _map_as_recorded(tf_ckpt_path: str, hparams: dict) -> dict[str, np.ndarray] | None:
    """Map GPT-2's variables as an earlier load found and recorded them; None without a record of this very file."""
    try:
        with open(tf_ckpt_path + _RECORD, encoding="utf-8") as file:
            record = json.load(file)
        identity, mapped = _map_variables(tf_ckpt_path + _DATA, record["variables"])
        if not mapped or identity != record["data_file"]:
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None
    shapes = {name: array.shape for name, array in mapped.items()}
    return {name: mapped[name] for name in _gpt2_variables(shapes, hparams, tf_ckpt_path)}


def _write_record(tf_ckpt_path: str, record: dict) -> None:
    temporary = f"{tf_ckpt_path}{_RECORD}.{os.getpid()}"
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
        os.replace(temporary, tf_ckpt_path + _RECORD)
    except OSError:  # a folder that cannot be written: the next load asks TensorFlow again
        with contextlib.suppress(OSError):
            os.remove(temporary)
