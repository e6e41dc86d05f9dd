"""Configuration of a Relaxed Recursive Transformer: the dense model's own config and the list of visits.

This file is shipped in every export beside modeling_rrt.py and imports nothing but transformers.
"""

import copy
import dataclasses

from transformers import CONFIG_MAPPING, PreTrainedConfig

# What is said of the recursive model itself. Everything else is a setting of the dense model, kept in its config alone,
# whoever reads or writes it: the stock model reads it there.
OWN = {
    "model_type", "base_config", "visits", "norms", "table_bits", "architectures", "auto_map", "custom_pipelines",
    "dtype", "name_or_path", "quantization_config", "return_dict", "torch_dtype", "transformers_version",
    "transformers_weights",
}  # fmt: skip
# Settings in names that would otherwise be this object's: private ones, and those that have a default in the class.
PRIVATE_SETTINGS = {"_attn_implementation_internal", "_experts_implementation_internal", "_output_attentions"}
SETTINGS_WITH_DEFAULT = {field.name for field in dataclasses.fields(PreTrainedConfig)} - OWN


def is_setting(name: str) -> bool:
    """Whether an attribute of a RrtConfig is kept in the dense model's config."""
    return name in PRIVATE_SETTINGS or not (name in OWN or name.startswith("_"))


def turns_at(config: PreTrainedConfig) -> int | None:
    """The longest text, in tokens, whose positions are encoded as those of every shorter one; None where all texts are
    alike. Beyond it, RoPE of the kinds that transformers calls longrope and dynamic goes by the length of the text: it
    encodes other positions, those before included."""
    text = config.get_text_config()
    given = getattr(text, "rope_parameters", None) or {}
    limits = []
    for rope in (given, *given.values()):  # of all layers, or of each kind of layer its own
        kind = (rope.get("rope_type") or "") if isinstance(rope, dict) else ""
        if kind == "longrope" and rope.get("short_factor") != rope.get("long_factor"):
            limits.append(rope["original_max_position_embeddings"])
        elif "dynamic" in kind:
            limits.append(text.max_position_embeddings)
    return min(limits, default=None)


class RrtConfig(PreTrainedConfig):
    """Configuration of `RrtForCausalLM` and `RrtModel`.

    Fields:
        base_config: the dense model's config (an object, or the dictionary of its config.json). Its number of layers
            is the number of visits: every visit has its own place in the KV cache.
        visits: one dictionary a visit, in running order: `layer` (the dense layer it stands for), `slot` (the shared
            weights it uses), `loop` (its place among the slot's visits), `ranks` (LoRA rank of each matrix by its
            path in the layer; 0 means none), and what may be empty or absent: `forms` (what a matrix is, by its
            path: "tied", which is the default, the slot's W' + B·A; "low_rank", B·A alone; "own", a full matrix of
            the visit's own, at rank 0) and `shapes` ((inputs, outputs) of the matrices that are smaller than the dense
            layer's, because neurons of the FFN were removed). `attention`, where a visit does not attend to
            everything: `heads` (KV heads that do), `window` and `sinks` (how many of the last and of the first keys
            the other heads see), and what these may have beyond: `landmark` (`size`, `count`, `seed`), blocks of keys
            between; `linear` (`features` and `seed`, of the maps as drawn), sums of what has left their window; or
            `owner` (its `loop`), whose keys and values in another visit of the slot they read on in.
            `gains`, where a visit has some: the paths of tied matrices whose product it multiplies, output by output,
            by a gain of its own. `exit` (true), where there is a linear map to the final norm for what the visit
            returns, to leave the model there.
        norms: "per_visit", every visit has its own norms and biases; "shared", they are tied like the matrices (the
            bias of a matrix that is not tied stays the visit's own).
        table_bits: 8 where embeddings and output projection are int8 rows with a scale each (rows_rrt.py); None where
            they are floating-point numbers, as in the dense model.
    """

    model_type = "rrt"

    base_config: dict | PreTrainedConfig | None = None
    visits: list | None = None
    norms: str = "per_visit"
    table_bits: int | None = None

    @classmethod
    def of(cls, plan, base: PreTrainedConfig, **fields) -> "RrtConfig":
        """The config of the model that a plan (rrtc.plan.Plan) makes of the dense model whose config is `base`."""
        visits = [visit.fields() for visit in plan.visits]
        return cls(base_config=base, visits=visits, norms=plan.norms, **fields)

    def __post_init__(self, **kwargs):
        base = vars(self).pop("base_config")  # until it is back, nothing goes to it
        if isinstance(base, dict):
            values = dict(base)
            base = CONFIG_MAPPING[values.pop("model_type")](**values)
        else:
            # A copy: what transformers sets on this config (the attention kernel, the dtype) must not reach
            # the dense model that the caller may be using.
            base = copy.deepcopy(base)
        if base is not None:
            base._attn_implementation = None  # what the caller's model runs is no choice for this one
            # These say which class and which code load the dense model, and must not load this one.
            base.architectures = None
            vars(base).pop("auto_map", None)
            vars(base).pop("custom_pipelines", None)
        given = {name: kwargs.pop(name) for name in list(kwargs) if is_setting(name) and hasattr(base, name)}
        super().__post_init__(**kwargs)
        self.visits = [{"forms": {}, "shapes": {}} | visit for visit in self.visits or []]
        if base is not None:
            defaults = vars(PreTrainedConfig())
            made = {name: vars(self).pop(name) for name in list(vars(self)) if is_setting(name)}
            given |= {name: value for name, value in made.items() if value != defaults.get(name)}
        self.base_config = base
        for name, value in given.items():
            setattr(self, name, value)

    def __setattr__(self, name, value):
        base = self.__dict__.get("base_config")
        if base is not None and is_setting(name):
            setattr(base, name, value)
        else:
            super().__setattr__(name, value)

    def __getattribute__(self, name):
        if name in SETTINGS_WITH_DEFAULT and (base := self.__dict__.get("base_config")) is not None:
            return getattr(base, name)
        return super().__getattribute__(name)

    def __getattr__(self, name):
        # Runs only where the ordinary look-up found nothing.
        base = self.__dict__.get("base_config")
        if base is not None and is_setting(name) and hasattr(base, name):
            return getattr(base, name)
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")

    def __delattr__(self, name):
        if self.base_config is not None and is_setting(name):
            delattr(self.base_config, name)
        else:
            super().__delattr__(name)

    def to_dict(self):
        """With the dense model's settings beside this config's own, as PEFT and others look for them."""
        own = super().to_dict()
        return own if self.base_config is None else self.base_config.to_dict() | own

    def to_diff_dict(self):
        """What config.json holds: the dense model's settings stand in `base_config` alone."""
        own, written = super().to_dict(), super().to_diff_dict()
        return {name: value for name, value in written.items() if name in own}

    def get_text_config(self, decoder=None, encoder=None):
        """The dense model's config: caches and embeddings are made from it."""
        return self if self.base_config is None else self.base_config
