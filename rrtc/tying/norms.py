"""Folding norms: a norm's gain is multiplied into the matrices that read it, so that tied layers differ in one thing
less. W (g * x) = (W diag(g)) x, exactly; a LayerNorm's bias goes into the readers' biases: W (x + b) = W x + W b.

Which matrices read which norm is not written down anywhere: one layer is run on random weights and watched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fold:
    """A norm that can be folded, by its path in the layer; the matrices that read it; and the offset of its gain, which
    is weight + offset (1 for Gemma, whose norms store the difference from one)."""

    norm: str
    readers: tuple[str, ...]
    offset: float


def apply_folds(layer: dict[str, Tensor], folds: list[Fold]) -> dict[str, Tensor]:
    """The tensors of one layer, or its vectors and some of its matrices, with `folds` done. Matrices are (outputs,
    inputs); the input is left as it is."""
    folded = dict(layer)
    for fold in folds:
        gain = layer[f"{fold.norm}.weight"] + fold.offset
        shift = layer.get(f"{fold.norm}.bias")
        for reader in fold.readers:
            weight = layer.get(f"{reader}.weight")
            if weight is None:
                continue
            folded[f"{reader}.weight"] = weight * gain
            if shift is not None:
                folded[f"{reader}.bias"] = layer[f"{reader}.bias"] + weight @ shift
        folded[f"{fold.norm}.weight"] = torch.full_like(gain, 1 - fold.offset)
        if shift is not None:
            folded[f"{fold.norm}.bias"] = torch.zeros_like(shift)
    return folded
