"""Visits that read another visit's keys and values: memory over loops (Feedback Transformer, arXiv 2002.09402).

A head with a window stores no more than it and its sinks. What lies behind them it can read from the same KV head of
another visit of its slot, its owner, which stores everything: of an earlier loop, or of a later one, so that tokens
attend to the highest representation of those before them.

The keys of a later loop are not there yet when an earlier one runs. But a key that is read lies a whole window back. So
visits from the first reader to the last owner run in blocks of at most one window: what a block reads of later loops
was made with the blocks before it. Which blocks these are makes no difference, so that training, reading a prompt and
single tokens are one function, and there is no fixed point to be found.

    base model      tells Loops that a forward pass begins and ends
    visits          all that run in blocks hand their arguments to Loops, and the last of them runs them all
    attention       a Look reads the owner's place in the cache; without a cache, what Loops remembers of the pass

This file is shipped in every export beside modeling_rrt.py and imports nothing but torch and transformers.
"""

import copy
import inspect
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer

from .attention_rrt import KeptLayer, Part, Rule, Sight, added
from .eyes_rrt import Documents, Eyes, cache_in

LEFT = "A model whose visits read later ones cannot be left between them."


@dataclass(frozen=True)
class OwnerRule(Rule):
    """A rule by which heads with a window read what lies behind it from the visit at the place `owner`."""

    owner: int = 0

    def read(self, query: Tensor, key: Tensor, start: Tensor) -> Tensor:
        """Whether such a head sees the owner's key: where it does not see its own. Arguments as of `visible`."""
        return (query - key >= self.window) & (key - start >= self.sinks)


def owned(visits: list[dict], rules: list[Rule | None]) -> "list[Rule | None]":
    """`rules` of `visits`, as in RrtConfig, with the places of their owners."""
    places = {(visit["slot"], visit["loop"]): place for place, visit in enumerate(visits)}
    found: list[Rule | None] = []
    for visit, rule in zip(visits, rules, strict=True):
        owner = (visit.get("attention") or {}).get("owner")
        if owner is not None:
            rule = OwnerRule(rule.window, rule.sinks, rule.heads, owner=places[visit["slot"], owner["loop"]])
        found.append(rule)
    return found


class Loops:
    """The visits of a model that read each other, while it runs.

    body: the places of the visits that run in blocks; none where all owners run before their readers. step: tokens in a
    block at most. remembered: by place, keys and values of this forward pass, where it has no cache.
    """

    def __init__(self, rules: list[Rule | None], documents: Documents):
        readers = {place: rule for place, rule in enumerate(rules) if isinstance(rule, OwnerRule)}
        later = {place: rule for place, rule in readers.items() if rule.owner > place}
        last = max((rule.owner for rule in later.values()), default=-1)
        self.body = range(min(later, default=0), last + 1)
        self.step = min((rule.window for rule in later.values()), default=0)
        self.least = min(rule.window for rule in readers.values())
        self.places = {*self.body, *readers, *(rule.owner for rule in readers.values())}
        self.documents, self.tokens = documents, 0
        self.remembered: dict[int, DynamicLayer] = {}
        self._waiting: list[tuple[LoopEyes, nn.Module, dict]] = []
        self._hidden: Tensor | None = None

    def begin(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """To be registered as a hook before the forward pass of the base model, with keyword arguments."""
        given = dict(zip(list(inspect.signature(type(model).forward).parameters)[1:], args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        self.tokens = tokens.shape[1]
        self._forget()
        for name in ("output_hidden_states", "output_attentions"):
            if self.runs_in_blocks and (given.get(name) or getattr(model.config, name, False)):
                raise ValueError(f"A model whose visits read later ones runs in blocks, and has no {name} to show.")

    def end(self, model: nn.Module, args: tuple, output) -> None:
        """To be registered as a hook after that forward pass, whether it succeeds or not."""
        left = self._forget()
        if left and output is not None:  # which it is where there was another error
            raise ValueError(LEFT)

    def _forget(self) -> bool:
        left = bool(self._waiting)
        self.remembered, self._waiting, self._hidden = {}, [], None
        return left

    @property
    def runs_in_blocks(self) -> bool:
        return bool(self.body) and self.tokens > self.step

    def wait(self, eyes: "LoopEyes", visit: nn.Module, hidden: Tensor, given: dict) -> Tensor:
        """What a visit of the body returns: to its last one, what all of them make of `hidden` (rows, tokens, width),
        and to those before just that, because they have not run yet. given: the arguments of its layer by name."""
        if eyes.place == self.body[0]:
            self._waiting = []
        elif hidden is not self._hidden:
            raise ValueError("Visits that read later ones run in blocks, and here something stands between them.")
        self._hidden = hidden
        self._waiting.append((eyes, visit, given))
        if eyes.place < self.body[-1]:
            if visit._forward_hooks:
                raise ValueError("What a visit returns cannot be watched where it waits for later ones.")
            return hidden
        calls, self._waiting, self._hidden = self._waiting, [], None
        if len(calls) < len(self.body):
            raise ValueError(LEFT)
        starts, outputs = self.documents.start, []
        columns = [eyes.columns(given, self.tokens)[1] for eyes, _, given in calls]
        try:
            for first in range(0, self.tokens, self.step):
                block = slice(first, min(first + self.step, self.tokens))
                states = hidden[:, block]
                self.documents.start = starts if starts is None or starts.shape[1] == 1 else starts[:, block]
                for (eyes, visit, given), offset in zip(calls, columns, strict=True):
                    states = eyes.look(visit, states, eyes.part_of(given, block, self.tokens, offset))
                outputs.append(states)
        finally:
            self.documents.start = starts
        return torch.cat(outputs, 1)


class LoopEyes(Eyes):
    """The eyes of a visit that reads another one, is read, or runs in blocks."""

    def __init__(self, layer: nn.Module, rule: Rule | None, loops: Loops):
        """rule: None where the visit attends to what the stock layer does."""
        super().__init__(layer, rule, loops.documents, Look)
        self.loops = loops

    def run(self, visit: nn.Module, args: tuple, kwargs: dict):
        given = self.named(args, kwargs)
        hidden = given.pop(self.names[0])
        if self.loops.runs_in_blocks and self.place in self.loops.body:
            return self.loops.wait(self, visit, hidden, given)
        return self.look(visit, hidden, given)

    def look(self, visit: nn.Module, hidden: Tensor, given: dict):
        """What the layer of `visit` makes of `hidden`."""
        given = self.arrange((hidden,), given)
        look, cache, owner = given["attention_mask"], cache_in(given), getattr(self.rule, "owner", None)
        if cache is None and self.loops.tokens > self.loops.least:
            look.remember(self._remembered())
        if owner is not None:
            layers = dict(enumerate(cache.layers)) if cache is not None else self.loops.remembered
            look.theirs = layers.get(owner)
        output = visit.slot()(given.pop(self.names[0]), loop=visit.loop, **given)
        if look.before is not None:
            self.loops.remembered[self.place] = look.after
        return output

    def arrange(self, args: tuple, kwargs: dict) -> dict:
        if self.rule is not None:
            return super().arrange(args, kwargs)
        given = dict(zip(self.names, args, strict=False)) | kwargs
        return given | {"attention_mask": Look(None, given.get("attention_mask"), None, 0, None)}

    def _remembered(self) -> DynamicLayer:
        found = self.loops.remembered.get(self.place)
        return found or (DynamicLayer() if self.rule is None else self.rule.place())

    def _place_in(self, given: dict) -> "DynamicLayer | StaticLayer":
        """Where the visit's keys and values are: in the cache, or in what is remembered."""
        cache = cache_in(given)
        if cache is None:
            return self._remembered()
        return cache.layers[self.place] if self.place < len(cache.layers) else DynamicLayer()

    def columns(self, given: dict, tokens: int) -> tuple[int, int]:
        """(how many columns the mask of so many new tokens has, the column that its first one is)."""
        return self._place_in(given).get_mask_sizes(tokens)

    def part_of(self, given: dict, block: slice, tokens: int, offset: int) -> dict:
        """The arguments of the layer for a block of so many tokens. offset: the first column of the whole mask."""
        mask, count = given.get("attention_mask"), block.stop - block.start
        length, first = self.columns(given, count)
        if mask is not None:
            mask = mask[..., block, first - offset : first - offset + length]
        elif length > count:  # no mask stands for a square one
            before = int(self._place_in(given).get_seq_length())
            device = next(t for t in pytree.tree_leaves(given) if isinstance(t, Tensor)).device
            queries = torch.arange(before, before + count, device=device)[:, None]
            mask = (torch.arange(first, first + length, device=device) <= queries)[None, None]

        def part(value):
            if not isinstance(value, Tensor):
                return value
            axes = [n for n in range(value.dim()) if value.shape[n] == tokens and (n > 0 or value.dim() == 1)]
            return value.narrow(axes[0], block.start, count) if axes else value

        others = {name: value if isinstance(value, Cache) else pytree.tree_map(part, value)
                  for name, value in given.items() if name != "attention_mask"}  # fmt: skip
        return others | {"attention_mask": mask}


class Look(Sight):
    """What a visit sees that reads another one, is read, or runs in blocks. rule: None where it is all.

    theirs: the owner's place in the cache, or in what is remembered. before, after: what is remembered of this visit
    without these tokens and with them. The former is not changed, because a layer whose activations are computed again
    for the gradient runs twice.
    """

    before: DynamicLayer | None = None
    after: DynamicLayer | None = None
    theirs: "DynamicLayer | StaticLayer | None" = None

    def remember(self, before: DynamicLayer) -> None:
        self.before, self.past, self._learns = before, int(before.get_seq_length()), torch.is_grad_enabled()

    def attend(self, run, module, query, key, value, adds_mask, **kwargs):
        if self.before is not None:
            if self._learns and not torch.is_grad_enabled():
                raise ValueError("Visits that read others need checkpointing with use_reentrant=False.")
            self.after = self.kept = _copied(self.before)
            key, value = self.after.update(key, value)
        if self.rule is not None:
            return super().attend(run, module, query, key, value, adds_mask, **kwargs)
        mask = self.mask
        if adds_mask and mask is not None and mask.dtype == torch.bool:
            mask = added(mask, query.dtype)
        return run(module, query, key, value, mask, **kwargs)

    def _in_sight(self, part: Part, first: int, last: int, alone: bool, dtype: torch.dtype | None) -> tuple:
        """Own keys and values as they are, and the owner's behind the window."""
        keys, values, columns, mask = super()._in_sight(part, first, last, alone, dtype)
        end = self.past + last - self.rule.window
        begin = min(self.rule.sinks, end) if self.start is None else 0
        if end <= begin or self.theirs is None:
            return keys, values, columns, mask
        there_keys, there_values = self._read(part.heads, begin, end, keys)
        there = torch.arange(begin, end, device=columns.device)
        beside = self._mask_there(first, last, there, dtype)
        if mask is not None or beside is not None:
            mask, beside = (_open(dtype, columns, last - first, n) if m is None else m
                            for m, n in ((mask, len(columns)), (beside, len(there))))  # fmt: skip
            rows = max(mask.shape[0], beside.shape[0])
            mask = torch.cat([m.expand(rows, -1, last - first, -1) for m in (mask, beside)], -1)
        return (
            torch.cat([keys, there_keys], -2), torch.cat([values, there_values], -2), torch.cat([columns, there]), mask
        )  # fmt: skip

    def _read(self, heads: list[int], begin: int, end: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The owner's keys and values of these KV heads in columns `begin` to `end`, brought to where `like` is."""
        layer = self.theirs
        if isinstance(layer, KeptLayer):
            there, keys, values = layer.everywhere.heads, layer.everywhere.keys, layer.everywhere.values
        elif type(layer) in (DynamicLayer, StaticLayer):
            there, keys, values = list(range(layer.keys.shape[1])), layer.keys, layer.values
        else:
            raise ValueError(f"a visit cannot read another one's keys in a {type(layer).__name__} of the cache")
        index = None if len(heads) == len(there) else [there.index(head) for head in heads]
        found = (tensor[:, :, begin:end] for tensor in (keys, values))
        keys, values = (tensor if index is None else tensor[:, index] for tensor in found)
        return keys.to(like.device), values.to(like.device)

    def _mask_there(self, first: int, last: int, columns: Tensor, dtype: torch.dtype | None) -> Tensor | None:
        """Which of the owner's `columns` these queries see; None: all."""
        if self.mask is None and self.start is None and last - first == 1:
            return None
        queries = self.past + torch.arange(first, last, device=columns.device)[:, None]
        seen = self.rule.read(queries, columns, self._starts(first, last, columns)[:, None, :, None])
        if self.mask is None:
            return seen if dtype is None else added(seen, dtype)
        stock = self.mask[..., first:last, :][..., columns]
        return seen & stock if stock.dtype == torch.bool else stock.masked_fill(~seen, torch.finfo(stock.dtype).min)


def _open(dtype: torch.dtype | None, like: Tensor, queries: int, columns: int) -> Tensor:
    """A mask that hides nothing."""
    seen = torch.ones(1, 1, queries, columns, dtype=torch.bool, device=like.device)
    return seen if dtype is None else added(seen, dtype)


def _copied(layer: DynamicLayer) -> DynamicLayer:
    """A place with the same tensors, to which tokens can be added without a change of this one."""
    made = copy.copy(layer)
    if isinstance(made, KeptLayer):
        made.everywhere, made.nearby = (part and replace(part) for part in (layer.everywhere, layer.nearby))
    return made
