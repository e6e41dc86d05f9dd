"""Results as tables for people. The numbers are those that `--json` writes."""

import math
from collections import defaultdict

from rich.console import Group
from rich.text import Text

from rrtc.attention import in_sight
from rrtc.console import plain, table
from rrtc.plain import to_yaml
from rrtc.plan import SAVINGS_CONTEXT, savings
from rrtc.storage import said_parts
from rrtc.units import count, duration, size

FEW_LAYERS = 3


def visits(rows: list[dict]) -> str:
    """The layer → visit map in lines of one slot each: which dense layers a slot stands for; and under it one line for
    each layer with matrices that are not simply tied, or with FFN neurons removed."""
    slots: dict[int, list[dict]] = defaultdict(list)
    for row in rows:
        slots[row["slot"]].append(row)
    lines = []
    for slot, uses in sorted(slots.items()):
        layers = ", ".join(f"{use['layer']}" for use in uses)
        tied = [(use, m) for use in uses for m in use["ranks"] if use["forms"].get(m, "tied") == "tied"]
        ranks = sorted({use["ranks"][m] for use, m in tied})
        if len(uses) == 1:
            lines.append(f"slot {slot:>3}   layer {layers}, its own weights")
        elif not tied:
            lines.append(f"slot {slot:>3}   layers {layers}, which share no matrix")
        else:
            shown = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
            lines.append(f"slot {slot:>3}   layers {layers}, LoRA rank {shown}")
        said = ((use["layer"], "; ".join(filter(None, [_forms(use), _attention(use)]))) for use in uses)
        lines += [f"{'':11}layer {layer}: {what}" for layer, what in said if what]
    return "\n".join(lines)


def _forms(visit: dict) -> str:
    """The matrices of a visit that are not simply tied, by the last part of their name: "low rank: up_proj 8, o_proj 4;
    own: q_proj; FFN: up_proj 48→60, down_proj 60→48". Empty where all are."""
    ranks, forms, last = visit["ranks"], visit["forms"], {m: m.split(".")[-1] for m in visit["ranks"]}
    listed = {
        "low rank": [f"{last[m]} {ranks[m]}" for m, form in forms.items() if form == "low_rank"],
        "own": [last[m] for m, form in forms.items() if form == "own"],
        "FFN": [f"{last[m]} {inputs}→{outputs}" for m, (inputs, outputs) in visit["shapes"].items()],
    }
    return "; ".join(f"{what}: {', '.join(names)}" for what, names in listed.items() if names)


def _attention(visit: dict) -> str:
    """What a visit attends to; empty where that is everything."""
    if not (attention := visit.get("attention")):
        return ""
    near = in_sight(attention)
    if not (heads := attention["heads"]):
        return f"sees {near}"
    named = f"KV head{'s' * (len(heads) > 1)} {', '.join(map(str, heads))}"
    return f"{named} see{'s' * (len(heads) == 1)} everything, the others {near}"


def plan(result: dict) -> Group:
    """The plan of `init --dry-run`."""
    dense_total, total = result["dense_params_total"], result["params_total"]
    quantized = result["recipe"]["quantize"]
    inner, dense_inner = result["params_non_embedding"], result["dense_params_non_embedding"]
    counts = [] if total is None else [
        ["parameters", count(dense_total), count(total), f"{total / dense_total:.3f}"],
        ["without embeddings", count(dense_inner), count(inner), f"{inner / dense_inner:.3f}"],
    ]  # fmt: skip
    rows = [
        *counts,
        [
            f"bytes in {result['dtype']}" + ("" if quantized == "none" else f", compressed in {quantized}"),
            size(result["dense_bytes"]),
            size(result["bytes"]),
            f"{result['bytes'] / result['dense_bytes']:.3f}",
        ],
        *(
            [f"KV cache at {context:,} tokens", size(dense), size(made), f"{made / dense:.3f}"]
            for (context, made), dense in zip(
                result["kv_bytes"].items(), result["dense_kv_bytes"].values(), strict=True
            )
        ),
    ]
    flops, dense_flops = result["flops_per_token"], result["dense_flops_per_token"]
    if flops is not None:
        rows.insert(
            len(counts) + 1, ["FLOPs per token", count(dense_flops), count(flops), f"{flops / dense_flops:.3f}"]
        )
    if result["source_bytes"]:
        ratio = result["bytes"] / result["source_bytes"]
        rows.append(["the GGUF file, on disk", size(result["source_bytes"]), size(result["bytes"]), f"{ratio:.3f}"])
    if result["visits"] is None:
        chosen = [
            f"{_pattern(result['recipe'])} How each matrix is stored is chosen by init, once it has measured what the "
            "loss feels."
        ]
    else:
        parts = ", ".join(f"{name.replace('_', ' ')} {count(n)}" for name, n in result["params_by_part"].items() if n)
        chosen = [f"Parameters by part: {parts}", visits(result["visits"])]
    saved = savings(flops, dense_flops, *(result[name][SAVINGS_CONTEXT] for name in ("kv_bytes", "dense_kv_bytes")))
    return Group(
        table(f"Plan for {result['model']}", ["", "dense", "compressed", "ratio"], rows),
        plain(f"Peak memory of init: about {size(result['init_peak_bytes'])}"),
        *map(plain, [*chosen, *([result["windows"]] if result["windows"] else [])]),
        plain(saved if result["recipe"]["budget"] == 1 else f"Tying saves memory and disk. {saved}"),
    )


def _pattern(recipe: dict) -> str:
    """Which layers will share weights, in a sentence."""
    kept = {0: "All layers", 1: "All layers but the first and the last"}.get(
        recipe["keep"], f"All layers but {recipe['keep']} at each end"
    )
    if recipe["sharing"] == "auto":
        return "Neighbors are tied where that is cheaper, which may be nowhere (--sharing auto)."
    if recipe["loops"] == 1:
        return "No layers are tied (--loops 1)."
    order = "in loops" if recipe["sharing"].endswith("cycle") else "in sequence"
    return f"{kept} are tied {order}, {recipe['loops']} to a slot (--sharing {recipe['sharing']})."


def planned(runs: dict) -> Group:
    """What `run --dry-run` found: the recipe and the plan of one run, or a row for each run of a sweep."""
    if len(runs) > 1:
        rows = [[name, *_size_and_work(run)] for name, run in runs.items()]
        return Group(table("Runs", ["run", "params", "w/o emb.", "of dense", "bytes", "steps", "FLOPs"], rows))
    (run,) = runs.values()
    training = run["uptrain"]
    flops = "" if training["flops_total"] is None else f", {count(training['flops_total'])} FLOPs"
    return Group(
        plain(to_yaml(run["recipe"])),
        plan(run["plan"]),
        plain(f"Training: {training['steps']:,} steps, {count(training['tokens'])} tokens{flops}"),
    )


def _size_and_work(run: dict) -> list[str]:
    made, training = run["plan"], run["uptrain"]
    inner = made["params_non_embedding"]
    return [
        "–" if inner is None else count(made["params_total"]),
        "–" if inner is None else count(inner),
        "–" if inner is None else f"{inner / made['dense_params_non_embedding']:.3f}",
        size(made["bytes"]),
        f"{training['steps']:,}",
        "–" if training["flops_total"] is None else count(training["flops_total"]),
    ]


def init(result: dict, folder: str, asked: dict) -> Group:
    """What `init` made; asked: the section of the recipe."""
    kept = result.get("residual_energy_kept", {})
    lines = [plain(f"Wrote {folder}: {_size_made(result, asked)}")]
    if any(kept.values()):
        rows = [[matrix, f"{energy:.1%}"] for matrix, energy in kept.items()]
        lines.append(table("What the LoRA kept of what tying lost", ["matrix", "energy"], rows))
        layers = sorted(result["residual_energy_kept_by_layer"].items(), key=lambda one: one[1])
        least = ", ".join(f"{layer} ({energy:.0%})" for layer, energy in layers[:FEW_LAYERS])
        lines.append(plain(f"It kept least of layer {least}."))
    if loss := result.get("loss"):
        before = "dense" if "dense" in loss else "given"
        lines.append(plain(_loss_in_words(loss["after_init"], loss[before], before, loss["tokens"])))
    if rows := result.get("alternatives"):
        lines += _alternatives(rows, result)
    lines.append(plain(f"Next: rrtc uptrain {folder} -o HEALED"))
    return Group(*lines)


def generated(result: dict) -> Text:
    """How fast `generate` was, in a line."""
    prompts, tokens, seconds = len(result["answers"]), result["tokens"], result["seconds"]
    parts = [
        f"{tokens:,} token{'s' * (tokens != 1)} for {prompts} prompt{'s' * (prompts > 1)}",
        f"{tokens / seconds:.1f} a second",
    ]
    if result["drafted"]:
        parts.append(f"{result['accepted'] / result['drafted']:.0%} of {result['drafted']:,} drafts were right")
    if result["left"]:
        parts.append(f"{1 - result['left'][-1] / max(sum(result['left']), 1):.0%} of them left early")
    return plain("; ".join(parts) + f" ({result['way']}).", "dim")


def served(result: dict) -> Text:
    """What `serve` did until it was stopped, in a line."""
    return plain(f"Answered {result['answered']:,} prompts; {result['tokens']:,} tokens were said.", "dim")


def _loss_in_words(ours: float, theirs: float, whose: str, tokens: int) -> str:
    """What a loss of `ours` nats a token is beside one of `theirs`."""
    return (
        f"Loss before any training: {ours:.3f} nats a token, where the {whose} model has {theirs:.3f} ({tokens:,} "
        f"tokens): the right token gets {math.exp(theirs - ours):.0%} of the probability that it has there (geometric "
        "mean)."
    )


def _size_made(result: dict, asked: dict) -> str:
    """How much was written, first in the unit in which it was asked for."""
    share = result["params_non_embedding"] / result["dense_params_non_embedding"]
    in_files = size(result["bytes_on_disk"])
    of_dense = f"{result['bytes_on_disk'] / result['dense_bytes']:.3f} of the dense model in the same format"
    numbers = f"{count(result['params_total'])} parameters"
    inner = f"{count(result['params_non_embedding'])} of them without embeddings"
    if (quantized := result.get("quantized_bytes")) is not None:
        of_dense = f"{quantized / result['dense_bytes']:.3f} of the dense model's {size(result['dense_bytes'])}"
        said = f"{numbers}, now {in_files}; {size(quantized)} by export --quantize {asked['quantize']}, {of_dense}"
    elif asked.get("size") is not None:
        said = f"{in_files}, {of_dense}; {numbers}"
    elif asked.get("budget") is not None:
        said = f"{numbers}, {inner}, {share:.3f} of the dense model's; {in_files}"
    else:
        said = f"{numbers}, {in_files}, {of_dense}"
    if source := result["source_bytes"]:
        said += f"; {result['bytes'] / source:.3f} of the GGUF file"
    return said


def _alternatives(rows: list[dict], result: dict) -> list:
    """What else could have been made at this size, and how to have it."""
    dense, kv = result["dense_flops_per_token"], size(result["kv_bytes"][SAVINGS_CONTEXT])
    cells = [
        [
            row["way"] + (" (made)" if row["made"] else ""),
            f"{row['predicted_excess']:.3f}",
            f"{row['flops_per_token'] / dense:.2f}",
            kv,
            f"{row['exits']}" if row["exits"] else "–",
            count(row["shared_params"]) if row["shared_params"] else "–",
            row["flags"],
        ]
        for row in rows
    ]
    columns = ["way", "costs at least", "FLOPs", f"KV at {SAVINGS_CONTEXT:,}", "early exits", "shared", "choose it by"]
    note = (
        "costs at least: nats a token on the calibration text, each change by itself and to second order; good to "
        "compare rows, and what is lost is more. Of rows that were not made a part of the layers was measured. FLOPs: "
        "of the dense model's, for a token. shared: weights that several layers use."
    )
    return [table("Ways to be this size", columns, cells, prose=[6]), plain(note)]


def estimate(result: dict) -> Group:
    """What `uptrain --dry-run` found."""
    rows = [
        ["steps", f"{result['steps']:,}"],
        ["tokens", count(result["tokens"])],
        ["learning rate, at most", f"{result['learning_rate']:.1e}"],
        ["FLOPs", count(result["flops_total"])],
        ["peak memory, about", size(result["peak_memory_bytes"])],
        [f"seconds a step, over {result['measured_steps']} steps", f"{result['seconds_per_step']:.2f}"],
        ["time in all, about", duration(result["seconds_total"])],
    ]
    profiled = [profile(result["profile"])] if "profile" in result else []
    return Group(*profiled, table(f"Uptraining on {result['device']}", ["", ""], rows))


def profile(rows: list[dict]) -> Group:
    """What the branches of tied visits add, beside the dense model's, and the gains that they get."""
    tied = [row for row in rows if row["gain"] is not None]
    cells = [
        [
            str(row["layer"]),
            f"{row['slot']}, {row['loop']}",
            row["branch"],
            f"{row['dense_branch'] / row['dense_stream']:.3g}",
            f"{row['tied_branch'] / row['tied_stream']:.3g}",
            f"{row['gain']:.2f}",
        ]
        for row in tied
    ]
    note = "Var[branch] / Var[stream], over tokens; the gain as the root of its mean square. What is not tied has none."
    columns = ["layer", "slot, loop", "branch", "dense", "tied", "gain"]
    return Group(table("What each branch adds to the hidden states", columns, cells), plain(note))


def uptrain(result: dict, folder: str) -> Group:
    """What `uptrain` made."""
    trained = f"{count(result['tokens'])} tokens in {duration(result['seconds'])}"
    if "first_attention" in result:
        what = "what heads with linear attention find, from full attention"
        row = [what, f"{result['first_attention']:.3f}", f"{result['last_attention']:.3f}"]
        columns = ["on the training text, squared, relative", "first", "last"]
        said = f"Curves: {folder}/loss.png. Next: rrtc eval {folder} -o REPORT"
        return Group(table(f"Wrote {folder}: {trained}", columns, [row]), plain(said))
    rows = []
    if result["first_loss"] is not None:
        rows.append(["loss", f"{result['first_loss']:.3f}", f"{result['last_loss']:.3f}"])
    if result.get("first_kl") is not None:
        hot = result["temperature"]
        at = "" if hot == 1 else f" at temperature {hot:g}"
        rows.append([f"KL to the teacher{at}", f"{result['first_kl']:.3f}", f"{result['last_kl']:.3f}"])
    for name in (key.removeprefix("first_") for key in result if key.startswith("first_exit_")):
        _, loop, what = name.split("_")
        # A joint exit learns from both, where there is a teacher.
        both = result["exits"] == "joint" and result.get("first_kl") is not None
        end = "the mean of the teacher and the model's own end" if both else "the model's own end"
        shown = {"loss": "loss", "kl": f"KL to {end}"}[what]
        rows.append(
            [f"exit after loop {loop}, {shown}", f"{result[f'first_{name}']:.3f}", f"{result[f'last_{name}']:.3f}"]
        )
    lines = [table(f"Wrote {folder}: {trained}", ["on the training text, nats per token", "first", "last"], rows)]
    if cache := result.get("teacher_cache"):
        lines.append(
            plain(
                f"Teacher cache: {cache['reused']} of {cache['windows']} windows were there before, "
                f"{cache['bytes_per_token']:.0f} bytes a token."
            )
        )
    return Group(
        *lines,
        plain("A nat less: the right token is 2.7 times as probable. What that is worth, rrtc eval measures."),
        plain(f"Curves: {folder}/loss.png. Next: rrtc eval {folder} -o REPORT"),
    )


def export(result: dict, folder: str) -> Group:
    """What `export` made."""
    lines = [
        f"Wrote {folder}: {result['format']}, {count(result['parameters'])} parameters, {size(result['bytes'])}. "
        f"Reloaded in a fresh process: largest logit difference {result['max_logit_difference']:.1e}."
    ]
    if "speculate" in result:
        lines.append("Its exit guesses: transformers' generate gives the same text, sooner where guesses are right.")
    if found := result.get("full_attention"):
        lines.append(
            f"This format attends to everything: {found['full']:.4f} nats a token on held-out text, where the model "
            f"with its windows has {found['windows']:.4f}."
        )
    if "quantize" in result:
        number, found = result["quantize"], result["bits_per_byte"]
        lines.append(f"Its numbers: {said_parts(result['parts'])}.")
        lines.append(
            f"Bits per byte on held-out text: {found['plain']:.4f} before, {found['calibrated']:.4f} in {number} "
            f"(rounded without calibration: {found['nearest']:.4f})."
        )
    return Group(*map(plain, lines))


def environment(result: dict) -> Group:
    """What `env` found."""
    device, memory = result["device"], result["device"]["memory_bytes"]
    packages = ", ".join(f"{name} {version}" for name, version in result["packages"].items() if version)
    missing = ", ".join(name for name, version in result["packages"].items() if not version)
    rows = [
        ["rrtc", result["rrtc"]],
        ["Python", result["python"]],
        ["platform", result["platform"]],
        ["processor cores", result["cores"]],
        ["memory", size(result["memory_bytes"])],
        ["device", f"{device['count']} × {device['name']} ({device['type']}{f', {size(memory)}' if memory else ''})"],
        ["packages", packages],
        ["not installed", missing or "–"],
        ["cache", result["cache_folder"]],
    ]
    return Group(table("Where rrtc runs", ["", ""], rows, prose=[1]))
