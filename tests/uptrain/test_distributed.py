"""Several processes train what one trains: under FSDP2 and DDP, and going on from each other's checkpoints.

Two processes on this machine's CPU do it all, once, in two_processes.py; the tests compare.
"""

import json
import sys
from pathlib import Path

import pytest
import ready
import torch
import two_processes
from pico import save_pico
from uptraining import STEPS, interrupt_at, make_rrt, metrics, settings, weights

from rrtc import api as pipeline
from rrtc.errors import WrongUsage
from rrtc.io.provenance import read_provenance
from rrtc.recipe.schema import Recipe
from rrtc.uptrain.job import prepare
from rrtc.uptrain.stage import uptrain

LOSSES = {"next_token": 0.5, "forward_kl": 1.0, "total_variation": 2.0, "hidden": 0.25}
CASES = {
    "llama": {},
    "gemma2": {},  # its head is its embedding
    "bfloat16": {"bfloat16": True},
}
DDP = {"micro_batch": 1, "losses": LOSSES}
SHARDED = DDP | {"fsdp": True}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, dict]:
    """A small model and its teacher, of each architecture."""
    folder, made = tmp_path_factory.mktemp("models"), {}
    for name in ("llama", "gemma2"):
        dense = save_pico(folder / f"{name}-dense", name)
        made[name] = {"folder": str(make_rrt(folder / name, dense, name)), "teacher": str(dense)}
    return made


@pytest.fixture(scope="module")
def cases(models) -> dict[str, dict]:
    return {
        name: {"weights": LOSSES} | models["gemma2" if name == "gemma2" else "llama"] | case
        for name, case in CASES.items()
    }


@pytest.fixture(scope="module")
def one(models, tmp_path_factory) -> Path:
    """One process: `straight` is a whole run, and `begun` one that was interrupted after a checkpoint at step 3."""
    folder = tmp_path_factory.mktemp("one")
    uptrain(models["llama"]["folder"], str(folder / "straight"), settings(losses=LOSSES))
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, 8)
        uptrain(models["llama"]["folder"], str(folder / "begun"), settings(losses=LOSSES))
    return folder


@pytest.fixture(scope="module")
def two(models, cases, one, tmp_path_factory) -> Path:
    """Two processes: `NAME.pt` of each case; `ddp` and `muon` are whole runs, the second sharded; `stopped` one that
    was sharded and interrupted after a checkpoint at step 3; and the run that one process had `begun` is finished
    sharded."""
    folder = tmp_path_factory.mktemp("two")
    runs = [
        (folder / "ddp", DDP, False, None),
        (folder / "stopped", SHARDED, False, 8),
        (one / "begun", SHARDED | {"activation_checkpointing": True}, True, None),
        (folder / "muon", SHARDED | {"optimizer": "muon"}, False, None),
    ]
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "runs.json").write_text(
        json.dumps(
            [
                (models["llama"]["folder"], str(output), settings(**changes).model_dump(), *how)
                for output, changes, *how in runs
            ]
        )
    )
    run = ready.run_two([sys.executable, two_processes.__file__, folder])
    assert run.returncode == 0, run.stderr
    return folder


def assert_same_course(folder: Path, other: Path) -> None:
    """Of two finished runs."""
    found, expected = metrics(folder), metrics(other)
    assert len(found) == len(expected) == STEPS
    for name in ("objective", "loss", "kl"):
        assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=0, abs=1e-5)
    norms = [step["grad_norm"] for step in expected]
    assert [step["grad_norm"] for step in found] == pytest.approx(norms, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_shared_out_slot_by_slot(name, cases, two):
    """That the parameters were DTensors, the processes have asserted."""
    expected, found = two_processes.train(**cases[name]), torch.load(two / f"{name}.pt")
    close = {"rtol": 0, "atol": 2e-2 if name == "bfloat16" else 1e-5}
    assert len(set(expected["objectives"])) == 4
    torch.testing.assert_close(found["objectives"], expected["objectives"], **close)
    assert all(gradient.abs().max() > 0 for gradient in expected["gradients"].values())
    torch.testing.assert_close(found["gradients"], expected["gradients"], **close)
    assert found["weights"].keys() == expected["weights"].keys()
    if name != "bfloat16":
        torch.testing.assert_close(found["weights"], expected["weights"], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_several_losses_on_two_processes(one, two):
    assert_same_course(two / "ddp", one / "straight")


@pytest.mark.slow
def test_muon_shared_out(models, one, two, tmp_path):
    """A matrix' step is made from the whole matrix, in bfloat16, which is why the courses part a little."""
    uptrain(models["llama"]["folder"], str(tmp_path / "out"), settings(losses=LOSSES, optimizer="muon"))
    found, expected, adamw = (
        [step["objective"] for step in metrics(folder)] for folder in (two / "muon", tmp_path / "out", one / "straight")
    )
    assert found == pytest.approx(expected, rel=0, abs=5e-4)  # 2.3e-4 was seen
    assert abs(adamw[-1] - expected[-1]) > 2e-2


@pytest.mark.slow
def test_what_was_sharded_goes_on_in_one_process(models, one, two):
    uptrain(models["llama"]["folder"], str(two / "stopped"), settings(losses=LOSSES), resume=True)
    assert_same_course(two / "stopped", one / "straight")


@pytest.mark.slow
def test_what_one_process_began_goes_on_sharded(one, two):
    assert_same_course(one / "begun", one / "straight")
    torch.testing.assert_close(weights(one / "begun"), weights(one / "straight"), rtol=0, atol=1e-4)
    provenance = read_provenance(one / "begun")
    assert provenance["recipe"]["uptrain"]["fsdp"] and provenance["measured"]["uptrain"]["processes"] == 2


def test_a_process_of_its_own_cannot_share(models, tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    expected = "shards the model over the processes of torchrun, and this was not started by it"
    with pytest.raises(WrongUsage, match=expected) as refused:
        prepare(tmp_path / "not even there", settings(fsdp=True).uptrain)
    assert "torchrun" in refused.value.hint
    recipe = Recipe.model_validate({"model": models["llama"]["teacher"], "uptrain": {"fsdp": True}})
    with pytest.raises(WrongUsage, match=expected):
        pipeline.run(recipe, str(tmp_path / "run"))
    assert not list(tmp_path.iterdir())
