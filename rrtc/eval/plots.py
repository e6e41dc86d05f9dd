"""The pictures of an evaluation report, each an SVG for an <img>: (title, what it shows, the picture as a data URI).

They are narrow, so that their letters can be read on a phone, and drawn on white, so that they can be read anywhere.
The same report gives the same bytes.
"""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass

import matplotlib
import numpy
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, PercentFormatter

from rrtc.io.report import parts_by_model
from rrtc.plan import SAVINGS_CONTEXT

WIDTH, HEIGHT = 4.4, 3.2  # inches: 422 pixels wide, about what a phone shows
# Okabe and Ito's colors, which the color-blind can tell apart; the dense model is always the first.
COLORS = ("#444444", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8B5A2B")
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3,
    "svg.hashsalt": "rrtc", "legend.frameon": False, "legend.fontsize": 8, "axes.titlesize": 9,
}  # fmt: skip
MOST_LABELS = 12  # of layers on an axis
# KV heads that see a window, those whose stock layer has one, and those that see everything.
COLORS_OF_HEADS = ("#d8d8d8", COLORS[6], COLORS[1])


@dataclass(frozen=True)
class Picture:
    """alt: what is to be seen, in words, for who cannot see it."""

    title: str
    alt: str
    source: str


def pictures(report: dict) -> list[Picture]:
    """Those that the report has figures for."""
    makers = (
        _quality_and_size,
        _quality_and_bytes,
        _quality_and_cache,
        _position,
        _tasks,
        _passkey,
        _residuals,
        _exits,
        _training,
    )
    layers = parts_by_model(report, "layers")
    with matplotlib.rc_context(STYLE):
        found = [maker(report) for maker in makers]
        for name, of_one in layers.items():
            found += [maker(of_one, name if len(layers) > 1 else None) for maker in (_heads, _ranks)]
        return [picture for picture in found if picture is not None]


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _picture(title: str, alt: str, draw: Callable[[Figure], None], height: float = HEIGHT) -> Picture:
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="white")
    draw(figure)
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    return Picture(title, alt, "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode())


def _legend(figure: Figure, names: int) -> None:
    figure.legend(loc="outside lower center", ncols=1 if names > 4 else 2)


def _quality_and_size(report: dict) -> Picture:
    return _quality_over(report, "params_total", "Parameters")


def _quality_and_bytes(report: dict) -> Picture | None:
    """Where bytes tell another story than parameters do, because some models have fewer bits."""
    widths = [row["bytes"] / row["params_total"] for row in report["models"] if row["params_total"]]
    if not widths or min(widths) > 0.9 * max(widths):
        return None
    return _quality_over(report, "bytes", "Bytes of weights")


def _quality_over(report: dict, key: str, label: str) -> Picture:
    rows = report["models"]

    def draw(figure):
        axis = figure.subplots()
        for number, row in enumerate(rows):
            score = row["scores"]["bits_per_byte"]
            axis.errorbar(
                row[key], score["value"], yerr=score["stderr"] or 0, color=_color(number), capsize=3,
                fmt={"exit": "^", "baseline": "s"}.get(row["kind"], "o"), label=row["model"],
            )  # fmt: skip
        axis.set(xlabel=label, ylabel="Bits per byte")
        axis.margins(x=0.15)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        _legend(figure, len(rows))

    height = HEIGHT + 0.13 * len(rows)
    title = "Quality against " + ("size" if key == "params_total" else "bytes")
    return _picture(title, f"Bits per byte of each model over its {label[0].lower()}{label[1:]}", draw, height)


def _quality_and_cache(report: dict) -> Picture | None:
    def kept(row: dict) -> int:
        return row["cost"]["kv_bytes"][str(SAVINGS_CONTEXT)]

    measured = [(number, row) for number, row in enumerate(report["models"]) if "cost" in row]
    if not any(row["kind"] == "stage" and kept(row) < kept(measured[0][1]) for _, row in measured):
        return None

    def draw(figure):
        axis = figure.subplots()
        for number, row in measured:
            score = row["scores"].get("kl", {"value": 0, "stderr": None})  # the dense model's is from itself
            axis.errorbar(
                kept(row), score["value"], yerr=score["stderr"] or 0, color=_color(number), capsize=3,
                fmt="s" if row["kind"] == "baseline" else "o", label=row["model"],
            )  # fmt: skip
        axis.set(xlabel=f"KV cache at {SAVINGS_CONTEXT:,} tokens", ylabel="KL from dense (nats)", xlim=(0, None))
        axis.margins(x=0.1)
        axis.xaxis.set_major_formatter(EngFormatter("B"))
        axis.locator_params(axis="x", nbins=5)
        _legend(figure, len(measured))

    height = HEIGHT + 0.13 * len(measured)
    alt = f"KL of each model from the dense one over the bytes of its KV cache at {SAVINGS_CONTEXT:,} tokens"
    return _picture("Quality against KV cache", alt, draw, height)


def _position(report: dict) -> Picture | None:
    rows = [(number, row) for number, row in enumerate(report["models"]) if row["kind"] != "dense"]
    if not rows:
        return None

    def draw(figure):
        axis = figure.subplots()
        for number, row in rows:
            middle = [(one["from"] * one["to"]) ** 0.5 for one in row["by_position"]]
            found = [one["loss"]["difference"] for one in row["by_position"]]
            axis.plot(middle, [one["value"] for one in found], "o-", markersize=3, color=_color(number),
                      label=row["model"])  # fmt: skip
            if all(one["low"] is not None for one in found):
                low, high = ([one[end] for one in found] for end in ("low", "high"))
                axis.fill_between(middle, low, high, color=_color(number), alpha=0.15, linewidth=0)
        axis.axhline(0, color=COLORS[0], linewidth=1)
        axis.set(xscale="log", xlabel="Tokens before it in the context", ylabel="Loss above the dense model's (nats)")
        ends = [one["from"] for one in rows[0][1]["by_position"]]
        axis.set_xticks(ends, [str(end) for end in ends])
        axis.minorticks_off()
        _legend(figure, len(rows))

    alt = "How much more each model loses than the dense one, by the position of the token in its context"
    return _picture("Loss by position", alt, draw, HEIGHT + 0.13 * len(rows))


def _tasks(report: dict) -> Picture | None:
    rows = [row for row in report["models"] if "tasks" in row]
    if not rows:
        return None
    names = list(rows[0]["tasks"])
    gap = 0.7 / max(1, len(rows) - 1)

    def draw(figure):
        axis = figure.subplots()
        for number, row in enumerate(rows):
            scores = [row["tasks"][name] for name in names]
            places = numpy.arange(len(names)) + number * gap - 0.35 * (len(rows) > 1)
            axis.errorbar(
                [score["value"] for score in scores], places, xerr=[score["stderr"] or 0 for score in scores],
                fmt="o", markersize=4, capsize=2, color=_color(report["models"].index(row)), label=row["model"],
            )  # fmt: skip
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.5, -0.5)  # the first task on top
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set(xlabel="Score (± standard error)")
        _legend(figure, len(rows))

    height = 1.2 + 0.16 * len(rows) + len(names) * max(0.3, 0.13 * len(rows))
    return _picture("Tasks", "Score of each model on each task, with its standard error", draw, height)


def _passkey(report: dict) -> Picture | None:
    rows = [row for row in report["models"] if "passkey" in row]
    if not rows:
        return None
    lengths, depths = (sorted({one[key] for one in rows[0]["passkey"]}) for key in ("length", "depth"))

    def draw(figure):
        axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
        for axis, row in zip(axes, rows, strict=True):
            found = {(one["length"], one["depth"]): one["value"] for one in row["passkey"]}
            table = numpy.array([[found[length, depth] for depth in depths] for length in lengths])
            axis.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
            for (y, x), value in numpy.ndenumerate(table):
                axis.text(x, y, f"{value:.0%}", ha="center", va="center", color="white" if value < 0.6 else "black")
            axis.set_title(row["model"], loc="left")
            axis.set_yticks(range(len(lengths)), [f"{length}" for length in lengths])
            axis.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
            axis.set_ylabel("Tokens")
            axis.grid(False)
        axes[-1].set_xlabel("Where the key is hidden, from the start to the end")

    height = 0.6 + len(rows) * (0.45 + 0.3 * len(lengths))
    return _picture("Pass keys found", "Share of hidden keys that each model finds, by length and depth", draw, height)


def _heads(layers: list[dict], name: str | None) -> Picture | None:
    if not any(one["attention"] for one in layers):
        return None
    heads = max(one["kv_heads"] for one in layers)
    table = numpy.full((heads, len(layers)), numpy.nan)  # places in COLORS_OF_HEADS; nan: there is no such head
    for place, one in enumerate(layers):
        table[: one["kv_heads"], place] = 0 if one["attention"] else 1 if one["window"] else 2
        table[one["attention"]["heads"] if one["attention"] else [], place] = 2
    labels = [_window(layers), "the dense layer's own window", "everything"]

    def draw(figure):
        axis = figure.subplots()
        axis.imshow(table, aspect="auto", cmap=ListedColormap(COLORS_OF_HEADS), vmin=0, vmax=2)
        axis.set_xticks(numpy.arange(-0.5, len(layers)), minor=True)
        axis.set_yticks(numpy.arange(-0.5, heads), minor=True)
        axis.grid(False)
        axis.grid(True, which="minor", color="white", alpha=1, linewidth=1)
        axis.tick_params(which="minor", length=0)
        axis.set_yticks(range(0, heads, -(-heads // MOST_LABELS)))
        axis.set_ylabel("KV head")
        _number_layers(axis, layers)
        shown = [n for n in range(len(labels)) if (table == n).any()]
        patches = [Patch(color=COLORS_OF_HEADS[n], label=labels[n]) for n in shown]
        figure.legend(handles=patches, loc="outside lower center", ncols=2)

    alt = "Which KV heads of which layers attend to everything, and which to a window"
    return _picture(_of("What KV heads attend to", name), _of(alt, name), draw, 1.4 + min(0.22 * heads, 3))


def _window(layers: list[dict]) -> str:
    """The window of those that have one: "the last 256 and the first 4", or from least to most."""
    parts = []
    for which, name in (("last", "window"), ("first", "sinks")):
        found = sorted({one["attention"][name] for one in layers if one["attention"]})
        if found[-1]:
            parts.append(f"the {which} {found[0]}" + (f" to {found[-1]}" if len(found) > 1 else ""))
    if any(one["attention"].get("landmark") for one in layers if one["attention"]):
        parts.insert(1, "blocks before them")
    return " and ".join(parts) + " tokens"


def _ranks(layers: list[dict], name: str | None) -> Picture:
    names = list(layers[0]["ranks"])
    table = numpy.array([[numpy.nan if r is None else r for r in one["ranks"].values()] for one in layers]).T

    def draw(figure):
        axis = figure.subplots()
        shown = axis.imshow(table, aspect="auto", cmap="viridis", vmin=0)
        axis.set_facecolor("#d8d8d8")  # where a matrix is full
        axis.set_yticks(range(len(names)), [name.rpartition(".")[2] for name in names])
        _number_layers(axis, layers)
        figure.colorbar(shown, label="rank", shrink=0.8)
        axis.grid(False)

    alt = "Rank of each matrix in each layer; gray where the matrix is full and the layer's own"
    title = _of("Rank by layer (gray: a full matrix of its own)", name)
    return _picture(title, _of(alt, name), draw, 1.2 + 0.25 * len(names))


def _of(words: str, name: str | None) -> str:
    """The title of a picture of one model, which is named where there are several."""
    return words if name is None else f"{name}: {words[0].lower()}{words[1:]}"


def _number_layers(axis, layers: list[dict], marked: bool = True) -> None:
    """The layers' numbers below; those that share their slot are marked, where that is wanted."""
    step = -(-len(layers) // MOST_LABELS)
    places = range(0, len(layers), step)
    axis.set_xticks(places, [f"{layers[place]['layer']}" for place in places])
    tied = marked and any(one["tied"] for one in layers)
    axis.set_xlabel("Layer (▪: shares its weights)" if tied else "Layer")
    shared = [place for place, one in enumerate(layers) if marked and one["tied"]]
    axis.plot(shared, [1.03] * len(shared), "s", markersize=2.5, color=COLORS[0], clip_on=False,
              transform=axis.get_xaxis_transform())  # fmt: skip


def _residuals(report: dict) -> Picture | None:
    models = {n: layers for n, layers in parts_by_model(report, "layers").items() if layers[0]["residual"] is not None}
    if not models:
        return None
    rows = [row["model"] for row in report["models"]]

    def draw(figure):
        axis = figure.subplots()
        for name, layers in models.items():
            color = _color(rows.index(name) if len(models) > 1 else 1)
            axis.plot([one["residual"] for one in layers], "o-", markersize=3, color=color, label=name)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set(ylabel="Energy that differs", ylim=(0, None))
        _number_layers(axis, next(iter(models.values())), marked=len(models) == 1)
        if len(models) > 1:
            _legend(figure, len(models))

    alt = "Share of the energy of the hidden states after each layer in which they differ from the dense model's"
    return _picture("What is lost, by layer", alt, draw, HEIGHT + 0.13 * len(models) * (len(models) > 1))


def _exits(report: dict) -> Picture | None:
    if not any(row["kind"] == "exit" for row in report["models"]):
        return None
    rows = [row for row in report["models"] if row["kind"] in ("dense", "exit")]
    rows.append(next(row for row in reversed(report["models"]) if row["kind"] == "stage"))

    def draw(figure):
        axis = figure.subplots()
        for row in rows:
            score = row["scores"]["bits_per_byte"]
            number = report["models"].index(row)
            axis.errorbar(
                row["layers_computed"], score["value"], yerr=score["stderr"] or 0, color=_color(number), capsize=3,
                fmt="^" if row["kind"] == "exit" else "o", label=row["model"],
            )  # fmt: skip
        axis.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axis.set(xlabel="Layers computed", ylabel="Bits per byte", xlim=(0, 1.08))
        _legend(figure, len(rows))

    return _picture("Exits", "Bits per byte of the model when it is left early, over the layers computed", draw)


def _training(report: dict) -> Picture | None:
    if not report["training"]:
        return None

    def draw(figure):
        axis = figure.subplots()
        for number, stage in enumerate(report["training"], 1):
            for column, what, line in ((1, "loss", "-"), (2, "KL to the teacher", "--")):
                points = [(point[0], point[column]) for point in stage["points"] if point[column] is not None]
                if points:
                    label = f"{stage['stage']}: {what}"
                    axis.plot(*zip(*points, strict=True), line, color=_color(number), linewidth=1, label=label)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.set(xlabel="Training tokens", ylabel="Nats per token", ylim=(0, None))
        _legend(figure, 2 * len(report["training"]))

    height = HEIGHT + 0.26 * (len(report["training"]) - 1)
    return _picture("Training", "Loss and KL on the training text over the tokens seen", draw, height)
