"""Writing the tensors of a format as safetensors: what the recursive and the dense one have in common."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rrtc.console import progress
from rrtc.io.folder import copy_companions
from rrtc.io.shard_writer import ShardWriter, map_ahead
from rrtc.io.weights import Weights

Tensors = Iterator[tuple[str, Iterable[Tensor]]]  # tensors by name, each in blocks of its rows


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
