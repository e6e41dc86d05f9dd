"""What a training token costs: rrtc's uptraining beside plain fine-tuning of the dense model by transformers' Trainer,
on the same windows in one run.

    python benchmarks/uptrain.py DENSE SMALL --data TEXT… [--context 256] [--batch-size 4] [--steps 4] [--rounds 3]

DENSE is the dense model's folder, SMALL what `rrtc init` made of it. Three ways to train are run in turn, each a
process of its own, `rounds` times; of each the fastest step counts, so that what else the machine does hits all alike:
the dense model on its next-token loss (Trainer as it comes), SMALL on its next-token loss, and SMALL by distillation.
`allowed` is the speed relative to the first that the plan's floating-point operations allow. Memory is the peak
resident size of the process (on an accelerator, what torch allocated there), and for distillation also what it may
take: 1.3 times that of the step without, plus the teacher's weights.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from rrtc.io.source import read_config
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture
from rrtc.units import count, size
from rrtc.uptrain.data import Stream
from rrtc.uptrain.job import Job, prepare
from rrtc.uptrain.trainer import DistillationTrainer, arguments

WAYS = {
    "dense": "Trainer, dense model",
    "next_token": "rrtc uptrain, next token",
    "forward_kl": "rrtc uptrain, distillation",
}
WARM_UP = 1  # steps that are not timed: they allocate


class Clock(TrainerCallback):
    """The seconds of every step."""

    def __init__(self):
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self._began = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self._began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dense", type=Path)
    parser.add_argument("small", type=Path)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=4, help="windows in a step and in a forward pass")
    parser.add_argument("--steps", type=int, default=4, help="timed, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # in a process of its own
    asked = parser.parse_args()
    if asked.way:
        print(json.dumps(trained(asked, asked.way)))
    else:
        Console().print(table(asked))


def job_of(asked: argparse.Namespace, way: str) -> Job:
    settings = {
        "data": asked.data, "context": asked.context, "batch_size": asked.batch_size, "micro_batch": asked.batch_size,
        "tokens": (WARM_UP + asked.steps) * asked.batch_size * asked.context,
        "losses": {"next_token" if way == "dense" else way: 1.0},
    }  # fmt: skip
    return prepare(asked.small, Recipe.model_validate({"uptrain": settings}).uptrain)


def trained(asked: argparse.Namespace, way: str) -> dict:
    """Seconds of the fastest step, peak memory in bytes, floating-point operations a token."""
    job, clock = job_of(asked, way), Clock()
    with tempfile.TemporaryDirectory() as nowhere:
        if way == "dense":
            model = AutoModelForCausalLM.from_pretrained(asked.dense, dtype=torch.float32)
            flops = 3 * read_architecture(read_config(asked.dense)).flops_per_token
            given = arguments(job, job.steps, Path(nowhere), save=False)
            given.bf16 = job.bfloat16
            windows = Stream(job.text, job.steps * asked.batch_size)
            trainer = Trainer(model, given, collate, windows, callbacks=[clock])
        else:
            flops = job.flops_per_token()
            trainer = DistillationTrainer(job, job.steps, Path(nowhere), save=False, callbacks=[clock])
        trainer.train()
    return {"seconds": min(clock.seconds[WARM_UP:]), "peak": peak(), "flops": flops}


def collate(windows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.stack([window["input_ids"] for window in windows])
    return {"input_ids": ids, "labels": ids}


def peak() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def table(asked: argparse.Namespace) -> Table:
    found: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(asked.rounds):
        for way in WAYS:
            command = [sys.executable, __file__, *sys.argv[1:], "--way", way]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[way].append(json.loads(said.strip().splitlines()[-1]))
    tokens = asked.batch_size * asked.context
    best = {way: min(run["seconds"] for run in runs) for way, runs in found.items()}
    memory = {way: max(run["peak"] for run in runs) for way, runs in found.items()}
    teacher = 4 * read_architecture(read_config(asked.dense)).parameters
    title = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    shown = Table(title=f"{asked.small}, steps of {asked.batch_size} x {asked.context} tokens. {title}")
    for column in ("", "tokens/s", "speed", "allowed", "of it", "peak memory", "may be"):
        shown.add_column(column, justify="right" if column else "left")
    for way, name in WAYS.items():
        speed = best["dense"] / best[way]
        allowed = found["dense"][0]["flops"] / found[way][0]["flops"]
        may_be = {"forward_kl": 1.3 * memory["next_token"] + teacher, "next_token": memory["dense"]}.get(way)
        shown.add_row(
            name, count(tokens / best[way]), f"{speed:.2f}", f"{allowed:.2f}", f"{speed / allowed:.0%}",
            size(memory[way]), size(may_be) if may_be else "–",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main()
