"""Models of the same size by other methods: as large as they may be, and what their papers say they are."""

import pytest
import torch
from pico import pico_config, save_pico
from transformers import AutoModelForCausalLM

from rrtc.errors import RrtcError
from rrtc.init.baselines import (
    layers_kept,
    low_rank_plan,
    make_baselines,
    shorter_config,
    write_low_rank,
    write_shorter,
)
from rrtc.init.stage import init
from rrtc.io.dense import DenseModel
from rrtc.io.source import find_model, load_for_scoring, read_config
from rrtc.recipe.schema import Recipe
from rrtc.runs import measure
from rrtc.stock.architecture import decoder_layers, read_architecture, read_plan

ARCHITECTURES = ("llama", "gemma3", "gpt2", "qwen3")


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    return torch.randint(3, 300, (4, 64), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_influence_is_that_of_whole_hidden_states(dense, text, tmp_path, architecture):
    folder = dense(architecture)
    plan = low_rank_plan(read_architecture(read_config(folder)), 100_000)
    found = write_low_rank(DenseModel(find_model(str(folder))), plan, text, "float32", tmp_path)
    model, states = AutoModelForCausalLM.from_pretrained(folder).eval(), []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda module, args, kwargs: states.append(args[0]), with_kwargs=True)
        layer.register_forward_hook(lambda module, args, out: states.append(out if torch.is_tensor(out) else out[0]))
    with torch.no_grad():
        model(text)
    expected = [
        1 - torch.cosine_similarity(x, y, dim=-1).mean().item() for x, y in zip(states[::2], states[1::2], strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-5) and len(found) == 6 and min(found) > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropped_layers_are_skipped_and_the_rest_is_as_it_was(dense, text, tmp_path, architecture):
    source = find_model(str(dense(architecture)))
    counted = read_architecture(source.config())
    left = [0, 3, 5]
    write_shorter(DenseModel(source), left, "float32", tmp_path)
    made = load_for_scoring(tmp_path)
    assert read_architecture(made.config).non_embedding < 0.52 * counted.non_embedding
    model = AutoModelForCausalLM.from_pretrained(source.folder).eval()
    layers = decoder_layers(model)
    layers._modules = {str(n): layers[number] for n, number in enumerate(left)}
    kinds = getattr(model.config, "layer_types", None)
    if kinds:
        model.config.layer_types = [kinds[number] for number in left]
    model.config.num_hidden_layers = len(left)
    for number, layer in enumerate(decoder_layers(model)):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    with torch.no_grad():
        torch.testing.assert_close(made(text).logits, model(text).logits, atol=1e-5, rtol=0)


def test_lists_of_layers_in_a_config_are_cut_down():
    made = shorter_config(pico_config("gemma3", eos_token_id=[1, 3, 4, 5, 6, 7]), [0, 2, 5])
    assert made.num_hidden_layers == 3
    assert made.eos_token_id == [1, 3, 4, 5, 6, 7]  # a list of that length by chance
    assert made.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]


def test_layers_go_by_influence_until_the_rest_fits(dense):
    counted = read_architecture(read_config(dense("llama")))
    influence = [0.5, 0.1, 0.4, 0.2, 0.6, 0.3]
    assert layers_kept(counted, influence, counted.non_embedding) == [0, 1, 2, 3, 4, 5]
    assert layers_kept(counted, influence, counted.non_embedding // 2 + 100) == [0, 2, 4]
    with pytest.raises(RrtcError, match="Not one layer of the dense model fits into 10"):
        layers_kept(counted, influence, 10)


def test_whitened_svd_ties_nothing_and_loses_least_on_what_it_sees(dense, text, tmp_path):
    source = find_model(str(dense("llama")))
    counted = read_architecture(source.config())
    target = int(0.7 * counted.non_embedding)
    plan = low_rank_plan(counted, target)
    (tmp_path / "svd").mkdir()
    write_low_rank(DenseModel(source), plan, text, "float32", tmp_path / "svd")
    assert plan == read_plan(read_config(tmp_path / "svd"))
    assert 0.98 * target < plan.non_embedding <= target
    assert len(plan.slots) == 6 and all(set(v.forms.values()) == {"low_rank"} for v in plan.visits)
    # The first q, which sees the same in both models: nothing of that rank comes closer to its outputs.
    dense_model, made = (AutoModelForCausalLM.from_pretrained(f).eval() for f in (source.folder, tmp_path / "svd"))
    seen = []
    q = decoder_layers(dense_model)[0].self_attn.q_proj
    q.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        dense_model(text)
    outputs = seen[0] @ q.weight.T
    values = torch.linalg.svdvals(outputs)
    rank = plan.visits[0].ranks["self_attn.q_proj"]
    least = values[rank:].square().sum()
    relaxed = decoder_layers(made)[0].self_attn.q_proj
    lost = (relaxed(seen[0]) - outputs).square().sum()
    left, kept, right = torch.linalg.svd(q.weight, full_matrices=False)
    plain = (seen[0] @ ((left[:, :rank] * kept[:rank]) @ right[:rank] - q.weight).T).square().sum()
    assert least < lost < 1.1 * least  # the moments of few tokens are damped
    assert lost < 0.9 * plain  # the SVD of the matrix alone


def test_layers_that_depend_on_their_place_are_not_dropped(tmp_path):
    source = find_model(str(save_pico(tmp_path / "dense", "gpt2", scale_attn_by_inverse_layer_idx=True)))
    (tmp_path / "out").mkdir()
    with pytest.raises(RrtcError, match="depends on its place"):
        write_shorter(DenseModel(source), [0, 3, 5], "float32", tmp_path / "out")


def test_a_size_that_cannot_be_is_refused(dense, tmp_path):
    counted = read_architecture(read_config(dense("llama")))
    with pytest.raises(RrtcError, match="with every matrix at rank 1"):
        low_rank_plan(counted, 1000)
    settings = {"init": {"rank": 64, "measure_tokens": 0}}  # more than the dense model has
    init(str(dense("llama")), str(tmp_path / "large"), Recipe.model_validate(settings))
    with pytest.raises(RrtcError, match="nothing that a baseline of its size would have to leave out"):
        make_baselines(tmp_path / "large", tmp_path)


@pytest.mark.slow
def test_an_evaluation_with_baselines_has_them_at_its_size(tmp_path):
    save_pico(tmp_path / "dense")
    tied = Recipe.model_validate({"init": {"rank": 8, "measure_tokens": 0}})
    init(str(tmp_path / "dense"), str(tmp_path / "small"), tied)
    asked = {"baselines": True, "context": 32, "tokens": 128, "passkey_trials": 0, "speed_rounds": 0}
    (tmp_path / "text.txt").write_text("It rained, and then it rained again. " * 60)
    recipe = Recipe.model_validate({"eval": asked | {"text": str(tmp_path / "text.txt"), "sample_tokens": 0}})
    report = measure([str(tmp_path / "small")], recipe, None, None)
    size = report["models"][1]["params_non_embedding"]
    kinds = {row["model"]: row["kind"] for row in report["models"]}
    names = ["dense", "after init", "whitened SVD, nothing tied", "layers dropped, 4 left"]
    quantized = ["dense in int8", "dense in int4"]
    assert list(kinds) == names + quantized and [kinds[name] for name in names[2:] + quantized] == ["baseline"] * 4
    whole, eight, four = (row for row in report["models"] if row["model"].startswith("dense"))
    assert whole["params_total"] == eight["params_total"] == four["params_total"]
    assert whole["bytes"] > eight["bytes"] > four["bytes"]
    assert 0 < eight["scores"]["kl"]["value"] < four["scores"]["kl"]["value"]
    for row in report["models"][2:4]:
        assert 0.8 * size < row["params_non_embedding"] <= size
        assert row["scores"]["bits_per_byte"]["difference"] is not None and row["scores"]["kl"]["value"] > 0
