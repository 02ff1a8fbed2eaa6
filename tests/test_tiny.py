"""The trained model in models/tiny, from its files to its text, and the script that trained it."""

import concurrent.futures
import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from helpers import (
    REAL_MODELS_DIR,
    ROOT,
    TINY_PROMPT,
    assert_close,
    assert_equal_to_tensorflow,
    copy_model,
    held_out_text,
    tiktoken_encoding,
)

import gpt2
import utils

TINY = REAL_MODELS_DIR / "tiny"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A copy, so that the tests leave no record in the repository."""
    return copy_model(TINY, tmp_path_factory.mktemp("models") / "tiny").parent


@pytest.fixture(scope="module")
def tiny(models_dir):
    return utils.load_encoder_hparams_and_params("tiny", str(models_dir))


def test_the_seven_files_are_small():
    assert sum((TINY / name).stat().st_size for name in utils.FILES) <= 6_000_000


def test_parameters_match_tensorflow(tiny, models_dir):
    assert_equal_to_tensorflow(models_dir / "tiny" / "model.ckpt", tiny[2])


def test_greedy_ids_match_transformers(tiny, reference):
    encoder, hparams, params = tiny
    assert encoder.encode("ROMEO:\nWhat light") == TINY_PROMPT
    greedy = reference["tiny/greedy"].tolist()
    assert gpt2.generate(TINY_PROMPT, params, hparams["n_head"], 100) == greedy
    assert list(gpt2.stream(TINY_PROMPT, params, hparams["n_head"], 100)) == greedy
    assert gpt2.generate(TINY_PROMPT, params, hparams["n_head"], 100, n_samples=2) == [
        greedy,
        greedy,
    ]
    assert_close(
        gpt2.gpt2(TINY_PROMPT, **params, n_head=hparams["n_head"]), reference["tiny/logits"]
    )


def test_log_probs_of_a_long_text_match_transformers(tiny, reference):
    _, hparams, params = tiny
    ids = reference["tiny/long_ids"]
    assert len(ids) > 5 * hparams["n_ctx"]
    result = gpt2.log_probs(ids, params, hparams["n_head"])
    np.testing.assert_allclose(result, reference["tiny/long_log_probs"], rtol=0, atol=1e-3)


def test_eight_threads_give_the_same_as_one(tiny, monkeypatch):
    encoder, hparams, params = tiny
    monkeypatch.setattr(
        "encoder._CACHE_WORDS", 3
    )  # the threads often empty the cache that others use

    def write(i):
        ids = encoder.encode(f"KING RICHARD {i}:\nMy lord, {'what say you? ' * i}")
        options = {"temperature": i / 4, "seed": i, "n_samples": i if i > 4 else None}
        written = gpt2.generate(ids, params, hparams["n_head"], 40, **options)
        return ids, written, [encoder.decode(row) for row in (written if i > 4 else [written])]

    alone = [write(i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(write, [*range(8)] * 4))
    assert together == alone * 4


def test_sampled_text_has_lines_and_common_words(tiny):
    encoder, hparams, params = tiny
    ids = gpt2.generate(
        encoder.encode("ROMEO:"), params, hparams["n_head"], 200, temperature=0.8, seed=1
    )
    text = encoder.decode(ids)
    words = re.findall(r"[a-z]+", text.lower())
    common = {
        "the",
        "and",
        "to",
        "of",
        "i",
        "you",
        "my",
        "that",
        "a",
        "is",
        "in",
        "not",
        "me",
        "it",
        "with",
        "for",
    }
    assert len(words) > 50
    assert sum(word in common for word in words) > len(words) / 6
    assert text.count("\n") > 5


def test_the_command_prints_the_text_of_the_ids(tiny, models_dir):
    encoder, hparams, params = tiny
    command = [
        sys.executable,
        str(ROOT / "gpt2.py"),
        "ROMEO:",
        "--model_size",
        "tiny",
        "--models_dir",
        str(models_dir),
    ]
    environment = {**os.environ, "GPT2_BASE_URL": "http://127.0.0.1:9"}  # no network
    result = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    ids = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 40)
    assert result.stdout == encoder.decode(ids).encode() + b"\n"
    assert (result.returncode, result.stderr) == (0, b"")


def test_cache_chunks_and_batches_give_the_same_logits(tiny):
    encoder, hparams, params = tiny
    n_head = hparams["n_head"]
    ids = encoder.encode(
        "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n"
    )
    whole = gpt2.gpt2(ids, **params, n_head=n_head)
    cache = gpt2.KVCache(params, n_head)
    pieces = [
        gpt2.gpt2(ids[i : i + 7], **params, n_head=n_head, cache=cache)
        for i in range(0, len(ids), 7)
    ]
    assert_close(np.concatenate(pieces), whole)
    assert_close(gpt2.gpt2([ids, ids[::-1]], **params, n_head=n_head)[0], whole)


def test_ids_match_tiktoken(tiny):
    tiktokens = tiktoken_encoding(REAL_MODELS_DIR, "tiny")
    for text in (
        "ROMEO:\nBut, soft! what light through yonder window breaks?",
        " naïve 😀\n\n  x1",
        "\ud800 '",
    ):
        assert tiny[0].encode(text) == tiktokens.encode_ordinary(text)


def held_out_loss(ids, params, hparams):
    """-log p in nats of all ids but the first, in windows of n_ctx + 1 ids as examples/train.py defines them."""
    n_ctx = hparams["n_ctx"]
    windows = [ids[i : i + n_ctx + 1] for i in range(0, len(ids) - 1, n_ctx)]
    return -sum(
        float(gpt2.log_probs(window, params, hparams["n_head"]).sum()) for window in windows
    )


def test_held_out_loss_is_the_one_in_the_readme(tiny):
    encoder, hparams, params = tiny
    ids = encoder.encode(held_out_text())
    nats, n_bytes = held_out_loss(ids, params, hparams), len(encoder.decode_bytes(ids[1:]))
    stated, bits, ngram = map(
        float, re.search(r"(\d\.\d+) nats.*?(\d\.\d+) bits.*?(\d\.\d+) bits", README, re.S).groups()
    )
    assert nats / (len(ids) - 1) == pytest.approx(stated, abs=1e-3)
    assert nats / math.log(2) / n_bytes == pytest.approx(bits, abs=1e-3)
    assert bits < ngram


def test_a_failed_download_names_the_tiny_model(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(utils, "BACKOFF", 0.01)
    with pytest.raises(ConnectionError, match="--model_size tiny needs no network$"):
        utils.load_encoder_hparams_and_params("124M", str(tmp_path))


def test_git_ignores_the_record():
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git repository")
    command = ["git", "check-ignore", "models/tiny/model.ckpt.verified.json", "models/124M"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).stdout.count(b"\n") == 2
    assert (
        subprocess.run(
            ["git", "check-ignore", "models/tiny/vocab.bpe"], cwd=ROOT, capture_output=True
        ).returncode
        == 1
    )


def train(*arguments):
    command = [sys.executable, "-m", "examples.train", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_training_script(tmp_path):
    text = (
        "the cat and the hat sat on the mat; then the rat ran in, and the cat ran after it.\n" * 200
    )
    (tmp_path / "my.txt").write_text(text)
    sizes = {
        "n_vocab": 280,
        "n_ctx": 16,
        "n_embd": 16,
        "n_head": 2,
        "n_layer": 2,
        "steps": 5,
        "batch": 4,
    }
    options = [f"--{name}={value}" for name, value in sizes.items()]
    result = train(tmp_path / "my.txt", tmp_path / "mine", *options)
    assert result.returncode == 0, result.stderr
    stated = float(re.search(r"held-out loss +(\S+) nats", result.stdout)[1])
    encoder, hparams, params = utils.load_encoder_hparams_and_params("mine", str(tmp_path))
    assert hparams == {name: sizes[name] for name in hparams}
    ids = encoder.encode(text[text.rfind("\n", 0, int(len(text) * 0.9)) + 1 :])
    assert held_out_loss(ids, params, hparams) / (len(ids) - 1) == pytest.approx(stated, abs=1e-3)
    again = train(tmp_path / "my.txt", tmp_path / "mine")
    assert again.returncode == 1
    assert "already exists" in again.stderr
