"""What each training token buys: several starts and recipes trained on the same tokens in the same order, in one run.

    python benchmarks/healing.py WORK --tokens 200k --data TEXT… --row "TITLE | FOLDER | flags of rrtc uptrain" --row …

FOLDER is what `rrtc init` made. Printed is, at a few checkpoints, the KL from the teacher in nats per token on the
training windows (a running mean: each window is new to the model), and after how many tokens a row first has the KL
that the first row has at its end. A row that trains on the next token alone should be given
`--losses next_token=1 --losses forward_kl=1e-6`, so that its KL is measured too. WORK keeps finished rows, and
kl.png shows them all.
"""

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

from rrtc.units import count, parse_count

CHECKPOINTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # shares of the way
MEAN_OVER = 0.02  # of the way: the running mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--tokens", type=parse_count, default=200_000)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--flags", default="", help="for every row")
    parser.add_argument("--row", action="append", required=True, metavar="'TITLE | FOLDER | FLAGS'")
    asked = parser.parse_args()
    asked.work.mkdir(parents=True, exist_ok=True)
    curves = {}
    for row in asked.row:
        title, folder, flags = (part.strip() for part in row.split("|"))
        curves[title] = trained(asked, title, folder, shlex.split(asked.flags) + shlex.split(flags))
        draw(curves, asked.work / "kl.png")
        Console(width=120).print(table(curves))


def trained(asked: argparse.Namespace, title: str, folder: str, flags: list[str]) -> list[tuple[int, float]]:
    """(tokens seen, KL as a running mean) after every step."""
    target = asked.work / title.replace(" ", "-").replace("/", "-")
    if not target.exists():
        command = [sys.executable, "-m", "rrtc", "uptrain", folder, "-o", str(target), "--tokens", str(asked.tokens)]
        for text in asked.data:
            command += ["--data", text]
        subprocess.run([*command, *flags], check=True)
    steps = [json.loads(line) for line in (target / "metrics.jsonl").read_text(encoding="utf8").splitlines()]
    width = max(1, round(MEAN_OVER * len(steps)))
    kls = [step["kl"] for step in steps]
    return [
        (step["tokens"], sum(kls[max(0, i - width + 1) : i + 1]) / min(i + 1, width)) for i, step in enumerate(steps)
    ]


def table(curves: dict[str, list[tuple[int, float]]]) -> Table:
    first = next(iter(curves.values()))
    last = first[-1]
    title = f"{platform.machine()}, {os.cpu_count()} CPUs, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    shown = Table(title=f"KL from the teacher. {title}")
    shown.add_column("tokens")
    places = [round(share * (len(first) - 1)) for share in CHECKPOINTS]
    for place in places:
        shown.add_column(count(first[place][0]), justify="right")
    shown.add_column(f"tokens to {last[1]:.3f}", justify="right")
    for name, curve in curves.items():
        reached = next((count(tokens) for tokens, kl in curve if kl <= last[1]), "–")
        shown.add_row(name, *(f"{curve[place][1]:.3f}" for place in places), reached)
    return shown


def draw(curves: dict[str, list[tuple[int, float]]], file: Path) -> None:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=name)
    axis.set(xlabel="Training tokens", ylabel="KL from the teacher (nats per token)", yscale="log")
    axis.xaxis.set_major_formatter(EngFormatter(sep=""))
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
