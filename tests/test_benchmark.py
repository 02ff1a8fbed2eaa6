"""The benchmark runs. Its figures are not tested."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

TIMES = [
    "a prompt of 100 tokens",
    "a prompt of 1000 tokens",
    "a token after 10 tokens",
    "a token after 960 tokens",
]
SCORED = [*TIMES, "scoring 1000 tokens"]
TABLES = {
    "The library, idle": ["likeliest ids like npGPT's, of 20", *SCORED],
    "The library, beside 1 busy processes that started before it": SCORED,
    "The library, beside 1 busy processes that started after it": SCORED,
    "The library, in a new process": [
        "importing and loading",
        "loading again",
        "peak memory of scoring 1000 tokens",
        "encoding prose, first time",
        "encoding prose again",
        "encoding code, first time",
        "encoding code again",
    ],
    "The command, and scripts that do the same": [
        "the whole command, 40 tokens",
        "its peak memory",
    ],
    "From 70 lines to fast": ["source code of the step", "importing and loading", *TIMES],
}


@pytest.mark.slow
def test_all_rows(tmp_path):
    page = tmp_path / "BENCHMARK.md"
    page.write_text("before\n<!-- written by benchmark.py -->\nold\n<!-- end -->\nafter\n")
    options = ["--quick", "--rounds", "1", "--output", str(tmp_path)]
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    stored = json.loads((tmp_path / "benchmark.json").read_text())
    assert {title: list(table) for title, table in stored["tables"].items()} == TABLES
    for table in stored["tables"].values():
        for what, figures in table.items():
            assert "gpt2_pico.py" in figures or "npGPT" in figures
            for figure in figures.values():
                assert 0 <= figure["min"] <= figure["median"] <= figure["max"]
                assert figure["median"] > 0 or what == "source code of the step"
    ids = stored["tables"]["The library, idle"]["likeliest ids like npGPT's, of 20"]
    assert {figure["min"] for figure in ids.values()} == {20}
    assert stored["packages"]["numpy"]
    content = page.read_text()
    assert content.startswith("before\n")
    assert content.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in content
    assert result.stdout.strip() in content
