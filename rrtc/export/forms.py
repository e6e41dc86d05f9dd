"""The two forms of an exported model: its tensors, a block of rows at a time, and its config.

    recursive    the tensors as they are, shared weights once; the modelling code goes along, so that it loads anywhere
    dense        W' + B·A multiplied out for each visit, under the names of the stock architecture; removed FFN neurons
                 are there again, as zeros, because the stock architecture has one width for all layers

Nothing here knows an architecture: names come from the stock model, built without storage.
"""

import copy
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from rrtc.effective import effective_blocks, effective_tensor
from rrtc.errors import RrtcError
from rrtc.model import RrtConfig, configuration_rrt, modeling_rrt
from rrtc.model.modeling_rrt import find_layers, matrices_of
from rrtc.model.skeleton import read_architecture, stock_model
from rrtc.trust import without_code
from rrtc.weights import Weights

# AutoModel is there for vLLM, which refuses remote code without it.
AUTO_MAP = {
    "AutoConfig": "configuration_rrt.RrtConfig",
    "AutoModel": "modeling_rrt.RrtModel",
    "AutoModelForCausalLM": "modeling_rrt.RrtForCausalLM",
}


Form = Iterator[tuple[str, Iterable[Tensor]]]  # tensors by name, each in blocks of its rows


def recursive_form(weights: Weights, dtype: torch.dtype | None, each: Callable) -> Form:
    """The tensors of the recursive form by name, in `dtype`, or each as it is where that is None. Raises RrtcError for
    a tensor with NaN or infinity. each: a `map` that may work ahead."""
    for name in weights:
        yield name, weights.blocks(name, dtype, each)


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


def write_recursive_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config of the recursive form, with its three-key auto_map, and the two files of modelling code."""
    config = without_code(json.loads((source / "config.json").read_text(encoding="utf8")))
    config |= {"architectures": ["RrtForCausalLM"], "auto_map": AUTO_MAP, "dtype": str(dtype).removeprefix("torch.")}
    config["base_config"].pop("_name_or_path", None)  # a place on the machine that made it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    for module in (configuration_rrt, modeling_rrt):
        shutil.copyfile(module.__file__, folder / Path(module.__file__).name)


def write_dense_config(config: RrtConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config of the stock architecture."""
    base: PreTrainedConfig = copy.deepcopy(config.base_config)
    base.architectures, base.dtype = [stock_class(config)], dtype
    base.save_pretrained(folder)


def stock_class(config: RrtConfig) -> str:
    """The name of the stock model class, such as LlamaForCausalLM."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)].__name__
