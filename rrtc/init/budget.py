"""A plan under a budget: measures the curves of every layer and of every group that may share, and lets allocate.py
choose among them."""

from dataclasses import replace
from statistics import median

import torch

from rrtc.console import note, progress
from rrtc.errors import WrongUsage
from rrtc.init.allocate import Choice, Group, allocate, alone, or_apart, together, visits_of
from rrtc.init.calibrate import Calibration
from rrtc.init.dense import DenseModel
from rrtc.init.neurons import Neurons
from rrtc.plan import Plan


def plan_under_budget(
    pattern: Plan,
    free: bool,
    target: int,
    dense: DenseModel,
    calibration: Calibration,
    neurons: list[Neurons],
    device: torch.device,
) -> tuple[Plan, float]:
    """(the plan of at most `target` parameters, the nats a token it is predicted to cost).

    pattern: which layers are tied; with `free`, neighbours may be tied or not, and every part of them may be left
    untied. Raises WrongUsage where no plan is small enough.
    """
    groups: list[Group] = []
    layers = pattern.architecture.layers

    def seen(number):
        return calibration.seen(number, dense.layer(number, device))

    if free:
        before, single_before = None, None
        with progress("Measuring what each layer needs", len(layers)) as advance:
            for number in range(len(layers)):
                here = seen(number)
                single = alone(number, here, neurons)
                groups.append(single)
                if before is not None and layers[number] == layers[number - 1]:
                    pair = together((number - 1, number), [before, here], neurons)
                    groups.append(or_apart(pair, [single_before, single]))
                before, single_before = here, single
                advance()
    else:
        with progress("Measuring what each slot needs", len(pattern.slots)) as advance:
            for visits in pattern.slots:
                numbers = tuple(visit.layer for visit in visits)
                views = [seen(number) for number in numbers]
                one = len(numbers) == 1
                groups.append(alone(numbers[0], views[0], neurons) if one else together(numbers, views, neurons))
                advance()

    matrices = {number: layer.matrices for number, layer in enumerate(layers)}

    def plan_of(choices: list[Choice]) -> Plan:
        return replace(pattern, visits=tuple(visits_of(choices, matrices, neurons)))

    try:
        choices = allocate(len(layers), groups, lambda c: plan_of(c).parameters, target)
    except ValueError as error:
        raise WrongUsage(
            f"The budget of {target:,} parameters cannot be met: the least possible is {error.args[0]:,}.",
            "Ask for a larger one, or tie more layers (loops).",
        ) from error
    plan = plan_of(choices)
    predicted = sum(choice.cost for choice in choices)
    note(explain(plan, predicted, free))
    return plan, round(predicted, 4)


def explain(plan: Plan, predicted: float, free: bool) -> str:
    """What was chosen and why, in a few sentences for the user."""
    matrices = [(visit, m) for visit in plan.visits for m in plan.matrices(visit)]
    low = [visit.ranks[m.name] for visit, m in matrices if visit.form(m) == "low_rank"]
    kept = [
        visit.shape(m)[0] / m.inputs
        for visit in plan.visits
        for m in plan.matrices(visit)
        if visit.shape(m)[0] < m.inputs
    ]
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
