"""Writing each form of an export, without checking it; and how many bytes that will be."""

import tempfile
from pathlib import Path

import torch

from rrtc.console import note, progress
from rrtc.export.forms.dense import dense_form, write_dense_config
from rrtc.export.forms.gguf import STORED, convert
from rrtc.export.forms.onnx import GRAPH, write_onnx
from rrtc.export.forms.recursive import recursive_config, recursive_form, write_recursive_config
from rrtc.io.folder import copy_companions
from rrtc.io.shard_writer import ShardWriter, map_ahead
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig
from rrtc.stock.architecture import read_architecture, stock_model


def bytes_written(form: str, weights: Weights, config: RrtConfig, dtype: torch.dtype | None) -> int:
    """About how many bytes of weights will be written. The GGUF form is made of a dense form, which is there beside it
    for a while."""
    if form in ("dense", "gguf"):
        beside = STORED.get(dtype, dtype).itemsize if form == "gguf" else 0
        return read_architecture(config.base_config).parameters * (dtype.itemsize + beside)
    if dtype is None:
        return weights.bytes_on_disk
    return weights.parameters * dtype.itemsize


def weights_bytes(folder: Path, form: str) -> int:
    """The size of the weights files of an export in `folder`: for the ONNX form, with the graph."""
    elsewhere = {"onnx": f"{Path(GRAPH).parent}/*", "gguf": "*.gguf"}
    if form not in elsewhere:
        return Weights(folder).bytes_on_disk
    return sum(file.stat().st_size for file in folder.glob(elsewhere[form]))


def write(
    source: Path,
    folder: Path,
    form: str,
    dtype: torch.dtype | None,
    shard_bytes: int,
    stored: torch.dtype | None = None,
) -> int:
    """Writes the rrtc model in `source` into the existing `folder`, without checking it; returns its parameter count.

    dtype: the number format of the weights; None, for the recursive form alone: as they are. No more than a few blocks
    of a tensor's rows are in memory, or a matrix that the stock model keeps transposed, but for the ONNX form.
    shard_bytes: of no meaning to the GGUF form, one weights file.
    stored: for the dense form, a wider number format in which to write what was rounded to `dtype`.
    """
    if form == "gguf":
        with tempfile.TemporaryDirectory(dir=folder, prefix="dense-") as dense:
            parameters = write(source, Path(dense), "dense", dtype, shard_bytes, STORED.get(dtype))
            note("Converting it with llama.cpp's converter")
            convert(Path(dense), folder, dtype)
        return parameters
    if form == "onnx":
        note("Tracing the model")
        return write_onnx(source, folder, dtype, shard_bytes)
    config, weights = recursive_config(source), Weights(source)
    if form == "dense":
        total = len(stock_model(config.base_config).state_dict())
        write_dense_config(config, folder, dtype)
    else:
        total = len(list(weights))
        write_recursive_config(source, folder, dtype or getattr(torch, weights.dtype))
    writer = ShardWriter(folder, shard_bytes)
    with progress("Writing weights", total) as advance, map_ahead() as each:
        tensors = dense_form(weights, config, dtype, each) if form == "dense" else recursive_form(weights, dtype, each)
        for name, blocks in tensors:
            writer.add_blocks(name, blocks if stored is None else (block.to(stored) for block in blocks))
            advance()
        writer.finish()
    copy_companions(source, folder)
    return Weights(folder).parameters
