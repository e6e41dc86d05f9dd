"""Single fields of a recipe that are set by name, as in init.rank=64, and several values of one, which make a sweep."""

import itertools
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rrtc.errors import WrongUsage
from rrtc.plain import from_yaml
from rrtc.recipe.schema import Recipe, checked

SWEPT = ("init", "uptrain")  # whose fields make another model


def parse_settings(texts: Iterable[str]) -> dict[str, Any]:
    """Values by field of texts FIELD=VALUE; a field that is there several times has a list of them, as flags do.

    Raises WrongUsage for what is no such text.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        name, value = _split(text, "init.rank=64")
        found.setdefault(name, []).append(value)
    return {name: values[0] if len(values) == 1 else values for name, values in found.items()}


def parse_sweep(texts: Iterable[str]) -> dict[str, list[str]]:
    """The values of each field of texts FIELD=VALUE,VALUE,…; where a value holds commas, they are divided by ;.

    Raises WrongUsage for what is no such text, and for a field that is there twice.
    """
    found: dict[str, list[str]] = {}
    for text in texts:
        name, values = _split(text, "init.rank=0,64,128")
        if name in found:
            raise WrongUsage(f"The sweep names {name} twice.", "Give all its values at once.")
        found[name] = [value.strip() for value in values.split(";" if ";" in values else ",")]
    return found


def with_settings(recipe: Recipe, settings: Mapping[str, Any], source: str) -> Recipe:
    """`recipe` with other values of some fields, by their names, such as init.rank or model. A text is read as a flag's
    value is; none takes away what may be left out, and [ or { begins YAML.

    Raises WrongUsage, which names their `source`, for a field that there is not, with the nearest that there is, and
    for a value of the wrong kind.
    """
    if not settings:
        return recipe
    values = recipe.model_dump()
    for name, value in settings.items():
        part, _, field = name.partition(".")
        section: Any = Recipe.model_fields[part].annotation if field and part in Recipe.model_fields else Recipe
        if not hasattr(section, "model_fields"):  # model.x
            raise WrongUsage(f"There is no key '{name}' in a recipe ({source}).", f"Did you mean '{part}'?")
        known = section.model_fields.get(field or part)
        read = _from_text(value, known.annotation, name) if known and isinstance(value, str) else value
        if field:
            values.setdefault(part, {})[field] = read
        else:
            values[part] = read
    return checked(Recipe, values, source)


def sweep_of(recipe: Recipe, sweep: Mapping[str, Sequence[Any]], source: str) -> dict[str, Recipe]:
    """The recipes of all combinations of the values in `sweep`, by names that can be those of folders, such as rank=64
    or loops=2,rank=64. Raises WrongUsage as `with_settings` does, and for a sweep of nothing, or of what one report
    cannot compare."""
    if not sweep:
        raise WrongUsage("This is a sweep of nothing.", "Name a field and its values, as in init.rank=0,64,128.")
    fields = [name.partition(".")[2] for name in sweep]
    for name, values in sweep.items():
        if name.partition(".")[0] in Recipe.model_fields and name.partition(".")[0] not in SWEPT:
            hint = "Runs of different models, or of different measures, are runs of their own."
            raise WrongUsage(f"A sweep is over fields of init and uptrain, and {name} is none.", hint)
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise WrongUsage(f"The sweep of {name} is over {values!r}, which is no list.", "Write it as [0, 64, 128].")
        if len(values) < 1 or "" in values:
            raise WrongUsage(f"The sweep of {name} lacks a value.", "Write it as in init.rank=0,64,128.")
    short = [name if fields.count(field) > 1 else field for name, field in zip(sweep, fields, strict=True)]
    found: dict[str, Recipe] = {}
    for combination in itertools.product(*sweep.values()):
        said = ",".join(f"{name}={value}" for name, value in zip(short, combination, strict=True))
        run = re.sub(r"[^\w.,=+-]+", "-", said)
        if run in found:
            raise WrongUsage(f"The sweep has two runs that are called {run}.", "Name each value once.")
        found[run] = with_settings(recipe, dict(zip(sweep, combination, strict=True)), source)
    return found


def _split(text: str, example: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise WrongUsage(f"'{text}' sets no field.", f"Write it as in {example}.")
    return name.strip(), value.strip()


def _from_text(text: str, annotation: Any, name: str) -> Any:
    """What `text` stands for in a field of that type; a section's own validators and pydantic read the rest."""
    kinds = typing.get_args(annotation)
    if text == "none" and type(None) in kinds:
        return None
    if annotation is str or annotation == str | None:  # which may begin with a bracket
        return text
    if text.startswith(("[", "{")):
        try:
            return from_yaml(text)
        except ValueError as error:
            raise WrongUsage(f"The value of {name} is not valid YAML: {error}.") from error
    if typing.get_origin(annotation) is list and kinds[0] is not str:
        return text.split(",")
    return [text] if typing.get_origin(annotation) in (list, dict) else text
