"""The recursive model as it learns: its forward pass ends in losses instead of logits.

The logits of a batch are by far its largest table, so they are never made as a whole: the hidden states go to
`chunked_losses`, which makes them piece by piece. This happens inside the model's own forward pass, because under FSDP
the head's parameters are whole only there.
"""

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from rrtc.model.modeling_rrt import RrtForCausalLM
from rrtc.model.skeleton import decoder_layers
from rrtc.recipe import UptrainRecipe
from rrtc.uptrain.losses import chunked_losses, hidden_distance


class Student(RrtForCausalLM):
    """An RrtForCausalLM that is told what comes next, and returns losses."""

    def forward(self, input_ids: Tensor, targets: Tensor, recipe: UptrainRecipe, lesson=None, **kwargs) -> dict:
        """Means over the tokens by name: `objective`, which has a gradient, and what it is made of (see losses.py).

        input_ids, targets: (windows, context), int64. lesson: what the teacher says of the same input_ids, or None.
        kwargs, such as position_ids, go to the stock base model.
        """
        matches = bool(recipe.losses.get("hidden"))
        hidden, states = run_base(self.stock, input_ids, keep_states=matches, **kwargs)
        head = self.stock.get_output_embeddings()
        means = chunked_losses(
            hidden.flatten(0, 1),
            lambda part: run_head(self.stock, part),
            list(head.parameters()),
            head.weight.shape[0],
            targets.flatten(),
            recipe.losses,
            recipe.temperature,
            lesson,
        )
        if matches:
            distance = hidden_distance(states, lesson.states)
            means["objective"] = means["objective"] + recipe.losses["hidden"] * distance
            means["hidden"] = distance.detach()
        return means


def run_base(model: PreTrainedModel, ids: Tensor, keep_states: bool, **kwargs) -> tuple[Tensor, list[Tensor]]:
    """What the head of a stock causal language model is given for `ids` (windows, context), as (windows, context,
    width); and, if they are to be kept, the hidden states after each layer."""
    states: list[Tensor] = []

    def keep(layer, given, output):
        states.append(output if isinstance(output, Tensor) else output[0])

    hooks = [layer.register_forward_hook(keep) for layer in decoder_layers(model)] if keep_states else []
    try:
        return model.base_model(ids, use_cache=False, **kwargs)[0], states
    finally:
        for hook in hooks:
            hook.remove()


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
