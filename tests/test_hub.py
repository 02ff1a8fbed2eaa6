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

pytest.importorskip("huggingface_hub")
FOLDER = ROOT / "tests" / "data" / "hugging_face"
COMMIT = "0123456789" * 4
LOAD = """
import sys
from utils import load_encoder_hparams_and_params
for name in sys.argv[2:]:
    try:
        encoder, hparams, params = load_encoder_hparams_and_params(name, sys.argv[1])
        print(encoder.decode(encoder.encode("the end")), params["wte"].shape)
    except (OSError, ValueError, ImportError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
"""
WHOLE = "the end (280, 8)\n"


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
    """A function that loads models in a process of its own, which reads HF_ENDPOINT."""

    def run(*names, before="", **environment):
        return subprocess.run(
            [sys.executable, "-c", before + LOAD, str(tmp_path / "models"), *names],
            env=hub.environment | environment,
            capture_output=True,
            text=True,
            timeout=100,
        )

    return run


def files(folder):
    return {path.name for path in Path(folder).iterdir() if path.is_file()}


def test_models_of_the_hub(hub, load, tmp_path):
    names = ["whole", "sharded", "tokenizer_json"]
    for offline in ("", "1"):  # the second time, they are in the folder
        result = load(*[f"someone/{name}" for name in names], HF_HUB_OFFLINE=offline)
        assert (result.stdout, result.stderr) == (WHOLE * 2 + "the end (288, 10)\n", "")
    for name in names:
        assert files(tmp_path / "models" / "someone" / name) == files(FOLDER / name)
    assert len(hub.requests) == sum(len(files(FOLDER / name)) for name in names)


def test_only_the_needed_files_are_downloaded(hub, load, tmp_path):
    for name in ("pytorch_model.bin", "README.md", "model.fp16.safetensors"):
        (tmp_path / "llama" / name).write_bytes(b"not needed")
    shutil.copy(FOLDER / "whole" / "config.json", tmp_path / "llama")
    assert load("someone/llama").stdout == WHOLE
    assert set(hub.requests) == {"config.json", "vocab.json", "merges.txt", "model.safetensors"}


def test_what_cannot_be_used_is_one_line_before_any_weights(hub, load, tmp_path):
    expected = {
        "someone/llama": ["ValueError", "config.json: model_type 'llama' is not supported"],
        "someone/pickle": ["FileNotFoundError", "has no model.safetensors", "save_pretrained"],
        "someone/nothing": ["ConnectionError", "does not exist"],
        "private/model": ["ConnectionError", "private", "HF_TOKEN"],
    }
    result = load(*expected)
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == len(expected)
    for line, name in zip(lines, expected, strict=True):
        assert all(word in line for word in [name, *expected[name]])
    assert not any("safetensors" in request or ".bin" in request for request in hub.requests)
    assert not list(tmp_path.glob("models/*/*"))


@pytest.mark.parametrize(
    ("environment", "before", "words"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "", "cannot download someone/whole"),
        ({"HF_HUB_OFFLINE": "1"}, "", "offline"),
        (
            {},
            "import sys; sys.modules['huggingface_hub'] = None",
            "someone/whole .*pip install huggingface_hub",
        ),
    ],
)
def test_no_network_and_no_package(load, environment, before, words):
    result = load("someone/whole", before=before, **environment)
    (line,) = result.stderr.splitlines()
    assert re.search(words, line)


def test_an_interrupted_download_is_resumed(hub, load, tmp_path):
    hub.breaks = 1
    assert load("someone/whole").stdout == WHOLE


@pytest.mark.slow
def test_a_download_that_failed_is_resumed(hub, load, tmp_path):
    hub.breaks = 1000
    result = load("someone/float16")
    assert "ConnectionError: cannot download someone/float16" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "models" / "someone" / "float16").exists()
    hub.breaks = 0
    assert load("someone/float16").stdout == WHOLE
