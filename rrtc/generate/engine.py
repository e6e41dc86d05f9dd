"""Many requests at once: those that wait, those that have a row, and the steps in which these go on.

A step runs each slot once, over the tokens of all requests, whatever loop they are at (§3.8 of the paper: continuous
depth-wise batching). A request that has ended frees its row at once, and one that waits takes it.
"""

from collections import deque
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from rrtc.errors import RrtcError, WrongUsage
from rrtc.generate.request import Request
from rrtc.generate.sampling import Drawing
from rrtc.generate.stages import Stages
from rrtc.generate.ways import FullDepth

CHUNK = 256  # tokens of prompts in one step: those who are answered already wait for them
UNBOUNDED = 10**9  # tokens


class Busy(RrtcError):
    """More requests wait than may."""


class Engine:
    """Answers requests with `model`, a recursive or dense causal language model, which stays as it is.

    way: makes what decides when tokens leave, of the number of loops and of the tokens of a prompt that enter together;
    where there is one loop to go through, that is full depth whatever it is.
    rows: requests that go on at once. context: tokens of a prompt and its answer at most. waiting: requests that may
    wait for a row at most. keeps: whether a row keeps what it has when its request has ended, so that one that begins
    with the same tokens reads only the others.
    """

    def __init__(self, model: PreTrainedModel, way: Callable[[int, int], FullDepth] = FullDepth, rows: int = 8,
                 context: int = 2048, chunk: int = CHUNK, waiting: int = UNBOUNDED, keeps: bool = False):  # fmt: skip
        self.model, self.context, self._longest_queue, self._keeps = model, context, waiting, keeps
        self.stages = Stages(model, by_depth=way is not FullDepth)
        self.way = (way if self.stages.loops > 1 else FullDepth)(self.stages.loops, chunk)
        self.store = self.stages.new_store(rows, context, max(self.way.most, chunk))
        self.most = rows + waiting  # requests that it can have at once
        self._free = list(range(rows))
        self._kept: list[list[int]] = [[] for _ in self._free]  # the tokens that each row has
        self.queue: deque[Request] = deque()
        self.active: list[Request] = []
        self.steps = self.passes = 0  # passes: tokens that went through a loop

    def submit(self, prompt: Sequence[int], most: int, seed: int | None = None,
               say: Callable[[int], bool] = lambda token: False, **settings) -> Request:  # fmt: skip
        """A request that takes part in the steps from now on. prompt: token ids. most: tokens of its answer at most.
        settings: arguments of transformers' `generate` that say how tokens are drawn.

        Raises WrongUsage for a prompt that is empty, or leaves no room for an answer; Busy where too many wait;
        RrtcError for settings that cannot be used.
        """
        room = self.context - len(prompt)
        if not prompt:
            raise WrongUsage("There is nothing in the prompt that the tokenizer has a token for.")
        if room < 1:
            sentence = f"The prompt has {len(prompt)} tokens, and with its answer there is room for {self.context}."
            raise WrongUsage(sentence, "Say it in fewer words.")
        if len(self.queue) - len(self._free) >= self._longest_queue:
            raise Busy(f"{len(self.queue)} requests wait already.", "Ask again when some of them have been answered.")
        drawing = Drawing(self.model, prompt, min(most, room), seed, **settings)
        request = Request(list(prompt), min(most, room), drawing, say, most <= room)
        self.queue.append(request)
        return request

    @torch.inference_mode()
    def step(self) -> list[Request]:
        """One pass over all slots, and the requests that have ended with it."""
        while self._free and self.queue:
            request = self.queue.popleft()
            request.row, request.entered = self._best_row(request.prompt)
            self._free.remove(request.row)
            self.store.back_to(request.row, request.entered)
            request.read_on(self.way.chunk)
            self.active.append(request)
        taking_part = sorted(self._taking_part(), key=lambda request: request.span.loop)
        spans = [request.span for request in taking_part]
        for request, span in zip(taking_part, spans, strict=True):
            span.reads = self.way.reads(request, span)
            self.store.arrivals[span.row][span.loop].add(span.positions)
        left, read = self.stages.run(spans, self.store)
        for request, span, states, logits in zip(taking_part, spans, left, read, strict=True):
            try:
                self.way.after(request, span, states, logits, self.store)
            except Exception as error:  # that its next token cannot be drawn is no matter of the others
                request.ended, request.error = "failed", error
        self.steps, self.passes = self.steps + 1, self.passes + sum(len(span) for span in spans)
        ended = [request for request in taking_part if request.ended]
        for request in ended:
            self._release(request)
        return ended

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do."""
        return bool(self.active or self.queue)

    def run(self, *requests: Request) -> None:
        """Steps until all of `requests` have ended, or all that there are."""
        while any(not request.ended for request in requests or (*self.active, *self.queue)):
            self.step()

    def cancel(self, request: Request) -> None:
        """Ends a request, of which nothing stays behind."""
        if request in self.queue:
            self.queue.remove(request)
        elif request in self.active:
            self._release(request)
        request.ended = request.ended or "stopped"

    def _taking_part(self) -> list[Request]:
        """Those that are answered already, and as many that read their prompts as fit into a step."""
        chosen, tokens = [], 0
        for request in self.active:
            if not request.said:
                tokens += len(request.span)
                if tokens > self.way.chunk and tokens > len(request.span):
                    continue
            chosen.append(request)
        return chosen

    def _best_row(self, prompt: list[int]) -> tuple[int, int]:
        """(a free row, with how many of its tokens the prompt begins): the last one of a prompt is always read."""
        found = {row: self.store.reach(row, _in_common(self._kept[row], prompt[:-1])) for row in self._free}
        return max(found.items(), key=lambda one: one[1])

    def _release(self, request: Request) -> None:
        self.active.remove(request)
        if self._keeps:
            self._kept[request.row] = request.tokens[: int(request.span.positions[0])]
        else:
            self.store.forget(request.row)
        self._free.append(request.row)
        request.span = None


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """With how many same tokens both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (a, b) in pairs if a != b), min(len(one), len(other)))
