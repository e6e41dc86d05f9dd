"""Whitening: a weight matrix as the loss sees it.

To second order, changing a matrix W by E costs tr(G E C E^T) / 2 nats a token: C = E[x x^T] of its inputs x, and G =
E[g g^T] of the gradients g of the loss with respect to its outputs, both per token (the Kronecker factors of the Fisher
information; Martens and Grosse, arXiv 1503.05671). So the best approximation of W is the ordinary best approximation of
G^1/2 W C^1/2, mapped back, and errors of all matrices of all layers are in one unit and can be added up. With G = 1
this is activation-aware SVD (SVD-LLM, arXiv 2403.07378), whose errors are in every layer's own unit.

Pure functions on float32 tensors; decompositions in float64.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


class Moment:
    """A second moment E[x x^T], symmetric positive definite: `matrix` is (size, size), or (size,) where only the
    diagonal is known. Matrices that read the same input share one, so that it is taken apart once."""

    def __init__(self, matrix: Tensor):
        self.matrix = matrix

    @classmethod
    def estimated(cls, mean: Tensor, samples: int) -> "Moment":
        """From the `mean` of x x^T over `samples`, moved towards the multiple of the identity with its trace as far as
        so few samples call for (oracle approximating shrinkage; Chen et al., arXiv 0907.4698, equation 23)."""
        size = len(mean)
        if mean.dim() == 1:
            return cls(mean.clamp_min(1e-6 * mean.mean()).clamp_min(1e-12))
        trace, energy = mean.trace().double(), mean.double().square().sum()
        spread = (samples + 1 - 2 / size) * (energy - trace**2 / size)
        share = (((1 - 2 / size) * energy + trace**2) / spread).clamp(0, 1).item() if spread > 0 else 1.0
        level = max(share * trace.item() / size, 1e-12)  # an input that is always zero has no trace
        return cls((1 - share) * mean + level * torch.eye(size).to(mean))

    @classmethod
    def pooled(cls, moments: list["Moment"]) -> "Moment":
        """The mean of several."""
        return cls(torch.stack([moment.matrix for moment in moments]).mean(0))

    @cached_property
    def _roots(self) -> tuple[Tensor, Tensor]:
        if self.matrix.dim() == 1:
            return self.matrix.sqrt(), self.matrix.rsqrt()
        values, vectors = torch.linalg.eigh(self.matrix.double())
        values = values.clamp_min(1e-12 * values[-1])
        root, inverse = vectors * values.sqrt() @ vectors.T, vectors * values.rsqrt() @ vectors.T
        return root, inverse

    @property
    def diagonal(self) -> Tensor:
        return self.matrix if self.matrix.dim() == 1 else self.matrix.diagonal()

    def times(self, x: Tensor) -> Tensor:
        """M x, for x (size, n)."""
        return _times(self.matrix, x)

    def root_times(self, x: Tensor) -> Tensor:
        """M^1/2 x, in the number format of x."""
        return _times(self._roots[0].to(x.dtype), x)

    def inverse_root_times(self, x: Tensor) -> Tensor:
        """M^-1/2 x, in the number format of x."""
        return _times(self._roots[1].to(x.dtype), x)

    def of(self, index: Tensor, signs: Tensor | None = None) -> "Moment":
        """The moment of some entries of x, in the order of `index`, each times its sign."""
        if self.matrix.dim() == 1:
            return Moment(self.matrix[index])
        part = self.matrix[index][:, index]
        return Moment(part if signs is None else part * signs * signs[:, None])


def _times(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix[:, None] * x if matrix.dim() == 1 else matrix @ x


@dataclass(frozen=True)
class Seen:
    """One matrix and how the loss sees it: `weight` (outputs, inputs), `inputs` = C and `slopes` = G."""

    weight: Tensor
    inputs: Moment
    slopes: Moment

    def cost(self, change: Tensor) -> float:
        """Nats a token that changing the weight by `change` costs to second order: tr(G E C E^T) / 2."""
        return 0.5 * (self.slopes.times(change) * self.inputs.times(change.T).T).sum().item()

    def spectrum(self) -> "Spectrum":
        return spectrum(self.weight, self.inputs, self.slopes)


@dataclass(frozen=True)
class Spectrum:
    """A matrix taken apart in its whitened space: it is left @ diag(values) @ right, and its best approximation of rank
    r keeps the first r. left: (outputs, k), values: (k,), descending, right: (k, inputs)."""

    left: Tensor
    values: Tensor
    right: Tensor

    def factors(self, chosen: slice) -> tuple[Tensor, Tensor]:
        """(B, A) of the chosen components, B (outputs, r) and A (r, inputs), of equal size, so that they train
        evenly."""
        b, a = self.left[:, chosen], self.values[chosen, None] * self.right[chosen]
        balance = (a.norm(dim=1) / b.norm(dim=0).clamp_min(1e-20)).clamp_min(1e-20).sqrt()
        return (b * balance).contiguous(), (a / balance[:, None]).contiguous()


def spectrum(matrix: Tensor, inputs: Moment, slopes: Moment) -> Spectrum:
    """`matrix` (outputs, inputs) taken apart in the space whitened by C = `inputs` and G = `slopes`.

    With the fewer outputs than inputs and G^1/2 W C W^T G^1/2 = U S^2 U^T, keeping r components is multiplying by
    G^-1/2 U_r U_r^T G^1/2 from the left, so that no root of the larger moment is needed, nor its singular vectors; and
    likewise from the right. In float64 the leading components are those of a full SVD, for a fraction of its time.
    """
    values, vectors = torch.linalg.eigh(_gram(matrix, inputs, slopes))
    values, vectors = values.flip(0).clamp_min(0).sqrt().float(), vectors.flip(1).float()  # largest first
    scale = values.clamp_min(1e-20)
    if _is_wide(matrix):
        return Spectrum(
            slopes.inverse_root_times(vectors), values, vectors.T @ slopes.root_times(matrix) / scale[:, None]
        )
    left = matrix @ inputs.root_times(vectors) / scale
    return Spectrum(left, values, inputs.inverse_root_times(vectors).T)


def costs_by_rank(matrix: Tensor, inputs: Moment, slopes: Moment) -> Tensor:
    """Nats a token lost with the best approximation of `matrix` at rank 0, 1, … min(outputs, inputs): float64."""
    energies = torch.linalg.eigvalsh(_gram(matrix, inputs, slopes)).clamp_min(0)
    return 0.5 * torch.cat([energies.new_zeros(1), energies.cumsum(0)]).flip(0)


def _is_wide(matrix: Tensor) -> bool:
    return matrix.shape[0] <= matrix.shape[1]


def _gram(matrix: Tensor, inputs: Moment, slopes: Moment) -> Tensor:
    """The smaller Gram matrix of G^1/2 W C^1/2, float64."""
    if _is_wide(matrix):
        inner, outer = matrix.double() @ inputs.times(matrix.T).double(), slopes
    else:
        inner, outer = matrix.double().T @ slopes.times(matrix).double(), inputs
    gram = outer.root_times(outer.root_times(inner).T)
    return (gram + gram.T) / 2
