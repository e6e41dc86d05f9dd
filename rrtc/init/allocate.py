"""Where to tie and how much to relax, under a size or a budget.

Everything that can be chosen has a curve: how many numbers are stored, and how many nats a token that is predicted to
cost (whiten.py: all in one unit, so that costs of different layers and matrices add up). At a price per stored number
each choice is made on its own, by the least of cost + price x numbers; the price at which all of them together meet the
limit is found by bisection. For convex curves this is the optimum (Everett 1963); these are nearly so.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from rrtc.architecture import Matrix
from rrtc.init.lineup import Lineup, line_up
from rrtc.plan import Visit
from rrtc.storage import PLAIN, Numbers
from rrtc.tying.joint import joint_costs
from rrtc.tying.neurons import Neurons, Removal, narrowed
from rrtc.tying.whiten import Seen, costs_by_rank

WIDTHS = (1.0, 0.75, 0.5)  # of an FFN, at which there are curves over the ranks of its matrices
FULL = -1  # the setting of a matrix that is stored as it is


class TooSmall(Exception):
    """No choice is small enough; `least` is what the smallest takes."""

    def __init__(self, least: int):
        self.least = least


@dataclass(frozen=True)
class Curve:
    """The settings of one matrix, or of an FFN by the matrix that reads its neurons, in `layers`.

    kind "tied": LoRA ranks, where the layers share W'; "low_rank": ranks without W', or FULL; "neurons": widths of an
    FFN with whole matrices. settings[i] stores numbers[i] numbers in all, or what takes as much as so many, and costs
    costs[i] nats a token; float64.
    """

    kind: str
    layers: tuple[int, ...]
    subject: str
    settings: list[int]
    numbers: Tensor
    costs: Tensor


@dataclass(frozen=True)
class Way:
    """One way to store a part of a layer: its curves, after an FFN was `narrowed` at `cost` nats, in each entry
    (layers, reader, width)."""

    curves: tuple[Curve, ...]
    narrowed: tuple[tuple[tuple[int, ...], str, int], ...] = ()
    cost: float = 0.0


@dataclass(frozen=True)
class Group:
    """Layers that share a slot, or one alone. Each of `parts` is a matrix or an FFN: the ways there are to store it.
    lineups: of the FFNs of these very layers, where they were looked at."""

    layers: tuple[int, ...]
    parts: tuple[tuple[Way, ...], ...]
    lineups: tuple[Lineup, ...] = ()

    def of(self, layers: tuple[int, ...]) -> "Group":
        """The same choices for other layers, as many, which are taken to be like these."""
        turned = dict(zip(self.layers, layers, strict=True))

        def others(numbers: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(turned[number] for number in numbers)

        def way(one: Way) -> Way:
            curves = tuple(replace(curve, layers=others(curve.layers)) for curve in one.curves)
            return replace(one, curves=curves, narrowed=tuple((others(n), *rest) for n, *rest in one.narrowed))

        return Group(layers, tuple(tuple(map(way, ways)) for ways in self.parts))


@dataclass(frozen=True)
class Choice:
    """What was chosen for a group: for each part a way, and the index of a setting on each of its curves."""

    group: Group
    ways: tuple[tuple[Way, tuple[int, ...]], ...]

    @property
    def numbers(self) -> float:
        return sum(c.numbers[i].item() for way, indices in self.ways for c, i in zip(way.curves, indices, strict=True))

    @property
    def cost(self) -> float:
        """Nats a token that it is predicted to cost."""
        return sum(
            way.cost + sum(c.costs[i].item() for c, i in zip(way.curves, indices, strict=True))
            for way, indices in self.ways
        )


def alone(layer: int, seen: Mapping[str, Seen], neurons: list[Neurons], stored: Numbers = PLAIN) -> Group:
    """The choices for a layer that shares nothing: each matrix whole or of low rank, an FFN with fewer neurons. `seen`:
    its matrices, by path, of which one, or those of one FFN, are asked for at a time. stored: what they will be stored
    in."""
    in_ffn = {name for inner in neurons for name in inner.matrices}
    parts = [(Way((_low_rank(layer, name, seen[name], stored),)),) for name in seen if name not in in_ffn]
    lineups = []
    for inner in neurons:
        ffn = {name: seen[name] for name in inner.matrices}
        lineups.append(line_up((layer,), [ffn], inner, removes=True))
        gone = lineups[-1].gone
        widths = [inner.width - count for count in gone.removed]
        sizes = [_ffn_size(ffn, inner, width, stored) for width in widths]
        numbers = torch.tensor(sizes, dtype=torch.float64)
        ways = [Way((Curve("neurons", (layer,), inner.reader, widths, numbers, gone.costs),))]
        for width, cost, kept in _grid(inner, gone, WIDTHS):
            curves = tuple(
                _low_rank(layer, name, narrowed(name, one, inner, kept), stored) for name, one in ffn.items()
            )
            ways.append(Way(curves, (((layer,), inner.reader, width),), cost))
        parts.append(tuple(ways))
    return Group((layer,), tuple(parts), tuple(lineups))


def together(
    layers: tuple[int, ...],
    seen: list[Mapping[str, Seen]],
    neurons: list[Neurons],
    widths: tuple[float, ...] = WIDTHS,
    stored: Numbers = PLAIN,
) -> Group:
    """The choices for layers that share a slot, all of whose matrices are tied. `seen`, `stored`: as for `alone`.
    widths: of a shared FFN, as parts of the dense one."""
    in_ffn = {name for inner in neurons for name in inner.matrices}
    parts = [(Way((_tied(layers, name, [s[name] for s in seen], stored),)),) for name in seen[0] if name not in in_ffn]
    lineups = []
    for inner in neurons:
        ffns = [{name: one[name] for name in inner.matrices} for one in seen]
        lineup = line_up(layers, ffns, inner, removes=min(widths) < 1)
        lineups.append(lineup)
        ways = []
        for width, cost, kept in _grid(inner, lineup.gone, widths):
            turned = ((name, lineup.turned(name, [ffn[name] for ffn in ffns], inner)) for name in inner.matrices)
            curves = tuple(
                _tied(layers, name, [narrowed(name, one, inner, kept) for one in group], stored)
                for name, group in turned
            )
            ways.append(Way(curves, ((layers, inner.reader, width),), cost))
        parts.append(tuple(ways))
    return Group(layers, tuple(parts), tuple(lineups))


def or_apart(group: Group, singles: list[Group]) -> Group:
    """`group` with further ways: each of its parts can also be stored for every layer by itself, as in `singles`."""
    parts = []
    for ways, *others in zip(group.parts, *(one.parts for one in singles), strict=True):
        apart = [
            Way(
                sum((w.curves for w in combination), ()),
                sum((w.narrowed for w in combination), ()),
                sum(w.cost for w in combination),
            )
            for combination in product(*others)
        ]
        parts.append((*ways, *apart))
    return Group(group.layers, tuple(parts), group.lineups)


def _ffn_size(ffn: Mapping[str, Seen], inner: Neurons, width: int, stored: Numbers) -> float:
    """What the matrices of an FFN take with so many of its neurons, in numbers."""
    size = 0.0
    for name, one in ffn.items():
        outputs, inputs = one.weight.shape
        narrow = (outputs, width) if name == inner.reader else (outputs // inner.width * width, inputs)
        size += stored.matrix(*narrow)
    return size


def _low_rank(layer: int, name: str, seen: Seen, stored: Numbers) -> Curve:
    outputs, inputs = seen.weight.shape
    costs, full = costs_by_rank(seen.weight, seen.inputs, seen.gradients), float(stored.matrix(outputs, inputs))
    # At least 1, and less than where the factors are larger than the matrix.
    ranks = range(1, max(2, math.ceil(full / (outputs + inputs))))
    numbers = [float(rank * (outputs + inputs)) for rank in ranks] + [full]
    costs = torch.cat([costs[1 : 1 + len(ranks)].cpu(), torch.zeros(1, dtype=torch.float64)])
    return Curve("low_rank", (layer,), name, [*ranks, FULL], torch.tensor(numbers, dtype=torch.float64), costs)


def _tied(layers: tuple[int, ...], name: str, group: list[Seen], stored: Numbers) -> Curve:
    outputs, inputs = group[0].weight.shape
    costs = joint_costs(group).cpu()
    ranks = torch.arange(len(costs), dtype=torch.float64)
    numbers = stored.matrix(outputs, inputs) + len(layers) * ranks * (outputs + inputs)
    return Curve("tied", layers, name, list(range(len(costs))), numbers, costs)


def _grid(inner: Neurons, gone: Removal, widths: tuple[float, ...]) -> list[tuple[int, float, Tensor]]:
    """(width, nats lost, kept neurons) at the steps of `gone` nearest to `widths`, as parts of all neurons."""
    found = []
    for share in widths:
        step = min(range(len(gone.removed)), key=lambda s: abs(inner.width - gone.removed[s] - share * inner.width))
        found.append((inner.width - gone.removed[step], gone.costs[step].item(), gone.kept(step)))
    return found


def choose(depth: int, groups: list[Group], price: float) -> list[Choice]:
    """At `price` nats a number, the groups that together stand for every layer once, and the best of their settings.

    Groups must be of neighboring layers, unless there is only one way to have every layer once.
    """
    choices = [_best(group, price) for group in sorted(groups, key=lambda group: len(group.layers))]
    if sum(len(group.layers) for group in groups) == depth:
        return choices
    values = [0.0] + [math.inf] * depth  # of the best choice for the layers before this one
    last: list[Choice | None] = [None] * (depth + 1)
    for end in range(1, depth + 1):
        for choice in choices:
            layers = choice.group.layers
            if layers[-1] + 1 == end:
                value = values[layers[0]] + choice.cost + price * choice.numbers
                if value < values[end] - 1e-12:  # a group must be better than its layers apart, not equally good
                    values[end], last[end] = value, choice
    found: list[Choice] = []
    while depth:
        found.insert(0, last[depth])
        depth = last[depth].group.layers[0]
    return found


def _best(group: Group, price: float) -> Choice:
    chosen = []
    for ways in group.parts:
        options = []
        for way in ways:
            found = [(curve.costs + price * curve.numbers).min(0) for curve in way.curves]
            value = way.cost + sum(minimum.values.item() for minimum in found)
            options.append((value, way, tuple(int(minimum.indices) for minimum in found)))
        _, way, indices = min(options, key=lambda option: option[0])
        chosen.append((way, indices))
    return Choice(group, tuple(chosen))


def allocate(
    depth: int, groups: list[Group], taken: Callable[[list[Choice]], int], limit: int, number: int = 1
) -> list[Choice]:
    """The choices of which as much as possible is `taken` up to the `limit`. number: what one more number takes.

    Raises TooSmall where even the smallest are above it.
    """
    low, high = 1e-14, 1e2  # nats a number: at the one everything is stored whole, at the other nothing
    best = choose(depth, groups, high)
    if taken(best) > limit:
        raise TooSmall(taken(best))
    for _ in range(60):
        price = math.sqrt(low * high)
        choices = choose(depth, groups, price)
        if taken(choices) > limit:
            low = price
        else:
            best, high = choices, price
    return _filled(best, taken, limit, number)


def _filled(choices: list[Choice], taken: Callable[[list[Choice]], int], limit: int, number: int) -> list[Choice]:
    """`choices` with what curves that jump have left of the limit spent on the settings that gain most for it."""
    while True:
        steps, room = [], (limit - taken(choices)) // number
        for at, choice in enumerate(choices):
            for part, (way, indices) in enumerate(choice.ways):
                for place, (curve, index) in enumerate(zip(way.curves, indices, strict=True)):
                    more, gain = curve.numbers - curve.numbers[index], curve.costs[index] - curve.costs
                    worth = torch.where((more > 0) & (more <= room) & (gain > 0), gain / more, -1.0)
                    value, better = worth.max(0)
                    if value > 0:
                        steps.append((value.item(), at, part, place, int(better)))
        if not steps:
            return choices
        _, at, part, place, better = max(steps)
        way, indices = choices[at].ways[part]
        ways = list(choices[at].ways)
        ways[part] = (way, (*indices[:place], better, *indices[place + 1 :]))
        choices = [*choices[:at], replace(choices[at], ways=tuple(ways)), *choices[at + 1 :]]


def visits_of(choices: list[Choice], matrices: dict[int, tuple[Matrix, ...]], neurons: list[Neurons]) -> list[Visit]:
    """The visits of a plan, in the order of the layers. `matrices`: of each layer."""
    visits = []
    first_layers = sorted(choice.group.layers[0] for choice in choices)
    for choice in choices:
        layers = choice.group.layers
        for loop, layer in enumerate(layers):
            ranks, forms, widths = {m.name: 0 for m in matrices[layer]}, {}, {}
            for way, indices in choice.ways:
                for narrow_layers, reader, width in way.narrowed:
                    if layer in narrow_layers:
                        widths[reader] = width
                for curve, index in zip(way.curves, indices, strict=True):
                    if layer not in curve.layers:
                        continue
                    setting = curve.settings[index]
                    if curve.kind == "neurons":
                        widths[curve.subject] = setting
                        own = next(inner.matrices for inner in neurons if inner.reader == curve.subject)
                        forms |= dict.fromkeys(own, "own")
                    elif curve.kind == "low_rank":
                        forms[curve.subject] = "own" if setting == FULL else "low_rank"
                        ranks[curve.subject] = max(setting, 0)
                    else:
                        ranks[curve.subject] = setting
            if len(layers) == 1:  # the slot is this layer's own
                forms = {name: form for name, form in forms.items() if form != "own"}
            shapes = {}
            for inner in neurons:
                width = widths.get(inner.reader, inner.width)
                if width < inner.width:
                    for m in matrices[layer]:
                        if m.name == inner.reader:
                            shapes[m.name] = (width, m.outputs)
                        elif m.name in inner.producers:
                            shapes[m.name] = (m.inputs, m.outputs // inner.width * width)
            visits.append(Visit(layer, first_layers.index(layers[0]), loop, ranks, forms, shapes))
    return sorted(visits, key=lambda visit: visit.layer)
