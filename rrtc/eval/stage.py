"""`rrtc eval`: the dense original, the compressed model, its exits and the stages it went through, on the same tokens.

What it returns is described in rrtc/report.py.
"""

import gc
from dataclasses import asdict
from pathlib import Path

import torch

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
from rrtc.console import progress, warn
from rrtc.errors import RrtcError
from rrtc.eval.sample import prompt_ids, sample
from rrtc.measure import Scores
from rrtc.model import RrtConfig
from rrtc.model.skeleton import read_architecture, read_plan
from rrtc.recipe import Recipe
from rrtc.report import SCHEMA, write_report
from rrtc.source import Source, content_hash, find_base, load_tokenizer, read_config
from rrtc.text import Windows, longest_context, scoring_texts


def evaluate(folder: str, recipe: Recipe, against: str | None = None, output: str | None = None) -> dict:
    """Measures the rrtc model `folder`; returns the report and, with `output`, writes it into that new folder.

    against: the dense model to compare with, by default the one that was compressed. Raises RrtcError where the models
    do not share a vocabulary, the dense model cannot be found, or a text is too short.
    """
    if output is not None:
        check_target(Path(output), Path(folder))
    provenance = read_provenance(Path(folder))
    if not (Path(folder) / "config.json").exists():
        raise RrtcError(f"{folder} is a '{provenance['stage']}' folder and holds no model to measure.")
    config = read_config(Path(folder))
    tokenizer = load_tokenizer(Path(folder))
    dense = find_base(Path(folder), against, "--against")
    _check_vocabulary(dense, config)
    if against is not None and content_hash(dense.file) != provenance["base"]["sha256"]:
        warn(f"{against} is not the model that {folder} was made from.")
    recipe = _held_out_of_its_training(recipe, provenance)
    context = longest_context(config, recipe.eval.context)
    texts = scoring_texts(recipe, tokenizer, context, recipe.eval.tokens)

    stages = [*earlier_stages(Path(folder)), (provenance["stage"], Path(folder))]
    table, samples = _measure(dense, stages, _trained_exits(provenance, config), texts, tokenizer, recipe)
    report = {
        "schema": SCHEMA,
        "of": {"stage": provenance["stage"], "made": provenance["made"]},
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


def _held_out_of_its_training(recipe: Recipe, provenance: dict) -> Recipe:
    """`recipe` with the data that the folder was trained on, so that what is scored is what that training held out."""
    trained = provenance["recipe"].get("uptrain")
    if trained is None:
        return recipe
    data = {key: trained[key] for key in ("data", "text_field")}
    return recipe.model_copy(update={"uptrain": recipe.uptrain.model_copy(update=data)})


def _trained_exits(provenance: dict, config) -> tuple[int, ...]:
    """The places of the layers after which the model of `config` was trained to be left early; none in a dense form."""
    trained = (provenance["recipe"].get("uptrain") or {}).get("exits", False)
    return read_plan(config).exits if trained and isinstance(config, RrtConfig) else ()


def _sizes(folder: Path) -> dict[str, int]:
    """Parameters of the model in `folder`, from its config: in all, and without embeddings."""
    config = read_config(folder)
    counted = read_plan(config) if isinstance(config, RrtConfig) else read_architecture(config)
    return {"params_total": counted.parameters, "params_non_embedding": counted.non_embedding}


def _measure(dense: Source, stages: list, exits: tuple[int, ...], texts: dict[str, Windows], tokenizer, recipe: Recipe):
    """(rows of the table, samples). Besides the dense model, one model at a time is in memory. The dense model's bytes
    are what it takes in the number format of the last stage. exits: of the last stage."""
    reference = measure.load_for_scoring(dense.folder)
    sizes = _sizes(dense.folder)
    width = getattr(torch, Weights(stages[-1][1]).dtype).itemsize
    rows = [("dense", sizes, width * sizes["params_total"])]
    for number, (stage, path) in enumerate(stages):
        before = [earlier for earlier, _ in stages[:number]].count(stage)
        name = f"after {stage} {before + 1}" if before else f"after {stage}"
        rows.append((name, _sizes(path), Weights(path).bytes_on_disk))
    windows = sum(len(w.ids) for w in texts.values())
    ids = prompt_ids(tokenizer, recipe.eval.prompt) if recipe.eval.sample_tokens else None
    table, samples = [], []
    with progress("Measuring", windows * len(rows)) as advance:
        for (name, counts, size), path in zip(rows, [None, *(path for _, path in stages)], strict=True):
            model = reference if path is None else measure.load_for_scoring(path)
            beside = None if path is None else reference
            left_at = exits if path == stages[-1][1] else ()
            scores = {text: measure.score_with_exits(model, w, left_at, beside, advance) for text, w in texts.items()}
            names = [name, *(f"exit after loop {loop}" for loop in range(1, len(left_at) + 1))]
            computed = [1.0, *((place + 1) / model.config.num_hidden_layers for place in left_at)]
            for number, (shown, share) in enumerate(zip(names, computed, strict=True)):
                here = {text: found[number] for text, found in scores.items()}
                table.append(
                    {
                        "model": shown,
                        **({"layers_computed": share} if exits else {}),
                        "params_total": counts["params_total"],
                        "params_non_embedding": counts["params_non_embedding"],
                        "bytes": size,
                        **_overall(here, texts),
                        "texts": {text: asdict(s) for text, s in here.items()},
                    }
                )
            if ids is not None:
                length = longest_context(model.config, ids.shape[1] + recipe.eval.sample_tokens) - ids.shape[1]
                said = sample(model, tokenizer, ids, length) if length > 0 else "(the prompt leaves no room)"
                samples.append({"model": name, "text": said})
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
