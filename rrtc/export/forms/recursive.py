"""The two forms of an exported model: its tensors, a block of rows at a time, and its config.

    recursive    the tensors as they are, shared weights once; the modeling code goes along, so that it loads anywhere
    dense        W' + B·A multiplied out for each visit, under the names of the stock architecture; removed FFN neurons
                 are there again, as zeros, because the stock architecture has one width for all layers

Nothing here knows an architecture: names come from the stock model, built without storage.
"""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from rrtc.errors import RrtcError
from rrtc.io.provenance import check_not_quantized
from rrtc.io.source import read_config
from rrtc.io.trust import without_code
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig, configuration_rrt, modeling_rrt

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


def write_recursive_config(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config of the recursive form, with its three-key auto_map, and the two files of modeling code."""
    config = without_code(json.loads((source / "config.json").read_text(encoding="utf8")))
    config |= {"architectures": ["RrtForCausalLM"], "auto_map": AUTO_MAP, "dtype": str(dtype).removeprefix("torch.")}
    config["base_config"].pop("_name_or_path", None)  # a place on the machine that made it
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf8")
    for module in (configuration_rrt, modeling_rrt):
        shutil.copyfile(module.__file__, folder / Path(module.__file__).name)


def recursive_config(folder: Path) -> RrtConfig:
    """The config of the rrtc model in `folder`. Raises RrtcError where that is another model."""
    config = read_config(folder)
    if not isinstance(config, RrtConfig):
        raise RrtcError(
            f"{folder} holds a '{config.model_type}' model, not a recursive one.",
            "Export the folder that 'rrtc init' or 'rrtc uptrain' wrote.",
        )
    check_not_quantized(folder, config)
    return config
