"""What can be chosen in `rrtc generate` and `rrtc serve`, which are no stages and so no sections of a recipe."""

from typing import Any

from pydantic import Field, field_validator, model_validator

from rrtc.recipe.chat import ChatOptions
from rrtc.recipe.section import Section

CONTEXT = 4096  # tokens of a request that is served, where nobody says how many


class AnswerOptions(ChatOptions):
    """How a model goes on with a prompt. What is None is as the model's own generation defaults have it."""

    top_k: int | None = Field(
        None,
        ge=0,
        le=10**9,
        description="Draw from so many of the most probable tokens; 0: from all. By default as the model says, or as "
        "transformers, from 50.",
    )
    repetition_penalty: float | None = Field(
        None,
        ge=0.01,
        le=100,
        description="Above 1, tokens that were there before become less probable. By default as the model says.",
    )
    stop: list[str] = Field(
        [], max_length=16, description="An answer ends before this text. Can be given several times."
    )

    @field_validator("stop")
    @classmethod
    def _something_to_stop_at(cls, value: list[str]) -> list[str]:
        if "" in value:
            raise ValueError("every answer would end before an empty text")
        return value

    @model_validator(mode="after")
    def _many_to_draw_from(self) -> "AnswerOptions":
        if self.temperature == 0 and self.top_k is not None:
            raise ValueError("with temperature 0 nothing is drawn, so top_k says nothing")
        return self

    def of_generate(self) -> dict[str, Any]:
        given = super().of_generate()
        more: dict[str, Any] = {} if self.top_k is None else {"top_k": self.top_k}
        if self.top_k:  # from all is how it would be without
            more["do_sample"] = True
        if self.repetition_penalty is not None:
            more["repetition_penalty"] = self.repetition_penalty
        return given | more


class EngineOptions(Section):
    """How many requests go on at once, and what early exits are used for."""

    batch: int = Field(8, ge=1, le=4096, description="Requests that go on at once; the others wait.")
    speculate: int | None = Field(
        None,
        ge=0,
        le=64,
        description="Tokens that the exit after the first loop drafts, and the other loops check, at most: the text "
        "stays what it is without. 0: none. By default as many as are worth it, of a model with exits.",
    )
    exit_threshold: float | None = Field(
        None,
        gt=0,
        description="Leave a token at the first exit that is surer of it than this. The text becomes another one.",
    )
    exit_quality: float | None = Field(
        None,
        gt=0,
        le=10,
        description="Find the threshold at which the loss grows by no more than so many nats, on text of its own.",
    )
    catch_up: bool = Field(
        False,
        description="Let tokens that have left go through the later loops too, together with the next one that does: "
        "nothing is missing for those behind them, and less is saved.",
    )

    @model_validator(mode="after")
    def _one_way(self) -> "EngineOptions":
        given = [name for name in ("speculate", "exit_threshold", "exit_quality") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} are two ways to use exits; choose one of them")
        if self.catch_up and not (self.exit_threshold or self.exit_quality):
            raise ValueError("catch_up is for tokens that have left; add exit_threshold or exit_quality")
        return self

    @property
    def uses_exits(self) -> bool:
        """Whether the user asks for something that takes exits."""
        return bool(self.speculate or self.exit_threshold or self.exit_quality)


class WayOptions(AnswerOptions, EngineOptions):
    """What can be chosen in `rrtc generate`."""


class ServeOptions(EngineOptions):
    """What can be chosen in `rrtc serve`. How an answer is drawn is said by each request."""

    host: str = Field("127.0.0.1", description="Address to listen at; by default this machine alone can connect.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen at; 0: one that is free.")
    context: int | None = Field(
        None,
        ge=2,
        le=10**9,
        description="Tokens of a prompt and its answer at most; room for as many is kept for each request of the "
        f"batch. By default {CONTEXT:,}, or what the model can see if that is less.",
    )
    waiting: int = Field(256, ge=0, le=10**6, description="Requests that may wait; more are told to come back later.")
    api_key: str | None = Field(
        None, min_length=1, description="What clients have to send as their API key; by default they need none."
    )
