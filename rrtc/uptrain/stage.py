"""`rrtc uptrain`: heals an rrtc folder by training, and writes the result as a new folder.

While it runs, NAME.partial/checkpoints holds its checkpoints (rrtc/io/resumable.py), and metrics.jsonl and loss.png
beside them show its course.
"""

import contextlib
import dataclasses
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from rrtc.console import note
from rrtc.io.folder import only_run, partial_of
from rrtc.io.resumable import Resumable
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.unchanged import Unchanged
from rrtc.io.weights import Weights
from rrtc.machine import is_first_process, process_group
from rrtc.recipe.schema import Recipe
from rrtc.units import parse_size
from rrtc.uptrain.checkpoints import Checkpoints, last_sound, remove, whole_checkpoints
from rrtc.uptrain.checks import check_apart
from rrtc.uptrain.curve import draw, steps_of, write_metrics
from rrtc.uptrain.data import Stream
from rrtc.uptrain.display import Display
from rrtc.uptrain.exits import exits_of
from rrtc.uptrain.guards import Course, LossGuard, Termination, reporters
from rrtc.uptrain.job import Job, prepare
from rrtc.uptrain.sharding import whole_state
from rrtc.uptrain.stability import gains_of
from rrtc.uptrain.teacher_cache import fill
from rrtc.uptrain.trainer import DistillationTrainer

CHECKPOINTS = "checkpoints"


def uptrain(folder: str, output: str, recipe: Recipe, resume: bool = False) -> dict:
    """Trains the model in the rrtc folder `folder` into the new folder `output`; returns what was measured (also in
    its rrtc.yaml under measured.uptrain).

    resume: go on from the last checkpoint of an interrupted run to the same output. Under torchrun, every process
    calls this, and the first one writes. Raises RrtcError or WrongUsage before any work for what can be known in
    advance, and where another run is writing `output`; after an error, NAME.partial stays only if it holds a
    checkpoint.
    """
    with only_run(Path(output)) if is_first_process else contextlib.nullcontext(), Unchanged(Path(folder)).blamed():
        return _uptrain(Path(folder), Path(output), recipe, resume)


def _uptrain(folder: Path, target: Path, recipe: Recipe, resume: bool) -> dict:
    disable_progress_bar()  # transformers' own
    making = resumable(target)
    check_apart(recipe.uptrain, target)
    making.check(resume, folder)
    job = prepare(folder, recipe.uptrain)
    max_shard_bytes, fingerprint = _max_shard_bytes(job, recipe), job.fingerprint()
    if resume:
        making.check_same(fingerprint)
    making.check_space(job.checkpoint_bytes())
    checkpoint = last_sound(making.finished()) if resume else None

    # Every process has now seen the disk as it was. From here on, the first one changes it.
    process_group().wait_for_everyone()
    with making.folder(resume, fingerprint) as partial:
        job, cached = _fill_cache(job)
        trainer = _train(job, making.kept, checkpoint)
        measured, state = trainer.measured() | cached, whole_state(trainer.model)
        if is_first_process:
            _write(job, trainer, state, measured, partial, target, max_shard_bytes)
    process_group().wait_for_everyone()  # nobody goes on before the folder is there
    return measured


def resumable(target: Path) -> Resumable:
    """The making of `target`. There is something to go on from once a checkpoint is whole."""
    checkpoints = partial_of(target) / CHECKPOINTS

    def unfinished() -> set[Path]:
        # One that was cut off would count among the two last ones, and the last whole one could go in its place.
        return set(checkpoints.glob("checkpoint-*")) - set(whole_checkpoints(checkpoints))

    return Resumable(target, CHECKPOINTS, lambda: whole_checkpoints(checkpoints), unfinished, remove)


def _max_shard_bytes(job: Job, recipe: Recipe) -> int:
    """The largest size of a weights file: as the input folder was asked to be written, or else what `recipe` says."""
    asked = (job.provenance["recipe"] or {}).get("init") or {}
    return parse_size(str(asked.get("max_shard_size", recipe.init.max_shard_size)))


def _fill_cache(job: Job) -> tuple[Job, dict]:
    """The job when its teacher cache, if it has one, holds all it needs; and what `measured` says about the cache."""
    if job.cache is None:
        return job, {}
    windows = Stream(job.text, job.steps * job.recipe.batch_size)
    dtype = torch.bfloat16 if job.bfloat16 else torch.float32
    found = fill(job.cache, windows, job.teacher.folder if job.teacher else None, dtype, process_group())
    note(
        f"The teacher cache has all {found['windows']} windows, {found['reused']} of them from before, in "
        f"{found['bytes_per_token']} bytes a token"
    )
    return dataclasses.replace(job, teacher=None), {"teacher_cache": found}


def _train(job: Job, checkpoints: Path, checkpoint: Path | None) -> DistillationTrainer:
    what = f"{job.tokens} tokens in {job.steps} steps of {job.recipe.batch_size} windows of {job.context}"
    taught = "with a teacher" if job.taught_by else "without a teacher"
    note(f"Uptraining on {what}, {taught}, at a learning rate of {job.learning_rate:.1e} at most")
    folder, termination = checkpoints.parent, Termination()
    trackers = reporters(job.recipe.report_to, folder)
    # In this order: a step that failed is not written down.
    guards = [LossGuard(job), Checkpoints(job), termination, Course(folder, _title(job))]
    with Display(job.steps, job.tokens) as display:
        trainer = DistillationTrainer(job, job.steps, checkpoints, save=True, callbacks=[*guards, *trackers, display])
        with termination:
            if checkpoint is None:
                trainer.begin()
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            termination.check(job.steps)
    return trainer


def _title(job: Job) -> str:
    loops = max(len(visits) for visits in job.plan.slots)
    return f"Uptraining {Path(job.provenance['base']['uri']).name} with {loops} loops"


def _write(
    job: Job,
    trainer: DistillationTrainer,
    state: dict[str, torch.Tensor],
    measured: dict,
    folder: Path,
    target: Path,
    max_bytes: int,
) -> None:
    """Writes the trained model, whose weights are `state`, into `folder`, which will become `target`: the tensors that
    the input folder has, under the same names and in the same dtype, gains and maps of exits."""
    writer, given = ShardWriter(folder, max_bytes), list(Weights(job.folder))
    added = [name for name in (*gains_of(trainer.model), *exits_of(trainer.model)) if name not in given]
    for name in [*given, *added]:
        writer.add(name, state[name].to("cpu", getattr(torch, job.dtype)))
    writer.finish()
    steps = steps_of(trainer.state.log_history)
    write_metrics(steps, folder / "metrics.jsonl")
    draw(steps, _title(job), folder / "loss.png")
    job.complete(folder, measured, target)
