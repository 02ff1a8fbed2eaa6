"""The benchmark works; what it finds is not tested."""

import json
import subprocess
import sys

from helpers import ROOT


def test_quick_mode(tmp_path):
    figures = tmp_path / "figures.json"
    command = [sys.executable, str(ROOT / "tests" / "benchmark.py"), "--quick", "--json", str(figures)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    stored = json.loads(figures.read_text())
    measured = {row["what"] for row in stored["figures"] if row["who"] == "npGPT"}
    assert {"quick: one more token", "quick: one more token after 104", "quick: its memory", "decode"} <= measured
    assert all(0 < row["min"] <= row["median"] <= row["max"] for row in stored["figures"])
    assert stored["versions"]["numpy"]
    assert stored["threads"] == 2
    for row in stored["figures"]:
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(f"| {row['what']} |")]
        assert f"{row['median']:.4g} {row['unit']}" in line
        assert row["who"] == "npGPT" or row["who"] in line
