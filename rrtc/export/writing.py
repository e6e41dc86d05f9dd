"""Writing each form of an export, without checking it; and how many bytes that will be."""

import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from rrtc.checkpoint import check_not_quantised, copy_companions
from rrtc.console import note, progress
from rrtc.errors import RrtcError
from rrtc.export.forms import dense_form, recursive_form, write_dense_config, write_recursive_config
from rrtc.export.gguf_form import STORED, convert
from rrtc.export.onnx_form import GRAPH, write_onnx
from rrtc.model import RrtConfig
from rrtc.model.skeleton import read_architecture, stock_model
from rrtc.source import read_config
from rrtc.weights import ShardWriter, Weights


def recursive_config(folder: Path) -> RrtConfig:
    """The config of the rrtc model in `folder`. Raises RrtcError where that is another model."""
    config = read_config(folder)
    if not isinstance(config, RrtConfig):
        raise RrtcError(
            f"{folder} holds a '{config.model_type}' model, not a recursive one.",
            "Export the folder that 'rrtc init' or 'rrtc uptrain' wrote.",
        )
    check_not_quantised(folder, config)
    return config


def bytes_written(form: str, weights: Weights, config: RrtConfig, dtype: torch.dtype | None) -> int:
    """About how many bytes of weights will be written. The GGUF form is made of a dense form, which is there beside it
    for a while."""
    if form in ("dense", "gguf"):
        beside = STORED.get(dtype, dtype).itemsize if form == "gguf" else 0
        return read_architecture(config.base_config).parameters * (dtype.itemsize + beside)
    if dtype is None:
        return weights.bytes_on_disk
    return weights.parameters * dtype.itemsize


def quantised_dense_bytes(config: RrtConfig, bits: int, dtype: torch.dtype) -> int:
    """About what the dense form would take with its layers' matrices in `bits` and the rest in `dtype`."""
    architecture = read_architecture(config.base_config)
    inside = sum(matrix.size for layer in architecture.layers for matrix in layer.matrices)
    return inside * bits // 8 + (architecture.parameters - inside) * dtype.itemsize


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
    with progress("Writing weights", total) as advance, _map_ahead() as each:
        tensors = dense_form(weights, config, dtype, each) if form == "dense" else recursive_form(weights, dtype, each)
        for name, blocks in tensors:
            writer.add_blocks(name, blocks if stored is None else (block.to(stored) for block in blocks))
            advance()
        writer.finish()
    copy_companions(source, folder)
    return Weights(folder).parameters


@contextmanager
def _map_ahead() -> Iterator[Callable]:
    """A `map` that works a few items ahead, in threads, while the caller writes what it has. Every thread works alone
    on its block: blocks are so small that threads which share one mostly wait for each other."""
    cores = torch.get_num_threads()  # one for each thread: the caller mostly waits for the disk
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:

            def ahead(function: Callable, items: Iterable) -> Iterator:
                waiting = deque()
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > cores:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()

            yield ahead
    finally:
        torch.set_num_threads(cores)
