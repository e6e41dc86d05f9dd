"""Command-line flags, made from the fields of the recipe."""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Annotated, Any

import typer

from rrtc.recipe.schema import load_recipe, with_flags
from rrtc.recipe.section import Section

RecipeFile = Annotated[
    str | None, typer.Option("--recipe", metavar="FILE", help="Recipe to start from; flags given here override it.")
]


def with_fields(*sections: tuple[str, type[Section]]) -> Callable:
    """Gives a command one flag for each field of the recipe's `sections`, and passes them on as one `recipe`."""

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        flags, owners = [], {}
        for part, schema in sections:
            for name, field in schema.model_fields.items():
                owners[name] = part
                flags.append(_flag(name, field, part))
        kept = [p for name, p in signature.parameters.items() if name != "recipe"]
        kept.append(
            inspect.Parameter("recipe_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RecipeFile)
        )

        @functools.wraps(command)
        def run(*, recipe_file: str | None, **given: Any):
            recipe = load_recipe(recipe_file)
            for part, _ in sections:
                values = {name: given.pop(name) for name, owner in owners.items() if owner == part}
                recipe = recipe.model_copy(update={part: with_flags(getattr(recipe, part), values)})
            return command(recipe=recipe, **given)

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in kept] + flags
        run.__signature__ = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _flag(name: str, field: Any, part: str) -> inspect.Parameter:
    dashed = name.replace("_", "-")
    kind, default = field.annotation, field.default
    declared = f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}"
    if isinstance(kind, types.UnionType):
        kind = str  # such as rank, which the recipe itself parses
    shown = ", ".join(map(str, default)) if isinstance(default, list) else default
    if isinstance(default, dict):
        kind, shown = list[str], ", ".join(f"{key}={value:g}" for key, value in default.items())
    text = field.description if shown in (None, "") else rf"{field.description} \[default: {shown}]"
    shape = "NAME=NUMBER" if isinstance(default, dict) else None
    option = typer.Option(declared, help=text, metavar=shape, show_default=False, rich_help_panel=f"Recipe: {part}")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
