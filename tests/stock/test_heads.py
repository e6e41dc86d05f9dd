"""What is measured of KV heads: against stock layers with masks by hand, and against eager attention weights."""

import copy

import pytest
import torch
from pico import VOCABULARY, pico_model, pico_tokenizer

from rrtc.model.attention_rrt import Rule
from rrtc.model.owner_rrt import OwnerRule
from rrtc.stock.heads import LookedUp, Losses
from rrtc.stock.streamed import StreamedModel
from rrtc.text.lookups import make_lookups

WINDOW, SINKS, CONTEXT, LAYER = 6, 2, 40, 2
RULE = Rule(WINDOW, SINKS, ())


def streamed(model) -> tuple[StreamedModel, dict]:
    tensors = dict(model.named_parameters())
    inside = {name: parameter.detach() for name, parameter in model.model.layers[LAYER].named_parameters()}
    return StreamedModel(model.config, lambda name: tensors[name].detach(), torch.device("cpu")), inside


def entering(width: int, rows: int = 3) -> torch.Tensor:
    return torch.randn(rows, CONTEXT, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_what_a_window_costs_a_head_is_half_of_the_mean_square_of_what_the_loss_feels(architecture):
    model = pico_model(architecture, initializer_range=0.3)
    kv_heads, heads = model.config.num_key_value_heads, model.config.num_attention_heads
    states, gradient = entering(model.config.hidden_size), entering(model.config.hidden_size).flip(0)
    live, inside = streamed(model)
    losses = Losses(states.shape[0] * CONTEXT, {"window": RULE, "wider": Rule(CONTEXT, 0, ())})
    with live.attending(LAYER, RULE, losses.sight):
        live.back_through(LAYER, inside, states, gradient.clone())
    found, nothing = losses.finish().values()
    assert not nothing.any()

    layer, heard = copy.deepcopy(model.model.layers[LAYER]), []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    position = model.model.rotary_emb(states, torch.arange(CONTEXT)[None])
    columns = torch.arange(CONTEXT)
    causal = columns[None] <= columns[:, None]
    near = causal & ((columns[:, None] - columns[None] < WINDOW) | (columns[None] < SINKS))
    for mask in (causal, near):
        given = states.clone().requires_grad_()
        output = layer(given, attention_mask=mask[None, None], position_embeddings=position)
        if mask is causal:
            heard[0].retain_grad()
            (output * gradient).sum().backward()
    felt = (heard[0].grad * (heard[1] - heard[0])).detach().unflatten(-1, (heads, -1)).sum(-1)
    each = felt.unflatten(-1, (kv_heads, -1)).sum(-1).flatten(0, 1).double()
    expected = each.T @ each / (2 * len(each))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.max()) and (found.diagonal() > 0).all()


def test_what_reading_another_layer_costs_is_measured_with_the_keys_that_this_keeps():
    model, owner = pico_model("llama", initializer_range=0.3), 4
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    tensors = dict(model.named_parameters())
    live = StreamedModel(model.config, lambda name: tensors[name].detach(), torch.device("cpu"))
    states, gradient = entering(48, rows=60), entering(48, rows=60).flip(0)  # more than one batch
    kept = {}
    for number in (owner, LAYER):
        kept[number] = Losses(1, {"window": RULE}, keeps=True)
        inside = {name: tensor.detach() for name, tensor in model.model.layers[number].named_parameters()}
        with live.attending(number, RULE, kept[number].sight):
            live.back_through(number, inside, states, gradient.clone())
    reading = Losses(states.shape[0] * CONTEXT, {"reads": OwnerRule(WINDOW, SINKS, (), owner=owner)},
                     kept[owner].kept())  # fmt: skip
    with live.attending(LAYER, RULE, reading.sight):
        live.back_through(LAYER, inside, states, gradient.clone())
    found = reading.finish()["reads"]

    layer, heard, asked = copy.deepcopy(model.model.layers[LAYER]), [], []
    layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: heard.append(args[0]))
    layer.self_attn.q_proj.register_forward_hook(lambda module, args, output: asked.append(output))
    cos, sin = model.model.rotary_emb(states, torch.arange(CONTEXT)[None])
    causal = torch.arange(CONTEXT)[None] <= torch.arange(CONTEXT)[:, None]
    given = states.clone().requires_grad_()
    output = layer(given, attention_mask=causal[None, None], position_embeddings=(cos, sin))
    heard[0].retain_grad()
    (output * gradient).sum().backward()
    query = asked[0].detach().unflatten(-1, (heads, -1)).transpose(1, 2)
    half = query.shape[-1] // 2
    query = query * cos[:, None] + torch.cat([-query[..., half:], query[..., :half]], -1) * sin[:, None]
    own, theirs = (
        [t.repeat_interleave(heads // kv_heads, 1) for t in one.kept().values()] for one in (kept[LAYER], kept[owner])
    )
    columns = torch.arange(CONTEXT)
    far = (columns[:, None] - columns[None] >= WINDOW) & (columns[None] >= SINKS)
    scores = torch.where(far, query @ theirs[0].mT, query @ own[0].mT) * layer.self_attn.scaling
    weights = scores.masked_fill(~causal, -torch.inf).softmax(-1)
    read = (weights * far) @ theirs[1] + (weights * ~far) @ own[1]
    change = read - heard[0].detach().unflatten(-1, (heads, -1)).transpose(1, 2)
    felt = (heard[0].grad.unflatten(-1, (heads, -1)).transpose(1, 2) * change).sum(-1).transpose(1, 2)
    each = felt.unflatten(-1, (kv_heads, -1)).sum(-1).flatten(0, 1).double()
    expected = each.T @ each / (2 * len(each))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.max()) and (found.diagonal() > 0).all()


def test_watching_changes_nothing_and_leaves_nothing_behind():
    model = pico_model("llama")
    live, inside = streamed(model)
    states, gradient = entering(48), entering(48).flip(0)
    plain = live.back_through(LAYER, inside, states, gradient.clone())
    with live.attending(LAYER, RULE, Losses(1, {"window": RULE}).sight):
        assert torch.equal(live.back_through(LAYER, inside, states, gradient.clone()), plain)
    assert torch.equal(live.back_through(LAYER, inside, states, gradient.clone()), plain)
    with live.attending(LAYER, RULE):  # and with the rule itself it is another layer
        assert not torch.allclose(live.back_through(LAYER, inside, states, gradient.clone()), plain)


@torch.no_grad()
def test_what_a_head_looks_up_is_its_attention_on_it():
    model = pico_model("llama", initializer_range=0.3)
    model.set_attn_implementation("eager")
    ids = torch.randint(3, VOCABULARY, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    wanted = [
        (30, (4, 5)),
        (35, (9,)),
        *((place, (place - 20,)) for place in range(24, 39)),
    ]  # more than a head is wide
    weights = model(ids, output_attentions=True).attentions[LAYER][0]  # (query heads, queries, keys)
    mass = torch.stack([weights[:, at][:, list(tokens)].sum(-1) for at, tokens in wanted]).mean(0)
    expected = mass.unflatten(0, (2, -1)).amax(-1)
    live, inside = streamed(model)
    tensors = [dict(layer.named_parameters()) for layer in model.model.layers]
    states, looking = live.embed(ids), LookedUp([wanted])
    for number in range(LAYER):
        live.run_layer(number, tensors[number], states)
    before = live.run_layer(LAYER, inside, states.clone())
    with live.attending(LAYER, RULE, looking.sight):
        assert torch.equal(live.run_layer(LAYER, inside, states.clone()), before)
    assert torch.allclose(looking.mass, expected, atol=1e-5)


@pytest.mark.parametrize("context", [64, 256, 1024])
def test_what_is_to_be_looked_up_stands_far_back_and_is_said_at_the_end(context):
    filler = torch.randint(3, VOCABULARY, (6, context), generator=torch.Generator().manual_seed(context))
    made = make_lookups(filler, pico_tokenizer(), seed=3)
    assert made.ids.shape == filler.shape and len(made.wanted) == 6
    for row, asked in zip(made.ids, made.wanted, strict=True):
        assert asked
        for at, (place,) in asked:
            assert row[at + 1] == row[place] and at > place and place <= context // 2 and at >= context // 2
    again = make_lookups(filler, pico_tokenizer(), seed=3)
    assert torch.equal(made.ids, again.ids) and made.wanted == again.wanted
    text = pico_tokenizer().decode(made.ids[1])
    assert (context < 1024) or text.rstrip().endswith(".") and "drawer of" in text
    assert "pass key" not in text
