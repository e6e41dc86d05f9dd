"""What can be chosen of the answers in `rrtc chat`, which is no stage and so no section of a recipe."""

from pydantic import Field, model_validator

from rrtc.errors import WrongUsage
from rrtc.recipe.section import Section

LOWEST = 0.001  # temperature by which scores can be divided, however large they are


class ChatOptions(Section):
    """How a model answers. What is None is as the model's own generation defaults have it."""

    max_tokens: int = Field(512, ge=1, le=10**9, description="Length of an answer at most.")
    temperature: float | None = Field(
        None,
        ge=0,
        le=100,
        description="How freely tokens are drawn; 0: always the most probable one. By default as the model's own "
        "generation_config.json says.",
    )
    top_p: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Draw from the most probable tokens that have this share together. By default as the model says.",
    )
    seed: int | None = Field(
        None, ge=0, lt=2**32, description="Draw the same again; by default, every answer is another one."
    )

    @model_validator(mode="after")
    def _something_to_draw_from(self) -> "ChatOptions":
        if self.temperature is not None and 0 < self.temperature < LOWEST:
            raise ValueError(f"a temperature below {LOWEST} is 0, or greater than that")
        if self.temperature == 0 and self.top_p is not None:
            raise ValueError("with temperature 0 nothing is drawn, so top_p says nothing")
        return self

    def of_generate(self) -> dict[str, bool | float]:
        """The arguments of transformers' `generate` that say how to draw; those that the model's own defaults decide
        are left out."""
        if self.temperature == 0:
            return {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}  # its own, which it warns of not
        given = {name: getattr(self, name) for name in ("temperature", "top_p") if getattr(self, name) is not None}
        # To draw from all tokens is how it would be without: it does not ask for drawing.
        return given | {"do_sample": True} if given and given != {"top_p": 1} else given


def check_prompt(prompt: str) -> None:
    """Raises WrongUsage where there is nothing in it that a model could answer."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise WrongUsage("The prompt holds bytes that are no text.", "Write it in UTF-8.") from error
    if not prompt.strip():
        raise WrongUsage("The prompt is empty.", "Say something: --prompt TEXT, or text on stdin.")
