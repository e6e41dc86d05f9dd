"""The recipe: every choice a run makes, in one typed schema.

A recipe is a YAML file with up to five parts (`model`, `init`, `uptrain`, `eval`, `export`). Every command-line flag is
a field of one of them and takes its help from here, so that a file and a command line can say the same things.
An unknown key is an error that names the nearest valid one.
"""

import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rrtc.errors import WrongUsage, nearest

MATRIX_GROUPS = ("q", "kv", "o", "ffn")  # the module groups of the paper's rank ablation (table G.1)
BUILT_IN_TEXT = "pydoc"
OWN_TEXT = "self"
DEFAULT_RANK = 64
BUDGETS = ("budget", "target_params", "target_bytes")
DISTILLATIONS = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")  # paper appendix I
LOSSES = ("next_token", *DISTILLATIONS, "hidden")


def parse_size(text: str) -> int:
    """Bytes of a size such as 4GB or 500MB. Raises WrongUsage for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    if not match:
        raise WrongUsage(f"'{text}' is not a size.", "Write it as 4GB or 500MB.")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def parse_count(text: str) -> int:
    """The number in a count such as 90M or 1.5B. Raises WrongUsage for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMBT]?)\s*", text, re.IGNORECASE)
    if not match:
        raise WrongUsage(f"'{text}' is not a count.", "Write it as 90M or 1.5B.")
    return int(float(match[1]) * 1000 ** " KMBT".index(match[2].upper() or " "))


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    def resolved(self) -> dict[str, Any]:
        """All fields as plain data, with what they stand for where a default depends on other fields."""
        return self.model_dump()


class InitRecipe(Section):
    """How layers are tied and what each visit gets of its own (paper §2.2 and §2.3)."""

    budget: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Parameters without embeddings over the dense model's, as in 0.6; ranks, and FFN neurons to "
        "remove, are solved for.",
    )
    target_params: str | None = Field(None, description="Instead of budget: parameters in all, as in 90M.")
    target_bytes: str | None = Field(None, description="Instead of budget: size of the weights, as in 180MB.")
    loops: int = Field(2, ge=1, description="How often each shared layer is used. 2 halves the layers, 3 thirds them.")
    sharing: Literal["auto", "cycle", "sequence", "middle_cycle", "middle_sequence"] | None = Field(
        None,
        description="Which layers share weights: cycle (0 1 2 0 1 2) or sequence (0 0 1 1 2 2); middle_* is keep 1; "
        "auto: of neighbours, what measures best under a budget, down to nothing. By default auto with a budget, else "
        "cycle.",
    )
    keep: int = Field(0, ge=0, description="How many layers at each end share nothing.")
    shared_init: Literal["stepwise", "lower", "upper", "average", "joint"] | None = Field(
        None,
        description="Where the shared weights come from: the mean of the tied layers, one of them, or joint: chosen "
        "together with all LoRA by what the loss feels. By default joint with a budget, else average.",
    )
    lora_init: Literal["svd", "zero"] = Field(
        "svd", description="LoRA from the SVD of what tying lost, or from zero (training starts at the shared weights)."
    )
    rank: int | dict[str, int] | None = Field(
        None,
        description="LoRA rank: one number, or by matrix group, as in q=64,kv=64,o=64,ffn=128. 0 means no LoRA. By "
        f"default {DEFAULT_RANK}; not with a budget.",
    )
    calibrate_on: list[str] = Field(
        [BUILT_IN_TEXT],
        description="Text from which joint learns what the layers see, as uptrain's data; self is text that the model "
        "writes itself, a little of everything, and goes well with text of your own.",
        min_length=1,
    )
    calibrate_tokens: int = Field(16_384, ge=1, description="Tokens of that text in all.")
    text_field: str = Field("text", description="The field that holds the text in jsonl, parquet and datasets.")
    seed: int = Field(0, description="Which pieces of the calibration text are taken.")
    norms: Literal["per_visit", "shared"] = Field(
        "per_visit", description="Norms and biases: one set for each visit, or tied like the matrices (the paper)."
    )
    fold_norms: bool = Field(
        True, description="Multiply norm gains into the matrices that read them, where that changes nothing."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights written; auto: the model's own (bfloat16 for a GGUF)."
    )
    max_shard_size: str = Field("4GB", description="Largest size of one weights file.")
    measure_tokens: int = Field(
        4096, ge=0, description="Tokens on which the loss before any training is measured at the end; 0: not at all."
    )

    @field_validator("rank", mode="before")
    @classmethod
    def _rank_from_text(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) and "=" in value:
            value = dict(part.split("=", 1) if "=" in part else (part, "") for part in value.split(","))
        if isinstance(value, dict):
            value = {str(group).strip(): rank for group, rank in value.items()}
            for group in value:
                if group not in MATRIX_GROUPS:
                    raise ValueError(f"there is no matrix group '{group}'. {nearest(group, MATRIX_GROUPS)}")
        for rank in value.values() if isinstance(value, dict) else [value]:
            if not str(rank).strip().isdecimal():
                raise ValueError(f"a rank is a whole number from 0 up, or one for each matrix group, not '{rank}'")
        return value

    @model_validator(mode="after")
    def _middle_is_keep_1(self) -> "InitRecipe":
        if (self.sharing or "").startswith("middle_") and self.keep not in (0, 1):
            raise ValueError(f"sharing '{self.sharing}' keeps one layer at each end, but keep is {self.keep}")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> "InitRecipe":
        given = [name for name in (*BUDGETS, "rank") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say how much to store; give one of them")
        if self.pattern == "auto" and not self.has_budget:
            raise ValueError("sharing 'auto' needs a budget to choose under: add budget, target_params or target_bytes")
        if self.pattern == "auto" and self.start != "joint":
            raise ValueError(f"sharing 'auto' goes by what the loss feels: shared_init must be joint, not {self.start}")
        if self.pattern == "auto" and (self.keep or self.loops != type(self).model_fields["loops"].default):
            raise ValueError("sharing 'auto' chooses what is tied, so keep and loops say nothing: name a pattern too")
        if self.start == "joint" and self.lora_init == "zero":
            raise ValueError("shared_init 'joint' chooses the LoRA too, so lora_init cannot be zero")
        return self

    @field_validator("calibrate_on", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def resolved(self) -> dict[str, Any]:
        rank = None if self.has_budget else DEFAULT_RANK if self.rank is None else self.rank
        return self.model_dump() | {"sharing": self.pattern, "shared_init": self.start, "rank": rank}

    @property
    def has_budget(self) -> bool:
        return any(getattr(self, name) is not None for name in BUDGETS)

    @property
    def pattern(self) -> str:
        """`sharing`, or what it is where it is not given."""
        return self.sharing or ("auto" if self.has_budget else "cycle")

    @property
    def start(self) -> str:
        """`shared_init`, or what it is where it is not given."""
        return self.shared_init or ("joint" if self.has_budget else "average")

    @property
    def order(self) -> str:
        """`cycle` or `sequence`: the pattern without what it says about `keep`."""
        return self.pattern.removeprefix("middle_")

    @property
    def kept_at_each_end(self) -> int:
        """`keep`, or 1 where the sharing is called `middle_…`."""
        return 1 if self.pattern.startswith("middle_") else self.keep

    def rank_of(self, group: str) -> int:
        """The rank asked for a matrix group; a group that a mapping leaves out gets no LoRA. 0 with a budget, under
        which it is solved for."""
        rank = self.resolved()["rank"]
        return rank.get(group, 0) if isinstance(rank, dict) else rank or 0


class UptrainRecipe(Section):
    """How the tied model is healed (paper §3 and appendix E), by distillation from the dense original."""

    data: list[str] = Field(
        [BUILT_IN_TEXT],
        description="Training text: .txt, .jsonl or .parquet files, folders of them, or a datasets name; "
        "pydoc is the text that Python itself ships, self is text that the teacher writes.",
        min_length=1,
    )
    data_weights: list[float] | None = Field(
        None,
        description="How much to take of each of the data, as in 3,1; by default as much as each has, of which no more "
        "counts than the run could use.",
    )
    text_field: str = Field("text", description="The field that holds the text in jsonl, parquet and datasets.")
    tokens: int = Field(1_000_000, ge=1, description="Training tokens in all.")
    context: int = Field(512, ge=8, description="Tokens in one training window.")
    separate_documents: bool = Field(
        False,
        description="Documents in a window do not attend to each other. Slower, and rarely how models are made.",
    )
    batch_size: int = Field(8, ge=1, description="Windows in one optimiser step, over all processes.")
    micro_batch: int = Field(2, ge=1, description="Windows in one forward pass of one process.")
    optimiser: Literal["adamw", "muon"] = Field(
        "adamw", description="muon: for the matrices in the layers, and AdamW for LoRA, norms, biases and embeddings."
    )
    learning_rate: float = Field(
        1e-4, gt=0, description="Peak learning rate. A start that is close to noise, as the paper's, can take 4e-4."
    )
    shared_lr_scale: float | str = Field(
        "visits",
        description="The learning rate of a weight that several visits use is multiplied by this; visits: divided by "
        "their number. 1 changes nothing.",
    )
    schedule: Literal["cosine", "warmup_stable_decay"] = Field(
        "cosine", description="How the learning rate falls: all the way, or only over the last part (decay)."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Part of the steps over which the learning rate rises.")
    decay: float = Field(0.2, gt=0, le=1, description="Part of the steps over which warmup_stable_decay falls.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the matrices.")
    max_grad_norm: float = Field(1.0, gt=0, description="Gradients are clipped to this norm.")
    losses: dict[str, float] = Field(
        {"forward_kl": 1.0},
        description="What is minimised, each with its weight: next_token; forward_kl, reverse_kl, jensen_shannon, "
        "total_variation (distances from the dense model's distribution); hidden (from its hidden states).",
    )
    temperature: float = Field(1.0, gt=0, description="Of both distributions, where they are compared.")
    teacher: str | None = Field(None, description="The model to learn from; by default the one that was compressed.")
    exits: bool = Field(
        False, description="Also train an exit after each loop but the last (cycle), of a model that is healed already."
    )
    exit_weight: float = Field(
        0.1,
        gt=0,
        description="Weight of the mean over the exits of next_token and of forward_kl from the model's own end.",
    )
    teacher_cache: str | None = Field(
        None,
        description="Folder in which what the teacher says is kept: it is asked once about each window, before "
        "training, and not at all where the folder has everything.",
    )
    teacher_cache_top: int = Field(
        64,
        ge=1,
        description="Tokens of the vocabulary that it keeps at each place, the most probable; the others' sum.",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Arithmetic: bfloat16 where the machine is fast at it. Weights are trained in float32."
    )
    activation_checkpointing: bool = Field(False, description="Recompute activations: less memory, a third slower.")
    fsdp: bool = Field(
        False, description="Share the weights, gradients and moments out among torchrun's processes (FSDP2)."
    )
    compile: bool = Field(
        False, description="Compile the layers (torch.compile): faster on a GPU, after a minute or two at the start."
    )
    save_every: int = Field(200, ge=1, description="Steps between checkpoints.")
    seed: int = Field(0, description="Order of the text and any randomness.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="Tracker that is sent every step's figures; tensorboard writes into the output folder."
    )

    @field_validator("losses", mode="before")
    @classmethod
    def _parse_losses(cls, value: Any) -> Any:
        """As on the command line, a list of NAME=WEIGHT, or as in a file, a mapping."""
        if isinstance(value, list):
            pairs = [str(item).partition("=") for item in value]
            value = {name.strip(): weight.strip() for name, _, weight in pairs}
        for name in value if isinstance(value, dict) else ():
            if name not in LOSSES:
                raise ValueError(f"there is no loss '{name}'. {nearest(str(name), LOSSES)}")
        return value

    @field_validator("losses", mode="after")
    @classmethod
    def _some_loss(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"the weight of {name} is {weight}, and it should be 0 or more")
        if not any(value.values()):
            raise ValueError("no loss has a weight above 0, so there is nothing to learn from")
        return value

    @property
    def distils(self) -> bool:
        """Whether a teacher is needed."""
        return any(weight for name, weight in self.losses.items() if name != "next_token")

    @model_validator(mode="after")
    def _whole_batch(self) -> "UptrainRecipe":
        if self.batch_size % self.micro_batch:
            raise ValueError(f"batch_size {self.batch_size} is not a multiple of micro_batch {self.micro_batch}")
        return self

    @model_validator(mode="after")
    def _cached(self) -> "UptrainRecipe":
        if self.teacher_cache is not None and self.losses.get("hidden"):
            raise ValueError("a teacher_cache keeps no hidden states, which the loss 'hidden' compares")
        return self

    @model_validator(mode="after")
    def _rises_before_it_falls(self) -> "UptrainRecipe":
        if self.schedule == "warmup_stable_decay" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup {self.warmup} and decay {self.decay} are together more than all steps")
        return self

    @field_validator("shared_lr_scale", mode="before")
    @classmethod
    def _visits_or_a_factor(cls, value: Any) -> Any:
        if value == "visits":
            return value
        try:
            factor = float(value)
        except (TypeError, ValueError):
            factor = 0.0
        if not 0 < factor < math.inf:
            raise ValueError(f"it should be visits or a number above 0, not '{value}'")
        return factor

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> "UptrainRecipe":
        if self.data_weights is None:
            return self
        if len(self.data_weights) != len(self.data):
            raise ValueError(f"data names {len(self.data)} texts and data_weights has {len(self.data_weights)} weights")
        if not all(0 <= weight < math.inf for weight in self.data_weights):
            raise ValueError("a weight in data_weights is a number from 0 up")
        if not any(self.data_weights):
            raise ValueError("data_weights are all 0, so there is nothing to learn from")
        return self

    @field_validator("data_weights", mode="before")
    @classmethod
    def _weights_from_text(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value

    @field_validator("data", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class EvalRecipe(Section):
    """What is measured, always beside the dense original on the same items."""

    text: list[str] = Field([], description="Text to score on; by default what training held out.")
    text_field: str = Field("text", description="The field that holds the text in jsonl, parquet and datasets.")
    tokens: int = Field(16_384, ge=2, description="Tokens to score from each text, rounded up to whole windows.")
    context: int = Field(512, ge=8, description="Tokens in one scored window.")
    tasks: list[str] = Field(
        [],
        description="Tasks of lm-evaluation-harness by name; paper is the paper's seven. Needs the extra rrtc\\[eval].",
    )
    tasks_dir: str | None = Field(None, description="A folder of task files of your own, in the harness's format.")
    tasks_data: str | None = Field(None, description="The folder that stands for {data} in these task files.")
    fewshot: int = Field(0, ge=0, description="Solved examples before each item of a task.")
    task_items: int | None = Field(None, ge=1, description="Items of each task at most; by default all.")
    task_batch: int = Field(8, ge=1, description="Requests of a task that are run at once.")
    passkey_lengths: list[int] = Field(
        [256, 512], description="Lengths in tokens of the texts in which a pass key is hidden."
    )
    passkey_trials: int = Field(4, ge=0, description="Pass keys hidden at each length and depth; 0: none.")
    speed_rounds: int = Field(5, ge=0, description="Rounds in which dense and compressed are timed in turn; 0: none.")
    baselines: bool = Field(
        False, description="Also make and measure what untied low rank and dropping layers give at the same size."
    )
    seed: int = Field(0, description="Draws the pass keys, the few-shot examples and the bootstrap's samples.")
    prompt: str = Field(
        "Explain in two sentences why the sky is blue.", description="What the sample continuation answers."
    )
    sample_tokens: int = Field(48, ge=0, description="Length of the sample continuation; 0: none.")

    _one_is_a_list = field_validator("text", "tasks", mode="before")(lambda v: [v] if isinstance(v, str) else v)


class ExportRecipe(Section):
    """The form in which the model leaves."""

    format: Literal["recursive", "dense", "onnx", "gguf"] = Field(
        "recursive",
        description="recursive: small, shared weights stored once; dense: the stock architecture; onnx: small, for "
        "ONNX Runtime and transformers.js; gguf: dense, for llama.cpp, whose folder RRTC_LLAMA_CPP names.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights written; auto: as they are, or float32 for onnx."
    )
    max_shard_size: str = Field(
        "4GB", description="Largest size of one weights file; for onnx 2GB at most, gguf is always one file."
    )
    quantize: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Matrices in 8 or 4 bits (compressed-tensors, which transformers and vLLM read), rounded by what "
        "all their uses see; LoRA is not quantised, and chosen anew.",
    )
    calibrate_on: list[str] = Field(
        [],
        description="For quantize: text to learn from, as uptrain's data. By default what the model was trained on, or "
        "calibrated on.",
    )
    calibrate_tokens: int = Field(16_384, ge=1, description="For quantize: tokens of that text in all.")
    text_field: str = Field("text", description="The field that holds it in jsonl, parquet and datasets.")
    seed: int = Field(0, description="For quantize: which pieces of that text are taken.")

    @model_validator(mode="after")
    def _check_quantize(self) -> "ExportRecipe":
        if self.quantize != "none" and self.format not in ("recursive", "dense"):
            raise ValueError(f"quantize is for the recursive and the dense form, not for {self.format}")
        if self.quantize != "none" and OWN_TEXT in self.calibrate_on:
            raise ValueError(f"quantising learns from text that there is, so calibrate_on cannot be {OWN_TEXT}")
        return self

    @field_validator("calibrate_on", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class Recipe(Section):
    """One run from a dense model to an exported one."""

    model: str | None = Field(
        None, description="The dense model: a folder, a hub id, a .gguf file or package://import_name/path/in/package."
    )
    init: InitRecipe = InitRecipe()
    uptrain: UptrainRecipe = UptrainRecipe()
    eval: EvalRecipe = EvalRecipe()
    export: ExportRecipe = ExportRecipe()


def load_recipe(path: str | None) -> Recipe:
    """The recipe in the YAML file `path`; the defaults where `path` is None.

    Raises WrongUsage for a missing file, broken YAML, an unknown key or a value of the wrong kind.
    """
    if path is None:
        return Recipe()
    import yaml

    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError) as error:
        raise WrongUsage(f"The recipe {path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    except yaml.YAMLError as error:
        raise WrongUsage(f"The recipe {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if values is not None and not isinstance(values, dict):
        raise WrongUsage(f"The recipe {path} holds no keys.", "Start from one of the files in recipes/.")
    given = {part: value for part, value in (values or {}).items() if value is not None}  # a heading with nothing below
    return _checked(Recipe, given, path)


def with_flags(section: Section, flags: dict[str, Any]) -> Section:
    """`section` with the values given on the command line (those that are not None) in place of its own."""
    given = {name: value for name, value in flags.items() if value is not None}
    return _checked(type(section), section.model_dump() | given, "the command line") if given else section


def _checked(schema: type[Section], values: dict, source: str) -> Section:
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = [str(part) for part in first["loc"]]
        if first["type"] == "extra_forbidden":
            hint = nearest(where[-1], _fields_at(schema, where[:-1]))
            raise WrongUsage(f"There is no key '{'.'.join(where)}' in a recipe ({source}).", hint) from error
        message = re.sub("^(Input|List) should", "it should", first["msg"].removeprefix("Value error, "))
        name = "'" + ".".join(where) + "'" if where else "a value"
        hint = ""
        if first["type"] == "literal_error":
            hint = nearest(
                str(first["input"]), first["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
            )
        elif first["type"] == "model_type":
            message = "it should hold keys of its own"
        sentence = f"In {source}, {name} is wrong: {message}"
        raise WrongUsage(sentence if sentence.endswith((".", "?")) else sentence + ".", hint) from error


def _fields_at(schema: type[Section], path: list[str]) -> list[str]:
    for part in path:
        schema = schema.model_fields[part].annotation
    return list(schema.model_fields)
