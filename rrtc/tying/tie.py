"""The mathematics of tying one weight matrix over the visits of a slot. Pure functions on tensors.

The dense layers' matrices W_1 … W_B, each (outputs, inputs), become one shared W' and for each visit a product B_b A_b
of rank r, with B (outputs, r) and A (r, inputs), so that W' + B_b A_b is close to W_b (paper §2.2 and §2.3).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from rrtc.tying.eigen import leading_eigenvectors


@dataclass(frozen=True)
class Tied:
    """One tied matrix. `factors` has (B, A) for each visit, or None at rank 0. The energies are squared Frobenius
    norms for each visit: of what tying lost (W_b - W'), and of the part of it that the factors restore."""

    shared: Tensor
    factors: list[tuple[Tensor, Tensor] | None]
    lost: list[float]
    restored: list[float]


def tie(layers: list[Tensor], sources: list[Tensor], ranks: list[int], lora_init: str, dtype: torch.dtype) -> Tied:
    """Ties the matrices `layers`, one a visit, each (outputs, inputs) in float32.

    sources: the matrices whose mean is the shared one. ranks: a LoRA rank for each visit. lora_init: "svd", or "zero"
    for B = 0. dtype: the format that will be stored; the factors also restore what rounding W' to it loses.
    """
    shared = torch.stack(sources).mean(0).to(dtype).float()
    factors: list[tuple[Tensor, Tensor] | None] = []
    lost, restored = [], [0.0] * len(layers)
    for number, (weight, rank) in enumerate(zip(layers, ranks, strict=True)):
        residual = weight - shared
        energy = residual.square().sum().item()
        lost.append(energy)
        if rank == 0:
            factors.append(None)
        elif lora_init == "zero" or energy == 0:
            # The usual LoRA start, and the paper's where the shared matrix is this layer's own (appendix C).
            factors.append(zero_product(residual.shape, rank, residual.device))
        else:
            b, a = truncated_svd(residual, rank)
            restored[number] = energy - (residual - b @ a).square().sum().item()
            factors.append((b, a))
    return Tied(shared, factors, lost, restored)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation B A of `matrix` (outputs, inputs) in the Frobenius norm at `rank`, balanced.

    B = U sqrt(S) is (outputs, rank) and A = sqrt(S) V^T is (rank, inputs): the paper's B = U S, A = V^T (§2.3) is the
    same product, but factors of equal size train evenly. Works on the leading eigenvectors of the smaller Gram matrix,
    M M^T or M^T M (eigen.py): the error is at most 1.01 times that of a full SVD, for a fraction of its time.
    """
    wide = matrix.shape[0] < matrix.shape[1]
    m = matrix if wide else matrix.T  # the small dimension first
    _, vectors = leading_eigenvectors(len(m), rank, lambda x: m @ (m.T @ x), lambda: m.double() @ m.double().T, matrix)
    coordinates = vectors.T @ m  # (rank, large): row i has length s_i
    root = coordinates.norm(dim=1, keepdim=True).clamp_min(1e-20).sqrt()
    left, right = vectors * root.T, coordinates / root
    return (left, right) if wide else (right.T, left.T)


def zero_product(shape: tuple[int, ...], rank: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, A) for a matrix of `shape` (outputs, inputs) with B = 0 and A Gaussian of variance 1 / inputs."""
    outputs, inputs = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rank, inputs, generator=generator) * inputs**-0.5
    return torch.zeros(outputs, rank, device=device), a.to(device)
