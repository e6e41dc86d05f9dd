"""`rrtc export`: writes a recursive model in the form in which it leaves, and checks that it arrives.

The order of the work: what can be known in advance; the logits of the model in memory; the new folder; the same logits
from that folder in a fresh process; the model card. Only then does the folder get its name.
"""

import gc
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rrtc.calibration_text import calibration_windows
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
from rrtc.console import note, progress, size, warn
from rrtc.errors import RrtcError
from rrtc.export.card import write_card
from rrtc.export.forms import dense_tensors, recursive_tensors, write_dense_config, write_recursive_config
from rrtc.export.licence import find_licence, forbids_derivatives
from rrtc.export.onnx_form import check_needed, onnx_bytes, write_onnx
from rrtc.export.quantised_form import BITS, check_can_quantise, quantise
from rrtc.export.verify import reference, verify
from rrtc.measure import is_too_large
from rrtc.model import RrtConfig
from rrtc.model.skeleton import read_architecture, stock_model
from rrtc.recipe import BUILT_IN_TEXT, OWN_TEXT, Recipe, parse_size
from rrtc.report import read_report
from rrtc.source import load_tokenizer, read_config
from rrtc.text import Windows, held_out_windows, longest_context

MEASURED_TOKENS = 4096  # of held-out text, on which the bits per byte of a quantised model are measured


def export(folder: str, output: str, recipe: Recipe, report: str | None = None) -> dict:
    """Writes the rrtc model in `folder` into the new folder `output`; returns what was measured (rrtc.yaml has it too).

    report: a folder with the report.json of `rrtc eval`, for the model card. Returned: format, dtype, where it was
    quantised quantize and bits_per_byte (plain, nearest, calibrated; see quantised_form.py), bytes (of the
    weights files), parameters (shared ones once), max_logit_difference (of the export, loaded in a fresh process, from
    the model in memory with the same rounding), largest_logit, rounding_logit_difference (what that rounding costs by
    itself), files and seconds. Raises RrtcError, and leaves no folder, where the export is not the same model.
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
    dtype = weights.dtype if dtype == "auto" else dtype
    # The recursive form is copied as it is unless asked otherwise. The dense form has one format: its matrices are new.
    cast = None if form == "recursive" and recipe.export.dtype == "auto" else getattr(torch, dtype)
    shards = parse_size(recipe.export.max_shard_size)
    bits = BITS.get(recipe.export.quantize)
    if bits is not None:
        check_can_quantise(form, config)
        texts = _texts_to_quantise_by(recipe, provenance, source, config)
    # The quantised tensors are written while the others are still there.
    check_space(target, _size(form, weights, config, cast) * (1 if bits is None else 2))
    licence = find_licence(source, Path(provenance["base"]["path"]))
    if forbids_derivatives(licence):
        stated = licence.get("license_name", licence["license"])
        warn(f"The licence of {provenance['base']['uri']} ({stated}) forbids passing on what is made of it.")

    from_disk = (
        form != "onnx"
        and bits is None
        and is_too_large(max(_parameters(weights), _stock_parameters(config)), torch.float32)
    )
    if from_disk:
        note("The model does not fit into memory: it is read from disk, matrix by matrix, to be checked")
    note("Computing logits to compare the export with")
    expected = reference(source, form, cast, from_disk)
    gc.collect()  # the model, which the fresh process needs the memory of
    with whole_folder(target) as partial:
        parameters = write(source, partial, form, cast, shards)
        quantised = {}
        if bits is not None:
            note(f"Rounding to {bits} bits")
            found = quantise(partial, bits, *texts, shards)
            expected = replace(expected, logits=found.logits, rounding=found.rounding)
            quantised = {"quantize": recipe.export.quantize, "bits_per_byte": found.bits_per_byte}
            dense = _quantised_dense_bytes(config, bits, cast or getattr(torch, dtype))
            if form == "recursive" and dense < Weights(partial).bytes_on_disk:
                note(f"The dense form would take about {size(dense)}: here all LoRA is beside it, in {dtype}.")
        note("Loading the export in a fresh process")
        difference = verify(partial, form, expected, getattr(torch, dtype), from_disk)
        measured = {
            "format": form,
            "dtype": dtype,
            **quantised,
            "bytes": onnx_bytes(partial) if form == "onnx" else Weights(partial).bytes_on_disk,
            "parameters": parameters,
            "max_logit_difference": difference,
            "largest_logit": expected.logits.abs().max().item(),
            "rounding_logit_difference": expected.rounding,
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


def _texts_to_quantise_by(recipe: Recipe, provenance: dict, source: Path, config: RrtConfig) -> tuple[Tensor, Windows]:
    """(token ids (windows, context) to calibrate by, windows to measure on), from the recipe's text, or from what the
    model in `source` was trained or calibrated on."""
    wanted, made = recipe.export, provenance["recipe"]
    if not wanted.calibrate_on:
        trained = provenance["stage"] == "uptrain"
        named = made["uptrain"]["data"] if trained else made["init"]["calibrate_on"]
        field = made["uptrain" if trained else "init"]["text_field"]
        texts = [text for text in named if text != OWN_TEXT] or [BUILT_IN_TEXT]
        wanted = wanted.model_copy(update={"calibrate_on": texts, "text_field": field})
    tokenizer, context = load_tokenizer(source), longest_context(config.base_config, recipe.eval.context)
    held_out = held_out_windows(wanted.calibrate_on, wanted.text_field, tokenizer, context, MEASURED_TOKENS)
    return calibration_windows(wanted, tokenizer, context), held_out


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
    """About how many bytes of weights will be written."""
    if form == "dense":
        return _stock_parameters(config) * dtype.itemsize
    if dtype is None:
        return weights.bytes_on_disk
    return _parameters(weights) * dtype.itemsize


def _stock_parameters(config: RrtConfig) -> int:
    """Parameters of the dense form."""
    return sum(parameter.numel() for parameter in stock_model(config.base_config).parameters())


def _quantised_dense_bytes(config: RrtConfig, bits: int, dtype: torch.dtype) -> int:
    """About what the dense form would take with its layers' matrices in `bits` and the rest in `dtype`."""
    matrices = [matrix for layer in read_architecture(config.base_config).layers for matrix in layer.matrices]
    inside = sum(matrix.inputs * matrix.outputs for matrix in matrices)
    return inside * bits // 8 + (_stock_parameters(config) - inside) * dtype.itemsize


def write(source: Path, folder: Path, form: str, dtype: torch.dtype | None, shard_bytes: int) -> int:
    """Writes the rrtc model in `source` into the existing `folder`, without checking it; returns its parameter count.

    dtype: the number format of the weights; None, for the recursive form alone: as they are. One tensor at a time is
    in memory, except for the ONNX form. shard_bytes: of no meaning to the ONNX form, whose weights are one file.
    """
    if form == "onnx":
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
            writer.add(name, tensor)
            parameters += tensor.numel()
            advance()
        writer.finish()
    copy_companions(source, folder)
    return parameters
