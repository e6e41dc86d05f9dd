"""rrtc run with fields set, dry, and as a sweep: what is refused before any work, and what is kept after some."""

import json
import re
from pathlib import Path

import pytest
import yaml
from pico import save_pico
from typer.testing import CliRunner

from rrtc import api, runs
from rrtc.cli.app import app
from rrtc.console import RrtcWarning
from rrtc.errors import RrtcError, WrongUsage
from rrtc.recipe.schema import load_recipe

SMALL = {
    "init": {"rank": 4, "measure_tokens": 0},
    "uptrain": {"context": 32, "batch_size": 2, "micro_batch": 2, "tokens": 128, "precision": "float32"},
    "eval": {"context": 32, "tokens": 128, "passkey_trials": 0, "speed_rounds": 0, "sample_tokens": 0},
}


def rrtc(*arguments, code: int = 0):
    result = CliRunner().invoke(app, ["run", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": str(save_pico(folder / "dense"))} | SMALL))
    return file


def rows_of(report: dict) -> list[str]:
    return [row["model"] for row in report["models"]]


# ---- before any work ----


def test_a_dry_run_shows_the_whole_recipe_and_the_plan_of_init(recipe, tmp_path):
    given = [recipe, "--set", "init.loops=3", "--set", "init.rank=8", "--tokens", "1000", "--dry-run"]
    found = json.loads(rrtc(*given, "--json", "-").stdout)
    model = load_recipe(str(recipe)).model
    plan = api.plan(model, loops=3, rank=8, measure_tokens=0)
    assert found["plan"] == json.loads(json.dumps(plan))
    assert found["recipe"]["init"] == found["plan"]["recipe"] and found["recipe"]["model"] == model
    assert found["uptrain"]["steps"] == 16 and found["uptrain"]["tokens"] == 1024
    flops = 3 * plan["flops_per_token"] + plan["dense_flops_per_token"]
    assert found["uptrain"]["flops_total"] == 1024 * flops
    shown = rrtc(*given).stdout
    assert "Plan for" in shown and "LoRA rank 8" in shown and "Training: 16 steps, 1.024k tokens" in shown
    (tmp_path / "shown.yaml").write_text(shown.split("\n\n")[0])
    again = load_recipe(str(tmp_path / "shown.yaml"))
    assert (again.init.loops, again.uptrain.tokens, again.uptrain.context) == (3, 1000, 32)


def test_the_dry_run_of_a_sweep_is_a_row_for_each_run(recipe):
    given = [recipe, "--sweep", "init.rank=0,4", "--sweep", "init.loops=2,3", "--dry-run"]
    found = json.loads(rrtc(*given, "--json", "-").stdout)
    assert list(found) == ["rank=0,loops=2", "rank=0,loops=3", "rank=4,loops=2", "rank=4,loops=3"]
    model = load_recipe(str(recipe)).model
    sizes = [run["plan"]["params_total"] for run in found.values()]
    assert sizes == [api.plan(model, rank=r, loops=n)["params_total"] for r in (0, 4) for n in (2, 3)]
    shown = rrtc(*given)
    assert all(name in shown.stdout for name in found)
    assert shown.stderr.count("will this one be. --dtype") == 1  # of four runs that have the same to say


def test_the_papers_recipes_plan_any_model_from_anywhere(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = load_recipe(str(recipe)).model
    found = json.loads(
        rrtc("tinyllama-2-loops", "--model", model, "--set", "init.rank=4", "--dry-run", "--json", "-").stdout
    )
    assert found["plan"]["model"] == model and found["recipe"]["init"]["norms"] == "shared"
    refused = rrtc("gemma-2b-2-loops", "-o", "out", code=1).stderr
    assert re.search(r"There are no weights in .*gemma-2b, only a config\.", refused) and "--model MODEL" in refused


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--set", "init.lops=2"], 2, "There is no key 'init.lops' in a recipe (the settings).\nHint: Did you mean"),
        (["--tokens", "9", "--set", "uptrain.tokens=8"], 2, "uptrain.tokens is given twice."),
        (["--model", "nowhere/at/all"], 1, "There is no model at nowhere/at/all."),
        (["--sweep", "init.loops=2,4"], 2, "The run loops=4 cannot be: 6 layers cannot be divided into 4 loops."),
        (["--sweep", "uptrain.data=pydoc,no.txt"], 2, "The runs are trained on different texts"),
        (["--sweep", "uptrain.data=pydoc,no.txt", "--set", "eval.text=pydoc"], 1, "There is no text at no.txt."),
        (["--sweep", "init.rank=0,4", "--set", "eval.baselines=on"], 2, "Baselines are made for one folder"),
        (["--dry-run", "--resume"], 2, "A dry run does no work that could be resumed."),
        (["--dry-run", "--tokens", "63"], 2, "63 tokens are less than one batch: 2 windows of 32 are 64."),
        (
            [
                "--set",
                "init.rank=none",
                "--set",
                "init.size=0.8",
                "--set",
                "init.sharing=auto",
                "--set",
                "uptrain.exits=joint",
            ],
            2,
            "ends of loops, and init may make none",
        ),
        (["--set", "uptrain.teacher_cache=out/uptrain"], 2, "The teacher cache out/uptrain lies in the output"),
    ],
)
def test_what_cannot_be_is_said_before_the_first_run(recipe, tmp_path, monkeypatch, arguments, code, says):
    monkeypatch.chdir(tmp_path)
    assert says in rrtc(recipe, "-o", "out", *arguments, code=code).stderr
    assert not list(tmp_path.iterdir())
    rrtc(recipe, code=2)  # and an output is needed


@pytest.mark.parametrize(
    ("over", "says"), [({}, "a sweep of nothing"), ({"init.rank": 4}, "is over 4, which is no list")]
)
def test_a_sweep_has_values(recipe, tmp_path, over, says):
    with pytest.raises(WrongUsage, match=says):
        api.sweep(recipe, tmp_path / "out", over)
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_users_is_in_the_place_of_a_sweeps_report(recipe, tmp_path):
    notes = tmp_path / "report" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    refused = rrtc(recipe, "-o", tmp_path, "--sweep", "init.rank=0,4", "--resume", code=1).stderr
    assert "report, where the report of the sweep belongs, holds what is not rrtc's" in refused
    assert notes.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["report"]


def test_no_output_is_in_a_folder_of_text(recipe, tmp_path):
    (tmp_path / "text.txt").write_text("Once upon a time. " * 500)
    for section in ("uptrain.data", "eval.text", "init.calibrate_on"):
        asked = ["--set", "init.shared_init=joint", "--set", f"{section}={tmp_path}"]
        refused = rrtc(recipe, "-o", tmp_path / "out", *asked, code=2).stderr
        assert f"out lies in the folder {tmp_path}, from which it is made" in " ".join(refused.split())
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_a_dry_run_refuses_gains_that_cannot_be(tmp_path):
    save_pico(tmp_path / "gemma", "gemma3")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump({"model": str(tmp_path / "gemma")} | SMALL))
    asked = ["--set", "init.norms=shared", "--set", "uptrain.stability=admin", "--dry-run"]
    assert "stability admin has no gain" in rrtc(file, *asked, code=2).stderr


def test_a_run_may_begin_with_a_model_whose_cache_it_plans_anew(recipe, tmp_path):
    first, file = tmp_path / "recursive", tmp_path / "again.yaml"
    api.init(recipe.with_name("dense"), first, loops=2, rank=4, measure_tokens=0)
    file.write_text(yaml.safe_dump({"model": str(first)} | SMALL | {"init": {"kv_budget": 0.6, "kv_context": 64}}))
    assert "at 64 tokens the KV cache takes 0.5" in rrtc(file, "--dry-run").output
    runs.check_models(load_recipe(str(file)))  # raises nothing
    budgets = ["--set", "uptrain.tokens=32"]
    assert "less than one batch" in rrtc(file, "-o", tmp_path / "out", *budgets, code=2).stderr


# ---- the work ----


@pytest.mark.slow
def test_a_sweep_is_reported_in_one_place_and_goes_on_with_more(recipe, tmp_path):
    out = tmp_path / "out"
    swept = json.loads(rrtc(recipe, "-o", out, "--sweep", "init.rank=0,4", "--json", "-").stdout)
    assert list(swept["runs"]) == ["rank=0", "rank=4"] and rows_of(swept["report"]) == ["dense", "rank=0", "rank=4"]
    sizes = [row["params_total"] for row in swept["report"]["models"][1:]]
    assert sizes == [run["init"]["params_total"] for run in swept["runs"].values()] and sizes[0] < sizes[1]
    assert {path.name for path in out.iterdir()} == {"rank=0", "rank=4", "report"}
    page = (out / "report" / "report.html").read_text()
    assert "Quality against size" in page and "rank=4" in page
    made = (out / "rank=0" / "init" / "rrtc.yaml").read_bytes()
    more = rrtc(recipe, "-o", out, "--sweep", "init.rank=0,8", "--resume", "--json", tmp_path / "more.json")
    assert more.stderr.count("done before") == 2 and (out / "rank=0" / "init" / "rrtc.yaml").read_bytes() == made
    assert rows_of(json.loads((tmp_path / "more.json").read_text())["report"]) == ["dense", "rank=0", "rank=8"]
    assert "is not empty" in rrtc(recipe, "-o", out, "--sweep", "init.rank=0", code=1).stderr
    other = rrtc(recipe, "-o", out, "--sweep", "init.rank=0,4", "--set", "init.keep=1", "--resume", code=1).stderr
    assert "init.keep was 0 and is now 1" in other


@pytest.mark.slow
def test_a_run_that_fails_loses_none_of_the_others_and_init_is_shared(recipe, tmp_path):
    """A rate at which weights overflow, as weight decay multiplies them by -999 in each step; in a sweep over training
    alone."""
    out = tmp_path / "out"
    over = {"uptrain.learning_rate": [1e-4, 1.0, 2e-4]}
    given = {"settings": {"uptrain.tokens": 2560, "uptrain.warmup": 0, "uptrain.weight_decay": 1000.0}}
    named = "The run learning_rate=1.0 failed: "
    with (
        pytest.warns(RrtcWarning, match=named),
        pytest.raises(RrtcError, match="1 of 3 runs failed: learning_rate=1.0: ") as failed,
    ):
        api.sweep(recipe, out, over, **given)
    assert failed.value.hint == f"The report of the others is in {out / 'report'}; --resume tries again."
    report = api.inspect(out / "report")["report"]
    assert rows_of(report) == ["dense", "learning_rate=0.0001", "learning_rate=0.0002"]
    assert (out / "init").is_dir() and not list(out.glob("*/init"))


@pytest.mark.slow
def test_a_sweep_of_one_value_over_training_goes_on_with_more(recipe, tmp_path):
    out = tmp_path / "out"
    rrtc(recipe, "-o", out, "--sweep", "uptrain.seed=0")
    assert {path.name for path in out.iterdir()} == {"init", "seed=0", "report"}
    made = (out / "seed=0" / "uptrain" / "rrtc.yaml").read_bytes()
    rrtc(recipe, "-o", out, "--sweep", "uptrain.seed=0,1", "--resume")
    assert (out / "seed=0" / "uptrain" / "rrtc.yaml").read_bytes() == made
    assert rows_of(api.inspect(out / "report")["report"]) == ["dense", "seed=0", "seed=1"]


@pytest.mark.slow
def test_an_interrupted_sweep_goes_on(recipe, tmp_path, monkeypatch):
    out, over, run_stages = tmp_path / "out", {"init.rank": [0, 4]}, runs._run_stages
    calls = []

    def interrupted(one, folders):
        calls.append(folders)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_stages(one, folders)

    monkeypatch.setattr(runs, "_run_stages", interrupted)
    with pytest.raises(KeyboardInterrupt):
        api.sweep(recipe, out, over)
    monkeypatch.undo()
    assert [path.name for path in out.iterdir()] == ["rank=0"]
    done = api.sweep(recipe, out, over, resume=True)
    assert rows_of(done["report"]) == ["dense", "rank=0", "rank=4"]
