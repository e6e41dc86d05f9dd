"""One compression: worked out and checked before any weights are read, and the folder of what is finished of it.

While it runs, NAME.partial/work has, each of them whole where it is there at all:

    started.json                    what the work belongs to
    own-text.safetensors            what the model wrote to be calibrated on
    inputs-3.safetensors            what the matrices of layer 3 see of the text (calibrate.py)
    output-gradients-3.safetensors  what the loss feels of their outputs (calibrate.py)
    states-3, gradient-3, kept-3    what calibration needs to go on (calibrate.py)
    group-3.pt, group-3-4.pt        the choices there are for these layers (budget.py)
    slot-3/                         a finished slot, as it will be stored

rrtc/io/resumable.py says when it goes.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rrtc import machine
from rrtc.console import note
from rrtc.init.calibrate import bytes_on_disk
from rrtc.init.first_plan import first_plan, propose_16_bits, say_rounded
from rrtc.io.dense import DenseModel
from rrtc.io.folder import check_target, file_hash, partial_of, whole_file
from rrtc.io.recursive import RecursiveModel, in_slot
from rrtc.io.resumable import STARTED, Resumable, discard
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.source import Source, find_model, load_tokenizer
from rrtc.io.weights import Weights
from rrtc.kv_budget import KvBudget
from rrtc.kv_kinds import LAST_LOOP
from rrtc.kv_owners import readable
from rrtc.plan import Plan
from rrtc.recipe.schema import Recipe
from rrtc.stock.trial import check_kinds, find_folds
from rrtc.storage import Numbers
from rrtc.target import Target, numbers_of, target_of
from rrtc.text.calibration import calibration_windows, own_windows
from rrtc.text.own import check_writer_fits
from rrtc.text.windows import Windows, longest_context, scoring_texts
from rrtc.tying.norms import Fold

OWN_TEXT_FILE = "own-text.safetensors"  # in the work
WORK = "work"
# What may change between the start of a run and its continuation: it matters only once every slot is finished.
FREE_ON_RESUME = ("max_shard_size", "measure_tokens")


@dataclass(frozen=True)
class Job:
    """What is compressed, how, and into which folder of slots. `plan` is the pattern, of which a size or a budget may
    make something else; `kv_budget` what there is for the KV cache, None where it stays as it is; `dtype` the dtype to
    write; `calibration` the text to learn from, ids (windows, context), None where none is needed, to which
    `own_windows` are added that the model writes; `scoring` the text for the closing measurement, None where there is
    none."""

    source: Source
    recipe: Recipe
    plan: Plan
    kv_budget: KvBudget | None
    dense: DenseModel | RecursiveModel
    dtype: str
    calibration: Tensor | None
    own_windows: int
    scoring: Windows | None
    work: Path

    @property
    def is_replan(self) -> bool:
        """Whether the model is recursive already, so that its attention is planned anew, and no more."""
        return isinstance(self.dense, RecursiveModel)

    def fingerprint(self) -> dict:
        """What a continued run must have in common with the one it continues, as plain data."""
        weights = self.dense.weights
        free = [name for name in FREE_ON_RESUME if self.recipe.init.size is None or name != "max_shard_size"]  # headers
        choices = {k: v for k, v in self.recipe.init.resolved().items() if k not in free}
        ids = torch.zeros(0) if self.calibration is None else self.calibration
        context = None if self.calibration is None else ids.shape[1]
        found = {
            "recipe": choices | {"context": context, "device": machine.device().type},
            "model's config": file_hash(self.source.folder / "config.json"),
            "calibration text": hashlib.sha256(ids.numpy()).hexdigest(),
        }
        with ThreadPoolExecutor() as pool:  # who hashes holds no other thread up
            hashes = zip(weights, pool.map(weights.hash_of, weights), strict=True)
            return found | {f"tensor {name}": one for name, one in hashes}

    def disk_bytes(self) -> int:
        """Disk space that the run takes at most, with what is there of it already: calibration, and every slot twice,
        in a file of its own and in the model."""
        waiting = 0
        if self.calibration is not None:
            windows, context = self.calibration.shape
            tokens, joint = (windows + self.own_windows) * context, self.recipe.init.start == "joint"
            prices_it = self.kv_budget is not None and self.kv_budget.is_measured and LAST_LOOP in self.kv_budget.kinds
            read = set(readable(self.plan, LAST_LOOP).values()) if prices_it else ()
            waiting = bytes_on_disk(self.plan.architecture, tokens, moments=joint, read=read)
        most = 0 if self.target is None else self.target.written
        return 2 * max(Numbers(self.dtype).bytes(self.plan), most) + waiting

    @property
    def numbers(self) -> Numbers:
        """As `numbers_of`."""
        return numbers_of(self.recipe.init, self.dtype)

    @property
    def target(self) -> Target | None:
        """What the plan may take; None where the recipe says itself what it is."""
        recipe = self.recipe.init
        return target_of(self.plan.architecture, recipe, self.dtype) if recipe.has_target else None

    def missing_slots(self, plan: Plan) -> list[int]:
        """The numbers of the slots of `plan` that are not finished."""
        return [number for number in range(len(plan.slots)) if not self._slot_folder(number).exists()]

    def save_slot(self, number: int, slot: Iterable[tuple[str, Tensor]], energies: dict) -> None:
        """Saves the tensors of slot `number`, by their names in it, as they will be stored, one at a time; and beside
        them `energies`, which slots.paper_slot adds up as it yields them. Raises RrtcError where a tensor does not fit
        the dtype."""
        writing = self.work / "writing"
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        writer = ShardWriter(writing, sys.maxsize)
        for name, tensor in slot:
            writer.add(in_slot(self.dense.parent, number, name), tensor.to(getattr(torch, self.dtype)).cpu())
        writer.finish()
        with whole_file(writing / "energies.json") as file:
            file.write_text(json.dumps(energies), encoding="utf8")
        writing.rename(self._slot_folder(number))

    def slot(self, number: int) -> Iterator[tuple[str, Tensor]]:
        """(full name, tensor) of the finished slot `number`."""
        weights = Weights(self._slot_folder(number))
        for name in weights:
            yield name, weights.raw(name)

    def slot_energies(self, number: int) -> dict[str, dict[str, tuple[float, float]]]:
        """What was saved beside the tensors of slot `number`; its layers are text there, as JSON has it."""
        return json.loads((self._slot_folder(number) / "energies.json").read_text(encoding="utf8"))

    def _slot_folder(self, number: int) -> Path:
        return self.work / f"slot-{number}"


def prepare(model: str, target: Path, recipe: Recipe) -> Job:
    """The job of compressing the dense `model` into the folder `target`. Reads configs, headers and text, but no
    weights. Raises RrtcError or WrongUsage for everything that would stop the run."""
    source = find_model(model)
    check_target(target, source.folder)
    plan, dtype = first_plan(source, recipe.init)
    propose_16_bits(source, recipe.init.dtype, dtype)
    architecture = plan.architecture
    dense: DenseModel | RecursiveModel
    dense = RecursiveModel(source.folder) if source.is_recursive else DenseModel(source, _folds(source, recipe))
    if isinstance(dense, DenseModel) and recipe.init.dtype == "auto" and not source.is_gguf:
        say_rounded(dense.finer_than(dtype), dtype)
    tokenizer = load_tokenizer(source.folder)
    calibration = scoring = None
    vocabulary = dense.config.get_text_config().vocab_size
    budget = KvBudget(architecture, recipe.init) if recipe.init.kv_budget is not None else None
    if budget is not None:
        check_kinds(dense.config, budget.kinds)
        if not budget.is_measured:
            budget.spend(plan, {}, {})  # raises where its loops, which no size changes, have nothing to read
    far = 0 if budget is None else budget.calibration_context
    if recipe.init.measure_tokens:
        context = longest_context(dense.config, max(recipe.eval.context, far))
        texts = scoring_texts(recipe, tokenizer, vocabulary, context, recipe.init.measure_tokens)
        scoring = next(iter(texts.values()))
    measured = budget is not None and budget.is_measured
    context = longest_context(dense.config, max(recipe.init.calibrate_context, far if measured else 0))
    if recipe.init.reads_text:
        calibration = calibration_windows(recipe.init, tokenizer, vocabulary, context)
    own, work = own_windows(recipe.init, context), partial_of(target) / WORK
    if own and calibration is not None and not (work / OWN_TEXT_FILE).exists():
        check_writer_fits(architecture.parameters)
    return Job(source, recipe, plan, budget, dense, dtype, calibration, own, scoring, work)


def _folds(source: Source, recipe: Recipe) -> list[Fold]:
    if not recipe.init.fold_norms or recipe.init.keeps_weights:
        return []
    folds, others = find_folds(source.config())
    if others:
        note(f"Norms not folded (no matrix reads them directly, or it would not be exact): {', '.join(others)}")
    return folds


def resumable(target: Path) -> Resumable:
    """The making of `target`. There is something to go on from once a text, a layer's calibration or a slot is
    finished."""
    partial = partial_of(target)
    work = partial / WORK

    def finished() -> list[Path]:
        some = any(any(work.glob(pattern)) for pattern in (OWN_TEXT_FILE, "inputs-*.safetensors", "slot-*"))
        return list(work.iterdir()) if some and (work / STARTED).exists() else []

    def unfinished() -> set[Path]:  # of a model that was not finished
        return set(partial.iterdir()) - {work}

    return Resumable(target, WORK, finished, unfinished, discard)
