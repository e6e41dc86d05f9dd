"""Memory and time of writing an export, beside the size of its files and the time of copying them.

    python benchmarks/export.py FOLDER --tokenizer MODEL [--size 8GB] [--shard 1GB]

FOLDER, which must not exist, gets a recursive model of random weights (bfloat16, two loops in sequence, LoRA of rank
64) of at least that size, and what is written of it, and is deleted afterwards; MODEL is a folder whose tokenizer is
copied. Writing is measured alone, in a process of its own, without the verification: its peak is the resident size,
files that it maps included (ru_maxrss), and may be 1.5 times the largest shard and 1 GiB. The time of each format is
beside that of `cp` of the model's files just before; file caches are emptied before either, where this is root. Both
are shown until the program ends, when a part of the files is in memory alone, and until all is on the disk.
"""

import argparse
import os
import platform
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import init_empty_weights
from memory import SHARD_BYTES, random_blocks, run
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, LlamaConfig

from rrtc.io.folder import copy_companions
from rrtc.io.provenance import write_provenance
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture
from rrtc.units import parse_size, size

WRITE = """
import sys, torch
from pathlib import Path
from rrtc.export.formats import FORMATS
source, folder, name, dtype, shard = sys.argv[1:]
FORMATS[name].write(Path(source), Path(folder), None if dtype == "as it is" else getattr(torch, dtype), int(shard))
"""
DROP_CACHES = Path("/proc/sys/vm/drop_caches")


def generate(folder: Path, tokenizer: Path, least_bytes: int, width: int, inner: int) -> None:
    """Writes a recursive model of at least `least_bytes` on disk into `folder`."""
    folder.mkdir(parents=True)
    copy_companions(tokenizer, folder)
    base = LlamaConfig(
        vocab_size=len(AutoTokenizer.from_pretrained(tokenizer)), hidden_size=width, intermediate_size=inner,
        num_hidden_layers=2, num_attention_heads=width // 64, num_key_value_heads=width // 256,
        tie_word_embeddings=True, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    recipe = InitRecipe(sharing="sequence", rank=64)
    two = make_plan(read_architecture(base), recipe).parameters
    base.num_hidden_layers = 4
    slot = make_plan(read_architecture(base), recipe).parameters - two
    base.num_hidden_layers = 2 * (-(-(least_bytes // 2 - two) // slot) + 1)
    plan = make_plan(read_architecture(base), recipe)
    config = RrtConfig.of(plan, base)
    config.save_pretrained(folder)
    with init_empty_weights():
        model = RrtForCausalLM(config)
    writer, generator = ShardWriter(folder, SHARD_BYTES), torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        writer.add_blocks(name, (block.bfloat16() for block in random_blocks(parameter.shape, generator)))
    writer.finish()
    write_provenance(folder, "init", {"uri": "random"}, {"init": recipe.model_dump()}, {"init": {}}, [])


def sync_seconds() -> float:
    """How long it takes until everything written is on the disk."""
    began = time.perf_counter()
    os.sync()
    return time.perf_counter() - began


def empty_caches() -> None:
    os.sync()
    if os.access(DROP_CACHES, os.W_OK):
        DROP_CACHES.write_text("3\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", type=parse_size, default=parse_size("8GB"))
    parser.add_argument("--shard", type=parse_size, default=parse_size("1GB"))
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    asked = parser.parse_args()
    try:
        generate(asked.folder / "rrt", asked.tokenizer, asked.size, asked.width, asked.inner)
        table = measured(asked.folder, asked.shard)
    finally:
        shutil.rmtree(asked.folder, ignore_errors=True)
    Console(width=110).print(table)


def measured(folder: Path, shard: int) -> Table:
    source = folder / "rrt"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    table = Table(
        "format", "written", "largest shard", "peak", "may be", "time, to disk", "copying, to disk", "ratio, to disk",
        title=f"Writing a recursive model of {size(Weights(source).bytes_on_disk)}\n{machine}",
    )  # fmt: skip
    for name, dtype in (("recursive", "as it is"), ("recursive", "float16"), ("dense", "bfloat16")):
        out = folder / "out"
        empty_caches()
        _, copying = run([shutil.which("cp"), "-r", str(source), str(out)])
        copying_to_disk = copying + sync_seconds()
        shutil.rmtree(out)
        out.mkdir()
        empty_caches()
        peak, seconds = run([sys.executable, "-c", WRITE, str(source), str(out), name, dtype, str(shard)])
        to_disk = seconds + sync_seconds()
        largest = max(file.stat().st_size for file in Weights(out).files)
        table.add_row(
            f"{name}, {dtype}", size(Weights(out).bytes_on_disk), size(largest), size(peak),
            size(int(1.5 * largest) + 2**30), f"{seconds:.0f} s, {to_disk:.0f} s",
            f"{copying:.0f} s, {copying_to_disk:.0f} s", f"{seconds / copying:.2f}, {to_disk / copying_to_disk:.2f}",
        )  # fmt: skip
        shutil.rmtree(out)
    return table


if __name__ == "__main__":
    main()
