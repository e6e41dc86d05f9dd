"""The dense format: W' + B·A multiplied out for each visit, under the names of the stock architecture. Removed FFN
neurons are there again, as zeros, because the stock architecture has one width for all layers.

Nothing here knows an architecture: names come from the stock model, built without storage.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from rrtc.errors import RrtcError
from rrtc.export.formats.loading import in_transformers
from rrtc.export.formats.recursive import recursive_config
from rrtc.export.formats.writing import Tensors, Texts, round_written, write_tensors
from rrtc.export.quantize import check_installed
from rrtc.export.verify import Reference, check_loaded
from rrtc.io.recursive import EffectiveLayers
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig
from rrtc.recipe.export import ExportRecipe
from rrtc.stock.architecture import (
    decoder_layers,
    layers_path,
    read_architecture,
    read_plan,
    stock_model,
    transposed_matrices,
)

LIBRARY, TAGS, QUANTIZED_TAGS = "transformers", (), ("compressed-tensors",)
FROM_DISK, TIMES_IN_MEMORY = True, 1
MULTIPLIED_OUT = True
GENERATES = False
WINDOWS = False

LIMITS = """- This format has the size of the original: what was saved is in the recursive format, not here.
- It computes what the recursive format does: what tying cost is above, as far as it was measured."""
LIMITS_QUANTIZED = """\
- Quantizing makes this format small, as it would the original: what tying saves is in the recursive format.
- It computes what the quantized recursive format does only nearly: each is rounded for itself.
- It is not the base model: what tying cost is above, as far as it was measured."""


def check(recipe: ExportRecipe, base: PreTrainedConfig, made: RrtConfig | None = None) -> None:
    """base: the config of the dense model. Raises RrtcError where one cannot be quantized."""
    if recipe.quantize == "none":
        return
    check_installed()
    if any(map(transposed_matrices, decoder_layers(stock_model(base)))):
        raise RrtcError(
            f"A dense '{base.model_type}' model keeps its matrices transposed, which no quantized format does.",
            "Leave out --format dense: in the recursive format they are ordinary ones.",
        )


def number_format(asked: str, stored: str) -> torch.dtype:
    """What the tensors are cast to, where the recipe says `asked` and most are `stored` in. It is one for all: the
    matrices are new."""
    return getattr(torch, stored if asked == "auto" else asked)


def bytes_written(weights: Weights, config: RrtConfig, dtype: torch.dtype) -> int:
    """About how many bytes of weights `write` will write."""
    return read_architecture(config.base_config).parameters * dtype.itemsize


def write(source: Path, folder: Path, dtype: torch.dtype, shard_bytes: int, stored: torch.dtype | None = None) -> int:
    """Writes the rrtc model in `source` into the existing `folder`, without checking it; returns its parameter count.

    dtype: the dtype of the weights, multiplied out in float32 and then cast. stored: a wider dtype in
    which to write what was rounded to `dtype`. No more than a few blocks of a tensor's rows are in memory, or a matrix
    that the stock model keeps transposed. Raises RrtcError for a tensor with NaN or infinity, and for one that the
    stock model has and `source` has not.
    """
    config, weights = recursive_config(source), Weights(source)
    write_config(config, folder, dtype)
    count = len(stock_model(config.base_config).state_dict())
    return write_tensors(
        source, folder, shard_bytes, count, lambda each: _tensors(weights, config, dtype, each), stored
    )


def write_quantized(
    source: Path, folder: Path, dtype: torch.dtype, shard_bytes: int, number: str, texts: Texts, expected: Reference
) -> tuple[int, Reference, dict]:
    """The same with its matrices in fewer bits; see rrtc.export.formats."""
    return write(source, folder, dtype, shard_bytes), *round_written(folder, number, texts, shard_bytes, expected)


def _tensors(weights: Weights, config: RrtConfig, dtype: torch.dtype, each: Callable) -> Tensors:
    """The tensors by name, in the stock model's order. each: a `map` that may work ahead."""
    stock = stock_model(config.base_config)
    parent, layers = layers_path(stock)
    effective, prefix = EffectiveLayers(weights, read_plan(config), parent), f"{parent}.{layers}."
    transposed = [transposed_matrices(layer) for layer in decoder_layers(stock)]
    tied = stock.all_tied_weights_keys
    for name in stock.state_dict():
        if name.startswith(prefix):
            number, path = name.removeprefix(prefix).split(".", 1)
            if path.removesuffix(".weight") in transposed[int(number)]:
                yield name, [effective.tensor(int(number), path, each).T.to(dtype)]
            else:
                yield name, (block.to(dtype) for block in effective.blocks(int(number), path, each))
        elif name in weights:
            yield name, weights.blocks(name, dtype, each)
        elif name not in tied:
            raise RrtcError(f"The tensor {name} is missing from {weights.folder}.", "The folder is damaged.")


def write_config(config: RrtConfig, folder: Path, dtype: torch.dtype) -> None:
    """Writes the config of the stock architecture."""
    base: PreTrainedConfig = copy.deepcopy(config.base_config)
    base.architectures, base.dtype = [stock_class(config)], dtype
    base.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text(encoding="utf8"))
    (folder / "config.json").write_text(json.dumps(written | _older_rope(written), indent=2) + "\n", encoding="utf8")


def _older_rope(config: dict) -> dict:
    """The rotary embedding of `config` (a config.json) as transformers 4 and what follows it spell it, beside the
    rope_parameters of transformers 5: without these keys, they take another theta without a word. Types of layers with
    a rotary embedding each have no older spelling that all architectures share."""
    rope = config.get("rope_parameters") or {}
    if "rope_theta" not in rope:
        return {}
    theta, partial = rope["rope_theta"], rope.get("partial_rotary_factor")
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    older = {"rope_theta": theta, "rope_scaling": None if scaling.get("rope_type") == "default" else scaling}
    return older if partial is None else older | {"partial_rotary_factor": partial}


def stock_class(config: RrtConfig) -> str:
    """The name of the stock model class, such as LlamaForCausalLM."""
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config.base_config)].__name__


def weights_bytes(folder: Path) -> int:
    """The size of the weights files in `folder`."""
    return Weights(folder).bytes_on_disk


def kv_bytes(config: RrtConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache after `context` tokens, computed with `dtype`."""
    return read_architecture(config.base_config).kv_bytes(context, dtype.itemsize)


def verify(folder: Path, expected: Reference, dtype: torch.dtype, from_disk: bool) -> tuple[float, dict]:
    """(the largest difference of a logit, nothing else that was measured). Raises RrtcError as `check_loaded` does."""
    return check_loaded(folder, expected, dtype, from_disk=from_disk), {}


def summary(config: RrtConfig) -> str:
    return (
        "Here both are multiplied out into ordinary weights for every layer: this is a stock"
        f" `{stock_class(config)}`, for whatever reads that architecture."
    )


def limits(exported: dict, config: RrtConfig) -> str:
    return LIMITS_QUANTIZED if "quantize" in exported else LIMITS


def how_to_load(exported: dict, name: str, config: RrtConfig, chat: bool) -> str:
    """Markdown. exported: what the export measured. name: of its folder. chat: whether the tokenizer has a chat
    template."""
    return in_transformers(exported, name, chat, f"Nothing else: this is a stock `{stock_class(config)}`.")
