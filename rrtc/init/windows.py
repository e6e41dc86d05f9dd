"""Which KV heads of a model see everything and which a window, by measuring: what a window, or what may be in its
place, costs each head, as calibration finds it, and which heads look up what stands far back (text/lookups.py)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from rrtc.init.calibrate import Calibration
from rrtc.io.dense import DenseModel
from rrtc.io.folder import whole_file
from rrtc.io.recursive import RecursiveModel
from rrtc.kv_budget import Head, KindLosses, KvBudget, WindowLosses
from rrtc.kv_kinds import LAST_LOOP
from rrtc.kv_owners import readable
from rrtc.model.attention_rrt import Rule
from rrtc.model.graft_rrt import rule_of
from rrtc.model.linear_rrt import LinearRule
from rrtc.model.owner_rrt import OwnerRule
from rrtc.plan import Plan
from rrtc.stock.heads import LookedUp
from rrtc.stock.streamed import StreamedModel
from rrtc.text.lookups import Lookups, make_lookups

LOOKUP_WINDOWS = 8  # of text, at whose ends something is to be looked up


def rules(
    budget: KvBudget, plan: Plan, layers: Sequence[nn.Module], model: DenseModel | RecursiveModel
) -> dict[int, dict[str, Rule]]:
    """By layer, and by the name of each kind in each of the budget's ways that the layer can have, the rule by which no
    head sees everything. plan: of which visits there are. layers: of the stock model, with weights or without. model:
    whose feature maps are taken, as far as it has them."""
    owners = readable(plan, LAST_LOOP)

    def rule(way: KvBudget, kind: str, number: int) -> Rule:
        made = rule_of({"attention": way.kinds[kind][number].fields()})
        if kind == LAST_LOOP:
            return OwnerRule(made.window, made.sinks, made.heads, owner=owners[number])
        if isinstance(made, LinearRule):
            made = made.on(layers[number])
            if isinstance(model, RecursiveModel):
                model.keep_maps(number, made)
        return made

    return {
        number: {
            way.measured_as(kind): rule(way, kind, number)
            for way in budget.ways
            for kind in way.kinds
            if kind != LAST_LOOP or number in owners
        }
        for number in dict(budget.heads)
    }


def measured_ways(budget: KvBudget, calibration: Calibration) -> list[tuple[KvBudget, KindLosses]]:
    """Each way to spend the budget, with what each kind costs every two heads of a layer there, in nats a token; only
    of layers that can have it."""

    found = {layer: calibration.losses(layer) for layer in dict(budget.heads)}

    def losses(way: KvBudget, kind: str) -> WindowLosses:
        name = way.measured_as(kind)
        return {layer: of_kinds[name] for layer, of_kinds in found.items() if name in of_kinds}

    return [(way, {kind: losses(way, kind) for kind in way.kinds}) for way in budget.ways]


def lookups(
    budget: KvBudget, dense: DenseModel, model: StreamedModel, tokenizer, ids: Tensor, seed: int, folder: Path,
    device: torch.device, advance: Callable[[int], None],
) -> dict[Head, float]:  # fmt: skip
    """How much of its attention each head gives to what it is to look up in LOOKUP_WINDOWS windows of the calibration
    text `ids`, (windows, context). It is kept in `folder`. advance(windows) is called for each of them and layer."""
    file = folder / "lookups.json"
    if not file.exists():
        asked = make_lookups(ids[:LOOKUP_WINDOWS], tokenizer, seed)
        found = _measure(budget, dense, model, asked, device, advance)
        with whole_file(file) as temporary:
            temporary.write_text(json.dumps(found), encoding="utf8")
    by_layer = json.loads(file.read_text(encoding="utf8"))
    return {(layer, head): by_layer[str(layer)][head] for layer, head in budget.heads}


def _measure(
    budget: KvBudget, dense: DenseModel, model: StreamedModel, asked: Lookups, device: torch.device,
    advance: Callable[[int], None],
) -> dict[int, list[float]]:  # fmt: skip
    """By layer, what `lookups` says of each head."""
    states, found = model.embed(asked.ids), {}
    free, rule = dict(budget.heads), rule_of({"attention": budget.window.fields()})
    for number in range(dense.depth):
        tensors = dense.layer(number, device)
        if number not in free:
            model.run_layer(number, tensors, states, advance=advance)
            continue
        masses = []
        for row, wanted in enumerate(asked.wanted):
            looking = LookedUp([wanted])
            with model.attending(number, rule, looking.sight):
                model.run_layer(number, tensors, states[row : row + 1], advance=advance)
            masses.append(looking.mass)
        found[number] = torch.stack(masses).mean(0).tolist()
    return found
