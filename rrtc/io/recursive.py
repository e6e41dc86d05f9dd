"""A recursive model on disk: what its tensors are called, the dense layers that they amount to, and writing one.

model.slots.3.shared.self_attn.q_proj.weight    W' of slot 3
model.slots.3.loops.1.self_attn.q_proj.A        what the visit of loop 1 has of its own: factors, full matrices
model.slots.3.loops.1.input_layernorm.weight    that no other visit uses, norms and biases
model.embed_tokens.weight                       all that lies outside the layers, as the stock model calls it
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from rrtc.architecture import Matrix
from rrtc.features import check_carried
from rrtc.io.dense import DenseModel
from rrtc.io.folder import copy_companions
from rrtc.io.provenance import PROVENANCE, check_not_quantized, read_provenance
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.source import read_config
from rrtc.io.trust import without_code
from rrtc.io.weights import Weights, row_blocks
from rrtc.model import RrtConfig
from rrtc.model.attention_rrt import Rule, divided
from rrtc.model.eyes_rrt import attention_of
from rrtc.model.graft_rrt import rule_of
from rrtc.model.linear_rrt import NAME as LINEAR
from rrtc.model.linear_rrt import LinearRule
from rrtc.plain import read_json
from rrtc.plan import Plan, Visit
from rrtc.stock.architecture import decoder_layers, layers_path, read_plan, stock_model
from rrtc.tying.norms import Fold


def trained_exits(folder: Path) -> tuple[int, ...]:
    """The places of the layers after which the model was trained to be left early; none in a dense form, or in a folder
    that rrtc did not write."""
    if not (folder / PROVENANCE).exists():
        return ()
    trained = (read_provenance(folder)["recipe"].get("uptrain") or {}).get("exits")
    config = read_config(folder)
    return read_plan(config).exits if trained not in (None, False, "none") and isinstance(config, RrtConfig) else ()


def in_slot(parent: str, slot: int, name: str) -> str:
    """The name of a tensor that a slot calls `name`. parent: the module that holds the list of layers."""
    return f"{parent}.slots.{slot}.{name}".removeprefix(".")


def shared_name(path: str) -> str:
    """What a slot calls the shared tensor at `path` of a layer."""
    return f"shared.{path}"


def own_name(visit: Visit, path: str) -> str:
    """What a slot calls the tensor at `path` of a layer that is the visit's own."""
    return f"loops.{visit.loop}.{path}"


class EffectiveLayers:
    """What the visits of a recursive model compute with: the tensors of the dense layers that slots, factors and norms
    amount to, float32, matrices as (outputs, inputs)."""

    def __init__(self, weights: Weights, plan: Plan, parent: str):
        """parent: the path of the module that holds the list of layers."""
        self._weights, self._plan, self._parent = weights, plan, parent

    def tensor(self, number: int, path: str, each: Callable = map) -> Tensor:
        """The tensor at `path` of layer `number`. each: a `map` that may work ahead, over blocks of its rows."""
        return torch.cat(list(self.blocks(number, path, each)))

    def blocks(self, number: int, path: str, each: Callable = map) -> Iterator[Tensor]:
        """The same in blocks of its rows. What a narrowed matrix lacks are zeros: removed neurons are at the end of
        each part of the outputs and at the end of the inputs, and compute some number times zero."""
        visit = self._plan.visits[number]
        module, _, kind = path.rpartition(".")
        matrix = next((m for m in self._plan.matrices(visit) if m.name == module), None)
        shape: Sequence[int]
        if matrix and kind == "weight":
            shape, rows_of = visit.shape(matrix)[::-1], self._product(visit, matrix)
        else:
            name = self._own(visit, path)
            if name not in self._weights:  # norms and biases that the slot has once
                name = self._shared(visit, path)
            shape, rows_of = self._weights.shape(name), partial(self._weights.read, name)
            if module in visit.gains and name == self._shared(visit, path):  # a bias that the gain multiplies as well
                rows_of = self._times_gain(visit, module, rows_of)
        if matrix is None or module not in visit.shapes:
            yield from each(rows_of, row_blocks(shape))
            return
        present = shape[0] // len(matrix.parts)
        missing_columns = [0, matrix.inputs - shape[1]] if kind == "weight" else []
        for number_of_part, (_, width) in enumerate(matrix.parts):
            for block in each(rows_of, row_blocks((present, *shape[1:]), first=number_of_part * present)):
                yield nn.functional.pad(block, missing_columns)
            if width > present:
                yield torch.zeros(width - present, *([matrix.inputs] if kind == "weight" else []))

    def _product(self, visit: Visit, matrix: Matrix) -> Callable[[slice], Tensor]:
        """What `matrix` of `visit` multiplies by, whatever its form: rows of it, (rows, inputs)."""
        without = self._without_gain(visit, matrix)
        return self._times_gain(visit, matrix.name, without) if matrix.name in visit.gains else without

    def _times_gain(self, visit: Visit, module: str, rows_of: Callable[[slice], Tensor]) -> Callable[[slice], Tensor]:
        """The rows of a tensor, each times the gain of the output that it is of."""
        gain = self._own(visit, f"{module}.gain")

        def times_gain(rows: slice) -> Tensor:
            return (rows_of(rows).T * self._weights.read(gain, rows)).T

        return times_gain

    def _without_gain(self, visit: Visit, matrix: Matrix) -> Callable[[slice], Tensor]:
        weights, form = self._weights, visit.form(matrix)
        full = (self._shared if form == "tied" else self._own)(visit, f"{matrix.name}.weight")
        if not visit.ranks[matrix.name]:
            return partial(weights.read, full)
        inner, outer = (self._own(visit, f"{matrix.name}.{factor}") for factor in "AB")
        a = weights.read(inner)

        def product(rows: slice) -> Tensor:
            b = weights.read(outer, rows)
            return b @ a if form == "low_rank" else weights.read(full, rows).addmm_(b, a)

        return product

    def _own(self, visit: Visit, path: str) -> str:
        return in_slot(self._parent, visit.slot, own_name(visit, path))

    def _shared(self, visit: Visit, path: str) -> str:
        return in_slot(self._parent, visit.slot, shared_name(path))


def rules_of(plan: Plan, layers: nn.ModuleList) -> dict[int, Rule]:
    """By layer, what its heads attend to where that is not everything; with feature maps as they are drawn, where there
    are any. layers: of the stock model, with weights or without."""
    rules: dict[int, Rule] = {}
    for visit in plan.visits:
        rule = rule_of(visit.fields())
        if isinstance(rule, LinearRule):
            rule = rule.on(layers[visit.layer])
        if rule is not None:
            rules[visit.layer] = rule
    return rules


def maps_of(plan: Plan, layers: nn.ModuleList, parent: str, rules: Mapping[int, Rule]) -> dict[str, nn.Module]:
    """The feature maps in `rules`, by what the names of their tensors begin with."""
    found: dict[str, nn.Module] = {}
    for visit in plan.visits:
        rule = rules.get(visit.layer)
        if isinstance(rule, LinearRule) and rule.maps is not None:
            attention = attention_of(layers[visit.layer])
            path = next(path for path, module in layers[visit.layer].named_modules() if module is attention)
            found[in_slot(parent, visit.slot, own_name(visit, f"{path}.{LINEAR}."))] = rule.maps
    return found


def drawn_maps(plan: Plan, layers: nn.ModuleList, parent: str) -> dict[str, Tensor]:
    """The tensors of all feature maps as they are drawn, by their full names."""
    return _tensors_of(maps_of(plan, layers, parent, rules_of(plan, layers)))


def _tensors_of(maps: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of `maps`, as of maps_of, by their full names."""
    return {f"{prefix}{name}": tensor for prefix, one in maps.items() for name, tensor in one.state_dict().items()}


def plan_by_layer(folder: Path) -> Plan:
    """The plan of the recursive model in `folder`. Raises RrtcError where it cannot be run layer by layer."""
    plan = read_plan(read_config(folder))
    hint = "Plan its KV cache anew from the folder that it was made from."
    check_carried("Running layer by layer", plan.features, hint)
    return plan


class RecursiveModel:
    """A recursive model on disk, read layer by layer as a DenseModel is: what its layers amount to, in float32.

    Its `plan` has the attention that it was written with; `rules` say of layers what their heads attend to, where that
    is not everything.
    """

    def __init__(self, folder: Path):
        """Raises RrtcError where the model in `folder` is quantized, or its config cannot be used."""
        config = read_config(folder)
        check_not_quantized(folder, config)
        self.weights, self.config, self.plan = Weights(folder), config.base_config, plan_by_layer(folder)
        stock = stock_model(self.config)
        self.parent, _ = layers_path(stock)
        self._paths = [[name for name, _ in layer.named_parameters()] for layer in decoder_layers(stock)]
        self._effective = EffectiveLayers(self.weights, self.plan, self.parent)
        self.depth = len(self._paths)
        self.folds: list[Fold] = []  # what was folded is so in the weights
        layers = decoder_layers(stock)
        self.rules = rules_of(self.plan, layers)
        self.maps = maps_of(self.plan, layers, self.parent, self.rules)  # as of maps_of
        for prefix, maps in self.maps.items():
            maps.load_state_dict({name: self.weights.read(f"{prefix}{name}") for name in maps.state_dict()})

    @torch.no_grad()
    def keep_maps(self, number: int, rule: LinearRule) -> None:
        """Gives the feature maps of `rule`, for layer `number`, what the model has learnt for the same KV heads in as
        many features. Those of other heads stay as they are."""
        before, heads = self.rules.get(number), self.plan.architecture.layers[number].kv_heads
        if not isinstance(before, LinearRule) or before.features != rule.features:
            return
        assert before.maps is not None and rule.maps is not None
        learnt = divided(before, heads)[1]
        for place, head in enumerate(divided(rule, heads)[1]):
            if head in learnt:
                for name, tensor in rule.maps.named_parameters():
                    tensor[place] = before.maps.get_parameter(name)[learnt.index(head)]

    def layer(self, number: int, device: torch.device) -> dict[str, Tensor]:
        """As DenseModel.layer."""
        return {path: self._effective.tensor(number, path).to(device) for path in self._paths[number]}

    def raw(self, name: str) -> Tensor:
        """As DenseModel.raw, of a tensor that belongs to no layer."""
        return self.weights.raw(name)


def copy_with_plan(source: RecursiveModel, plan: Plan, folder: Path, shard_bytes: int) -> int:
    """Writes the model `source`, with another plan of what its visits attend to, into the existing `folder`, all but
    its rrtc.yaml; returns the bytes of its tensors. Its weights files are copied as they are, unless one of the plans
    has feature maps: what these have learnt stays (RecursiveModel.keep_maps), and those that are new are drawn."""
    given, layers = source.weights.folder, decoder_layers(stock_model(source.config))
    rules = rules_of(plan, layers)
    for number, rule in rules.items():
        if isinstance(rule, LinearRule):
            source.keep_maps(number, rule)
    new = _tensors_of(maps_of(plan, layers, source.parent, rules))
    kept = [name for name in source.weights if not name.startswith(tuple(source.maps))]
    if source.maps or new:
        writer = ShardWriter(folder, shard_bytes)
        for name in kept:
            writer.add(name, source.raw(name))
        for name, tensor in new.items():
            writer.add(name, tensor.to(getattr(torch, source.weights.dtype)))
        writer.finish()
        written = writer.total_bytes
    else:
        for file in [*source.weights.files, *given.glob("*.safetensors.index.json")]:
            shutil.copyfile(file, folder / Path(file).name)
        written = sum(source.raw(name).nbytes for name in kept)
    values = without_code(read_json(given / "config.json")) | {"visits": [visit.fields() for visit in plan.visits]}
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")
    copy_companions(given, folder)
    return written


def write_recursive(
    folder: Path, dense: DenseModel, plan: Plan, slots: Iterable[tuple[str, Tensor]], dtype: str, shard_bytes: int
) -> int:
    """Writes the recursive model that `plan` makes of `dense` into the existing `folder`, all but its rrtc.yaml;
    returns the bytes of its tensors. slots: the tensors of all slots by their full names, in `dtype`."""
    writer = ShardWriter(folder, shard_bytes)
    for name, tensor in slots:
        writer.add(name, tensor)
    stock = stock_model(dense.config)
    for name, tensor in drawn_maps(plan, decoder_layers(stock), layers_path(stock)[0]).items():
        writer.add(name, tensor.to(getattr(torch, dtype)))
    for name in dense.others():
        writer.add_blocks(name, dense.blocks(name, getattr(torch, dtype)))
    writer.finish()
    config = RrtConfig.of(plan, dense.config)
    config.architectures, config.dtype = ["RrtForCausalLM"], dtype
    config.save_pretrained(folder)
    copy_companions(dense.weights.folder, folder)
    return writer.total_bytes
