"""Models by their names on the Hugging Face Hub, whose interface a small server here plays."""

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import DATA_DIR, ROOT
from hugging_face_kinds import edit

import hugging_face
from utils import load_encoder_hparams_and_params

pytest.importorskip("huggingface_hub")
FOLDER = DATA_DIR / "hugging_face"
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
NAMES = ["whole", "sharded", "with_more", "interrupted", "other_names"]
MODELS = {f"someone/{name}": WHOLE for name in NAMES} | {
    "someone/tokenizer_json": "the end (288, 10)"
}
REFUSED = {  # before any weights are downloaded
    "someone/llama": ["ValueError", "config.json: model_type 'llama' is not supported"],
    "someone/quantized": ["ValueError", "config.json: quantization_config", "not supported"],
    "someone/pickle": ["ValueError", "no model.safetensors", "save_pretrained"],
    "someone/nothing": ["ConnectionError", "Repository Not Found"],
    "private/model": ["ConnectionError", "401"],
    "silent/model": ["ConnectionError", "cannot download silent/model"],
}


class Hub(BaseHTTPRequestHandler):
    """The two addresses that the library uses: revision and resolve."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        """Print nothing."""

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
            content = {"id": name, "sha": commit(folder), "siblings": siblings}
            self.send(200, json.dumps(content).encode())
        else:
            self.resolve(name, folder / file)

    do_HEAD = do_GET

    def resolve(self, name, path):
        content = path.read_bytes()
        headers = {"ETag": f'"{digest(content)}"', "X-Repo-Commit": commit(path.parent)}
        status = 200
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        if start:
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        n_sent = None
        if self.command == "GET":
            self.server.requests.append((name, path.name))
            if path.suffix == ".safetensors" and self.server.breaks[name]:
                self.server.breaks[name] -= 1
                self.close_connection = True
                n_sent = 1000
        self.send(status, content[start:], headers, n_sent)

    def send(self, status, body, headers=(), n_sent=None):
        self.send_response(status)
        for key, value in (dict(headers) | {"Content-Length": len(body)}).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:n_sent])
            if n_sent:
                self.server.goes_on.wait(60)


def digest(content):
    return hashlib.sha1(content).hexdigest()


def commit(folder):
    """The id of a revision: any change of the files changes it."""
    return digest(b"".join(path.read_bytes() for path in sorted(folder.iterdir())))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder = tmp_path_factory.mktemp("hub")
    server.requests = []
    server.goes_on = threading.Event()  # while it is not set, a broken answer stays open
    server.goes_on.set()
    server.breaks = Counter({"someone/interrupted": 1})
    server.models = {f"someone/{path.name}": path for path in FOLDER.iterdir() if path.is_dir()}
    for name in ("with_more", "interrupted", "failing", "llama", "quantized", "pickle"):
        server.models[f"someone/{name}"] = shutil.copytree(FOLDER / "whole", server.folder / name)
    for name in ("pytorch_model.bin", "README.md", "trainer_state.json", "b.safetensors"):
        (server.folder / "with_more" / name).write_bytes(b"not needed")
    edit(server.folder / "llama", {"config.json": {"model_type": "llama"}})
    edit(server.folder / "quantized", {"config.json": {"quantization_config": {"bits": 8}}})
    weights = server.folder / "pickle" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    other_names = shutil.copytree(FOLDER / "sharded", server.folder / "other_names")
    for path in other_names.glob("model-*"):
        path.rename(path.with_name(path.name.replace("model-", "part_")))
    index = other_names / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-', '"part_'))
    server.models["someone/other_names"] = other_names
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def start(hub, *names, **environment):
    """Start to load models in a process of its own, which reads HF_ENDPOINT."""
    environment |= {"HOME": str(hub.folder), "HF_HOME": str(hub.folder / "cache")}
    environment |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "NO_PROXY": "127.0.0.1"}
    environment |= {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LOAD, str(hub.folder / "models"), *names]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **pipes)


def finish(process):
    """The lines that the process prints, one for each model."""
    output, errors = process.communicate(timeout=300)
    assert "%|" not in errors  # no progress bar in a log file
    assert process.returncode == 0, errors
    return output.splitlines()


@pytest.fixture(scope="module")
def answers(hub):
    """{name: what is printed} for all models, in one process because it takes seconds to start."""
    names = [*MODELS, *REFUSED]
    return dict(zip(names, finish(start(hub, *names)), strict=True))


def files(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def requested(hub, name):
    return [file for model, file in hub.requests if model == name]


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_hub_is_loaded_from_only_the_files_that_are_needed(hub, answers, name):
    assert answers[name] == MODELS[name]
    published = files(hub.models["someone/whole" if "with_more" in name else name])
    assert files(hub.folder / "models" / name) == published
    requests = requested(hub, name)
    if name == "someone/interrupted":
        requests.remove("model.safetensors")  # it was requested twice
    assert sorted(requests) == published


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_one_line_before_any_weights(hub, answers, name):
    assert all(word in answers[name] for word in [name, *REFUSED[name]])
    assert not any("safetensors" in file or ".bin" in file for file in requested(hub, name))
    owner, model = name.split("/")
    assert not list(hub.folder.glob(f"models/{owner}/*{model}*/"))


def test_models_that_are_there_need_no_network(hub, answers):
    *lines, last = finish(start(hub, *MODELS, "someone/float16", HF_HUB_OFFLINE="1"))
    assert "offline" in last
    assert lines == list(MODELS.values())


def test_without_the_package_a_line_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="^someone/whole .*pip install huggingface_hub$"):
        load_encoder_hparams_and_params("someone/whole", str(tmp_path))


def test_no_message_shows_a_signature():
    """The Hub sends its clients to signed addresses of its storage."""

    def refuse(name):
        raise OSError(f"403 for url 'https://cdn/{name}?X-Signature=secret&Id=5'.\nThe end?")

    message = "cannot download a/b from the Hub: 403 for url 'https://cdn/a/b'. The end?"
    with pytest.raises(ConnectionError, match=f"^{re.escape(message)}$"):
        hugging_face.ask_hub(refuse, "a/b")


SLOW = "someone/slow"


def forget_requests(hub, name):
    hub.requests = [request for request in hub.requests if request[0] != name]


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def stuck(hub):
    """Start processes that load someone/slow, and wait until the server holds the weights back."""
    hub.models[SLOW] = shutil.copytree(FOLDER / "whole", hub.folder / "slow")
    forget_requests(hub, SLOW)
    hub.goes_on.clear()
    hub.breaks[SLOW] = 1

    def run(n_processes):
        processes = [start(hub, SLOW) for _ in range(n_processes)]
        wait_for(lambda: "model.safetensors" in requested(hub, SLOW))
        return processes

    yield run
    hub.goes_on.set()
    shutil.rmtree(hub.folder / "models" / SLOW)
    shutil.rmtree(hub.folder / "slow")


def test_of_two_processes_one_downloads_and_the_other_waits(hub, stuck):
    processes = stuck(2)
    wait_for(lambda: len(list(hub.folder.glob("models/someone/.slow*.part"))) == 1)
    time.sleep(1)  # for the second process to come as far
    assert [process.poll() for process in processes] == [None, None]
    hub.goes_on.set()
    assert [finish(process) for process in processes] == [[WHOLE], [WHOLE]]
    whole = files(FOLDER / "whole")
    assert sorted(requested(hub, SLOW)) == sorted([*whole, "model.safetensors"])


def test_ctrl_c_ends_at_once_and_the_next_run_continues(hub, stuck):
    (process,) = stuck(1)
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert time.monotonic() - before < 2
    assert process.returncode != 0
    assert not (hub.folder / "models" / "someone" / "slow").exists()
    hub.goes_on.set()
    forget_requests(hub, SLOW)
    assert finish(start(hub, SLOW)) == [WHOLE]
    assert requested(hub, SLOW) == ["model.safetensors"]


def test_another_revision_does_not_mix_with_a_download_that_was_interrupted(hub, stuck):
    (process,) = stuck(1)
    process.kill()
    process.communicate()
    hub.goes_on.set()
    hub.models[SLOW] = FOLDER / "tokenizer_json"
    assert finish(start(hub, SLOW)) == ["the end (288, 10)"]
    models = hub.folder / "models" / "someone"
    assert files(models / "slow") == files(FOLDER / "tokenizer_json")
    assert not list(models.glob(".slow*.part"))


@pytest.mark.slow
def test_a_download_that_failed_is_resumed(hub):
    name = "someone/failing"
    hub.breaks[name] = 1000
    assert "ConnectionError: cannot download someone/failing" in finish(start(hub, name))[0]
    assert not (hub.folder / "models" / name).exists()
    hub.breaks[name] = 0
    assert finish(start(hub, name)) == [WHOLE]
