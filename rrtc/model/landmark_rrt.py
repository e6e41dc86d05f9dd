"""Landmark blocks: some blocks of keys that stay in sight after they have left the window, which is what is left of
BigBird's random blocks (Zaheer et al. 2020, arXiv 2007.14062, §2) in a causal model whose cache is to be bounded.

There, each query draws blocks anew, so that all keys have to be kept. Here, keys draw lots, and those that lose are
forgotten for good: of all blocks that have left the window so far, the `count` with the least lots stay (reservoir
sampling). A block goes as it came, one key after the other: as each key of the newcomer leaves the window, the key in
the same place of the block that it relieves goes out of sight. So exactly size * count keys are kept, and what matters
of a key is one number: which key relieves it. The lot is that of a block's number in its document, and of the visit's
seed.

This file is shipped in every export beside attention_rrt.py and imports nothing but torch.
"""

import functools
import heapq
import random
from dataclasses import dataclass

import torch
from torch import Tensor

NEVER = 1 << 30  # the number of a block that no text has


@dataclass(frozen=True)
class Landmark:
    """`count` blocks of `size` keys beyond the window and the sinks. seed: of the lots, so that visits see others."""

    size: int
    count: int
    seed: int

    @torch.compiler.disable  # its table is as long as the text
    def relieved_by(self, key: Tensor, first: Tensor) -> Tensor:
        """The column of the key that takes the place of `key`, which is in sight until that one leaves the window. For
        a key of a block that is passed over, and for one before the blocks, the key itself.

        Both are columns, and broadcast; first: where the blocks of the query's document begin.
        """
        behind = key - first
        block = behind.clamp(min=0) // self.size
        known = 1 << int(block.max()).bit_length() if block.numel() else 1
        relief = _table(self.count, self.seed, known, block.device)[block]
        return torch.where(behind < 0, key, key + (relief - block) * self.size)


@functools.lru_cache(maxsize=1024)
@torch.inference_mode(False)
def _table(count: int, seed: int, blocks: int, device: torch.device) -> Tensor:
    return torch.tensor(reliefs(count, seed, blocks), device=device)


def reliefs(count: int, seed: int, blocks: int) -> list[int]:
    """For each of so many blocks the number of the block that relieves it: its own where it is passed over, NEVER where
    none of them does."""
    chance, kept, found = random.Random(seed), [], []
    for number in range(blocks):
        found.append(NEVER)
        heapq.heappush(kept, (-chance.random(), number))
        if len(kept) > count:
            _, relieved = heapq.heappop(kept)
            found[relieved] = number
    return found
