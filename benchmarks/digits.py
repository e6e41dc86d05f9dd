"""What all commands write for pico models, as digests: a refactoring shows that they are equal.

    python benchmarks/digits.py before.json                       # on the commit before the change
    python benchmarks/digits.py after.json --against before.json  # after it: lists what differs

Weights, configs and reports are hashed; curves and provenance are kept to be read. Times, speeds and paths are left
out. Exit code 1 where anything differs. One thread, so that sums are taken in one order; both sides need the same
machine and versions.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from pathlib import Path

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import torch
import yaml
from typer.testing import CliRunner

from rrtc.cli.app import app

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
from pico import save_pico

TEXT = ("All happy families are alike; each unhappy family is unhappy in its own way. " * 20 + "\n\n\n") * 40
VOLATILE = {"seconds", "made", "path", "made_with", "of", "speed", "tokens_per_second", "peak_memory_bytes"}
LEFT_OUT = (".py", ".png", ".html")  # code and pictures
TRAIN = (
    "--data text.txt --context 32 --tokens 768 --batch-size 4 --micro-batch 2 --save-every 3 --learning-rate 1e-2 "
    "--precision float32"
)
EVAL = "--tokens 1000 --context 64 --passkey-lengths 200 --sample-tokens 8 --speed-rounds 1"
MEASURE = "--measure-tokens 500"
AUTO = f"--budget 0.6 --sharing auto --calibrate-on text.txt --calibrate-on self --calibrate-tokens 1024 {MEASURE}"
MIDDLE = f"--budget 0.6 --sharing middle_cycle --calibrate-tokens 1024 {MEASURE} --dtype bfloat16"
ARCHITECTURES = ("llama", "gemma3", "gpt2", "phi3")
COMMANDS = [
    *(f"init {name} -o {name}-paper --rank 4 {MEASURE}" for name in ARCHITECTURES),
    *(f"init {name} -o {name}-auto {AUTO}" for name in ARCHITECTURES),
    *(f"init {name} -o {name}-middle {MIDDLE}" for name in ARCHITECTURES),
    "init llama -o llama-shared --rank 4 --loops 3 --norms shared --shared-init stepwise --measure-tokens 0",
    f"uptrain llama-paper -o up-paper {TRAIN} --losses forward_kl=1 --losses next_token=1 --losses hidden=0.5",
    f"uptrain llama-middle -o up-middle {TRAIN}",
    f"uptrain gemma3-auto -o up-gemma {TRAIN} --optimizer muon",
    f"uptrain up-middle -o up-exits {TRAIN} --exits after --teacher-cache cache",
    f"uptrain gpt2-paper -o up-gpt2 {TRAIN} --losses next_token=1",
    f"eval up-exits -o report-exits {EVAL}",
    f"eval up-gemma -o report-gemma {EVAL} --text text.txt --baselines",
    "export up-exits -o recursive --report report-exits",
    "export up-gemma -o dense --format dense --dtype bfloat16",
    "export up-gpt2 -o dense-gpt2 --format dense",
    "export up-middle -o onnx --format onnx --dtype float16",
    "export up-middle -o int4 --quantize int4",
    "export llama-auto -o int8 --quantize int8 --format dense",
]


def run(command: str) -> None:
    print(f"rrtc {command}", flush=True)
    done = CliRunner().invoke(app, command.split(), env={"COLUMNS": "200", "NO_COLOR": "1"})
    if done.exit_code:
        sys.exit(f"{done.output}\n{done.exception!r}")


def steady(value):
    """`value`, read from JSON or YAML, without what differs from one run to the next."""
    if isinstance(value, dict):
        return {key: steady(each) for key, each in value.items() if key not in VOLATILE}
    return [steady(each) for each in value] if isinstance(value, list) else value


def digest(file: Path):
    content = file.read_bytes()
    if file.name == "metrics.jsonl":
        return [[step[key] for key in ("loss", "kl", "objective")] for step in map(json.loads, content.splitlines())]
    if file.name == "rrtc.yaml":
        return steady(yaml.safe_load(content))
    if file.name == "report.json":
        content = json.dumps(steady(json.loads(content)), sort_keys=True).encode()
    if file.name == "README.md":
        content = re.sub(rb"(seconds|tokens_per_second): [\d.]+", b"", content)
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the JSON file to write")
    parser.add_argument("--against", type=Path, help="one that was written before")
    asked = parser.parse_args()
    output, before = asked.output.absolute(), asked.against and json.loads(asked.against.read_text())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ["RRTC_CACHE"] = str(Path(folder) / "rrtc-cache")
        Path("text.txt").write_text(TEXT)
        for name in ARCHITECTURES:
            torch.manual_seed(0)
            save_pico(Path(name), name)
        for command in COMMANDS:
            run(command)
        files = [file for file in sorted(Path().rglob("*")) if file.is_file() and file.suffix not in LEFT_OUT]
        found = {str(file): digest(file) for file in files if file.parts[0] != "rrtc-cache"}
        os.chdir(output.parent)
    output.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    if before is None:
        print(f"{len(found)} files")
        return 0
    different = [name for name in sorted(found.keys() | before.keys()) if found.get(name) != before.get(name)]
    print(f"{len(different)} of {len(found)} files differ", *different, sep="\n")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
