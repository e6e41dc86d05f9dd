"""Rounding a weight matrix to a few bits so that what it computes changes least: the mathematics, on plain tensors.

A matrix W (outputs, inputs) is replaced by Q = s q, with whole numbers q and one scale s for each group of neighboring
inputs of an output. On inputs with the second moments H = E[x x^T] that loses tr((W - Q) H (W - Q)^T). Rounding each
weight to its nearest multiple of s ignores H; GPTQ (Frantar et al., arXiv 2210.17323) goes through the inputs one by
one, and makes up for the error of each with those that are still to come.

A shared matrix is read in every loop: its error is made once, and felt in all of them (LoopQ, arXiv 2605.16343). So the
H it is rounded by is the sum over its visits. And what is then left, each visit's LoRA can take up as far as its rank
goes, for that is not rounded: B A is chosen anew for W' + B A - Q, by what this visit sees.
"""

import torch
from torch import Tensor

from rrtc.tying.moments import DiagonalMoment, FullMoment
from rrtc.tying.whiten import spectrum

DAMPING = 0.01  # of the mean of the moments' diagonal, as in GPTQ
BLOCK = 128  # inputs after which an error reaches all that are still to come: one product in place of many small ones
CLIPS = torch.linspace(1.0, 0.6, 17).tolist()  # of the largest weight in a group: a smaller range has finer steps


def widest_scales(weight: Tensor, bits: int, group: int) -> Tensor:
    """The scale of each group of `group` inputs, (outputs, inputs / group), that just holds its largest weight."""
    highest = 2 ** (bits - 1) - 1
    largest = weight.unflatten(1, (-1, group)).abs().amax(-1) / highest
    return torch.where(largest > 0, largest, 1.0)  # a group of zeros


def best_scales(weight: Tensor, bits: int, group: int, importance: Tensor) -> Tensor:
    """The same, where each may be smaller than that, down to the last of CLIPS: the one whose rounding loses least,
    each input counted by `importance` (inputs,), E[x²]."""
    parts, matters = weight.unflatten(1, (-1, group)), importance.view(-1, group)
    widest = widest_scales(weight, bits, group)
    best, least = widest, torch.full_like(widest, torch.inf)
    for clip in CLIPS:
        scale = clip * widest
        lost = ((_nearest(parts, scale[..., None], bits) - parts).square() * matters).sum(-1)
        best, least = torch.where(lost < least, scale, best), torch.minimum(lost, least)
    return best


def round_to_nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Q (outputs, inputs): every weight at its nearest multiple. scale: (outputs, groups)."""
    return _nearest(weight, scale.repeat_interleave(weight.shape[1] // scale.shape[1], 1), bits)


def gptq(weight: Tensor, moments: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Q (outputs, inputs), in float32, for `weight` W and `moments` H (inputs, inputs). scale: (outputs, groups)."""
    group = weight.shape[1] // scale.shape[1]
    # Row i of the upper Cholesky factor of H^-1: how the inputs after i make up best for an error at i.
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(_damped(moments)))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    left, found = weight.float().clone(), torch.empty_like(weight, dtype=torch.float32)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        errors = torch.empty_like(left[:, start:end])
        for i in range(start, end):
            found[:, i] = _nearest(left[:, i], scale[:, i // group], bits)
            errors[:, i - start] = (left[:, i] - found[:, i]) / factor[i, i]
            left[:, i:end] -= errors[:, i - start, None] * factor[i, i:end]
        left[:, end:] -= errors @ factor[start:end, end:]
    return found


def best_factors(wanted: Tensor, moments: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B (outputs, rank), A (rank, inputs)), in float32, with the least tr((E - B A) H (E - B A)^T) for E `wanted`
    (outputs, inputs) and H `moments` (inputs, inputs), both float32; see whiten.py. rank: at most the smaller side of
    E."""
    alike = DiagonalMoment(wanted.new_ones(len(wanted)))  # errors of all outputs count alike
    return spectrum(wanted, FullMoment(_damped(moments).float()), alike, rank).factors(slice(0, rank))


def _nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    """`weight` at the nearest multiple of `scale` that so many bits can hold."""
    highest = 2 ** (bits - 1) - 1
    return (weight / scale).round().clamp(-highest - 1, highest) * scale


def _damped(moments: Tensor) -> Tensor:
    """`moments` in float64, with what makes them invertible on their diagonal."""
    moments = moments.double()
    level = DAMPING * moments.diagonal().mean().clamp_min(1e-12)
    return moments + level * torch.eye(len(moments), dtype=moments.dtype, device=moments.device)
