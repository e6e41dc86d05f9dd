"""What the user sees: results on stdout, progress and notes on stderr, and only from the first process of a run.

Rich itself honors NO_COLOR and writes plain text into pipes.
"""

import json
import os
import sys
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rrtc.errors import RrtcError, WrongUsage
from rrtc.machine import is_first_process

results = Console(quiet=not is_first_process, soft_wrap=True)
notes = Console(stderr=True, quiet=not is_first_process, soft_wrap=True)


def note(text: str) -> None:
    """One line about what is going on, on stderr."""
    notes.print(text, style="dim", highlight=False, markup=False)


def warn(text: str) -> None:
    """One line the user should not miss, on stderr."""
    notes.print(f"Note: {text}", style="yellow", highlight=False, markup=False)


def show_error(error: RrtcError) -> None:
    """The sentence and the hint of `error`, on stderr, from every process that meets one of its own."""
    if error.of_all_processes and not is_first_process:
        return
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"Error: {error.sentence}", style="bold red", highlight=False, markup=False)
    if error.hint:
        console.print(f"Hint: {error.hint}", style="cyan", highlight=False, markup=False)


@contextmanager
def progress(description: str, total: int, done: int = 0):
    """A progress bar with the time left, on stderr; yields a function that advances it by n steps (default 1). Of
    `total` steps, `done` were done before."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )  # fmt: skip

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=notes, transient=True, disable=not notes.is_terminal) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda n=1: bar.advance(task, n)


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
    if target == "-":
        sys.stdout.write(text)
    else:
        Path(target).write_text(text, encoding="utf8")


def table(title: str, columns: list[str], rows: list[list[str]]) -> Table:
    """A Rich table: the first column to the left, the others, numbers, to the right."""
    made = Table(title=title, title_justify="left", title_style="bold")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right", overflow="fold", no_wrap=number == 0)
    for row in rows:
        made.add_row(*[str(cell) for cell in row])
    return made
