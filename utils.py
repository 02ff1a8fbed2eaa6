"""OpenAI's files: download a published GPT-2, verify it, load it -> (encoder, hparams, params).

A model is a folder with a TensorFlow checkpoint and a vocabulary. The weights lie in the file as
NumPy needs them, so they are memory-mapped, not copied. hugging_face.py reads the other layout;
`load_encoder_hparams_and_params` is the door to both.
"""

import contextlib
import glob
import hashlib
import math
import mmap
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import hugging_face
from encoder import Encoder, get_encoder, read_json
from terminal import note, progress_bar

MODEL_SIZES = {  # the published models -> their names on the Hugging Face Hub
    "124M": "openai-community/gpt2",
    "355M": "openai-community/gpt2-medium",
    "774M": "openai-community/gpt2-large",
    "1558M": "openai-community/gpt2-xl",
}
BUNDLED = Path(__file__).resolve().parent / "models" / "tiny"
HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
MAX_SIZE = 1_000_000  # no value in hparams.json may be larger

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
IN_EVERY_SIZE = ("checkpoint", "encoder.json", "vocab.bpe")  # these are the same in all sizes
DATA_SUFFIX = ".data-00000-of-00001"  # of a checkpoint's only data file
KNOWN_DATA = {  # the size of a data file -> SHA-256: 124M and tiny
    497_759_232: FILES["model.ckpt" + DATA_SUFFIX],
    3_828_736: "c757eb2ae9723d74d1599ca802817c31e0104bc3443135bbfc60ca0e9c82c884",
}

CHUNK_BYTES = 1 << 13  # read at a time; an interruption loses at most two of them
TIMEOUT = (4, 8)  # seconds to connect, and between two pieces of an answer
PATIENCE = 8  # seconds: give up on a server that has sent nothing by then
RETRIES = 4  # in a row without progress
BACKOFF = 0.5  # seconds before the first retry, doubled for each further one
MAX_WAIT = 30  # seconds: upper limit for Retry-After
TRANSIENT = (408, 425, 429, 500, 502, 503, 504)  # HTTP statuses after which a retry may help

REPLACE = "replace it with an intact copy (delete a published model's file to download it again)"


# Downloading


def download_gpt2_files(model_size: str, model_dir: str) -> None:
    """Download the files of a published model that are missing in model_dir.

    A file gets its final name only after its length and its SHA-256 (if published) are verified.
    An interrupted download leaves a file *.part, which the next call continues. If several
    processes download a file at once, one does the work and the others wait (not on Windows).

    Environment variables: GPT2_BASE_URL is the address of a mirror, with files at
    $GPT2_BASE_URL/{model_size}/{file}. GPT2_ALLOW_UNVERIFIED=1 skips SHA-256.

    Raises ValueError for an unknown model_size, ConnectionError if a file cannot be downloaded or
    is wrong, and another OSError if a file cannot be written.
    """
    if model_size not in MODEL_SIZES:
        raise ValueError(f"{model_size!r} is not a published model: {', '.join(MODEL_SIZES)}")
    missing = [name for name in FILES if not os.path.isfile(os.path.join(model_dir, name))]
    if not missing:
        return
    import requests
    from requests.utils import get_auth_from_url, urldefragauth

    base_url = (os.environ.get("GPT2_BASE_URL") or BASE_URL).rstrip("/")
    with requests.Session() as session:
        session.headers["Accept-Encoding"] = "identity"  # lengths count the file's own bytes
        if "@" in base_url:  # a user and a password, which no message may show
            session.auth = get_auth_from_url(base_url)
            base_url = urldefragauth(base_url)
        if base_url.lower().startswith("https://"):
            del session.adapters["http://"]  # no redirect may lead from https to http
        note(f"downloading {model_size} from {base_url}")
        for name in missing:
            is_known = model_size == "124M" or name in IN_EVERY_SIZE
            is_trusted = os.environ.get("GPT2_ALLOW_UNVERIFIED") == "1"
            sha256 = FILES[name] if is_known and not is_trusted else None
            path = os.path.join(model_dir, name)
            download(session, f"{base_url}/{model_size}/{name}", path, sha256)


def download(session, url, path, sha256):
    """Download url to path. After a failure that may pass, go on where it stopped."""
    import requests

    part = path + ".part"
    n_failures = 0  # since the last progress
    deadline = time.monotonic() + PATIENCE
    while True:
        size = size_of(part)
        try:
            return receive(session, url, path, sha256)
        except (
            requests.ConnectionError,
            requests.Timeout,
            requests.exceptions.ChunkedEncodingError,
        ) as error:
            if size_of(part) > size:
                n_failures = 0
                deadline = math.inf
            n_failures += 1
            if n_failures > RETRIES or time.monotonic() > deadline:
                problem = f"{type(error).__name__}: {reason(error)}"
                raise ConnectionError(f"cannot download {url}: {problem}") from None
            wait = stated_wait(error.response) or BACKOFF * 2 ** (n_failures - 1)
        except (requests.RequestException, ValueError) as error:
            raise ConnectionError(f"cannot download {url}: {reason(error)}") from None
        except OSError as error:
            error.filename = error.filename or part  # a failed write does not name the file
            raise
        time.sleep(wait)


def receive(session, url, path, sha256):
    """Request what is missing of a file, append it to path.part, verify that, rename it."""
    import requests

    part = path + ".part"
    start = max(0, size_of(part) - 1)  # the last byte again: there must be something to request
    headers = {"Range": f"bytes={start}-"} if start else {}
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        length = length_of_file(response, start, part)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(part, "ab") as file:
            lock(file)
            if os.path.isfile(path):  # another process has downloaded it
                Path(part).unlink(missing_ok=True)
                return
            if max(0, file.seek(0, os.SEEK_END) - 1) != start:
                raise requests.ConnectionError("another process has changed the file")
            if response.status_code == 200:  # the whole file
                start = 0
            file.truncate(start)
            name = os.path.basename(path)
            with progress_bar(
                desc=name, initial=start, total=length, unit="B", unit_scale=True
            ) as bar:
                for chunk in response.iter_content(CHUNK_BYTES):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if size_of(part) != length:
                raise requests.ConnectionError(f"received {size_of(part)} of {length} bytes")
            if sha256 not in (None, digest(part)):
                os.remove(part)
                raise ValueError("it is not the published file: its SHA-256 is another one")
            os.replace(part, path)


def length_of_file(response, start, part):
    """Return the length of the whole file, of which the answer may be the rest.

    Raises requests.ConnectionError if another request may help, and ValueError if not.
    """
    import requests

    status = response.status_code
    headers = response.headers
    rest = re.fullmatch(rf"bytes {start}-\d+/(\d+)", headers.get("Content-Range", ""))
    if status == 206 and start and rest:
        return int(rest[1])
    if status in (206, 416) and start:
        os.remove(part)
        raise requests.ConnectionError("the server cannot continue the file")
    if status in TRANSIENT:
        raise requests.ConnectionError(f"HTTP status {status}", response=response)
    if status != 200:
        raise ValueError(f"HTTP status {status}")
    if "text/html" in headers.get("Content-Type", "").lower():
        raise ValueError("the answer is a web page (does this network require a login?)")
    if "Content-Encoding" in headers or not headers.get("Content-Length", "").isdecimal():
        raise ValueError("the server does not state the length of the file")
    return int(headers["Content-Length"])


def stated_wait(response):
    """Return how many seconds a server that is busy asks us to wait."""
    value = "" if response is None else response.headers.get("Retry-After", "")
    return min(MAX_WAIT, float(value)) if value.isdecimal() else 0


def lock(file):
    """Wait until no other process has locked the file (not on Windows)."""
    with contextlib.suppress(ImportError, OSError):  # some network file systems have no locks
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"waiting for another download of {file.name}")
            fcntl.flock(file, fcntl.LOCK_EX)


def reason(error):
    """Return the message of the error that began a chain of errors."""
    while error.__context__:
        error = error.__context__
    return str(error)


def size_of(path):
    """Return the size of a file, 0 if there is none."""
    try:
        return os.path.getsize(path)
    except FileNotFoundError:
        return 0


def digest(path):
    """Return the SHA-256 of a file in hex."""
    return hashlib.sha256(np.memmap(path, mode="r").data).hexdigest()


# Loading


def load_encoder_hparams_and_params(model_size: str, models_dir: str) -> tuple[Encoder, dict, dict]:
    """Load a model -> (encoder, hparams, params).

    model_size names a folder in models_dir, or it is the path of a folder. The folder holds a
    TensorFlow checkpoint in OpenAI's layout (fine-tuned ones are often named model-1000) or a
    Hugging Face model. If there is none, a published model is downloaded from OpenAI, owner/name
    from the Hugging Face Hub, and tiny is taken from this repository. hparams is a dict of n_vocab,
    n_ctx, n_embd, n_head and n_layer. For params see load_gpt2_params_from_tf_ckpt.

    Raises ValueError for an unknown model and for files that are damaged or do not fit together,
    FileNotFoundError for a missing file, ImportError if TensorFlow or huggingface_hub is needed and
    missing, and what download_gpt2_files raises.
    """
    model_dir = find_model_dir(model_size, models_dir)
    if not os.path.exists(model_dir) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", model_size):
        note(f"downloading {model_size} from the Hugging Face Hub")
        hugging_face.download(model_size, model_dir)
    tf_ckpt_path = find_checkpoint(model_dir)
    if tf_ckpt_path is None and os.path.isfile(os.path.join(model_dir, "config.json")):
        return load_hugging_face(model_dir)
    # A fine-tuned model, such as model-1000, may lie in a folder with a published name.
    checkpoint = os.path.basename(tf_ckpt_path or "model.ckpt")
    if model_size in MODEL_SIZES and checkpoint == "model.ckpt":
        data = os.path.join(model_dir, checkpoint + DATA_SUFFIX)
        if model_size != "124M" and not os.path.isfile(data):
            import_tensorflow(f"the download of {model_size}")
        download_gpt2_files(model_size, model_dir)
        tf_ckpt_path = find_checkpoint(model_dir)
    if tf_ckpt_path is None:
        raise missing_model(model_size, model_dir)
    folder, name = os.path.split(model_dir)
    encoder = get_encoder(name, folder)
    path = os.path.join(model_dir, "hparams.json")
    hparams = read_json(path)
    check_hparams(hparams, path)
    n_tokens = len(encoder.decoder)
    if hparams["n_vocab"] != n_tokens:
        problem = f"n_vocab is {hparams['n_vocab']}, but the vocabulary has {n_tokens} tokens"
        raise ValueError(f"{path}: {problem}")
    return encoder, hparams, load_gpt2_params_from_tf_ckpt(tf_ckpt_path, hparams)


def find_model_dir(model_size, models_dir):
    """Return the folder of a model: in models_dir, or a path. It may not exist yet."""
    model_dir = os.path.expanduser(os.path.join(models_dir, model_size))
    path = os.path.expanduser(model_size)
    if not os.path.isdir(model_dir):
        is_path = os.path.dirname(path) or path in (".", "..")
        if is_path and os.path.exists(path):
            return path
        if model_size == BUNDLED.name:
            return str(BUNDLED)
    return model_dir


def missing_model(model_size, model_dir):
    """Return an error that says which models there are."""
    model_dir = os.path.abspath(model_dir)
    place = model_dir if os.path.isdir(model_dir) else os.path.dirname(model_dir)
    names = sorted(os.listdir(place)) if os.path.isdir(place) else []
    meant = [size for size, name in MODEL_SIZES.items() if name.endswith("/" + model_size.lower())]
    hint = f"did you mean {meant[0]}? " if meant else ""
    return ValueError(
        f"there is no model in {model_dir}, neither a file named checkpoint nor a config.json; "
        f"{place} holds {', '.join(names) or 'nothing'}; {hint}"
        f"published models are {', '.join(MODEL_SIZES)}, and this repository has tiny"
    )


def find_checkpoint(model_dir):
    """Return the path of the checkpoint in model_dir, without suffix, or None if there is none.

    The file `checkpoint` names it, in the text format of TensorFlow's CheckpointState. It may hold
    a path on the machine that saved it, which may have been a Windows machine.
    """
    path = os.path.join(model_dir, "checkpoint")
    if not os.path.isfile(path):
        return None
    content = Path(path).read_text(encoding="utf-8-sig", errors="replace")
    match = re.search(r"""^\s*model_checkpoint_path\s*:\s*["'](.+)["']""", content, re.MULTILINE)
    if not match:
        raise ValueError(f"{path} does not name a checkpoint; {REPLACE}")
    return os.path.join(model_dir, re.split(r"[/\\]", match[1])[-1])


def check_hparams(hparams, path):
    """Raise ValueError, naming the file, if a size of the model is impossible."""
    for name in HPARAMS:
        value = hparams.get(name)
        if type(value) is not int or not 1 <= value <= MAX_SIZE:
            rule = f"must be a whole number from 1 to {MAX_SIZE}"
            raise ValueError(f"{path}: {name} {rule}, got {value!r}")
    if hparams["n_embd"] % hparams["n_head"]:
        problem = f"n_embd, {hparams['n_embd']}, is not a multiple of n_head, {hparams['n_head']}"
        raise ValueError(f"{path}: {problem}")


def load_gpt2_params_from_tf_ckpt(tf_ckpt_path: str | os.PathLike, hparams: dict) -> dict[str, Any]:
    """Load the checkpoint tf_ckpt_path (without `.index`) -> nested dict of float32 arrays:

    {"wte": [n_vocab, n_embd], "wpe": [n_ctx, n_embd], "blocks": [{"ln_1": {"g", "b"}, "attn":
    {"c_attn": {"w", "b"}, "c_proj": {"w", "b"}}, "ln_2": {"g", "b"}, "mlp": {"c_fc": {"w", "b"},
    "c_proj": {"w", "b"}}}, ...], "ln_f": {"g", "b"}}, each w [d_in, d_out]. The arrays are
    read-only, and mapped from the file if possible.

    The first load verifies the data file by its SHA-256 if that is known, else through TensorFlow.
    An empty file beside it (`.verified`, which can be deleted) lets later loads skip this until a
    file changes. A checkpoint with other variables (an optimizer's, which are ignored) or several
    data files has no such mark: each load needs TensorFlow.

    Raises ValueError for a variable that is missing, has another shape than hparams say, or fails
    TensorFlow's checksum, and FileNotFoundError for a missing file.
    """
    prefix = os.fspath(tf_ckpt_path)
    data = prefix + DATA_SUFFIX
    mark = Path(prefix + ".verified")
    changed = last_change(prefix)
    mapped = map_data_file(prefix, hparams)
    is_marked = mark.is_file() and mark.stat().st_mtime_ns > changed
    if mapped and (is_marked or is_known(data)):
        variables = mapped
    else:
        variables = read_with_tensorflow(prefix, hparams, mapped)
    is_mapped = all(array is mapped.get(name) for name, array in variables.items())
    if is_mapped and not is_marked and changed == last_change(prefix):
        with contextlib.suppress(OSError):  # in a folder that cannot be written
            mark.touch()
    return nest(variables, hparams)


def is_known(data):
    """Return whether a data file is one whose SHA-256 is known."""
    size = size_of(data)
    return size in KNOWN_DATA and KNOWN_DATA[size] == digest(data)


def data_files(prefix):
    """Return the paths of a checkpoint's data files. If there are none, return the usual path."""
    # The whole pattern leaves out backups, such as model.ckpt.data-00000-of-00001.bak.
    return sorted(glob.glob(glob.escape(prefix) + ".data-?????-of-?????")) or [prefix + DATA_SUFFIX]


def last_change(prefix):
    """Return when a file of the checkpoint was last changed, in nanoseconds."""
    return max(os.stat(path).st_ctime_ns for path in [prefix + ".index", *data_files(prefix)])


def map_data_file(prefix, hparams):
    """Map the data file -> {name: array}.

    Returns {} unless there is one data file, whose size is that of GPT-2's variables. TensorFlow
    writes them one after another, sorted by name. So hparams determine the place of each variable.
    """
    if data_files(prefix) != [prefix + DATA_SUFFIX]:
        return {}
    n_embd = hparams["n_embd"]
    # In closed form, because a damaged hparams.json may name a million layers.
    n_per_layer = n_embd * (12 * n_embd + 13)
    n_others = n_embd * (hparams["n_vocab"] + hparams["n_ctx"] + 2)
    if size_of(prefix + DATA_SUFFIX) != 4 * (hparams["n_layer"] * n_per_layer + n_others):
        return {}
    with open(prefix + DATA_SUFFIX, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    arrays = {}
    offset = 0
    for name, shape in sorted(variable_shapes(hparams)):
        array = np.frombuffer(content, np.float32, math.prod(shape), offset)
        arrays[name] = array.reshape(shape)
        offset += array.nbytes
    return arrays


def variable_shapes(hparams: dict, n_inner: int | None = None) -> Iterator[tuple[str, tuple]]:
    """Yield the (name, shape) of each variable, as openai/gpt-2's model.py names them.

    n_inner, the width of the hidden layer of mlp, is 4 * n_embd by default.
    """
    n_embd = hparams["n_embd"]
    n_inner = n_inner or 4 * n_embd
    yield "model/wte", (hparams["n_vocab"], n_embd)
    yield "model/wpe", (hparams["n_ctx"], n_embd)
    yield "model/ln_f/g", (n_embd,)
    yield "model/ln_f/b", (n_embd,)
    projections = {
        "attn/c_attn": (n_embd, 3 * n_embd),
        "attn/c_proj": (n_embd, n_embd),
        "mlp/c_fc": (n_embd, n_inner),
        "mlp/c_proj": (n_inner, n_embd),
    }
    for layer in range(hparams["n_layer"]):
        for name in ("ln_1/g", "ln_1/b", "ln_2/g", "ln_2/b"):
            yield f"model/h{layer}/{name}", (n_embd,)
        for name, (d_in, d_out) in projections.items():
            yield f"model/h{layer}/{name}/w", (1, d_in, d_out)
            yield f"model/h{layer}/{name}/b", (d_out,)


def checked_names(found, hparams, where, n_inner=None):
    """Return the names of GPT-2's variables, given {name: shape} of those that were found.

    Raises ValueError, naming `where`, if one is missing, has another shape, or is of another layer.
    A leading 1 of a shape does not count.
    """
    names = []
    for name, shape in variable_shapes(hparams, n_inner):
        if name not in found:
            raise ValueError(f"{where}: {name} is missing")
        if tuple(found[name]) not in (shape, shape[-2:]):
            problem = (
                f"has shape {list(found[name])}, expected {list(shape)} from the model's sizes"
            )
            raise ValueError(f"{where}: {name} {problem}")
        names.append(name)
    n_layer = hparams["n_layer"]
    if any(name.startswith(f"model/h{n_layer}/") for name in found):
        raise ValueError(f"{where} has more layers than n_layer, which is {n_layer}")
    return names


def nest(variables, hparams):
    """Turn {"model/h0/ln_1/g": array, ...} into {"blocks": [{"ln_1": {"g": array, ...}}, ...]}."""
    params: dict[str, Any] = {}
    for name, array in variables.items():
        *keys, last = name.split("/")
        place = params
        for key in keys:
            place = place.setdefault(key, {})
        array.flags.writeable = False
        place[last] = array.reshape(array.shape[-2:])  # a w is [1, d_in, d_out] in a checkpoint
    model = params["model"]
    model["blocks"] = [model.pop(f"h{layer}") for layer in range(hparams["n_layer"])]
    return model


def load_hugging_face(model_dir):
    """Load a folder in Hugging Face's layout -> (encoder, hparams, params).

    Rows of wte after the last token are cut off. params also holds the arguments that differ from
    GPT-2's, under the names of the functions that take them.
    """
    folder = hugging_face.read_folder(model_dir)
    hparams = folder.hparams
    check_hparams(hparams, os.path.join(model_dir, "config.json"))
    shapes = {name: array.shape for name, array in folder.variables.items()}
    names = checked_names(shapes, hparams, model_dir, folder.n_inner)
    params = nest({name: folder.variables[name] for name in names}, hparams)
    for block in params["blocks"]:
        block["mlp"] |= folder.ffn
        block["ln_1"] |= folder.layer_norm
        block["ln_2"] |= folder.layer_norm
    params["ln_f"] |= folder.layer_norm
    params["wte"] = params["wte"][: len(folder.encoder.decoder)]
    hparams["n_vocab"] = len(params["wte"])
    return folder.encoder, hparams, params


# TensorFlow


def read_with_tensorflow(prefix, hparams, mapped):
    """Read GPT-2's variables through TensorFlow, which verifies them -> {name: array}.

    Arrays in mapped that are equal are taken instead.
    """
    tf = import_tensorflow(prefix)
    suspect = prefix + ".index"  # the file to name in an error
    variables = {}
    try:
        with plain_path(prefix) as path:
            reader = tf.train.load_checkpoint(path)
            names = checked_names(reader.get_variable_to_shape_map(), hparams, prefix)
            suspect = " or ".join(data_files(prefix))
            for name in progress_bar(names, "first load"):
                array = np.asarray(reader.get_tensor(name), np.float32)
                if name in mapped and array.tobytes() == mapped[name].tobytes():
                    array = mapped[name]
                variables[name] = array
    except (tf.errors.OpError, RuntimeError, IndexError) as error:  # IndexError: the data is cut
        problem = str(error).splitlines()[0]
        raise ValueError(f"{suspect} is damaged or missing: {problem}; {REPLACE}") from None
    return variables


def import_tensorflow(prefix):
    """Return the module. Raises ImportError that says why it is needed and how to install it."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # without these, it prints many lines
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    try:
        import tensorflow
    except ImportError as error:
        raise ImportError(
            f"TensorFlow must verify {prefix}, which is new or has changed, but cannot be imported "
            f"({error}); install it with: pip install -r requirements.txt, or load the model from "
            "the Hugging Face Hub, such as openai-community/gpt2-medium, which does not need it"
        ) from None
    return tensorflow


@contextlib.contextmanager
def plain_path(path):
    """Yield path, or a path of links to its files if TensorFlow cannot take it.

    TensorFlow reads *, ? and [ in a path as patterns, and refuses bytes that are not UTF-8.
    """
    if not re.search(r"[*?[\ud800-\udfff]", path):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in glob.glob(glob.escape(path) + ".*"):
            os.symlink(os.path.abspath(file), os.path.join(folder, "model" + file[len(path) :]))
        yield os.path.join(folder, "model")
