"""What becomes of a token that has been through a loop: it goes on, is a draft, or leaves.

A way says of which tokens the head is asked after a loop, and what a request does next. While a prompt is read, all of
them do the same: every token goes through every loop.
"""

from collections import deque
from collections.abc import Callable
from itertools import accumulate

import torch
from torch import Tensor

from rrtc.generate.request import Request
from rrtc.generate.stages import Span
from rrtc.generate.store import Store

REMEMBERED = 64  # rounds from which it is known how good drafts are
KNOWN = 8  # rounds, before which it is not
WEIGHT = 2  # rounds, of what is known of the draft before, in what is known of a draft
TRIED_AGAIN = 64  # tokens without drafts after which one is tried
MOST_OWED = 32  # tokens that have left, until they catch up


class FullDepth:
    """Every token goes through all loops."""

    most = 1  # tokens of a request in one step, when its prompt has been read

    def __init__(self, loops: int, chunk: int):
        """loops: how many a token goes through. chunk: tokens of a prompt that enter together."""
        self.last, self.chunk = loops - 1, chunk

    def reads(self, request: Request, span: Span) -> slice | None:
        """Of which tokens of the span the head is to be asked after this loop."""
        if span.loop == self.last and not request.unread:
            return slice(len(span) - 1, len(span))
        return None

    def after(self, request: Request, span: Span, states: Tensor, logits: Tensor, store: Store) -> None:
        """Has the request go on from what the loop made of its span. states: (tokens, width). logits: (tokens read,
        vocabulary)."""
        if span.loop < self.last:
            request.go_on(span.loop + 1, span.positions, states)
        elif request.unread:
            request.read_on(self.chunk)
        else:
            self.say(request, logits[-1])

    def say(self, request: Request, logits: Tensor) -> None:
        request.take(request.drawing.pick(request.drawing.scores(request.tokens, logits)))
        if request.ended is None:
            request.enter(request.said[-1:], len(request.tokens) - 1)


class Speculate(FullDepth):
    """The exit after the first loop drafts some tokens, and the other loops, which begin from the states that these
    have there, check them at once. What is said is what full depth says (lossless).

    drafts: how many at most. best(said, most): how many drafts are best, at most so many, where rounds of n drafts say
    said(n) tokens; without it there are always as many as possible.
    """

    def __init__(
        self, loops: int, chunk: int, drafts: int, best: Callable[[Callable[[int], float], int], int] | None = None,
        sure: float = 0.0,
    ):  # fmt: skip
        """sure: drafting ends with one of which the exit is less sure than this."""
        super().__init__(loops, chunk)
        self.drafts, self.most, self.sure, self._best = drafts, drafts + 1, sure, best
        self._rounds: deque[tuple[int, int]] = deque(maxlen=REMEMBERED)  # drafts that were checked, and right
        self.wanted = drafts
        self.drafted = self.accepted = 0

    def reads(self, request: Request, span: Span) -> slice | None:
        if request.unread or not request.said:
            return super().reads(request, span)
        if span.loop == self.last:
            return slice(0, len(span))
        return slice(0, 1) if span.loop == 0 and len(request.states) < self._wanted(request) else None

    def after(self, request: Request, span: Span, states: Tensor, logits: Tensor, store: Store) -> None:
        if request.unread or not request.said:
            super().after(request, span, states, logits, store)
        elif span.loop == self.last:
            self._check(request, logits, store)
        elif span.loop:
            request.go_on(span.loop + 1, span.positions, states)
        else:
            request.states.append(states)
            if len(logits):
                said = request.tokens + request.drafts
                scores = request.drawing.scores(said, logits[0])
                request.drafts.append(request.drawing.pick(scores, ahead=len(request.drafts)))
                if not self.sure or scores.softmax(-1).max() >= self.sure:
                    request.enter(request.drafts[-1:], len(said))
                    return
            first, count = len(request.tokens) - 1, len(request.states)
            positions = torch.arange(first, first + count, device=states.device)
            request.go_on(1, positions, torch.cat(request.states))

    def _check(self, request: Request, logits: Tensor, store: Store) -> None:
        """Says the drafts that are right, and one token more."""
        request.since, checked, accepted = 0 if request.drafts else request.since + 1, 0, 0
        for number in range(len(request.states)):
            token, right = self._token(request, number, logits[number]), False
            if number < len(request.drafts):
                right = token == request.drafts[number]
                checked, accepted = checked + 1, accepted + right
            request.take(token)
            if request.ended or not right:
                break
        self._learn(checked, accepted)
        request.drafts, request.states = [], []
        if request.ended is None:
            first = len(request.tokens) - 1
            store.back_to(request.row, first)
            request.enter(request.said[-1:], first)

    def _token(self, request: Request, number: int, logits: Tensor) -> int:
        """What full depth says at the place of that draft, or behind the last one."""
        return request.drawing.pick(request.drawing.scores(request.tokens, logits))

    def _learn(self, checked: int, accepted: int) -> None:
        """From a round in which so many drafts were checked, and all right but perhaps the last of them."""
        if not checked:
            return
        self.drafted, self.accepted = self.drafted + checked, self.accepted + accepted
        self._rounds.append((checked, accepted))
        if self._best is not None and len(self._rounds) >= KNOWN:
            self.wanted = self._best(self._said().__getitem__, self.drafts)

    def _said(self) -> list[float]:
        """How many tokens a round says that has 0, 1, … drafts. Right drafts come together, so each is right as often
        as those in its place were, once all before them were; where few rounds came to it, as those before it."""
        rates, right = [], None
        for place in range(self.drafts):
            tried = sum(checked > place for checked, _ in self._rounds)
            kept = sum(accepted > place for _, accepted in self._rounds)
            right = kept / tried if right is None else (kept + WEIGHT * right) / (tried + WEIGHT)
            rates.append(right)
        reached = accumulate(rates, lambda share, rate: share * rate, initial=1.0)
        return list(accumulate(reached))

    def _wanted(self, request: Request) -> int:
        """How many drafts this request makes before they are checked."""
        most = min(self.drafts, request.most - len(request.said) - 1)
        return min(most, self.wanted or (request.since >= TRIED_AGAIN)) if request.drawing.foresees else 0


class Leave(FullDepth):
    """A token leaves after the first loop whose exit is surer of it than `threshold`: what it says there is said, which
    need not be what full depth says (lossy).

    Those that come later do not see it at the loops that it did not go through; or it goes through them together with
    the next token that does (catch_up).
    """

    def __init__(self, loops: int, chunk: int, threshold: float, catch_up: bool = False):
        super().__init__(loops, chunk)
        self.threshold, self.catch_up = threshold, catch_up
        self.most = MOST_OWED if catch_up else 1
        self.left = [0] * loops  # tokens that were said after each loop

    def reads(self, request: Request, span: Span) -> slice | None:
        if request.unread or not request.said:
            return super().reads(request, span)
        return slice(len(span) - 1, len(span))

    def after(self, request: Request, span: Span, states: Tensor, logits: Tensor, store: Store) -> None:
        if request.unread or not request.said:
            super().after(request, span, states, logits, store)
            return
        waiting = request.owed.get(span.loop, ())
        if span.loop == self.last:
            self._leave(request, span, logits)
        elif len(waiting) + len(span) <= self.most and logits[-1].float().softmax(-1).max() > self.threshold:
            if self.catch_up:
                request.owed[span.loop] = (*waiting, (span.positions, states))
            self._leave(request, span, logits)
        else:
            request.owed.pop(span.loop, None)
            positions, carried = zip(*waiting, (span.positions, states), strict=True)
            request.go_on(span.loop + 1, torch.cat(positions), torch.cat(carried))

    def _leave(self, request: Request, span: Span, logits: Tensor) -> None:
        self.left[span.loop] += 1
        self.say(request, logits[-1])
