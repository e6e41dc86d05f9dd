"""Recursive pico models, and the stock models that compute the same."""

import copy
import functools

import pytest
import torch
from pico import EVERY_ARCHITECTURE, VOCABULARY, pico_config
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.graft_rrt import find_layers
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture

EQUAL = 1e-4
WINDOW = 8  # the sliding window of the pico models: every sequence here is longer

everywhere = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
both_norms = pytest.mark.parametrize("norms", ["per_visit", "shared"])


def rrt_config(architecture: str, base=None, **recipe) -> RrtConfig:
    base = base or pico_config(architecture)
    plan = make_plan(read_architecture(base), InitRecipe(**({"rank": 3} | recipe)))
    return RrtConfig.of(plan, base)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random values in every norm, bias and LoRA factor, so that none of them can be left out unnoticed."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".A", ".B")):
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
            elif parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@functools.cache
@torch.inference_mode(False)  # whoever asks first may be in it, and who comes later may want gradients
def recursive(architecture: str, norms: str = "per_visit", **recipe) -> RrtForCausalLM:
    """A recursive pico model with random weights; shared by tests, which must not change it."""
    torch.manual_seed(sum(architecture.encode()))
    return randomize(RrtForCausalLM(rrt_config(architecture, norms=norms, **recipe)))


def written_out(model: RrtForCausalLM) -> torch.nn.Module:
    """The stock model that computes what `model` should: layer by layer, its weights are read off the names in the
    recursive model's state dict, and W' + B A is multiplied out. Nothing of the recursive model's code is used."""
    base = copy.deepcopy(model.config.base_config)
    stock = AutoModelForCausalLM.from_config(base, dtype=torch.float32).eval()
    parent, name = find_layers(stock, base.num_hidden_layers)
    path = next(p for p, module in stock.named_modules() if module is parent)
    tensors = model.state_dict()
    wanted = {n: tensors[n] for n in stock.state_dict() if not n.startswith(f"{path}.{name}.")}
    for number, (visit, layer) in enumerate(zip(model.config.visits, getattr(parent, name), strict=True)):
        shared, own = f"{path}.slots.{visit['slot']}.shared.", f"{path}.slots.{visit['slot']}.loops.{visit['loop']}."
        for key in layer.state_dict():
            value = tensors[own + key] if own + key in tensors else tensors[shared + key]
            matrix = key.removesuffix(".weight").removesuffix(".bias")
            if key.endswith(".weight") and visit["ranks"].get(matrix):
                value = value + tensors[f"{own}{matrix}.B"] @ tensors[f"{own}{matrix}.A"]
            if own + key not in tensors and f"{own}{matrix}.gain" in tensors:  # of what is tied, a bias too
                value = tensors[f"{own}{matrix}.gain"][(...,) + (None,) * (value.dim() - 1)] * value
            if isinstance(layer.get_submodule(matrix) if key.endswith(".weight") else None, Conv1D):
                value = value.T
            wanted[f"{path}.{name}.{number}.{key}"] = value
    stock.load_state_dict(wanted)
    return stock


@functools.cache
def tokens(rows: int = 2, length: int = 2 * WINDOW + 5) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


def assert_equal(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = EQUAL) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max().item() <= tolerance


@torch.no_grad()
def logits(model, **kwargs) -> torch.Tensor:
    return model(tokens(), **kwargs).logits


@functools.cache
@torch.inference_mode(False)
def double(architecture: str, **recipe) -> RrtForCausalLM:
    """A recursive pico model in float64, in which there are no ties; not to be changed."""
    return copy.deepcopy(recursive(architecture, **recipe)).double()


@functools.cache
def idle_after_the_first_loop(loops: int = 2) -> RrtForCausalLM:
    """A recursive model whose later loops change nothing, so that every draft is right."""
    model = copy.deepcopy(recursive("llama", loops=loops)).double()
    parent, _ = find_layers(model.stock, len(model.config.visits))
    with torch.no_grad():
        for slot in parent.slots:
            for path in ("self_attn.o_proj", "mlp.down_proj"):
                shared = slot.shared.get_submodule(path)
                for loop in list(slot.loops)[1:]:
                    matrix = loop.get_submodule(path)
                    matrix.A, matrix.B = (
                        torch.nn.Parameter(-shared.weight.clone()),
                        torch.nn.Parameter(torch.eye(shared.weight.shape[0], dtype=torch.double)),
                    )
                    matrix.rank = shared.weight.shape[1]
    return model


@functools.cache
def nearly_idle(loops: int) -> RrtForCausalLM:
    """A recursive model whose later loops change little, so that many drafts are right."""
    model = copy.deepcopy(idle_after_the_first_loop(loops))
    parent, _ = find_layers(model.stock, len(model.config.visits))
    with torch.no_grad():
        for slot in parent.slots:
            for loop in list(slot.loops)[1:]:
                for path in ("self_attn.o_proj", "mlp.down_proj"):
                    loop.get_submodule(path).A.mul_(0.8)
    return model
