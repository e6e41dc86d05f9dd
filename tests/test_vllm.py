"""The recursive form and vLLM, without vLLM: what the source of its backend for transformers models (0.33) asks of a
model, and a run of the model as that backend makes it, with stand-ins for vLLM's layers."""

import importlib.util
import inspect
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch
from test_export import IDS, make_rrt
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rrtc.export import vllm_plugin
from rrtc.model import RrtForCausalLM, RrtModel


class Replicated(nn.Module):
    """In the place of vLLM's linear layers, which are no nn.Linear."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight, self.bias)


class Attention:
    """In the place of vLLM's attention of one layer, with a KV cache of its own. One sequence, all heads."""

    def __init__(self):
        self.keys = self.values = None

    def __call__(self, query, key, value, scaling):  # (1, heads, tokens, width) each
        self.keys = key if self.keys is None else torch.cat([self.keys, key], 2)
        self.values = value if self.values is None else torch.cat([self.values, value], 2)
        groups, new, past = query.shape[1] // key.shape[1], query.shape[2], self.keys.shape[2]
        keys, values = (x.repeat_interleave(groups, 1) for x in (self.keys, self.values))
        visible = torch.ones(new, past, dtype=torch.bool).tril(past - new)
        return nn.functional.scaled_dot_product_attention(query, keys, values, visible, scale=scaling)


def attention_of_vllm(module, query, key, value, attention_mask, scaling=None, attention_instances=None, **kwargs):
    mixed = attention_instances[module.layer_idx](query, key, value, scaling)  # (1, heads, tokens, width)
    return mixed.transpose(1, 2).reshape(query.shape[2], -1), None


def replace_linears(module: nn.Module) -> int:
    """As vLLM's recursive_replace does: by the names of the children. Returns how many."""
    replaced = 0
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, Replicated(child))
            replaced += 1
        else:
            replaced += replace_linears(child)
    return replaced


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "vllm", attention_of_vllm)


def as_vllm_builds(folder: Path) -> RrtModel:
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config()._attn_implementation = "vllm"
    config.dtype = torch.float32
    with torch.device("meta"):
        model = AutoModel.from_config(config=config, dtype=torch.float32, trust_remote_code=False)
    assert type(model.get_decoder()) is RrtModel  # what vLLM compiles
    return model


@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3", "phi3", "gpt2"])
def test_the_backend_finds_one_attention_module_for_each_visit(architecture, norms, tmp_path, backend):
    model = as_vllm_builds(make_rrt(tmp_path, architecture, norms))
    assert RrtModel.is_backend_compatible() and RrtModel._can_set_attn_implementation()
    assert {"input_ids", "inputs_embeds", "position_ids"} <= inspect.signature(RrtModel.forward).parameters.keys()
    found = []
    for module in model.modules():
        source = inspect.getsource(type(module).forward)
        if "= ALL_ATTENTION_FUNCTIONS" in source:
            assert source.count(" attention_interface(") == 1
            assert module.config._attn_implementation == "vllm"
            found.append(module.layer_idx)
    assert sorted(found) == list(range(model.config.num_hidden_layers)) and all(type(i) is int for i in found)


@torch.inference_mode()
@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "smollm3"])
def test_it_computes_the_same_with_vllms_layers_and_one_kv_cache_for_each_visit(architecture, norms, tmp_path, backend):
    folder = make_rrt(tmp_path, architecture, norms)
    whole = RrtForCausalLM.from_pretrained(folder).eval()
    ids = IDS[:1]
    expected = whole(ids, output_hidden_states=True).hidden_states[-1]
    model = as_vllm_builds(folder).eval()
    assert replace_linears(model) == len({w for n, w in whole.named_parameters() if ".shared." in n and w.dim() == 2})
    model = model.to_empty(device="cpu")
    given = {name.removeprefix("model."): tensor for name, tensor in whole.state_dict().items()}
    model.load_state_dict({name: given[name] for name in model.state_dict()})
    for name, buffer in whole.named_buffers():  # vLLM leaves buffers where they are
        model.get_buffer(name.removeprefix("model.")).copy_(buffer)
    instances = {number: Attention() for number in range(model.config.num_hidden_layers)}
    states = [
        model(
            input_ids=part, inputs_embeds=None, use_cache=False, position_ids=positions[None],
            attention_instances=instances, return_dict=False,
        )[0]
        for part, positions in zip(
            ids.split([20, 1, 1, 2], 1), torch.arange(ids.shape[1]).split([20, 1, 1, 2]), strict=True
        )
    ]  # fmt: skip
    torch.testing.assert_close(torch.cat(states, 1), expected, atol=1e-5, rtol=0)
    assert {instance.keys.shape[2] for instance in instances.values()} == {ids.shape[1]}


def test_the_plugin_registers_the_text_backend_once(monkeypatch):
    registered = {}
    registry = types.SimpleNamespace(
        get_supported_archs=registered.keys,
        register_model=lambda architecture, where: registered.setdefault(architecture, []).append(where),
    )
    monkeypatch.setitem(sys.modules, "vllm", types.SimpleNamespace(ModelRegistry=registry))
    vllm_plugin.register()
    vllm_plugin.register()
    assert registered == {"RrtForCausalLM": [vllm_plugin.BACKEND]}


def test_the_entry_point_names_it_and_nothing_else_of_rrtc_imports_vllm():
    root = Path(__file__).parent.parent
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    module, _, function = points["rrtc"].partition(":")
    assert getattr(importlib.import_module(module), function) is vllm_plugin.register
    code = "import sys, rrtc.export.vllm_plugin; print(sorted({'vllm', 'torch', 'transformers'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    asking = {file.name for file in (root / "rrtc").rglob("*.py") if "vllm import" in file.read_text()}
    assert asking == {"vllm_plugin.py"}
