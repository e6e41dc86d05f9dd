"""What a user sees while a model trains, on stderr: a live panel in a terminal, else a line at every tenth of the way.

━━━━━━━━━━━━╸━━━━━━━━━━━  step 312 of 1000
1.28M of 4.1M tokens · 5.32k tokens/s · 8 min 50 s left
loss 3.412 ▇▆▅▅▄▃▃▂▂▁   KL 0.712 ▇▆▅▄▃▂▂▁▁▁   learning rate 3.1e-04
"""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text
from transformers import TrainerCallback

from rrtc.console import notes
from rrtc.units import count, duration

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 24  # of a sparkline, in characters
REPORTS = 10  # lines about a run outside a terminal


def sparkline(values: list[float], width: int = WIDTH) -> str:
    """`values` as a line of bars of at most `width` characters, each the mean of its share of them."""
    width = min(width, len(values))
    edges = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means, default=0), max(means, default=0)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((mean - low) * scale)] for mean in means)


class Display(TrainerCallback):
    """Shows the steps that the trainer logs. A context manager: the panel goes away with it, even after an error."""

    def __init__(self, steps: int, tokens: int, console: Console = notes):
        self.steps, self.tokens, self.console = steps, tokens, console
        self.live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self.losses: list[float] = []
        self.kls: list[float] = []
        self.began = self.first_step = None  # of this process: a continued run does not begin at step 0

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *error) -> None:
        if self.live:
            self.live.stop()

    def on_train_begin(self, args, state, control, **kwargs):
        self.began, self.first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "objective" not in logs:
            return
        first = "" if "loss" in logs else "exit_1_"  # where exits learn alone
        self.losses.append(logs.get(f"{first}loss", logs["objective"]))
        self.kls.append(logs.get(f"{first}kl"))
        step = state.global_step
        seconds = (time.monotonic() - self.began) / (step - self.first_step)  # a step
        rate = self.tokens / self.steps / seconds
        amounts = (
            f"{count(logs['tokens'])} of {count(self.tokens)} tokens · {count(rate)} tokens/s · "
            f"{duration((self.steps - step) * seconds)} left"
        )
        if self.live:
            self.live.update(self._panel(step, amounts, logs["learning_rate"]))
        elif step * REPORTS // self.steps > (step - 1) * REPORTS // self.steps:
            kl = "" if self.kls[-1] is None else f" · KL {self.kls[-1]:.3f}"
            self.console.print(
                f"step {step} of {self.steps} · {amounts} · loss {self.losses[-1]:.3f}{kl} · "
                f"learning rate {logs['learning_rate']:.1e}",
                style="dim",
                highlight=False,
            )

    def _panel(self, step: int, amounts: str, learning_rate: float) -> Group:
        at, room = f"step {step} of {self.steps}", self.console.width
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=self.steps, completed=step, width=max(min(40, room - len(at) - 2), 1)), at)
        figures = [Text.assemble("loss ", (f"{self.losses[-1]:.3f} ", "bold"), (sparkline(self.losses), "cyan"))]
        if self.kls[-1] is not None:
            figures.append(Text.assemble("KL ", (f"{self.kls[-1]:.3f} ", "bold"), (sparkline(self.kls), "magenta")))
        figures.append(Text(f"learning rate {learning_rate:.1e}"))
        joined = Text("   ").join(figures)
        lines = [joined] if joined.cell_len <= room else figures
        for line in (said := Text(amounts), *lines):
            line.no_wrap, line.overflow = False, "fold"  # between words, where the terminal is narrow
        return Group(bar, said, *lines)
