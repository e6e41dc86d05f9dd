"""Scores of a language model on packed windows: loss, bits per byte, and closeness to a reference model; and the
machine they are made on.

`rrtc eval` takes the scores of single tokens, for intervals and for what depends on their place.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rrtc.stock.parts import Parts
from rrtc.text.windows import Windows

# Of so many tokens there are logits, and of so many are distributions compared, at a time: both bound memory.
LOGITS_AT_ONCE, TOKENS_AT_ONCE = 1024, 128


@dataclass(frozen=True)
class Scores:
    """Means over the scored tokens. loss and kl are in nats per token; kl and top1_agreement are against the reference
    model and None where there is none; top1_agreement is a share from 0 to 1."""

    tokens: int
    loss: float
    bits_per_byte: float
    kl: float | None = None
    top1_agreement: float | None = None


@dataclass(frozen=True)
class TokenScores:
    """The same of every scored token, each (windows, context - 1), float32 on the CPU; kl and top1_agreement are None
    without a reference model. confidence: the probability of the most probable token; correct: 1 where that is the
    token, else 0."""

    loss: Tensor
    confidence: Tensor
    correct: Tensor
    kl: Tensor | None = None
    top1_agreement: Tensor | None = None


def score(model, windows: Windows, reference=None, advance=lambda: None) -> Scores:
    """Scores `model` on every token of `windows` but the first of each.

    reference: a model with the same vocabulary, for KL(reference || model) and top-1 agreement. advance is called after
    each window.
    """
    found = score_tokens(model, windows, (), reference, advance)[0]
    loss = found.loss.double().mean().item()
    beside = () if reference is None else (t.double().mean().item() for t in (found.kl, found.top1_agreement))
    return Scores(found.loss.numel(), loss, loss / math.log(2) / windows.bytes_per_token, *beside)


@torch.inference_mode()
def score_tokens(
    model, windows: Windows, exits: Sequence[int] = (), reference=None, advance=lambda: None
) -> list[TokenScores]:
    """What `score` is the mean of: of the model, and then of what it says if it is left after the layer at each of the
    places `exits`. advance is called after each window."""
    rows: list[list[Tensor]] = [[] for _ in range(1 + len(exits))]  # of each window (3 or 5, tokens)
    ours, theirs = Parts(model), None if reference is None else Parts(reference)
    # Where weights wait on disk until they are computed with, the model is on no device, and the batch says where.
    place = torch.device("cpu") if model.device.type == "meta" else model.device
    for ids in windows.ids:
        ids = ids.unsqueeze(0).to(place)  # (1, context)
        states = _states(ours, ids, exits)
        beside = None if theirs is None else theirs.run(ids)[0][0]
        found: list[list[Tensor]] = [[] for _ in rows]
        for start in range(0, ids.shape[1] - 1, LOGITS_AT_ONCE):
            part = slice(start, start + LOGITS_AT_ONCE)
            targets = ids[0, 1:][part]
            reference_logits = None if beside is None else theirs.head(beside[part])[: len(targets)]
            for pieces, hidden in zip(found, states, strict=True):
                pieces.append(_scored(ours.head(hidden[part])[: len(targets)], targets, reference_logits))
        for row, pieces in zip(rows, found, strict=True):
            row.append(torch.cat(pieces, 1))
        advance()
    return [TokenScores(*torch.stack(row, 1)) for row in rows]


def _scored(logits: Tensor, targets: Tensor, reference_logits: Tensor | None) -> Tensor:
    """The fields of TokenScores for each of `targets` (tokens,), all five with a reference: (3 or 5, tokens). Both
    logits: (tokens, vocabulary)."""
    parts = []
    for start in range(0, len(targets), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        log_p = logits[part].float().log_softmax(-1)
        highest, best = log_p.max(-1)
        found = [-log_p.gather(1, targets[part, None])[:, 0], highest.exp(), (best == targets[part]).float()]
        if reference_logits is not None:
            log_q = reference_logits[part].float().log_softmax(-1)
            found.append((log_q.exp() * (log_q - log_p)).sum(-1))
            found.append((log_q.argmax(-1) == best).float())
        parts.append(torch.stack(found))
    return torch.cat(parts, 1).cpu()


def _states(parts: Parts, ids: Tensor, exits: Sequence[int]) -> list[Tensor]:
    """What the head is given for `ids` (1, context), (context, width): in the end, and at each of `exits`."""
    final, outputs = parts.run(ids, exits)
    return [final[0], *(parts.after(ids, place, output)[0] for place, output in zip(exits, outputs, strict=True))]
