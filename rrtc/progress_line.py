"""One line about work that goes on: what is done, a bar, how much of it, for how long, and the time that is left.

    2/5 Calibrating ━━━━━━━━━━━━━╸━━━━━━━━━━━━  38% 0:01:02 left 0:03:10

It fits into the terminal: the bar gets what the words leave, and the name of the work is cut before a figure is. Where
there is no terminal, as in the log of a job, the same without the bar is a line of its own every minute.
"""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BAR = 40  # columns at most
LEAST_BAR = 4  # under which there is none
NOTHING = "-:--:--"  # a time that nothing is known of
EVERY = 60.0  # seconds between lines where there is no terminal


@dataclass
class Phase:
    """Work of one kind. weight: the time that all of it takes, beside that of the others; total, done: its steps, as
    far as they are known; before: those that an earlier run had done."""

    weight: float
    total: int = 0
    done: int = 0
    before: int = 0
    over: bool = False
    began: float | None = None

    @property
    def share(self) -> float:
        """How much of it is done."""
        return 1.0 if self.over else self.done / self.total if self.total else 0.0

    @property
    def share_now(self) -> float:
        """The same without what an earlier run had done."""
        return self.share - (self.before / self.total if self.total else 0.0)


@dataclass
class Work:
    """Several phases, one after the other, of which only the first ones have begun."""

    phases: Mapping[str, Phase]
    began: float = field(default_factory=time.monotonic)

    @property
    def share(self) -> float:
        return sum(p.weight * p.share for p in self.phases.values()) / sum(p.weight for p in self.phases.values())

    def left(self, now: float) -> float | None:
        """Seconds that are left of all phases, or None while nothing is known: those of the phase at hand at its own
        speed, those of later ones by their weights and the speed so far."""
        made = sum(phase.weight * phase.share_now for phase in self.phases.values())
        if made <= 0:
            return None
        per_weight = (now - self.began) / made
        seconds = 0.0
        for phase in self.phases.values():
            if phase.began is not None and not phase.over and phase.share_now > 0:
                seconds += (now - phase.began) * (1 - phase.share) / phase.share_now
            else:
                seconds += per_weight * phase.weight * (1 - phase.share)
        return seconds


class Line:
    """The line, in a terminal. amounts: whether the steps of the phase at hand are shown (of one kind of work), or the
    share of all of it."""

    def __init__(self, work: Work, amounts: bool):
        self._work, self._amounts, self._name = work, amounts, ""

    def show(self, name: str) -> None:
        self._name = name

    def parts(self) -> tuple[str, str]:
        """(the name of the work, its figures)"""
        now, phases = time.monotonic(), list(self._work.phases)
        phase, left = self._work.phases[self._name], self._work.left(now)
        name = self._name if self._amounts else f"{phases.index(self._name) + 1}/{len(phases)} {self._name}"
        much = f"{phase.done}/{phase.total}" if self._amounts else f"{self._work.share:.0%}"
        return name, f"{much} {_clock(now - self._work.began)} left {NOTHING if left is None else _clock(left)}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        name, figures = self.parts()
        words, width = Text(name), options.max_width
        room = width - words.cell_len - len(figures) - 2
        if room < LEAST_BAR:
            words.truncate(max(width - len(figures) - 1, 0), overflow="ellipsis")
            yield Text.assemble(words, " ", figures, no_wrap=True, overflow="crop")
            return
        grid = Table.grid(padding=(0, 1, 0, 0))
        bar = ProgressBar(total=1.0, completed=self._work.share, width=min(room, BAR))
        for one in (words.cell_len, min(room, BAR), len(figures)):
            grid.add_column(width=one, no_wrap=True)
        grid.add_row(words, bar, figures)
        yield grid


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


class Progress:
    """Shows `work` on `console` while it goes on: in a terminal as one line, which changes, and elsewhere every minute
    as another one."""

    def __init__(self, console: Console, work: Work, amounts: bool = False):
        self._console, self._work, self._line = console, work, Line(work, amounts)
        self._told = time.monotonic()
        self._live = Live(self._line, console=console, refresh_per_second=4, transient=True, auto_refresh=True)
        self._shown = console.is_terminal

    @property
    def names(self) -> Collection[str]:
        return self._work.phases.keys()

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """The phase `name` begins, of whose `total` steps an earlier run had `done` some. Those before it are over."""
        for other, phase in self._work.phases.items():
            if other == name:
                break
            phase.over = True
        phase = self._work.phases[name]
        phase.total, phase.done, phase.before, phase.began = total, done, done, time.monotonic()
        self._line.show(name)
        if self._shown and not self._live.is_started:
            self._live.start()

    def advance(self, name: str, steps: int = 1) -> None:
        self._work.phases[name].done += steps
        if not self._shown and time.monotonic() - self._told >= EVERY:
            self._told = time.monotonic()
            self._console.print(Text(" ".join(self._line.parts())))

    def end(self, name: str) -> None:
        self._work.phases[name].over = True

    def stop(self) -> None:
        self._live.stop()
