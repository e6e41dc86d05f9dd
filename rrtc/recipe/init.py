"""The section `init` of a recipe."""

import re
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from rrtc.errors import WrongUsage, nearest
from rrtc.recipe.section import BUILT_IN_TEXT, Amount, Section
from rrtc.units import parse_extent

MATRIX_GROUPS = ("q", "kv", "o", "ffn")  # the module groups of the paper's rank ablation (table G.1)
DEFAULT_RANK = 64
WIDEST_WINDOW = 512  # tokens, where the recipe names no window
TARGETS = ("size", "budget")  # either says how much to store
GONE = {  # fields of rrtc 0.1
    "target_bytes": "target_bytes is called size now: write size: {}",
    "target_params": "target_params is no more: say how large the file may be, as in size: 180MB, which is 90M "
    "parameters in bfloat16",
}


class InitRecipe(Section):
    """How layers are tied and what each visit gets of its own (paper §2.2 and §2.3)."""

    size: float | str | None = Field(
        None,
        description="How large the weights files may be, embeddings and all: 300MB, or a part (0.5, 50%) of what the "
        "dense model takes in the dtype that is written. Ranks, and FFN neurons to remove, are solved for.",
    )
    quantize: Literal["none", "int8", "int4"] = Field(
        "none",
        description="The size is that of the file that 'rrtc export --quantize' will write: matrices in 8 or 4 bits, "
        "embeddings in 8, the rest in dtype. What init itself writes is in dtype.",
    )
    budget: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Instead of size, as in papers: parameters without embeddings over the dense model's, as in 0.6.",
    )
    loops: int = Field(
        2, ge=1, le=10**4, description="How often each shared layer is used. 2 halves the layers, 3 thirds them."
    )
    sharing: Literal["auto", "cycle", "sequence", "middle_cycle", "middle_sequence"] | None = Field(
        None,
        description="Which layers share weights: cycle (0 1 2 0 1 2) or sequence (0 0 1 1 2 2); middle_* is keep 1; "
        "auto: those neighbors that measure cheaper tied, which may be none. By default middle_cycle with a size or a "
        "budget, else cycle.",
    )
    keep: int | None = Field(
        None, ge=0, le=10**4, description="How many layers at each end share nothing: 1 with middle_*, else 0."
    )
    shared_init: Literal["stepwise", "lower", "upper", "average", "joint"] | None = Field(
        None,
        description="Where the shared weights come from: the mean of the tied layers, one of them, or joint: chosen "
        "together with all LoRA by what the loss feels. By default joint with a size or budget, else average.",
    )
    lora_init: Literal["svd", "zero"] = Field(
        "svd", description="LoRA from the SVD of what tying lost, or from zero (training starts at the shared weights)."
    )
    rank: int | dict[str, int] | None = Field(
        None,
        description="LoRA rank: one number, or by matrix group, as in q=64,kv=64,o=64,ffn=128. 0 means no LoRA. By "
        f"default {DEFAULT_RANK}; not with a size or budget.",
    )
    kv_budget: float | None = Field(
        None,
        gt=0,
        le=1,
        description="Bytes of the KV cache over the dense model's at kv_context tokens, as in 0.2: most KV heads then "
        "see a window. With size 1 the weights stay as they are.",
    )
    kv_context: int | None = Field(
        None, ge=1, le=10**9, description="The length in tokens at which kv_budget counts; by default the model's own."
    )
    kv_window: int | None = Field(
        None,
        ge=1,
        le=10**9,
        description="Tokens that a KV head with a window sees, the newest included. By default the largest power of "
        f"two that half of the budget allows, and {WIDEST_WINDOW} at most, or up to two or four times that, whichever "
        "costs least; and a little more, until the budget is spent.",
    )
    kv_sinks: int = Field(
        4, ge=0, le=10**6, description="First tokens of a document that these heads see as well, and cannot do without."
    )
    kv_kinds: list[Literal["window", "landmark", "linear", "last_loop"]] = Field(
        ["window"],
        description="What heads that do not see everything may have, at equal bytes: window; landmark, half of it and "
        "blocks of what lies before, drawn by lot; linear, sums of random features; last_loop, what the last loop "
        "keeps: alone with kv_choice last, or after window, of a model that is tied already. Of several, each visit "
        "gets what costs it least.",
        min_length=1,
    )
    kv_grain: Literal["heads", "visits"] = Field(
        "heads",
        description="What is chosen: each KV head by itself, or all heads of a visit alike (even and last do).",
    )
    kv_choice: Literal["measured", "even", "last"] = Field(
        "measured",
        description="What sees everything: heads that the loss feels most; visits at even distances; the last ones.",
    )
    kv_lookups: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Share of the heads that see everything which is kept for those that look up what stands far back.",
    )
    calibrate_on: list[str] = Field(
        [BUILT_IN_TEXT],
        description="Text from which joint learns what the layers see, as uptrain's data; self is text that the model "
        "writes itself, a little of everything, and goes well with text of your own.",
        min_length=1,
    )
    calibrate_tokens: Amount = Field(16_384, ge=1, le=10**12, description="Tokens of that text in all.")
    calibrate_context: int = Field(512, ge=8, le=10**9, description="Tokens in one window of that text.")
    text_field: str = Field(
        "text", description="The field of a row that holds the text; else messages or conversations, as chat data has."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Which pieces of the calibration text are taken.")
    norms: Literal["per_visit", "shared"] = Field(
        "per_visit", description="Norms and biases: one set for each visit, or tied like the matrices (the paper)."
    )
    fold_norms: bool = Field(
        True, description="Multiply norm gains into the matrices that read them, where that changes nothing."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights written; auto: the model's own (bfloat16 for a GGUF)."
    )
    max_shard_size: str = Field("4GB", description="Largest size of the tensors in one weights file.")
    measure_tokens: Amount = Field(
        4096,
        ge=0,
        le=10**12,
        description="Tokens on which the loss before any training is measured at the end; 0: not at all.",
    )

    @model_validator(mode="before")
    @classmethod
    def _fields_of_old(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, sentence in GONE.items():
            if values.get(name) is not None:
                raise ValueError(sentence.format(values[name]))
        return {name: value for name, value in values.items() if name not in GONE}

    @field_validator("size", mode="before", json_schema_input_type=float | str | None)
    @classmethod
    def _size_is_one(cls, value: Any) -> Any:
        if value is None:
            return None
        try:
            extent = parse_extent(value)
        except WrongUsage as error:
            raise ValueError(f"{error.sentence} {error.hint}") from error
        return extent if isinstance(extent, float) else value

    @field_validator("rank", mode="before", json_schema_input_type=int | str | dict[str, int] | None)
    @classmethod
    def _rank_from_text(cls, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) and "=" in value:
            value = dict(part.partition("=")[::2] for part in value.split(","))
        if isinstance(value, dict):
            value = {str(group).strip(): rank for group, rank in value.items()}
            for group in value:
                if group not in MATRIX_GROUPS:
                    raise ValueError(f"there is no matrix group '{group}'. {nearest(group, MATRIX_GROUPS)}")
        for rank in value.values() if isinstance(value, dict) else [value]:
            if not re.fullmatch(r"\s*[0-9]{1,9}\s*", str(rank)):
                raise ValueError(f"a rank is a whole number from 0 up, or one for each matrix group, not '{rank}'")
        return value

    @model_validator(mode="after")
    def _middle_is_keep_1(self) -> "InitRecipe":
        if (self.sharing or "").startswith("middle_") and self.keep not in (None, 0, 1):
            raise ValueError(f"sharing '{self.sharing}' keeps one layer at each end, but keep is {self.keep}")
        return self

    @model_validator(mode="after")
    def _one_size(self) -> "InitRecipe":
        given = [name for name in (*TARGETS, "rank") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} both say how much to store; give one of them")
        if self.quantize != "none" and self.size is None:
            raise ValueError("quantize says in which numbers a size is counted; add a size")
        if self.pattern == "auto" and not self.has_target:
            raise ValueError("sharing 'auto' needs something to choose under: add a size or a budget")
        if self.pattern == "auto" and self.start != "joint" and not self.keeps_weights:
            raise ValueError(f"sharing 'auto' goes by what the loss feels: shared_init must be joint, not {self.start}")
        if self.pattern == "auto" and (self.keep or self.loops != type(self).model_fields["loops"].default):
            raise ValueError("sharing 'auto' chooses what is tied, so keep and loops say nothing: name a pattern too")
        if self.start == "joint" and self.lora_init == "zero":
            raise ValueError("shared_init 'joint' chooses the LoRA too, so lora_init cannot be zero")
        return self

    @model_validator(mode="after")
    def _kv_fields_need_a_budget(self) -> "InitRecipe":
        fields = {name: field for name, field in type(self).model_fields.items() if name.startswith("kv_")}
        asked = [name for name, field in fields.items() if getattr(self, name) != field.default]
        if self.kv_budget is None and asked:
            raise ValueError(f"{asked[0]} says how a KV budget is met; add kv_budget")
        if self.kv_kinds[0] == "last_loop" and self.kv_choice != "last":
            raise ValueError(
                "not every visit can have kv_kinds 'last_loop'; name window first, or it alone with kv_choice 'last'"
            )
        if len(self.kv_kinds) > 1 and self.kv_choice != "measured":
            raise ValueError(f"which of kv_kinds costs least is measured; with kv_choice '{self.kv_choice}', name one")
        if "linear" in self.kv_kinds and self.has_target and not self.keeps_weights:
            raise ValueError(
                "the feature maps of kv_kinds 'linear' are parameters, which no size or budget counts yet; plan the "
                "cache afterwards, of the folder that is written"
            )
        return self

    @field_validator("kv_kinds", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _kinds_from_text(cls, value: Any) -> Any:
        kinds = value.split(",") if isinstance(value, str) else value
        return list(dict.fromkeys(str(kind).strip() for kind in kinds)) if isinstance(kinds, list) else kinds

    @field_validator("calibrate_on", mode="before", json_schema_input_type=str | list[str])
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    def resolved(self) -> dict[str, Any]:
        rank = None if self.has_target else DEFAULT_RANK if self.rank is None else self.rank
        defaults = {"sharing": self.pattern, "keep": self.kept_at_each_end, "shared_init": self.start, "rank": rank}
        return self.model_dump() | defaults

    @property
    def has_target(self) -> bool:
        """Whether a size or a budget says how much to store."""
        return any(getattr(self, name) is not None for name in TARGETS)

    @property
    def keeps_weights(self) -> bool:
        """Whether nothing is tied and every weight stays as it is: with size or budget 1, and nothing that says
        otherwise."""
        return 1 in (self.budget, self.size) and self.sharing in (None, "auto") and self.shared_init is None

    @property
    def reads_text(self) -> bool:
        """Whether anything is chosen by what the model does on text."""
        return self.start == "joint" or (self.kv_budget is not None and self.kv_choice == "measured")

    @property
    def pattern(self) -> str:
        """`sharing`, or what it is where it is not given."""
        if self.sharing is not None:
            return self.sharing
        if self.keeps_weights:
            return "auto"
        return "middle_cycle" if self.has_target and self.keep is None else "cycle"

    @property
    def start(self) -> str:
        """`shared_init`, or what it is where it is not given."""
        return self.shared_init or ("joint" if self.has_target and not self.keeps_weights else "average")

    @property
    def order(self) -> str:
        """`cycle` or `sequence`: the pattern without what it says about `keep`."""
        return self.pattern.removeprefix("middle_")

    @property
    def kept_at_each_end(self) -> int:
        """`keep`, or 1 where the sharing is called `middle_…`."""
        return 1 if self.pattern.startswith("middle_") else self.keep or 0

    def rank_of(self, group: str) -> int:
        """The rank asked for a matrix group; a group that a mapping leaves out gets no LoRA. 0 with a size or a
        budget, under which it is solved for."""
        rank = self.resolved()["rank"]
        return rank.get(group, 0) if isinstance(rank, dict) else rank or 0
