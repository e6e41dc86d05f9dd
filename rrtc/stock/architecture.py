"""What a dense model is made of, read off its config alone: the stock model is built without storage and looked at."""

import contextlib
import copy
from dataclasses import replace

from accelerate import init_empty_weights
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from rrtc.architecture import Architecture, Layer, Matrix
from rrtc.errors import RrtcError, short
from rrtc.model.configuration_rrt import RrtConfig
from rrtc.model.eyes_rrt import attention_of
from rrtc.model.graft_rrt import find_layers, matrices_of, matrix_shape
from rrtc.plan import Plan, read_visits

# The projections that one matrix of an attention block can hold, by a piece of its name; a fused one holds the queries
# and then keys and values of equal width. What is in no row is "o", and what is in no attention block is "ffn".
ATTENTION_NAMES = {
    "query_key_value": ("q", "kv", "kv"), "qkv": ("q", "kv", "kv"), "c_attn": ("q", "kv", "kv"),
    "q_proj": ("q",), "query": ("q",), "k_proj": ("kv",), "key": ("kv",), "v_proj": ("kv",), "value": ("kv",),
}  # fmt: skip
MOST_BUFFER_BYTES = 8 << 30


def stock_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The stock causal language model of `config`, with parameters on the meta device and real buffers.

    Raises RrtcError where transformers has no decoder for this config, or only an encoder, or cannot build it, or where
    its buffers (tables of positions, and masks) would take more than MOST_BUFFER_BYTES.
    """
    kind = type(config)
    advice = "rrtc compresses decoder language models such as Llama, Gemma, Qwen, Mistral, Phi-3, Pythia or GPT-2."
    if config.is_encoder_decoder or kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RrtcError(f"A '{config.model_type}' model is not a decoder language model.", advice)
    if kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        raise RrtcError(f"This '{config.model_type}' model is an encoder: it does not generate text.", advice)
    try:
        with quiet_warnings(), no_init_weights():  # parameters without storage have no values to draw
            with init_empty_weights(include_buffers=True):
                empty = MODEL_FOR_CAUSAL_LM_MAPPING[kind](config)
            taken = sum(buffer.numel() * buffer.itemsize for buffer in empty.buffers())
            if taken > MOST_BUFFER_BYTES:
                raise ValueError(f"its tables of positions would take {taken} bytes")
            with init_empty_weights(include_buffers=False):
                return MODEL_FOR_CAUSAL_LM_MAPPING[kind](config).eval()
    except Exception as error:  # every architecture has its own way to fail over a config that does not add up
        reason = short(error)
        raise RrtcError(f"No '{config.model_type}' model can be built from this config: {reason}") from error


@contextlib.contextmanager
def quiet_warnings():
    """Silence for transformers' remarks about odd configs while a model is built only to be looked at."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The list of decoder layers of a stock `model`. Raises RrtcError where there is no such list."""
    try:
        parent, name = find_layers(model, model.config.get_text_config().num_hidden_layers)
    except (ValueError, AttributeError) as error:
        raise RrtcError(
            f"The decoder layers of this '{model.config.model_type}' model were not found: {error}."
        ) from error
    return getattr(parent, name)


def layers_path(model: PreTrainedModel) -> tuple[str, str]:
    """(the path of the module that holds the list of decoder layers of `model`, the list's name in it)."""
    parent, name = find_layers(model, model.config.get_text_config().num_hidden_layers)
    return next(path for path, module in model.named_modules() if module is parent), name


def transposed_matrices(layer: nn.Module) -> set[str]:
    """The paths of the weight matrices that a stock decoder layer keeps as (inputs, outputs), as GPT-2 does."""
    return {path for path, module in matrices_of(layer).items() if isinstance(module, Conv1D)}


def read_architecture(config: PreTrainedConfig) -> Architecture:
    """The architecture of the dense model of `config`, without its weights.

    Raises RrtcError for a model without decoder layers, or with matrices that are raw parameters (mixture-of-experts
    weights, convolutions), which cannot be tied as linear layers, or with buffers in its layers that are saved with
    it, and where no layer has projections that are known to give keys and values: what its KV cache takes cannot be
    said.
    """
    model = stock_model(config)
    text = config.get_text_config()

    layers, windows = [], windows_of(config)
    for number, layer in enumerate(decoder_layers(model)):
        modules = matrices_of(layer)
        matrices = tuple(_matrix(name, module, text) for name, module in modules.items())
        inside = tuple(f"{name}." for name in modules)
        vectors = {n: p for n, p in layer.named_parameters() if not n.startswith(inside)}
        raw = [name for name, parameter in vectors.items() if parameter.dim() > 1]
        if raw:
            raise RrtcError(
                f"Layer {number} of this '{config.model_type}' model holds {', '.join(raw)} as raw parameters, which "
                "cannot be tied.",
                "rrtc ties linear layers only: mixture-of-experts and state-space models are not supported yet.",
            )
        saved = layer.state_dict().keys()
        if buffers := [name for name, _ in layer.named_buffers() if name in saved]:
            raise RrtcError(
                f"Layer {number} of this '{config.model_type}' model holds {', '.join(buffers)} as buffers that are "
                "saved with it, which tying would lose.",
                "rrtc keeps what a layer has as parameters: layers with saved buffers are not supported yet.",
            )
        made = Layer(matrices, tuple((name, p.numel()) for name, p in vectors.items()))
        layers.append(replace(made, kv_heads=_kv_heads(layer, made.kv_width), window=windows[number]))

    if not any(layer.kv_width for layer in layers):  # some may well have none, and read the keys and values of others
        raise RrtcError(
            f"No layer of this '{config.model_type}' model has projections that are known to give keys and values, so "
            "what its KV cache takes cannot be said.",
            "rrtc ties layers that project to queries, keys and values: latent attention (MLA) is not supported yet.",
        )

    # The output projection counts as a head of its own unless the config ties it to the embedding.
    output = model.get_output_embeddings()
    tied = output is None or bool(getattr(config, "tie_word_embeddings", False))
    outside = {id(p) for layer in decoder_layers(model) for p in layer.parameters()}
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    outside |= {id(p) for p in tables} | {id(p) for p in (output.parameters() if output is not None else ())}
    return Architecture(
        model_type=config.model_type,
        layers=tuple(layers),
        embedding=sum(p.numel() for p in tables),
        head=0 if tied else sum(p.numel() for p in output.parameters()),
        head_flops=output.weight.numel() if output is not None else 0,
        table_rows=sum(map(len, tables)) + (0 if tied else output.weight.shape[0]),
        rest=sum(p.numel() for p in model.parameters() if id(p) not in outside),
        context=getattr(text, "max_position_embeddings", None) or 0,
        width=text.hidden_size,
    )


def read_plan(config: RrtConfig) -> Plan:
    """The plan by which the recursive model of `config` was made."""
    return Plan(read_architecture(config.base_config), read_visits(config.visits), config.norms)


def attending_to_everything(config: RrtConfig) -> RrtConfig:
    """The config of the same model without the windows of its visits. `config` stays as it is."""
    changed = copy.deepcopy(config)
    changed.visits = [{key: value for key, value in visit.items() if key != "attention"} for visit in config.visits]
    return changed


def _kv_heads(layer: nn.Module, kv_width: int) -> int:
    """How many heads the keys and values of the stock `layer` have; 0 where its attention cannot be told what each of
    them is to see, or is not made of equal heads."""
    attention = attention_of(layer)
    width = getattr(attention, "head_dim", None) or getattr(attention, "head_size", None)
    return 0 if not width or kv_width % (2 * width) else kv_width // (2 * width)


def windows_of(config: PreTrainedConfig) -> list[int]:
    """How many keys a query of each stock layer sees, itself included; 0: all. As transformers' caches decide it."""
    types, settings = get_layer_types_and_kwargs(config.get_text_config())
    kinds = zip(types, settings, strict=True)
    return [0 if kind == "full_attention" else own.get("sliding_window") or 0 for kind, own in kinds]


def _matrix(name: str, module: nn.Module, config: PreTrainedConfig) -> Matrix:
    inputs, outputs = matrix_shape(module)
    *parents, last = name.split(".")
    if not any("att" in parent for parent in parents):
        halves = 2 if "gate_up" in last else 1
        parts = (("ffn", outputs // halves),) * halves
    else:
        known = next((groups for piece, groups in ATTENTION_NAMES.items() if piece in last), None)
        if known is None:
            parts = (("o", outputs),)
        elif len(known) == 1:
            parts = ((known[0], outputs),)
        else:
            heads = config.num_attention_heads
            query_width = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
            key_width = (outputs - query_width) // 2
            parts = (("q", query_width), ("kv", key_width), ("kv", key_width))
    return Matrix(name, inputs, outputs, module.bias is not None, parts)
