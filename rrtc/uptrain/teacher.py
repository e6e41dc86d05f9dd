"""The model that a student learns from: what it says of each batch."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rrtc.io.source import load_model
from rrtc.stock.parts import Parts, states_of
from rrtc.uptrain.losses import Lesson


class LiveTeacher:
    """A dense model that is run on every batch. Its logits are made a piece at a time, as the student's are."""

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device, temperature: float, keep_states: bool):
        """keep_states: whether lessons hold the hidden states after every layer."""
        self.model = load_model(folder, dtype=dtype).requires_grad_(False).to(device)
        self.parts, self.temperature = Parts(self.model), temperature
        self.kept = range(len(self.parts.layers)) if keep_states else ()

    @torch.no_grad()
    def __call__(self, ids: Tensor, **kwargs) -> "LiveLesson":
        """ids: (windows, context), int64. kwargs: what else the base model is given."""
        hidden, outputs = self.parts.run(ids, self.kept, **kwargs)
        return LiveLesson(self.parts, hidden, self.temperature, [states_of(output) for output in outputs])


class MeanLesson:
    """What several lessons about one batch say on the average. The gradient of forward_kl from it is the average of
    those from each of them."""

    def __init__(self, *lessons: Lesson):
        self._lessons = lessons

    def about(self, part: slice) -> Callable[[slice, Tensor], Tensor]:
        """See rrtc.uptrain.losses.Lesson."""
        every = [lesson.about(part) for lesson in self._lessons]

        def log_q(rows: slice, log_p: Tensor) -> Tensor:
            said = torch.stack([one(rows, log_p) for one in every])
            return said.logsumexp(0) - math.log(len(every))

        return log_q


class LiveLesson:
    """What a model says of one batch, its own head at work. No gradient goes back through it."""

    def __init__(self, parts: Parts, hidden: Tensor, temperature: float, states: Sequence[Tensor] = ()):
        """hidden: what the head of the model is given, (windows, context, width). states: the hidden states after each
        layer, likewise, if they are kept."""
        self._parts, self._hidden, self._temperature = parts, hidden.detach().flatten(0, 1), temperature
        self.states = states

    @torch.no_grad()
    def about(self, part: slice) -> Callable[[slice, Tensor], Tensor]:
        """See rrtc.uptrain.losses.Lesson."""
        logits = self._parts.head(self._hidden[part])

        def log_q(rows: slice, log_p: Tensor) -> Tensor:
            return (logits[rows].float() / self._temperature).log_softmax(-1)

        return log_q
