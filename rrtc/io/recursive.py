"""What a visit computes with: the tensors of the dense layer that its slot, factors and norms amount to."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from rrtc.io.weights import Weights, row_blocks
from rrtc.plan import Matrix


def effective_tensor(
    weights: Weights, slot: str, visit: dict, path: str, matrices: dict[str, Matrix], each: Callable = map
) -> Tensor:
    """The tensor at `path` of the decoder layer that `visit` stands for, float32; matrices as (outputs, inputs).

    slot: the name of the visit's slot. matrices: the weight matrices of the dense layer by their path. each: a `map`
    that may work ahead, over blocks of its rows.
    """
    return torch.cat(list(effective_blocks(weights, slot, visit, path, matrices, each)))


def effective_blocks(
    weights: Weights, slot: str, visit: dict, path: str, matrices: dict[str, Matrix], each: Callable = map
) -> Iterator[Tensor]:
    """The same in blocks of its rows. What a narrowed matrix lacks are zeros: removed neurons are at the end of each
    part of the outputs and at the end of the inputs, and compute some number times zero."""
    own, shared = f"{slot}.loops.{visit['loop']}", f"{slot}.shared"
    module, _, kind = path.rpartition(".")
    matrix, narrowed = matrices.get(module), visit["shapes"].get(module)
    if matrix and kind == "weight":
        inputs, outputs = narrowed or (matrix.inputs, matrix.outputs)
        shape, rows_of = (outputs, inputs), _product(weights, own, shared, visit, module)
    else:  # norms and biases are the visit's own, or the slot's
        name = f"{own}.{path}" if f"{own}.{path}" in weights else f"{shared}.{path}"
        shape, rows_of = weights.shape(name), lambda rows: weights.read(name, rows)
    if not narrowed:
        yield from each(rows_of, row_blocks(shape))
        return
    present = shape[0] // len(matrix.parts)
    missing_columns = (0, matrix.inputs - shape[1]) if kind == "weight" else ()
    for number, (_, width) in enumerate(matrix.parts):
        for block in each(rows_of, row_blocks((present, *shape[1:]), first=number * present)):
            yield nn.functional.pad(block, missing_columns)
        if width > present:
            yield torch.zeros(width - present, *([matrix.inputs] if kind == "weight" else []))


def _product(weights: Weights, own: str, shared: str, visit: dict, matrix: str) -> Callable[[slice], Tensor]:
    """What `matrix` of `visit` multiplies by, whatever its form: rows of it, (rows, inputs), float32."""
    form = visit["forms"].get(matrix, "tied")
    full = None if form == "low_rank" else f"{shared if form == 'tied' else own}.{matrix}.weight"
    if not visit["ranks"][matrix]:
        return lambda rows: weights.read(full, rows)
    inner = weights.read(f"{own}.{matrix}.A")

    def product(rows: slice) -> Tensor:
        outer = weights.read(f"{own}.{matrix}.B", rows)
        return outer @ inner if full is None else weights.read(full, rows).addmm_(outer, inner)

    return product
