"""The recursive form as vLLM runs it: its backend for transformers models, told what it cannot see by itself.

vLLM imports this by the name that vllm_plugin.py gives it; nothing else of rrtc does.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import replace

from torch import Tensor, nn
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.transformers import TransformersForCausalLM

from rrtc.errors import RrtcError
from rrtc.features import check_carried
from rrtc.model import RrtConfig
from rrtc.model.graft_rrt import RelaxedLinear, find_layers
from rrtc.plan import features_of, read_visits

SLIDING, FULL = "sliding_attention", "full_attention"  # transformers' names, by which vLLM knows a layer with a window


class RrtForCausalLM(TransformersForCausalLM):
    """As vLLM's class of that name; vLLM calls `recursive_replace` while it builds the model, on the meta device.

    Raises RrtcError for visits that see what vLLM cannot be told: see `windows_of`.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        config = vllm_config.model_config.hf_config
        self.windows = windows_of(config)
        settings = config.get_text_config()
        with _restored(config, "visits", "table_bits"), _restored(settings, "layer_types", "sliding_window"):
            # vLLM has embeddings of its own, which get the tables as floating-point numbers.
            config.table_bits = None
            # Its own attention does the windows, so the model is built without.
            config.visits = [replace(visit, attention=None).fields() for visit in read_visits(config.visits)]
            super().__init__(vllm_config=vllm_config, prefix=prefix)
        for number, window in self.windows.items():
            if self.attention_instances[number].sliding_window != window:
                raise RrtcError(f"This vLLM does not give layer {number} the window of {window} tokens that it has.")
        # A divisor of the logits (Granite's). vLLM's backend knows only the other name, logit_scale, of a factor.
        self.logits_processor.scale /= getattr(self.text_config, "logits_scaling", 1.0)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(floating(weights))

    def recursive_replace(self):
        _part_classes(self.model)
        super().recursive_replace()
        # vLLM reads the number of an attention layer off the path of its module, in which no other number may stand.
        # The path has two, slots.k.loops.b; but the module is also reached by way of the visit that stands in the list
        # of layers, at that number.
        layers_of_model = self.text_config.num_hidden_layers
        parent, name = find_layers(self.model, layers_of_model)
        layers = next(path for path, module in self.named_modules() if module is getattr(parent, name))
        for number, (path, fuser) in self.attention_fusers.items():
            inside = path.partition(".loops.")[2].partition(".")[2]
            self.attention_fusers[number] = f"{layers}.{number}.{inside}", fuser
        if self.windows:
            # vLLM makes its attention layers next, by what the config says. The stock model is there already, and must
            # not take these for kinds of its own: when the model is built, they are gone again.
            self.text_config.layer_types = [SLIDING if n in self.windows else FULL for n in range(layers_of_model)]
            (self.text_config.sliding_window,) = set(self.windows.values())


def floating(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """`weights` by name, with tables that are stored in int8 rows (model/rows_rrt.py) as the stock model has them."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        module, inside, part = name.rpartition(".table.")
        if not inside:
            yield name, tensor
            continue
        parts = waiting.setdefault(module, {})
        parts[part] = tensor
        if len(parts) == 2:
            del waiting[module]
            yield f"{module}.weight", parts["numbers"].to(parts["scale"].dtype) * parts["scale"]


def windows_of(config: RrtConfig) -> dict[int, int]:
    """The window of each layer that has one, by its number, where visits see windows; empty where none does, and vLLM
    reads what there is off the dense model's config. Raises RrtcError for what vLLM has no word for."""
    visits, base = read_visits(config.visits), config.get_text_config()
    features = features_of(visits)
    if not features:
        return {}
    hint = "Run it in transformers, or plan its attention by whole visits and without sinks, as vLLM has it."
    check_carried("vLLM", features, hint)
    kinds = getattr(base, "layer_types", None) or []
    windows = {number: base.sliding_window for number, kind in enumerate(kinds) if kind == SLIDING}
    windows |= {number: visit.attention.window for number, visit in enumerate(visits) if visit.attention is not None}
    if len(widths := sorted(set(windows.values()))) > 1:
        raise RrtcError(
            f"vLLM cannot run this model, whose layers have windows of {' and '.join(map(str, widths))} tokens: it "
            "knows one width for all.",
            "Plan the attention with one width, or run the model in transformers.",
        )
    return windows


@contextlib.contextmanager
def _restored(config: PreTrainedConfig, *names: str) -> Iterator[None]:
    """After the block, the settings of these `names` are what they were, or are gone."""
    before = {name: vars(config)[name] for name in names if name in vars(config)}
    try:
        yield
    finally:
        for name in names:
            vars(config).pop(name, None)
        vars(config).update(before)


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
