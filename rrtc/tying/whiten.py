"""Whitening: a weight matrix as the loss sees it.

To second order, changing a matrix W by E costs tr(G E C E^T) / 2 nats a token: C = E[x x^T] of its inputs x, and G =
E[g g^T] of the gradients g of the loss with respect to its outputs, both per token (the Kronecker factors of the Fisher
information; Martens and Grosse, arXiv 1503.05671). So the best approximation of W is the ordinary best approximation of
G^1/2 W C^1/2, mapped back, and errors of all matrices of all layers are in one unit and can be added up. With G = 1
this is activation-aware SVD (SVD-LLM, arXiv 2403.07378), whose errors are in every layer's own unit.

Pure functions on float32 tensors; decompositions in float64, but for truncations of low rank (eigen.py).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rrtc.tying.eigen import leading_eigenvectors
from rrtc.tying.moments import BLOCK, Moment


@dataclass(frozen=True)
class Seen:
    """One matrix and how the loss sees it: `weight` (outputs, inputs), `inputs` = C and `gradients` = G."""

    weight: Tensor
    inputs: Moment
    gradients: Moment

    def cost(self, change: Tensor) -> float:
        """Nats a token that changing the weight by `change` costs to second order: tr(G E C E^T) / 2."""
        return 0.5 * (self.gradients.times(change) * self.inputs.times(change.T).T).sum().item()

    def spectrum(self, rank: int) -> "Spectrum":
        return spectrum(self.weight, self.inputs, self.gradients, rank)


@dataclass(frozen=True)
class Spectrum:
    """The leading components of a matrix in its whitened space. Its best approximation of rank r is that of the first r
    in left @ diag(values) @ right. left: (outputs, k), values: (k,), descending, right: (k, inputs)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, chosen: slice) -> tuple[Tensor, Tensor]:
        """(B, A) of the chosen components, B (outputs, r) and A (r, inputs), of equal size, so that they train
        evenly."""
        b, a = self.left[:, chosen], self.values[chosen, None] * self.right[chosen]
        balance = (a.norm(dim=1) / b.norm(dim=0).clamp_min(1e-20)).clamp_min(1e-20).sqrt()
        return (b * balance).contiguous(), (a / balance[:, None]).contiguous()


def spectrum(matrix: Tensor, inputs: Moment, gradients: Moment, rank: int) -> Spectrum:
    """The `rank` leading components (or all there are, if fewer) of `matrix` (outputs, inputs) in the space whitened by
    C = `inputs` and G = `gradients`. Their error is at most 1.01 times that of the best approximation.

    With the fewer outputs than inputs and G^1/2 W C W^T G^1/2 = U S^2 U^T, keeping r components is multiplying by
    G^-1/2 U_r U_r^T G^1/2 from the left, so that no root of the larger moment is needed, nor its singular vectors; and
    likewise from the right.
    """
    m, outer, inner = _small_side_first(matrix, inputs, gradients)

    def times(x: Tensor) -> Tensor:
        return outer.root_times(m @ inner.times(m.T @ outer.transposed_root_times(x)))

    squares, vectors = leading_eigenvectors(
        len(m), min(rank, len(m)), times, lambda: _gram(matrix, inputs, gradients), matrix
    )
    values = squares.clamp_min(0).sqrt().float()
    left = outer.inverse_root_times(vectors)
    right = outer.transposed_root_times(vectors).T @ m / values.clamp_min(1e-20)[:, None]
    return Spectrum(left, values, right) if _is_wide(matrix) else Spectrum(right.T, values, left.T)


def costs_by_rank(matrix: Tensor, inputs: Moment, gradients: Moment) -> Tensor:
    """Nats a token lost with the best approximation of `matrix` at rank 0, 1, … min(outputs, inputs): float64."""
    energies = torch.linalg.eigvalsh(_gram(matrix, inputs, gradients)).clamp_min(0)
    return 0.5 * torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _small_side_first(matrix: Tensor, inputs: Moment, gradients: Moment) -> tuple[Tensor, Moment, Moment]:
    """(`matrix`, turned so that its smaller side comes first; the moment of that side; that of the other)."""
    return (matrix, gradients, inputs) if _is_wide(matrix) else (matrix.T, inputs, gradients)


def _gram(matrix: Tensor, inputs: Moment, gradients: Moment) -> Tensor:
    """The smaller Gram matrix of G^1/2 W C^1/2, float64."""
    m, outer, inner = _small_side_first(matrix, inputs, gradients)
    pairs = zip(m.split(BLOCK, dim=1), inner.times(m.T).split(BLOCK), strict=True)
    middle = sum(columns.double() @ rows.double() for columns, rows in pairs)
    gram = outer.root_times(outer.root_times(middle).T)
    return (gram + gram.T) / 2
