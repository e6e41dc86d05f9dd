"""Time to score tasks through rrtc, over the time that lm-evaluation-harness takes for the same by itself.

    python benchmarks/eval.py MODEL --tasks-dir recipes/tasks --tasks-data FOLDER [--tasks piqa arc_easy] [--items 100]

MODEL is a folder, dense or compressed. Model, tasks and batch size are the same objects and numbers for both, and both
run in turn, the first of them second in the next round. The harness's time is that of its `evaluate`, without samples
and bootstrap: what it must do to have a score. Its simple_evaluate, which also describes the machine, takes longer.
"""

import argparse
import os
import platform
import statistics
import time
from dataclasses import replace

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from rrtc import console
from rrtc.eval.tasks import Harness, Task, find_tasks
from rrtc.io.source import load_for_scoring, load_tokenizer
from rrtc.recipe.eval import EvalRecipe

WARM_UP = 4  # items


def seconds(work) -> tuple[float, object]:
    started = time.perf_counter()
    done = work()
    return time.perf_counter() - started, done


def compared(task: Task, harness: Harness, alone: HFLM, rounds: int) -> dict:
    """`ours` and `theirs`, seconds of each round; and `scores`, of ours and of theirs."""

    def through_rrtc() -> float:
        return float(harness.run(task)["score"].mean())

    def by_itself() -> float:
        found = evaluate(
            alone, {"tasks": {task.name: task.loaded}}, limit=task.items, bootstrap_iters=0, log_samples=False
        )
        return found["results"][task.name][f"{task.metric},none"]

    harness.run(replace(task, items=min(WARM_UP, task.items)))
    found = {"ours": [], "theirs": []}
    for number in range(rounds):
        pair = [("ours", through_rrtc), ("theirs", by_itself)]
        scores = {}
        for name, work in reversed(pair) if number % 2 else pair:
            took, scores[name] = seconds(work)
            found[name].append(took)
    return found | {"scores": (scores["ours"], scores["theirs"])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL", help="a folder, dense or compressed")
    parser.add_argument("--tasks", nargs="+", default=["piqa", "arc_easy"], metavar="TASK")
    parser.add_argument("--tasks-dir", metavar="FOLDER", help="of task files")
    parser.add_argument("--tasks-data", metavar="FOLDER", help="that stands for {data} in them")
    parser.add_argument("--items", type=int, default=100, help="of each task")
    parser.add_argument("--batch", type=int, default=8, help="requests at once")
    parser.add_argument("--rounds", type=int, default=4)
    args = parser.parse_args()
    recipe = EvalRecipe(
        tasks=args.tasks, tasks_dir=args.tasks_dir, tasks_data=args.tasks_data, task_items=args.items,
        task_batch=args.batch,
    )  # fmt: skip
    tasks, not_run = find_tasks(recipe)
    for entry in not_run:
        console.warn(f"{entry['task']} is not run. {entry['why']}")
    model, tokenizer = load_for_scoring(args.model), load_tokenizer(args.model)
    harness = Harness(model, tokenizer, recipe)
    alone = HFLM(model, backend="causal", tokenizer=tokenizer, batch_size=args.batch)
    rows = []
    for task in tasks:
        found = compared(task, harness, alone, args.rounds)
        ratios = [ours / theirs for ours, theirs in zip(found["ours"], found["theirs"], strict=True)]
        ours, theirs = (f"{score:.4f}" for score in found["scores"])
        times = (f"{statistics.median(found[name]):.1f} s" for name in ("ours", "theirs"))
        spread = f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
        rows.append([task.name, str(task.items), f"{ours} / {theirs}", *times, spread])
    columns = ["task", "items", "score: rrtc / harness", "rrtc", "harness", "ratio of times"]
    cores = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    title = (
        f"{platform.machine()}, {cores}, torch {torch.__version__}, {args.rounds} rounds, {time.strftime('%Y-%m-%d')}"
    )
    console.results.print(console.table(title, columns, rows))


if __name__ == "__main__":
    main()
