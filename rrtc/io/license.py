"""The license of a model, as far as its own files state it, and whether it lets a changed model be passed on."""

import re
from pathlib import Path

from rrtc.io.trust import leads_outside
from rrtc.plain import from_yaml

KEYS = ("license", "license_name", "license_link")  # of a model card's metadata
# Words that open the well-known license texts, and the hub's names of those licenses.
KNOWN_TEXTS = {
    r"apache license\s+version 2\.0": "apache-2.0",
    r"mit license|permission is hereby granted, free of charge": "mit",
    r"gemma terms of use": "gemma",
    r"attribution-noderivatives 4\.0": "cc-by-nd-4.0",
    r"attribution-noncommercial-noderivatives 4\.0": "cc-by-nc-nd-4.0",
}


def find_license(place: Path) -> dict[str, str]:
    """The license of the dense model at `place`, a folder or a GGUF file, as model card metadata: `license`, and where
    the hub has no name for it, so that this is "other", `license_name` and `license_link` as far as there are such. {}
    where none is stated.

    Looked for in the model card, the GGUF header and the license files, in this order: what a card says is the license
    of the model, and a file may be that of anything beside it. Files that differ make it "other".
    """
    place = Path(place)
    if place.is_dir():
        return _in_card(place / "README.md") or _in_files(place)
    header = _in_gguf(place)
    return _in_card(place.with_name("README.md")) or ({"license": header} if header else _in_files(place.parent))


def license_of(folder: Path, base: dict) -> dict[str, str]:
    """The same of the compressed model in `folder`: what its own card says, or else what was found of the dense model
    when it was compressed, which `base` (of its rrtc.yaml) has under `license`, or else its own license files. Nothing
    outside `folder` is read: its rrtc.yaml can name any place as that of the dense model."""
    found = base.get("license")
    known = {key: found[key] for key in KEYS if isinstance(found.get(key), str)} if isinstance(found, dict) else {}
    return _in_card(Path(folder) / "README.md") or (known if "license" in known else _in_files(Path(folder)))


def forbids_derivatives(license: dict[str, str]) -> bool:
    """Whether the license that `find_license` has found lets nobody pass on a changed model, going by its name: "ND" is
    how Creative Commons and those who follow it call that."""
    words = re.split(r"\W+|_", f"{license.get('license')} {license.get('license_name')}".lower())
    return "nd" in words or "noderivatives" in words


def _in_files(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.glob("LICENSE*") if file.is_file() and not leads_outside(file, folder))
    names = {_of_text(_start_of(file, 3000)) for file in files}
    if not files:
        return {}
    name = names.pop() if len(names) == 1 else None
    return {"license": name} if name else {"license": "other", "license_link": files[0].name}


def _in_card(readme: Path) -> dict[str, str]:
    if not readme.is_file() or leads_outside(readme, readme.parent):
        return {}
    block = re.match(r"\s*---[ \t]*\n(.*?)\n---[ \t]*(\n|$)", _start_of(readme, 100_000), re.DOTALL)
    try:
        data = from_yaml(block[1]) if block else None
    except ValueError:  # a README that is not a model card
        return {}
    data = data if isinstance(data, dict) else {}
    stated = {key: data[key] for key in KEYS if isinstance(data.get(key), str)}
    return stated if "license" in stated else {}


def _start_of(file: Path, characters: int) -> str:
    with open(file, encoding="utf8", errors="replace") as stream:
        return stream.read(characters)


def _of_text(text: str) -> str | None:
    start = " ".join(text.lower().split())
    llama = re.search(r"llama (\d(?:\.\d)?) community licen[sc]e", start)
    if llama:
        return f"llama{llama[1]}"
    return next((name for words, name in KNOWN_TEXTS.items() if re.search(words, start)), None)


def _in_gguf(file: Path) -> str | None:
    """The value of general.license in a file, where that is a GGUF file and has it."""
    from gguf import GGUFReader

    try:
        field = GGUFReader(file).fields.get("general.license")
        return None if field is None else str(field.contents())
    except Exception:  # no GGUF file, or a damaged one: gguf raises many kinds
        return None
