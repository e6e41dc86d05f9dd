"""What people do with a model of transformers has the same effect on a recursive one: each is done to a stock model
beside it."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from pico import pico_config, pico_model
from recursive_models import assert_equal, everywhere, logits, recursive, tokens, written_out
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from rrtc.model import RrtConfig, RrtForCausalLM, RrtForSequenceClassification, RrtForTokenClassification, RrtModel
from rrtc.model.graft_rrt import Slot


def side_by_side(folder: Path, architecture: str) -> tuple[Path, Path]:
    """Folders of a recursive model and of the stock model that computes the same."""
    recursive(architecture).save_pretrained(folder / "recursive")
    written_out(recursive(architecture)).save_pretrained(folder / "stock")
    return folder / "recursive", folder / "stock"


# Settings

SETTINGS = {
    "use_cache": ({"use_cache": False}, "llama"),
    "output_hidden_states": ({"output_hidden_states": True}, "gpt2"),
    "output_attentions": ({"output_attentions": True}, "llama"),
    "attn_implementation": ({"attn_implementation": "eager"}, "llama"),
    "sliding_window": ({"sliding_window": 3}, "mistral"),
    "window of some layers": ({"sliding_window": 3}, "gemma3"),
    "rope_parameters": ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}}, "llama"),
    "attention_dropout": ({"attention_dropout": 0.5}, "llama"),
    "a name of the architecture's own": ({"attn_pdrop": 0.5, "n_inner": None}, "gpt2"),
    "rms_norm_eps": ({"rms_norm_eps": 0.3}, "llama"),
    "final_logit_softcapping": ({"final_logit_softcapping": 0.5}, "gemma3"),
    "logits_scaling": ({"logits_scaling": 7.0}, "granite"),
    "num_labels": ({"num_labels": 5}, "llama"),
}


@torch.no_grad()
def everything(model) -> list:
    """All that a forward pass returns, in training mode, where dropout shows."""
    torch.manual_seed(0)
    output = model.train()(tokens())
    values = output if isinstance(output, tuple) else output.to_tuple()
    flat = []
    for value in values:
        flat.extend(value if isinstance(value, tuple) else [value])
    return [value for value in flat if isinstance(value, torch.Tensor)] + [type(value) for value in values]


def assert_same_outputs(ours: list, theirs: list) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor):
            assert_equal(one, other, 1e-4 * max(1.0, other.abs().max().item()))
        else:
            assert one is other


@pytest.mark.parametrize("settings, architecture", SETTINGS.values(), ids=SETTINGS)
def test_a_setting_given_to_from_pretrained_has_the_effect_it_has_on_stock(settings, architecture, tmp_path):
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(folder, **settings) for folder in side_by_side(tmp_path, architecture)
    )
    assert type(ours) is RrtForCausalLM
    assert_same_outputs(everything(ours), everything(theirs))
    for name in settings.keys() - {"attn_implementation"}:
        assert getattr(ours.config, name) == getattr(theirs.config, name) == settings[name]
    assert ours.config._attn_implementation == theirs.config._attn_implementation
    ours.save_pretrained(tmp_path / "again")
    again, theirs = AutoConfig.from_pretrained(tmp_path / "again"), theirs.config
    for name in settings.keys() - {"attn_implementation"}:
        assert getattr(again, name) == getattr(theirs, name), name


@pytest.mark.parametrize(
    "settings, architecture",
    [
        ({"use_cache": False}, "llama"),
        ({"output_hidden_states": True}, "llama"),
        ({"is_causal": False}, "llama"),  # which no config declares, and the masks look for
        ({"use_cache": False, "output_hidden_states": True}, "gpt2"),
    ],
    ids=str,
)
def test_a_setting_written_to_a_models_config_has_the_effect_it_has_on_stock(settings, architecture):
    ours = copy.deepcopy(recursive(architecture))
    theirs = written_out(ours)
    without = everything(ours)
    for model in (ours, theirs):
        for name, value in settings.items():
            setattr(model.config, name, value)
            assert getattr(model.config, name) == value
    ours, theirs = everything(ours), everything(theirs)
    assert_same_outputs(ours, theirs)
    assert len(ours) != len(without) or any(
        one is not other if isinstance(one, type) else not torch.equal(one, other)
        for one, other in zip(ours, without, strict=True)
    )


def test_tuples_are_returned_where_asked_for():
    """By the config too, which stock Llama fails on in transformers 5.23."""
    model = copy.deepcopy(recursive("llama"))
    expected = logits(model)
    with torch.no_grad():
        assert torch.equal(model(tokens(), return_dict=False)[0], expected)
        model.config.return_dict = False
        assert isinstance(model(tokens()), tuple) and torch.equal(model(tokens())[0], expected)


def test_output_attentions_needs_the_eager_kernel_as_stock_does():
    ours, theirs = copy.deepcopy(recursive("llama")), written_out(recursive("llama"))
    for model in (ours, theirs):
        with pytest.raises(ValueError, match="not supported when using the `attn_implementation` set to sdpa"):
            model.config.output_attentions = True
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
    assert len(ours(tokens()).attentions) == len(theirs(tokens()).attentions) == 6


def test_settings_beside_base_config_in_a_file_reach_the_dense_models_config(tmp_path):
    """As transformers writes them on other classes, and as earlier versions of rrtc did for changed ones."""
    recursive("llama").config.save_pretrained(tmp_path)
    plain = (tmp_path / "config.json").read_bytes()
    written = json.loads(plain)
    (tmp_path / "config.json").write_text(json.dumps(written | {"use_cache": False, "tie_word_embeddings": True}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.base_config.use_cache is False and config.base_config.tie_word_embeddings is True
    config.save_pretrained(tmp_path)
    again = json.loads((tmp_path / "config.json").read_text())
    assert again.keys() == written.keys()
    assert again["base_config"] == written["base_config"] | {"use_cache": False, "tie_word_embeddings": True}
    config.use_cache, config.tie_word_embeddings = True, False
    config.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == plain


def test_a_setting_can_be_deleted_and_names_of_its_own_stay_with_the_recursive_config():
    config = copy.deepcopy(recursive("llama").config)
    config.is_causal = False
    assert config.base_config.is_causal is False
    del config.is_causal
    assert not hasattr(config, "is_causal") and not hasattr(config.base_config, "is_causal")
    config.quantization_config = {"quant_method": "none"}
    assert not hasattr(config.base_config, "quantization_config")
    del config.quantization_config
    assert not hasattr(config, "quantization_config")


# Generation


@everywhere
def test_generation_starts_from_embeddings(architecture):
    ours, prompt = recursive(architecture), tokens(2, 11)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    runs = [
        model.generate(inputs_embeds=model.get_input_embeddings()(prompt), **options, num_beams=beams).tolist()
        for model in (ours, written_out(ours))
        for beams in (1, 2)
    ]
    assert runs[:2] == runs[2:]
    # Gemma scales what it embeds, but not what it is given.
    if not hasattr(ours.get_input_embeddings(), "embed_scale"):
        assert runs[0] == ours.generate(prompt, **options)[:, prompt.shape[1] :].tolist()


# Training


def base_gradients(model, checkpointing: bool, cache: bool | None) -> dict[str, torch.Tensor]:
    model = copy.deepcopy(model).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    options = {} if cache is None else {"use_cache": cache}
    model(tokens(), **options)[0].square().mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("cache", [None, True])
@everywhere
def test_checkpointing_leaves_the_gradients_as_they_are_without_the_head_too(architecture, cache):
    """With a cache, as the config of every architecture has it by default."""
    whole = recursive(architecture)
    base = RrtModel(copy.deepcopy(whole.config)).eval()
    base.load_state_dict(whole.base_model.state_dict())
    for ours, theirs in ((base, written_out(whole).base_model), (whole, written_out(whole))):
        plain, expected = base_gradients(ours, False, cache), base_gradients(theirs, False, cache)
        checkpointed = base_gradients(ours, True, cache)
        assert plain.keys() == checkpointed.keys() and expected.keys() & plain.keys()
        assert all(torch.equal(plain[name], checkpointed[name]) for name in plain)
        for name in expected.keys() & plain.keys():  # what is outside the layers
            assert_equal(plain[name], expected[name], 1e-4 * max(1.0, expected[name].abs().max().item()))


def test_checkpointing_can_be_switched_off_again():
    model = copy.deepcopy(recursive("gpt2")).base_model
    wrapped = RrtModel(copy.deepcopy(recursive("gpt2").config))
    for each in (model, wrapped):
        (getattr(each, "activation_checkpointing_enable", None) or each.gradient_checkpointing_enable)()
        assert all(
            module.gradient_checkpointing for module in each.modules() if hasattr(module, "gradient_checkpointing")
        )
        (getattr(each, "activation_checkpointing_disable", None) or each.gradient_checkpointing_disable)()
        assert not any(getattr(module, "gradient_checkpointing", False) for module in each.modules())
    assert wrapped.stock.gradient_checkpointing is False


# Saving


@everywhere
def test_the_base_model_saves_what_automodel_loads(architecture, tmp_path):
    model = copy.deepcopy(recursive(architecture))
    model.base_model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["RrtModel"]
    loaded, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is RrtModel
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        expected = model(tokens(), output_hidden_states=True).hidden_states[-1]
        assert torch.equal(loaded.eval()(tokens()).last_hidden_state, expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.architectures == ["RrtModel"]
    twin = copy.deepcopy(model)  # what it saves is its own
    with torch.no_grad():
        twin.get_input_embeddings().weight.zero_()
    twin.base_model.save_pretrained(tmp_path / "twin")
    assert not AutoModel.from_pretrained(tmp_path / "twin").get_input_embeddings().weight.any()


def test_a_model_without_a_head_saves_itself_by_any_name(tmp_path):
    model = RrtModel(recursive("llama").config)
    for number, each in enumerate((model, model.base_model, model.stock)):
        each.save_pretrained(tmp_path / str(number))
        assert type(AutoModel.from_pretrained(tmp_path / str(number))) is RrtModel
    assert (tmp_path / "0/model.safetensors").read_bytes() == (tmp_path / "2/model.safetensors").read_bytes()


@pytest.mark.parametrize("architecture", ["gemma3", "gpt2", "llama"])
def test_a_head_untied_in_the_config_is_saved_and_loaded(architecture, tmp_path):
    """A tied model whose head was trained by itself, as adapters do that are merged."""
    ours = RrtForCausalLM(
        RrtConfig(
            base_config=pico_config(architecture, tie_word_embeddings=True),
            visits=recursive(architecture).config.visits,
        )
    ).eval()
    for model in (ours, pico_model(architecture, tie_word_embeddings=True)):
        model.config.tie_word_embeddings = False
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach() + 0.1)
        model.save_pretrained(tmp_path / type(model).__name__)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / type(model).__name__).eval()
        assert loaded.config.tie_word_embeddings is False
        assert torch.equal(loaded.get_output_embeddings().weight, head.weight)
        assert torch.equal(logits(loaded), logits(model))


# The attention kernel


@pytest.mark.parametrize("asked", [None, "eager", "sdpa"])
def test_the_config_tells_which_attention_kernel_runs(asked, tmp_path):
    options = {} if asked is None else {"attn_implementation": asked}
    for folder in side_by_side(tmp_path, "llama"):
        for kind in (AutoModelForCausalLM, AutoModel):
            model = kind.from_pretrained(folder, **options)
            assert model.config._attn_implementation == (asked or "sdpa")
            assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {asked or "sdpa"}
            model.set_attn_implementation("eager")
            assert model.config._attn_implementation == "eager"
            assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}


# Classification


SEQUENCES, TOKENS = AutoModelForSequenceClassification, AutoModelForTokenClassification


@pytest.mark.parametrize(
    "architecture, kind",
    [("llama", SEQUENCES), ("llama", TOKENS), ("gemma3", SEQUENCES), ("gpt2", SEQUENCES), ("gpt2", TOKENS)],
)
def test_it_classifies_as_stock_does(architecture, kind, tmp_path):
    for folder in side_by_side(tmp_path, architecture):
        model = kind.from_pretrained(folder, num_labels=3)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if name.split(".")[0] in ("score", "classifier"):
                    parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
        model.save_pretrained(folder)
    ours, theirs = (kind.from_pretrained(folder).eval() for folder in (tmp_path / "recursive", tmp_path / "stock"))
    own = RrtForSequenceClassification if kind is SEQUENCES else RrtForTokenClassification
    assert type(ours) is own and ours.config.num_labels == theirs.config.num_labels == 3
    labels = torch.tensor([2, 0]) if kind is SEQUENCES else tokens() % 3
    results = []
    for model in (ours, theirs):
        output = model(tokens(), labels=labels)
        output.loss.backward()
        results.append((output.logits, output.loss, model.get_input_embeddings().weight.grad))
    assert ours.config.problem_type == theirs.config.problem_type
    for one, other in zip(*results, strict=True):
        assert_equal(one, other)


def test_a_class_that_transformers_does_not_have_says_what_to_do():
    config = copy.deepcopy(recursive("granite").config)
    with pytest.raises(ValueError, match="no ForTokenClassification for 'granite'.* Load RrtModel"):
        RrtForTokenClassification(config)


# Distribution


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_no_plan_for_tensor_parallelism_is_claimed(architecture):
    stock = pico_model(architecture)
    assert stock.tp_plan  # which names matrices of layers that a recursive model does not have
    for model in (recursive(architecture), RrtModel(copy.deepcopy(recursive(architecture).config))):
        assert model._tp_plan == model._pp_plan == model._ep_plan == {}
        assert not model.supports_tp_plan
        assert not model.config.base_model_tp_plan


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_sharded_with_fsdp_is_a_slot(architecture):
    """Not the visits, which stand where the dense model's layers did and own nothing."""
    for model in (recursive(architecture), RrtModel(copy.deepcopy(recursive(architecture).config))):
        ((pattern, style),) = model.fsdp_plan.items()
        assert style == "free_full_weight"
        found = [module for name, module in model.named_modules() if re.sub(r"\d+", "*", name) == pattern]
        assert found == [module for module in model.modules() if isinstance(module, Slot)] and len(found) == 3


# PEFT

# PEFT asks for it by the name that transformers 5.23 deprecates.
quiet = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


def adapted(targets, **options):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    return get_peft_model(copy.deepcopy(recursive("llama")), config)


@quiet
@pytest.mark.parametrize(
    "targets, options, count",
    [
        ("all-linear", {}, 3 * 7),
        (["q_proj", "v_proj"], {"exclude_modules": r".*\.loops\..*"}, 3 * 2),
        (r".*\.shared\..*\.(q_proj|v_proj)", {}, 3 * 2),
    ],
    ids=["all-linear", "names", "regex"],
)
def test_adapters_go_to_the_shared_matrices(targets, options, count, tmp_path):
    from peft import PeftModel

    model = adapted(targets, **options)
    places = [name for name, module in model.named_modules() if hasattr(module, "lora_A")]
    assert len(places) == count and all(".shared." in name for name in places)
    plain, with_adapter = logits(recursive("llama")), logits(model)
    assert (plain - with_adapter).abs().max() > 0.01
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lora_" in name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(copy.deepcopy(recursive("llama")), tmp_path)
    assert torch.equal(logits(again), with_adapter)
    assert_equal(logits(again.merge_and_unload()), with_adapter)


@quiet
def test_plain_names_alone_are_refused_by_peft():
    with pytest.raises(ValueError, match="Target module RelaxedLinear"):
        adapted(["q_proj"])


@quiet
@pytest.mark.parametrize("kind, architecture", [("Prompt", "llama"), ("Prompt", "gpt2"), ("Prefix", "llama")])
def test_prompt_and_prefix_tuning_find_the_sizes(kind, architecture):
    import peft

    results = []
    for model in (copy.deepcopy(recursive(architecture)), written_out(recursive(architecture))):
        config = getattr(peft, f"{kind}TuningConfig")(num_virtual_tokens=5, task_type="CAUSAL_LM")
        torch.manual_seed(0)
        tuned = peft.get_peft_model(model, config).eval()
        loss = tuned(tokens(), labels=tokens()).loss
        loss.backward()
        results.append((loss, sum(p.grad.numel() for p in tuned.parameters() if p.requires_grad)))
    assert results[0][1] == results[1][1] > 0
    assert abs(results[0][0] - results[1][0]) < 1e-4
