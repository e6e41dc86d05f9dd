"""Folding norms: a norm's gain is multiplied into the matrices that read it, so that tied layers differ in one thing
less. W (g * x) = (W diag(g)) x, exactly; a LayerNorm's bias goes into the readers' biases: W (x + b) = W x + W b.

Which matrices read which norm is not written down anywhere: one layer is run on random weights and watched.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from rrtc.init.trial import Trial


@dataclass(frozen=True)
class Fold:
    """A norm that can be folded, by its path in the layer; the matrices that read it; and the offset of its gain, which
    is weight + offset (1 for Gemma, whose norms store the difference from one)."""

    norm: str
    readers: tuple[str, ...]
    offset: float


def find_folds(config: PreTrainedConfig) -> tuple[list[Fold], list[str]]:
    """(the norms of a decoder layer that can be folded exactly, the paths of those that cannot).

    Runs the first decoder layer of `config`'s stock model on random weights: a norm is foldable where its output is
    what some matrices read, and the layer gives the same result after folding, to TOLERANCE.
    """
    trial = Trial(config)
    folds, others = [], []
    for norm, readers in trial.readers().items():
        fold = Fold(norm, readers, trial.gain_offset(norm)) if readers else None
        if fold is not None and _is_exact(trial, fold):
            folds.append(fold)
        else:
            others.append(norm)
    return folds, others


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


def _is_exact(trial: Trial, fold: Fold) -> bool:
    try:
        return trial.is_same(lambda layer: apply_folds(layer, [fold]))
    except KeyError:  # a LayerNorm's bias has nowhere to go where a reader has none
        return False
