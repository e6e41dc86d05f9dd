"""Plans in which visits read another loop's keys, and what refuses them by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import uptraining
from exports import make_rrt, recipe
from pico import pico_config, save_pico
from transformers import AutoModelForCausalLM
from windowed import see_windows

from rrtc import api
from rrtc.attention import Attention, Owner
from rrtc.errors import RrtcError, WrongUsage
from rrtc.eval import stage as measured
from rrtc.export import stage
from rrtc.generate.stages import Stages
from rrtc.io.recursive import RecursiveModel
from rrtc.kv_owners import local_but, with_owners
from rrtc.patterns import make_plan
from rrtc.plan import Plan, read_visits
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.architecture import read_architecture
from rrtc.uptrain.checks import check_features
from rrtc.uptrain.stage import uptrain

READER = {"window": 9, "sinks": 3, "heads": [], "owner": {"loop": 1}}
FEEDBACK = (READER, READER, READER, None, None, None)  # two loops of three visits


def made(**init) -> Plan:
    return make_plan(read_architecture(pico_config("llama")), InitRecipe(rank=3, **init))


@pytest.fixture
def source(tmp_path) -> Path:
    return see_windows(make_rrt(tmp_path / "rrt"), FEEDBACK)


def test_a_plan_comes_back_from_its_config_and_takes_the_bytes_of_its_windows():
    local = local_but(made(loops=3), "last_loop", 9, 3)
    plan = with_owners(local, "last_loop")
    assert read_visits([visit.fields() for visit in plan.visits]) == plan.visits
    assert [visit.attention and visit.attention.owner for visit in plan.visits] == [Owner(2)] * 4 + [None] * 2
    assert {"owner", "later"} < plan.features and plan.kv_bytes(1000, 2) == local.kv_bytes(1000, 2)
    assert local.features == {"window", "sinks"} and "owner" not in json.dumps(
        [visit.fields() for visit in local.visits]
    )
    first = with_owners(local_but(made(loops=3), "first_loop", 9, 3), "first_loop")
    assert [visit.attention and visit.attention.owner for visit in first.visits] == [None] * 2 + [Owner(0)] * 4
    assert first.features == {"window", "sinks", "owner"}
    assert local_but(made(loops=1), "last_loop", 9, 3) == made(loops=1)  # nothing is tied


def test_heads_that_the_owner_does_not_store_get_none_and_a_plan_that_says_otherwise_is_refused():
    plan = local_but(made(), "last_loop", 9, 3)

    def seeing(first: Attention, second: Attention | None) -> Plan:
        visits = list(plan.visits)
        visits[1], visits[4] = (replace(visits[n], attention=one) for n, one in ((1, first), (4, second)))
        return replace(plan, visits=tuple(visits))

    assert "later" in seeing(Attention(9, owner=Owner(1)), None).features
    assert "later" in seeing(Attention(9, heads=(1,), owner=Owner(1)), Attention(9, heads=(0,))).features
    assert with_owners(seeing(Attention(9), Attention(9, heads=(1,))), "last_loop").visits[1].attention.owner is None
    with pytest.raises(WrongUsage, match="layer 1 has an owner in loop 2, and there is no other visit of its slot"):
        seeing(Attention(9, owner=Owner(2)), None)
    with pytest.raises(WrongUsage, match="layer 1 has an owner in loop 0"):
        seeing(Attention(9, owner=Owner(0)), None)
    with pytest.raises(WrongUsage, match="reads KV heads of layer 4, which do not all see everything"):
        seeing(Attention(9, owner=Owner(1)), Attention(9, heads=(1,)))


@pytest.mark.parametrize("form", ["dense", "gguf", "onnx"])
def test_forms_that_cannot_say_so_are_refused(form, source, tmp_path):
    with pytest.raises(
        RrtcError, match=f"The {form} format is not for models with visits that read keys and values of another"
    ):
        stage.export(str(source), str(tmp_path / "out"), recipe(format=form))
    assert not list(tmp_path.glob("out*"))


def test_what_runs_layer_by_layer_or_loop_by_loop_is_refused(source):
    with pytest.raises(RrtcError, match="Running layer by layer is not for models with visits that read"):
        RecursiveModel(source)
    with pytest.raises(RrtcError, match="The engine for many requests is not for models with visits that read"):
        Stages(AutoModelForCausalLM.from_pretrained(source))


def test_eval_says_before_it_measures_that_the_engine_cannot_run_it(source, tmp_path, monkeypatch):
    monkeypatch.setattr(measured, "scoring_texts", None)
    dense = str(save_pico(tmp_path / "dense"))
    with pytest.raises(RrtcError, match="The engine for many requests is not for models with visits that read"):
        measured.evaluate(str(source), Recipe(eval={"engine": True}), against=dense)


def test_what_uptraining_would_ask_of_a_loop_that_has_not_run_is_refused():
    last = with_owners(local_but(made(), "last_loop", 9, 3), "last_loop")
    for asked, name in (
        ({"exits": "after"}, "--exits"), ({"losses": {"hidden": 1.0}}, "The loss 'hidden'"),
        ({"compile": True}, "--compile"), ({"regularizers": {"bmi": 0.02}}, "The regularizer 'bmi'"),
        ({"stability": "admin"}, "--stability admin"), ({"fsdp": True}, "--fsdp"),
    ):  # fmt: skip
        with pytest.raises(RrtcError, match=f"{name} is not for models with visits that read"):
            check_features(UptrainRecipe(**asked), last.features)
    first = with_owners(local_but(made(), "first_loop", 9, 3), "first_loop")
    check_features(UptrainRecipe(exits="after", losses={"hidden": 1.0}, stability="admin"), first.features)


@pytest.mark.slow
def test_it_is_uptrained_and_exported_as_it_is(source, tmp_path):
    (tmp_path / "text.txt").write_text("It rained, and then it rained again. def f(x): return x * 0x1f\n" * 100)
    changes = {"data": [str(tmp_path / "text.txt")], "losses": {"next_token": 1.0}, "separate_documents": True}
    wanted = uptraining.settings(**changes, activation_checkpointing=True)
    uptrain(str(source), str(tmp_path / "healed"), wanted)
    losses = [step["loss"] for step in uptraining.metrics(tmp_path / "healed")]
    assert losses[-1] < losses[0]
    stage.export(str(tmp_path / "healed"), str(tmp_path / "out"), recipe())
    model, _ = api.load(str(tmp_path / "out"))
    assert model.config.visits[0]["attention"] == READER
    card = " ".join((tmp_path / "out/README.md").read_text().split())
    assert (
        "6 of 12 KV heads: the last 9 tokens, itself included, and the first 3 of its document; of the others" in card
    )
    with torch.no_grad():
        ids = torch.arange(60)[None] * 37 % 320
        expected = api.load(str(tmp_path / "healed"))[0](ids).logits
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=0)
