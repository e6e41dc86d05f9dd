"""What a visit computes with: the tensors of the dense layer that its slot, factors and norms amount to."""

import torch
from torch import Tensor, nn

from rrtc.checkpoint import Weights
from rrtc.plan import Matrix


def effective_tensor(weights: Weights, slot: str, visit: dict, path: str, matrices: dict[str, Matrix]) -> Tensor:
    """The tensor at `path` of the decoder layer that `visit` stands for, float32; matrices as (outputs, inputs).

    slot: the name of the visit's slot. matrices: the weight matrices of the dense layer by their path.
    """
    own, shared = f"{slot}.loops.{visit['loop']}", f"{slot}.shared"
    module, _, kind = path.rpartition(".")
    if module in matrices and kind == "weight":
        tensor = _product(weights, own, shared, visit, module)
    else:  # norms and biases are the visit's own, or the slot's
        tensor = weights.read(f"{own}.{path}" if f"{own}.{path}" in weights else f"{shared}.{path}")
    return _widened(tensor, matrices[module]) if module in visit["shapes"] else tensor


def _product(weights: Weights, own: str, shared: str, visit: dict, matrix: str) -> Tensor:
    """What `matrix` of `visit` multiplies by, whatever its form: (outputs, inputs), float32."""
    form = visit["forms"].get(matrix, "tied")
    full = None if form == "low_rank" else weights.read(f"{shared if form == 'tied' else own}.{matrix}.weight")
    if not visit["ranks"][matrix]:
        return full
    factors = weights.read(f"{own}.{matrix}.B") @ weights.read(f"{own}.{matrix}.A")
    return factors if full is None else full + factors


def _widened(tensor: Tensor, matrix: Matrix) -> Tensor:
    """Weight (outputs, inputs) or bias (outputs,) of a narrowed `matrix` at its dense width. Removed neurons are zeros
    at the end of each part of the outputs and at the end of the inputs, and compute some number times zero."""
    columns = (0, matrix.inputs - tensor.shape[1]) if tensor.dim() == 2 else ()
    parts = zip(tensor.chunk(len(matrix.parts)), matrix.parts, strict=True)
    return torch.cat([nn.functional.pad(part, (*columns, 0, width - len(part))) for part, (_, width) in parts])
