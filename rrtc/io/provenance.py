"""rrtc.yaml: where a folder came from, with which recipe, and what was measured on the way."""

import os
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rrtc import __version__
from rrtc.errors import RrtcError
from rrtc.io.trust import check_folder
from rrtc.plain import read_yaml, to_yaml

PROVENANCE = "rrtc.yaml"
REPLAN = "replan"  # what, in the recipe there, was asked of a model that was tied already: its model and init


class _Said(BaseModel):
    """A part of rrtc.yaml with what rrtc itself goes by; whatever else is in it is only shown or handed on."""

    model_config = ConfigDict(strict=True)


class _Made(_Said):
    stage: str
    path: str = Field(min_length=1)
    made: str


class _Base(_Said):
    uri: str
    path: str = Field(min_length=1)
    relative_path: str = Field(min_length=1)
    sha256: str
    bytes: int


class _Init(_Said):
    shared_init: str | None = None
    calibrate_on: list[str] = []
    text_field: str = ""


class _Uptrain(_Said):
    data: list[str]
    text_field: str
    exits: bool | str = False  # until 0.1 whether, now when they were trained


class _Recipe(_Said):
    model: str | None = None
    init: _Init | None = None
    uptrain: _Uptrain | None = None
    eval: dict[str, Any] | None = None
    export: dict[str, Any] | None = None


class _Provenance(_Made):
    rrtc: str
    versions: dict[str, str]
    base: _Base
    recipe: _Recipe
    measured: dict[str, Any]
    history: list[_Made]


def write_provenance(folder: Path, stage: str, base: dict, recipe: dict, measured: dict, history: list) -> dict:
    """Writes rrtc.yaml into `folder` and returns what it says.

    base: what rrtc.io.source says of the dense model. recipe: the parts of the recipe that were used. measured: figures
    by stage. history: the provenance entries of the folders this one was made from, oldest first.
    """
    import torch
    import transformers

    value = {
        "rrtc": __version__,
        "stage": stage,
        "path": str(Path(folder).absolute()).removesuffix(".partial"),
        "made": datetime.now().astimezone().isoformat(),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        "base": base,
        "recipe": recipe,
        "measured": measured,
        "history": history,
    }
    (Path(folder) / PROVENANCE).write_text(to_yaml(value), encoding="utf8")
    return value


def read_provenance(folder: Path) -> dict:
    """What rrtc.yaml in `folder` says. Raises RrtcError where the folder is not one that rrtc wrote, or is one that
    `check_folder` refuses."""
    folder = Path(folder)
    if not folder.is_dir():
        raise RrtcError(f"There is no folder {folder}.")
    file = folder / PROVENANCE
    if not file.exists():
        raise RrtcError(f"{folder} was not written by rrtc: it has no {PROVENANCE}.", "Make one with 'rrtc init'.")
    check_folder(folder)
    try:
        value = read_yaml(file)
        _Provenance.model_validate(value)
    except (OSError, ValueError) as error:
        reason = _first_fault(error) if isinstance(error, ValidationError) else str(error)
        raise RrtcError(f"The file {file} is damaged: {reason}.") from error
    if "licence" in value["base"]:  # as rrtc 0.1 spelled it
        value["base"].setdefault("license", value["base"].pop("licence"))
    return value


def _first_fault(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'it'}: {first['msg'][0].lower()}{first['msg'][1:]}"


def check_not_quantized(folder: Path, config) -> None:
    """Raises RrtcError where the model in `folder` is quantized, by its transformers `config`, so that it can be used
    but not worked on."""
    if hasattr(config, "quantization_config"):
        raise RrtcError(
            f"The model in {folder} is quantized, and what was rounded away is gone.",
            "Take the folder that it was made from.",
        )


def next_history(provenance: dict) -> list:
    """The history of a folder that is made from the one `provenance` describes."""
    return [*provenance["history"], {key: provenance[key] for key in ("stage", "path", "made")}]


def base_seen_from(target: Path, folder: Path, provenance: dict) -> dict:
    """The base model in the `provenance` of the rrtc folder `folder`, with its paths as seen from a folder `target`."""
    base = provenance["base"]
    beside = os.path.normpath(Path(folder).absolute() / base["relative_path"])
    path = next((path for path in (base["path"], beside) if os.path.exists(path)), base["path"])
    return base | {"path": path, "relative_path": os.path.relpath(path, Path(target).absolute())}


def earlier_stages(folder: Path) -> list[tuple[str, Path]]:
    """(stage, folder) of the rrtc folders that `folder` was made from, oldest first, as far as they still exist."""
    found = []
    for entry in read_provenance(folder)["history"]:
        # Where it was written, or beside this folder if all of them were moved together.
        for path in (Path(entry["path"]), Path(folder).absolute().parent / Path(entry["path"]).name):
            if os.path.exists(path / PROVENANCE) and read_provenance(path)["made"] == entry["made"]:
                found.append((entry["stage"], path))
                break
    return found


def without_places(value):
    """`value`, plain data such as a provenance, with the last part alone of every path that cannot be a name on the
    hub, which has one slash: what others may see of where things are on this machine."""
    if isinstance(value, dict):
        found = {}
        for key, inside in value.items():
            name, copies = without_places(key), 1
            while name in found:  # two files of one name
                copies += 1
                name = f"{without_places(key)} ({copies})"
            found[name] = without_places(inside)
        return found
    if isinstance(value, list):
        return [without_places(inside) for inside in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    """Whether it is an absolute path, or else one without spaces, which sentences have."""
    relative = text.startswith(("./", "../", "~/")) or (text.count("/") > 1 and "://" not in text)
    return os.path.isabs(text) or (relative and not any(map(str.isspace, text)))
