"""What takes more than one stage: `rrtc run`, the four of a recipe in a row, each into its own folder; and `rrtc eval`
with models of the same size that other methods make."""

from collections.abc import Sequence
from pathlib import Path

from rrtc.console import note
from rrtc.errors import RrtcError, WrongUsage
from rrtc.eval.stage import evaluate
from rrtc.eval.tasks import find_tasks
from rrtc.export.forms.writing import weights_bytes
from rrtc.export.stage import check_form, export
from rrtc.init.baselines import make_baselines
from rrtc.init.job import can_resume
from rrtc.init.stage import init
from rrtc.io.folder import check_target, difference, partial_of
from rrtc.io.provenance import read_provenance
from rrtc.io.report import read_report
from rrtc.io.source import find_model, read_config
from rrtc.io.weights import Weights
from rrtc.recipe.schema import Recipe
from rrtc.recipe.section import OWN_TEXT
from rrtc.stock.architecture import read_architecture
from rrtc.text.sources import documents
from rrtc.text.windows import longest_context
from rrtc.units import parse_size
from rrtc.uptrain.checkpoints import whole_checkpoints
from rrtc.uptrain.job import check_processes, check_reporter, check_tokens, check_writer
from rrtc.uptrain.stage import uptrain

STAGES = ("init", "uptrain", "eval", "export")


def run(recipe: Recipe, output: str, resume: bool = False) -> dict:
    """Runs init, uptrain, eval and export of `recipe` into folders of those names in `output`.

    With `resume`, stages that are complete are not run again, init goes on from what it has finished and training from
    its last checkpoint. Returns the result of each stage by its name. Raises RrtcError where `output` is in use, or was
    made by another recipe.
    """
    if recipe.model is None:
        raise WrongUsage("The recipe does not name a model.", "Add 'model: …', as in recipes/quickstart.yaml.")
    folders = {stage: Path(output) / stage for stage in STAGES}
    checkpoints = partial_of(folders["uptrain"]) / "checkpoints"
    if not resume:
        check_target(Path(output))
    _check_inputs(recipe)
    if recipe.eval.tasks and not folders["eval"].exists():
        note("Looking for the tasks of the evaluation")
        find_tasks(recipe.eval)
    steps = {
        "init": lambda: init(recipe.model, str(folders["init"]), recipe, resume=can_resume(folders["init"])),
        "uptrain": lambda: uptrain(
            str(folders["init"]), str(folders["uptrain"]), recipe, resume=bool(whole_checkpoints(checkpoints))
        ),
        "eval": lambda: measure([str(folders["uptrain"])], recipe, output=str(folders["eval"])),
        "export": lambda: export(str(folders["uptrain"]), str(folders["export"]), recipe, str(folders["eval"])),
    }
    results = {}
    for number, (stage, step) in enumerate(steps.items(), 1):
        if folders[stage].exists():
            _check_same_recipe(stage, folders[stage], recipe)
            note(f"{number}/4 {stage}: done before")
            made = read_provenance(folders[stage])["measured"]
            results[stage] = read_report(folders[stage]) if stage == "eval" else made[stage]
        else:
            note(f"{number}/4 {stage} → {folders[stage]}")
            results[stage] = step()
    return results


def measure(folders: Sequence[str], recipe: Recipe, against: str | None = None, output: str | None = None) -> dict:
    """`evaluate`, with the baselines of the recipe where it asks for them."""
    return evaluate(folders, recipe, against, output, make_baselines)


def _check_inputs(recipe: Recipe) -> None:
    """Raises what the later stages would raise about their inputs, before the first one spends its time: all but what
    takes the compressed model to tell."""
    check_processes(recipe.uptrain)
    check_reporter(recipe.uptrain.report_to)
    if recipe.uptrain.exits:
        raise WrongUsage(
            "Exits are trained after the model is healed, and a run only heals it.",
            "Leave exits out, and train them afterwards: rrtc uptrain DIR/uptrain -o DIR/exits --exits.",
        )
    calibration = set(recipe.init.calibrate_on) - {OWN_TEXT} if recipe.init.start == "joint" else []
    data = set(recipe.uptrain.data) - {OWN_TEXT}
    quantized = recipe.export.calibrate_on if recipe.export.quantize != "none" else []
    texts = (
        (recipe.init, calibration), (recipe.uptrain, data), (recipe.eval, recipe.eval.text), (recipe.export, quantized)
    )  # fmt: skip
    for part, sources in texts:
        for source in sources:
            next(documents(source, part.text_field))
    if recipe.uptrain.teacher is not None:
        find_model(recipe.uptrain.teacher)
    check_writer(recipe.uptrain)
    for size in (recipe.init.max_shard_size, recipe.export.max_shard_size):
        parse_size(size)
    config = find_model(recipe.model).config()
    check_tokens(recipe.uptrain, longest_context(config, recipe.uptrain.context))
    check_form(recipe.export, config, read_architecture(config).parameters)


def _check_same_recipe(stage: str, folder: Path, recipe: Recipe) -> None:
    done = read_provenance(folder)["recipe"]
    before = {"model": done["model"]} | {f"{stage}.{key}": value for key, value in done[stage].items()}
    now = {"model": recipe.model} | {f"{stage}.{k}": value for k, value in getattr(recipe, stage).resolved().items()}
    changed = difference(before, now)
    if changed is not None:
        raise RrtcError(
            f"{folder} was made with another recipe: {changed}.", "Use the old recipe, or another output folder."
        )


def describe(folder: str) -> dict:
    """What rrtc.yaml says of `folder`, with the visits of its model, and its size on disk and its number formats where
    it holds a model.

    Raises RrtcError where rrtc did not write the folder, or where its weights are damaged.
    """
    path = Path(folder)
    description = {"folder": folder} | read_provenance(path)
    exported = description["measured"].get("export") if description["stage"] == "export" else None
    exported = exported if isinstance(exported, dict) else {}
    if exported.get("format") in ("onnx", "gguf"):  # whose weights are no safetensors
        description["dtype"] = exported.get("dtype")
        description["bytes_on_disk"] = weights_bytes(path, exported["format"])
    elif (path / "config.json").exists():
        weights = Weights(path)
        quantized = exported.get("quantize")  # and LoRA, norms and embeddings in the other format
        description["dtype"] = f"{quantized} and {exported.get('dtype')}" if quantized else weights.dtype
        description["bytes_on_disk"] = weights.bytes_on_disk
        description["visits"] = getattr(read_config(path), "visits", None)  # a dense export has none
    if description["stage"] == "eval":
        description["report"] = read_report(path)
    return description
