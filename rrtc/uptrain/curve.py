"""What a run leaves behind about its course: metrics.jsonl, a line a step, and loss.png, the same as a picture."""

import json
from itertools import accumulate, cycle
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

MEASURED = ("objective", "learning_rate", "grad_norm", "seconds")  # of each step; what else is logged is a loss
LABELS = {"loss": "Next-token loss (nats per token)", "kl": "KL from the teacher (nats per token)"}
COLORS = ("tab:blue", "tab:purple", "tab:green", "tab:orange", "tab:red", "tab:brown", "tab:pink", "tab:cyan")
POINTS = 2000  # drawn of a long run, more than a picture has room for
ENDS = 20  # the first and the last of so many parts of a run are averaged in its summary


def step_of(entry: dict) -> dict:
    """A step from its entry in a Trainer's log: step, tokens (counted from the start of the run), loss and kl (in nats
    per token; None where there is none), the other losses by their names, and MEASURED, with the seconds of the step
    alone."""
    known = ("step", "tokens", *MEASURED, "epoch")
    losses = {"loss": None, "kl": None} | {name: value for name, value in entry.items() if name not in known}
    return {field: entry[field] for field in ("step", "tokens")} | losses | {field: entry[field] for field in MEASURED}


def steps_of(log_history: list[dict]) -> list[dict]:
    """The steps in a Trainer's history, as `step_of` gives them."""
    return [step_of(entry) for entry in log_history if "objective" in entry]


def losses_of(step: dict) -> list[str]:
    """The names of the losses that a step has."""
    return [name for name in step if name not in ("step", "tokens", *MEASURED) and step[name] is not None]


def summary(steps: list[dict]) -> dict:
    """first_loss, last_loss, first_kl, last_kl, and the same for every other loss: means over the first and the last
    twentieth of the steps, because one batch is noisy. The kl figures are None for a run without a teacher."""
    some = max(1, len(steps) // ENDS)
    result = dict.fromkeys(("first_loss", "last_loss", "first_kl", "last_kl"))
    for field in losses_of(steps[0]):
        for name, part in (("first", steps[:some]), ("last", steps[-some:])):
            result[f"{name}_{field}"] = round(sum(step[field] for step in part) / some, 4)
    return result


def line(step: dict) -> str:
    """A line of metrics.jsonl."""
    return json.dumps(step) + "\n"


def write_metrics(steps: list[dict], file: Path) -> None:
    """One JSON object a line, as `steps_of` gives them."""
    file.write_text("".join(map(line, steps)), encoding="utf8")


def draw(steps: list[dict], title: str, file: Path) -> None:
    """Each loss over the tokens seen, in a panel of its own: the steps faintly, and their running mean."""
    panels = losses_of(steps[0])
    height = 1 + 2.7 * len(panels)
    # Margins in inches: a layout that is found takes half the time of a picture, and a run has many pictures.
    figure = Figure(figsize=(8, height))
    figure.subplots_adjust(left=0.09, right=0.93, bottom=0.55 / height, top=1 - 0.65 / height, hspace=0.2)
    figure.suptitle(title, fontsize=12, y=1 - 0.2 / height)
    tokens, every = [step["tokens"] for step in steps], max(1, len(steps) // POINTS)
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, field, color in zip(axes, panels, cycle(COLORS), strict=False):
        values = [step[field] for step in steps]
        axis.plot(tokens[::every], values[::every], color=color, alpha=0.25, linewidth=1)
        smooth = _running_mean(values, max(1, len(values) // ENDS))
        axis.plot(tokens[::every], smooth[::every], color=color, linewidth=2)
        axis.annotate(
            f"{smooth[-1]:.3f}", (tokens[-1], smooth[-1]), xytext=(5, 0), textcoords="offset points", va="center",
            color=color,
        )  # fmt: skip
        axis.set_title(LABELS.get(field, field.replace("_", " ").capitalize()), loc="left", fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("Training tokens")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(file, dpi=120)


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width` - 1 before it."""
    sums = list(accumulate(values, initial=0.0))  # a long run is drawn often: no sum over each width anew
    return [(sums[i] - sums[max(0, i - width)]) / min(i, width) for i in range(1, len(sums))]
