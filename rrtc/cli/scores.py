"""What `rrtc eval` found, as tables for people."""

from rich.console import Group
from rich.text import Text

from rrtc.console import FittedTable, plain, table
from rrtc.eval.words import UNITS, verdict
from rrtc.io.report import parts_by_model
from rrtc.plan import KV_CONTEXTS
from rrtc.units import count, size


def report(result: dict) -> Group:
    """What `eval` found: tables of the models' sizes and scores, and one of each other kind of measurement."""
    models = result["models"]
    whole, exits = ([row for row in models if (row["kind"] == "exit") == left] for left in (False, True))
    sizes = [
        [row["model"], count(row["params_total"]), count(row["params_non_embedding"]), size(row["bytes"])]
        for row in whole
    ]
    scores = ["bits/byte", "against dense", "KL", "top-1"]
    lines = [
        table(f"Measured against {result['against']}", ["model", "params", "w/o emb.", "bytes"], sizes),
        table("Scores", ["model", *scores], [[row["model"], *_scores(row)] for row in whole]),
    ]
    if exits:
        rows = [[row["model"], f"{row['layers_computed']:.0%}", *_scores(row)] for row in exits]
        lines.append(table("Left early", ["model", "layers computed", *scores], rows))
    lines += [*_tasks(models), *_passkey(models), *_cache(models), *_speeds(result)]
    scored = ", ".join(f"{name} ({count(n)} tokens)" for name, n in result["tokens"].items())
    lines += [
        plain(f"{UNITS} [95 % interval]"),
        plain(f"Scored on: {scored}"),
    ]
    if engine := result.get("engine"):
        ways = [[one["way"], one["requests"], _or_dash(one["forecast"]), _ratio(one)] for one in engine["ways"]]
        title = "Ways to generate, as a multiple of full depth's speed"
        lines.append(table(title, ["way", "requests", "forecast", "measured"], ways))
    if result["source_bytes"]:
        lines.append(
            plain(
                f"The dense model was read from a GGUF file of {size(result['source_bytes'])}; its size above is what "
                "it takes in the format of the compressed one."
            )
        )
    for entry in result["not_run"]:
        lines.append(plain(f"Not run: {entry['task']}. {entry['why']}"))
    if result["samples"] and (prompt := result.get("prompt")):
        lines.append(Text.assemble(plain("Asked: ", "bold"), plain(" ".join(prompt.split()))))
    for said in result["samples"]:
        words = " ".join(said["text"].split()) or "(says nothing)"
        lines.append(Text.assemble(plain(f"{said['model']}: ", "bold"), plain(words)))
    return Group(*lines, *map(plain, verdict(result)))


SHOWN = {"bits_per_byte": "{:.4f}", "kl": "{:.4f}", "top1_agreement": "{:.1%}"}


def _scores(row: dict) -> list[str]:
    scores = row["scores"]
    shown = ["–" if key not in scores else form.format(scores[key]["value"]) for key, form in SHOWN.items()]
    return [shown[0], _difference(scores["bits_per_byte"]), *shown[1:]]


def _difference(score: dict) -> str:
    """How far from the dense model, with the interval: +0.084 [0.071, 0.098]."""
    found = score["difference"]
    if found is None:
        return "–"
    interval = "" if found["low"] is None else f" [{found['low']:.3f}, {found['high']:.3f}]"
    return f"{found['value']:+.3f}{interval}"


def _ratio(found: dict) -> str:
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _or_dash(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}"


def _tasks(models: list[dict]) -> list[FittedTable]:
    """A table of tasks with a column a model; [] where no task was run."""
    asked = [row for row in models if "tasks" in row]
    if not asked:
        return []
    rows = [
        [f"{name} ({found['metric']}, {found['items']})", *(_share(row["tasks"][name]) for row in asked)]
        for name, found in asked[0]["tasks"].items()
    ]
    rows.append(["average", *(_share(row["task_average"]) for row in asked)])
    return [table("Tasks, in percent (± standard error)", ["task", *(row["model"] for row in asked)], rows)]


def _share(score: dict) -> str:
    stderr = "" if score["stderr"] is None else f" ± {100 * score['stderr']:.1f}"
    return f"{100 * score['value']:.1f}{stderr}"


def _passkey(models: list[dict]) -> list[FittedTable]:
    """A table of pass keys found with a row a length; [] where none was hidden."""
    from rrtc.eval.statistics import over_depths

    asked = [row for row in models if "passkey" in row]
    if not asked:
        return []
    found, rows = [over_depths(row["passkey"]) for row in asked], []
    for length, (*_, items) in found[0].items():
        shares = [f"{share:.0%} [{low:.0%}, {high:.0%}]" for share, low, high, _ in (one[length] for one in found)]
        rows.append([f"{length} tokens, {items} keys", *shares])
    return [table("Pass keys found, over all depths", ["text", *(row["model"] for row in asked)], rows)]


def _cache(models: list[dict]) -> list[FittedTable]:
    """A table of the KV cache with a column for each length; [] where it was not worked out, as in older reports."""
    rows = [
        [row["model"], *(size(row["cost"]["kv_bytes"][str(context)]) for context in KV_CONTEXTS)]
        for row in models
        if (row.get("cost") or {}).get("kv_bytes")
    ]
    if len({tuple(sizes) for _, *sizes in rows}) < 2:  # there is nothing to compare
        return []
    return [table("KV cache", ["model", *(f"{n:,} tokens" for n in KV_CONTEXTS)], rows)]


def _speeds(result: dict) -> list[FittedTable]:
    """A table of how fast each compressed model is; [] where that was not measured."""
    rows, lengths = [], []
    for name, speed in parts_by_model(result, "speed").items():
        long = speed.get("long")
        lengths += [long["prompt_tokens"]] if long else []
        rows.append(
            [name, *(_ratio(speed[what]) for what in ("prefill", "decode")), _ratio(long["decode"]) if long else "–"]
        )
    columns = ["model", "reading a prompt", "generating"]
    if lengths:
        columns.append(f"generating after {max(lengths):,} tokens")
    title = "Speed, as a multiple of the dense model's [quartiles]"
    return [table(title, columns, [row[: len(columns)] for row in rows])] if rows else []
