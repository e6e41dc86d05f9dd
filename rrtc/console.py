"""What the user sees: results on stdout, progress and notes on stderr, and only from the first process of a run.

Names of files, models and tensors are others' words: nothing in them is taken for markup, and a control character is
shown as an escape, such as \\x1b. Rich itself honors NO_COLOR and writes plain text into pipes.
"""

import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from logging import ERROR, getLogger
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.console import Group as RichGroup
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from rrtc.errors import RrtcError, WrongUsage
from rrtc.machine import is_first_process

if TYPE_CHECKING:
    from rrtc.progress_line import Progress


def _console(stderr: bool = False, quiet: bool = False) -> Console:
    """A console that breaks long lines between words in a terminal, and leaves them whole in a pipe or a file."""
    made = Console(stderr=stderr, quiet=quiet)
    made.soft_wrap = not made.is_terminal
    return made


results = _console(quiet=not is_first_process)
notes = _console(stderr=True, quiet=not is_first_process)
_phases: "Progress | None" = None  # what is going on, where that is several kinds of work in a row
_said: set[str] | None = None  # in a block of `said_once`
# Control characters, those that turn the direction of writing, and bytes of a file's name that are no text.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
NOT_ON_A_PAGE = re.compile(f"(?![\\n\\t]){CONTROLS.pattern}")  # those that a text of several lines has no use for


class RrtcWarning(UserWarning):
    """What the user of the Python API should not miss."""


def visible(text: object) -> str:
    """`text` on one line, with its control characters as escapes."""
    return CONTROLS.sub(_escape, str(text))


def say(text: str) -> None:
    """Writes a piece of a model's text onto stdout at once: its lines and tabs as they are, and other control
    characters as escapes."""
    results.out(NOT_ON_A_PAGE.sub(_escape, text), end="", highlight=False)


def _escape(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


def plain(text: object, style: str = "") -> Text:
    """`text`, which may have several lines, for printing: it holds no markup, and is `visible`."""
    return Text("\n".join(map(visible, str(text).split("\n"))), style)


@contextmanager
def notes_shown(shown: bool) -> Iterator[None]:
    """Whether notes and progress are shown in the block, and warnings there, or else as Python's."""
    before, notes.quiet = notes.quiet, not (shown and is_first_process)
    try:
        yield
    finally:
        notes.quiet = before


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence of transformers' bars and remarks in the block, and of its quantizers' bars: rrtc shows its own progress,
    and they would run through it. A TRANSFORMERS_VERBOSITY that is set holds for the remarks. Imports transformers, and
    with it torch."""
    from tqdm import tqdm
    from transformers.utils import logging

    begin = tqdm.__init__

    def begin_unseen(self, *args, **kwargs):
        """Bars of tqdm's own kinds, such as those of compressed-tensors; downloads, which are of others, stay."""
        begin(self, *args, **kwargs | ({"disable": True} if type(self).__module__.startswith("tqdm.") else {}))

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    offloading = getLogger("accelerate.big_modeling")  # remarks that what was to be read from disk is on disk
    offloading_level = offloading.level
    logging.disable_progress_bar()
    tqdm.__init__ = begin_unseen
    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        logging.set_verbosity_error()
        offloading.setLevel(ERROR)
    try:
        yield
    finally:
        tqdm.__init__ = begin
        logging.set_verbosity(level)
        offloading.setLevel(offloading_level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def quiet_downloads() -> Iterator[None]:
    """No bars of huggingface_hub in the block."""
    from huggingface_hub import utils

    shown = not utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            utils.enable_progress_bars()


@contextmanager
def said_once() -> Iterator[None]:
    """A note or a warning that comes again in the block is not shown again: runs of a sweep have much in common."""
    global _said
    before, _said = _said, set()
    try:
        yield
    finally:
        _said = before


def _is_new(text: str) -> bool:
    """Whether `text` is to be shown; it is remembered in a block of `said_once`."""
    if _said is None:
        return True
    known = text in _said
    _said.add(text)
    return not known


def note(text: str) -> None:
    """One line about what is going on, on stderr."""
    if _is_new(text):
        notes.print(Text(visible(text), "dim"))


def warn(text: str) -> None:
    """One line the user should not miss: on stderr, or, where no notes are shown, an RrtcWarning, which a program can
    filter, or make an error."""
    if not _is_new(text):
        return
    if not notes.quiet:
        show_warning(text)
    elif is_first_process:
        warnings.warn(text, RrtcWarning, stacklevel=2)


def show_warning(text: str) -> None:
    """One line the user should not miss, on stderr."""
    _console(stderr=True).print(Text(f"Note: {visible(text)}", "yellow"))


def show_error(error: RrtcError) -> None:
    """The sentence and the hint of `error`, on stderr, from every process that meets one of its own."""
    if error.of_all_processes and not is_first_process:
        return
    console = _console(stderr=True)
    console.print(Text(f"Error: {visible(error.sentence)}", "bold red"))
    if error.hint:
        console.print(Text(f"Hint: {visible(error.hint)}", "cyan"))


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
    """A progress line with the time left, on stderr; yields a function that advances it by n steps (default 1). Of
    `total` steps, `done` were done before. In a block of `whole_progress` with this name it is a part of that."""
    from rrtc.progress_line import Phase, Progress, Work

    name = visible(description)
    if _phases is not None and name in _phases.names:
        _phases.begin(name, total, done)
        yield lambda n=1: _phases.advance(name, n)
        _phases.end(name)
        return
    line = Progress(notes, Work({name: Phase(1.0)}), amounts=True)
    try:
        line.begin(name, total, done)
        yield lambda n=1: line.advance(name, n)
    finally:
        line.stop()


@contextmanager
def whole_progress(weights: Mapping[str, float]) -> Iterator[None]:
    """One progress line over several calls of `progress` in the block, by their descriptions, in that order: with the
    share of all of them, and the time left in all. weights: how long each takes, beside the others."""
    from rrtc.progress_line import Phase, Progress, Work

    global _phases
    before, _phases = _phases, Progress(notes, Work({name: Phase(weight) for name, weight in weights.items()}))
    try:
        yield
    finally:
        _phases.stop()
        _phases = before


def check_json_target(target: str | None) -> None:
    """Raises WrongUsage where `write_json` could not write to `target`; to be asked before any work."""
    if target in (None, "-"):
        return
    path = Path(target)
    if path.is_dir() or not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise WrongUsage(f"The JSON file {target} cannot be written.", "Name a file in a folder that exists, or -.")


def write_json(value: dict, target: str | None) -> None:
    """`value` as JSON into the file `target`, or onto stdout where it is "-"; nothing where it is None."""
    if target is None or not is_first_process:
        return
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    text = NOT_ON_A_PAGE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)  # which says the same
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf8")


class FittedTable:
    """A table that loses no figure and breaks no word where the terminal is narrow.

    The first column is to the left, the others, numbers, to the right. Those in `prose` are to the left, and their
    cells may be broken between words, as the first one's may. Where that is too wide still, each row is a record: its
    first cell, and under it a line for each other one.
    """

    def __init__(self, title: str, columns: list[str], rows: list[list], prose: Sequence[int] = ()):
        self._title, self._prose = plain(title, "bold"), {0, *prose}
        self._columns, self._rows = [plain(one) for one in columns], [[plain(cell) for cell in row] for row in rows]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = list(zip(*self._rows, strict=True)) if self._rows else [()] * len(self._columns)
        least, widest = [], []
        for place, (title, column) in enumerate(zip(self._columns, cells, strict=True)):
            natural = max((cell.cell_len for cell in column), default=0)
            needed = _longest_word(title, *column) if place in self._prose else max(natural, _longest_word(title))
            least.append(needed)
            widest.append(max(natural, title.cell_len))
        room = options.max_width - sum(least) - GAP * (len(least) - 1)
        yield self._title
        yield self._as_table(least, widest, room) if room >= 0 else self._as_records()
        yield Text("")

    def _as_table(self, least: list[int], widest: list[int], room: int) -> Table:
        made = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP - 1, 0, 0))
        made.show_header = any(title.plain for title in self._columns)
        for place in sorted(range(len(least)), key=lambda place: place not in self._prose):  # headings come last
            more = min(widest[place] - least[place], room)
            least[place], room = least[place] + more, room - more
        for place, (title, width) in enumerate(zip(self._columns, least, strict=True)):
            justify = "left" if place in self._prose else "right"
            made.add_column(title, justify=justify, width=width, overflow="fold")
        for row in self._rows:
            made.add_row(*row)
        return made

    def _as_records(self) -> RichGroup:
        lines: list = []
        for row in self._rows:
            for place, (title, cell) in enumerate(zip(self._columns, row, strict=True)):
                said = _wrapped(Text.assemble(title, ": ", cell) if title.plain else cell.copy())
                lines.append(Padding(said, (0, 0, 0, 2 if place else 0), expand=False))
        return RichGroup(*lines)


GAP = 2  # blanks between columns


def _longest_word(*texts: Text) -> int:
    return max((cell_len(word) for text in texts for word in text.plain.split()), default=0)


def _wrapped(text: Text) -> Text:
    """`text`, to be broken between words even where the console leaves that to the terminal."""
    text.no_wrap, text.overflow = False, "fold"
    return text


def table(title: str, columns: list[str], rows: list[list], prose: Sequence[int] = ()) -> FittedTable:
    """A table of texts and numbers for people; prose: the columns, by place, whose cells may be broken."""
    return FittedTable(title, columns, rows, prose)
