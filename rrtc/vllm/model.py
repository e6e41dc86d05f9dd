"""The recursive form as vLLM runs it: its backend for transformers models, told what it cannot see by itself.

vLLM imports this by the name that vllm_plugin.py gives it; nothing else of rrtc does.
"""

from torch import nn
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM

from rrtc.model.modeling_rrt import RelaxedLinear, find_layers


class RrtForCausalLM(TransformersForCausalLM):
    """As vLLM's class of that name; vLLM calls `recursive_replace` while it builds the model, on the meta device."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # A divisor of the logits (Granite's). vLLM's backend knows only the other name, logit_scale, of a factor.
        self.logits_processor.scale /= getattr(self.text_config, "logits_scaling", 1.0)

    def recursive_replace(self):
        _part_classes(self.model)
        super().recursive_replace()
        # vLLM reads the number of an attention layer off the path of its module, in which no other number may stand.
        # The path has two, slots.k.loops.b; but the module is also reached by way of the visit that stands in the list
        # of layers, at that number.
        parent, name = find_layers(self.model, self.text_config.num_hidden_layers)
        layers = next(path for path, module in self.named_modules() if module is getattr(parent, name))
        for number, (path, fuser) in self.attention_fusers.items():
            inside = path.partition(".loops.")[2].partition(".")[2]
            self.attention_fusers[number] = f"{layers}.{number}.{inside}", fuser


def _part_classes(model: nn.Module) -> None:
    """Gives modules that hold relaxed matrices, instead of plain ones in the same places, a class of their own.

    vLLM decides once for a class whether it fuses the matrices of a module, by the first one it meets: one whose
    matrices are all the visit's own would otherwise speak for those that have factors.
    """
    classes: dict[tuple, type] = {}
    for module in model.modules():
        relaxed = tuple(name for name, child in module.named_children() if isinstance(child, RelaxedLinear))
        if relaxed:
            kind = type(module)
            module.__class__ = classes.setdefault((kind, relaxed), type(kind.__name__, (kind,), {}))
