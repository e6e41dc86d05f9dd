"""`rrtc eval`: the dense original, the compressed model and the stages it went through, on the same tokens.

What it returns is described in rrtc/report.py.
"""

import gc
from dataclasses import asdict
from pathlib import Path

from rrtc import measure
from rrtc.checkpoint import (
    Weights,
    base_seen_from,
    check_target,
    earlier_stages,
    next_history,
    read_provenance,
    whole_folder,
    write_provenance,
)
from rrtc.console import progress
from rrtc.errors import RrtcError
from rrtc.eval.sample import prompt_ids, sample
from rrtc.measure import Scores
from rrtc.recipe import Recipe
from rrtc.report import SCHEMA, write_report
from rrtc.source import Source, find_base, load_tokenizer, read_config
from rrtc.text import Windows, longest_context, scoring_texts


def evaluate(folder: str, recipe: Recipe, against: str | None = None, output: str | None = None) -> dict:
    """Measures the rrtc model `folder`; returns the report and, with `output`, writes it into that new folder.

    against: the dense model to compare with, by default the one that was compressed. Raises RrtcError where the models
    do not share a vocabulary, the dense model cannot be found, or a text is too short.
    """
    if output is not None:
        check_target(Path(output))
    provenance = read_provenance(Path(folder))
    if not (Path(folder) / "config.json").exists():
        raise RrtcError(f"{folder} is a '{provenance['stage']}' folder and holds no model to measure.")
    tokenizer = load_tokenizer(Path(folder))
    config = read_config(Path(folder))
    dense = find_base(Path(folder), against, "--against")
    _check_vocabulary(dense, config)
    context = longest_context(config, recipe.eval.context)
    texts = scoring_texts(recipe, tokenizer, context, recipe.eval.tokens)

    stages = [*earlier_stages(Path(folder)), (provenance["stage"], Path(folder))]
    table, samples = _measure(dense, provenance, stages, texts, tokenizer, recipe)
    report = {
        "schema": SCHEMA,
        "against": dense.uri,
        "tokens": {name: len(w.ids) * (w.ids.shape[1] - 1) for name, w in texts.items()},
        "table": table,
        "source_bytes": dense.bytes_on_disk if dense.is_gguf else None,
        "samples": samples,
    }
    if output is not None:
        with whole_folder(Path(output)) as target:
            write_report(target, report)
            used = provenance["recipe"] | {"eval": recipe.eval.model_dump()}
            measured = provenance["measured"] | {"eval": {row["model"]: row["bits_per_byte"] for row in table}}
            base = base_seen_from(Path(output), Path(folder), provenance)
            write_provenance(target, "eval", base, used, measured, next_history(provenance))
    return report


def _check_vocabulary(dense: Source, config) -> None:
    ours, theirs = config.get_text_config().vocab_size, dense.config().get_text_config().vocab_size
    if ours != theirs:
        raise RrtcError(
            f"{dense.uri} has a vocabulary of {theirs} tokens and the compressed model one of {ours}, so they cannot "
            "be compared token by token.",
            "Name the dense model that was compressed.",
        )


def _measure(dense: Source, provenance: dict, stages: list, texts: dict[str, Windows], tokenizer, recipe: Recipe):
    """(rows of the table, samples). Besides the dense model, one model at a time is in memory."""
    reference = measure.load_for_scoring(dense.folder)
    base = provenance["base"]
    rows = [("dense", base, base["bytes_in_dtype"])]
    for stage, path in stages:
        own = read_provenance(path)["measured"]
        rows.append((f"after {stage}", own["init"], Weights(path).bytes_on_disk))
    windows = sum(len(w.ids) for w in texts.values())
    ids = prompt_ids(tokenizer, recipe.eval.prompt) if recipe.eval.sample_tokens else None
    table, samples = [], []
    with progress("Measuring", windows * len(rows)) as advance:
        for (name, counts, size), path in zip(rows, [None, *(path for _, path in stages)], strict=True):
            model = reference if path is None else measure.load_for_scoring(path)
            beside = None if path is None else reference
            scores = {text: measure.score(model, w, beside, advance) for text, w in texts.items()}
            table.append(
                {
                    "model": name,
                    "params_total": counts["params_total"],
                    "params_non_embedding": counts["params_non_embedding"],
                    "bytes": size,
                    **_overall(scores, texts),
                    "texts": {text: asdict(s) for text, s in scores.items()},
                }
            )
            if ids is not None:
                samples.append({"model": name, "text": sample(model, tokenizer, ids, recipe.eval.sample_tokens)})
            del model
            gc.collect()
    return table, samples


def _overall(scores: dict[str, Scores], texts: dict[str, Windows]) -> dict[str, float | None]:
    """The scores over all texts together: means over tokens, and bits over bytes."""
    tokens = {name: s.tokens for name, s in scores.items()}
    total = sum(tokens.values())
    means: dict[str, float | None] = {}
    for key in ("loss", "kl", "top1_agreement"):
        values = {name: getattr(s, key) for name, s in scores.items()}
        means[key] = None if None in values.values() else sum(v * tokens[n] for n, v in values.items()) / total
    size = {name: tokens[name] * texts[name].bytes_per_token for name in texts}
    means["bits_per_byte"] = sum(s.bits_per_byte * size[name] for name, s in scores.items()) / sum(size.values())
    return means
