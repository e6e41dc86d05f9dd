"""A plan under a budget: measures the curves of every layer and of every group that may share, and lets allocate.py
choose among them."""

from dataclasses import replace
from statistics import median

import torch

from rrtc.console import progress
from rrtc.init.allocate import Choice, Group, TooSmall, allocate, alone, or_apart, together, visits_of
from rrtc.init.calibrate import Calibration
from rrtc.init.dense import DenseModel
from rrtc.init.neurons import Neurons
from rrtc.plan import Plan, too_small


def measure_groups(
    pattern: Plan,
    free: bool,
    dense: DenseModel,
    calibration: Calibration,
    neurons: list[Neurons],
    device: torch.device,
) -> list[Group]:
    """The choices there are for every slot of `pattern`; with `free`, for every layer by itself and for every two
    neighbours that are alike, any part of which may be left untied."""
    layers = pattern.architecture.layers
    groups: list[Group] = []

    def seen(number):
        return calibration.seen(number, dense.layer(number, device))

    if not free:
        with progress("Measuring what each slot needs", len(pattern.slots)) as advance:
            for visits in pattern.slots:
                numbers = tuple(visit.layer for visit in visits)
                views = [seen(number) for number in numbers]
                one = len(numbers) == 1
                groups.append(alone(numbers[0], views[0], neurons) if one else together(numbers, views, neurons))
                advance()
        return groups
    with progress("Measuring what each layer needs", len(layers)) as advance:
        before, single_before = None, None
        for number in range(len(layers)):
            here = seen(number)
            single = alone(number, here, neurons)
            groups.append(single)
            if before is not None and layers[number] == layers[number - 1]:
                # At full width alone: a narrower shared FFN was never chosen (benchmarks/LOG.md).
                pair = together((number - 1, number), [before, here], neurons, widths=(1.0,))
                groups.append(or_apart(pair, [single_before, single]))
            before, single_before = here, single
            advance()
    return groups


def plan_under_budget(pattern: Plan, groups: list[Group], target: int, neurons: list[Neurons]) -> tuple[Plan, float]:
    """(the plan of at most `target` parameters, the nats a token it is predicted to cost), chosen among `groups`.

    Raises WrongUsage where no plan is small enough.
    """
    matrices = {number: layer.matrices for number, layer in enumerate(pattern.architecture.layers)}

    def plan_of(choices: list[Choice]) -> Plan:
        return replace(pattern, visits=tuple(visits_of(choices, matrices, neurons)))

    try:
        choices = allocate(len(matrices), groups, lambda c: plan_of(c).parameters, target)
    except TooSmall as error:
        raise too_small(target, error.least) from error
    return plan_of(choices), sum(choice.cost for choice in choices)


def explain(plan: Plan, predicted: float, free: bool) -> str:
    """What was chosen and why, in a few sentences for the user."""
    matrices = [(visit, m) for visit in plan.visits for m in plan.matrices(visit)]
    low = [visit.ranks[m.name] for visit, m in matrices if visit.form(m) == "low_rank"]
    kept = [visit.shape(m)[0] / m.inputs for visit, m in matrices if visit.shape(m)[0] < m.inputs]
    groups = [visits for visits in plan.slots if len(visits) > 1]
    said = []
    if groups:
        said.append(f"{sum(map(len, groups))} of {len(plan.visits)} layers share {len(groups)} slots")
    elif free:
        said.append("Nothing is tied: at this budget every layer is cheaper by itself")
    if kept:
        said.append(f"{len(kept)} FFNs keep {min(kept):.0%} to {max(kept):.0%} of their neurons")
    if low:
        said.append(f"{len(low)} of {len(matrices)} matrices are of low rank (median {median(low):.0f})")
    return "; ".join(said) + f". Predicted to cost {predicted:.2f} nats a token, to second order."
