"""The recursive model over every architecture, against stock models whose layers are written out one by one."""

import copy
import functools
import json
import pickle
from pathlib import Path

import pytest
import torch
from pico import VOCABULARY, pico_config, pico_model
from recursive_models import (
    EQUAL,
    WINDOW,
    assert_equal,
    both_norms,
    everywhere,
    logits,
    randomize,
    recursive,
    rrt_config,
    tokens,
    written_out,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache
from transformers.pytorch_utils import Conv1D

from rrtc.model import RrtConfig, RrtForCausalLM, RrtModel
from rrtc.model.graft_rrt import RelaxedLinear, find_layers, graft, matrices_of
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture


@functools.cache
def saved(architecture: str, norms: str = "per_visit") -> Path:
    """The same model in a folder; shared by tests, which must not change it."""
    folder = FOLDER / architecture / norms
    recursive(architecture, norms).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def _folder(tmp_path_factory):
    global FOLDER
    FOLDER = tmp_path_factory.mktemp("recursive")


# What the model computes


@both_norms
@everywhere
def test_with_lora_it_equals_the_stock_model_with_the_products_multiplied_out(architecture, norms):
    model = recursive(architecture, norms)
    expected = logits(written_out(model))
    assert_equal(logits(model), expected)
    without = copy.deepcopy(model)
    for name, parameter in without.named_parameters():
        if name.endswith(".B"):
            parameter.data.zero_()
    assert (logits(without) - expected).abs().max() > 100 * EQUAL  # the LoRA is large enough to be seen


@both_norms
@everywhere
def test_at_rank_0_it_equals_a_plain_looped_model(architecture, norms):
    model = recursive(architecture, norms, rank=0)
    assert not any(name.endswith((".A", ".B")) for name, _ in model.named_parameters())
    assert_equal(logits(model), logits(written_out(model)))


@pytest.mark.parametrize(
    "recipe",
    [
        {"loops": 3},
        {"loops": 6},
        {"loops": 1},
        {"sharing": "sequence"},
        {"sharing": "middle_cycle"},
        {"sharing": "middle_sequence", "loops": 4},
        {"rank": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_every_sharing_equals_its_stock_model(architecture, recipe):
    model = recursive(architecture, **recipe)
    assert_equal(logits(model), logits(written_out(model)))


@pytest.mark.parametrize("architecture", ["gemma2", "qwen2", "gpt2"])
def test_ranks_may_differ_from_group_to_group(architecture):
    config = rrt_config(architecture, rank={"q": 2, "ffn": 5})
    model = randomize(RrtForCausalLM(config))
    assert {m.rank for m in model.modules() if isinstance(m, RelaxedLinear)} >= {0, 5}
    assert_equal(logits(model), logits(written_out(model)))


@both_norms
@everywhere
def test_cached_generation_equals_uncached(architecture, norms):
    model, prompt = recursive(architecture, norms), tokens(1, WINDOW + 3)
    runs = [
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
            use_cache=use_cache,
            output_logits=True,
            return_dict_in_generate=True,
        )  # fmt: skip
        for use_cache in (True, False)
    ]
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
    assert_equal(torch.stack(runs[0].logits), torch.stack(runs[1].logits))


def test_an_architectures_own_preparation_for_generation_is_used():
    """Phi-3 with long rope changes its frequencies where a sequence outgrows the original context, and starts over."""
    factors = {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [3.0] * 6}
    factors |= {"partial_rotary_factor": 1.0, "original_max_position_embeddings": 16, "factor": 16.0}
    base = pico_config("phi3", original_max_position_embeddings=16, rope_parameters=factors)
    model = randomize(RrtForCausalLM(rrt_config("phi3", base)))
    stock, prompt = written_out(model), tokens(1, 12)
    runs = [
        each.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=10, min_new_tokens=10, do_sample=False,
            output_logits=True, return_dict_in_generate=True,
        )
        for each in (model, stock)
    ]  # fmt: skip
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
    assert_equal(torch.stack(runs[0].logits), torch.stack(runs[1].logits))


@everywhere
def test_every_visit_has_its_own_place_in_the_cache(architecture):
    model, whole = recursive(architecture), logits(recursive(architecture))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        first = model(tokens()[:, :WINDOW], past_key_values=cache, use_cache=True).logits
        second = model(tokens()[:, WINDOW:], past_key_values=cache, use_cache=True).logits
    assert_equal(torch.cat([first, second], 1), whole)
    assert len(cache.layers) == 6
    assert all(layer.keys is not None for layer in cache.layers)


@everywhere
def test_a_static_cache_equals_a_growing_one(architecture):
    model, prompt = recursive(architecture), tokens(1, WINDOW + 3)
    runs = [
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False,
            cache_implementation=kind, disable_compile=True,
        )
        for kind in ("static", "dynamic")
    ]  # fmt: skip
    assert runs[0].tolist() == runs[1].tolist()


@both_norms
@everywhere
def test_left_padded_batches_equal_single_ones(architecture, norms):
    model = recursive(architecture, norms)
    long, short = tokens(1, WINDOW + 7), tokens(2, WINDOW + 3)[1:]
    padding = torch.full((1, long.shape[1] - short.shape[1]), model.config.pad_token_id)
    batch = torch.cat([long, torch.cat([padding, short], 1)])
    mask = torch.ones_like(batch)
    mask[1, : padding.shape[1]] = 0
    options = {
        "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True,
        "return_dict_in_generate": True,
    }  # fmt: skip
    together = model.generate(batch, attention_mask=mask, **options)
    for row, prompt in enumerate((long, short)):
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert together.sequences[row, batch.shape[1] :].tolist() == alone.sequences[0, prompt.shape[1] :].tolist()
        assert_equal(torch.stack(together.logits)[:, row], torch.stack(alone.logits)[:, 0])


@everywhere
def test_its_loss_is_the_stock_models_loss(architecture):
    model = recursive(architecture)
    stock = written_out(model)
    labels = tokens().clone()
    labels[0, :4] = -100
    with torch.no_grad():
        ours, theirs = model(tokens(), labels=labels), stock(tokens(), labels=labels)
        assert abs(ours.loss - theirs.loss) <= EQUAL
        weighted = [m(tokens(), labels=labels, num_items_in_batch=7).loss for m in (model, stock)]
    assert abs(weighted[0] - weighted[1]) <= EQUAL * 10
    assert weighted[0] > ours.loss  # the sum over more than 7 tokens, divided by 7


@everywhere
def test_embeddings_can_be_given_and_logits_limited(architecture):
    model = recursive(architecture)
    whole = logits(model)
    with torch.no_grad():
        assert_equal(model(inputs_embeds=model.get_input_embeddings()(tokens())).logits, whole)
    assert_equal(logits(model, logits_to_keep=1), whole[:, -1:])


@everywhere
def test_hidden_states_are_the_stock_models_and_one_more_than_its_layers(architecture):
    model = recursive(architecture)
    with torch.no_grad():
        ours = model(tokens(), output_hidden_states=True).hidden_states
        theirs = written_out(model)(tokens(), output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == 7
    for one, other in zip(ours, theirs, strict=True):
        assert_equal(one, other, EQUAL * other.abs().max().item())


@everywhere
def test_attentions_are_the_stock_models_one_for_each_visit(architecture):
    model = copy.deepcopy(recursive(architecture))
    stock = written_out(model)
    for each in (model, stock):
        each.set_attn_implementation("eager")
    with torch.no_grad():
        ours, theirs = (m(tokens(), output_attentions=True).attentions for m in (model, stock))
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert_equal(one, other)


@everywhere
def test_attention_kernels_agree_and_the_stock_models_choice_is_the_default(architecture):
    stock = pico_model(architecture)
    default = RrtForCausalLM(rrt_config(architecture))
    assert default.config._attn_implementation == stock.config._attn_implementation
    assert default.stock.config._attn_implementation == stock.config._attn_implementation
    for name in ("_can_compile_fullgraph", "_keys_to_ignore_on_load_unexpected"):
        assert getattr(default, name) == getattr(stock, name)
    eager = AutoModelForCausalLM.from_pretrained(saved(architecture), attn_implementation="eager").eval()
    reference = written_out(eager)
    for kernel in ("eager", "sdpa") if stock._supports_sdpa else ("eager",):
        for each in (eager, reference):
            each.set_attn_implementation(kernel)
            assert each.config._attn_implementation == kernel
        assert eager.stock.config._attn_implementation == kernel
        assert_equal(logits(eager), logits(reference))
    if not stock._supports_sdpa:
        with pytest.raises(ValueError, match="does not support an attention implementation through torch"):
            AutoModelForCausalLM.from_pretrained(saved(architecture), attn_implementation="sdpa")


# Configs


def test_building_from_a_live_models_config_does_not_change_the_live_model():
    for architecture in ("llama", "gemma3", "gpt2"):
        live = pico_model(architecture)
        before, kernel = logits(live), live.config._attn_implementation
        config = rrt_config(architecture, live.config)
        model = RrtForCausalLM(config)
        model.set_attn_implementation("eager")
        model.resize_token_embeddings(VOCABULARY + 16)
        assert config.base_config is not live.config
        assert live.config._attn_implementation == kernel
        assert live.config.vocab_size == VOCABULARY
        assert torch.equal(logits(live), before)


@everywhere
def test_the_config_answers_for_the_dense_model(architecture):
    base, config = pico_config(architecture), rrt_config(architecture)
    for name in (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range",
    ):  # fmt: skip
        assert getattr(config, name) == getattr(base, name), name
    assert config.model_type == "rrt"
    for name in ("layer_types", "sliding_window"):
        assert getattr(config, name, None) == getattr(base, name, None)
    with pytest.raises(AttributeError, match="RrtConfig has no attribute 'nonsense'"):
        _ = config.nonsense


@everywhere
def test_a_config_survives_json(architecture, tmp_path):
    config = rrt_config(architecture)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is RrtConfig and type(loaded.base_config) is type(config.base_config)
    assert loaded.visits == config.visits and loaded.norms == config.norms
    assert loaded.base_config.to_dict() == config.base_config.to_dict()


@pytest.mark.parametrize("form", [lambda config: config, lambda config: config.to_dict()], ids=["object", "dictionary"])
def test_the_dense_models_class_and_code_are_not_carried_along(form, tmp_path):
    base = pico_config("llama", architectures=["LlamaForCausalLM"])
    base.auto_map = {"AutoModelForCausalLM": "somewhere.Else"}
    config = rrt_config("llama", pico_config("llama"))
    config = RrtConfig(base_config=form(base), visits=config.visits)
    config.save_pretrained(tmp_path)
    assert (
        "Llama" not in (tmp_path / "config.json").read_text()
        and "auto_map" not in (tmp_path / "config.json").read_text()
    )
    assert base.architectures == ["LlamaForCausalLM"] and base.auto_map
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


@everywhere
def test_generation_defaults_are_the_dense_models(architecture):
    ours, theirs = recursive(architecture).generation_config, pico_model(architecture).generation_config
    assert (ours.bos_token_id, ours.eos_token_id, ours.pad_token_id) == (0, 1, 2)
    assert ours.eos_token_id == theirs.eos_token_id


# Saving and loading


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def header_length(file: Path) -> int:
    with open(file, "rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


@both_norms
@everywhere
def test_saving_loading_and_saving_again_gives_the_same_bytes(architecture, norms, tmp_path):
    folder = saved(architecture, norms)
    loaded, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(loaded) is RrtForCausalLM
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    assert torch.equal(logits(loaded.eval()), logits(recursive(architecture, norms)))
    loaded.save_pretrained(tmp_path)
    again = RrtForCausalLM.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    first, second = folder_bytes(folder), folder_bytes(tmp_path / "again")
    assert first.keys() == second.keys() >= {"config.json", "model.safetensors"}
    for name in first:
        assert first[name] == second[name], name


@everywhere
def test_shared_weights_are_stored_once(architecture):
    model, folder = recursive(architecture), saved(architecture)
    file = folder / "model.safetensors"
    assert file.stat().st_size - header_length(file) == 4 * model.num_parameters()
    names = load_file(file).keys()
    for path in matrices_of(pico_layer(architecture)):
        holders = [name for name in names if name.endswith(f".{path}.weight")]
        assert len(holders) == 3 and all(".shared." in name for name in holders)
    assert not any(name.startswith("stock.") for name in names)


def pico_layer(architecture: str) -> torch.nn.Module:
    model = pico_model(architecture)
    parent, name = find_layers(model, 6)
    return getattr(parent, name)[0]


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_file_is_within_five_percent_of_its_parameters(architecture, tmp_path):
    base = pico_config(architecture, hidden_size=192, intermediate_size=512)
    model = RrtForCausalLM(rrt_config(architecture, base, rank=8))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert 1 <= size / (4 * model.num_parameters()) < 1.05
    assert size < 0.7 * 4 * sum(p.numel() for p in AutoModelForCausalLM.from_config(base).parameters())


@pytest.mark.parametrize("tied", [True, False])
@everywhere
def test_embeddings_stay_tied_or_untied(architecture, tied, tmp_path):
    config = rrt_config(architecture, pico_config(architecture, tie_word_embeddings=tied))
    model = randomize(RrtForCausalLM(config))
    model.save_pretrained(tmp_path)
    loaded = RrtForCausalLM.from_pretrained(tmp_path).eval()
    for each in (model, loaded):
        one, other = each.get_input_embeddings().weight, each.get_output_embeddings().weight
        assert (one.data_ptr() == other.data_ptr()) == tied
        assert each.num_parameters() == make_plan(read_architecture(config.base_config), InitRecipe(rank=3)).parameters
    assert torch.equal(logits(loaded), logits(model))
    file = tmp_path / "model.safetensors"
    assert file.stat().st_size - header_length(file) == 4 * model.num_parameters()


@everywhere
def test_shards_load_as_one_file_does(architecture, tmp_path):
    recursive(architecture).save_pretrained(tmp_path, max_shard_size="150KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert torch.equal(logits(RrtForCausalLM.from_pretrained(tmp_path).eval()), logits(recursive(architecture)))


@both_norms
@everywhere
def test_automodel_gives_the_hidden_states_of_the_language_model(architecture, norms):
    folder = saved(architecture, norms)
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert type(model) is RrtModel and not report["missing_keys"]
    with torch.no_grad():
        hidden = model.eval()(tokens()).last_hidden_state
        expected = recursive(architecture, norms)(tokens(), output_hidden_states=True).hidden_states[-1]
    assert torch.equal(hidden, expected)


@everywhere
def test_half_precision_is_loaded_as_asked(architecture, tmp_path):
    model = RrtForCausalLM.from_pretrained(saved(architecture), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    model.save_pretrained(tmp_path)
    assert {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert RrtForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


@everywhere
def test_resized_embeddings_reload(architecture, tmp_path):
    model = copy.deepcopy(recursive(architecture))
    before = logits(model)
    model.resize_token_embeddings(VOCABULARY + 16)
    after = logits(model)
    assert after.shape[-1] == VOCABULARY + 16 == model.config.vocab_size
    assert_equal(after[..., :VOCABULARY], before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(RrtForCausalLM.from_pretrained(tmp_path).eval()), after)
    assert json.loads((tmp_path / "config.json").read_text())["base_config"]["vocab_size"] == VOCABULARY + 16


@everywhere
def test_embeddings_can_be_replaced(architecture):
    model = copy.deepcopy(recursive(architecture))
    new_input = copy.deepcopy(model.get_input_embeddings())
    new_output = torch.nn.Linear(48, VOCABULARY, bias=False)
    with torch.no_grad():
        new_input.weight.mul_(0.9)
    model.set_input_embeddings(new_input)
    model.set_output_embeddings(new_output)
    assert model.get_input_embeddings() is model.stock.get_input_embeddings() is new_input
    assert model.get_output_embeddings() is model.stock.get_output_embeddings() is new_output
    model(tokens()).logits.sum().backward()
    assert new_input.weight.grad.any() and new_output.weight.grad.any()


@everywhere
def test_missing_lora_loads_as_nothing_and_leaves_the_rest_alone(architecture, tmp_path):
    tensors = load_file(saved(architecture) / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith((".A", ".B"))}
    (tmp_path / "config.json").write_bytes((saved(architecture) / "config.json").read_bytes())
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    model, report = RrtForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert report["missing_keys"] == set(tensors) - set(kept)
    loaded = dict(model.named_parameters())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in kept.items())
    assert all(not loaded[name].any() for name in report["missing_keys"] if name.endswith(".B"))
    assert all(loaded[name].isfinite().all() and loaded[name].any() for name in report["missing_keys"] if ".A" in name)
    assert_equal(logits(model.eval()), logits(written_out(model)))


@everywhere
def test_a_new_model_has_finite_weights_and_no_lora_effect(architecture):
    model = RrtForCausalLM(rrt_config(architecture)).eval()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert all(not p.any() for name, p in model.named_parameters() if name.endswith(".B"))
    assert logits(model).std() > 0.01


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@everywhere
def test_a_copy_computes_the_same_and_shares_nothing(architecture, duplicate):
    model = randomize(RrtForCausalLM(rrt_config(architecture)))
    before, twin = logits(model), duplicate(model)
    assert torch.equal(logits(twin), before)
    for parameter in twin.parameters():
        parameter.data.mul_(0.9)
    assert torch.equal(logits(model), before)
    assert_equal(logits(twin), logits(written_out(twin)))
    assert (logits(twin) - before).abs().max() > 100 * EQUAL


# Training


def without_dropout(model: torch.nn.Module) -> torch.nn.Module:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def gradients(architecture: str, norms: str, checkpointing: bool = False) -> dict[str, torch.Tensor]:
    model = without_dropout(copy.deepcopy(recursive(architecture, norms))).train()
    if checkpointing:
        # transformers renamed it and deprecated the old name on the way
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    used = []
    for module in model.modules():
        if isinstance(module, RelaxedLinear):
            module.register_forward_pre_hook(lambda module, args: used.append(module))
    model(tokens(), labels=tokens(), use_cache=False).loss.backward()
    assert len(used) == (1 + checkpointing) * len(set(used))  # recomputed once
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@both_norms
@everywhere
def test_gradients_with_and_without_activation_checkpointing_are_equal_and_reach_every_parameter(architecture, norms):
    plain = gradients(architecture, norms)
    missing = [name for name, gradient in plain.items() if gradient is None]
    assert not missing
    assert all(plain[name].any() for name in plain if name.endswith((".A", ".B", "weight")))
    checkpointed = gradients(architecture, norms, checkpointing=True)
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


@everywhere
def test_training_mode_reaches_the_stock_model_and_every_layer(architecture):
    model = copy.deepcopy(recursive(architecture))
    for mode in (True, False):
        model.train(mode)
        assert model.training is mode and model.stock.training is mode
        assert all(module.training is mode for module in model.modules())


@everywhere
def test_gradients_are_those_of_the_stock_model(architecture):
    """The gradient of a shared matrix is the sum over its visits; of B it is dW A^T, of A it is B^T dW."""
    model = recursive(architecture)
    stock = written_out(model)
    stock(tokens(), labels=tokens(), use_cache=False).loss.backward()
    ours = gradients(architecture, "per_visit")
    parent, name = find_layers(stock, 6)
    prefix = next(p for p, module in stock.named_modules() if module is parent)
    for path in matrices_of(getattr(parent, name)[0]):
        total: dict[int, torch.Tensor] = {}
        for visit, layer in zip(model.config.visits, getattr(parent, name), strict=True):
            module = layer.get_submodule(path)
            gradient = module.weight.grad.T if isinstance(module, Conv1D) else module.weight.grad
            total[visit["slot"]] = total.get(visit["slot"], 0) + gradient
            own = f"{prefix}.slots.{visit['slot']}.loops.{visit['loop']}.{path}"
            factors = model.get_submodule(own)
            assert_equal(ours[f"{own}.B"], gradient @ factors.A.T)
            assert_equal(ours[f"{own}.A"], factors.B.T @ gradient)
        for slot, gradient in total.items():
            assert_equal(ours[f"{prefix}.slots.{slot}.shared.{path}.weight"], gradient)


# The graft itself


def test_layers_that_differ_are_refused_before_anything_is_replaced():
    model = pico_model("llama")
    parent, name = find_layers(model, 6)
    getattr(parent, name)[4].mlp.down_proj = torch.nn.Linear(7, 48)
    before = list(model.state_dict())
    visits = rrt_config("llama").visits
    with pytest.raises(ValueError, match="layer 4 .* layers it is tied to"):
        graft(model, visits)
    assert list(model.state_dict()) == before


def test_decoder_layers_are_found_only_where_there_is_one_list_of_them():
    model = pico_model("llama")
    with pytest.raises(ValueError, match="expected one list of 5 decoder layers, found 0"):
        find_layers(model, 5)
    model.other = torch.nn.ModuleList(torch.nn.Identity() for _ in range(6))
    with pytest.raises(ValueError, match="expected one list of 6 decoder layers, found 2"):
        find_layers(model, 6)


def test_a_replaced_shared_matrix_is_the_one_that_is_used():
    """Adapters and quantizers put their own module in place of a matrix: every visit must go through it."""
    model = copy.deepcopy(recursive("llama"))
    calls = []

    class Counting(torch.nn.Linear):
        def forward(self, x):
            calls.append(self)
            return super().forward(x)

    slot = model.model.slots[1].shared.mlp
    replacement = Counting(80, 48, bias=False)
    replacement.weight = slot.down_proj.weight
    slot.down_proj = replacement
    assert torch.equal(logits(model), logits(recursive("llama")))
    assert calls == [replacement] * 2
