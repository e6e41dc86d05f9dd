"""The four stages, and what can be said of the first two before they run."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rrtc.api.call import Place, RecipeLike, check_one_process, home, model_of, recipe_of, work
from rrtc.console import quiet_libraries
from rrtc.errors import WrongUsage
from rrtc.io.folder import check_target
from rrtc.io.provenance import read_provenance
from rrtc.io.source import find_model
from rrtc.recipe.schema import Recipe
from rrtc.results import EstimateResult, ExportResult, InitResult, PlanResult, Report, UptrainResult
from rrtc.runs import check_sizes, measure
from rrtc.text.sources import source_folders
from rrtc.units import parse_size
from rrtc.uptrain.checks import check_recipe


def init(
    model: Place | None, output: Place, recipe: RecipeLike = None, *, resume: bool = False, verbose: bool = False,
    **fields: Any,
) -> InitResult:  # fmt: skip
    """Compresses the dense `model` (a folder, a hub id, a .gguf file or package://…; None: the recipe's) into the new
    folder `output`. fields: of InitRecipe. resume: go on from what an interrupted run has finished."""
    asked = recipe_of(recipe, "init", fields)
    name, target = model_of(model, asked), home(output)
    check_one_process("init")
    check_sizes(asked)
    if not resume:
        check_target(Path(target), *source_folders(asked.init.calibrate_on if asked.init.reads_text else []))
    with work(verbose, f"Reading {name}", heavy=False):
        if not Path(name).is_file():  # a GGUF is hashed: once is enough
            find_model(name)
        with quiet_libraries():
            from rrtc.init.stage import init

            return cast(InitResult, init(name, target, asked, resume=resume))


def plan(model: Place | None, recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any) -> PlanResult:
    """What `init` would make of `model`, from its config.json and, where there are weights, their headers. fields: of
    InitRecipe."""
    from rrtc.init.dry_run import dry_run

    asked = recipe_of(recipe, "init", fields)
    name = model_of(model, asked)
    check_one_process("init")
    check_sizes(asked)
    with work(verbose, f"Reading {name}", heavy=False):
        return cast(PlanResult, dry_run(name, asked))


def uptrain(
    folder: Place, output: Place, recipe: RecipeLike = None, *, resume: bool = False, verbose: bool = False,
    **fields: Any,
) -> UptrainResult:  # fmt: skip
    """Heals the tied model in `folder` by training it to do as its dense original does, into the new folder `output`.
    fields: of UptrainRecipe. resume: go on from the last checkpoint of an interrupted run."""
    asked, source, target = recipe_of(recipe, "uptrain", fields), home(folder), home(output)
    _check_uptrain(source, asked)
    if not resume:
        check_target(Path(target), Path(source), *source_folders(asked.uptrain.data))
    with work(verbose, f"Reading {source}"):
        from rrtc.uptrain.stage import uptrain

        return cast(UptrainResult, uptrain(source, target, asked, resume=resume))


def estimate(folder: Place, recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any) -> EstimateResult:
    """What `uptrain` would take, measured on a few of its steps. fields: of UptrainRecipe."""
    asked, source = recipe_of(recipe, "uptrain", fields), home(folder)
    _check_uptrain(source, asked)
    with work(verbose, f"Reading {source}"):
        from rrtc.uptrain.estimate import estimate

        return cast(EstimateResult, estimate(source, asked))


def evaluate(
    folders: Place | Sequence[Place], output: Place | None = None, against: Place | None = None,
    recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any,
) -> Report:  # fmt: skip
    """Measures the model in one folder, or several side by side, beside the dense original on the same items. fields:
    of EvalRecipe. output: a new folder for the report and its page. against: the dense model, where it has moved."""
    asked = recipe_of(recipe, "eval", fields)
    sources = [home(folder) for folder in ([folders] if isinstance(folders, str | os.PathLike) else folders)]
    if not sources:
        raise WrongUsage("There is no folder to measure.")
    target, dense = (None if place is None else home(place) for place in (output, against))
    if target is not None:
        check_target(Path(target), *map(Path, sources), *source_folders(asked.eval.text))
    for source in sources:
        read_provenance(Path(source))
    with work(verbose, f"Reading {', '.join(sources)}"):
        return measure(sources, asked, dense, target)


def export(
    folder: Place, output: Place, report: Place | None = None, push_to_hub: str | None = None, private: bool = False,
    recipe: RecipeLike = None, *, verbose: bool = False, **fields: Any,
) -> ExportResult:  # fmt: skip
    """Writes the model in `folder` into the new folder `output` in a form that loads without rrtc, and checks it in a
    fresh process. fields: of ExportRecipe. report: what `evaluate` wrote, for the model card. push_to_hub: USER/NAME of
    a new repository to upload it to. private: make that repository a private one."""
    asked, source, target = recipe_of(recipe, "export", fields), home(folder), home(output)
    if private and push_to_hub is None:
        raise WrongUsage("Only what is pushed can be private.", "Add --push-to-hub USER/NAME, or leave out --private.")
    check_one_process("export")
    parse_size(asked.export.max_shard_size)
    calibration = asked.export.calibrate_on if asked.export.quantize != "none" else []
    check_target(Path(target), Path(source), *source_folders(calibration))
    read_provenance(Path(source))
    with work(verbose, f"Reading {source}"):
        from rrtc.export.push import check_push, push
        from rrtc.export.stage import export

        if push_to_hub is not None:
            check_push(push_to_hub, private)
        made = export(source, target, asked, None if report is None else home(report))
        if push_to_hub is not None:
            made = made | {"pushed_to": push(Path(target), push_to_hub, private)}
        return cast(ExportResult, made)


def _check_uptrain(folder: str, recipe: Recipe) -> None:
    check_recipe(recipe.uptrain)
    read_provenance(Path(folder))
