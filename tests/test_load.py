"""Loading: checkpoints written by TensorFlow, intact and damaged, read through TensorFlow and mapped."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, SMALL_HPARAMS, SMALL_MERGES, random_variables, save_variables, write_model, write_vocabulary

import utils
from utils import load_encoder_hparams_and_params, load_gpt2_params_from_tf_ckpt

DATA, INDEX, RECORD = "model.ckpt.data-00000-of-00001", "model.ckpt.index", "model.ckpt.layout.json"
N_FLIPS = int(os.environ.get("NPGPT_FLIPS", 50))  # a long run by hand: 200


def flat(params):
    """{variable name: array} of a params dict."""
    result = {"model/wte": params["wte"], "model/wpe": params["wpe"]}
    result |= {f"model/ln_f/{key}": array for key, array in params["ln_f"].items()}
    for i, block in enumerate(params["blocks"]):
        for part, content in block.items():
            for key, value in content.items():
                leaves = value if isinstance(value, dict) else {"": value}
                result |= {f"model/h{i}/{part}/{key}/{leaf}".rstrip("/"): array for leaf, array in leaves.items()}
    return result


def assert_params(params, hparams=SMALL_HPARAMS, seed=0):
    expected, found = random_variables(hparams, seed), flat(params)
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == np.float32
        assert not array.flags.writeable
        np.testing.assert_array_equal(array, expected[name].reshape(array.shape))
        assert array.ndim == (1 if name.endswith(("/b", "/g")) else 2)


def assert_equal_to_tensorflow(prefix, params):
    """The parameters are, bit for bit, what TensorFlow reads from the checkpoint."""
    import tensorflow as tf

    reader = tf.train.load_checkpoint(str(prefix))
    found = flat(params)
    assert found.keys() == reader.get_variable_to_shape_map().keys()
    for name, array in found.items():
        np.testing.assert_array_equal(array, reader.get_tensor(name).reshape(array.shape))


@pytest.fixture
def model_dir(small_model, tmp_path):
    """A copy of the small model to do anything with, in a models_dir of its own; not loaded yet."""
    return shutil.copytree(small_model, tmp_path / "small", ignore=shutil.ignore_patterns("*.layout.json"))


def load(model_dir):
    return load_encoder_hparams_and_params(model_dir.name, str(model_dir.parent))


@pytest.fixture
def no_tensorflow(monkeypatch):
    def call():
        monkeypatch.setattr(utils, "_read_with_tensorflow", lambda *_: pytest.fail("TensorFlow was asked"))

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
    _, _, params = load(model_dir)
    assert_params(params)
    assert all(map(is_mapped, flat(params).values()))


def test_eleven_layers_are_in_numeric_order(tmp_path):
    hparams = SMALL_HPARAMS | {"n_layer": 11, "n_embd": 6}
    model_dir = write_model(tmp_path / "deep", hparams)
    for _ in range(2):
        assert_params(load(model_dir)[2], hparams)


def test_a_fine_tuned_model_with_an_optimizers_variables(tmp_path, no_tensorflow):
    slots = {f"{name}/Adam": array + 1 for name, array in random_variables(SMALL_HPARAMS).items()}
    extra = slots | {"global_step": np.int64(1000), "beta1_power": np.float32(0.5)}
    model_dir = write_model(tmp_path / "my-run", prefix="model-1000", extra=extra)
    assert_params(load(model_dir)[2])
    no_tensorflow()
    _, _, params = load(model_dir)
    assert_params(params)
    assert is_mapped(params["wte"])


def test_a_published_name_with_a_fine_tuned_model_is_loaded_as_it_is(tmp_path):
    assert_params(load(write_model(tmp_path / "124M", prefix="model-7"))[2])


def test_a_checkpoint_saved_under_another_path(model_dir):
    (model_dir / "checkpoint").write_text('model_checkpoint_path: "/home/someone/run1/model.ckpt"\n')
    assert_params(load(model_dir)[2])


def test_a_folder_with_brackets_and_spaces(small_model, tmp_path):
    assert_params(load(shutil.copytree(small_model, tmp_path / "models [1]" / "my run*[2]"))[2])


def test_a_checkpoint_that_is_no_plain_concatenation(model_dir):
    """A string variable, of no fixed length, in front: loads through TensorFlow every time."""
    save_variables(model_dir / "model.ckpt", random_variables(SMALL_HPARAMS) | {"a": np.array(b"text", object)})
    for _ in range(2):
        _, _, params = load(model_dir)
        assert_params(params)
        assert not (model_dir / RECORD).exists()


def test_a_checkpoint_in_several_data_files(model_dir):
    import tensorflow as tf

    variables, names = random_variables(SMALL_HPARAMS), sorted(random_variables(SMALL_HPARAMS))
    parts = []
    for i, some in enumerate((names[:9], names[9:])):
        parts.append(str(model_dir / f"part{i}"))
        tf.raw_ops.SaveV2(
            prefix=parts[-1],
            tensor_names=some,
            shape_and_slices=[""] * len(some),
            tensors=[tf.constant(variables[name]) for name in some],
        )
    for path in model_dir.glob("model.ckpt.*"):
        path.unlink()
    tf.raw_ops.MergeV2Checkpoints(checkpoint_prefixes=parts, destination_prefix=str(model_dir / "model.ckpt"))
    assert len(list(model_dir.glob("model.ckpt.data-*"))) == 2
    assert_params(load(model_dir)[2])


def test_the_public_reader_alone(model_dir):
    assert_params(load_gpt2_params_from_tf_ckpt(str(model_dir / "model.ckpt"), SMALL_HPARAMS))


def rewrite(variables_change):
    def damage(model_dir):
        variables = random_variables(SMALL_HPARAMS)
        variables_change(variables)
        save_variables(model_dir / "model.ckpt", variables)

    return damage


def hparams(**changes):
    def damage(model_dir):
        values = {key: value for key, value in (SMALL_HPARAMS | changes).items() if value is not None}
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
    "variable missing": (rewrite(lambda v: v.pop(W)), "model.ckpt has no variable model/h1/mlp/c_fc/w"),
    "variable of another shape": (
        rewrite(lambda v: v.update({W: v[W][0], "more": v[W]})),
        r"c_fc/w has shape \[12, 48\], but \[1, 12, 48\]",
    ),
    "layers missing": (hparams(n_layer=3), "has no variable model/h2/ln_1/g, of shape .12. by hparams.json"),
    "huge": (hparams(n_layer=10**9), "has no variable model/h2/ln_1/g"),
    "huge vocabulary": (hparams(n_vocab=10**30), "has 269 tokens, but n_vocab is 1000000"),
    "huge context": (hparams(n_ctx=10**30), r"model/wpe has shape \[32, 12\], but \[1000000"),
    "hparams of another shape": (hparams(n_ctx=31), r"model/wpe has shape \[32, 12\], but \[31, 12\]"),
    "hparams missing": (hparams(n_embd=None), "hparams.json has no 'n_embd'"),
    "hparams negative": (hparams(n_layer=-1), "n_layer is -1, not a whole number above 0"),
    "hparams zero": (hparams(n_head=0), "n_head is 0"),
    "hparams float": (hparams(n_embd=12.0), "n_embd is 12.0"),
    "hparams bool": (hparams(n_layer=True), "n_layer is True"),
    "hparams text": (hparams(n_ctx="32"), "n_ctx is '32'"),
    "hparams contradictory": (hparams(n_head=5), "n_embd 12 is not a multiple of n_head 5"),
    "hparams a list": (file("hparams.json", b"[1, 2]"), "hparams.json"),
    "hparams not json": (file("hparams.json", b"<html>"), "hparams.json"),
    "hparams endlessly nested": (file("hparams.json", b"[" * 100_000), "hparams.json"),
    "checkpoint empty": (file("checkpoint", b""), "checkpoint does not name a checkpoint"),
    "index empty": (file(INDEX, b""), "model.ckpt.index is damaged"),
    "index of something else": (file(INDEX, b"x" * 500), "model.ckpt.index is damaged"),
    "index of another size": (of_another_size(INDEX), r"\[269, 24\], but \[269, 12\]"),
    "data of another size": (of_another_size(DATA), "model.ckpt.data.* is damaged"),
    "both of another size": (of_another_size(INDEX, DATA), r"\[269, 24\], but \[269, 12\]"),
    "data cut": (cut(DATA, 10_000), "model.ckpt.data-00000-of-00001 is damaged"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("recorded", [False, True])
def test_a_fault_is_one_line_that_names_the_file(model_dir, fault, recorded):
    if recorded:
        load(model_dir)
    damage, message = FAULTS[fault]
    damage(model_dir)
    if recorded and fault.startswith("index"):  # no longer needed: the data file is the one that was verified
        assert_params(load(model_dir)[2])
    else:
        with pytest.raises(ValueError, match=message) as error:
            load(model_dir)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["checkpoint", "encoder.json", "vocab.bpe", "hparams.json", DATA, INDEX])
def test_a_missing_file_is_named(model_dir, name):
    (model_dir / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load(model_dir)


def fails_or_is_right(model_dir):
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


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("name", [DATA, INDEX, "hparams.json", "encoder.json", "vocab.bpe", "checkpoint", RECORD])
def test_no_flipped_byte_gives_wrong_parameters(model_dir, name, recorded):
    if recorded or name == RECORD:
        load(model_dir)
    path = model_dir / name
    intact, rng = path.read_bytes(), random.Random(name)
    for _ in range(N_FLIPS):
        damaged = bytearray(intact)
        position = rng.randrange(len(intact))
        damaged[position] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        right = fails_or_is_right(model_dir)
        if name == DATA:
            assert not right, f"byte {position} of the data was changed and nothing noticed"
    path.write_bytes(intact)
    assert fails_or_is_right(model_dir)


@pytest.mark.parametrize("name", [DATA, INDEX, "hparams.json", "encoder.json", "vocab.bpe", "checkpoint", RECORD])
def test_no_cut_gives_wrong_parameters(model_dir, name):
    load(model_dir)
    path = model_dir / name
    intact = path.read_bytes()
    for i in range(N_FLIPS):
        path.write_bytes(intact[: len(intact) * i // N_FLIPS])
        right = fails_or_is_right(model_dir)
        assert right or name not in (INDEX, RECORD)  # no longer needed, and found anew
        assert not right or name != DATA


def touched(path):
    os.utime(path, ns=(1, 1))


def replaced_by_its_like(path):
    """Same size, same time, other content: only the inode's own time tells."""
    status = path.stat()
    other = path.with_suffix(".other")
    other.write_bytes(path.read_bytes()[::-1])
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize(
    ("change", "right"),
    [
        (touched, True),
        (replaced_by_its_like, False),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0\0\0\0"), True),
        (lambda path: path.write_bytes(path.read_bytes()[:-4]), False),
    ],
    ids=["touched", "replaced", "grown", "cut"],
)
def test_a_data_file_that_changed_after_the_record_is_read_anew(model_dir, monkeypatch, change, right):
    load(model_dir)
    change(model_dir / DATA)
    asked = []
    through = utils._read_with_tensorflow
    monkeypatch.setattr(utils, "_read_with_tensorflow", lambda *args: asked.append(1) or through(*args))
    assert fails_or_is_right(model_dir) == right
    assert asked or not right


def test_a_model_of_another_seed_in_its_place(model_dir, tmp_path):
    load(model_dir)
    other = write_model(tmp_path / "other", seed=1)
    for name in (DATA, INDEX):
        shutil.copy(other / name, model_dir / name)
    assert_params(load(model_dir)[2], seed=1)


def test_a_folder_that_cannot_be_written(model_dir):
    model_dir.chmod(0o555)
    if os.access(model_dir, os.W_OK):
        pytest.skip("root may write everywhere")
    for _ in range(2):
        assert_params(load(model_dir)[2])
    model_dir.chmod(0o755)


def test_a_record_that_cannot_be_written_is_done_without(model_dir):
    (model_dir / RECORD).mkdir()
    for _ in range(2):
        assert_params(load(model_dir)[2])


@pytest.mark.parametrize("name", ["", ".", "..", "../small", "a/b", "a\\b", "/tmp", "C:", "a\0b"])
def test_a_name_that_is_a_path_is_refused(small_model, name):
    with pytest.raises(ValueError, match="folder in"):
        load_encoder_hparams_and_params(name, str(small_model.parent))


def test_an_unknown_name_lists_what_there_is(small_model, tmp_path):
    with pytest.raises(ValueError, match=r"'nope'.* small; .*124M, 355M, 774M, 1558M"):
        load_encoder_hparams_and_params("nope", str(small_model.parent))
    with pytest.raises(ValueError, match=r"none; .*124M"):
        load_encoder_hparams_and_params("nope", str(tmp_path / "not-there"))
    assert not (tmp_path / "not-there").exists()


def python(code, *arguments, **kwargs):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **kwargs)


LOAD = """
import sys
from utils import load_encoder_hparams_and_params
load_encoder_hparams_and_params(sys.argv[1], sys.argv[2])
print(sorted({"tensorflow", "requests"} & set(sys.modules)))
"""


def test_nothing_that_is_read_is_executed():
    for name in ("gpt2.py", "encoder.py", "utils.py"):
        assert not re.search(r"pickle|marshal|\beval\b|\bexec\b|subprocess|os\.system", (ROOT / name).read_text())


def test_tensorflow_is_silent_and_loaded_once(model_dir):
    first, second = (python(LOAD, model_dir.name, model_dir.parent) for _ in range(2))
    assert "'tensorflow'" in first.stdout
    assert (first.stderr, first.returncode) == ("", 0)
    assert (second.stdout, second.stderr, second.returncode) == ("[]\n", "", 0)


def test_without_tensorflow_the_first_load_says_what_it_needs(model_dir):
    hidden = "import sys; sys.modules['tensorflow'] = None" + LOAD
    result = python(hidden, model_dir.name, model_dir.parent)
    assert "ImportError: the first load of a checkpoint needs TensorFlow" in result.stderr
    load(model_dir)
    assert python(hidden, model_dir.name, model_dir.parent).returncode == 0


@pytest.mark.parametrize(("merges", "n"), [([*SMALL_MERGES, "t o"], 270), (SMALL_MERGES[:-1], 268)])
def test_other_tokens_than_the_model_has(model_dir, merges, n):
    write_vocabulary(model_dir, merges=merges)
    with pytest.raises(ValueError, match=rf"{n} tokens, but n_vocab is 269 in hparams\.json"):
        load(model_dir)


def test_files_of_another_vocabulary(model_dir, tmp_path):
    write_vocabulary(tmp_path / "other", merges=["a b", "ab c"])
    shutil.copy(tmp_path / "other" / "vocab.bpe", model_dir)
    with pytest.raises(ValueError, match=r"vocab\.bpe does not fit"):
        load(model_dir)
