"""Inputs that stay as they are: what a run reads is what it says that it has read, from its first file to its last.

A model that is replaced or deleted meanwhile would otherwise be one thing in the weights and another in rrtc.yaml, or
in the cache. A file is told from another one by its number, size and time, which are only compared for equality.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rrtc.errors import RrtcError
from rrtc.io.folder import COMPANION_FILES
from rrtc.io.weights import file_state

OF_A_MODEL = ("config.json", "rrtc.yaml", "*.safetensors", "*.index.json", *COMPANION_FILES)
HINT = "Start again, and leave it as it is until the run has ended."


class Unchanged:
    """The files of models, folders or single files, as they are now."""

    def __init__(self, *places: Path):
        self._seen = {file: _state(file) for place in places for file in _files(Path(place))}

    def check(self) -> None:
        """Raises RrtcError where one of the files is another one than it was, or gone."""
        for file, before in self._seen.items():
            if (now := _state(file)) != before:
                raise RrtcError(f"{file} was {'changed' if now else 'deleted'} while it was in use.", HINT)

    def check_mapped(self) -> None:
        """Raises RrtcError where a file was written into: who has mapped it into memory reads the new contents. One
        that was deleted, or has another in its place, is still there for him."""
        for file, before in self._seen.items():
            now = _state(file)
            if now and before and now != before and now[:2] == before[:2]:
                raise RrtcError(f"{file} was changed while it was in use.", HINT)

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """An error in the block is about a file that was changed or deleted, where one was."""
        try:
            yield
        except Exception as error:
            if not getattr(error, "says_what_is_kept", False):
                try:
                    self.check()
                except RrtcError as changed:
                    raise changed from error
            raise


def _files(place: Path) -> list[Path]:
    if not place.is_dir():
        return [place]
    return sorted({file for pattern in OF_A_MODEL for file in place.glob(pattern)})


def _state(file: Path) -> tuple[int, ...] | None:
    """None where there is no such file."""
    try:
        return file_state(os.stat(file))
    except OSError:
        return None
