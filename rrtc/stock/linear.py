"""Linear attention behind the windows of a recursive model, fitted while the model attends to everything: gains by
which its sums weigh what they should, and how far what a head finds is from what full attention finds.

Both are Sights (model/attention_rrt.py), which compute what the stock attention does, and look on.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from rrtc.model.attention_rrt import Part, Sight, divided
from rrtc.model.graft_rrt import Visit
from rrtc.model.linear_rrt import LinearRule, Maps
from rrtc.model.modeling_rrt import RrtForCausalLM

QUERIES = 128  # whose scores exist at once
NONE = -50.0  # a log-gain that is as good as none, and can still learn
LOG_GAINS = (NONE, *(step / 2 for step in range(-8, 49)))
ALONE = 200.0  # a log-gain beside which the window counts nothing


@torch.no_grad()
def match_gains(model: RrtForCausalLM, ids: Tensor, by: str = "error") -> None:
    """Sets the gains of all linear attention in `model`, in place, whatever they were.

    by: "error": of each KV head the one of LOG_GAINS with which the mean square of what is wrong in its output is
    least; the first of them is as good as none. "mass": log-gains are the mean, over queries and query heads, of the
    logarithm of what far keys weigh over what the sums say. ids: text, (windows, context), int64, longer than any
    window.
    """
    found: dict[Maps, list[Tensor]] = {}

    def look(sight: Sight, run: Callable, query: Tensor, part: Part, full: Tensor) -> None:
        rule, heads = sight.rule, part.keys.shape[1]
        near, far, said = masses(rule, query, part, run.keywords["scaling"])
        if by == "mass":
            one = (far - said).unflatten(1, (heads, -1)).mean((0, 2, 3))
        else:
            sides = []
            for gain in (NONE, ALONE):
                rule.maps.log_gain.fill_(gain)
                sides.append(rule.near(sight, run, query, part, False)[0].float()[:, rule.window + rule.sinks :])
            full, ratio, errors = full[:, rule.window + rule.sinks :], (said - near).transpose(1, 2)[..., None], []
            for gain in LOG_GAINS:
                wrong = torch.lerp(*sides, (gain + ratio).sigmoid()) - full
                errors.append(wrong.square().sum((0, 1, 3)).unflatten(0, (heads, -1)).sum(-1))
            one = torch.stack(errors)
        found.setdefault(rule.maps, []).append(one)

    with _looking_on(model, look):
        for window in ids:
            model.base_model(window[None], use_cache=False)
    for maps, ones in found.items():
        mean = torch.stack(ones).mean(0)
        maps.log_gain.copy_(mean if by == "mass" else torch.tensor(LOG_GAINS)[mean.argmin(0).cpu()])


def masses(rule: LinearRule, query: Tensor, part: Part, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
    """Of each query that has far keys, the logarithms of the sums of e^(q·k) over the near keys and over the far ones,
    and that of the estimate of the latter without its gain: (rows, query heads, queries) each. Every row is one
    document. query: (rows, query heads, tokens, width)."""
    each, first = query.shape[1] // part.keys.shape[1], rule.window + rule.sinks
    query, keys = query[:, :, first:].float(), part.keys.float()
    count = query.shape[2]  # query number n of these sees the first n + 1 of the keys behind the sinks from afar
    sums = rule.maps.of(keys[:, :, rule.sinks : rule.sinks + count], scaling).logcumsumexp(2)
    said = (rule.maps.of(query, scaling) + sums.repeat_interleave(each, 1)).logsumexp(-1) - math.log(sums.shape[-1])
    keys, near, far = keys.repeat_interleave(each, 1), [], []
    for start in range(0, count, QUERIES):
        block = query[:, :, start : start + QUERIES]
        column = torch.arange(keys.shape[2], device=keys.device)
        last = first + start + torch.arange(block.shape[2], device=keys.device)[:, None]
        scores = (scaling * block @ keys.mT).masked_fill(column > last, -math.inf)
        is_far = (column >= rule.sinks) & (last - column >= rule.window)
        near.append(scores.masked_fill(is_far, -math.inf).logsumexp(-1))
        far.append(scores.masked_fill(~is_far, -math.inf).logsumexp(-1))
    return torch.cat(near, -1), torch.cat(far, -1), said


def attention_distance(model: RrtForCausalLM, forward: Callable[[], object]) -> Tensor:
    """|o - f|² / |f|², o what a head with linear attention finds and f what it would find if it saw everything, where
    all layers before it do; the sums are over the tokens of a window, and the mean over windows and all such heads of
    `model`.

    It has a gradient by their maps and gains alone, which is worked out layer by layer: `forward` runs the base model.
    """
    total, heads, slopes = torch.zeros(()), 0, []

    def look(sight: Sight, run: Callable, query: Tensor, part: Part, full: Tensor) -> None:
        nonlocal total, heads
        parameters = list(sight.rule.maps.parameters())
        with torch.enable_grad():
            found = sight.rule.near(sight, run, query, part, False)[0].float()
            distance = ((found - full).square().sum((1, 3)) / full.square().sum((1, 3))).mean(0).sum()
            slopes.extend(zip(parameters, torch.autograd.grad(distance, parameters), strict=True))
        total, heads = total.to(distance.device) + distance.detach(), heads + query.shape[1]

    with torch.no_grad(), _looking_on(model, look):
        forward()
    # Parameters times their gradients, which add nothing to the value.
    return (total + sum(((p - p.detach()) * slope).sum() for p, slope in slopes)) / heads


def linear_maps(model: nn.Module) -> list[Maps]:
    """The feature maps of all visits of `model`."""
    return [module for module in model.modules() if isinstance(module, Maps)]


@contextlib.contextmanager
def _looking_on(model: RrtForCausalLM, look: Callable) -> Iterator[None]:
    """In the block, visits with linear attention attend to everything, and look(sight, run, query, part, full) is told
    of the heads with a window: their queries (rows, query heads, tokens, width), their keys and values, and what they
    find, float32, (rows, tokens, query heads, width). run: the kernel, as Sights call it."""
    eyes = [module.eyes for module in model.modules() if isinstance(module, Visit) and module.eyes]
    eyes = [one for one in eyes if isinstance(one.rule, LinearRule)]
    before = [one.sight for one in eyes]
    for one in eyes:
        one.sight = partial(_LookedOn, look)
    try:
        yield
    finally:
        for one, sight in zip(eyes, before, strict=True):
            one.sight = sight


class _LookedOn(Sight):
    def __init__(self, look: Callable, *given):
        super().__init__(*given)
        self._look = look

    def attend(self, run: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, adds_mask: bool,
               **kwargs) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        output, weights = run(module, query, key, value, self.mask, **kwargs)
        _, heads = divided(self.rule, key.shape[1])
        each = query.shape[1] // key.shape[1]
        places = [head * each + number for head in heads for number in range(each)]
        part = Part(heads, key[:, heads], value[:, heads], torch.arange(key.shape[2], device=key.device))
        self._look(self, partial(run, module, **kwargs), query[:, places], part, output[:, :, places].float())
        return output, weights
