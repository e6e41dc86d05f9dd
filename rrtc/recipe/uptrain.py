"""The section `uptrain` of a recipe."""

from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationInfo, field_validator, model_validator

from rrtc.errors import nearest
from rrtc.recipe.section import BUILT_IN_TEXT, OWN_TEXT, Amount, Section

DISTILLATIONS = ("forward_kl", "reverse_kl", "jensen_shannon", "total_variation")  # paper appendix I
MOST_WEIGHT = 1_000_000
LOSSES = ("next_token", *DISTILLATIONS, "hidden", "attention")
REGULARIZERS = ("bmi",)
WEIGHTED: dict[str, tuple[str, tuple[str, ...]]] = {  # by field, what has a weight there, and what there is
    "losses": ("loss", LOSSES),
    "regularizers": ("regularizer", REGULARIZERS),
}


class UptrainRecipe(Section):
    """How the tied model is healed (paper §3 and appendix E), by distillation from the dense original."""

    data: list[str] = Field(
        [BUILT_IN_TEXT],
        description="Training text: files (.txt, .jsonl, .json, .csv, .tsv, .parquet; all but the last also .gz or "
        ".zst), folders of them, or a datasets name; pydoc is the text that Python itself ships, self is text that the "
        "teacher writes.",
        min_length=1,
    )
    data_weights: list[float] | None = Field(
        None,
        description="How much to take of each of the data, as in 3,1; by default as much as each has, of which no more "
        "counts than the run could use.",
    )
    text_field: str = Field(
        "text", description="The field of a row that holds the text; else messages or conversations, as chat data has."
    )
    tokens: Amount = Field(1_000_000, ge=1, le=10**12, description="Training tokens in all, as in 10M.")
    context: int = Field(512, ge=8, le=10**9, description="Tokens in one training window.")
    separate_documents: bool = Field(
        False,
        description="Documents in a window do not attend to each other. Slower, and rarely how models are made.",
    )
    batch_size: int = Field(2, ge=1, le=10**6, description="Windows in one optimizer step, over all processes.")
    micro_batch: int | None = Field(
        None,
        ge=1,
        le=10**6,
        description="Windows in one forward pass of one process; by default 2, or 1 where batch_size cannot be divided "
        "so.",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw",
        validation_alias=AliasChoices("optimizer", "optimiser"),  # the second as recipes of rrtc 0.1 spell it
        description="muon: for the matrices in the layers, and AdamW for LoRA, norms, biases and embeddings.",
    )
    learning_rate: float | None = Field(
        None,
        gt=0,
        le=1e3,
        description="Peak learning rate. By default, the more the start has lost and the more tokens a step has, the "
        "larger: 1e-4 for 0.6 nats and 4,096 tokens.",
    )
    shared_lr_scale: float | str = Field(
        "visits",
        description="The learning rate of a weight that several visits use is multiplied by this; visits: divided by "
        "their number. 1 changes nothing.",
    )
    stability: Literal["none", "admin"] = Field(
        "none",
        description="admin: before training, each visit gets gains for what it adds to the hidden states, so that it "
        "adds as much as the dense layer.",
    )
    schedule: Literal["cosine", "warmup_stable_decay"] = Field(
        "cosine", description="How the learning rate falls: all the way, or only over the last part (decay)."
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="Part of the steps over which the learning rate rises.")
    decay: float = Field(0.2, gt=0, le=1, description="Part of the steps over which warmup_stable_decay falls.")
    weight_decay: float = Field(0.0, ge=0, le=1e3, description="Weight decay of the matrices.")
    max_grad_norm: float = Field(1.0, gt=0, le=1e9, description="Gradients are clipped to this norm.")
    losses: dict[str, float] = Field(
        {"forward_kl": 1.0},
        description="What is minimized, each with its weight: next_token; forward_kl, reverse_kl, jensen_shannon, "
        "total_variation (distances from the dense model's distribution); hidden (from its hidden states). Or alone: "
        "attention (what heads with linear attention find, from full attention; only their maps and gains learn).",
    )
    regularizers: dict[str, float] = Field(
        {"bmi": 0.0},
        description="What is minimized beside them, each with its weight; 0: not at all. bmi: that hidden states of a "
        "piece of text tell the one that follows from others, 0.02 as in its paper.",
    )
    temperature: float = Field(1.0, ge=0.01, le=100, description="Of both distributions, where they are compared.")
    teacher: str | None = Field(None, description="The model to learn from; by default the one that was compressed.")
    exits: Literal["none", "frozen", "after", "joint"] = Field(
        "none",
        description="Also train an exit after each loop but the last (cycle). frozen: nothing else learns, so that the "
        "model stays what it is; losses, exit_weight and teacher are not asked. after: of a model that is healed "
        "already, all of which goes on learning, as in the paper. joint: along with healing, from the teacher, too. "
        "With frozen and joint, each exit gets a linear map, fitted before training.",
    )
    exit_weight: float = Field(
        0.1,
        gt=0,
        le=MOST_WEIGHT,
        description="Weight of the exits' losses: after, the mean over the exits of next_token and of forward_kl from "
        "the model's own end; joint, forward_kl from the mean of the teacher and that end, later exits weighing more, "
        "and none more than this times the model's own loss.",
    )
    teacher_cache: str | None = Field(
        None,
        description="Folder in which what the teacher says is kept: it is asked once about each window, before "
        "training, and not at all where the folder has everything.",
    )
    teacher_cache_top: int = Field(
        64,
        ge=1,
        le=10**6,
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
    save_every: int = Field(200, ge=1, le=10**12, description="Steps between checkpoints.")
    seed: int = Field(0, ge=0, lt=2**32, description="Order of the text and any randomness.")
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="Tracker that is sent every step's figures; tensorboard writes into the output folder."
    )

    @field_validator("exits", mode="before", json_schema_input_type=Literal["none", "frozen", "after", "joint"] | bool)
    @classmethod
    def _exits_or_not(cls, value: Any) -> Any:
        """Folders of before say whether there are any."""
        return {True: "after", False: "none"}[value] if isinstance(value, bool) else value

    @field_validator("losses", "regularizers", mode="before", json_schema_input_type=dict[str, float] | list[str])
    @classmethod
    def _parse_weights(cls, value: Any, info: ValidationInfo) -> Any:
        """As on the command line, a list of NAME=WEIGHT, or as in a file, a mapping; of known names alone."""
        what, known = WEIGHTED[info.field_name or ""]
        if isinstance(value, list):
            pairs = [str(item).partition("=") for item in value]
            names = [name.strip() for name, _, _ in pairs]
            if twice := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{twice[0]} is there twice")
            value = {name.strip(): weight.strip() for name, _, weight in pairs}
        for name in value if isinstance(value, dict) else ():
            if name not in known:
                raise ValueError(f"there is no {what} '{name}'. {nearest(str(name), known)}")
        return value

    @field_validator("losses", "regularizers", mode="after")
    @classmethod
    def _check_weights(cls, value: dict[str, float]) -> dict[str, float]:
        for name, weight in value.items():
            if not 0 <= weight <= MOST_WEIGHT:
                raise ValueError(f"the weight of {name} is {weight}, and it should be from 0 to {MOST_WEIGHT:,}")
        return value

    @field_validator("losses", mode="after")
    @classmethod
    def _some_loss(cls, value: dict[str, float]) -> dict[str, float]:
        if not any(value.values()):
            raise ValueError("no loss has a weight above 0, so there is nothing to learn from")
        return value

    @property
    def distills(self) -> bool:
        """Whether a teacher is needed."""
        asked = (name for name, weight in self.losses.items() if weight and name not in ("next_token", "attention"))
        return self.exits != "frozen" and any(asked)

    @property
    def transfers(self) -> bool:
        """Whether linear attention learns from full attention, and nothing else learns."""
        return bool(self.losses.get("attention"))

    @property
    def freezes(self) -> bool:
        """Whether the model stays as it is, and only maps beside it learn."""
        return self.transfers or self.exits == "frozen"

    @property
    def fits_exits(self) -> bool:
        """Whether exits get maps of their own."""
        return self.exits in ("frozen", "joint")

    @model_validator(mode="after")
    def _stages_of_their_own(self) -> "UptrainRecipe":
        others = [name for name, weight in self.regularizers.items() if weight]
        others += ["stability"] if self.stability != "none" else []
        others += ["fsdp"] if self.fsdp else []
        if self.exits == "frozen" and others:
            raise ValueError(f"exits 'frozen' are a stage of their own, and do not go with {others[0]}")
        others += [name for name, weight in self.losses.items() if weight and name != "attention"]
        others += ["exits"] if self.exits != "none" else []
        if self.transfers and others:
            raise ValueError(f"the loss 'attention' is a stage of its own, and does not go with {others[0]}")
        return self

    @model_validator(mode="after")
    def _nothing_is_idle(self) -> "UptrainRecipe":
        """What was asked for, and would say nothing: it was meant to."""
        asks = self.distills or self.exits == "frozen"
        if self.teacher_cache is not None and not asks:
            raise ValueError("a teacher_cache keeps what a teacher says, and these losses ask none")
        if self.teacher is not None and not asks and OWN_TEXT not in self.data:
            raise ValueError("a teacher is named, and these losses ask none")
        for name, says in (("exit_weight", self.exits != "none"), ("decay", self.schedule != "cosine")):
            if not says and getattr(self, name) != type(self).model_fields[name].default:
                needed = "exits" if name == "exit_weight" else "schedule warmup_stable_decay"
                raise ValueError(f"{name} says nothing without {needed}")
        return self

    @model_validator(mode="after")
    def _whole_batch(self) -> "UptrainRecipe":
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
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
        if not 0 < factor <= MOST_WEIGHT:
            raise ValueError(f"it should be visits or a number above 0, to {MOST_WEIGHT:,}, not '{value}'")
        return factor

    @model_validator(mode="after")
    def _a_weight_for_each(self) -> "UptrainRecipe":
        if self.data_weights is None:
            return self
        if len(self.data_weights) != len(self.data):
            raise ValueError(f"data names {len(self.data)} texts and data_weights has {len(self.data_weights)} weights")
        if not all(0 <= weight <= MOST_WEIGHT for weight in self.data_weights):
            raise ValueError(f"a weight in data_weights is a number from 0 to {MOST_WEIGHT:,}")
        if not any(self.data_weights):
            raise ValueError("data_weights are all 0, so there is nothing to learn from")
        return self

    @field_validator("data_weights", mode="before", json_schema_input_type=float | str | list[float] | None)
    @classmethod
    def _weights_from_text(cls, value: Any) -> Any:
        return value.split(",") if isinstance(value, str) else [value] if isinstance(value, int | float) else value

    @field_validator("data", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value
