"""The notebook runs without an error and prints what is stored in it.

After a change of the model or the notebook, this command stores its outputs again:

    python -m jupyter execute --inplace examples/tour.ipynb
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from helpers import REAL_MODELS_DIR, ROOT, copy_model

COMMAND = [sys.executable, "-m", "jupyter", "execute", "--inplace", "examples/tour.ipynb"]
PACKAGES = ["nbclient", "ipykernel", "matplotlib"]
DECIMAL = r"\d+\.\d+"


def code_cells(folder):
    notebook = json.loads((folder / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def shown(cell):
    """Return what a cell shows as one text. For a picture, this text says its size."""
    texts = []
    for output in cell["outputs"]:
        data = output.get("data", {})
        texts += output.get("text") or data["text/plain"]
        if "image/png" in data:
            texts.append(" as an image\n")
    return "".join(texts)


@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in PACKAGES),
    reason=f"needs {', '.join(PACKAGES)}",
)
def test_the_notebook_shows_what_is_stored(tmp_path):
    """Texts are equal, and so are percentages, but for their last digit, which the CPU decides."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    copy_model(REAL_MODELS_DIR / "tiny", tmp_path / "models" / "tiny")
    env = os.environ | {"PYTHONDEVMODE": ""}  # or asyncio prints what took long into the notebook
    result = subprocess.run(COMMAND, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for before, after in zip(code_cells(ROOT), code_cells(tmp_path), strict=True):
        expected = shown(before)
        actual = shown(after)
        assert re.sub(DECIMAL, "number", actual) == re.sub(DECIMAL, "number", expected)
        numbers = [float(number) for number in re.findall(DECIMAL, expected)]
        assert list(map(float, re.findall(DECIMAL, actual))) == pytest.approx(numbers, abs=0.11)


def test_what_is_stored():
    """All cells were run in their order, all comparisons are true, and the file is small."""
    cells = code_cells(ROOT)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    texts = [shown(cell) for cell in cells]
    assert sum("True" in text for text in texts) >= 5
    assert not any("False" in text for text in texts)
    assert sum("as an image" in text for text in texts) >= 7
    assert (ROOT / "examples" / "tour.ipynb").stat().st_size < 400_000
