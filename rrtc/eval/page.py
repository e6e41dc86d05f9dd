"""report.html: report.json to look at, in one file that needs nothing else."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rrtc.eval.statistics import over_depths
from rrtc.eval.words import UNITS, verdict
from rrtc.io.report import parts_by_model
from rrtc.plan import KV_CONTEXTS, SAVINGS_CONTEXT, savings
from rrtc.units import count, size

TEMPLATE = Path(__file__).with_name("page.html")
PARTS = {
    "embeddings": "embeddings", "head": "head", "shared": "shared", "own": "own", "lora": "LoRA",
    "low_rank": "low rank", "norms_and_biases": "norms, biases", "feature_maps": "feature maps", "exits": "exits",
}  # fmt: skip
LOOPS = "Using layers several times saves memory and disk."


@dataclass(frozen=True)
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def write_page(report: dict, file: Path) -> None:
    """Writes the page of `report` (see rrtc/io/report.py) into `file`. What was not measured has no section."""
    from jinja2 import Environment

    from rrtc.eval.plots import pictures

    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(
        TEMPLATE.read_text(encoding="utf8")
    )
    made = report["of"] and f"made {report['of']['made'][:10]}"
    page = template.render(
        report=report,
        title=f"Measured against {report['against']}" + (f", {made}" if made else ""),
        verdict=verdict(report),
        scored=", ".join(f"{name} ({count(n)} tokens)" for name, n in report["tokens"].items()),
        tables=[table for make in TABLES if (table := make(report)).rows],
        pictures=pictures(report),
        made_with=_made_with(report["made_with"]),
    )
    file.write_text(page, encoding="utf8")


def _models(report: dict) -> Table:
    rows = []
    for row in report["models"]:
        scores = row["scores"]
        rows.append(
            [
                row["model"],
                f"{row['layers_computed']:.0%}" if "layers_computed" in row else "",
                count(row["params_total"]),
                count(row["params_non_embedding"]),
                size(row["bytes"]),
                _score(scores["bits_per_byte"], "{:.4f}"),
                _difference(scores["bits_per_byte"], "{:+.4f}"),
                _score(scores.get("calibration_error"), "{:.1f} %", 100),
                _score(scores.get("kl"), "{:.4f}"),
                _score(scores.get("top1_agreement"), "{:.1f} %", 100),
            ]
        )
    columns = ["model", "layers computed", "parameters", "w/o embeddings", "bytes", "bits per byte", "from dense",
               "calibration error", "KL (nats)", "top-1 agreement"]  # fmt: skip
    if not any(row[1] for row in rows):
        columns, rows = [c for c in columns if c != "layers computed"], [[row[0], *row[2:]] for row in rows]
    return Table("Models", columns, rows, UNITS)


def _tasks(report: dict) -> Table:
    asked = [row for row in report["models"] if "tasks" in row]
    rows = []
    for name, found in asked[0]["tasks"].items() if asked else ():
        rows.append([f"{name} ({found['metric']}, {found['items']} items)", *_with_differences(asked, name)])
    if asked:
        rows.append(["average", *_with_differences(asked, None)])
    return Table("Tasks, in percent", ["task", *(row["model"] for row in asked)], rows)


def _with_differences(rows: list[dict], task: str | None) -> list[str]:
    cells = []
    for row in rows:
        score = row["task_average"] if task is None else row["tasks"][task]
        difference = "" if score["difference"] is None else f" ({_difference(score, '{:+.1f}', 100)})"
        cells.append(_score(score, "{:.1f}", 100) + difference)
    return cells


def _parts(report: dict) -> Table:
    rows = [row for row in report["models"] if row["kind"] != "exit"]
    used = [part for part in PARTS if any(row["parts"].get(part) for row in rows)]
    cells = [[row["model"], *(count(row["parts"].get(part, 0)) for part in used)] for row in rows]
    return Table("Parameters by part", ["model", *(PARTS[part] for part in used)], cells)


def _passkey(report: dict) -> Table:
    asked = [row for row in report["models"] if "passkey" in row]
    found = [over_depths(row["passkey"]) for row in asked]
    rows = []
    for length, (*_, items) in (found[0] if asked else {}).items():
        shares = ([100 * share for share in one[length][:3]] for one in found)
        cells = [f"{share:.0f} [{low:.0f}, {high:.0f}]" for share, low, high in shares]
        rows.append([f"{length:,} tokens ({items} keys)", *cells])
    note = "Over all depths; the 95 % interval (Wilson's) is of each share by itself."
    return Table("Pass keys found, in percent", ["text", *(row["model"] for row in asked)], rows, note)


def _cost(report: dict) -> Table:
    rows, speeds = [], parts_by_model(report, "speed")
    for row in report["models"]:
        if "cost" in row:
            cost = row["cost"]
            peak = "–" if cost["peak_memory_bytes"] is None else size(cost["peak_memory_bytes"])
            kept = [size(cost["kv_bytes"][str(context)]) for context in KV_CONTEXTS]
            kv, speed = size(cost["kv_bytes_per_token"]), _speed(speeds.get(row["model"]))
            rows.append([row["model"], *kept, kv, count(cost["flops_per_token"]), peak, *(speed if speeds else [])])
    note, cache = " ".join([LOOPS, *_savings(report["models"])]), [f"KV cache at {n:,} tokens" for n in KV_CONTEXTS]
    columns = ["model", *cache, "a token at most", "FLOPs a token", "peak memory"]
    if speeds:
        one = next(iter(speeds.values()))
        columns += ["reading a prompt", "generating"]
        note += (
            " Reading and generating: speed as a multiple of the dense model's, in turn on the same machine "
            f"({one['device']}, {one['rounds']} rounds, median and quartiles)."
        )
    for name, speed in speeds.items():
        if "long" in speed:
            after, of = speed["long"], f"{name}: " if len(speeds) > 1 else ""
            note += f" {of}Generating after {after['prompt_tokens']:,} tokens: {_ratio(after['decode'])}."
    return Table("Cost", columns, rows, note)


def _speed(found: dict | None) -> list[str]:
    return ["–", "–"] if found is None else [_ratio(found[what]) for what in ("prefill", "decode")]


def _ratio(found: dict) -> str:
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _savings(rows: list[dict]) -> Iterator[str]:
    """What a token of each compressed model saves: one sentence for all of which the same is true."""
    measured = [row for row in rows if "cost" in row]
    said: dict[str, list[str]] = {}
    for row in (row for row in measured if row["kind"] == "stage"):
        both = (row["cost"], measured[0]["cost"])  # and the dense model's
        flops, cache = ([cost[key] for cost in both] for key in ("flops_per_token", "kv_bytes"))
        said.setdefault(savings(*flops, *(kept[str(SAVINGS_CONTEXT)] for kept in cache)), []).append(row["model"])
    for sentence, models in said.items():
        yield sentence if len(said) == 1 else f"{', '.join(models)}: {sentence}"


def _score(score: dict | None, form: str, scale: float = 1) -> str:
    if score is None:
        return "–"
    digits = form.partition(".")[2][0]
    stderr = "" if score["stderr"] is None else f" ± {scale * score['stderr']:.{digits}f}"
    return form.format(scale * score["value"]) + stderr


def _difference(score: dict, form: str, scale: float = 1) -> str:
    found = score["difference"]
    if found is None:
        return "–"
    value, low, high = (None if found[key] is None else form.format(scale * found[key]) for key in found)
    return value if low is None else f"{value} [{low}, {high}]"


def _made_with(made: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return (
        f"Made with {versions}; computed on {made['device']} in {made['dtype']}; seed {made['seed']}, "
        f"{made['resamples']} bootstrap samples."
    )


def _engine(report: dict) -> Table:
    found = report.get("engine") or {"ways": []}
    rows = [
        [way["way"], str(way["requests"]), "–" if way["forecast"] is None else f"{way['forecast']:.2f}", _ratio(way)]
        for way in found["ways"]
    ]
    notes = ["Speed as a multiple of full depth by rrtc's engine, in turn on this machine; median and quartiles."]
    if found["ways"] and found["right"] is not None:
        notes.append(f"The first exit is right about {found['right']:.0%} of what the model says itself.")
    for one in found.get("thresholds", ()):
        notes.append(
            f"At most {one['limit']} nats a token are lost where an exit is surer than {one['threshold']:.3f}: "
            f"{one['left']:.0%} of tokens leave early."
        )
    return Table("Ways to generate", ["way", "requests at once", "forecast", "measured"], rows, " ".join(notes))


TABLES = (_models, _tasks, _passkey, _parts, _cost, _engine)
