"""rrtc.api: the same work as the commands, in Python; its results are as rrtc/results.py describes them."""

import io
import json
import re
import shutil
import typing
import warnings

import pytest
import torch
import yaml
from pico import ARCHITECTURES, pico_model, save_pico
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rrtc import api, console, results
from rrtc.cli.app import app
from rrtc.cli.description import description
from rrtc.errors import RrtcError, WrongUsage
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.runs import STAGES
from rrtc.stock.architecture import read_architecture

pytestmark = pytest.mark.slow

IDS = (torch.arange(2 * 24) * 37 % 320).view(2, 24)
TRAINING = {"context": 32, "batch_size": 2, "micro_batch": 2, "tokens": 256, "precision": "float32"}
SCORING = {"context": 32, "tokens": 128, "passkey_trials": 0, "speed_rounds": 0, "sample_tokens": 0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """What each function returns for a pico model, by its name, and the folders that they wrote."""
    place = tmp_path_factory.mktemp("api")
    dense = save_pico(place / "dense")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", console.RrtcWarning)  # on the little text that pico models are trained on
        returned = {
            "plan": api.plan(dense, loops=3, rank=4),
            "init": api.init(dense, place / "small", loops=3, rank=4, measure_tokens=256),
            "estimate": api.estimate(place / "small", **TRAINING),
            "uptrain": api.uptrain(place / "small", place / "healed", **TRAINING),
            "evaluate": api.evaluate(place / "healed", place / "report", **SCORING),
            "export": api.export(place / "healed", place / "release", place / "report", format="dense"),
        }
    return place, returned


def described(result: dict, kind: type, where: str = "result") -> None:
    """Asserts that `result` has the keys of the TypedDict `kind`, with values of the kinds that it says."""
    hints = typing.get_type_hints(kind, include_extras=False)
    extra = {key for key in result if key.startswith(("first_", "last_"))} if kind is results.UptrainResult else set()
    assert kind.__required_keys__ <= result.keys() <= hints.keys() | extra, where
    for key in result.keys() & hints.keys():
        fits(result[key], hints[key], f"{where}[{key!r}]")


def fits(value, kind, where: str) -> None:
    origin, inside = typing.get_origin(kind), typing.get_args(kind)
    if kind is typing.Any:
        return
    if typing.is_typeddict(kind):
        described(value, kind, where)
    elif origin is list:
        assert isinstance(value, list), where
        for number, one in enumerate(value):
            fits(one, inside[0], f"{where}[{number}]")
    elif origin is dict:
        assert isinstance(value, dict), where
        for key, one in value.items():
            fits(key, inside[0], where)
            fits(one, inside[1], f"{where}[{key!r}]")
    elif origin is tuple:
        assert isinstance(value, tuple | list) and len(value) == len(inside), where
    elif inside:  # a union, of something and None
        assert value is None or [fits(value, one, where) for one in inside if one is not type(None)], where
    else:
        assert isinstance(value, (int, float) if kind is float else kind), f"{where} is {value!r}"


def test_results_are_as_they_are_described(folders):
    place, returned = folders
    described(returned["plan"], results.PlanResult)
    described(returned["init"], results.InitResult)
    described(returned["estimate"], results.EstimateResult)
    described(returned["uptrain"], results.UptrainResult)
    described(returned["export"], results.ExportResult)
    for folder in ("small", "healed", "report", "release"):
        described(api.inspect(place / folder), results.InspectResult)
    described(api.env(), results.EnvResult)
    assert returned["plan"]["params_total"] == returned["init"]["params_total"]
    assert returned["evaluate"] == api.inspect(place / "report")["report"]


def test_a_plan_under_a_budget_is_described_too(folders):
    plan = api.plan(folders[0] / "dense", budget=0.7)
    described(plan, results.PlanResult)
    assert plan["visits"] is None and plan["params_by_part"] is None


def test_a_run_returns_what_its_stages_return(folders, tmp_path):
    recipe = {
        "model": str(folders[0] / "dense"), "init": {"rank": 4, "measure_tokens": 0},
        "uptrain": TRAINING | {"tokens": 64}, "eval": SCORING,
    }  # fmt: skip
    with warnings.catch_warnings(action="ignore", category=console.RrtcWarning):
        made = api.run(recipe, tmp_path / "run", tokens=128)
        again = api.run(recipe, tmp_path / "run", resume=True, tokens=128)
    described(made, results.RunResult)
    assert made == again and made["uptrain"]["tokens"] == 128
    with pytest.raises(RrtcError, match="was made with another recipe: uptrain.tokens was 128 and is now 64"):
        api.run(recipe, tmp_path / "run", resume=True)
    with pytest.raises(WrongUsage, match="does not name a model"):
        api.run({}, tmp_path / "other")


def test_a_run_from_a_model_that_is_tied_already_goes_on_as_any(folders, tmp_path):
    place = folders[0]
    init = {"kv_budget": 0.6, "kv_window": 16, "calibrate_tokens": 256, "measure_tokens": 0}
    recipe = {"model": str(place / "small"), "init": init, "uptrain": TRAINING | {"tokens": 64}, "eval": SCORING}
    with warnings.catch_warnings(action="ignore", category=console.RrtcWarning):
        made = api.run(recipe, tmp_path / "run")
        for folder in ("eval", "export"):
            shutil.rmtree(tmp_path / "run" / folder)
        again = api.run(recipe, tmp_path / "run", resume=True)
    assert made["init"] == again["init"] and made["uptrain"] == again["uptrain"]
    assert "predicted_window_cost" in again["init"]
    for changed, said in (
        ({"init": init | {"kv_window": 20}}, "init.kv_window was 16 and is now 20"),
        ({"model": str(place / "healed")}, f"model was {place / 'small'} and is now {place / 'healed'}"),
    ):
        with pytest.raises(RrtcError, match=f"was made with another recipe: {re.escape(said)}"):
            api.run(recipe | changed, tmp_path / "run", resume=True)
    shown = CliRunner().invoke(app, ["inspect", str(tmp_path / "run" / "uptrain")]).output
    said = f"recipe, replan {place / 'small'}: kv_budget 0.6, kv_window 16, calibrate_tokens 256"
    assert "".join(said.split()) in "".join(shown.split())  # wherever lines end
    assert made["init"]["folded_norms"] == [] and "foldednorms;" not in "".join(shown.split())


def test_a_run_of_one_step_learns_something(folders, tmp_path):
    given = TRAINING | {"tokens": 64}
    with warnings.catch_warnings(action="ignore", category=console.RrtcWarning):
        made = api.uptrain(folders[0] / "small", tmp_path / "healed", **given)
    assert made["steps"] == 1
    before, after = (load_file(folder / "model.safetensors") for folder in (folders[0] / "small", tmp_path / "healed"))
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("asked", [{"exits": "joint"}, {"losses": {"next_token": 1.0}}, {"context": 512}])
def test_the_dry_run_of_a_run_counts_as_that_of_its_training(folders, asked):
    """A context of 512 is more than the model can see."""
    training = TRAINING | {"batch_size": 1, "micro_batch": 1} | asked
    with warnings.catch_warnings(action="ignore", category=console.RrtcWarning):
        estimate = api.estimate(folders[0] / "small", **training)
        recipe = {"model": str(folders[0] / "dense"), "init": {"loops": 3, "rank": 4}, "uptrain": training}
        planned = api.plan_run(recipe)["run"]["uptrain"]
    assert planned == {name: estimate[name] for name in ("steps", "tokens", "flops_total")}


def test_a_run_whose_loops_have_no_ends_to_leave_at_is_refused_before_it_begins(folders, tmp_path):
    recipe = {"model": str(folders[0] / "dense"), "uptrain": {"exits": "joint"}}
    for init in ({"sharing": "sequence"}, {"sharing": "middle_sequence", "keep": 1}, {"loops": 1, "budget": 0.9}):
        with pytest.raises(WrongUsage, match="nowhere to leave early: exits are at the ends of loops"):
            api.run(recipe | {"init": init}, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_an_export_that_is_multiplied_out_is_described_by_its_own_figures(folders, tmp_path):
    export = api.export(folders[0] / "healed", tmp_path / "dense", format="dense", dtype="bfloat16")
    init = api.inspect(folders[0] / "healed")["measured"]["init"]
    assert export["parameters"] != init["params_total"] and init["dense_bytes"] == 4 * init["dense_params_total"]
    shown = Console(width=200, file=io.StringIO())
    shown.print(description(api.inspect(tmp_path / "dense")))
    rows = dict(re.findall(r"^ *(weights|parameters|FLOPs a token) +(.*?) *$", shown.file.getvalue(), re.M))
    share = f"{export['parameters'] / init['dense_params_total']:.3f} of the dense model's"
    assert rows.keys() == {"weights", "parameters"} and share in rows["parameters"]
    of_dense = export["bytes"] / (2 * init["dense_params_total"])
    assert f"in bfloat16, {of_dense:.3f} of the dense model's" in rows["weights"]


def test_a_run_whose_stages_are_of_different_models_does_not_go_on(folders, tmp_path):
    recipe = {
        "model": str(folders[0] / "dense"), "init": {"rank": 4, "measure_tokens": 0},
        "uptrain": TRAINING | {"tokens": 64}, "eval": SCORING,
    }  # fmt: skip
    run = tmp_path / "run"

    def refused(stage: str, source: str) -> None:
        sentence = f"{run / stage} was made from another {source} than there is in {run / source} now"
        with pytest.raises(RrtcError, match=re.escape(sentence)):
            api.run(recipe, run, resume=True)

    with warnings.catch_warnings(action="ignore", category=console.RrtcWarning):
        api.run(recipe, run)
        made = (run / "uptrain" / "rrtc.yaml").read_text()
        shutil.move(run / "uptrain", tmp_path / "aside")
        refused("eval", "uptrain")
        shutil.move(tmp_path / "aside", run / "uptrain")
        (run / "uptrain" / "rrtc.yaml").write_text(re.sub("^made: .*", "made: '2020-01-01'", made, flags=re.M))
        refused("eval", "uptrain")  # it was trained anew
        shutil.rmtree(run / "eval")
        refused("export", "uptrain")
        (run / "uptrain" / "rrtc.yaml").write_text(made)
        refused("export", "eval")
        shutil.rmtree(run / "export")
        assert api.run(recipe, run, resume=True).keys() == set(STAGES)


def test_the_commands_write_what_the_functions_return(folders):
    place, returned = folders

    def shown(*arguments) -> dict:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json", "-"])
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    plan = shown("init", place / "dense", "--dry-run", "--loops", 3, "--rank", 4)
    assert plan == json.loads(json.dumps(returned["plan"]))
    inspected = shown("inspect", place / "healed")
    assert inspected == json.loads(json.dumps(api.inspect(place / "healed")))


def test_a_recipe_is_where_keywords_start_from(folders, tmp_path):
    dense = str(folders[0] / "dense")
    values = {"model": dense, "init": {"loops": 3, "rank": 2}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for recipe in (tmp_path / "recipe.yaml", str(tmp_path / "recipe.yaml"), values, Recipe.model_validate(values)):
        plan = api.plan(None, recipe, rank={"q": 5})
        assert (plan["model"], plan["recipe"]["loops"], plan["recipe"]["rank"]) == (dense, 3, {"q": 5})
        assert api.plan(None, recipe, rank=None)["recipe"]["rank"] == 2


@pytest.mark.parametrize(
    "call, sentence, hint",
    [
        (
            lambda model: api.plan(model, lops=3),
            "There is no key 'lops' in a recipe (the call).",
            "Did you mean 'loops'?",
        ),
        (lambda model: api.init(model, "out", bugdet=0.5), "There is no key 'bugdet'", "Did you mean 'budget'?"),
        (lambda model: api.uptrain(model, "out", token=5), "There is no key 'token'", "Did you mean 'tokens'?"),
        (lambda model: api.evaluate(model, task="paper"), "There is no key 'task'", "Did you mean 'tasks'?"),
        (lambda model: api.export(model, "out", formt="onnx"), "There is no key 'formt'", "Did you mean 'format'?"),
        (lambda model: api.plan(model, {"init": {"keeep": 1}}), "There is no key 'init.keeep'", "Did you mean 'keep'?"),
        (lambda model: api.plan(model, sharing="circle"), "In the call, 'sharing' is wrong", "Did you mean 'cycle'?"),
        (lambda model: api.plan(model, loops="many"), "In the call, 'loops' is wrong", ""),
        (lambda model: api.plan(None), "There is no dense model", "Name it"),
        (lambda model: api.export(model, "out", private=True), "Only what is pushed can be private", "Add"),
        (lambda model: api.evaluate([]), "There is no folder to measure", ""),
        (lambda model: api.load(model, dtype="foo"), "A model cannot have the dtype 'foo'", "bfloat16"),
        (lambda model: api.load(model, dtype=torch.int8), "A model cannot have the dtype torch.int8", "bfloat16"),
        (lambda model: api.load(model, device="toaster"), "There is no device 'toaster' here: ", ""),
        (lambda model: api.load(model, device="cuda:77"), "There is no device 'cuda:77' here: ", ""),
        (lambda model: api.generate(model, []), "There are no prompts", ""),
    ],
)
def test_a_wrong_call_names_the_nearest_valid_one(call, sentence, hint, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WrongUsage) as raised:
        call(folders[0] / "dense")
    assert sentence in raised.value.sentence and hint in raised.value.hint
    assert not list(tmp_path.iterdir())


def test_nothing_is_printed_unless_asked(folders, tmp_path, capfd):
    place, _ = folders
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        api.init(place / "dense", tmp_path / "small", rank=4, measure_tokens=128)
        api.uptrain(tmp_path / "small", tmp_path / "healed", **TRAINING)
        api.evaluate(tmp_path / "healed", **SCORING)
        api.export(tmp_path / "healed", tmp_path / "release")
        api.inspect(tmp_path / "release")
        api.load(tmp_path / "release")
    assert capfd.readouterr() == ("", "")
    assert all(issubclass(one.category, console.RrtcWarning) for one in caught), [str(one) for one in caught]
    api.init(place / "dense", tmp_path / "other", rank=4, measure_tokens=0, verbose=True)
    assert f"Reading {place / 'dense'}" in capfd.readouterr().err


def test_the_libraries_speak_again_afterwards(folders):
    from huggingface_hub.utils import are_progress_bars_disabled
    from transformers.utils import logging

    before = (logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled())
    api.load(folders[0] / "small")
    assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled())


def test_a_folder_loads_exported_or_not(folders):
    place, _ = folders
    for folder in ("dense", "small", "healed", "release"):
        model, tokenizer = api.load(place / folder)
        assert not model.training and model.dtype == torch.float32 and len(tokenizer) == model.config.vocab_size
        with torch.no_grad():
            logits = model(IDS).logits
            half = api.load(str(place / folder), dtype="bfloat16")[0]
        assert half.dtype == torch.bfloat16
        if folder == "release":
            healed = api.load(place / "healed")[0]
            torch.testing.assert_close(logits, healed(IDS).logits, atol=1e-4, rtol=1e-4)
    with pytest.raises(RrtcError, match="has no config.json"):
        api.load(place / "report")
    with pytest.raises(RrtcError, match="There is no model at"):
        api.load(place / "nowhere")


@pytest.mark.parametrize(
    "architecture, norms", [*((name, "per_visit") for name in ARCHITECTURES), ("llama", "shared"), ("gpt2", "shared")]
)
def test_tying_in_memory_is_what_init_does_as_in_the_paper(architecture, norms, dense, tmp_path):
    choices = {"loops": 3, "rank": 4, "norms": norms}
    model = AutoModelForCausalLM.from_pretrained(dense(architecture), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    made = api.tie(model, make_plan(read_architecture(model.config), InitRecipe(**choices)))
    assert type(made).__name__ == "RrtForCausalLM" and not made.training
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    ours = {tensor.data_ptr() for tensor in made.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in after.values()}
    api.init(dense(architecture), tmp_path / "small", fold_norms=False, measure_tokens=0, **choices)
    written = api.load(tmp_path / "small")[0]
    expected, found = written.state_dict(), made.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    with torch.no_grad():
        assert torch.equal(made(IDS).logits, written(IDS).logits)


def test_what_cannot_be_tied_in_memory(tmp_path):
    model = pico_model("llama")
    other = make_plan(read_architecture(pico_model("qwen2").config), InitRecipe(rank=4))
    with pytest.raises(WrongUsage, match="not of this model's architecture"):
        api.tie(model, other)
    plan = make_plan(read_architecture(model.config), InitRecipe(rank=4))
    with pytest.raises(RrtcError, match="recursive already"):
        api.tie(api.tie(model, plan), plan)
    with pytest.raises(RrtcError, match="A LlamaModel says no tokens"):
        api.tie(model.model, plan)


def test_one_message_is_a_conversation_and_what_is_no_prompt_is_refused(folders):
    model = folders[0] / "healed"
    with pytest.raises(RrtcError, match="neither text nor messages"):
        api.generate(model, 5)
    with pytest.raises(RrtcError, match="neither text nor messages"):
        api.generate(model, {"content": "who?"})
    few = {"max_tokens": 3, "temperature": 0.0}
    message = {"role": "user", "content": "word"}
    for one, other in ((message, [message]), ((text for text in ["word"]), ["word"])):
        found = [[answer["text"] for answer in api.generate(model, asked, **few)["answers"]] for asked in (one, other)]
        assert found[0] == found[1] and len(found[0]) == 1


def test_a_tied_model_has_the_number_format_and_mode_of_the_dense_one():
    model = pico_model("llama").to(torch.bfloat16).train()
    made = api.tie(model, make_plan(read_architecture(model.config), InitRecipe(rank=4)))
    assert {parameter.dtype for parameter in made.parameters()} == {torch.bfloat16} and made.training
    made(IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in made.parameters())


def test_a_tilde_is_the_users_home(folders, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "dense").symlink_to(folders[0] / "dense")
    (tmp_path / "book.txt").write_text("All happy families are alike. " * 400)
    (tmp_path / "recipe.yaml").write_text("init: {rank: 4, measure_tokens: 0}\nuptrain: {data: ~/book.txt}\n")
    api.init("~/dense", "~/small", "~/recipe.yaml")
    assert api.inspect("~/small")["folder"] == str(tmp_path / "small")
    with warnings.catch_warnings(action="ignore", category=console.RrtcWarning):
        api.uptrain("~/small", "~/healed", "~/recipe.yaml", teacher_cache="~/lessons", **TRAINING)
        report = api.evaluate("~/healed", "~/report", "~/dense", text=["~/book.txt"], **SCORING)
    assert [tmp_path / name for name in ("healed", "lessons")] == [
        path for path in sorted(tmp_path.iterdir()) if path.name in ("healed", "lessons")
    ]
    assert list(report["tokens"]) and api.inspect("~/healed")["recipe"]["uptrain"]["data"] == [
        str(tmp_path / "book.txt")
    ]
    api.export("~/healed", "~/release", "~/report")
    assert api.load("~/release")
    arguments = ["init", "~/dense", "--dry-run", "--recipe", "~/recipe.yaml", "--json", "~/plan.json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "plan.json").read_text())["model"] == str(tmp_path / "dense")
    assert CliRunner().invoke(app, ["export", "~/healed", "-o", "~/again"]).exit_code == 0
    assert (tmp_path / "again" / "rrtc.yaml").exists()
