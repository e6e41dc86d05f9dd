"""A plan under a size or a budget: measures the curves of every layer and of every group that may share, and lets
allocate.py choose among them."""

import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from rrtc.architecture import Layer
from rrtc.console import progress
from rrtc.init.allocate import (
    WIDTHS,
    Choice,
    Curve,
    Group,
    TooSmall,
    Way,
    allocate,
    alone,
    or_apart,
    together,
    visits_of,
)
from rrtc.init.calibrate import Calibration
from rrtc.init.lineup import Lineup
from rrtc.io.dense import DenseModel
from rrtc.io.folder import whole_file
from rrtc.plan import Plan
from rrtc.storage import PLAIN, Numbers
from rrtc.target import Target
from rrtc.tying.neurons import Neurons, Removal
from rrtc.tying.whiten import Seen


def measure_groups(
    pattern: Plan,
    free: bool,
    dense: DenseModel,
    calibration: Calibration,
    neurons: list[Neurons],
    device: torch.device,
    work: Path,
    most: int | None = None,
    called: str = "",
    stored: Numbers = PLAIN,
) -> list[Group]:
    """The choices there are for every slot of `pattern`; with `free`, for every layer by itself and for every two
    neighbors that are alike, any part of which may be left untied. Each is kept in the folder `work` once it is
    measured, and taken from there. most: of so many slots of a kind, and of the first and the last; the others are
    taken to be like the nearest that was measured. called: the name of this work for its progress. stored: what all of
    it will be stored in."""
    views: dict[int, dict[str, Seen]] = {}  # of the layers of the group at hand

    def seen(number: int) -> dict[str, Seen]:
        if number not in views:
            views[number] = calibration.seen(number, dense.layer(number, device))
        return views[number]

    def measured(numbers: tuple[int, ...]) -> Group:
        if len(numbers) == 1:
            return _kept(numbers, work, lambda: alone(numbers[0], seen(numbers[0]), neurons, stored))
        singles = [measured((number,)) for number in numbers] if free else []

        def measure():
            # Where a choice was free, a shared FFN narrower than the dense one was never chosen (benchmarks/LOG.md).
            widths = (1.0,) if free else WIDTHS
            group = together(numbers, [seen(number) for number in numbers], neurons, widths, stored)
            return or_apart(group, singles) if free else group

        return _kept(numbers, work, measure)

    layers = pattern.architecture.layers
    if free:
        alike = [number and layers[number] == layers[number - 1] for number in range(len(layers))]
        wanted = [(number - 1, number) if alike[number] else (number,) for number in range(len(layers))]
    else:
        wanted = [tuple(visit.layer for visit in visits) for visits in pattern.slots]
    chosen = wanted if most is None else _some(pattern, wanted, most)
    missing = [numbers for numbers in chosen if not _file_of(numbers, work).exists()]
    with progress(called, len(chosen), len(chosen) - len(missing)) as advance:
        for numbers in missing:
            for number in views.keys() - set(numbers):
                del views[number]
            measured(numbers)
            advance()
    if free:  # every layer by itself, too
        wanted += [numbers[1:] for numbers in wanted if len(numbers) == 2]
    if most is None:
        return [measured(numbers) for numbers in wanted]
    found = {numbers: measured(numbers) for numbers in chosen}
    return [found[_nearest(pattern, numbers, chosen)].of(numbers) for numbers in wanted]


def _some(pattern: Plan, wanted: list[tuple[int, ...]], most: int) -> list[tuple[int, ...]]:
    """Of the layers of slots `wanted` so many of each kind, spread evenly, and those of the first and the last layer,
    which are like no others."""
    last, kinds = len(pattern.visits) - 1, defaultdict(list)
    for numbers in wanted:
        if not {0, last} & set(numbers):
            kinds[_kind(pattern, numbers)].append(numbers)
    spread = set()
    for alike in kinds.values():
        count = min(most, len(alike))
        spread |= {alike[int((place + 0.5) * len(alike) / count)] for place in range(count)}
    return [numbers for numbers in wanted if numbers in spread or {0, last} & set(numbers)]


def _kind(pattern: Plan, numbers: tuple[int, ...]) -> tuple[int, Layer]:
    """What layers that share a slot have in common with others that do."""
    return len(numbers), pattern.architecture.layers[numbers[0]]


def _nearest(pattern: Plan, numbers: tuple[int, ...], chosen: list[tuple[int, ...]]) -> tuple[int, ...]:
    alike = [other for other in chosen if _kind(pattern, other) == _kind(pattern, numbers)]
    last = len(pattern.visits) - 1
    inner = [other for other in alike if not {0, last} & set(other)]
    return numbers if numbers in alike else min(inner or alike, key=lambda other: abs(other[0] - numbers[0]))


def _file_of(numbers: tuple[int, ...], work: Path) -> Path:
    return work / f"group-{'-'.join(map(str, numbers))}.pt"


def _kept(numbers: tuple[int, ...], work: Path, measure: Callable[[], Group]) -> Group:
    """The group of the layers `numbers` from its file in `work`, which is made where there is none."""
    file = _file_of(numbers, work)
    if not file.exists():
        contents = io.BytesIO()  # torch itself would not say that a disk is full
        torch.save(measure(), contents)
        with whole_file(file) as temporary:
            temporary.write_bytes(contents.getvalue())
    kinds = [Group, Way, Curve, Lineup, Removal]  # and nothing else, so that reading runs no code
    with torch.serialization.safe_globals(kinds):
        return torch.load(file, weights_only=True)


def plan_under(pattern: Plan, groups: list[Group], target: Target, neurons: list[Neurons]) -> tuple[Plan, float]:
    """(the plan that `target` allows, the nats a token it is predicted to cost), chosen among `groups`.

    Raises WrongUsage where no plan is small enough.
    """
    matrices = {number: layer.matrices for number, layer in enumerate(pattern.architecture.layers)}

    def plan_of(choices: list[Choice]) -> Plan:
        return replace(pattern, visits=tuple(visits_of(choices, matrices, neurons)))

    try:
        choices = allocate(len(matrices), groups, lambda c: target.taken(plan_of(c)), target.limit, target.number)
    except TooSmall as error:
        target.check(error.least)
        raise
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
        said.append("Nothing is tied: at this size every layer is cheaper by itself")
    if kept:
        said.append(f"{len(kept)} FFNs keep {min(kept):.0%} to {max(kept):.0%} of their neurons")
    if low:
        said.append(f"{len(low)} of {len(matrices)} matrices are of low rank (median {median(low):.0f})")
    bound = f"On the calibration text this costs at least about {predicted:.2f} nats a token"
    return "; ".join(said) + f". {bound}: each change by itself, to second order; what they do together comes on top."
