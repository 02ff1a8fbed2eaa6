"""The benchmark runs. Its figures are not tested."""

import json
import subprocess
import sys

import pytest
from helpers import ROOT

TIMES = [
    "a prompt of 100 tokens, ms",
    "a prompt of 1000 tokens, ms",
    "a token after 10 tokens, ms",
    "a token after 960 tokens, ms",
]
SCORED = [*TIMES, "scoring 1000 tokens, ms"]
LIKELIEST = "likeliest ids like npGPT's, of 20, ids"
LINES = "source code of the step, lines"
LOADING = "importing and loading, ms"
TABLES = {
    "The library, idle": [LIKELIEST, *SCORED],
    "The library, beside 1 busy processes that started before it": SCORED,
    "The library, beside 1 busy processes that started after it": SCORED,
    "The library, in a new process": [
        LOADING,
        "loading again, ms",
        "peak memory of scoring 1000 tokens, MB",
        "encoding prose, first time, MB/s",
        "encoding prose again, MB/s",
        "encoding code, first time, MB/s",
        "encoding code again, MB/s",
    ],
    "The command, and scripts that do the same": [
        "the whole command, 40 tokens, s",
        "its peak memory, MB",
    ],
    "From 70 lines to fast": [LINES, LOADING, *TIMES],
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
        for what, programs in table.items():
            assert {"npGPT", "threads"} & programs.keys()
            assert what == LINES or min(min(values) for values in programs.values()) > 0
    ids = stored["tables"]["The library, idle"][LIKELIEST]
    assert set(ids) >= {"npGPT", "gpt2_pico.py"}
    assert {min(values) for values in ids.values()} == {20}
    assert stored["packages"]["numpy"]
    content = page.read_text()
    assert content.startswith("before\n")
    assert content.endswith("\n<!-- end -->\nafter\n")
    assert "old" not in content
    assert result.stdout.strip() in content
