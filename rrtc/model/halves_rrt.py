"""A recursive model in two halves: up to an exit, which guesses the next token, and from there on.

Both are views: copies of the modules on the way to the list of layers, in which another list stands, and otherwise the
model's own modules. The model stays as it is, whatever happens, and others may use it meanwhile. The stock forward pass
runs both halves, so that positions, masks, norms and scaled or capped logits are whatever the architecture makes of
them.

This file is shipped in every export beside modeling_rrt.py and imports nothing but torch and transformers.
"""

import copy

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .graft_rrt import find_layers, leave
from .rows_rrt import RowsHead

PART = 4  # guesses are made among the first 1/PART of the vocabulary and what stands in the text already


def run(model, ids: Tensor, cache: Cache, **kwargs) -> Tensor:
    """The logits of `ids` (1, tokens), which come after what is in the cache."""
    past = cache.get_seq_length()
    positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
    return model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, return_dict=True, **kwargs
    ).logits


class DraftHead(nn.Module):
    """The rows of an output projection that guesses are made among: the first ones, because tokenizers learn frequent
    tokens first, and those of tokens that the text has. The columns of its logits are in that order."""

    def __init__(self, head: nn.Module, ids: Tensor):
        super().__init__()
        self.__dict__["whole"] = head  # not a child: it is the model's
        self.vocabulary = head.weight.shape[0]
        self.first = self.vocabulary // PART if type(head) in (nn.Linear, RowsHead) else self.vocabulary
        self.others = [token for token in dict.fromkeys(ids[0].tolist()) if token >= self.first]
        self._take()

    def _take(self) -> None:
        bias = getattr(self.whole, "bias", None)
        rows = self.whole.table.rows if isinstance(self.whole, RowsHead) else self.whole.weight.__getitem__
        self.weight = rows(self.others) if self.others else None
        self.bias = None if bias is None or not self.others else bias[self.others]

    def add(self, token: int) -> None:
        if token >= self.first and token not in self.others:
            self.others.append(token)
            self._take()

    def forward(self, hidden: Tensor) -> Tensor:
        if self.first == self.vocabulary:
            return self.whole(hidden)
        if isinstance(self.whole, RowsHead):
            logits = self.whole.table.project(hidden, self.whole.bias, self.first)
        else:
            bias = None if self.whole.bias is None else self.whole.bias[: self.first]
            logits = nn.functional.linear(hidden, self.whole.weight[: self.first], bias)
        if not self.others:
            return logits
        return torch.cat([logits, nn.functional.linear(hidden, self.weight, self.bias)], -1)

    def token(self, column: int) -> int:
        return column if column < self.first else self.others[column - self.first]

    def over_all(self, logits: Tensor) -> Tensor:
        """`logits` (columns,) as those of the whole vocabulary, (1, vocabulary)."""
        scores = logits.new_full((1, self.vocabulary), -torch.inf)
        scores[0, : self.first] = logits[: self.first]
        scores[0, self.others] = logits[self.first :]
        return scores


class Standing(nn.Module):
    """Stands in the place of a visit and calls `function` instead. Stock forward passes read attributes off layers."""

    def __init__(self, visit: nn.Module, function):
        super().__init__()
        self.__dict__["visit"], self.forward = visit, function

    def __getattr__(self, name):
        return getattr(self.__dict__["visit"], name)


class Halves:
    """The two halves of `model`, in front of and behind the exit after the visit at `place`, at work on one `cache`,
    which has been through the whole model. ids: (1, tokens), the text until now.

    costs: bytes that are read for a pass through the first half, through the second and the head, and the draft head.
    """

    def __init__(self, model, place: int, cache: Cache, ids: Tensor):
        stock, visits = model.stock, len(model.config.visits)
        parent, name = find_layers(stock, visits)
        layers, whole = list(getattr(parent, name)), stock.get_output_embeddings()
        paths = {id(module): path for path, module in stock.named_modules()}
        there = f"{paths[id(parent)]}.{name}".removeprefix(".")
        self.head, self._cache, self._ids, self._outputs = DraftHead(whole, ids), cache, ids, []
        first, second, exit_ = layers[: place + 1], layers[place + 1 :], layers[place]
        early = nn.ModuleList([*first[:-1], Standing(exit_, self._keeping(exit_))])
        self._early = _twin(stock, {there: early, paths[id(whole)]: self.head})
        known = [Standing(layer, lambda *args, **kwargs: self._known) for layer in first]
        self._late = _twin(stock, {there: nn.ModuleList([*known, *second])})
        # Masks are made for the first place of a kind in the cache: here, one that the second half is to write.
        later = cache.layers[place + 1 :]
        alike = [next((a for a in later if a.is_sliding == e.is_sliding), later[0]) for e in cache.layers[: place + 1]]
        self._later = Cache(layers=[*alike, *later])
        table = whole.table if isinstance(whole, RowsHead) else whole.weight
        sizes, head = [_bytes(layer) for layer in layers], table.nbytes
        draft = head * self.head.first / self.head.vocabulary
        way_out = sum(parameter.nbytes for parameter in exit_.parameters())
        self.costs = sum(sizes[: place + 1]) + way_out, sum(sizes[place + 1 :]) + head, draft

    def early(self, token: int) -> Tensor:
        """What the exit says after `token`, which comes next in the cache: logits (columns of the draft head,)."""
        return run(self._early, self._ids.new_tensor([[token]]), self._cache)[0, -1]

    def late(self) -> Tensor:
        """The logits (tokens, vocabulary) of the whole model for all that went through `early` since the last time."""
        outputs, self._outputs = self._outputs, []
        if isinstance(outputs[0], Tensor):
            self._known = torch.cat(outputs, 1)
        else:  # hidden states and more, as of some layers
            self._known = torch.cat([output[0] for output in outputs], 1), *outputs[0][1:]
        return run(self._late, self._ids.new_zeros(1, len(outputs)), self._later)[0]

    def _keeping(self, layer: nn.Module):
        """A function that runs `layer`, keeps what it returns, and leaves the model with it."""

        def keep(*args, **kwargs):
            self._outputs.append(layer(*args, **kwargs))
            return leave(layer, self._outputs[-1])

        return keep


def _twin(model: nn.Module, others: dict[str, nn.Module]) -> nn.Module:
    """`model` with other modules at these paths: copies of the modules on the way there, and otherwise its own."""
    twin = copy.copy(model)
    twin.__dict__["_modules"] = dict(model._modules)
    for path, module in others.items():
        name, _, rest = path.partition(".")
        twin._modules[name] = _twin(twin._modules[name], {rest: module}) if rest else module
    return twin


def _bytes(visit: nn.Module) -> int:
    """What is read to run a visit: its own weights and those that it shares."""
    layer = visit.slot().loops[visit.loop]
    shared = (m.shared() for m in layer.modules() if callable(getattr(m, "shared", None)))
    return sum(t.nbytes for module in (layer, *shared) for t in (*module.parameters(), *module.buffers()))
