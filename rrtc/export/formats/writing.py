"""Writing the tensors of a format as safetensors: what the recursive and the dense one have in common."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rrtc.console import note, progress
from rrtc.export.quantize import quantize
from rrtc.export.verify import Reference, check_logits
from rrtc.io.folder import copy_companions
from rrtc.io.shard_writer import ShardWriter, map_ahead
from rrtc.io.weights import Weights
from rrtc.storage import BITS
from rrtc.text.windows import Windows

Tensors = Iterator[tuple[str, Iterable[Tensor]]]  # tensors by name, each in blocks of its rows
Texts = tuple[Tensor, Windows]  # to calibrate on, token ids (windows, context); held out of it


def write_tensors(
    source: Path,
    folder: Path,
    shard_bytes: int,
    count: int,
    tensors: Callable[[Callable], Tensors],
    stored: torch.dtype | None = None,
) -> int:
    """Writes `count` tensors into the existing `folder`, and beside them what `source` has beside its weights; returns
    the parameter count.

    tensors(each): the tensors; each: a `map` that may work ahead. No more than a few blocks are in memory. stored: a
    wider dtype to write them in.
    """
    writer = ShardWriter(folder, shard_bytes)
    with progress("Writing weights", count) as advance, map_ahead() as each:
        for name, blocks in tensors(each):
            writer.add_blocks(name, blocks if stored is None else (block.to(stored) for block in blocks))
            advance()
        writer.finish()
    copy_companions(source, folder)
    return Weights(folder).parameters


def round_written(
    folder: Path, number: str, texts: Texts, shard_bytes: int, expected: Reference
) -> tuple[Reference, dict]:
    """Rounds the matrices of the recursive or dense model in `folder`, just written, to `number`, int8 or int4.

    Returns what the model must compute then, where `expected` is what it must have computed before, and
    bits_per_byte and parts, as `Quantized` has them. Raises RrtcError where it did not.
    """
    dtype = getattr(torch, Weights(folder).dtype)
    note(f"Rounding to {BITS[number]} bits")
    found = quantize(folder, BITS[number], *texts, shard_bytes)
    check_logits(found.plain, expected, dtype)
    rounded = replace(expected, logits=found.logits, rounding=found.rounding)
    return rounded, {"bits_per_byte": found.bits_per_byte, "parts": found.parts}
