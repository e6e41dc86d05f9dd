"""The licence of the base model, as far as its own files state it."""

import re
from pathlib import Path

from rrtc.trust import leads_outside

# Words that open the well-known licence texts, and the hub's names of those licences.
KNOWN_TEXTS = {
    r"apache license\s+version 2\.0": "apache-2.0",
    r"mit license|permission is hereby granted, free of charge": "mit",
    r"gemma terms of use": "gemma",
}


def find_licence(folder: Path, base: Path | None) -> dict[str, str]:
    """The licence as model card metadata (`license`, and `license_link` where it has no name); {} where none is stated.

    Looked for in the model card, the GGUF header and the licence file, first of the model in `folder`, then of its
    base (a folder or a GGUF file; None or absent where it is not known).
    """
    for place in (Path(folder), base):
        if place is None or not place.exists():
            continue
        inside = place if place.is_dir() else place.parent
        name = _in_card(inside / "README.md") or (_in_gguf(place) if place.is_file() else None)
        if name:
            return {"license": name}
        for file in sorted(file for file in inside.glob("LICENSE*") if not leads_outside(file, inside)):
            name = _of_text(file.read_text(encoding="utf8", errors="replace"))
            return {"license": name} if name else {"license": "other", "license_link": file.name}
    return {}


def _in_card(readme: Path) -> str | None:
    from huggingface_hub import ModelCard

    if not readme.is_file() or leads_outside(readme, readme.parent):
        return None
    try:
        stated = ModelCard.load(readme, ignore_metadata_errors=True).data.license
    except Exception:  # a README that is not a model card: any kind of broken YAML
        return None
    return stated if isinstance(stated, str) else None


def _of_text(text: str) -> str | None:
    start = " ".join(text[:3000].lower().split())
    llama = re.search(r"llama (\d(?:\.\d)?) community licen[sc]e", start)
    if llama:
        return f"llama{llama[1]}"
    return next((name for words, name in KNOWN_TEXTS.items() if re.search(words, start)), None)


def _in_gguf(file: Path) -> str | None:
    """The value of general.license in a GGUF file."""
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("general.license")
    return field.contents() if field is not None else None
