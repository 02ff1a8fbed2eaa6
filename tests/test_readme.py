"""The README's snippets run, and what it says of options and files is so."""

import inspect
import re
import subprocess
import sys

import pytest
from helpers import ROOT, SMALL_HPARAMS, write_model

import gpt2
import utils

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    write_model(folder / "models" / "124M", SMALL_HPARAMS | {"n_ctx": 64})
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippets_run(models, snippet):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{snippet}"
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=models, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_options_are_those_of_main():
    table = dict(re.findall(r"^\| `--(\w+)` \| (\S*) ?\|", README, re.MULTILINE))
    signature = {
        name: "" if parameter.default is None else str(parameter.default)
        for name, parameter in inspect.signature(gpt2.main).parameters.items()
        if name != "prompt"
    }
    assert table == signature | {"interactive": ""}


def test_files_and_sizes_are_named():
    for name in (*utils.FILES, *utils.MODEL_SIZES, "GPT2_BASE_URL", "GPT2_ALLOW_UNVERIFIED"):
        assert f"`{name}" in README or f"{name}:" in README


def test_only_the_six_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    names = {re.match(r"[a-z-]+", line)[0].removesuffix("-cpu") for line in lines if line}
    assert names == {"numpy", "tensorflow", "requests", "tqdm", "regex", "fire"}
