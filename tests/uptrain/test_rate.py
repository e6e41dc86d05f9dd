"""The learning rate that a recipe leaves open follows from what the start has lost and from the tokens of a step."""

import json

import pytest
from uptraining import settings

from rrtc.uptrain.job import prepare
from rrtc.uptrain.rate import LEAST, MOST, default_rate, lost_by
from rrtc.uptrain.stage import uptrain


@pytest.mark.parametrize(
    ("lost", "tokens", "rate"),
    [
        (0.6, 4096, 1e-4),
        (None, 4096, 1e-4),
        (0.6, 1024, 5e-5),
        (0.15, 4096, 2.5e-5),
        (0.3, 16384, 1e-4),
        (0.6, 10**9, 4e-4),
        (5.0, 4096, MOST),
        (0.0, 4096, LEAST),
    ],
)
def test_it_rises_with_what_was_lost_and_with_the_root_of_a_steps_tokens(lost, tokens, rate):
    assert default_rate(lost, tokens) == rate


def test_what_was_lost_is_the_last_that_was_measured():
    def lost(provenance: dict, stage: str = "uptrain") -> float | None:
        return lost_by({"stage": stage} | provenance)

    init = {"loss": {"tokens": 9, "dense": 3.0, "after_init": 3.5}}
    assert lost({"measured": {"init": init}}) == 0.5
    assert lost({"measured": {"init": init, "uptrain": {"last_kl": 0.25}}}) == 0.25
    assert lost({"measured": {"init": init, "uptrain": {"last_kl": None}}}) == 0.5
    for healed in ({"last_kl": None}, {"last_kl": 0.02, "temperature": 4.0}):  # of exits alone, and of softened ones
        assert lost({"measured": {"init": init, "uptrain": healed | {"lost_before": 0.3}}}) == 0.3
    assert lost({"measured": {"init": {}}}) is None
    windows = {"loss": {"tokens": 9, "given": 3.25, "after_init": 3.5}}
    healed = {"init": init, "uptrain": {"last_kl": 0.25}, "windows": windows}
    assert lost({"measured": healed}, "init") == 0.5  # planned anew after it was healed
    assert lost({"measured": healed}) == 0.25  # and healed again
    assert lost({"measured": {"init": init, "windows": {}}}, "init") == 0.5


def test_a_run_takes_it_and_says_so(rrt, tmp_path, capsys):
    recipe = settings(learning_rate=None)
    rate = prepare(rrt, recipe.uptrain).learning_rate
    measured = uptrain(str(rrt), str(tmp_path / "out"), recipe)
    steps = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert max(step["learning_rate"] for step in steps) == measured["learning_rate"] == rate
    assert f"at a learning rate of {rate:.1e} at most" in capsys.readouterr().err
    assert prepare(tmp_path / "out", recipe.uptrain).learning_rate == default_rate(
        measured["last_kl"], recipe.uptrain.batch_size * recipe.uptrain.context
    )
    assert prepare(rrt, settings(learning_rate=None, losses={"next_token": 1.0}).uptrain).learning_rate == rate
