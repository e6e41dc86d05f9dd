"""What a run leaves behind about its course: metrics.jsonl, a line a step, and loss.png, the same as a picture."""

import json
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

FIELDS = ("step", "tokens", "loss", "kl", "objective", "learning_rate", "grad_norm", "seconds")
ENDS = 20  # the first and the last of so many parts of a run are averaged in its summary


def steps_of(log_history: list[dict]) -> list[dict]:
    """The steps in a Trainer's history, with FIELDS and the other losses in use. loss and kl are in nats per token,
    tokens are counted from the start of the run, seconds are of the step alone."""
    steps = [entry for entry in log_history if "objective" in entry]
    return [dict.fromkeys(FIELDS) | {k: v for k, v in step.items() if k != "epoch"} for step in steps]


def summary(steps: list[dict]) -> dict:
    """first_loss, last_loss, first_kl, last_kl: means over the first and the last twentieth of the steps, because one
    batch is noisy. The kl figures are None for a run without a teacher. The same for the loss and kl of each exit."""
    some = max(1, len(steps) // ENDS)
    result = {}
    for field in ("loss", "kl", *(name for name in steps[0] if name.startswith("exit_"))):
        for name, part in (("first", steps[:some]), ("last", steps[-some:])):
            values = [step[field] for step in part if step[field] is not None]
            result[f"{name}_{field}"] = round(sum(values) / some, 4) if values else None
    return result


def write_metrics(steps: list[dict], file: Path) -> None:
    """One JSON object a line, as `steps_of` gives them."""
    file.write_text("".join(json.dumps(step) + "\n" for step in steps), encoding="utf8")


def draw(steps: list[dict], title: str, file: Path) -> None:
    """The loss and, with a teacher, the KL over the tokens seen: each step faintly, and their running mean."""
    panels = [("loss", "Next-token loss\n(nats per token)", "tab:blue")]
    if steps[0]["kl"] is not None:
        panels.append(("kl", "KL from the teacher\n(nats per token)", "tab:purple"))
    figure = Figure(figsize=(8, 1 + 2.7 * len(panels)), layout="constrained")
    figure.suptitle(title, fontsize=12)
    tokens = [step["tokens"] for step in steps]
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, (field, label, colour) in zip(axes, panels, strict=True):
        values = [step[field] for step in steps]
        axis.plot(tokens, values, color=colour, alpha=0.25, linewidth=1)
        smooth = _running_mean(values, max(1, len(values) // ENDS))
        axis.plot(tokens, smooth, color=colour, linewidth=2)
        axis.annotate(
            f"{smooth[-1]:.3f}", (tokens[-1], smooth[-1]), xytext=(5, 0), textcoords="offset points", va="center",
            color=colour,
        )  # fmt: skip
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("Training tokens")
    axes[-1].xaxis.set_major_formatter(EngFormatter(sep=""))
    figure.savefig(file, dpi=150)


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of each value and up to `width` - 1 before it."""
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
