"""A recipe as a file to start from: every field with its default and a line of help; and the JSON Schema of recipes, by
which editors complete and check them."""

import json
import textwrap
import typing
from typing import Any, Literal

from rrtc.recipe.schema import Recipe
from rrtc.recipe.section import Section

WIDTH = 100
HEAD = """\
# A recipe of rrtc with the defaults of every field: keep what you change, and delete the rest.
# Run it with: rrtc run recipe.yaml -o runs/mine
# To have an editor complete and check it: rrtc recipe --schema > recipe.schema.json, and this as the first line:
# # yaml-language-server: $schema=recipe.schema.json
"""


def commented_recipe() -> str:
    """The default recipe as YAML with comments. It loads as `Recipe()`."""
    return HEAD + "\n" + "\n".join(_lines(Recipe(), "")) + "\n"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of recipe files."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema | {"title": "A recipe of rrtc"}


def _lines(section: Section, indent: str) -> typing.Iterator[str]:
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield f"\n{indent}{name}:"
            yield from _lines(value, indent + "  ")
        else:
            comment = f"{field.description}{choices_of(field.annotation)}"
            for line in textwrap.wrap(comment, WIDTH - len(indent), break_on_hyphens=False):
                yield f"{indent}# {line}"
            yield f"{indent}{name}: {json.dumps(value, ensure_ascii=False)}"  # JSON is YAML


def choices_of(annotation: Any) -> str:
    """A sentence, after a space, on the values of a field that has a fixed set of them; otherwise nothing."""
    kinds = [kind for kind in (annotation, *typing.get_args(annotation)) if typing.get_origin(kind) is Literal]
    return f" One of: {', '.join(map(str, typing.get_args(kinds[0])))}." if kinds else ""
