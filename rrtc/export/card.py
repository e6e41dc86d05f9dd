"""The model card: what the export is, what was tied, what was measured, how to load it, and what it does not do.

Every number in it was measured, on this model or on the one it was made from; where nothing was, the card says so.
"""

import re
from collections import Counter, defaultdict
from pathlib import Path

import torch
import yaml

from rrtc import __version__
from rrtc.export.formats import FORMATS
from rrtc.io.license import forbids_derivatives
from rrtc.io.provenance import without_places
from rrtc.model import RrtConfig
from rrtc.plan import KV_CONTEXTS, Plan
from rrtc.stock.architecture import read_plan
from rrtc.storage import said_numbers, said_parts
from rrtc.units import count, size

COLUMNS = {
    "layers_computed": ("layers computed", "{:.0%}".format),
    "params_total": ("parameters", count),
    "params_non_embedding": ("without embeddings", count),
    "bytes": ("on disk", size),
    "bits_per_byte": ("bits per byte", "{:.4f}".format),
    "loss": ("loss", "{:.4f}".format),
    "calibration_error": ("calibration error", "{:.1%}".format),
    "kl": ("KL to dense", "{:.4f}".format),
    "top1_agreement": ("top-1 agreement", "{:.1%}".format),
    "task_average": ("tasks, average", "{:.1%}".format),
}


def write_card(
    folder: Path,
    name: str,
    config: RrtConfig,
    provenance: dict,
    exported: dict,
    report: dict | None,
    license: dict[str, str],
    chat: bool,
) -> None:
    """Writes README.md into `folder`.

    name: what the folder will be called. provenance: the rrtc.yaml of the export. exported: what the export measured.
    report: report.json of an evaluation, or None. license: as rrtc.io.license has it. chat: whether the tokenizer has a
    chat template.
    """
    made_as, base = FORMATS[exported["format"]], provenance["base"]
    named = hub_id(base)
    provenance = without_places(provenance)
    base = provenance["base"]
    if report is not None:
        report = without_places(report) | {"samples": report.get("samples", [])}  # which may begin with a slash
    sections = [
        f"# {name}",
        f"{_summary(config, base)} {made_as.summary(config)}".rstrip(),
        "## What was tied",
        _tying(config, provenance),
        "## What a token sees",
        _attention(config, exported),
        "## What was measured",
        _measured(provenance, exported, report),
        "## How to load it",
        made_as.how_to_load(exported, name, config, chat),
        "## Limits",
        made_as.limits(exported, config),
        "## License",
        _license(license, base),
        "## Recipe",
        f"```yaml\n{yaml.safe_dump(provenance['recipe'], sort_keys=False, allow_unicode=True)}```",
    ]
    text = f"---\n{_metadata(exported, name, config, named, license, report)}\n---\n\n" + "\n\n".join(sections) + "\n"
    (folder / "README.md").write_text(text, encoding="utf8")


def hub_id(base: dict) -> str | None:
    """The hub id of the base model, or None where its URI is a folder, a file or a package."""
    uri = base.get("uri", "")
    is_local = str(base.get("path", "")).endswith(uri)  # a folder models/llama looks like a hub id, and is none
    return uri if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", uri) and not uri.endswith(".gguf") and not is_local else None


def _metadata(
    exported: dict, name: str, config: RrtConfig, base_id: str | None, license: dict, report: dict | None
) -> str:
    from huggingface_hub import ModelCardData

    made_as = FORMATS[exported["format"]]
    quantized = [*made_as.QUANTIZED_TAGS, exported["quantize"]] if "quantize" in exported else []
    tags = ["rrtc", "recursive-transformer", "compression", config.base_config.model_type, "arxiv:2410.20672"]
    # Of the hub's relations (adapter, merge, quantized, finetune), the one for weights that were changed by training.
    relation = {"base_model": base_id, "base_model_relation": "finetune"} if base_id else {}
    # The report is about what was exported: with other numbers, or other attention, it scores otherwise.
    same = not exported.keys() & {"quantize", "full_attention"}
    results = _eval_results(report) if report is not None and same else []
    measured = {"model_name": name, "eval_results": results} if results else {}
    return ModelCardData(
        library_name=made_as.LIBRARY,
        pipeline_tag="text-generation",
        tags=[*tags, *made_as.TAGS, *quantized],
        **license,
        **relation,
        **measured,
    ).to_yaml()


def _eval_results(report: dict) -> list:
    """The scores of the model that was evaluated, the last stage of `report`, as huggingface_hub.EvalResult."""
    from huggingface_hub import EvalResult

    stages = [row for row in report["models"] if row["kind"] == "stage"]
    if not stages:
        return []
    text = {"dataset_type": "text", "dataset_name": ", ".join(report["tokens"])}
    found = [(text, name, COLUMNS[name][0], score["value"]) for name, score in stages[-1]["scores"].items()]
    for task, score in stages[-1].get("tasks", {}).items():
        about = {"dataset_type": task, "dataset_name": task}
        found.append((about, score["metric"], f"{score['metric']} of {score['items']} items", score["value"]))
    return [
        EvalResult("text-generation", **about, metric_type=metric, metric_name=called, metric_value=round(value, 4))
        for about, metric, called, value in found
    ]


def _summary(config: RrtConfig, base: dict) -> str:
    plan, layers = read_plan(config), len(config.visits)
    start = f"Made from **{base.get('uri', 'a dense model')}** by rrtc {__version__}"
    if not plan.ties:
        fewer = plan.non_embedding < plan.architecture.non_embedding
        start += f": none of its {layers} decoder layers share weights, but they have fewer of them" if fewer else ""
    else:
        start += (
            " as a [Relaxed Recursive Transformer](https://arxiv.org/abs/2410.20672): its "
            f"{layers} decoder layers have {len(plan.slots)} sets of weights"
        )
    if any(map(max, _lora_ranks(config).values())):
        start += ", and those that share one correct it by low-rank (LoRA) parts of their own"
    return f"{start}."


def _tying(config: RrtConfig, provenance: dict) -> str:
    slots = [visit["slot"] for visit in config.visits]
    uses = [slots.count(slot) for slot in sorted(set(slots))]
    ranks = {name: found for name, found in _lora_ranks(config).items() if max(found)}
    init = provenance["recipe"].get("init", {})
    lines = [
        f"- Loops: {max(uses)}",
        *(f"- {key.capitalize()}: {init[key]}" for key in ("sharing", "keep") if key in init),
    ]
    if len(set().union(*ranks.values())) == 1:
        lines.append(f"- LoRA rank: {min(set().union(*ranks.values()))}")
    else:
        shown = [f"{name} {min(r)}" + (f" to {max(r)}" if len(r) > 1 else "") for name, r in ranks.items()]
        lines.append("- LoRA rank: " + (", ".join(shown) or "none"))
    of_several = sum(_shared(visit, name, slots) for visit in config.visits for name in visit["ranks"])
    forms = Counter(visit["forms"].get(name, "tied") for visit in config.visits for name in visit["ranks"])
    own = forms.total() - of_several - forms["low_rank"]
    lines.append(
        f"- Matrices of all layers: {of_several} share one with other layers; {forms['low_rank']} are a low-rank "
        f"product alone; {own} are a layer's own"
    )
    if narrowed := [str(visit["layer"]) for visit in config.visits if visit["shapes"]]:
        lines.append(f"- Layers with FFN neurons removed: `{' '.join(narrowed)}`")
    lines.append(f"- Norms and biases: {'one set for each layer' if config.norms == 'per_visit' else 'shared'}")
    lines.append(f"- Set of weights that each layer uses: `{' '.join(map(str, slots))}`")
    return "\n".join(lines)


def _attention(config: RrtConfig, exported: dict) -> str:
    """What tokens attend to, and the KV cache that this takes."""
    plan, made_as, dtype = read_plan(config), FORMATS[exported["format"]], getattr(torch, exported["dtype"])
    if found := exported.get("full_attention"):
        sees = (
            f"All that it sees in the base model: this format cannot say which heads see a window. With full attention "
            f"this model loses {found['full']:.4f} nats a token, and with the windows that it was made with "
            f"{found['windows']:.4f} (on {found['tokens']:,} tokens of held-out text, {found['context']:,} at a time). "
            f"Figures of an evaluation below are with the windows."
        )
    elif plan.features:
        sees = _windows(plan)
    elif window := exported.get("without_window"):
        sees = (
            f"Everything: the file does not say that layers of the base model see {window:,} tokens. Up to that length "
            "it is the same model; what comes behind it was not learnt so."
        )
    else:
        sees = "What it sees in the base model."
    cache = ", ".join(f"{size(made_as.kv_bytes(config, n, dtype))} at {n:,} tokens" for n in KV_CONTEXTS)
    of_dense = _of_dense(plan, dtype.itemsize) if made_as.WINDOWS and plan.features else ""
    return f"{sees}\n\nThe KV cache takes {cache}{of_dense}."


def _windows(plan: Plan) -> str:
    """Which KV heads see what."""
    heads = sum(layer.kv_heads for layer in plan.architecture.layers)
    groups: Counter[tuple[int, str]] = Counter()
    everything = []
    for visit, layer in zip(plan.visits, plan.architecture.layers, strict=True):
        if visit.attention is not None:
            window, landmark, sinks = visit.attention.window, visit.attention.landmark, visit.attention.sinks
            seen = f"the last {window} tokens, itself included"
            seen += f", {landmark.count} blocks of {landmark.size} tokens before them" if landmark else ""
            seen += f", and the first {sinks} of its document" if sinks else ""
            if (owner := visit.attention.owner) is not None:
                seen += f"; of the others, what loop {owner.loop} of the same slot keeps"
            if (linear := visit.attention.linear) is not None:
                seen += f"; of the others, sums in {linear.features} features"
            groups[window, seen] += layer.kv_heads - len(visit.attention.heads)
            everything += [f"{visit.layer}.{head}" for head in visit.attention.heads]
        elif not layer.window:
            everything += [f"{visit.layer}.{head}" for head in range(layer.kv_heads)]
    lines = [f"- {number} of {heads} KV heads: {seen}" for (_, seen), number in sorted(groups.items())]
    if own := sum(layer.kv_heads for layer in plan.architecture.layers if layer.window):
        lines.append(f"- {own} KV heads: the window that their layers have in the base model")
    lines.append(f"- {len(everything)} KV heads: everything. As layer.head: `{' '.join(everything) or 'none'}`")
    return "\n".join(lines)


def _of_dense(plan: Plan, width: int) -> str:
    """How much of the base model's KV cache that is, at `width` bytes a number."""
    shares = [f"{plan.kv_bytes(n, width) / plan.architecture.kv_bytes(n, width):.3f}" for n in KV_CONTEXTS]
    return f": {', '.join(shares)} of the base model's"


def _lora_ranks(config: RrtConfig) -> dict[str, set[int]]:
    """The LoRA ranks of each matrix in the layers that share it."""
    slots, ranks = [visit["slot"] for visit in config.visits], defaultdict(set)
    for visit in config.visits:
        for name, rank in visit["ranks"].items():
            if _shared(visit, name, slots):
                ranks[name].add(rank)
    return ranks


def _shared(visit: dict, name: str, slots: list[int]) -> bool:
    """Whether a matrix of that visit is one that others use, too. slots: of all visits."""
    return slots.count(visit["slot"]) > 1 and visit["forms"].get(name, "tied") == "tied"


def _measured(provenance: dict, exported: dict, report: dict | None) -> str:
    parts = []
    if report is not None:
        against = f" against {report['against']}" if "against" in report else ""
        tokens = report.get("tokens", {})
        texts = ", ".join(f"{n} tokens of '{text}'" for text, n in tokens.items()) if isinstance(tokens, dict) else ""
        on = f", on {texts or f'{tokens} tokens'}" if tokens else ""
        sizes = "Compressed sizes are those of the recursive format."
        parts.append(f"By `rrtc eval`{against}{on}; loss and KL in nats per token. {sizes}")
        parts.append(_table([_flat(row) for row in report["models"]]))
        if any("tasks" in row for row in report["models"]):
            parts.append(_tasks([row for row in report["models"] if "tasks" in row]))
        parts += [f"Not measured: {entry['task']}. {entry['why']}" for entry in report["not_run"]]
        if report.get("source_bytes"):
            parts.append(f"The dense model was read from a quantized file of {size(report['source_bytes'])}.")
        if report.get("samples") and report.get("prompt"):
            parts.append(f"Samples, asked:\n\n````text\n{report['prompt'].strip()}\n````")
        for sample in report.get("samples", []):
            parts.append(f"Sample ({sample['model']}):\n\n````text\n{sample['text'].strip()}\n````")
    stages = {stage: values for stage, values in provenance["measured"].items() if stage != "export" and values}
    if isinstance(stages.get("init"), dict):  # what else could have been made is no fact about this model
        stages["init"] = {name: value for name, value in stages["init"].items() if name != "alternatives"}
    if stages:
        before = "While it was made" if report is not None else "No evaluation report was given. While it was made"
        parts.append(f"{before}, rrtc measured:")
        parts.append(f"```yaml\n{yaml.safe_dump(stages, sort_keys=False, allow_unicode=True)}```")
    elif report is None:
        parts.append("Its quality was not measured.")
    cast, numbers = "", f"mostly {exported['dtype']}"
    if "quantize" in exported:
        parts.append(_quantized(exported))
        numbers = said_numbers(exported["parts"])
    elif exported["rounding_logit_difference"]:
        cast = (
            f" Rounding to {exported['dtype']} alone moved a logit by at most "
            f"{exported['rounding_logit_difference']:.2g}, which no figure above contains."
        )
    again = {"transformers": "read back by transformers", "llama_cpp": "run in llama.cpp"}.get(
        exported.get("read_by"), "loaded again"
    )
    parts.append(
        f"This export: {count(exported['parameters'])} parameters, {size(exported['bytes'])} of weights, {numbers}. "
        f"It was {again} in a fresh process without rrtc; the largest difference of a logit "
        f"from the model it was made from, in float32 arithmetic and rounded alike, was "
        f"{exported['max_logit_difference']:.2g}, where the largest logit was {exported['largest_logit']:.3g}.{cast}"
    )
    if "llama_cpp" in exported:
        parts.append(_run(exported["llama_cpp"]))
    return "\n\n".join(parts)


def _quantized(exported: dict) -> str:
    """What quantizing cost, on the held-out text it was measured on."""
    number, cost = exported["quantize"], exported["bits_per_byte"]
    return (
        f"Its numbers: {said_parts(exported['parts'])}. Bits per byte on text held out of the calibration: "
        f"{cost['plain']:.4f} before, {cost['calibrated']:.4f} as it is here; rounded to {number} without calibration "
        f"it would be {cost['nearest']:.4f}. The figures above are from before."
    )


def _run(run: dict | None) -> str:
    """What came of running a GGUF file in llama.cpp; `run` as formats.gguf.verify returns it."""
    if run is None:
        return "It was not run in llama.cpp."
    return (
        f"llama.cpp (llama-cpp-python {run['version']}) ran it: {run['equal_tokens']} of {run['tokens']} greedy tokens "
        f"were those of transformers before two were equally good, and the largest difference of a logit was "
        f"{run['max_logit_difference']:.2g}."
    )


def _flat(row: dict) -> dict:
    """A row of the report with its scores beside its sizes."""
    scores = {name: score["value"] for name, score in row["scores"].items()}
    average = {"task_average": row["task_average"]["value"]} if "task_average" in row else {}
    return row | scores | average


def _tasks(rows: list[dict]) -> str:
    """The tasks as a Markdown table, with standard errors; a column a model."""
    lines = [["task (metric, items)", *(row["model"] for row in rows)], ["---", *["---:"] * len(rows)]]
    for name, found in rows[0]["tasks"].items():
        scores = [row["tasks"][name] for row in rows]
        errors = ["" if score["stderr"] is None else f" ± {score['stderr']:.1%}" for score in scores]
        shown = [f"{score['value']:.1%}{error}" for score, error in zip(scores, errors, strict=True)]
        lines.append([f"{name} ({found['metric']}, {found['items']})", *shown])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _table(rows: list[dict]) -> str:
    """The rows of an evaluation as a Markdown table; a dash where something was not measured."""
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    lines = [" | ".join(["model", *(COLUMNS[key][0] for key in keys)]), " | ".join(["---", *["---:"] * len(keys)])]
    for row in rows:
        cells = ["–" if row.get(key) is None else COLUMNS[key][1](row[key]) for key in keys]
        lines.append(" | ".join([str(row.get("model", "–")), *cells]))
    return "\n".join(f"| {line} |" for line in lines)


def _license(license: dict, base: dict) -> str:
    uri = base.get("uri", "the base model")
    if not license and "license" not in base:
        return f"Not known: this model was made by an rrtc that did not write the license of {uri} down. Look there."
    if not license:
        return f"Not known: the files of {uri} state none. Ask its makers before passing this model on."
    stated = license.get("license_name", license["license"])
    if "license_link" in license:
        stated = ("" if stated == "other" else f"{stated}, ") + f"see {license['license_link']}"
    forbidden = " It does not allow changed versions, such as this one, to be passed on."
    return f"That of the base model {uri}: {stated}.{forbidden if forbids_derivatives(license) else ''}"
