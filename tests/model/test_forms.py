"""Visits whose matrices have different forms (tied, low-rank, own), and FFNs narrower than the dense model's."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from exports import IDS, STRANGER, logits_of, run_python
from mixed_forms import RANKS, mixed, mixed_config, mixed_plan, save_mixed
from pico import EVERY_ARCHITECTURE, pico_config, pico_model
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from rrtc.api import inspect
from rrtc.cli import tables
from rrtc.errors import WrongUsage
from rrtc.export import stage
from rrtc.export.formats import FORMATS
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.graft_rrt import RelaxedLinear, find_layers, graft, matrices_of
from rrtc.patterns import make_plan
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture, read_plan

SHARDS = 100_000

everywhere = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
both_norms = pytest.mark.parametrize("norms", ["per_visit", "shared"])


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance * expected.abs().max().item(), rtol=0)


# What it costs


def keys_of(plan: Plan) -> dict[str, tuple[str, torch.Size]]:
    """(part, shape) of every matrix parameter inside the layers, by the name it has after "slots."."""
    keys = {}
    for visit in plan.visits:
        for matrix in plan.matrices(visit):
            name, form, (inputs, outputs) = matrix.name, visit.forms.get(matrix.name, "tied"), visit.shape(matrix)
            own = f"{visit.slot}.loops.{visit.loop}.{name}"
            users = [v for v in plan.visits if v.slot == visit.slot and v.forms.get(name, "tied") == "tied"]
            if form == "tied":
                keys[f"{visit.slot}.shared.{name}.weight"] = "shared" if len(users) > 1 else "own", (outputs, inputs)
            if form == "own":
                keys[f"{own}.weight"] = "own", (outputs, inputs)
            else:
                part, rank = {"tied": "lora"}.get(form, form), RANKS[form]
                keys[f"{own}.A"], keys[f"{own}.B"] = (part, (rank, inputs)), (part, (outputs, rank))
            if matrix.bias:
                tied_bias = form == "tied" and plan.norms == "shared"
                place = f"{visit.slot}.shared.{name}" if tied_bias else own
                keys[f"{place}.bias"] = "norms_and_biases", (outputs,)
    return keys


@both_norms
@everywhere
def test_names_shapes_parts_and_bytes_are_the_plans(architecture, norms, tmp_path):
    plan, model = mixed_plan(architecture, norms), mixed(architecture, norms)
    keys, counted, found = keys_of(plan), {}, set()
    for name, parameter in model.named_parameters():
        inside = name.partition("slots.")[2]
        if inside in keys:
            found.add(inside)
            part, shape = keys[inside]
            assert tuple(parameter.shape) == shape, name
        elif inside:
            assert parameter.dim() == 1, name  # a norm
            part = "norms_and_biases"
        elif name.endswith(("embed_tokens.weight", "embed_in.weight", "wte.weight", "wpe.weight")):
            part = "embeddings"
        else:
            part = "head" if name.startswith(("lm_head", "embed_out")) else "norms_and_biases"
        counted[part] = counted.get(part, 0) + parameter.numel()
    assert found == keys.keys()
    assert {part: size for part, size in plan.parts.items() if size} == counted
    assert counted.keys() >= {"shared", "own", "low_rank", "lora"}
    assert plan.parameters == model.num_parameters() == plan.summary(4)["params_total"]
    model.save_pretrained(tmp_path)
    assert sum(4 * tensor.numel() for tensor in load_file(tmp_path / "model.safetensors").values()) == (
        4 * plan.parameters
    )


@everywhere
def test_flops_are_those_that_torch_counts(architecture):
    """Of one token, in matrix products with a weight: attention's own are batched ones."""
    model, plan = mixed(architecture), mixed_plan(architecture)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(IDS[:1, :1], use_cache=False)
    counts = counter.get_flop_counts()["Global"]
    assert plan.flops_per_token == sum(counts.get(op, 0) for op in (torch.ops.aten.mm, torch.ops.aten.addmm))
    assert plan.flops_per_token < plan.architecture.flops_per_token
    assert plan.summary(2)["flops_per_token"] == plan.flops_per_token


def test_narrowing_and_low_rank_cost_what_their_sizes_say():
    """By hand: layer 5 of the pico Llama is low-rank (7) throughout, with 70 neurons of 80."""
    plan = make_plan(read_architecture(pico_config("llama")), InitRecipe(loops=1))
    last = mixed_plan("llama").visits[5]
    changed = replace(plan, visits=(*plan.visits[:5], replace(last, slot=5, loop=0)))
    dense = 2 * 48 * 48 + 2 * 48 * 24 + 3 * 48 * 80
    low_rank = 7 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 70))
    assert changed.parts["low_rank"] == low_rank and changed.parts["lora"] == 0
    assert changed.parameters == plan.parameters - dense + low_rank
    assert changed.flops_per_token == plan.flops_per_token - 2 * dense + 2 * low_rank
    assert changed.kv_bytes_per_token(2) == plan.kv_bytes_per_token(2)


# What it computes


@both_norms
@everywhere
def test_the_dense_export_is_the_stock_model_that_computes_the_same(architecture, norms, tmp_path, monkeypatch):
    monkeypatch.setattr("rrtc.io.weights.BLOCK_NUMBERS", 500)  # several blocks even for a pico model
    source, target = save_mixed(tmp_path / "rrt", architecture, norms), tmp_path / "dense"
    target.mkdir()
    parameters = FORMATS["dense"].write(source, target, torch.float32, SHARDS)
    stock, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    assert type(stock).__module__.startswith("transformers.")
    assert parameters == stock.num_parameters() == mixed_plan(architecture, norms).architecture.parameters
    expected = logits_of(mixed(architecture, norms))
    close(logits_of(stock), expected)

    plan, (parent, name) = mixed_plan(architecture, norms), find_layers(stock, 6)
    for visit, layer in zip(plan.visits, getattr(parent, name), strict=True):
        for matrix in plan.matrices(visit):
            module = layer.get_submodule(matrix.name)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight  # (outputs, inputs)
            inputs, outputs = visit.shape(matrix)
            assert (weight != 0).any(0).sum() == inputs and (weight != 0).any(1).sum() == outputs
            for part in weight.chunk(len(matrix.parts)) if matrix.name in visit.shapes else ():
                assert not part[outputs // len(matrix.parts) :].any() and not part[:, inputs:].any()


def test_the_matrices_of_a_dense_export_are_the_multiplied_out_ones(tmp_path):
    """Phi-3's fused FFN, tensor by tensor, from the names in the recursive file."""
    source, target = save_mixed(tmp_path / "rrt", "phi3"), tmp_path / "dense"
    target.mkdir()
    FORMATS["dense"].write(source, target, torch.float32, 10**9)
    made, dense = load_file(source / "model.safetensors"), load_file(target / "model.safetensors")
    slot, up, down = "model.slots.2.loops.", "mlp.gate_up_proj", "mlp.down_proj"
    own, low_rank = made[f"{slot}0.{up}.weight"], made[f"{slot}1.{up}.B"] @ made[f"{slot}1.{up}.A"]
    for layer, width, product in ((2, 52, own), (5, 70, low_rank)):
        expected = torch.zeros(160, 48)
        expected[:width], expected[80 : 80 + width] = product[:width], product[width:]
        close(dense[f"model.layers.{layer}.{up}.weight"], expected, 1e-6)
    expected = torch.zeros(48, 80)
    tied = "model.slots.1.shared.mlp.down_proj.weight", "model.slots.1.loops.1.mlp.down_proj"
    expected[:, :44] = made[tied[0]] + made[f"{tied[1]}.B"] @ made[f"{tied[1]}.A"]
    close(dense[f"model.layers.4.{down}.weight"], expected, 1e-6)


def exact(architecture: str, form: str) -> tuple[RrtForCausalLM, torch.nn.Module]:
    """(a model whose matrices all have `form` and are exactly those of a dense model, the dense model)."""
    dense = pico_model(architecture)
    plan = make_plan(read_architecture(dense.config), InitRecipe(rank=0))
    visits = [
        replace(
            visit,
            forms={m.name: form for m in plan.matrices(visit)},
            ranks={m.name: min(m.inputs, m.outputs) if form == "low_rank" else 0 for m in plan.matrices(visit)},
        )
        for visit in plan.visits
    ]
    config = RrtConfig(base_config=dense.config, visits=[asdict(visit) for visit in visits])
    model = RrtForCausalLM(config).eval()
    parent, name = find_layers(dense, 6)
    prefix = next(path for path, module in dense.named_modules() if module is parent)
    inside = f"{prefix}.{name}."
    tensors = {key: tensor for key, tensor in dense.state_dict().items() if not key.startswith(inside)}
    for visit, layer in zip(visits, getattr(parent, name), strict=True):
        own, matrices = f"{prefix}.slots.{visit.slot}.loops.{visit.loop}.", matrices_of(layer)
        for key, tensor in layer.state_dict().items():
            path = key.removesuffix(".weight")
            if path not in matrices:
                tensors[own + key] = tensor
                continue
            weight = tensor.T if isinstance(matrices[path], Conv1D) else tensor
            if form == "own":
                tensors[own + key] = weight
            else:
                u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
                tensors[f"{own}{path}.A"], tensors[f"{own}{path}.B"] = vt.float(), (u * s).float()
    model.load_state_dict(tensors)
    return model, dense


@pytest.mark.parametrize("form", ["low_rank", "own"])
@everywhere
def test_exact_factors_at_full_rank_and_exact_own_matrices_are_the_dense_model(architecture, form):
    model, dense = exact(architecture, form)
    assert not any(".shared." in name for name, _ in model.named_parameters())
    close(logits_of(model), logits_of(dense))


@everywhere
def test_forms_and_widths_are_seen_in_the_result(architecture):
    """Each kind of parameter of the mixed model matters: without it the logits are others."""
    expected = logits_of(mixed(architecture))
    for wanted in (".shared.", ".A", ".B", ".loops.0."):
        model = copy.deepcopy(mixed(architecture))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "slots." in name and wanted in name and parameter.dim() > 1:
                    parameter.mul_(0.5)
        assert (logits_of(model) - expected).abs().max() > 1e-3 * expected.abs().max()


@both_norms
@everywhere
def test_cached_generation_equals_uncached(architecture, norms):
    model, prompt = mixed(architecture, norms), IDS[:1, :11]
    options = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "output_logits": True}
    runs = [
        model.generate(
            prompt, attention_mask=torch.ones_like(prompt), use_cache=cache, return_dict_in_generate=True, **options
        )
        for cache in (True, False)
    ]
    assert torch.equal(runs[0].sequences, runs[1].sequences)
    close(torch.stack(runs[0].logits), torch.stack(runs[1].logits))


# Saving and loading


@both_norms
@everywhere
def test_it_loads_as_it_was_saved(architecture, norms, tmp_path):
    model = mixed(architecture, norms)
    model.save_pretrained(tmp_path / "first")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "first", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert read_plan(loaded.config) == mixed_plan(architecture, norms)
    loaded.save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.slow
def test_a_recursive_export_loads_and_generates_where_rrtc_is_not(tmp_path):
    chosen, targets = [("llama", "per_visit"), ("phi3", "per_visit"), ("gpt2", "shared"), ("gpt_neox", "shared")], []
    for architecture, norms in chosen:
        source = save_mixed(tmp_path / f"{architecture}-rrt", architecture, norms)
        targets.append(tmp_path / architecture)
        targets[-1].mkdir()
        parameters = FORMATS["recursive"].write(source, targets[-1], None, 10**9)
        assert parameters == mixed_plan(architecture, norms).parameters
    run_python(STRANGER, json.dumps(IDS.tolist()), "out.safetensors", *map(str, targets), cwd=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    for (architecture, norms), target in zip(chosen, targets, strict=True):
        model = mixed(architecture, norms)
        torch.testing.assert_close(found[f"{target}:logits"], logits_of(model), atol=1e-6, rtol=0)
        greedy = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False)
        assert torch.equal(found[f"{target}:greedy"], greedy)


@pytest.mark.slow
@pytest.mark.parametrize("architecture, norms", [("phi3", "per_visit"), ("gpt2", "shared")])
def test_an_export_in_16_bits_is_verified_and_the_card_says_what_the_matrices_are(architecture, norms, tmp_path):
    source = save_mixed(tmp_path / "rrt", architecture, norms)
    options = Recipe(export={"format": "dense", "dtype": "bfloat16"})
    result = stage.export(str(source), str(tmp_path / "out"), options)
    assert result["max_logit_difference"] < 1e-3 * result["largest_logit"] < result["largest_logit"]
    assert result["rounding_logit_difference"] > 0
    card = (tmp_path / "out/README.md").read_text()
    plan = mixed_plan(architecture)
    forms = [
        "own" if form == "tied" and len(plan.slots[visit.slot]) == 1 else form
        for visit in plan.visits
        for form in (visit.forms.get(matrix, "tied") for matrix in visit.ranks)
    ]
    assert (
        f"- Matrices of all layers: {forms.count('tied')} share one with other layers; {forms.count('low_rank')} are a "
        f"low-rank product alone; {forms.count('own')} are a layer's own"
    ) in card
    assert "- Layers with FFN neurons removed: `1 2 4 5`\n" in card and "- LoRA rank: 3\n" in card


@everywhere
def test_a_config_without_forms_and_shapes_loads_as_before(architecture, tmp_path):
    plan = make_plan(read_architecture(pico_config(architecture)), InitRecipe(rank=3))
    visits = [asdict(visit) for visit in plan.visits]
    torch.manual_seed(0)
    model = RrtForCausalLM(RrtConfig(base_config=pico_config(architecture), visits=visits)).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for visit in config["visits"]:
        assert visit.pop("forms") == visit.pop("shapes") == {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert read_plan(loaded.config) == plan
    assert "LoRA rank 3" in tables.visits(loaded.config.visits)
    stock = pico_model(architecture)
    graft(stock, config["visits"])
    assert stock.state_dict().keys() == model.state_dict().keys()


def test_inspect_shows_one_line_for_each_visit_with_forms(tmp_path):
    lines = tables.visits(inspect(str(save_mixed(tmp_path, "llama")))["visits"]).splitlines()
    assert lines[0] == "slot   0   layers 0, 3, LoRA rank 3"
    assert lines[1] == "slot   1   layers 1, 4, LoRA rank 3"
    ffn = "FFN: down_proj 44→48, gate_proj 48→44, up_proj 48→44"  # a config.json is sorted
    assert lines[2] == f"           layer 1: low rank: down_proj 7, gate_proj 7, q_proj 7, v_proj 7; {ffn}"
    assert lines[3] == f"           layer 4: {ffn}"
    assert lines[4] == "slot   2   layers 2, 5, which share no matrix"
    own = "down_proj, gate_proj, up_proj, k_proj, o_proj, q_proj, v_proj"
    assert lines[5].startswith(f"           layer 2: own: {own}; FFN: down_proj 52→48")
    assert len(lines) == 7


# Training


@both_norms
@everywhere
def test_gradients_reach_every_parameter_and_checkpointing_does_not_change_them(architecture, norms):
    found = []
    for checkpointing in (False, True):
        model = copy.deepcopy(mixed(architecture, norms)).train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        if checkpointing:
            (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
        calls = []
        for module in model.modules():
            if isinstance(module, RelaxedLinear):
                module.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(module))
        model(IDS, labels=IDS, use_cache=False).loss.backward()
        assert len(calls) == (1 + checkpointing) * len(set(calls))
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert not [name for name, gradient in found[0].items() if gradient is None]
    assert all(gradient.any() for name, gradient in found[0].items() if gradient.dim() > 1)
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


@everywhere
def test_a_step_lowers_the_loss_and_changes_every_matrix(architecture):
    model = copy.deepcopy(mixed(architecture)).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-3), []
    for _ in range(2):
        loss = model(IDS, labels=IDS, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert not [n for n, p in model.named_parameters() if p.dim() > 1 and torch.equal(p, before[n])]


@everywhere
def test_a_new_model_starts_with_factors_of_no_effect_and_random_own_matrices(architecture):
    torch.manual_seed(0)
    model = RrtForCausalLM(mixed_config(architecture))
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith(".B"):
            assert not parameter.any(), name
        elif name.endswith(".A"):
            assert 0.5 < parameter.std() * parameter.shape[1] ** 0.5 < 1.5, name
        elif ".loops." in name and parameter.dim() > 1:
            assert 0.02 < parameter.std() < 0.15, name  # initializer_range is 0.1; GPT-2 takes less for its outputs


# What is refused


def change(visit: int, **fields) -> dict:
    """`mixed_plan("llama")` with entries added to the fields of one visit, as keyword arguments of Plan."""
    plan = mixed_plan("llama")
    visits = list(plan.visits)
    visits[visit] = replace(visits[visit], **{name: getattr(visits[visit], name) | new for name, new in fields.items()})
    return {"architecture": plan.architecture, "visits": tuple(visits), "norms": plan.norms}


UP, DOWN, Q = "mlp.up_proj", "mlp.down_proj", "self_attn.q_proj"
REFUSED = {
    "no matrix 'mlp.upproj' in layer 3": (3, {"forms": {"mlp.upproj": "own"}}),
    "no matrix 'norm' in layer 3": (3, {"shapes": {"norm": (1, 1)}}),
    "'lowrank' is no form": (3, {"forms": {UP: "lowrank"}}),
    "form 'own' and the rank 3": (3, {"forms": {UP: "own"}}),
    "form 'low_rank' and the rank 0": (3, {"forms": {UP: "low_rank"}, "ranks": {UP: 0}}),
    "cannot have 48 and 81": (2, {"shapes": {UP: (48, 81)}}),
    "cannot have 48 and 0": (2, {"shapes": {UP: (48, 0)}}),
    "q_proj in layer 2, of 48 inputs and 48 outputs, cannot have 48 and 40": (2, {"shapes": {Q: (48, 40)}}),
    "Layers 0 and 3 cannot share mlp.up_proj": (3, {"shapes": {UP: (48, 60)}}),
}


@pytest.mark.parametrize("words", REFUSED)
def test_a_plan_with_impossible_forms_or_shapes_is_refused(words):
    visit, fields = REFUSED[words]
    with pytest.raises(WrongUsage, match=words):
        Plan(**change(visit, **fields))


def test_a_fused_matrix_loses_as_many_outputs_from_each_half():
    plan = mixed_plan("phi3")
    visit = replace(plan.visits[2], shapes={"mlp.gate_up_proj": (48, 101)})
    with pytest.raises(WrongUsage, match="cannot have 48 and 101"):
        replace(plan, visits=(*plan.visits[:2], visit, *plan.visits[3:]))


@pytest.mark.parametrize(
    "visit, field, values, words",
    [
        (3, "forms", {"mlp.upproj": "own"}, "mlp.upproj is no matrix of layer 3"),
        (3, "shapes", {"norm": [1, 1]}, "norm is no matrix of layer 3"),
        (3, "forms", {UP: "lowrank"}, "has the form 'lowrank'"),
        (3, "forms", {UP: "own"}, "mlp.up_proj of layer 3 has the form own and the rank 3"),
        (5, "ranks", {UP: 0}, "mlp.up_proj of layer 5 has the form low_rank and the rank 0"),
        (4, "shapes", {UP: [48, 60]}, "mlp.up_proj of layer 4 does not have the shape of the matrix it is tied to"),
    ],
)
def test_the_model_refuses_them_too_before_anything_is_replaced(visit, field, values, words):
    model, visits = pico_model("llama"), [asdict(v) for v in mixed_plan("llama").visits]
    before = list(model.state_dict())
    visits[visit][field] |= values
    with pytest.raises(ValueError, match=words):
        graft(model, visits)
    assert list(model.state_dict()) == before
