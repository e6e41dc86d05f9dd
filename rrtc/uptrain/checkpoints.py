"""The checkpoints of a run: which of them are whole, and a callback that has one written after step 1 too and reads it
back, so that a run cannot fail only at its end."""

import contextlib
import json
import os
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerState

from rrtc.console import warn
from rrtc.errors import RrtcError
from rrtc.io.folder import file_hash, whole_file
from rrtc.io.folder import remove as remove_folder
from rrtc.io.weights import Weights
from rrtc.machine import is_first_process
from rrtc.plain import read_json
from rrtc.uptrain.job import Job
from rrtc.uptrain.sharding import whole_state

WHOLE = "rrtc-whole"  # a file in each checkpoint that was written to the end: the SHA-256 of its other files by name


def whole_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that were written to the end, oldest first."""
    whole = [marker.parent for marker in Path(folder).glob(f"checkpoint-*/{WHOLE}")]
    return sorted(whole, key=step_number)


def mark_whole(checkpoint: Path) -> None:
    """Writes down that `checkpoint` is complete, and what is in it."""
    found = {file.name: file_hash(file) for file in sorted(checkpoint.iterdir()) if file.is_file()}
    with whole_file(checkpoint / WHOLE) as mark:
        mark.write_text(json.dumps(found, indent=2) + "\n", encoding="utf8")


def wrong_file(checkpoint: Path) -> str | None:
    """The name of a file of a checkpoint that is missing or not as it was written; None where all are."""
    try:
        written = read_json(checkpoint / WHOLE)
        for name, sha256 in written.items():
            if not os.path.isfile(checkpoint / name) or file_hash(checkpoint / name) != sha256:
                return name
    except (OSError, ValueError, AttributeError, TypeError):
        return WHOLE
    return None


def last_sound(checkpoints: list[Path]) -> Path:
    """The last of `checkpoints`, which are whole, in which every file is as it was written. Says which ones it passes
    over. Raises RrtcError where there is none."""
    for number, checkpoint in enumerate(reversed(checkpoints), 1):
        wrong = wrong_file(checkpoint)
        if wrong is None:
            return checkpoint
        if number < len(checkpoints):
            warn(f"{checkpoint.name} is damaged ({wrong}): the run goes on from the checkpoint before it.")
    raise RrtcError(
        f"The run cannot be resumed: {checkpoints[0]} is damaged ({wrong}), and there is no other checkpoint.",
        f"Delete {checkpoints[0].parents[1]}, and start anew.",
    )


def remove(folder: Path) -> None:
    """Removes `folder` and the checkpoints in it, as far as the disk lets it. Their marks go first, so that what a kill
    on the way leaves behind is not taken for a checkpoint."""
    for marker in list(Path(folder).rglob(WHOLE)):
        with contextlib.suppress(OSError):
            marker.unlink()
    remove_folder(folder)


def step_number(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


class Checkpoints(TrainerCallback):
    """Has a checkpoint written after step 1 as well, and compares it with what is in memory. Checks too that the model
    to be written in the end has what it needs. A continued run has been through this."""

    def __init__(self, job: Job):
        self.job = job

    def on_train_begin(self, args, state, control, **kwargs):
        state.save_steps = args.save_steps  # a continued run comes with what its checkpoint says

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            control.should_save = True

    def on_save(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step != 1:
            return
        weights, moments = whole_state(model), optimizer.state_dict()["state"]  # sharded ones all processes ask for
        for name in model.critic_names:
            weights.pop(name, None)
        if not is_first_process:
            return
        checkpoint = Path(args.output_dir) / "checkpoint-1"
        try:
            wrong = (
                _wrong_weights(checkpoint, weights)
                or _wrong_state(checkpoint, moments)
                or _missing(self.job.folder, weights)
            )
        except Exception as error:  # a damaged file can raise anything on the way through torch, pickle and json
            wrong = f"reading it raised '{' '.join(str(error).split()) or type(error).__name__}'"
        if wrong:
            remove(checkpoint)
            raise RrtcError(
                f"The checkpoint after step 1 is not what was to be written: {wrong}.",
                "Nothing but that step is lost. Is the disk sound, and has it enough space?",
            )


def _wrong_weights(checkpoint: Path, state: dict[str, torch.Tensor]) -> str | None:
    """How the weights in a checkpoint differ from those in memory; None where they are the same bits."""
    saved = Weights(checkpoint)
    names = set(saved)
    stored = [state[name] for name in names & state.keys()]
    for name, tensor in state.items():
        if name not in names:
            if not any(torch.equal(tensor, other) for other in stored):  # tied tensors are written once
                return f"it has no tensor {name}"
        elif not torch.equal(saved.raw(name), tensor.cpu()):
            return f"the tensor {name} has another shape or other numbers"
    return None


def _wrong_state(checkpoint: Path, moments: dict) -> str | None:
    """How the optimizer's state in a checkpoint differs from that in memory; None where it is the same bits."""
    TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    torch.load(checkpoint / "scheduler.pt", weights_only=True)
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)["state"]
    for parameter, values in moments.items():
        for name, value in values.items():
            found = saved[parameter][name]
            if not (torch.equal(found, value.cpu()) if isinstance(value, torch.Tensor) else found == value):
                return f"the optimizer's {name} of parameter {parameter} has other numbers"
    return None


def _missing(folder: Path, state: dict[str, torch.Tensor]) -> str | None:
    """What the model to be written in the end, which has the tensors of `folder`, would lack; None for nothing."""
    source = Weights(folder)
    for name in source:
        if name not in state or list(state[name].shape) != source.shape(name):
            return f"the model in memory has no tensor {name} of the shape that it has in {folder}"
    return None
