"""A student shared out among the processes of torchrun (FSDP2), and made whole again to be written.

The unit is the slot: its weights are whole on a process only while one of its visits runs, forward or backward. What
belongs to no slot (embedding, final norm, head) is whole from the beginning of a step to its end, because the losses
are computed in pieces inside the student's own forward pass. Processes hold a part each of weights, gradients and
moments, and of nothing else: a teacher is whole on every one.

Whatever is written is whole and looks as if nothing had been sharded, so that any number of processes, sharded or not,
can go on from it.
"""

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from rrtc.machine import is_first_process
from rrtc.model.graft_rrt import Slot


def shard(student: nn.Module, device: torch.device, bfloat16: bool = False) -> None:
    """Makes the parameters of `student`, in place, DTensors of which each process of the group holds a part on its
    `device`. It may be on the CPU before: slots move one at a time.

    bfloat16: whether slots are gathered in bfloat16, which is what autocast makes of their matrices anyway, and would
    keep until the backward pass. Their norms then have bfloat16 gains too. The parts, and the sums of gradients, stay
    float32.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    halves = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for module in list(student.modules()):
        if isinstance(module, Slot):  # one by one: a list of them fails where one is used more than once
            fully_shard(module, mesh=mesh, mp_policy=halves if bfloat16 else MixedPrecisionPolicy())
    fully_shard(student, mesh=mesh)


def whole_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of `model`, sharded or not. Of a sharded one, which all processes have to ask for at the same time, the
    first process gets whole tensors on the CPU and the others get nothing."""
    if not isinstance(model, FSDPModule):
        return model.state_dict()
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def save_whole(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state of `optimizer`, whose parameters are sharded, one of whole tensors: `state_dict` gathers them, on
    the CPU of the first process alone, and is for all processes to call; `load_state_dict` takes its part of them."""
    optimizer.register_state_dict_post_hook(_gather)
    optimizer.register_load_state_dict_pre_hook(_scatter)


def _gather(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    return state_dict | {
        "state": {
            number: {name: _whole(value) for name, value in state.items()}
            for number, state in state_dict["state"].items()
        }
    }


def _whole(value):
    if not isinstance(value, DTensor):
        return value
    whole = value.full_tensor()
    return whole.cpu() if is_first_process else None


def _scatter(optimizer: torch.optim.Optimizer, state_dict: dict) -> dict:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return state_dict | {
        "state": {
            number: {name: _part(value, parameters[number]) for name, value in state.items()}
            for number, state in state_dict["state"].items()
        }
    }


def _part(value, parameter: DTensor):
    """What this process holds of a moment of `parameter`. Every process has the whole moment: nothing is sent."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value  # such as the number of steps
    return distribute_tensor(
        value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None
    )
