"""The optimizer: each parameter takes the steps of its role, shared ones shorter steps; schedules are what they say."""

import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from mixed_forms import mixed_config, mixed_plan
from pico import pico_config
from uptraining import BATCH, CONTEXT, interrupt_at, metrics, settings, weights

from rrtc.errors import WrongUsage
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import load_recipe, with_flags
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.architecture import read_architecture
from rrtc.uptrain.job import prepare
from rrtc.uptrain.optimizer import make_optimizer, parameter_groups
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.trainer import DistillationTrainer

RATE = 1e-2
ADAMW = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8}


def recipe(**changes) -> UptrainRecipe:
    return UptrainRecipe.model_validate({"learning_rate": RATE, "weight_decay": 0.1} | changes)


def tied(architecture: str = "llama", **init) -> RrtForCausalLM:
    torch.manual_seed(0)
    config = pico_config(architecture)
    plan = make_plan(read_architecture(config), InitRecipe(rank=3, **init))
    visits = [asdict(visit) for visit in plan.visits]
    return RrtForCausalLM(RrtConfig(base_config=config, visits=visits, norms=plan.norms))


def by_name(model: torch.nn.Module, groups: list[dict]) -> dict[str, dict]:
    """The group of each trained parameter, which must be exactly one."""
    result = {}
    for name, parameter in model.named_parameters():
        found = [group for group in groups if any(parameter is other for other in group["params"])]
        assert len(found) == parameter.requires_grad, name
        if found:
            result[name] = found[0]
    assert sum(len(group["params"]) for group in groups) == len(result)
    return result


def trainer_of(folder: Path, output: Path, steps: int = 1, **changes) -> DistillationTrainer:
    return DistillationTrainer(prepare(folder, settings(**changes).uptrain), steps, output, save=False, callbacks=[])


# -- the groups


@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "phi3", "gpt_neox", "gpt2"])
def test_groups_by_role(architecture, norms):
    model = RrtForCausalLM(mixed_config(architecture, norms))
    groups = by_name(model, parameter_groups(model, recipe(), RATE))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            expected = "vectors"
        elif name.endswith((".A", ".B")):
            expected = "factors"
        else:
            expected = "matrices" if ".slots." in name else "embeddings"
        assert groups[name]["role"] == expected, name
        assert groups[name]["weight_decay"] == (0.0 if expected == "vectors" else 0.1)
    assert {group["role"] for group in groups.values()} == {"embeddings", "factors", "matrices", "vectors"}


@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", ["llama", "gpt_neox"])
def test_visits_are_those_that_use_a_parameter(architecture, norms):
    """In a plan where some matrices of a slot are tied by both visits, some by one and some by none."""
    model, plan = RrtForCausalLM(mixed_config(architecture, norms)), mixed_plan(architecture, norms)
    seen = set()
    for name, group in by_name(model, parameter_groups(model, recipe(), RATE)).items():
        expected = 1
        if ".shared." in name:
            slot, path = name.split(".slots.")[1].split(".shared.")
            path = path.rpartition(".")[0]
            expected = sum(visit.forms.get(path, "tied") == "tied" for visit in plan.slots[int(slot)])
            seen.add(expected)
        assert group["visits"] == expected, name
        assert group["lr"] == RATE / expected
    assert seen == {1, 2}


@pytest.mark.parametrize("loops", [1, 2, 3])
@pytest.mark.parametrize(("asked", "factor"), [("visits", None), (1.0, 1.0), ("0.7", 0.7)])
def test_learning_rate_of_shared_weights(loops, asked, factor):
    model = tied(loops=loops)
    groups = by_name(model, parameter_groups(model, recipe(shared_lr_scale=asked), RATE))
    expected = 1.0 if loops == 1 else factor or 1 / loops
    rates = {".shared." in name: set() for name in groups}
    for name, group in groups.items():
        rates[".shared." in name].add(group["lr"])
    assert rates == {True: {RATE * expected}, False: {RATE}}


def test_kept_layers_are_not_shared():
    model = tied(loops=2, keep=1)
    groups = by_name(model, parameter_groups(model, recipe(), RATE))
    visits = {
        int(name.split(".slots.")[1].split(".")[0]): g["visits"] for name, g in groups.items() if ".shared." in name
    }
    assert visits == {0: 1, 1: 2, 2: 2, 3: 1}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_rate_that_is_logged_is_the_recipes(optimizer):
    made = make_optimizer(tied(loops=3, norms="shared"), recipe(optimizer=optimizer), RATE, ADAMW)
    assert made.param_groups[0]["lr"] == RATE


def test_frozen_parameters_are_left_out():
    model = tied(loops=2)
    model.get_input_embeddings().requires_grad_(False)
    groups = by_name(model, parameter_groups(model, recipe(), RATE))
    assert "model.embed_tokens.weight" not in groups and "lm_head.weight" in groups


def test_adamw_is_as_fast_as_the_trainers_own(rrt, tmp_path):
    optimizer = trainer_of(rrt, tmp_path).create_optimizer()
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.defaults["fused"]


# -- muon


def test_muon_takes_the_matrices_in_the_slots():
    model = RrtForCausalLM(mixed_config("llama"))
    optimizer = make_optimizer(model, recipe(optimizer="muon"), RATE, ADAMW)
    groups = by_name(model, optimizer.param_groups)
    for name, parameter in model.named_parameters():
        expected = ".slots." in name and parameter.dim() == 2 and not name.endswith((".A", ".B"))
        assert ("momentum" in groups[name]) == expected and ("betas" in groups[name]) == (not expected), name


def test_a_step_of_each_is_its_optimizers_own():
    """The parameters of Muon move as under torch.optim.Muon alone, the others as under AdamW alone."""
    mixed, muon, adamw = (tied(loops=3) for _ in range(3))
    together = make_optimizer(mixed, recipe(optimizer="muon"), RATE, ADAMW)
    taken = {name for name, group in by_name(mixed, together.param_groups).items() if "momentum" in group}
    alone = [
        torch.optim.Muon(
            [p for n, p in muon.named_parameters() if n in taken and ".shared." in n],
            lr=RATE / 3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw",
        ),
        make_optimizer(adamw, recipe(), RATE, ADAMW),
    ]  # fmt: skip
    ids = torch.randint(300, (2, 16), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        mixed.zero_grad()
        mixed(ids, labels=ids).loss.backward()
        for model in (muon, adamw):
            for parameter, other in zip(model.parameters(), mixed.parameters(), strict=True):
                parameter.grad = other.grad
        for optimizer in (*alone, together):
            optimizer.step()
    references = dict(muon.named_parameters()), dict(adamw.named_parameters())
    assert len(taken) == 14  # seven in each of two slots
    for name, parameter in mixed.named_parameters():
        assert torch.equal(parameter, references[name not in taken][name]), name
        assert not torch.equal(parameter, references[name in taken][name]), name


@pytest.mark.slow
def test_muon_heals(rrt, tmp_path):
    measured = uptrain(
        str(rrt),
        str(tmp_path / "out"),
        settings(tokens=CONTEXT * BATCH * 30, optimizer="muon", losses={"forward_kl": 1.0}),
    )
    assert measured["last_kl"] < 0.6 * measured["first_kl"]


@pytest.mark.slow
def test_resumed_muon_run_equals_a_straight_one(rrt, tmp_path, monkeypatch):
    recipe = settings(optimizer="muon", weight_decay=0.1, schedule="warmup_stable_decay", decay=0.5)
    uptrain(str(rrt), str(tmp_path / "straight"), recipe)
    with monkeypatch.context() as patched:
        interrupt_at(patched, 8)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(tmp_path / "resumed"), recipe)
    uptrain(str(rrt), str(tmp_path / "resumed"), recipe, resume=True)
    ours, theirs = weights(tmp_path / "resumed"), weights(tmp_path / "straight")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    figures = ("loss", "kl", "learning_rate", "grad_norm")
    resumed, straight = ([[s[f] for f in figures] for s in metrics(tmp_path / n)] for n in ("resumed", "straight"))
    assert resumed == straight


# -- the schedules


def rates(trainer: DistillationTrainer, steps: int) -> list[float]:
    """The learning rate of each step as a share of its peak, which must be the same for all groups."""
    trainer.create_optimizer_and_scheduler(steps)
    result = []
    for _ in range(steps):
        groups = trainer.optimizer.param_groups
        first, *others = (group["lr"] / group["initial_lr"] for group in groups)
        assert others == pytest.approx([first] * len(others))
        result.append(first)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    return result


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_warmup_stable_decay(rrt, tmp_path, optimizer):
    asked = {"schedule": "warmup_stable_decay", "warmup": 0.1, "decay": 0.4, "optimizer": optimizer}
    expected = [0, 1 / 2, *[1] * 10, *(1 - math.sqrt(i / 8) for i in range(8))]
    assert rates(trainer_of(rrt, tmp_path, 20, **asked), 20) == pytest.approx(expected)


@pytest.mark.parametrize(("warmup", "decay", "steps"), [(0.5, 0.5, 5), (0.0, 1.0, 3), (0.05, 0.2, 3)])
def test_few_steps_rise_stay_and_fall(rrt, tmp_path, warmup, decay, steps):
    shares = rates(trainer_of(rrt, tmp_path, steps, schedule="warmup_stable_decay", warmup=warmup, decay=decay), steps)
    peak = shares.index(1.0)
    assert shares[: peak + 1] == sorted(shares[: peak + 1]) and shares[peak:] == sorted(shares[peak:], reverse=True)


def test_cosine(rrt, tmp_path):
    expected = [0, 1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * i / 9)) for i in range(9))]
    assert rates(trainer_of(rrt, tmp_path, 12, warmup=0.25), 12) == pytest.approx(expected)


# -- the recipe


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"optimizer": "muom"}, "'optimizer' is wrong: it should be 'adamw' or 'muon'"),
        ({"schedule": "linear"}, "'schedule' is wrong: it should be 'cosine' or 'warmup_stable_decay'"),
        ({"shared_lr_scale": "visit"}, "'shared_lr_scale' is wrong: it should be visits or a number above 0"),
        ({"shared_lr_scale": "0"}, "it should be visits or a number above 0, to 1,000,000, not '0'."),
        ({"shared_lr_scale": "nan"}, "it should be visits or a number above 0, to 1,000,000, not 'nan'."),
        ({"decay": 0.0}, "'decay' is wrong: it should be greater than 0"),
        ({"schedule": "warmup_stable_decay", "warmup": 0.5, "decay": 0.6}, "warmup 0.5 and decay 0.6 are together"),
    ],
)  # fmt: skip
def test_bad_values_are_refused(flags, message):
    with pytest.raises(WrongUsage) as refused:
        with_flags(UptrainRecipe(), flags, "the command line")
    assert message in str(refused.value) and "\n" not in str(refused.value)


def test_the_scale_can_be_said_in_a_file(tmp_path):
    (tmp_path / "recipe.yaml").write_text("uptrain: {shared_lr_scale: 0.5}")
    assert load_recipe(str(tmp_path / "recipe.yaml")).uptrain.shared_lr_scale == 0.5
    assert with_flags(UptrainRecipe(), {"shared_lr_scale": "0.25"}, "the command line").shared_lr_scale == 0.25
