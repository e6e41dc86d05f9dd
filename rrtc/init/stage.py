"""`rrtc init`: reads a dense model slot by slot, ties it, and writes the recursive model.

What is finished waits in NAME.partial/work (job.py), so that an interrupted run can go on from there.
"""

import gc
import time
from collections.abc import Callable, Hashable, Iterable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rrtc import machine
from rrtc.console import note, progress, whole_progress
from rrtc.errors import WrongUsage
from rrtc.init import phases
from rrtc.init.allocate import Group
from rrtc.init.alternatives import alternatives, said
from rrtc.init.budget import explain, measure_groups, plan_under
from rrtc.init.calibrate import Calibration, calibrate, layers_done
from rrtc.init.job import OWN_TEXT_FILE, Job, prepare, resumable
from rrtc.init.lineup import Lineup
from rrtc.init.memory import return_freed_memory
from rrtc.init.prove import prove
from rrtc.init.slots import joint_slot, paper_slot, source_layers
from rrtc.init.windows import LOOKUP_WINDOWS, lookups, measured_ways, rules
from rrtc.io.dense import DenseModel
from rrtc.io.folder import only_run, whole_file
from rrtc.io.provenance import REPLAN, base_seen_from, next_history, read_provenance, write_provenance
from rrtc.io.recursive import RecursiveModel, copy_with_plan, write_recursive
from rrtc.io.resumable import discard
from rrtc.io.source import load_tokenizer
from rrtc.io.weights import Weights
from rrtc.kv_budget import Head, KindLosses, KvBudget, cheapest
from rrtc.plan import Plan, kv_bytes_at
from rrtc.recipe.schema import Recipe
from rrtc.recipe.section import BUILT_IN_TEXT
from rrtc.stock.streamed import StreamedModel
from rrtc.stock.trial import find_neurons
from rrtc.storage import NUMBER_BYTES
from rrtc.text.own import own_text
from rrtc.text.windows import Windows
from rrtc.tying.neurons import Neurons
from rrtc.units import parse_size

Key = TypeVar("Key", bound=Hashable)

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
    with (
        job.source.files.blamed(),
        folder.folder(resume, job.fingerprint()) as partial,
        whole_progress(phases.weights(job)),
    ):
        try:
            plan, measured = _tie(job)
        except WrongUsage:  # a recipe that turns out to be impossible stays so, and the work is for no other
            discard(partial)
            raise
        measured |= _write(job, plan, partial, shard_bytes)
        if "owner" in plan.features:
            note("What that costs is not measured here, where one layer runs after the other: 'rrtc eval' measures it.")
        elif job.scoring is not None:
            measured["loss"] = _closing_measurement(job.dense, partial, job.scoring)
        measured["seconds"] = round(time.monotonic() - started, 1)
        _say_where_from(job, plan, partial, target, measured)
    return measured


def _say_where_from(job: Job, plan: Plan, partial: Path, target: Path, measured: dict) -> None:
    """Writes rrtc.yaml into `partial`, which will become `target`."""
    asked = job.recipe.init.resolved()
    if job.is_replan:
        before = read_provenance(job.source.folder)
        base = base_seen_from(target, job.source.folder, before)
        kept = before["recipe"] | {
            "init": (before["recipe"].get("init") or {}) | {n: v for n, v in asked.items() if n.startswith("kv_")},
            REPLAN: {"model": job.source.uri, "init": asked},
        }
        job.source.files.check()
        write_provenance(partial, "init", base, kept, before["measured"] | {"windows": measured}, next_history(before))
        return
    base = job.source.provenance(target) | {
        "params_total": plan.architecture.parameters,
        "params_non_embedding": plan.architecture.non_embedding,
    }
    job.source.files.check()
    write_provenance(partial, "init", base, {"model": job.source.uri, "init": asked}, {"init": measured}, [])


def _tie(job: Job) -> tuple[Plan, dict]:
    """Finishes every slot. Returns the plan, and what was measured on the way."""
    joint = job.recipe.init.start == "joint"
    neurons = find_neurons(job.dense.config) if joint else []
    calibration, heads = (None, None) if job.calibration is None else _calibrate(job, neurons)
    if job.is_replan:
        plan, measured = job.plan, {}
    elif joint:
        plan, measured = _tie_jointly(job, calibration, neurons)
    else:
        plan, measured = _tie_as_in_paper(job)
    if job.kv_budget is None:
        return plan, measured
    ways, lookups = heads or ([(job.kv_budget, {})], {})
    plan, cost, said = cheapest(ways, plan, lookups)
    if cost is not None:
        text = f"windows of {job.calibration.shape[1]:,} tokens of the calibration text"
        said += f" On {text} what was chosen costs about {cost:.3f} nats a token, and more in longer ones."
    note(said)
    return plan, measured | {"predicted_window_cost": cost and round(cost, 4)}


def _calibrate(
    job: Job, neurons: list[Neurons]
) -> tuple[Calibration, tuple[list[tuple[KvBudget, KindLosses]], dict[Head, float]] | None]:
    """(what was gathered about the layers; the ways to spend a KV budget that goes by what was measured, with
    what windows cost the KV heads in each, and what each head looks up)."""
    dense, recipe, ids, device = job.dense, job.recipe.init, job.calibration, machine.device()
    if job.own_windows:
        ids = torch.cat([ids, _own_text(job)])
    elif recipe.calibrate_on == [BUILT_IN_TEXT]:
        note("Calibrating on Python's language reference alone. --calibrate-on takes text like what the model is for.")
    budget = job.kv_budget if job.kv_budget is not None and job.kv_budget.is_measured else None
    done = sum(layers_done(job.work, dense.depth))
    model = StreamedModel(dense.config, dense.raw, device)
    with progress(phases.CALIBRATING, 2 * dense.depth * len(ids), done * len(ids)) as advance:
        every = None if budget is None else rules(budget, job.plan, model.layers, dense)
        moments = recipe.start == "joint"
        calibration = calibrate(dense, model, neurons, ids, job.work, device, advance, every, moments)
    if budget is None:
        return calibration, None
    tokenizer, count = load_tokenizer(job.source.folder), min(LOOKUP_WINDOWS, len(ids))
    with progress(phases.LOOKUPS, dense.depth * count) as advance:
        able = lookups(budget, dense, model, tokenizer, ids, recipe.seed, job.work, device, advance)
    return calibration, (measured_ways(budget, calibration), able)


def _tie_as_in_paper(job: Job) -> tuple[Plan, dict]:
    """Measured is the share of what tying lost that the factors restore, for each matrix and for each layer."""
    plan, dtype = job.plan, getattr(torch, job.dtype)
    sources = source_layers(plan, job.recipe.init.start)

    def make(k: int) -> Slot:
        visits, energies = plan.slots[k], {}
        wanted = {visit.layer for visit in visits} | set(sources[k])
        layers = {number: job.dense.layer(number, machine.device()) for number in wanted}
        return paper_slot(plan, visits, layers, sources[k], job.recipe.init, dtype, energies), energies

    _make_slots(job, plan, make)
    found = [
        (name, int(layer), *energies)
        for k in range(len(plan.slots))
        for name, by_layer in job.slot_energies(k).items()
        for layer, energies in by_layer.items()
    ]
    return plan, {
        "residual_energy_kept": _kept((name, restored, lost) for name, _, restored, lost in found),
        "residual_energy_kept_by_layer": _kept(sorted((layer, restored, lost) for _, layer, restored, lost in found)),
    }


def _kept(found: Iterable[tuple[Key, float, float]]) -> dict[Key, float]:
    """The share of what was lost that was restored, of (what it is about, energy restored, energy lost)."""
    totals: dict[Key, list[float]] = {}
    for key, restored, lost in found:
        total = totals.setdefault(key, [0.0, 0.0])
        total[0], total[1] = total[0] + restored, total[1] + lost
    return {key: round(restored / lost, 4) if lost else 1.0 for key, (restored, lost) in totals.items()}


def _tie_jointly(job: Job, calibration: Calibration, neurons: list[Neurons]) -> tuple[Plan, dict]:
    """Chooses under the size or the budget if there is one, and ties. Measured are the nats a token that a chosen plan
    is predicted to cost, and what others would, where no pattern was asked for."""
    plan, dense, recipe = job.plan, job.dense, job.recipe.init
    device, excess = machine.device(), None
    gc.collect()  # the streamed model refers to itself
    target, rows = job.target, []
    lineups: list[Lineup] = []
    if target is not None:
        free = recipe.pattern == "auto"

        def measure(pattern: Plan, most: int | None = None, way: str = "") -> list[Group]:
            called = phases.trying(way) if way else phases.PLANNING
            return measure_groups(
                pattern, free, dense, calibration, neurons, device, job.work, most, called, target.numbers
            )

        def choose(pattern: Plan, groups: list[Group]) -> tuple[Plan, float]:
            return plan_under(pattern, groups, target, neurons)

        groups = measure(plan)
        plan, excess = choose(plan, groups)
        lineups = [one for group in groups for one in group.lineups]
        note(explain(plan, excess, free))
        if recipe.sharing is None:
            rows = alternatives(recipe, target, (plan, excess), measure, choose)
            if len(rows) > 1:
                note(said(rows))

    def make(k: int) -> Slot:
        layers = {visit.layer: dense.layer(visit.layer, device) for visit in plan.slots[k]}
        seen = {number: calibration.seen(number, tensors) for number, tensors in layers.items()}
        return joint_slot(plan, plan.slots[k], layers, seen, neurons, lineups), {}

    _make_slots(job, plan, make)
    found = {"predicted_excess": excess and round(excess, 4)}
    return plan, found | ({"alternatives": rows} if rows else {})


def _own_text(job: Job) -> Tensor:
    """What the model writes to be calibrated on, ids (windows, context)."""
    file, context = job.work / OWN_TEXT_FILE, job.calibration.shape[1]
    if not file.exists():
        tokenizer, tokens = load_tokenizer(job.source.folder), job.own_windows * (context - 1)
        with progress(phases.OWN_TEXT, tokens) as advance:
            written = own_text(job.source.folder, tokenizer, job.own_windows, context, job.recipe.init.seed, advance)
            ids = torch.cat(list(written))
        job.source.files.check()
        with whole_file(file) as temporary:
            save_file({"ids": ids}, temporary)
    return load_file(file)["ids"]


def _make_slots(job: Job, plan: Plan, make: Callable[[int], Slot]) -> None:
    """Makes and saves the slots of `plan` that are not finished, one after the other. make(k): slot k."""
    missing = job.missing_slots(plan)
    with progress(phases.TYING, len(plan.slots), len(plan.slots) - len(missing)) as advance:
        for k in missing:
            job.save_slot(k, *make(k))
            advance()


def _write(job: Job, plan: Plan, folder: Path, shard_bytes: int) -> dict:
    """Writes the model into `folder`, all but its rrtc.yaml, from the finished slots and what lies outside them.
    Returns its sizes."""
    width, numbers = NUMBER_BYTES[job.dtype], job.numbers
    quantized = {} if numbers.bits is None else {"quantized_bytes": numbers.bytes(plan)}
    if isinstance(job.dense, RecursiveModel):
        written = copy_with_plan(job.dense, plan, folder, shard_bytes)
    else:

        def slots(advance: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
            for k in range(len(plan.slots)):
                yield from job.slot(k)
                advance()

        with progress(phases.WRITING, len(plan.slots)) as advance:
            written = write_recursive(folder, job.dense, plan, slots(advance), job.dtype, shard_bytes)
    return {
        "params_total": plan.parameters,
        "params_non_embedding": plan.non_embedding,
        "dense_params_total": plan.architecture.parameters,
        "dense_params_non_embedding": plan.architecture.non_embedding,
        "bytes": written,
        "dense_bytes": plan.architecture.parameters * width,
        "bytes_on_disk": Weights(folder).bytes_on_disk,
        **quantized,
        "flops_per_token": plan.flops_per_token,
        "dense_flops_per_token": plan.architecture.flops_per_token,
        "source_bytes": job.source.bytes_on_disk if job.source.is_gguf else None,
        "kv_bytes": kv_bytes_at(plan, width),
        "dense_kv_bytes": kv_bytes_at(plan.architecture, width),
        "folded_norms": [fold.norm for fold in job.dense.folds],
    }


def _closing_measurement(given: DenseModel | RecursiveModel, compressed: Path, windows: Windows) -> dict:
    """The loss of the model that was `given` and of the `compressed` one before any training, in nats per token. Both
    are run layer by layer, so that neither is ever in memory whole."""
    device, losses = machine.device(), {"tokens": windows.ids.shape[0] * (windows.ids.shape[1] - 1)}
    first = "given" if isinstance(given, RecursiveModel) else "dense"
    with progress(phases.SCORING, 2 * given.depth * len(windows.ids)) as advance:
        for name, one in ((first, given), ("after_init", RecursiveModel(compressed))):
            model = StreamedModel(one.config, one.raw, device)
            states = model.embed(windows.ids)
            model.run(lambda number, one=one: one.layer(number, device), states, one.rules, advance)
            losses[name] = round(model.loss(states, windows.ids), 4)
    return losses
