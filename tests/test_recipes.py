"""Each recipe runs and prints what stands beneath it.

After a change of the model or a recipe, this command stores what they print:

    PYTHONPATH=. python tests/test_recipes.py
"""

import contextlib
import io
import re

import pytest
from helpers import REAL_MODELS_DIR, ROOT, copy_model

RECIPES = ROOT / "examples" / "RECIPES.md"
BLOCK = re.compile(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", re.DOTALL)  # code, what it prints
DECIMAL = r"-?\d+\.\d*"

BLOCKS = BLOCK.findall(RECIPES.read_text(encoding="utf-8"))
SET_UP = BLOCKS[0][0]
OURS = [(code, shown) for code, shown in BLOCKS if shown]


def run(code):
    """Run a block after the first one, which is the same for all -> what it prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(SET_UP + code, {})
    return output.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a copy of the tiny model, so that no record is left in the repository."""
    folder = tmp_path_factory.mktemp("recipes")
    copy_model(REAL_MODELS_DIR / "tiny", folder / "models" / "tiny")
    return folder


@pytest.mark.parametrize(("code", "shown"), OURS)
def test_recipes_print_what_is_shown(folder, monkeypatch, code, shown):
    """Texts are equal, and so are numbers, but for their last digit, which the CPU decides."""
    monkeypatch.chdir(folder)
    printed = run(code)
    assert re.sub(DECIMAL, "number", printed).split() == re.sub(DECIMAL, "number", shown).split()
    pairs = zip(re.findall(DECIMAL, printed), re.findall(DECIMAL, shown), strict=True)
    for number, expected in pairs:
        n_decimals = len(expected.partition(".")[2])
        assert float(number) == pytest.approx(float(expected), abs=1.1 * 10**-n_decimals)


def test_only_other_libraries_are_not_run():
    others = [code for code, shown in BLOCKS[1:] if not shown]
    assert ["transformers" in code for code in others] == [True, False]
    assert ["minicons" in code for code in others] == [False, True]
    assert all(code.count("\n") <= 12 for code, _ in BLOCKS)


def with_output(match):
    """Return a block with what it prints now beneath it."""
    code, shown = match.groups()
    if shown is None:
        return match[0]
    return f"```python\n{code}```\n\n```\n{run(code)}```"


if __name__ == "__main__":
    text = BLOCK.sub(with_output, RECIPES.read_text(encoding="utf-8"))
    RECIPES.write_text(text, encoding="utf-8")
