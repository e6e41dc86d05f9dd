"""The licence of the base model, as far as its own files state it, and whether it lets a changed model be passed on."""

import re
from pathlib import Path

from rrtc.trust import leads_outside

# Words that open the well-known licence texts, and the hub's names of those licences.
KNOWN_TEXTS = {
    r"apache license\s+version 2\.0": "apache-2.0",
    r"mit license|permission is hereby granted, free of charge": "mit",
    r"gemma terms of use": "gemma",
    r"attribution-noderivatives 4\.0": "cc-by-nd-4.0",
    r"attribution-noncommercial-noderivatives 4\.0": "cc-by-nc-nd-4.0",
}


def find_licence(folder: Path, base: Path | None) -> dict[str, str]:
    """The licence as model card metadata (`license`; where the hub has no name for it, that is "other", with
    `license_name` and `license_link` as far as there are such); {} where none is stated.

    Looked for in the model cards, the GGUF header and the licence files, in this order, each time first of the model in
    `folder`, then of its base (a folder or a GGUF file; None or absent where it is not known): what a card says is the
    licence of the model, and a file may be that of anything beside it. Files that differ make it "other".
    """
    places = [place for place in (Path(folder), base) if place is not None and place.exists()]
    folders = [place if place.is_dir() else place.parent for place in places]
    for inside in folders:
        if stated := _in_card(inside / "README.md"):
            return stated
    for place in places:
        if place.is_file() and (name := _in_gguf(place)):
            return {"license": name}
    for inside in folders:
        files = sorted(file for file in inside.glob("LICENSE*") if file.is_file() and not leads_outside(file, inside))
        names = {_of_text(file.read_text(encoding="utf8", errors="replace")) for file in files}
        if files:
            name = names.pop() if len(names) == 1 else None
            return {"license": name} if name else {"license": "other", "license_link": files[0].name}
    return {}


def forbids_derivatives(licence: dict[str, str]) -> bool:
    """Whether the licence that `find_licence` has found lets nobody pass on a changed model, going by its name: "ND" is
    how Creative Commons and those who follow it call that."""
    words = re.split(r"\W+|_", f"{licence.get('license')} {licence.get('license_name')}".lower())
    return "nd" in words or "noderivatives" in words


def _in_card(readme: Path) -> dict[str, str]:
    from huggingface_hub import ModelCard

    if not readme.is_file() or leads_outside(readme, readme.parent):
        return {}
    try:
        data = ModelCard.load(readme, ignore_metadata_errors=True).data
    except Exception:  # a README that is not a model card: any kind of broken YAML
        return {}
    stated = {key: data.get(key) for key in ("license", "license_name", "license_link")}
    stated = {key: value for key, value in stated.items() if isinstance(value, str)}
    return stated if "license" in stated else {}


def _of_text(text: str) -> str | None:
    start = " ".join(text[:3000].lower().split())
    llama = re.search(r"llama (\d(?:\.\d)?) community licen[sc]e", start)
    if llama:
        return f"llama{llama[1]}"
    return next((name for words, name in KNOWN_TEXTS.items() if re.search(words, start)), None)


def _in_gguf(file: Path) -> str | None:
    """The value of general.license in a file, where that is a GGUF file and has it."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).fields.get("general.license")
    except (OSError, ValueError, LookupError):  # no GGUF file, or half of one
        return None
    return field.contents() if field is not None else None
