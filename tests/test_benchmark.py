"""The benchmark runs. Its results are not tested."""

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT

TASKS = [  # the rows of the short table
    "one more token",
    "a prompt of 104 tokens",
    "the whole command, 40 tokens",
    "memory of the command",
    "scoring texts of 20 to 300 tokens",
]
OTHERS = [
    "one more token after 104 tokens",
    "beside 1 busy processes, one more token",
    "beside 1 busy processes, a prompt of 104 tokens",
    "memory of scoring a text of 128 tokens",
    "scoring 5 paragraphs",
]


def run_benchmark(figures):
    script = str(ROOT / "tests" / "benchmark.py")
    command = [sys.executable, script, "--quick", "--json", str(figures)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stderr
    return result.stdout, json.loads(figures.read_text())


def shown_figure(table, row):
    """The number that the long table shows for this row of the figures."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {row['what']} |")]
    who = "" if row["who"] == "npGPT" else re.escape(row["who"]) + " "
    shown = re.search(rf"(?:\| |<br>){who}([\d,.e+-]+) {re.escape(row['unit'])} \(", line)
    return float(shown[1].replace(",", ""))


@pytest.mark.slow
def test_quick_mode(tmp_path):
    table, stored = run_benchmark(tmp_path / "figures.json")
    measured = {row["what"] for row in stored["figures"] if row["who"] == "npGPT"}
    assert {"decoding", *(f"quick: {task}" for task in TASKS + OTHERS)} <= measured
    assert stored["versions"]["numpy"]
    assert stored["threads"] == 2
    assert table.count(f"| {stored['processor']} | npGPT |") == 2
    for row in stored["figures"]:
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert shown_figure(table, row) == pytest.approx(row["median"], rel=1e-3)
    # The short table comes first, and no row of the long one has such cells.
    labels = re.findall(r"^\| ([^|:]+) \| \S+ (?:ms|s|MB|tokens/s) \|", table, re.MULTILINE)
    assert labels == TASKS
