"""Command-line flags, made from the fields of the recipe."""

import functools
import inspect
import os
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer
from pydantic import BeforeValidator

from rrtc.recipe.commented import choices_of
from rrtc.recipe.schema import load_recipe, with_flags
from rrtc.recipe.section import Section

# The fields that most runs set. They stand beside --output; the other fields of the section come after them.
COMMON = {
    "init": ("size", "quantize", "kv_budget", "loops", "sharing", "keep", "rank", "calibrate_on"),
    "uptrain": ("data", "tokens", "context", "learning_rate", "batch_size", "micro_batch", "losses"),
    "eval": ("text", "tokens", "tasks", "baselines"),
    "export": ("format", "dtype", "quantize"),
}
# What the help calls a value. A field that is not here has the word of its type.
WORDS = {
    "budget": "SHARE", "kv_budget": "SHARE", "kv_context": "TOKENS", "kv_window": "TOKENS", "kv_sinks": "TOKENS",
    "kv_kinds": "KIND,KIND", "kv_grain": "WHAT", "kv_choice": "HOW", "kv_lookups": "SHARE", "size": "SHARE|SIZE",
    "max_shard_size": "SIZE", "sharing": "PATTERN", "rank": "N|GROUP=N,…", "shared_init": "START",
    "lora_init": "START", "dtype": "DTYPE", "precision": "DTYPE", "norms": "HOW", "calibrate_on": "TEXT",
    "data": "TEXT", "text": "TEXT", "text_field": "NAME", "tokens": "TOKENS", "calibrate_tokens": "TOKENS",
    "calibrate_context": "TOKENS", "measure_tokens": "TOKENS", "context": "TOKENS",
    "sample_tokens": "TOKENS", "speed_context": "TOKENS",
    "passkey_lengths": "TOKENS", "data_weights": "W,W,…", "learning_rate": "RATE", "losses": "LOSS=WEIGHT",
    "shared_lr_scale": "FACTOR|visits", "teacher": "MODEL", "teacher_cache": "FOLDER", "warmup": "SHARE",
    "decay": "SHARE", "optimizer": "NAME", "schedule": "NAME", "report_to": "TRACKER", "tasks": "TASK",
    "tasks_dir": "FOLDER", "tasks_data": "FOLDER", "prompt": "TEXT", "format": "FORMAT", "quantize": "BITS",
}  # fmt: skip
TYPE_WORDS = {int: "N", float: "NUMBER", str: "TEXT"}

RecipeFile = Annotated[
    str | None,
    typer.Option("--recipe", metavar="FILE", help="Recipe to start from; flags given here override it."),
]


def with_fields(part: str, schema: type[Section]) -> Callable:
    """Gives a command one flag for each field of the section `part` of the recipe, and passes them on as one `recipe`.

    The flags of COMMON fields follow the command's own --output, and all others come last, in a panel of their own.
    """

    def decorate(command: Callable) -> Callable:
        signature = inspect.signature(command)
        fields = schema.model_fields
        common = [_flag(name, fields[name], None) for name in COMMON[part]]
        others = [_flag(name, fields[name], f"More: {part}") for name in fields if name not in COMMON[part]]
        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for n, p in signature.parameters.items() if n != "recipe"]
        after = 1 + next(place for place, parameter in enumerate(own) if parameter.name == "output")
        file = inspect.Parameter("recipe_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RecipeFile)
        parameters = [*own[:after], *common, file, *own[after:], *others]

        @functools.wraps(command)
        def run(*, recipe_file: str | None, **given: Any):
            recipe = load_recipe(recipe_file and os.path.expanduser(recipe_file))
            flags = with_flags(getattr(recipe, part), {name: given.pop(name) for name in fields}, "the command line")
            return command(recipe=recipe.model_copy(update={part: flags}), **given)

        run.__signature__ = signature.replace(parameters=parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def _flag(name: str, field: Any, panel: str | None) -> inspect.Parameter:
    dashed, default = name.replace("_", "-"), field.default
    kind, word = _value(field)
    shown = ", ".join(map(str, default)) if isinstance(default, list) else default
    if isinstance(default, dict):
        shown = ", ".join(f"{key}={value:g}" for key, value in default.items())
    elif isinstance(default, bool):
        shown = "on" if default else "off"
    text = field.description + choices_of(field.annotation)
    if typing.get_origin(kind) is list:
        text += " Can be given several times."
    option = typer.Option(
        f"--{dashed}/--no-{dashed}" if kind is bool else f"--{dashed}",
        help=text if shown in (None, "") else f"{text} [default: {shown}]",
        metavar=None if kind is bool else WORDS.get(name, word),
        show_default=False,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )


def _value(field: Any) -> tuple[type, str]:
    """(the type that typer reads, the word for it) of a recipe's field."""
    if any(isinstance(one, BeforeValidator) for one in field.metadata):
        return str, "TEXT"
    kinds = typing.get_args(field.annotation)
    optional = type(None) in kinds
    kind = kinds[0] if optional and len(kinds) == 2 else field.annotation
    if typing.get_origin(kind) is Literal:
        return kind, "CHOICE"
    if typing.get_origin(kind) is dict:
        return list[str], "NAME=NUMBER"
    if typing.get_origin(kind) is list and not optional and typing.get_args(kind)[0] in TYPE_WORDS:
        return kind, TYPE_WORDS[typing.get_args(kind)[0]]
    if kind in (bool, int, float):
        return kind, TYPE_WORDS.get(kind, "")
    return str, "TEXT"  # text, and what the recipe itself parses, such as rank
