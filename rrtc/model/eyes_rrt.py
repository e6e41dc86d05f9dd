"""A rule of attention at work on a stock decoder layer, whose code stays as it is.

    base model      notes where the document of each token begins (Documents)
    Visit           puts a Sight in the place of the attention mask, and its own layer into the cache (Eyes)
    attention       stock code all through; its kernel is looked up by name, and the name is ours (attend), which runs
                    the kernel that the user chose once for the heads that see everything and once for the others

This file is shipped in every export beside attention_rrt.py and imports nothing but torch and transformers.
"""

import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_rrt import KeptLayer, Rule, Sight

KERNEL = "rrt"  # the name of `attend` among transformers' attention functions
MASKED_KERNELS = ("sdpa", "eager")  # those that can be told for each query what it sees


class Documents:
    """Where documents begin in the batch that a model works on: after the padding on the left, and where positions
    begin anew. The base model `model` notes it at every forward pass, and its visits read it."""

    def __init__(self, model: nn.Module):
        self._names = list(inspect.signature(type(model).forward).parameters)[1:]
        self.start: Tensor | None = None  # (rows or 1, tokens or 1), columns; None: all of them at 0

    def note(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """To be registered as a hook before the forward pass of that model, with keyword arguments. Raises ValueError
        where the model is to run a kernel that its visits cannot do with, before one of them has."""
        kernel_of(model.config)
        given = dict(zip(self._names, args, strict=False)) | kwargs
        tokens = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        positions, mask = given.get("position_ids"), given.get("attention_mask")
        starts = []
        if isinstance(mask, Tensor) and mask.dim() == 2:
            starts.append(mask.int().argmax(-1, keepdim=True))
        if isinstance(positions, Tensor) and positions.dim() == 2:
            cache = cache_in(given)
            past = 0 if cache is None else int(cache.get_seq_length())
            columns = past + torch.arange(tokens.shape[1], device=positions.device)
            # Positions skip what is masked, also within a document.
            if starts and mask.shape[1] >= past + tokens.shape[1]:
                columns = (starts[0] + mask.int().cumsum(-1) - 1)[:, columns]
            starts.append((columns - positions).clamp(min=0))
        start = None
        for one in starts:
            start = one if start is None else torch.maximum(start, one)
        self.start = None if start is None or not start.any() else start


def kernel_of(config) -> str:
    """The attention kernel that a stock config names. Raises ValueError for one that takes no masks."""
    chosen = config._attn_implementation
    if chosen not in MASKED_KERNELS:
        named = " or ".join(MASKED_KERNELS)
        raise ValueError(f"A model with visits that see a window needs the kernel {named}, and not {chosen}.")
    return chosen


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask, **kwargs):
    """The attention function of visits that do not attend to everything."""
    chosen = kernel_of(module.config.stock)
    run = ALL_ATTENTION_FUNCTIONS.get_interface(chosen, eager_kernel(module))
    if not isinstance(attention_mask, Sight):
        raise TypeError("a visit with a rule of attention was called without its Sight")
    return attention_mask.attend(run, module, query, key, value, adds_mask=chosen == "eager", **kwargs)


AttentionInterface.register(KERNEL, attend)


class KernelConfig:
    """The config that an attention module reads, with our kernel in the place of the one that the user chose."""

    _attn_implementation = KERNEL

    def __init__(self, stock: PreTrainedConfig):
        self.__dict__["stock"] = stock

    def __getattr__(self, name):
        if name.startswith("__") or name == "stock":  # copies are made before there is anything inside
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __setattr__(self, name, value):
        setattr(self.stock, name, value)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module of a decoder layer that looks its kernel up by name; None where there is no such one."""
    found = [m for m in layer.modules() if m is not layer and hasattr(m, "layer_idx") and hasattr(m, "config")]
    return found[0] if len(found) == 1 and eager_kernel(found[0]) else None


def eager_kernel(attention: nn.Module) -> Callable | None:
    """The kernel that modules which look theirs up have beside them, for when none is chosen."""
    return getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)


class Eyes:
    """A rule at work on one decoder layer: it arranges what the layer is called with."""

    def __init__(
        self, layer: nn.Module, rule: Rule, documents: Documents | None = None, sight: Callable[..., Sight] = Sight
    ):
        """Has the attention of `layer` run our kernel from now on. documents: None where every row is one document.
        sight: what makes the Sights."""
        attention = attention_of(layer)
        if attention is None:
            raise ValueError(f"the attention in a {type(layer).__name__} cannot be told which keys to see")
        self.layer, self.rule, self.documents, self.sight = layer, rule, documents, sight
        self.place = attention.layer_idx
        self.attention, attention.config = attention, KernelConfig(attention.config)
        self.names = list(inspect.signature(type(layer).forward).parameters)[1:]

    def arrange(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of the layer by name, with a Sight for a mask, and the cache prepared."""
        given = self.named(args, kwargs)
        cache = cache_in(given)
        kept, past = None, 0
        if cache is not None:
            prepare(cache, {self.place: self.rule})
            layer = cache.layers[self.place] if self.place < len(cache.layers) else None
            past = int(layer.get_seq_length()) if layer is not None else 0
            kept = layer if isinstance(layer, KeptLayer) else None
            if layer is not None and (layer.is_sliding or not isinstance(layer, DynamicLayer | StaticLayer)):
                raise ValueError(f"a visit with a rule of its own cannot use a {type(layer).__name__} in the cache")
        start = None if self.documents is None else self.documents.start
        given["attention_mask"] = self.sight(self.rule, given.get("attention_mask"), start, past, kept)
        return given

    def named(self, args: tuple, kwargs: dict) -> dict:
        """The arguments of the layer by name, without the cache where the layer would let go of it later on: where it
        computes its activations again for the gradient, because a cache cannot be written twice."""
        given = dict(zip(self.names, args, strict=False)) | kwargs
        if self.layer.training and getattr(self.layer, "gradient_checkpointing", False):
            given = {name: None if isinstance(value, Cache) else value for name, value in given.items()}
        return given

    def run(self, visit: nn.Module, args: tuple, kwargs: dict):
        """What the layer of `visit` makes of its arguments."""
        given = self.arrange(args, kwargs)
        return visit.slot()(given.pop(self.names[0]), loop=visit.loop, **given)

    def close(self) -> None:
        """Gives the attention its own kernel back."""
        self.attention.config = self.attention.config.stock


def cache_in(given: dict) -> Cache | None:
    """The cache among arguments by name: architectures call it differently."""
    return next((value for value in given.values() if isinstance(value, Cache)), None)


def prepare(cache, rules: dict[int, Rule]) -> None:
    """Puts KeptLayers into the places of a `cache` to which nothing was written yet. Caches that keep everything in
    another way (static ones) stay as they are: they give the same results, and save nothing."""
    if not isinstance(cache, Cache):
        return
    for place, rule in rules.items():
        while cache.layer_class_to_replicate is DynamicLayer and len(cache.layers) <= place:
            cache.layers.append(DynamicLayer())
        layer = cache.layers[place] if place < len(cache.layers) else None
        if type(layer) is DynamicLayer and not layer.is_initialized:
            cache.layers[place] = rule.place()
