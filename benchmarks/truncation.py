"""Truncation to a low rank beside torch.linalg.svd: time, and the error of the approximation over the best possible.

    python benchmarks/truncation.py [--shapes 1024x1024 2048x5632] [--ranks 64 128] [--repeats 3]

Matrices are random, float32, with four spectra: flat (Gaussian entries), falling slowly (i^-1/2) and fast (i^-1), and
flat with two values that stand out. Of the repeats the fastest counts, on either side; both are timed in turn.
"""

import argparse
import os
import platform
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rrtc.tying.tie import truncated_svd


def spectra(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Matrices of `shape` by the name of their spectrum."""
    flat = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    place = torch.arange(1, len(s) + 1)
    outliers = torch.cat([torch.tensor([1000.0, 200.0]) * s[0], s[2:]])
    values = {"i^-1/2": place**-0.5, "i^-1": place**-1.0, "two outliers": outliers}
    return {"flat": flat} | {name: (u * own) @ v for name, own in values.items()}


def timed(*works: Callable[[], object], repeats: int) -> list[float]:
    """Seconds that each takes, at best, when they run in turn."""
    best = [float("inf")] * len(works)
    for _ in range(repeats):
        for number, work in enumerate(works):
            started = time.perf_counter()
            work()
            best[number] = min(best[number], time.perf_counter() - started)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["1024x1024", "2048x2048", "4096x4096", "2048x5632"])
    parser.add_argument("--ranks", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--repeats", type=int, default=3)
    asked = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    table = Table(title=f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    for column in ("matrix", "spectrum", "rank", "full SVD (s)", "rrtc (s)", "faster", "error over the best"):
        table.add_column(column, justify="left" if column in ("matrix", "spectrum") else "right")
    for text in asked.shapes:
        shape = tuple(int(size) for size in text.split("x"))
        for name, matrix in spectra(shape).items():
            best = torch.linalg.svdvals(matrix.double())
            for rank in asked.ranks:
                full, ours = timed(
                    lambda m=matrix: torch.linalg.svd(m, full_matrices=False),
                    lambda m=matrix, r=rank: truncated_svd(m, r),
                    repeats=asked.repeats,
                )
                b, a = truncated_svd(matrix, rank)
                error = (matrix.double() - b.double() @ a.double()).norm() / best[rank:].square().sum().sqrt()
                figures = (f"{full:.3f}", f"{ours:.3f}", f"{full / ours:.1f} x", f"{error.item():.5f}")
                table.add_row(f"{text}", name, str(rank), *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
