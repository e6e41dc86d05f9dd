"""Quantized exports: the recursive or the dense format with the matrices of its layers in 8 or 4 bits.

The file format is `pack-quantized` of compressed-tensors, which transformers and vLLM read: weights packed into int32,
and beside them a scale for each group of inputs. Norms and every LoRA or low-rank factor stay as they are: they are
small, or rounding them costs more than it saves.

Embeddings and the output projection of the recursive format are int8 rows with a scale each (model/rows_rrt.py), for
int4 too, where 4 bits would cost far more than they save. Those of the dense format stay as they are: transformers 5.23
fails to load an embedding of compressed-tensors (it has no weight), and vLLM 0.32 one that is tied.

What is rounded, and how, is in rrtc.tying.rounding. Here the plain export, already written, is loaded, run over the
calibration text, rounded in memory one slot after the other, and written over. Its bits per byte are measured on text
held out of the calibration: before, with every weight rounded to its nearest number, and as it is written.
"""

import importlib.util
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrtc.console import note, progress
from rrtc.errors import RrtcError
from rrtc.export.verify import fixed_ids, logits_of
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.source import load_model
from rrtc.io.weights import Weights, row_blocks
from rrtc.machine import device
from rrtc.model import RrtConfig
from rrtc.model.graft_rrt import RelaxedLinear, find_layers
from rrtc.model.rows_rrt import BITS as TABLE_BITS
from rrtc.model.rows_rrt import tables_of
from rrtc.scoring import score
from rrtc.stock.architecture import read_architecture
from rrtc.stock.parts import watching
from rrtc.storage import group_of
from rrtc.text.windows import Windows
from rrtc.tying.moments import Gathering
from rrtc.tying.rounding import best_factors, best_scales, gptq, round_to_nearest, widest_scales
from rrtc.units import size

MOMENTS_AT_ONCE = 2 << 30  # bytes: the text is read several times where the moments of all slots take more


@dataclass(frozen=True)
class Matrix:
    """A weight matrix and the modules that compute with it: itself, or the visits of its slot. `linear` is an
    nn.Linear with the weight (outputs, inputs); group: inputs with a scale in common."""

    name: str
    linear: nn.Linear
    readers: tuple[nn.Module, ...]

    @property
    def group(self) -> int:
        return group_of(self.linear.in_features)

    @property
    def moment_bytes(self) -> int:
        return 4 * len(self.readers) * self.linear.in_features**2


@dataclass(frozen=True)
class Quantized:
    """logits: of verify.fixed_ids, (rows, tokens, vocabulary), float32, of the model in memory; plain: the same before
    it was quantized. rounding: how far that moved one of them at most. bits_per_byte: plain, nearest and calibrated, on
    held-out text. parts: of what the files have, by what it is for: its number format, and bytes."""

    logits: Tensor
    plain: Tensor
    rounding: float
    bits_per_byte: dict[str, float]
    parts: dict[str, dict[str, str | int]]


def check_installed() -> None:
    """Raises RrtcError where compressed-tensors is not."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise RrtcError(
            "Quantizing needs compressed-tensors, which is not installed.",
            "Install it with 'pip install rrtc[quantize]'.",
        )


def quantize(folder: Path, bits: int, calibration: Tensor, held_out: Windows, shard_bytes: int) -> Quantized:
    """Rounds the matrices of the recursive or dense model in `folder`, just written, in its files; the rest stays.

    calibration: token ids (windows, context). The model is in memory once, in float32, with at most MOMENTS_AT_ONCE or
    the moments of one matrix, and a few more of the largest of these in float64.
    """
    weights = Weights(folder)
    dtype = getattr(torch, weights.dtype)
    # On an accelerator where there is one with float64, which the rounding is worked out in.
    place = device() if device().type == "cuda" else torch.device("cpu")
    model = load_model(folder, dtype=torch.float32).to(place)
    matrices = _matrices(model)
    ids = fixed_ids(model.config).to(place)
    plain, found = logits_of(model, ids), {"plain": score(model, held_out).bits_per_byte}
    tables = _round_tables(model, dtype) if isinstance(model.config, RrtConfig) else {}
    for matrix in matrices:
        scale = _stored_scale(widest_scales(matrix.linear.weight.data, bits, matrix.group), dtype)
        matrix.linear.weight.data = round_to_nearest(matrix.linear.weight.data, scale, bits)
    found["nearest"] = score(model, held_out).bits_per_byte
    for matrix in matrices:
        matrix.linear.weight.data = weights.read(f"{matrix.name}.weight").to(place)
    scales: dict[str, Tensor] = {}
    parts = list(_parts(matrices))
    with progress("Reading the calibration text", len(parts) * len(calibration)) as advance:
        for part in parts:
            moments = _moments(model, part, calibration, advance)
            for matrix in part:
                scales[matrix.name] = _round(matrix, moments, bits, dtype)
    found["calibrated"] = score(model, held_out).bits_per_byte
    logits = logits_of(model, ids)
    _write(folder, weights, model, scales, tables, bits, dtype, shard_bytes)
    _write_config(folder, model, matrices, bool(tables), bits)
    if isinstance(model.config, RrtConfig):
        _compare_with_dense(model.config, Weights(folder).bytes_on_disk, bits, dtype)
    parts = _parts_of(Weights(folder), bits, dtype)
    return Quantized(logits.cpu(), plain.cpu(), (logits - plain).abs().max().item(), found, parts)


@torch.no_grad()
def _round_tables(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Rounds embeddings and the output projection of a recursive `model`, in place, row by row; returns the scales
    (rows, 1) by the names of their modules."""
    scales = {}
    for name, module in tables_of(model.stock)[0].items():
        weight, found = module.weight.data, []
        for rows in row_blocks(weight.shape):
            found.append(_stored_scale(widest_scales(weight[rows], TABLE_BITS, weight.shape[1]), dtype))
            weight[rows] = round_to_nearest(weight[rows], found[-1], TABLE_BITS)
        scales[name] = torch.cat(found)
    return scales


def _parts_of(weights: Weights, bits: int, dtype: torch.dtype) -> dict[str, dict[str, str | int]]:
    """As Quantized.parts: what is packed, what is in int8 rows, and everything else."""
    kinds = {"weight_packed": "layers", "weight_scale": "layers", "weight_shape": "layers"}
    found = {"layers": f"int{bits}", "tables": f"int{TABLE_BITS}", "rest": str(dtype).removeprefix("torch.")}
    sizes = dict.fromkeys(found, 0)
    for name in weights:
        last = name.rpartition(".")[2]
        sizes["tables" if last in ("numbers", "scale") else kinds.get(last, "rest")] += weights.raw(name).nbytes
    return {part: {"number": number, "bytes": sizes[part]} for part, number in found.items() if sizes[part]}


def _compare_with_dense(config: RrtConfig, written: int, bits: int, dtype: torch.dtype) -> None:
    """Says so where the dense format, with its layers' matrices in `bits` and the rest in `dtype`, would take less than
    the recursive one, of so many bytes."""
    architecture = read_architecture(config.base_config)
    inside = sum(matrix.size for layer in architecture.layers for matrix in layer.matrices)
    dense = inside * bits // 8 + (architecture.parameters - inside) * dtype.itemsize
    if dense < written:
        number = str(dtype).removeprefix("torch.")
        note(f"The dense format would take about {size(dense)}: here all LoRA is beside it, in {number}.")


def _matrices(model: PreTrainedModel) -> list[Matrix]:
    """The linear layers inside the decoder layers of `model`, recursive or stock, slot by slot."""
    parent, layers = find_layers(model, model.config.get_text_config().num_hidden_layers)
    container = getattr(parent, "slots", getattr(parent, layers))  # visits have only maps of exits beside their slots
    prefix = next(name for name, module in model.named_modules() if module is container)
    visits = [module for module in model.modules() if isinstance(module, RelaxedLinear) and module.shared is not None]
    found = []
    for name, module in container.named_modules():
        if isinstance(module, nn.Linear):
            readers = tuple(visit for visit in visits if visit.shared() is module)
            found.append(Matrix(f"{prefix}.{name}", module, readers or (module,)))
    return found


def _parts(matrices: list[Matrix]) -> Iterator[list[Matrix]]:
    """`matrices` in runs whose moments are in memory at a time."""
    part: list[Matrix] = []
    for matrix in matrices:
        if part and sum(m.moment_bytes for m in [*part, matrix]) > MOMENTS_AT_ONCE:
            yield part
            part = []
        part.append(matrix)
    yield part


@torch.inference_mode()
def _moments(model: PreTrainedModel, matrices: list[Matrix], calibration: Tensor, advance) -> dict[nn.Module, Tensor]:
    """The mean of x x^T over all tokens, (inputs, inputs), float32, of what enters each reader of `matrices`.
    `calibration`: (windows, context). Readers of the same input (queries, keys and values) have one tensor."""
    found: dict[nn.Module, Gathering] = {}
    last: tuple[Tensor, Gathering] | None = None  # an input, and where it went

    def read(module: nn.Module, inputs: Tensor) -> None:
        nonlocal last
        if last is None or last[0] is not inputs:
            last = inputs, found.get(module) or Gathering(calibration.numel(), always_full=True)
            last[1].add(inputs.flatten(0, -2))
        found[module] = last[1]

    with watching(inputs={reader: partial(read, reader) for matrix in matrices for reader in matrix.readers}):
        for ids in calibration:
            model(ids[None].to(model.device), use_cache=False)
            advance()
    means = {gathering: gathering.finish() for gathering in dict.fromkeys(found.values())}
    return {module: means[gathering] for module, gathering in found.items()}


@torch.no_grad()
def _round(matrix: Matrix, moments: Mapping[nn.Module, Tensor], bits: int, dtype: torch.dtype) -> Tensor:
    """Rounds `matrix` in place and chooses the LoRA factors of its visits anew; returns the scales, (outputs, groups),
    in `dtype`, as they will be stored."""
    pooled = sum(moments[reader] for reader in matrix.readers)
    weight = matrix.linear.weight.data
    scale = _stored_scale(best_scales(weight, bits, matrix.group, pooled.diagonal()), dtype)
    matrix.linear.weight.data = gptq(weight, pooled, scale, bits)
    lost = weight - matrix.linear.weight.data
    for reader in matrix.readers:
        if isinstance(reader, RelaxedLinear) and reader.rank:
            b, a = best_factors(lost + reader.B @ reader.A, moments[reader], reader.rank)
            reader.B.copy_(_stored(b, dtype))
            reader.A.copy_(_stored(a, dtype))
    return scale.to(dtype)


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor` as it is after it was stored in `dtype`."""
    return tensor.to(dtype).to(tensor.dtype)


def _stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale` as it is stored; one that is too small for `dtype` becomes 1, which rounds its weights to 0."""
    stored = _stored(scale, dtype)
    return torch.where(stored > 0, stored, 1.0)


def _write(
    folder: Path, weights: Weights, model: PreTrainedModel, scales: dict[str, Tensor], tables: dict[str, Tensor],
    bits: int, dtype: torch.dtype, shard_bytes: int,
) -> None:  # fmt: skip
    """Writes the tensors of `model` in place of the files of `weights`: those with `scales` packed, those of `tables`
    in rows with these scales, LoRA factors in `dtype`, the others as they are."""
    state, writer = model.state_dict(), ShardWriter(folder, shard_bytes)
    relaxed = [name for name, module in model.named_modules() if isinstance(module, RelaxedLinear)]
    factors = {f"{name}.{factor}" for name in relaxed for factor in "AB"}
    with progress("Writing weights", len(list(weights))) as advance:
        for name in weights:
            module = name.removesuffix(".weight")
            if module in scales and name != module:
                for part, packed in _packed(state[name].cpu(), scales[module].cpu(), bits).items():
                    writer.add(f"{module}.{part}", packed)
            elif module in tables and name != module:
                scale = tables[module]
                writer.add(f"{module}.table.numbers", (state[name] / scale).round().to(torch.int8).cpu())
                writer.add(f"{module}.table.scale", scale.to(dtype).cpu())
            else:
                writer.add(name, state[name].to(dtype).cpu() if name in factors else weights.raw(name))
            advance()
    for file in [*weights.files, folder / "model.safetensors.index.json"]:
        file.unlink(missing_ok=True)
    writer.finish()


def _scheme(bits: int, group: int) -> dict:
    """The numbers that weights are in, as compressed-tensors calls them."""
    return {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}


def _packed(weight: Tensor, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """What is stored of a rounded `weight` (outputs, inputs) with `scale` (outputs, groups): weight_packed (int32),
    weight_scale and weight_shape."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    numbers = QuantizationArgs(**_scheme(bits, weight.shape[1] // scale.shape[1]))
    scheme = QuantizationScheme(targets=["Linear"], weights=numbers)
    stored = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale.float()}, scheme)
    return stored | {"weight_scale": scale}


def _anywhere(model: PreTrainedModel, name: str) -> str:
    """The module of `model` at `name`, as compressed-tensors looks for it. AutoModel has the same modules without the
    prefix of the model class, so a name may begin with anything."""
    return rf"re:(.*\.)?{re.escape(name.removeprefix(f'{model.base_model_prefix}.'))}$"


def _write_config(folder: Path, model: PreTrainedModel, matrices: list[Matrix], tables: bool, bits: int) -> None:
    """Adds to the config.json of `folder` what is quantized, and how. tables: whether embeddings are in rows."""
    quantized = {matrix.linear for matrix in matrices}
    names = {module: name for name, module in model.named_modules()}
    groups = {}
    for number, group in enumerate(sorted({matrix.group for matrix in matrices})):
        targets = [_anywhere(model, m.name) for m in matrices if m.group == group]
        groups[f"group_{number}"] = {"targets": targets, "weights": _scheme(bits, group)}
    if len(groups) == 1:
        groups["group_0"]["targets"] = ["Linear"]
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(_anywhere(model, names[m]) for m in names if isinstance(m, nn.Linear) and m not in quantized),
    }
    if tables:
        config["table_bits"] = TABLE_BITS
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
