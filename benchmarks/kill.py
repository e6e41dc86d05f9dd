"""Kills rrtc's commands at random moments and looks at what they leave behind.

    python benchmarks/kill.py --work FOLDER [--kills 50] [--seed 0] [--only init uptrain …]

The model is a pico Llama of four layers. Every command begins with an empty cache and is killed with SIGKILL in two
ways in turn: after a random part of the time that it takes, and at a random one of its operations on files of the new
folder and of the cache, so that every step of the writing is met, the last renaming too. After each kill there may be
no folder of the final name, or a whole one, as it is where nothing is killed (at worst with the folder of finished work
that was about to be removed, which nothing reads); and the same command, with --resume where it says that there is
something to resume, must then succeed with the same files, from what the kill has left in the cache. Exit code 1 where
that is not so. FOLDER is made, and deleted afterwards.

All are forked from one process that has imported what they need, and so are the fresh ones in which exports are loaded
again: of a pico model's export, most is importing torch.
"""

import argparse
import gc
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))

import ready
from pico import save_pico

from rrtc.cli.app import main as rrtc
from rrtc.eval import stage as evaluating  # noqa: F401 - imported once, for all the commands that are forked from here
from rrtc.export import stage as exporting  # noqa: F401
from rrtc.init import stage as initializing  # noqa: F401
from rrtc.io.folder import RESUMABLE, partial_of
from rrtc.uptrain import stage as uptraining  # noqa: F401

OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.copyfile"}
TIMES = {"made", "seconds", "tokens_per_second", "path", "relative_path"}  # what differs from run to run
UNLIKE = {"README.md", "loss.png", "report.html"}  # files that tell of these
TRAINING = "--data pydoc --context 32 --tokens 1024 --batch-size 4 --micro-batch 2 --save-every 2 --precision float32"
SCORING = "--tokens 512 --context 64 --passkey-trials 0 --speed-rounds 0 --sample-tokens 4"
RECIPE = {
    "init": {"rank": 4, "measure_tokens": 256},
    "uptrain": {"context": 32, "tokens": 512, "batch_size": 4, "micro_batch": 2, "save_every": 2},
    "eval": {"tokens": 512, "context": 64, "passkey_trials": 0, "speed_rounds": 0, "sample_tokens": 4},
}


def commands(dense: Path, work: Path) -> dict[str, list[str]]:
    """Each command by name, without its output. `work` has the folders `tied` and `healed`, and a recipe."""
    tied, healed = str(work / "tied"), str(work / "healed")
    shards = ["--max-shard-size", "100KB"]
    found = {
        "init, paper": ["init", str(dense), "--rank", "4", "--measure-tokens", "256", *shards],
        "init, size": ["init", str(dense), "--size", "0.7", "--calibrate-tokens", "512", "--measure-tokens", "256"],
        "uptrain": ["uptrain", tied, *TRAINING.split()],
        "eval": ["eval", healed, *SCORING.split()],
        "run": ["run", str(work / "recipe.yaml")],
    }
    for form in ("recursive", "dense", "onnx"):
        found[f"export, {form}"] = ["export", healed, "--format", form, *(shards if form != "onnx" else [])]
    found["export, int4"] = ["export", healed, "--quantize", "int4", "--calibrate-tokens", "512"]
    return found


def start(arguments: list[str], target: Path, log: Path, last: int | None = None) -> int:
    """Runs a command in a process of its own, whose number is returned. It kills itself before operation number `last`
    (from 0) on a file of the new folder or of the cache; without that, it writes into `log` how many there were."""
    process = os.fork()
    if process:
        return process
    counted = 0
    beginnings = (str(target), str(partial_of(target)), os.environ["RRTC_CACHE"])

    def count(event: str, given: tuple) -> None:
        nonlocal counted
        if event in OPERATIONS and any(str(argument).startswith(beginnings) for argument in given[:2]):
            if counted == last:
                os.kill(os.getpid(), signal.SIGKILL)
            counted += 1

    subprocess.run = load_again
    sys.addaudithook(count)
    said = os.open(log.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["rrtc", *arguments, "-o", str(target)]
    try:
        rrtc()
    except SystemExit as end:
        log.write_text(str(counted))
        os._exit(end.code or 0)


def load_again(command: list[str], **others) -> subprocess.CompletedProcess:
    """In place of subprocess.run: the fresh process in which an export is loaded."""
    return ready.run([command[0], *command[2:]], cwd=others["cwd"], env=others["env"])  # without -P


def succeed(arguments: list[str], target: Path, log: Path) -> None:
    """Runs a command without a kill, and once more with --resume where it asks for that. Exits where it fails."""
    for more in ([], ["--resume"]):
        _, status = os.waitpid(start([*arguments, *more], target, log), 0)
        said = log.with_suffix(".txt").read_text()
        if not status:
            return
        if not any(word in said for word in ("--resume", "is not empty")):
            break
    sys.exit(f"rrtc {' '.join(arguments)} failed:\n{said}")


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file in a folder by its name, without what differs from run to run."""
    found = {}
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or file.name in UNLIKE:
            continue
        value = file.read_bytes()
        if file.suffix in (".yaml", ".json", ".jsonl"):
            texts = value.decode().splitlines() if file.suffix == ".jsonl" else [value.decode()]
            value = json.dumps([_timeless(yaml.safe_load(text)) for text in texts]).encode()
        found[file.relative_to(folder).as_posix()] = hashlib.sha256(value).hexdigest()
    return found


def _timeless(value):
    if isinstance(value, dict):
        return {key: _timeless(inside) for key, inside in value.items() if key not in TIMES}
    return [_timeless(inside) for inside in value] if isinstance(value, list) else value


def kill(name: str, arguments: list[str], work: Path, kills: int, chance: random.Random) -> Counter:
    """Kills a command so many times; returns how often it left what behind."""
    target, log, found = work / "out", work / "operations", Counter()
    shutil.rmtree(os.environ["RRTC_CACHE"])
    started = time.monotonic()
    succeed(arguments, target, log)
    seconds, operations, whole = time.monotonic() - started, int(log.read_text()), contents(target)
    shutil.rmtree(target)
    for number in range(kills):
        shutil.rmtree(os.environ["RRTC_CACHE"])
        if number % 2:
            moment = chance.uniform(0, seconds)
            process, at = start(arguments, target, log), f"after {moment:.2f} s"
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)  # where it has ended, nobody has asked for its end yet
        else:
            moment = chance.randrange(operations)
            process, at = start(arguments, target, log, moment), f"before operation {moment}"
        os.waitpid(process, 0)
        for name in RESUMABLE:
            if (target / name).exists() and (target / "rrtc.yaml").exists():
                shutil.rmtree(target / name)
                found["removing"] += 1
        # `run` makes its folder at once, and fills it stage by stage.
        left = "whole" if target.exists() else "unfinished" if partial_of(target).exists() else "nothing"
        if left == "whole" and arguments[0] != "run" and contents(target) != whole:
            sys.exit(f"{name}, killed {at}: {target} is not whole.")
        if left == "whole" and arguments[0] != "run":
            shutil.rmtree(target)
        succeed(arguments, target, log)
        if contents(target) != whole or partial_of(target).exists():
            sys.exit(f"{name}, killed {at}: what came of the next run is another one.")
        shutil.rmtree(target)
        found[left] += 1
    return found


def main(work: Path, kills: int, seed: int, only: list[str]) -> None:
    os.environ |= {"RRTC_CACHE": str(work / "cache"), "HF_MODULES_CACHE": str(work / "modules"), "HF_HUB_OFFLINE": "1"}
    ready.server()
    for name in ("onnxruntime", "onnxscript.optimizer"):
        importlib.import_module(name)
    dense = save_pico(work / "dense", num_hidden_layers=4)
    gc.collect()
    gc.freeze()
    (work / "recipe.yaml").write_text(yaml.safe_dump({"model": str(dense)} | RECIPE))
    log, made = work / "operations", commands(dense, work)
    succeed(made["init, paper"], work / "tied", log)
    succeed(made["uptrain"], work / "healed", log)
    heads = f"{'command':<20}{'kills':>6}{'nothing':>9}{'unfinished':>12}{'whole':>7}{'of them with work':>19}"
    print(f"{heads}   the next run", flush=True)
    for name, arguments in made.items():
        if not only or name.startswith(tuple(only)):
            found = kill(name, arguments, work, kills, random.Random(f"{seed} {name}"))
            left = f"{found['nothing']:>9}{found['unfinished']:>12}{found['whole']:>7}{found['removing']:>19}"
            print(f"{name:<20}{kills:>6}{left}   the same files", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What killed commands leave behind.")
    parser.add_argument("--work", type=Path, required=True, help="new folder, deleted afterwards")
    parser.add_argument("--kills", type=int, default=50, help="of each command")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="beginnings of names, such as uptrain or 'export, onnx'")
    given = parser.parse_args()
    given.work.mkdir()
    try:
        main(given.work.absolute(), given.kills, given.seed, given.only)
    finally:
        shutil.rmtree(given.work)
