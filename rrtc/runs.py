"""Whole recipes: their stages one after the other, sweeps of several of them, and what can be said before.

What a stage has finished is not done again, so that whatever stopped a run, the next one goes on.
"""

import functools
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rrtc.console import note, warn
from rrtc.errors import RrtcError, WrongUsage
from rrtc.features import check_carried
from rrtc.init.dry_run import dry_run
from rrtc.init.first_plan import first_plan
from rrtc.io.folder import check_outside
from rrtc.io.provenance import REPLAN, read_provenance
from rrtc.io.report import is_report, read_report
from rrtc.io.resumable import difference
from rrtc.io.source import Source, find_model, load_tokenizer, read_config
from rrtc.kv_kinds import LAST_LOOP
from rrtc.plan import Plan
from rrtc.recipe.schema import Recipe
from rrtc.recipe.section import OWN_TEXT
from rrtc.recipe.settings import SWEPT
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.results import Report, RunPlanResult
from rrtc.storage import BITS
from rrtc.text.sources import check_source, check_split_alike, source_folders
from rrtc.units import parse_size
from rrtc.uptrain.checks import check_apart, check_features, check_recipe, check_tokens, training_flops

STAGES = ("init", "uptrain", "eval", "export")
# What each stage was made from; the card of an export has the scores of eval.
MADE_FROM = {"uptrain": ("init",), "eval": ("uptrain",), "export": ("uptrain", "eval")}
REPORT = "report"  # of a sweep, in its folder
SHARED = "init"  # of a sweep over what comes after it


def run_recipe(recipe: Recipe, output: Path) -> dict[str, Any]:
    """The results of the four stages, each in a folder of its name in `output`. Raises what the stages raise."""
    check_models(recipe)
    folders = {stage: output / stage for stage in STAGES}
    check_apart(recipe.uptrain, folders["uptrain"])
    if not folders["eval"].exists():
        _check_tasks(recipe)
    return _run_stages(recipe, folders)


def sweep_recipes(recipes: Mapping[str, Recipe], output: Path, shares_init: bool) -> dict[str, Any]:
    """Runs init and uptrain of each recipe into a folder of its name in `output`, and measures all results in one
    report. shares_init: init, which is the same in all of them, is done once.

    A run that fails loses none of the others: they are run and reported, and an RrtcError at the end names it.
    """
    first = next(iter(recipes.values()))
    for name, recipe in recipes.items():
        check_models(recipe)
        check_apart(recipe.uptrain, output / name / "uptrain")
    _check_tasks(first)
    shared = {"init": output / SHARED} if shares_init else {}
    if shared:
        _run_stages(first, shared)
    done, failed = {}, {}
    for number, (name, recipe) in enumerate(recipes.items(), 1):
        folders = {stage: output / name / stage for stage in SWEPT} | shared
        note(f"{name} ({number} of {len(recipes)})")
        try:
            done[name] = _run_stages(recipe, folders) | {"folder": str(folders["uptrain"])}
        except (RrtcError, MemoryError, OSError, RuntimeError) as error:
            if _is_interruption(error):
                raise
            failed[name] = " ".join(str(error).split()) or type(error).__name__
            warn(f"The run {name} failed: {failed[name]}")
    if not done:
        name, why = next(iter(failed.items()))
        raise RrtcError(f"All runs of the sweep failed, {name} with: {why}", "--resume tries them again.")
    report = output / REPORT
    if report.exists():  # of fewer runs, perhaps (see `check_sweep`); what was measured is kept in the cache
        shutil.rmtree(report)
    found = measure([run["folder"] for run in done.values()], first, None, str(report))
    if failed:
        why = "; ".join(f"{name}: {why}" for name, why in failed.items())
        hint = f"The report of the others is in {report}; --resume tries again."
        raise RrtcError(f"{len(failed)} of {len(recipes)} runs failed: {why}", hint)
    return {"runs": done, "report": found}


def plan_run(recipe: Recipe) -> RunPlanResult:
    """What a run would do, without doing it: the recipe with what its defaults stand for, init's plan, and the steps
    of the training. Raises what would stop the run, as far as recipe, config and headers show it."""
    check_run(recipe)
    plan, training = dry_run(cast(str, recipe.model), recipe), recipe.uptrain
    source = find_model(cast(str, recipe.model), config_only=True)
    first = first_plan(source, recipe.init)[0]
    _check_gains(training, first, source)
    architecture = first.architecture
    context = min(training.context, architecture.context or training.context)
    check_tokens(training, context)
    a_step = training.batch_size * context
    steps = -(-training.tokens // a_step)
    tokens, flops = steps * a_step, plan["flops_per_token"]
    if flops is not None:
        teacher = plan["dense_flops_per_token"] if training.distills else 0
        exits = recipe.init.loops - 1 if training.exits != "none" else 0
        flops = training_flops(training, flops, teacher, exits, architecture.head_flops)
    resolved = {"model": recipe.model} | {stage: getattr(recipe, stage).resolved() for stage in STAGES}
    of_training = {"steps": steps, "tokens": tokens, "flops_total": None if flops is None else flops * tokens}
    return cast(RunPlanResult, {"recipe": resolved, "plan": plan, "uptrain": of_training})


def _is_interruption(error: Exception) -> bool:
    """Whether the user or a signal stopped the run, as its exit code says."""
    return isinstance(error, RrtcError) and error.exit_code > 128


def _run_stages(recipe: Recipe, folders: Mapping[str, Path]) -> dict[str, Any]:
    """The results of the stages that have one of the `folders`. Raises RrtcError where one of them was made with
    another recipe."""
    from rrtc.export import stage as exporting
    from rrtc.init import stage as initializing
    from rrtc.init.job import resumable as initialized
    from rrtc.uptrain import stage as uptraining

    def begun(resumable: Callable, stage: str) -> bool:
        return bool(resumable(folders[stage]).finished())

    place = {stage: str(folder) for stage, folder in folders.items()}
    steps = {
        "init": lambda: initializing.init(cast(str, recipe.model), place["init"], recipe, begun(initialized, "init")),
        "uptrain": lambda: uptraining.uptrain(
            place["init"], place["uptrain"], recipe, begun(uptraining.resumable, "uptrain")
        ),
        "eval": lambda: measure([place["uptrain"]], recipe, None, place["eval"]),
        "export": lambda: exporting.export(place["uptrain"], place["export"], recipe, place["eval"]),
    }
    _check_made_from_each_other(folders)
    results = {}
    for number, (stage, folder) in enumerate(folders.items(), 1):
        if folder.exists():
            _check_same_recipe(stage, folder, recipe)
            note(f"{number}/{len(folders)} {stage}: done before")
            results[stage] = _result_of(stage, folder)
        else:
            note(f"{number}/{len(folders)} {stage} → {folder}")
            results[stage] = steps[stage]()
    return results


def _result_of(stage: str, folder: Path) -> Any:
    """What the finished `stage` in `folder` returned."""
    if stage == "eval":
        return read_report(folder)
    provenance = read_provenance(folder)
    return provenance["measured"]["windows" if stage == "init" and REPLAN in provenance["recipe"] else stage]


def _check_made_from_each_other(folders: Mapping[str, Path]) -> None:
    """Raises RrtcError where a stage is done and one that it was made from is not there, or was done anew: its result
    would be of another model than the run's."""
    for stage, folder in folders.items():
        if not folder.exists():
            continue
        made_from = {entry["stage"]: entry["made"] for entry in read_provenance(folder)["history"]}
        for source in MADE_FROM.get(stage, ()):
            before = folders.get(source)
            if before is None:  # of a sweep, which has it elsewhere
                continue
            if not before.exists() or made_from.get(source) not in (None, read_provenance(before)["made"]):
                raise RrtcError(
                    f"{folder} was made from another {source} than there is in {before} now.",
                    f"Delete {folder}, so that it is made anew.",
                )


def measure(folders: Sequence[str], recipe: Recipe, against: str | None, output: str | None) -> Report:
    """`evaluate`, with the baselines that the stages init and export make, which eval does not know."""
    from rrtc.eval import stage

    of_this_recipe = functools.partial(baselines, by_user=recipe.init.calibrate_on)
    return stage.evaluate(folders, recipe, against, output, of_this_recipe)


def baselines(
    folder: Path, work: Path, against: str | None = None, by_user: Collection[str] = ()
) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """As rrtc.init.baselines.make_baselines, and beside these the dense model in 8 and in 4 bits, as `rrtc export
    --format dense --quantize` rounds it, on the same text: what a user would do without rrtc. Raises RrtcError as that
    does."""
    from rrtc.export.quantize import quantize
    from rrtc.export.stage import check_format
    from rrtc.init.baselines import calibration_text, make_baselines, write_shorter
    from rrtc.io.dense import DenseModel
    from rrtc.io.folder import whole_folder
    from rrtc.io.source import find_base
    from rrtc.io.weights import Weights
    from rrtc.recipe.export import ExportRecipe
    from rrtc.stock.architecture import read_architecture
    from rrtc.text.windows import Windows

    made, missing = make_baselines(folder, work, against, by_user)
    source = find_base(folder, against, "--against")
    dense, ids = DenseModel(source), calibration_text(folder, source, by_user)
    parameters = read_architecture(dense.config).parameters
    for number, bits in BITS.items():
        recipe = ExportRecipe(format="dense", quantize=number)
        try:
            check_format(recipe, dense.config, parameters)
        except RrtcError as error:
            missing.append({"task": f"dense in {number}", "why": error.sentence})
            continue
        with whole_folder(work / f"dense-{number}") as partial:
            write_shorter(dense, list(range(dense.depth)), Weights(folder).dtype, partial)
            quantize(partial, bits, ids, Windows(ids[:1], 1.0), parse_size(recipe.max_shard_size))
        made[f"dense in {number}"] = work / f"dense-{number}"
    return made, missing


def check_sizes(recipe: Recipe) -> None:
    """Raises WrongUsage for a size that is none."""
    parse_size(recipe.init.max_shard_size)


def check_run(recipe: Recipe) -> None:
    """Raises what the stages of a run would raise about the recipe itself."""
    check_recipe(recipe.uptrain)
    planned, written = recipe.init.quantize, recipe.export.quantize
    if planned != "none" and (planned != written or recipe.export.format != "recursive"):
        raise WrongUsage(
            f"init.quantize plans for a recursive export in {planned}, and export makes a {recipe.export.format} one "
            f"with quantize {written}.",
            f"Set export.quantize to {planned} and export.format to recursive, or leave init.quantize out.",
        )
    if recipe.uptrain.exits in ("frozen", "after"):
        raise WrongUsage(
            "Exits are trained after the model is healed, and a run only heals it.",
            "Leave exits out, and train them afterwards: rrtc uptrain DIR/uptrain -o DIR/exits --exits frozen.",
        )
    without_loops = recipe.init.pattern == "auto" or recipe.init.pattern.endswith("sequence") or recipe.init.loops == 1
    if recipe.uptrain.exits == "joint" and without_loops:
        may_make = "may make none" if recipe.init.pattern == "auto" else "makes none"
        raise WrongUsage(
            f"There is nowhere to leave early: exits are at the ends of loops, and init {may_make}.",
            "Leave uptrain.exits out, or let init.sharing be a cycle of two loops or more.",
        )
    _check_kinds(recipe)
    check_sizes(recipe)
    parse_size(recipe.export.max_shard_size)


def _check_kinds(recipe: Recipe) -> None:
    """Raises what later stages would raise about the kinds of attention that init may choose."""
    init = recipe.init
    features: set[str] = {"window", *init.kv_kinds} if init.kv_budget is not None and init.kv_budget < 1 else set()
    if LAST_LOOP in features:
        features |= {"owner", "later"}
    for by, name, is_asked in (
        (f"The {recipe.export.format} format", "export.format", True),
        ("The engine for many requests", "eval.engine", recipe.eval.engine),
    ):
        if is_asked:
            hint = f"Change {name}, or what init may give the model (kv_budget, kv_kinds)."
            check_carried(by, features, hint, WrongUsage)
    check_features(recipe.uptrain, features)
    if recipe.uptrain.transfers and "linear" not in features:
        raise WrongUsage(
            "The loss 'attention' is about linear attention, and init gives none to the model.",
            "Add linear to init.kv_kinds, or leave the loss out.",
        )


def check_texts(output: Path, *recipes: Recipe) -> None:
    """Raises what the stages of the runs into `output` would raise about the texts that the recipes name."""
    texts: dict[tuple[str, str], None] = {}
    for recipe in recipes:
        calibration = recipe.init.calibrate_on if recipe.init.reads_text else []
        quantized = recipe.export.calibrate_on if recipe.export.quantize != "none" else []
        sections = {"init": calibration, "uptrain": recipe.uptrain.data, "eval": recipe.eval.text, "export": quantized}
        for stage, sources in sections.items():
            texts |= {(source, getattr(recipe, stage).text_field): None for source in sources if source != OWN_TEXT}
    check_outside(output, *source_folders(source for source, _ in texts))
    for source, field in texts:
        check_source(source, field)
    for recipe in recipes:
        check_split_alike(recipe.uptrain.data)


def check_has_weights(model: str) -> None:
    """Raises RrtcError where the folder `model` holds a config alone, as those of the paper's recipes do."""
    folder = Path(model)
    weights = ("*.safetensors*", "*.bin*", "*.gguf")
    if (folder / "config.json").is_file() and not any(file for kind in weights for file in folder.glob(kind)):
        hint = "That is enough for --dry-run. To run, name the model with its weights: --model MODEL."
        raise RrtcError(f"There are no weights in {folder}, only a config.", hint)


def check_sweep(recipes: Mapping[str, Recipe], output: Path) -> None:
    """Raises, as far as recipes, config and headers show it, what would stop one of the runs into `output`, and their
    report."""
    if (report := output / REPORT).exists() and not is_report(report):
        raise RrtcError(f"{report}, where the report of the sweep belongs, holds what is not rrtc's.", "Move it away.")
    for name, recipe in recipes.items():
        try:
            check_run(recipe)
            dry_run(cast(str, recipe.model), recipe)
        except RrtcError as error:
            raise type(error)(f"The run {name} cannot be: {error.sentence}", error.hint) from error
    first = next(iter(recipes.values()))
    texts = {(*recipe.uptrain.data, recipe.uptrain.text_field) for recipe in recipes.values()}
    if len(texts) > 1 and not first.eval.text:
        sentence = "The runs are trained on different texts, so that there is none to compare them on."
        raise WrongUsage(sentence, "Name one: --set eval.text=FILE.")
    if len(recipes) > 1 and first.eval.baselines:
        raise WrongUsage("Baselines are made for one folder, and not for a sweep.", "Add --set eval.baselines=off.")
    check_texts(output, *recipes.values())


def _check_tasks(recipe: Recipe) -> None:
    from rrtc.eval.tasks import find_tasks

    if recipe.eval.tasks:
        note("Looking for the tasks of the evaluation")
        find_tasks(recipe.eval)


def check_models(recipe: Recipe) -> None:
    """Raises what the later stages of a run would raise about the models and packages that they need, before the first
    one spends its time: all but what takes the compressed model to tell."""
    from rrtc.export.stage import check_format
    from rrtc.text.windows import longest_context
    from rrtc.uptrain.job import check_reporter, check_teacher

    training, source = recipe.uptrain, find_model(cast(str, recipe.model))
    check_reporter(training.report_to)
    plan, config = first_plan(source, recipe.init)[0], _dense_config(source)
    if training.teacher is not None:
        check_teacher(find_model(training.teacher), training, config, load_tokenizer(source.folder))
    _check_gains(training, plan, source)
    check_tokens(training, longest_context(config, training.context))
    check_format(recipe.export, config, plan.architecture.parameters)


def _check_gains(training: UptrainRecipe, plan: Plan, source: Source) -> None:
    """Raises WrongUsage where stability admin has no gain to set in what `plan` makes of `source`."""
    if training.stability == "admin":
        from rrtc.uptrain.stability import branches_of

        branches_of(plan, _dense_config(source))


def _dense_config(source: Source):
    """The transformers config of the dense model that `source` is, or was made from."""
    return read_config(source.folder).base_config if source.is_recursive else source.config()


def _check_same_recipe(stage: str, folder: Path, recipe: Recipe) -> None:
    done = read_provenance(folder)["recipe"]
    done = done | done.get(REPLAN, {})
    before = {"model": done["model"]} | {f"{stage}.{key}": value for key, value in done[stage].items()}
    now = {"model": recipe.model} | {f"{stage}.{k}": value for k, value in getattr(recipe, stage).resolved().items()}
    changed = difference(before, now)
    if changed is not None:
        raise RrtcError(
            f"{folder} was made with another recipe: {changed}.", "Use the old recipe, or another output folder."
        )
