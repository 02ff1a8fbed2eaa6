"""The trained model in models/tiny, from its files to its text, and the script that trained it."""

import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    REAL_MODELS_DIR,
    ROOT,
    TINY_PROMPT,
    assert_close,
    assert_equal_to_tensorflow,
    held_out_text,
    tiktoken_encoding,
)

import gpt2
import utils
from encoder import WORD
from examples import train

needs_tensorflow = pytest.mark.skipif(
    not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow"
)


def test_the_seven_files_are_small():
    sizes = [(REAL_MODELS_DIR / "tiny" / name).stat().st_size for name in utils.FILES]
    assert sum(sizes) <= 6_000_000


def test_git_ignores_the_record_and_downloads_but_not_the_tiny_model():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("needs git and its repository")
    paths = ["models/tiny/model.ckpt.verified.json", "models/124M", "models/tiny/vocab.bpe"]
    command = ["git", "-c", f"safe.directory={ROOT}", "check-ignore", *paths]
    ignored = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert ignored.split() == paths[:2]


@needs_tensorflow
def test_parameters_match_tensorflow(tiny, models_dir):
    assert_equal_to_tensorflow(f"{models_dir}/tiny/model.ckpt", tiny[2])


def test_ids_match_tiktoken(tiny):
    tiktokens = tiktoken_encoding(REAL_MODELS_DIR, "tiny")
    for text in ("ROMEO:\nBut, soft! what light?", " naïve 😀\n\n  x1", "\ud800 '"):
        assert tiny[0].encode(text) == tiktokens.encode_ordinary(text)


@pytest.mark.parametrize("sizes", [[6], [2, 1, 1, 2]])
def test_logits_match_transformers(tiny, reference, sizes):
    _, hparams, params = tiny
    cache = gpt2.KVCache(params, hparams["n_head"], batch=(2,))
    parts = []
    for ids in np.split(np.array([TINY_PROMPT] * 2), np.cumsum(sizes)[:-1], axis=1):
        parts.append(gpt2.gpt2(ids, **params, n_head=hparams["n_head"], cache=cache))
    assert_close(np.concatenate(parts, axis=1)[1], reference["tiny/logits"])


def test_greedy_ids_and_their_text_match_transformers(tiny, reference, models_dir, capfd):
    encoder, hparams, params = tiny
    greedy = reference["tiny/greedy"].tolist()
    assert encoder.encode("ROMEO:\nWhat light") == TINY_PROMPT
    assert gpt2.generate(TINY_PROMPT, params, hparams["n_head"], 100) == greedy
    samples = gpt2.generate(TINY_PROMPT, params, hparams["n_head"], 100, n_samples=2)
    assert samples == [greedy, greedy]
    text = tiktoken_encoding(REAL_MODELS_DIR, "tiny").decode(greedy)
    assert gpt2.command_line(["ROMEO:\nWhat light", "100", "tiny", models_dir]) == 0
    assert capfd.readouterr() == (f"{text}\n", "")


def test_log_probs_of_a_long_text_match_transformers(tiny, reference):
    _, hparams, params = tiny
    ids = reference["tiny/long_ids"]
    assert len(ids) > 5 * hparams["n_ctx"]
    result = gpt2.log_probs(ids, params, hparams["n_head"])
    np.testing.assert_allclose(result, reference["tiny/long_log_probs"], rtol=0, atol=1e-3)


def held_out_loss(ids, params, hparams):
    """-log p in nats of all ids but the first, in windows as examples/train.py defines them."""
    total = 0.0
    for start in range(0, len(ids) - 1, hparams["n_ctx"]):
        window = ids[start : start + hparams["n_ctx"] + 1]
        total -= float(gpt2.log_probs(window, params, hparams["n_head"]).sum())
    return total


@pytest.mark.slow
def test_held_out_loss_is_the_one_in_the_readme(tiny):
    encoder, hparams, params = tiny
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    figures = re.search(r"(\d\.\d+) nats.*?(\d\.\d+) bits.*?(\d\.\d+) bits", readme, re.S)
    stated, bits, ngram = map(float, figures.groups())
    ids = encoder.encode(held_out_text())
    nats = held_out_loss(ids, params, hparams)
    n_bytes = len(encoder.decode_bytes(ids[1:]))
    assert nats / (len(ids) - 1) == pytest.approx(stated, abs=1e-3)
    assert nats / math.log(2) / n_bytes == pytest.approx(bits, abs=1e-3)
    assert bits < ngram


# examples/train.py

TEXT = "the cat and the hat sat on the mat; then the rat ran in, and the cat ran too.\n" * 60
SIZES = {"n_vocab": 280, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
OPTIONS = [f"--{name}={value}" for name, value in SIZES.items()]
OPTIONS += ["--batch=2", "--steps=16"]  # the model is saved after every second step


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("\ufeff" + TEXT, encoding="utf-8")  # the byte order mark is dropped
    return str(path)


def run(*arguments):
    return utils.run_command("train.py", train.command, [str(word) for word in arguments])


def message(capfd):
    """The one line of train.py on standard error, without those that TensorFlow may print."""
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = re.findall("^train.py: (.*)", error, re.MULTILINE)
    assert error.endswith(f"{line}\n")
    return line


def assert_model(folder, loss):
    """The folder holds the seven files of a model with this held-out loss, in nats per token."""
    assert sorted(os.listdir(folder)) == sorted(utils.FILES)
    encoder, hparams, params = utils.load_encoder_hparams_and_params(folder.name, folder.parent)
    assert hparams == SIZES
    ids = encoder.encode(TEXT[TEXT.rfind("\n", 0, int(len(TEXT) * 0.9)) + 1 :])
    nats = held_out_loss(ids, params, hparams)
    assert nats / (len(ids) - 1) == pytest.approx(float(loss), abs=1e-3)


def at_window(monkeypatch, number, action):
    """Call action when the training asks for this window. It takes two for each step."""
    random_windows = train.random_windows

    def windows(*args):
        for i, window in enumerate(random_windows(*args)):
            if i == number:
                action()
            yield window

    monkeypatch.setattr(train, "random_windows", windows)


def press_ctrl_c():
    raise KeyboardInterrupt


@needs_tensorflow
def test_training(text_file, tmp_path, capfd):
    target = tmp_path / "new" / "mine"
    assert run(text_file, target, *OPTIONS) == 0
    output = capfd.readouterr().out
    losses = re.findall(rf"step (\d+): (\S+) nats per token, saved in {target}\n", output)
    assert [int(step) for step, _ in losses] == list(range(2, 17, 2))
    stated = re.search(r"^held-out loss +(\S+) nats per token$", output, re.M)[1]
    assert stated == losses[-1][1]
    assert float(stated) < float(losses[0][1])
    assert os.listdir(tmp_path / "new") == ["mine"]
    assert_model(target, stated)


def test_a_wrong_option_of_the_file_run_in_another_folder(tmp_path):
    command = [sys.executable, ROOT / "examples" / "train.py", "my.txt", "mine", "--steps=0"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "train.py: --steps must be at least 1, got 0\n"


def test_merges_are_the_most_frequent_pairs():
    """Against a count of all pairs before each merge."""
    words = [train.byte_symbols(word) for word in WORD.findall(held_out_text()[:3000])]
    for merged in train.train_bpe(held_out_text()[:3000], 60):
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        assert merged == min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = [train.merge(word, merged) for word in words]


@needs_tensorflow
@pytest.mark.parametrize(
    ("option", "status", "words"),
    [
        ("--seed=4294967296", 2, "--seed must be from 0 to 4294967295, got 4294967296"),
        ("--n_vocab=256", 2, "--n_vocab must be at least 257, .* got 256"),
        ("--n_ctx=1000001", 2, "--n_ctx must be at most 1000000, got 1000001"),
        ("--n_head=3", 2, "--n_embd must be a multiple of --n_head 3, got 16"),
        ("--learning_rate=nan", 2, "--learning_rate must be a number above 0, got nan"),
        ("--weight_decay=inf", 2, "--weight_decay must be a number, 0 or more, got inf"),
        ("--held_out=1", 2, "--held_out must be above 0 and below 1, got 1.0"),
        ("--steps=few", 2, "argument --steps: invalid int value: 'few'.*--help"),
        ("--n_vocab=1024", 1, r"the text is too small.*--n_vocab can be at most \d+"),
        ("--n_ctx=10000", 1, "the text is too small for --n_ctx 10000: .* tokens to train on"),
    ],
)
def test_bad_options(option, status, words, text_file, tmp_path, capfd):
    assert run(text_file, tmp_path / "mine", *OPTIONS, option) == status
    assert re.match(words, message(capfd))
    assert not (tmp_path / "mine").exists()


def test_what_is_found_before_the_work(text_file, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train, "train_bpe", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "latin1.txt").write_bytes(b"na\xefve")
    target = tmp_path / "mine"
    cases = {
        (text_file, tmp_path): "already exists; name another folder",
        (text_file, f"{text_file}/mine"): f"cannot create a folder in {text_file}: ",
        (tmp_path / "none", target): "No such file",
        (tmp_path / "latin1.txt", target): "latin1.txt is not UTF-8",
    }
    for arguments, words in cases.items():
        assert run(*arguments) == 1
        assert words in message(capfd)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert run(text_file, target) == 1
    assert re.match("training needs TensorFlow.*; install it with: pip", message(capfd))
    assert not target.exists()


@needs_tensorflow
def test_ctrl_c_before_the_first_step(text_file, tmp_path, capfd, monkeypatch):
    at_window(monkeypatch, 0, press_ctrl_c)
    assert run(text_file, tmp_path / "mine", *OPTIONS) == 130
    assert message(capfd) == "stopped; nothing is saved"
    assert os.listdir(tmp_path) == ["my.txt"]


@needs_tensorflow
@pytest.mark.slow
def test_ctrl_c_saves_the_model(text_file, tmp_path, capfd, monkeypatch):
    at_window(monkeypatch, 2, press_ctrl_c)
    target = tmp_path / "mine"
    assert run(text_file, target, *OPTIONS) == 130
    start = f"stopped; {target} holds the model of step 1, held-out loss "
    assert_model(target, re.fullmatch(f"{start}(.*) nats per token", message(capfd))[1])


def test_ctrl_c_while_a_model_replaces_another(tmp_path, monkeypatch):
    """It comes between the two renames. The first model comes back."""
    monkeypatch.setattr(train.Best, "write", lambda best, folder: folder.mkdir())
    best = train.Best(tmp_path / "mine", None, SIZES)
    best.step = 1
    best.save()
    (tmp_path / "mine" / "first").touch()
    rename = Path.rename

    def interrupted(path, target):
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    best.step = 2
    with pytest.raises(KeyboardInterrupt):
        best.save()
    assert os.listdir(tmp_path) == ["mine"]
    assert os.listdir(tmp_path / "mine") == ["first"]
    assert best.saved_step == 1


@needs_tensorflow
@pytest.mark.slow
def test_a_model_that_cannot_be_saved_is_not_lost(text_file, tmp_path, capfd, monkeypatch):
    """The folder is removed during the training."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    at_window(monkeypatch, 9, lambda: shutil.rmtree(tmp_path / "new"))
    assert run(text_file, tmp_path / "new" / "mine", *OPTIONS) == 1
    output, error = capfd.readouterr()
    assert output.count(", saved in") == 2
    assert output.count(", not saved: ") == 6
    rescue, loss = re.search(r"; it is in (\S+), held-out loss (\S+) nats.*\n\Z", error).groups()
    assert_model(Path(rescue), loss)
