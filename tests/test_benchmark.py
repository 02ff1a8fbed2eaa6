"""The benchmark runs. Its results are not tested."""

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT


def test_quick_mode(tmp_path):
    figures = tmp_path / "figures.json"
    command = [
        sys.executable,
        str(ROOT / "tests" / "benchmark.py"),
        "--quick",
        "--json",
        str(figures),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    stored = json.loads(figures.read_text())
    measured = {row["what"] for row in stored["figures"] if row["who"] == "npGPT"}
    tasks = [
        "one more token",
        "a prompt of 104 tokens",
        "the whole command, 40 tokens",
        "memory of the command",
    ]
    tasks += ["scoring texts of 20 to 300 tokens"]
    assert {
        *(f"quick: {task}" for task in tasks),
        "quick: one more token after 104 tokens",
        "decoding",
    } <= measured
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in stored["figures"])
    assert stored["versions"]["numpy"]
    assert stored["threads"] == 2
    for row in stored["figures"]:
        (line,) = [
            line for line in result.stdout.splitlines() if line.startswith(f"| {row['what']} |")
        ]
        who = "" if row["who"] == "npGPT" else re.escape(row["who"]) + " "
        shown = re.search(rf"(?:\| |<br>){who}([\d,.e+-]+) {re.escape(row['unit'])} \(", line)
        assert float(shown[1].replace(",", "")) == pytest.approx(row["median"], rel=1e-3)
    labels = re.findall(r"^\| ([^|:]+) \| \S+ (?:ms|s|MB|tokens/s) \|", result.stdout, re.MULTILINE)
    assert labels == tasks  # the short table comes first, and no row of the long one has such cells
