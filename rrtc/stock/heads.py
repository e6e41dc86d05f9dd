"""What the KV heads of a stock layer do while it runs: how much the loss feels it when each of them sees no more than a
window or what is in its place, and how much of its attention goes to tokens that are to be looked up.

Both are Sights: they stand in the place of the attention mask while `Parts.run_layer` runs the layer as it is.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer

from rrtc.model.attention_rrt import Rule, Sight
from rrtc.model.owner_rrt import Look, OwnerRule


def _by_kv_head(values: Tensor, kv_heads: int) -> Tensor:
    """(rows, tokens, query heads) -> (rows, tokens, KV heads, query heads of each)."""
    return values.unflatten(-1, (kv_heads, -1))


class Losses:
    """Adds up for the KV heads of a layer what it costs, as the loss feels it, that they see no more than a rule lets
    them: E[(g·d)(g'·d')]/2 in nats a token for every two heads, where d is what the rule changes in a head's output and
    g the gradient of the loss with respect to that output. The sum over all pairs of the heads that have a window is
    the second-order change of the loss for gradients of labels that the model itself draws (the Fisher information).

    rules: by kind, those that are tried, by each of which no head sees everything. theirs: for an OwnerRule, what
    `kept` says of the layer that is read, of the same windows. keeps: whether this layer is to be read.
    """

    def __init__(
        self, tokens: int, rules: Mapping[str, Rule], theirs: Mapping[str, Tensor] | None = None, keeps: bool = False
    ):
        self._tokens, self._rules, self._theirs, self._rows = tokens, rules, theirs, 0
        self._totals: dict[str, Tensor] = {}
        self._keeps, self._seen = keeps, []  # keys and values of the batches so far

    def sight(self, rule: Rule, *given) -> Sight:
        """To be given to `Parts.attending`, with whatever rule."""
        return _Compared(self, rule, *given)

    def tried(self, given: tuple, key: Tensor, value: Tensor) -> Iterator[tuple[str, Sight]]:
        """By kind, what takes the place of the mask of the next windows, which have these keys and values."""
        if self._keeps:
            self._seen.append((key.detach().cpu(), value.detach().cpu()))
        windows, theirs = slice(self._rows, self._rows + len(key)), DynamicLayer()
        if self._theirs is not None:
            theirs.update(self._theirs["keys"][windows], self._theirs["values"][windows])
        self._rows += len(key)
        for kind, rule in self._rules.items():
            sight = (Look if isinstance(rule, OwnerRule) else Sight)(rule, *given)
            if isinstance(sight, Look):
                sight.theirs = theirs
            yield kind, sight

    def kept(self) -> dict[str, Tensor]:
        """Keys and values of the layer, if it is to be read: (windows, KV heads, tokens, width)."""
        keys, values = zip(*self._seen, strict=True)
        return {"keys": torch.cat(keys), "values": torch.cat(values)}

    def finish(self) -> dict[str, Tensor]:
        """By kind: (KV heads, KV heads), float64, nats a token."""
        return {kind: total / (2 * self._tokens) for kind, total in self._totals.items()}

    def add(self, kind: str, gradient: Tensor, change: Tensor, kv_heads: int) -> None:
        felt = _by_kv_head((gradient * change).sum(-1), kv_heads).sum(-1).flatten(0, 1).double()
        self._totals[kind] = self._totals.get(kind, 0.0) + (felt.T @ felt).cpu()


class _Compared(Sight):
    """Computes what the stock layer does; beside it, what it would be with each rule of `losses`."""

    def __init__(self, losses: Losses, rule: Rule, *given):
        super().__init__(rule, *given)
        self._losses, self._given = losses, given

    def attend(self, run: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, adds_mask: bool,
               **kwargs) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        output, weights = run(module, query, key, value, self.mask, **kwargs)
        if output.requires_grad:
            for kind, sight in self._losses.tried(self._given, key, value):
                with torch.no_grad():
                    change = sight.attend(run, module, query, key, value, adds_mask, **kwargs)[0] - output
                output.register_hook(partial(self._felt, kind, change, key.shape[1]))
        return output, weights

    def _felt(self, kind: str, change: Tensor, kv_heads: int, gradient: Tensor) -> None:
        self._losses.add(kind, gradient, change, kv_heads)


class LookedUp:
    """Takes the mean, for each KV head of a layer, of the attention that some queries give to the tokens that they are
    to look up; of the query heads of a KV head, that of the one that gives most."""

    def __init__(self, wanted: Sequence[Sequence[tuple[int, tuple[int, ...]]]]):
        """wanted: for each window of the batch (query, tokens to look up), both as places in the window."""
        self._wanted = wanted
        self.mass: Tensor | None = None  # (KV heads,), of the last time that the layer ran

    def sight(self, *given) -> Sight:
        """To be given to `Parts.attending`."""
        return _Asked(self, *given)


class _Asked(Sight):
    def __init__(self, asking: LookedUp, *given):
        super().__init__(*given)
        self._asking = asking

    def attend(self, run: Callable, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, adds_mask: bool,
               **kwargs) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """With values that are 1 in one place for the tokens that a query is to look up, and 0 elsewhere, attention's
        output is the weight of these tokens, whatever the kernel."""
        width, wanted = value.shape[-1], self._asking._wanted
        found: list[Tensor] = []
        for first in range(0, max(map(len, wanted)), width):
            marks = torch.zeros_like(value)
            for row, asked in enumerate(wanted):
                for place, (_, tokens) in enumerate(asked[first : first + width]):
                    marks[row, :, list(tokens), place] = 1
            weight, _ = run(module, query, key, marks, self.mask, **kwargs)
            for row, asked in enumerate(wanted):
                for place, (at, _) in enumerate(asked[first : first + width]):
                    found.append(weight[row, at, :, place])
        by_head = torch.stack(found)[None]  # (1, questions, query heads)
        self._asking.mass = _by_kv_head(by_head, key.shape[1]).mean(1).amax(-1)[0].cpu()
        return run(module, query, key, value, self.mask, **kwargs)
