"""ONNX graphs in 8 or 4 bits: matrices as ONNX Runtime's operators read them, in blocks of inputs with a scale each.

    MatMulNBits    a product with a matrix in 4 or 8 bits
    Gather, Mul    rows of an embedding in 8 bits; tied to the output projection, both read one tensor (browsers have no
                   GatherBlockQuantized)

The numbers are those of the quantized recursive format, which were rounded by what all uses of a matrix see: ONNX
Runtime's quantizer would round each to the nearest. A shared matrix is stored once, for all nodes that read it.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrtc.io.weights import Weights
from rrtc.model.rows_rrt import BITS as TABLE_BITS

SMALLEST, LARGEST_TABLE = 16, 128  # inputs in a block: of MatMulNBits; of a table, whose rows have one scale
DOMAIN = "com.microsoft"
ENDS = "blocks", "scales"  # of the names of what is stored of a matrix


@dataclass(frozen=True)
class Rounded:
    """A matrix: whole numbers (outputs, inputs), int8, of so many bits, times `scale` (outputs, groups), float32, of
    groups of equally many inputs."""

    whole: Tensor
    scale: Tensor
    bits: int
    part: str  # layers or tables

    @property
    def weight(self) -> Tensor:
        return self.whole.float() * self.scale.repeat_interleave(self.whole.shape[1] // self.scale.shape[1], 1)

    @property
    def block(self) -> int:
        """The inputs in one block: the smallest power of two that has room for a group. A table's group is cut into the
        largest ones that divide it, because a row that is looked up has no room to spare."""
        inputs, group = self.whole.shape[1], self.whole.shape[1] // self.scale.shape[1]
        if self.part == "tables":
            return min(inputs & -inputs, LARGEST_TABLE)
        return max(SMALLEST, 1 << (group - 1).bit_length())

    @property
    def blocks(self) -> tuple[NDArray, NDArray]:
        """(what MatMulNBits has of it: (outputs, blocks, bytes of a block), uint8; scales (outputs, blocks),
        float32)."""
        outputs, inputs = self.whole.shape
        count = -(-inputs // self.block)
        numbers = torch.zeros(outputs, count * self.block, dtype=torch.int16)
        numbers[:, :inputs] = self.whole
        numbers = (numbers + 2 ** (self.bits - 1)).to(torch.uint8).view(outputs, count, self.block)
        if self.bits == 4:  # the first of two numbers is in the lower half of a byte
            numbers = numbers[..., ::2] | numbers[..., 1::2] << 4
        scale = self.scale.expand(outputs, count) if self.scale.shape[1] == 1 else self.scale
        return numbers.contiguous().numpy(), scale.contiguous().numpy()


def read_rounded(folder: Path, bits: int) -> dict[str, Rounded]:
    """The matrices of the quantized recursive export in `folder`, by the names of their modules."""
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weights, found = Weights(folder), {}
    for name in weights:
        module, _, last = name.rpartition(".")
        if last == "weight_packed":
            shape = torch.Size(weights.raw(f"{module}.weight_shape").tolist())
            whole = unpack_from_int32(weights.raw(name), bits, shape)
            found[module] = Rounded(whole, weights.raw(f"{module}.weight_scale").float(), bits, "layers")
        elif last == "numbers":
            scale = weights.raw(f"{module}.scale").float()
            found[module.removesuffix(".table")] = Rounded(weights.raw(name), scale, TABLE_BITS, "tables")
    return found


def fill(model: torch.nn.Module, folder: Path, rounded: dict[str, Rounded]) -> None:
    """Gives a recursive `model` in floating point the numbers of the quantized export in `folder`, of which `rounded`
    are the matrices."""
    weights, state = Weights(folder), model.state_dict()
    with torch.no_grad():
        for module, matrix in rounded.items():
            state[f"{module}.weight"].copy_(matrix.weight)
        for name in weights:
            if name in state:
                state[name].copy_(weights.raw(name))


def in_blocks(graph, rounded: dict[str, Rounded]) -> None:
    """Replaces the matrices of `graph` (an onnx_ir.Model) that are `rounded`, each with all nodes that read it. A table
    whose rows are no multiple of SMALLEST stays in floating point."""
    # A graph keeps the numbers of a matrix and not its name.
    known = {_key(matrix.weight.numpy()): name for name, matrix in rounded.items() if matrix.block >= SMALLEST}
    for value in list(graph.graph.initializers.values()):
        if len(value.shape) == 2 and value.const_value.dtype.name == "FLOAT":
            array = value.const_value.numpy()
            name = known.get(_key(array)) or known.get(_key(array.T))
            if name is not None:
                _replace(graph, value, name, rounded[name])


def parts_of(graph, rounded: dict[str, Rounded], dtype: torch.dtype) -> dict[str, dict[str, str | int]]:
    """The parts of `graph`, whose other matrices are in `dtype`, as rrtc.export.quantize.Quantized has them."""
    sizes = {"layers": 0, "tables": 0, "rest": 0}
    for value in graph.graph.initializers.values():
        module, _, last = value.name.removesuffix(".stored").rpartition(".")
        sizes[rounded[module].part if last in ENDS else "rest"] += value.const_value.nbytes
    numbers = {matrix.part: f"int{matrix.bits}" for matrix in rounded.values()}
    numbers["rest"] = str(dtype).removeprefix("torch.")
    return {part: {"number": numbers[part], "bytes": size} for part, size in sizes.items() if size}


def _key(array: NDArray) -> tuple:
    return array.shape, hashlib.sha256(numpy.ascontiguousarray(array)).digest()


def _replace(graph, value, name: str, matrix: Rounded) -> None:
    """Has all nodes that read the matrix `value` read its blocks, where there are operators for all of them."""
    products, lookups = [], []  # (node, of what a product is)
    for use in list(value.uses()):
        node = use.node
        readers = [other.node for other in node.outputs[0].uses()] if node.op_type == "Transpose" else [node]
        if any(reader.op_type not in ("MatMul", "Gather") for reader in readers):
            return
        products += [reader for reader in readers if reader.op_type == "MatMul"]
        lookups += [reader for reader in readers if reader.op_type == "Gather"]
    graph.opset_imports[DOMAIN] = 1
    numbers, scale = (_initializer(graph, f"{name}.{end}", a) for end, a in zip(ENDS, matrix.blocks, strict=True))
    outputs, inputs = matrix.whole.shape
    for node in products:
        about = {"K": inputs, "N": outputs, "bits": matrix.bits, "block_size": matrix.block}
        _put(graph, node, "MatMulNBits", [node.inputs[0], numbers, scale], about)
    for node in lookups:
        _look_up(graph, node, name, numbers, scale)
    for node in [use.node for use in value.uses()]:
        graph.graph.remove(node, safe=True)  # a Transpose that nothing reads
    graph.graph.initializers.pop(value.name)


def _initializer(graph, name: str, array: NDArray):
    import onnx_ir as ir

    value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
    value.shape, value.type = ir.Shape(array.shape), ir.TensorType(value.const_value.dtype)
    graph.graph.register_initializer(value)
    return value


def _look_up(graph, node, name: str, numbers, scale) -> None:
    """Rows of a table in 8 bits in the place of `node`, a Gather of rows: those of `numbers` (rows, blocks, block) and
    `scale` (rows, blocks) in floating point."""
    import onnx_ir as ir

    ids = node.inputs[1]
    last = _initializer(graph, f"{name}.last", numpy.array([-1]))
    zero = _initializer(graph, f"{name}.zero", numpy.array(2 ** (TABLE_BITS - 1), "float32"))
    shape = _initializer(graph, f"{name}.shape", numpy.array([0] * len(ids.shape) + [-1]))
    made = [ir.node("Gather", [numbers, ids]), ir.node("Gather", [scale, ids])]
    made += [
        ir.node("Cast", [made[0].outputs[0]], {"to": ir.DataType.FLOAT}),
        ir.node("Unsqueeze", [made[1].outputs[0], last]),
    ]
    made.append(ir.node("Sub", [made[2].outputs[0], zero]))
    made.append(ir.node("Mul", [made[4].outputs[0], made[3].outputs[0]]))
    graph.graph.insert_before(node, made)
    _put(graph, node, "Reshape", [made[5].outputs[0], shape], {}, "")


def _put(graph, node, operator: str, inputs: list, attributes: dict[str, int], domain: str = DOMAIN) -> None:
    """`operator` in the place of `node`, with its output."""
    import onnx_ir as ir

    made, before = ir.node(operator, inputs, attributes, domain=domain), node.outputs[0]
    made.outputs[0].name, made.outputs[0].shape, made.outputs[0].type = before.name, before.shape, before.type
    before.replace_all_uses_with(made.outputs[0], replace_graph_outputs=True)
    graph.graph.insert_before(node, [made])
    graph.graph.remove(node, safe=True)
