"""Folders of a model with linear attention: read layer by layer, with another plan, exported, or refused by name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exports import STRANGER, make_rrt, recipe, run_python
from safetensors.torch import load_file
from windowed import SINKS, WINDOW, see_windows

from rrtc.errors import RrtcError
from rrtc.export import stage, verify
from rrtc.generate.engine import Engine
from rrtc.io.recursive import RecursiveModel, copy_with_plan
from rrtc.io.weights import Weights
from rrtc.kv_budget import without_windows
from rrtc.model import RrtForCausalLM
from rrtc.model.linear_rrt import LinearRule, Maps
from rrtc.stock.streamed import StreamedModel

IDS = torch.arange(2 * 60).view(2, 60) * 37 % 320
NEAR = {"window": WINDOW, "sinks": SINKS, "linear": {"features": 8, "seed": 3}}


@pytest.fixture
def source(tmp_path) -> Path:
    """An rrtc folder whose maps have learnt something."""
    folder = see_windows(make_rrt(tmp_path / "rrt"), (NEAR | {"heads": [1]}, NEAR | {"heads": []}, None))
    model = RrtForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, Maps):
            module.log_gain.data += 2
            module.maps.data *= 1.1
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(folder: Path) -> torch.Tensor:
    return RrtForCausalLM.from_pretrained(folder).eval()(IDS, use_cache=False).logits


@torch.no_grad()
def test_read_layer_by_layer_it_is_the_model(source):
    one = RecursiveModel(source)
    model = StreamedModel(one.config, one.raw, torch.device("cpu"))
    states = model.embed(IDS)
    model.run(lambda number: one.layer(number, torch.device("cpu")), states, one.rules)
    log_p = logits(source)[:, :-1].log_softmax(-1)
    expected = -log_p.gather(2, IDS[:, 1:, None]).mean().item()
    assert model.loss(states, IDS) == pytest.approx(expected, abs=1e-5)


@torch.no_grad()
def test_with_another_plan_the_maps_come_and_go(source, tmp_path):
    given = RecursiveModel(source)
    for name, plan in (("without", without_windows(given.plan)), ("again", given.plan)):
        (tmp_path / name).mkdir()
        copy_with_plan(given, plan, tmp_path / name, 10**9)
        assert any(".linear." in tensor for tensor in Weights(tmp_path / name)) == (name == "again")
        model, info = RrtForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model(IDS, use_cache=False).logits, logits(source))  # with what the maps have learnt


def test_what_maps_have_learnt_goes_with_their_heads_to_another_plan(source, tmp_path):
    given = RecursiveModel(source)
    number = next(number for number, rule in given.rules.items() if isinstance(rule, LinearRule))
    place = next(n for n, visit in enumerate(given.plan.visits) if visit.layer == number)
    heads = range(given.plan.architecture.layers[number].kv_heads)
    near = {n: [head for head in heads if head not in n] for n in ((), (0,))}
    found = {}
    for seeing in near:
        attention = replace(given.plan.visits[place].attention, heads=seeing, window=9)
        visits = [replace(v, attention=attention if n == place else None) for n, v in enumerate(given.plan.visits)]
        copy_to = tmp_path / str(len(seeing))
        copy_to.mkdir()
        copy_with_plan(given, replace(given.plan, visits=tuple(visits)), copy_to, 10**9)
        found[seeing] = RecursiveModel(copy_to).rules[number].maps
    before = given.rules[number]
    learnt = [head for head in heads if head not in before.heads]
    assert learnt == [0]
    _, features, width = before.maps.maps.shape
    for seeing, maps in found.items():
        drawn = Maps(len(near[seeing]), features, width, before.maps.seed)
        for place, head in enumerate(near[seeing]):
            if head in learnt:
                assert torch.equal(maps.maps[place], before.maps.maps[learnt.index(head)])
                assert maps.log_gain[place] == before.maps.log_gain[learnt.index(head)] == 2
            else:
                assert torch.equal(maps.maps[place], drawn.maps[place]) and maps.log_gain[place] == 0


@pytest.mark.parametrize("form", ["dense", "gguf", "onnx"])
def test_formats_that_cannot_carry_it_refuse_it_before_any_work(form, source, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "reference", None)
    with pytest.raises(
        RrtcError, match=f"The {form} format is not for models with KV heads that keep sums of what has left"
    ):
        stage.export(str(source), str(tmp_path / "out"), recipe(format=form))
    assert not (tmp_path / "out").exists()


def test_the_engine_for_many_requests_refuses_it(source):
    with pytest.raises(RrtcError, match="The engine for many requests is not for models with KV heads that keep sums"):
        Engine(RrtForCausalLM.from_pretrained(source))


@torch.no_grad()
def test_what_an_export_is_compared_with_has_rounded_maps_also_where_they_come_from_disk(source):
    model = RrtForCausalLM.from_pretrained(source).eval()
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    for from_disk in (False, True):
        found = verify.reference(source, torch.bfloat16, from_disk)
        torch.testing.assert_close(found.logits, verify.logits_of(model, found.ids), atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["none", "int8"])
def test_recursive_has_it_where_rrtc_is_not(bits, source, tmp_path, cold):
    (tmp_path / "text.txt").write_text("It rained, and then it rained again. def f(x): return x * 0x1f\n" * 400)
    asked = {"calibrate_on": [str(tmp_path / "text.txt")], "calibrate_tokens": 512} if bits != "none" else {}
    result = stage.export(str(source), str(tmp_path / "out"), recipe(quantize=bits, **asked))
    assert "of the others, sums in 8 features" in " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert "linear_rrt.py" in result["files"] and result["max_logit_difference"] < 1e-3
    if bits == "none":
        out = tmp_path / "out"
        run_python(STRANGER, json.dumps(IDS.tolist()), str(tmp_path / "found"), str(out), cwd=tmp_path)
        torch.testing.assert_close(load_file(tmp_path / "found")[f"{out}:logits"], logits(source), atol=1e-4, rtol=0)
