"""The benchmark of initializations runs, on a pico model and with the row that no other test makes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "init.py"
TEXT = "\n\n\n".join(f"Chapter {n}. It was the {n}th of May, and the rain had not stopped. " * 9 for n in range(40))


def benchmark(*arguments):
    command = [sys.executable, str(BENCHMARK), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_row_is_made_measured_trained_and_scored(dense, tmp_path):
    for name in ("learn.txt", "book.txt"):
        (tmp_path / name).write_text(TEXT)
    work, learn = tmp_path / "work", tmp_path / "learn.txt"
    given = ["--model", dense("llama"), "--calibrate-on", learn, "--train-on", learn, "--work", work]
    given += ["--score-tokens", 256, "--calibrate-tokens", 512, "--context", 32]
    given += ["--steps", 2]  # the learning rate of the first is 0
    given += ["--rows", "whitened-svd", "mergekit"]

    done = benchmark(*given, "--score-on", tmp_path / "book.txt")

    assert done.returncode == 0, done.stderr
    assert "mergekit: layer average: skipped" in done.stdout
    result = json.loads((work / "results.json").read_text())
    (row,) = result["rows"]
    assert row["seconds"] > 0 and row["peak_bytes"] > 50e6
    assert row["after_init"]["size"] == row["after_training"]["size"] == pytest.approx(0.684, rel=0.03)
    assert row["after_init"]["size"] <= 0.684
    dense_loss, loss = (part["losses"]["book.txt"] for part in (result["dense"], row["after_init"]))
    assert row["after_init"]["excess"] == pytest.approx(loss - dense_loss)
    assert row["after_training"]["losses"] != row["after_init"]["losses"]

    other = benchmark(*given, "--score-on", tmp_path / "book.txt", "--budget", 0.5)
    assert other.returncode == 1 and "other settings" in other.stderr
    own = benchmark(*given, "--score-on", learn)
    assert own.returncode == 2 and "also calibrated or trained on" in own.stderr
