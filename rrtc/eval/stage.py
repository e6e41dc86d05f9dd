"""`rrtc eval`: the dense original, the compressed model, its exits and the stages it went through, on the same items.

What it returns is described in rrtc/io/report.py.
"""

import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import TypeAdapter

from rrtc import __version__, machine
from rrtc.console import note, progress, warn
from rrtc.errors import RrtcError, WrongUsage
from rrtc.eval.candidates import Candidate, candidates_of, check_holds_model, dense_candidate, stored_dtype
from rrtc.eval.cost import peak_memory, speed, speed_after
from rrtc.eval.engine import LONGEST, engine_passes, measure_engine
from rrtc.eval.measurements import Examinee, Questions
from rrtc.eval.page import write_page
from rrtc.eval.passkey import Probe, make_probes
from rrtc.eval.statistics import FEWEST, RESAMPLES
from rrtc.eval.summary import scores_of
from rrtc.eval.tasks import Task, find_tasks
from rrtc.generate.stages import check_context, stage_rules
from rrtc.io.folder import check_target, whole_folder
from rrtc.io.provenance import base_seen_from, next_history, read_provenance, write_provenance
from rrtc.io.recursive import trained_exits
from rrtc.io.report import PAGE, SCHEMA, write_report
from rrtc.io.source import Source, content_hash, find_base, load_tokenizer, read_config
from rrtc.io.trust import text_of_folder
from rrtc.machine import from_first_process, on_first_process
from rrtc.plain import from_json
from rrtc.plan import Plan, kv_bytes_at
from rrtc.recipe.eval import EvalRecipe
from rrtc.recipe.schema import Recipe
from rrtc.text.sources import shared_files, source_fingerprint, text_hash
from rrtc.text.windows import Windows, longest_context, scoring_texts

CURVE_POINTS = 400  # of a training curve, in the report

MakeBaselines = Callable[[Path, Path, str | None], tuple[dict[str, Path], list[dict]]]


def evaluate(
    folders: str | Sequence[str],
    recipe: Recipe,
    against: str | None = None,
    output: str | None = None,
    make_baselines: MakeBaselines | None = None,
) -> dict:
    """Measures the rrtc model in one folder, or in several side by side; returns the report and, with `output`, writes
    it and its page into that new folder.

    against: the dense model to compare with, by default the one that was compressed. make_baselines(folder, work,
    against) makes the models of the same size for `recipe.eval.baselines`. Raises RrtcError where the models
    do not share a vocabulary, the dense model cannot be found, a text is too short, or there is no such task.
    """
    machine.process_group()  # before any model is loaded: it says which accelerator is this process's
    paths = [Path(folder) for folder in ([folders] if isinstance(folders, str) else folders)]
    if output is not None:
        for path in paths:
            check_target(Path(output), path)
    provenances = [check_holds_model(path) for path in paths]
    dense = find_base(paths[0], against, "--against")
    hashed = content_hash(dense.file)
    for path, provenance in zip(paths, provenances, strict=True):
        _check_vocabulary(dense, read_config(path), path)
        if hashed != provenance["base"]["sha256"]:
            if against is None:
                raise WrongUsage(
                    f"{paths[0]} and {path} were made from different models.",
                    "Name the one to compare both with: --against MODEL.",
                )
            warn(f"{against} is not the model that {path} was made from.")
    if recipe.eval.baselines and len(paths) > 1:
        raise WrongUsage("Baselines are made for one folder.", "Leave out --baselines, or name one folder.")

    tokenizer = load_tokenizer(paths[0])
    config = read_config(paths[0])
    if recipe.eval.engine and len(paths) == 1:
        stage_rules(config)  # raises where the engine cannot run it
        check_context(config, LONGEST)
    context = longest_context(config, recipe.eval.context)
    held_out = _held_out_of_their_training(recipe, paths, provenances)
    for source in recipe.eval.text:
        _warn_of_what_was_learned(source, paths, provenances)
    texts = scoring_texts(held_out, tokenizer, config.get_text_config().vocab_size, context, recipe.eval.tokens)
    tasks, not_run = find_tasks(recipe.eval) if recipe.eval.tasks else ([], [])
    probes, too_long = _probes(recipe.eval, tokenizer, config)
    not_run += too_long
    not_run += _without_intervals(texts, tasks)
    questions = Questions(recipe.eval, tokenizer, texts, tasks, probes)

    with tempfile.TemporaryDirectory(prefix="rrtc-baselines-") as own:
        work = from_first_process(own)
        candidates = candidates_of(paths)
        named = {c.folder: c.folder.name if len(paths) == 1 else c.name for c in candidates}
        training = [curve | {"stage": name} for path, name in named.items() if (curve := _curve(path))]
        if recipe.eval.baselines and make_baselines is not None:
            made, missing = on_first_process(lambda: make_baselines(paths[0], Path(work), against))
            not_run += missing
            candidates += [Candidate(name, "baseline", folder) for name, folder in made.items()]
        # Of folders in several dtypes the narrowest, so that none looks smaller beside the dense model than it is.
        dtype = min(map(stored_dtype, paths), key=lambda one: one.itemsize)
        rows, last, samples = _measure(dense_candidate(dense), candidates, questions, dtype)
    report = {
        "schema": SCHEMA,
        "of": {key: provenances[0][key] for key in ("stage", "made")} if len(paths) == 1 else None,
        "against": dense.uri,
        "made_with": _made_with(recipe),
        "tokens": {name: len(w.ids) * (w.ids.shape[1] - 1) for name, w in texts.items()},
        "models": rows,
        "not_run": not_run,
        **last,
        "training": training,
        "source_bytes": dense.bytes_on_disk if dense.is_gguf else None,
        "samples": samples,
        "prompt": recipe.eval.prompt,
    }
    if output is not None:
        on_first_process(lambda: _write(report, Path(output), paths[0], recipe))
    return report


def _write(report: dict, output: Path, folder: Path, recipe: Recipe) -> None:
    """Writes the report and its page into the new folder `output`. folder: the (first) one that was measured."""
    provenance = read_provenance(folder)
    with whole_folder(output) as target:
        write_report(target, report)
        write_page(report, target / PAGE)
        used = provenance["recipe"] | {"eval": recipe.eval.model_dump()}
        bits = {row["model"]: row["scores"]["bits_per_byte"]["value"] for row in report["models"]}
        base = base_seen_from(output, folder, provenance)
        write_provenance(target, "eval", base, used, provenance["measured"] | {"eval": bits}, next_history(provenance))


def _check_vocabulary(dense: Source, config, folder: Path) -> None:
    ours, theirs = config.get_text_config().vocab_size, dense.config().get_text_config().vocab_size
    if ours != theirs:
        raise RrtcError(
            f"{dense.uri} has a vocabulary of {theirs} tokens and {folder} one of {ours}, so they cannot be compared "
            "token by token.",
            "Name the dense model that was compressed.",
        )


def _held_out_of_their_training(recipe: Recipe, folders: Sequence[Path], provenances: Sequence[dict]) -> Recipe:
    """`recipe` with the data that the folders were trained on, so that what is scored is what that training held out.
    Raises WrongUsage where they were trained on different data and no text is named, and as `text_of_folder` and
    `_check_same_text` do."""
    trained = [provenance["recipe"].get("uptrain") for provenance in provenances]
    used = [data and {key: data[key] for key in ("data", "text_field")} for data in trained]
    for folder, data in zip(folders, used, strict=True):
        if data != used[0] and not recipe.eval.text:
            raise WrongUsage(
                f"{folders[0]} and {folder} were not trained on the same text, so there is none to compare them on.",
                "Name one: --text FILE.",
            )
    if used[0] is None:
        return recipe
    if not recipe.eval.text:
        text_of_folder(folders[0], used[0]["data"], recipe.uptrain.data, "--text")
        for folder, provenance in zip(folders, provenances, strict=True):
            _check_same_text(folder, provenance)
    return recipe.model_copy(update={"uptrain": recipe.uptrain.model_copy(update=used[0])})


def _warn_of_what_was_learned(source: str, folders: Sequence[Path], provenances: Sequence[dict]) -> None:
    """Warns where a model is to be scored on a text that it was trained on: by what the text holds, or by its files."""
    held = text_hash(source_fingerprint(source))
    for folder, provenance in zip(folders, provenances, strict=True):
        learned = (provenance["measured"].get("uptrain") or {}).get("text_sha256", {})
        files: set[Path] = set()
        for text in learned:
            with suppress(RrtcError):  # it is gone
                files |= shared_files(source, text)
        if held in learned.values() or files:
            warn(
                f"{folder} was trained on {source}, so its score is better than on new text. Without --text, what "
                "training held out is scored."
            )


def _check_same_text(folder: Path, provenance: dict) -> None:
    """Raises RrtcError where a text is not what the model in `folder` was trained on any more: who knows what training
    held out of it then. An rrtc before 0.2 did not write it down."""
    for source, sha256 in provenance["measured"]["uptrain"].get("text_sha256", {}).items():
        if text_hash(source_fingerprint(source)) != sha256:
            raise RrtcError(
                f"{source} is not the text any more that {folder} was trained on, so what training held out of it is "
                "not known.",
                "Name what to score on: --text FILE.",
            )


def _probes(recipe: EvalRecipe, tokenizer, config) -> tuple[list[Probe], list[dict]]:
    """(the probes, those that this model or tokenizer cannot be given, for `not_run`)."""
    probes, not_run = [], []
    for length in dict.fromkeys(recipe.passkey_lengths) if recipe.passkey_trials else []:
        try:
            longest = longest_context(config, sys.maxsize)
            probes += make_probes(tokenizer, length, recipe.passkey_trials, recipe.seed, longest)
        except WrongUsage as error:
            not_run.append({"task": f"pass keys in {length} tokens", "why": error.sentence})
    return probes, not_run


def _without_intervals(texts: dict[str, Windows], tasks: Sequence[Task]) -> list[dict]:
    """For `not_run`: what has too few items to tell how sure its scores are."""
    counts = {f"'{name}'": (len(windows.ids), "windows") for name, windows in texts.items()}
    counts |= {task.name: (task.items, "items") for task in tasks}
    return [
        {
            "task": f"intervals of {name}",
            "why": f"It has {n} {items}, and it takes {FEWEST} to tell how sure a score is.",
        }
        for name, (n, items) in counts.items()
        if n < FEWEST
    ]


def _measure(
    dense: Candidate, candidates: Sequence[Candidate], questions: Questions, dtype: torch.dtype
) -> tuple[list, dict, list]:
    """(rows of the report, its parts that are about one compressed model, samples). Besides the dense model, one model
    at a time is in memory."""
    rows, samples, reused, made = [], [], 0, 0
    last: dict = {"layers": [], "speed": None, "engine": None}
    stages = [candidate for candidate in candidates if candidate.kind == "stage" and candidate.throughout]
    reference = Examinee(dense, questions)
    theirs = reference.answers()[0]
    everyone = [(dense, reference), *((c, Examinee(c, questions, reference)) for c in candidates)]
    any_exits = any(candidate.exits for candidate in candidates)
    for candidate, examinee in everyone:
        every = [theirs] if examinee is reference else examinee.answers()
        sizes = candidate.sizes(dtype.itemsize if examinee is reference else None)
        cost = _cost(candidate, dtype, questions) if candidate.throughout else None
        for number, answers in enumerate(every):
            shares = [1.0, *(candidate.layers_computed(place) for place in candidate.exits)]
            rows.append(
                {
                    "model": _name(candidate, number, len(stages)),
                    "kind": "exit" if number else candidate.kind,
                    **({"layers_computed": shares[number]} if any_exits else {}),
                    **sizes,
                    **scores_of(answers, None if examinee is reference else theirs, questions),
                    **({"cost": cost} if cost and not number else {}),
                }
            )
        if every[0].said is not None:
            samples.append({"model": candidate.name, "text": every[0].said})
        if candidate in stages:
            found = {"layers": _layers(candidate, examinee), "speed": _speed(reference, examinee, questions)}
            if [candidate] == stages:
                last = found | {"engine": _engine(examinee, questions)}
            else:
                rows[-len(every)] |= {part: value for part, value in found.items() if value}
        reused, made = reused + examinee.reused, made + examinee.made
        if examinee is not reference:
            examinee.leave()
    if reused:
        note(f"{reused} of {reused + made} measurements had been made before and were not made again.")
    return rows, last, samples


def _name(candidate: Candidate, number: int, compared: int) -> str:
    if number == 0:
        return candidate.name
    return f"exit after loop {number}" if compared == 1 else f"{candidate.name}, exit after loop {number}"


def _cost(candidate: Candidate, dtype: torch.dtype, questions: Questions) -> dict:
    counted = candidate.counted
    peak = None
    if questions.recipe.speed_rounds:
        peak = on_first_process(lambda: peak_memory(candidate.folder, machine.scoring_dtype()))
    return {
        "kv_bytes_per_token": counted.kv_bytes_per_token(dtype.itemsize),
        "kv_bytes": {str(context): size for context, size in kv_bytes_at(counted, dtype.itemsize).items()},
        "flops_per_token": counted.flops_per_token,
        "peak_memory_bytes": peak,
    }


def _speed(dense: Examinee, examinee: Examinee, questions: Questions) -> dict | None:
    rounds = questions.recipe.speed_rounds
    if not rounds:
        return None
    pair = (dense.model, examinee.model)
    with progress("Timing both in turn", 1 + rounds) as advance:
        found = on_first_process(lambda: speed(*pair, rounds, advance))
    counted, context = examinee.candidate.counted, questions.recipe.speed_context
    if isinstance(counted, Plan) and counted.features:
        with progress(f"Timing both at {context:,} tokens", 3 + rounds) as advance:
            after = on_first_process(lambda: speed_after(*pair, rounds, context, advance))
        found |= {} if after is None else {"long": after}
    return found


def _engine(examinee: Examinee, questions: Questions) -> dict | None:
    if not questions.recipe.engine:
        return None
    rounds, tokenizer = max(questions.recipe.speed_rounds, 1), questions.tokenizer
    loops = max((visit.loop for visit in getattr(examinee.candidate.counted, "visits", ())), default=0) + 1
    with progress("Timing ways to generate in turn", engine_passes(loops, rounds)) as advance:
        has_exits = bool(trained_exits(examinee.candidate.folder))
        return on_first_process(lambda: measure_engine(examinee.model, tokenizer, has_exits, rounds, advance))


def _layers(candidate: Candidate, examinee: Examinee) -> list[dict]:
    plan = candidate.counted
    if not isinstance(plan, Plan):
        return []
    uses = {slot: len(visits) for slot, visits in enumerate(plan.slots)}
    return [
        {
            "layer": visit.layer,
            "slot": visit.slot,
            "loop": visit.loop,
            "tied": uses[visit.slot] > 1,
            "ranks": {
                m.name: None if visit.form(m) == "own" or (uses[visit.slot] == 1 and visit.form(m) == "tied")
                else visit.ranks[m.name]
                for m in plan.matrices(visit)
            },
            "residual": residual,
            "kv_heads": plan.architecture.layers[visit.layer].kv_heads,
            "window": plan.architecture.layers[visit.layer].window,
            "attention": visit.attention and visit.attention.fields(),
        }
        for visit, residual in zip(plan.visits, examinee.residuals(), strict=True)
    ]  # fmt: skip


def _curve(folder: Path) -> dict | None:
    """The training curve in `folder`, thinned; None where it has none. Raises RrtcError where it is damaged."""
    file = folder / "metrics.jsonl"
    if not file.exists():
        return None
    try:
        steps = [from_json(line) for line in file.read_text(encoding="utf8").splitlines()]
        points = [[step["tokens"], step["loss"], step.get("kl")] for step in steps]
        TypeAdapter(list[tuple[int, float | None, float | None]]).validate_python(points)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise RrtcError(
            f"The training curve {file} is damaged.", "Remove the file: the report does without."
        ) from error
    return {"stage": folder.name, "points": points[:: max(1, -(-len(points) // CURVE_POINTS))]} if points else None


def _made_with(recipe: Recipe) -> dict:
    names = ["torch", "transformers", *(["lm_eval"] if recipe.eval.tasks else [])]
    return {
        "versions": {"rrtc": __version__, **{name: version(name) for name in names}},
        "device": machine.device().type,
        "dtype": str(machine.scoring_dtype()).removeprefix("torch."),
        "seed": recipe.eval.seed,
        "resamples": RESAMPLES,
    }
