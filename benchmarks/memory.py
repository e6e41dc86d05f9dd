"""Peak memory of `rrtc init` on a generated Llama-shaped checkpoint, beside what it may take.

    python benchmarks/memory.py FOLDER --tokenizer MODEL [--size 8GB] [-- flags of rrtc init]

FOLDER, which must not exist, gets a model of random weights (float32, in shards) and what init makes of it, and is
deleted afterwards; MODEL is a folder whose tokenizer is copied. May be taken: the largest tie group's layers in
float32, the calibration activations of one layer (the inputs of its matrices, float32), and 1 GiB. The peak is the
resident size of the process, files that it maps included, as the kernel counts it (ru_maxrss).
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig

from rrtc.io.folder import copy_companions
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.weights import row_blocks
from rrtc.stock.architecture import read_architecture, stock_model
from rrtc.units import parse_size, size

SHARD_BYTES = 2 * 10**9
DEFAULT_FLAGS = "--shared-init joint --sharing sequence --rank 64 --calibrate-tokens 1024 --measure-tokens 1024"


def generate(folder: Path, tokenizer: Path, least_bytes: int, width: int, inner: int) -> LlamaConfig:
    """Writes a model of at least `least_bytes` on disk into `folder`; returns its config."""
    folder.mkdir(parents=True)
    copy_companions(tokenizer, folder)
    vocabulary = len(AutoTokenizer.from_pretrained(tokenizer))
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=1,
        num_attention_heads=width // 64, num_key_value_heads=width // 256, tie_word_embeddings=True,
        dtype="float32", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    one = read_architecture(config)
    layer = one.non_embedding - one.rest
    layers = -(-(least_bytes // 4 - one.parameters) // layer) + 1
    config.num_hidden_layers = layers + layers % 2
    config.save_pretrained(folder)
    writer = ShardWriter(folder, SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in stock_model(config).named_parameters():
        writer.add_blocks(name, random_blocks(parameter.shape, generator))
    writer.finish()
    return config


def random_blocks(shape: torch.Size, generator: torch.Generator) -> Iterator[Tensor]:
    for rows in row_blocks(shape):
        block = torch.Size((rows.stop - rows.start, *shape[1:]))
        yield 0.02 * torch.randn(block, generator=generator) if len(shape) > 1 else torch.ones(block)


def run(command: list[str]) -> tuple[int, float]:
    """(peak resident size in bytes, seconds) of a command. Ends this program if it fails."""
    started = time.monotonic()
    process = os.posix_spawn(command[0], command, dict(os.environ))
    _, status, usage = os.wait4(process, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed.")
    return 1024 * usage.ru_maxrss, time.monotonic() - started


def estimated(folder: Path, flags: list[str]) -> int:
    """The peak that `rrtc init --dry-run` tells in advance, in bytes."""
    command = [sys.executable, "-m", "rrtc", "init", str(folder / "dense"), "--dry-run", "--json", "-", *flags]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(told)["init_peak_bytes"]


def main() -> None:
    own, _, flags = " ".join(sys.argv[1:]).partition(" -- ")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", type=parse_size, default=parse_size("8GB"))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    asked, flags = parser.parse_args(own.split()), (flags or DEFAULT_FLAGS).split()
    try:
        config = generate(asked.folder / "dense", asked.tokenizer, asked.size, asked.width, asked.inner)
        table = report(asked.folder, config, flags)
    finally:
        shutil.rmtree(asked.folder, ignore_errors=True)
    Console().print(table)


def report(folder: Path, config: LlamaConfig, flags: list[str]) -> Table:
    """Runs init on folder/dense and says what it took."""
    estimate = estimated(folder, flags)
    init = [sys.executable, "-m", "rrtc", "init", str(folder / "dense"), "-o", str(folder / "out"), *flags]
    peak, seconds = run(init)
    given = dict(zip(flags[::2], flags[1::2], strict=False))
    tokens, loops = int(given["--calibrate-tokens"]), int(given.get("--loops", 2))
    architecture = read_architecture(config)
    matrices = {m.name.split(".")[-1]: m for m in architecture.layers[0].matrices}
    group = 4 * loops * sum(m.size for m in matrices.values())
    activations = 4 * tokens * sum(matrices[f"{name}_proj"].inputs for name in ("q", "o", "gate", "down"))
    bound = group + activations + 2**30
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    table = Table(title=f"rrtc init {' '.join(flags)}\n{machine}", show_header=False)
    rows = {
        "on disk": size(sum(file.stat().st_size for file in (folder / "dense").glob("*.safetensors"))),
        "parameters": f"{architecture.parameters:,} in {len(architecture.layers)} layers",
        "largest tie group in float32": size(group),
        "calibration activations of one layer": f"{size(activations)} ({tokens} tokens)",
        "may be taken": size(bound),
        "peak resident size": f"{size(peak)} ({peak / bound:.0%} of it)",
        "estimate of --dry-run": size(estimate),
        "written": size(sum(file.stat().st_size for file in (folder / "out").glob("*.safetensors"))),
        "time": f"{seconds / 60:.1f} min",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
