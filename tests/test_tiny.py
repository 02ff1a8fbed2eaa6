"""The model that ships with the repository: OpenAI's layout, trained weights, text that can be judged."""

import concurrent.futures
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import REAL_MODELS_DIR, ROOT, SHARED, TINY_PROMPT
from test_encoder import oracle
from test_load import assert_equal_to_tensorflow
from test_model import REFERENCE, assert_close

import gpt2
import utils

TINY = REAL_MODELS_DIR / "tiny"
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """A copy, so that the tests leave no record in the repository."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(TINY, folder / "tiny", ignore=shutil.ignore_patterns("*.layout.json"))
    return folder


@pytest.fixture(scope="module")
def tiny(models_dir):
    return utils.load_encoder_hparams_and_params("tiny", str(models_dir))


def test_the_seven_files_are_all_and_small():
    sizes = {path.name: path.stat().st_size for path in TINY.iterdir() if not path.name.endswith(".layout.json")}
    assert sizes.keys() == utils.FILES.keys()
    assert sum(sizes.values()) <= 6_000_000


def test_the_parameters_are_what_tensorflow_reads(tiny, models_dir):
    assert_equal_to_tensorflow(models_dir / "tiny" / "model.ckpt", tiny[2])


def test_greedy_text_is_that_of_transformers(tiny):
    encoder, hparams, params = tiny
    assert encoder.encode("ROMEO:\nWhat light") == TINY_PROMPT
    greedy = REFERENCE["tiny/greedy"].tolist()
    assert gpt2.generate(TINY_PROMPT, params, hparams["n_head"], 100) == greedy
    assert list(gpt2.stream(TINY_PROMPT, params, hparams["n_head"], 100)) == greedy
    assert gpt2.generate(TINY_PROMPT, params, hparams["n_head"], 100, n_samples=2) == [greedy, greedy]
    assert_close(gpt2.gpt2(TINY_PROMPT, **params, n_head=hparams["n_head"]), REFERENCE["tiny/logits"])


def test_eight_threads_give_what_one_gives(tiny, monkeypatch):
    encoder, hparams, params = tiny
    monkeypatch.setattr("encoder._CACHE_WORDS", 3)  # so that it is emptied under their hands

    def write(i):
        ids = encoder.encode(f"KING RICHARD {i}:\nMy lord, {'what say you? ' * i}")
        options = {"temperature": i / 4, "seed": i, "n_samples": i if i > 4 else None}
        written = gpt2.generate(ids, params, hparams["n_head"], 40, **options)
        return ids, written, [encoder.decode(row) for row in (written if i > 4 else [written])]

    alone = [write(i) for i in range(8)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(write, [*range(8)] * 4))
    assert together == alone * 4


def test_the_text_is_made_of_lines_and_words(tiny):
    encoder, hparams, params = tiny
    ids = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 200, temperature=0.8, seed=1)
    text = encoder.decode(ids)
    words = re.findall(r"[a-z]+", text.lower())
    common = {"the", "and", "to", "of", "i", "you", "my", "that", "a", "is", "in", "not", "me", "it", "with", "for"}
    assert len(words) > 50
    assert sum(word in common for word in words) > len(words) / 6
    assert text.count("\n") > 5


def test_the_whole_chain_as_a_command(tiny, models_dir):
    encoder, hparams, params = tiny
    command = [sys.executable, str(ROOT / "gpt2.py"), "ROMEO:", "--model_size", "tiny", "--models_dir", str(models_dir)]
    environment = {**os.environ, "GPT2_BASE_URL": "http://127.0.0.1:9"}  # no network
    result = subprocess.run(command, capture_output=True, env=environment, timeout=120)
    ids = gpt2.generate(encoder.encode("ROMEO:"), params, hparams["n_head"], 40)
    assert result.stdout == encoder.decode(ids).encode() + b"\n"
    assert (result.returncode, result.stderr) == (0, b"")


def test_cache_and_chunks_and_batches_agree(tiny):
    encoder, hparams, params = tiny
    n_head = hparams["n_head"]
    ids = encoder.encode("First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n")
    whole = gpt2.gpt2(ids, **params, n_head=n_head)
    cache = gpt2.KVCache(params, n_head)
    pieces = [gpt2.gpt2(ids[i : i + 7], **params, n_head=n_head, cache=cache) for i in range(0, len(ids), 7)]
    assert_close(np.concatenate(pieces), whole)
    assert_close(gpt2.gpt2([ids, ids[::-1]], **params, n_head=n_head)[0], whole)


def test_ids_are_tiktokens(tiny):
    tiktokens = oracle(REAL_MODELS_DIR, "tiny")
    for text in ("ROMEO:\nBut, soft! what light through yonder window breaks?", " naïve 😀\n\n  x1", "\ud800 '"):
        assert tiny[0].encode(text) == tiktokens.encode_ordinary(text)


def test_held_out_loss_is_the_training_scripts(tiny):
    """The last tenth of the text, in windows of n_ctx + 1 ids that share their ends, as train_tiny.py cuts them."""
    path = Path(SHARED or ".") / "text" / "tinyshakespeare.txt"
    if not path.is_file():
        pytest.skip("needs text/tinyshakespeare.txt in the folder that NPGPT_SHARED names")
    encoder, hparams, params = tiny
    text = path.read_bytes().decode("utf-8")
    held_out = text[text.rfind("\n", 0, int(len(text) * 0.9)) + 1 :]
    ids, n_ctx = encoder.encode(held_out), hparams["n_ctx"]
    windows = [ids[i : i + n_ctx + 1] for i in range(0, len(ids) - 1, n_ctx)]
    nats = -sum(float(gpt2.log_probs(window, params, hparams["n_head"]).sum()) for window in windows)
    stated, bits, ngram = map(
        float, re.search(r"(\d\.\d+) nats.*?(\d\.\d+) bits.*?(\d\.\d+) bits", README, re.S).groups()
    )
    assert nats / (len(ids) - 1) == pytest.approx(stated, abs=1e-3)
    n_bytes = len(encoder.decode(ids[1:]).encode())
    assert nats / math.log(2) / n_bytes == pytest.approx(bits, abs=1e-3)
    assert bits < ngram


def test_a_failed_download_points_to_it(monkeypatch, tmp_path):
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(utils, "BACKOFF", 0.01)
    with pytest.raises(ConnectionError, match="--model_size tiny needs no network$"):
        utils.load_encoder_hparams_and_params("124M", str(tmp_path))


def test_the_record_is_no_change_to_git():
    if not (ROOT / ".git").exists():
        pytest.skip("needs the git repository")
    command = ["git", "check-ignore", "models/tiny/model.ckpt.layout.json", "models/124M"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).stdout.count(b"\n") == 2
    assert (
        subprocess.run(["git", "check-ignore", "models/tiny/vocab.bpe"], cwd=ROOT, capture_output=True).returncode == 1
    )


def test_the_training_script(tmp_path):
    text = "the cat and the hat sat on the mat; then the rat ran in, and the cat ran after it.\n" * 200
    (tmp_path / "my.txt").write_text(text)
    sizes = {"n_vocab": 280, "n_ctx": 16, "n_embd": 16, "n_head": 2, "n_layer": 2, "steps": 5, "batch": 4}
    options = [f"--{name}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(ROOT / "tests" / "train_tiny.py"), str(tmp_path / "my.txt"), str(tmp_path / "mine")]
    first = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert first.returncode == 0, first.stderr
    stated = float(re.search(r"held-out loss +(\S+) nats", first.stdout)[1])
    encoder, hparams, params = utils.load_encoder_hparams_and_params("mine", str(tmp_path))
    assert hparams == {name: sizes[name] for name in hparams}
    held_out = text[text.rfind("\n", 0, int(len(text) * 0.9)) + 1 :]
    ids = encoder.encode(held_out)
    windows = [ids[i : i + 17] for i in range(0, len(ids) - 1, 16)]
    nats = -sum(float(gpt2.log_probs(window, params, 2).sum()) for window in windows)
    assert nats / (len(ids) - 1) == pytest.approx(stated, abs=1e-3)
    again = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert again.returncode == 1
    assert "exists already" in again.stderr
