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

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rrtc import runs
from rrtc.console import note, notes_shown, quiet_downloads, quiet_libraries
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.folder import check_target
from rrtc.io.provenance import PROVENANCE, read_provenance
from rrtc.io.report import read_report
from rrtc.io.source import Source, answers_hash, check_tokenizer, find_base, find_model, read_config
from rrtc.io.weights import Weights
from rrtc.plain import read_json
from rrtc.plan import read_visits
from rrtc.recipe.chat import ChatOptions
from rrtc.recipe.generate import ServeOptions, WayOptions
from rrtc.recipe.schema import Recipe, checked, load_recipe, with_flags
from rrtc.recipe.section import Section
from rrtc.recipe.settings import sweep_of, with_settings
from rrtc.results import (
    EnvResult,
    EstimateResult,
    ExportResult,
    GeneratedResult,
    GenerateResult,
    InitResult,
    InspectResult,
    PlanResult,
    Report,
    RunPlanResult,
    RunResult,
    ServeResult,
    SweepResult,
    UptrainResult,
)
from rrtc.runs import (
    STAGES,
    check_has_weights,
    check_run,
    check_sizes,
    check_sweep,
    check_texts,
    measure,
    run_recipe,
    sweep_recipes,
)
from rrtc.serve.place import bind, check_installed
from rrtc.storage import said_numbers
from rrtc.text.prompts import AnswersFile, Prompt, check_prompt_value, prompt_of, read_prompts
from rrtc.units import parse_size
from rrtc.uptrain.checks import check_recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rrtc.chat import Chat
    from rrtc.generate.words import Show
    from rrtc.model import RrtForCausalLM
    from rrtc.plan import Plan

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
    check_sizes(asked)
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
    check_sizes(asked)
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
        return measure(sources, asked, dense, target)


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
            check_push(push_to_hub, private)
        made = export(source, target, asked, None if report is None else _home(report))
        if push_to_hub is not None:
            made = made | {"pushed_to": push(Path(target), push_to_hub, private)}
        return cast(ExportResult, made)


def run(
    recipe: Place | Mapping[str, Any] | Recipe, output: Place, resume: bool = False, *, tokens: int | None = None,
    model: Place | None = None, settings: Mapping[str, Any] | None = None, verbose: bool = False,
) -> RunResult:  # fmt: skip
    """Runs init, uptrain, eval and export of `recipe` into folders of those names in `output`.

    tokens: to train on, instead of the recipe's. model: the dense model, instead of the recipe's. settings: other
    fields, by names such as "init.rank". With `resume`, stages that are complete are not run again, init goes on from
    what it has finished and training from its last checkpoint. Returns the result of each stage by its name. Raises
    RrtcError where `output` is in use, or was made by another recipe.
    """
    asked, target = _recipe_of_run(recipe, tokens, model, settings), Path(_home(output))
    check_has_weights(cast(str, asked.model))
    if not resume:
        check_target(target)
    check_run(asked)
    check_texts(asked)
    with _work(verbose, f"Reading {asked.model}"):
        return cast(RunResult, run_recipe(asked, target))


def sweep(
    recipe: Place | Mapping[str, Any] | Recipe, output: Place, over: Mapping[str, Sequence[Any]], resume: bool = False,
    *, tokens: int | None = None, model: Place | None = None, settings: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> SweepResult:  # fmt: skip
    """Runs init and uptrain of `recipe` with every combination of the values in `over`, such as {"init.rank": [0, 64]},
    into folders such as rank=64 in `output`, and measures all of them in one report there.

    The others are as in `run`; with `resume`, values can be added. A run that fails loses none of the others: an
    RrtcError at the end names it. Raises WrongUsage, before any work, for values that no run can have.
    """
    asked, target = _recipe_of_run(recipe, tokens, model, settings), Path(_home(output))
    recipes = sweep_of(asked, over, "the sweep")
    check_has_weights(cast(str, asked.model))
    if not resume:
        check_target(target)
    with _work(verbose, f"Reading {asked.model}", heavy=False):
        check_sweep(recipes)
        with quiet_libraries():
            return cast(SweepResult, sweep_recipes(recipes, target))


def plan_run(
    recipe: Place | Mapping[str, Any] | Recipe, over: Mapping[str, Sequence[Any]] | None = None, *,
    tokens: int | None = None, model: Place | None = None, settings: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> dict[str, RunPlanResult]:  # fmt: skip
    """What `run` would do, or each run of a `sweep`, by its name ("run" where there is one): the whole recipe, the plan
    and the steps of the training. No weights are read."""
    asked = _recipe_of_run(recipe, tokens, model, settings)
    recipes = sweep_of(asked, over, "the sweep") if over else {"run": asked}
    with _work(verbose, f"Reading {asked.model}", heavy=False):
        return {name: runs.plan_run(one) for name, one in recipes.items()}


def _recipe_of_run(
    recipe: RecipeLike, tokens: int | None, model: Place | None, settings: Mapping[str, Any] | None
) -> Recipe:
    """The recipe that is to be run. Raises WrongUsage for what it cannot be, and where it names no model."""
    given = {"uptrain.tokens": tokens, "model": None if model is None else os.fspath(model)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() & (settings or {}).keys():
        raise WrongUsage(f"{name} is given twice.", "Give it once, by its own option or among the settings.")
    asked = _recipe(
        with_settings(_recipe(recipe, "init", {}), given | dict(settings or {}), "the settings"), "init", {}
    )
    _check_one_process("run")
    if asked.model is None:
        raise WrongUsage("The recipe does not name a model.", "Name it: --model MODEL, or 'model: …' in the recipe.")
    return asked


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
        found["dtype"] = " and ".join(filter(None, (exported.get("quantize"), exported.get("dtype")))) or None
        found["bytes_on_disk"] = sum(file.stat().st_size for file in [*path.glob("onnx/*"), *path.glob("*.gguf")])
    elif (path / "config.json").exists():
        weights = Weights(path)
        quantized, parts = exported.get("quantize"), exported.get("parts")
        if quantized and isinstance(parts, dict) and parts and all(isinstance(part, dict) for part in parts.values()):
            found["dtype"] = said_numbers(parts)
        else:  # an rrtc that wrote no parts left all but the layers' matrices in the other format
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
    Raises RrtcError where there is no such model, where its files lack a tensor, or where it has no tokenizer.
    """
    with _work(False, ""):
        folder = find_model(_home(model)).folder
        Weights(folder)  # refuses what it holds besides safetensors, and paths in its index
        from transformers import AutoModelForCausalLM

        from rrtc.io.source import load_tokenizer, with_all_tensors
        from rrtc.model import RrtConfig  # and with it the recursive model is registered
        from rrtc.stock.architecture import read_plan

        config = read_config(folder)  # raises for what transformers has no model for
        if isinstance(config, RrtConfig):
            read_plan(config)  # raises for visits that cannot be
        safe = {"use_safetensors": True, "trust_remote_code": False}
        loaded = with_all_tensors(AutoModelForCausalLM, folder, dtype=dtype, **safe)
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


def generate(
    model: Place, prompts: "Prompt | Sequence[Prompt]", *, show: "Show | None" = None,
    done: "Callable[[int, GeneratedResult], None] | None" = None, verbose: bool = False, **options: Any,
) -> GenerateResult:  # fmt: skip
    """Goes on with many prompts at once, with `model`, which may be all that `load` takes:

        for answer in api.generate("healed", ["Once upon a time", "The sky is"], max_tokens=40)["answers"]:
            print(answer["text"])

    A prompt is text that is gone on with, or a list of messages for the chat template. show(piece) is called with each
    piece of text as it comes, done(number, answer) with each answer as soon as it is whole. options: of WayOptions in
    rrtc/recipe/generate.py. What a request is answered does not depend on the others.

    Raises WrongUsage for prompts that hold nothing or more than the model can see, and for exits that the model does
    not have; RrtcError where the model cannot be found, or has no tokenizer.
    """
    one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict))
    several = cast("list[Prompt]", [prompts] if one else list(prompts))
    if not several:
        raise WrongUsage("There are no prompts.")
    for number, prompt in enumerate(several, 1):
        check_prompt_value(prompt, f"Prompt {number}")
    return _generate(_home(model), several, with_flags(WayOptions(), options, "the call"), verbose, show, done)


def _generate(
    name: str, prompts: "list[Prompt]", options: WayOptions, verbose: bool, show: "Show | None" = None,
    done: "Callable[[int, GeneratedResult], None] | None" = None, numbers: Sequence[int] | None = None,
    fingerprint: str | None = None,
) -> GenerateResult:  # fmt: skip
    """`generate`, of checked arguments. numbers: as for rrtc.generate.answers.answer_all. fingerprint: the model's
    `answers_hash`, where it is known already: all weights are read for it."""
    with _work(verbose, f"Reading {name}"):
        source = find_model(name)
        source.weights()
        check_tokenizer(source.folder)
        from rrtc.generate.answers import answer_all
        from rrtc.generate.words import stops_of
        from rrtc.io.recursive import trained_exits
        from rrtc.machine import device

        loaded, tokenizer = load(source.folder, device=device())
        options = options.model_copy(update={"stop": stops_of(options.stop, loaded.generation_config)})
        return answer_all(
            name, loaded, tokenizer, prompts, options, bool(trained_exits(source.folder)),
            fingerprint or answers_hash(source.folder), show, done, numbers,
        )  # fmt: skip


def generate_file(
    model: Place, prompts: Place, output: Place, *, resume: bool = False, verbose: bool = False, **options: Any
) -> GenerateResult | None:
    """`generate` for the .jsonl file `prompts`, a line of which is {"prompt": …} or {"messages": …}, into the new
    .jsonl file `output`: the same lines, with `text`, `tokens` and `ended`. resume: goes on from what an interrupted
    run has answered already. What is returned is about the prompts that were answered now; None where all had been."""
    asked, name = with_flags(WayOptions(), options, "the call"), _home(model)
    rows = read_prompts(Path(_home(prompts)))
    fingerprint = answers_hash(find_model(name).folder)
    file = AnswersFile(Path(_home(output)), rows, asked.model_dump(mode="json") | {"model": fingerprint})
    file.check(resume)
    left = [number for number in range(len(rows)) if number not in file.done]
    with file.writing():
        if not left:
            return None
        return _generate(
            name, [prompt_of(rows[number]) for number in left], asked, verbose,
            done=lambda number, answer: file.add(left[number], answer), numbers=left, fingerprint=fingerprint,
        )  # fmt: skip


def serve(model: Place, *, verbose: bool = False, **options: Any) -> ServeResult:
    """Answers requests of OpenAI's protocol with `model`, which may be all that `load` takes, until Ctrl-C or SIGTERM:
    /v1/completions, /v1/chat/completions, /v1/models and /health. options: of ServeOptions in rrtc/recipe/generate.py.

    Raises RrtcError, before it listens, where the packages of the extra `serve` are not installed, nothing can listen
    at the address, the model cannot be found or has no tokenizer, or there is no room for so many requests; WrongUsage
    for exits that the model does not have, and a context that it cannot see.
    """
    asked, name = with_flags(ServeOptions(), options, "the call"), _home(model)
    _check_one_process("serve")
    check_installed()
    with _work(verbose, f"Reading {name}", heavy=False), bind(asked.host, asked.port) as place:
        source = find_model(name)
        source.weights()
        check_tokenizer(source.folder)
        with quiet_libraries():
            from rrtc.io.recursive import trained_exits
            from rrtc.machine import device
            from rrtc.serve.server import serve

            loaded, has_exits = load(source.folder, device=device()), bool(trained_exits(source.folder))
            return serve(*loaded, name, asked, has_exits, answers_hash(source.folder), place)


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


def _check_uptrain(folder: str, recipe: Recipe) -> None:
    check_recipe(recipe.uptrain)
    read_provenance(Path(folder))
