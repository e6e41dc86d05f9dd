"""init: the mathematics against brute force, folding against the unfolded layer, whole models against the dense one."""

import hashlib
import json

import pytest
import torch
from initialized import logits, recipe
from pico import EVERY_ARCHITECTURE, pico_config, pico_model, save_pico
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from rrtc.errors import RrtcError
from rrtc.init.dry_run import dry_run
from rrtc.init.stage import init
from rrtc.io.provenance import read_provenance
from rrtc.recipe.schema import Recipe
from rrtc.stock.trial import find_folds
from rrtc.tying.tie import tie, truncated_svd

FULL = 10_000  # more than any dimension, so that ranks are clamped to full rank


@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30)])
@pytest.mark.parametrize("rank", [1, 7, 25])
def test_truncated_svd_is_the_optimum_and_balanced(shape, rank):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(rank))
    b, a = truncated_svd(matrix, rank)
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    best = (matrix - (u[:, :rank] * s[:rank]) @ v[:rank]).norm()
    assert (matrix - b @ a).norm() <= best * (1 + 1e-4) + 1e-6 * matrix.norm()
    assert torch.allclose(b.T @ b, a @ a.T, atol=1e-4)  # both are diag(s)


def test_tie_reports_the_energy_that_was_lost_and_restored():
    torch.manual_seed(0)
    layers = [torch.randn(12, 9), torch.randn(12, 9)]
    tied = tie(layers, layers, [3, 3], "svd", torch.float32)
    assert torch.allclose(tied.shared, (layers[0] + layers[1]) / 2)
    residuals = [w - tied.shared for w in layers]
    left = [r - b @ a for r, (b, a) in zip(residuals, tied.factors, strict=True)]
    assert tied.lost == pytest.approx([r.square().sum().item() for r in residuals], rel=1e-5)
    still = [lost - restored for lost, restored in zip(tied.lost, tied.restored, strict=True)]
    assert still == pytest.approx([x.square().sum().item() for x in left], rel=1e-5)
    spectrum = torch.linalg.svdvals(residuals[0])
    assert tied.restored == pytest.approx([spectrum[:3].square().sum().item()] * 2, rel=1e-4)


def test_factors_start_at_nothing_where_the_shared_matrix_is_the_layers_own():
    torch.manual_seed(0)
    layers = [torch.randn(12, 9), torch.randn(12, 9)]
    tied = tie(layers, layers[:1], [3, 3], "svd", torch.float32)
    (b_own, a_own), (b_other, _) = tied.factors
    assert b_own.abs().max() == 0 and a_own.std() > 0.1
    assert b_other.abs().max() > 0


def test_what_rounding_the_shared_matrix_loses_goes_into_the_factors():
    torch.manual_seed(0)
    layers = [torch.randn(12, 9), torch.randn(12, 9)]
    tied = tie(layers, layers, [9, 9], "svd", torch.bfloat16)
    assert torch.equal(tied.shared, tied.shared.bfloat16().float())
    for weight, (b, a) in zip(layers, tied.factors, strict=True):
        assert torch.allclose(tied.shared + b @ a, weight, atol=1e-5)


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@pytest.mark.parametrize("sharing, loops", [("cycle", 2), ("sequence", 3)])
def test_full_rank_reproduces_the_dense_logits(architecture, sharing, loops, dense, tmp_path):
    init(str(dense(architecture)), str(tmp_path / "out"), recipe(sharing=sharing, loops=loops, rank=FULL))
    assert (logits(tmp_path / "out") - logits(dense(architecture))).abs().max() <= 1e-4


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("shared_init", ["stepwise", "lower", "upper"])
def test_full_rank_reproduces_the_dense_logits_from_every_start(architecture, shared_init, dense, tmp_path):
    choices = {"shared_init": shared_init, "rank": FULL, "sharing": "middle_cycle", "fold_norms": False}
    init(str(dense(architecture)), str(tmp_path / "out"), recipe(**choices))
    assert (logits(tmp_path / "out") - logits(dense(architecture))).abs().max() <= 1e-4


def test_folded_norms_can_be_shared_without_loss(dense, tmp_path):
    """Llama's two norms fold into the matrices; what is left of them is one, in every layer."""
    init(str(dense("llama")), str(tmp_path / "folded"), recipe(rank=FULL, norms="shared"))
    assert (logits(tmp_path / "folded") - logits(dense("llama"))).abs().max() <= 1e-4
    init(str(dense("llama")), str(tmp_path / "mean"), recipe(rank=FULL, norms="shared", fold_norms=False))
    assert (logits(tmp_path / "mean") - logits(dense("llama"))).abs().max() > 1e-2


FOLDS = {
    "llama": {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
              "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    "gemma3": {"input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
               "pre_feedforward_layernorm": ("mlp.gate_proj", "mlp.up_proj")},
    "phi3": {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
    "gpt_neox": {"input_layernorm": ("attention.query_key_value",),
                 "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
    "gpt2": {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    "olmo2": {},
}  # fmt: skip


@pytest.mark.parametrize("architecture", FOLDS)
def test_the_norms_that_fold_are_found_by_watching_a_layer(architecture):
    folds, others = find_folds(pico_config(architecture))
    assert {fold.norm: fold.readers for fold in folds} == FOLDS[architecture]
    assert {fold.offset for fold in folds} <= ({1.0} if architecture == "gemma3" else {0.0})
    assert not set(others) & set(FOLDS[architecture])


def test_a_norm_whose_bias_has_nowhere_to_go_is_not_folded():
    """GPT-NeoX without attention biases: the LayerNorm's own bias cannot move into the projection."""
    folds, others = find_folds(pico_config("gpt_neox", attention_bias=False))
    assert [fold.norm for fold in folds] == ["post_attention_layernorm"]
    assert "input_layernorm" in others


def test_the_mean_of_the_tied_layers_is_stored(dense, tmp_path):
    init(str(dense("llama")), str(tmp_path / "out"), recipe(fold_norms=False, rank=4))
    with safe_open(dense("llama") / "model.safetensors", "pt") as weights:
        mean = sum(weights.get_tensor(f"model.layers.{layer}.mlp.up_proj.weight") for layer in (1, 4)) / 2
        norm = weights.get_tensor("model.layers.4.input_layernorm.weight")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as weights:
        assert torch.allclose(weights.get_tensor("model.slots.1.shared.mlp.up_proj.weight"), mean, atol=1e-6)
        assert torch.equal(weights.get_tensor("model.slots.1.loops.1.input_layernorm.weight"), norm)


def test_zero_init_starts_at_the_plain_looped_model(dense, tmp_path):
    init(str(dense("qwen2")), str(tmp_path / "zero"), recipe(lora_init="zero", rank=8))
    init(str(dense("qwen2")), str(tmp_path / "none"), recipe(rank=0))
    assert torch.allclose(logits(tmp_path / "zero"), logits(tmp_path / "none"), atol=1e-5)


def test_the_input_is_left_alone_and_the_output_is_small(dense, tmp_path):
    def contents():
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in dense("llama").iterdir()}

    before = contents()
    measured = init(str(dense("llama")), str(tmp_path / "out"), recipe(rank=4, max_shard_size="200KB"))
    assert contents() == before
    shards = list((tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and all(shard.stat().st_size < 220_000 for shard in shards)
    assert measured["bytes"] == 4 * measured["params_total"]
    assert read_provenance(tmp_path / "out")["measured"]["init"] == measured


def test_the_closing_measurement_is_the_loss_of_both_models(dense, tmp_path):
    asked = Recipe.model_validate({"init": {"rank": FULL, "measure_tokens": 500}, "eval": {"context": 64}})
    loss = init(str(dense("llama")), str(tmp_path / "out"), asked)["loss"]
    assert loss["tokens"] == 8 * 63
    assert loss["after_init"] == pytest.approx(loss["dense"], abs=1e-3) and loss["dense"] > 1


def test_tied_and_untied_embeddings(tmp_path):
    for tied in (True, False):
        source = save_pico(tmp_path / f"dense-{tied}", "llama", tie_word_embeddings=tied)
        init(str(source), str(tmp_path / f"out-{tied}"), recipe(rank=FULL))
        assert (logits(tmp_path / f"out-{tied}") - logits(source)).abs().max() <= 1e-4
        with safe_open(tmp_path / f"out-{tied}" / "model.safetensors", "pt") as weights:
            assert ("lm_head.weight" in weights.keys()) is not tied  # noqa: SIM118 - not a dictionary


def test_a_checkpoint_of_the_bare_decoder_is_read(tmp_path):
    """As GPT-2's on the hub: names without the prefix of the causal language model."""
    model = pico_model("gpt2")
    source = save_pico(tmp_path / "dense", "gpt2")
    model.base_model.save_pretrained(source)
    init(str(source), str(tmp_path / "out"), recipe(rank=FULL))
    with torch.no_grad():
        ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(7))
        assert (logits(tmp_path / "out") - model(ids).logits).abs().max() <= 1e-4


def test_a_config_that_does_not_fit_its_weights_is_refused(dense, tmp_path):
    config = json.loads((dense("llama") / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    for file in dense("llama").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 81}))
    with pytest.raises(RrtcError, match="has shape .*, but the config asks for"):
        init(str(other), str(tmp_path / "out"), recipe())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_dry_run_needs_nothing_but_the_config(dense, tmp_path):
    (tmp_path / "config.json").write_bytes((dense("qwen3") / "config.json").read_bytes())
    from_config = dry_run(str(tmp_path), recipe())
    from_weights = dry_run(str(dense("qwen3")), recipe())
    assert from_config | {"model": None} == from_weights | {"model": None}
    written = init(str(dense("qwen3")), str(tmp_path / "out"), recipe())
    assert from_config["params_total"] == written["params_total"] and from_config["bytes"] == written["bytes"]


def test_a_tied_head_that_the_file_repeats_is_stored_once(tmp_path):
    source = save_pico(tmp_path / "dense", "llama", tie_word_embeddings=True)
    tensors = load_file(source / "model.safetensors")
    copied = tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(copied, source / "model.safetensors", metadata={"format": "pt"})
    measured = init(str(source), str(tmp_path / "out"), recipe(rank=FULL))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "lm_head.weight" not in stored
    assert sum(tensor.numel() for tensor in stored.values()) == measured["params_total"]
    assert (logits(tmp_path / "out") - logits(source)).abs().max() <= 1e-4


def test_without_tying_nothing_is_lost_or_kept(dense, tmp_path):
    measured = init(str(dense("llama")), str(tmp_path / "out"), recipe(loops=1, dtype="bfloat16"))
    assert measured["residual_energy_kept"] == measured["residual_energy_kept_by_layer"] == {}


def test_what_the_factors_kept_is_said_by_matrix_and_by_layer(dense, tmp_path):
    asked = recipe(loops=2, rank=5, measure_tokens=0, dtype="float32", fold_norms=False)
    measured = init(str(dense("llama")), str(tmp_path / "out"), asked)
    source, ours = load_file(dense("llama") / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    lost, kept = {}, {}
    for name, weight in source.items():
        parts = name.split(".")
        if "layers" not in parts or weight.dim() == 1:
            continue
        layer, matrix = int(parts[2]), ".".join(parts[3:-1])
        slot = f"model.slots.{layer % 3}"
        own = f"{slot}.loops.{layer // 3}.{matrix}"
        residual = weight - ours[f"{slot}.shared.{matrix}.weight"]
        lost[layer, matrix] = residual.square().sum().item()
        left = (residual - ours[f"{own}.B"] @ ours[f"{own}.A"]).square().sum().item()
        kept[layer, matrix] = lost[layer, matrix] - left
    for place, field in enumerate(("residual_energy_kept_by_layer", "residual_energy_kept")):
        expected = {
            one: sum(kept[key] for key in kept if key[place] == one)
            / sum(lost[key] for key in lost if key[place] == one)
            for one in {key[place] for key in kept}
        }
        assert measured[field] == pytest.approx(expected, abs=1e-3)
    assert list(measured["residual_energy_kept_by_layer"]) == list(range(6))


def test_a_compressed_model_is_not_compressed_again(dense, tmp_path):
    init(str(dense("llama")), str(tmp_path / "out"), recipe())
    with pytest.raises(RrtcError, match="is compressed already"):
        init(str(tmp_path / "out"), str(tmp_path / "again"), recipe())


def test_numbers_too_large_for_the_format_are_refused(tmp_path):
    source = save_pico(tmp_path / "dense")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.2.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * 1e7}, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RrtcError, match="down_proj.* does not fit float16"):
        init(str(source), str(tmp_path / "out"), recipe(dtype="float16"))
    assert not (tmp_path / "out").exists()
    init(str(source), str(tmp_path / "fits"), recipe(dtype="bfloat16"))


def test_a_dry_run_passes_over_an_index_whose_weights_were_not_fetched(dense, tmp_path):
    (tmp_path / "config.json").write_bytes((dense("llama") / "config.json").read_bytes())
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert dry_run(str(tmp_path), recipe())["params_total"] == dry_run(str(dense("llama")), recipe())["params_total"]
