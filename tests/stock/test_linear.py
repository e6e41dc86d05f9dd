"""Linear attention is fitted by what full attention does: gains, and the gradient of what is wrong."""

import math
from dataclasses import replace

import pytest
import torch
from pico import VOCABULARY, pico_config

from rrtc.attention import Attention, Linear
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.attention_rrt import Part
from rrtc.model.linear_rrt import LinearRule, Maps
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock import linear
from rrtc.stock.architecture import read_architecture
from rrtc.stock.linear import attention_distance, linear_maps, masses, match_gains


def model_of() -> RrtForCausalLM:
    """The first two visits have linear attention, in both KV heads, and in the second."""
    plan = make_plan(read_architecture(pico_config("llama")), InitRecipe(rank=3))
    kinds = [Attention(9, 3, linear=Linear(16, 1)), Attention(9, 3, (0,), linear=Linear(16, 2))]
    visits = [replace(v, attention=kinds[v.layer] if v.layer < 2 else None) for v in plan.visits]
    torch.manual_seed(0)
    config = RrtConfig.of(replace(plan, visits=tuple(visits)), pico_config("llama", initializer_range=0.3))
    return RrtForCausalLM(config).eval()


def ids(rows: int = 2) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, 60), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_masses_are_the_sums_over_near_and_far_keys(monkeypatch):
    monkeypatch.setattr(linear, "QUERIES", 7)
    query, key = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    rule = LinearRule(9, 3, (), features=16, maps=Maps(2, 16, 8, seed=0))
    found = masses(rule, query, Part([0, 1], key, key, torch.arange(40)), 0.4)
    for head in range(4):
        for number, at in enumerate(range(12, 40)):
            weights = (0.4 * query[0, head, at] @ key[0, head // 2].T).exp()
            far = range(3, at - 8)
            near = [place for place in range(at + 1) if place not in far]
            one = Maps(1, 16, 8, 0)
            one.maps.copy_(rule.maps.maps[head // 2][None])
            phi = [one.of(vectors, 0.4).exp()[0, 0] for vectors in (query[:, head, None, at], key[:, head // 2, None])]
            said = (phi[0] @ phi[1][list(far)].T).sum() / 16
            expected = torch.stack([weights[near].sum(), weights[list(far)].sum(), said]).log()
            torch.testing.assert_close(torch.stack([mass[0, head, number] for mass in found]), expected)


@torch.no_grad()
def test_gains_match_the_far_mass():
    model, ratios = model_of(), {}
    for maps in linear_maps(model):
        maps.log_gain.fill_(3)  # what was there counts nothing
    match_gains(model, ids(), by="mass")

    def look(sight, run, query, part, full):
        _, far, said = masses(sight.rule, query, part, run.keywords["scaling"])
        ratios[sight.rule.maps] = (far - said).unflatten(1, (part.keys.shape[1], -1)).mean((0, 2, 3))

    with linear._looking_on(model, look):
        model(ids())  # in one batch
    for maps in linear_maps(model):
        torch.testing.assert_close(maps.log_gain.data, ratios[maps])


@torch.no_grad()
def test_of_all_gains_those_are_taken_with_which_least_is_wrong():
    model, chosen, wrong = model_of(), {}, {}
    match_gains(model, ids())
    for maps in linear_maps(model):
        chosen[maps] = maps.log_gain.clone()
        assert set(chosen[maps].tolist()) <= set(linear.LOG_GAINS)

    def look(sight, run, query, part, full):
        output = sight.rule.near(sight, run, query, part, False)[0]
        error = (output - full)[:, 12:].square().sum((0, 1, 3)).unflatten(0, (part.keys.shape[1], -1)).sum(-1)
        wrong.setdefault(sight.rule.maps, []).append(error)

    for change in (0.0, -0.5, 0.5, -3.0, 3.0, -math.inf):
        for maps, gain in chosen.items():
            maps.log_gain.copy_(gain + change)
        with linear._looking_on(model, look):
            model(ids())
    for errors in wrong.values():
        assert all((errors[0] <= other * (1 + 1e-5)).all() for other in errors[1:])


def test_the_distance_has_the_gradient_of_what_is_wrong():
    model, text = model_of(), ids(1)

    def distance() -> torch.Tensor:
        return attention_distance(model, lambda: model.base_model(text, use_cache=False))

    distance().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if ".linear." in name
    }
    with torch.no_grad():
        for maps in linear_maps(model):
            for tensor, place in ((maps.log_gain, (0,)), (maps.maps, (0, 3, 2))):
                tensor[place] += 0.01
                above = distance()
                tensor[place] -= 0.02
                slope = (above - distance()).item() / 0.02
                tensor[place] += 0.01
                assert tensor.grad[place].item() == pytest.approx(slope, rel=0.05, abs=1e-4)
        text = ids(1)[:, :9]  # nothing leaves a window
        assert distance().item() == pytest.approx(0, abs=1e-9)
    assert all(layer.eyes.sight is linear.Sight for layer in model.model.layers[:2])


def test_what_it_would_find_is_compared_with_what_the_model_finds_that_sees_everything():
    """Where nothing of the window is left but the query's own key, and no gain: the value of that key."""
    model = model_of()
    for layer in model.model.layers[:2]:
        layer.eyes.rule = replace(layer.eyes.rule, window=1, sinks=0)
        layer.eyes.rule.maps.log_gain.data.fill_(linear.NONE)
    values, fulls = [], []

    def look(sight, run, query, part, full):
        values.append(part.values.transpose(1, 2).repeat_interleave(query.shape[1] // part.values.shape[1], 2))
        fulls.append(full)

    with torch.no_grad(), linear._looking_on(model, look):
        model(ids())
    expected = [
        ((value - full).square().sum((1, 3)) / full.square().sum((1, 3))).mean(0)
        for value, full in zip(values, fulls, strict=True)
    ]
    found = attention_distance(model, lambda: model(ids()))
    assert found.item() == pytest.approx(torch.cat(expected).mean().item(), rel=1e-4)
    # So that training does not depend on how many windows a forward pass has.
    halves = [attention_distance(model, lambda part=part: model(part)).item() for part in ids().chunk(2)]
    assert found.item() == pytest.approx(sum(halves) / 2, rel=1e-5)
