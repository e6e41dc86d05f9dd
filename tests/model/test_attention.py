"""Visits that do not attend to everything: against stock layers with a mask for each head, in every way to run them."""

import copy
import functools
import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from pico import ARCHITECTURES, COMMON, VOCABULARY, pico_config
from recursive_models import assert_equal, randomize, recursive, written_out
from transformers import AutoModelForCausalLM, DiffLlamaConfig, DynamicCache, StaticCache
from windowed import cropped, drawn_by_lot, live_bytes, mask_of_each_head, padded

from rrtc.attention import Attention, Landmark
from rrtc.export.formats.recursive import write_config
from rrtc.model import RrtConfig, RrtForCausalLM, landmark_rrt
from rrtc.model.attention_rrt import KeptLayer, Rule
from rrtc.model.graft_rrt import find_layers
from rrtc.patterns import make_plan
from rrtc.plan import Plan, read_visits
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture

LENGTH = 150  # more than a block of queries, so that those that go together do
# Those where some layer attends to everything of itself, which is what can be restricted.
local_ones = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in ("llama", "gemma3", "gpt2") else pytest.mark.slow)
        for name in ARCHITECTURES
        if name != "mistral"
    ],
)


def local_plan(architecture: str, window: int = 9, sinks: int = 3, changes: dict | None = None) -> Plan:
    """A plan with a visit of every kind: full, and with a window for all heads or for all but one, with landmark blocks
    beyond it or without."""
    plan = make_plan(read_architecture(pico_config(architecture, **changes or {})), InitRecipe(rank=3))
    blocks = [Landmark(4, 3, seed) for seed in range(2)]
    kinds = [
        Attention(window, sinks, (1,)), Attention(window, sinks, landmark=blocks[0]), None,
        Attention(window, sinks, (0,), blocks[1]), Attention(window, sinks),
    ]  # fmt: skip
    free = [visit.layer for visit in plan.visits if not plan.architecture.layers[visit.layer].window]
    given = {layer: kinds[place % len(kinds)] for place, layer in enumerate(free)}
    return replace(plan, visits=tuple(replace(visit, attention=given.get(visit.layer)) for visit in plan.visits))


@functools.cache
def local(architecture: str, window: int = 9, sinks: int = 3) -> RrtForCausalLM:
    """A recursive pico model with such a plan, not to be changed. Its attention is peaked enough to tell keys apart."""
    torch.manual_seed(sum(architecture.encode()))
    config = RrtConfig.of(local_plan(architecture, window, sinks), pico_config(architecture, initializer_range=0.3))
    return randomize(RrtForCausalLM(config))


@functools.cache
def ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@functools.cache
def at_once(architecture: str) -> torch.Tensor:
    with torch.no_grad():
        return local(architecture)(ids(), use_cache=False).logits


def masks_by_hand(model: RrtForCausalLM, stock: torch.nn.Module, length: int) -> None:
    """Gives every layer of the `stock` model that is written out from `model` a mask of its own, of each head."""
    parent, name = find_layers(stock, len(model.config.visits))
    layers = read_architecture(stock.config).layers
    for layer, visit in zip(getattr(parent, name), model.config.visits, strict=True):
        if "attention" not in visit:
            continue
        heads = stock.config.num_attention_heads, layers[visit["layer"]].kv_heads
        forward, mask = layer.forward, mask_of_each_head(visit["attention"], *heads, length).to(stock.dtype)

        def with_mask(*args, forward=forward, mask=mask, **kwargs):
            if len(args) > 2:  # GPT-2 gives the cache and the mask by position
                return forward(args[0], args[1], mask, *args[3:], **kwargs)
            return forward(*args, **kwargs | {"attention_mask": mask})

        layer.forward = with_mask


@local_ones
@torch.no_grad()
def test_it_equals_stock_layers_with_a_mask_for_each_head(architecture):
    model = copy.deepcopy(local(architecture)).double()  # Granite's peaked scores lose too many digits in float32
    stock = written_out(model).double()
    found, without = model(ids(), use_cache=False).logits, stock(ids()).logits
    masks_by_hand(model, stock, LENGTH)
    assert_equal(found, stock(ids(), use_cache=False).logits, 1e-4)
    assert (without - found).abs().max() > 0.1


@local_ones
@torch.no_grad()
def test_token_by_token_and_in_chunks_it_computes_what_it_does_at_once(architecture):
    model = local(architecture)
    for sizes in ([1] * LENGTH, [100, 1, 1, 40, 8], [70, 80]):
        cache, parts, first = DynamicCache(config=model.config), [], 0
        for size in sizes:
            parts.append(model(ids()[:, first : first + size], past_key_values=cache).logits)
            first += size
        assert_equal(torch.cat(parts, 1), at_once(architecture), 1e-3)


@local_ones
@torch.no_grad()
def test_the_cache_takes_the_bytes_that_the_plan_says_at_every_length(architecture):
    model, plan = local(architecture), local_plan(architecture)
    cache = DynamicCache()  # without a config, its layers come one by one
    for length in range(1, 40):
        model(ids()[:1, length - 1 : length], past_key_values=cache)
        if architecture.startswith("gemma"):  # without a config, stock layers keep all, whatever their window
            continue
        assert live_bytes(cache) == plan.kv_bytes(length, 4)
    cache = model(ids()[:1], use_cache=True).past_key_values  # made by the model, from its config
    assert live_bytes(cache) == plan.kv_bytes(LENGTH, 4) < plan.architecture.kv_bytes(LENGTH, 4)


@local_ones
@torch.no_grad()
def test_a_padded_row_computes_what_it_does_alone(architecture):
    model, pads = local(architecture), 11
    for found in padded(model, ids(), pads, [90, 1, LENGTH - 91]):
        assert_equal(found[:1, pads:], at_once(architecture)[:1, : LENGTH - pads], 1e-3)
        assert_equal(found[1:], at_once(architecture)[1:], 1e-3)


def test_a_token_that_is_masked_within_a_document_begins_no_other_one():
    """As transformers masks a pad token in a prompt, and counts positions without it."""
    model, mask = local("llama"), torch.ones_like(ids())
    mask[:, 26] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found: list[torch.Tensor] = []
    for length in (LENGTH, 11):
        cache, outputs = DynamicCache(config=model.config), []
        for part in torch.arange(LENGTH).split(length):
            given = {"attention_mask": mask[:, : part[-1] + 1], "position_ids": positions[:, part]}
            with torch.no_grad():
                outputs.append(model(ids()[:, part], past_key_values=cache, **given).logits)
        found.append(torch.cat(outputs, 1)[mask.bool()])
    assert_equal(*found)


@local_ones
@torch.no_grad()
def test_packed_documents_compute_what_they_do_alone(architecture):
    model, first = local(architecture), 70
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)])[None].expand(2, -1)
    found = model(ids(), position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in (ids()[:, :first], ids()[:, first:])]
    assert_equal(found, torch.cat(alone, 1), 1e-3)


@local_ones
@torch.no_grad()
def test_every_way_to_generate_gives_the_tokens_of_generating_without_a_cache(architecture):
    model = local(architecture)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    expected = model.generate(ids(), use_cache=False, **settings)
    for way in (
        {},
        {"prefill_chunk_size": 40},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache()},
    ):
        assert torch.equal(model.generate(ids(), **settings, **way), expected), way
    one = model.generate(ids()[:1], use_cache=False, **settings)
    assert torch.equal(model.generate(ids()[:1], prompt_lookup_num_tokens=4, **settings), one)
    beams = model.generate(ids(), use_cache=False, num_beams=3, **settings)
    assert torch.equal(model.generate(ids(), num_beams=3, **settings), beams)


@local_ones
@torch.no_grad()
def test_a_static_cache_gives_the_same_logits(architecture):
    model = local(architecture)
    cache, parts = StaticCache(config=model.config, max_cache_len=LENGTH + 20), []
    for first, last in ((0, 100), (100, 101), (101, LENGTH)):
        parts.append(model(ids()[:, first:last], past_key_values=cache).logits)
    assert_equal(torch.cat(parts, 1), at_once(architecture), 1e-3)


@local_ones
@torch.no_grad()
def test_eager_attention_gives_the_same_logits_and_weights_of_every_head(architecture):
    model = copy.deepcopy(local(architecture))
    model.set_attn_implementation("eager")
    cache = DynamicCache(config=model.config)
    found = model(ids(), past_key_values=cache, output_attentions=True)
    assert_equal(found.logits, at_once(architecture), 1e-3)
    after = model(ids()[:, :1], past_key_values=cache, output_attentions=True)
    for place, visit in enumerate(model.config.visits):
        if wanted := visit.get("attention"):
            assert_equal(found.attentions[place].sum(-1), torch.ones(2, model.config.num_attention_heads, LENGTH), 1e-4)
            outside = slice(wanted["sinks"], LENGTH + 1 - wanted["window"])
            weight = after.attentions[place].squeeze(2)  # (rows, heads, columns)
            kv_heads = local_plan(architecture).architecture.layers[place].kv_heads
            mask = mask_of_each_head(wanted, weight.shape[1], kv_heads, LENGTH + 1)[0, :, -1]
            assert not weight[:, mask < 0].any()
            far = {head for head in range(weight.shape[1]) if weight[:, head, outside].max() > 0}
            each = weight.shape[1] // kv_heads
            heads = range(kv_heads) if "landmark" in wanted else wanted["heads"]
            assert far == {head * each + number for head in heads for number in range(each)}


@local_ones
def test_gradients_with_checkpointing_are_those_without(architecture):
    gradients = []
    for checkpointing in (False, True):
        model = copy.deepcopy(local(architecture)).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)  # for dropout
        positions = torch.cat([torch.arange(70), torch.arange(LENGTH - 70)])[None]
        model(ids(), position_ids=positions, labels=ids(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_with_checkpointing_a_cache_is_left_alone_as_stock_layers_leave_it():
    model = copy.deepcopy(local("llama")).train()
    expected = model(ids(), use_cache=False).logits
    model.activation_checkpointing_enable()
    cache = DynamicCache(config=model.config)
    assert torch.equal(model(ids(), past_key_values=cache).logits, expected) and cache.get_seq_length() == 0


@torch.no_grad()
def test_a_window_wider_than_the_text_is_the_model_without_one_to_the_bit():
    wide = local("llama", window=LENGTH)
    config = copy.deepcopy(wide.config)
    for visit in config.visits:
        visit.pop("attention", None)
    plain = RrtForCausalLM(config).eval()
    plain.load_state_dict(wide.state_dict())
    assert torch.equal(wide(ids(), use_cache=False).logits, plain(ids(), use_cache=False).logits)
    assert_equal(wide(ids(), use_cache=True).logits, plain(ids()).logits, 1e-5)
    assert not any(visit.eyes for visit in plain.model.layers)
    assert "attention" not in json.dumps(recursive("llama").config.to_diff_dict()["visits"])


def test_the_rule_is_monotone():
    """A key that a query does not see is seen by no later one."""
    chance = torch.Generator().manual_seed(0)
    for _ in range(200):
        window, sinks, start, seed = (int(torch.randint(low, 20, (), generator=chance)) for low in (1, 0, 0, 0))
        landmark = landmark_rrt.Landmark(1 + seed % window, 1 + seed % 3, seed) if seed % 2 else None
        columns = torch.arange(start, 60)
        seen = Rule(window, sinks, (), landmark).visible(columns[:, None], columns[None], torch.tensor(start))
        for key in range(len(columns)):
            of_later_queries = seen[key:, key].int()  # from the query of the same column on
            assert of_later_queries[0] and (of_later_queries.diff() <= 0).all()
        most = window + sinks + (landmark.size * landmark.count if landmark else 0)
        assert seen.sum(-1).tolist() == [min(number + 1, most) for number in range(len(columns))]
        if landmark:
            apart = {"size": landmark.size, "count": landmark.count, "seed": seed}
            drawn = drawn_by_lot(**apart, window=window, sinks=sinks, length=len(columns))
            assert torch.equal(seen, drawn | Rule(window, sinks, ()).visible(columns[:, None], columns[None], start))


@torch.no_grad()
def test_what_was_let_go_of_cannot_be_cropped_unless_the_past_is_recorded():
    model = local("llama")
    cache = cropped(model, ids(), 20)
    assert cache.get_seq_length() == LENGTH - 20
    assert live_bytes(cache) == 2 * local_plan("llama").kv_bytes(LENGTH - 20, 4)
    assert_equal(model(ids()[:, -20:], past_key_values=cache).logits, at_once("llama")[:, -20:], 1e-3)


def test_an_empty_place_in_the_cache_can_be_treated_as_a_full_one():
    """As offloaded caches do, which fetch the next layer before it has any tokens."""
    layer = KeptLayer(Rule(8, 2, (0,)))
    for treat in (layer.prefetch, layer.offload, lambda: layer.crop(0), lambda: layer.batch_repeat_interleave(2)):
        treat()
    layer.reorder_cache(torch.tensor([0]))
    assert layer.get_seq_length() == 0 and not layer.is_initialized and layer.keys is None
    assert layer.get_mask_sizes(3) == (3, 0)


@torch.no_grad()
def test_rows_of_the_cache_can_be_chosen_and_repeated():
    model = local("llama")
    cache = model(ids()[:, :-1], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    found = model(ids()[1:, -1:].expand(2, -1), past_key_values=cache).logits
    assert_equal(found, at_once("llama")[1:, -1:].expand(2, -1, -1), 1e-3)


@pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning")
def test_kernels_that_take_no_mask_are_refused():
    model = copy.deepcopy(local("llama"))
    model.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="needs the kernel sdpa or eager, and not flex_attention"):
        model(ids())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@torch.no_grad()
def test_compiled_it_computes_the_same():
    found = torch.compile(copy.deepcopy(local("llama")), backend="eager")(ids(), use_cache=False).logits
    assert_equal(found, at_once("llama"), 1e-4)


def test_with_a_cache_a_kernel_that_is_called_twice_is_refused():
    config = DiffLlamaConfig(**COMMON)
    plan = make_plan(read_architecture(config), InitRecipe(rank=3))
    plan = replace(plan, visits=tuple(replace(visit, attention=Attention(9, 3)) for visit in plan.visits))
    model = randomize(RrtForCausalLM(RrtConfig.of(plan, config)))
    with pytest.raises(ValueError, match="a DiffLlamaAttention calls its kernel twice"):
        model(ids())


ALONE = """
import sys
sys.modules["rrtc"] = None  # as where it is not installed
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2]), use_cache=False).logits, sys.argv[3])
"""


@pytest.mark.slow
def test_saved_and_loaded_where_rrtc_is_not_installed_it_computes_the_same(tmp_path):
    local("llama").save_pretrained(tmp_path / "plain")
    shutil.copytree(tmp_path / "plain", tmp_path / "model")
    write_config(tmp_path / "plain", tmp_path / "model", torch.float32)
    torch.save(ids(), tmp_path / "ids")
    command = [sys.executable, "-c", ALONE, *(str(tmp_path / name) for name in ("model", "ids", "logits"))]
    subprocess.run(command, check=True, cwd=tmp_path, env={"HOME": str(tmp_path), "PATH": ""})
    assert torch.equal(torch.load(tmp_path / "logits"), at_once("llama"))
    here = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").config.visits
    assert read_visits(here) == local_plan("llama").visits
