"""Tied or not, at equal size: what the same text makes of models whose layers are tied, and of one in which nothing is.

    python benchmarks/tied_or_not.py WORK --model FOLDER --data TEXT… [--budgets 0.684 0.5] [--tokens 2M]
                                     [--minutes 10] [--init-flags "…"] [--flags "…"]

For each budget there are three models: layers tied in two loops (middle_cycle), neighbors tied (middle_sequence), and
nothing tied (--loops 1). All learn from the same dense model by the same windows in the same order, at a rate that
stays the same after its warm-up, so that every point of a curve is a run of its own that ended there. A teacher cache
(--flags "--teacher-cache DIR") spares two of three asking the dense model. It is filled for all of --tokens before
anything is learned, so ask for no more than will be used.

The models take turns: to 20 thousand tokens, to 50 thousand, and so on. After --minutes it stops, and the same command
goes on from there, to the same figures. On a GPU: --minutes 10 --tokens 100M --flags "--precision bfloat16 --compile
--batch-size 64".

Printed is the KL from the dense model in nats a token on the training windows, each of which is new to the model when
it is scored: means over the last tenth of the way. KL = c × tokens^-a is fitted to each curve from a tenth of its way
on; where the tied and the untied curve cross, and between which tokens in nine of ten bootstrap samples of the same
blocks of steps of both. WORK keeps models, checkpoints and curves; kl.png has all of them, results.json the figures.
"""

import argparse
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.console import Console
from rich.table import Table

from rrtc.io.folder import partial_of
from rrtc.units import count, parse_count

WAYS = {
    "two loops": ["--sharing", "middle_cycle"],
    "in sequence": ["--sharing", "middle_sequence"],
    "nothing tied": ["--loops", "1"],
}
MILESTONES = [digit * 10**power for power in range(4, 10) for digit in (2, 5, 10)]  # tokens: 20k, 50k, 100k, …
LAST = 0.1  # of the way: what a figure is the mean over, and where a fit begins
BLOCK = 10  # steps that a bootstrap takes together, because neighbors are alike
SAMPLES = 2000
ALL_TEXT = 1e15  # tokens: more than there are, so that a crossing beyond them is none
CONSTANT = ["--schedule", "warmup_stable_decay", "--decay", "1e-9"]

Curve = list[tuple[int, float]]  # tokens seen, and the KL of the step's windows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.684, 0.5])
    parser.add_argument("--tokens", type=parse_count, default=2_000_000)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--init-flags", default="", help="for every rrtc init")
    parser.add_argument("--flags", default="", help="for every rrtc uptrain")
    asked = parser.parse_args()
    until = time.monotonic() + 60 * asked.minutes
    rows = {(budget, way): asked.work / f"{way.replace(' ', '-')}-{budget}" for budget in asked.budgets for way in WAYS}
    remember(asked)
    for (budget, way), folder in rows.items():
        if not (folder / "init").exists() and time.monotonic() < until:
            made = ["-o", str(folder / "init"), "--budget", str(budget), *WAYS[way], *shlex.split(asked.init_flags)]
            rrtc(["init", asked.model, *made, *texts("--calibrate-on", asked)])
    for milestone in [m for m in MILESTONES if m < asked.tokens] + [asked.tokens]:
        for folder in rows.values():
            if (folder / "init").exists():
                train(folder, milestone, until, asked)
    report(asked.work, {row: curve_of(folder) for row, folder in rows.items()})


def remember(asked: argparse.Namespace) -> None:
    """Writes down what decides the figures, or stops where WORK holds those of other settings."""
    decides = {name: str(getattr(asked, name)) for name in ("model", "data", "tokens", "init_flags", "flags")}
    file = asked.work / "settings.json"
    asked.work.mkdir(parents=True, exist_ok=True)
    if file.exists() and json.loads(file.read_text(encoding="utf8")) != decides:
        sys.exit(f"{asked.work} holds figures of other settings: {file.read_text(encoding='utf8')}")
    file.write_text(json.dumps(decides), encoding="utf8")


def texts(flag: str, asked: argparse.Namespace) -> list[str]:
    return [part for text in asked.data for part in (flag, text)]


def rrtc(arguments: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "rrtc", *arguments], check=True)


def train(folder: Path, milestone: int, until: float, asked: argparse.Namespace) -> None:
    """Trains the model of `folder` on to `milestone` tokens, or until the time is up; it goes on from there later."""
    target = folder / "healed"
    if target.exists() or time.monotonic() >= until or seen(folder) >= milestone:
        return
    command = [sys.executable, "-m", "rrtc", "uptrain", str(folder / "init"), "-o", str(target), *CONSTANT]
    command += ["--tokens", str(asked.tokens), *texts("--data", asked), *shlex.split(asked.flags)]
    if partial_of(target).exists():
        command.append("--resume")
    running = subprocess.Popen(command)
    while running.poll() is None:
        time.sleep(0.5)
        if time.monotonic() >= until or (milestone < asked.tokens and seen(folder) >= milestone):
            running.send_signal(signal.SIGTERM)  # it finishes its step and saves
            running.wait()
            return
    if running.returncode:
        sys.exit(f"{shlex.join(command)}: exit code {running.returncode}")


def curve_of(folder: Path) -> Curve:
    files = [folder / name / "metrics.jsonl" for name in ("healed", "healed.partial")]
    lines = next((file.read_text(encoding="utf8").splitlines() for file in files if file.exists()), [])
    return [(step["tokens"], step["kl"]) for step in map(json.loads, lines)]


def seen(folder: Path) -> int:
    """Tokens that the model of `folder` has learned from."""
    return max((tokens for tokens, _ in curve_of(folder)), default=0)


def mean_before(curve: Curve, milestone: int) -> float | None:
    """The mean KL over the last tenth of the way to `milestone`; None where the curve does not go so far."""
    if not curve or curve[-1][0] < milestone:
        return None
    return float(numpy.mean([kl for tokens, kl in curve if (1 - LAST) * milestone < tokens <= milestone]))


def fit(tokens: numpy.ndarray, kl: numpy.ndarray) -> tuple[float, float]:
    """(a, log c) of KL = c × tokens^-a, by least squares of the logarithms."""
    slope, height = numpy.polyfit(numpy.log(tokens), numpy.log(kl), 1)
    return -slope, height


def crossing(one: tuple[float, float], other: tuple[float, float]) -> float:
    """The tokens from which on `one` is below `other` for good; infinity where it never is."""
    gain, gap = one[0] - other[0], one[1] - other[1]
    return math.exp(min(gap / gain, 700)) if gain > 0 else math.inf


def compared(tied: Curve, untied: Curve) -> dict:
    """The fits of both curves over the steps that both have, from a tenth of the way on; where they cross, and between
    which tokens in nine of ten bootstrap samples."""
    both = min(len(tied), len(untied))
    tokens = numpy.array([tokens for tokens, _ in tied[:both]], dtype=float)
    late = tokens > LAST * tokens[-1]
    kls = [numpy.array([kl for _, kl in curve[:both]])[late] for curve in (tied, untied)]
    tokens, chance = tokens[late], numpy.random.default_rng(0)
    starts = max(1, len(tokens) - BLOCK + 1)
    found = []
    for _ in range(SAMPLES):
        drawn = chance.integers(starts, size=-(-len(tokens) // BLOCK))[:, None] + numpy.arange(BLOCK)
        drawn = drawn[drawn < len(tokens)]
        fits = [fit(tokens[drawn], kl[drawn]) for kl in kls]
        found.append((fits[0][0] - fits[1][0], crossing(*fits)))
    gains, crossings = numpy.array(found).T
    one, other = (fit(tokens, kl) for kl in kls)
    ends = [float(value) for value in numpy.quantile(crossings, (0.05, 0.95), method="nearest")]
    return {
        "tokens": int(tokens[-1]),
        "exponents": (one[0], other[0]),
        "gain": [one[0] - other[0], *map(float, numpy.quantile(gains, (0.05, 0.95)))],
        "crossing": [crossing(one, other), *ends],
    }


def report(work: Path, curves: dict[tuple[float, str], Curve]) -> None:
    reached = [m for m in MILESTONES if any(mean_before(curve, m) for curve in curves.values())]
    table = Table(title="KL from the dense model, nats a token, over the last tenth of so many tokens")
    for column in ("budget", "", *map(count, reached)):
        table.add_column(column)
    result: dict[str, dict] = {}
    for (budget, way), curve in curves.items():
        found = {m: mean_before(curve, m) for m in reached}
        table.add_row(str(budget), way, *("–" if kl is None else f"{kl:.4f}" for kl in found.values()))
        result[f"{way}, {budget}"] = {"kl": found, "tokens": curve[-1][0] if curve else 0}
    Console(width=120).print(table)
    for (budget, way), curve in curves.items():
        untied = curves[budget, "nothing tied"]
        if way != "nothing tied" and min(len(curve), len(untied)) >= 4 * BLOCK:
            fits = result[f"{way}, {budget}"]["against nothing tied"] = compared(curve, untied)
            print(f"{budget}, {way}: {said(fits)}")
    (work / "results.json").write_text(json.dumps(result, indent=2), encoding="utf8")
    draw(curves, work / "kl.png")


def said(fits: dict) -> str:
    (tied, untied), (_, least, most), (at, first, last) = fits["exponents"], fits["gain"], fits["crossing"]
    slopes = f"KL falls as tokens^-{tied:.3f}, untied as tokens^-{untied:.3f} (difference {least:+.3f} to {most:+.3f})"
    where = [f"from {tokens:.2g} tokens on" if tokens < ALL_TEXT else "never" for tokens in (at, first, last)]
    beyond = "" if at <= fits["tokens"] else f", which is beyond the {count(fits['tokens'])} that were measured"
    return f"{slopes}; tied is below {where[0]} (90 %: {where[1]}, to {where[2]}){beyond}"


def draw(curves: dict[tuple[float, str], Curve], file: Path) -> None:
    budgets: Sequence[float] = list(dict.fromkeys(budget for budget, _ in curves))
    figure = Figure(figsize=(5 * len(budgets), 4.5), layout="constrained")
    for axis, budget in zip(figure.subplots(1, len(budgets), squeeze=False)[0], budgets, strict=True):
        for (of, way), curve in curves.items():
            if of == budget and curve:
                tokens, kls = numpy.array(curve).T
                width = max(1, len(kls) // 20)
                smooth = numpy.convolve(kls, numpy.ones(width) / width, mode="valid")
                axis.plot(tokens[width - 1 :], smooth, label=way)
                axis.legend()
        axis.set(title=f"budget {budget}", xlabel="training tokens", xscale="log", yscale="log")
        axis.set_ylabel("KL from the dense model (nats a token)")
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3, which="both")
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    main()
