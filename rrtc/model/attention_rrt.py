"""What a visit attends to: one rule says which keys a query sees, and with that which of them the cache keeps.

The rule is monotone: a key that a query does not see is seen by no later one. So what the cache keeps is what the next
query sees, and a forward pass over everything, one in chunks, and one token by token agree. Some KV heads of a visit
see everything (the rule's `heads`), the others a window and the first tokens of their document (sinks, without which a
pretrained model breaks: Xiao et al. 2023, arXiv 2309.17453), and blocks of those between where there is a landmark.

    base model      notes where the document of each token begins (Documents)
    Visit           puts a Sight in the place of the attention mask, and its own layer into the cache (KeptLayer)
    attention       stock code all through; its kernel is looked up by name, and the name is ours (attend), which runs
                    the kernel that the user chose once for the heads that see everything and once for the others

This file is shipped in every export beside modeling_rrt.py and imports nothing but torch and transformers.
"""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .landmark_rrt import Landmark

KERNEL = "rrt"  # the name of `attend` among transformers' attention functions
MASKED_KERNELS = ("sdpa", "eager")  # those that can be told for each query what it sees
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


class Documents:
    """Where documents begin in the batch that a model works on: after the padding on the left, and where positions
    begin anew. The base model `model` notes it at every forward pass, and its visits read it."""

    def __init__(self, model: nn.Module):
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.start: Tensor | None = None  # (rows or 1, tokens or 1), columns; None: all of them at 0

    def note(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """To be registered as a hook before the forward pass of that model, with keyword arguments."""
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        starts = []
        if isinstance(mask, Tensor) and mask.dim() == 2:
            starts.append(mask.int().argmax(-1, keepdim=True))
        if isinstance(positions, Tensor) and positions.dim() == 2:
            cache = cache_in(given)
            past = 0 if cache is None else int(cache.get_seq_length())
            columns = past + torch.arange(tokens.shape[1], device=positions.device)
            # Positions skip what is masked, also within a document.
            if starts and mask.shape[1] >= past + tokens.shape[1]:
                columns = (starts[0] + mask.int().cumsum(-1) - 1)[:, columns]
            starts.append((columns - positions).clamp(min=0))
        start = None
        for one in starts:
            start = one if start is None else torch.maximum(start, one)
        self.start = None if start is None or not start.any() else start


def divided(rule: Rule, heads: int) -> tuple[list[int], list[int]]:
    """(the KV heads that see everything, the others) of so many."""
    return list(rule.heads), [head for head in range(heads) if head not in rule.heads]


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
            output[:, :, places] = found
            if weights is not None:
                weights[:, places] = weight
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


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """The attention function of visits that do not attend to everything."""
    chosen = module.config.stock._attn_implementation
    if chosen not in MASKED_KERNELS:
        named = " or ".join(MASKED_KERNELS)
        raise ValueError(f"A model with visits that see a window needs the kernel {named}, and not {chosen}.")
    run = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_kernel(module))
    if not isinstance(attention_mask, Sight):
        raise TypeError("a visit with a rule of attention was called without its Sight")
    return attention_mask.attend(run, module, query, key, value, adds_mask=chosen == "eager", **kwargs)


AttentionInterface.register(KERNEL, attend)


class KernelConfig:
    """The config that an attention module reads, with our kernel in the place of the one that the user chose."""

    _attn_implementation = KERNEL

    def __init__(self, stock: PreTrainedConfig):
        self.__dict__["stock"] = stock

    def __getattr__(self, name):
        if name.startswith("__") or name == "stock":  # copies are made before there is anything inside
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __setattr__(self, name, value):
        setattr(self.stock, name, value)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer that looks its kernel up by name; None where there is no such one."""
    found = [m for m in layer.modules() if m is not layer and hasattr(m, "layer_idx") and hasattr(m, "config")]
    return found[0] if len(found) == 1 and eager_kernel(found[0]) else None


def eager_kernel(attention: nn.Module) -> Callable | None:
    """The kernel that modules which look theirs up have beside them, for when none is chosen."""
    return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)


class Eyes:
    """A rule at work on one decoder layer: it arranges what the layer is called with."""

    def __init__(
        self, layer: nn.Module, rule: Rule, documents: Documents | None = None, sight: Callable[..., Sight] = Sight
    ):
        """Has the attention of `layer` run our kernel from now on. documents: None where every row is one document.
        sight: what makes the Sights."""
        attention = attention_of(layer)
        if attention is None:
            raise ValueError(f"the attention in a {type(layer).__name__} cannot be told which keys to see")
        self.rule, self.documents, self.sight, self.place = rule, documents, sight, attention.layer_idx
        self.attention, attention.config = attention, KernelConfig(attention.config)
        self.names = list(inspect.signature(type(layer).forward).parameters)[1:]

    def arrange(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of the layer by name, with a Sight for a mask, and the cache prepared."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cache = cache_in(given)
        kept, past = None, 0
        if cache is not None:
            prepare(cache, {self.place: self.rule})
            layer = cache.layers[self.place] if self.place < len(cache.layers) else None
            past = int(layer.get_seq_length()) if layer is not None else 0
            kept = layer if isinstance(layer, KeptLayer) else None
            if layer is not None and (layer.is_sliding or not isinstance(layer, DynamicLayer | StaticLayer)):
                raise ValueError(f"a visit with a rule of its own cannot use a {type(layer).__name__} in the cache")
        start = None if self.documents is None else self.documents.start
        given["attention_mask"] = self.sight(self.rule, given.get("attention_mask"), start, past, kept)
        return given

    def run(self, visit: nn.Module, args: tuple, kwargs: dict):
        """What the layer of `visit` makes of its arguments."""
        given = self.arrange(args, kwargs)
        return visit.slot()(given.pop(self.names[0]), loop=visit.loop, **given)

    def close(self) -> None:
        """Gives the attention its own kernel back."""
        self.attention.config = self.attention.config.stock


def cache_in(given: dict) -> Cache | None:
    """The cache among arguments by name: architectures call it differently."""
    return next((value for value in given.values() if isinstance(value, Cache)), None)


def prepare(cache, rules: dict[int, Rule]) -> None:
    """Puts KeptLayers into the places of a `cache` to which nothing was written yet. Caches that keep everything in
    another way (static ones) stay as they are: they give the same results, and save nothing."""
    if not isinstance(cache, Cache):
        return
    for place, rule in rules.items():
        while cache.layer_class_to_replicate is DynamicLayer and len(cache.layers) <= place:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[place] if place < len(cache.layers) else None
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[place] = rule.place()
