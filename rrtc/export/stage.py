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
from transformers import PreTrainedConfig

from rrtc.console import note, warn
from rrtc.errors import RrtcError
from rrtc.export.card import write_card
from rrtc.export.forms.dense import quantized_dense_bytes
from rrtc.export.forms.gguf import find_converter, verify_gguf
from rrtc.export.forms.onnx import check_needed
from rrtc.export.forms.recursive import recursive_config
from rrtc.export.forms.writing import bytes_written, weights_bytes, write
from rrtc.export.quantize import BITS, check_can_quantize, check_has_matrices, quantize
from rrtc.export.verify import check_logits, reference, verify
from rrtc.io.folder import check_space, check_target, whole_folder
from rrtc.io.license import forbids_derivatives, license_of
from rrtc.io.provenance import base_seen_from, next_history, read_provenance, write_provenance
from rrtc.io.report import read_report
from rrtc.io.source import load_tokenizer
from rrtc.io.weights import Weights
from rrtc.machine import is_too_large, too_large
from rrtc.model import RrtConfig
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture
from rrtc.text.calibration import calibration_windows
from rrtc.text.windows import Windows, held_out_windows, longest_context, readable
from rrtc.units import parse_size, size

MEASURED_TOKENS = 4096  # of held-out text, on which the bits per byte of a quantized model are measured


def export(folder: str, output: str, recipe: Recipe, report: str | None = None) -> dict:
    """Writes the rrtc model in `folder` into the new folder `output`; returns what was measured (rrtc.yaml has it too).

    report: a folder with the report.json of `rrtc eval`, for the model card. Returned: format, dtype, bytes (of the
    weights files), parameters (shared ones once), max_logit_difference (of the export, loaded in a fresh process, from
    the model in memory, rounded and quantized alike), largest_logit, rounding_logit_difference (what that costs by
    itself), files and seconds; where it was quantized also quantize and bits_per_byte, as `Quantized` has them; for the
    GGUF form also read_by and llama_cpp, as `verify_gguf` has them. Raises RrtcError, and leaves no folder, where the
    export is not the same model.
    """
    started = time.monotonic()
    source, target = Path(folder), Path(output)
    check_target(target, source)
    provenance, config, weights = read_provenance(source), recursive_config(source), Weights(source)
    evaluation = _report_about(report, provenance)
    chat = load_tokenizer(source).chat_template is not None
    form, bits = recipe.export.format, BITS.get(recipe.export.quantize)
    parameters = max(weights.parameters, read_architecture(config.base_config).parameters)
    from_disk = check_form(recipe.export, config.base_config, parameters)
    dtype = recipe.export.dtype
    if dtype == "auto":
        dtype = "float32" if form == "onnx" else weights.dtype  # float32 is what every device computes in
    # The recursive form is copied as it is unless asked otherwise. The dense form has one format: its matrices are new.
    cast = None if form == "recursive" and recipe.export.dtype == "auto" else getattr(torch, dtype)
    shards = parse_size(recipe.export.max_shard_size)
    if bits is not None:
        check_has_matrices(form, config)
        texts = _texts_to_quantize_by(recipe, provenance, source, config)
    # The quantized tensors are written while the others are still there.
    check_space(target, bytes_written(form, weights, config, cast) * (1 if bits is None else 2))
    base = base_seen_from(target, source, provenance)
    license = license_of(source, base)
    if not license and "license" not in base:
        warn(f"The license of {base['uri']} is not known: {folder} was made before rrtc wrote it down.")
    if forbids_derivatives(license):
        stated = license.get("license_name", license["license"])
        warn(f"The license of {provenance['base']['uri']} ({stated}) forbids passing on what is made of it.")

    if from_disk:
        note("The model does not fit into memory: it is read from disk, matrix by matrix, to be checked")
    note("Computing logits to compare the export with")
    expected = reference(source, form, cast, from_disk)
    gc.collect()  # the model, which the fresh process needs the memory of
    with whole_folder(target) as partial:
        parameters = write(source, partial, form, cast, shards)
        beside = {}  # what only some forms have measured
        if bits is not None:
            note(f"Rounding to {bits} bits")
            found = quantize(partial, bits, *texts, shards)
            check_logits(found.plain, expected.logits, getattr(torch, dtype), form)
            expected = replace(expected, logits=found.logits, rounding=found.rounding)
            beside = {"quantize": recipe.export.quantize, "bits_per_byte": found.bits_per_byte}
            dense = quantized_dense_bytes(config, bits, getattr(torch, dtype))
            if form == "recursive" and dense < Weights(partial).bytes_on_disk:
                note(f"The dense form would take about {size(dense)}: here all LoRA is beside it, in {dtype}.")
        note("Loading the export in a fresh process")
        if form == "gguf":
            difference, beside = verify_gguf(partial, expected, getattr(torch, dtype))
        else:
            difference = verify(partial, form, expected, getattr(torch, dtype), from_disk)
        measured = {
            "format": form,
            "dtype": dtype,
            "bytes": weights_bytes(partial, form),
            "parameters": parameters,
            "max_logit_difference": difference,
            "largest_logit": expected.logits.abs().max().item(),
            "rounding_logit_difference": expected.rounding,
            **beside,
            "files": sorted([*_files(partial), "README.md", "rrtc.yaml"]),
            "seconds": round(time.monotonic() - started, 1),
        }
        value = write_provenance(
            partial,
            "export",
            base,
            provenance["recipe"] | {"export": recipe.export.model_dump()},
            provenance["measured"] | {"export": measured},
            next_history(provenance),
        )
        write_card(partial, target.name, config, value, measured, evaluation, license, chat)
    return measured


def check_form(recipe: ExportRecipe, base: PreTrainedConfig, parameters: int) -> bool:
    """Whether a model of so many parameters does not fit into memory, so that it has to be made and checked from disk.

    base: the config of the dense model. Raises RrtcError where the form cannot be made of such a model, or not from
    disk, and where what it takes is not installed.
    """
    form, quantized = recipe.format, recipe.quantize != "none"
    if form == "onnx":
        check_needed()
    if form == "gguf":
        find_converter()
    if quantized:
        check_can_quantize(form, base)
    times = 2 if form == "onnx" else 1  # beside the model, its graph has it once more
    from_disk = is_too_large(times * parameters, torch.float32)
    if from_disk and (form not in ("recursive", "dense") or quantized):
        raise too_large(
            "To be quantized" if quantized else "For this form", parameters, torch.float32,
            "The recursive and the dense form, not quantized, are made and checked from disk.", times,
        )  # fmt: skip
    return from_disk


def _texts_to_quantize_by(recipe: Recipe, provenance: dict, source: Path, config: RrtConfig) -> tuple[Tensor, Windows]:
    """(token ids (windows, context) to calibrate by, windows to measure on), from the recipe's text, or from what the
    model in `source` was trained or calibrated on."""
    wanted, made = recipe.export, provenance["recipe"]
    if not wanted.calibrate_on:
        trained = "uptrain" in made
        named = made["uptrain"]["data"] if trained else made["init"]["calibrate_on"]
        field = made["uptrain" if trained else "init"]["text_field"]
        wanted = wanted.model_copy(update={"calibrate_on": readable(named), "text_field": field})
    tokenizer, context = load_tokenizer(source), longest_context(config.base_config, recipe.eval.context)
    held_out = held_out_windows(wanted.calibrate_on, wanted.text_field, tokenizer, context, MEASURED_TOKENS)
    return calibration_windows(wanted, tokenizer, context), held_out


def _files(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _report_about(folder: str | None, provenance: dict) -> dict | None:
    """The evaluation report in `folder`. Raises RrtcError where it is not about the model of that `provenance`."""
    if folder is None:
        return None
    report = read_report(Path(folder))
    if report["of"] != {key: provenance[key] for key in ("stage", "made")}:
        raise RrtcError(f"The evaluation report in {folder} is about another model.", "Run 'rrtc eval' on this one.")
    return report
