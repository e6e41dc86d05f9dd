"""The house: every module imports, and each room imports only what lies below it."""

import ast
import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rrtc"
MODULES = {".".join(("rrtc", *file.relative_to(ROOT).with_suffix("").parts)): file for file in ROOT.rglob("*.py")}
STAGES = {"init", "uptrain", "eval", "export"}
ABOVE = [
    {"cli", "__main__"},
    {"api", "environment", "runs"},
    STAGES | {"chat", "serve"},
    {"scoring", "text", "generate", "io", "stock"},
]  # and below these all others


def imports_of(name: str) -> dict[str, bool]:
    """What a module imports, wherever in it, by full names (of `from x import y`, x and x.y), and whether it says so
    relatively."""
    found = {}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name: False for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), name.rpartition(".")[0])
            found |= dict.fromkeys((source, *(f"{source}.{alias.name}" for alias in node.names)), node.level > 0)
    return found


def room_of(name: str) -> str:
    return (name.split(".") + [""])[1]


def floor_of(room: str) -> int:
    return next((number for number, rooms in enumerate(ABOVE) if room in rooms), len(ABOVE))


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"rrtc.__main__", "rrtc.vllm.model"}))
def test_it_imports(name):
    importlib.import_module(name.removesuffix(".__init__"))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_it_imports_only_what_lies_below_it(name):
    imported, room = imports_of(name), room_of(name)
    rooms = {room_of(other) for other in imported if other.startswith("rrtc.")}
    assert not [other for other in rooms if floor_of(other) < floor_of(room)]
    if room in STAGES:
        assert not rooms & (STAGES - {room})
    if room == "tying":
        assert rooms <= {"tying"}
        assert {other.split(".")[0] for other in imported} <= {"rrtc", "torch", "scipy", *sys.stdlib_module_names}
    if room == "model":  # ships with an export
        assert all(relative for other, relative in imported.items() if other.split(".")[0] == "rrtc")
        assert rooms <= {"model"}
