"""Keys and values of many requests: a place for every visit, in it a row for every request.

What a token has at a visit stands in the column of its arrival there, not of its position: a token that leaves early
never arrives at the later loops, and takes no room in them. Heads with a window keep no more than the window, what one
step brings, and their sinks: later tokens take the columns of those that have gone out of sight. Of heads that see
landmark blocks beyond, everything is kept.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rrtc.model.attention_rrt import Rule, divided


class Shelf:
    """Keys and values of some KV heads of one visit, (rows, heads, columns, width) each. They are made when the first
    token comes, as large as they will ever be.

    rule: what the heads see, or None where they see everything.
    """

    def __init__(self, heads: list[int], rule: Rule | None, columns: int):
        self.heads, self.rule, self.columns = heads, rule, columns
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def write(self, rows: int, row: int, columns: "slice | Tensor", keys: Tensor, values: Tensor) -> None:
        """keys, values: (1, all KV heads, tokens, width), of the tokens that get these columns of `row`. rows: how many
        there are."""
        if self.keys is None:
            shape = (rows, len(self.heads), self.columns, keys.shape[-1])
            self.keys = keys.new_empty(shape)  # what was not written is never read, and on a CPU takes no memory
            self.values = values.new_empty(*shape[:3], values.shape[-1])
        if len(self.heads) < keys.shape[1]:
            keys, values = keys[:, self.heads], values[:, self.heads]
        self.keys[row, :, columns], self.values[row, :, columns] = keys[0], values[0]

    def read(self, row: int, columns: int) -> tuple[Tensor, Tensor]:
        """The first columns of a row: (1, heads, columns, width) each."""
        return self.keys[row : row + 1, :, :columns], self.values[row : row + 1, :, :columns]


class Arrivals:
    """Which tokens of one request have come to a loop: `positions`, (tokens,), int64, in the order of their arrival,
    which is that of their positions. written: how many columns were ever written to since there was none; those behind
    the last arrival have what was taken back."""

    def __init__(self, context: int, device: torch.device):
        self._room = torch.empty(context, dtype=torch.long, device=device)
        self.count = self.written = 0

    @property
    def positions(self) -> Tensor:
        return self._room[: self.count]

    def add(self, positions: Tensor) -> None:
        self._room[self.count : self.count + len(positions)] = positions
        self.count += len(positions)
        self.written = max(self.written, self.count)

    def back_to(self, position: int) -> None:
        """Forgets the tokens from `position` on."""
        self.count = int((self.positions < position).sum())
        self.written = self.written if self.count else 0


class Sighting:
    """What the tokens of one span find on the shelves with one rule: where they are to be written, how many columns to
    read, and what each of them sees there. It is the same at every visit of a loop.

    rule: None where all is seen. arrivals: with the span's tokens in it. tokens: how many they are. ring: columns of
    such shelves, in which what is no sink goes round.
    """

    def __init__(self, rule: Rule | None, arrivals: Arrivals, tokens: int, ring: int):
        last, first = arrivals.count, arrivals.count - tokens
        self.mask: Tensor | None = None  # (1, 1, tokens, columns), bool; None: all is seen
        self.columns: slice | Tensor = slice(first, last)
        if rule is None:
            self.width = last
            if tokens > 1:
                self.mask = _not_later(arrivals.positions, tokens)
            return
        self.width = min(last, ring)
        turn = ring - rule.sinks
        if last > ring:
            new = torch.arange(first, last, device=arrivals.positions.device)
            self.columns = torch.where(new < rule.sinks, new, rule.sinks + (new - rule.sinks) % turn)
            # The newest token that has come to each column.
            column = torch.arange(ring, device=new.device)
            rounds = (last - 1 - column).div(turn, rounding_mode="floor")
            stands = arrivals.positions[torch.where(column < rule.sinks, column, column + rounds * turn)]
        else:
            stands = arrivals.positions
        queries = arrivals.positions[first:, None]
        self.mask = rule.visible(queries, stands, queries.new_zeros(()))[None, None]


def _not_later(positions: Tensor, tokens: int) -> Tensor:
    return (positions <= positions[-tokens:, None])[None, None]


class Store:
    """All shelves of a model, and the arrivals of every row."""

    def __init__(self, rules: Sequence[Rule | None], depths: Sequence[int], rows: int, context: int, most: int,
                 device: torch.device):  # fmt: skip
        """rules, depths: what the heads of each visit see (None: everything), and the loop that it belongs to. context:
        tokens of a request at most. most: tokens of a request in one step at most."""
        self.rows, self.context, self._rules, self._depths = rows, context, list(rules), list(depths)
        self._most, self._device = most, device
        self._shelves: dict[int, list[Shelf]] = {}
        self.arrivals: list[list[Arrivals]] = []
        for _ in range(rows):
            self.arrivals.append([Arrivals(context, device) for _ in range(max(depths) + 1)])

    def ring(self, rule: Rule | None, context: int | None = None) -> int:
        """Columns of a shelf whose heads see what the rule says. context: in place of its own."""
        context = context or self.context
        whole = rule is None or rule.landmark is not None
        return context if whole else min(context, rule.sinks + rule.window + self._most)

    def kinds(self, depth: int) -> set[Rule | None]:
        """What is seen by heads in that loop, without saying which heads."""
        found: set[Rule | None] = set()
        for rule, own in zip(self._rules, self._depths, strict=True):
            if own == depth:
                found |= {None} if rule is None else {_of_any_heads(rule), *([None] if rule.heads else [])}
        return found

    def shelves(self, visit: int, heads: int) -> list[Shelf]:
        """Those of one visit, whose keys and values have so many heads."""
        if visit not in self._shelves:
            rule = self._rules[visit]
            everywhere, nearby = (list(range(heads)), []) if rule is None else divided(rule, heads)
            near = rule and _of_any_heads(rule)
            made = [Shelf(part, kind, self.ring(kind)) for part, kind in ((everywhere, None), (nearby, near)) if part]
            self._shelves[visit] = made
        return self._shelves[visit]

    def forget(self, row: int) -> None:
        """Empties a row."""
        self.back_to(row, 0)

    def back_to(self, row: int, position: int) -> None:
        """Takes back what a row has from that position on, in every loop."""
        for arrivals in self.arrivals[row]:
            arrivals.back_to(position)

    def reach(self, row: int, position: int) -> int:
        """`position` where the row can be taken back to it and lacks nothing of what later tokens see; else 0."""
        for arrivals in self.arrivals[row]:
            before = int((arrivals.positions < position).sum())
            # What was taken back before has stood in the place of something, too.
            gone = arrivals.written - before > self._most and any(self._goes_round(rule) for rule in self._rules)
            if before < position or gone:
                return 0
        return position

    def _goes_round(self, rule: Rule | None) -> bool:
        return self.ring(rule) < self.context

    @property
    def bytes(self) -> int:
        """What the keys and values of all rows take."""
        return self.bytes_of(self.rows, self.context)

    def bytes_of(self, rows: int, context: int) -> int:
        """What they would take with so many rows and such a context, as far as a token has come to every visit."""
        made = [shelf for shelves in self._shelves.values() for shelf in shelves if shelf.keys is not None]
        return sum(
            rows * self.ring(shelf.rule, context) * tensor[0, :, 0].numel() * tensor.element_size()
            for shelf in made
            for tensor in (shelf.keys, shelf.values)
        )


def _of_any_heads(rule: Rule) -> Rule:
    return replace(rule, heads=())
