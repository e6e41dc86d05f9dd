"""Joint choice of the shared matrix and all LoRA factors of a tie group, weighted by what the loss sees (whiten.py).

Minimized is the sum over the visits b of the cost of W' + B_b A_b in place of W_b: tr(G E_b C_b E_b^T) / 2 with E_b =
W_b - W' - B_b A_b, C_b the moment of the inputs of visit b, and G the mean over the visits of their gradients' moments.

For given factors the best W' is the mean of the W_b - B_b A_b weighted by the C_b (RegMean; Jin et al., arXiv
2212.09849). For two visits, putting it in leaves a cost of D - (B_1 A_1 - B_2 A_2) alone, where D = W_1 - W_2, in the
metric of the parallel sum H = C_1 (C_1 + C_2)^-1 C_2. As B_1 A_1 - B_2 A_2 can be any matrix of rank 2r, the optimum is
the truncation of G^1/2 D H^1/2 to rank 2r, half of its components for each visit. (The paper's Average + SVD spends
both adapters on the same r components.) For more visits W' and the factors are improved in turn, from the mean, which
is no saddle for these, and with momentum (Nesterov), which gets as far in 8 turns as 16 to 24 without.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rrtc.tying.moments import BLOCK, Moment
from rrtc.tying.tie import zero_product
from rrtc.tying.whiten import Seen, costs_by_rank, spectrum

SWEEPS = 8  # of the alternation for three visits and more; with twice as many the cost is 1 to 4 % lower


@dataclass(frozen=True)
class Joint:
    """shared: W' (outputs, inputs); factors: (B, A) for each visit."""

    shared: Tensor
    factors: list[tuple[Tensor, Tensor]]

    def cost(self, group: list[Seen]) -> float:
        """Nats a token that the group loses to second order, each visit by its own C and G."""
        pairs = zip(group, self.factors, strict=True)
        return sum(seen.cost(seen.weight - self.shared - b @ a) for seen, (b, a) in pairs)


def joint_costs(group: list[Seen]) -> Tensor:
    """Nats a token lost with the group tied, for LoRA rank 0, 1, … min(outputs, inputs) of each visit: float64.

    Exact for two visits, but for their gradients' being pooled. For more it is the cost with W' at its optimum for rank
    0, an upper bound.
    """
    gradients = Moment.pooled([seen.gradients for seen in group])
    if len(group) == 2:
        costs = costs_by_rank(*_difference(group), gradients)
        return torch.cat([costs[::2], costs.new_zeros(len(costs) - len(costs[::2]))])
    shared = _shared(group)
    first, *others = [costs_by_rank(seen.weight - shared, seen.inputs, gradients) for seen in group]
    return sum(others, first)


def joint(group: list[Seen], rank: int) -> Joint:
    """The best shared matrix and factors of `rank` for each visit of the group."""
    gradients = Moment.pooled([seen.gradients for seen in group])
    if rank == 0:
        empty = [(s.weight.new_zeros(len(s.weight), 0), s.weight.new_zeros(0, s.weight.shape[1])) for s in group]
        return Joint(_shared(group), empty)
    if len(group) == 2:
        difference = spectrum(*_difference(group), gradients, 2 * rank)
        # Every other component, so that both visits get as much of the large ones.
        first = difference.factors(slice(0, 2 * rank, 2))
        b, a = difference.factors(slice(1, 2 * rank, 2))
        factors = [_padded(*first, rank), _padded(-b, a, rank)]
        return Joint(_shared(group, factors), factors)
    factors, before, shared = [], None, _shared(group)
    for sweep in range(SWEEPS):
        ahead = shared if before is None else shared + sweep / (sweep + 2) * (shared - before)
        found = (spectrum(seen.weight - ahead, seen.inputs, gradients, rank) for seen in group)
        factors = [components.factors(slice(0, rank)) for components in found]
        before, shared = shared, _shared(group, factors)
    return Joint(shared, factors)


def _difference(group: list[Seen]) -> tuple[Tensor, Moment]:
    """(W_1 - W_2, the parallel sum of the moments of their inputs)."""
    first, second = group
    return first.weight - second.weight, Moment.parallel(first.inputs, second.inputs)


def _padded(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B, A) at `rank`, where the difference has fewer components for each visit: the rest is free to learn."""
    zero, free = zero_product((len(b), a.shape[1]), rank - b.shape[1], b.device)
    return torch.cat([b, zero], dim=1), torch.cat([a, free])


def _shared(group: list[Seen], factors: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
    """The best W' for given factors, (sum of M_b C_b) (sum of C_b)^-1 with M_b = W_b - B_b A_b; some rows at a time."""
    pooled, shared = Moment.pooled([seen.inputs for seen in group]), torch.empty_like(group[0].weight)
    for start in range(0, len(shared), BLOCK):
        rows = slice(start, start + BLOCK)
        products: Any = 0
        for number, seen in enumerate(group):
            weight = seen.weight[rows].double()
            if factors is not None:
                b, a = factors[number]
                weight -= b[rows] @ a
            products = products + seen.inputs.times(weight.T) / len(group)
        shared[rows] = pooled.solve(products).T
    return shared
