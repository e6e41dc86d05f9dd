"""The stock forward pass of a causal language model in its parts: decoder layers, what follows them, and the head.

No part is written again here. The stock forward runs, and what is known already stands in for the modules that would
work it out, so that final norms, scaled or capped logits and the like are whatever the architecture makes of them.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from rrtc.stock.architecture import decoder_layers


@contextmanager
def outputs_of(layers: Iterable[nn.Module]) -> Iterator[list]:
    """A list that fills with what each of `layers` returns, in the order they run, while the model runs."""
    outputs: list = []
    hooks = [layer.register_forward_hook(lambda layer, given, output: outputs.append(output)) for layer in layers]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def run_base(model: PreTrainedModel, ids: Tensor, keep_states: bool, **kwargs) -> tuple[Tensor, list[Tensor]]:
    """What the head of a stock causal language model is given for `ids` (windows, context), as (windows, context,
    width); and, if they are to be kept, the hidden states after each layer."""
    with outputs_of(decoder_layers(model) if keep_states else ()) as outputs:
        hidden = model.base_model(ids, use_cache=False, **kwargs)[0]
    return hidden, [output if isinstance(output, Tensor) else output[0] for output in outputs]


class _Ran(nn.Module):
    """Stands where the decoder layers stood, and returns what one of them returned."""

    def __init__(self, layer: nn.Module, output):
        super().__init__()
        self.__dict__["layer"] = layer  # not a child: its parameters belong elsewhere
        self.output = output

    def forward(self, *args, **kwargs):
        return self.output

    def __getattr__(self, name):
        return getattr(self.__dict__["layer"], name)  # stock forwards read attributes off their layers


def run_exit(model: PreTrainedModel, ids: Tensor, output, **kwargs) -> Tensor:
    """What the head of `model` would be given for `ids`, as in `run_base`, if the layer that returned `output` were
    the last one. ids and kwargs: those the layer ran on."""
    layers = decoder_layers(model)
    children = layers._modules
    layers._modules = {"0": _Ran(layers[0], output)}
    try:
        return model.base_model(ids, use_cache=False, **kwargs)[0]
    finally:
        layers._modules = children


@contextmanager
def left_after(model: PreTrainedModel, place: int) -> Iterator[None]:
    """`model` without the layers behind the one at `place`: what it says and computes if it is left there."""
    layers = decoder_layers(model)
    children = layers._modules
    layers._modules = dict(list(children.items())[: place + 1])
    try:
        yield
    finally:
        layers._modules = children


class _Known(nn.Module):
    """Stands in for a base model whose hidden states are known."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def forward(self, *args, **kwargs):
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.hidden)


def run_head(model: PreTrainedModel, hidden: Tensor) -> Tensor:
    """The logits (tokens, vocabulary) that a stock causal language model makes of `hidden` (tokens, width), with
    whatever it does beside the projection: scaling, capping, a bias."""
    name, base = model.base_model_prefix, model.base_model
    model._modules[name] = _Known(hidden[None])
    try:
        return model(hidden.new_zeros(1, 1).long()).logits[0]
    finally:
        model._modules[name] = base
