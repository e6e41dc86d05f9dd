"""What a visit attends to: one rule says which keys a query sees, and with that which of them the cache keeps.

The rule is monotone: a key that a query does not see is seen by no later one. So what the cache keeps is what the next
query sees, and a forward pass over everything, one in chunks, and one token by token agree. Some KV heads of a visit
see everything (the rule's `heads`), the others a window and the first tokens of their document (sinks, without which a
pretrained model breaks: Xiao et al. 2023, arXiv 2309.17453), and blocks of those between where there is a landmark.

    Rule            which keys a query sees
    Sight           stands in the place of the attention mask, and has each head attend to what it sees
    KeptLayer       a visit's place in the cache, which keeps what the next query sees

How stock decoder layers come by them is in eyes_rrt.py.
This file is shipped in every export beside modeling_rrt.py and imports nothing but torch and transformers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from .landmark_rrt import Landmark

LEAST_BLOCK = 64  # queries that go through a window together: fewer are slower than the keys that they leave out


@dataclass(frozen=True)
class Rule:
    """What the queries of a visit see. heads: the KV heads that see all keys before the query; the others see the last
    `window`, the query's own included, the first `sinks` of the query's document, and the blocks of `landmark`."""

    window: int
    sinks: int
    heads: tuple[int, ...]
    landmark: Landmark | None = None

    def visible(self, query: Tensor, key: Tensor, start: Tensor) -> Tensor:
        """Whether a head with a window sees the key. All arguments are columns, counted from a row's first token, and
        broadcast; start: where the query's document begins."""
        last = key if self.landmark is None else self.landmark.relieved_by(key, start + self.sinks)
        return (key <= query) & ((query - last < self.window) | ((key >= start) & (key - start < self.sinks)))

    def place(self) -> "KeptLayer":
        """What a visit with this rule has in the cache."""
        return KeptLayer(self)

    def near(self, sight: "Sight", *given) -> tuple[Tensor, Tensor | None]:
        """What the heads with a window find: see Sight._near."""
        return sight._near(*given)


def divided(rule: Rule, heads: int) -> tuple[list[int], list[int]]:
    """(the KV heads that see everything, the others) of so many."""
    # Not `head not in rule.heads`: torch.compile takes numbers that were others before for symbols, and finds none in.
    return list(rule.heads), [head for head in range(heads) if all(head != one for one in rule.heads)]


@dataclass
class Part:
    """Some KV heads, and keys and values of theirs: (rows, heads, tokens, width). columns: (tokens,), which tokens."""

    heads: list[int]
    keys: Tensor
    values: Tensor
    columns: Tensor

    def add(self, keys: Tensor, values: Tensor, columns: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys[:, self.heads]], -2)
        self.values = torch.cat([self.values, values[:, self.heads]], -2)
        self.columns = torch.cat([self.columns, columns])

    def keep(self, wanted: Tensor) -> None:
        """Forgets the tokens that are not `wanted`, (tokens,), bool."""
        if not wanted.all():
            self.keys, self.values = self.keys[..., wanted, :], self.values[..., wanted, :]
            self.columns = self.columns[wanted]

    def each(self, change: Callable[[Tensor], Tensor]) -> None:
        self.keys, self.values = change(self.keys), change(self.values)


class KeptLayer(DynamicLayer):
    """A visit's place in the cache: all tokens for the heads that see everything, and for the others those that the
    next query sees. To those who make masks it says that it has all: a Sight picks the columns that there are."""

    def __init__(self, rule: Rule):
        super().__init__()
        self.rule = rule
        self.everywhere: Part | None = None  # the heads that see everything
        self.nearby: Part | None = None  # the others
        self.cumulative_length, self.record_past = 0, False
        self.start: Tensor | None = None  # as in Documents, of the last forward pass
        self.unread = False  # whether tokens came that no Sight has looked at

    @property
    def parts(self) -> list[Part]:
        return [part for part in (self.everywhere, self.nearby) if part is not None]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        nothing = torch.arange(0, device=self.device)
        self.everywhere, self.nearby = (
            Part(heads, key_states[:, heads, :0], value_states[:, heads, :0], nothing) if heads else None
            for heads in divided(self.rule, key_states.shape[1])
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Takes in new tokens, and returns them alone: the Sight reads the others here."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        columns = torch.arange(self.cumulative_length, self.cumulative_length + tokens, device=key_states.device)
        for part in self.parts:
            part.add(key_states, value_states, columns)
        self.cumulative_length += tokens
        self.unread = True
        self._show()
        return key_states, value_states

    def forget(self) -> None:
        """Lets go of what no later query sees, in any row."""
        if self.nearby is not None:
            columns = self.nearby.columns
            start = columns.new_zeros(1, 1) if self.start is None else self.start[:, -1:]
            self.nearby.keep(self.rule.visible(columns.new_tensor(self.cumulative_length), columns, start).any(0))
            self._show()

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back: `tokens_to_remove`, below 0. What was forgotten for them is only there while the
        past is recorded, as in stock layers with a window."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove as a negative number.")
        if tokens_to_remove and self.is_initialized:
            if not self.record_past and self.nearby is not None and len(self.nearby.columns) < self.cumulative_length:
                raise RuntimeError("Call activate_past_recording before crop: tokens were let go of already.")
            self.cumulative_length += tokens_to_remove
            for part in self.parts:
                part.keep(part.columns < self.cumulative_length)
        self.forget()

    def activate_past_recording(self) -> None:
        """Forgets nothing until the next `crop`."""
        self.record_past = True

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def reset(self) -> None:
        super().reset()
        self.everywhere = self.nearby = self.start = None

    def offload(self) -> None:
        self._each(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda tensor: tensor[indices])

    def _each(self, change: Callable[[Tensor], Tensor]) -> None:
        for part in self.parts:
            part.each(change)
        self._show()

    def _show(self) -> None:
        """Where stock code looks for the tensors of a layer, there are those of some heads; before the first token, as
        in stock layers, none."""
        for part in self.parts[:1]:
            self.keys, self.values = part.keys, part.values


class Sight:
    """What stands in the place of the attention mask of a visit: it knows which keys each query sees.

    mask: the stock mask, (rows or 1, 1, queries, columns), bool, or float to be added, or None. past: how many tokens
    came before these. kept: the visit's place in the cache, if that is ours.
    """

    def __init__(self, rule: Rule, mask: Tensor | None, start: Tensor | None, past: int, kept: KeptLayer | None):
        self.rule, self.mask, self.start, self.past, self.kept = rule, mask, start, past, kept

    def attend(self, run: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, adds_mask: bool,
               **kwargs) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As an attention function of transformers: (output, (rows, queries, heads, width); weights or None). `run` is
        the one that the user chose. adds_mask: whether it takes masks to be added, not bool ones."""
        if self.kept is None and key.shape[2] <= self.rule.window:  # which is everything
            return run(module, query, key, value, self.mask, **kwargs)
        if self.kept is not None:
            if not self.kept.unread:  # what it would be given is not what the cache has
                raise ValueError(f"a {type(module).__name__} calls its kernel twice, which a window cannot be for")
            self.kept.unread = False
        parts = self._parts(key, value)
        each, output, weights = query.shape[1] // key.shape[1], None, None
        for part, see in zip(parts, (self._far, partial(self.rule.near, self)), strict=True):
            if part is None:
                continue
            places = [head * each + number for head in part.heads for number in range(each)]
            alone = len(places) == query.shape[1]
            found, weight = see(partial(run, module, **kwargs), query if alone else query[:, places], part, adds_mask)
            if alone:
                output, weights = found, weight
                continue
            if output is None:
                output = found.new_empty(*found.shape[:2], query.shape[1], found.shape[3])
                weights = None if weight is None else weight.new_empty(*query.shape[:3], weight.shape[3])
            output[:, :, places] = found.to(output.dtype)  # under autocast, kernels differ in that
            if weights is not None:
                weights[:, places] = weight.to(weights.dtype)
        if self.kept is not None:
            self.kept.start = self.start
            if not self.kept.record_past:
                self.kept.forget()
        return output, weights

    def _parts(self, key: Tensor, value: Tensor) -> tuple[Part | None, Part | None]:
        """The heads that see everything and the others, with the keys and values that there are. Without a place of the
        visit's own in the cache, `key` and `value` are all of them."""
        if self.kept is not None:
            return self.kept.everywhere, self.kept.nearby
        columns, parts = torch.arange(key.shape[2], device=key.device), []
        for heads in divided(self.rule, key.shape[1]):
            keys, values = (key, value) if len(heads) == key.shape[1] else (key[:, heads], value[:, heads])
            parts.append(Part(heads, keys, values, columns) if heads else None)
        return tuple(parts)

    def _far(self, run: Callable, query: Tensor, part: Part, adds_mask: bool) -> tuple[Tensor, Tensor | None]:
        return run(query, part.keys, part.values, self.mask)

    def _near(self, run: Callable, query: Tensor, part: Part, adds_mask: bool) -> tuple[Tensor, Tensor | None]:
        """The heads with a window. Many queries go in blocks, each with the keys that some query of it sees."""
        queries, outputs, weights = query.shape[2], [], []
        step, dtype = max(self.rule.window, LEAST_BLOCK), query.dtype if adds_mask else None
        for first in range(0, queries, step):
            last = min(first + step, queries)
            keys, values, columns, mask = self._in_sight(part, first, last, queries <= step, dtype)
            output, weight = run(query[:, :, first:last], keys, values, mask)
            outputs.append(output)
            if weight is not None:
                total = int(part.columns[-1]) + 1  # every part has the newest token
                weights.append(weight.new_zeros(*weight.shape[:3], total).index_add(-1, columns, weight))
        if len(outputs) == 1:
            return outputs[0], weights[0] if weights else None
        return torch.cat(outputs, 1), torch.cat(weights, 2) if weights else None

    def _in_sight(self, part: Part, first: int, last: int, alone: bool, dtype: torch.dtype | None) -> tuple:
        """What queries `first` to `last` look at: (keys, values, their columns, the mask). alone: whether these are all
        queries; then nothing is picked out beforehand. dtype: as for `_mask`."""
        keys, values, columns = part.keys, part.values, part.columns
        if not alone:
            index = self._wanted(first, last, columns).nonzero().squeeze(-1)
            keys, values, columns = keys[:, :, index], values[:, :, index], columns[index]
        return keys, values, columns, self._mask(first, last, columns, dtype)

    def _starts(self, first: int, last: int, like: Tensor) -> Tensor:
        """Where the documents of these queries begin: (rows or 1, queries or 1)."""
        if self.start is None:
            return like.new_zeros(1, 1)
        return self.start[:, first:last] if self.start.shape[1] > 1 else self.start

    def _wanted(self, first: int, last: int, columns: Tensor) -> Tensor:
        """Which of `columns` some of these queries may see: (columns,), bool."""
        soonest, starts = columns.clamp(min=self.past + first), self._starts(first, last, columns).unique()[:, None]
        return (columns < self.past + last) & self.rule.visible(soonest, columns, starts).any(0)  # it is monotone

    def _mask(self, first: int, last: int, columns: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """Which of `columns` these queries see: (rows or 1, 1, queries, columns), bool, or to be added in `dtype`."""
        exact = self.kept is not None and not self.kept.record_past  # what is there is what the next query sees
        if exact and self.mask is None and self.start is None and self.past and last - first == 1:
            return None
        queries = self.past + torch.arange(first, last, device=columns.device)[:, None]
        start = self._starts(first, last, columns)[:, None, :, None]
        seen = self.rule.visible(queries, columns, start)
        if self.mask is None:
            return seen if dtype is None else added(seen, dtype)
        stock = self.mask[..., first:last, :][..., columns]
        return seen & stock if stock.dtype == torch.bool else stock.masked_fill(~seen, torch.finfo(stock.dtype).min)


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask of what is seen, to be added to scores."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)
