"""How large the files are that weights are stored in. Pure arithmetic, no torch."""

from collections.abc import Mapping
from typing import Any

from rrtc.plan import Architecture, Plan
from rrtc.units import size

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of the dtypes that init writes
HEADER_ROOM = 1 << 20  # bytes that a large file leaves for its header (io/shard_writer.py)
LARGE_SHARD = 100 * HEADER_ROOM  # bytes of tensors from which a file is large
# What the parts of a quantized export are, for people.
PARTS = {"layers": "matrices of the layers", "tables": "embeddings and output projection", "rest": "everything else"}
ENTRY_BYTES = 160  # of a tensor in a header, at most: its name, dtype, shape and place


def tensor_bytes(plan: Plan, dtype: str) -> int:
    """Bytes of the tensors of `plan`: numbers of every part take as many as `dtype` has."""
    return plan.parameters * NUMBER_BYTES[dtype]


def header_bytes(architecture: Architecture, files_bytes: int, shard_bytes: int) -> int:
    """Bytes at most of the headers in weights files of `files_bytes` in all, each with up to `shard_bytes` of tensors,
    whatever plan of `architecture` they hold."""
    # Of a matrix: a shared or an own one, two factors, and a bias; beside the layers: tables, norms and a head.
    matrices = [matrix for layer in architecture.layers for matrix in layer.matrices]
    tensors = (
        sum(3 + matrix.bias for matrix in matrices) + sum(len(layer.vectors) for layer in architecture.layers) + 16
    )
    files = 2 * -(-files_bytes // shard_bytes) if files_bytes > shard_bytes else 1  # each is half full or more
    room = files * HEADER_ROOM if min(files_bytes, shard_bytes) >= LARGE_SHARD else 0
    return max(room, tensors * ENTRY_BYTES + files * 64)


def said_parts(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """What the `parts` of a quantized export (as its measurements have them) are stored in, for people."""
    return "; ".join(f"{PARTS[part]} in {stored['number']} ({size(stored['bytes'])})" for part, stored in parts.items())


def said_numbers(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """The number formats of `parts`, each once: int4, int8 and bfloat16."""
    *others, last = dict.fromkeys(str(stored.get("number")) for stored in parts.values())
    return f"{', '.join(others)} and {last}" if others else last
