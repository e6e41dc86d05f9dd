"""The dtype that `init` writes."""

from rrtc.io.source import Source

NUMBER_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def stored_dtype(source: Source, asked: str, named: str | None = None) -> str:
    """What was `asked` for, or for "auto" the source's own, or bfloat16 for a GGUF, which had fewer bits than that
    before it was dequantized. named: the source's own, for a source without weights; by default that of its weights."""
    if asked != "auto":
        return asked
    if source.is_gguf:
        return "bfloat16"
    dtype = named or source.weights().dtype
    return dtype if dtype in NUMBER_BYTES else "float32"
