"""Checkpoints that TensorFlow wrote, intact and damaged, read by TensorFlow and memory-mapped."""

import importlib.util
import json
import math
import os
import pickle
import random
import re
import shutil
import sys
from unittest.mock import Mock

import numpy as np
import pytest
from helpers import (
    DATA_DIR,
    FILES,
    SMALL_HPARAMS,
    SMALL_MERGES,
    copy_model,
    flat,
    is_mapped,
    load,
    python,
    random_variables,
    save_data,
    save_variables,
    write_model,
    write_vocabulary,
)

import utils
from utils import load_encoder_hparams_and_params, load_gpt2_params_from_tf_ckpt

if not importlib.util.find_spec("tensorflow"):
    pytest.skip("needs TensorFlow", allow_module_level=True)

DATA = "model.ckpt.data-00000-of-00001"
INDEX = "model.ckpt.index"
MARK = "model.ckpt.verified"
SMALL_VARIABLES = random_variables(SMALL_HPARAMS)
OTHER_VARIABLES = random_variables(SMALL_HPARAMS, seed=1)
N_FLIPS = int(os.environ.get("NPGPT_FLIPS", 12))
FEW = range(N_FLIPS // 4 + 1)


@pytest.fixture
def model_dir(small_model, tmp_path):
    """A copy of the small model that the test may modify. It has not been loaded before."""
    return copy_model(small_model, tmp_path / "small")


def check_params(params, variables=SMALL_VARIABLES):
    found = flat(params)
    assert found.keys() == variables.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, variables[name].reshape(array.shape))
        assert array.ndim == (1 if name.endswith(("/b", "/g")) else 2)


def is_right(model_dir):
    """Return whether the model loads. If so, its parameters must be right."""
    try:
        params = load(model_dir)[2]
    except (ValueError, OSError) as error:
        message = str(error)
    else:
        check_params(params)
        return True
    assert "\n" not in message
    assert str(model_dir) in message
    return False


# Intact checkpoints


def test_first_load_and_mapped_load(model_dir, monkeypatch):
    """TensorFlow is needed for the first load, not for those that map the file."""
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "tensorflow", None)
        with pytest.raises(ImportError, match=r"must verify .* pip install -r requirements\.txt"):
            load(model_dir)
    encoder, hparams, params = load(model_dir)
    assert hparams == SMALL_HPARAMS
    assert encoder.decode(encoder.encode("the thing")) == "the thing"
    check_params(params)
    assert (model_dir / MARK).read_bytes() == b""
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    params = load(model_dir)[2]
    check_params(params)
    assert all(map(is_mapped, flat(params).values()))
    for prefix in (model_dir / "model.ckpt", str(model_dir / "model.ckpt")):
        check_params(load_gpt2_params_from_tf_ckpt(prefix, SMALL_HPARAMS))


OF_ONE = dict.fromkeys(("n_ctx", "n_embd", "n_head", "n_layer"), 1)


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ({"n_layer": 11, "n_embd": 6}, np.float32),  # h10 comes after h1 in the file
        (OF_ONE, np.float32),
        ({"n_embd": 9}, np.float16),
    ],
)
def test_other_sizes_and_types(tmp_path, sizes, dtype):
    hparams = SMALL_HPARAMS | sizes
    variables = {name: array.astype(dtype) for name, array in random_variables(hparams).items()}
    model_dir = write_model(tmp_path / "other", hparams, extra=variables)
    for _ in range(2):
        check_params(load(model_dir)[2], variables)


def test_a_fine_tuned_model_with_other_variables(tmp_path):
    """An optimizer's variables, and a text, which comes first and moves the others.

    The model may lie in a folder with a published name, although its sizes are others.
    """
    slots = {f"{name}/Adam": array + 1 for name, array in SMALL_VARIABLES.items()}
    extra = slots | {"global_step": np.int64(1000), "a": np.array(b"text", object)}
    model_dir = write_model(tmp_path / "124M", prefix="model-1000", extra=extra)
    for _ in range(2):
        params = load(model_dir)[2]
        check_params(params)
        assert all(array.flags.aligned for array in flat(params).values())
        assert not list(model_dir.glob("*.verified"))


def test_a_checkpoint_saved_again(model_dir):
    """Another model, in one data file or in two, as a distributed training saves it."""
    import tensorflow as tf

    load(model_dir)
    prefix = model_dir / "model.ckpt"
    save_variables(prefix, OTHER_VARIABLES)
    check_params(load(model_dir)[2], OTHER_VARIABLES)
    names = sorted(SMALL_VARIABLES)
    parts = {str(model_dir / "part0"): names[:9], str(model_dir / "part1"): names[9:]}
    for part, some in parts.items():
        save_data(part, {name: SMALL_VARIABLES[name] for name in some})
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=list(parts), destination_prefix=str(prefix))
    check_params(load(model_dir)[2])  # the old data file lies beside them
    (model_dir / DATA).unlink()
    for _ in range(2):
        check_params(load(model_dir)[2])
    (model_dir / "model.ckpt.data-00001-of-00002").unlink()
    with pytest.raises(ValueError, match="data-00001-of-00002.* No such file"):
        load(model_dir)


# Names and places


@pytest.mark.parametrize(
    ("name", "quoted"),
    [
        ("model.ckpt", '"/home/someone/run1/model.ckpt"'),
        ("model.ckpt", r'"C:\\run\\model.ckpt"'),
        ("m[1] b", "'m[1] b'"),
        ("it's", '"it\'s"'),
    ],
)
@pytest.mark.parametrize("start", ["  ", "\ufeff"])
def test_the_file_checkpoint_names_the_files(model_dir, name, quoted, start):
    for path in model_dir.glob("model.ckpt.*"):
        path.rename(model_dir / path.name.replace("model.ckpt", name))
    (model_dir / "checkpoint").write_text(f"{start}model_checkpoint_path:  {quoted}\n")
    check_params(load(model_dir)[2])


@pytest.mark.parametrize("name", ["models [1]/*[2]? é 中", os.fsdecode(b"\xff")])
def test_unusual_names_of_folders(small_model, tmp_path, name):
    check_params(load(copy_model(small_model, tmp_path / name))[2])


def test_a_backup_beside_the_data_file(model_dir, monkeypatch):
    load(model_dir)
    shutil.copy(model_dir / DATA, model_dir / f"{DATA}.bak")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    check_params(load(model_dir)[2])


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "nope",
            "/nope, .* holds small; published models are 124M, 355M, 774M, 1558M, and .* tiny",
        ),
        ("GPT2-XL", "did you mean 1558M[?]"),
        ("a/b/c", "/a/b/c, .* holds nothing"),
        ("a\0b", "there is no model"),
        ("small/vocab.bpe", "no model in .*/small/vocab.bpe, .*/small holds .* vocab.bpe;"),
    ],
)
def test_unknown_names_raise(small_model, name, match):
    with pytest.raises(ValueError, match=match):
        load_encoder_hparams_and_params(name, str(small_model.parent))


def test_paths_of_folders(small_model, monkeypatch):
    """A name with a separator may be a path. A folder in models_dir comes first."""
    monkeypatch.chdir(small_model.parent.parent)
    monkeypatch.setenv("HOME", str(small_model.parent))
    path = f"{small_model.parent.name}/small"
    for name in (str(small_model), path, f"./{path}/", "~/small"):
        assert load_encoder_hparams_and_params(name, "models")[1] == SMALL_HPARAMS
    assert load_encoder_hparams_and_params("small", "~")[1] == SMALL_HPARAMS
    monkeypatch.chdir(small_model)
    assert load_encoder_hparams_and_params(".", "models")[1] == SMALL_HPARAMS
    monkeypatch.chdir(small_model.parent)
    with pytest.raises(ValueError, match="there is no model in .*/models/small"):
        load_encoder_hparams_and_params("small", "models")


PUBLISHED = {  # n_embd, n_layer, bytes of the data file
    "124M": (768, 12, 497_759_232),
    "355M": (1024, 24, 1_419_292_672),
    "774M": (1280, 36, 3_096_120_320),
    "1558M": (1600, 48, 6_230_444_800),
}


def test_shapes_have_the_sizes_of_the_published_files():
    assert list(utils.MODEL_SIZES) == list(PUBLISHED)
    for n_embd, n_layer, n_bytes in PUBLISHED.values():
        hparams = {"n_vocab": 50257, "n_ctx": 1024, "n_embd": n_embd, "n_layer": n_layer}
        shapes = [shape for _, shape in utils.variable_shapes(hparams)]
        assert 4 * sum(map(math.prod, shapes)) == n_bytes


def test_tiny_is_found_from_everywhere(tmp_path, small_model):
    elsewhere = tmp_path / "elsewhere"
    assert load(elsewhere / "tiny")[1]["n_vocab"] == 1024
    with pytest.raises(ValueError, match=rf"{elsewhere}/nope, .* holds nothing; .*124M"):
        load(elsewhere / "nope")
    assert not elsewhere.exists()
    assert load(copy_model(small_model, elsewhere / "tiny"))[1] == SMALL_HPARAMS


@pytest.mark.parametrize("kept", [[], ["checkpoint", "hparams.json"]])
def test_a_size_that_cannot_be_verified_is_not_downloaded(tmp_path, monkeypatch, model_dir, kept):
    """Also if an earlier download left some of the files."""
    for name in kept:
        (tmp_path / "355M").mkdir(exist_ok=True)
        shutil.copy(model_dir / name, tmp_path / "355M")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    monkeypatch.setenv("GPT2_BASE_URL", "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(ImportError, match="^.*verify .* 355M.*openai-community/gpt2-.*$"):
        load(tmp_path / "355M")
    assert sorted(path.name for path in tmp_path.glob("355M/*")) == kept
    assert (tmp_path / "355M").exists() == bool(kept)


def test_two_models_in_one_folder(model_dir):
    """The file `checkpoint` decides."""
    for path in (DATA_DIR / "hugging_face" / "whole").iterdir():
        shutil.copy(path, model_dir)
    assert load(model_dir)[1] == SMALL_HPARAMS
    (model_dir / "checkpoint").unlink()
    assert load(model_dir)[1]["n_vocab"] == 280


# Missing and damaged files


def test_folders_without_a_model_say_what_they_hold(tmp_path):
    for name in ("adapter_config.json", "model-1000.index"):
        (tmp_path / name).write_text("{}")
    message = "neither .* checkpoint nor .* config.json; .* holds adapter_config.json, model-1000"
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["hparams.json", "encoder.json", "vocab.bpe", DATA, INDEX])
def test_missing_files_and_git_lfs_pointers_are_named(model_dir, name):
    (model_dir / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    with pytest.raises(ValueError, match=rf"{name}.* is (a Git LFS pointer.*git lfs pull|damaged)"):
        load(model_dir)
    (model_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(model_dir)


def variables(changes):
    changed = SMALL_VARIABLES | changes
    kept = {name: array for name, array in changed.items() if array is not None}
    return lambda model_dir: save_variables(model_dir / "model.ckpt", kept)


def hparams(**changes):
    return file("hparams.json", json.dumps(SMALL_HPARAMS | changes).encode())


def file(name, content):
    return lambda model_dir: (model_dir / name).write_bytes(content)


def of_another_size(name):
    def damage(model_dir):
        other = write_model(model_dir.with_name("other"), SMALL_HPARAMS | {"n_embd": 24})
        shutil.copy(other / name, model_dir)

    return damage


W = "model/h1/mlp/c_fc/w"
FAULTS = {
    "variable missing": (variables({W: None}), f"model.ckpt: {W} is missing"),
    "variable of another shape": (
        variables({W: SMALL_VARIABLES[W][0, :, 1:], "more": SMALL_VARIABLES[W]}),
        r"c_fc/w has shape \[12, 47\], expected \[1, 12, 48\] from the model's sizes",
    ),
    "layers ignored": (hparams(n_layer=1), "has more layers than n_layer, which is 1"),
    "a million layers": (hparams(n_layer=10**6), "h2/ln_1/g is missing"),
    "more than a million": (hparams(n_vocab=10**6 + 1), "n_vocab must be .* got 1000001"),
    "n_ctx of another shape": (hparams(n_ctx=31), r"wpe has shape \[32, 12\], expected .*\[31, 12"),
    "zero": (hparams(n_head=0), "n_head must be a whole number from 1 to 1000000, got 0"),
    "a bool": (hparams(n_layer=True), "n_layer must be .* got True"),
    "no multiple": (hparams(n_head=5), r"n_embd, \d+, is not a multiple of n_head, 5"),
    "hparams missing": (file("hparams.json", b'{"n_vocab": 269}'), "n_ctx must be .* got None"),
    "hparams a list": (file("hparams.json", b"[1, 2]"), "hparams.json"),
    "hparams endlessly nested": (file("hparams.json", b"[" * 100_000), "hparams.json"),
    "checkpoint empty": (file("checkpoint", b""), "checkpoint does not name a checkpoint"),
    "index of something else": (file(INDEX, b"x" * 500), "model.ckpt.index is damaged"),
    "index of another size": (of_another_size(INDEX), r"\[269, 24\], expected \[269, 12\]"),
    "data of another size": (of_another_size(DATA), "model.ckpt.data.* is damaged"),
    "other merges": (file("vocab.bpe", b"#version: 0.2\na b\nab c\n"), r"vocab\.bpe does not fit"),
    "more tokens": (
        lambda model_dir: write_vocabulary(model_dir, [*SMALL_MERGES, "t o"]),
        "n_vocab is 269, but the vocabulary has 270 tokens",
    ),
}


@pytest.mark.parametrize(("damage", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_line_that_names_the_file(model_dir, damage, message):
    load(model_dir)  # the mark of this load must not count
    damage(model_dir)
    with pytest.raises(ValueError, match=message) as error:
        load(model_dir)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "flips_right", "cuts_right"),  # how many damaged files load all the same
    [
        (DATA, {0}, {0}),
        (INDEX, FEW, {0}),
        ("hparams.json", FEW, FEW),  # the last line end may be cut
        ("encoder.json", FEW, {0}),
        ("vocab.bpe", FEW, FEW),
        ("checkpoint", range(N_FLIPS // 4, N_FLIPS), range(1, N_FLIPS)),  # one line counts
    ],
)
def test_damaged_files_never_give_wrong_parameters(model_dir, name, flips_right, cuts_right):
    load(model_dir)
    path = model_dir / name
    intact = path.read_bytes()
    rng = random.Random(name)
    n_flips = 0
    n_cuts = 0
    for i in range(N_FLIPS):
        if i % 2:
            (model_dir / MARK).unlink(missing_ok=True)
        flipped = bytearray(intact)
        flipped[rng.randrange(len(intact))] ^= 1 << rng.randrange(8)
        path.write_bytes(flipped)
        n_flips += is_right(model_dir)
        path.write_bytes(intact[: len(intact) * i // N_FLIPS])
        n_cuts += is_right(model_dir)
    assert n_flips in flips_right
    assert n_cuts in cuts_right
    path.write_bytes(intact)
    assert is_right(model_dir)


# The mark


def replaced_with_the_same_mtime(path):
    """Other content with the same size and mtime: only the ctime differs."""
    status = path.stat()
    path.write_bytes(path.read_bytes()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (lambda path: os.utime(path, ns=(1, 1)), True),
        (replaced_with_the_same_mtime, False),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0\0"), True),
        (lambda path: os.link(path, path.with_name("link")), True),
    ],
    ids=["touched", "replaced", "grown", "linked"],
)
def test_a_changed_data_file_is_verified_again(model_dir, monkeypatch, change, right):
    load(model_dir)
    change(model_dir / DATA)
    verify = Mock(wraps=utils.read_with_tensorflow)
    monkeypatch.setattr(utils, "read_with_tensorflow", verify)
    assert is_right(model_dir) == right
    assert verify.call_count == 1


def test_a_mark_that_cannot_be_written(model_dir):
    (model_dir / MARK).mkdir()
    for _ in range(2):
        check_params(load(model_dir)[2])


# Other processes

FIRST_LOADS = """
import os, sys, utils
from concurrent.futures import ThreadPoolExecutor
models_dir, first, *others = sys.argv[1:]
load = utils.load_encoder_hparams_and_params
with ThreadPoolExecutor(4) as pool:
    list(pool.map(load, 4 * [first], 4 * [models_dir]))
dangerous = {"os.exec", "os.fork", "os.posix_spawn", "os.system", "pickle.find_class"}
dangerous.add("subprocess.Popen")
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event in dangerous else None)
for name in others:
    try:
        load(name, models_dir)
        print("loaded", name)
    except (OSError, ValueError):
        print("refused", name)
print(seen)
os.write(2, b"still there")
"""
SECOND_LOAD = """
import sys, utils
utils.load_encoder_hparams_and_params(*sys.argv[1:])
print({"tensorflow", "requests"} & set(sys.modules))
"""


def own_lines(stderr):
    """The lines of standard error without those about CUDA, which TensorFlow's GPU build prints."""
    theirs = r"(?i)cuda|cudnn|cublas|cufft|computation_placer|tensorrt|absl::InitializeLog"
    return [line for line in stderr.splitlines() if not re.search(theirs, line)]


def test_tensorflow_is_silent_and_code_in_files_is_never_executed(model_dir, tmp_path):
    """Four threads load a model at once. Standard error still works, and the library is silent.

    In other models, each file in turn is a pickle or a Python expression that would create a file.
    """
    marker = tmp_path / "executed"
    calling_pickle = f"cbuiltins\nopen\n(V{marker}\nVw\ntR.".encode()  # open(marker, "w")
    attacks = (calling_pickle, f"open({str(marker)!r}, 'w')".encode())
    for execute, attack in zip((pickle.loads, eval), attacks, strict=True):
        execute(attack).close()
        marker.unlink()  # it must exist: the attack works
    expected = []
    for name in (*FILES, MARK, "pytorch_model.bin"):
        for attack in attacks:
            model = f"model{len(expected)}"
            (copy_model(model_dir, tmp_path / model) / name).write_bytes(attack)
            is_ignored = name in ("model.ckpt.meta", MARK, "pytorch_model.bin")
            expected.append(("loaded " if is_ignored else "refused ") + model)
    models = [line.split()[1] for line in expected]
    status, out, err = python("-c", FIRST_LOADS, tmp_path, model_dir.name, *models)
    assert (status, own_lines(err)) == (0, ["still there"])
    assert out.splitlines() == [*expected, "[]"]
    assert not marker.exists()
    assert python("-c", SECOND_LOAD, model_dir.name, tmp_path) == (0, "set()\n", "")
