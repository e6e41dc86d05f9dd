"""A stock causal language model in its parts: what enters the layers, a layer by itself, the head and its logits.

No part is written again here. The stock forward pass runs, and functions stand in for the modules whose work is known
already, or is to be recorded, so that masks, positions, final norms, scaled or capped logits and the like are whatever
the architecture makes of them. All that takes a model apart, exits, streaming and trials, stands on this file.
"""

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from rrtc.errors import RrtcError
from rrtc.model.attention_rrt import Rule, Sight
from rrtc.model.eyes_rrt import Eyes
from rrtc.model.graft_rrt import leave, matrices_of
from rrtc.stock.architecture import decoder_layers, transposed_matrices


@contextlib.contextmanager
def standing_in(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Has each module call another function in place of its own forward pass. The module stays where it is, because
    stock forward passes read attributes off their layers."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        module.forward = forward
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:  # such as accelerate's, which brings weights from disk
                module.forward = forward


@contextlib.contextmanager
def watching(
    inputs: Mapping[nn.Module, Callable] | None = None, outputs: Mapping[nn.Module, Callable] | None = None
) -> Iterator[None]:
    """Calls a function with the first input of a module before it runs, or with its output after that. What the latter
    returns, if it is not None, is taken for the output."""
    with contextlib.ExitStack() as hooks:
        for module, see in (inputs or {}).items():
            hook = module.register_forward_pre_hook(lambda _, args, see=see: see(args[0]))
            hooks.callback(hook.remove)
        for module, see in (outputs or {}).items():
            hook = module.register_forward_hook(lambda _, args, output, see=see: see(output))
            hooks.callback(hook.remove)
        yield


def states_of(output) -> Tensor:
    """The hidden states in what a layer returns: all of it, or the first of several."""
    return output if isinstance(output, Tensor) else output[0]


class Parts:
    """The parts of `model`, a stock causal language model or a recursive one. Hidden states are (windows, context,
    width); ids are token ids, (windows, context), int64.

    `embed`, `run_layer` and `logits` are for models whose layers need nothing of the tokens but hidden states, and for
    windows of one length without padding: then the arguments beside hidden states with which layers are called (masks,
    positions) depend on the shape of a batch alone, and are recorded once for each shape.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device | None = None):
        """device: where batches are computed; by default where the model is."""
        self.model = model
        self.device = model.device if device is None else device
        self._calls: dict[tuple[int, int], list[tuple[tuple, dict]]] = {}  # by (windows, context)
        self._eyes: dict[int, Eyes] = {}

    @cached_property
    def layers(self) -> list[nn.Module]:
        return decoder_layers(self.model)

    def run(self, ids: Tensor, keep: Sequence[int] = (), **kwargs) -> tuple[Tensor, list]:
        """(what the head is given for `ids`, (windows, context, width); what the layers at the indices `keep` return,
        in the order they run). kwargs go to the base model."""
        outputs: list = []
        with watching(outputs={self.layers[index]: outputs.append for index in keep}):
            hidden = self.model.base_model(ids, use_cache=False, **kwargs)[0]
        return hidden, outputs

    def after(self, ids: Tensor, index: int, output, **kwargs) -> Tensor:
        """What the head is given for `ids` where the model is left after the layer at `index`, which returned `output`.
        ids and kwargs: those that the layer ran on."""
        left = leave(self.layers[index], output)
        with self._instead_of_layers(lambda *args, **others: left):
            return self.model.base_model(ids, use_cache=False, **kwargs)[0]

    def head(self, hidden: Tensor) -> Tensor:
        """The logits (tokens, vocabulary) of `hidden` (tokens, width), which the head is given, with whatever the model
        does beside the projection: scaling, capping, a bias."""
        known = BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden[None])
        # Whichever it is that the model calls: OPT calls its decoder, inside of the base model.
        called = [module for module in self.model.base_model.modules() if isinstance(module, PreTrainedModel)]
        with standing_in(dict.fromkeys(called, lambda *args, **kwargs: known)):
            return self.model(hidden.new_zeros(1, 1).long()).logits[0]

    @contextlib.contextmanager
    def left_after(self, index: int) -> Iterator[None]:
        """The model without the layers behind the one at `index`: what it says and computes if it is left there."""
        last = None

        def remember(output):
            nonlocal last
            last = leave(self.layers[index], output)

        behind = {layer: lambda *args, **kwargs: last for layer in self.layers[index + 1 :]}
        with watching(outputs={self.layers[index]: remember}), standing_in(behind):
            yield

    def embed(self, ids: Tensor) -> Tensor:
        """The hidden states that enter the first layer."""
        entered, hand_on = [], self._handing_on()

        def keep(number: int, hidden: Tensor, *args, **kwargs):
            if number == 0:
                entered.append(hidden)
            return hand_on(number, hidden)

        with self._instead_of_layers(keep):
            self.model.base_model(ids.to(self.device), use_cache=False)
        return entered[0]

    def run_layer(self, number: int, tensors: dict[str, Tensor], hidden: Tensor) -> Tensor:
        """What layer `number` makes of `hidden`. tensors: all its parameters by their path in it, on the device of
        `hidden`, matrices as (outputs, inputs)."""
        args, kwargs = self._recorded(tuple(hidden.shape[:2]))[number]
        args = (hidden, *args)
        if number in self._eyes:
            args, kwargs = (), self._eyes[number].arrange(args, kwargs)
        turned = {f"{name}.weight" for name in self.transposed[number]}
        tensors = {name: tensor.T if name in turned else tensor for name, tensor in tensors.items()}
        return states_of(functional_call(self.layers[number], tensors, args, kwargs))

    @contextlib.contextmanager
    def attending(self, number: int, rule: Rule, sight: Callable[..., Sight] = Sight) -> Iterator[None]:
        """Has `run_layer` run layer `number` with that rule of what it attends to, or whatever `sight` makes of it."""
        self._recorded((1, 1))  # what the layers return is found out before
        self._eyes[number] = Eyes(self.layers[number], rule, sight=sight)
        try:
            yield
        finally:
            self._eyes.pop(number).close()

    def logits(self, ids: Tensor, hidden: Tensor) -> Tensor:
        """The logits (windows, context, vocabulary) of `hidden`, which has left the last layer."""
        hand_on = self._handing_on()
        with self._instead_of_layers(lambda number, *args, **kwargs: hand_on(number, hidden)):
            return self.model(ids.to(self.device), use_cache=False).logits

    def check_needs_no_tokens(self) -> None:
        """Raises RrtcError where layers are called with anything that depends on the tokens beside hidden states."""
        first, other = (self._record(torch.full((1, 2), token, device=self.device)) for token in (0, 1))
        pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(other), strict=True)
        if not all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor)):
            kind = self.model.config.model_type
            raise RrtcError(f"The layers of this '{kind}' model need the tokens, not hidden states alone.")

    @cached_property
    def transposed(self) -> list[set[str]]:
        """For each layer the paths of the matrices that it keeps as (inputs, outputs)."""
        return [transposed_matrices(layer) for layer in self.layers]

    @property
    def groups(self) -> list[list[tuple[str, ...]]]:
        """For each layer its matrices by path, those together that read the same input, in the order they run."""
        return [groups for _, groups in self._tried]

    @cached_property
    @torch.no_grad()
    def _tried(self) -> list[tuple[tuple | None, list[tuple[str, ...]]]]:
        """For each layer what it returns beside hidden states (None where it returns these alone), and its `groups`.
        Every layer runs once without data, on the meta device."""
        trials = [copy.deepcopy(layer).to("meta") for layer in self.layers]
        found = []

        def attempt(number, hidden, *args, **kwargs):
            read: dict[str, Tensor] = {}  # the tensors are kept alive, so that identity means something
            matrices = matrices_of(trials[number])
            given = pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), (hidden, args, kwargs))
            with watching({module: functools.partial(read.__setitem__, name) for name, module in matrices.items()}):
                output = trials[number](given[0], *given[1], **given[2])
            names: dict[int, list[str]] = {}
            for name, tensor in read.items():
                names.setdefault(id(tensor), []).append(name)
            beside = None if isinstance(output, Tensor) else output[1:]
            found.append((beside, [tuple(group) for group in names.values()]))
            return hidden if beside is None else (hidden, *beside)

        with self._instead_of_layers(attempt):
            self.model.base_model(torch.zeros(1, 2, dtype=torch.long, device=self.device), use_cache=False)
        return found

    def _handing_on(self) -> Callable[[int, Tensor], Tensor | tuple]:
        """A function that gives hidden states as the layer of that number returns them: as they are, or first in a
        tuple."""
        tried = self._tried  # before anything stands in for the layers

        def hand_on(number: int, hidden: Tensor) -> Tensor | tuple:
            beside, _ = tried[number]
            return hidden if beside is None else (hidden, *beside)

        return hand_on

    def _recorded(self, shape: tuple[int, int]) -> list[tuple[tuple, dict]]:
        if shape not in self._calls:
            self._calls[shape] = self._record(torch.zeros(shape, dtype=torch.long, device=self.device))
        return self._calls[shape]

    @torch.no_grad()
    def _record(self, ids: Tensor) -> list[tuple[tuple, dict]]:
        """The (args, kwargs) beside hidden states with which the model calls each layer for a batch of `ids`."""
        calls, hand_on = [], self._handing_on()

        def keep(number, hidden, *args, **kwargs):
            calls.append((args, kwargs))
            return hand_on(number, hidden)

        with self._instead_of_layers(keep):
            self.model.base_model(ids, use_cache=False)
        return calls

    def _instead_of_layers(self, forward: Callable):
        """Has forward(number, hidden_states, *args, **kwargs) called where the model calls a layer."""
        return standing_in({layer: functools.partial(forward, number) for number, layer in enumerate(self.layers)})
