"""`rrtc init`: reads a dense model slot by slot, ties it, and writes the recursive model.

What is finished waits in NAME.partial/work (job.py), so that an interrupted run can go on from there.
"""

import gc
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrtc import machine
from rrtc.console import note, progress
from rrtc.errors import WrongUsage
from rrtc.init.budget import explain, measure_groups, plan_under_budget
from rrtc.init.calibrate import calibrate, layers_done
from rrtc.init.dtypes import NUMBER_BYTES
from rrtc.init.job import OWN_TEXT_FILE, Job, prepare, resumable
from rrtc.init.memory import return_freed_memory
from rrtc.init.prove import prove
from rrtc.init.slots import joint_slot, paper_slot, source_layers
from rrtc.io.dense import DenseModel
from rrtc.io.folder import only_run, whole_file
from rrtc.io.provenance import write_provenance
from rrtc.io.recursive import EffectiveLayers, write_recursive
from rrtc.io.resumable import discard
from rrtc.io.source import load_tokenizer
from rrtc.io.weights import Weights
from rrtc.patterns import target_parameters
from rrtc.plan import Plan
from rrtc.recipe.schema import Recipe
from rrtc.recipe.section import BUILT_IN_TEXT
from rrtc.stock.streamed import StreamedModel
from rrtc.stock.trial import find_neurons
from rrtc.text.own import own_text
from rrtc.text.windows import Windows
from rrtc.units import parse_size

# A slot: its tensors and their names in it, float32, and its energies, which fill as they come (slots.paper_slot).
Slot = tuple[Iterator[tuple[str, Tensor]], dict[str, tuple[float, float]]]


def init(model: str, output: str, recipe: Recipe, resume: bool = False) -> dict:
    """Compresses the dense `model` into the folder `output`; returns what was measured (also in its rrtc.yaml).

    resume: go on from what an interrupted run to the same output has finished; the result is the same to the bit, but
    for the seconds, which are those of this run. Raises RrtcError or WrongUsage before any work for what can be known
    in advance, and where another run is writing `output`. After an error NAME.partial stays only if a later run can go
    on from it.
    """
    with only_run(Path(output)):
        return _init(model, Path(output), recipe, resume)


def _init(model: str, target: Path, recipe: Recipe, resume: bool) -> dict:
    started = time.monotonic()
    return_freed_memory()
    shard_bytes = parse_size(recipe.init.max_shard_size)
    folder = resumable(target)
    folder.check(resume)
    job = prepare(model, target, recipe)
    if resume:
        folder.check_same(job.fingerprint())
    else:
        prove(job.dense, machine.device())
    folder.check_space(job.disk_bytes())
    with job.source.files.blamed(), folder.folder(resume, job.fingerprint()) as partial:
        try:
            plan, measured = _tie(job)
        except WrongUsage:  # a recipe that turns out to be impossible stays so, and the work is for no other
            discard(partial)
            raise
        measured |= _write(job, plan, partial, shard_bytes)
        if job.scoring is not None:
            measured["loss"] = _closing_measurement(job.dense, partial, plan, job.scoring)
        measured["seconds"] = round(time.monotonic() - started, 1)
        base = job.source.provenance(target) | {
            "params_total": plan.architecture.parameters,
            "params_non_embedding": plan.architecture.non_embedding,
        }
        job.source.files.check()
        kept = {"model": job.source.uri, "init": recipe.init.resolved()}
        write_provenance(partial, "init", base, kept, {"init": measured}, [])
    return measured


def _tie(job: Job) -> tuple[Plan, dict]:
    """Finishes every slot. Returns the plan, and what was measured on the way."""
    return _tie_as_in_paper(job) if job.calibration is None else _tie_jointly(job)


def _tie_as_in_paper(job: Job) -> tuple[Plan, dict]:
    """Measured is for each matrix the share of what tying lost that its factors restore."""
    plan, dtype = job.plan, getattr(torch, job.dtype)
    sources = source_layers(plan, job.recipe.init.start)

    def make(k: int) -> Slot:
        visits, energies = plan.slots[k], {}
        wanted = {visit.layer for visit in visits} | set(sources[k])
        layers = {number: job.dense.layer(number, machine.device()) for number in wanted}
        return paper_slot(plan, visits, layers, sources[k], job.recipe.init, dtype, energies), energies

    _make_slots(job, plan, make)
    totals: dict[str, tuple[float, float]] = {}
    for k in range(len(plan.slots)):
        for name, (restored, lost) in job.slot_energies(k).items():
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + restored, before[1] + lost)
    kept = {name: round(restored / lost, 4) if lost else 1.0 for name, (restored, lost) in totals.items()}
    return plan, {"residual_energy_kept": kept}


def _tie_jointly(job: Job) -> tuple[Plan, dict]:
    """Calibrates, chooses under the budget if there is one, and ties. Measured are the nats a token that a chosen plan
    is predicted to cost."""
    plan, dense, recipe, ids = job.plan, job.dense, job.recipe.init, job.calibration
    device, predicted = machine.device(), None
    if job.own_windows:
        ids = torch.cat([ids, _own_text(job)])
    elif recipe.calibrate_on == [BUILT_IN_TEXT]:
        note("Calibrating on Python's language reference alone. --calibrate-on takes text like what the model is for.")
    neurons = find_neurons(dense.config)
    done = sum(layers_done(job.work, dense.depth))
    with progress("Calibrating", 2 * dense.depth * len(ids), done * len(ids)) as advance:
        model = StreamedModel(dense.config, dense.raw, device)
        calibration = calibrate(dense, model, neurons, ids, job.work, device, advance)
    del model
    gc.collect()  # it refers to itself
    if recipe.has_budget:
        target = target_parameters(plan.architecture, recipe, NUMBER_BYTES[job.dtype])
        free = recipe.pattern == "auto"
        groups = measure_groups(plan, free, dense, calibration, neurons, device, job.work)
        plan, predicted = plan_under_budget(plan, groups, target, neurons)
        note(explain(plan, predicted, free))

    def make(k: int) -> Slot:
        layers = {visit.layer: dense.layer(visit.layer, device) for visit in plan.slots[k]}
        seen = {number: calibration.seen(number, tensors) for number, tensors in layers.items()}
        return joint_slot(plan, plan.slots[k], layers, seen, neurons), {}

    _make_slots(job, plan, make)
    return plan, {"predicted_excess": predicted and round(predicted, 4)}


def _own_text(job: Job) -> Tensor:
    """What the model writes to be calibrated on, ids (windows, context)."""
    file, context = job.work / OWN_TEXT_FILE, job.calibration.shape[1]
    if not file.exists():
        tokenizer, tokens = load_tokenizer(job.source.folder), job.own_windows * (context - 1)
        with progress("Writing text to calibrate on", tokens) as advance:
            written = own_text(job.source.folder, tokenizer, job.own_windows, context, job.recipe.init.seed, advance)
            ids = torch.cat(list(written))
        job.source.files.check()
        with whole_file(file) as temporary:
            save_file({"ids": ids}, temporary)
    return load_file(file)["ids"]


def _make_slots(job: Job, plan: Plan, make: Callable[[int], Slot]) -> None:
    """Makes and saves the slots of `plan` that are not finished, one after the other. make(k): slot k."""
    missing = job.missing_slots(plan)
    with progress("Tying slots", len(plan.slots), len(plan.slots) - len(missing)) as advance:
        for k in missing:
            job.save_slot(k, *make(k))
            advance()


def _write(job: Job, plan: Plan, folder: Path, shard_bytes: int) -> dict:
    """Writes the model into `folder`, all but its rrtc.yaml, from the finished slots and what lies outside them.
    Returns its sizes."""
    slots = (named for k in range(len(plan.slots)) for named in job.slot(k))
    written = write_recursive(folder, job.dense, plan, slots, job.dtype, shard_bytes)
    return {
        "params_total": plan.parameters,
        "params_non_embedding": plan.non_embedding,
        "bytes": written,
        "dense_bytes": plan.architecture.parameters * NUMBER_BYTES[job.dtype],
        "source_bytes": job.source.bytes_on_disk if job.source.is_gguf else None,
        "folded_norms": [fold.norm for fold in job.dense.folds],
    }


def _closing_measurement(dense: DenseModel, compressed: Path, plan: Plan, windows: Windows) -> dict:
    """The loss of the dense and of the compressed model before any training, in nats per token. Both are run layer by
    layer, so that neither is ever in memory whole."""
    weights, device = Weights(compressed), machine.device()
    effective = EffectiveLayers(weights, plan, dense.parent)

    def compressed_layer(number: int) -> dict[str, torch.Tensor]:
        return {path: effective.tensor(number, path).to(device) for path in dense.paths(number)}

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
