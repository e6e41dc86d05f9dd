"""Text as rrtc reads it with the pico tokenizer."""

import pytest
from pico import pico_tokenizer

from rrtc.errors import RrtcError
from rrtc.text.sources import documents


def read(source, field: str = "text") -> list[str]:
    """The documents of a source."""
    return list(documents(str(source), field, pico_tokenizer()))


def refused(source, field: str = "text") -> RrtcError:
    """The error that reading a source ends in."""
    with pytest.raises(RrtcError) as error:
        read(source, field)
    return error.value
