"""The notebook runs without an error and prints what is stored in it.

After a change of the model or the notebook, this command stores its outputs again:

    python -m jupyter execute --inplace examples/tour.ipynb
"""

import re

import pytest
from helpers import ROOT

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")
pytest.importorskip("ipykernel")
pytest.importorskip("matplotlib")

TOUR = ROOT / "examples" / "tour.ipynb"
DECIMAL = r"\d+\.\d+"


def read_tour():
    return nbformat.read(TOUR, as_version=4)


def shown(cell):
    """Return what a cell shows as one text. For a picture, this text says its size."""
    texts = []
    for output in cell.outputs:
        texts.append(output.get("text") or output.data["text/plain"])
        if "image/png" in output.get("data", {}):
            texts.append(" as an image\n")
    return "".join(texts)


def test_the_notebook_shows_what_is_stored():
    """Texts are equal, and so are percentages, but for their last digit, which the CPU decides."""
    stored = [cell for cell in read_tour().cells if cell.cell_type == "code"]
    tour = read_tour()
    resources = {"metadata": {"path": str(TOUR.parent)}}
    nbclient.NotebookClient(tour, timeout=300, resources=resources).execute()
    executed = [cell for cell in tour.cells if cell.cell_type == "code"]
    for before, after in zip(stored, executed, strict=True):
        expected = shown(before)
        actual = shown(after)
        assert re.sub(DECIMAL, "number", actual) == re.sub(DECIMAL, "number", expected)
        numbers = [float(number) for number in re.findall(DECIMAL, expected)]
        assert list(map(float, re.findall(DECIMAL, actual))) == pytest.approx(numbers, abs=0.11)


def test_what_is_stored():
    """All cells were run in their order, all comparisons are true, and the file is small."""
    cells = [cell for cell in read_tour().cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    texts = [shown(cell) for cell in cells]
    assert sum("True" in text for text in texts) >= 5
    assert not any("False" in text for text in texts)
    assert sum("as an image" in text for text in texts) >= 7
    assert TOUR.stat().st_size < 400_000
