"""The streamed model against the stock one: hidden states, losses, what is watched on the way, and memory."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
import transformers
from pico import ARCHITECTURES, COMMON, EVERY_ARCHITECTURE, pico_model
from transformers import AutoModelForCausalLM

from rrtc import scoring
from rrtc.errors import RrtcError
from rrtc.io.dense import DenseModel
from rrtc.io.source import find_model
from rrtc.model.graft_rrt import matrices_of
from rrtc.stock import streamed
from rrtc.stock.architecture import decoder_layers
from rrtc.stock.streamed import StreamedModel
from rrtc.text.windows import Windows

# What the pico architectures leave out: ALiBi, layers that return tuples, projections around the layers, a head with a
# bias, attention and MLP side by side (which then share an input), scaled logits, partial rotary positions.
OTHERS = {
    "opt": ("OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 80}),
    "falcon": ("FalconConfig", {"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True}),
    "falcon-alibi": ("FalconConfig", {"alibi": True, "parallel_attn": False, "multi_query": False}),
    "bloom": ("BloomConfig", {"tie_word_embeddings": True}),
    "mpt": ("MptConfig", {"d_model": 48, "n_heads": 4, "n_layers": 6}),
    "gptj": ("GPTJConfig", {"n_embd": 48, "n_head": 4, "n_layer": 6, "rotary_dim": 8}),
    "phi": ("PhiConfig", {}),
    "cohere": ("CohereConfig", {"tie_word_embeddings": True, "logit_scale": 0.25}),
    "gemma2-capped": ("Gemma2Config", {"head_dim": 16, "final_logit_softcapping": 0.5, "tie_word_embeddings": True}),
    "stablelm": ("StableLmConfig", {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "starcoder2": ("Starcoder2Config", {"tie_word_embeddings": True}),
}  # fmt: skip
ALL = [*EVERY_ARCHITECTURE, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
CPU = torch.device("cpu")


def make_model(name: str):
    if name in ARCHITECTURES:
        return pico_model(name)
    class_name, own = OTHERS[name]
    torch.manual_seed(sum(name.encode()))
    config = getattr(transformers, class_name)(**(COMMON | own))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """For an architecture: the stock model, the same one streamed from its folder, and five windows of tokens that are
    longer than the attention windows."""
    made: dict[str, SimpleNamespace] = {}

    def get(name: str) -> SimpleNamespace:
        if name not in made:
            stock, folder = make_model(name), tmp_path_factory.mktemp(name)
            stock.save_pretrained(folder)
            source = find_model(str(folder))
            dense = DenseModel(source)
            ids = torch.randint(3, 300, (5, 24), generator=torch.Generator().manual_seed(7))
            model = StreamedModel(source.config(), lambda name: as_stored(dense, name), CPU)
            made[name] = SimpleNamespace(stock=stock, dense=dense, model=model, ids=ids, config=source.config())
        return made[name]

    return get


@pytest.fixture(params=["one batch", "many batches"])
def batches(request, monkeypatch):
    """Everything in one batch and one block of the vocabulary, or batches of 2, 2 and 1 windows and four blocks."""
    if request.param == "many batches":
        monkeypatch.setattr(streamed, "TOKENS_AT_ONCE", 50)
        monkeypatch.setattr(streamed, "HEAD_BYTES", 4 * 48 * 100)


def as_stored(dense: DenseModel, name: str) -> torch.Tensor:
    return dense.weights.raw(dense._disk_names[name])


def run_all(case, watch=lambda number: None) -> torch.Tensor:
    states = case.model.embed(case.ids)
    for number in range(6):
        case.model.run_layer(number, case.dense.layer(number, CPU), states, watch(number))
    return states


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", ALL)
def test_states_after_every_layer_are_the_stock_models(name, cases, batches):
    case = cases(name)
    seen = []  # after each layer; the last of output_hidden_states would be after the final norm
    hooks = [
        layer.register_forward_hook(lambda module, args, output: seen.append(first(output)))
        for layer in decoder_layers(case.stock)
    ]
    with torch.no_grad():
        entering = case.stock(case.ids, output_hidden_states=True).hidden_states[0]
    for hook in hooks:
        hook.remove()
    states = case.model.embed(case.ids)
    assert states.dtype == torch.float32 and difference(states, entering) < 1e-5
    address, advanced = states.data_ptr(), []
    for number in range(6):
        returned = case.model.run_layer(
            number, case.dense.layer(number, CPU), states, advance=lambda n: advanced.append(n)
        )
        assert returned is states and states.data_ptr() == address
        assert difference(states, seen[number]) < 1e-5
    assert sum(advanced) == 6 * 5


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", ALL)
def test_the_loss_is_what_measure_says(name, cases, batches):
    case = cases(name)
    loss = case.model.loss(run_all(case), case.ids)
    assert loss == pytest.approx(scoring.score(case.stock, Windows(case.ids, 1.0)).loss, abs=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_every_matrix_is_watched_with_its_input(name, cases, batches):
    case = cases(name)
    expected, hooks = {}, []
    for number, layer in enumerate(decoder_layers(case.stock)):
        for path, module in matrices_of(layer).items():

            def keep(module, args, key=(number, path)):
                expected[key] = gram(args[0].flatten(0, -2))

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        case.stock(case.ids)
    for hook in hooks:
        hook.remove()
    shown = []  # looked at after the run: what is shown must not change when the states do
    run_all(case, lambda number: lambda names, inputs: shown.append((number, names, inputs)))
    found = defaultdict(float)
    for number, names, inputs in shown:
        for path in names:
            found[number, path] = found[number, path] + gram(inputs)
    assert set(found) == set(expected)
    for key, value in expected.items():
        assert difference(found[key], value) < 1e-4


def gram(inputs: torch.Tensor) -> torch.Tensor:
    return inputs.T @ inputs


GROUPS = {
    "llama": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)],
    "phi3": [("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)],
    "gpt2": [("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)],
    "phi": [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"), ("self_attn.dense",),
            ("mlp.fc2",)],
}  # fmt: skip


@pytest.mark.parametrize("name", GROUPS)
def test_matrices_that_share_an_input_are_shown_together(name, cases):
    called = []
    run_all(cases(name), lambda number: lambda names, inputs: called.append((number, names)))
    assert called == [(number, names) for number in range(6) for names in GROUPS[name]]
    assert cases(name).model.groups == [GROUPS[name]] * 6


def test_windows_of_another_length_are_run_by_the_same_model(cases):
    case = cases("gemma3")
    whole = run_all(case)
    short = SimpleNamespace(model=case.model, dense=case.dense, ids=case.ids[:3, :13])
    assert difference(run_all(short), whole[:3, :13]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_no_more_of_the_tables_is_read_than_needed(name, cases, monkeypatch):
    """Embedding rows of tokens that do not occur may hold anything, and the head comes in blocks."""
    case = cases(name)
    table = case.model._paths[case.model._embedding] + ".weight"
    unused = torch.ones(320, dtype=torch.bool)
    unused[case.ids] = False
    unused[:2] = False  # of these it is tried whether layers need the tokens

    def spoilt(wanted):
        tensor = as_stored(case.dense, wanted).clone()
        if wanted == table:
            tensor[unused] = torch.nan
        return tensor

    model = StreamedModel(case.config, spoilt, CPU)
    assert torch.equal(model.embed(case.ids), case.model.embed(case.ids))
    assert len(model._embedding.weight) <= (~unused).sum()
    monkeypatch.setattr(streamed, "HEAD_BYTES", 4 * 120 * 50)  # 120 tokens
    shapes = []
    hook = case.model._head.register_forward_hook(lambda head, args, out: shapes.append((head.weight.shape, out.shape)))
    case.model.loss(case.model.embed(case.ids), case.ids)
    hook.remove()
    assert len(shapes) == 7  # 320 entries in blocks of 50
    assert all(weight.numel() <= 120 * 50 and logits.numel() <= 120 * 50 for weight, logits in shapes)


def test_weights_in_bfloat16_are_computed_with_in_float32(cases):
    case = cases("llama")
    model = StreamedModel(case.config, lambda name: as_stored(case.dense, name).bfloat16(), CPU)
    rounded = case.stock.get_input_embeddings().weight.bfloat16().float()
    assert torch.equal(model.embed(case.ids), rounded[case.ids])
    assert model.loss(model.embed(case.ids), case.ids) == pytest.approx(
        case.model.loss(model.embed(case.ids), case.ids), abs=0.05
    )


def test_layers_that_need_the_tokens_are_refused(cases, monkeypatch):
    case = cases("llama")
    base = type(case.stock.base_model)
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda self, ids, **kwargs: forward(self, ids, tokens=ids, **kwargs))
    with pytest.raises(RrtcError, match="'llama' model need the tokens"):
        StreamedModel(case.config, lambda name: as_stored(case.dense, name), CPU)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_an_ordinary_backward(name, cases, batches):
    case = cases(name)
    entering, states = [], case.model.embed(case.ids)
    for number in range(6):
        entering.append(states.clone())
        case.model.run_layer(number, case.dense.layer(number, CPU), states)
    gradient, labels = case.model.loss_gradient(states, case.ids, seed=3)
    assert torch.equal(case.model.loss_gradient(states, case.ids, labels)[0], gradient)
    at_end = gradient.clone()

    found = defaultdict(list)
    for number in reversed(range(6)):
        before = entering[number].clone()
        returned = case.model.back_through(
            number,
            case.dense.layer(number, CPU),
            entering[number],
            gradient,
            lambda path, output_gradient, number=number: found[number, path].append(output_gradient),
        )
        assert returned is gradient and torch.equal(entering[number], before)

    expected, ends, hooks = {}, {}, []
    layers = decoder_layers(case.stock)
    hooks.append(layers[0].register_forward_pre_hook(lambda module, args: ends.update(entering=args[0])))
    hooks.append(layers[5].register_forward_hook(lambda module, args, output: ends.update(leaving=first(output))))
    for number, layer in enumerate(layers):
        for path, module in matrices_of(layer).items():

            def keep(module, args, output, key=(number, path)):
                output.register_hook(lambda output_gradient: expected.update({key: output_gradient.flatten(0, -2)}))

            hooks.append(module.register_forward_hook(keep))
    logits = case.stock(case.ids, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    likelihood = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum()
    first_gradient, last_gradient = torch.autograd.grad(-likelihood, [ends["entering"], ends["leaving"]])
    assert difference(at_end, last_gradient) < 1e-4
    assert difference(gradient, first_gradient) < 1e-4
    assert set(found) == set(expected) and len(found) == sum(len(matrices_of(layer)) for layer in layers)
    for key, output_gradient in expected.items():
        assert difference(torch.cat(found[key]), output_gradient) < 1e-4


@pytest.mark.slow
def test_labels_are_sampled_from_the_models_own_distribution(cases, batches):
    case = cases("llama")
    ids = case.ids[:1, :3].expand(1000, 3)
    states = SimpleNamespace(model=case.model, dense=case.dense, ids=ids)
    left = run_all(states)
    _, labels = case.model.loss_gradient(left, ids, seed=1)
    with torch.no_grad():
        wanted = case.stock(ids[:1]).logits[0].softmax(-1)  # (3, vocabulary)
    for position in range(3):
        counts = torch.bincount(labels[:, position], minlength=320)
        sigma = (1000 * wanted[position] * (1 - wanted[position])).sqrt()
        assert ((counts - 1000 * wanted[position]).abs() <= 5 * sigma + 2).all()
    _, again = case.model.loss_gradient(left, ids, seed=1)
    _, others = case.model.loss_gradient(left, ids, seed=2)
    assert torch.equal(labels, again) and not torch.equal(labels, others)
