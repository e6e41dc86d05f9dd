"""Configuration of a Relaxed Recursive Transformer: the dense model's own config and the list of visits.

This file is shipped in every export beside modeling_rrt.py and imports nothing but transformers.
"""

import copy
import dataclasses

from transformers import CONFIG_MAPPING, PreTrainedConfig

# What the outside world asks a config for. They are answered by the dense model's config and stored nowhere else.
ANSWERED_BY_BASE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "layer_types", "sliding_window", "use_cache",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
)  # fmt: skip


class RrtConfig(PreTrainedConfig):
    """Configuration of `RrtForCausalLM` and `RrtModel`.

    Fields:
        base_config: the dense model's config (an object, or the dictionary of its config.json). Its number of layers
            is the number of visits: every visit has its own place in the KV cache.
        visits: one dictionary a visit, in running order: `layer` (the dense layer it stands for), `slot` (the shared
            weights it uses), `loop` (its place among the slot's visits), `ranks` (LoRA rank of each matrix by its
            path in the layer; 0 means none), and two that may be empty or absent: `forms` (what a matrix is, by its
            path: "tied", which is the default, the slot's W' + B·A; "low_rank", B·A alone; "own", a full matrix of
            the visit's own, at rank 0) and `shapes` ((inputs, outputs) of the matrices that are smaller than the dense
            layer's, because neurons of the FFN were removed).
        norms: "per_visit", every visit has its own norms and biases; "shared", they are tied like the matrices (the
            bias of a matrix that is not tied stays the visit's own).
    """

    model_type = "rrt"

    base_config: dict | PreTrainedConfig | None = None
    visits: list | None = None
    norms: str = "per_visit"

    @classmethod
    def of(cls, plan, base: PreTrainedConfig, **fields) -> "RrtConfig":
        """The config of the model that a plan (rrtc.plan.Plan) makes of the dense model whose config is `base`."""
        visits = [dataclasses.asdict(visit) for visit in plan.visits]
        return cls(base_config=base, visits=visits, norms=plan.norms, **fields)

    def __post_init__(self, **kwargs):
        base = self.base_config
        if isinstance(base, dict):
            values = dict(base)
            self.base_config = CONFIG_MAPPING[values.pop("model_type")](**values)
        else:
            # A copy: what transformers sets on this config (the attention kernel, the number format) must not reach
            # the dense model that the caller may be using.
            self.base_config = copy.deepcopy(base)
        if base is not None:
            self.base_config._attn_implementation = None  # what the caller's model runs is no choice for this one
            # These say which class and which code load the dense model, and must not load this one.
            self.base_config.architectures = None
            vars(self.base_config).pop("auto_map", None)
            vars(self.base_config).pop("custom_pipelines", None)
        self.visits = [{"forms": {}, "shapes": {}} | visit for visit in self.visits or []]
        super().__post_init__(**kwargs)

    def __getattr__(self, name):
        # Runs only where the ordinary look-up found nothing.
        base = self.__dict__.get("base_config")
        if name in ANSWERED_BY_BASE and base is not None:
            return getattr(base, name)
        raise AttributeError(f"{type(self).__name__} has no attribute '{name}'")

    def get_text_config(self, decoder=None, encoder=None):
        """The dense model's config: caches and embeddings are made from it."""
        return self if self.base_config is None else self.base_config
