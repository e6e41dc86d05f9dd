"""What rrtc lets a model folder do, wherever it came from: be read, and nothing else.

A folder gets no code of its own run and no file outside it read. Pickles and paths in a weights index are refused where
weights are read (rrtc/io/weights.py); here are the other ways, which lie in links, in config.json, in
tokenizer_config.json and in the text that rrtc.yaml names. Both doors that folders come through, `find_model` and
`read_provenance`, ask `check_folder`.
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.plain import read_json
from rrtc.recipe.section import BUILT_IN_TEXT, OWN_TEXT

CODE_KEYS = ("auto_map", "custom_pipelines")  # of config files: Python files that transformers is to run
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
NO_CODE = "rrtc runs no code from a model folder, only the architectures that transformers has."
# The most that a model of any kind has of what there is a module for, or an entry in a list; by the ends of names, of
# which GGUF has its own.
MOST = {
    re.compile(r"(layers?|blocks?|depth|\.block_count)$"): 1_000,
    re.compile(r"(heads?|experts?|\.head_count|\.expert_count)$"): 10_000,
}
SYSTEM = tuple(map(Path, ("/dev", "/proc", "/sys")))  # their files are no text, and some of them never end


def check_folder(folder: Path) -> None:
    """Raises RrtcError where `folder` would have a file outside it read, or code run that is not installed here.

    What its weights files hold is not looked at.
    """
    folder = Path(folder)
    for file in [*folder.iterdir(), *(folder / "additional_chat_templates").glob("*")]:
        if file.is_file() and leads_outside(file, folder):
            raise RrtcError(
                f"{file} is a link to a file outside its folder, which rrtc does not read.",
                "If you trust it, put the file itself there.",
            )
        if file.exists() and not file.is_file() and not file.is_dir():  # opening a pipe would wait for ever
            raise RrtcError(f"{file} is neither a file nor a folder.")
    if (folder / "adapter_config.json").exists():
        raise RrtcError(
            f"{folder} holds an adapter (adapter_config.json), which can name weights elsewhere.",
            "Merge it into the model first (PEFT's merge_and_unload), or remove it.",
        )
    config, tokenizer = _json(folder / "config.json"), _json(folder / "tokenizer_config.json")
    if "configuration_files" in config:
        raise RrtcError(
            f"The config of {folder} names configs for other versions (configuration_files), which rrtc does not read.",
            "Keep the one that this version of transformers should read as config.json, and remove that key from it.",
        )
    if "transformers_weights" in config:
        raise RrtcError(
            f"The config of {folder} names a weights file of its own (transformers_weights).",
            "Call that file model.safetensors, and remove the name from config.json.",
        )
    for part in _parts(config):
        for key in KERNEL_KEYS:
            if "/" in str(part.get(key, "")):
                raise RrtcError(f"The config of {folder} asks for code from a hub ({key}: {part[key]}).", NO_CODE)
    check_counts(config, folder / "config.json")
    for part in _parts(tokenizer):
        for key, value in part.items():
            for name in value if isinstance(value, list) else [value]:
                if "file" in key and isinstance(name, str) and _is_elsewhere(name, folder):
                    raise RrtcError(f"The tokenizer of {folder} names a file outside it ({key}: {name}).")


def check_counts(config: dict, file: Path) -> None:
    """Raises RrtcError where `config`, read from `file`, has more layers, heads or experts than any model: what makes
    one after the other would not come to an end."""
    for part in _parts(config):
        for key, value in part.items():
            most = next((most for name, most in MOST.items() if name.search(key)), None)
            if most is not None and isinstance(value, int | float) and value > most:
                raise RrtcError(f"{file} says {key}: {value:.4g}, and no model has more than {most:,}.")


def text_of_folder(folder: Path, sources: Sequence[str], by_user: Collection[str], option: str = "") -> list[str]:
    """`sources`, the text that the rrtc.yaml of `folder` names, where it may be read; a note says what is read.

    Text that the user names, which `by_user` is, may be anything. Else a folder could come from anywhere, and have any
    file read or anything fetched. So it is built-in text, or a file or folder on a disk. Raises RrtcError for anything
    else, with a hint to name it, or another text by `option`.
    """
    others = [source for source in sources if source not in (BUILT_IN_TEXT, OWN_TEXT, *by_user)]
    for source in others:
        name = os.path.expanduser(source)
        place = Path(os.path.realpath(name)) if os.path.isfile(name) or os.path.isdir(name) else None
        if place is None or any(place.is_relative_to(root) or root.is_relative_to(place) for root in SYSTEM):
            raise RrtcError(
                f"{folder} says that it was made with the text {source}, which is no file or folder on this machine's "
                "disks, so rrtc does not read it without being asked to.",
                "Name it in a recipe, as when it was made" + (f", or another text: {option} TEXT." if option else "."),
            )
    if others:
        note(f"Reading the text that {folder} was made with: {', '.join(others)}")
    return list(sources)


def _is_elsewhere(name: str, folder: Path) -> bool:
    """Whether a tokenizer's file `name` is there and outside `folder`. Old tokenizers name the places they once had on
    their makers' machines, which are not there."""
    return any(os.path.exists(place) and leads_outside(place, folder) for place in (Path(name), folder / name))


def check_no_own_code(folder: Path, known: bool) -> None:
    """Raises RrtcError where the config in `folder` says that its model needs code of its own. known: whether
    transformers has an architecture of that name; then the code is not needed, and is not run."""
    if not known and "auto_map" in _json(Path(folder) / "config.json"):
        raise RrtcError(f"The model in {folder} needs Python code of its own (auto_map in config.json).", NO_CODE)


def leads_outside(file: Path, folder: Path) -> bool:
    """Whether `file`, which may be a link, is a file outside `folder`. A hub's cache keeps the files of a snapshot
    beside it, for one model or for all of them, and they count as inside."""
    folder, target = folder.resolve(), file.resolve()
    inside = [folder]
    if folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--"):
        blobs = [folder.parents[1] / "blobs", folder.parents[2] / "blobs"]
        inside += blobs
        if folder.is_relative_to(_own_cache()):  # then the user has put these files on another disk
            inside += [place.resolve() for place in blobs]
    return not any(target.is_relative_to(place) for place in inside)


def _own_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE).expanduser().resolve()


def without_code(values: dict) -> dict:
    """The contents of a config file without what asks for Python files, at any depth."""
    return {
        key: without_code(value) if isinstance(value, dict) else value
        for key, value in values.items()
        if key not in CODE_KEYS
    }


def _parts(values: dict) -> Iterator[dict]:
    """`values` and all dictionaries in it: the configs of parts of a model."""
    yield values
    for value in values.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _json(file: Path) -> dict:
    """What a config file holds; {} where there is none, or where it holds no keys, which whoever needs it will say.
    Raises RrtcError where it cannot be read, so that nothing in it goes unseen."""
    if not file.exists():
        return {}
    try:
        values = read_json(file)
    except (OSError, ValueError) as error:
        raise RrtcError(f"The config {file} cannot be read.") from error
    return values if isinstance(values, dict) else {}
