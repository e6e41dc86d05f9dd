"""Exits that say something from the first step on: a linear map each, from where a loop ends to where the model ends.

What a loop leaves behind is so unlike what the final norm is used to that the head makes nothing of it. The map that
takes the one closest to the other, by least squares, is had from a few thousand tokens without training (the "tuned
lens", Belrose et al. 2023, arXiv 2303.08112, trains it), and training goes on from there.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from rrtc.model.graft_rrt import Visit, exit_of
from rrtc.model.modeling_rrt import RrtForCausalLM
from rrtc.plan import Plan
from rrtc.stock.architecture import decoder_layers
from rrtc.stock.parts import Parts, states_of

TOKENS_PER_INPUT = 16  # to fit a map by
RIDGE = 1e-4  # of the mean square of an input: what keeps a map that so few tokens say too little of from large numbers


def with_exits(plan: Plan) -> Plan:
    """`plan` with a map for every place where its model can be left early."""
    visits = (replace(visit, exit=place in plan.exits) for place, visit in enumerate(plan.visits))
    return replace(plan, visits=tuple(visits))


def add_exits(model: RrtForCausalLM, plan: Plan) -> None:
    """Gives the recursive `model` the maps that `plan` has and it has not; each leaves what it is given as it is."""
    for layer, visit in zip(decoder_layers(model), plan.visits, strict=True):
        if visit.exit and layer.exit is None:
            layer.exit = exit_of(model, visit.fields()).to(model.device, model.dtype)
            nn.init.eye_(layer.exit.weight)
    model.config.visits = [visit.fields() for visit in plan.visits]


def exits_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """The maps of all exits among the parameters of `model`, by their names."""
    visits = [(name, module) for name, module in model.named_modules() if isinstance(module, Visit)]
    return {f"{name}.exit.weight": visit.exit.weight for name, visit in visits if visit.exit is not None}


@torch.no_grad()
def fit_exits(model: RrtForCausalLM, places: Sequence[int], ids: Tensor) -> None:
    """Sets the maps of the exits after the layers at `places`, in place, to those that bring what these layers return
    for `ids` (windows, context), int64, closest to what the last one does.

    With x the former and y the latter, both (width,): A = argmin sum |A x - y|² / |y|² over the tokens. Each counts as
    much as any other, because norms at the end differ by orders of magnitude, and the final norm takes them out.
    """
    parts, last = Parts(model), len(model.config.visits) - 1
    width = model.config.get_text_config().hidden_size
    squares = {place: torch.zeros(width, width, dtype=torch.float64) for place in places}
    products = {place: torch.zeros(width, width, dtype=torch.float64) for place in places}
    for window in ids:
        _, outputs = parts.run(window[None].to(model.device), [*places, last])
        *starts, end = (states_of(output)[0].to("cpu", torch.float64) for output in outputs)
        norms = end.norm(dim=-1, keepdim=True)
        for place, start in zip(places, starts, strict=True):
            scaled = start / norms
            squares[place] += scaled.T @ scaled
            products[place] += scaled.T @ (end / norms)
    for place in places:
        ridge = RIDGE * squares[place].diagonal().mean() * torch.eye(width, dtype=torch.float64)
        fitted = torch.linalg.solve(squares[place] + ridge, products[place]).T
        decoder_layers(model)[place].exit.weight.copy_(fitted)
