"""The machine that rrtc runs on: its accelerator and its memory, and the processes of torchrun that work together.

Heavy libraries are imported inside the functions: the console asks this module which process it is in, and must not
wait for torch.
"""

import os
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from rrtc.errors import RrtcError
from rrtc.units import size

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState
    from numpy.typing import NDArray

MODEL_SHARE = 0.7  # of the free memory that a model may take; the rest is for what it computes
PATIENCE = timedelta(hours=6)  # of a process with one that it waits for

Value = TypeVar("Value")

is_first_process = int(os.environ.get("RANK", "0")) == 0


def device() -> "torch.device":
    """The accelerator of this machine, or its CPU."""
    import torch

    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32: an accelerator that has it, or AMX."""
    import torch

    if device().type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device().type == "cpu" and torch.cpu._is_amx_tile_supported()


def scoring_dtype() -> "torch.dtype":
    """The dtype that models are scored in: float32 on a CPU, bfloat16 on an accelerator."""
    import torch

    return torch.float32 if device().type == "cpu" else torch.bfloat16


def free_memory(of: "torch.device") -> int:
    """Bytes that are free now where `of` computes."""
    import psutil
    import torch

    module = torch.get_device_module(of)
    return module.mem_get_info(of)[0] if hasattr(module, "mem_get_info") else psutil.virtual_memory().available


def is_too_large(parameters: int, dtype: "torch.dtype") -> bool:
    """Whether a model of so many parameters does not fit into the memory that is free now, in `dtype`."""
    import psutil

    return parameters * dtype.itemsize > MODEL_SHARE * psutil.virtual_memory().available


def too_large(why: str, parameters: int, dtype: "torch.dtype", hint: str, times: int = 1) -> RrtcError:
    """What to raise where the model, so many times, `is_too_large` for what has to be done with it whole."""
    often = f"{times} times " if times > 1 else ""
    return RrtcError(
        f"{why}, the whole model has to be in memory, and {often}its {size(parameters * dtype.itemsize)} do not fit.",
        hint,
    )


def process_group() -> "PartialState":
    """The processes that work together: those of torchrun, or this one alone."""
    from accelerate import PartialState

    # Without the flag, processes on CPUs would not see each other. The first one tokenizes and writes checkpoints
    # alone, and torch's own patience with it ends after 10 minutes.
    return PartialState(cpu=device().type == "cpu", timeout=PATIENCE)


def spread(count: int, measure: Callable[[list[int]], "NDArray"]) -> "NDArray":
    """The figures (count, …) of so many items, on every process. `measure` makes those of a share of them, (share, …),
    from their numbers; with more processes than items, some make the first one's for nothing."""
    import numpy
    from accelerate.utils import gather_object

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
    if process_group().num_processes == 1:
        return value
    import torch.distributed

    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]
