"""init under a budget: calibration, the planner and whole models, on pico models."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from initialized import logits, recipe
from pico import EVERY_ARCHITECTURE, VOCABULARY, pico_config, save_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rrtc import machine
from rrtc.errors import RrtcError
from rrtc.init import slots
from rrtc.init.allocate import allocate, alone, choose, together, visits_of
from rrtc.init.budget import measure_groups
from rrtc.init.calibrate import Calibration, calibrate
from rrtc.init.dry_run import dry_run
from rrtc.init.slots import joint_slot
from rrtc.init.stage import init
from rrtc.io.dense import DenseModel
from rrtc.io.provenance import read_provenance
from rrtc.io.source import find_model, load_tokenizer
from rrtc.patterns import make_plan
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture, read_plan
from rrtc.stock.streamed import StreamedModel
from rrtc.stock.trial import find_folds, find_neurons
from rrtc.text.calibration import calibration_windows
from rrtc.text.own import AT_ONCE, own_text
from rrtc.tying.joint import joint_costs

CPU = torch.device("cpu")


def small(**choices):
    return recipe(calibrate_tokens=768, **choices)


def plan_in(folder: Path) -> Plan:
    from transformers import AutoConfig

    import rrtc.model  # noqa: F401

    return read_plan(AutoConfig.from_pretrained(folder))


@pytest.fixture(scope="session")
def calibrated(dense, tmp_path_factory):
    """(dense model, calibration, neurons) of the pico Llama."""
    source = find_model(str(dense("llama")))
    model = DenseModel(source, find_folds(source.config())[0])
    windows = calibration_windows(InitRecipe(calibrate_tokens=768), load_tokenizer(source.folder), VOCABULARY, 128)
    neurons = find_neurons(source.config())
    streamed = StreamedModel(source.config(), model.raw, CPU)
    folder = tmp_path_factory.mktemp("calibration")
    return model, calibrate(model, streamed, neurons, windows, folder, CPU, lambda windows: None), neurons


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_a_budget_of_one_changes_nothing(dense, tmp_path, architecture):
    init(str(dense(architecture)), str(tmp_path / "out"), small(budget=1.0))
    expected = logits(dense(architecture))
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=2e-4 * expected.abs().max().item())
    assert plan_in(tmp_path / "out").non_embedding == read_architecture(pico_config(architecture)).non_embedding


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("sharing", ["auto", "cycle", "middle_sequence"])
def test_a_budget_is_met_within_a_per_cent(dense, tmp_path, architecture, sharing):
    measured = init(str(dense(architecture)), str(tmp_path / "out"), small(budget=0.72, sharing=sharing))
    plan = plan_in(tmp_path / "out")
    share = plan.non_embedding / plan.architecture.non_embedding
    assert 0.71 < share <= 0.72
    assert measured["params_non_embedding"] == plan.non_embedding
    stored = sum(t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert stored == plan.parameters
    if sharing == "cycle":
        assert [visit.slot for visit in plan.visits] == [0, 1, 2, 0, 1, 2]
    assert torch.isfinite(logits(tmp_path / "out")).all()


@pytest.mark.slow
def test_biases_of_untied_matrices_are_the_visits_own_where_norms_are_shared(dense, tmp_path):
    init(str(dense("gpt2")), str(tmp_path / "out"), small(budget=0.8, norms="shared"))
    assert torch.isfinite(logits(tmp_path / "out")).all()
    stored = sum(t.numel() for t in load_file(tmp_path / "out" / "model.safetensors").values())
    assert stored == plan_in(tmp_path / "out").parameters


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gpt2", "gemma3"])
def test_joint_at_full_rank_is_the_dense_model(dense, tmp_path, architecture):
    choices = small(shared_init="joint", sharing="sequence", rank=10_000)
    init(str(dense(architecture)), str(tmp_path / "out"), choices)
    expected = logits(dense(architecture))
    assert torch.allclose(logits(tmp_path / "out"), expected, atol=1e-3 * expected.abs().max().item())


def test_joint_is_closer_to_the_dense_model_than_average(dense, tmp_path):
    expected = logits(dense("llama"))
    far = {}
    for start in ("average", "joint"):
        init(str(dense("llama")), str(tmp_path / start), small(shared_init=start, sharing="sequence", rank=12))
        far[start] = (logits(tmp_path / start) - expected).square().mean().item()
    assert far["joint"] < 0.7 * far["average"]


def test_a_fixed_start_gets_the_largest_rank_that_fits(dense, tmp_path):
    init(str(dense("llama")), str(tmp_path / "out"), small(budget=0.8, sharing="cycle", shared_init="average"))
    plan = plan_in(tmp_path / "out")
    ranks = {rank for visit in plan.visits for rank in visit.ranks.values()}
    assert len(ranks) == 1
    assert plan.non_embedding <= 0.8 * plan.architecture.non_embedding
    larger = recipe(sharing="cycle", rank=ranks.pop() + 1)
    assert dry_run(str(dense("llama")), larger)["params_non_embedding"] > 0.8 * plan.architecture.non_embedding


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"budget": 0.6, "rank": 8}, "budget and rank both say how much to store"),
        ({"budget": 0.6, "size": "1MB"}, "size and budget both"),
        ({"sharing": "auto"}, "add a size or a budget"),
        ({"sharing": "auto", "budget": 0.5, "shared_init": "average"}, "must be joint"),
        ({"budget": 0.5, "sharing": "auto", "keep": 2}, "keep and loops say nothing"),
        ({"budget": 0.5, "sharing": "auto", "loops": 3}, "keep and loops say nothing"),
        ({"shared_init": "joint", "lora_init": "zero"}, "lora_init cannot be zero"),
    ],
)
def test_contradictions_are_refused(choices, says):
    with pytest.raises(ValueError, match=says):
        InitRecipe(**choices)


@pytest.mark.parametrize(
    ("choices", "says"),
    [
        ({"size": "130KB"}, "cannot be met: the least possible is"),
        ({"size": "70KB"}, "is less than the embeddings alone take"),
        ({"budget": 0.2, "sharing": "cycle"}, "cannot be met: the least possible is"),
        ({"budget": 0.2, "sharing": "cycle", "shared_init": "average"}, "cannot be met: the least possible is"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(dense, tmp_path, choices, says):
    with pytest.raises(RrtcError, match=re.escape(says)):
        init(str(dense("llama")), str(tmp_path / "out"), small(**choices))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RrtcError, match=re.escape(says)):  # from shapes alone, so that no calibration is in vain
        dry_run(str(dense("llama")), small(**choices))


def test_a_dry_run_under_a_budget_tells_the_size(dense):
    told = dry_run(str(dense("llama")), small(budget=0.7))
    assert told["params_non_embedding"] == int(0.7 * told["dense_params_non_embedding"])
    assert told["visits"] is None


@pytest.mark.slow
def test_the_planner_never_does_worse_than_either_parent(calibrated, tmp_path):
    model, calibration, neurons = calibrated
    seen = [calibration.seen(number, model.layer(number, CPU)) for number in range(model.depth)]
    singles = [alone(number, one, neurons) for number, one in enumerate(seen)]
    pairs = [together((n, n + 1), [seen[n], seen[n + 1]], neurons) for n in range(model.depth - 1)]
    pattern = make_plan(read_architecture(model.config), InitRecipe(budget=0.7, sharing="auto"))
    free = measure_groups(pattern, True, model, calibration, neurons, CPU, tmp_path)
    count = sum(one.weight.numel() for layer in seen for one in layer.values())

    def numbers(choices):
        return sum(choice.numbers for choice in choices)

    for share in (0.55, 0.7, 0.9):
        cost = {
            name: sum(c.cost for c in allocate(model.depth, groups, numbers, int(share * count)))
            for name, groups in {"auto": free, "alone": singles, "tied": pairs[::2]}.items()
        }
        assert cost["auto"] <= min(cost["alone"], cost["tied"]) * 1.01
        # Plain whitened SVD with the same rank share everywhere is one of the choices of `alone`.
        uniform = 0.0
        for layer in seen:
            for one in layer.values():
                outputs, inputs = one.weight.shape
                rank = int(share * outputs * inputs / (outputs + inputs))
                b, a = one.spectrum(rank).factors(slice(0, rank))
                uniform += one.cost(one.weight - b @ a)
        assert cost["alone"] < uniform


def test_a_price_buys_each_part_at_its_best(calibrated):
    model, calibration, neurons = calibrated
    groups = [alone(0, calibration.seen(0, model.layer(0, CPU)), neurons)]
    for price in (1e-9, 1e-6, 1e-4):
        (choice,) = choose(1, groups, price)
        for ways, (way, indices) in zip(groups[0].parts, choice.ways, strict=True):
            chosen = way.cost + sum(
                (c.costs[i] + price * c.numbers[i]).item() for c, i in zip(way.curves, indices, strict=True)
            )
            for other in ways:
                floor = other.cost + sum((c.costs + price * c.numbers).min().item() for c in other.curves)
                assert chosen <= floor + 1e-12


def test_predicted_costs_are_those_of_what_is_written(calibrated):
    """The curve of a tied pair against the cost of the joint solution itself."""
    model, calibration, neurons = calibrated
    seen = [calibration.seen(number, model.layer(number, CPU)) for number in (1, 2)]
    pair = together((1, 2), seen, neurons)
    (curve,) = next(way.curves for (way, *_) in pair.parts if way.curves[0].subject == "self_attn.q_proj")
    expected = joint_costs([one[curve.subject] for one in seen])
    assert torch.equal(curve.costs, expected)
    outputs, inputs = seen[0][curve.subject].weight.shape
    assert curve.numbers[3] == outputs * inputs + 2 * 3 * (outputs + inputs)
    layers = read_architecture(pico_config("llama")).layers
    visits = visits_of(choose(2, [pair], 1e-7), {n: layers[n].matrices for n in (1, 2)}, neurons)
    assert [(v.layer, v.slot, v.loop) for v in visits] == [(1, 0, 0), (2, 0, 1)]


def test_what_the_planner_lined_up_is_lined_up_once(calibrated, monkeypatch):
    """Neither tied nor single FFNs are lined up again where the plan has a width that the planner has weighed."""
    model, calibration, neurons = calibrated
    layers = {number: model.layer(number, CPU) for number in (0, 1)}
    seen = {number: calibration.seen(number, tensors) for number, tensors in layers.items()}
    groups = [together((0, 1), list(seen.values()), neurons), alone(0, seen[0], neurons), alone(1, seen[1], neurons)]
    architecture = read_architecture(pico_config("llama"))
    architecture = replace(architecture, layers=architecture.layers[:2])
    matrices = {number: layer.matrices for number, layer in enumerate(architecture.layers)}
    for chosen in (groups[:1], groups[1:]):
        visits = visits_of(choose(2, chosen, 1e-4), matrices, neurons)
        plan = Plan(architecture, tuple(visits), "per_visit")
        made = []
        for lineups in ([], [one for group in chosen for one in group.lineups]):
            with monkeypatch.context() as patch:
                if lineups:
                    patch.setattr(slots, "line_up", None)
                found = {}
                for visits_of_slot in plan.slots:
                    fresh = {visit.layer: dict(layers[visit.layer]) for visit in visits_of_slot}
                    found |= dict(joint_slot(plan, visits_of_slot, fresh, seen, neurons, lineups))
                made.append(found)
        first, second = made
        assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
        (width,) = {visit.shape(m)[0] for visit in visits for m in plan.matrices(visit) if m.name == neurons[0].reader}
        assert width < neurons[0].width


@pytest.mark.slow
def test_the_order_of_documents_does_not_matter(dense, tmp_path):
    from pydoc_data.topics import topics

    paragraphs = [p.replace("\n", " ") for topic in sorted(topics.values()) for p in topic.split("\n\n") if len(p) > 80]
    shuffled = random.Random(1).sample(paragraphs, len(paragraphs))
    found = []
    for name, order in (("a", paragraphs), ("b", shuffled)):
        text = tmp_path / f"{name}.txt"
        text.write_text("\n\n\n".join(order), encoding="utf8")
        init(str(dense("llama")), str(tmp_path / name), small(budget=0.7, calibrate_on=[str(text)]))
        found.append(load_file(tmp_path / name / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], atol=1e-5), name
    init(str(dense("llama")), str(tmp_path / "c"), small(budget=0.7, calibrate_on=[str(tmp_path / "a.txt")], seed=1))
    other = load_file(tmp_path / "c" / "model.safetensors")
    assert other.keys() != found[0].keys() or any(not torch.equal(t, other[n]) for n, t in found[0].items())


def test_calibration_reads_only_what_training_may_see(dense, tmp_path):
    from rrtc.text.sources import split

    documents = [f"document number {n} " + "words and more words " * 20 for n in range(150)]
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(documents), encoding="utf8")
    tokenizer = load_tokenizer(dense("llama"))
    choices = InitRecipe(calibrate_on=[str(text)], calibrate_tokens=100_000)
    decoded = tokenizer.decode(calibration_windows(choices, tokenizer, VOCABULARY, 64).flatten())
    training, held_out = split(documents)
    numbers = set(re.findall(r"document number (\d+) ", decoded))
    assert numbers and not numbers & {re.search(r"number (\d+) ", d)[1] for d in held_out}
    assert len(numbers) > 0.9 * len(training)


def test_a_model_writes_as_it_would_say(dense):
    """The first tokens it draws are those that it finds likely, and the same seed draws the same."""
    folder = dense("llama")
    tokenizer, steps = load_tokenizer(folder), []

    def written(seed: int, windows: int = 600) -> torch.Tensor:
        return torch.cat(list(own_text(folder, tokenizer, windows, 3, seed, steps.append)))

    ids = written(seed=0)
    assert ids.shape == (600, 3) and ids.dtype == torch.int64 and sum(steps) == 600 * 2
    assert torch.equal(ids, written(seed=0)) and not torch.equal(ids, written(seed=1))
    assert torch.equal(ids[:AT_ONCE], written(seed=0, windows=AT_ONCE))
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(ids[:1, :1]).logits[0, 0].softmax(-1)
    seen = torch.bincount(ids[:, 1], minlength=len(expected)) / 600
    # Of 600 draws, the squared distance from the distribution is about (1 - sum p^2) / 600.
    assert (seen - expected).square().sum() < 2 * (1 - expected.square().sum()) / 600


def test_a_model_larger_than_memory_cannot_write_text(dense, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MODEL_SHARE", 0)
    with pytest.raises(RrtcError, match="To write text, the whole model has to be in memory, and its .*B do not fit."):
        init(str(dense("llama")), str(tmp_path / "out"), small(budget=0.7, calibrate_on=["self"]))
    assert not list(tmp_path.iterdir())
    with pytest.raises(RrtcError, match="To write text"):
        dry_run(str(dense("llama")), small(budget=0.7, calibrate_on=["self"]))


def test_little_calibration_text_is_said(dense, tmp_path, capfd):
    (tmp_path / "notes.txt").write_text("A few words of nobody in particular. " * 40)
    tokenizer = load_tokenizer(dense("llama"))
    found = calibration_windows(InitRecipe(calibrate_on=[str(tmp_path / "notes.txt")]), tokenizer, VOCABULARY, 128)
    said = " ".join(capfd.readouterr().err.split())
    assert f"notes.txt has only {found.numel()} tokens to calibrate on, where 16384 were wanted" in said
    calibration_windows(InitRecipe(calibrate_tokens=found.numel()), tokenizer, VOCABULARY, 128)
    assert not capfd.readouterr().err


def test_a_model_that_computes_infinity_is_refused(tmp_path):
    """Its weights are finite."""
    folder = save_pico(tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("up_proj.weight", "down_proj.weight")):
            tensor *= 1e25
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RrtcError, match="dense computes NaN or infinity: transformers' loss on 48 tokens is nan"):
        init(str(folder), str(tmp_path / "out"), small(budget=0.7))


def test_a_model_that_computes_infinity_on_the_calibration_text_is_refused(tmp_path):
    """No token of the proof that the model is read right is one of the text's."""
    folder = save_pico(tmp_path / "dense", "gpt2", tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    space = load_tokenizer(folder)(" the the")["input_ids"][-1]
    tensors["transformer.wte.weight"][space] = 3e38  # the sum that LayerNorm takes the mean of is beyond float32
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(RrtcError, match=r"computes NaN or infinity on the calibration text \(inputs-\d, "):
        init(str(folder), str(tmp_path / "out"), small(budget=0.7))


@pytest.mark.slow
def test_calibration_on_the_models_own_text(dense, tmp_path):
    own = small(budget=0.7, calibrate_on=["self"])
    both = small(budget=0.7, calibrate_on=["self", "pydoc"])
    for name, choices in (("own", own), ("again", own), ("both", both)):
        init(str(dense("llama")), str(tmp_path / name), choices)
        assert not (tmp_path / name / "work").exists()
    assert torch.equal(logits(tmp_path / "own"), logits(tmp_path / "again"))
    assert not torch.equal(logits(tmp_path / "own"), logits(tmp_path / "both"))


def test_calibration_gathers_what_the_layers_see(calibrated):
    model, calibration, _ = calibrated
    assert isinstance(calibration, Calibration)
    seen = calibration.seen(2, model.layer(2, CPU))
    assert set(seen) == {m.name for m in read_architecture(pico_config("llama")).layers[2].matrices}
    assert seen["self_attn.q_proj"].inputs is seen["self_attn.k_proj"].inputs
    assert seen["mlp.up_proj"].gradients.matrix.dim() == 1 and seen["mlp.down_proj"].gradients.matrix.dim() == 2


@pytest.mark.slow
def test_what_was_chosen_is_in_the_provenance(dense, tmp_path):
    init(str(dense("llama")), str(tmp_path / "out"), small(budget=0.7))
    found = read_provenance(tmp_path / "out")
    assert found["recipe"]["init"]["sharing"] == "middle_cycle" and found["recipe"]["init"]["shared_init"] == "joint"
    assert found["measured"]["init"]["predicted_excess"] > 0
