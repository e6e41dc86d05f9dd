"""The best file of a size: the dense model in ever fewer bits, beside what rrtc makes of the same bytes.

    python benchmarks/smallest.py DENSE --calibrate-on TEXT … --score-on TEXT … [--release FOLDER …] --work DIR
                                  [--bits 4,8 4,4 3,8 3,4 2,4] [--group 64]

Each of --bits is a dense model whose matrices have the first number of bits and whose embeddings the second; with 16
they stay as they are. Matrices are rounded as `rrtc export --quantize` does it, by GPTQ on the calibration text;
embeddings with a scale for each row in 8 bits, and for each --group of it in fewer. Few of these are files that
something loads: they are models in memory, and their bytes are counted: numbers, scales in 16 bits, and all else in 16.

--release: folders that rrtc wrote; their bytes are those of their weights files. Loss and bits per byte are those of
all texts to score on together, each model computing in bfloat16. DIR/results.jsonl has a line for each model, and what
is there is not measured again.
"""

import argparse
import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from common import Results, add_texts, texts_of
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from rrtc.export.quantize import _matrices, _moments
from rrtc.io.source import load_model
from rrtc.io.weights import Weights
from rrtc.model.rows_rrt import tables_of
from rrtc.scoring import score
from rrtc.tying.rounding import best_scales, gptq, round_to_nearest, widest_scales
from rrtc.units import size

SCALE, PLAIN = 16, 16  # bits of a scale; of what is not rounded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path)
    add_texts(parser, 8192)
    parser.add_argument("--release", nargs="*", default=[], type=Path)
    parser.add_argument("--bits", nargs="*", default=["4,8", "4,4", "3,8", "3,4", "2,4"])
    parser.add_argument("--group", type=int, default=64, help="inputs with a scale in common, at most")
    args = parser.parse_args()
    calibration, scored = texts_of(parser, args)
    results = Results(args.work)

    def measure(name: str, made: Iterator[tuple[PreTrainedModel, int]]) -> None:
        def measured() -> dict:
            model, count = next(made)
            found = score(model.bfloat16(), scored)
            return {"bytes": count, "loss": found.loss, "bits_per_byte": found.bits_per_byte}

        results.measured({"model": name}, measured)

    moments = functools.cache(lambda: moments_of(args.dense, calibration))
    for asked_bits in args.bits:
        inside, tables = map(int, asked_bits.split(","))
        name = f"dense, {inside} bits in groups of {args.group}, embeddings in {tables}"
        measure(name, rounded(args.dense, moments, inside, tables, args.group))
    for folder in args.release:
        measure(str(folder), released(folder))
    table = Table("model", "size", "loss", "bits per byte")
    for row in sorted(results.rows, key=lambda row: row["bytes"]):
        table.add_row(row["model"], size(row["bytes"]), f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}")
    Console(width=120).print(table)


def released(folder: Path) -> Iterator[tuple[PreTrainedModel, int]]:
    yield load_model(folder, dtype=torch.bfloat16).eval(), Weights(folder).bytes_on_disk


def moments_of(folder: Path, calibration: torch.Tensor) -> dict[str, torch.Tensor]:
    """By the names of matrices, the second moments of what enters them in the dense model."""
    model = load_model(folder, dtype=torch.float32).eval()
    matrices = _matrices(model)
    found = _moments(model, matrices, calibration, lambda: None)
    return {matrix.name: found[matrix.linear] for matrix in matrices}


@torch.no_grad()
def rounded(
    folder: Path, moments: Callable[[], dict[str, torch.Tensor]], inside: int, tables: int, group: int
) -> Iterator[tuple[PreTrainedModel, int]]:
    """The dense model of `folder` with its matrices in `inside` bits and its embeddings in `tables`, and its bytes."""
    model = load_model(folder, dtype=torch.float32).eval()
    bits = PLAIN * sum(parameter.numel() for parameter in model.parameters())
    for module in tables_of(model)[0].values():
        weight = module.weight.data
        if tables < PLAIN:
            width = weight.shape[1] if tables == 8 else group
            uniform = weight.new_ones(weight.shape[1])
            scale = widest_scales(weight, 8, width) if tables == 8 else best_scales(weight, tables, width, uniform)
            module.weight.data = round_to_nearest(weight, scale.bfloat16().float(), tables)
            bits += (tables - PLAIN) * weight.numel() + SCALE * scale.numel()
    matrices = _matrices(model) if inside < PLAIN else []
    for matrix in matrices:
        weight, seen = matrix.linear.weight.data, moments()[matrix.name]
        scale = best_scales(weight, inside, group, seen.diagonal()).bfloat16().float()
        matrix.linear.weight.data = gptq(weight, seen, scale, inside)
        bits += (inside - PLAIN) * weight.numel() + SCALE * scale.numel()
    yield model, bits // 8


if __name__ == "__main__":
    main()
