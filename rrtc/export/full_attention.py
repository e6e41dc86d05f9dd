"""Whether a model whose visits see a window may leave as one that attends to everything.

Formats of the stock architecture cannot say that some heads see a window. A model that learnt with its windows may have
come to need them, and one that did not is no worse without: which of the two it is, is measured, on text that it did
not learn from, in windows of text that are longer than those of the visits.
"""

import gc
from pathlib import Path

from rrtc.console import note, progress
from rrtc.errors import RrtcError
from rrtc.export.verify import loaded, placed
from rrtc.model import RrtConfig
from rrtc.plan import read_visits
from rrtc.scoring import score
from rrtc.text.windows import Windows, longest_context

TOKENS, CONTEXT = 8192, 2048  # that are scored, and in one window of text at least
TOLERANCE = 0.005  # nats per token


def context_to_measure(config: RrtConfig) -> int:
    """Tokens in one window of text: what the visits of that model see no more than a part of, if the model can."""
    seen = [visit.attention.most + 1 for visit in read_visits(config.visits) if visit.attention]
    return longest_context(config, max(CONTEXT, *(2 * one for one in seen)))


def measure_full_attention(folder: Path, held_out: Windows, form: str, from_disk: bool) -> dict:
    """How the model in `folder` does with its windows and without: tokens, context, and the losses `windows` and
    `full`, in nats per token of `held_out`. form: the name of the format, for the error. from_disk: as in `reference`.

    Raises RrtcError where full attention is worse by more than TOLERANCE.
    """
    windows, context = held_out.ids.shape
    found = {"tokens": windows * (context - 1), "context": context}
    note(f"Measuring the model with its windows and without, on {found['tokens']:,} tokens")
    for name in ("windows", "full"):
        with placed(from_disk) as there, progress(f"Scoring with {name}", windows) as advance:
            model = loaded(folder, there, windows=name == "windows")
            found[name] = score(model, held_out, advance=advance).loss
            del model
            gc.collect()
    if found["full"] > found["windows"] + TOLERANCE:
        raise RrtcError(
            f"The {form} format attends to everything, and this model has learnt not to: it loses {found['full']:.4f} "
            f"nats a token so, and {found['windows']:.4f} with its windows.",
            "Export it with --format recursive.",
        )
    note(f"Full attention is no worse: {found['full']:.4f} nats a token, and {found['windows']:.4f} with windows")
    return found
