"""Spoils the files that rrtc reads, by a seed, and counts what reading them does.

    python benchmarks/fuzz.py [--cases 100000] [--heavy 3000] [--seed 0] [--only KIND] [--faults FOLDER]

Every kind of file in tests/helpers/fuzzing.py gets an equal part of --cases, those that build a model or a tokenizer
of --heavy. A table at the end has a line for each kind: how many were read, refused with a sentence, or made a fault,
which is anything else, 5 s of processor time too; and every fault once, with its first case. FOLDER gets the file of
each of these. Exit code 1 where there was one.
"""

import argparse
import faulthandler
import os
import resource
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="critical")

from fuzzing import kinds, spoiled, try_case

MEMORY = 12 << 30  # bytes of address space: a case that wants more is a fault
HANGS = 120  # seconds after which what does not answer to a signal ends the program, and says where it was


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--heavy", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds whose name begins with this")
    parser.add_argument("--faults", type=Path)
    given = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with tempfile.TemporaryDirectory() as work:
        os.environ["RRTC_CACHE"] = f"{work}/cache"
        every = kinds(Path(work))
        counts, faults = {}, {}
        for kind in every:
            if not kind.name.startswith(given.only):
                continue
            alike = sum(other.heavy == kind.heavy for other in every)
            counts[kind.name] = Counter()
            for number in range(-(-(given.heavy if kind.heavy else given.cases) // alike)):
                content = spoiled(kind, given.seed, number)
                faulthandler.dump_traceback_later(HANGS, exit=True)
                outcome = try_case(kind, content)
                faulthandler.cancel_dump_traceback_later()
                counts[kind.name][outcome.what] += 1
                if outcome.what == "fault":
                    key = (kind.name, outcome.error[:60])
                    if key not in faults and given.faults is not None:
                        given.faults.mkdir(parents=True, exist_ok=True)
                        (given.faults / f"{len(faults):03}-{kind.file.name}").write_bytes(content)
                    faults.setdefault(key, (number, outcome.error))
            print(kind.name, dict(counts[kind.name]), file=sys.stderr, flush=True)
    print("| file | cases | read | refused | faults |\n|---|---|---|---|---|")
    for name, found in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        print(f"| {name} | {found.total():,} | {found['read']:,} | {found['refused']:,} | {found['fault']:,} |")
    for (name, _), (number, error) in faults.items():
        print(f"\n{name}, seed {given.seed}, case {number}: {error}")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
