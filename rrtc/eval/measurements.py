"""One model measured by everything that is asked: texts, tasks, pass keys, its hidden states, what it says.

Every measurement is kept (rrtc/io/remembered.py) as figures of single items, and a model is only loaded for one that is
not there yet.
"""

import gc
import hashlib
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy
import torch
import transformers
from numpy.typing import NDArray

from rrtc import machine, scoring
from rrtc.console import progress
from rrtc.errors import RrtcError
from rrtc.eval.candidates import Candidate
from rrtc.eval.passkey import Probe, found
from rrtc.eval.sample import sample
from rrtc.eval.tasks import Harness, Task
from rrtc.io.remembered import Measurement, remembered
from rrtc.io.source import load_for_scoring, read_config
from rrtc.io.unchanged import Unchanged
from rrtc.machine import share_of, spread
from rrtc.plan import Plan
from rrtc.recipe.eval import EvalRecipe
from rrtc.stock.parts import Parts, states_of
from rrtc.text.windows import Windows

RESIDUAL_WINDOWS = 4  # of each text: the residuals are for looking at, and need no interval


@dataclass(frozen=True)
class Questions:
    """What all models are asked."""

    recipe: EvalRecipe
    tokenizer: object
    texts: dict[str, Windows]
    tasks: Sequence[Task]
    probes: Sequence[Probe]

    @cached_property
    def tokenizer_sha256(self) -> str:
        """Of all that the tokenizer would write: its vocabulary, its settings, its chat template."""
        with tempfile.TemporaryDirectory() as folder:
            try:
                self.tokenizer.save_pretrained(folder)
            except Exception as error:  # a full disk, of which tokenizers has a kind of its own
                hint = "Free some space, or have TMPDIR name a folder on another disk."
                raise RrtcError(f"Writing into the temporary folder {folder} failed: {error}.", hint) from error
            digest = hashlib.sha256()
            for file in sorted(Path(folder).rglob("*")):
                if file.is_file():
                    digest.update(file.name.encode() + file.read_bytes())
            return digest.hexdigest()


@dataclass
class Answers:
    """The measurements of one model, or of one of its exits. A text's are the fields of rrtc.scoring.TokenScores."""

    texts: dict[str, Measurement] = field(default_factory=dict)
    tasks: dict[str, Measurement] = field(default_factory=dict)
    passkey: NDArray | None = None
    said: str | None = None


class Examinee:
    """A candidate that is being measured; its model is loaded when it is first needed, and let go by `leave`."""

    def __init__(self, candidate: Candidate, questions: Questions, dense: "Examinee | None" = None):
        self.candidate, self._questions, self._dense = candidate, questions, dense
        self.files = Unchanged(candidate.folder)
        self._fingerprint = candidate.fingerprint()
        self.reused = self.made = 0  # measurements

    @cached_property
    def model(self):
        return load_for_scoring(self.candidate.folder)

    def leave(self) -> None:
        self.__dict__.pop("model", None)
        gc.collect()

    def answers(self) -> list[Answers]:
        """Of the model, and then of each of its exits."""
        every = [Answers() for _ in range(1 + len(self.candidate.exits))]
        for name, windows in self._questions.texts.items():
            for answers, scores in zip(every, self._text(name, windows), strict=True):
                answers.texts[name] = scores
        if self.candidate.throughout:
            for answers, place in zip(every, (None, *self.candidate.exits), strict=True):
                answers.tasks = {task.name: self._task(task, place) for task in self._questions.tasks}
                answers.passkey = self._passkey(place) if self._questions.probes else None
        every[0].said = self._said() if self._questions.recipe.sample_tokens else None
        return every

    def _text(self, name: str, windows: Windows) -> list[Measurement]:
        exits, fields = self.candidate.exits, ("loss", "confidence", "correct", "kl", "top1_agreement")
        reference = None if self._dense is None else self._dense._fingerprint
        ids = hashlib.sha256(windows.ids.numpy().tobytes()).hexdigest()

        def scored() -> Measurement:
            beside = None if self._dense is None else self._dense.model
            with self._progress(name, share_of(len(windows.ids))) as advance:

                def of(numbers: list[int]) -> NDArray:
                    part = replace(windows, ids=windows.ids[numbers])
                    rows = scoring.score_tokens(self.model, part, exits, beside, advance)
                    kept = [getattr(row, key) for row in rows for key in fields if getattr(row, key) is not None]
                    return torch.stack(kept, 1).numpy()  # (windows, rows x fields, tokens)

                found = spread(len(windows.ids), of)
            used = fields if self._dense is not None else fields[:3]
            names = [f"{row}.{key}" for row in range(1 + len(exits)) for key in used]
            return {key: numpy.ascontiguousarray(found[:, number]) for number, key in enumerate(names)}

        kept = self._remembered(scored, what="text", windows=[ids, len(windows.ids)], exits=exits, against=reference)
        rows = [{} for _ in range(1 + len(exits))]
        for key, value in kept.items():
            row, _, what = key.partition(".")
            rows[int(row)][what] = value
        return rows

    def _task(self, task: Task, place: int | None) -> Measurement:
        def run() -> Measurement:
            with self._left(place), self._progress(task.name, task.items) as advance:
                harness = Harness(self.model, self._questions.tokenizer, self._questions.recipe)
                return harness.run(task, advance)

        return self._remembered(
            run, what="task", task=task.fingerprint, exit=place, tokenizer=self._questions.tokenizer_sha256,
            generation=generation_fingerprint(self.candidate.folder),
        )  # fmt: skip

    def _passkey(self, place: int | None) -> NDArray:
        probes = self._questions.probes

        def run() -> Measurement:
            with self._left(place), self._progress("pass keys", share_of(len(probes))) as advance:
                return {
                    "found": spread(len(probes), lambda mine: found(self.model, [probes[n] for n in mine], advance))
                }

        asked = hashlib.sha256(repr([(list(p.ids), list(p.key)) for p in probes]).encode()).hexdigest()
        return self._remembered(run, what="passkey", probes=asked, exit=place)["found"]

    def residuals(self) -> list[float | None]:
        """By layer: the share of the energy of the hidden states after it in which they differ from the dense model's,
        ‖h − h_dense‖² / ‖h_dense‖², mean over tokens. None where the dense model has states of another shape, and where
        visits read later ones, so that there are no states between them."""
        ours, theirs = (read_config(who.candidate.folder).get_text_config() for who in (self, self._dense))
        alike = (ours.num_hidden_layers, ours.hidden_size) == (theirs.num_hidden_layers, theirs.hidden_size)
        counted = self.candidate.counted
        if not alike or (isinstance(counted, Plan) and "later" in counted.features):
            return [None] * ours.num_hidden_layers
        ids = torch.cat([windows.ids[:RESIDUAL_WINDOWS] for windows in self._questions.texts.values()])

        def run() -> Measurement:
            return {"residuals": _residuals(self.model, self._dense.model, ids)}

        asked = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        found = self._remembered(run, what="residuals", windows=[asked, len(ids)], against=self._dense._fingerprint)
        return found["residuals"].tolist()

    def _said(self) -> str:
        recipe, tokenizer = self._questions.recipe, self._questions.tokenizer

        def run() -> Measurement:
            said = sample(self.model, tokenizer, recipe.prompt, recipe.sample_tokens)
            return {"utf8": numpy.frombuffer(said.encode(), numpy.uint8)}

        asked = {"prompt": recipe.prompt, "tokens": recipe.sample_tokens}
        stop = generation_fingerprint(self.candidate.folder)
        found = self._remembered(
            run, what="sample", asked=asked, tokenizer=self._questions.tokenizer_sha256, generation=stop
        )
        return found["utf8"].tobytes().decode()

    def _steady(self, run):
        """`run`, of models whose files are those that were hashed."""

        def steady() -> Measurement:
            with ExitStack() as both:
                everyone = [self.files, *([] if self._dense is None else [self._dense.files])]
                for files in everyone:
                    both.enter_context(files.blamed())
                value = run()
            for files in everyone:
                files.check()
            return value

        return steady

    def _left(self, place: int | None):
        return nullcontext() if place is None else Parts(self.model).left_after(place)

    def _progress(self, what: str, total: int):
        return progress(f"{self.candidate.name}: {what}", total)

    def _remembered(self, run, **asked) -> Measurement:
        made_on = [str(machine.device().type), torch.__version__, transformers.__version__]
        value, was_there = remembered({"model": self._fingerprint, "machine": made_on, **asked}, self._steady(run))
        self.reused, self.made = self.reused + was_there, self.made + (not was_there)
        return value


def generation_fingerprint(folder: Path) -> str:
    """SHA-256 of the generation defaults in a model folder; that of nothing where it has none."""
    file = folder / "generation_config.json"
    return hashlib.sha256(file.read_bytes() if file.exists() else b"").hexdigest()


@torch.inference_mode()
def _residuals(model, dense, ids: torch.Tensor) -> NDArray:
    """(layers,) float64, see Examinee.residuals. ids: (windows, context)."""
    both, total = [Parts(model), Parts(dense)], 0.0
    for window in ids:
        window = window[None].to(model.device)
        ours, theirs = (_states(parts, window) for parts in both)
        lost = (ours - theirs).square().sum(-1) / theirs.square().sum(-1)  # (layers, 1, context)
        total = total + lost.double().mean((1, 2)).cpu().numpy()
    return total / len(ids)


def _states(parts: Parts, ids: torch.Tensor) -> torch.Tensor:
    """The hidden states after every layer, (layers, 1, context, width), float32."""
    _, outputs = parts.run(ids, range(len(parts.layers)))
    return torch.stack([states_of(output) for output in outputs]).float()
