"""What KV heads that do not see everything may have: of the bytes of the window that they would have else. Pure
arithmetic, no torch."""

import math
from collections.abc import Callable
from dataclasses import replace

from rrtc.architecture import Layer
from rrtc.attention import SUM_BYTES, Attention, Landmark, Linear
from rrtc.errors import WrongUsage

KV_NUMBER_BYTES = 2  # of a number in the cache: in 16 bits, as models run
LANDMARK_SIZE = 16  # tokens in a landmark block; blocks take half of the window
FEATURES = 64  # of linear attention
LAST_LOOP = "last_loop"  # the kind of heads that read another visit
NOTHING_TO_READ = (
    "There is nothing for last_loop to read: no slot has a last loop that sees everything, and an earlier one that "
    "does not."
)
KEEP_TO_READ = (
    "Tie layers in loops, by a pattern (--sharing), and ask for a --kv-budget that lets all layers of the last loop "
    "see everything."
)


def kind_of(attention: Attention | None) -> str:
    """Which of KINDS it is that heads have which do not see everything."""
    if attention is not None and attention.owner is not None:
        return LAST_LOOP
    beyond = set() if attention is None else KINDS.keys() & attention.fields().keys() - {"window"}
    return next(iter(beyond), "window")


def _landmark(window: Attention, number: int, layer: Layer) -> Attention:
    """Half of a window, and as many tokens in landmark blocks, drawn anew for each layer."""
    count = window.window // 2 // LANDMARK_SIZE
    if not count:
        raise WrongUsage(
            f"A window of {window.window} tokens leaves no room for landmark blocks of {LANDMARK_SIZE}, which take "
            "half of it.",
            f"Give a --kv-window of {2 * LANDMARK_SIZE} or more, or leave landmark out of --kv-kinds.",
        )
    landmark = Landmark(LANDMARK_SIZE, count, seed=number)
    return replace(window, window=window.window - count * LANDMARK_SIZE, landmark=landmark)


def _linear(window: Attention, number: int, layer: Layer) -> Attention:
    """Sums in FEATURES features, as drawn anew for each layer, and what their bytes leave of a window."""
    width, linear = layer.kv_width // (2 * layer.kv_heads), Linear(FEATURES, seed=number)
    taken = math.ceil(SUM_BYTES * linear.numbers(width) / (KV_NUMBER_BYTES * 2 * width))  # tokens of that many bytes
    if taken >= window.window:
        raise WrongUsage(
            f"A window of {window.window} tokens leaves no room for the sums of linear attention, which take the bytes "
            f"of {taken}.",
            "Give a larger --kv-window, or leave linear out of --kv-kinds.",
        )
    return replace(window, window=window.window - taken, linear=linear)


# What heads of a layer that do not see everything can have: of the bytes of the window that they would have else. Those
# that are priced are called as their field in Attention.
KINDS: dict[str, Callable[[Attention, int, Layer], Attention]] = {
    "window": lambda window, number, layer: window,
    "landmark": _landmark,
    "linear": _linear,
    LAST_LOOP: lambda window, number, layer: window,  # behind which it reads, where there is something to be read
}
