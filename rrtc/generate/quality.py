"""How sure an exit must be for a token to leave there, so that the loss grows by no more than is allowed.

Text is scored as it would be generated: a token leaves where its exit is sure enough, and those behind it do not see it
at the later loops. The threshold taken is the lowest at which the upper bound of the loss's growth, over windows of
text, is below the limit (Schuster et al. 2022, CALM, §3.2: learn, then test).
"""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, stdev

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from rrtc.generate.stages import Span, Stages

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)  # of tokens that would leave after the first loop
SURE = 1.645  # standard errors above the mean: one-sided, 95 %
FEWEST = 8  # windows that a bound can be had of
PROMPT = 16  # first tokens of a window, which go through all loops, as prompts do
NEVER = 2.0  # no exit is so sure


@dataclass(frozen=True)
class Threshold:
    """value: how sure an exit must be; None where leaving costs too much at every threshold that was tried. growth,
    most: of the loss by it, in nats a token, and the upper bound of that. shares: of the tokens that leave after each
    loop, the last one included."""

    value: float | None
    growth: float
    most: float
    shares: tuple[float, ...]


class Scored:
    """Windows of text, (windows, context) token ids, scored at full depth and at their first exit. advance is called
    after each pass over one of them: see `passes`."""

    @torch.inference_mode()
    def __init__(
        self, model: PreTrainedModel, windows: Tensor, catch_up: bool = False,
        advance: Callable[[], None] = lambda: None,
    ):  # fmt: skip
        """Raises ValueError where tokens cannot leave the model early."""
        windows = windows.to(model.device)
        self.stages, self._windows, self._catch_up, self._advance = Stages(model), windows, catch_up, advance
        if self.stages.loops == 1:
            raise ValueError("tokens cannot leave this model early")
        self._store = self.stages.new_store(1, windows.shape[1], windows.shape[1])
        self._positions = torch.arange(windows.shape[1], device=windows.device)
        self._first = [self._after_first_loop(ids) for ids in windows]
        self._full = [self._losses(number, NEVER)[0] for number in range(len(windows))]

    def __len__(self) -> int:
        return len(self._windows)

    def sureness(self, share: float) -> float:
        """What the first exit must be surer than for that share of all tokens to leave there."""
        return float(torch.cat([sure[PROMPT:] for _, _, sure in self._first]).quantile(1 - share))

    def leaving(self, threshold: float) -> tuple[list[float], list[float]]:
        """(growth of the loss of each window, in nats a token; the share of all tokens that leave after each loop)."""
        growth, left = [], torch.zeros(self.stages.loops)
        for number, full in enumerate(self._full):
            losses, loops = self._losses(number, threshold)
            growth.append(float((losses - full)[PROMPT:-1].mean()))
            left += torch.bincount(loops[PROMPT:], minlength=self.stages.loops).cpu()
        return growth, (left / left.sum()).tolist()

    def _after_first_loop(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the first loop makes of a window, the loss of each token there, and how sure the exit is of it."""
        states, logits = self._run(0, self._positions, ids=ids)
        return states, self._loss(logits, ids, self._positions), logits.softmax(-1).amax(-1)

    def _losses(self, number: int, threshold: float) -> tuple[Tensor, Tensor]:
        """The loss of each token of a window, and after which loop it has left, (context,) each."""
        ids, positions = self._windows[number], self._positions
        states, losses, sure = self._first[number]
        losses, loops = losses.clone(), torch.zeros_like(ids)
        leaves = (sure > threshold) & (positions >= PROMPT)
        gone = leaves.clone()
        for loop in range(1, self.stages.loops):
            if not self._catch_up:
                positions, states = positions[~leaves], states[~leaves]
            if gone.all():
                break
            states, logits = self._run(loop, positions, states=states)
            inside = ~gone[positions]
            here = positions[inside]
            losses[here], loops[here] = self._loss(logits, ids, positions)[inside], loop
            leaves = (logits.softmax(-1).amax(-1) > threshold) & (positions >= PROMPT)
            gone[positions[leaves]] = True
        return losses, loops

    def _run(self, loop: int, positions: Tensor, **given) -> tuple[Tensor, Tensor]:
        """States and logits of these tokens of a window after that loop."""
        arrivals = self._store.arrivals[0][loop]
        arrivals.back_to(0)
        arrivals.add(positions)
        span = Span(0, loop, positions, reads=slice(0, len(positions)), **given)
        (states,), (logits,) = self.stages.run([span], self._store)
        self._advance()
        return states, logits.float()

    @staticmethod
    def _loss(logits: Tensor, ids: Tensor, positions: Tensor) -> Tensor:
        """Of what comes after each of `positions`; 0 at the last token of the window."""
        loss = cross_entropy(logits, ids.roll(-1)[positions], reduction="none")
        return loss.masked_fill(positions == len(ids) - 1, 0.0)


def find_threshold(scored: Scored, limit: float) -> Threshold:
    """The lowest threshold by which the loss grows by less than `limit` nats a token, as far as the scored windows can
    tell. Raises ValueError for fewer windows than a bound can be had of."""
    if len(scored) < FEWEST:
        raise ValueError(f"{len(scored)} windows are too few; a bound takes {FEWEST}")
    with torch.inference_mode():
        found = Threshold(None, 0.0, 0.0, (*[0.0] * (scored.stages.loops - 1), 1.0))
        low, high = 0, len(SHARES)  # the larger the share, the more it costs
        while low < high:
            middle = (low + high) // 2
            tried = _tried(scored, scored.sureness(SHARES[middle]))
            if tried.most < limit:
                found, high = tried, middle
            else:
                low = middle + 1
        return found


def passes(windows: int, loops: int, limits: int = 1) -> int:
    """How often so many windows advance until the thresholds for so many limits are found, at most."""
    return windows * (1 + (loops - 1) * (1 + limits * len(SHARES).bit_length()))


def _tried(scored: Scored, threshold: float) -> Threshold:
    growth, shares = scored.leaving(threshold)
    mean = fmean(growth)
    return Threshold(threshold, mean, mean + SURE * stdev(growth) / len(growth) ** 0.5, tuple(shares))
