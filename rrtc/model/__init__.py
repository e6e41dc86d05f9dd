"""The recursive model. Importing this package registers it, so that transformers' Auto classes load it by name."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from .configuration_rrt import RrtConfig
from .modeling_rrt import RrtForCausalLM, RrtForSequenceClassification, RrtForTokenClassification, RrtModel

AutoConfig.register("rrt", RrtConfig, exist_ok=True)
AutoModel.register(RrtConfig, RrtModel, exist_ok=True)
AutoModelForCausalLM.register(RrtConfig, RrtForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(RrtConfig, RrtForSequenceClassification, exist_ok=True)
AutoModelForTokenClassification.register(RrtConfig, RrtForTokenClassification, exist_ok=True)
