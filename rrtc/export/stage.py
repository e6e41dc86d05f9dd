"""`rrtc export`: writes a recursive model in the format in which it leaves, and checks that it arrives.

The order of the work: what can be known in advance; the logits of the model in memory; the new folder; the same logits
from that folder in a fresh process; the model card. Only then does the folder get its name.
"""

import gc
import time
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from rrtc.console import note, warn
from rrtc.errors import RrtcError
from rrtc.export.card import write_card
from rrtc.export.formats import FORMATS
from rrtc.export.formats.recursive import recursive_config
from rrtc.export.full_attention import TOKENS as COMPARED_TOKENS
from rrtc.export.full_attention import context_to_measure, measure_full_attention
from rrtc.export.verify import reference
from rrtc.features import check_carried
from rrtc.io.folder import MARK, check_space, check_target, whole_folder
from rrtc.io.license import forbids_derivatives, license_of
from rrtc.io.provenance import base_seen_from, next_history, read_provenance, write_provenance
from rrtc.io.report import read_report
from rrtc.io.source import load_tokenizer
from rrtc.io.trust import text_of_folder
from rrtc.io.unchanged import Unchanged
from rrtc.io.weights import Weights
from rrtc.machine import is_too_large, too_large
from rrtc.model import RrtConfig
from rrtc.plan import features_of, read_visits
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_plan
from rrtc.text.calibration import calibration_windows
from rrtc.text.windows import Windows, held_out_windows, longest_context, readable
from rrtc.units import parse_size

MEASURED_TOKENS = 4096  # of held-out text, on which the bits per byte of a quantized model are measured


def export(folder: str, output: str, recipe: Recipe, report: str | None = None) -> dict:
    """Writes the rrtc model in `folder` into the new folder `output`; returns what was measured (rrtc.yaml has it too).

    report: a folder with the report.json of `rrtc eval`, for the model card. Returned: format, dtype, bytes (of the
    weights files), parameters (shared ones once), max_logit_difference (of the export, loaded in a fresh process, from
    the model in memory, rounded and quantized alike), largest_logit, rounding_logit_difference (what that costs by
    itself), files and seconds; where it was quantized also quantize and what the format's `write_quantized` found;
    where it has no windows and the model has, full_attention, as `measure_full_attention` has it; for the GGUF format
    also read_by and llama_cpp, as its `verify` has them. Raises RrtcError, and leaves no folder, where the export is
    not the same model.
    """
    inputs = Unchanged(Path(folder))
    with inputs.blamed():
        return _export(folder, output, recipe, report, inputs)


def _export(folder: str, output: str, recipe: Recipe, report: str | None, inputs: Unchanged) -> dict:
    started = time.monotonic()
    source, target = Path(folder), Path(output)
    check_target(target, source)
    provenance, config, weights = read_provenance(source), recursive_config(source), Weights(source)
    evaluation = _report_about(report, provenance)
    chat = load_tokenizer(source).chat_template is not None
    made_as, quantized = FORMATS[recipe.export.format], recipe.export.quantize != "none"
    plan = read_plan(config)
    parameters = max(weights.parameters, plan.architecture.parameters)
    from_disk = check_format(recipe.export, config.base_config, parameters, config)
    cast = made_as.number_format(recipe.export.dtype, weights.dtype)
    dtype = cast or getattr(torch, weights.dtype)  # of most of what is written
    shards = parse_size(recipe.export.max_shard_size)
    widened = not made_as.WINDOWS and bool(plan.features)
    wanted = _with_text(recipe, provenance, source) if quantized or widened else recipe.export
    if quantized:
        context = longest_context(config.base_config, wanted.calibrate_context)
        calibration = calibration_windows(wanted, load_tokenizer(source), config.vocab_size, context)
        texts = calibration, _held_out(wanted, source, config, context, MEASURED_TOKENS)
    if widened:
        held_out = _held_out(wanted, source, config, context_to_measure(config), COMPARED_TOKENS)
    # The quantized tensors are written while the others are still there.
    check_space(target, made_as.bytes_written(weights, config, cast) * (2 if quantized else 1))
    base = base_seen_from(target, source, provenance)
    license = license_of(source, base)
    if not license and "license" not in base:
        warn(f"The license of {base['uri']} is not known: {folder} was made before rrtc wrote it down.")
    if forbids_derivatives(license):
        stated = license.get("license_name", license["license"])
        warn(f"The license of {provenance['base']['uri']} ({stated}) forbids passing on what is made of it.")

    _say_what_was_planned(recipe.export, provenance, weights.dtype)
    if from_disk:
        note("The model does not fit into memory: it is read from disk, matrix by matrix, to be checked")
    compared = {}
    if widened:
        compared["full_attention"] = measure_full_attention(source, held_out, recipe.export.format, from_disk)
    note("Computing logits to compare the export with")
    expected = reference(source, cast, from_disk, made_as.MULTIPLIED_OUT, made_as.GENERATES, made_as.WINDOWS)
    gc.collect()  # the model, which the fresh process needs the memory of
    with whole_folder(target) as partial:
        if quantized:
            number = recipe.export.quantize
            parameters, expected, found = made_as.write_quantized(
                source, partial, cast, shards, number, texts, expected
            )
            compared |= {"quantize": number} | found
        else:
            parameters = made_as.write(source, partial, cast, shards)
        note("Loading the export in a fresh process")
        difference, checked = made_as.verify(partial, expected, dtype, from_disk)
        measured = {
            "format": recipe.export.format,
            "dtype": str(dtype).removeprefix("torch."),
            "bytes": made_as.weights_bytes(partial),
            "parameters": parameters,
            "max_logit_difference": difference,
            "largest_logit": expected.logits.abs().max().item(),
            "rounding_logit_difference": expected.rounding,
            **compared,
            **checked,
            "files": sorted([*_files(partial), "README.md", "rrtc.yaml"]),
            "seconds": round(time.monotonic() - started, 1),
        }
        inputs.check()
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


def check_format(recipe: ExportRecipe, base: PreTrainedConfig, parameters: int, made: RrtConfig | None = None) -> bool:
    """Whether a model of so many parameters does not fit into memory, so that it has to be made and checked from disk.

    base: the config of the dense model. made: that of the recursive model, where there is one already. Raises RrtcError
    where the format cannot be made of such a model, or not from disk, and where what it takes is not installed.
    """
    made_as, quantized = FORMATS[recipe.format], recipe.quantize != "none"
    if made is not None:
        features = features_of(read_visits(made.visits))
        check_carried(f"The {recipe.format} format", features, "Export it with --format recursive.")
    made_as.check(recipe, base, made)
    from_disk = is_too_large(made_as.TIMES_IN_MEMORY * parameters, torch.float32)
    if from_disk and (quantized or not made_as.FROM_DISK):
        raise too_large(
            "To be quantized" if quantized else "For this format", parameters, torch.float32,
            "The recursive and the dense format, not quantized, are made and checked from disk.",
            made_as.TIMES_IN_MEMORY,
        )  # fmt: skip
    return from_disk


def _say_what_was_planned(asked: ExportRecipe, provenance: dict, stored: str) -> None:
    """A note where the model, whose weights are in the dtype `stored`, was planned to be exported in other numbers than
    are `asked` for."""
    init = provenance["recipe"].get("init") or {}
    planned = init.get("quantize", "none")
    ways = {"format": "recursive", "quantize": planned, "dtype": stored}
    if planned != "none" and any(getattr(asked, name) not in (way, "auto") for name, way in ways.items()):
        flags = " ".join(f"--{name} {way}" for name, way in ways.items())
        note(f"The size of {init.get('size')} was planned for {flags}.")


def _with_text(recipe: Recipe, provenance: dict, source: Path) -> ExportRecipe:
    """The section export with the text that the recipe names, or else that the model in `source` was trained or
    calibrated on."""
    wanted, made = recipe.export, provenance["recipe"]
    if wanted.calibrate_on:
        return wanted
    said = made.get("uptrain") or made.get("init") or {}
    named, field = said.get("data") or said.get("calibrate_on") or [], said.get("text_field") or wanted.text_field
    by_user = {*recipe.uptrain.data, *recipe.init.calibrate_on}
    texts = text_of_folder(source, readable(named), by_user, "--calibrate-on")
    return wanted.model_copy(update={"calibrate_on": texts, "text_field": field})


def _held_out(wanted: ExportRecipe, source: Path, config: RrtConfig, context: int, tokens: int) -> Windows:
    """So many tokens at most of what is held out of that text."""
    tokenizer, rows = load_tokenizer(source), config.vocab_size
    return held_out_windows(wanted.calibrate_on, wanted.text_field, tokenizer, rows, context, tokens)


def _files(folder: Path) -> list[str]:
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARK)
    return [file.relative_to(folder).as_posix() for file in files]


def _report_about(folder: str | None, provenance: dict) -> dict | None:
    """The evaluation report in `folder`. Raises RrtcError where it is not about the model of that `provenance`."""
    if folder is None:
        return None
    report = read_report(Path(folder))
    if report["of"] != {key: provenance[key] for key in ("stage", "made")}:
        raise RrtcError(f"The evaluation report in {folder} is about another model.", "Run 'rrtc eval' on this one.")
    return report
