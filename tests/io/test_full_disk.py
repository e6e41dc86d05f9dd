"""A full disk in eval and run: one sentence, nothing under a final name, and the next run goes on from what there is.
(For init see test_init_resume.py, for uptrain test_uptrain.py, for export test_export_faults.py.)"""

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from moments import at_the
from uptraining import SETTINGS, settings

from rrtc import api
from rrtc.errors import RrtcError
from rrtc.eval import stage as evaluating
from rrtc.recipe.schema import Recipe
from rrtc.uptrain.stage import uptrain

SCORING = {"tokens": 512, "context": 64, "passkey_trials": 0, "speed_rounds": 0, "sample_tokens": 4}


@contextmanager
def full() -> Iterator[None]:
    """Files cannot grow beyond a few bytes, which is how a full disk looks to who writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))


def test_eval(rrt, tmp_path):
    asked = Recipe.model_validate({"eval": SCORING})
    with full(), pytest.raises(RrtcError, match=r"Writing .* failed: .*[Ff]ile too large"):
        evaluating.evaluate(str(rrt), asked, output=str(tmp_path / "report"))
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    evaluating.evaluate(str(rrt), asked, output=str(tmp_path / "report"))


def test_a_full_cache_is_named(rrt, tmp_path):
    with full(), pytest.raises(RrtcError, match=f"Writing {tmp_path}/cache/tokens/.* failed: File too large") as error:
        uptrain(str(rrt), str(tmp_path / "out"), settings())
    assert "RRTC_CACHE" in error.value.hint and [path.name for path in tmp_path.iterdir()] == ["cache"]


@pytest.mark.slow
def test_run_goes_on_with_the_stage_that_the_disk_was_too_full_for(dense, tmp_path, monkeypatch):
    asked = {
        "model": str(dense("llama")), "init": {"rank": 4, "measure_tokens": 0},
        "uptrain": SETTINGS | {"tokens": 256}, "eval": SCORING,
    }  # fmt: skip
    with ExitStack() as later, monkeypatch.context() as patched:
        at_the(1, patched, evaluating, "write_page", lambda: later.enter_context(full()))
        with pytest.raises(RrtcError, match="Writing eval failed: File too large"):
            api.run(asked, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["init", "uptrain"]
    api.run(asked, tmp_path / "out", resume=True)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["eval", "export", "init", "uptrain"]
