"""A request: a prompt, what was said to it until now, and the tokens that take part in the next step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from rrtc.generate.sampling import Drawing
from rrtc.generate.stages import Span

Ended = Literal["by itself", "max_tokens", "context", "stopped", "failed"]


@dataclass(eq=False)
class Request:
    """prompt: token ids. most: how many are said at most. say(token) is called with each of them as it comes; what it
    returns says whether the request is to end with it."""

    prompt: list[int]
    most: int
    drawing: Drawing
    say: Callable[[int], bool] = lambda token: False
    room: bool = True  # whether `most` is what was asked for; else the context allows no more
    said: list[int] = field(default_factory=list)
    ended: Ended | None = None
    error: Exception | None = None  # with which it failed
    row: int = -1
    span: Span | None = None
    drafts: list[int] = field(default_factory=list)  # tokens
    states: list[Tensor] = field(default_factory=list)  # of the tokens whose drafts these are, as they left the loop
    owed: dict[int, tuple] = field(default_factory=dict)  # by loop: (positions, states) of tokens that left after it
    entered: int = 0  # tokens of the prompt that have entered the first loop
    since: int = 0  # tokens that it said without drafts

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.said

    @property
    def unread(self) -> bool:
        """Whether some of the prompt has not entered yet."""
        return self.entered < len(self.prompt)

    def read_on(self, chunk: int) -> None:
        """The next tokens of the prompt come next."""
        ids = self.prompt[self.entered : self.entered + chunk]
        self.enter(ids, self.entered)
        self.entered += len(ids)

    def take(self, token: int) -> None:
        """Notes that this is said next."""
        self.said.append(token)
        self.drawing.go_on()
        if self.say(token):
            self.ended = "stopped"
        elif token in self.drawing.ends:
            self.ended = "by itself"
        elif len(self.said) == self.most:
            self.ended = "max_tokens" if self.room else "context"

    def enter(self, ids: list[int], first: int) -> None:
        """Fresh tokens, from position `first` on, come next."""
        device = self.drawing.device
        positions = torch.arange(first, first + len(ids), device=device)
        self.span = Span(self.row, 0, positions, ids=torch.tensor(ids, device=device))

    def go_on(self, loop: int, positions: Tensor, states: Tensor) -> None:
        """These tokens go through another loop."""
        self.span = Span(self.row, loop, positions, states=states)
