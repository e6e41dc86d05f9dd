"""A folder whose making can go on after an interruption: what `init` and `uptrain` have in common.

While a run makes NAME, NAME.partial/KEPT has what is finished of it, whole where it is there at all, and started.json,
which says what that belongs to. KEPT is removed when NAME.partial has become NAME, so that a kill at any moment leaves
either something to go on from or a whole folder, at worst one with a folder KEPT that nothing reads.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rrtc import __version__
from rrtc.console import note, warn
from rrtc.errors import RrtcError
from rrtc.io.folder import (
    STARTED,
    check_not_interrupted,
    check_space,
    check_target,
    partial_of,
    remove,
    whole_file,
    whole_folder,
)
from rrtc.io.provenance import PROVENANCE
from rrtc.machine import is_first_process
from rrtc.plain import read_json


@dataclass(frozen=True)
class Resumable:
    """The making of the folder `target`. name: that of the folder KEPT. finished(): what in it a later run can go on
    from; unfinished(): what an interrupted run has left besides, which is in the way. remove(path): removes it, so that
    a kill on the way leaves nothing that looks finished. Of several processes the first one changes the disk."""

    target: Path
    name: str
    finished: Callable[[], list[Path]]
    unfinished: Callable[[], Iterable[Path]]
    remove: Callable[[Path], None]

    @property
    def partial(self) -> Path:
        return partial_of(self.target)

    @property
    def kept(self) -> Path:
        return self.partial / self.name

    def check(self, resume: bool, *sources: Path) -> None:
        """Raises RrtcError, before any work, where `target` cannot become a new folder made from `sources`, where there
        is nothing to `resume`, and where there is and it is not to be."""
        if resume and (self.target / PROVENANCE).exists():
            left = self.target / self.name
            hint = f"The run was stopped while it removed {left}, which can be deleted." if left.exists() else ""
            raise RrtcError(f"There is nothing to resume: {self.target} is complete.", hint)
        check_target(self.target, *sources)
        check_not_interrupted(self.target, self.name)
        finished = self.finished()
        if resume and not finished:
            sentence = f"There is nothing to resume: {self.partial} holds no finished {self.name}."
            raise RrtcError(sentence, "Start without --resume.")
        if finished and not resume:
            sentence = f"{self.partial} holds the {self.name} of an interrupted run."
            raise RrtcError(sentence, "Continue it with --resume, or delete that folder.")

    def check_same(self, fingerprint: dict) -> None:
        """Raises RrtcError where a run with that fingerprint cannot go on from what is kept; names what differs."""
        file = self.kept / STARTED
        try:
            started = read_json(file)
            before, version = started["fingerprint"], started["rrtc"]
            choices = before["recipe"].items()
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise RrtcError(
                f"The run cannot be resumed: {file}, which says what it was started with, is damaged.",
                f"Delete {self.partial} and start anew; a checkpoint in it can be trained on by itself.",
            ) from error
        check_unchanged(before | {"recipe": dict(choices)}, fingerprint)
        if version != __version__:
            warn(f"The run was started with rrtc {version}, and goes on with {__version__}.")

    def check_space(self, needed: int) -> None:
        """Raises RrtcError where the disk has too little space for a run that takes so many bytes in all."""
        files = (file for path in self.finished() for file in [path, *path.rglob("*")] if file.is_file())
        there = sum(file.stat().st_size for file in files)
        check_space(self.target, needed - there)

    @contextmanager
    def folder(self, resume: bool, fingerprint: dict) -> Iterator[Path]:
        """Yields NAME.partial with KEPT in it, and renames it when the block ends. After an error NAME.partial stays if
        there is something in it to go on from, and a note says so, unless the error `says_what_is_kept`."""
        if not is_first_process:
            yield self.partial
            return
        for path in self.unfinished() if resume else [self.partial]:
            self.remove(path)
        with whole_folder(self.target, keep_partial=True) as partial:
            try:
                self.kept.mkdir(exist_ok=True)
                if not resume:
                    with whole_file(self.kept / STARTED) as file:
                        started = {"rrtc": __version__, "fingerprint": fingerprint}
                        file.write_text(json.dumps(started, indent=2) + "\n", encoding="utf8")
                yield partial
            except BaseException as error:
                if not self.finished():
                    self.remove(partial)
                elif not getattr(error, "says_what_is_kept", False):
                    note(f"What is finished is in {self.kept}: --resume goes on from there.")
                raise
        self.remove(self.target / self.name)


def discard(path: Path) -> None:
    """Removes a file, or a folder with all that it holds. What says what a folder belongs to goes first, so that what a
    kill on the way leaves behind is not taken for something to go on from."""
    for started in path.rglob(STARTED):
        started.unlink()
    remove(path)


def check_unchanged(before: dict, now: dict) -> None:
    """Raises RrtcError where a run with the fingerprint `now` cannot go on from one with the fingerprint `before`; it
    names what differs. A fingerprint has under "recipe" the choices that were made, and under the name of everything
    else that the result depends on a hash of it."""
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
