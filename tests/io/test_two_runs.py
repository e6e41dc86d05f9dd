"""Two runs at once: with one cache both do as one alone does; of two with one output, one is told to wait."""

import shutil
import sys

import pytest
from ready import Ready
from uptraining import weights

TRAINING = "--data pydoc --data self --context 32 --tokens 256 --batch-size 4 --micro-batch 2 --precision float32"


def run(*arguments) -> Ready:
    return Ready([sys.executable, "-m", "rrtc", *arguments])


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.slow
def test_with_one_cache(rrt, tmp_path, cache):
    """Its text is tokenized, and written by the teacher, once; and what the teacher says of it is kept in one place."""
    command = ["uptrain", rrt, *TRAINING.split(), "--teacher-cache", tmp_path / "lessons"]
    both = [run(*command, "-o", tmp_path / name) for name in ("a", "b")]
    for process in both:
        assert process.wait() == 0, process.stderr
    one, other = (weights(tmp_path / name) for name in ("a", "b"))
    assert all(one[name].equal(other[name]) for name in one)
    shutil.rmtree(tmp_path / "a")
    again = run(*command, "-o", tmp_path / "a")
    assert again.wait() == 0 and all(one[name].equal(found) for name, found in weights(tmp_path / "a").items())


@pytest.mark.slow
def test_with_one_output(rrt, tmp_path, cache):
    both = [run("uptrain", rrt, *TRAINING.split(), "-o", tmp_path / "out") for _ in range(2)]
    assert sorted(process.wait() for process in both) == [0, 1], [process.stderr for process in both]
    (refused,) = (process for process in both if process.wait())
    assert f"Error: Another run is writing {tmp_path / 'out'}." in refused.stderr and "Traceback" not in refused.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "out"} and weights(tmp_path / "out")
