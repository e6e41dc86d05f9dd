"""The README's picture of quality against size, docs/quality.svg, from the figures in picture.json.

    python benchmarks/picture.py [FILE.svg]

Nothing is measured here: benchmarks/init.py does that, LOG.md has the whole tables, and picture.json the figures that
are drawn. The same figures give the same bytes.
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

HERE = Path(__file__).parent
STYLES = {
    "rrtc init --sharing auto": {"color": "#0072B2", "marker": "o"},
    "the same, two loops": {"color": "#0072B2", "marker": "D", "markerfacecolor": "white", "linestyle": "none"},
    "whitened SVD, nothing tied": {"color": "#D55E00", "marker": "s", "linestyle": "--"},
}


def draw(models: list[dict], target: Path) -> None:
    """Writes the picture of `models`, as in picture.json, into the SVG file `target`."""
    figure = Figure(figsize=(8, 3.2), layout="constrained", facecolor="white")
    axes = figure.subplots(1, len(models), sharex=True, sharey=True)
    for ax, model in zip(axes, models, strict=True):
        for row in model["rows"]:
            sizes, losses = zip(*row["points"], strict=True)
            ax.plot(sizes, losses, label=row["method"], **STYLES[row["method"]])
            below = row["method"] == "rrtc init --sharing auto"
            for size, loss in row["points"]:
                text, place = f"{loss + 1e-9:.2f}", (0, -14 if below else 6)
                ax.annotate(text, (size, loss), place, textcoords="offset points", ha="center", fontsize=8)
        ax.set(title=model["name"], xlabel="parameters without embeddings,\npart of the dense model's")
        ax.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        ax.set_ylim(-0.2, 5.6)
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("loss above the dense model's\n(nats a token), nothing trained")
    axes[0].legend(frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": "rrtc", "svg.fonttype": "none"}):
        figure.savefig(target, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    wanted = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs" / "quality.svg"
    draw(json.loads((HERE / "picture.json").read_text(encoding="utf8"))["models"], wanted)
