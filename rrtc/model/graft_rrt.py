"""Grafts recursion into a stock model: its list of decoder layers is replaced by visits to shared slots.

    base model
      layers[v]            Visit: stands where dense layer v stood, and calls its slot
      slots[k].shared      the tied matrices, each stored once, without bias
      slots[k].loops[b]    a stock decoder layer with its own layer_idx, norms and biases, whose matrices are
                           RelaxedLinear: W'x + B(Ax) + b, with W' reached in slots[k].shared by name, or without W';
                           or plain nn.Linear, where the visit has a full matrix of its own. Where a visit has a gain
                           for what the matrix adds to the stream: g * (W'x + B(Ax)) + b
      layers[v].exit       a linear map from what visit v returns to what the last one does, where the model may be left
                           after v: so different are the two that the head makes nothing of the former (the "tuned
                           lens", Belrose et al. 2023, arXiv 2303.08112). A whole forward pass does not use it.

This file is shipped in every export beside modeling_rrt.py and imports nothing but torch and transformers.
"""

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from .attention_rrt import Rule
from .eyes_rrt import Documents, Eyes, attention_of
from .landmark_rrt import Landmark
from .linear_rrt import NAME as LINEAR
from .linear_rrt import LinearRule
from .owner_rrt import LoopEyes, Loops, OwnerRule, owned


class Reference:
    """A module that belongs elsewhere in the model: its container and its name there.

    Never the module itself: adapters and quantizers replace modules by setting attributes, and a direct reference
    would go on using the old one. Nor an attribute that torch registers: the parameters would be listed twice.
    """

    def __init__(self, container: nn.Module, name: str):
        self.container, self.name = container, name

    def __call__(self) -> nn.Module:
        return getattr(self.container, self.name)


class RelaxedLinear(nn.Module):
    """One visit's view of a shared matrix: y = W'x + B(Ax) + b  (paper §2.3; LoRA scale 1, there is no alpha).
    Without a shared matrix (None) it is a low-rank one: y = B(Ax) + b. With a gain, all but the visit's own bias is
    multiplied by it, output by output.

    A: (rank, inputs), B: (outputs, rank), bias and gain: (outputs,); A and B are absent at rank 0.
    """

    def __init__(self, shared: Reference | None, inputs: int, outputs: int, rank: int, bias: bool, gain: bool = False):
        super().__init__()
        self.shared = shared
        self.in_features, self.out_features, self.rank = inputs, outputs, rank
        if rank:
            self.A = nn.Parameter(torch.empty(rank, inputs))
            self.B = nn.Parameter(torch.empty(outputs, rank))
        self.bias = nn.Parameter(torch.empty(outputs)) if bias else None
        self.gain = nn.Parameter(torch.empty(outputs)) if gain else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., inputs) -> (..., outputs)
        if self.shared is None:
            return nn.functional.linear(nn.functional.linear(x, self.A), self.B, self.bias)
        y = self.shared()(x)
        if self.rank:
            y = y + nn.functional.linear(nn.functional.linear(x, self.A), self.B)
        if self.gain is not None:
            y = y * self.gain
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        form = "low_rank" if self.shared is None else "tied"
        return f"{self.in_features} -> {self.out_features}, {form}, rank={self.rank}, bias={self.bias is not None}"


class SharedModule(nn.Module):
    """A norm that a slot holds once for all its visits (`norms="shared"`)."""

    def __init__(self, shared: Reference):
        super().__init__()
        self.shared = shared

    def forward(self, *args, **kwargs):
        return self.shared()(*args, **kwargs)


class Slot(nn.Module):
    """One set of layer weights and the visits that use it. The unit for sharding and offloading."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Module()
        self.loops = nn.ModuleList()

    def forward(self, hidden_states, *args, loop: int, **kwargs):
        return self.loops[loop](hidden_states, *args, **kwargs)


class Visit(nn.Module):
    """Stands in the stock list of layers where a dense layer stood: calls its slot, and owns nothing but its exit."""

    def __init__(self, slot: Reference, loop: int, eyes: Eyes | None = None, exit: nn.Linear | None = None):
        """eyes: None where the visit attends to what the stock layer does. exit: None where there is no such map."""
        super().__init__()
        self.slot, self.loop, self.eyes, self.exit = slot, loop, eyes, exit

    def forward(self, hidden_states, *args, **kwargs):
        if self.eyes is not None:
            return self.eyes.run(self, (hidden_states, *args), kwargs)
        return self.slot()(hidden_states, *args, loop=self.loop, **kwargs)

    def __getattr__(self, name):
        # Stock forwards read public attributes off their layers, such as attention_type. Nothing private goes through,
        # and not the checkpointing flag, which torch looks for on every module.
        if name.startswith("_") or name in ("slot", "loop", "eyes", "exit", "gradient_checkpointing"):
            return super().__getattr__(name)
        return getattr(self.slot().loops[self.loop], name)


def find_layers(model: nn.Module, depth: int) -> tuple[nn.Module, str]:
    """Where a stock model keeps its decoder layers: the parent module and the name of the list in it.

    In a grafted one, that is the list of visits. Raises ValueError unless exactly one list of modules is `depth` long.
    """
    found = [
        (parent, name)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == depth
        if not isinstance(parent, Slot) and not any(isinstance(module, Slot) for module in child)
    ]
    if len(found) != 1:
        raise ValueError(f"expected one list of {depth} decoder layers, found {len(found)}")
    return found[0]


def matrices_of(layer: nn.Module) -> dict[str, nn.Module]:
    """The weight matrices of a decoder layer by their path in it: linear layers, and GPT-2's transposed ones."""
    return {name: module for name, module in layer.named_modules() if isinstance(module, (nn.Linear, Conv1D))}


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """(inputs, outputs) of one of `matrices_of`."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


def graft(model: nn.Module, visits: list[dict], norms: str = "per_visit") -> None:
    """Replaces the decoder layers of a stock `model`, in place, by visits to shared slots.

    `visits` and `norms` are as in RrtConfig. Raises ValueError, before anything is replaced, where the layers of a
    slot are not alike, or where a form or shape does not fit.
    """
    parent, name = find_layers(model, len(visits))
    layers, rules = getattr(parent, name), owned(visits, [rule_of(visit) for visit in visits])
    shapes: dict[int, dict] = {}
    tied: dict[tuple[int, str], tuple] = {}
    for layer, visit in zip(layers, visits, strict=True):
        shape = {n: tuple(p.shape) for n, p in layer.named_parameters()}
        if shapes.setdefault(visit["slot"], shape) != shape:
            raise ValueError(f"layer {visit['layer']} does not have the parameters of the layers it is tied to")
        _check_forms(layer, visit, tied)
    slots = nn.ModuleList(Slot() for _ in shapes)
    for layer, visit in zip(layers, visits, strict=True):
        _relax(layer, slots[visit["slot"]], visit, norms)
        slots[visit["slot"]].loops.append(layer)
    rules = [_at_work(rule, layer) for rule, layer in zip(rules, layers, strict=True)]
    # The slots hang beside the old list, inside the stock base model: its hooks look for layers among its children.
    parent.slots = slots
    eyes = _eyes(parent, layers, rules)
    visits_list = nn.ModuleList(
        Visit(Reference(slots, str(visit["slot"])), visit["loop"], eyes.get(place), exit_of(model, visit))
        for place, visit in enumerate(visits)
    )
    setattr(parent, name, visits_list)


def _eyes(parent: nn.Module, layers: nn.ModuleList, rules: list[Rule | None]) -> dict[int, Eyes]:
    """By place, the eyes of the visits that need some, which `parent` tells of its forward passes."""
    documents = Documents(parent)
    if any(rules):
        parent.register_forward_pre_hook(documents.note, with_kwargs=True)
    if not any(isinstance(rule, OwnerRule) for rule in rules):
        return {place: Eyes(layers[place], rule, documents) for place, rule in enumerate(rules) if rule}
    loops = Loops(rules, documents)
    parent.register_forward_pre_hook(loops.begin, with_kwargs=True)
    parent.register_forward_hook(loops.end, always_call=True)
    return {
        place: LoopEyes(layers[place], rule, loops) if place in loops.places else Eyes(layers[place], rule, documents)
        for place, rule in enumerate(rules)
        if rule or place in loops.places
    }


def exit_of(model: nn.Module, visit: dict) -> nn.Linear | None:
    """The map of a visit's exit, not yet filled; None where it has none. It is not trained by whoever trains the model,
    whose passes do not use it."""
    if not visit.get("exit"):
        return None
    width = model.config.get_text_config().hidden_size
    return nn.Linear(width, width, bias=False).requires_grad_(False)


def leave(layer: nn.Module, output):
    """What the final norm is given where a model is left after `layer`, which returned `output`: hidden states, or a
    tuple that begins with them."""
    way_out = getattr(layer, "exit", None)
    if way_out is None:
        return output
    return way_out(output) if isinstance(output, torch.Tensor) else (way_out(output[0]), *output[1:])


def rule_of(visit: dict) -> Rule | None:
    """What the heads of a visit see; None where that is what the stock layer's do."""
    if (attention := visit.get("attention")) is None:
        return None
    seen = attention["window"], attention.get("sinks", 0), tuple(attention.get("heads", ()))
    if linear := attention.get("linear"):
        return LinearRule(*seen, **linear)
    landmark = attention.get("landmark")
    return Rule(*seen, landmark and Landmark(**landmark))


def _at_work(rule: Rule | None, layer: nn.Module) -> Rule | None:
    """The rule for a `layer`, which gets what parameters there are to it."""
    if isinstance(rule, LinearRule):
        rule = rule.on(layer)
        attention_of(layer).add_module(LINEAR, rule.maps)
    return rule


def _matrix_form(visit: dict, path: str, module: nn.Module) -> tuple[str, tuple[int, int]]:
    """What the stock matrix `module` at `path` becomes in `visit`: its form and its (inputs, outputs)."""
    form = visit.get("forms", {}).get(path, "tied")
    return form, tuple(visit.get("shapes", {}).get(path, matrix_shape(module)))


def _check_forms(layer: nn.Module, visit: dict, tied: dict[tuple[int, str], tuple]) -> None:
    """Raises ValueError where a matrix of `visit` cannot be made of `layer`. `tied` collects the shapes of the tied
    matrices by (slot, path)."""
    matrices, where = matrices_of(layer), f"of layer {visit['layer']}"
    gains = set(visit.get("gains") or ())
    unknown = (visit.get("forms", {}).keys() | visit.get("shapes", {}).keys() | gains) - matrices.keys()
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]} is no matrix {where}")
    for path, module in matrices.items():
        (form, shape), rank = _matrix_form(visit, path, module), visit["ranks"][path]
        if form not in ("tied", "low_rank", "own"):
            raise ValueError(f"{path} {where} has the form {form!r}, which is not tied, low_rank or own")
        if form != "tied" and (form == "low_rank") != (rank > 0):
            raise ValueError(f"{path} {where} has the form {form} and the rank {rank}")
        if form != "tied" and path in gains:
            raise ValueError(f"{path} {where} has the form {form} and a gain, which is for tied ones")
        if form == "tied" and tied.setdefault((visit["slot"], path), shape) != shape:
            raise ValueError(f"{path} {where} does not have the shape of the matrix it is tied to")


def _relax(layer: nn.Module, slot: Slot, visit: dict, norms: str) -> None:
    """Makes a stock decoder layer one of the loops of `slot`; the first one that needs them brings shared modules."""
    matrices = matrices_of(layer)
    for path, module in matrices.items():
        (form, (inputs, outputs)), bias = _matrix_form(visit, path, module), module.bias is not None
        if form == "own":
            _replace(layer, path, nn.Linear(inputs, outputs, bias))
            continue
        reference, own_bias = None, bias
        if form == "tied":
            reference, own_bias = _shared_place(slot, path), bias and norms == "per_visit"
            if reference.name not in reference.container._modules:
                reference.container.add_module(reference.name, nn.Linear(inputs, outputs, bias and not own_bias))
        gain = path in (visit.get("gains") or ())
        _replace(layer, path, RelaxedLinear(reference, inputs, outputs, visit["ranks"][path], own_bias, gain))
    if norms == "shared":
        others = [
            (path, module)
            for path, module in layer.named_modules()
            if path and path not in matrices and not list(module.children()) and list(module.parameters())
        ]
        for path, module in others:
            reference = _shared_place(slot, path)
            if reference.name not in reference.container._modules:
                reference.container.add_module(reference.name, module)
            _replace(layer, path, SharedModule(reference))


def _shared_place(slot: Slot, path: str) -> Reference:
    """Where the module at `path` of a layer lives among the slot's shared ones, making containers on the way."""
    container, (*parents, name) = slot.shared, path.split(".")
    for part in parents:
        if part not in container._modules:
            container.add_module(part, nn.Module())
        container = container._modules[part]
    return Reference(container, name)


def _replace(layer: nn.Module, path: str, module: nn.Module) -> None:
    *parents, name = path.split(".")
    setattr(layer.get_submodule(".".join(parents)), name, module)
