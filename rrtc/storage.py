"""How large the files are that weights are stored in. Pure arithmetic, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rrtc.architecture import Architecture
from rrtc.plan import Plan
from rrtc.units import size

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}  # of the dtypes that init writes
BITS = {"int8": 8, "int4": 4}  # of the numbers that exports are quantized to
GROUP = 128  # inputs that have a scale in common, at most
SHAPE_BYTES = 16  # of the tensor that says the shape of a packed matrix
HEADER_ROOM = 1 << 20  # bytes that a large file leaves for its header (io/shard_writer.py)
LARGE_SHARD = 100 * HEADER_ROOM  # bytes of tensors from which a file is large
# What the parts of a quantized export are, for people.
PARTS = {"layers": "matrices of the layers", "tables": "embeddings and output projection", "rest": "everything else"}
ENTRY_BYTES = 160  # of a tensor in a header, at most: its name, dtype, shape and place


def group_of(inputs: int) -> int:
    """How many inputs of a quantized matrix have a scale in common: the largest power of two that divides them, up to
    GROUP, or all of them where that is less than 16."""
    power = min(inputs & -inputs, GROUP)
    return power if power >= 16 else inputs


@dataclass(frozen=True)
class Numbers:
    """What a model is stored in: `dtype`, or, with `bits`, as a quantized export in the recursive form (rrtc/export/
    quantize.py): full matrices in so many bits, tables in 8, and factors, norms and biases in `dtype`."""

    dtype: str
    bits: int | None = None

    @property
    def width(self) -> int:
        """Bytes of a number in `dtype`."""
        return NUMBER_BYTES[self.dtype]

    def matrix(self, outputs: int, inputs: int) -> float:
        """How many numbers in `dtype` take as much as a full matrix."""
        if self.bits is None:
            return outputs * inputs
        packed = outputs * 4 * -(-inputs * self.bits // 32)
        return (packed + SHAPE_BYTES) / self.width + outputs * (inputs // group_of(inputs))

    def tables(self, architecture: Architecture) -> int:
        """Bytes of embeddings and of an output projection of its own."""
        numbers = architecture.embedding + architecture.head
        if self.bits is None:
            return self.width * numbers
        bias = architecture.head - architecture.head_flops if architecture.head else 0
        return numbers - bias + self.width * (architecture.table_rows + bias)

    def whole(self, architecture: Architecture) -> int:
        """Bytes of the dense model."""
        matrices = [matrix for layer in architecture.layers for matrix in layer.matrices]
        others = architecture.non_embedding - sum(matrix.size for matrix in matrices)
        inside = others + sum(self.matrix(matrix.outputs, matrix.inputs) for matrix in matrices)
        return self.tables(architecture) + int(self.width * inside)

    def bytes(self, plan: Plan) -> int:
        """Bytes of the tensors of `plan`."""
        if self.bits is None:
            return plan.parameters * self.width
        full = 0.0
        for visits in plan.slots:
            for matrix in plan.matrices(visits[0]):
                holders = [visit for visit in visits if visit.form(matrix) == "tied"][:1]
                holders += [visit for visit in visits if visit.form(matrix) == "own"]
                full += sum(self.matrix(*visit.shape(matrix)[::-1]) for visit in holders)
        others = sum(count for part, count in plan.parts.items() if part not in ("embeddings", "head", "shared", "own"))
        return self.tables(plan.architecture) + int(self.width * (full + others))


PLAIN = Numbers("float32")  # where numbers are counted alone


def header_bytes(architecture: Architecture, files_bytes: int, shard_bytes: int, quantized: bool = False) -> int:
    """Bytes at most of the headers in weights files of `files_bytes` in all, each with up to `shard_bytes` of tensors,
    whatever plan of `architecture` they hold."""
    # Of a matrix: a shared or an own one (packed, with scales and a shape), two factors, and a bias; beside the layers:
    # tables, norms and a head.
    matrices = [matrix for layer in architecture.layers for matrix in layer.matrices]
    each = 5 if quantized else 3
    tensors = (
        sum(each + matrix.bias for matrix in matrices) + sum(len(layer.vectors) for layer in architecture.layers) + 16
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
