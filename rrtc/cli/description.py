"""What `inspect` shows of a folder: its plan, where it came from, how it was made, and what was measured, in the units
people read. What rrtc.yaml holds besides may be anything, and is shown as it is."""

import re
from typing import Any

from rich.console import Group

from rrtc.cli import scores, tables
from rrtc.console import plain, table
from rrtc.io.provenance import REPLAN
from rrtc.recipe.schema import Recipe
from rrtc.storage import NUMBER_BYTES
from rrtc.units import count, duration, size

SHOWN_ABOVE = ("params_total", "params_non_embedding", "bytes", "bytes_on_disk", "flops_per_token", "kv_bytes")
IN_NATS = re.compile("^predicted_|loss$|kl$")  # names of what is in nats a token
COUNTED = ("params", "parameters", "tokens", "flops", "steps", "windows")  # beginnings of what is a count


def description(result: dict) -> Group:
    """What `inspect` found."""
    base = result["base"]
    rows = [
        ["stage", result["stage"]],
        ["made", f"{result['made']} by rrtc {result['rrtc']}"],
        ["versions", ", ".join(f"{name} {version}" for name, version in result["versions"].items())],
        ["dense model", f"{base['uri']} ({size(base['bytes'])}, sha256 {base['sha256'][:12]}…)"],
        ["came through", " → ".join([h["stage"] for h in result["history"]] + [result["stage"]])],
    ]
    rows += _sizes(result)
    rows += [[f"recipe, {part}", _recipe(part, values)] for part, values in result["recipe"].items() if values]
    rows += [[f"measured, {stage}", _measured(figures)] for stage, figures in result["measured"].items()]
    lines = [table(result["folder"], ["", ""], rows, prose=[1])]
    if result.get("visits"):
        lines.append(plain(tables.visits(result["visits"])))
    if "report" in result:
        lines.append(scores.report(result["report"]))
    return Group(*lines)


def _sizes(result: dict) -> list[list[str]]:
    """Rows of how large the model is, beside the dense one as far as that is known."""
    made, rows = result["measured"].get("init"), []
    made = made if isinstance(made, dict) else {}
    if "bytes_on_disk" in result:
        weights = f"{size(result['bytes_on_disk'])} in {result['dtype']}"
        dense, parameters = made.get("dense_bytes"), made.get("dense_params_total")
        if _is_number(parameters) and result["dtype"] in NUMBER_BYTES:  # which an export may have changed
            dense = NUMBER_BYTES[result["dtype"]] * parameters
        if _is_number(dense) and dense > 0:
            weights += f", {result['bytes_on_disk'] / dense:.3f} of the dense model's {size(dense)}"
        rows.append(["weights", weights])
    exported = result["measured"].get("export") if result["stage"] == "export" else None
    if isinstance(exported, dict) and exported.get("format") != "recursive":  # multiplied out: init counted another
        if _is_number(ours := exported.get("parameters")):
            rows.append(["parameters", count(ours) + _share(ours, made.get("dense_params_total"))])
    else:
        for title, key in (
            ("parameters", "params_total"), ("without embeddings", "params_non_embedding"),
            ("FLOPs a token", "flops_per_token"),
        ):  # fmt: skip
            if _is_number(ours := made.get(key)):
                rows.append([title, count(ours) + _share(ours, made.get(f"dense_{key}"))])
    if kv := result.get("kv_bytes"):
        dense = result["dense_kv_bytes"]
        shown = (f"{size(n)} at {context:,} tokens{_share(n, dense[context])}" for context, n in kv.items())
        rows.append(["KV cache", "; ".join(shown)])
    return rows


def _share(ours: float, dense: Any) -> str:
    return f", {ours / dense:.3f} of the dense model's" if _is_number(dense) and dense > 0 else ""


def _recipe(part: str, values: Any) -> str:
    """The fields of a section that were set to something else than their defaults."""
    if not isinstance(values, dict):
        return str(values)
    if part == REPLAN:
        of_attention = {n: value for n, value in values["init"].items() if n.startswith(("kv_", "calibrate_"))}
        return f"{values['model']}: {_recipe('init', of_attention)}"
    section = Recipe.model_fields[part].annotation if part in Recipe.model_fields else None
    fields = getattr(section, "model_fields", {})
    changed = {
        name: value
        for name, value in values.items()
        if value is not None and not (name in fields and fields[name].default == value)
    }
    return ", ".join(f"{name} {_plainly(value)}" for name, value in changed.items()) or "as by default"


def _measured(figures: Any) -> str:
    """Figures by name, without those that have rows of their own."""
    if not isinstance(figures, dict):
        return _plainly(figures)
    said = []
    for name, value in figures.items():
        hidden = (
            name in SHOWN_ABOVE
            or str(name).removeprefix("dense_") in SHOWN_ABOVE
            or name in ("alternatives", "text_sha256")
        )
        if value in (None, [], {}) or hidden:
            continue
        title = {"seconds": "took"}.get(name, str(name).replace("_", " "))
        unit = " nats a token" if _is_number(value) and IN_NATS.search(str(name)) else ""
        said.append(f"{title}{' (nats a token)' if name == 'loss' else ''} {_figure(str(name), value)}{unit}")
    return "; ".join(said)


def _figure(name: str, value: Any) -> str:
    """A figure in the unit that its name says it has."""
    if isinstance(value, dict):
        return ", ".join(f"{str(key).replace('_', ' ')} {_figure(str(key), inside)}" for key, inside in value.items())
    if not _is_number(value):
        return _plainly(value)
    if "bytes" in name and "per_byte" not in name:
        return size(value)
    if name.startswith("seconds"):
        return duration(value)
    return count(value) if name.startswith(COUNTED) else _plainly(value)


def _plainly(value: Any) -> str:
    """`value` as people write it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key}={_plainly(inside)}" for key, inside in value.items())
    return ", ".join(map(_plainly, value)) if isinstance(value, list) else str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e18
