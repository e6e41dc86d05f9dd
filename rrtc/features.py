"""What visits can have that not everything carries which stores, runs or trains a model, and what does not carry it.

A feature is called as its field in the `attention` of a visit; see `features_of` in rrtc/plan.py.
"""

from collections.abc import Collection

from rrtc.errors import RrtcError

# Of several that are not carried, the first is named.
WORDS = {
    "owner": "visits that read keys and values of another loop (owner)",
    "later": "visits that read keys and values of a later loop (owner)",
    "linear": "KV heads that keep sums of what has left their window (linear attention)",
    "landmark": "KV heads that see blocks of tokens beyond their window (landmark)",
    "heads": "visits of which only some KV heads see a window",
    "sinks": "KV heads that see the first tokens beyond their window (sinks)",
    "window": "KV heads that see a window",
}
NOT_CARRIED = {
    "The recursive format": (),
    "The dense format": ("owner", "linear"),  # it attends to everything, where that is no worse than windows
    "The gguf format": ("owner", "linear"),
    "The onnx format": ("owner", "linear", "window"),  # one length of the cache for all heads
    "The engine for many requests": ("owner", "linear"),
    "vLLM": ("owner", "linear", "landmark", "heads", "sinks"),
    "Running layer by layer": ("owner",),
    "--compile": ("owner",),
    "--fsdp": ("owner",),
    # What a loop returns is not there before a later one that it reads has run.
    "--exits": ("later",),
    "The loss 'hidden'": ("later",),
    "The regularizer 'bmi'": ("later",),
    "--stability admin": ("later",),
}


def check_carried(by: str, features: Collection[str], hint: str, error: type[RrtcError] = RrtcError) -> None:
    """Raises an `error` where a model has a feature that is not carried `by` one of NOT_CARRIED."""
    for name, words in WORDS.items():
        if name in features and name in NOT_CARRIED[by]:
            raise error(f"{by} is not for models with {words}.", hint)
