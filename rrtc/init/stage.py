"""`rrtc init`: reads a dense model slot by slot, ties it, and writes the recursive model as it goes."""

import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import torch

from rrtc import measure
from rrtc.checkpoint import (
    ShardWriter,
    check_space,
    check_target,
    copy_companions,
    parse_size,
    whole_folder,
    write_provenance,
)
from rrtc.console import note, progress
from rrtc.init.dense import DenseModel
from rrtc.init.norms import Fold, apply_folds, find_folds
from rrtc.init.tie import tie
from rrtc.model import RrtConfig
from rrtc.model.skeleton import read_architecture
from rrtc.plan import Plan, Visit, make_plan, source_layers
from rrtc.recipe import Recipe
from rrtc.source import Source, find_model, load_tokenizer
from rrtc.text import Windows, longest_context, scoring_texts

WIDTHS = {"float32": 4, "bfloat16": 2, "float16": 2}


def dry_run(model: str, recipe: Recipe) -> dict:
    """What `init` would do, from the config and, where there are weights, their headers: the plan as plain data.

    Raises RrtcError or WrongUsage for what would stop `init` itself, as far as headers show it.
    """
    source = find_model(model, config_only=True)
    has_weights = any(source.folder.glob("*.safetensors"))
    plan = make_plan(read_architecture(source.config()), recipe.init)
    dtype = _dtype(source, recipe, has_weights)
    if has_weights:
        DenseModel(source)  # checks names and shapes
    shard_bytes = parse_size(recipe.init.max_shard_size)
    summary = plan.summary(WIDTHS[dtype], shard_bytes, measured=recipe.init.measure_tokens > 0)
    source_bytes = source.bytes_on_disk if source.is_gguf else None
    asked = {"model": model, "dtype": dtype, "source_bytes": source_bytes, "recipe": recipe.init.model_dump()}
    return asked | summary


def init(model: str, output: str, recipe: Recipe) -> dict:
    """Compresses the dense `model` into the folder `output`; returns what was measured (also in its rrtc.yaml).

    Raises RrtcError or WrongUsage before any work for what can be known in advance.
    """
    started = time.monotonic()
    shard_bytes = parse_size(recipe.init.max_shard_size)
    check_target(Path(output))
    source = find_model(model)
    check_target(Path(output), source.folder)
    plan = make_plan(read_architecture(source.config()), recipe.init)
    tokenizer = load_tokenizer(source.folder)
    dense = DenseModel(source)
    dtype = _dtype(source, recipe, has_weights=True)
    check_space(Path(output), plan.parameters * WIDTHS[dtype])
    windows = None
    if recipe.init.measure_tokens:
        context = longest_context(source.config(), recipe.eval.context)
        windows = next(iter(scoring_texts(recipe, tokenizer, context, recipe.init.measure_tokens).values()))
    folds = _folds(source, recipe)

    with whole_folder(Path(output)) as folder:
        writer = ShardWriter(folder, shard_bytes)
        energies = _write_slots(dense, plan, recipe, folds, getattr(torch, dtype), writer)
        for name in dense.others():
            writer.add(name, dense.read(name).to(getattr(torch, dtype)))
        writer.finish()
        config = RrtConfig(
            base_config=source.config(), visits=[asdict(visit) for visit in plan.visits], norms=plan.norms
        )
        config.architectures, config.dtype = ["RrtForCausalLM"], dtype
        config.save_pretrained(folder)
        copy_companions(source.folder, folder)
        measured = {
            "params_total": plan.parameters,
            "params_non_embedding": plan.non_embedding,
            "bytes": writer.total_bytes,
            "dense_bytes": plan.architecture.parameters * WIDTHS[dtype],
            "source_bytes": source.bytes_on_disk if source.is_gguf else None,
            "residual_energy_kept": {
                name: round(restored / lost, 4) if lost else 1.0 for name, (restored, lost) in energies.items()
            },
            "folded_norms": [fold.norm for fold in folds],
        }
        if windows is not None:
            measured["loss"] = _closing_measurement(source.folder, folder, windows)
        measured["seconds"] = round(time.monotonic() - started, 1)
        base = source.provenance(Path(output)) | {
            "params_total": plan.architecture.parameters,
            "params_non_embedding": plan.architecture.non_embedding,
        }
        kept = {"model": source.uri, "init": recipe.init.model_dump()}
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


def _write_slots(
    dense: DenseModel, plan: Plan, recipe: Recipe, folds: list[Fold], dtype: torch.dtype, writer: ShardWriter
) -> dict[str, tuple[float, float]]:
    """Ties and writes every slot. Returns for each matrix (energy the factors restored, energy that tying lost)."""
    device = measure.device()
    energies: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    with progress("Tying slots", len(plan.slots)) as advance:
        for k, (visits, sources) in enumerate(
            zip(plan.slots, source_layers(plan, recipe.init.shared_init), strict=True)
        ):
            wanted = {visit.layer for visit in visits} | set(sources)
            layers = {number: apply_folds(dense.layer(number, device), folds) for number in wanted}
            prefix = f"{dense.parent}.slots.{k}"
            for matrix in plan.architecture.layers[visits[0].layer].matrices:
                name = f"{matrix.name}.weight"
                tied = tie(
                    [layers[visit.layer][name] for visit in visits],
                    [layers[number][name] for number in sources],
                    [visit.ranks[matrix.name] for visit in visits],
                    recipe.init.lora_init,
                    dtype,
                )
                writer.add(f"{prefix}.shared.{name}", tied.shared.to(dtype).cpu())
                for visit, factors in zip(visits, tied.factors, strict=True):
                    if factors is not None:
                        for letter, factor in zip("BA", factors, strict=True):
                            writer.add(f"{prefix}.loops.{visit.loop}.{matrix.name}.{letter}", factor.to(dtype).cpu())
                if len(visits) > 1:
                    restored, lost = energies[matrix.name]
                    energies[matrix.name] = (restored + tied.restored, lost + tied.lost)
            _write_vectors(layers, visits, sources, plan, prefix, dtype, writer)
            advance()
    return energies


def _write_vectors(
    layers: dict,
    visits: list[Visit],
    sources: list[int],
    plan: Plan,
    prefix: str,
    dtype: torch.dtype,
    writer: ShardWriter,
) -> None:
    """Writes norms and biases: for each visit its layer's own, or for all visits the mean of the source layers'."""
    matrices = {f"{m.name}.weight" for m in plan.architecture.layers[visits[0].layer].matrices}
    for name in (n for n in layers[visits[0].layer] if n not in matrices):
        if plan.norms == "shared":
            mean = torch.stack([layers[number][name] for number in sources]).mean(0)
            writer.add(f"{prefix}.shared.{name}", mean.to(dtype).cpu())
        else:
            for visit in visits:
                writer.add(f"{prefix}.loops.{visit.loop}.{name}", layers[visit.layer][name].to(dtype).cpu())


def _closing_measurement(dense: Path, compressed: Path, windows: Windows) -> dict:
    """The loss of the dense and of the compressed model before any training, in nats per token; one after the other,
    so that they are never in memory together."""
    losses = {"tokens": windows.ids.shape[0] * (windows.ids.shape[1] - 1)}
    with progress("Measuring", 2 * len(windows.ids)) as advance:
        for name, folder in (("dense", dense), ("after_init", compressed)):
            model = measure.load_for_scoring(folder)
            losses[name] = round(measure.score(model, windows, advance=advance).loss, 4)
            del model
    return losses
