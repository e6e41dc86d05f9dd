"""The licence of the base model, as far as its own files state it: nothing is guessed."""

import re
import struct
from pathlib import Path

# Words that open the well-known licence texts, and the hub's names of those licences.
KNOWN_TEXTS = {
    r"apache license\s+version 2\.0": "apache-2.0",
    r"mit license|permission is hereby granted, free of charge": "mit",
    r"gemma terms of use": "gemma",
    r"redistribution and use in source and binary forms": "bsd-3-clause",
}
GGUF_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of GGUF's value types
GGUF_STRING = 8


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
        for file in sorted(inside.glob("LICENSE*")):
            name = _of_text(file.read_text(encoding="utf8", errors="replace"))
            return {"license": name} if name else {"license": "other", "license_link": file.name}
    return {}


def _in_card(readme: Path) -> str | None:
    from huggingface_hub import ModelCard

    if not readme.is_file():
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
    """The value of general.license in a GGUF file. It stands among the first keys, before the long vocabulary, so that
    only the start of the file is read (the gguf package reads all of it, which takes seconds)."""
    with open(file, "rb") as stream:
        start = stream.read(1_000_000)
    try:
        magic, _, _, keys = struct.unpack_from("<4sIQQ", start)
        at = struct.calcsize("<4sIQQ")
        for _ in range(keys if magic == b"GGUF" else 0):
            key, at = _gguf_string(start, at)
            (kind,) = struct.unpack_from("<I", start, at)
            at += 4
            if kind == GGUF_STRING:
                value, at = _gguf_string(start, at)
                if key == "general.license":
                    return value
            elif kind in GGUF_WIDTHS:
                at += GGUF_WIDTHS[kind]
            else:  # an array; only those of strings, such as general.tags, stand before the licence
                kind, length = struct.unpack_from("<IQ", start, at)
                at += 12
                for _ in range(length if kind == GGUF_STRING else 0):
                    _, at = _gguf_string(start, at)
                at += 0 if kind == GGUF_STRING else GGUF_WIDTHS[kind] * length
    except (struct.error, KeyError, UnicodeDecodeError):  # the keys go on beyond what was read, or are of a newer kind
        return None
    return None


def _gguf_string(data: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", data, at)
    return data[at + 8 : at + 8 + length].decode("utf8"), at + 8 + length
