"""Models by their names on the Hugging Face Hub, whose interface a small server here plays."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import DATA_DIR, ROOT

from utils import load_encoder_hparams_and_params

pytest.importorskip("huggingface_hub")
FOLDER = DATA_DIR / "hugging_face"
COMMIT = "0123456789" * 4
LOAD = """
import sys
from utils import load_encoder_hparams_and_params
for name in sys.argv[2:]:
    try:
        encoder, hparams, params = load_encoder_hparams_and_params(name, sys.argv[1])
        print(encoder.decode(encoder.encode("the end")), params["wte"].shape)
    except (OSError, ValueError, ImportError) as error:
        print(f"{type(error).__name__}: {error}")
"""
WHOLE = "the end (280, 8)"
NAMES = ["someone/whole", "someone/sharded", "someone/with_more", "someone/interrupted"]
MODELS = dict.fromkeys(NAMES, WHOLE) | {"someone/tokenizer_json": "the end (288, 10)"}
REFUSED = {  # before any weights are downloaded
    "someone/llama": ["ValueError", "config.json: model_type 'llama' is not supported"],
    "someone/pickle": ["FileNotFoundError", "has no model.safetensors", "save_pretrained"],
    "someone/nothing": ["ConnectionError", "does not exist"],
    "private/model": ["ConnectionError", "private", "HF_TOKEN"],
    "silent/model": ["ConnectionError", "cannot download silent/model"],
}


class Hub(BaseHTTPRequestHandler):
    """The three addresses that huggingface_hub uses: revision, tree and resolve."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        pattern = r"/(?:api/models/)?((\w+)/[\w.-]+)/(\w+)/\w+(?:/([^?]*))?(?:\?.*)?"
        match = re.fullmatch(pattern, self.path)
        name, owner, action, file = match.groups() if match else [None] * 4
        folder = self.server.models.get(name)
        if owner == "silent":
            self.close_connection = True
        elif owner == "private":
            self.send(401, b'{"error": "Invalid username or password."}')
        elif folder is None:
            self.send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif action == "revision":
            siblings = [{"rfilename": path.name} for path in folder.iterdir()]
            content = {"id": name, "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(content).encode())
        elif action == "tree":
            tree = []
            for path in folder.iterdir():
                size = path.stat().st_size
                tree.append({"type": "file", "path": path.name, "size": size, "oid": oid(path)})
            self.send(200, json.dumps(tree).encode())
        else:
            self.resolve(name, folder / file)

    do_HEAD = do_GET

    def resolve(self, name, path):
        content = path.read_bytes()
        headers = {"ETag": f'"{oid(path)}"', "X-Repo-Commit": COMMIT}
        if self.command == "GET":
            self.server.requests.append((name, path.name))
        status = 200
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        if start:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        n_sent = None
        if self.server.breaks[name] and self.command == "GET" and path.suffix == ".safetensors":
            self.server.breaks[name] -= 1
            self.close_connection = True
            n_sent = 5000
        self.send(status, content[start:], headers, n_sent)

    def send(self, status, body, headers=(), n_sent=None):
        self.send_response(status)
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:n_sent])


def oid(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tmp_path_factory.mktemp("hub")
    server.requests = []
    server.breaks = Counter({"someone/interrupted": 1})
    server.models = {f"someone/{path.name}": path for path in FOLDER.iterdir() if path.is_dir()}
    for name in ("with_more", "interrupted", "failing", "llama", "pickle"):
        server.models[f"someone/{name}"] = shutil.copytree(FOLDER / "whole", server.folder / name)
    for name in ("pytorch_model.bin", "README.md", "model.fp16.safetensors"):
        (server.folder / "with_more" / name).write_bytes(b"not needed")
    (server.folder / "llama" / "config.json").write_text('{"model_type": "llama"}')
    weights = server.folder / "pickle" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def load(hub, *names, **environment):
    """Load models in a process of its own, which reads HF_ENDPOINT -> a line for each of them."""
    environment |= {"HOME": str(hub.folder), "HF_HOME": str(hub.folder / "cache")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "NO_PROXY": "127.0.0.1"}
    environment |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, str(hub.folder / "models"), *names]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "%|" not in result.stderr  # no progress bar in a log file
    lines = result.stdout.splitlines()
    assert (result.returncode, len(lines)) == (0, len(names)), result.stderr
    return dict(zip(names, lines, strict=True))


@pytest.fixture(scope="module")
def answers(hub):
    """{name: what is printed} for all models, in one process because it takes seconds to start."""
    return load(hub, *MODELS, *REFUSED)


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_hub_is_loaded_from_only_the_files_that_are_needed(hub, answers, name):
    assert answers[name] == MODELS[name]
    folder = FOLDER / name.removeprefix("someone/")
    needed = files(folder if folder.exists() else FOLDER / "whole")
    assert files(hub.folder / "models" / name) == needed
    requests = [file for model, file in hub.requests if model == name]
    if name == "someone/interrupted":
        requests.remove("model.safetensors")  # it was requested twice
    assert sorted(requests) == needed


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_one_line_before_any_weights(hub, answers, name):
    assert all(word in answers[name] for word in [name, *REFUSED[name]])
    requests = [file for model, file in hub.requests if model == name]
    assert not any("safetensors" in file or ".bin" in file for file in requests)
    assert not list(hub.folder.glob(f"models/{name}*"))


def test_models_that_are_there_need_no_network(hub, answers):
    lines = load(hub, *MODELS, "someone/float16", HF_HUB_OFFLINE="1")
    assert "offline" in lines.pop("someone/float16")
    assert lines == MODELS


def test_without_the_package_a_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="^someone/whole .*pip install huggingface_hub$"):
        load_encoder_hparams_and_params("someone/whole", str(tmp_path))


@pytest.mark.slow
def test_a_download_that_failed_is_resumed(hub):
    name = "someone/failing"
    hub.breaks[name] = 1000
    assert "ConnectionError: cannot download someone/failing" in load(hub, name)[name]
    assert not (hub.folder / "models" / name).exists()
    hub.breaks[name] = 0
    assert load(hub, name)[name] == WHOLE
