"""Counts, bytes and seconds: as people write them, and as they read them."""

import re

from rrtc.errors import WrongUsage


def count(n: float) -> str:
    """A count in the unit people read: 134.5M, 1.23B; and what is larger, such as operations, as in 1.8Z."""
    for size, unit in ((1e21, "Z"), (1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(n) >= size:
            return f"{n / size:.4g}{unit}"
    return f"{n:.4g}"


def size(n: float) -> str:
    """Bytes in decimal units, as disks are sold: 538.1 MB."""
    for unit_bytes, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(n) >= unit_bytes:
            return f"{n / unit_bytes:.4g} {unit}"
    return f"{n:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as people say them: 42 s, 3 min 20 s, 5 h 10 min."""
    seconds = round(seconds)
    if seconds < 100:
        return f"{seconds} s"
    minutes, rest = divmod(seconds, 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def parse_size(text: str) -> int:
    """Bytes of a size such as 4GB or 500MB, one at least. Raises WrongUsage for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    bytes_ = int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " ")) if match else 0
    if not bytes_:
        raise WrongUsage(f"'{text}' is not a size.", "Write it as 4GB or 500MB.")
    return bytes_


def parse_extent(value: float | str) -> float | int:
    """How much of something: a float up to 1 is a part of it (0.5, or 50%), an int bytes (300MB). Raises WrongUsage for
    anything else."""
    text = str(value).strip()
    try:
        part = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        if 0 < part <= 1:
            return part
    except ValueError:
        if re.search("[A-Za-z]$", text) and text[0].isdigit():
            return parse_size(text)
    raise WrongUsage(f"'{value}' is neither a part nor a size.", "Write it as 0.5, 50% or 300MB.")


def parse_count(text: str) -> int:
    """The number in a count such as 200k, 90M or 1.5B. Raises WrongUsage for anything else."""
    match = re.fullmatch(r"\s*(\d{1,18}(?:\.\d{1,18})?)\s*([KMBT]?)\s*", text.replace("_", ""), re.IGNORECASE)
    if not match:
        raise WrongUsage(f"'{text}' is not a count.", "Write it as 200k, 90M or 1.5B.")
    return int(float(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " "))
