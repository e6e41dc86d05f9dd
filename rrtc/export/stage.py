"""`rrtc export`: writes a recursive model in the form in which it leaves, and checks that it arrives.

The order of the work: what can be known in advance; the logits of the model in memory; the new folder; the same logits
from that folder in a fresh process; the model card. Only then does the folder get its name.
"""

import gc
import tempfile
import time
from pathlib import Path

import torch

from rrtc.checkpoint import (
    ShardWriter,
    Weights,
    base_seen_from,
    check_space,
    check_target,
    copy_companions,
    next_history,
    read_provenance,
    whole_folder,
    write_provenance,
)
from rrtc.console import note, progress, warn
from rrtc.errors import RrtcError
from rrtc.export.card import write_card
from rrtc.export.forms import dense_tensors, recursive_tensors, write_dense_config, write_recursive_config
from rrtc.export.gguf_form import STORED, convert, find_converter, gguf_file, verify_gguf
from rrtc.export.licence import find_licence, forbids_derivatives
from rrtc.export.onnx_form import check_needed, onnx_bytes, write_onnx
from rrtc.export.verify import reference, verify
from rrtc.model import RrtConfig
from rrtc.model.skeleton import stock_model
from rrtc.recipe import Recipe, parse_size
from rrtc.report import read_report
from rrtc.source import load_tokenizer, read_config


def export(folder: str, output: str, recipe: Recipe, report: str | None = None) -> dict:
    """Writes the rrtc model in `folder` into the new folder `output`; returns what was measured (rrtc.yaml has it too).

    report: a folder with the report.json of `rrtc eval`, for the model card. Returned: format, dtype, bytes (of the
    weights files), parameters (shared ones once), max_logit_difference (of the export, loaded in a fresh process, from
    the model in memory with the same rounding), largest_logit, rounding_logit_difference (what that rounding costs by
    itself), files and seconds; for the GGUF form also read_by and llama_cpp, as `verify_gguf` has them. Raises
    RrtcError, and leaves no folder, where the export is not the same model.
    """
    started = time.monotonic()
    source, target = Path(folder), Path(output)
    check_target(target, source)
    provenance, config, weights = read_provenance(source), _recursive_config(source), Weights(source)
    evaluation = _report_about(report, provenance)
    chat = load_tokenizer(source).chat_template is not None
    form = recipe.export.format
    dtype = recipe.export.dtype
    if form == "onnx":
        check_needed()
        dtype = "float32" if dtype == "auto" else dtype  # what every device computes in
    if form == "gguf":
        find_converter()
    dtype = weights.dtype if dtype == "auto" else dtype
    # The recursive form is copied as it is unless asked otherwise. The dense form has one format: its matrices are new.
    cast = None if form == "recursive" and recipe.export.dtype == "auto" else getattr(torch, dtype)
    shards = parse_size(recipe.export.max_shard_size)
    check_space(target, _size(form, weights, config, cast))
    licence = find_licence(source, Path(provenance["base"]["path"]))
    if forbids_derivatives(licence):
        stated = licence.get("license_name", licence["license"])
        warn(f"The licence of {provenance['base']['uri']} ({stated}) forbids passing on what is made of it.")

    note("Computing logits to compare the export with")
    expected = reference(source, form, cast)
    gc.collect()  # the model, which the fresh process needs the memory of
    with whole_folder(target) as partial:
        parameters = write(source, partial, form, cast, shards)
        note("Loading the export in a fresh process")
        checked = {}
        if form == "gguf":
            difference, checked = verify_gguf(partial, expected, getattr(torch, dtype))
        else:
            difference = verify(partial, form, expected, getattr(torch, dtype))
        measured = {
            "format": form,
            "dtype": dtype,
            "bytes": _bytes(partial, form),
            "parameters": parameters,
            "max_logit_difference": difference,
            "largest_logit": expected.logits.abs().max().item(),
            "rounding_logit_difference": expected.rounding,
            **checked,
            "files": sorted([*_files(partial), "README.md", "rrtc.yaml"]),
            "seconds": round(time.monotonic() - started, 1),
        }
        value = write_provenance(
            partial,
            "export",
            base_seen_from(target, source, provenance),
            provenance["recipe"] | {"export": recipe.export.model_dump()},
            provenance["measured"] | {"export": measured},
            next_history(provenance),
        )
        write_card(partial, target.name, config, value, measured, evaluation, source, chat)
    return measured


def _bytes(folder: Path, form: str) -> int:
    """The size of the weights files in `folder`."""
    if form == "gguf":
        return gguf_file(folder).stat().st_size
    return onnx_bytes(folder) if form == "onnx" else Weights(folder).bytes_on_disk


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _recursive_config(folder: Path) -> RrtConfig:
    config = read_config(folder)
    if not isinstance(config, RrtConfig):
        raise RrtcError(
            f"{folder} holds a '{config.model_type}' model, not a recursive one.",
            "Export the folder that 'rrtc init' or 'rrtc uptrain' wrote.",
        )
    return config


def _parameters(weights: Weights) -> int:
    return sum(torch.Size(weights.shape(name)).numel() for name in weights)


def _report_about(folder: str | None, provenance: dict) -> dict | None:
    """The evaluation report in `folder`. Raises RrtcError where it is not about the model of that `provenance`."""
    if folder is None:
        return None
    report = read_report(Path(folder))
    if report["of"] != {key: provenance[key] for key in ("stage", "made")}:
        raise RrtcError(f"The evaluation report in {folder} is about another model.", "Run 'rrtc eval' on this one.")
    return report


def _size(form: str, weights: Weights, config: RrtConfig, dtype: torch.dtype | None) -> int:
    """About how many bytes of weights will be written (tied embeddings are counted twice for the dense form).

    The GGUF form is made of a dense form, which is there beside it for a while.
    """
    if form in ("dense", "gguf"):
        beside = STORED.get(dtype, dtype).itemsize if form == "gguf" else 0
        numbers = sum(parameter.numel() for parameter in stock_model(config.base_config).parameters())
        return numbers * (dtype.itemsize + beside)
    if dtype is None:
        return weights.bytes_on_disk
    return _parameters(weights) * dtype.itemsize


def write(
    source: Path,
    folder: Path,
    form: str,
    dtype: torch.dtype | None,
    shard_bytes: int,
    stored: torch.dtype | None = None,
) -> int:
    """Writes the rrtc model in `source` into the existing `folder`, without checking it; returns its parameter count.

    dtype: the number format of the weights; None, for the recursive form alone: as they are. One tensor at a time is
    in memory, except for the ONNX form. shard_bytes: of no meaning to the ONNX and GGUF forms, each one weights file.
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
        return write_onnx(source, folder, dtype)
    config, weights = _recursive_config(source), Weights(source)
    if form == "dense":
        tensors, total = dense_tensors(weights, config, dtype), len(stock_model(config.base_config).state_dict())
        write_dense_config(config, folder, dtype)
    else:
        tensors, total = recursive_tensors(weights, dtype), len(list(weights))
        write_recursive_config(source, folder, dtype or getattr(torch, weights.dtype))
    writer, parameters = ShardWriter(folder, shard_bytes), 0
    with progress("Writing weights", total) as advance:
        for name, tensor in tensors:
            writer.add(name, tensor if stored is None else tensor.to(stored))
            parameters += tensor.numel()
            advance()
        writer.finish()
    copy_companions(source, folder)
    return parameters
