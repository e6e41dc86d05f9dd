"""From measurements to the rows of the report: each figure with its error and its difference from the dense one's."""

import math
import zlib
from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from rrtc.eval.measurements import Answers, Questions
from rrtc.eval.passkey import Probe
from rrtc.eval.statistics import Estimate, average, calibration_error, estimate, wilson
from rrtc.eval.tasks import Task
from rrtc.io.remembered import Measurement

TEXT_SCORES = ("loss", "bits_per_byte", "kl", "top1_agreement")


def scores_of(answers: Answers, dense: Answers | None, questions: Questions) -> dict:
    """The part of a row of rrtc/io/report.py that was measured. dense: None for the dense model itself."""
    seed = questions.recipe.seed
    row = {
        "scores": _text_scores(list(questions.texts), answers, dense, questions),
        "texts": {name: _text_scores([name], answers, dense, questions) for name in questions.texts},
        "by_position": _by_position(answers, dense, seed),
    }
    if answers.tasks:
        tasks = {task.name: _task(task, answers, dense, seed) for task in questions.tasks}
        row["tasks"] = {
            task.name: {"metric": task.metric, "items": len(answers.tasks[task.name]["score"])}
            | tasks[task.name].as_score()
            for task in questions.tasks
        }
        row["task_average"] = average(list(tasks.values())).as_score()
    if answers.passkey is not None:
        row["passkey"] = _passkey(questions.probes, answers.passkey, None if dense is None else dense.passkey, seed)
    return row


def _text_scores(names: Sequence[str], answers: Answers, dense: Answers | None, questions: Questions) -> dict:
    """The scores over the texts of these names; a window is an item."""

    def sums(of: Answers, key: str) -> NDArray:
        return numpy.concatenate([of.texts[name][key].sum(1, dtype=float) for name in names])

    def whole(of: Answers) -> tuple[NDArray, NDArray]:
        return tuple(numpy.concatenate([of.texts[name][key] for name in names]) for key in ("confidence", "correct"))

    tokens = numpy.concatenate([numpy.full(*_windows(answers.texts[name])) for name in names])
    per_token = numpy.repeat(
        [questions.texts[name].bytes_per_token for name in names],
        [len(answers.texts[name]["loss"]) for name in names],
    )
    sizes = {"bits_per_byte": tokens * per_token * math.log(2)}
    found = {}
    for score in TEXT_SCORES:
        key = "loss" if score == "bits_per_byte" else score
        if key in answers.texts[names[0]]:
            beside = sums(dense, key) if dense is not None and key == "loss" else None
            seed = _seed(questions.recipe.seed, *names)
            found[score] = estimate(sums(answers, key), sizes.get(score, tokens), beside, seed).as_score()
    theirs = None if dense is None else whole(dense)
    error = calibration_error(*whole(answers), theirs, _seed(questions.recipe.seed, *names))
    return found | {"calibration_error": error.as_score()}


def _windows(scores: Measurement) -> tuple[int, float]:
    """(windows, scored tokens in each)."""
    windows, tokens = scores["loss"].shape
    return windows, float(tokens)


def _by_position(answers: Answers, dense: Answers | None, seed: int) -> list[dict]:
    """The loss of tokens with so many tokens before them, in ranges that double."""
    ours = numpy.concatenate([scores["loss"] for scores in answers.texts.values()])
    theirs = None if dense is None else numpy.concatenate([scores["loss"] for scores in dense.texts.values()])
    last, found, start = ours.shape[1] + 1, [], 1
    while start < last:
        end = min(max(2 * start, FIRST_RANGE), last)
        part = slice(start - 1, end - 1)  # the first scored token has one before it
        beside = None if theirs is None else theirs[:, part].mean(1, dtype=float)
        score = estimate(ours[:, part].mean(1, dtype=float), None, beside, _seed(seed, "position")).as_score()
        found.append({"from": start, "to": end, "loss": score})
        start = end
    return found


FIRST_RANGE = 16  # tokens: there is little to tell of the first few


def _task(task: Task, answers: Answers, dense: Answers | None, seed: int) -> Estimate:
    beside = None if dense is None else dense.tasks[task.name]["score"]
    return estimate(answers.tasks[task.name]["score"], None, beside, _seed(seed, task.name))


def _passkey(probes: Sequence[Probe], found: NDArray, dense: NDArray | None, seed: int) -> list[dict]:
    rows = []
    for place in dict.fromkeys((probe.length, probe.depth) for probe in probes):
        chosen = numpy.array([(probe.length, probe.depth) == place for probe in probes])
        beside = None if dense is None else dense[chosen]
        score = estimate(found[chosen], None, beside, _seed(seed, *map(str, place))).as_score()
        low, high = wilson(found[chosen].sum(), int(chosen.sum()))
        about = {"length": place[0], "depth": place[1], "items": int(chosen.sum())}
        rows.append({**about, **score, "low": float(low), "high": float(high)})
    return rows


def _seed(seed: int, *names: str) -> list[int]:
    return [seed, *(zlib.crc32(name.encode()) for name in names)]
