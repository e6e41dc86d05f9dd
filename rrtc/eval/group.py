"""An evaluation on several processes (torchrun): each measures a share of the items, and all know the whole."""

from collections.abc import Callable
from typing import TypeVar

import numpy
from accelerate.utils import gather_object
from numpy.typing import NDArray

from rrtc.measure import process_group

Value = TypeVar("Value")


def spread(count: int, measure: Callable[[list[int]], NDArray]) -> NDArray:
    """The figures (count, …) of so many items, on every process. `measure` makes those of a share of them, (share, …),
    from their numbers; with more processes than items, some make the first one's for nothing."""
    group = process_group()
    mine = list(range(group.process_index, count, group.num_processes)) or [0]
    figures = measure(mine)
    if group.num_processes == 1:
        return figures
    found = dict(gather_object(list(zip(mine, figures, strict=True))))
    return numpy.stack([found[number] for number in range(count)])


def share_of(count: int) -> int:
    """How many of so many items this process measures: what its progress bar has to count."""
    group = process_group()
    return len(range(group.process_index, count, group.num_processes)) or 1


def on_first_process(make: Callable[[], Value]) -> Value:
    """What `make` returns on the first process, on all of them: for what is timed, or written."""
    return from_first_process(make() if process_group().is_main_process else None)


def from_first_process(value: Value) -> Value:
    """What the first process gave, on all of them."""
    import torch.distributed

    if process_group().num_processes == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]
