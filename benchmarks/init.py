"""What initializations are worth: loss before and after the same training, time and peak memory, in one table.

    python benchmarks/init.py --model FOLDER --calibrate-on TEXT... --train-on TEXT... --score-on TEXT... --work DIR

Texts are .txt, .jsonl or .parquet files; those to score on must be others than those to learn from. Every row
starts from the dense model in FOLDER (safetensors, an even number of layers) and is, at the same --budget unless its
title names a rank:

    paper          the paper's Average + SVD, tied in a cycle
    middle-cycle   joint initialization, tied in a cycle with one layer kept at each end
    auto           joint initialization, and rrtc chooses what to tie and what to narrow
    whitened-svd   nothing tied: activation-whitened SVD of every matrix (whitened_svd.py)
    average        layers l and l + L/2 averaged and looped, without LoRA: the weights of the next row, run twice
    mergekit       the same average by mergekit: a dense model of half the layers; not trained
    paper-64       the paper's initialization at rank 64, for its time
    pissa-64       PEFT's PiSSA adapters at rank 64, for its time: one SVD of every matrix too, but nothing gets smaller

mergekit and PEFT are looked for in the Pythons named by --mergekit-python and --peft-python (virtual environments with
`pip install mergekit==0.1.5` and `pip install peft==0.21.2`); without them their rows are skipped.

Each initialization is a process of its own. Its time is the whole process's, Python's imports and the writing of files
included; its memory is the peak of its resident size, in which files mapped into memory count. rrtc's own closing
measurement is off. Then every row is scored, trained by `rrtc uptrain` (distillation from the dense model alone; the
same text, order and number of steps) and scored again. Excess is the loss over the dense model's on the same tokens, in
nats a token, mean over the texts. Size is parameters without embeddings over the dense model's. Leave the machine alone
meanwhile, or the times mean nothing.

What comes out: the table on stdout; in DIR, results.json with every figure, and for each row the folders it made, its
logs and its commands. Rows that DIR has are not made again, so that a run can be broken off, or given more --rows
later; for other settings use another DIR.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from statistics import mean

import yaml

from rrtc import console
from rrtc.units import size

TITLES = {
    "paper": "paper: Average + SVD",
    "middle-cycle": "joint, middle_cycle",
    "auto": "auto",
    "whitened-svd": "whitened SVD, nothing tied",
    "average": "average, looped, no LoRA",
    "mergekit": "mergekit: layer average",
    "paper-64": "paper, rank 64",
    "pissa-64": "PEFT: PiSSA, rank 64",
}
FOR_THEIR_TIME = ("paper-64", "pissa-64")  # neither scored nor trained
RANK = "64"
TRAINING = {"batch_size": 4, "micro_batch": 4, "learning_rate": 1e-4, "losses": {"forward_kl": 1.0}}
TRAINING_CONTEXT = 256  # at most; small steps, so that a few hundred of them are minutes on two cores
HERE = Path(__file__).parent


class NoResult(Exception):
    """Why a row has no figures."""


def main() -> None:
    args = arguments()
    settings = write_settings(args)
    dense = scored(args, "dense", Path(args.model))
    rows, missing = [], []
    for name in args.rows:
        console.note(f"{TITLES[name]} …")
        try:
            rows.append(measured_row(args, name, dense))
        except NoResult as error:
            missing.append(f"{TITLES[name]}: {error}")
    result = {"machine": machine(dense), "settings": settings, "steps": args.steps, "dense": dense, "rows": rows}
    console.write_json(result | {"missing": missing}, str(args.work / "results.json"))
    show(result, missing)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="FOLDER", help="the dense model")
    for name, what in (("calibrate-on", "see"), ("train-on", "learn from"), ("score-on", "be scored on")):
        parser.add_argument(f"--{name}", required=True, nargs="+", metavar="TEXT", help=f"what models {what}")
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="where everything is written")
    parser.add_argument("--budget", type=float, default=0.684, help="parameters without embeddings over the dense's")
    parser.add_argument("--calibrate-tokens", type=int, default=16_384, help="in all")
    parser.add_argument("--score-tokens", type=int, default=16_384, help="from the beginning of each text")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window of calibration and scoring")
    parser.add_argument("--steps", type=int, default=200, help="of training; 0: none")
    parser.add_argument("--rows", nargs="+", choices=TITLES, default=list(TITLES), metavar="ROW", help="by default all")
    parser.add_argument("--mergekit-python", metavar="PYTHON", help="a Python that has mergekit")
    parser.add_argument("--peft-python", metavar="PYTHON", help="a Python that has PEFT")
    args = parser.parse_args()
    if set(args.score_on) & {*args.calibrate_on, *args.train_on}:
        parser.error("a text to score on is also calibrated or trained on")
    if depth(args) % 2:
        parser.error(f"{args.model} has {depth(args)} layers, and half of the rows pair layer l with l + L/2")
    return args


def depth(args: argparse.Namespace) -> int:
    return dense_config(args)["num_hidden_layers"]


def dense_config(args: argparse.Namespace) -> dict:
    return json.loads((Path(args.model) / "config.json").read_text(encoding="utf8"))


def write_settings(args: argparse.Namespace) -> dict:
    """Writes what all rows have in common as a recipe, and returns it."""
    settings = {
        "model": args.model,
        "init": {
            "budget": args.budget,
            "calibrate_on": args.calibrate_on,
            "calibrate_tokens": args.calibrate_tokens,
            "measure_tokens": 0,
        },
        "uptrain": TRAINING
        | {
            "data": args.train_on,
            "context": min(TRAINING_CONTEXT, args.context),
            "teacher_cache": str(args.work / "teacher"),  # which says the same of all rows
        },
        "eval": {"text": args.score_on, "tokens": args.score_tokens, "context": args.context},
    }
    args.work.mkdir(parents=True, exist_ok=True)
    file = recipe_file(args)
    if file.exists() and yaml.safe_load(file.read_text(encoding="utf8")) != settings:
        sys.exit(f"{args.work} holds rows that were made with other settings ({file.name}). Name another --work.")
    file.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf8")
    return settings


def recipe_file(args: argparse.Namespace) -> Path:
    return args.work / "recipe.yaml"


def measured_row(args: argparse.Namespace, name: str, dense: dict) -> dict:
    """All figures of one row. Raises NoResult."""
    folder = args.work / name / "init"
    row = {"name": name, "title": TITLES[name], **made(folder, initialization(args, name, folder))}
    if name in FOR_THEIR_TIME:
        return row
    row["after_init"] = scored(args, f"{name}/init", folder, dense)
    if args.steps and name != "mergekit":
        trained = args.work / name / f"trained-{args.steps}"
        took = made(trained, training(args, folder, trained))
        row["after_training"] = took | scored(args, f"{name}/{trained.name}", trained, dense)
    return row


def initialization(args: argparse.Namespace, name: str, folder: Path) -> list[str]:
    """The command that makes the row `name` into `folder`. Raises NoResult where this machine cannot."""
    rrtc = [sys.executable, "-m", "rrtc", "init", args.model, "-o", str(folder)]
    at_budget = [*rrtc, "--recipe", str(recipe_file(args))]
    at_rank = [*rrtc, "--measure-tokens", "0", "--sharing", "cycle", "--shared-init", "average", "--rank"]
    match name:
        case "paper":
            return [*at_budget, "--sharing", "cycle", "--shared-init", "average"]
        case "middle-cycle":
            return [*at_budget, "--sharing", "middle_cycle"]
        case "auto":
            return [*at_budget, "--sharing", "auto"]
        case "whitened-svd":
            return [sys.executable, str(HERE / "whitened_svd.py"), str(recipe_file(args)), str(folder)]
        case "average":  # as mergekit has it: norms averaged too, and in their places
            return [*at_rank, "0", "--norms", "shared", "--no-fold-norms"]
        case "paper-64":
            return [*at_rank, RANK]
        case "mergekit":
            python = python_with("mergekit", args.mergekit_python)
            return [python, "-m", "mergekit.scripts.run_yaml", str(write_merge(args, folder)), str(folder)]
        case "pissa-64":
            python = python_with("peft", args.peft_python)
            return [python, str(HERE / "pissa.py"), args.model, RANK, str(folder)]


def python_with(module: str, python: str | None) -> str:
    """`python`, or NoResult where it was not named or lacks `module`."""
    option = f"--{module}-python"
    if python is None:
        raise NoResult(f"skipped, no {option} was given")
    look = f"import importlib.util, sys; sys.exit(importlib.util.find_spec('{module}') is None)"
    if subprocess.run([python, "-c", look]).returncode:
        raise NoResult(f"skipped, {module} is not installed for {option}")
    return python


def write_merge(args: argparse.Namespace, folder: Path) -> Path:
    """Writes what mergekit is to do and returns that file. A merge must not name the same model twice ("Duplicate merge
    inputs"), so each half of the layers is read through a link of its own."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    half, sources = depth(args) // 2, []
    for name, start in (("lower", 0), ("upper", half)):
        link = folder.parent.absolute() / name
        if not link.exists():
            link.symlink_to(Path(args.model).absolute())
        sources.append({"model": str(link), "layer_range": [start, start + half]})
    config = dense_config(args)
    merge = {
        "merge_method": "linear",
        "dtype": config.get("dtype") or config.get("torch_dtype") or "float32",
        "parameters": {"weight": 0.5},
        "slices": [{"sources": sources}],
    }
    file = folder.parent / "merge.yaml"
    file.write_text(yaml.safe_dump(merge, sort_keys=False), encoding="utf8")
    return file


def training(args: argparse.Namespace, folder: Path, target: Path) -> list[str]:
    tokens = args.steps * TRAINING["batch_size"] * min(TRAINING_CONTEXT, args.context)
    rrtc = [sys.executable, "-m", "rrtc", "uptrain", str(folder), "-o", str(target)]
    return [*rrtc, "--recipe", str(recipe_file(args)), "--tokens", str(tokens)]


def made(target: Path, command: list[str]) -> dict:
    """Has `command` make the folder `target`, unless an earlier run has; returns what that took. Raises NoResult."""
    record = target.with_name(f"{target.name}.json")
    if not record.exists():
        for left in (target, target.with_name(f"{target.name}.partial")):  # by a run that was broken off
            shutil.rmtree(left, ignore_errors=True)
        took = run(command, target.with_name(f"{target.name}.log"))
        console.write_json(took | {"commit": commit(), "command": command}, str(record))
    return json.loads(record.read_text(encoding="utf8"))


def scored(args: argparse.Namespace, name: str, folder: Path, dense: dict | None = None) -> dict:
    """What score.py says of the model in `folder`, from an earlier run if there was one; with the scores of the `dense`
    model also the mean excess over it. Raises NoResult."""
    file = args.work / f"{name}-score.json"
    if not file.exists():
        command = [sys.executable, str(HERE / "score.py"), str(recipe_file(args)), str(folder), str(file)]
        run(command, file.with_suffix(".log"))
    found = json.loads(file.read_text(encoding="utf8"))
    if dense is None:
        return found
    found["size"] = found["params_non_embedding"] / dense["params_non_embedding"]
    return found | {"excess": mean(loss - dense["losses"][text] for text, loss in found["losses"].items())}


def run(command: list[str], log: Path) -> dict:
    """Runs `command`, what it says going to `log`: its seconds and the peak of its resident size in bytes. Raises
    NoResult where it fails.

    This process never imports torch: Linux counts what a process had before it became the command, and a process
    starts as its parent.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    with open(log, "w", encoding="utf8") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = log.read_text(encoding="utf8").strip().splitlines() or ["nothing was said"]
        raise NoResult(f"failed with exit code {process.returncode}: {said[-1]} (all of it: {log})")
    return {"seconds": round(time.perf_counter() - started, 2), "peak_bytes": usage.ru_maxrss * 1024}


def commit() -> str:
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"


def machine(dense: dict) -> dict:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "cpus": os.cpu_count(),
        "threads": dense["threads"],
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
    }


def show(result: dict, missing: list[str]) -> None:
    lines = []
    for row in result["rows"]:
        before, after = row.get("after_init"), row.get("after_training")
        lines.append(
            [
                row["title"],
                f"{before['size']:.3f}" if before else "–",
                f"{row['seconds']:.1f} s",
                size(row["peak_bytes"]),
                f"{before['excess']:.3f}" if before else "–",
                f"{after['excess']:.3f}" if after else "–",
            ]
        )
    columns = ["initialization", "size", "time", "memory", "excess", f"{result['steps']} steps"]
    values, losses = result["machine"], result["dense"]["losses"]
    console.results.print(
        f"{values['cpus']} CPUs, {values['threads']} threads, Python {values['python']}, torch {values['torch']}, "
        f"transformers {values['transformers']}, {values['date']}, commit {values['commit']}"
    )
    console.results.print(f"{result['settings']['model']}: " + ", ".join(f"{t} {x:.3f}" for t, x in losses.items()))
    console.results.print(console.table("", columns, lines))
    for line in missing:
        console.results.print(line, markup=False)
    others = {row["commit"] for row in result["rows"]} - {values["commit"]}
    if others:
        console.results.print(f"Some rows were made earlier, at commit {', '.join(sorted(others))}.")


if __name__ == "__main__":
    main()
