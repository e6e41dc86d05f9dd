"""One uptraining run, worked out and checked before any weights are loaded.

Everything a user can get wrong is met here, in seconds: a teacher with another vocabulary, text that is missing or too
short, a batch that cannot be divided.
"""

from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from rrtc.checkpoint import Weights, read_provenance
from rrtc.console import note, warn
from rrtc.errors import RrtcError, WrongUsage
from rrtc.measure import device, fast_bfloat16
from rrtc.model import RrtConfig
from rrtc.model.skeleton import read_architecture, read_plan
from rrtc.plan import Plan
from rrtc.recipe import UptrainRecipe
from rrtc.source import Source, content_hash, find_base, load_tokenizer, read_config
from rrtc.text import Windows, longest_context
from rrtc.uptrain.data import training_windows

# What may change between the start of a run and its continuation: it changes the cost of a step, not its result.
FREE_ON_RESUME = ("micro_batch", "activation_checkpointing", "fsdp", "save_every")
MOST_TOKENS = 500_000_000  # of text in memory: 4 GB of token ids, and the text itself on the way there


@dataclass(frozen=True)
class Job:
    """What is trained, from whom and on what. `dtype` is the number format of the folder's weights, `bfloat16` says
    whether the arithmetic is in bfloat16, and `accumulation` how many micro-batches of one process make a step."""

    folder: Path
    recipe: UptrainRecipe
    provenance: dict
    plan: Plan
    dtype: str
    teacher: Source | None
    windows: Windows
    steps: int
    accumulation: int
    bfloat16: bool

    @property
    def context(self) -> int:
        return self.windows.ids.shape[1]

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.batch_size * self.context

    @property
    def tokens(self) -> int:
        """Tokens in all: what the recipe asks for, rounded up to whole steps."""
        return self.steps * self.tokens_per_step

    def flops_per_token(self) -> int:
        """Floating-point operations to train on one token, without attention over the context: forward, backward at
        twice its price, the forward pass repeated under activation checkpointing, and the teacher's forward pass."""
        passes = 4 if self.recipe.activation_checkpointing else 3
        teacher = read_architecture(self.teacher.config()).flops_per_token if self.teacher else 0
        return passes * self.plan.flops_per_token + teacher

    def checkpoint_bytes(self) -> int:
        """Disk space that the run's checkpoints take at most: weights and two moments in float32, the two last ones
        and the one being written."""
        at_once = min(3, -(-self.steps // self.recipe.save_every))
        return at_once * 3 * 4 * self.plan.parameters

    def fingerprint(self) -> dict:
        """What a continued run must have in common with the one it continues, as plain data."""
        return {
            "recipe": {k: v for k, v in self.recipe.model_dump().items() if k not in FREE_ON_RESUME},
            "model": content_hash(self.folder),
            "teacher": content_hash(self.teacher.file) if self.teacher else None,
            "text": self.windows.sha256,
        }


def prepare(folder: Path, recipe: UptrainRecipe) -> Job:
    """The job of uptraining the rrtc folder `folder`. Reads configs, headers and text, but no weights.

    Raises RrtcError or WrongUsage for everything that would stop the run.
    """
    check_processes(recipe)
    provenance = read_provenance(folder)
    if not (folder / "config.json").exists():
        raise RrtcError(f"{folder} is a '{provenance['stage']}' folder and holds no model to train.")
    config = read_config(folder)
    if not isinstance(config, RrtConfig):
        raise RrtcError(f"{folder} holds a dense '{config.model_type}' model.", "Compress it first, with 'rrtc init'.")
    dtype = Weights(folder).dtype
    tokenizer = load_tokenizer(folder)
    teacher = _teacher(folder, recipe, config, tokenizer) if recipe.distils else None

    processes = process_group().num_processes
    if recipe.batch_size % (recipe.micro_batch * processes):
        raise WrongUsage(
            f"A batch_size of {recipe.batch_size} cannot be divided into micro-batches of {recipe.micro_batch} on "
            f"{processes} processes.",
            f"Make batch_size a multiple of {recipe.micro_batch * processes}, or change micro_batch.",
        )
    context = longest_context(config, recipe.context)
    if context < recipe.context:
        warn(f"The context is {context} tokens: the model cannot see {recipe.context}.")
    per_step = recipe.batch_size * context
    steps = -(-recipe.tokens // per_step)
    check_tokens(steps * per_step)
    windows = training_windows(recipe, tokenizer, context, steps * per_step)
    epochs = steps * recipe.batch_size / len(windows.ids)
    if epochs > 1:
        note(f"The text has {windows.ids.numel()} tokens: training goes through it {epochs:.3g} times.")
    return Job(
        folder=folder,
        recipe=recipe,
        provenance=provenance,
        plan=read_plan(config),
        dtype=dtype,
        teacher=teacher,
        windows=windows,
        steps=steps,
        accumulation=recipe.batch_size // (recipe.micro_batch * processes),
        bfloat16=fast_bfloat16() if recipe.precision == "auto" else recipe.precision == "bfloat16",
    )


def process_group() -> PartialState:
    """The processes that train together: those of torchrun, or this one alone."""
    return PartialState(cpu=device().type == "cpu")  # without the flag, processes on CPUs would not see each other


def check_processes(recipe: UptrainRecipe) -> None:
    """Raises WrongUsage where the model is to be sharded and there is nobody to share it with."""
    if recipe.fsdp and process_group().num_processes == 1:
        raise WrongUsage(
            "--fsdp shards the model over several processes, and this is one.",
            "Start it as 'torchrun --nproc-per-node 8 -m rrtc uptrain …' on 8 GPUs, or leave --fsdp out.",
        )


def check_tokens(tokens: int) -> None:
    """Raises WrongUsage for a run of more tokens than this version can hold."""
    if tokens > MOST_TOKENS:
        raise WrongUsage(
            f"This version of rrtc holds the training text in memory, at most {MOST_TOKENS:,} tokens of it, and this "
            f"run takes {tokens:,}.",
            "Lower tokens.",
        )


def _teacher(folder: Path, recipe: UptrainRecipe, config: RrtConfig, tokenizer) -> Source:
    """The model to learn from. Raises RrtcError where it does not speak in the same tokens."""
    teacher = find_base(folder, recipe.teacher, "--teacher")
    teacher.weights()  # headers only: a missing or truncated file shows here
    hint = "Name a teacher with the same tokenizer, or train without one (--losses next_token=1)."
    ours, theirs = config.vocab_size, teacher.config().get_text_config().vocab_size
    if ours != theirs:
        raise RrtcError(
            f"The teacher {teacher.uri} has a vocabulary of {theirs} tokens and the model one of {ours}, so it cannot "
            "teach it token by token.",
            hint,
        )
    # The model's own base needs no second look. Another teacher may number the same words differently.
    if recipe.teacher is not None and load_tokenizer(teacher.folder).get_vocab() != tokenizer.get_vocab():
        raise RrtcError(f"The tokenizer of the teacher {teacher.uri} gives its tokens other meanings.", hint)
    return teacher
