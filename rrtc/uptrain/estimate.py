"""`rrtc uptrain --dry-run`: what a run would take, from a few of its own steps. Only their text, tokenized,
is written, into the cache."""

import math
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from rrtc.console import note
from rrtc.recipe.schema import Recipe
from rrtc.uptrain.curve import steps_of
from rrtc.uptrain.guards import LossGuard
from rrtc.uptrain.job import Job, prepare
from rrtc.uptrain.stability import profile, rows
from rrtc.uptrain.trainer import DistillationTrainer

STEPS = 3  # taken: the first one, which allocates and is not counted, and one in each half of the run


def estimate(folder: str, recipe: Recipe) -> dict:
    """What `uptrain` would take on this machine, as plain data.

    steps, tokens, tokens_per_step; learning_rate (at its peak); flops_per_token and flops_total (without attention
    over the context);
    measured_steps, seconds_before (gains are set and exits fitted), seconds_per_step and seconds_total (of both,
    without loading); peak_memory_bytes (of one process, measured: on the accelerator, or on a CPU all that the process
    holds); checkpoint_bytes (disk space that is needed on the way); device; with `stability` also profile, a row for
    each branch of each visit (see rrtc.uptrain.stability.rows).
    Raises RrtcError or WrongUsage for what would stop the run itself.
    """
    disable_progress_bar()
    job = prepare(Path(folder), recipe.uptrain, most_steps=STEPS)
    measured = min(STEPS, job.steps)
    if lacking := _lacking(job):
        note(
            f"The teacher cache lacks {lacking:,} windows of this run at least. The teacher is asked about them before "
            "the first step, which is not in these figures."
        )
    note(f"Measuring {measured} of {job.steps} steps")
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = DistillationTrainer(job, measured, Path(nowhere), save=False, callbacks=[LossGuard(job)])
        before = profile(trainer.model, job.branches, trainer.profiled()) if job.branches else []
        began = time.perf_counter()
        dense, gains = trainer.begin()
        seconds_before = time.perf_counter() - began
        trainer.train()
    profiled = {"profile": rows(job.plan, job.branches, dense, before, gains)} if job.branches else {}
    seconds = [step["seconds"] for step in steps_of(trainer.state.log_history)]
    seconds_per_step = statistics.mean(seconds[1:] or seconds)
    return {
        "steps": job.steps,
        "tokens": job.tokens,
        "tokens_per_step": job.tokens_per_step,
        "learning_rate": job.learning_rate,
        "flops_per_token": job.flops_per_token(),
        "flops_total": job.flops_per_token() * job.tokens,
        "measured_steps": measured,
        "seconds_before": seconds_before,
        "seconds_per_step": seconds_per_step,
        "seconds_total": seconds_before + seconds_per_step * job.steps,
        "peak_memory_bytes": _peak_memory(trainer.args.device),
        "checkpoint_bytes": job.checkpoint_bytes(),
        "device": trainer.args.device.type,
    } | profiled


def _lacking(job: Job) -> int:
    """Of how many windows of the run its teacher cache cannot hold the lessons, where it holds those that are measured:
    it has fewer than the run has different ones."""
    if job.cache is None or job.teacher is not None:
        return 0
    different = sum(source.count if source.shard.complete else math.inf for source in job.text.sources)
    return max(0, int(min(job.steps * job.recipe.batch_size, different)) - job.cache.windows)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux kibibytes
