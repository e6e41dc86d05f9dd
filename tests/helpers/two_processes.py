"""What test_distributed.py runs in two processes on this machine's CPU; part of it also runs in one.

    torchrun --nproc-per-node 2 two_processes.py FOLDER

FOLDER/cases.json: arguments of `train`, by name; the results go to FOLDER/NAME.pt. FOLDER/runs.json: arguments of
rrtc's `uptrain`, each a list [folder, output, recipe, resume, micro-batch to be interrupted at or None].
"""

import json
import sys
from pathlib import Path
from unittest import mock

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from rrtc.machine import is_first_process, process_group
from rrtc.model.graft_rrt import Slot
from rrtc.recipe.schema import Recipe
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.uptrain import losses
from rrtc.uptrain.sharding import shard, whole_state
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.student import Student
from rrtc.uptrain.teacher import LiveTeacher
from rrtc.uptrain.trainer import DistillationTrainer

CPU = torch.device("cpu")
COMPUTE_LOSS = DistillationTrainer.compute_loss


@mock.patch.object(losses, "LOGITS_AT_ONCE", 5 * 320)  # several pieces
def train(folder: str, teacher: str, weights: dict, bfloat16: bool = False, sharded: bool = False) -> dict:
    """Four steps in plain PyTorch: the objectives, the gradients of the first step, and the weights at the end. The
    processes share every batch out, and return what one process returns."""
    rank, world = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if sharded else (0, 1)
    recipe = UptrainRecipe(losses=weights)
    live = LiveTeacher(Path(teacher), torch.float32, CPU, recipe.temperature, keep_states=True)
    student = Student.from_pretrained(folder, dtype=torch.float32).train()
    if sharded:
        shard(student, CPU, bfloat16)
        for name, parameter in student.named_parameters():
            assert isinstance(parameter, DTensor) and parameter.dtype == torch.float32, name
            assert parameter.to_local().numel() < parameter.numel(), name
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    found = {"objectives": [], "gradients": {}}
    for step in range(4):
        ids = torch.randint(320, (4, 17), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            objective = student(ids[:, :-1], ids[:, 1:], recipe, live(ids[:, :-1]))["objective"]
        objective.backward()
        if sharded:
            slots = [module for module in student.modules() if isinstance(module, Slot)]
            assert all(isinstance(parameter, DTensor) for slot in slots for parameter in slot.parameters())
            torch.distributed.all_reduce(objective.detach().div_(world))
        found["objectives"].append(objective.item())
        if step == 0:
            found["gradients"] = {
                name: parameter.grad.full_tensor() if sharded else parameter.grad
                for name, parameter in student.named_parameters()
            }
        optimizer.step()
        optimizer.zero_grad()
    found["weights"] = whole_state(student)
    return found


def watch(recipe: Recipe, interrupted_at: int | None) -> None:
    """From now on, every micro-batch asserts that the model is shared out as the recipe says, and the one of that
    number, counted from now, is interrupted by Ctrl-C on every process."""
    done = 0

    def watched(self, model, *args, **kwargs):
        nonlocal done
        done += 1
        if done == interrupted_at:
            raise KeyboardInterrupt
        assert {isinstance(parameter, DTensor) for parameter in model.parameters()} == {recipe.uptrain.fsdp}
        assert isinstance(model, DistributedDataParallel) != recipe.uptrain.fsdp
        return COMPUTE_LOSS(self, model, *args, **kwargs)

    DistillationTrainer.compute_loss = watched


def main(folder: Path) -> None:
    assert process_group().num_processes == 2 and torch.distributed.get_backend() == "gloo"
    for name, case in json.loads((folder / "cases.json").read_text()).items():
        found = train(**case, sharded=True)
        if is_first_process:
            torch.save(found, folder / f"{name}.pt")
    for rrt, output, given, resume, interrupted_at in json.loads((folder / "runs.json").read_text()):
        recipe = Recipe.model_validate(given)
        watch(recipe, interrupted_at)
        try:
            uptrain(rrt, output, recipe, resume)
        except KeyboardInterrupt:
            assert interrupted_at
            process_group().wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
