"""What rrtc lets a model folder do, wherever it came from: be read, and nothing else.

A folder gets no code of its own run and no file outside it read. Pickles and paths in a weights index are refused where
weights are read (rrtc/io/weights.py); here are the other ways, which lie in links, in config.json and in
tokenizer_config.json. Both doors that folders come through, `find_model` and `read_provenance`, ask `check_folder`.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from rrtc.errors import RrtcError

CODE_KEYS = ("auto_map", "custom_pipelines")  # of config files: Python files that transformers is to run
KERNEL_KEYS = ("attn_implementation", "_attn_implementation", "experts_implementation")
NO_CODE = "rrtc runs no code from a model folder, only the architectures that transformers has."


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
    for key, value in tokenizer.items():
        # Old tokenizers name the places they once had on their makers' machines, which are not there.
        if key.endswith("_file") and isinstance(value, str) and os.path.exists(value):
            raise RrtcError(f"The tokenizer of {folder} names a file outside it ({key}: {value}).")


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
        inside += [folder.parents[1] / "blobs", folder.parents[2] / "blobs"]
    return not any(target.is_relative_to(place) for place in inside)


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
    """What a config file holds; {} where there is none, or where it is damaged, which whoever needs it will say."""
    try:
        values = json.loads(file.read_text(encoding="utf8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
