"""The dtype that `init` writes."""

from rrtc.console import note
from rrtc.io.source import Source
from rrtc.storage import NUMBER_BYTES


def stored_dtype(source: Source, asked: str, named: str | None = None) -> str:
    """What was `asked` for, or for "auto" the source's own, or bfloat16 for a GGUF, which had fewer bits than that
    before it was dequantized. named: the source's own, for a source without weights; by default that of its weights."""
    if asked != "auto":
        return asked
    if source.is_gguf:
        return "bfloat16"
    dtype = named or source.weights().dtype
    return dtype if dtype in NUMBER_BYTES else "float32"


def propose_16_bits(asked: str, dtype: str) -> None:
    """A note where float32 is written because the source has it, and nobody asked for it."""
    if asked == "auto" and dtype == "float32":
        note("The model is stored in float32, and so will this one be. --dtype bfloat16 makes it half as large.")
