"""One decoder layer run on random weights and watched, to learn what no config says: which matrices read which norm,
which ones make up the inner dimension of an FFN, where its branches end, and whether attention caps its scores."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers import PreTrainedConfig

from rrtc.errors import WrongUsage
from rrtc.model.attention_rrt import Rule, Sight
from rrtc.model.eyes_rrt import attention_of
from rrtc.model.graft_rrt import matrices_of, matrix_shape
from rrtc.stock.architecture import stock_model, transposed_matrices
from rrtc.stock.parts import Parts, watching
from rrtc.tying.neurons import Neurons, reordered
from rrtc.tying.norms import Fold, apply_folds

TOLERANCE = 1e-4  # of the largest output, in float32
TRIAL_TOKENS = 6
NUDGE = 0.1  # what is added to one channel to see where it arrives


@dataclass(frozen=True)
class Branch:
    """Where a residual branch of a decoder layer ends: the module at `path`, whose output times `factor` is added to
    the hidden states. offset: of a norm, which multiplies by (weight + offset); 0 for a matrix."""

    path: str
    factor: float
    offset: float


class Trial:
    """The first layer of a stock model on random weights, fed random hidden states. `tensors`: its parameters by path,
    float32, matrices as (outputs, inputs)."""

    def __init__(self, config: PreTrainedConfig):
        stock = stock_model(config)
        self.parts = Parts(stock, torch.device("cpu"))
        self.layer = self.parts.layers[0]
        for path in transposed_matrices(self.layer):  # as in the recursive model: these would keep their width
            inputs, outputs = matrix_shape(self.layer.get_submodule(path))
            self.layer.set_submodule(path, nn.Linear(inputs, outputs, device="meta"))
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int) -> Tensor:
            # Large enough for attention to differ between heads, or moving a channel to another would not show.
            return torch.randn(shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.3)

        self.tensors: dict[str, Tensor] = {}
        inside = {module: path for path, module in self.layer.named_modules()}
        embedding = stock.get_input_embeddings()
        others = {embedding, *(module for layer in self.parts.layers[1:] for module in layer.modules())}
        for module in stock.base_model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if module in inside:
                    self.tensors[f"{inside[module]}.{name}".removeprefix(".")] = drawn(*parameter.shape)
                elif module not in others:
                    setattr(module, name, nn.Parameter(drawn(*parameter.shape), requires_grad=False))
        self.states = torch.randn(1, TRIAL_TOKENS, config.get_text_config().hidden_size, generator=generator)
        stock.float()
        # What layers are called with beside hidden states does not depend on the tokens, and it is all that is wanted.
        embedding.forward = lambda ids: torch.zeros(*ids.shape, embedding.embedding_dim)
        self.run()  # records how the layer is called, before anything watches it

    @torch.no_grad()
    def run(self, tensors: dict[str, Tensor] | None = None) -> Tensor:
        """The output of the layer, with `tensors`, by path, in place of its own. They can have other shapes."""
        return self.parts.run_layer(0, self.tensors | (tensors or {}), self.states)

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

        def keep_output(name: str):
            return lambda output: outputs.__setitem__(name, output)

        def find_input(name: str):
            def see(given: Tensor) -> None:
                for norm, output in outputs.items():
                    if given is output:
                        read[norm].append(name)

            return see

        with watching(
            inputs={module: find_input(name) for name, module in matrices.items()},
            outputs={module: keep_output(name) for name, module in norms.items()},
        ):
            self.run()
        return {name: tuple(readers) for name, readers in read.items()}

    @torch.no_grad()
    def gain_offset(self, norm: str) -> float:
        """c where the norm multiplies by (weight + c): read off its outputs at weight 0 and at weight 1."""
        module, given = self.layer.get_submodule(norm), []
        with watching(inputs={module: given.append}):  # in an FFN its width is not the layer's
            self.run()
        zeros = {name: torch.zeros(parameter.shape) for name, parameter in module.named_parameters()}
        at_zero, at_one = (
            functional_call(module, zeros | {"weight": torch.full_like(zeros["weight"], value)}, (given[0],))
            for value in (0.0, 1.0)
        )
        return round((at_zero.norm() / (at_one - at_zero).norm()).item(), 3)

    def is_same(self, transform: Callable[[dict[str, Tensor]], dict[str, Tensor]], reference=lambda t: t) -> bool:
        """Whether the layer gives the same output, to TOLERANCE, with `transform` of its tensors as with `reference`
        of them."""
        expected, output = self.run(reference(self.tensors)), self.run(transform(self.tensors))
        return (output - expected).abs().max().item() <= TOLERANCE * expected.abs().max().item()

    def kernel_calls(self) -> list[dict]:
        """What the attention calls its kernel with beside tensors, each time that it does in one pass of the layer."""
        calls: list[dict] = []

        class Watched(Sight):
            def attend(self, run, module, query, key, value, adds_mask, **kwargs):
                calls.append(kwargs)
                return super().attend(run, module, query, key, value, adds_mask, **kwargs)

        if attention_of(self.layer) is not None:
            with self.parts.attending(0, Rule(TRIAL_TOKENS, 0, ()), Watched):
                self.run()
        return calls

    @torch.no_grad()
    def branches(self) -> list[Branch]:
        """The residual branches in the order they run: they end in the modules, matrices or norms behind them, whose
        output is added to the hidden states as it is, or times a number."""
        silent = {name: torch.zeros(tensor.shape) for name, tensor in self.tensors.items()}
        order: list[str] = []
        leaves = {name: m for name, m in self.layer.named_modules() if name and not list(m.children())}
        candidates = {name: m for name, m in leaves.items() if list(m.parameters())}
        with watching(outputs={m: (lambda _, name=name: order.append(name)) for name, m in candidates.items()}):
            plain = self.run(silent)

        def moved(name: str, by: Tensor) -> Tensor | None:
            """How the layer's output moves where the output of a module does, while no other branch says a word."""
            shapes: list[torch.Size] = []

            def nudge(output: Tensor) -> Tensor | None:
                shapes.append(output.shape)
                return output + by if output.shape == by.shape else None

            with watching(outputs={candidates[name]: nudge}):
                change = self.run(silent) - plain
            return change if shapes[0] == by.shape else None

        one, other = self.states, self.states.flip(-1) * 3
        found, matrices = [], matrices_of(self.layer)
        for name in order:
            first, second = moved(name, one), moved(name, other)
            if first is None or second is None:
                continue
            factor = (first * one).sum() / one.square().sum()
            far = max((first - factor * one).abs().max(), (second - factor * other).abs().max())
            if factor.abs() > TOLERANCE and far <= TOLERANCE * other.abs().max():
                offset = 0.0 if name in matrices else self.gain_offset(name)
                found.append(Branch(name, round(factor.item(), 4), offset))
        return found

    @torch.no_grad()
    def feeding(self, reader: str) -> list[str]:
        """The matrices of which an output channel reaches the same input channel of `reader` and no other (or, where a
        fused one has several times as many outputs, its parts do so in turn)."""
        matrices = matrices_of(self.layer)
        width, _ = matrix_shape(matrices[reader])

        def inputs_of_reader(nudged: dict[nn.Module, Callable]) -> Tensor:
            seen: list[Tensor] = []
            with watching(inputs={matrices[reader]: lambda given: seen.append(given.clone())}, outputs=nudged):
                self.run()
            return seen[0]

        def nudge(channel: int):
            return lambda output: output + NUDGE * nn.functional.one_hot(torch.tensor(channel), output.shape[-1])

        plain = inputs_of_reader({})
        found = []
        for name, module in matrices.items():
            _, outputs = matrix_shape(module)
            if name == reader or outputs % width:
                continue
            channels = [width // 3 + part * width for part in range(outputs // width)]
            changes = [inputs_of_reader({module: nudge(channel)}) - plain for channel in channels]
            reached = [change.flatten(0, -2).abs().amax(0) > 0 for change in changes]
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


def check_kinds(config: PreTrainedConfig, kinds: Collection[str]) -> None:
    """Raises WrongUsage where the attention of `config` cannot have one of these: kv_kinds of the recipe."""
    calls = Trial(config).kernel_calls()
    if len(calls) > 1:
        raise WrongUsage(
            f"The attention of this '{config.model_type}' model calls its kernel {len(calls)} times in a layer, and "
            "cannot be told which keys to see.",
            "Leave out --kv-budget.",
        )
    if "linear" in kinds and any(call.get("softcap") is not None for call in calls):
        raise WrongUsage(
            f"The attention of this '{config.model_type}' model caps its scores, which linear attention cannot.",
            "Leave linear out of --kv-kinds.",
        )


def find_branches(config: PreTrainedConfig) -> list[Branch]:
    """The residual branches of a decoder layer: its attention and its FFN. Empty where what they say passes through
    more than a factor on its way to the hidden states."""
    return Trial(config).branches()


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
