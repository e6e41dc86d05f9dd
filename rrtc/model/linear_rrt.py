"""Linear attention for what has left a window: heads that keep sums of random features in the place of keys and values.

    output = (sum over the window of e^(q·k) v + g φ(q)·S) / (sum over the window of e^(q·k) + g φ(q)·z)
    S = sum of φ(k) v, z = sum of φ(k), over the keys that have left the window and are no sinks

φ are the positive random features of Performers (FAVOR+: Choromanski et al. 2021, arXiv 2009.14794, lemma 1): with rows
w of a map, φ_j(x) = e^(w_j·x - |x|²/2) / √m, so that the mean of φ(q)·φ(k) over draws of the map is e^(q·k). Window and
sums stand under one normaliser, as in LoLCATs (Zhang et al. 2024, arXiv 2410.10254), and g is a gain of each KV head.

A feature is thus to a query what a key is: its score is w_j·q + log z_j, and S_j / z_j is its value. So these two are
what is kept (State), whatever the size of the sums; the kernel that the user chose computes all of it, with a mask; and
where a key has just left the window of some queries that go together, the mask makes its score the estimate of it.

This file is shipped in every export beside modeling_rrt.py and imports nothing but torch and transformers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .attention_rrt import KeptLayer, Part, Rule, Sight, added, divided
from .eyes_rrt import attention_of

BLOCK = 32  # queries that go together: for each of them and each key that leaves the window, all features are made
NOTHING = torch.finfo(torch.float32).min  # the logarithm of a sum of nothing
NAME = "linear"  # what an attention module calls its Maps


def draw(heads: int, features: int, width: int, seed: int) -> Tensor:
    """Maps of FAVOR+: (heads, features, width), float32. The rows of each block of `width` are orthogonal and have the
    lengths of Gaussian vectors (arXiv 2009.14794, §3.4)."""
    generator = torch.Generator().manual_seed(seed)
    shape, blocks = (heads, features, width), -(-features // width)
    made = {"generator": generator, "device": "cpu", "dtype": torch.float32}  # whatever a model is loaded in
    gaussian = torch.randn(heads, blocks, width, width, **made)
    turned = torch.linalg.qr(gaussian)[0].mT.flatten(1, 2)[:, :features]
    return turned * torch.randn(shape, **made).norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class State:
    """What some KV heads keep of the keys that have left their window: of each feature the logarithm of z, and S / z,
    a mean of values. until: the column before which they were."""

    mass: Tensor  # (rows, heads, features), float32
    mean: Tensor  # (rows, heads, features, width), float32
    until: int

    def each(self, change: Callable[[Tensor], Tensor]) -> "State":
        return replace(self, mass=change(self.mass), mean=change(self.mean))


class Maps(nn.Module):
    """The feature maps of the KV heads of a visit that have a window, and the logarithms of their gains."""

    def __init__(self, heads: int, features: int, width: int, seed: int):
        super().__init__()
        self.seed = seed
        self.maps = nn.Parameter(torch.empty(heads, features, width))
        self.log_gain = nn.Parameter(torch.empty(heads))
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """As drawn, with gains of 1."""
        init.copy_(self.maps, draw(*self.maps.shape, self.seed))
        init.zeros_(self.log_gain)

    def forward(self) -> tuple[Tensor, Tensor]:
        """The parameters. They are had by a call, because what brings them from disk, or rounds them, stands in it."""
        return self.maps, self.log_gain

    def of(self, vectors: Tensor, scaling: float) -> Tensor:
        """The logarithms of √m φ: (rows, heads, tokens, width) -> (rows, heads, tokens, features), float32. The heads
        are KV heads or query heads. scaling: what products of queries and keys are multiplied by."""
        vectors = vectors.float() * scaling**0.5
        maps = _of_heads(self()[0], vectors.shape[1], vectors)
        return vectors @ maps.mT - vectors.square().sum(-1, keepdim=True) / 2

    def of_queries(self, query: Tensor, scaling: float) -> Tensor:
        """As `of`, with what each feature is multiplied by beside: g / m."""
        bias = _of_heads(self()[1], query.shape[1], query)[:, None, None] - math.log(self.maps.shape[1])
        return self.of(query, scaling) + bias

    def empty(self, values: Tensor) -> State:
        """The state of nothing, of heads with such `values`, (rows, heads, tokens, width)."""
        shape = *values.shape[:2], self.maps.shape[1]
        nothing = values.new_full(shape, NOTHING, dtype=torch.float32)
        return State(nothing, values.new_zeros(*shape, values.shape[-1], dtype=torch.float32), 0)

    def absorb(self, state: State, part: Part, until: int, start: Tensor, sinks: int, scaling: float) -> State:
        """`state`, and with it the keys of `part` in the columns from its end up to `until`, all but sinks. start:
        (rows or 1, 1), where documents begin: of what was there before, nothing stays."""
        if until <= state.until:
            return state
        # Of a document that begins behind the state's end, nothing is in it yet.
        mass = state.mass.masked_fill((start >= state.until)[..., None], NOTHING)
        index = ((part.columns >= state.until) & (part.columns < until)).nonzero().squeeze(-1)
        taken = (part.columns[index] - start >= sinks)[:, None, :, None]  # (rows or 1, 1, tokens, 1)
        if not taken.any():
            return State(mass, state.mean, until)
        new = self.of(part.keys[..., index, :], scaling).masked_fill(~taken, NOTHING)
        total = torch.logaddexp(mass, new.logsumexp(-2))
        old, new = (mass - total).exp(), (new - total[..., None, :]).exp() * taken
        return State(total, state.mean * old[..., None] + new.mT @ part.values[..., index, :].float(), until)


def _of_heads(of_kv_heads: Tensor, heads: int, like: Tensor) -> Tensor:
    """(KV heads, …) -> (heads, …), float32, where `like` is: to each query head what its KV head has."""
    return of_kv_heads.repeat_interleave(heads // len(of_kv_heads), 0).to(like.device, torch.float32)


class LinearLayer(KeptLayer):
    """A visit's place in the cache: beside what its windows and sinks keep, the State of what has left the windows."""

    rule: "LinearRule"

    def __init__(self, rule: "LinearRule"):
        super().__init__(rule)
        self.state: State | None = None
        self.scaling = 1.0  # as in Maps.of; of the last forward pass

    def forget(self) -> None:
        """Lets go of what no later query sees, once it is in the state."""
        if self.state is not None:
            start = self.nearby.columns.new_zeros(1, 1) if self.start is None else self.start[:, -1:]
            until = self.cumulative_length - self.rule.window + 1
            with torch.autocast(start.device.type, enabled=False):
                self.state = self.rule.maps.absorb(self.state, self.nearby, until, start, self.rule.sinks, self.scaling)
        super().forget()

    def crop(self, tokens_to_remove: int) -> None:
        """As KeptLayer.crop."""
        left = self.cumulative_length + tokens_to_remove - self.rule.window + 1
        if tokens_to_remove < 0 and self.state is not None and self.state.until > max(0, left):
            raise RuntimeError("Call activate_past_recording before crop: tokens were summed up already.")
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.state = None

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        super()._each(change)
        if self.state is not None:
            self.state = self.state.each(change)


@dataclass(frozen=True)
class LinearRule(Rule):
    """As Rule; and of the keys that its window has left behind, a head keeps sums of so many `features`. seed: of the
    maps, as long as nothing has changed them. maps: of the layer that the rule is at work on."""

    features: int = 0
    seed: int = 0
    maps: Maps | None = field(default=None, compare=False)

    def on(self, layer: nn.Module) -> "LinearRule":
        """This rule with new maps for a decoder `layer`, whose they are not."""
        attention = attention_of(layer)
        heads = attention.config.num_attention_heads // getattr(attention, "num_key_value_groups", 1)  # as kernels do
        width = getattr(attention, "head_dim", None) or attention.head_size
        return replace(self, maps=Maps(len(divided(self, heads)[1]), self.features, width, self.seed))

    def place(self) -> LinearLayer:
        return LinearLayer(self)

    def near(self, sight: Sight, run: Callable, query: Tensor, part: Part, adds_mask: bool):
        """As Sight._near. It is done in float32: a mask in 16 bits would round the logarithms of sums."""
        if run.keywords.get("softcap") is not None:
            raise ValueError("a visit with linear attention cannot have its scores capped")
        kept, outputs, weights = sight.kept, [], []
        with torch.autocast(query.device.type, enabled=False):
            state = self.maps.empty(part.values) if kept is None or kept.state is None else kept.state
            for first in range(0, query.shape[2], BLOCK):
                last = min(first + BLOCK, query.shape[2])
                block = _Block(self, sight, first, last, part, run.keywords["scaling"])
                block.check()
                state = block.absorbed(state)
                output, weight = block.attend(run, query[:, :, first:last], state)
                outputs.append(output.to(query.dtype))
                weights.append(weight)
        if kept is not None:
            kept.rule, kept.scaling = self, run.keywords["scaling"]
            if not kept.record_past:
                kept.state = state
            elif kept.state is None:
                kept.state = self.maps.empty(part.values)
        return torch.cat(outputs, 1), None if weights[0] is None else torch.cat(weights, 2)


class _Block:
    """Some queries that go together, `first` to `last` of those of a Sight, and the keys that there are for them."""

    def __init__(self, rule: LinearRule, sight: Sight, first: int, last: int, part: Part, scaling: float):
        self.rule, self.sight, self.part, self.scaling = rule, sight, part, scaling
        self.first, self.last = first, last
        self.until = max(0, sight.past + first - rule.window + 1)  # before it, all is far for all of these queries
        self.start = sight._starts(first, last, part.columns)  # (rows or 1, queries or 1)

    def check(self) -> None:
        """Raises ValueError where the stock mask leaves out what the sums have in them."""
        if (mask := self.sight.mask) is None:
            return
        seen = mask[..., self.first : self.last, :]
        seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
        columns = torch.arange(seen.shape[-1], device=seen.device)
        query = self.sight.past + torch.arange(self.first, self.last, device=seen.device)
        missing = self._left(query[:, None], columns) & ~seen
        is_pad = ~seen.gather(-1, query[None, None, :, None].expand(*seen.shape[:2], -1, 1))
        if (missing & ~is_pad).any():
            raise ValueError("a visit with linear attention was given a mask that leaves out tokens within a document")

    def absorbed(self, state: State) -> State:
        """`state` up to what is far for all of these queries."""
        return self.rule.maps.absorb(state, self.part, self.until, self.start[:, :1], self.rule.sinks, self.scaling)

    def attend(self, run: Callable, query: Tensor, state: State) -> tuple[Tensor, Tensor | None]:
        """As an attention function of transformers. state: of what is far for the first of these queries. Weights are
        those of the keys that there are; what is missing to 1 have the features."""
        maps, part = self.rule.maps, self.part
        wanted = self.sight._wanted(self.first, self.last, part.columns).nonzero().squeeze(-1)
        columns, keys, values = part.columns[wanted], part.keys[:, :, wanted].float(), part.values[:, :, wanted].float()
        each, features = query.shape[1] // keys.shape[1], maps.of_queries(query, self.scaling)
        far = self._far(columns)
        mask = self.sight._mask(self.first, self.last, columns, None)
        if mask is None:
            mask = query.new_zeros(1, 1, 1, len(columns), dtype=torch.float32)
        elif mask.dtype == torch.bool:
            mask = added(mask, torch.float32)
        mask = mask.float().expand(len(query), query.shape[1], query.shape[2], -1)
        index = far.any(2).flatten(0, 1).any(0).nonzero().squeeze(-1)
        if len(index):  # keys that have left the window of some of these queries
            own = maps.of(keys[:, :, index], self.scaling).repeat_interleave(each, 1)
            estimate = (features[..., None, :] + own[:, :, None]).logsumexp(-1)
            score = self.scaling * query.float() @ keys[:, :, index].repeat_interleave(each, 1).mT
            mask = mask.index_copy(-1, index, torch.where(far[..., index], estimate - score, mask[..., index]))
        began = (self.start < state.until)[:, None, :, None]  # whether the query's document is the state's
        features = features + state.mass.repeat_interleave(each, 1)[:, :, None]
        mask = torch.cat([mask, features.masked_fill(~began, NOTHING)], -1)
        keys, values = F.pad(keys, (0, 0, 0, state.mass.shape[-1])), torch.cat([values, state.mean], -2)
        output, weight = run(query.float(), keys, values, mask)
        if weight is not None:
            whole = weight.new_zeros(*weight.shape[:3], int(part.columns[-1]) + 1)  # every part has the newest token
            weight = whole.index_copy(-1, columns, weight[..., : len(columns)])
        return output, weight

    def _far(self, columns: Tensor) -> Tensor:
        """Which of `columns` are far for a query and in no state: (rows or 1, 1, queries, columns), bool."""
        query = self.sight.past + torch.arange(self.first, self.last, device=columns.device)
        return self._left(query[:, None], columns) & (columns >= self.until)

    def _left(self, query: Tensor, columns: Tensor) -> Tensor:
        """Which of `columns` have left the window of a query, and are no sinks."""
        behind = columns - self.start[:, None, :, None]
        return (behind >= self.rule.sinks) & (query - columns >= self.rule.window)
