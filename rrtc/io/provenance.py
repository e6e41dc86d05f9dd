"""rrtc.yaml: where a folder came from, with which recipe, and what was measured on the way."""

import os
import time
from pathlib import Path

import yaml

from rrtc import __version__
from rrtc.errors import RrtcError
from rrtc.io.trust import check_folder

PROVENANCE = "rrtc.yaml"


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
        "made": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"torch": str(torch.__version__), "transformers": transformers.__version__},
        "base": base,
        "recipe": recipe,
        "measured": measured,
        "history": history,
    }
    (Path(folder) / PROVENANCE).write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf8")
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
    damaged = RrtcError(f"The file {file} is damaged.")
    try:
        value = yaml.safe_load(file.read_text(encoding="utf8"))
        texts = [entry[key] for entry in (value, *value["history"]) for key in ("stage", "path", "made")]
        texts += [value["base"][key] for key in ("uri", "path", "relative_path", "sha256")]
        parts = [value["recipe"], value["measured"]]
        if "licence" in value["base"]:  # as rrtc 0.1 spelled it
            value["base"].setdefault("license", value["base"].pop("licence"))
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, RecursionError) as error:
        raise damaged from error
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(part, dict) for part in parts):
        raise damaged
    return value


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
    path = next((path for path in (base["path"], beside) if Path(path).exists()), base["path"])
    return base | {"path": path, "relative_path": os.path.relpath(path, Path(target).absolute())}


def earlier_stages(folder: Path) -> list[tuple[str, Path]]:
    """(stage, folder) of the rrtc folders that `folder` was made from, oldest first, as far as they still exist."""
    found = []
    for entry in read_provenance(folder)["history"]:
        # Where it was written, or beside this folder if all of them were moved together.
        for path in (Path(entry["path"]), Path(folder).absolute().parent / Path(entry["path"]).name):
            if (path / PROVENANCE).exists() and read_provenance(path)["made"] == entry["made"]:
                found.append((entry["stage"], path))
                break
    return found


def without_places(value):
    """`value`, plain data such as a provenance, with the last part alone of every absolute path: what others may see of
    where things are on this machine."""
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
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
