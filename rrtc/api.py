"""The one door: what the commands do, as functions.

    from rrtc import api

    api.plan("SmolLM2-135M", loops=2)                        # what would be made of it; no weights are read
    api.init("SmolLM2-135M", "small", budget=0.7)
    api.uptrain("small", "healed", data="corpus.jsonl", tokens=10_000_000)
    report = api.evaluate("healed", output="report")
    api.export("healed", "release", report="report")
    model, tokenizer = api.load("healed")

Keywords are the fields of the recipe's section (`rrtc recipe` lists them) and say what the command's flags say.
`recipe` is where they start from: a file, a dictionary or a Recipe. A keyword that is None counts as not given. Places
may begin with ~. What is returned is described in rrtc/results.py.

Nothing is printed. With verbose=True, notes, warnings and progress go to stderr, as on the command line; without, what
must not be missed is a Python warning (rrtc.console.RrtcWarning). What cannot be done raises an RrtcError, or its kind
WrongUsage where the call itself is wrong, before any work as far as it can be known by then.

Importing this module imports no torch: what takes seconds to import waits until the cheap checks have passed.
"""

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rrtc.console import note, notes_shown, quiet_downloads, quiet_libraries
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.folder import check_target
from rrtc.io.provenance import PROVENANCE, read_provenance
from rrtc.io.report import read_report
from rrtc.io.resumable import difference
from rrtc.io.source import Source, check_tokenizer, find_base, find_model, read_config
from rrtc.io.weights import Weights
from rrtc.plain import read_json
from rrtc.plan import read_visits
from rrtc.recipe.chat import ChatOptions
from rrtc.recipe.schema import Recipe, checked, load_recipe, with_flags
from rrtc.recipe.section import OWN_TEXT, Section
from rrtc.results import (
    EnvResult,
    EstimateResult,
    ExportResult,
    InitResult,
    InspectResult,
    PlanResult,
    Report,
    RunResult,
    UptrainResult,
)
from rrtc.text.sources import check_source
from rrtc.units import parse_count, parse_size
from rrtc.uptrain.checks import check_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrtc.chat import Chat
    from rrtc.model import RrtForCausalLM
    from rrtc.plan import Plan

STAGES = ("init", "uptrain", "eval", "export")
# Fields of the recipe that name places, or may.
PLACES = ("model", "calibrate_on", "data", "teacher", "teacher_cache", "text", "tasks_dir", "tasks_data")

Place = str | os.PathLike[str]
RecipeLike = Place | Mapping[str, Any] | Recipe | None
AnySection = TypeVar("AnySection", bound=Section)


def init(
    model: Place | None, output: Place, recipe: RecipeLike = None, *, resume: bool = False, verbose: bool = False,
    **fields: Any,
) -> InitResult:  # fmt: skip
    """Compresses the dense `model` (a folder, a hub id, a .gguf file or package://…; None: the recipe's) into the new
    folder `output`. fields: of InitRecipe. resume: go on from what an interrupted run has finished."""
    asked = _recipe(recipe, "init", fields)
    name, target = _model(model, asked), _home(output)
    _check_one_process("init")
    _check_sizes(asked)
    if not resume:
        check_target(Path(target))
    with _work(verbose, f"Reading {name}", heavy=False):
        if not Path(name).is_file():  # a GGUF is hashed: once is enough
            find_model(name)
        with quiet_libraries():
            from rrtc.init.stage import init

            return cast(InitResult, init(name, target, asked, resume=resume))


def plan(model: Place | None, recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any) -> PlanResult:
    """What `init` would make of `model`, from its config.json and, where there are weights, their headers. fields: of
    InitRecipe."""
    from rrtc.init.dry_run import dry_run

    asked = _recipe(recipe, "init", fields)
    name = _model(model, asked)
    _check_one_process("init")
    _check_sizes(asked)
    with _work(verbose, f"Reading {name}", heavy=False):
        return cast(PlanResult, dry_run(name, asked))


def uptrain(
    folder: Place, output: Place, recipe: RecipeLike = None, *, resume: bool = False, verbose: bool = False,
    **fields: Any,
) -> UptrainResult:  # fmt: skip
    """Heals the tied model in `folder` by training it to do as its dense original does, into the new folder `output`.
    fields: of UptrainRecipe. resume: go on from the last checkpoint of an interrupted run."""
    asked, source, target = _recipe(recipe, "uptrain", fields), _home(folder), _home(output)
    _check_uptrain(source, asked)
    if not resume:
        check_target(Path(target), Path(source))
    with _work(verbose, f"Reading {source}"):
        from rrtc.uptrain.stage import uptrain

        return cast(UptrainResult, uptrain(source, target, asked, resume=resume))


def estimate(folder: Place, recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any) -> EstimateResult:
    """What `uptrain` would take, measured on a few of its steps. fields: of UptrainRecipe."""
    asked, source = _recipe(recipe, "uptrain", fields), _home(folder)
    _check_uptrain(source, asked)
    with _work(verbose, f"Reading {source}"):
        from rrtc.uptrain.estimate import estimate

        return cast(EstimateResult, estimate(source, asked))


def evaluate(
    folders: Place | Sequence[Place], output: Place | None = None, against: Place | None = None,
    recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any,
) -> Report:  # fmt: skip
    """Measures the model in one folder, or several side by side, beside the dense original on the same items. fields:
    of EvalRecipe. output: a new folder for the report and its page. against: the dense model, where it has moved."""
    asked = _recipe(recipe, "eval", fields)
    sources = [_home(folder) for folder in ([folders] if isinstance(folders, str | os.PathLike) else folders)]
    target, dense = (None if place is None else _home(place) for place in (output, against))
    for source in sources:
        if target is not None:
            check_target(Path(target), Path(source))
    for source in sources:
        read_provenance(Path(source))
    with _work(verbose, f"Reading {', '.join(sources)}"):
        return _evaluate(sources, asked, dense, target)


def export(
    folder: Place, output: Place, report: Place | None = None, push_to_hub: str | None = None, private: bool = False,
    recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any,
) -> ExportResult:  # fmt: skip
    """Writes the model in `folder` into the new folder `output` in a form that loads without rrtc, and checks it in a
    fresh process. fields: of ExportRecipe. report: what `evaluate` wrote, for the model card. push_to_hub: USER/NAME of
    a new repository to upload it to. private: make that repository a private one."""
    asked, source, target = _recipe(recipe, "export", fields), _home(folder), _home(output)
    if private and push_to_hub is None:
        raise WrongUsage("Only what is pushed can be private.", "Add --push-to-hub USER/NAME, or leave out --private.")
    _check_one_process("export")
    parse_size(asked.export.max_shard_size)
    check_target(Path(target), Path(source))
    read_provenance(Path(source))
    with _work(verbose, f"Reading {source}"):
        from rrtc.export.push import check_push, push
        from rrtc.export.stage import export

        if push_to_hub is not None:
            check_push(push_to_hub)
        made = export(source, target, asked, None if report is None else _home(report))
        if push_to_hub is not None:
            made = made | {"pushed_to": push(Path(target), push_to_hub, private)}
        return cast(ExportResult, made)


def run(
    recipe: Place | Mapping[str, Any] | Recipe, output: Place, resume: bool = False, *, tokens: int | None = None,
    verbose: bool = False,
) -> RunResult:  # fmt: skip
    """Runs init, uptrain, eval and export of `recipe` into folders of those names in `output`.

    tokens: to train on, instead of the recipe's. With `resume`, stages that are complete are not run again, init goes
    on from what it has finished and training from its last checkpoint. Returns the result of each stage by its name.
    Raises RrtcError where `output` is in use, or was made by another recipe.
    """
    asked, target = _recipe(recipe, "uptrain", {"tokens": tokens}), Path(_home(output))
    _check_one_process("run")
    if asked.model is None:
        raise WrongUsage("The recipe does not name a model.", "Add 'model: …', as in recipes/quickstart.yaml.")
    if not resume:
        check_target(target)
    _check_recipe(asked)
    with _work(verbose, f"Reading {asked.model}"):
        return cast(RunResult, _run(asked, target))


def _run(recipe: Recipe, output: Path) -> dict:
    from rrtc.eval.tasks import find_tasks
    from rrtc.export import stage as exporting
    from rrtc.init import stage as initializing
    from rrtc.init.job import resumable as initialized
    from rrtc.uptrain import stage as uptraining

    folders = {stage: str(output / stage) for stage in STAGES}
    made, healed, measured, exported = folders.values()
    _check_models(recipe)
    if recipe.eval.tasks and not Path(measured).exists():
        note("Looking for the tasks of the evaluation")
        find_tasks(recipe.eval)

    def begun(resumable: Callable, target: str) -> bool:
        return bool(resumable(Path(target)).finished())

    steps = {
        "init": lambda: initializing.init(cast(str, recipe.model), made, recipe, begun(initialized, made)),
        "uptrain": lambda: uptraining.uptrain(made, healed, recipe, begun(uptraining.resumable, healed)),
        "eval": lambda: _evaluate([healed], recipe, None, measured),
        "export": lambda: exporting.export(healed, exported, recipe, measured),
    }
    results = {}
    for number, (stage, step) in enumerate(steps.items(), 1):
        folder = Path(folders[stage])
        if folder.exists():
            _check_same_recipe(stage, folder, recipe)
            note(f"{number}/4 {stage}: done before")
            results[stage] = read_report(folder) if stage == "eval" else read_provenance(folder)["measured"][stage]
        else:
            note(f"{number}/4 {stage} → {folder}")
            results[stage] = step()
    return results


def _evaluate(folders: list[str], recipe: Recipe, against: str | None, output: str | None) -> Report:
    """`evaluate`, with the baselines that the stage init makes, which eval does not know."""
    from rrtc.eval import stage
    from rrtc.init.baselines import make_baselines

    of_this_recipe = functools.partial(make_baselines, by_user=recipe.init.calibrate_on)
    return stage.evaluate(folders, recipe, against, output, of_this_recipe)


def inspect(folder: Place) -> InspectResult:
    """What rrtc.yaml says of `folder`, with the visits of its model, and its size on disk and its number formats where
    it holds a model. Needs no torch. Raises RrtcError where rrtc did not write the folder, or where its weights are
    damaged."""
    place = _home(folder)
    path = Path(place)
    found: dict[str, Any] = {"folder": place} | read_provenance(path)
    exported = found["measured"].get("export") if found["stage"] == "export" else None
    exported = exported if isinstance(exported, dict) else {}
    if exported.get("format") in ("onnx", "gguf"):  # whose weights are no safetensors
        found["dtype"] = exported.get("dtype")
        found["bytes_on_disk"] = sum(file.stat().st_size for file in [*path.glob("onnx/*"), *path.glob("*.gguf")])
    elif (path / "config.json").exists():
        weights = Weights(path)
        quantized = exported.get("quantize")  # and LoRA, norms and embeddings in the other format
        found["dtype"] = f"{quantized} and {exported.get('dtype')}" if quantized else weights.dtype
        found["bytes_on_disk"] = weights.bytes_on_disk
        found["visits"] = _visits(path / "config.json")
        of_init = found["measured"].get("windows") or found["measured"].get("init")
        if found["visits"] is not None and isinstance(of_init, dict):
            found |= {name: of_init[name] for name in ("kv_bytes", "dense_kv_bytes") if name in of_init}
    if found["stage"] == "eval":
        found["report"] = read_report(path)
    return cast(InspectResult, found)


def load(model: Place, dtype: Any = "auto", device: Any = "cpu") -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """(model, tokenizer) of a folder that rrtc wrote, exported or not, or of any other model that rrtc reads.

    dtype: a torch.dtype or its name; "auto": as it is stored. The model is in eval mode. No code from the folder is
    run. To load an unexported folder with transformers alone, `import rrtc.model` first, which registers its classes.
    Raises RrtcError where there is no such model, or where it has no tokenizer.
    """
    with _work(False, ""):
        folder = find_model(_home(model)).folder
        Weights(folder)  # refuses what it holds besides safetensors, and paths in its index
        from transformers import AutoModelForCausalLM

        import rrtc.model  # noqa: F401 - registers the recursive model
        from rrtc.io.source import load_tokenizer

        read_config(folder)  # raises for what transformers has no model for
        safe = {"use_safetensors": True, "trust_remote_code": False}
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **safe)
        return loaded.to(device).eval(), load_tokenizer(folder)


def chat(
    model: Place, against: Place | None = None, *, max_tokens: int | None = None, temperature: float | None = None,
    top_p: float | None = None, seed: int | None = None, verbose: bool = False,
) -> "Chat":  # fmt: skip
    """A conversation with `model`, which may be all that `load` takes:

        print(api.chat("healed").answer("Why is the sky blue?")["answers"][0]["text"])

    What is said next is said after that. Where the tokenizer has a chat template, it is used; where it has none, the
    model goes on with the text. against: another model that is told the same, or "dense": the one that the folder
    `model` was made from. The others: of ChatOptions; as the model's own generation defaults have it where not given.
    Raises RrtcError where one of the models cannot be found or has no tokenizer.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    asked, name = with_flags(ChatOptions(), options, "the call"), _home(model)
    with _work(verbose, f"Reading {name}", heavy=False):
        sources = [find_model(name)]
        if against is not None:
            sources.append(_dense_of(Path(name), _home(against)))
        for source in sources:
            source.weights()
            check_tokenizer(source.folder)
        with quiet_libraries():
            from rrtc.chat import Chat, Speaker
            from rrtc.machine import device

            return Chat([Speaker(one.uri, *load(one.folder, device=device()), asked) for one in sources])


def _dense_of(folder: Path, named: str) -> Source:
    """The model that the user named to compare the one in `folder` with; "dense" is the one that it was made from."""
    if named == "dense" and not (folder / PROVENANCE).exists():
        sentence = f"{folder} was not written by rrtc, so nothing says which dense model it was made from."
        raise RrtcError(sentence, "Name a model in place of 'dense'.")
    return find_base(folder, None if named == "dense" else named, "--against")


def tie(model: "PreTrainedModel", plan: "Plan") -> "RrtForCausalLM":
    """The recursive model that `plan` makes of a dense `model` that is in memory, tied as in the paper (Average and
    SVD). `model` stays as it is.

        from rrtc.patterns import make_plan
        from rrtc.recipe.init import InitRecipe
        from rrtc.stock.architecture import read_architecture

        plan = make_plan(read_architecture(model.config), InitRecipe(loops=2, rank=64))
        recursive = api.tie(model, plan)

    Raises WrongUsage where the plan is of another architecture, or has forms that `init` alone can choose.
    """
    from rrtc.init.in_memory import tie_in_memory

    return tie_in_memory(model, plan)


def env() -> EnvResult:
    """What a bug report should say: versions, the machine, and where rrtc keeps what it can make again."""
    from rrtc.environment import describe_environment

    return describe_environment()


# ---- what they have in common ----


@contextmanager
def _work(verbose: bool, about: str, heavy: bool = True) -> Iterator[None]:
    """Shows notes and progress in the block if `verbose`, the first one at once, because imports take seconds; and, if
    what follows is `heavy`, keeps transformers silent."""
    with notes_shown(verbose), nullcontext() if verbose else quiet_downloads():
        note(about)
        with quiet_libraries() if heavy else nullcontext():
            yield


def _recipe(recipe: RecipeLike, part: str, fields: Mapping[str, Any]) -> Recipe:
    """`recipe` with `fields` in its section `part`, and the user's home in place of ~. Raises WrongUsage for what a
    recipe cannot be."""
    if isinstance(recipe, Mapping):
        recipe = checked(Recipe, dict(recipe), "the recipe")
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(None if recipe is None else _home(recipe))
    given = {name: _home_in(name, value) for name, value in fields.items()}
    sections = {stage: _at_home(getattr(recipe, stage)) for stage in STAGES}
    sections[part] = with_flags(sections[part], given, "the call")
    return _at_home(recipe).model_copy(update=sections)


def _home(place: Place) -> str:
    return os.path.expanduser(os.fspath(place))


def _home_in(field: str, value: Any) -> Any:
    """`value` of a recipe's `field`, with the user's home in place of ~ if it is a place, or several."""
    if field not in PLACES:
        return value
    if isinstance(value, list | tuple):
        return [_home_in(field, one) for one in value]
    return _home(value) if isinstance(value, str | os.PathLike) else value


def _at_home(section: AnySection) -> AnySection:
    places = [field for field in PLACES if field in type(section).model_fields]
    return section.model_copy(update={field: _home_in(field, getattr(section, field)) for field in places})


def _model(model: Place | None, recipe: Recipe) -> str:
    if model is None and recipe.model is None:
        raise WrongUsage("There is no dense model.", "Name it, here or in the recipe (model).")
    return _home(cast(Place, recipe.model if model is None else model))


def _visits(file: Path) -> list[dict] | None:
    """The visits in a config.json, with all their fields; None where it is that of a dense model."""
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise RrtcError(f"The config {file} cannot be read.") from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind is None or (kind != "rrt" and "auto_map" in values):
        read_config(file.parent)  # refuses it; or transformers knows the model, and needs no code from the folder
    if kind != "rrt":
        return None
    try:
        return [visit.fields() for visit in read_visits(values.get("visits"))]
    except ValueError as error:
        raise RrtcError(f"The config {file} of a 'rrt' model cannot be used: its visits are damaged.") from error


def _check_one_process(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WrongUsage(f"'rrtc {command}' runs in one process.", "'rrtc uptrain' and 'rrtc eval' are for torchrun.")


def _check_sizes(recipe: Recipe) -> None:
    """Raises WrongUsage for a size or a count that is none."""
    parse_size(recipe.init.max_shard_size)
    if recipe.init.target_params is not None:
        parse_count(recipe.init.target_params)
    if recipe.init.target_bytes is not None:
        parse_size(recipe.init.target_bytes)


def _check_uptrain(folder: str, recipe: Recipe) -> None:
    check_recipe(recipe.uptrain)
    read_provenance(Path(folder))


def _check_recipe(recipe: Recipe) -> None:
    """Raises what the stages of a run would raise about the recipe itself and about the text that it names."""
    check_recipe(recipe.uptrain)
    if recipe.uptrain.exits:
        raise WrongUsage(
            "Exits are trained after the model is healed, and a run only heals it.",
            "Leave exits out, and train them afterwards: rrtc uptrain DIR/uptrain -o DIR/exits --exits.",
        )
    _check_sizes(recipe)
    parse_size(recipe.export.max_shard_size)
    calibration = set(recipe.init.calibrate_on) - {OWN_TEXT} if recipe.init.start == "joint" else []
    data = set(recipe.uptrain.data) - {OWN_TEXT}
    quantized = recipe.export.calibrate_on if recipe.export.quantize != "none" else []
    texts = (
        (recipe.init, calibration), (recipe.uptrain, data), (recipe.eval, recipe.eval.text), (recipe.export, quantized)
    )  # fmt: skip
    for part, sources in texts:
        for source in sources:
            check_source(source, part.text_field)


def _check_models(recipe: Recipe) -> None:
    """Raises what the later stages of a run would raise about the models and packages that they need, before the first
    one spends its time: all but what takes the compressed model to tell."""
    from rrtc.export.stage import check_format
    from rrtc.stock.architecture import read_architecture
    from rrtc.text.windows import longest_context
    from rrtc.uptrain.job import check_reporter, check_tokens

    check_reporter(recipe.uptrain.report_to)
    if recipe.uptrain.teacher is not None:
        find_model(recipe.uptrain.teacher)
    config = find_model(cast(str, recipe.model)).config()
    check_tokens(recipe.uptrain, longest_context(config, recipe.uptrain.context))
    check_format(recipe.export, config, read_architecture(config).parameters)


def _check_same_recipe(stage: str, folder: Path, recipe: Recipe) -> None:
    done = read_provenance(folder)["recipe"]
    before = {"model": done["model"]} | {f"{stage}.{key}": value for key, value in done[stage].items()}
    now = {"model": recipe.model} | {f"{stage}.{k}": value for k, value in getattr(recipe, stage).resolved().items()}
    changed = difference(before, now)
    if changed is not None:
        raise RrtcError(
            f"{folder} was made with another recipe: {changed}.", "Use the old recipe, or another output folder."
        )
