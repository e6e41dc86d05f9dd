"""The model that a student learns from: what it says of each batch."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rrtc.model.forward import run_base, run_head


class LiveTeacher:
    """A dense model that is run on every batch. Its logits are made a piece at a time, as the student's are."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, temperature: float, keep_states: bool):
        """keep_states: whether lessons hold the hidden states after every layer."""
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.requires_grad_(False).eval().to(device)
        self.temperature, self.keep_states = temperature, keep_states

    @torch.no_grad()
    def __call__(self, ids: Tensor, **kwargs) -> "LiveLesson":
        """ids: (windows, context), int64. kwargs: what else the base model is given."""
        return LiveLesson(self, *run_base(self.model, ids, self.keep_states, **kwargs))


class LiveLesson:
    """What a LiveTeacher says of one batch. `states`: (windows, context, width) after each layer, if they are kept."""

    def __init__(self, teacher: LiveTeacher, hidden: Tensor, states: list[Tensor]):
        self._teacher, self._hidden, self.states = teacher, hidden.flatten(0, 1), states

    @torch.no_grad()
    def log_q(self, part: slice, log_p: Tensor) -> Tensor:
        """See rrtc.uptrain.losses.Lesson."""
        logits = run_head(self._teacher.model, self._hidden[part]).float()
        if self._teacher.temperature != 1:
            logits = logits / self._teacher.temperature
        return logits.log_softmax(-1)
