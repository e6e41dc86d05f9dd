"""One decoder layer run on random weights and watched, to learn what no config says: which matrices read which norm,
and which ones make up the inner dimension of an FFN."""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rrtc.model.modeling_rrt import matrices_of, matrix_shape
from rrtc.stock.architecture import decoder_layers, stock_model
from rrtc.tying.neurons import Neurons, reordered
from rrtc.tying.norms import Fold, apply_folds

TOLERANCE = 1e-4  # of the largest output, in float32
TRIAL_TOKENS = 6


class Trial:
    """The stock model with its first layer only, random weights, and no embedding: it is fed hidden states."""

    def __init__(self, config: PreTrainedConfig):
        stock = stock_model(config)
        self.layer = decoder_layers(stock)[0]
        self.base = stock.base_model
        del decoder_layers(stock)[1:]
        for path, module in matrices_of(self.layer).items():
            if isinstance(module, Conv1D):  # as in the recursive model, and so that all are (outputs, inputs)
                parent, _, name = path.rpartition(".")
                linear = nn.Linear(*matrix_shape(module), device="meta")
                setattr(self.layer.get_submodule(parent), name, linear)
        generator = torch.Generator().manual_seed(0)
        embedding = stock.get_input_embeddings()
        for module in self.base.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                if module is not embedding:
                    # Large enough for attention to differ between heads, or moving a channel to another would not show.
                    scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.3
                    value = torch.randn(parameter.shape, generator=generator) * scale
                    setattr(module, name, nn.Parameter(value, requires_grad=False))
        width = config.get_text_config().hidden_size
        self.states = torch.randn(1, TRIAL_TOKENS, width, generator=generator)
        self.base.float()

    @torch.no_grad()
    def run(self, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """The output, with `tensors` of the layer, by path, in place of its own. They can have other shapes."""
        path = next(path for path, module in self.base.named_modules() if module is self.layer)
        given = {f"{path}.{name}": tensor for name, tensor in (tensors or {}).items()}
        arguments = {"inputs_embeds": self.states, "use_cache": False}
        return functional_call(self.base, given, (), arguments).last_hidden_state

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

    def is_same(self, transform: Callable[[dict[str, Tensor]], dict[str, Tensor]], reference=lambda t: t) -> bool:
        """Whether the layer gives the same output, to TOLERANCE, with `transform` of its tensors as with `reference`
        of them. Matrices are (outputs, inputs)."""
        own = {name: p.detach() for name, p in self.layer.named_parameters()}
        expected, output = self.run(reference(own)), self.run(transform(own))
        return (output - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()

    @torch.no_grad()
    def feeding(self, reader: str) -> list[str]:
        """The matrices of which an output channel reaches the same input channel of `reader` and no other (or, where a
        fused one has several times as many outputs, its parts do so in turn)."""
        matrices = matrices_of(self.layer)
        width, _ = matrix_shape(matrices[reader])
        seen: list[Tensor] = []

        def inputs_of_reader(change: tuple[str, int] | None) -> Tensor:
            seen.clear()
            with contextlib.ExitStack() as hooks:
                hooks.callback(
                    matrices[reader].register_forward_pre_hook(lambda _, args: seen.append(args[0].clone())).remove
                )
                if change is not None:
                    name, channel = change

                    def nudge(module, args, output):
                        return output + torch.nn.functional.one_hot(torch.tensor(channel), output.shape[-1]) * 0.1

                    hooks.callback(matrices[name].register_forward_hook(nudge).remove)
                self.run()
            return seen[0]

        plain = inputs_of_reader(None)
        found = []
        for name, module in matrices.items():
            _, outputs = matrix_shape(module)
            if name == reader or outputs % width:
                continue
            channels = [width // 3 + part * width for part in range(outputs // width)]
            reached = [(inputs_of_reader((name, c)) - plain).flatten(0, -2).abs().amax(0) > 0 for c in channels]
            if all(r.nonzero()[:, 0].tolist() == [width // 3] for r in reached):
                found.append(name)
        return found


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


def _is_exact(trial: Trial, fold: Fold) -> bool:
    try:
        return trial.is_same(lambda layer: apply_folds(layer, [fold]))
    except KeyError:  # a LayerNorm's bias has nowhere to go where a reader has none
        return False


def find_neurons(config: PreTrainedConfig) -> list[Neurons]:
    """The inner dimensions of the decoder layers of `config`. Empty where reordering is not exact."""
    trial = Trial(config)
    shapes = {name: matrix_shape(module) for name, module in matrices_of(trial.layer).items()}
    found = []
    for reader, (width, _) in shapes.items():
        producers = tuple(trial.feeding(reader))
        if not producers:
            continue
        neurons = Neurons(reader, producers, (), width)
        generator = torch.Generator().manual_seed(0)
        order = torch.randperm(width, generator=generator)
        if not (_can_reorder(trial, neurons, order) and _can_leave(trial, neurons, order[: width // 2])):
            continue
        signs = torch.where(torch.rand(width, generator=generator) < 0.5, -1.0, 1.0)
        signed = []
        for producer in producers:
            one = Neurons(reader, producers, (producer,), width)
            if trial.is_same(lambda layer, n=one, s=signs: reordered(layer, n, torch.arange(n.width), s)):
                signed.append(producer)
        found.append(Neurons(reader, producers, tuple(signed[:1]), width))
    return found


def _can_reorder(trial: Trial, neurons: Neurons, order: Tensor) -> bool:
    return trial.is_same(lambda layer: reordered(layer, neurons, order))


def _can_leave(trial: Trial, neurons: Neurons, kept: Tensor) -> bool:
    """Whether the layer runs on the `kept` neurons alone, as it does where the reader ignores the others."""
    name = f"{neurons.reader}.weight"
    silent = torch.ones(neurons.width).index_fill(0, kept, 0).bool()
    try:
        return trial.is_same(
            lambda layer: reordered(layer, neurons, kept),
            lambda layer: layer | {name: layer[name].masked_fill(silent, 0)},
        )
    except RuntimeError:  # attention heads have a fixed size
        return False
