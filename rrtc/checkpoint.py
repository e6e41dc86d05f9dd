"""Model folders on disk, beside their weights: what makes a folder whole, and where it came from.

Everything rrtc writes is built in NAME.partial and renamed to NAME when it is complete, so that a killed run never
leaves something that looks finished. Every folder carries rrtc.yaml: the recipe, the base model it came from, the
versions, and what was measured on the way.
"""

import errno
import json
import os
import shutil
import time
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import yaml

from rrtc import __version__
from rrtc.cache import only_run
from rrtc.errors import RrtcError, WrongUsage
from rrtc.trust import check_folder, without_code
from rrtc.weights import disk_error

PROVENANCE = "rrtc.yaml"
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
LICENCE_FILES = ("LICENSE*", "NOTICE*", "USE_POLICY*")
# What goes along with the weights: the tokenizer, the generation defaults, the licence.
COMPANION_FILES = (
    "tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "additional_chat_templates/*.jinja", "generation_config.json", "spiece.model", *LICENCE_FILES,
)  # fmt: skip
RESUMABLE = {"checkpoints": "uptrain", "work": "init"}  # a folder in NAME.partial: the command that goes on from it


def check_target(target: Path, source: Path | None = None) -> None:
    """Raises RrtcError unless `target` can become a new folder: absent or empty, in a place that can be written to, and
    not inside the folder `source` that it is made from."""
    target = Path(target)
    if source is not None and target.resolve().is_relative_to(Path(source).resolve()):
        raise WrongUsage(f"The output {target} lies in the folder it is made from.", "Name a folder outside it.")
    if target.resolve() == Path.cwd() or target.is_mount():
        raise RrtcError(f"The output folder {target} cannot be replaced by a new one.", "Name a folder inside it.")
    if target.is_symlink():
        raise RrtcError(f"The output {target} is a link.", "Name a folder beside the one that it leads to.")
    if target.is_dir() and any(target.iterdir()):
        raise RrtcError(f"The output folder {target} is not empty.", "Name a new folder: rrtc overwrites nothing.")
    if target.exists() and not target.is_dir():
        raise RrtcError(f"The output {target} is a file.", "Name a new folder.")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise RrtcError(f"The output folder {target} cannot be made: {parent} is a file.")
    if not os.access(parent, os.W_OK):
        raise RrtcError(f"The output folder {target} cannot be made: {parent} is read-only.")


def check_space(target: Path, needed: int) -> None:
    """Raises RrtcError where the disk of `target` has less than `needed` bytes left."""
    parent = Path(target).absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise RrtcError(
            f"This needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free on the disk of {target}."
        )


def partial_of(target: Path) -> Path:
    """Where `target` is built before it is complete."""
    target = Path(target).absolute()
    return target.with_name(target.name + ".partial")


def check_not_interrupted(target: Path, own: str | None = None) -> None:
    """Raises RrtcError where `target`.partial holds what another command than the one whose folder is `own` has left
    to go on from."""
    partial = partial_of(target)
    for folder, command in RESUMABLE.items():
        if folder != own and (partial / folder).exists():
            raise RrtcError(
                f"{partial} holds the {folder} of an interrupted run.",
                f"Continue it with 'rrtc {command} --resume', or delete that folder.",
            )


@contextmanager
def whole_folder(target: Path, keep_partial: bool = False):
    """Yields the folder in which to build `target`; renames it to `target` when the block ends without an error.

    After an error the unfinished folder is removed, unless `keep_partial` is set: for a run that can be resumed, and
    that has made sure itself that it is the `only_run`. Raises RrtcError where another run is writing `target`.
    """
    target, partial = Path(target), partial_of(target)
    with nullcontext() if keep_partial else only_run(target):
        check_target(target)
        if not keep_partial:
            check_not_interrupted(target)
        new_parents = [parent for parent in partial.parents if not parent.exists()]
        try:
            if not keep_partial:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True, exist_ok=True)
            yield partial
            if target.is_dir():
                target.rmdir()
            partial.rename(target)
        except BaseException as error:
            if not keep_partial:
                shutil.rmtree(partial, ignore_errors=True)
            for parent in new_parents:
                with suppress(OSError):  # not empty: something of use stayed
                    parent.rmdir()
            if isinstance(error, OSError) and error.errno in DISK_ERRORS:
                raise disk_error(target, error) from error
            raise


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer, generation defaults and licence files of one model folder into another; no code, and
    nothing that asks for code."""
    for pattern in COMPANION_FILES:
        for file in Path(source).glob(pattern):
            if not file.is_file() or file.suffix == ".py":
                continue
            copy = Path(target) / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
            if file.name == "tokenizer_config.json":
                values = json.loads(file.read_text(encoding="utf8"))
                if values != (kept := without_code(values)):
                    text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
                    (Path(target) / file.name).write_text(text, encoding="utf8")


def write_provenance(folder: Path, stage: str, base: dict, recipe: dict, measured: dict, history: list) -> dict:
    """Writes rrtc.yaml into `folder` and returns what it says.

    base: what rrtc.source says of the dense model. recipe: the parts of the recipe that were used. measured: figures by
    stage. history: the provenance entries of the folders this one was made from, oldest first.
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
    except (yaml.YAMLError, UnicodeDecodeError, LookupError, TypeError, RecursionError) as error:
        raise damaged from error
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(part, dict) for part in parts):
        raise damaged
    return value


def check_not_quantised(folder: Path, config) -> None:
    """Raises RrtcError where the model in `folder` is quantised, by its transformers `config`, so that it can be used
    but not worked on."""
    if hasattr(config, "quantization_config"):
        raise RrtcError(
            f"The model in {folder} is quantised, and what was rounded away is gone.",
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
