"""The dense model that rrtc reads is the one that transformers loads, or it is refused."""

import json
from pathlib import Path

import pytest
import torch
from pico import save_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import rrtc.model  # noqa: F401 - registers the recursive model
from rrtc.errors import RrtcError
from rrtc.init.prove import prove
from rrtc.init.stage import init
from rrtc.io.dense import DenseModel
from rrtc.io.source import find_model
from rrtc.io.weights import Weights
from rrtc.recipe.schema import Recipe

CPU = torch.device("cpu")
NOTHING_TIED = Recipe.model_validate({"init": {"loops": 1, "rank": 0, "measure_tokens": 0}})
IDS = torch.arange(40).view(2, 20) * 7 % 320


def dense(folder: Path) -> DenseModel:
    return DenseModel(find_model(str(folder)))


def change(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Other tensors in the weights of a pico model; None takes one out. Dots in names are two underscores."""
    file = folder / "model.safetensors"
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in (load_file(file) | named).items() if tensor is not None}
    save_file(kept, file, metadata={"format": "pt"})
    return folder


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(IDS).logits


@pytest.mark.slow
@pytest.mark.parametrize("stored", ["embedding alone", "head alone", "both alike", "both, and they differ"])
def test_a_head_that_the_config_ties_is_the_one_transformers_uses(stored, tmp_path):
    folder = save_pico(tmp_path / "dense", tie_word_embeddings=True)
    table = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    if stored == "head alone":
        change(folder, lm_head__weight=table, model__embed_tokens__weight=None)
    elif stored == "both alike":
        change(folder, lm_head__weight=table.clone())
    elif stored == "both, and they differ":
        change(folder, lm_head__weight=table.flip(0) / 2)
    model = dense(folder)
    assert model.config.tie_word_embeddings is (stored != "both, and they differ")
    prove(model, CPU)
    init(str(folder), str(tmp_path / "made"), NOTHING_TIED)
    torch.testing.assert_close(logits(tmp_path / "made"), logits(folder), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_of_two_sets_of_weights_the_one_is_read_that_transformers_loads(tmp_path):
    folder, other = save_pico(tmp_path / "dense"), save_pico(tmp_path / "other", "qwen3")
    change(folder, model__norm__weight=torch.full((48,), 2.0))
    stale = load_file(other / "model.safetensors")
    save_file(stale, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
    index = {"weight_map": dict.fromkeys(stale, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in Weights(folder).files] == ["model.safetensors"]
    prove(dense(folder), CPU)
    init(str(folder), str(tmp_path / "made"), NOTHING_TIED)
    torch.testing.assert_close(logits(tmp_path / "made"), logits(folder), rtol=0, atol=1e-5)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    for number in (1, 2):
        save_file({"x": torch.full((3,), float(number))}, tmp_path / f"model-{number}.safetensors")
    index = {"weight_map": {"x": "model-1.safetensors", "y": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RrtcError, match="The tensor x is in two files"):
        Weights(tmp_path)


def test_whole_numbers_are_no_weights(tmp_path):
    folder = save_pico(tmp_path / "dense")
    quantized = torch.randint(-127, 127, (48, 80), dtype=torch.int8)
    change(folder, model__layers__3__mlp__down_proj__weight=quantized)
    with pytest.raises(RrtcError, match=r"layers\.3\.mlp\.down_proj\.weight as I8, a quantized format"):
        dense(folder)


def test_a_quantized_model_is_refused_by_its_config(tmp_path):
    folder = save_pico(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "int-quantized"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RrtcError, match="is quantized, and what was rounded away is gone"):
        find_model(str(folder)).config()


@pytest.mark.parametrize(
    ("other", "hint"),
    [
        ("_orig_mod.model.layers.2.mlp.up_proj.weight", "without what it was wrapped in"),
        ("base_model.model.model.layers.2.mlp.up_proj.weight", "without what it was wrapped in"),
        ("model.layers.2.mlp.up_proj.qweight", "as quantized models have it"),
    ],
)
def test_a_tensor_that_is_there_under_another_name_is_named(other, hint, tmp_path):
    folder, name = save_pico(tmp_path / "dense"), "model.layers.2.mlp.up_proj.weight"
    tensor = load_file(folder / "model.safetensors")[name]
    change(folder, **{name.replace(".", "__"): None, other.replace(".", "__"): tensor})
    with pytest.raises(RrtcError, match=f"The tensor {name} is missing") as refused:
        dense(folder)
    assert other in refused.value.hint and hint in refused.value.hint


def test_a_buffer_with_numbers_of_its_own_is_refused(tmp_path, monkeypatch):
    from rrtc.io import dense as module

    stock_model = module.stock_model

    def with_buffer(config):
        model = stock_model(config)
        model.model.register_buffer("scale", torch.ones(2))
        return model

    monkeypatch.setattr(module, "stock_model", with_buffer)
    folder = change(save_pico(tmp_path / "dense"), model__scale=torch.ones(2))
    dense(folder)
    change(folder, model__scale=torch.tensor([1.0, 2.0]))
    with pytest.raises(RrtcError, match=r"holds the buffer model\.scale with numbers that the config does not give"):
        dense(folder)


def test_a_model_that_is_read_otherwise_than_transformers_does_is_refused_before_any_work(tmp_path, monkeypatch):
    folder, layer = save_pico(tmp_path / "dense"), DenseModel.layer
    monkeypatch.setattr(
        DenseModel, "layer", lambda self, number, device: layer(self, number and number - 1, device)
    )  # one layer off
    with pytest.raises(RrtcError, match="otherwise than transformers does"):
        init(str(folder), str(tmp_path / "made"), NOTHING_TIED)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_configs_for_other_versions_are_refused(tmp_path):
    folder = save_pico(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"configuration_files": ["config.1.0.0.json"]}))
    with pytest.raises(RrtcError, match="names configs for other versions"):
        find_model(str(folder))
