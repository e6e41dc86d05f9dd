"""What exits can win on this machine, known before it is tried.

A token of full depth takes a pass over all layers. Where it speculates, each draft takes the first loop and the head,
and a round takes the other loops once, over all its tokens; where a token leaves, it takes what it goes through, and
the head after each loop. All of these are timed here, in the passes that the engine makes, and put together.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from transformers import PreTrainedModel

from rrtc.generate.stages import Span, Stages
from rrtc.generate.store import Store

WORTH_IT = 1.05  # times full depth, below which nobody would notice
TURNS = 5
LONG = 5  # tokens of a span in the second of the two timings that a line is drawn through


@dataclass(frozen=True)
class Costs:
    """Seconds of passes over one token of each of so many requests. whole: all layers and the head. first: the first
    loop, and what is before it. head: the head, after a loop. rest: the other loops, what is after them, and the head;
    rest_more: of each further token that a request has in it."""

    loops: int
    whole: float
    first: float
    head: float
    rest: float
    rest_more: float

    def speculating(self, said: float, drafts: int) -> float:
        """How many times as fast as full depth it is to draft so many tokens at a time, where a round says so many."""
        took = (drafts + 1) * self.first + drafts * self.head + self.rest + drafts * self.rest_more
        return said * self.whole / took

    def best(self, said: Callable[[int], float], most: int) -> int:
        """How many drafts at a time are best, where rounds of so many say said(drafts) tokens: 0 where none are worth
        it."""
        best = max(range(1, most + 1), key=lambda drafts: self.speculating(said(drafts), drafts), default=0)
        return best if best and self.speculating(said(best), best) >= 1 else 0

    def leaving(self, shares: Sequence[float]) -> float:
        """How many times as fast as full depth it is where these shares of the tokens leave after each loop, the last
        one included."""
        took, through, later = self.first + self.head, 1.0 - shares[0], self.rest / (self.loops - 1)
        for share in shares[1:]:
            took += through * later  # the head is in it, once for all of `rest`
            through -= share
        return self.whole / took


def measure_costs(model: PreTrainedModel, requests: int = 1, context: int = 64) -> Costs | None:
    """The costs for so many requests at once, after so many tokens each. None where tokens cannot leave early."""
    stages, whole = Stages(model), Stages(model, by_depth=False)
    if stages.loops == 1:
        return None
    later = [(loop, loop == stages.loops - 1) for loop in range(1, stages.loops)]
    passes = {  # in which stages, tokens of a request, and for each pass its loop and whether the head is asked
        "whole": (whole, 1, [(0, True)]),
        "first": (stages, 1, [(0, False)]),
        "exit": (stages, 1, [(0, True)]),
        "rest": (stages, 1, later),
        "long": (stages, LONG, later),
    }
    stores = {made: made.new_store(requests, context, context) for made in (stages, whole)}
    times: dict[str, list[float]] = {name: [] for name in passes}
    for turn in range(TURNS + 1):  # in turn, because the machine does other things, too; the first is for warmth
        for name, (made, tokens, steps) in passes.items():
            begun = time.perf_counter()
            for loop, reads in steps:
                spans = [_span(made, stores[made], row, loop, tokens, context, reads) for row in range(requests)]
                left, _ = made.run(spans, stores[made])
            left[0].sum().item()  # on an accelerator, until it is done
            if turn:
                times[name].append(time.perf_counter() - begun)
    found = {name: median(seconds) for name, seconds in times.items()}
    more, head = (found["long"] - found["rest"]) / (LONG - 1), found["exit"] - found["first"]
    return Costs(stages.loops, found["whole"], found["first"], max(head, 0), found["rest"], max(more, 0))


def _span(stages: Stages, store: Store, row: int, loop: int, tokens: int, context: int, reads: bool) -> Span:
    """The last of `context` tokens, at that loop, as if the others had come before. All of it is made up."""
    device, arrivals = stages.model.device, store.arrivals[row][loop]
    everything = torch.arange(context, device=device)
    arrivals.back_to(0)
    arrivals.add(everything)
    positions = everything[context - tokens :]
    width = stages.model.get_input_embeddings().weight.shape[1]
    states = torch.zeros(tokens, width, dtype=stages.model.dtype, device=device) if loop else None
    ids = None if loop else torch.zeros_like(positions)
    return Span(row, loop, positions, ids=ids, states=states, reads=slice(0, tokens) if reads else None)
