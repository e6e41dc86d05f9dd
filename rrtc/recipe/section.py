"""What the sections of a recipe have in common."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict

from rrtc.errors import WrongUsage
from rrtc.units import parse_count

BUILT_IN_TEXT = "pydoc"
OWN_TEXT = "self"


def _as_number(value: Any) -> Any:
    try:
        return parse_count(value) if isinstance(value, str) else value
    except WrongUsage as error:
        raise ValueError(f"{error.sentence} {error.hint}") from error


Amount = Annotated[int, BeforeValidator(_as_number, json_schema_input_type=int | str)]  # also as people write it: 10M


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def resolved(self) -> dict[str, Any]:
        """All fields as plain data, with what they stand for where a default depends on other fields."""
        return self.model_dump()
