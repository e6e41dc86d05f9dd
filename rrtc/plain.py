"""Plain data from files that others wrote: JSON and YAML, within bounds that whatever goes on with it can rely on.

Here are null, booleans, numbers, text, lists and mappings, at most DEEPEST of them inside each other, numbers of at
most DIGITS characters, and every list and mapping in one place: a YAML alias, by which a kilobyte can stand for a
billion strings or a mapping can hold itself, is refused, and so are YAML's other kinds (dates, sets, Python's own).
"""

import json
from pathlib import Path
from typing import Any

import yaml

DEEPEST = 64
DIGITS = 100
LARGEST_YAML = 1_000_000  # bytes; PyYAML reads half of that in a second
LARGEST_JSON = 100_000_000


def read_json(file: Path) -> Any:
    """What the JSON file holds. Raises OSError where it cannot be opened, ValueError where it is not such data."""
    return from_json(_text(file, LARGEST_JSON))


def read_yaml(file: Path) -> Any:
    """What the YAML file holds. Raises OSError where it cannot be opened, ValueError where it is not such data."""
    return from_yaml(_text(file, LARGEST_YAML))


def from_json(text: str) -> Any:
    """What the JSON `text` says. Raises ValueError where it is not such data."""
    try:
        return _not_too_deep(json.loads(text, parse_int=lambda digits: int(_short(digits))))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def from_yaml(text: str) -> Any:
    """What the YAML `text` says. Raises ValueError where it is not such data; its text says why, on one line."""
    try:
        return _not_too_deep(yaml.load(text, _Loader))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except (yaml.YAMLError, ArithmeticError, LookupError) as error:  # !!int "" is an IndexError
        raise ValueError(" ".join(str(error).split())) from error


def to_yaml(value: Any) -> str:
    """`value`, plain data, as YAML that `from_yaml` reads: in the order it has, and without aliases."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "aliases are not read", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:  # the first would be lost
                raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is there twice", key.start_mark)
            seen.add((key.tag, str(key.value)))
        return super().construct_mapping(node, deep)

    def construct_scalar(self, node):
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        return _short(super().construct_scalar(node)) if number else super().construct_scalar(node)


_KINDS = {f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _KINDS or tag is None
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in forms if tag in _KINDS]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _Dumper(yaml.SafeDumper):
    def ignore_aliases(self, data):
        return True


def _text(file: Path, largest: int) -> str:
    with open(file, "rb") as stream:
        content = stream.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"it is larger than {largest} bytes")
    return content.decode("utf8")


def _short(number: str) -> str:
    if len(number) > DIGITS:
        raise ValueError(f"it has a number of {len(number)} characters")
    return number


def _not_too_deep(value: Any, depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    for inside in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _not_too_deep(inside, depth + 1)
    return value
