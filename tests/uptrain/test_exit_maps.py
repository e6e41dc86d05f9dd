"""Exits with a linear map of their own: what they say wherever a model is left, how the map is fitted, and that nothing
else changes by it."""

import copy
import shutil
from pathlib import Path

import pytest
import torch
from pico import EVERY_ARCHITECTURE, pico_config, save_pico
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache
from typer.testing import CliRunner
from uptraining import interrupt_at, metrics, weights

from rrtc import api, scoring
from rrtc.cli.app import app
from rrtc.errors import RrtcError, WrongUsage
from rrtc.export.stage import export
from rrtc.generate.quality import Scored
from rrtc.init.stage import init
from rrtc.io.provenance import read_provenance
from rrtc.io.recursive import trained_exits
from rrtc.io.source import load_model
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.graft_rrt import find_layers
from rrtc.model.halves_rrt import Halves, run
from rrtc.patterns import make_plan
from rrtc.plan import Plan, read_visits
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.architecture import decoder_layers, read_architecture, read_plan
from rrtc.stock.parts import Parts, states_of
from rrtc.text.windows import Windows
from rrtc.uptrain.exits import RIDGE, add_exits, exits_of, fit_exits, with_exits
from rrtc.uptrain.job import prepare
from rrtc.uptrain.optimizer import parameter_groups
from rrtc.uptrain.rate import EXITS
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.student import Student

ENDS = (1, 3)  # of the first loops of three, each of two layers


def looped(architecture: str = "llama", kind: type = RrtForCausalLM) -> RrtForCausalLM:
    """A recursive pico model of three loops without maps, its weights random; in eval mode, float64."""
    config = pico_config(architecture)
    plan = make_plan(read_architecture(config), InitRecipe(rank=3, loops=3))
    torch.manual_seed(0)
    model = kind(RrtConfig.of(plan, config)).eval().double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B") or parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def with_maps(model: RrtForCausalLM) -> RrtForCausalLM:
    """The same with a random map at each exit."""
    model = copy.deepcopy(model)
    add_exits(model, with_exits(read_plan(model.config)))
    with torch.no_grad():
        for number, parameter in enumerate(exits_of(model).values()):
            draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number), dtype=parameter.dtype)
            parameter.copy_(draw / len(draw) ** 0.5)
    return model


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(0))


def left_after(model: RrtForCausalLM, place: int, ids: Tensor) -> Tensor:
    """The logits of `model` cut off after the layer at `place`, with the map of its exit by hand."""
    way_out = decoder_layers(model)[place].exit.weight
    shorter = copy.deepcopy(model)
    parent, name = find_layers(shorter.stock, len(model.config.visits))
    layers = nn.ModuleList(list(getattr(parent, name))[: place + 1])
    setattr(parent, name, layers)

    def mapped(module, args, output):
        states = states_of(output) @ way_out.T
        return states if isinstance(output, Tensor) else (states, *output[1:])

    layers[-1].register_forward_hook(mapped)
    return shorter(ids, use_cache=False).logits


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
@torch.no_grad()
def test_whoever_leaves_the_model_goes_through_the_map(architecture, ids):
    plain = looped(architecture)
    model = with_maps(plain)
    # Gemma 2 computes softmax in float32: a token by itself may differ from one in its text by so much.
    near = {"atol": 1e-6, "rtol": 1e-5} if architecture == "gemma2" else {"atol": 1e-7, "rtol": 1e-7}
    assert torch.equal(model(ids).logits, plain(ids).logits)  # whose whole passes know nothing of it
    parts = Parts(model)
    _, outputs = parts.run(ids, ENDS)
    for place, output in zip(ENDS, outputs, strict=True):
        expected = left_after(model, place, ids)
        torch.testing.assert_close(parts.head(parts.after(ids, place, output).flatten(0, 1)), expected.flatten(0, 1))
        with parts.left_after(place):
            torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
        cache = DynamicCache(config=model.config)
        run(model, ids[:1, :-1], cache)
        halves = Halves(model, place, cache, ids[:1, :-1])
        guessed = halves.head.over_all(halves.early(int(ids[0, -1])))[0]
        said = guessed > -torch.inf
        torch.testing.assert_close(guessed[said], expected[0, -1][said], **near)
        torch.testing.assert_close(
            halves.late()[0], plain(ids[:1]).logits[0, -1], **near
        )  # from states without the map
    assert (expected - parts.head(outputs[1][0] if isinstance(outputs[1], tuple) else outputs[1][0])).abs().max() > 0.01


@torch.no_grad()
def test_scores_and_the_engine_leave_by_the_map(ids):
    model = with_maps(looped()).float()
    found = scoring.score_tokens(model, Windows(ids, 1.0), ENDS)
    logits = left_after(model, ENDS[0], ids)
    expected = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(found[1].loss.flatten(), expected)
    _, losses, sure = Scored(model, ids[:1])._first[0]
    torch.testing.assert_close(losses[:-1], expected[: len(ids[0]) - 1])
    torch.testing.assert_close(sure, logits[0].softmax(-1).amax(-1))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma3"])
@torch.no_grad()
def test_a_map_is_the_least_squares_one(architecture, ids):
    model = looped(architecture)
    add_exits(model, with_exits(read_plan(model.config)))
    ids = torch.randint(3, 300, (16, 24), generator=torch.Generator().manual_seed(1))
    _, outputs = Parts(model).run(ids, (*ENDS, 5))
    *starts, end = (states_of(output).flatten(0, 1) for output in outputs)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    fit_exits(model, ENDS, ids)
    weights = 1 / end.norm(dim=-1, keepdim=True)
    for place, start in zip(ENDS, starts, strict=True):
        scaled = start * weights
        ridge = (RIDGE * scaled.square().sum(0).mean()) ** 0.5 * torch.eye(scaled.shape[1], dtype=scaled.dtype)
        target = torch.cat([end * weights, torch.zeros_like(ridge)])
        expected = torch.linalg.lstsq(torch.cat([scaled, ridge]), target).solution.T
        torch.testing.assert_close(decoder_layers(model)[place].exit.weight, expected, rtol=1e-6, atol=1e-8)
    maps = exits_of(model)
    assert len(maps) == 2 and all(
        name.endswith(f".{place}.exit.weight") for place, name in zip(ENDS, maps, strict=True)
    )
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters() if name not in maps)


# -- the plan


def test_the_plan_counts_maps_and_refuses_them_where_no_loop_ends():
    config = pico_config("llama")
    plan = with_exits(make_plan(read_architecture(config), InitRecipe(rank=3, loops=3)))
    model = RrtForCausalLM(RrtConfig.of(plan, config))
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plan.parts["exits"] == 2 * config.hidden_size**2
    assert [visit.get("exit") for visit in model.config.visits] == [None, True, None, True, None, None]
    assert all(torch.equal(parameter, torch.eye(len(parameter))) for parameter in exits_of(model).values())
    fields = [visit.fields() for visit in plan.visits]
    assert read_visits(fields) == plan.visits
    for value in ("yes", 1, None):
        with pytest.raises(ValueError, match="exit"):
            read_visits([fields[0], fields[1] | {"exit": value}, *fields[2:]])
    misplaced = read_visits([fields[0] | {"exit": True}, *fields[1:]])
    with pytest.raises(WrongUsage, match="Layer 0 has an exit, and does not end a loop"):
        Plan(plan.architecture, misplaced, plan.norms)


# -- as a stage


def recipe(root: Path, **asked) -> Recipe:
    learned = {
        "data": [str(root / "text.txt")], "context": 32, "tokens": 32 * 4 * 8, "batch_size": 4, "micro_batch": 2,
        "precision": "float32", "save_every": 4,
    }  # fmt: skip
    return Recipe.model_validate({"uptrain": learned | asked})


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> Path:
    """A folder with a tied model, and that with exits beside a model that stays as it is."""
    root = tmp_path_factory.mktemp("maps")
    (root / "text.txt").write_text("It rained, and then it rained again. " * 90)
    save_pico(root / "dense")
    init(str(root / "dense"), str(root / "tied"), Recipe.model_validate({"init": {"rank": 4, "measure_tokens": 0}}))
    uptrain(str(root / "tied"), str(root / "exits"), recipe(root, exits="frozen"))
    return root


@pytest.mark.slow
def test_a_frozen_model_stays_what_it_is_and_its_exit_learns(stages):
    ours, before = (weights(stages / name) for name in ("exits", "tied"))
    assert ours.keys() - before.keys() == {"model.layers.2.exit.weight"}
    assert all(torch.equal(ours[name], tensor) for name, tensor in before.items())
    way_out = ours["model.layers.2.exit.weight"]
    assert (way_out - torch.eye(len(way_out))).abs().max() > 0.1  # it was fitted: 8 steps do not go so far
    steps = metrics(stages / "exits")
    assert steps[0]["loss"] is steps[0]["kl"] is None  # of the model itself, which does not learn
    assert steps[-1]["objective"] < steps[0]["objective"]
    for step in steps:
        assert step["objective"] == pytest.approx(step["exit_1_loss"] + step["exit_1_kl"], rel=1e-5)
    measured = read_provenance(stages / "exits")["measured"]["uptrain"]
    assert measured["learning_rate"] == EXITS and measured["teacher"] is None
    assert trained_exits(stages / "exits") == (2,) and trained_exits(stages / "tied") == ()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_command_shows_what_the_exits_learned(stages, tmp_path, optimizer):
    asked = ["--data", str(stages / "text.txt"), "--context", "32", "--tokens", "256", "--optimizer", optimizer]
    command = ["uptrain", str(stages / "tied"), "-o", str(tmp_path / "out"), "--exits", "frozen", *asked]
    done = CliRunner().invoke(app, command, env={"COLUMNS": "160"})
    assert done.exit_code == 0, done.output
    assert "exit after loop 1, loss" in done.stdout and "exit after loop 1, KL to the model's own end" in done.stdout


@pytest.mark.slow
def test_a_map_that_the_weights_lack_is_missed(stages, tmp_path):
    folder = shutil.copytree(stages / "exits", tmp_path / "exits")
    tensors = weights(folder)
    del tensors["model.layers.2.exit.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    lacks = "have no model.layers.2.exit.weight, which the model's config.json asks for"
    for use in (load_model, api.load, lambda where: uptrain(str(where), str(tmp_path / "out"), recipe(stages))):
        with pytest.raises(RrtcError, match=lacks):
            use(folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_interrupted_run_goes_on_from_the_map_that_it_has(stages, tmp_path, monkeypatch):
    asked = recipe(stages, exits="frozen")
    with monkeypatch.context() as patched:
        interrupt_at(patched, 11)  # in the sixth step, of two micro-batches each
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(stages / "tied"), str(tmp_path / "out"), asked)
    uptrain(str(stages / "tied"), str(tmp_path / "out"), asked, resume=True)
    ours, theirs = ((folder / "model.safetensors").read_bytes() for folder in (tmp_path / "out", stages / "exits"))
    assert ours == theirs


@pytest.mark.slow
def test_maps_go_where_the_model_goes_and_guess_there(stages, tmp_path, ids):
    export(str(stages / "exits"), str(tmp_path / "out"), recipe(stages))
    ours, before = (weights(folder) for folder in (tmp_path / "out", stages / "exits"))
    assert ours.keys() == before.keys() and all(torch.equal(ours[name], before[name]) for name in ours)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert model.generation_config.speculate == {"exit": 2}
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    plain = model.generate(ids[:1], speculate=False, **settings)
    assert torch.equal(model.generate(ids[:1], **settings), plain)
    as_dense = recipe(stages).model_copy(update={"export": ExportRecipe(format="dense")})
    export(str(stages / "exits"), str(tmp_path / "dense"), as_dense)
    assert not any("exit" in name for name in weights(tmp_path / "dense"))
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").generate(ids[:1], **settings), plain)


@pytest.mark.slow
def test_a_map_is_not_among_what_is_rounded(stages, tmp_path):
    as_int8 = recipe(stages).model_copy(
        update={"export": ExportRecipe(quantize="int8", calibrate_tokens=256, calibrate_context=32)}
    )
    export(str(stages / "exits"), str(tmp_path / "out"), as_int8)
    ours, before = (weights(folder) for folder in (tmp_path / "out", stages / "exits"))
    name = "model.layers.2.exit.weight"
    assert torch.equal(ours[name], before[name])


@pytest.mark.slow
def test_healing_again_leaves_maps_as_they_are(stages, tmp_path):
    uptrain(str(stages / "exits"), str(tmp_path / "healed"), recipe(stages, learning_rate=1e-3))
    ours, before = (weights(folder) for folder in (tmp_path / "healed", stages / "exits"))
    same = {name for name in before if torch.equal(ours[name], before[name])}
    assert "model.layers.2.exit.weight" in same and len(same) < len(before) / 2
    assert trained_exits(tmp_path / "healed") == ()  # they are of a model that was
    for folder, fitted in ((stages / "exits", ()), (tmp_path / "healed", (2,)), (stages / "tied", (2,))):
        assert prepare(folder, recipe(stages, exits="frozen").uptrain).fitted_exits == fitted


@pytest.mark.slow
def test_exits_that_learn_jointly_have_maps_at_a_rate_of_their_own(stages, tmp_path):
    asked = recipe(stages, exits="joint", learning_rate=1e-4, tokens=32 * 4 * 3)
    uptrain(str(stages / "tied"), str(tmp_path / "out"), asked)
    assert {"loss", "kl", "exit_1_kl"} < metrics(tmp_path / "out")[0].keys()
    ours, before = (weights(folder) for folder in (tmp_path / "out", stages / "tied"))
    assert ours.keys() - before.keys() == {"model.layers.2.exit.weight"}
    model = Student.from_pretrained(tmp_path / "out")
    groups = {group["role"]: group for group in parameter_groups(model, asked.uptrain, 1e-4)}
    assert groups["exits"]["lr"] == EXITS and groups["exits"]["params"] == list(exits_of(model).values())
    assert groups["embeddings"]["lr"] == 1e-4
    assert not any(
        parameter is way_out for parameter in groups["embeddings"]["params"] for way_out in exits_of(model).values()
    )


@pytest.mark.parametrize(
    ("asked", "named"),
    [({"stability": "admin"}, "stability"), ({"regularizers": {"bmi": 0.02}}, "bmi"), ({"fsdp": True}, "fsdp")],
)
def test_what_does_not_go_with_a_frozen_model_is_refused(asked, named):
    with pytest.raises(ValidationError, match=f"exits 'frozen' are a stage of their own, and do not go with {named}"):
        UptrainRecipe(exits="frozen", **asked)
