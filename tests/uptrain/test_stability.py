"""Gains that bring what branches add to the size it has in the dense model: they are what they should be, belong to
tied visits alone, and arrive in whatever is made of the model."""

import copy
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from initialized import logits as logits_of
from mixed_forms import mixed, mixed_plan
from pico import pico_config, pico_model, save_pico
from recursive_models import assert_equal, both_norms, everywhere, logits, recursive, tokens, written_out
from uptraining import curve, interrupt_at, make_rrt, metrics, settings, uptrain_on_two_processes, weights

from rrtc.errors import RrtcError, WrongUsage
from rrtc.export.stage import export
from rrtc.generate.engine import Engine
from rrtc.generate.ways import Speculate
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.plan import Plan
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import decoder_layers, read_plan
from rrtc.stock.trial import Branch
from rrtc.uptrain.estimate import estimate
from rrtc.uptrain.job import prepare
from rrtc.uptrain.stability import FURTHEST, add_gains, branches_of, gains_of, match, profile, with_gains
from rrtc.uptrain.stage import uptrain

IDS = tokens(4, 40)


def gained(given: RrtForCausalLM) -> tuple[RrtForCausalLM, Plan, list[Branch]]:
    """(a copy of `given` that has gains wherever stability admin gives it some, each 1, its plan, its branches)."""
    plan = read_plan(given.config)
    branches = branches_of(plan, given.config.base_config)
    plan, model = with_gains(plan, branches), copy.deepcopy(given)
    add_gains(model, plan)
    return model, plan, branches


def randomly(model: RrtForCausalLM) -> RrtForCausalLM:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name in gains_of(model):
            gain = model.get_parameter(name)
            gain.copy_(1 + 0.3 * torch.randn(gain.shape, generator=generator))
    return model


# -- a model with gains


@everywhere
@both_norms
def test_a_gain_multiplies_what_the_tied_matrix_says(architecture, norms, tmp_path):
    given = recursive(architecture, norms=norms)
    try:
        model, plan, _ = gained(given)
    except WrongUsage as error:
        assert "end in norms" in str(error) and norms == "shared"
        return
    assert_equal(logits(model), logits(given), 0)  # each is 1
    randomly(model)
    assert_equal(logits(model), logits(written_out(model)))
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(RrtForCausalLM.from_pretrained(tmp_path).eval()), logits(model))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_engine_multiplies_too(architecture):
    model = randomly(gained(recursive(architecture))[0]).double()
    prompt = IDS[0, :9].tolist()
    engine = Engine(model, lambda *args: Speculate(*args, drafts=3), rows=2, context=64)
    request = engine.submit(prompt, 8, do_sample=False)
    engine.run()
    assert engine.stages.loops == 2
    assert request.said == model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, 9:].tolist()


def test_only_tied_matrices_have_gains():
    plan = mixed_plan("llama")
    low_rank = plan.visits[1]
    name = next(name for name, form in low_rank.forms.items() if form == "low_rank")
    with pytest.raises(WrongUsage, match="is not tied, and has a gain"):
        replace(plan, visits=tuple(replace(v, gains=(name,) if v is low_rank else ()) for v in plan.visits))
    visits = [asdict(visit) | {"gains": [name]} if visit is low_rank else asdict(visit) for visit in plan.visits]
    with pytest.raises(ValueError, match="has the form low_rank and a gain"):
        RrtForCausalLM(RrtConfig(base_config=pico_config("llama"), visits=visits))


# -- the profile


def test_the_profile_is_what_layers_add():
    model = pico_model("granite")  # whose branches are multiplied by 0.7
    branches = branches_of(read_plan(recursive("granite").config), model.config)
    assert [(branch.path, branch.factor) for branch in branches] == [("self_attn.o_proj", 0.7), ("mlp.down_proj", 0.7)]
    between: list[torch.Tensor] = []
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: between.append(args[0]))
        for layer in decoder_layers(model)
    ]
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    for layer, found in enumerate(profile(model, branches, IDS)):
        before, middle = states[layer], between[layer]
        streams = [before, middle]
        added = [middle - before] + ([states[layer + 1] - middle] if layer < 5 else [])  # the last one comes normed
        for variances, stream in zip(found, streams, strict=True):
            torch.testing.assert_close(variances.stream, stream.flatten(0, 1).var(0, correction=0))
        for variances, branch in zip(found, added, strict=False):
            torch.testing.assert_close(
                variances.branch, branch.flatten(0, 1).var(0, correction=0), rtol=1e-4, atol=1e-6
            )


@everywhere
def test_branches_are_as_large_as_the_dense_models_after_it(architecture):
    dense = pico_model(architecture)
    model, plan, branches = gained(recursive(architecture))
    theirs = profile(dense, branches, IDS)
    gains = match(model, plan, branches, theirs, IDS)
    before, after = profile(recursive(architecture), branches, IDS), profile(model, branches, IDS)
    held = torch.stack([(gain > 1 / FURTHEST) & (gain < FURTHEST) for both in gains for gain in both])
    ratios = [
        torch.stack([a.branch / b.branch for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True)])
        for ours in (before, after)
    ]
    assert held.sum() >= 12
    assert (ratios[0][held].log().abs() > 0.1).float().mean() > 0.5
    torch.testing.assert_close(ratios[1][held], torch.ones_like(ratios[1][held]), rtol=1e-4, atol=0)


def test_gains_are_1_where_the_models_agree():
    given = recursive("llama")
    model, plan, branches = gained(given)
    gains = match(model, plan, branches, profile(written_out(given), branches, IDS), IDS)
    for gain in (gain for both in gains for gain in both):
        torch.testing.assert_close(gain, torch.ones_like(gain), rtol=1e-4, atol=0)


def test_visits_that_share_nothing_stay_as_they_are():
    given = recursive("llama", sharing="middle_cycle")
    model, plan, branches = gained(given)
    gains = match(model, plan, branches, profile(pico_model("llama"), branches, IDS), IDS)
    assert [both[0] is None and both[1] is None for both in gains] == [True, False, False, False, False, True]
    assert [visit.gains != () for visit in plan.visits] == [False, True, True, True, True, False]
    before = given.state_dict()
    changed = {
        name for name, tensor in model.state_dict().items() if not torch.equal(before.get(name, torch.ones(1)), tensor)
    }
    assert changed == set(gains_of(model))

    untied = recursive("llama", loops=1)
    assert gained(untied)[1] == read_plan(untied.config)


def test_what_is_the_visits_own_takes_its_gain_in():
    given = mixed("llama")
    model, plan, branches = gained(given)
    gains = match(model, plan, branches, profile(pico_model("llama"), branches, IDS), IDS)
    ends = {branch.path for branch in branches}
    own = [v.layer for v in plan.visits for m in plan.matrices(v) if m.name in ends and m.name not in v.gains]
    assert set(own) & {place for place, both in enumerate(gains) if both[0] is not None}
    after = profile(model, branches, IDS)
    dense = profile(pico_model("llama"), branches, IDS)
    for place, both in enumerate(gains):
        for number, gain in enumerate(both):
            if gain is not None:
                held = (gain > 1 / FURTHEST) & (gain < FURTHEST)
                found = (after[place][number].branch / dense[place][number].branch)[held]
                torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-4, atol=0)


# -- a run


@pytest.fixture(scope="module")
def healed(rrt) -> Path:
    uptrain(str(rrt), str(rrt.parent / "with-gains"), settings(stability="admin"))
    return rrt.parent / "with-gains"


@pytest.mark.slow
def test_a_run_begins_with_gains_and_goes_on_as_if_it_had_not_stopped(rrt, healed, tmp_path, monkeypatch):
    gains = {name: tensor for name, tensor in weights(healed).items() if name.endswith(".gain")}
    assert len(gains) == 12 and all((gain - 1).abs().max() > 0.05 for gain in gains.values())
    target = tmp_path / "resumed"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 8)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings(stability="admin"))
    checkpoint = target.with_name("resumed.partial") / "checkpoints" / "checkpoint-3"
    assert torch.isfinite(logits_of(checkpoint)).all()  # a model like any other
    uptrain(str(rrt), str(target), settings(stability="admin"), resume=True)
    assert (target / "model.safetensors").read_bytes() == (healed / "model.safetensors").read_bytes()
    assert (target / "config.json").read_bytes() == (healed / "config.json").read_bytes()
    assert [{**step, "seconds": 0} for step in metrics(target)] == [{**step, "seconds": 0} for step in metrics(healed)]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["recursive", "dense"])
def test_an_export_has_the_gains(healed, tmp_path, format):
    export(str(healed), str(tmp_path / "out"), Recipe.model_validate({"export": {"format": format}}))
    assert_equal(logits_of(tmp_path / "out"), logits_of(healed))


@pytest.mark.slow
def test_a_dry_run_shows_the_profile_and_a_cached_teacher_changes_nothing(rrt, healed, tmp_path):
    recipe = settings(stability="admin", teacher_cache=str(tmp_path / "cache"), teacher_cache_top=320)
    found = estimate(str(rrt), recipe)["profile"]
    assert [(row["layer"], row["branch"]) for row in found[:3]] == [
        (0, "self_attn.o_proj"), (0, "mlp.down_proj"), (1, "self_attn.o_proj")
    ]  # fmt: skip
    assert len(found) == 12 and all(row["gain"] and row["dense_branch"] > 0 for row in found)
    assert "profile" not in estimate(str(rrt), settings())
    uptrain(str(rrt), str(tmp_path / "cached"), recipe)
    assert metrics(tmp_path / "cached")[0]["loss"] == pytest.approx(metrics(healed)[0]["loss"], abs=1e-5)
    assert "gain" in str(sorted(weights(tmp_path / "cached")))


@pytest.mark.slow
def test_processes_that_share_the_model_set_the_same_gains(rrt, healed, tmp_path):
    uptrain_on_two_processes(rrt, tmp_path / "shared", settings(stability="admin", fsdp=True))
    assert curve(tmp_path / "shared") == [pytest.approx(step, abs=1e-4) for step in curve(healed)]


# -- what is refused


def test_what_has_no_gains_is_refused_before_any_work(dense, tmp_path):
    rrt = make_rrt(tmp_path / "gemma", dense("gemma3"), "gemma3", norms="shared")
    with pytest.raises(WrongUsage, match="end in norms .*, and its visits share them"):
        prepare(rrt, settings(stability="admin").uptrain)
    other = save_pico(tmp_path / "deeper", num_hidden_layers=8)
    rrt = make_rrt(tmp_path / "llama", dense("llama"))
    with pytest.raises(RrtcError, match="Stability admin compares layer by layer"):
        prepare(rrt, settings(stability="admin", teacher=str(other)).uptrain)
