"""The recursive model. Importing this package registers it, so that transformers' Auto classes load it by name."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_rrt import RrtConfig
from .modeling_rrt import RrtForCausalLM, RrtModel

AutoConfig.register("rrt", RrtConfig, exist_ok=True)
AutoModel.register(RrtConfig, RrtModel, exist_ok=True)
AutoModelForCausalLM.register(RrtConfig, RrtForCausalLM, exist_ok=True)
