"""`rrtc uptrain`: heals an rrtc folder by training, and writes the result as a new folder.

While it runs, NAME.partial/checkpoints holds its checkpoints and resume.json, which says what they belong to, and
metrics.jsonl and loss.png beside them show its course. The checkpoints are removed when NAME.partial has become NAME,
so that a kill at any moment leaves either a run to resume or a whole model, at worst one with a folder `checkpoints`
that nothing reads.
"""

import contextlib
import dataclasses
import json
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.io.folder import (
    check_incomplete,
    check_not_interrupted,
    check_space,
    check_target,
    check_unchanged,
    only_run,
    partial_of,
    whole_file,
    whole_folder,
)
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.weights import Weights
from rrtc.machine import is_first_process, process_group
from rrtc.recipe.schema import Recipe
from rrtc.units import parse_size
from rrtc.uptrain.checkpoints import Checkpoints, remove, whole_checkpoints
from rrtc.uptrain.curve import draw, steps_of, write_metrics
from rrtc.uptrain.data import Stream
from rrtc.uptrain.display import Display
from rrtc.uptrain.guards import Course, LossGuard, Stopped, Termination, reporters
from rrtc.uptrain.job import Job, prepare
from rrtc.uptrain.sharding import whole_state
from rrtc.uptrain.teacher_cache import fill
from rrtc.uptrain.trainer import DistillationTrainer

CHECKPOINTS = "checkpoints"
RESUME = "resume.json"


def uptrain(folder: str, output: str, recipe: Recipe, resume: bool = False) -> dict:
    """Trains the model in the rrtc folder `folder` into the new folder `output`; returns what was measured (also in
    its rrtc.yaml under measured.uptrain).

    resume: go on from the last checkpoint of an interrupted run to the same output. Under torchrun, every process
    calls this, and the first one writes. Raises RrtcError or WrongUsage before any work for what can be known in
    advance, and where another run is writing `output`; after an error, NAME.partial stays only if it holds a
    checkpoint.
    """
    with only_run(Path(output)) if is_first_process else contextlib.nullcontext():
        return _uptrain(Path(folder), Path(output), recipe, resume)


def _uptrain(folder: Path, target: Path, recipe: Recipe, resume: bool) -> dict:
    disable_progress_bar()  # transformers' own
    if resume:
        check_incomplete(target, CHECKPOINTS)
    check_target(target, folder)
    check_not_interrupted(target, CHECKPOINTS)
    partial = partial_of(target)
    checkpoints = partial / CHECKPOINTS
    saved = whole_checkpoints(checkpoints)
    if resume and not saved:
        raise RrtcError(f"There is nothing to resume: {partial} holds no checkpoint.", "Start without --resume.")
    if saved and not resume:
        raise RrtcError(
            f"{partial} holds the checkpoints of an interrupted run.",
            "Continue it with --resume, or delete that folder.",
        )
    job = prepare(folder, recipe.uptrain)
    max_shard_bytes = _max_shard_bytes(job, recipe)
    fingerprint = job.fingerprint()
    if resume:
        check_unchanged(_begun_with(checkpoints), fingerprint)
    there = sum(file.stat().st_size for checkpoint in saved for file in checkpoint.rglob("*"))
    check_space(target, job.checkpoint_bytes() - there)

    # Every process has now seen the disk as it was. From here on, the first one changes it.
    process_group().wait_for_everyone()
    if is_first_process and not resume:
        remove(partial)  # of a run that was killed before its first checkpoint
    elif is_first_process:
        # One that was cut off would count among the two last ones, and the last whole one could go in its place.
        for unfinished in set(checkpoints.glob("checkpoint-*")) - set(saved):
            remove(unfinished)
    with whole_folder(target, keep_partial=True) if is_first_process else contextlib.nullcontext():
        try:
            if is_first_process:
                checkpoints.mkdir(exist_ok=True)
                with whole_file(checkpoints / RESUME) as file:
                    file.write_text(json.dumps(fingerprint, indent=2) + "\n", encoding="utf8")
            job, cached = _fill_cache(job)
            trainer = _train(job, checkpoints, saved[-1] if resume else None)
            measured, state = trainer.measured() | cached, whole_state(trainer.model)
            if is_first_process:
                _write(job, trainer, state, measured, partial, target, max_shard_bytes)
        except BaseException as error:
            if is_first_process and not whole_checkpoints(checkpoints):
                remove(partial)
            elif is_first_process and not isinstance(error, Stopped):
                note(f"The checkpoints are in {checkpoints}: --resume goes on from the last one.")
            raise
    if is_first_process:
        remove(target / CHECKPOINTS)
    process_group().wait_for_everyone()  # nobody goes on before the folder is there
    return measured


def _begun_with(checkpoints: Path) -> dict:
    """The fingerprint of the run that wrote `checkpoints`."""
    try:
        return json.loads((checkpoints / RESUME).read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise RrtcError(
            f"The run cannot be resumed: {checkpoints / RESUME}, which says what it was started with, is damaged.",
            "Begin a new run from its last checkpoint: rrtc uptrain CHECKPOINT -o NEW.",
        ) from error


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
    note(f"Uptraining on {what}, {'with a teacher' if job.taught_by else 'without a teacher'}")
    folder, termination = checkpoints.parent, Termination()
    trackers = reporters(job.recipe.report_to, folder)
    # In this order: a step that failed is not written down.
    guards = [LossGuard(job), Checkpoints(job), termination, Course(folder, _title(job))]
    with Display(job.steps, job.tokens) as display:
        trainer = DistillationTrainer(job, job.steps, checkpoints, save=True, callbacks=[*guards, *trackers, display])
        with termination:
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
    the input folder has, under the same names and in the same number format."""
    writer = ShardWriter(folder, max_bytes)
    for name in Weights(job.folder):
        writer.add(name, state[name].to("cpu", getattr(torch, job.dtype)))
    writer.finish()
    steps = steps_of(trainer.state.log_history)
    write_metrics(steps, folder / "metrics.jsonl")
    draw(steps, _title(job), folder / "loss.png")
    job.complete(folder, measured, target)
