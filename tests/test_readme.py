"""The README's snippets print what it shows, and its lists of options and files are complete."""

import inspect
import re
import subprocess
import sys

import pytest
from helpers import REAL_MODELS_DIR, ROOT, copy_model

import gpt2
import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXCERPT, *SNIPPETS = re.findall(
    r"^```python\n(.*?)^```\n(?:\n```\n(.*?)^```)?", README, re.MULTILINE | re.DOTALL
)
QUICK_START = re.search(r"prints:\n\n```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with models/tiny."""
    folder = tmp_path_factory.mktemp("readme")
    copy_model(REAL_MODELS_DIR / "tiny", folder / "models" / "tiny")
    return folder


@pytest.mark.parametrize(("snippet", "output"), SNIPPETS)
def test_snippets_print_what_is_shown(folder, snippet, output):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{snippet}"
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=folder, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == output


def test_quick_start_prints_what_is_shown(folder):
    assert 'gpt2.py "ROMEO:" --model_size tiny\n' in README
    command = [sys.executable, str(ROOT / "gpt2.py"), "ROMEO:", "--model_size", "tiny"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert result.stdout.strip() == QUICK_START[1].strip()


def test_the_excerpt_is_in_the_source():
    source = (ROOT / "gpt2.py").read_text(encoding="utf-8")
    assert all(line + "\n" in source for line in EXCERPT[0].splitlines())


def test_options_match_main():
    table = dict(re.findall(r"^\| `--(\w+)` \| (\S*) ?\|", README, re.MULTILINE))
    signature = {
        name: "" if parameter.default is None else str(parameter.default)
        for name, parameter in inspect.signature(gpt2.main).parameters.items()
        if name != "prompt"
    }
    assert table == signature | {"interactive": ""}


def test_files_sizes_and_variables_are_named():
    for name in (*utils.FILES, *utils.MODEL_SIZES, "GPT2_BASE_URL", "GPT2_ALLOW_UNVERIFIED"):
        assert f"`{name}" in README or f"{name}:" in README


def test_there_are_six_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[a-z-]+", line)[0].removesuffix("-cpu") for line in lines if line}
    assert names == {"numpy", "tensorflow", "requests", "tqdm", "regex", "fire"}
