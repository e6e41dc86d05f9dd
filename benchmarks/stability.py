"""How steadily tied models train, with `stability: admin` and without: in pieces that go on where they were left.

    python benchmarks/stability.py WORK --start "joint, 2 loops=FOLDER" --start … --data TEXT
                                   [--only change curves] [--ways paper visits admin] [--rates 1e-4 3e-4 1e-3]
                                   [--seeds 0 1 2] [--tokens 200k] [--context 512] [--batch-size 8] [--set FIELD=VALUE]

FOLDER is what `rrtc init` made; --set has other choices of `rrtc uptrain` for all. Ways: paper, every parameter
has the same learning rate; visits, that of shared weights is divided by their visits; admin, that and gains.

change: of one step of AdamW at the first rate, on the first batch: the KL from the teacher before it, |h' - h|² / |h|²
of the last hidden states, and the KL of what the model says after the step from what it said before, in nats a token.
curves: whole runs at every rate and seed, from the lowest rate on, until one diverges (the run stops by itself, or ends
ABOVE times its first KL); of each, the 99th percentile of the norm of the gradients over its median, spikes (steps with
more than SPIKE times the median norm of the AROUND before them), and the KL over the last twentieth of the steps.

WORK/results.jsonl has a line for every piece that is done. What it has is not done again, so a piece can be as small as
one wants: `--seeds 0 --rates 1e-4` now, others later. The table shows all that is there. The same on a GPU, with more
tokens: add `--tokens 10M --set precision=bfloat16 --set compile=true`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from common import Results, add_runs, place_of, recipe_of_run, run
from rich.console import Console
from rich.table import Table

from rrtc.errors import RrtcError
from rrtc.io.folder import partial_of
from rrtc.recipe.schema import Recipe
from rrtc.stock.parts import Parts
from rrtc.uptrain.curve import ENDS
from rrtc.uptrain.job import prepare
from rrtc.uptrain.trainer import DistillationTrainer

WAYS = {
    "paper": {"shared_lr_scale": 1.0},
    "visits": {"shared_lr_scale": "visits"},
    "admin": {"shared_lr_scale": "visits", "stability": "admin"},
}
SPIKE, AROUND = 3.0, 20
ABOVE = 1.1  # times the first step's KL: who ends there has lost more than it learned
SHOWN = 512  # tokens on which a change is measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--start", action="append", required=True, metavar="NAME=FOLDER")
    add_runs(parser)
    parser.add_argument("--only", nargs="+", choices=["change", "curves"], default=["change", "curves"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3, 3e-3])
    parser.add_argument("--batch-size", type=int, default=8)
    asked = parser.parse_args()
    done, measure = Results(asked.work), {"change": change, "curves": curve}
    for start in asked.start:
        name, _, folder = start.partition("=")
        for way in asked.ways:
            for seed in asked.seeds:
                for kind in asked.only:
                    for rate in asked.rates[:1] if kind == "change" else sorted(asked.rates):
                        key = {"kind": kind, "start": name, "way": way, "seed": seed, "rate": rate}
                        key |= {"tokens": asked.tokens if kind == "curves" else asked.batch_size * asked.context}
                        recipe = recipe_of(asked, way, seed, rate)
                        found = done.measured(key, measure[kind], Path(folder), recipe, asked, key)
                        if found.get("diverged"):
                            break
    show(done.rows)


def recipe_of(asked: argparse.Namespace, way: str, seed: int, rate: float) -> Recipe:
    values = {"tokens": asked.tokens, "batch_size": asked.batch_size, "micro_batch": 1, "learning_rate": rate}
    return recipe_of_run(asked, values | {"seed": seed} | WAYS[way])


def change(folder: Path, recipe: Recipe, asked: argparse.Namespace, key: dict) -> dict:
    """What one step does to the model's output."""
    step = recipe.uptrain.model_copy(update={"warmup": 0.0, "tokens": asked.batch_size * asked.context})
    job = prepare(folder, step)
    with tempfile.TemporaryDirectory() as nowhere:
        trainer = DistillationTrainer(job, 1, Path(nowhere), save=False, callbacks=[])
        gains = trainer.begin()[1]
        ids = trainer.profiled()[: max(1, SHOWN // job.context)].to(trainer.args.device)
        before = said(trainer, ids)
        trainer.train()
        after = said(trainer, ids)
    known = [gain for both in gains for gain in both if gain is not None]
    return {
        "kl": trainer.state.log_history[0]["kl"],
        "grad_norm": trainer.state.log_history[0]["grad_norm"],
        "hidden": ((after[0] - before[0]).square().sum() / before[0].square().sum()).item(),
        "kl_of_step": (before[1].exp() * (before[1] - after[1])).sum(-1).mean().item(),
        "gain": torch.stack(known).square().mean().sqrt().item() if known else 1.0,
    }


@torch.no_grad()
def said(trainer: DistillationTrainer, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(last hidden states, log-probabilities) of `ids`."""
    parts = Parts(trainer.model.stock)
    hidden, _ = parts.run(ids)
    return hidden.float(), parts.head(hidden.flatten(0, 1)).float().log_softmax(-1)


def curve(folder: Path, recipe: Recipe, asked: argparse.Namespace, key: dict) -> dict:
    """What a run comes to. It goes on from its last checkpoint, if it was interrupted."""
    name = "-".join(str(key[part]) for part in ("start", "way", "seed", "rate", "tokens"))
    target, sentence = place_of(asked.work, name), ""
    try:
        run(folder, target, recipe)
    except RrtcError as error:
        if "diverged" not in str(error) and "became" not in str(error):
            raise
        sentence = str(error)
    lines = (target if target.exists() else partial_of(target)) / "metrics.jsonl"
    steps = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    some = max(1, len(steps) // ENDS)
    norms = [step["grad_norm"] for step in steps]
    around = [norms[max(0, number - AROUND) : number] for number in range(1, len(norms))]
    last = statistics.mean(step["kl"] for step in steps[-some:]) if steps else None
    return {
        "steps": len(steps),
        "first_kl": steps[0]["kl"] if steps else None,
        "last_kl": last,
        "norm_ratio": torch.tensor(norms).quantile(0.99).item() / statistics.median(norms) if norms else None,
        "spikes": sum(norm > SPIKE * statistics.median(before) for before, norm in zip(around, norms[1:], strict=True)),
        "diverged": bool(sentence) or (last is not None and last > ABOVE * steps[0]["kl"]),
    }  # fmt: skip


def show(done: list[dict]) -> None:
    said = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    columns = {
        "change": ("kl", "gain", "grad_norm", "hidden", "kl_of_step"),
        "curves": ("steps", "first_kl", "last_kl", "norm_ratio", "spikes", "diverged"),
    }
    for kind, names in columns.items():
        shown = Table(title=f"{kind}. {said}")
        for column in ("start", "way", "rate", "seeds", "tokens", *names):
            shown.add_column(column)
        groups: dict[tuple, list[dict]] = {}
        for one in done:
            if one["kind"] == kind:
                groups.setdefault((one["start"], one["way"], one["rate"], one["tokens"]), []).append(one)
        for (start, way, rate, tokens), rows in groups.items():
            cells = [_spread([row[name] for row in rows if row[name] is not None]) for name in names]
            shown.add_row(start, way, f"{rate:g}", str(len(rows)), str(tokens), *cells)
        if groups:
            Console(width=160).print(shown)


def _spread(values: list) -> str:
    """The mean, and the least and most where there are several."""
    if not values:
        return "–"
    mean = f"{statistics.mean(values):.4g}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.4g}, {max(values):.4g})"


if __name__ == "__main__":
    main()
