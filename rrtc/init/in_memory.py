"""Tying a model that is in memory already, as the paper does: for research at a prompt. `rrtc init` does it from disk,
layer by layer, so that a model need not fit into memory, and can do more."""

import copy

from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from rrtc.errors import RrtcError, WrongUsage
from rrtc.init.slots import paper_slot, source_layers
from rrtc.io.recursive import drawn_maps
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.graft_rrt import find_layers
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import decoder_layers, read_architecture, transposed_matrices

AS_IN_PAPER = InitRecipe(shared_init="average", lora_init="svd")


def tie_in_memory(model: PreTrainedModel, plan: Plan) -> RrtForCausalLM:
    """The recursive model that `plan` makes of the stock causal language model `model`: each shared matrix is the mean
    of its layers', and LoRA is the truncated SVD of what that loses (paper §2.2 and §2.3, Average and SVD).

    It has the dtype, device and mode of `model`, which stays as it is and shares no storage with it. Norms are
    not folded. Raises WrongUsage where the plan is of another architecture, or asks for forms that a joint start alone
    chooses, and RrtcError where `model` is no decoder that rrtc can tie.
    """
    if isinstance(model, RrtForCausalLM):
        raise RrtcError("This model is recursive already.", "Give the dense one.")
    if model.get_output_embeddings() is None:
        raise RrtcError(f"A {type(model).__name__} says no tokens.", "Load it with AutoModelForCausalLM.")
    if plan.architecture != read_architecture(model.config):
        raise WrongUsage(
            "The plan is not of this model's architecture.",
            "Make it with make_plan(read_architecture(model.config), InitRecipe(…)).",
        )
    if any(visit.forms or visit.shapes for visit in plan.visits):
        raise WrongUsage("In memory, matrices can only be tied.", "Forms and narrow FFNs are chosen by api.init.")
    layers = decoder_layers(model)
    parent, name = find_layers(model, len(layers))
    base = next(path for path, module in model.named_modules() if module is parent)
    state = {n: t.clone() for n, t in model.state_dict().items() if not n.startswith(f"{base}.{name}.")}
    for k, (visits, sources) in enumerate(zip(plan.slots, source_layers(plan, AS_IN_PAPER.start), strict=True)):
        dense = {number: _tensors(layers[number]) for number in {visit.layer for visit in visits} | set(sources)}
        for path, tensor in paper_slot(plan, visits, dense, sources, AS_IN_PAPER, model.dtype, {}):
            state[f"{base}.slots.{k}.{path}"] = tensor.to(model.dtype, copy=True)
    state |= {path: tensor.to(model.dtype) for path, tensor in drawn_maps(plan, layers, base).items()}
    config = RrtConfig.of(plan, model.config)
    config.dtype = model.dtype
    with init_empty_weights(include_buffers=False), no_init_weights():
        made = RrtForCausalLM(config)
    made.load_state_dict(state, assign=True)
    made.tie_weights()
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.to(model.device).train(model.training)


def _tensors(layer: nn.Module) -> dict[str, Tensor]:
    """The tensors of a decoder layer by their paths, float32; matrices as (outputs, inputs)."""
    turned = {f"{path}.weight" for path in transposed_matrices(layer)}
    found = {path: parameter.detach().float() for path, parameter in layer.named_parameters()}
    return {path: tensor.T.contiguous() if path in turned else tensor for path, tensor in found.items()}
