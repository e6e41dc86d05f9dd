"""Single fields that are set by name, and sweeps over them: typed and checked as flags are."""

import re

import pytest

from rrtc.errors import WrongUsage
from rrtc.recipe.schema import Recipe, load_recipe
from rrtc.recipe.settings import parse_settings, parse_sweep, sweep_of, with_settings


def recipe_with(*texts: str, recipe: Recipe | None = None) -> Recipe:
    return with_settings(recipe or Recipe(), parse_settings(texts), "the settings")


@pytest.mark.parametrize(
    ("texts", "part", "values"),
    [
        (["init.loops=3", "init.rank=128"], "init", {"loops": 3, "rank": 128}),
        (["init.rank=q=4,ffn=2"], "init", {"rank": {"q": 4, "ffn": 2}}),
        (["init.fold_norms=off", "init.size=90MB"], "init", {"fold_norms": False, "size": "90MB"}),
        (["init.size=50%"], "init", {"size": 0.5}),
        (["init.calibrate_on=a.txt"], "init", {"calibrate_on": ["a.txt"]}),
        (["init.calibrate_on=a.txt", "init.calibrate_on=b.txt"], "init", {"calibrate_on": ["a.txt", "b.txt"]}),
        (["uptrain.learning_rate=5e-5", "uptrain.data_weights=1"], "uptrain", {"learning_rate": 5e-5}),
        (["uptrain.losses=next_token=1"], "uptrain", {"losses": {"next_token": 1.0}}),
        (["uptrain.losses={next_token: 1, hidden: 2}"], "uptrain", {"losses": {"next_token": 1.0, "hidden": 2.0}}),
        (["uptrain.losses=next_token=1", "uptrain.losses=hidden=2"], "uptrain",
         {"losses": {"next_token": 1.0, "hidden": 2.0}}),
        (["eval.prompt=[INST]hello", "eval.text_field={text"], "eval",
         {"prompt": "[INST]hello", "text_field": "{text"}),
        (["eval.passkey_lengths=64,128"], "eval", {"passkey_lengths": [64, 128]}),
        (["eval.passkey_lengths=[64, 128]", "eval.prompt=a = b"], "eval",
         {"passkey_lengths": [64, 128], "prompt": "a = b"}),
    ],
)  # fmt: skip
def test_a_field_is_set_to_a_value_of_its_type(texts, part, values):
    section = getattr(recipe_with(*texts), part)
    assert {name: getattr(section, name) for name in values} == values


def test_others_stay_and_none_takes_away():
    quickstart = load_recipe("quickstart")
    changed = recipe_with("init.budget=none", "init.rank=8", "model=mine", recipe=quickstart)
    assert changed.model == "mine" and changed.init.budget is None and changed.init.rank == 8
    assert changed.init.sharing == quickstart.init.sharing and changed.uptrain == quickstart.uptrain
    assert recipe_with(recipe=quickstart) is quickstart
    assert with_settings(quickstart, {"uptrain.tokens": 5, "init.seed": 1}, "x").uptrain.tokens == 5


@pytest.mark.parametrize(
    ("text", "sentence", "hint"),
    [
        ("init.lops=3", "There is no key 'init.lops' in a recipe (the settings).", "Did you mean 'loops'?"),
        ("inti.loops=3", "There is no key 'inti' in a recipe (the settings).", "Did you mean 'init'?"),
        ("loops=3", "There is no key 'loops' in a recipe (the settings).", "Valid: model, init"),
        ("model.loops=3", "There is no key 'model.loops' in a recipe (the settings).", "Did you mean 'model'?"),
        ("init=3", "In the settings, 'init' is wrong: it should hold keys of its own.", ""),
        ("init.loops=many", "In the settings, 'init.loops' is wrong: it should be a valid integer", ""),
        ("init.sharing=cycel", "In the settings, 'init.sharing' is wrong", "Did you mean 'cycle'?"),
        ("init.budget=1.5", "In the settings, 'init.budget' is wrong: it should be less than or equal to 1.", ""),
        ("eval.passkey_lengths=[64", "The value of eval.passkey_lengths is not valid YAML:", ""),
        ("init.loops", "'init.loops' sets no field.", "Write it as in init.rank=64."),
    ],
)
def test_what_is_no_field_or_no_value_is_refused(text, sentence, hint):
    with pytest.raises(WrongUsage) as refused:
        recipe_with(text)
    assert refused.value.sentence.startswith(sentence) and refused.value.hint.startswith(hint)


def test_a_sweep_is_every_combination_with_a_name_each():
    found = sweep_of(Recipe(), parse_sweep(["init.loops=2,3", "init.rank=0,64"]), "the sweep")
    assert list(found) == ["loops=2,rank=0", "loops=2,rank=64", "loops=3,rank=0", "loops=3,rank=64"]
    assert [(r.init.loops, r.init.rank) for r in found.values()] == [(2, 0), (2, 64), (3, 0), (3, 64)]
    apart = sweep_of(Recipe(), parse_sweep(["init.seed=1", "uptrain.seed=2,3"]), "the sweep")
    assert list(apart) == ["init.seed=1,uptrain.seed=2", "init.seed=1,uptrain.seed=3"]
    commas = sweep_of(Recipe(), parse_sweep(["init.rank=8;q=4,ffn=2"]), "the sweep")
    assert [r.init.rank for r in commas.values()] == [8, {"q": 4, "ffn": 2}]
    odd = sweep_of(Recipe(), {"uptrain.data": ["../a b.txt", "c"]}, "the sweep")
    assert list(odd) == ["data=..-a-b.txt", "data=c"] and odd["data=c"].uptrain.data == ["c"]


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (["init.rank=0,,4"], "The sweep of init.rank lacks a value."),
        (["init.rank=0,0"], "The sweep has two runs that are called rank=0."),
        (["init.rank=0", "init.rank=4"], "The sweep names init.rank twice."),
        (["eval.tokens=1,2"], "A sweep is over fields of init and uptrain, and eval.tokens is none."),
        (["model=a,b"], "A sweep is over fields of init and uptrain, and model is none."),
        (["init.rnak=0,4"], "There is no key 'init.rnak' in a recipe (the sweep)."),
        (["init.rank"], "'init.rank' sets no field."),
    ],
)
def test_what_is_no_sweep_is_refused(texts, says):
    with pytest.raises(WrongUsage, match=re.escape(says)):
        sweep_of(Recipe(), parse_sweep(texts), "the sweep")


def test_the_papers_recipes_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("gemma-2b-2-loops")
    assert recipe.init.rank == 512 and (tmp_path / recipe.model / "config.json").is_file()
    with pytest.raises(WrongUsage) as refused:
        load_recipe("gemma-2b-4-loops")
    assert "gemma-2b-3-loops, pythia-1b-2-loops, quickstart" in refused.value.hint
