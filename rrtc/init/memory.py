"""The memory of `init`: what it will take, and that what is freed goes back to the system."""

import ctypes
import sys

from rrtc.plan import Plan

PROGRAM_BYTES = 450_000_000  # Python, torch and transformers themselves
BATCH_TOKENS = 2048  # that init runs through a layer at a time
MMAP_THRESHOLD = -3  # the option's number in glibc's malloc.h
LEAST_BYTES = 1 << 20


def init_bytes(plan: Plan, tokens: int, joint: bool, context: int = 0) -> int:
    """An estimate of the peak memory of `init` in bytes, parts of files that it looks at included. tokens: that the
    model is run over, layer by layer, in windows of `context`. joint: whether layers are tied by what they see.

    The larger of two. Running: a layer, the activations of a batch, the hidden states and their gradients, and what
    is gathered for the moments. Tying: the layers of the largest slot (or two neighbors, where any may be tied),
    and a few copies of its largest matrix, or, for `joint`, its FFN's moments and what lining up neurons or solving
    with moments takes. All in float32, decompositions in float64.
    """
    visits = max(plan.slots, key=lambda visits: len(visits) * sum(m.size for m in plan.matrices(visits[0])))
    matrices, together = plan.matrices(visits[0]), max(len(visits), 2 if joint else 1)
    layer, largest = 4 * sum(m.size for m in matrices), max(matrices, key=lambda m: m.inputs)
    at_once = 6 * min(tokens, max(BATCH_TOKENS, context)) * sum(m.inputs + m.outputs for m in matrices)
    gathered = 4 * sum(min(tokens, m.inputs) * m.inputs for m in matrices)
    running = layer + at_once + gathered + 2 * 4 * tokens * matrices[0].inputs
    work = 6 * 4 * max(m.size for m in matrices)
    if joint:
        moments = together * 4 * sum(min(tokens, size) * size for size in (largest.inputs, largest.outputs))
        sampled = tokens < largest.inputs
        work = moments + (8 * largest.inputs**2 + 12 * largest.size if sampled else 24 * largest.inputs**2)
    return PROGRAM_BYTES + max(running if tokens else 0, together * layer + work)


def return_freed_memory() -> None:
    """Has the C library give back every block of LEAST_BYTES and more as soon as it is freed. Does nothing where that
    is not glibc.

    By default glibc raises that size to 32 MiB as such blocks are freed, and keeps smaller ones: while tensors of all
    sizes come and go, memory in use and memory that is kept end up half as large again as what tensors hold.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, LEAST_BYTES)
