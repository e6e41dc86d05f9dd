"""The benchmark of initializations runs, on a pico model and with the row that no other test makes; that of tied and
untied models finds the slopes and the crossing of curves that are known."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import ready

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "init.py"
TEXT = "\n\n\n".join(f"Chapter {n}. It was the {n}th of May, and the rain had not stopped. " * 9 for n in range(40))


def benchmark(*arguments):
    return ready.run([sys.executable, str(BENCHMARK), *map(str, arguments)])


@pytest.mark.slow
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


def test_slopes_and_crossing_of_curves_that_are_known(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK.parent))
    from tied_or_not import compared, crossing, said

    chance = random.Random(0)
    tokens = [1000 * step for step in range(1, 1001)]

    def curve(c, a):
        return [(one, c * one**-a * math.exp(chance.gauss(0, 0.05))) for one in tokens]

    crossed = math.exp(math.log(8 / 2) / (0.3 - 0.2))  # 8 t^-0.3 = 2 t^-0.2
    found = compared(curve(8, 0.3), curve(2, 0.2))
    assert found["exponents"] == pytest.approx((0.3, 0.2), abs=0.01)
    assert found["gain"][1] < 0.1 < found["gain"][2]
    assert found["crossing"][1] < crossed < found["crossing"][2]
    assert found["crossing"][2] / found["crossing"][1] < 2
    assert "beyond the 1M that were measured" in said(found)

    assert crossing((0.2, math.log(8)), (0.3, math.log(2))) == math.inf
    assert "tied is below never" in said(compared(curve(8, 0.2), curve(2, 0.3)))
