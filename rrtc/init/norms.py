"""Folding norms: a norm's gain is multiplied into the matrices that read it, so that tied layers differ in one thing
less. W (g * x) = (W diag(g)) x, exactly; a LayerNorm's bias goes into the readers' biases: W (x + b) = W x + W b.

Which matrices read which norm is not written down anywhere: one layer is run on random weights and watched.
"""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rrtc.model.modeling_rrt import matrices_of
from rrtc.model.skeleton import decoder_layers, stock_model

TOLERANCE = 1e-4  # of the largest output, in float32
TRIAL_TOKENS = 6


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
    trial = _Trial(config)
    folds, others = [], []
    for norm, readers in trial.readers().items():
        fold = Fold(norm, readers, trial.gain_offset(norm)) if readers else None
        if fold is not None and trial.is_exact(fold):
            folds.append(fold)
        else:
            others.append(norm)
    return folds, others


def apply_folds(layer: dict[str, Tensor], folds: list[Fold]) -> dict[str, Tensor]:
    """The tensors of one layer with `folds` done. Matrices are (outputs, inputs); the input is left as it is."""
    folded = dict(layer)
    for fold in folds:
        gain = layer[f"{fold.norm}.weight"] + fold.offset
        shift = layer.get(f"{fold.norm}.bias")
        for reader in fold.readers:
            weight = layer[f"{reader}.weight"]
            folded[f"{reader}.weight"] = weight * gain
            if shift is not None:
                folded[f"{reader}.bias"] = layer[f"{reader}.bias"] + weight @ shift
        folded[f"{fold.norm}.weight"] = torch.full_like(gain, 1 - fold.offset)
        if shift is not None:
            folded[f"{fold.norm}.bias"] = torch.zeros_like(shift)
    return folded


class _Trial:
    """The stock model with its first layer only, random weights, and no embedding: it is fed hidden states."""

    def __init__(self, config: PreTrainedConfig):
        stock = stock_model(config)
        self.layer = decoder_layers(stock)[0]
        self.base = stock.base_model
        del decoder_layers(stock)[1:]
        generator = torch.Generator().manual_seed(0)
        embedding = stock.get_input_embeddings()
        for module in self.base.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if module is not embedding:
                    scale = 0.02 if parameter.dim() > 1 else 0.3
                    value = torch.randn(parameter.shape, generator=generator) * scale
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
        width = config.get_text_config().hidden_size
        self.states = torch.randn(1, TRIAL_TOKENS, width, generator=generator)
        self.base.float()

    @torch.no_grad()
    def run(self) -> Tensor:
        return self.base(inputs_embeds=self.states, use_cache=False).last_hidden_state

    def readers(self) -> dict[str, tuple[str, ...]]:
        """For each norm of the layer, the matrices whose input is its output. Norms inside attention heads, after an
        attention or MLP block, or on the residual stream have none."""
        matrices = matrices_of(self.layer)
        norms = {
            name: module
            for name, module in self.layer.named_modules()
            if name not in matrices and not list(module.children()) and getattr(module, "weight", None) is not None
        }
        outputs: dict[str, Tensor] = {}  # kept alive, so that identity means something
        read: dict[str, list[str]] = {name: [] for name in norms}

        def keep_output(name):
            return lambda module, args, output: outputs.__setitem__(name, output)

        def find_input(name):
            def hook(module, args):
                for norm, output in outputs.items():
                    if args[0] is output:
                        read[norm].append(name)

            return hook

        with contextlib.ExitStack() as hooks:
            for name, module in norms.items():
                hooks.callback(module.register_forward_hook(keep_output(name)).remove)
            for name, module in matrices.items():
                hooks.callback(module.register_forward_pre_hook(find_input(name)).remove)
            self.run()
        return {name: tuple(readers) for name, readers in read.items()}

    @torch.no_grad()
    def gain_offset(self, norm: str) -> float:
        """c where the norm multiplies by (weight + c): read off its outputs at weight 0 and at weight 1."""
        module = self.layer.get_submodule(norm)
        saved = {name: p.clone() for name, p in module.named_parameters()}
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
        module.weight.zero_()
        at_zero = module(self.states)
        module.weight.fill_(1.0)
        at_one = module(self.states)
        for name, parameter in module.named_parameters():
            parameter.copy_(saved[name])
        return round((at_zero.norm() / (at_one - at_zero).norm()).item(), 3)

    @torch.no_grad()
    def is_exact(self, fold: Fold) -> bool:
        """Whether the layer gives the same output after `fold`; the weights are put back afterwards."""
        before = self.run()
        saved = {name: p.clone() for name, p in self.layer.named_parameters()}
        turned = {f"{n}.weight" for n, m in matrices_of(self.layer).items() if isinstance(m, Conv1D)}
        try:
            folded = apply_folds({n: t.T if n in turned else t for n, t in saved.items()}, [fold])
        except KeyError:  # a LayerNorm's bias has nowhere to go where a reader has none
            return False
        parameters = dict(self.layer.named_parameters())
        for name, value in folded.items():
            parameters[name].copy_(value.T if name in turned else value)
        after = self.run()
        for name, value in saved.items():
            parameters[name].copy_(value)
        return (after - before).abs().max().item() <= TOLERANCE * before.abs().max().item()
