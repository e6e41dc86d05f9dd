"""One uptraining run, worked out and checked before any weights are loaded.

Everything a user can get wrong is met here, in seconds: a teacher with another vocabulary, text that is missing or too
short, a batch that cannot be divided.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from transformers.integrations import integration_utils

from rrtc.console import note, warn
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.folder import copy_companions
from rrtc.io.provenance import base_seen_from, check_not_quantized, next_history, read_provenance, write_provenance
from rrtc.io.recursive import trained_exits
from rrtc.io.source import Source, content_hash, find_base, find_model, load_tokenizer, read_config
from rrtc.io.unchanged import Unchanged
from rrtc.io.weights import Weights
from rrtc.machine import fast_bfloat16, process_group
from rrtc.model import RrtConfig
from rrtc.plain import read_json
from rrtc.plan import Plan
from rrtc.recipe.section import BUILT_IN_TEXT, OWN_TEXT
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.architecture import read_architecture, read_plan
from rrtc.stock.trial import Branch
from rrtc.text.windows import longest_context
from rrtc.uptrain.checks import check_features, check_recipe, check_tokens, training_flops
from rrtc.uptrain.data import ORDER, Mixture, Stream, training_text
from rrtc.uptrain.exits import with_exits
from rrtc.uptrain.rate import EXITS, TRANSFER, default_rate, lost_by
from rrtc.uptrain.stability import branches_of, with_gains
from rrtc.uptrain.teacher_cache import TeacherCache

MICRO_BATCH = 2  # where the recipe does not say it

# What may change between the start of a run and its continuation: it changes the cost of a step, not its result.
FREE_ON_RESUME = ("micro_batch", "activation_checkpointing", "fsdp", "save_every", "report_to")


@dataclass(frozen=True)
class Job:
    """What is trained, from whom and on what. `dtype` is the dtype of the folder's weights, `arithmetic`
    that of the computations; `micro_batch` windows are in a forward pass of one process, and `accumulation` passes make
    its part of a step.

    `taught_by` has the `uri` and the `sha256` of the dense model that is learned from; None where there is none.
    `teacher` is that model where it has to be run, and None where `cache` has all that it would say. `inputs` are the
    files of `folder`. `branches` are the residual branches that get gains (`stability`), for which `original` is to be
    profiled, and which are in the `plan` already; none, and None, where there are to be no gains. `fitted_exits` are
    the places of exits whose maps are fitted before training: all in the `plan`, unless they were trained already.
    """

    folder: Path
    recipe: UptrainRecipe
    provenance: dict
    plan: Plan
    dtype: str
    taught_by: dict | None
    teacher: Source | None
    cache: TeacherCache | None
    text: Mixture
    steps: int
    micro_batch: int
    accumulation: int
    arithmetic: str
    inputs: Unchanged
    branches: tuple[Branch, ...] = ()
    original: Source | None = None
    fitted_exits: tuple[int, ...] = ()

    @property
    def context(self) -> int:
        return self.text.context

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch_size * self.context

    @property
    def tokens(self) -> int:
        """Tokens in all: what the recipe asks for, rounded up to whole steps."""
        return self.steps * self.tokens_per_step

    @property
    def learning_rate(self) -> float:
        """The peak learning rate: the recipe's, or the default for what the model has lost."""
        if self.recipe.learning_rate is not None:
            return self.recipe.learning_rate
        if self.recipe.transfers:
            return TRANSFER
        if self.recipe.exits == "frozen":
            return EXITS
        return default_rate(lost_by(self.provenance), self.tokens_per_step)

    @property
    def bfloat16(self) -> bool:
        return self.arithmetic == "bfloat16"

    def flops_per_token(self) -> int:
        """As `training_flops` counts them."""
        teacher = read_architecture(self.teacher.config()).flops_per_token if self.teacher else 0
        exits = len(self.plan.exits) if self.recipe.exits != "none" else 0
        head = self.plan.architecture.head_flops
        return training_flops(self.recipe, self.plan.flops_per_token, teacher, exits, head)

    def checkpoint_bytes(self) -> int:
        """Disk space that the run's checkpoints take at most: weights and two moments in float32, the two last ones
        and the one being written."""
        later = -(-self.steps // self.recipe.save_every)
        at_once = min(3, later + (self.steps > 1 and self.recipe.save_every > 1))  # and one after the first step
        return at_once * 3 * 4 * self.plan.parameters

    def complete(self, folder: Path, measured: dict, target: Path | None = None) -> None:
        """Makes `folder`, which holds weights of this run, one that other commands take: with the config, the tokenizer
        and rrtc.yaml. measured: what it says under measured.uptrain. target: what `folder` will be called. Raises
        RrtcError where the model that is trained, or its teacher, has changed meanwhile."""
        self.inputs.check()
        if self.teacher is not None:
            self.teacher.files.check_mapped()
        if self.branches or self.recipe.fits_exits:  # the model may have other parameters than the one in `self.folder`
            values = read_json(self.folder / "config.json") | {"visits": [visit.fields() for visit in self.plan.visits]}
            (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf8")
        else:
            shutil.copyfile(self.folder / "config.json", folder / "config.json")
        copy_companions(self.folder, folder)
        write_provenance(
            folder,
            "uptrain",
            base_seen_from(target or folder, self.folder, self.provenance),
            self.provenance["recipe"] | {"uptrain": self.recipe.model_dump()},
            self.provenance["measured"] | {"uptrain": measured},
            next_history(self.provenance),
        )

    def fingerprint(self) -> dict:
        """What a continued run must have in common with the one it continues, as plain data."""
        recipe = {k: v for k, v in self.recipe.model_dump().items() if k not in FREE_ON_RESUME}
        recipe["learning_rate"] = self.learning_rate  # which may have been left to what the model has lost
        recipe["teacher_cache"] = self.cache is not None  # it may have moved
        if self.recipe.regularizers.get("bmi") or self.recipe.exits == "joint":
            # The first compares the windows of a micro-batch with each other; the second has ratios of its means.
            recipe["micro_batch"] = self.micro_batch
        return {
            "recipe": recipe,
            "arithmetic": self.arithmetic,  # which `precision: auto` leaves to the machine
            "model": content_hash(self.folder),
            "teacher": self.taught_by["sha256"] if self.taught_by else None,
            "text": self.text.sha256,
            "order of the text": ORDER,
        }


def prepare(folder: Path, recipe: UptrainRecipe, most_steps: int | None = None) -> Job:
    """The job of uptraining the rrtc folder `folder`. Reads configs, headers and text, but no weights, unless the
    teacher has to write text. most_steps: no more text than for so many steps will be used; by default that for all.

    Raises RrtcError or WrongUsage for everything that would stop the run.
    """
    inputs = Unchanged(folder)
    check_recipe(recipe)
    check_reporter(recipe.report_to)
    provenance = read_provenance(folder)
    if not (folder / "config.json").exists():
        raise RrtcError(f"{folder} is a '{provenance['stage']}' folder and holds no model to train.")
    config = read_config(folder)
    if not isinstance(config, RrtConfig):
        raise RrtcError(f"{folder} holds a dense '{config.model_type}' model.", "Compress it first, with 'rrtc init'.")
    check_not_quantized(folder, config)
    plan = read_plan(config)
    check_features(recipe, plan.features)
    if recipe.exits != "none":
        _check_exits(folder, plan, provenance, recipe.exits)
    if recipe.transfers:
        _check_linear(folder, plan, longest_context(config, recipe.context))
    branches: tuple[Branch, ...] = ()
    if recipe.stability == "admin":
        branches = tuple(branches_of(plan, config.base_config))
        plan = with_gains(plan, branches)
    fitted_exits: tuple[int, ...] = ()
    if recipe.fits_exits:
        plan = with_exits(plan)
        # Maps of a model that was healed or planned anew since then say little of it now.
        trained = provenance["stage"] == "uptrain" and trained_exits(folder)
        fitted_exits = () if trained else plan.exits
    dtype = Weights(folder).dtype
    tokenizer = load_tokenizer(folder)
    arithmetic = recipe.precision
    if arithmetic == "auto":
        arithmetic = "bfloat16" if fast_bfloat16() else "float32"
    taught_by, teacher, cache = None, None, None
    if recipe.distills:
        taught_by = _taught_by(provenance, recipe)
        cache = _cache(recipe, taught_by["sha256"], config, arithmetic)
        # A cache that holds something may hold everything, and then the teacher need not be there.
        if cache is None or not cache.windows:
            teacher = _teacher(folder, recipe, config, tokenizer)
    writer = teacher
    if (OWN_TEXT in recipe.data or branches) and teacher is None:
        writer = _teacher(folder, recipe, config, tokenizer)

    processes = process_group().num_processes
    micro_batch = _micro_batch(recipe, processes)
    context = longest_context(config, recipe.context)
    if context < recipe.context:
        warn(f"The context is {context} tokens: the model cannot see {recipe.context}.")
    check_tokens(recipe, context)
    steps = -(-recipe.tokens // (recipe.batch_size * context))
    windows = min(steps, most_steps or steps) * recipe.batch_size
    if recipe.data == [BUILT_IN_TEXT]:
        note("Training on Python's language reference alone. --data takes text like what the model is for.")
    text = training_text(recipe, tokenizer, config.vocab_size, context, windows, writer, process_group())
    for source, share in zip(text.sources, text.shares, strict=True):
        epochs = share * steps * recipe.batch_size / source.count
        if epochs > 1 and source.shard.complete:
            has = f"The text {source.name} has {source.shard.tokens} tokens"
            note(f"{has}: training goes through it {epochs:.3g} times.")
    if cache is not None and not cache.holds(Stream(text, windows)):
        teacher = writer or _teacher(folder, recipe, config, tokenizer)
    return Job(
        folder=folder,
        recipe=recipe,
        provenance=provenance,
        plan=plan,
        dtype=dtype,
        taught_by=taught_by,
        teacher=teacher,
        cache=cache,
        text=text,
        steps=steps,
        micro_batch=micro_batch,
        accumulation=recipe.batch_size // (micro_batch * processes),
        arithmetic=arithmetic,
        inputs=inputs,
        branches=branches,
        original=writer if branches else None,
        fitted_exits=fitted_exits,
    )


def _check_exits(folder: Path, plan: Plan, provenance: dict, when: str) -> None:
    """Raises WrongUsage where there is no loop to exit from; warns where the exits come too early in training."""
    if not plan.exits:
        raise WrongUsage(
            f"The model in {folder} has no exits, because no loop over its tied layers ends before another begins.",
            "Exits need at least 2 loops and the sharing cycle or middle_cycle.",
        )
    if when != "joint" and "uptrain" not in [provenance["stage"], *(one["stage"] for one in provenance["history"])]:
        warn("This model was not healed yet. Heal it first, or train its exits along with it: --exits joint.")


def _check_linear(folder: Path, plan: Plan, context: int) -> None:
    """Raises WrongUsage where no linear attention could learn from windows of text of that `context`."""
    found = [visit.attention for visit in plan.visits if visit.attention is not None and visit.attention.linear]
    if not found:
        raise WrongUsage(
            f"No visit of the model in {folder} has linear attention, which the loss 'attention' is about.",
            "Plan it first: rrtc init … --kv-budget 0.2 --kv-kinds linear.",
        )
    least = max(one.window + one.sinks for one in found) + 2  # the last token is no query
    if context < least:
        raise WrongUsage(
            f"In windows of {context} tokens nothing leaves what the heads of this model see.",
            f"Raise the context to {least} at least, and better to twice of it.",
        )


def check_reporter(name: str) -> None:
    """Raises RrtcError where the tracker `name` is not installed."""
    if name != "none" and not getattr(integration_utils, f"is_{name}_available")():
        raise RrtcError(f"The package {name} is not installed.", f"Install it: pip install {name}")


def _micro_batch(recipe: UptrainRecipe, processes: int) -> int:
    """Windows in one forward pass of each of so many processes. Raises WrongUsage where they do not make a batch."""
    size = recipe.micro_batch or (MICRO_BATCH if recipe.batch_size % (MICRO_BATCH * processes) == 0 else 1)
    if recipe.batch_size % (size * processes):
        is_asked = recipe.micro_batch is not None
        into, instead = (f" into micro-batches of {size}", ", or change micro_batch") if is_asked else ("", "")
        raise WrongUsage(
            f"A batch_size of {recipe.batch_size} cannot be divided{into} on {processes} processes.",
            f"Make batch_size a multiple of {size * processes}{instead}.",
        )
    return size


def _taught_by(provenance: dict, recipe: UptrainRecipe) -> dict:
    """`uri` and `sha256` of the dense model to learn from; the model's own base is not looked at."""
    if recipe.teacher is None:
        return {name: provenance["base"][name] for name in ("uri", "sha256")}
    named = find_model(recipe.teacher)
    return {"uri": named.uri, "sha256": content_hash(named.file)}


def _cache(recipe: UptrainRecipe, teacher: str, config: RrtConfig, arithmetic: str) -> TeacherCache | None:
    if recipe.teacher_cache is None:
        return None
    folder = Path(recipe.teacher_cache).expanduser()
    return TeacherCache(folder, teacher, config.vocab_size, recipe.temperature, recipe.teacher_cache_top, arithmetic)


def _teacher(folder: Path, recipe: UptrainRecipe, config: RrtConfig, tokenizer) -> Source:
    """The model to learn from. Raises RrtcError where it does not speak in the same tokens."""
    teacher = find_base(folder, recipe.teacher, "--teacher")
    check_teacher(teacher, recipe, config, tokenizer)
    return teacher


def check_teacher(teacher: Source, recipe: UptrainRecipe, config, tokenizer) -> None:
    """Raises RrtcError where `teacher` cannot teach a model of that transformers config and tokenizer what `recipe`
    asks for."""
    teacher.weights()  # headers only: a missing or truncated file shows here
    hint = "Name a teacher with the same tokenizer, or train without one (--losses next_token=1)."
    ours, theirs = (one.get_text_config().vocab_size for one in (config, teacher.config()))
    if ours != theirs:
        raise RrtcError(
            f"The teacher {teacher.uri} has a vocabulary of {theirs} tokens and the model one of {ours}, so it cannot "
            "teach it token by token.",
            hint,
        )
    context = longest_context(config, recipe.context)
    if (sees := longest_context(teacher.config(), context)) < context:
        raise RrtcError(
            f"The teacher {teacher.uri} can see {sees} tokens, and windows have {context}.",
            f"Make them shorter (--context {sees}), or name another teacher.",
        )
    # The model's own base needs no second look. Another teacher may number the same words differently.
    if recipe.teacher is not None and load_tokenizer(teacher.folder).get_vocab() != tokenizer.get_vocab():
        raise RrtcError(f"The tokenizer of the teacher {teacher.uri} gives its tokens other meanings.", hint)
    if recipe.losses.get("hidden") or recipe.stability == "admin":
        what = "The loss 'hidden'" if recipe.losses.get("hidden") else "Stability admin"
        both = config.get_text_config(), teacher.config().get_text_config()
        (depth, width), (their_depth, their_width) = ((c.num_hidden_layers, c.hidden_size) for c in both)
        if (depth, width) != (their_depth, their_width):
            raise RrtcError(
                f"{what} compares layer by layer, and the teacher {teacher.uri} has {their_depth} layers of width "
                f"{their_width} where the model has {depth} of width {width}.",
                "Leave that out, or learn from the model's own original.",
            )
