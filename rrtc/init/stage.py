"""`rrtc init`: reads a dense model slot by slot, ties it, and writes the recursive model as it goes."""

import gc
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from rrtc import measure
from rrtc.checkpoint import (
    ShardWriter,
    Weights,
    check_space,
    check_target,
    copy_companions,
    whole_folder,
    write_provenance,
)
from rrtc.console import note, progress
from rrtc.effective import effective_tensor
from rrtc.init.budget import explain, measure_groups, plan_under_budget
from rrtc.init.calibrate import bytes_on_disk, calibrate, calibration_windows
from rrtc.init.dense import DenseModel
from rrtc.init.memory import return_freed_memory
from rrtc.init.neurons import find_neurons
from rrtc.init.norms import Fold, find_folds
from rrtc.init.slots import joint_slot, paper_slot
from rrtc.init.streamed import StreamedModel
from rrtc.model import RrtConfig
from rrtc.model.skeleton import read_architecture
from rrtc.plan import Plan, make_plan, source_layers, target_parameters
from rrtc.recipe import InitRecipe, Recipe, parse_size
from rrtc.source import Source, find_model, load_tokenizer
from rrtc.text import Windows, longest_context, scoring_texts

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def dry_run(model: str, recipe: Recipe) -> dict:
    """What `init` would do, from the config and, where there are weights, their headers: the plan as plain data.

    Raises RrtcError or WrongUsage for what would stop `init` itself, as far as headers show it.
    """
    source = find_model(model, config_only=True)
    has_weights = any(source.folder.glob("*.safetensors"))
    architecture = read_architecture(source.config())
    dtype = _dtype(source, recipe, has_weights)
    plan = make_plan(architecture, recipe.init, WIDTHS[dtype])
    if has_weights:
        DenseModel(source)  # checks names and shapes
    parse_size(recipe.init.max_shard_size)  # raises for what is none
    joint = recipe.init.start == "joint"
    tokens = max(recipe.init.measure_tokens, recipe.init.calibrate_tokens if joint else 0)
    summary = plan.summary(WIDTHS[dtype], tokens, joint)
    source_bytes = source.bytes_on_disk if source.is_gguf else None
    if recipe.init.has_budget and joint:
        # What is stored how, and so what it computes, is known once the layers are measured; how much is known now.
        target = target_parameters(architecture, recipe.init, WIDTHS[dtype])
        size = {"params_total": target, "params_non_embedding": target - architecture.embedding - architecture.head}
        unknown = ("params_by_part", "flops_per_token", "visits")
        summary |= size | {"bytes": target * WIDTHS[dtype]} | dict.fromkeys(unknown)
    asked = {"model": model, "dtype": dtype, "source_bytes": source_bytes, "recipe": recipe.init.resolved()}
    return asked | summary


def init(model: str, output: str, recipe: Recipe) -> dict:
    """Compresses the dense `model` into the folder `output`; returns what was measured (also in its rrtc.yaml).

    Raises RrtcError or WrongUsage before any work for what can be known in advance.
    """
    started = time.monotonic()
    return_freed_memory()
    shard_bytes = parse_size(recipe.init.max_shard_size)
    check_target(Path(output))
    source = find_model(model)
    check_target(Path(output), source.folder)
    architecture = read_architecture(source.config())
    dtype = _dtype(source, recipe, has_weights=True)
    plan = make_plan(architecture, recipe.init, WIDTHS[dtype])
    tokenizer = load_tokenizer(source.folder)
    dense = DenseModel(source, _folds(source, recipe))
    context = longest_context(source.config(), recipe.eval.context)
    windows = calibration = None
    if recipe.init.measure_tokens:
        windows = next(iter(scoring_texts(recipe, tokenizer, context, recipe.init.measure_tokens).values()))
    if recipe.init.start == "joint":
        calibration = calibration_windows(recipe.init, tokenizer, context)
    waiting = 0 if calibration is None else bytes_on_disk(architecture, calibration.ids.numel())
    check_space(Path(output), plan.parameters * WIDTHS[dtype] + waiting)

    with whole_folder(Path(output)) as folder:
        writer = ShardWriter(folder, shard_bytes)
        measured = {}
        if calibration is None:
            measured["residual_energy_kept"] = _write_as_in_paper(dense, plan, recipe.init, dtype, writer)
        else:
            with tempfile.TemporaryDirectory(dir=folder) as work:
                plan, measured["predicted_excess"] = _write_jointly(
                    dense, plan, recipe.init, source, calibration, Path(work), dtype, writer
                )
        for name in dense.others():
            writer.add_blocks(name, dense.blocks(name, getattr(torch, dtype)))
        writer.finish()
        config = RrtConfig(
            base_config=source.config(), visits=[asdict(visit) for visit in plan.visits], norms=plan.norms
        )
        config.architectures, config.dtype = ["RrtForCausalLM"], dtype
        config.save_pretrained(folder)
        copy_companions(source.folder, folder)
        measured |= {
            "params_total": plan.parameters,
            "params_non_embedding": plan.non_embedding,
            "bytes": writer.total_bytes,
            "dense_bytes": plan.architecture.parameters * WIDTHS[dtype],
            "source_bytes": source.bytes_on_disk if source.is_gguf else None,
            "folded_norms": [fold.norm for fold in dense.folds],
        }
        if windows is not None:
            measured["loss"] = _closing_measurement(dense, folder, plan, windows)
        measured["seconds"] = round(time.monotonic() - started, 1)
        base = source.provenance(Path(output)) | {
            "params_total": plan.architecture.parameters,
            "params_non_embedding": plan.architecture.non_embedding,
        }
        kept = {"model": source.uri, "init": recipe.init.resolved()}
        write_provenance(folder, "init", base, kept, {"init": measured}, [])
    return measured


def _dtype(source: Source, recipe: Recipe, has_weights: bool) -> str:
    """The number format to write: what the recipe says, or else the source's own, or bfloat16 for a GGUF, which had
    fewer bits than that before it was dequantised."""
    if recipe.init.dtype != "auto":
        return recipe.init.dtype
    if source.is_gguf:
        return "bfloat16"
    stored = source.weights().dtype if has_weights else source.config().dtype or "bfloat16"
    dtype = str(stored).removeprefix("torch.")
    return dtype if dtype in WIDTHS else "float32"


def _folds(source: Source, recipe: Recipe) -> list[Fold]:
    if not recipe.init.fold_norms:
        return []
    folds, others = find_folds(source.config())
    if others:
        note(f"Norms not folded (no matrix reads them directly, or it would not be exact): {', '.join(others)}")
    return folds


def _write_as_in_paper(
    dense: DenseModel, plan: Plan, recipe: InitRecipe, dtype: str, writer: ShardWriter
) -> dict[str, float]:
    """Ties and writes every slot. Returns for each matrix the share of what tying lost that its factors restore."""
    energies: dict[str, tuple[float, float]] = {}
    with progress("Tying slots", len(plan.slots)) as advance:
        for k, (visits, sources) in enumerate(zip(plan.slots, source_layers(plan, recipe.start), strict=True)):
            wanted = {visit.layer for visit in visits} | set(sources)
            layers = {number: dense.layer(number, measure.device()) for number in wanted}
            slot = paper_slot(plan, visits, layers, sources, recipe, getattr(torch, dtype), energies)
            _write(slot, f"{dense.parent}.slots.{k}", dtype, writer)
            del layers, slot  # before the next ones are read
            advance()
    return {name: round(restored / lost, 4) if lost else 1.0 for name, (restored, lost) in energies.items()}


def _write_jointly(
    dense: DenseModel,
    plan: Plan,
    recipe: InitRecipe,
    source: Source,
    text: Windows,
    work: Path,
    dtype: str,
    writer: ShardWriter,
) -> tuple[Plan, float | None]:
    """Calibrates, chooses under the budget if there is one, ties and writes every slot. Returns the plan and the nats a
    token that a chosen one is predicted to cost."""
    device, predicted = measure.device(), None
    neurons = find_neurons(source.config())
    with progress("Calibrating", 2 * dense.depth * len(text.ids)) as advance:
        model = StreamedModel(source.config(), dense.raw, device)
        calibration = calibrate(dense, model, neurons, text.ids, work, device, advance)
    del model
    gc.collect()  # it refers to itself
    if recipe.has_budget:
        target = target_parameters(plan.architecture, recipe, WIDTHS[dtype])
        free = recipe.pattern == "auto"
        groups = measure_groups(plan, free, dense, calibration, neurons, device)
        plan, predicted = plan_under_budget(plan, groups, target, neurons)
        note(explain(plan, predicted, free))
    with progress("Tying slots", len(plan.slots)) as advance:
        for k, visits in enumerate(plan.slots):
            layers = {visit.layer: dense.layer(visit.layer, device) for visit in visits}
            seen = {number: calibration.seen(number, tensors) for number, tensors in layers.items()}
            _write(joint_slot(plan, visits, layers, seen, neurons), f"{dense.parent}.slots.{k}", dtype, writer)
            advance()
    return plan, predicted and round(predicted, 4)


def _write(slot: Iterator[tuple[str, torch.Tensor]], prefix: str, dtype: str, writer: ShardWriter) -> None:
    for name, tensor in slot:
        writer.add(f"{prefix}.{name}", tensor.to(getattr(torch, dtype)).cpu())


def _closing_measurement(dense: DenseModel, compressed: Path, plan: Plan, windows: Windows) -> dict:
    """The loss of the dense and of the compressed model before any training, in nats per token. Both are run layer by
    layer, so that neither is ever in memory whole."""
    weights, device = Weights(compressed), measure.device()

    def compressed_layer(number: int) -> dict[str, torch.Tensor]:
        visit = plan.visits[number]
        slot, matrices = f"{dense.parent}.slots.{visit.slot}", {m.name: m for m in plan.matrices(visit)}
        tensors = {path: effective_tensor(weights, slot, asdict(visit), path, matrices) for path in dense.paths(number)}
        return {path: tensor.to(device) for path, tensor in tensors.items()}

    losses = {"tokens": windows.ids.shape[0] * (windows.ids.shape[1] - 1)}
    with progress("Measuring", 2 * dense.depth * len(windows.ids)) as advance:
        for name, read, layer in (
            ("dense", dense.raw, lambda number: dense.layer(number, device)),
            ("after_init", weights.raw, compressed_layer),
        ):
            model = StreamedModel(dense.config, read, device)
            states = model.embed(windows.ids)
            for number in range(dense.depth):
                model.run_layer(number, layer(number), states, advance=advance)
            losses[name] = round(model.loss(states, windows.ids), 4)
    return losses
