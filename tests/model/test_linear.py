"""Heads that keep sums of random features of what has left their window: against the formula, and in every way to run
them."""

import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pico import VOCABULARY, pico_config
from recursive_models import assert_equal, randomize
from transformers import DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from windowed import cropped, padded

from rrtc.attention import Attention, Linear
from rrtc.errors import WrongUsage
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.attention_rrt import KeptLayer, Sight
from rrtc.model.linear_rrt import LinearLayer, LinearRule, Maps, draw
from rrtc.patterns import make_plan
from rrtc.plan import Plan, read_visits
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture

FEATURES, LENGTH = 16, 150
three = pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])


def plan_of(architecture: str, features: int) -> Plan:
    """A plan with visits whose heads have a window, or all but one have, and others; behind the windows is linear
    attention, if it has any features."""
    plan = make_plan(read_architecture(pico_config(architecture)), InitRecipe(rank=3))
    visits = []
    for visit in plan.visits:
        kind = Linear(features, visit.layer) if features else None
        attention = (Attention(9, 3, (1,), linear=kind), Attention(9, 3, linear=kind), None)[visit.layer % 3]
        free = not plan.architecture.layers[visit.layer].window
        visits.append(replace(visit, attention=attention if free else None))
    return replace(plan, visits=tuple(visits))


@functools.cache
def model_of(architecture: str, features: int = FEATURES) -> RrtForCausalLM:
    """A recursive pico model with such a plan, not to be changed; with the same weights, however many features."""
    config = RrtConfig.of(plan_of(architecture, features), pico_config(architecture, initializer_range=0.3))
    if not features:
        torch.manual_seed(sum(architecture.encode()))
        return randomize(RrtForCausalLM(config))
    model = RrtForCausalLM(config)
    missing = model.load_state_dict(model_of(architecture, 0).state_dict(), strict=False).missing_keys
    assert missing and all(".linear." in name for name in missing)
    return model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_can_be_saved_and_loaded_in_16_bits(dtype, tmp_path):
    model = copy.deepcopy(model_of("llama")).to(dtype)
    model.save_pretrained(tmp_path)
    again = RrtForCausalLM.from_pretrained(tmp_path)
    assert again.dtype == dtype
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert again(ids()).logits.isfinite().all()


@functools.cache
def ids() -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def live_bytes(cache) -> int:
    """Of keys, values and sums."""
    tensors = []
    for layer in cache.layers:
        for part in layer.parts if isinstance(layer, KeptLayer) else [layer]:
            tensors += [part.keys, part.values]
        if isinstance(layer, LinearLayer):
            tensors += [layer.state.mass, layer.state.mean]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


@functools.cache
def at_once(architecture: str) -> torch.Tensor:
    with torch.no_grad():
        return model_of(architecture)(ids(), use_cache=False).logits


def by_formula(query, key, value, rule: LinearRule, scaling: float, start) -> torch.Tensor:
    """(rows, queries, heads, width), float64: each sum of the module's docstring, query by query."""
    heads, length = query.shape[1], query.shape[2]
    query, key, value = (t.double() for t in (query, key, value))
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    maps = rule.maps.maps.double().repeat_interleave(heads // len(rule.maps.maps), 0)
    gain = rule.maps.log_gain.double().exp().repeat_interleave(heads // len(rule.maps.maps), 0)

    def features(vectors):
        x = vectors * scaling**0.5
        return (x @ maps.mT - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(maps.shape[1])

    phi_q, phi_k = features(query), features(key)
    output = torch.zeros(len(query), length, heads, value.shape[-1], dtype=torch.float64)
    for row in range(len(query)):
        for i in range(length):
            first = int(start[row, i])
            near = [j for j in range(first, i + 1) if i - j < rule.window or j - first < rule.sinks]
            far = [j for j in range(first, i + 1) if j not in near]
            weight = (scaling * query[row, :, i, None] * key[row][:, near]).sum(-1).exp()
            s = torch.einsum("hjm,hjd->hmd", phi_k[row][:, far], value[row][:, far])
            z = phi_k[row][:, far].sum(1)
            over = (weight[..., None] * value[row][:, near]).sum(1) + gain[:, None] * (phi_q[row, :, i, None] @ s)[:, 0]
            under = weight.sum(1) + gain * (phi_q[row, :, i] * z).sum(-1)
            output[row, i] = over / under[:, None]
    return output


@torch.no_grad()
def test_it_is_the_formula():
    """With two documents in one row, and one behind padding in the other."""
    generator, length = torch.Generator().manual_seed(0), 90
    query, key, value = (torch.randn(2, heads, length, 8, generator=generator) for heads in (4, 2, 2))
    start = torch.stack([torch.where(torch.arange(length) < 50, 0, 50), torch.full((length,), 7)])
    rule = LinearRule(9, 3, (), features=FEATURES, maps=Maps(2, FEATURES, 8, seed=5))
    rule.maps.log_gain.copy_(torch.tensor([0.5, -1.0]))
    columns = torch.arange(length)
    mask = ((columns <= columns[:, None]) & (columns >= start[:, :, None]))[:, None]
    module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
    sight = Sight(rule, mask, start, 0, None)
    found, _ = sight.attend(sdpa_attention_forward, module, query, key, value, False, scaling=0.4)
    expected = by_formula(query, key, value, rule, 0.4, start)
    for row, first in enumerate((0, 7)):
        torch.testing.assert_close(found[row, first:].double(), expected[row, first:], atol=2e-5, rtol=0)


def test_features_estimate_the_exponential_without_bias_and_better_the_more_they_are():
    """The error of the mean falls as 1 / sqrt(m), over 400 draws of 16 features, and of 4 times as many."""
    generator = torch.Generator().manual_seed(0)
    query, key = (0.6 * torch.randn(1, 1, 40, 8, generator=generator) for _ in range(2))
    exact = (query @ key.mT).exp()
    error = {}
    for features in (16, 64):
        found = []
        for seed in range(400):
            maps = Maps(1, features, 8, seed)
            found.append((maps.of(query, 1.0).exp() @ maps.of(key, 1.0).exp().mT / features).detach())
        found = torch.stack(found)
        error[features] = ((found / exact - 1).square().mean().sqrt()).item()
        assert ((found.mean(0) / exact - 1).abs().mean()) < 3 * error[features] / math.sqrt(400)
    assert error[16] / error[64] == pytest.approx(2, rel=0.15)


def test_rows_of_a_map_are_orthogonal_in_blocks_and_as_long_as_gaussian_ones():
    maps = draw(3, 20, 8, seed=0)
    for block in (maps[:, :8], maps[:, 8:16], maps[:, 16:]):
        products = block @ block.mT
        torch.testing.assert_close(products, torch.diag_embed(products.diagonal(dim1=1, dim2=2)), atol=1e-5, rtol=0)
    assert torch.equal(maps, draw(3, 20, 8, seed=0)) and not torch.equal(maps, draw(3, 20, 8, seed=1))
    assert draw(50, 64, 64, seed=0).norm(dim=-1).square().mean().item() == pytest.approx(64, rel=0.02)


@three
@torch.no_grad()
def test_token_by_token_and_in_chunks_it_computes_what_it_does_at_once(architecture):
    model = model_of(architecture)
    assert (at_once(architecture) - model_of(architecture, 0)(ids(), use_cache=False).logits).abs().max() > 0.1
    for sizes in ([1] * LENGTH, [100, 1, 1, 40, 8]):
        cache, parts, first = DynamicCache(config=model.config), [], 0
        for size in sizes:
            parts.append(model(ids()[:, first : first + size], past_key_values=cache).logits)
            first += size
        assert_equal(torch.cat(parts, 1), at_once(architecture), 1e-3)
    static, parts = StaticCache(config=model.config, max_cache_len=LENGTH + 20), []
    for first, last in ((0, 100), (100, 101), (101, LENGTH)):
        parts.append(model(ids()[:, first:last], past_key_values=static).logits)
    assert_equal(torch.cat(parts, 1), at_once(architecture), 1e-3)


@three
@torch.no_grad()
def test_the_cache_takes_the_bytes_that_the_plan_says_and_the_model_its_parameters(architecture):
    model, plan = model_of(architecture), plan_of(architecture, FEATURES)
    assert sum(parameter.numel() for parameter in model.parameters()) == plan.parameters
    for length in (1, 5, 40, LENGTH):
        cache = model(ids()[:1, :length], use_cache=True).past_key_values
        assert live_bytes(cache) == plan.kv_bytes(length, 4)
    cache = copy.deepcopy(model).bfloat16()(ids()[:1], use_cache=True).past_key_values
    assert live_bytes(cache) == plan.kv_bytes(LENGTH, 2)


@torch.no_grad()
def test_a_padded_row_and_packed_documents_compute_what_they_do_alone():
    model, pads, first = model_of("llama"), 11, 70
    for found in padded(model, ids(), pads, [90, 1, LENGTH - 91]):
        assert_equal(found[:1, pads:], at_once("llama")[:1, : LENGTH - pads], 1e-3)
        assert_equal(found[1:], at_once("llama")[1:], 1e-3)
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)])[None].expand(2, -1)
    alone = [model(part, use_cache=False).logits for part in (ids()[:, :first], ids()[:, first:])]
    assert_equal(model(ids(), position_ids=positions, use_cache=False).logits, torch.cat(alone, 1), 1e-3)


@torch.no_grad()
def test_every_way_to_generate_gives_the_tokens_of_generating_without_a_cache():
    model = model_of("llama")
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    expected = model.generate(ids(), use_cache=False, **settings)
    for way in ({}, {"prefill_chunk_size": 40}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids(), **settings, **way), expected), way
    one = model.generate(ids()[:1], use_cache=False, **settings)
    assert torch.equal(model.generate(ids()[:1], prompt_lookup_num_tokens=4, **settings), one)
    beams = model.generate(ids(), use_cache=False, num_beams=3, **settings)
    assert torch.equal(model.generate(ids(), num_beams=3, **settings), beams)


@torch.no_grad()
def test_without_gain_it_is_the_window():
    model = copy.deepcopy(model_of("llama"))
    for module in model.modules():
        if isinstance(module, Maps):
            module.log_gain.fill_(-math.inf)
    assert_equal(model(ids(), use_cache=False).logits, model_of("llama", 0)(ids(), use_cache=False).logits, 1e-4)


@torch.no_grad()
def test_what_was_summed_up_cannot_be_cropped_unless_the_past_is_recorded():
    model = model_of("llama")
    cache = cropped(model, ids(), 20)
    assert_equal(model(ids()[:, -20:], past_key_values=cache).logits, at_once("llama")[:, -20:], 1e-3)


@torch.no_grad()
def test_eager_attention_gives_the_same_logits_and_rows_of_the_cache_can_be_chosen():
    model = copy.deepcopy(model_of("llama"))
    model.set_attn_implementation("eager")
    found = model(ids()[:, :-1], use_cache=True, output_attentions=True)
    assert_equal(found.logits, at_once("llama")[:, :-1], 1e-3)
    sums = found.attentions[0].sum(-1)
    assert sums.max() <= 1 + 1e-5 and sums.min() < 0.9  # what is missing have the features
    found.past_key_values.batch_select_indices(torch.tensor([1]))
    found.past_key_values.batch_repeat_interleave(2)
    after = model(ids()[1:, -1:].expand(2, -1), past_key_values=found.past_key_values).logits
    assert_equal(after, at_once("llama")[1:, -1:].expand(2, -1, -1), 1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_eager_attention_runs_in_every_dtype(dtype):
    exact, model = at_once("llama"), copy.deepcopy(model_of("llama")).to(dtype)
    rounding = (model(ids(), use_cache=False).logits - exact).abs().max()
    model.set_attn_implementation("eager")
    assert (model(ids(), use_cache=False).logits - exact).abs().max() < 2 * rounding + 1e-3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@torch.no_grad()
def test_compiled_it_computes_the_same():
    found = torch.compile(copy.deepcopy(model_of("llama")), backend="eager")(ids(), use_cache=False).logits
    assert_equal(found, at_once("llama"), 1e-4)


@three
def test_under_autocast_it_learns(architecture):
    model = copy.deepcopy(model_of(architecture))
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids(), labels=ids(), use_cache=False)
    found.loss.backward()
    assert (found.logits - at_once(architecture)).abs().mean() < 0.1 * at_once(architecture).abs().mean()
    assert all(p.grad.isfinite().all() and p.grad.any() for n, p in model.named_parameters() if ".linear." in n)


def test_maps_learn_and_are_saved(tmp_path):
    model = copy.deepcopy(model_of("llama"))
    model(ids(), labels=ids(), use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if ".linear." in name:
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
            parameter.data += 0.1
    model.save_pretrained(tmp_path)
    again = RrtForCausalLM.from_pretrained(tmp_path)
    assert read_visits(again.config.visits) == plan_of("llama", FEATURES).visits
    with torch.no_grad():
        assert torch.equal(again(ids(), use_cache=False).logits, model(ids(), use_cache=False).logits)


@torch.no_grad()
def test_maps_that_a_folder_does_not_have_are_those_of_the_seed(tmp_path):
    model_of("llama", 0).save_pretrained(tmp_path)
    again = RrtForCausalLM.from_pretrained(tmp_path, config=model_of("llama").config)
    assert torch.equal(again(ids(), use_cache=False).logits, at_once("llama"))


@torch.no_grad()
def test_capped_scores_and_masks_with_holes_are_refused():
    model = copy.deepcopy(model_of("llama"))
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    assert_equal(model(ids(), attention_mask=mask, use_cache=False).logits, at_once("llama"), 1e-3)
    mask[:, :, 100:, 40] = False
    with pytest.raises(ValueError, match="a mask that leaves out tokens within a document"):
        model(ids(), attention_mask=mask, use_cache=False)
    padded = torch.ones(2, LENGTH, dtype=torch.long)
    padded[0, 100:] = 0  # on the right, where no token that counts sees it
    found = model(ids(), attention_mask=padded, use_cache=False).logits
    assert_equal(found[:1, :100], at_once("llama")[:1, :100], 1e-3)
    capped = copy.deepcopy(model_of("gemma2"))
    with pytest.raises(ValueError, match="cannot have its scores capped"):
        capped(ids(), use_cache=False)


@pytest.mark.parametrize(
    "attention, said",
    [
        (Attention(9, 3, (), linear=Linear(0)), "has no features"),
        (Attention(9, 3, (), linear=Linear(10**9)), "has more than 100,000 features"),
        (Attention(9, 3, (), linear=Linear(4, seed=10**30)), "a seed below 0, or of more than 63 bits"),
        (Attention(9, 3, (0, 1), linear=Linear(4)), "no KV head with a window"),
    ],
)
def test_linear_attention_that_cannot_be_is_refused(attention, said):
    plan = plan_of("llama", 0)
    visits = (replace(plan.visits[0], attention=attention), *plan.visits[1:])
    with pytest.raises(WrongUsage, match=said):
        replace(plan, visits=visits)
