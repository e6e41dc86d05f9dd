"""Whole recipes, and sweeps of several."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from rrtc import runs
from rrtc.api.call import Place, RecipeLike, check_one_process, home, recipe_of, work
from rrtc.console import quiet_libraries, said_once
from rrtc.errors import WrongUsage
from rrtc.io.folder import check_target
from rrtc.recipe.schema import Recipe
from rrtc.recipe.settings import sweep_of, with_settings
from rrtc.results import RunPlanResult, RunResult, SweepResult
from rrtc.runs import check_has_weights, check_run, check_sweep, check_texts, run_recipe, sweep_recipes


def run(
    recipe: Place | Mapping[str, Any] | Recipe, output: Place, resume: bool = False, *, tokens: int | str | None = None,
    model: Place | None = None, settings: Mapping[str, Any] | None = None, verbose: bool = False,
) -> RunResult:  # fmt: skip
    """Runs init, uptrain, eval and export of `recipe` into folders of those names in `output`.

    tokens: to train on, instead of the recipe's, as in "2M". model: the dense model, instead of the recipe's.
    settings: other fields, by names such as "init.rank". With `resume`, stages that are complete are not run again,
    init goes on from what it has finished and training from its last checkpoint. Returns the result of each stage by
    its name. Raises RrtcError where `output` is in use, or was made by another recipe.
    """
    asked, target = _recipe_of_run(recipe, tokens, model, settings), Path(home(output))
    check_has_weights(cast(str, asked.model))
    if not resume:
        check_target(target)
    check_run(asked)
    check_texts(target, asked)
    with work(verbose, f"Reading {asked.model}"):
        return cast(RunResult, run_recipe(asked, target))


def sweep(
    recipe: Place | Mapping[str, Any] | Recipe, output: Place, over: Mapping[str, Sequence[Any]], resume: bool = False,
    *, tokens: int | str | None = None, model: Place | None = None, settings: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> SweepResult:  # fmt: skip
    """Runs init and uptrain of `recipe` with every combination of the values in `over`, such as {"init.rank": [0, 64]},
    into folders such as rank=64 in `output`, and measures all of them in one report there.

    The others are as in `run`; with `resume`, values can be added. A run that fails loses none of the others: an
    RrtcError at the end names it. Raises WrongUsage, before any work, for values that no run can have.
    """
    asked, target = _recipe_of_run(recipe, tokens, model, settings), Path(home(output))
    recipes = sweep_of(asked, over, "the sweep")
    check_has_weights(cast(str, asked.model))
    if not resume:
        check_target(target)
    with work(verbose, f"Reading {asked.model}", heavy=False):
        with said_once():
            check_sweep(recipes, target)
        with quiet_libraries():
            return cast(SweepResult, sweep_recipes(recipes, target, all(name.startswith("uptrain.") for name in over)))


def plan_run(
    recipe: Place | Mapping[str, Any] | Recipe, over: Mapping[str, Sequence[Any]] | None = None, *,
    tokens: int | str | None = None, model: Place | None = None, settings: Mapping[str, Any] | None = None,
    verbose: bool = False,
) -> dict[str, RunPlanResult]:  # fmt: skip
    """What `run` would do, or each run of a `sweep`, by its name ("run" where there is one): the whole recipe, the plan
    and the steps of the training. No weights are read."""
    asked = _recipe_of_run(recipe, tokens, model, settings)
    recipes = sweep_of(asked, over, "the sweep") if over else {"run": asked}
    with work(verbose, f"Reading {asked.model}", heavy=False), said_once():
        return {name: runs.plan_run(one) for name, one in recipes.items()}


def _recipe_of_run(
    recipe: RecipeLike, tokens: int | str | None, model: Place | None, settings: Mapping[str, Any] | None
) -> Recipe:
    """The recipe that is to be run. Raises WrongUsage for what it cannot be, and where it names no model."""
    given = {"uptrain.tokens": tokens, "model": None if model is None else os.fspath(model)}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given.keys() & (settings or {}).keys():
        raise WrongUsage(f"{name} is given twice.", "Give it once, by its own option or among the settings.")
    asked = recipe_of(
        with_settings(recipe_of(recipe, "init", {}), given | dict(settings or {}), "the settings"), "init", {}
    )
    check_one_process("run")
    if asked.model is None:
        raise WrongUsage("The recipe does not name a model.", "Name it: --model MODEL, or 'model: …' in the recipe.")
    return asked
