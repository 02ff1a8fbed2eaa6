"""The trained model in models/tiny, from its files to its text, and the script that trained it."""

import importlib.util
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import (
    REAL_MODELS_DIR,
    ROOT,
    TINY_PROMPT,
    assert_close,
    flat,
    held_out_text,
    load,
    python,
    tiktoken_encoding,
)

import gpt2
import terminal
import utils
from encoder import get_encoder
from examples import train

needs_tensorflow = pytest.mark.skipif(
    not importlib.util.find_spec("tensorflow"), reason="needs TensorFlow"
)

END = "<|endoftext|>"
SPEAKER = "^[A-Z][A-Za-z ]*:\n"


def test_the_seven_files_are_small():
    sizes = [(REAL_MODELS_DIR / "tiny" / name).stat().st_size for name in utils.FILES]
    assert sum(sizes) <= 6_000_000


@needs_tensorflow
def test_parameters_match_tensorflow(tiny):
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(REAL_MODELS_DIR / "tiny" / "model.ckpt"))
    found = flat(tiny[2])
    assert found.keys() == reader.get_variable_to_shape_map().keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, reader.get_tensor(name).reshape(array.shape))


def test_ids_match_tiktoken(tiny):
    tiktokens = tiktoken_encoding(REAL_MODELS_DIR, "tiny")
    for text in ("ROMEO:\nBut, soft! what light?", " naïve 😀\n\n  x1", "\ud800 '"):
        assert tiny[0].encode(text) == tiktokens.encode_ordinary(text)


def test_logits_match_transformers(tiny, reference):
    _, hparams, params = tiny
    logits = gpt2.gpt2(TINY_PROMPT, **params, n_head=hparams["n_head"])
    assert_close(logits, reference["tiny/logits"])


def test_greedy_ids_match_transformers(tiny, reference):
    encoder, hparams, params = tiny
    greedy = reference["tiny/greedy"].tolist()
    assert encoder.encode("ROMEO:\nWhat light") == TINY_PROMPT
    assert gpt2.generate(TINY_PROMPT, params, hparams["n_head"], 100) == greedy


def held_out_loss(ids, params, hparams):
    """-log p in nats of all ids but the first, in windows as examples/train.py defines them."""
    total = 0.0
    for start in range(0, len(ids) - 1, hparams["n_ctx"]):
        window = ids[start : start + hparams["n_ctx"] + 1]
        total -= float(gpt2.log_probs(window, params, hparams["n_head"]).sum())
    return total


@pytest.mark.slow
def test_held_out_loss_is_the_one_in_the_manual(tiny):
    encoder, hparams, params = tiny
    manual = (ROOT / "examples" / "README.md").read_text(encoding="utf-8")
    stated = float(re.search(r"(\d\.\d+) bits per\s+byte", manual)[1])
    ids = encoder.encode(held_out_text())
    nats = held_out_loss(ids, params, hparams)
    bits = nats / math.log(2) / len(encoder.decode_bytes(ids[1:]))
    assert bits == pytest.approx(stated, abs=1e-3)
    assert bits <= 2.11


def test_a_text_begins_with_a_speaker_and_goes_on(tiny):
    encoder, hparams, params = tiny
    logits = gpt2.gpt2(encoder.encode(END, {END}), **params, n_head=hparams["n_head"])[-1]
    nats = np.logaddexp.reduce(logits) - logits
    speakers = re.findall(SPEAKER, held_out_text(), re.MULTILINE)
    assert len(speakers) > 900
    assert np.mean([nats[encoder.encode(speaker)[0]] for speaker in speakers]) <= 4.5
    assert re.match(SPEAKER, "".join(gpt2.continuation("", tiny)))
    ids = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 40)
    assert END not in encoder.decode(ids)


# examples/train.py

LINE = "the cat and the hat sat on the mat; then the rat ran in, and the cat ran too.\n"
TEXT = END.join([LINE * 6] * 10)  # the last of the ten documents is held out
SIZES = {"n_vocab": 280, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 1}
OPTIONS = [f"--{name}={value}" for name, value in SIZES.items()]
OPTIONS += ["--batch=2", "--steps=16"]  # the model is evaluated after every second step


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("\ufeff" + TEXT, encoding="utf-8")  # the byte order mark is dropped
    return str(path)


def run(*arguments):
    return terminal.run(train.command, [str(word) for word in arguments], train.Options)


def message(capfd):
    """The one line of train.py on standard error, without those that TensorFlow may print."""
    error = capfd.readouterr().err
    assert "Traceback" not in error
    (line,) = re.findall("^train.py: (.*)", error, re.MULTILINE)
    assert error.endswith(f"{line}\n")
    return line


def assert_model(folder, loss):
    """The folder holds the seven files of a model with this held-out loss, in nats per token."""
    assert set(utils.FILES) <= set(os.listdir(folder))
    encoder, hparams, params = load(folder)
    assert hparams == SIZES
    ids = encoder.encode(END + (LINE * 6).rstrip() + END, {END})
    n = len(ids) // hparams["n_ctx"] * hparams["n_ctx"]
    nats = held_out_loss(ids[: n + 1], params, hparams)
    assert nats / n == pytest.approx(float(loss), abs=1e-3)


@needs_tensorflow
def test_training(text_file, tmp_path, capfd):
    target = tmp_path / "new" / "mine"
    assert run(text_file, target, *OPTIONS) == 0
    output = capfd.readouterr().out
    line = rf"step (\d+): held-out loss (\S+) nats per token, saved in {target}\n"
    losses = re.findall(line, output)
    assert [int(step) for step, _ in losses] == list(range(2, 17, 2))
    assert float(losses[-1][1]) < float(losses[0][1])
    assert os.listdir(tmp_path / "new") == ["mine"]
    assert_model(target, losses[-1][1])
    assert re.search(r"A text of the model:\n\n.*\w", output, re.DOTALL)


def test_a_wrong_option_of_the_file_run_in_another_folder(tmp_path):
    words = [ROOT / "examples" / "train.py", "my.txt", "mine", "--steps=0"]
    status, out, err = python(*words, cwd=tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("train.py: --steps must be from 1 to 1000000000, got 0; --help")


def test_documents():
    paragraphs = ["one\n\n", "two\r\n\r\n", "  three\n \n\n", "four\nlines\n\n", "five"]
    text = "".join(paragraphs)
    assert train.documents(text, 2) == ["one\n\ntwo", "  three\n \n\nfour\nlines", "five"]
    assert train.documents(text, 9) == [text]
    with_ends = f"{END}one\n\ntwo\n{END}\n{END}\nthree\n"
    assert train.documents(with_ends, 1) == ["one\n\ntwo", "three"]


def test_ids_are_those_of_the_saved_files(tmp_path):
    texts = ["It's  naïve 😀\n\n 12x1\u2028 ᾴ ", "\x00'Ll ſ\r\n", held_out_text()[:9000]]
    tokenizer = train.train_vocabulary(texts, 300)
    _, merges = tokenizer.model.save(str(tmp_path))
    Path(merges).rename(tmp_path / "vocab.bpe")
    (tmp_path / "encoder.json").write_text(json.dumps(tokenizer.get_vocab()))
    encoder = get_encoder(tmp_path.name, tmp_path.parent)
    expected = encoder.encode(END + END.join(texts) + END, {END})
    assert train.encode(tokenizer, texts).tolist() == expected
    dropped = train.encode(tokenizer, texts, 0.5)
    assert len(dropped) > len(expected)
    assert encoder.decode(dropped) == encoder.decode(expected)


@needs_tensorflow
@pytest.mark.parametrize(
    ("option", "status", "words"),
    [
        ("--n_head=3", 2, r"the options: n_embd, \d+, is not a multiple of n_head, 3;"),
        (
            f"--n_vocab={10**30}",
            2,
            "the options: n_vocab must be .* from 1 to 1000000, got 10{30};",
        ),
        ("--paragraphs=5000000000", 2, "--paragraphs must be from 1 to 1000000000, got 50{9};"),
        (f"--steps={10**30}", 2, "--steps must be from 1 to 1000000000, got 10{30};"),
        ("--learning_rate=nan", 2, "--learning_rate must be at least 0 and below 1, got nan"),
        ("--n_vocab=1024", 1, r"--n_vocab cannot be 1024 for this text, but it can be \d+$"),
        ("--n_vocab=256", 1, "--n_vocab cannot be 256 for this text, but it can be 257$"),
        ("--n_ctx=1000", 1, r"a text of \d+ tokens is too short for --n_ctx 1000$"),
    ],
)
def test_bad_options(option, status, words, text_file, tmp_path, capfd):
    assert run(text_file, tmp_path / "mine", *OPTIONS, option) == status
    assert re.match(words, message(capfd))
    assert not (tmp_path / "mine").exists()


def test_what_is_found_before_the_work(text_file, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(train, "train_vocabulary", lambda *_: pytest.fail("the work has begun"))
    (tmp_path / "latin1.txt").write_bytes(b"na\xefve")
    target = tmp_path / "mine"
    cases = {
        (text_file, tmp_path): "already exists; name another folder",
        (text_file, f"{text_file}/mine"): "File exists: ",
        (tmp_path / "none", target): "No such file",
        (tmp_path / "latin1.txt", target): "latin1.txt is not UTF-8",
    }
    for arguments, words in cases.items():
        assert run(*arguments) == 1
        assert words in message(capfd)
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert run(text_file, target) == 1
    assert "install it with: python -m pip install tensorflow" in message(capfd)
    assert not target.exists()


@needs_tensorflow
@pytest.mark.parametrize("n_steps", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_saves_the_model_if_it_has_learnt(text_file, tmp_path, capfd, monkeypatch, n_steps):
    batches = train.Trainer.batches

    def interrupted(trainer):
        yield from itertools.islice(batches(trainer), n_steps)
        raise KeyboardInterrupt

    monkeypatch.setattr(train.Trainer, "batches", interrupted)
    target = tmp_path / "mine"
    assert run(text_file, target, *OPTIONS) == 130
    if n_steps == 0:
        assert os.listdir(tmp_path) == ["my.txt"]
    else:
        line = f"stopped; step 1: held-out loss (.*) nats per token, saved in {target}"
        assert_model(target, re.fullmatch(line, message(capfd))[1])


@needs_tensorflow
def test_too_little_memory(text_file, tmp_path, capfd, monkeypatch):
    from tensorflow.errors import ResourceExhaustedError

    error = ResourceExhaustedError(None, None, "OOM when allocating tensor")
    monkeypatch.setattr(train, "initial_weights", Mock(side_effect=error))
    assert run(text_file, tmp_path / "mine", *OPTIONS) == 1
    assert message(capfd) == "OOM when allocating tensor"


@needs_tensorflow
def test_a_model_of_another_program_is_not_replaced(text_file, tmp_path, capfd, monkeypatch):
    target = tmp_path / "mine"
    batches = train.Trainer.batches

    def beside_another(trainer):
        target.mkdir()
        (target / "theirs").touch()
        yield from batches(trainer)

    monkeypatch.setattr(train.Trainer, "batches", beside_another)
    assert run(text_file, target, *OPTIONS) == 1
    assert re.search(f"Directory not empty.*{target}", message(capfd))
    assert os.listdir(target) == ["theirs"]


@needs_tensorflow
def test_ctrl_c_while_a_model_replaces_another(text_file, tmp_path, capfd, monkeypatch):
    """It comes between the two renames, and again when train.py saves after it."""
    rename = Path.rename

    def interrupted(path, target):
        if path.name == "new" and (path.parent / "old").exists():
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    target = tmp_path / "mine"
    assert run(text_file, target, *OPTIONS) == 130
    first = re.search("step 2: held-out loss (.*) nats", capfd.readouterr().out)[1]
    assert sorted(os.listdir(tmp_path)) == ["mine", "my.txt"]
    assert_model(target, first)
