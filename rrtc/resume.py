"""Going on with an interrupted run: what `init` and `uptrain` have in common.

What is finished waits in a folder of NAME.partial, with a fingerprint of what it belongs to: under "recipe" the choices
that were made, and under the name of everything else that the result depends on a hash of it.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rrtc.checkpoint import PROVENANCE
from rrtc.errors import RrtcError
from rrtc.weights import disk_error


def check_incomplete(target: Path, work: str) -> None:
    """Raises RrtcError where `target` is complete, so that there is nothing to resume. `work` is the name of the folder
    that held what was finished; a kill at the very end leaves a part of it."""
    if (target / PROVENANCE).exists():
        left = target / work
        hint = f"The run was stopped while it removed {left}, which can be deleted." if left.exists() else ""
        raise RrtcError(f"There is nothing to resume: {target} is complete.", hint)


def check_unchanged(before: dict, now: dict) -> None:
    """Raises RrtcError where a run with the fingerprint `now` cannot go on from one with the fingerprint `before`; it
    names what differs."""
    changed = difference(before["recipe"], now["recipe"])
    others = [name for name in before | now if name != "recipe" and before.get(name) != now.get(name)]
    if changed is None and others:
        changed = f"the {others[0]} has changed since it was started"
    if changed is not None:
        raise RrtcError(
            f"The run cannot be resumed, because {changed}.",
            "Go on with what the run was started with, or start a new one under another name.",
        )


def difference(before: dict, now: dict) -> str | None:
    """The first field of `now` that was another in `before`, in words; None where there is none."""
    for field, value in now.items():
        if before.get(field) != value:
            return f"{field} was {before.get(field)} and is now {value}"
    return None


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yields where to write `file`. It gets its name when the block ends and its contents are on the disk, so that a
    file is whole where there is one. Raises RrtcError where the disk does not take it."""
    from safetensors import SafetensorError

    temporary = file.with_name(f"{file.name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as stream:
            os.fsync(stream.fileno())
        temporary.rename(file)
    except (OSError, SafetensorError) as error:
        raise disk_error(file, error) from error
