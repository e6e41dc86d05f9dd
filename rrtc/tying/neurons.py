"""The inner dimension of an FFN: finding it, lining up the neurons of tied layers, and removing the least needed ones.

A neuron is one row of the matrices that produce the inner activations (gate and up) and one column of the matrix that
reads them (down). Reordering neurons leaves the layer's function as it is, and so does turning the signs of a row and a
column where the activation is linear in that row. Which matrices these are is not written down anywhere: one layer is
run on random weights and watched.
"""

from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rrtc.tying.moments import BLOCK, Moment
from rrtc.tying.whiten import Seen

STEPS = 96  # neurons are removed in about so many steps, after each of which the others are weighed again
# What is left is a multiple of this: matrix kernels are made for such widths, those of quantized weights for no others.
ALIGNED = 32


@dataclass(frozen=True)
class Neurons:
    """`width` neurons. reader: the matrix whose inputs they are. producers: the matrices whose outputs they come from;
    a fused one has several rows a neuron, one in each of its equal parts. signed: those producers in which the neuron
    is linear, so that turning its sign there and in the reader changes nothing."""

    reader: str
    producers: tuple[str, ...]
    signed: tuple[str, ...]
    width: int

    @property
    def matrices(self) -> tuple[str, ...]:
        return (*self.producers, self.reader)


def reordered(layer: dict[str, Tensor], neurons: Neurons, index: Tensor, signs: Tensor | None = None) -> dict:
    """The tensors of one layer, or some of them, with the neurons of `index` only, in its order, each times its sign.
    Matrices are (outputs, inputs); the input is left as it is."""
    result = dict(layer)
    for producer in neurons.producers:
        turns = signs if producer in neurons.signed else None
        for name in (f"{producer}.weight", f"{producer}.bias"):
            if name in layer:
                parts = layer[name].unflatten(0, (-1, neurons.width))[:, index]  # (parts, neurons, …)
                if turns is not None:
                    parts = parts * turns.view(1, -1, *[1] * (parts.dim() - 2))
                result[name] = parts.flatten(0, 1)
    name = f"{neurons.reader}.weight"
    if name in layer:
        columns = layer[name][:, index]
        result[name] = columns if signs is None or not neurons.signed else columns * signs
    return result


def reordered_seen(name: str, seen: Seen, neurons: Neurons, index: Tensor, signs: Tensor | None = None) -> Seen:
    """As `reordered`, for one of the neurons' matrices with the moments of their activations or gradients."""
    weight = reordered({f"{name}.weight": seen.weight}, neurons, index, signs)[f"{name}.weight"]
    if name == neurons.reader:
        return Seen(weight, seen.inputs.of(index, signs if neurons.signed else None), seen.gradients)
    parts = len(seen.weight) // neurons.width
    rows = torch.cat([index + part * neurons.width for part in range(parts)])
    turns = signs.repeat(parts) if signs is not None and name in neurons.signed else None
    return Seen(weight, seen.inputs, seen.gradients.of(rows, turns))


def narrowed(name: str, seen: Seen, neurons: Neurons, kept: Tensor) -> Seen:
    """How one of the neurons' matrices is seen with the `kept` neurons alone, the reader refitted to them."""
    if len(kept) == neurons.width:
        return seen
    if name == neurons.reader:
        return Seen(refitted(seen, kept), seen.inputs.of(kept), seen.gradients)
    return reordered_seen(name, seen, neurons, kept)


def align(first: dict[str, Seen], second: dict[str, Seen], neurons: Neurons) -> tuple[Tensor, Tensor]:
    """(index, signs), each (width,): the order and signs of the second layer's neurons that make them most like the
    first's. `first` and `second` hold how the matrices of both layers are seen, by path.

    Likeness is the inner product of rows and columns in the metric of whiten.py, with the diagonal of the neurons' own
    moment; the assignment is the best of all (Hungarian algorithm).
    """
    # Likeness is the sum of (rows of the first, scaled) @ (columns of the second); and whether signs turn it.
    terms: list[tuple[bool, Tensor, Tensor, Tensor]] = []
    for name in neurons.matrices:
        a, b = first[name], second[name]
        turned = bool(neurons.signed) and name in (*neurons.signed, neurons.reader)
        if name == neurons.reader:
            columns = Moment.pooled([a.gradients, b.gradients]).times(b.weight).mul_(_sizes(b.inputs))
            terms.append((turned, a.weight.T, _sizes(a.inputs), columns))
        else:
            inputs = Moment.pooled([a.inputs, b.inputs])
            parts = [m.weight.unflatten(0, (-1, neurons.width)) for m in (a, b)]
            sizes = [_sizes(m.gradients).unflatten(0, (-1, neurons.width)) for m in (a, b)]
            for rows, others, size, other_size in zip(*parts, *sizes, strict=True):
                terms.append((turned, rows, size, inputs.times(others.T).mul_(other_size)))

    def likeness(block: slice, wanted: bool) -> Any:  # a tensor, or 0
        return sum(
            rows[block] @ columns * size[block, None] for turned, rows, size, columns in terms if turned is wanted
        )

    # Filled some rows at a time, negative and in float64, because the assignment would make a copy of anything else.
    cost = torch.empty(neurons.width, neurons.width, dtype=torch.float64)
    for start in range(0, neurons.width, BLOCK):
        block = slice(start, start + BLOCK)
        cost[block] = -(likeness(block, False) + abs(likeness(block, True)))
    _, index = linear_sum_assignment(cost.numpy())
    del cost
    index = torch.from_numpy(index).to(first[neurons.reader].weight.device)
    signed: Any = sum((rows * columns[:, index].T).sum(1) for turned, rows, _, columns in terms if turned)
    signs = torch.ones(neurons.width, device=index.device)
    return index, signs.masked_fill_(signed < 0, -1) if neurons.signed else signs


def _sizes(moment: Moment) -> Tensor:
    return moment.diagonal.sqrt()


@dataclass(frozen=True)
class Removal:
    """Neurons in the order in which they go, least needed first. `costs[s]` nats a token are lost when the first
    `removed[s]` are gone and the reader's other columns make up for them as well as they can."""

    order: Tensor
    removed: list[int]
    costs: Tensor
    width: int

    @classmethod
    def none(cls, width: int) -> "Removal":
        """All neurons stay."""
        return cls(torch.zeros(0, dtype=torch.long), [0], torch.zeros(1, dtype=torch.float64), width)

    def kept(self, step: int) -> Tensor:
        """The neurons that are left after `step` steps, in their old order."""
        gone = torch.zeros(self.width, dtype=torch.bool, device=self.order.device)
        gone[self.order[: self.removed[step]]] = True
        return (~gone).nonzero()[:, 0]


def removal(readers: list[Seen]) -> Removal:
    """How to remove neurons from layers that share them (or from one), least costly first.

    Removing neurons J from a reader W and refitting the others costs tr(G W_J ((C^-1)_JJ)^-1 W_J^T) / 2 (optimal brain
    surgeon, Hassibi and Stork 1993, for whole columns; the update keeps W and C^-1 exact for the next step). A quarter
    of the neurons always stays.
    """
    width = readers[0].weight.shape[1]
    step = _step(width)
    states = [(s.inputs.inverse(), s.gradients.root_times(s.weight)) for s in readers]
    gone = torch.zeros(width, dtype=torch.bool, device=readers[0].weight.device)
    order, removed, costs = [], [0], [0.0]
    while removed[-1] + step <= width - max(1, width // 4):
        needed: Any = sum(columns.square().sum(0) / inverse.diagonal for inverse, columns in states)
        chosen = needed.masked_fill(gone, torch.inf).topk(step, largest=False).indices
        cost = costs[-1]
        for inverse, columns in states:
            schur, rows = inverse.remove(chosen)
            lost = columns[:, chosen].double()
            cost += 0.5 * (lost @ schur * lost).sum().item()
            columns.addmm_(lost.float(), (schur @ rows).float(), alpha=-1)
            columns[:, chosen] = 0
        gone[chosen] = True
        order.append(chosen)
        removed.append(removed[-1] + step)
        costs.append(cost)
    none = gone.new_zeros(0, dtype=torch.long)
    return Removal(torch.cat([none, *order]), removed, torch.tensor(costs, dtype=torch.float64), width)


def _step(width: int) -> int:
    """How many of `width` neurons go at a time: a multiple of ALIGNED, or of as large a power of two as divides the
    width and lets it fall in 24 steps or more."""
    unit = min(ALIGNED, width & -width, 1 << (max(1, width // 24).bit_length() - 1))
    return max(unit, round(width / STEPS / unit) * unit)


def refitted(reader: Seen, kept: Tensor) -> Tensor:
    """The reader's weight on the `kept` neurons that comes closest to the whole: (outputs, kept).

    W C_:K (C_KK)^-1 minimizes E |W x - V x_K|^2, in every metric of the outputs.
    """
    moment, found = reader.inputs.of(kept), reader.weight.new_empty(len(reader.weight), len(kept))
    for start in range(0, len(found), BLOCK):
        rows = slice(start, start + BLOCK)
        found[rows] = moment.solve(reader.inputs.times(reader.weight[rows].T.double())[kept]).T
    return found
