"""Visits that read another loop's keys and values: against attention worked out token by token, in every way to run."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from pico import ARCHITECTURES, VOCABULARY, pico_config
from recursive_models import assert_equal, randomize
from transformers import AttentionInterface, DynamicCache, GenerationConfig, StaticCache
from windowed import live_bytes, padded

from rrtc.attention import Attention, Landmark, Linear
from rrtc.kv_owners import local_but, with_owners
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture
from rrtc.stock.parts import Parts, standing_in

LENGTH, WINDOW, SINKS = 40, 9, 3  # four blocks and a part of one
owners = pytest.mark.parametrize("owner", ["first_loop", "last_loop"])
architectures = pytest.mark.parametrize(
    "architecture",
    [
        pytest.param(name, marks=() if name in ("llama", "gemma3", "gpt2") else pytest.mark.slow)
        for name in ARCHITECTURES
        if name != "mistral"  # whose layers all have a window of their own
    ],
)


def owner_plan(architecture: str, owner: str, window: int = WINDOW) -> Plan:
    """A plan with owners, in which all heads of most readers have a window. Of one slot, head 1 of the readers sees
    everything, and of the owner the others, and the windows are wider."""
    # Gemma's layers have windows in turn. With three loops, slots are of one kind, and some run in blocks between.
    recipe = InitRecipe(rank=3, loops=3 if "gemma" in architecture else 2)
    plan = local_but(make_plan(read_architecture(pico_config(architecture)), recipe), owner, window, SINKS)
    mixed = next(visit.slot for visit in plan.visits if visit.attention is not None)
    visits = list(plan.visits)
    for place, visit in enumerate(visits):
        if visit.slot == mixed:
            others = tuple(head for head in range(plan.architecture.layers[place].kv_heads) if head != 1)
            heads = others if visit.attention is None else (1,)
            visits[place] = replace(visit, attention=Attention(window + 2, SINKS, heads))
    return with_owners(replace(plan, visits=tuple(visits)), owner)


@functools.cache
def reading(architecture: str, owner: str, window: int = WINDOW) -> RrtForCausalLM:
    """A recursive pico model with that plan, in float64, not to be changed. Its attention is peaked."""
    torch.manual_seed(sum(architecture.encode()))
    config = RrtConfig.of(owner_plan(architecture, owner, window), pico_config(architecture, initializer_range=0.3))
    return randomize(RrtForCausalLM(config)).double()


@functools.cache
def ids(rows: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(1))


@functools.cache
def at_once(architecture: str, owner: str) -> torch.Tensor:
    with torch.no_grad():
        return reading(architecture, owner)(ids(), use_cache=False).logits


def plain(model: RrtForCausalLM) -> RrtForCausalLM:
    """A model with the same weights, that attends to everything."""
    config = copy.deepcopy(model.config)
    for visit in config.visits:
        visit.pop("attention", None)
    made = RrtForCausalLM(config).double().eval()
    made.load_state_dict(model.state_dict())
    return made


class ByHand:
    """Attention of a model that is given one token after the other, worked out for each KV head key by key."""

    def __init__(self, plan: Plan):
        self.visits = plan.visits
        self.seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {place: [] for place in range(len(plan.visits))}

    def __call__(self, module, query, keys, values, mask, scaling=None, softcap=None, sliding_window=None, **kwargs):
        place, outputs = module.layer_idx, []
        self.seen[place].append((keys, values))
        attention, now, each = self.visits[place].attention, len(self.seen[place]) - 1, query.shape[1] // keys.shape[1]
        for head in range(query.shape[1]):
            found = [self._key(place, attention, now, key, head // each, sliding_window) for key in range(now + 1)]
            keys, values = (torch.stack(one, 1) for one in zip(*[pair for pair in found if pair], strict=True))
            scores = (keys @ query[:, head, 0, :, None])[..., 0] * (scaling or query.shape[-1] ** -0.5)
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            outputs.append((scores.softmax(-1)[:, None] @ values)[:, 0])
        return torch.stack(outputs, 1)[:, None], None

    def _key(self, place, attention, query, column, head, window):
        """(key, value) of that column, (rows, width) each; None where it is not seen."""
        if attention is None and window and query - column >= window:
            return None
        if attention is not None and head not in attention.heads:
            far = query - column >= attention.window and column >= attention.sinks
            if far and attention.owner is None:
                return None
            if far:
                slot = self.visits[place].slot
                place = [n for n, v in enumerate(self.visits) if (v.slot, v.loop) == (slot, attention.owner.loop)][0]
        key, value = self.seen[place][column]
        return key[:, head, 0], value[:, head, 0]


def by_hand(model: RrtForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of `model`, which attends to everything, if it attended to what its `plan` says."""
    AttentionInterface.register("by_hand", ByHand(model.plan))
    model.set_attn_implementation("by_hand")
    places = torch.arange(tokens.shape[1])[None, :, None]
    return torch.cat([model(tokens[:, n : n + 1], position_ids=places[:, n], use_cache=False).logits
                      for n in range(tokens.shape[1])], 1)  # fmt: skip


@architectures
@owners
def test_logits_and_gradients_are_those_of_attention_worked_out_key_by_key(architecture, owner):
    model, tokens = copy.deepcopy(reading(architecture, owner)), ids(1, 27)
    other = plain(model)
    other.plan = owner_plan(architecture, owner)
    gradients = []
    for made, run in ((model, lambda: model(tokens, use_cache=False).logits), (other, lambda: by_hand(other, tokens))):
        logits = run()
        logits.square().mean().backward()
        gradients.append((logits.detach(), {name: p.grad for name, p in made.named_parameters()}))
    (found, ours), (expected, theirs) = gradients
    tolerance = 1e-8 if architecture != "gemma2" else 1e-4  # which computes softmax in float32
    assert_equal(found, expected, tolerance)
    assert (plain(model)(tokens).logits - expected).abs().max() > 0.1
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        assert_equal(gradient, theirs[name], 1e4 * tolerance * gradient.abs().max().item())


@architectures
@owners
@torch.no_grad()
def test_tokens_and_chunks_compute_what_the_whole_text_does_and_take_the_bytes_of_the_plan(architecture, owner):
    model, tolerance = reading(architecture, owner), 1e-8 if architecture != "gemma2" else 1e-4
    plan = owner_plan(architecture, owner)
    for sizes in ([1] * LENGTH, [25, 1, 1, 10, 3], [20, 20]):
        cache, static = DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=LENGTH + 5)
        parts, first = [], 0
        for size in sizes:
            part = ids()[:, first : first + size]
            parts.append([model(part, past_key_values=one).logits for one in (cache, static)])
            first += size
            assert live_bytes(cache) == 2 * plan.kv_bytes(first, 8)
        for logits in zip(*parts, strict=True):
            assert_equal(torch.cat(logits, 1), at_once(architecture, owner), tolerance)
    assert plan.kv_bytes(LENGTH, 8) == without_owners(plan).kv_bytes(LENGTH, 8) < plan.architecture.kv_bytes(LENGTH, 8)


def without_owners(plan: Plan) -> Plan:
    return replace(plan, visits=tuple(
        replace(visit, attention=visit.attention and replace(visit.attention, owner=None)) for visit in plan.visits
    ))  # fmt: skip


@torch.no_grad()
def test_visits_of_other_kinds_may_run_in_blocks_between():
    plan = local_but(make_plan(read_architecture(pico_config("llama")), InitRecipe(rank=3)), "last_loop", WINDOW, SINKS)
    near = plan.visits[0].attention
    kinds = (near, replace(near, landmark=Landmark(3, 2, 0)), replace(near, linear=Linear(8)))
    visits = [replace(v, attention=kinds[place]) if place < 3 else v for place, v in enumerate(plan.visits)]
    visits[0] = with_owners(plan, "last_loop").visits[0]
    torch.manual_seed(0)
    config = RrtConfig.of(replace(plan, visits=tuple(visits)), pico_config("llama", initializer_range=0.3))
    model = randomize(RrtForCausalLM(config)).double()
    whole = model(ids(), use_cache=False).logits
    for sizes in ([1] * LENGTH, [25, 1, 14]):
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids().split(sizes, 1)]
        assert_equal(torch.cat(parts, 1), whole, 1e-3)  # sums are in float32


@owners
@torch.no_grad()
def test_padded_rows_and_packed_documents_compute_what_they_do_alone(owner):
    model, pads, first = reading("llama", owner), 7, 25
    for found in padded(model, ids(), pads, [30, 1, LENGTH - 31]):
        assert_equal(found[:1, pads:], at_once("llama", owner)[:1, : LENGTH - pads], 1e-8)
        assert_equal(found[1:], at_once("llama", owner)[1:], 1e-8)
    positions = torch.cat([torch.arange(first), torch.arange(LENGTH - first)])[None].expand(2, -1)
    found = model(ids(), position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in (ids()[:, :first], ids()[:, first:])]
    assert_equal(found, torch.cat(alone, 1), 1e-8)


@owners
@torch.no_grad()
def test_every_way_to_generate_gives_the_tokens_of_generating_without_a_cache(owner):
    model, prompts = reading("llama", owner), ids()[:, :22]
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 2, "eos_token_id": None}
    expected = model.generate(prompts, use_cache=False, **settings)
    for way in ({}, {"prefill_chunk_size": 17}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(prompts, **settings, **way), expected), way
    assert torch.equal(model.generate(prompts[:1], prompt_lookup_num_tokens=14, **settings), expected[:1])
    beams = model.generate(prompts, use_cache=False, num_beams=3, **settings)
    assert torch.equal(model.generate(prompts, num_beams=3, **settings), beams)
    guessing = GenerationConfig(**settings)
    guessing.speculate = {"exit": 2}  # and the stock method runs
    assert torch.equal(model.generate(prompts[:1], guessing), expected[:1])


@owners
def test_gradients_with_checkpointing_are_those_without_and_eager_attention_agrees(owner):
    gradients = []
    for way in ("as it is", "checkpointed", "with a cache", "eager"):
        model = copy.deepcopy(reading("llama", owner)).train()
        if way == "checkpointed":
            model.activation_checkpointing_enable()
        if way == "eager":
            model.set_attn_implementation("eager")
        positions = torch.cat([torch.arange(25), torch.arange(LENGTH - 25)])[None] if way != "with a cache" else None
        use_cache = way in ("with a cache", "checkpointed")  # which the layers then do without
        model(ids(), position_ids=positions, labels=ids(), use_cache=use_cache).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        if way == "as it is":
            model.zero_grad()
            model(ids(), labels=ids(), use_cache=False).loss.backward()
            one_document = {name: p.grad for name, p in model.named_parameters()}
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert_equal(one_document[name], gradients[2][name], 1e-9)
        assert_equal(gradient, gradients[3][name], 1e-3 * gradient.abs().max().item())  # its softmax is in float32


@owners
@torch.no_grad()
def test_a_window_wider_than_the_text_is_the_model_without_one_to_the_bit(owner):
    wide = reading("llama", owner, window=LENGTH)
    assert torch.equal(wide(ids(), use_cache=False).logits, plain(wide)(ids(), use_cache=False).logits)


def test_attention_weights_stand_where_the_keys_do():
    model = copy.deepcopy(reading("llama", "first_loop"))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        found = model(ids(), output_attentions=True, use_cache=False)
    for weights in found.attentions:
        assert_equal(weights.sum(-1), torch.ones_like(weights[..., 0]), 1e-6)
        assert weights.shape[-2:] == (LENGTH, LENGTH)
        assert not weights.triu(1).any()
    with pytest.raises(ValueError, match="runs in blocks, and has no output_attentions to show"):
        reading("llama", "last_loop")(ids(), output_attentions=True)


def passed_on(hidden_states, *args, **kwargs):
    return hidden_states


def changed(hidden_states, *args, **kwargs):
    return hidden_states + 1


def test_what_cannot_be_had_of_visits_that_wait_for_each_other_is_refused():
    model = reading("llama", "last_loop")
    with pytest.raises(ValueError, match="has no output_hidden_states to show"):
        model(ids(), output_hidden_states=True)
    with pytest.raises(ValueError, match="cannot be watched"):
        Parts(model).run(ids(), keep=[2])
    for place, instead, error in ((4, passed_on, "cannot be left between"), (1, changed, "something stands between")):
        with pytest.raises(ValueError, match=error), standing_in({model.model.layers[place]: instead}):
            model(ids(), use_cache=False)
    model = copy.deepcopy(model).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="use_reentrant=False"):
        model(ids(), labels=ids(), use_cache=False)
