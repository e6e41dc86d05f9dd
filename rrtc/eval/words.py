"""What a report comes to, in words: what each compressed model keeps of the dense one, and on what it loses most.

Pure Python, because the command line shows reports without torch.
"""

# Said once, where the scores stand.
UNITS = (
    "Bits per byte: bits that it takes to write a byte of the text down with the model's help; less is better. KL: how "
    "far the model's probabilities are from the dense model's, in nats a token; a nat is a factor of 2.7. Top-1: share "
    "of tokens on which both find the same one most probable."
)


def asked_about(report: dict) -> list[dict]:
    """The rows of the compressed models that the report is about: the last stage of one folder, or all folders that are
    compared."""
    stages = [row for row in report["models"] if row["kind"] == "stage"]
    return stages if report["of"] is None else stages[-1:]


def verdict(report: dict) -> list[str]:
    """What it comes to, in a few sentences for each model that the report is about."""
    baselines = [row for row in report["models"] if row["kind"] == "baseline"]
    return [_of_one(row, report["models"][0]) + _better(row, baselines) for row in asked_about(report)]


def _better(row: dict, baselines: list[dict]) -> str:
    """The baseline that takes no more bytes and loses less, if there is one: the best of them."""

    def bits(one: dict) -> float:
        return one["scores"]["bits_per_byte"]["value"]

    found = [one for one in baselines if one["bytes"] <= row["bytes"] and bits(one) < bits(row)]
    if not found:
        return ""
    best = min(found, key=bits)
    share = f"{best['bytes'] / row['bytes']:.0%} of its bytes" if row["bytes"] else "no more bytes"
    return f" But without rrtc one has more for less: {best['model']} takes {share} and {bits(best):.4f} bits per byte."


def _of_one(row: dict, dense: dict) -> str:
    sizes = [row[key] / dense[key] if dense[key] else 1.0 for key in ("bytes", "params_non_embedding")]
    said = f"{row['model']} takes {sizes[0]:.0%} of the dense model's bytes, {sizes[1]:.0%} of its parameters without "
    return f"{said}embeddings. It {_kept(row, dense)}. It {_lost(row, dense)}."


def _kept(row: dict, dense: dict) -> str:
    kept = []
    if (score := row["scores"].get("top1_agreement")) is not None:
        kept.append(f"{score['value']:.0%} of the dense model's first choices of a token")
    average, theirs = row.get("task_average"), dense.get("task_average")
    if average is not None and theirs is not None and theirs["value"] > 0:
        ours, whole = average["value"], theirs["value"]
        kept.append(f"{ours / whole:.0%} of its average over tasks ({100 * ours:.1f} of {100 * whole:.1f} %)")
    return f"keeps {' and '.join(kept)}" if kept else "was scored on text alone"


def _lost(row: dict, dense: dict) -> str:
    bits, theirs = row["scores"]["bits_per_byte"]["value"], dense["scores"]["bits_per_byte"]["value"]
    if bits <= theirs:
        return f"loses nothing on text: {bits:.4f} bits per byte, where the dense model has {theirs:.4f}" + _tasks(row)
    more = f", {bits / theirs - 1:.0%} more" if theirs > 0 else ""
    lost = f"loses {bits - theirs:.4f} bits per byte ({bits:.4f}{more})"
    if len(row["texts"]) > 1:
        by = {name: _difference(scores["bits_per_byte"]) for name, scores in row["texts"].items()}
        worst = max(by, key=by.__getitem__)
        lost += f", most on {worst} ({by[worst]:+.4f})"
    return lost + _tasks(row)


def _tasks(row: dict) -> str:
    by = {name: _difference(score) for name, score in row.get("tasks", {}).items()}
    worst = min(by, key=by.__getitem__) if len(by) > 1 else None
    if worst is None or by[worst] >= 0:
        return ""
    return f"; of the tasks it loses most on {worst} ({100 * by[worst]:+.1f} points)"


def _difference(score: dict) -> float:
    """From the dense model's."""
    return score["difference"]["value"] if score["difference"] else 0.0
