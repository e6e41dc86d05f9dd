"""Kills `rrtc export` at random moments and looks at what it leaves behind.

    python benchmarks/kill.py RRTC_FOLDER --work FOLDER [--kills 50] [--seed 0]

Both forms are exported in turn, and killed with SIGKILL in two ways in turn: after a random part of the time that an
export takes, most of which is the verification; and at a random one of its operations on files of the new folder, so
that every step of the writing is met, the last renaming too. After each kill there may be no folder of the final name,
or a whole one, as it is where nothing is killed; and the same command must then succeed. Exit code 1 where that is not
so. FOLDER is made, and deleted afterwards.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import yaml

from rrtc.cli.app import main as rrtc
from rrtc.export import stage  # noqa: F401 - imported once, for all the exports that are forked from here
from rrtc.io.folder import partial_of

FORMS = ("recursive", "dense")
OPERATIONS = {"open", "os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.listdir", "os.scandir", "shutil.copyfile"}
OF_EACH_RUN = ("rrtc.yaml", "README.md")  # they hold the time of day


def start(source: Path, target: Path, form: str, log: Path, last: int | None = None) -> int:
    """Exports in a process of its own, whose number is returned. It kills itself before operation number `last` (from
    0) on a file of the new folder; without that, it writes into `log` how many there were."""
    process = os.fork()
    if process:
        return process
    counted = 0
    beginnings = (str(target), str(partial_of(target)))

    def count(event: str, arguments: tuple) -> None:
        nonlocal counted
        if event in OPERATIONS and any(str(argument).startswith(beginnings) for argument in arguments[:2]):
            if counted == last:
                os.kill(os.getpid(), signal.SIGKILL)
            counted += 1

    sys.addaudithook(count)
    said = os.open(log.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    sys.argv = ["rrtc", "export", str(source), "-o", str(target), "--format", form, "--max-shard-size", "100KB"]
    try:
        rrtc()
    except SystemExit as end:
        log.write_text(str(counted))
        os._exit(end.code or 0)


def succeed(source: Path, target: Path, form: str, log: Path) -> None:
    """Exports without a kill. Exits where that fails."""
    _, status = os.waitpid(start(source, target, form, log), 0)
    if status:
        sys.exit(f"The export failed:\n{log.with_suffix('.txt').read_text()}")


def contents(folder: Path) -> dict[str, str]:
    """A hash of each file in an export by its name, without what differs from run to run. Exits where the files are not
    those that its rrtc.yaml tells of."""
    files = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    told = yaml.safe_load((folder / "rrtc.yaml").read_text())["measured"]["export"]["files"]
    if sorted(files) != told:
        sys.exit(f"{folder} holds {sorted(files)}, and says {told}.")
    return {name: digest for name, digest in files.items() if name not in OF_EACH_RUN}


def main(source: Path, work: Path, kills: int, seed: int) -> Counter:
    """Kills so many exports of `source` in `work`; returns how many left what behind."""
    chance, found = random.Random(seed), Counter()
    target, log = work / "out", work / "operations"
    whole, seconds, operations = {}, {}, {}
    for form in FORMS:
        started = time.monotonic()
        succeed(source, target, form, log)
        seconds[form], operations[form] = time.monotonic() - started, int(log.read_text())
        whole[form] = contents(target)
        shutil.rmtree(target)
        print(f"{form}: {operations[form]} operations on files in {seconds[form]:.1f} s")
    for number in range(kills):
        form, by_clock = FORMS[number % 2], number // 2 % 2 == 1
        if by_clock:
            moment = chance.uniform(0, seconds[form])
            process, at = start(source, target, form, log), f"after {moment:.2f} s"
            time.sleep(moment)
            os.kill(process, signal.SIGKILL)  # where it has ended, nobody has asked for its end yet
        else:
            moment = chance.randrange(operations[form])
            process, at = start(source, target, form, log, moment), f"before operation {moment}"
        os.waitpid(process, 0)
        left = "whole" if target.exists() else "unfinished" if partial_of(target).exists() else "nothing"
        if left == "whole" and contents(target) != whole[form]:
            sys.exit(f"{form}, killed {at}: {target} is not whole.")
        if left == "whole":
            shutil.rmtree(target)
        succeed(source, target, form, log)
        if contents(target) != whole[form] or partial_of(target).exists():
            sys.exit(f"{form}, killed {at}: the next export is another one.")
        shutil.rmtree(target)
        found[left] += 1
        print(f"{number + 1:>3}  {form:<9}  killed {at:<20}  left {left}; the next export succeeded", flush=True)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What a killed export leaves behind.")
    parser.add_argument("source", type=Path, help="an rrtc folder")
    parser.add_argument("--work", type=Path, required=True, help="new folder, deleted afterwards")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.work.mkdir()
    try:
        left = main(given.source.absolute(), given.work.absolute(), given.kills, given.seed)
    finally:
        shutil.rmtree(given.work)
    print(", ".join(f"{count} left {what}" for what, count in left.items()))
