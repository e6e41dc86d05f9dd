"""What the sections of a recipe have in common."""

from typing import Any

from pydantic import BaseModel, ConfigDict

BUILT_IN_TEXT = "pydoc"
OWN_TEXT = "self"


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def resolved(self) -> dict[str, Any]:
        """All fields as plain data, with what they stand for where a default depends on other fields."""
        return self.model_dump()
