"""The neurons of an FFN that several layers share, lined up: found once, when the planner weighs the layers, and used
again when their slot is made."""

from dataclasses import dataclass

from torch import Tensor

from rrtc.tying.neurons import Neurons, Removal, align, removal, reordered_seen
from rrtc.tying.whiten import Seen


@dataclass(frozen=True)
class Lineup:
    """Of the FFN that `reader` reads in `layers`: orders, of each layer but the first, (index, signs) as `align` finds
    them; gone, how neurons leave all of them, at no step where that was not asked."""

    layers: tuple[int, ...]
    reader: str
    orders: tuple[tuple[Tensor, Tensor], ...]
    gone: Removal

    def turned(self, name: str, group: list[Seen], inner: Neurons) -> list[Seen]:
        """How the matrix `name` of each layer is seen, in the order of the first layer's neurons."""
        first, *others = group
        return [first, *(reordered_seen(name, o, inner, *order) for o, order in zip(others, self.orders, strict=True))]


def line_up(layers: tuple[int, ...], ffns: list[dict[str, Seen]], inner: Neurons, removes: bool) -> Lineup:
    """Lines up the neurons `inner` of `layers`. ffns: for each layer how its matrices are seen. removes: find out in
    which order they go, too."""
    orders = tuple(align(ffns[0], other, inner) for other in ffns[1:])
    found = Lineup(layers, inner.reader, orders, Removal.none(inner.width))
    if not removes:
        return found
    readers = found.turned(inner.reader, [ffn[inner.reader] for ffn in ffns], inner)
    return Lineup(layers, inner.reader, orders, removal(readers))
