"""How often the first exit is right about what the model says itself, when it goes on with a few prompts.

On text that people wrote it can be right more often, or less, and there is nothing of the loops that models get into.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rrtc.generate.engine import Engine
from rrtc.generate.request import Request
from rrtc.generate.stages import Span
from rrtc.generate.store import Store
from rrtc.generate.ways import FullDepth

TRIAL = (8, 32)  # prompts, and tokens of each
TRIAL_NEW = 64  # tokens of each answer


class Listening(FullDepth):
    """Full depth, at which the first exit is asked about each token that is said, too. right: for each request, whether
    each draft of the exit would have been right."""

    def __init__(self, loops: int, chunk: int):
        super().__init__(loops, chunk)
        self.right: dict[Request, list[bool]] = {}
        self._drafted: dict[Request, int] = {}

    def reads(self, request: Request, span: Span) -> slice | None:
        return slice(0, 1) if request.said and span.loop == 0 else super().reads(request, span)

    def after(self, request: Request, span: Span, states: Tensor, logits: Tensor, store: Store) -> None:
        if request.said and span.loop == 0:
            self._drafted[request] = request.drawing.pick(request.drawing.scores(request.tokens, logits[0]))
        super().after(request, span, states, logits, store)
        if request in self._drafted and span.loop == self.last:
            self.right.setdefault(request, []).append(request.said[-1] == self._drafted.pop(request))


def agreement(
    model: PreTrainedModel, prompts: Tensor, new: int, settings: Mapping[str, Any],
    advance: Callable[[], None] = lambda: None,
) -> NDArray:  # fmt: skip
    """Whether the first exit's draft of each token would be right, (prompts, new), bool, where `model`, whose loops
    tokens can go through one by one, goes on with `prompts`, (prompts, tokens) token ids.

    settings: arguments of transformers' `generate` that say how tokens are drawn. advance is called prompts × (new + 1)
    times. Raises RrtcError where the settings cannot be used.
    """
    rows, length = prompts.shape
    engine = Engine(model, Listening, rows, length + new + 1)
    settings = {**settings, "eos_token_id": None}  # what follows an end is the model's own text, too

    def said(token: int) -> bool:
        advance()
        return False

    requests = [engine.submit(ids, new + 1, seed, said, **settings) for seed, ids in enumerate(prompts.tolist())]
    engine.run()
    for request in requests:
        if request.error is not None:
            raise request.error
    return numpy.array([engine.way.right[request] for request in requests])


def said_a_round(right: NDArray, drafts: int) -> float:
    """How many tokens a round of so many drafts says in the mean, where these drafts are `right`, (answers, tokens),
    bool. Those that are come together, so that it is less than where each is right whatever the others are."""
    rounds = 0
    for answer in right:
        first = 0
        while first < len(answer):
            tried = answer[first : first + drafts]
            first += 1 + (len(tried) if tried.all() else int(tried.argmin()))
            rounds += 1
    return right.size / rounds
