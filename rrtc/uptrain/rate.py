"""The learning rate where a recipe leaves it open: the more a start has lost, and the more text a step has, the larger.

Steps that are too large first undo what a good start has, and win it back only as the rate falls. Measured (see
benchmarks/LOG.md): from 0.6 nats lost, in steps of 1,024 tokens, 5e-5 is better than 1e-4 and 2e-4; from 0.15 nats,
1e-4 is too much; from the paper's start, which is close to noise, 4e-4 is not. Noise falls with the root of a batch,
and so the rate of Adam may rise with it (Malladi et al. 2022, arXiv 2205.10287).
"""

from typing import Any

RATE, LOST, TOKENS = 1e-4, 0.6, 4096  # the rate for a start that has lost so many nats, in steps of so many tokens
MOST_TOKENS = 65_536  # of a step, beyond which noise is not what limits the rate
LEAST, MOST = 1e-5, 4e-4
TRANSFER = 0.01  # for feature maps alone (attention transfer)
EXITS = 1e-3  # for the maps of exits, whatever else learns


def default_rate(lost: float | None, tokens: int) -> float:
    """The peak learning rate from a start that is `lost` nats a token from its dense model (None: not known), in steps
    of so many tokens; two digits of it."""
    scale = (min(tokens, MOST_TOKENS) / TOKENS) ** 0.5 * (LOST if lost is None else lost) / LOST
    return float(f"{min(max(RATE * scale, LEAST), MOST):.1e}")


def lost_by(provenance: dict[str, Any]) -> float | None:
    """What the model of a folder has lost, in nats a token, as its rrtc.yaml says: by healing's last KL, where that is
    at temperature 1, or by what was known before; else by init's closing measurement; and what planning its KV cache
    anew has cost since. None where none was measured."""
    measured = provenance["measured"]
    lost = _lost_before_windows(measured)
    if lost is None or provenance["stage"] != "init":
        return lost
    return lost + (_difference(measured.get("windows", {}).get("loss"), "given") or 0.0)


def _lost_before_windows(measured: dict[str, Any]) -> float | None:
    healed = measured.get("uptrain", {})
    known = healed.get("last_kl") if healed.get("temperature", 1) == 1 else None
    found = healed.get("lost_before") if known is None else known
    if isinstance(found, int | float):
        return float(found)
    return _difference(measured.get("init", {}).get("loss"), "dense")


def _difference(loss: Any, first: str) -> float | None:
    """What a closing measurement has found to be lost, in nats a token; None where there is none."""
    match loss:
        case {"after_init": float(after), **others} if isinstance(before := others.get(first), float):
            return max(after - before, 0.0)
    return None
