"""Checkpoints that TensorFlow wrote, intact and damaged, read by TensorFlow and memory-mapped."""

import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    DATA_DIR,
    ROOT,
    SMALL_HPARAMS,
    SMALL_MERGES,
    copy_model,
    flat,
    random_variables,
    save_variables,
    write_model,
    write_vocabulary,
)

import utils
from utils import load_encoder_hparams_and_params, load_gpt2_params_from_tf_ckpt

DATA, INDEX, RECORD = (
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.verified.json",
)
N_FLIPS = int(os.environ.get("NPGPT_FLIPS", 20))  # for a long run: 200


def assert_params(params, hparams=SMALL_HPARAMS, seed=0):
    expected, found = random_variables(hparams, seed), flat(params)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, expected[name].reshape(array.shape))
        assert array.ndim == (1 if name.endswith(("/b", "/g")) else 2)


@pytest.fixture
def model_dir(small_model, tmp_path):
    """A copy of the small model that the test may modify. It has not been loaded before."""
    return copy_model(small_model, tmp_path / "small")


def load(model_dir):
    return load_encoder_hparams_and_params(model_dir.name, str(model_dir.parent))


@pytest.fixture
def no_tensorflow(monkeypatch):
    """A function: after it is called, a load through TensorFlow fails the test."""

    def call():
        monkeypatch.setattr(
            utils, "read_with_tensorflow", lambda *_: pytest.fail("TensorFlow was used")
        )

    return call


def is_mapped(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base is not None


def test_first_load_and_mapped_load(model_dir, no_tensorflow):
    encoder, hparams, params = load(model_dir)
    assert hparams == SMALL_HPARAMS
    assert encoder.decode(encoder.encode("the thing")) == "the thing"
    assert_params(params)
    assert (model_dir / RECORD).stat().st_size < 4000
    no_tensorflow()
    params = load(model_dir)[2]
    assert_params(params)
    assert all(map(is_mapped, flat(params).values()))
    for prefix in (model_dir / "model.ckpt", str(model_dir / "model.ckpt")):
        assert_params(load_gpt2_params_from_tf_ckpt(prefix, SMALL_HPARAMS))


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_layer": 11, "n_embd": 6},  # the layers in numeric order, not in that of their names
        {"n_vocab": 269, "n_ctx": 1, "n_embd": 1, "n_head": 1, "n_layer": 1},
    ],
)
def test_other_sizes(tmp_path, sizes):
    hparams = SMALL_HPARAMS | sizes
    model_dir = write_model(tmp_path / "other", hparams)
    for _ in range(2):
        assert_params(load(model_dir)[2], hparams)


def test_a_fine_tuned_model_with_optimizer_variables(tmp_path):
    slots = {f"{name}/Adam": array + 1 for name, array in random_variables(SMALL_HPARAMS).items()}
    extra = slots | {"global_step": np.int64(1000), "a": np.array(True)}
    model_dir = write_model(tmp_path / "124M", prefix="model-1000", extra=extra)
    for _ in range(2):
        params = load(model_dir)[2]
        assert_params(params)
        assert all(array.flags.aligned for array in flat(params).values())


@pytest.mark.parametrize(
    "path", ["/home/someone/run1/model.ckpt", r"C:\\run\\model.ckpt", "./model.ckpt"]
)
def test_a_checkpoint_that_was_saved_elsewhere(model_dir, path):
    (model_dir / "checkpoint").write_text(f'model_checkpoint_path: "{path}"\n')
    assert_params(load(model_dir)[2])


@pytest.mark.parametrize(
    "folder", ["models [1]", "run*[2]?", "back\\slash", "näme", os.fsdecode(b"not utf-8 \xff")]
)
def test_unusual_names_of_folders(small_model, tmp_path, folder):
    name = folder.replace("\\", "")  # names of models have none
    assert_params(load(copy_model(small_model, tmp_path / folder / name))[2])


def test_a_checkpoint_that_is_not_a_plain_concatenation(model_dir):
    """A text, which has no fixed length, comes first: TensorFlow must read it every time."""
    save_variables(
        model_dir / "model.ckpt", random_variables(SMALL_HPARAMS) | {"a": np.array(b"text", object)}
    )
    for _ in range(2):
        _, _, params = load(model_dir)
        assert_params(params)
        assert not (model_dir / RECORD).exists()


def test_a_checkpoint_in_several_data_files(model_dir):
    for path in model_dir.glob("model.ckpt.*"):
        path.unlink()
    save_in_shards(model_dir / "model.ckpt", random_variables(SMALL_HPARAMS))
    assert len(list(model_dir.glob("model.ckpt.data-*"))) == 2
    assert_params(load(model_dir)[2])


def save_in_shards(prefix, variables):
    """Save two data files, as a distributed training does."""
    import tensorflow as tf

    names, parts = sorted(variables), []
    for i, some in enumerate((names[:9], names[9:])):
        parts.append(str(prefix.parent / f"part{i}"))
        tensors = [tf.constant(variables[name]) for name in some]
        tf.raw_ops.SaveV2(
            prefix=parts[-1], tensor_names=some, shape_and_slices=[""] * len(some), tensors=tensors
        )
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(prefix))


def test_a_checkpoint_saved_again_in_shards_beside_its_old_data_file(model_dir):
    load(model_dir)
    save_in_shards(model_dir / "model.ckpt", random_variables(SMALL_HPARAMS, seed=1))
    assert (model_dir / DATA).exists()
    for _ in range(2):
        assert_params(load(model_dir)[2], seed=1)


def test_a_missing_shard_is_named(model_dir):
    (model_dir / DATA).unlink()
    save_in_shards(model_dir / "model.ckpt", random_variables(SMALL_HPARAMS))
    (model_dir / "model.ckpt.data-00001-of-00002").unlink()
    with pytest.raises(FileNotFoundError, match="data-00001-of-00002") as error:
        load(model_dir)
    assert "delete" not in str(error.value)


@pytest.mark.parametrize("name", ["m[1]", "a b", "it's", 'say "hi"', "back\\slash"])
@pytest.mark.parametrize("quote", ['"', "'"])
def test_unusual_names_of_checkpoints(tmp_path, name, quote):
    model_dir = write_model(tmp_path / "small")
    for path in model_dir.glob("model.ckpt.*"):
        path.rename(model_dir / path.name.replace("model.ckpt", name))
    escaped = name.replace("\\", "\\\\").replace(quote, "\\" + quote)
    (model_dir / "checkpoint").write_text(f"  model_checkpoint_path:  {quote}{escaped}{quote}\n")
    assert_params(load(model_dir)[2])


def test_a_float16_checkpoint_of_odd_width(tmp_path):
    hparams = SMALL_HPARAMS | {"n_embd": 9}
    model_dir = write_model(tmp_path / "half", hparams)
    variables = {
        name: array.astype(np.float16) for name, array in random_variables(hparams).items()
    }
    save_variables(model_dir / "model.ckpt", variables)
    for name, array in flat(load(model_dir)[2]).items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, variables[name].reshape(array.shape))


def test_a_published_name_requires_the_published_hparams(model_dir, monkeypatch):
    published = model_dir.rename(model_dir.with_name("124M"))
    with pytest.raises(
        ValueError, match=r"hparams\.json does not have the values of the published 124M"
    ):
        load(published)
    monkeypatch.setenv("GPT2_ALLOW_UNVERIFIED", "1")
    assert_params(load(published)[2])


def own_lines(stderr):
    """The lines of standard error without those about CUDA, which TensorFlow's GPU build prints."""
    theirs = r"(?i)cuda|cudnn|cublas|cufft|computation_placer|tensorrt|absl::InitializeLog"
    return [line for line in stderr.splitlines() if not re.search(theirs, line)]


FIRST_LOADS = """
import os, sys, threading
from utils import load_encoder_hparams_and_params
if sys.argv[3] == "None":
    sys.stderr = None
target = load_encoder_hparams_and_params
threads = [threading.Thread(target=target, args=sys.argv[1:3]) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
os.write(2, b"still there")
"""


@pytest.mark.parametrize("stderr", ["None", "open"])
def test_first_loads_in_threads_keep_standard_error(model_dir, stderr):
    result = python(FIRST_LOADS, model_dir.name, model_dir.parent, stderr)
    assert (own_lines(result.stderr), result.returncode) == (["still there"], 0)
    assert (model_dir / RECORD).exists()


def rewrite(variables_change):
    def damage(model_dir):
        variables = random_variables(SMALL_HPARAMS)
        variables_change(variables)
        save_variables(model_dir / "model.ckpt", variables)

    return damage


def hparams(**changes):
    def damage(model_dir):
        values = {
            key: value for key, value in (SMALL_HPARAMS | changes).items() if value is not None
        }
        (model_dir / "hparams.json").write_text(json.dumps(values))

    return damage


def file(name, content):
    return lambda model_dir: (model_dir / name).write_bytes(content)


def cut(name, n):
    return lambda model_dir: os.truncate(model_dir / name, n)


def of_another_size(*names):
    def damage(model_dir):
        with tempfile.TemporaryDirectory() as folder:
            other = write_model(Path(folder) / "other", SMALL_HPARAMS | {"n_embd": 24})
            for name in names:
                shutil.copy(other / name, model_dir / name)

    return damage


W = "model/h1/mlp/c_fc/w"
FAULTS = {
    "variable missing": (rewrite(lambda v: v.pop(W)), "model.ckpt: model/h1/mlp/c_fc/w is missing"),
    "variable of another shape": (
        rewrite(lambda v: v.update({W: v[W][0, :, 1:], "more": v[W]})),
        r"c_fc/w has shape \[12, 47\], expected shape \[1, 12, 48\] from the model's sizes",
    ),
    "layers missing": (hparams(n_layer=3), "h2/ln_1/g is missing, expected shape .12. from"),
    "huge": (hparams(n_layer=10**6), "h2/ln_1/g is missing"),
    "layers ignored": (hparams(n_layer=1), "has more layers than n_layer, which is 1"),
    "more than a million": (hparams(n_vocab=10**6 + 1), "n_vocab must be .* got 1000001"),
    "huge context": (hparams(n_ctx=10**30), "n_ctx must be .* got 1000000000000000000000000000000"),
    "hparams of another shape": (
        hparams(n_ctx=31),
        r"model/wpe has shape \[32, 12\], expected shape \[31, 12\]",
    ),
    "hparams missing": (hparams(n_embd=None), "hparams.json has no n_embd"),
    "hparams negative": (
        hparams(n_layer=-1),
        "n_layer must be a whole number from 1 to 1000000, got -1",
    ),
    "hparams zero": (hparams(n_head=0), "n_head must be .* got 0"),
    "hparams float": (hparams(n_embd=12.0), "n_embd must be .* got 12.0"),
    "hparams bool": (hparams(n_layer=True), "n_layer must be .* got True"),
    "hparams text": (hparams(n_ctx="32"), "n_ctx must be .* got '32'"),
    "hparams contradictory": (hparams(n_head=5), "n_embd 12 is not a multiple of n_head 5"),
    "hparams a list": (file("hparams.json", b"[1, 2]"), "hparams.json"),
    "hparams not json": (file("hparams.json", b"<html>"), "hparams.json"),
    "hparams endlessly nested": (file("hparams.json", b"[" * 100_000), "hparams.json"),
    "checkpoint empty": (file("checkpoint", b""), "checkpoint does not name a checkpoint"),
    "index empty": (file(INDEX, b""), "model.ckpt.index is damaged"),
    "index of something else": (file(INDEX, b"x" * 500), "model.ckpt.index is damaged"),
    "index of another size": (of_another_size(INDEX), r"\[269, 24\], expected shape \[269, 12\]"),
    "data of another size": (of_another_size(DATA), "model.ckpt.data.* is damaged"),
    "both of another size": (
        of_another_size(INDEX, DATA),
        r"\[269, 24\], expected shape \[269, 12\]",
    ),
    "data cut": (cut(DATA, 10_000), "model.ckpt.data-00000-of-00001 is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("recorded", [False, True])
def test_faults_are_one_line_that_names_the_file(model_dir, fault, recorded):
    if recorded:
        load(model_dir)
    damage, message = FAULTS[fault]
    damage(model_dir)
    with pytest.raises(ValueError, match=message) as error:
        load(model_dir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["checkpoint", "encoder.json", "vocab.bpe", "hparams.json", DATA, INDEX]
)
def test_missing_files_are_named(model_dir, name):
    (model_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(model_dir)


def is_right(model_dir):
    """Return whether the model loads. If so, its parameters must be right."""
    try:
        params = load(model_dir)[2]
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        assert_params(params)
        return True
    assert "\n" not in message
    assert str(model_dir) in message
    return False


# How many damaged files load all the same, at least and at most. A damaged record is ignored.
@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        (DATA, 0, 0),
        (INDEX, 0, N_FLIPS // 4),
        ("hparams.json", 0, N_FLIPS // 4),
        ("encoder.json", 0, N_FLIPS // 4),
        ("vocab.bpe", 0, N_FLIPS // 4),
        ("checkpoint", N_FLIPS // 4, N_FLIPS),  # only one of its lines counts
        (RECORD, N_FLIPS, N_FLIPS),
    ],
)
@pytest.mark.parametrize("recorded", [False, True])
def test_flipped_bits_never_give_wrong_parameters(model_dir, name, recorded, least, most):
    if recorded or name == RECORD:
        load(model_dir)
    path = model_dir / name
    intact, rng = path.read_bytes(), random.Random(name)
    right = 0
    for _ in range(N_FLIPS):
        damaged = bytearray(intact)
        damaged[rng.randrange(len(intact))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        right += is_right(model_dir)
    assert least <= right <= most
    path.write_bytes(intact)
    assert is_right(model_dir)


@pytest.mark.parametrize(
    ("name", "n_right"),
    [
        (DATA, 0),
        (INDEX, 0),
        ("hparams.json", 0),
        ("encoder.json", 0),
        ("vocab.bpe", 0),
        ("checkpoint", None),  # its first line is enough
        (RECORD, N_FLIPS),
    ],
)
def test_truncated_files_never_give_wrong_parameters(model_dir, name, n_right):
    load(model_dir)
    path = model_dir / name
    intact = path.read_bytes()
    right = 0
    for i in range(N_FLIPS):
        path.write_bytes(intact[: len(intact) * i // N_FLIPS])
        right += is_right(model_dir)
    assert right == n_right or (n_right is None and 0 < right < N_FLIPS)


def touched(path):
    os.utime(path, ns=(1, 1))


def replaced_with_the_same_mtime(path):
    """Other content with the same size and mtime: only the ctime differs."""
    status = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (touched, True),
        (replaced_with_the_same_mtime, False),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0\0"), True),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), False),
    ],
    ids=["touched", "replaced", "grown", "cut"],
)
def test_a_changed_data_file_is_verified_again(model_dir, monkeypatch, change, right):
    load(model_dir)
    change(model_dir / DATA)
    asked = []
    through = utils.read_with_tensorflow
    monkeypatch.setattr(
        utils, "read_with_tensorflow", lambda *args: asked.append(1) or through(*args)
    )
    assert is_right(model_dir) == right
    assert asked or not right


def test_a_model_replaced_by_another(model_dir, tmp_path):
    load(model_dir)
    other = write_model(tmp_path / "other", seed=1)
    for name in (DATA, INDEX):
        shutil.copy(other / name, model_dir / name)
    assert_params(load(model_dir)[2], seed=1)


def test_a_folder_that_cannot_be_written(model_dir):
    model_dir.chmod(0o555)
    if os.access(model_dir, os.W_OK):
        pytest.skip("root can write everywhere")
    for _ in range(2):
        assert_params(load(model_dir)[2])
    model_dir.chmod(0o755)


def test_a_record_that_cannot_be_written(model_dir):
    (model_dir / RECORD).mkdir()
    for _ in range(2):
        assert_params(load(model_dir)[2])


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../small", "a/b/c", "a/..", "a\\b", "/tmp", "C:", "a\0b"]
)
def test_names_that_are_paths_raise(small_model, name):
    with pytest.raises(ValueError, match="folder in"):
        load_encoder_hparams_and_params(name, str(small_model.parent))


def test_an_unknown_name_lists_the_models(small_model, tmp_path):
    match = r"nope; models there: small; published: 124M, 355M, 774M, 1558M; bundled: tiny"
    with pytest.raises(ValueError, match=match):
        load_encoder_hparams_and_params("nope", str(small_model.parent))
    with pytest.raises(ValueError, match=rf"{tmp_path}/not-there/nope; models there: none; .*124M"):
        load_encoder_hparams_and_params("nope", str(tmp_path / "not-there"))
    assert not (tmp_path / "not-there").exists()


@pytest.mark.parametrize(
    ("name", "size"),
    [("gpt2", "124M"), ("GPT2-XL", "1558M"), ("124m", "124M"), ("1.5B", "1558M"), ("345M", "355M")],
)
def test_other_names_of_the_published_sizes(tmp_path, name, size):
    with pytest.raises(ValueError, match=f"did you mean {size}, or openai-community/gpt2"):
        load_encoder_hparams_and_params(name, str(tmp_path))


def test_tiny_is_found_from_everywhere(tmp_path, small_model):
    _, hparams, _ = load_encoder_hparams_and_params("tiny", str(tmp_path / "elsewhere"))
    assert hparams["n_vocab"] == 1024
    shutil.copytree(small_model, tmp_path / "tiny")
    assert load_encoder_hparams_and_params("tiny", str(tmp_path))[1] == SMALL_HPARAMS


@pytest.mark.parametrize("size", ["355M", "774M", "1558M"])
def test_a_size_that_cannot_be_verified_is_not_downloaded(tmp_path, monkeypatch, size):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(ImportError, match=f"verify {size} .*openai-community/gpt2-") as error:
        load_encoder_hparams_and_params(size, str(tmp_path))
    assert "\n" not in str(error.value)
    assert not (tmp_path / size).exists()


HINTS = {
    "LoRA": ("adapter_config.json", "{}", "LoRA adapter.*merge"),
    "nothing": ("README.md", "", "neither a checkpoint nor a config.json"),
    "an index": ("model-1000.index", "", 'model-1000.index, but no .* "model-1000"'),
}


@pytest.mark.parametrize("case", HINTS)
def test_folders_without_a_model_say_what_they_hold(tmp_path, case):
    name, content, match = HINTS[case]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / name).write_text(content)
    with pytest.raises(FileNotFoundError, match=match):
        load(tmp_path / "model")


@pytest.mark.parametrize("name", ["hparams.json", "encoder.json", "vocab.bpe", DATA, INDEX])
def test_git_lfs_pointers_are_named_as_such(model_dir, name):
    (model_dir / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match=rf"{name}.*Git LFS pointer.*git lfs pull"):
        load(model_dir)


def test_two_models_in_one_folder(model_dir, capsys):
    """TensorFlow's is loaded if it is complete, with one line that says so."""
    for name in ("config.json", "model.safetensors", "vocab.json", "merges.txt"):
        shutil.copy(DATA_DIR / "hugging_face" / "whole" / name, model_dir)
    assert load(model_dir)[1] == SMALL_HPARAMS
    (line,) = capsys.readouterr().err.splitlines()
    assert "TensorFlow" in line
    assert "model.safetensors" in line
    (model_dir / INDEX).unlink()
    (model_dir / "encoder.json").unlink()
    assert load(model_dir)[1]["n_vocab"] == 280
    assert capsys.readouterr().err == ""


def python(code, *arguments, **kwargs):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


LOAD = """
import sys
from utils import load_encoder_hparams_and_params
load_encoder_hparams_and_params(sys.argv[1], sys.argv[2])
print(sorted({"tensorflow", "requests"} & set(sys.modules)))
"""


WATCHED_LOADS = """
import sys, tensorflow, utils
dangerous = {
    "pickle.find_class", "subprocess.Popen", "os.system",
    "os.exec", "os.posix_spawn", "os.fork",
}
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event in dangerous else None)
for name in sys.argv[2:]:
    try:
        utils.load_encoder_hparams_and_params(name, sys.argv[1])
        print("loaded", name)
    except (OSError, ValueError) as error:
        print("refused", name)
print(seen)
"""


class Payload:
    """Its pickle creates the file `path` when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_code_in_model_files_is_never_executed(small_model, tmp_path):
    """Each model file in turn is a pickle or a Python expression that would create a file."""
    marker = tmp_path / "executed"
    attacks = [pickle.dumps(Payload(marker)), f"open({str(marker)!r}, 'w')".encode()]
    pickle.loads(attacks[0]).close()
    marker.unlink()  # it must exist: the pickle works
    eval(attacks[1]).close()
    marker.unlink()
    models = []
    for name in (
        DATA,
        INDEX,
        RECORD,
        "hparams.json",
        "encoder.json",
        "vocab.bpe",
        "checkpoint",
        "pytorch_model.bin",
    ):
        for attack in attacks:
            models.append(f"model{len(models)}")
            model_dir = copy_model(small_model, tmp_path / "models" / models[-1])
            (model_dir / name).write_bytes(attack)
    result = python(WATCHED_LOADS, tmp_path / "models", *models, check=True)
    *loads, seen = result.stdout.splitlines()
    assert seen == "[]"
    assert not marker.exists()
    assert [line.split()[1] for line in loads] == models
    assert (
        sum(line.startswith("loaded") for line in loads) == 4
    )  # with another RECORD or pytorch_model.bin


def test_tensorflow_is_silent_and_used_once(model_dir):
    first, second = (python(LOAD, model_dir.name, model_dir.parent) for _ in range(2))
    assert "'tensorflow'" in first.stdout
    assert (own_lines(first.stderr), first.returncode) == ([], 0)
    assert (second.stdout, second.stderr, second.returncode) == ("[]\n", "", 0)


def test_first_load_without_tensorflow(model_dir):
    hidden = "import sys; sys.modules['tensorflow'] = None" + LOAD
    result = python(hidden, model_dir.name, model_dir.parent)
    assert "ImportError: TensorFlow must verify" in result.stderr
    assert "pip install -r requirements.txt" in result.stderr
    load(model_dir)
    assert python(hidden, model_dir.name, model_dir.parent).returncode == 0


@pytest.mark.parametrize(("merges", "n"), [([*SMALL_MERGES, "t o"], 270), (SMALL_MERGES[:-1], 268)])
def test_a_vocabulary_of_another_size(model_dir, merges, n):
    write_vocabulary(model_dir, merges=merges)
    with pytest.raises(ValueError, match=rf"{n} tokens, but n_vocab is 269"):
        load(model_dir)


def test_merges_of_another_vocabulary(model_dir, tmp_path):
    write_vocabulary(tmp_path / "other", merges=["a b", "ab c"])
    shutil.copy(tmp_path / "other" / "vocab.bpe", model_dir)
    with pytest.raises(ValueError, match=r"vocab\.bpe does not fit"):
        load(model_dir)
