"""What all calls have in common: where they may begin, what their keywords may say, and what is shown meanwhile."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar, cast

from rrtc.console import note, notes_shown, quiet_downloads, quiet_libraries
from rrtc.errors import WrongUsage
from rrtc.recipe.schema import Recipe, checked, load_recipe, with_flags
from rrtc.recipe.section import Section
from rrtc.runs import STAGES

# Fields of the recipe that name places, or may.
PLACES = ("model", "calibrate_on", "data", "teacher", "teacher_cache", "text", "tasks_dir", "tasks_data")

Place = str | os.PathLike[str]
RecipeLike = Place | Mapping[str, Any] | Recipe | None
AnySection = TypeVar("AnySection", bound=Section)


@contextmanager
def work(verbose: bool, about: str, heavy: bool = True) -> Iterator[None]:
    """Shows notes and progress in the block if `verbose`, the first one at once, because imports take seconds; and, if
    what follows is `heavy`, keeps transformers silent."""
    with notes_shown(verbose), nullcontext() if verbose else quiet_downloads():
        note(about)
        with quiet_libraries() if heavy else nullcontext():
            yield


def recipe_of(recipe: RecipeLike, part: str, fields: Mapping[str, Any]) -> Recipe:
    """`recipe` with `fields` in its section `part`, and the user's home in place of ~. Raises WrongUsage for what a
    recipe cannot be."""
    if isinstance(recipe, Mapping):
        recipe = checked(Recipe, dict(recipe), "the recipe")
    elif not isinstance(recipe, Recipe):
        recipe = load_recipe(None if recipe is None else home(recipe))
    given = {name: _home_in(name, value) for name, value in fields.items()}
    sections = {stage: _at_home(getattr(recipe, stage)) for stage in STAGES}
    sections[part] = with_flags(sections[part], given, "the call")
    return _at_home(recipe).model_copy(update=sections)


def home(place: Place) -> str:
    return os.path.expanduser(os.fspath(place))


def _home_in(field: str, value: Any) -> Any:
    """`value` of a recipe's `field`, with the user's home in place of ~ if it is a place, or several."""
    if field not in PLACES:
        return value
    if isinstance(value, list | tuple):
        return [_home_in(field, one) for one in value]
    return home(value) if isinstance(value, str | os.PathLike) else value


def _at_home(section: AnySection) -> AnySection:
    places = [field for field in PLACES if field in type(section).model_fields]
    return section.model_copy(update={field: _home_in(field, getattr(section, field)) for field in places})


def model_of(model: Place | None, recipe: Recipe) -> str:
    if model is None and recipe.model is None:
        raise WrongUsage("There is no dense model.", "Name it, here or in the recipe (model).")
    return home(cast(Place, recipe.model if model is None else model))


def check_one_process(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WrongUsage(f"'rrtc {command}' runs in one process.", "'rrtc uptrain' and 'rrtc eval' are for torchrun.")
