"""Models by their names on the Hugging Face Hub, whose interface a small server here plays."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from helpers import ROOT

FOLDER = ROOT / "tests" / "data" / "hugging_face"
COMMIT = "0123456789" * 4
LOAD = """
import sys
from utils import load_encoder_hparams_and_params
try:
    encoder, hparams, params = load_encoder_hparams_and_params(sys.argv[1], sys.argv[2])
except (OSError, ValueError, ImportError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(encoder.decode(encoder.encode("the end")), params["wte"].shape)
"""


class Hub(BaseHTTPRequestHandler):
    """The three addresses that huggingface_hub uses: revision, tree and resolve."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        pattern = r"/(?:api/models/)?(\w+/[\w.-]+)/(\w+)/\w+(?:/([^?]*))?(\?.*)?"
        match = re.fullmatch(pattern, self.path)
        if not match:
            self.send(404, b"{}", with_body)
            return
        name, action, file = match[1], match[2], match[3]
        folder = self.server.models.get(name)
        if name.startswith("private/"):
            self.send(401, b'{"error": "Invalid username or password."}', with_body)
        elif folder is None:
            self.send(404, b"{}", with_body, {"X-Error-Code": "RepoNotFound"})
        elif action == "revision":
            siblings = [{"rfilename": path.name} for path in folder.iterdir()]
            content = {"id": name, "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(content).encode(), with_body)
        elif action == "tree":
            tree = [
                {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid(path)}
                for path in folder.iterdir()
            ]
            self.send(200, json.dumps(tree).encode(), with_body)
        else:
            self.resolve(folder / file, with_body)

    def resolve(self, path, with_body):
        content = path.read_bytes()
        headers = {"ETag": f'"{oid(path)}"', "X-Repo-Commit": COMMIT}
        if not with_body:
            self.send(200, content, False, headers)
            return
        self.server.requests.append(path.name)
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0").split("-")[0]) or 0)
        status = 200
        if start:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.server.breaks and path.suffix == ".safetensors":
            self.server.breaks -= 1
            self.close_connection = True
            self.send(status, content[start:], True, headers, n_sent=5000)
        else:
            self.send(status, content[start:], True, headers)

    def send(self, status, body, with_body, headers=(), n_sent=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body[:n_sent])


def oid(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests = []
    server.breaks = 0
    server.models = {f"someone/{path.name}": path for path in FOLDER.iterdir() if path.is_dir()}
    server.models["someone/llama"] = shutil.copytree(FOLDER / "whole", tmp_path / "llama")
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    server.models["someone/pickle"] = shutil.copytree(FOLDER / "whole", tmp_path / "pickle")
    weights = tmp_path / "pickle" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    for name in ("pytorch_model.bin", "README.md", "model.fp16.safetensors"):
        (tmp_path / "llama" / name).write_bytes(b"not needed")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server.environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "cache"),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "NO_PROXY": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def load(hub, tmp_path):
    """A function that loads a model in a process of its own, so that it reads HF_ENDPOINT."""

    def run(name, before="", **environment):
        return subprocess.run(
            [sys.executable, "-c", before + LOAD, name, str(tmp_path / "models")],
            env=hub.environment | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def files(folder):
    return {path.name for path in Path(folder).iterdir() if path.is_file()}


@pytest.mark.parametrize(
    ("name", "shape"), [("whole", (280, 8)), ("sharded", (280, 8)), ("tokenizer_json", (288, 10))]
)
def test_a_model_of_the_hub(hub, load, tmp_path, name, shape):
    result = load(f"someone/{name}")
    assert (result.stdout, result.stderr) == (f"the end {shape}\n", "")
    assert files(tmp_path / "models" / "someone" / name) == files(FOLDER / name)
    assert sorted(hub.requests) == sorted(files(FOLDER / name))
    again = load(f"someone/{name}", HF_HUB_OFFLINE="1")
    assert (again.stdout, again.stderr) == (result.stdout, "")


def test_only_the_needed_files_are_downloaded(hub, load, tmp_path):
    shutil.copy(FOLDER / "whole" / "config.json", tmp_path / "llama")
    assert load("someone/llama").stdout == "the end (280, 8)\n"
    assert set(hub.requests) == {"config.json", "vocab.json", "merges.txt", "model.safetensors"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("someone/llama", ["config.json", "model_type 'llama' is not supported"]),
        ("someone/pickle", ["has no model.safetensors", "save_pretrained"]),
        ("someone/nothing", ["does not exist"]),
        ("private/model", ["private", "HF_TOKEN"]),
    ],
)
def test_models_that_cannot_be_used_are_one_line_before_any_weights(
    hub, load, tmp_path, name, words
):
    result = load(name)
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert all(word in result.stderr for word in [name, *words])
    assert not any("safetensors" in request or ".bin" in request for request in hub.requests)
    assert not (tmp_path / "models" / name).exists()
    assert not list(tmp_path.glob("models/*/*"))


def test_no_network(load):
    result = load("someone/whole", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.stderr.count("\n") == 1
    assert "cannot download someone/whole" in result.stderr
    result = load("someone/whole", HF_HUB_OFFLINE="1")
    assert result.stderr.count("\n") == 1
    assert "offline" in result.stderr


def test_the_package_is_optional(load):
    result = load("someone/whole", "import sys; sys.modules['huggingface_hub'] = None")
    assert result.stderr.count("\n") == 1
    assert "pip install huggingface_hub" in result.stderr


@pytest.mark.parametrize("breaks", [1, 1000])
def test_an_interrupted_download_is_resumed(hub, load, tmp_path, breaks):
    hub.breaks = breaks
    result = load("someone/whole")
    if breaks == 1000:
        assert result.stderr.splitlines()[-1].startswith("ConnectionError: cannot download")
        assert not (tmp_path / "models" / "someone" / "whole").exists()
        hub.breaks = 0
        result = load("someone/whole")
    assert result.stdout == "the end (280, 8)\n"
