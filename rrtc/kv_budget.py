"""What a KV budget allows: how many KV heads can see everything, and which, and what the others see. Pure arithmetic,
no torch.

What windows cost adds up over layers, and within a layer over pairs of heads, so that the choice is made and its cost
is known before anything is built. Where heads may have something else than a window (`kinds`), it takes the bytes of
the window, so that a visit simply gets the kind that costs its heads least.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property

from rrtc.architecture import Architecture
from rrtc.attention import Attention, in_sight
from rrtc.errors import WrongUsage
from rrtc.kv_kinds import KEEP_TO_READ, KINDS, KV_NUMBER_BYTES, LAST_LOOP, NOTHING_TO_READ, kind_of
from rrtc.kv_owners import with_owners
from rrtc.plan import Plan
from rrtc.recipe.init import WIDEST_WINDOW, InitRecipe

Head = tuple[int, int]  # (layer, KV head)
WindowLosses = Mapping[int, Sequence[Sequence[float]]]  # by layer, what windows in both of two KV heads cost
KindLosses = Mapping[str, WindowLosses]  # by kind, the same of what takes the place of the windows
LEAST_CONTEXT = 4096  # tokens of a calibration window, where the model can see so many: less shows no distance
WINDOWS_IN_CONTEXT = 4  # what a calibration window holds at least of what a head sees
LONGER = (2, 4)  # times as long as half of the budget allows: windows that are tried as well
LOOKS_UP = 0.03  # of a head's attention on what is to be looked up: less is no looking up


class KvBudget:
    """The KV budget of `recipe` for models of one architecture.

    context: the tokens at which it counts. heads: those that can be given a window, because their layer has none of its
    own. window: what those see at least that do not see everything. kinds: by its name and by layer, what they may have
    in its place, of the same bytes. Raises WrongUsage where there are no such heads, where the model cannot see so many
    tokens, where the budget cannot be met, and where a kind does not fit into the window.
    """

    def __init__(
        self, architecture: Architecture, recipe: InitRecipe, window: int | None = None, lookups: int | None = None
    ):
        """window, and lookups, how many heads may see everything because they look up: in place of what follows from
        the recipe."""
        assert recipe.kv_budget is not None
        self._architecture, self._recipe = architecture, recipe
        self.context = _counted_context(architecture, recipe)
        free = [(n, layer) for n, layer in enumerate(architecture.layers) if layer.kv_heads and not layer.window]
        if not free:
            own = any(layer.window for layer in architecture.layers)
            reason = "has a window of its own" if own else "cannot be told what to see"
            raise WrongUsage(f"There are no KV heads to choose from: every layer of this model {reason}.")
        self.heads: list[Head] = [(number, head) for number, layer in free for head in range(layer.kv_heads)]
        self.window = Attention(window or _window(recipe, self.context), recipe.kv_sinks)
        self.kinds = {
            kind: {number: KINDS[kind](self.window, number, layer) for number, layer in free}
            for kind in recipe.kv_kinds
        }
        self._dense = architecture.kv_bytes(self.context, 1)
        self._for_lookups = lookups
        least = sum(layer.kv_numbers(self.context) for layer in architecture.layers)
        least -= sum(self._saved(layer) for layer, _ in self.heads)
        self._spare = recipe.kv_budget * self._dense - least  # for heads that see everything
        if self._spare < 0:
            raise WrongUsage(
                f"The KV budget of {recipe.kv_budget:g} cannot be met: where every head that can have one has a "
                f"window of {self.window.window} tokens, the cache takes {least / self._dense:.3f} of the dense "
                f"model's at {self.context:,} tokens.",
                "Ask for more, give a smaller --kv-window, or count at a longer --kv-context.",
            )

    @cached_property
    def ways(self) -> list["KvBudget"]:
        """What the choice is made of: this budget, and where the recipe names no window, the same with windows that are
        up to twice and up to four times as long, beside which fewer heads see everything: those that may because they
        look up still can."""
        if self._recipe.kv_window is not None or not self.is_measured:
            return [self]
        spare = self._spare - self._most_lookups() * max(self._saved(layer) for layer, _ in self.heads)
        more = int(spare // sum(self._width(layer) for layer, _ in self.heads))  # tokens, for every head
        most = min(self.window.window + max(more, 0), self.context)
        windows = dict.fromkeys(min(times * self.window.window, most) for times in LONGER)
        longer = (window for window in windows if window > self.window.window)
        return [self, *(KvBudget(self._architecture, self._recipe, n, self._most_lookups()) for n in longer)]

    def measured_as(self, kind: str) -> str:
        """By what name calibration knows what `kind` costs with this window."""
        return f"{kind}-{self.window.window}"

    @property
    def calibration_context(self) -> int:
        """How long the windows of text are at least, in tokens, from which the choice is made."""
        wanted = max(LEAST_CONTEXT, WINDOWS_IN_CONTEXT * max(way.window.window for way in self.ways))
        return min(wanted, self._architecture.context or wanted)

    @property
    def is_measured(self) -> bool:
        """Whether the choice goes by what a window costs each head."""
        return self._recipe.kv_choice == "measured"

    def spend(self, plan: Plan, losses: KindLosses, lookups: Mapping[Head, float]) -> Plan:
        """`plan` with as many heads that see everything as the budget allows: one after the other that which costs most
        with a window, beside those that have one still. What the others of a visit have is what costs them least, and
        windows get what bytes are left over.

        losses: of every kind; heads are sorted by the first. lookups: how much of its attention each head gives to what
        it is to look up; heads that do come first, up to their share. Both may be empty: then it is known how many they
        are, not which.
        """
        everything = self._seeing_most(losses.get(next(iter(self.kinds)), {}), lookups)
        windows = self._with_windows(plan, everything)
        reading = with_owners(windows, LAST_LOOP) if LAST_LOOP in self.kinds else windows
        if LAST_LOOP in self.kinds and not self.is_measured and "owner" not in reading.features:
            raise WrongUsage(NOTHING_TO_READ, KEEP_TO_READ)
        visits = []
        for local, reader in zip(windows.visits, reading.visits, strict=True):
            if local.attention is None:
                visits.append(local)
                continue
            near = [head for head in self.heads if head[0] == local.layer and head[1] not in local.attention.heads]
            able = [kind for kind in self.kinds if kind != LAST_LOOP or reader != local]
            kind = min(able, key=lambda kind: cost(near, losses.get(kind, {})), default=None)  # the first of several
            if kind is None or kind == LAST_LOOP:
                visits.append(reader)
                continue
            asked, heads = self.kinds[kind][local.layer], local.attention.heads
            more = local.attention.window - self.window.window
            visits.append(replace(local, attention=replace(asked, heads=heads, window=asked.window + more)))
        return replace(plan, visits=tuple(visits))

    def _with_windows(self, plan: Plan, everything: set[Head]) -> Plan:
        """`plan`, in which these heads see everything and the others a window."""
        local, free = replace(self.window, window=self.lengthened(everything)), {layer for layer, _ in self.heads}
        visits = []
        for visit in plan.visits:
            count = self._architecture.layers[visit.layer].kv_heads if visit.layer in free else 0
            heads = tuple(head for head in range(count) if (visit.layer, head) in everything)
            visits.append(replace(visit, attention=replace(local, heads=heads) if len(heads) < count else None))
        return replace(plan, visits=tuple(visits))

    def lengthened(self, everything: set[Head]) -> int:
        """The tokens in a window where these heads see everything: `window`, and what their bytes leave over, unless
        the recipe names the window."""
        taken = sum(self._saved(layer) for layer, _ in everything)
        each = sum(self._width(layer) for layer, head in self.heads if (layer, head) not in everything)
        if self._recipe.kv_window is not None or not each:
            return self.window.window
        return self.window.window + min(int((self._spare - taken) // each), self.context - self.window.most)

    def _seeing_most(self, losses: WindowLosses, lookups: Mapping[Head, float]) -> set[Head]:
        """The heads that are to see everything, as many as the budget allows."""
        visits = [[head for head in self.heads if head[0] == layer] for layer in sorted(dict(self.heads))]
        if not self.is_measured:
            return self._most(visits, _even if self._recipe.kv_choice == "even" else _last)
        if self._recipe.kv_grain == "visits":
            visits.sort(key=lambda visit: cost(visit, losses), reverse=True)
            return self._most(visits, _first)
        able = sorted((head for head in self.heads if lookups.get(head, 0.0) >= LOOKS_UP), key=lambda h: -lookups[h])
        first = able[: self._most_lookups()]
        ordered = [*first, *_dearest_first([[head for head in visit if head not in first] for visit in visits], losses)]
        return self._most([[head] for head in ordered], _first)

    def _most_lookups(self) -> int:
        """How many heads see everything because they look up, at most."""
        if self._for_lookups is not None:
            return self._for_lookups
        return round(self._recipe.kv_lookups * len(self._most([[head] for head in self.heads], _first)))

    def seeing_everything(self, plan: Plan) -> set[Head]:
        """Those of the heads that can have a window which see everything in `plan`."""
        windows = {visit.layer: visit.attention for visit in plan.visits if visit.attention is not None}
        return {(layer, head) for layer, head in self.heads if layer not in windows or head in windows[layer].heads}

    def explain(self, plan: Plan, losses: KindLosses) -> str:
        """What `plan` has made of the budget, in sentences for the user. losses: as for `spend`."""
        share = plan.kv_bytes(self.context, KV_NUMBER_BYTES) / (KV_NUMBER_BYTES * self._dense)
        everything = self.seeing_everything(plan)
        one_each = [next(iter(of_kind.values())) for of_kind in self.kinds.values()]
        more = self.lengthened(everything) - self.window.window
        said = dict.fromkeys(in_sight(replace(one, window=one.window + more).fields()) for one in one_each)
        return (
            f"{len(everything)} of {len(self.heads)} KV heads see everything, the others "
            f"{', or '.join(said)}: at {self.context:,} tokens the KV cache takes {share:.3f} of the dense model's."
            f"{self._explain_kinds(plan, losses) if len(self.kinds) > 1 else ''}{_explain_owners(plan)}"
            f"{'' if losses else self._explain_ways()}"
        )

    def _explain_ways(self) -> str:
        """What else it may become once it is known what windows cost."""
        own, *others = (way.lengthened(way._seeing_most({}, {})) for way in self.ways)
        longer = [f"{window:,}" for window in dict.fromkeys(others) if window != own]
        if not longer:
            return ""
        return f" Or {' or '.join(longer)} and fewer such heads, if that is measured to cost less."

    def _explain_kinds(self, plan: Plan, losses: KindLosses) -> str:
        """Which kind won where, and by how much it is predicted to."""
        if not losses:
            return " Each visit gets what costs its heads least, which is known once they are measured."
        layers: dict[str, list[int]] = {kind: [] for kind in self.kinds}
        saved: dict[str, float] = dict.fromkeys(self.kinds, 0.0)
        first = next(iter(self.kinds))
        for layer, near in _near_heads(plan, losses[first]).items():
            kind = kind_of(plan.visits[layer].attention)
            layers[kind].append(layer)
            saved[kind] += cost(near, losses[first]) - cost(near, losses[kind])
        won = [
            f"{kind} in layers {' '.join(map(str, places))} ({saved[kind]:.3f} nats a token less)"
            for kind, places in layers.items()
            if kind != first and places
        ]
        if not won:
            return f" Of {', '.join(self.kinds)}, {first} costs least in all {len(layers[first])} layers."
        return f" Instead of {first}: {', '.join(won)}."

    def _saved(self, layer: int) -> int:
        """Numbers that a window saves for one head of a layer."""
        return self._width(layer) * (self.context - self.window.kept(self.context))

    def _width(self, layer: int) -> int:
        """Numbers that one head of a layer keeps of a token."""
        heads = self._architecture.layers[layer]
        return heads.kv_width // heads.kv_heads

    def _most(self, units: list[list[Head]], some: Callable[[list, int], list]) -> set[Head]:
        """The heads of as many `units` as can see everything: some(units, count) of them."""
        for count in range(len(units), 0, -1):
            chosen = {head for unit in some(units, count) for head in unit}
            if sum(self._saved(layer) for layer, _ in chosen) <= self._spare:
                return chosen
        return set()


def _dearest_first(visits: Sequence[Sequence[Head]], losses: WindowLosses) -> list[Head]:
    """The heads of all `visits`: again and again the one whose window costs most beside those that are left."""

    def dearest(left: list[Head]) -> tuple[float, Head]:
        whole = cost(left, losses)
        return max(((whole - cost([one for one in left if one != head], losses), head) for head in left),
                   key=lambda gain: gain[0])  # fmt: skip

    order, left = [], [list(visit) for visit in visits if visit]
    next_of = [dearest(heads) for heads in left]
    while left:
        place = max(range(len(left)), key=lambda n: next_of[n][0])
        order.append(next_of[place][1])
        left[place].remove(order[-1])
        if left[place]:
            next_of[place] = dearest(left[place])
        else:
            del left[place], next_of[place]
    return order


def cheapest(
    ways: Sequence[tuple[KvBudget, KindLosses]], plan: Plan, lookups: Mapping[Head, float]
) -> tuple[Plan, float | None, str]:
    """(`plan` with the budget spent in the way that is predicted to cost least, that cost in nats a token, None where
    nothing was measured, and what was chosen, in sentences for the user).

    ways: of one budget, each with what was measured of its kinds; lookups: as for `KvBudget.spend`.
    """
    spent = [(way, losses, way.spend(plan, losses, lookups)) for way, losses in ways]
    costs = [predicted(made, losses) if losses else None for _, losses, made in spent]
    best = min(range(len(spent)), key=lambda place: costs[place] or 0.0)
    budget, losses, made = spent[best]
    said, named = budget.explain(made, losses), [made]
    for (other, _, there), cost in zip(spent, costs, strict=True):
        if there not in named and costs[best]:
            named.append(there)
            everything = other.seeing_everything(there)
            window = f"{other.lengthened(everything):,}"
            said += f" With windows of {window}, {len(everything)} would, for {cost:.3f} nats a token."
    return made, costs[best], said


def without_windows(plan: Plan) -> Plan:
    """`plan`, in which every visit attends to what its stock layer does."""
    return replace(plan, visits=tuple(replace(visit, attention=None) for visit in plan.visits))


def cost(heads: Sequence[Head], losses: WindowLosses) -> float:
    """What windows in `heads` cost together, in nats a token; 0 in layers of which nothing is known."""
    pairs = ((layer, head, other) for layer, head in heads for beside, other in heads if beside == layer)
    return sum(losses[layer][head][other] for layer, head, other in pairs if layer in losses)


def predicted(plan: Plan, losses: KindLosses) -> float:
    """What the windows of `plan`, and what is in their place, cost in nats a token."""
    near = _near_heads(plan, next(iter(losses.values())))
    return sum(cost(heads, losses[kind_of(plan.visits[layer].attention)]) for layer, heads in near.items())


def _near_heads(plan: Plan, losses: WindowLosses) -> dict[int, list[Head]]:
    """By layer, the heads that do not see everything. losses: what says how many heads there are."""
    windows = {visit.layer: visit.attention.heads for visit in plan.visits if visit.attention is not None}
    return {
        layer: [(layer, head) for head in range(len(losses[layer])) if head not in seeing]
        for layer, seeing in windows.items()
    }


def _explain_owners(plan: Plan) -> str:
    readers = sum(visit.attention is not None and visit.attention.owner is not None for visit in plan.visits)
    return f" {readers} visits read behind their windows what the last loop of their slot keeps." if readers else ""


def _counted_context(architecture: Architecture, recipe: InitRecipe) -> int:
    longest, asked = architecture.context, recipe.kv_context
    if asked is None and not longest:
        raise WrongUsage("This model's config does not say how many tokens it can see.", "Say it with --kv-context.")
    if asked is not None and longest and asked > longest:
        raise WrongUsage(
            f"The KV budget is to count at {asked:,} tokens, but this model can see {longest:,}.",
            f"Give --kv-context up to {longest}, or leave it out.",
        )
    return asked or longest


def _window(recipe: InitRecipe, context: int) -> int:
    """The window asked for, or the largest power of two that takes no more than half of the budget."""
    if recipe.kv_window is not None:
        return recipe.kv_window
    assert recipe.kv_budget is not None
    room = max(1, int(recipe.kv_budget * context / 2))
    return min(WIDEST_WINDOW, 1 << (room.bit_length() - 1))


def _first(units: list, count: int) -> list:
    return units[:count]


def _last(units: list, count: int) -> list:
    return units[len(units) - count :]


def _even(units: list, count: int) -> list:
    return [units[int((place + 0.5) * len(units) / count)] for place in range(count)]
