"""Attention transfer: linear attention learns what full attention finds, and nothing else learns."""

import io

import pytest
import torch
from rich.console import Console
from uptraining import interrupt_at, make_rrt, metrics, settings, weights
from windowed import see_windows

from rrtc.cli import tables
from rrtc.errors import WrongUsage
from rrtc.model import RrtForCausalLM
from rrtc.recipe.schema import checked
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.uptrain.optimizer import make_optimizer
from rrtc.uptrain.stage import uptrain

NEAR = {"window": 5, "sinks": 2, "heads": [], "linear": {"features": 8, "seed": 3}}


@pytest.fixture
def source(dense, tmp_path):
    folder = see_windows(make_rrt(tmp_path / "rrt", dense("llama")), (NEAR, NEAR | {"heads": [1]}, None))
    RrtForCausalLM.from_pretrained(folder).save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_maps_and_gains_alone_learn_and_a_run_goes_on_where_it_was(source, tmp_path, monkeypatch):
    asked = settings(losses={"attention": 1.0}, learning_rate=0.05)
    result = uptrain(str(source), str(tmp_path / "out"), asked)
    before, after = weights(source), weights(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]) == (".linear." not in name), name
    steps = metrics(tmp_path / "out")
    assert [step["loss"] for step in steps] == [None] * len(steps) and result["teacher"] is None
    assert steps[-1]["attention"] < steps[0]["attention"] == steps[0]["objective"]
    console = Console(file=io.StringIO(), width=120)
    console.print(tables.uptrain(result, "out"))
    shown = console.file.getvalue()
    assert "from full attention" in shown and f"{result['first_attention']:.3f}" in shown
    with monkeypatch.context() as stopped:
        interrupt_at(stopped, 10)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(source), str(tmp_path / "again"), asked)
    uptrain(str(source), str(tmp_path / "again"), asked, resume=True)
    again = weights(tmp_path / "again")
    assert all(torch.equal(tensor, again[name]) for name, tensor in after.items())


def test_muon_leaves_maps_to_adamw(source):
    model = RrtForCausalLM.from_pretrained(source)
    optimizer = make_optimizer(model, UptrainRecipe(optimizer="muon"), 1e-3, {})
    roles = {parameter: group["role"] for group in optimizer.param_groups for parameter in group["params"]}
    maps = {roles[p] for name, p in model.named_parameters() if ".linear." in name and p.dim() > 1}
    assert maps == {"factors"} and "matrices" in roles.values()


def test_it_needs_linear_attention_and_text_that_leaves_the_window(source, dense, tmp_path):
    plain = make_rrt(tmp_path / "plain", dense("llama"))
    with pytest.raises(WrongUsage, match="No visit of the model in .* has linear attention"):
        uptrain(str(plain), str(tmp_path / "out"), settings(losses={"attention": 1.0}))
    with pytest.raises(WrongUsage, match="In windows of 8 tokens nothing leaves what the heads"):
        uptrain(str(source), str(tmp_path / "out"), settings(losses={"attention": 1.0}, context=8))
    wide = see_windows(make_rrt(tmp_path / "wide", dense("llama")), (NEAR | {"window": 300},))
    with pytest.raises(WrongUsage, match="In windows of 256 tokens nothing leaves what the heads"):
        uptrain(str(wide), str(tmp_path / "out"), settings(losses={"attention": 1.0}, context=512))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "beside, named",
    [
        ({"losses": {"attention": 1, "forward_kl": 1}}, "forward_kl"),
        ({"losses": {"attention": 1}, "exits": "joint"}, "exits"),
        ({"losses": {"attention": 1}, "stability": "admin"}, "stability"),
        ({"losses": {"attention": 1}, "regularizers": {"bmi": 0.1}}, "bmi"),
        ({"losses": {"attention": 1}, "fsdp": True}, "fsdp"),
    ],
)
def test_it_is_a_stage_of_its_own(beside, named):
    with pytest.raises(WrongUsage, match=f"stage of its own, and does not go with {named}"):
        checked(UptrainRecipe, beside, "a test")
