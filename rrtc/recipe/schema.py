"""The recipe: every choice a run makes, in one typed schema.

A recipe is a YAML file with up to five parts (`model`, `init`, `uptrain`, `eval`, `export`). Every command-line flag is
a field of one of them and takes its help from here, so that a file and a command line can say the same things.
An unknown key is an error that names the nearest valid one.
"""

import re
from pathlib import Path
from typing import Any, TypeVar

from pydantic import Field, ValidationError

from rrtc.errors import WrongUsage, nearest
from rrtc.recipe.eval import EvalRecipe
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.section import Section
from rrtc.recipe.uptrain import UptrainRecipe

AnySection = TypeVar("AnySection", bound=Section)

# The recipes that come with rrtc: inside the package in a wheel (pyproject.toml puts them there), else in the checkout.
SHIPPED = [Path(__file__).parents[1] / "recipes", Path(__file__).parents[2] / "recipes"]
PAPER = "paper"  # the folder in it with the paper's models


class Recipe(Section):
    """One run from a dense model to an exported one."""

    model: str | None = Field(
        None, description="The dense model: a folder, a hub id, a .gguf file or package://import_name/path/in/package."
    )
    init: InitRecipe = InitRecipe()
    uptrain: UptrainRecipe = UptrainRecipe()
    eval: EvalRecipe = EvalRecipe()
    export: ExportRecipe = ExportRecipe()


def load_recipe(path: str | None) -> Recipe:
    """The recipe in the YAML file `path`; the defaults where `path` is None. A bare name, where no file has it, is that
    of a recipe that comes with rrtc, such as `quickstart`. A model beside such a recipe is found from anywhere.

    Raises WrongUsage for a missing file, broken YAML, an unknown key or a value of the wrong kind.
    """
    if path is None:
        return Recipe()
    from rrtc.plain import read_yaml

    file = _file_of(path)
    try:
        values = read_yaml(file)
    except (OSError, UnicodeDecodeError) as error:
        hint = _shipped_names(path) if isinstance(error, FileNotFoundError) else ""
        sentence = f"The recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}."
        raise WrongUsage(sentence, hint) from error
    except ValueError as error:
        raise WrongUsage(f"The recipe {path} is not valid YAML: {error}.") from error
    if values is not None and not isinstance(values, dict):
        raise WrongUsage(f"The recipe {path} holds no keys.", "Start from one of the files in recipes/.")
    given = {part: value for part, value in (values or {}).items() if value is not None}  # a heading with nothing below
    recipe = checked(Recipe, given, path)
    return recipe.model_copy(update={"model": _beside(file, recipe.model)})


def _file_of(path: str) -> Path:
    """The file `path`, or the shipped recipe of that bare name where there is none."""
    folders = [place for folder in SHIPPED for place in (folder, folder / PAPER)]
    shipped = [folder / f"{path}.yaml" for folder in folders] if re.fullmatch(r"[\w.-]+", path) else []
    return next((file for file in [Path(path), *shipped] if file.is_file()), Path(path))


def _shipped_names(path: str) -> str:
    """A hint for a recipe that is not there: those that rrtc brings."""
    names = {file.stem for folder in SHIPPED for file in [*folder.glob("*.yaml"), *folder.glob(f"{PAPER}/*.yaml")]}
    return f"rrtc brings these recipes with it: {', '.join(sorted(names))}."


def _beside(file: Path, model: str | None) -> str | None:
    """`model`, or where it is if it comes with rrtc as the recipe `file` does."""
    for folder in SHIPPED if model is not None else ():
        if file.resolve().is_relative_to(folder) and (folder.parent / str(model)).is_dir():
            return str(folder.parent / str(model))
    return model


def with_flags(section: AnySection, flags: dict[str, Any], source: str) -> AnySection:
    """`section` with the values given in `source`, such as "the command line", in place of its own, where they are not
    None."""
    given = {name: value for name, value in flags.items() if value is not None}
    return checked(type(section), section.model_dump() | given, source) if given else section


def checked(schema: type[AnySection], values: dict, source: str) -> AnySection:
    """The section with these `values`. Raises WrongUsage, naming their `source`, for a value of the wrong kind, and
    for a key that the section does not have, with the nearest that it has."""
    try:
        return schema.model_validate(values)
    except UnicodeEncodeError as error:  # half a surrogate pair, where there is a choice of words or numbers
        raise WrongUsage(f"In {source}, a value holds what is no text.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            hint = nearest(where[-1], _fields_at(schema, where[:-1]))
            raise WrongUsage(f"There is no key '{'.'.join(where)}' in a recipe ({source}).", hint) from error
        message = re.sub("^(Input|List) should", "it should", first["msg"].removeprefix("Value error, "))
        name = "'" + ".".join(where) + "'" if where else "a value"
        hint = ""
        if first["type"] == "literal_error":
            hint = nearest(
                str(first["input"]), first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            )
        elif first["type"] == "model_type":
            message = "it should hold keys of its own"
        sentence = f"In {source}, {name} is wrong: {message}"
        raise WrongUsage(sentence if sentence.endswith((".", "?")) else sentence + ".", hint) from error


def _fields_at(schema: type[Section], path: list[str]) -> list[str]:
    section: Any = schema
    for part in path:
        section = section.model_fields[part].annotation
    return list(section.model_fields)
