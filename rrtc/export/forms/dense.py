"""The dense form: W' + B·A multiplied out for each visit, under the names of the stock architecture."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rrtc.errors import RrtcError
from rrtc.export.forms.recursive import Form
from rrtc.io.recursive import effective_blocks, effective_tensor
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig
from rrtc.model.modeling_rrt import find_layers, matrices_of
from rrtc.stock.architecture import read_architecture, stock_model


def dense_form(weights: Weights, config: RrtConfig, dtype: torch.dtype, each: Callable) -> Form:
    """The tensors of the dense form by name, in the stock model's order; multiplied out in float32, then cast. each: a
    `map` that may work ahead.

    Raises RrtcError as `recursive_form` does, and for a tensor that the stock model has and `weights` have not.
    """
    stock = stock_model(config.base_config)
    parent, layers = find_layers(stock, len(config.visits))
    inside = next(f"{name}." if name else "" for name, module in stock.named_modules() if module is parent)
    prefix = f"{inside}{layers}."
    shapes = [{m.name: m for m in layer.matrices} for layer in read_architecture(config.base_config).layers]
    transposed = [
        {path for path, module in matrices_of(layer).items() if isinstance(module, Conv1D)}
        for layer in getattr(parent, layers)
    ]
    tied = stock.all_tied_weights_keys
    for name in stock.state_dict():
        if name.startswith(prefix):
            number, path = name.removeprefix(prefix).split(".", 1)
            visit = config.visits[int(number)]
            of = weights, f"{inside}slots.{visit['slot']}", visit, path, shapes[int(number)]
            if path.removesuffix(".weight") in transposed[int(number)]:
                yield name, [effective_tensor(*of, each).T.to(dtype)]
            else:
                yield name, (block.to(dtype) for block in effective_blocks(*of, each))
        elif name in weights:
            yield name, weights.blocks(name, dtype, each)
        elif name not in tied:
            raise RrtcError(f"The tensor {name} is missing from {weights.folder}.", "The folder is damaged.")


def write_dense_config(config: RrtConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config of the stock architecture."""
    base: PreTrainedConfig = copy.deepcopy(config.base_config)
    base.architectures, base.dtype = [stock_class(config)], dtype
    base.save_pretrained(folder)


def stock_class(config: RrtConfig) -> str:
    """The name of the stock model class, such as LlamaForCausalLM."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)].__name__


def quantized_dense_bytes(config: RrtConfig, bits: int, dtype: torch.dtype) -> int:
    """About what the dense form would take with its layers' matrices in `bits` and the rest in `dtype`."""
    architecture = read_architecture(config.base_config)
    inside = sum(matrix.size for layer in architecture.layers for matrix in layer.matrices)
    return inside * bits // 8 + (architecture.parameters - inside) * dtype.itemsize
