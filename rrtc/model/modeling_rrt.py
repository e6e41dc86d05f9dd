"""A Relaxed Recursive Transformer over any Hugging Face decoder (Bae et al., ICLR 2025, arXiv 2410.20672).

One class serves every architecture. It builds the stock model from the dense model's own config and replaces only the
list of decoder layers (graft_rrt.py says by what); the stock forward, masks, cache, generation and attention kernels
stay as they are.

This file is shipped in every export beside configuration_rrt.py and imports nothing but torch and transformers.
"""

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.utils import can_return_tuple

from .configuration_rrt import RrtConfig
from .eyes_rrt import prepare
from .graft_rrt import RelaxedLinear, Slot, Visit, graft, rule_of
from .linear_rrt import Maps
from .rows_rrt import BITS, Rows, put_in_rows


class RrtPreTrainedModel(PreTrainedModel):
    """A grafted stock model in the clothes of a class of its own.

    The stock model's children are also the children of this object (they share one dictionary), so that parameters
    keep the names they have in the stock model, and the stock model's forward runs on the same modules.
    """

    config: RrtConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["Slot"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _stock_classes = {}

    def __init__(self, config: RrtConfig):
        base = config.base_config
        if type(base) not in self._stock_classes:
            raise ValueError(
                f"transformers has no {type(self).__name__.removeprefix('Rrt')} for '{base and base.model_type}', of "
                "which this model is made. Load RrtModel (AutoModel) and put a head of your own on its hidden states."
            )
        stock = self._stock_classes[type(base)](base)
        graft(stock, config.visits, config.norms)
        if config.table_bits not in (None, BITS):
            raise ValueError(f"table_bits is {config.table_bits!r}: embeddings can be in {BITS} bits, or as they are")
        if config.table_bits is not None:
            put_in_rows(stock)
        super().__init__(config)
        self._adopt(stock)
        self.base_model_prefix = stock.base_model_prefix
        # A head in rows that is tied reads the embedding's, and has no weight to tie.
        self._tied_weights_keys = stock._tied_weights_keys if config.table_bits is None else None
        self._keys_to_ignore_on_load_unexpected = stock._keys_to_ignore_on_load_unexpected
        self._can_compile_fullgraph = stock._can_compile_fullgraph and not any(map(rule_of, config.visits))
        stock.save_pretrained, stock.base_model.save_pretrained = self.save_pretrained, self._save_base_model
        self.post_init()
        # The dense model's plans for distribution name matrices and layers that are not there.
        for module in (self, stock, stock.base_model):
            module._tp_plan, module._ep_plan, module._pp_plan = {}, {}, {}
        slots = next(name for name, module in self.named_modules() if isinstance(module, Slot)).rpartition(".")[0]
        self._fsdp_plan = {f"{slots}.*": "free_full_weight"}

    def _adopt(self, stock: PreTrainedModel) -> None:
        self.__dict__["stock"] = stock
        self.__dict__["_modules"] = stock._modules

    def _save_base_model(self, *args, **kwargs):
        """`save_pretrained` of the stock base model. Its own would write the dense model's config to these weights."""
        with torch.device("meta"):
            base = RrtModel(self.config)
        base._adopt(self.stock.base_model)
        base.save_pretrained(*args, **kwargs)

    @can_return_tuple
    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
        use_cache=None, output_attentions=None, output_hidden_states=None, **kwargs,
    ):  # fmt: skip
        """As the stock model's forward."""
        given = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache,
            "output_attentions": output_attentions, "output_hidden_states": output_hidden_states,
        }  # fmt: skip
        return self.stock(**{name: value for name, value in given.items() if value is not None}, **kwargs)

    def _init_weights(self, module):
        # The stock model knows its own modules (Gemma's scaled embedding, rotary tables). LoRA starts as nothing.
        self.stock._init_weights(module)
        if isinstance(module, Rows):
            init.zeros_(module.numbers)
            init.ones_(module.scale)

    def initialize_weights(self):
        super().initialize_weights()
        for module in self.modules():
            if isinstance(module, Maps):
                module.reset()
            if isinstance(module, Visit) and module.exit is not None:
                init.eye_(module.exit.weight)
            if isinstance(module, RelaxedLinear):
                if module.rank:
                    init.normal_(module.A, std=module.in_features**-0.5)
                    init.zeros_(module.B)
                if module.bias is not None:
                    init.zeros_(module.bias)
                if module.gain is not None:
                    init.ones_(module.gain)

    def train(self, mode: bool = True):
        self.stock.training = mode
        return super().train(mode)

    def set_attn_implementation(self, *args, **kwargs):
        self.stock.set_attn_implementation(*args, **kwargs)

    def _set_gradient_checkpointing(self, **settings):
        # The stock model has a flag of its own, and is not among this object's modules.
        self.stock._set_gradient_checkpointing(**settings)

    def get_input_embeddings(self):
        return self.stock.get_input_embeddings()

    def set_input_embeddings(self, value):
        self._refuse_in_rows()
        self.stock.set_input_embeddings(value)

    def resize_token_embeddings(self, *args, **kwargs):
        self._refuse_in_rows()
        return super().resize_token_embeddings(*args, **kwargs)

    def _refuse_in_rows(self):
        if self.config.table_bits is not None:
            raise ValueError(
                f"The embeddings of this model are in {self.config.table_bits} bits, and cannot be resized or "
                "replaced. Do it in the model before it was quantized."
            )


class RrtModel(RrtPreTrainedModel):
    """The recursive decoder without its output projection."""

    _stock_classes = MODEL_MAPPING


class RrtWithHead(RrtPreTrainedModel):
    """A recursive decoder with a head that can compute a loss."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
                **kwargs):  # fmt: skip
        """As the stock model's forward."""
        if labels is not None:
            kwargs["labels"] = labels
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache, output_attentions,
            output_hidden_states, **kwargs,
        )  # fmt: skip


class RrtForSequenceClassification(RrtWithHead):
    """The recursive decoder with a label for each sequence."""

    _stock_classes = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


class RrtForTokenClassification(RrtWithHead):
    """The recursive decoder with a label for each token."""

    _stock_classes = MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING


class RrtForCausalLM(RrtWithHead, GenerationMixin):
    """The recursive decoder with its output projection."""

    _stock_classes = MODEL_FOR_CAUSAL_LM_MAPPING

    def __init__(self, config: RrtConfig):
        super().__init__(config)
        self.prepare_inputs_for_generation = self.stock.prepare_inputs_for_generation

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        # Now, because assisted decoding asks the cache to record the past before the first forward pass.
        cache = model_kwargs.get("past_key_values")
        prepare(cache, {place: rule for place, visit in enumerate(self.config.visits) if (rule := rule_of(visit))})
        if cache is not None and generation_config.is_assistant:
            cache.activate_past_recording()

    def _sample(self, *args, generation_config, **kwargs):
        """Greedy and sampled generation; with guesses of an exit, where the generation config has `speculate`."""
        if not getattr(generation_config, "speculate", None):
            return super()._sample(*args, generation_config=generation_config, **kwargs)
        from .speculate_rrt import speculate  # which imports this file

        return speculate(self, *args, generation_config=generation_config, **kwargs)

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, labels=None, use_cache=None, output_attentions=None, output_hidden_states=None,
                logits_to_keep=0, **kwargs):  # fmt: skip
        """As the stock model's forward."""
        return super().forward(
            input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels, use_cache,
            output_attentions, output_hidden_states, logits_to_keep=logits_to_keep, **kwargs,
        )  # fmt: skip

    def get_output_embeddings(self):
        return self.stock.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings):
        self._refuse_in_rows()
        self.stock.set_output_embeddings(new_embeddings)
