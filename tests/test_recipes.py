"""Every command in the README and every recipe runs: the quickstart on the real model with fewer tokens, the recipes
for big models on pico models of the same architecture."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from pico import save_pico
from transformers import AutoConfig
from typer.testing import CliRunner

from rrtc.cli.app import app
from rrtc.recipe.schema import load_recipe

ROOT = Path(__file__).parent.parent
TEXT = "\n\n\n".join(f"Chapter {n}. It was the {n}th of May, and the rain had not stopped. " * 30 for n in range(40))
BIG = sorted((ROOT / "recipes" / "paper").glob("*.yaml"))


def rrtc(*arguments):
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result


def commands_in_readme() -> list[str]:
    """The rrtc commands in the README's code blocks, apart from the lines that set up an environment."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf8"), re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line.startswith("rrtc ")]


@pytest.mark.slow
def test_every_command_in_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pico(tmp_path / "MODEL", num_hidden_layers=4)
    for name in ("corpus.txt", "book.txt"):
        Path(name).write_text(TEXT)
    small = {"context": 32, "tokens": 2000}
    recipe = {"model": "MODEL", "init": {"rank": 4}, "uptrain": small | {"data": ["corpus.txt"]}}
    recipe["eval"] = small | {"speed_rounds": 0}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    commands = commands_in_readme()
    named = {"init", "uptrain", "chat", "eval", "export", "serve", "inspect", "run"}
    assert {shlex.split(c)[1] for c in commands} == named
    for command in (c for c in commands if shlex.split(c)[1] != "serve"):  # which tests/serve stops, too
        rrtc(*shlex.split(command)[1:])
    assert {p.name for p in Path("runs/mine").iterdir()} == {"init", "uptrain", "eval", "export"}


@pytest.mark.slow
@pytest.mark.parametrize("path", BIG, ids=lambda p: p.stem)
def test_a_recipe_for_a_big_model_runs_on_a_pico_model_of_the_same_architecture(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(str(path))
    kind = AutoConfig.from_pretrained(recipe.model).model_type
    plan = json.loads(rrtc("init", "--recipe", path, "--dry-run", "--json", "-").stdout)
    assert plan["params_non_embedding"] < plan["dense_params_non_embedding"]

    dense = save_pico(tmp_path / "dense", kind)
    (tmp_path / "corpus.txt").write_text(TEXT)
    changed = recipe.model_dump()
    changed["model"] = str(dense)
    changed["uptrain"] |= {"data": [str(tmp_path / "corpus.txt")], "tokens": 1500, "context": 32, "batch_size": 8}
    changed["uptrain"] |= {"micro_batch": 4}
    assert changed["eval"]["tasks"] == ["paper"]  # which are not at hand
    changed["eval"] |= {"context": 32, "tokens": 1000, "speed_rounds": 0, "tasks": []}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(changed))
    rrtc("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "export" / "README.md").exists()


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """The quickstart's folder, made by the recipe's own command, but with fewer tokens and trials in every stage."""
    folder = tmp_path_factory.mktemp("quickstart") / "out"
    recipe = yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    recipe["init"] |= {"measure_tokens": 512}
    recipe["uptrain"] |= {"tokens": 2048}
    recipe["eval"] |= {"tokens": 2304, "passkey_trials": 0, "speed_rounds": 0}
    folder.with_name("recipe.yaml").write_text(yaml.safe_dump(recipe))
    rrtc("run", folder.with_name("recipe.yaml"), "-o", folder)
    return folder


@pytest.mark.slow
def test_the_quickstart_heals_a_real_model(quickstart):
    report = json.loads((quickstart / "eval" / "report.json").read_text())
    rows = {row["model"]: row for row in report["models"]}
    assert list(rows) == ["dense", "after init", "after uptrain"]
    dense, tied, healed = rows.values()
    bits, kl, agreement = (
        [row["scores"][key]["value"] for row in (tied, healed)] for key in ("bits_per_byte", "kl", "top1_agreement")
    )
    alone = dense["scores"]["bits_per_byte"]["value"]
    assert bits[0] < 1.25 * alone  # with nothing trained
    assert alone < bits[1] < bits[0] and kl[1] < kl[0] and agreement[1] > agreement[0]
    assert dense["scores"].keys() == {
        "loss",
        "bits_per_byte",
        "calibration_error",
    }  # it is what the others are compared with
    difference = healed["scores"]["bits_per_byte"]["difference"]
    assert difference["value"] == pytest.approx(bits[1] - alone)
    assert 0 < difference["low"] < difference["value"] < difference["high"]
    assert tied["params_total"] < dense["params_total"] and tied["bytes"] < dense["bytes"]
    assert report["source_bytes"] == 98_362_432  # the 4-bit file, smaller than the 16-bit result
    assert [sample["model"] for sample in report["samples"]] == list(rows)


@pytest.mark.slow
def test_the_quickstarts_export_is_the_model_that_was_measured(quickstart):
    """The weights on disk are those of the healed model, and the card has the measured table."""
    from safetensors.torch import load_file

    healed = load_file(quickstart / "uptrain" / "model.safetensors")
    exported = load_file(quickstart / "export" / "model.safetensors")
    assert healed.keys() == exported.keys()
    assert all(torch.equal(healed[name], exported[name]) for name in healed)
    report = json.loads((quickstart / "eval" / "report.json").read_text())
    card = (quickstart / "export" / "README.md").read_text()
    for row in report["models"]:
        assert row["model"] in card and f"{row['scores']['bits_per_byte']['value']:.4f}" in card
    assert (quickstart / "uptrain" / "loss.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_finished_run_resumes_to_nothing_and_another_recipe_is_refused(quickstart):
    command = ["run", str(quickstart.with_name("recipe.yaml")), "-o", str(quickstart), "--resume"]
    assert rrtc(*command).stderr.count("done before") == 4
    result = CliRunner().invoke(app, [*command, "--tokens", "9999"])
    assert result.exit_code == 1 and "uptrain.tokens was 2048 and is now 9999" in result.stderr


def test_a_run_whose_text_is_missing_stops_before_the_first_stage(tmp_path):
    recipe = {"model": str(save_pico(tmp_path / "dense")), "uptrain": {"data": [str(tmp_path / "no.txt")]}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")])
    assert result.exit_code == 1 and "There is no text at" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "says"),
    [
        pytest.param(
            *("llama", {"eval": {"tasks": ["no_such_task"]}}, "There is no task 'no_such_task'"), marks=pytest.mark.slow
        ),
        pytest.param(
            *("llama", {"eval": {"tasks": ["piqa"], "tasks_dir": "nowhere"}}, "There are no task files (.yaml) in"),
            marks=pytest.mark.slow,
        ),
        ("llama", {"export": {"format": "gguf"}}, "RRTC_LLAMA_CPP does not say where it is"),
        ("gpt2", {"export": {"format": "dense", "quantize": "int4"}}, "keeps its matrices transposed"),
        ("llama", {"export": {"quantize": "int4", "calibrate_on": ["nowhere.txt"]}}, "There is no text at nowhere.txt"),
        ("llama", {"export": {"max_shard_size": "much"}}, "'much' is not a size"),
        (
            *("gemma3", {"init": {"norms": "shared"}, "uptrain": {"context": 32, "stability": "admin"}}),
            "its visits share them, so that stability admin has no gain",
        ),
        ("llama", {"uptrain": {"context": 32, "teacher": "larger"}}, "so it cannot teach it token by token"),
        (
            *("llama", {"uptrain": {"context": 32, "teacher": "deeper", "losses": {"hidden": 1}}}),
            "The loss 'hidden' compares layer by layer",
        ),
    ],
)
def test_a_run_whose_end_is_impossible_stops_before_the_first_stage(
    architecture, changes, says, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.delenv("RRTC_LLAMA_CPP", raising=False)
    recipe = {"model": str(save_pico(tmp_path / "dense", architecture)), "uptrain": {"context": 32}} | changes
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    others = {"larger": {"vocab_size": 600}, "deeper": {"num_hidden_layers": 8}}
    if (teacher := recipe["uptrain"].get("teacher")) in others:
        monkeypatch.chdir(tmp_path_factory.mktemp("teachers"))
        save_pico(Path(teacher), **others[teacher])
    result = CliRunner().invoke(app, ["run", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")])
    assert result.exit_code in (1, 2) and says in result.stderr, result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "recipe.yaml"]
