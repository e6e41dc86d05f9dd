"""The plan: which layers share, with which ranks, and what that costs; checked against the paper and real models."""

import dataclasses
from pathlib import Path

import pytest
import transformers
from pico import ARCHITECTURES, COMMON, WINDOWED, pico_config, pico_model
from transformers import AutoModelForCausalLM

from rrtc.architecture import Architecture, Layer, Matrix
from rrtc.errors import RrtcError, WrongUsage
from rrtc.init.memory import init_bytes
from rrtc.init.slots import source_layers
from rrtc.io.source import read_config
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.plan import savings
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import load_recipe
from rrtc.stock.architecture import decoder_layers, read_architecture, stock_model

PAPER = Path(__file__).parent.parent / "recipes" / "paper"

# Parameters without embeddings in billions, as the paper prints them, for these ranks.
RANKS = (0, 64, 128, 256, 512)
PAPER_TABLE = {
    ("gemma-2b", 2): (0.99, 1.07, 1.15, 1.30, 1.60),
    ("gemma-2b", 3): (0.66, 0.74, 0.82, 0.97, 1.27),
    ("tinyllama-1.1b", 2): (0.48, 0.53, 0.58, 0.68, 0.86),
    ("pythia-1b", 2): (0.40, 0.44, 0.48, 0.55, 0.70),
}

LATENT = {  # attention that keeps one narrow vector of a token
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4,
}  # fmt: skip


def plan_of(config, **recipe):
    return make_plan(read_architecture(config), InitRecipe(**recipe))


def depths(layers: int) -> Architecture:
    """An architecture of so many equal layers of one matrix."""
    layer = Layer((Matrix("mlp.up", 8, 16, False, (("ffn", 16),)),), (("norm.weight", 8),))
    return Architecture("made up", (layer,) * layers, 100, 0, 100, 8)


@pytest.mark.parametrize("norms", ["shared", "per_visit"])
@pytest.mark.parametrize(("model", "loops"), PAPER_TABLE)
def test_every_cell_of_the_papers_parameter_table_is_met_within_a_hundredth_of_a_billion(model, loops, norms):
    architecture = read_architecture(read_config(PAPER / model))
    for rank, cell in zip(RANKS, PAPER_TABLE[model, loops], strict=True):
        plan = make_plan(architecture, InitRecipe(loops=loops, rank=rank, norms=norms))
        assert abs(plan.non_embedding / 1e9 - cell) < 0.01, (rank, plan.non_embedding)


@pytest.mark.parametrize(
    ("model", "non_embedding", "embedding"),
    [("gemma-2b", 1.98, 0.52), ("tinyllama-1.1b", 0.97, 0.13), ("pythia-1b", 0.81, 0.21)],
)
def test_the_papers_dense_models_have_the_papers_sizes(model, non_embedding, embedding):
    dense = read_architecture(read_config(PAPER / model))
    assert round(dense.non_embedding / 1e9, 2) == non_embedding
    assert round((dense.embedding + dense.head) / 1e9, 2) == embedding
    assert dense.parameters == dense.non_embedding + dense.embedding + dense.head


@pytest.mark.parametrize(
    ("model", "sources"),
    [
        ("gemma-2b", [0, 2, 4, 6, 8, 11, 13, 15, 17]),
        ("tinyllama-1.1b", [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21]),
        ("pythia-1b", [0, 2, 4, 6, 9, 11, 13, 15]),
    ],
)
def test_stepwise_takes_the_papers_layers(model, sources):
    plan = plan_of(read_config(PAPER / model), loops=2)
    assert source_layers(plan, "stepwise") == [[layer] for layer in sources]


def test_the_other_ways_to_start_take_all_the_first_or_the_last_layer_of_a_slot():
    plan = make_plan(depths(6), InitRecipe(loops=3))
    assert source_layers(plan, "average") == [[0, 2, 4], [1, 3, 5]]
    assert source_layers(plan, "lower") == [[0], [1]]
    assert source_layers(plan, "upper") == [[4], [5]]


def test_a_kept_layer_is_its_own_source_and_no_other_slots():
    plan = make_plan(depths(8), InitRecipe(loops=3, keep=1))
    for shared_init in ("average", "lower", "upper", "stepwise"):
        first, *tied, last = source_layers(plan, shared_init)
        assert (first, last) == ([0], [7])
        assert all(0 < layer < 7 for layers in tied for layer in layers)
    assert source_layers(plan, "stepwise") == [[0], [1], [6], [7]]


@pytest.mark.parametrize("shared_init", ["average", "lower", "upper", "stepwise"])
def test_all_layers_in_one_slot_have_one_source_list(shared_init):
    expected = {"average": [0, 1, 2], "lower": [0], "upper": [2], "stepwise": [0]}
    assert source_layers(make_plan(depths(3), InitRecipe(loops=3)), shared_init) == [expected[shared_init]]


@pytest.mark.parametrize(
    ("recipe", "slots", "loops"),
    [
        ({"sharing": "cycle"}, [0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]),
        ({"sharing": "sequence"}, [0, 0, 1, 1, 2, 2], [0, 1, 0, 1, 0, 1]),
        ({"sharing": "cycle", "loops": 3}, [0, 1, 0, 1, 0, 1], [0, 0, 1, 1, 2, 2]),
        ({"sharing": "sequence", "loops": 3}, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]),
        ({"sharing": "cycle", "keep": 1}, [0, 1, 2, 1, 2, 3], [0, 0, 0, 1, 1, 0]),
        ({"sharing": "middle_cycle"}, [0, 1, 2, 1, 2, 3], [0, 0, 0, 1, 1, 0]),
        ({"sharing": "middle_sequence"}, [0, 1, 1, 2, 2, 3], [0, 0, 1, 0, 1, 0]),
        ({"sharing": "cycle", "keep": 2}, [0, 1, 2, 2, 3, 4], [0, 0, 0, 1, 0, 0]),
        ({"loops": 6}, [0] * 6, [0, 1, 2, 3, 4, 5]),
        ({"loops": 1}, [0, 1, 2, 3, 4, 5], [0] * 6),
    ],
)
def test_layers_become_visits_in_the_order_of_the_sharing(recipe, slots, loops):
    plan = make_plan(depths(6), InitRecipe(**recipe))
    assert [visit.layer for visit in plan.visits] == list(range(6))
    assert [visit.slot for visit in plan.visits] == slots
    assert [visit.loop for visit in plan.visits] == loops


def test_a_layer_with_weights_of_its_own_gets_no_lora():
    plan = make_plan(depths(6), InitRecipe(keep=1, rank=4))
    assert [visit.ranks["mlp.up"] for visit in plan.visits] == [0, 4, 4, 4, 4, 0]
    assert all(visit.ranks["mlp.up"] == 0 for visit in make_plan(depths(6), InitRecipe(loops=1, rank=4)).visits)


def test_a_rank_is_at_most_the_smaller_side_of_its_matrix():
    assert make_plan(depths(6), InitRecipe(rank=1000)).visits[0].ranks == {"mlp.up": 8}
    for architecture in ARCHITECTURES:
        plan = plan_of(pico_config(architecture), rank=1000)
        for matrix in plan.architecture.layers[0].matrices:
            assert plan.visits[0].ranks[matrix.name] == min(matrix.inputs, matrix.outputs), (architecture, matrix.name)


def test_ranks_follow_the_matrix_groups_and_a_group_left_out_gets_none():
    ranks = plan_of(pico_config("llama"), rank={"q": 3, "ffn": 5}).visits[0].ranks
    assert ranks == {
        "self_attn.q_proj": 3, "self_attn.k_proj": 0, "self_attn.v_proj": 0, "self_attn.o_proj": 0,
        "mlp.gate_proj": 5, "mlp.up_proj": 5, "mlp.down_proj": 5,
    }  # fmt: skip


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_matrix_is_known_by_its_group(architecture):
    dense = read_architecture(pico_config(architecture))
    for matrix in dense.layers[0].matrices:
        name = matrix.name.split(".")[-1]
        if "mlp" in matrix.name:
            expected = {"ffn"}
        elif name in ("query_key_value", "qkv_proj", "c_attn"):
            expected = {"q", "kv"}
        else:
            expected = {"q_proj": {"q"}, "k_proj": {"kv"}, "v_proj": {"kv"}}.get(name, {"o"})
        assert {group for group, _ in matrix.parts} == expected, matrix.name
        assert sum(outputs for _, outputs in matrix.parts) == matrix.outputs, matrix.name


@pytest.mark.parametrize("rank", [4, 16, 32, 64])
def test_phi3s_fused_projections_get_the_lora_of_their_parts(rank):
    """Phi-3 is Mistral with q, k, v in one matrix and gate, up in another: each may differ by the rounding of its rank,
    and a fused matrix never gets more rank than its smaller side."""
    apart, fused = plan_of(pico_config("mistral"), rank=rank), plan_of(pico_config("phi3"), rank=rank)
    assert fused.architecture.parameters == apart.architecture.parameters
    matrices = {matrix.name: matrix for matrix in fused.architecture.layers[0].matrices}
    qkv, gate_up = matrices["self_attn.qkv_proj"], matrices["mlp.gate_up_proj"]
    rounding = (qkv.inputs + qkv.outputs + gate_up.inputs + gate_up.outputs) / 2
    for one, other in zip(apart.visits, fused.visits, strict=True):
        surplus = sum(map(one.factors, apart.matrices(one))) - sum(map(other.factors, fused.matrices(other)))
        clamped = any(other.ranks[m.name] == min(m.inputs, m.outputs) for m in (qkv, gate_up))
        assert surplus >= -rounding if clamped else abs(surplus) <= rounding


def test_pythias_fused_qkv_gets_one_and_a_half_times_the_rank():
    visit = plan_of(read_config(PAPER / "pythia-1b"), rank=256).visits[0]
    assert visit.ranks["attention.query_key_value"] == 384
    assert visit.ranks["attention.dense"] == visit.ranks["mlp.dense_h_to_4h"] == 256


@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_parts_add_up_to_the_parameters_of_the_real_model(architecture, norms):
    config = pico_config(architecture)
    dense = read_architecture(config)
    assert dense.parameters == pico_model(architecture).num_parameters()
    for recipe in ({"rank": 5}, {"rank": 0}, {"rank": {"ffn": 3}, "sharing": "middle_sequence"}, {"loops": 3}):
        plan = make_plan(dense, InitRecipe(norms=norms, **recipe))
        visits = [dataclasses.asdict(visit) for visit in plan.visits]
        model = RrtForCausalLM(RrtConfig(base_config=config, visits=visits, norms=norms))
        by_part = {"embeddings": 0, "head": 0, "shared": 0, "own": 0, "lora": 0, "norms_and_biases": 0}
        for name, parameter in model.named_parameters():
            by_part[part_of(name, plan)] += parameter.numel()
        assert plan.parts == {part: by_part[part] for part in plan.parts}
        assert plan.parameters == model.num_parameters()
        assert plan.non_embedding == plan.parameters - plan.parts["embeddings"] - plan.parts["head"]


def part_of(name: str, plan) -> str:
    """The part of the plan to which a parameter of the real model belongs, by its name alone."""
    if name.endswith((".A", ".B")):
        return "lora"
    matrices = tuple(f".shared.{matrix.name}.weight" for matrix in plan.architecture.layers[0].matrices)
    if name.endswith(matrices):
        slot = int(name.split("slots.")[1].split(".")[0])
        return "shared" if len(plan.slots[slot]) > 1 else "own"
    if name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight", "wpe.weight")):
        return "embeddings"
    return "head" if name.startswith(("lm_head", "embed_out")) else "norms_and_biases"


def test_what_a_token_saves_is_said_from_the_counts():
    begin = "Beside the dense model, a token "
    assert (
        savings(75, 100, 50, 100)
        == begin + "saves 25.0% of the arithmetic and saves 50.0% of the KV cache at 8,192 tokens of context."
    )
    assert savings(1031, 1000, 100, 100) == begin + "takes 3.1% more arithmetic and saves no KV cache."
    assert savings(None, 100, 60, 100) == begin + "saves 40.0% of the KV cache at 8,192 tokens of context."


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_summary_counts_as_the_plan_does(architecture):
    plan = plan_of(pico_config(architecture), rank=4)
    summary = plan.summary(2)
    assert summary["params_total"] == plan.parameters == sum(summary["params_by_part"].values())
    assert summary["bytes"] == 2 * plan.parameters and summary["dense_bytes"] == 2 * plan.architecture.parameters
    assert summary["dense_params_non_embedding"] == plan.architecture.non_embedding
    assert [visit["slot"] for visit in summary["visits"]] == [0, 1, 2, 0, 1, 2]
    assert summary["kv_bytes_per_token"] == plan.kv_bytes_per_token(2)
    assert summary["dense_kv_bytes_per_token"] == plan.architecture.kv_bytes_per_token(2)


def test_the_memory_init_needs_is_a_slot_at_a_time_whatever_is_measured():
    plan = plan_of(read_config(PAPER / "gemma-2b"), loops=2)
    slot = 2 * sum(matrix.size for matrix in plan.architecture.layers[0].matrices)
    tying, running = init_bytes(plan, tokens=0, joint=False), init_bytes(plan, tokens=400_000, joint=False)
    assert 4 * slot < tying < running
    assert init_bytes(plan, tokens=1000, joint=False) < init_bytes(plan, tokens=1000, joint=True)


def test_looping_saves_neither_arithmetic_nor_kv_cache_and_lora_adds_arithmetic():
    config = pico_config("llama")
    dense = read_architecture(config)
    plain, relaxed = make_plan(dense, InitRecipe(rank=0)), make_plan(dense, InitRecipe(rank=4))
    assert plain.flops_per_token == dense.flops_per_token
    assert relaxed.flops_per_token == dense.flops_per_token + 2 * relaxed.parts["lora"]
    more = 100 * (relaxed.flops_per_token / dense.flops_per_token - 1)
    assert plain.savings == "Beside the dense model, a token saves no arithmetic and saves no KV cache."
    assert (
        relaxed.savings == f"Beside the dense model, a token takes {more:.1f}% more arithmetic and saves no KV cache."
    )
    head_dim = config.hidden_size // config.num_attention_heads
    assert plain.kv_bytes_per_token(2) == 6 * 2 * config.num_key_value_heads * head_dim * 2


@pytest.mark.parametrize(
    ("recipe", "sentence", "hint"),
    [
        (
            {"loops": 4},
            "6 layers cannot be divided into 4 loops",
            "loops can be 2, 3, 6; for 4, --sharing cycle --keep 1",
        ),
        (
            {"loops": 3, "keep": 1},
            "6 layers less 2 kept ones cannot be divided into 3 loops",
            "loops can be 2, 4; for 3, --sharing cycle --keep 0.",
        ),
        ({"loops": 7}, "only 6 of the model's 6 layers are left to tie, too few for 7 loops", "Lower keep or loops"),
        ({"keep": 3}, "only 0 of the model's 6 layers are left", "Lower keep or loops"),
        ({"keep": 9}, "only 0 of the model's 6 layers are left", "Lower keep or loops"),
    ],
)
def test_layers_that_cannot_be_divided_are_refused_with_what_would_do(recipe, sentence, hint):
    with pytest.raises(WrongUsage) as error:
        make_plan(depths(6), InitRecipe(**recipe))
    assert sentence in error.value.sentence and hint in error.value.hint


def test_layers_that_differ_cannot_be_tied_and_the_message_says_where():
    plain = depths(4)
    wide = Layer((Matrix("mlp.up", 8, 24, False, (("ffn", 24),)),), (("norm.weight", 8), ("gain", 1)))
    uneven = dataclasses.replace(plain, layers=(wide, *plain.layers[1:]))
    with pytest.raises(WrongUsage, match="Layers 0 and 2 cannot share weights, because they differ in gain, mlp.up"):
        make_plan(uneven, InitRecipe())
    alternating = dataclasses.replace(plain, layers=(wide, plain.layers[0]) * 2)
    with pytest.raises(WrongUsage, match="Layers 0 and 1"):
        make_plan(alternating, InitRecipe(sharing="sequence"))
    assert len(make_plan(alternating, InitRecipe(sharing="cycle")).slots) == 2


def test_a_first_layer_of_another_kind_can_be_kept_but_not_tied():
    """DeepSeek's first layer is dense and its others are mixtures of experts; here both kinds are plain."""
    plain = depths(6)
    other = Layer((Matrix("mlp.up", 8, 32, False, (("ffn", 32),)),), plain.layers[0].vectors)
    uneven = dataclasses.replace(plain, layers=(other, *plain.layers[1:]))
    with pytest.raises(WrongUsage, match="Layers 0 and 3"):
        make_plan(uneven, InitRecipe())
    plan = make_plan(uneven, InitRecipe(keep=1, rank=0))
    assert plan.parts["own"] == 8 * 32 + 8 * 16


def test_a_mixture_of_experts_is_refused_naming_the_raw_parameters():
    config = transformers.MixtralConfig(**COMMON, num_local_experts=4)
    with pytest.raises(RrtcError) as error:
        read_architecture(config)
    assert "mlp.experts.gate_up_proj" in error.value.sentence and "mlp.experts.down_proj" in error.value.sentence
    assert "mixtral" in error.value.sentence and "mixture-of-experts" in error.value.hint
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("YoutuConfig", LATENT),
        ("MiniCPM3Config", LATENT),
        ("DeepseekV3Config", LATENT | {"first_k_dense_replace": 6}),
        ("CTRLConfig", {"dff": 80}),
    ],
)
def test_a_model_whose_keys_and_values_are_not_known_is_refused(kind, own):
    config = getattr(transformers, kind)(**(COMMON | own))
    with pytest.raises(RrtcError) as error:
        read_architecture(config)
    assert f"'{config.model_type}'" in error.value.sentence and "keys and values" in error.value.sentence
    assert "MLA" in error.value.hint and error.value.exit_code == 1


def test_buffers_that_are_saved_with_a_layer_are_refused_by_name():
    with pytest.raises(RrtcError) as error:
        read_architecture(transformers.ApertusConfig(**COMMON))
    assert "'apertus'" in error.value.sentence and "mlp.act_fn.beta, mlp.act_fn.eps" in error.value.sentence
    assert "buffers" in error.value.hint and error.value.exit_code == 1


def test_buffers_that_are_made_anew_on_loading_are_no_reason_to_refuse():
    config = transformers.GPTNeoConfig(
        **(COMMON | {"num_layers": 6, "num_heads": 4, "attention_types": [[["global", "local"], 3]]})
    )
    assert any(name == "attn.attention.bias" for name, _ in decoder_layers(stock_model(config))[0].named_buffers())
    assert read_architecture(config).parameters == AutoModelForCausalLM.from_config(config).num_parameters()


def test_layers_that_read_the_keys_and_values_of_others_are_no_reason_to_refuse():
    config = transformers.Gemma3nTextConfig(**COMMON, layer_types=WINDOWED["layer_types"], num_kv_shared_layers=2)
    assert [layer.kv_width > 0 for layer in read_architecture(config).layers] == [True] * 4 + [False] * 2


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (transformers.BertConfig(), "This 'bert' model is an encoder: it does not generate text."),
        (transformers.T5Config(), "A 't5' model is not a decoder language model."),
        (transformers.ViTConfig(), "A 'vit' model is not a decoder language model."),
        (transformers.CLIPConfig(), "A 'clip' model is not a decoder language model."),
        (transformers.WhisperConfig(), "A 'whisper' model is not a decoder language model."),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_what_is_not_a_decoder_language_model_is_refused_in_one_sentence(config, sentence):
    with pytest.raises(RrtcError) as error:
        read_architecture(config)
    assert error.value.sentence == sentence
    assert "Llama" in error.value.hint


def test_a_config_that_does_not_add_up_is_refused_with_the_reason():
    with pytest.raises(RrtcError, match="No 'llama' model can be built from this config: .*no_such_function"):
        read_architecture(pico_config("llama", hidden_act="no_such_function"))


@pytest.mark.parametrize("file", sorted(PAPER.glob("*.yaml")), ids=lambda file: file.stem)
def test_the_papers_recipes_name_a_config_that_can_be_planned(file):
    recipe = load_recipe(str(file))
    assert (PAPER.parent.parent / recipe.model / "config.json").is_file()
    plan = make_plan(read_architecture(read_config(PAPER.parent.parent / recipe.model)), recipe.init)
    assert recipe.init.norms == "shared" and not recipe.init.fold_norms
    cell = PAPER_TABLE[Path(recipe.model).name, recipe.init.loops][RANKS.index(recipe.init.rank)]
    assert abs(plan.non_embedding / 1e9 - cell) < 0.01


def test_there_is_a_recipe_for_each_of_the_papers_four_models():
    recipes = [load_recipe(str(file)) for file in PAPER.glob("*.yaml")]
    assert sorted((Path(r.model).name, r.init.loops) for r in recipes) == sorted(PAPER_TABLE)
