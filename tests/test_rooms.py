"""Each file has one concern: imports run one way only, also those inside functions."""

import ast
import subprocess
import sys

import pytest
from helpers import ROOT

LAYERS = {  # file -> the files of this project that it may import
    "gpt2_pico": {"utils"},
    "fast": set(),
    "encoder": set(),
    "terminal": set(),
    "gpt2": {"fast", "encoder", "terminal", "utils"},
    "hugging_face": {"encoder", "fast"},
    "utils": {"encoder", "hugging_face", "terminal"},
}


def imported_modules(path):
    """The modules that a file imports anywhere, each by its first name."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.add((node.module or "").partition(".")[0])
    return modules


@pytest.mark.parametrize("name", LAYERS)
def test_imports_run_one_way(name):
    assert {path.stem for path in ROOT.glob("*.py")} == LAYERS.keys()
    assert imported_modules(ROOT / f"{name}.py") & LAYERS.keys() <= LAYERS[name]


def test_the_layers_have_no_circle():
    left = dict(LAYERS)
    while left:
        lowest = {name for name, others in left.items() if not others & left.keys()}
        assert lowest
        left = {name: others for name, others in left.items() if name not in lowest}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.stem)
def test_examples_use_public_names(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module in LAYERS:
            assert not any(alias.name.startswith("_") for alias in node.names)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in LAYERS:
            assert not node.attr.startswith("_")


def test_importing_stays_light():
    heavy = {"tensorflow", "requests", "fire", "tqdm", "utils"}
    code = f"import sys, gpt2, encoder; print(sorted({heavy} & set(sys.modules)))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_a_program_with_a_module_called_utils(tmp_path):
    (tmp_path / "utils.py").write_text("raise AssertionError('the program has its own utils')")
    code = f"""
import sys
sys.path[:0] = [{str(tmp_path)!r}]
sys.path += [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import gpt2
from helpers import SMALL_HPARAMS, random_params
params = random_params(SMALL_HPARAMS)
logits = gpt2.gpt2([5, 7], **params, n_head=3)
print(gpt2.generate([5, 7], params, 3, 1) == [logits[-1].argmax()])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert (result.stdout, result.stderr) == (b"True\n", b"")


def test_the_size_of_the_rooms():
    """gpt2_pico.py fits on a screen or two, and the first formula of gpt2.py stands early."""
    assert len((ROOT / "gpt2_pico.py").read_text().splitlines()) <= 70
    lines = (ROOT / "gpt2.py").read_text(encoding="utf-8").splitlines()
    assert lines.index("def gelu(x):") < 50
    for path in ROOT.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 650
