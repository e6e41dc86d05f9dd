"""The commands beside the four stages, and what all commands have in common: --quiet, --verbose, completion."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pico import save_pico
from typer.testing import CliRunner

from rrtc import __version__, api, console
from rrtc.cli.app import app
from rrtc.recipe.commented import commented_recipe, recipe_schema
from rrtc.recipe.schema import Recipe, load_recipe

SHIPPED = Path(__file__).parents[2] / "recipes"
RECIPES = [*SHIPPED.glob("*.yaml"), *(SHIPPED / "paper").glob("*.yaml")]


def rrtc(*arguments, **environment):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"} | environment)


def test_quiet_shows_the_result_warnings_and_errors_and_nothing_on_the_way(dense, tmp_path, monkeypatch):
    loud = rrtc("init", dense("llama"), "--dry-run", "--rank", "4")
    quiet = rrtc("init", dense("llama"), "--dry-run", "--rank", "4", "--quiet")
    assert loud.stderr.startswith(f"Reading {dense('llama')}\n") and quiet.stderr == ""
    assert "Plan for" in loud.stdout and quiet.stdout == loud.stdout
    failed = rrtc("init", tmp_path / "nowhere", "--dry-run", "-q")
    assert failed.exit_code == 1 and failed.stderr.startswith("Error: There is no model at")

    planned = api.plan

    def warned(*args, verbose, **kwargs):
        with console.notes_shown(verbose):
            console.warn("mind the gap")
        return planned(*args, verbose=verbose, **kwargs)

    monkeypatch.setattr(api, "plan", warned)
    assert rrtc("init", dense("llama"), "--dry-run", "-q").stderr == "Note: mind the gap\n"
    told = rrtc("init", dense("llama"), "--dry-run").stderr
    assert told.startswith(f"Note: mind the gap\nReading {dense('llama')}\n")


def test_verbose_shows_where_an_error_came_from(tmp_path):
    short, long = (rrtc("init", tmp_path / "nowhere", "--dry-run", *flag) for flag in ((), ("--verbose",)))
    assert "Traceback" not in short.stderr and "Traceback" in long.stderr and "find_model" in long.stderr
    assert long.stderr.endswith(short.stderr.split("\n", 1)[1]) and long.exit_code == short.exit_code == 1


def test_names_are_shown_as_they_are(tmp_path):
    name = "odd[/x][red]\x1b[31m"
    folder = save_pico(tmp_path / name)
    shown = rrtc("init", folder, "--dry-run", "--rank", "4")
    assert shown.exit_code == 0, shown.output
    assert r"odd[/x][red]\x1b[31m" in shown.stdout and r"odd[/x][red]\x1b[31m" in shown.stderr
    assert "\x1b" not in shown.output
    out = tmp_path / "out[/y]\x1b]0;title\x07"
    made = rrtc("init", folder, "-o", out, "--rank", "4", "--measure-tokens", "0")
    assert made.exit_code == 0, made.output
    inspected = rrtc("inspect", out)
    assert inspected.exit_code == 0 and r"out[/y]\x1b]0;title\x07" in inspected.stdout
    failed = rrtc("init", folder, "-o", out)
    assert r"out[/y]\x1b]0;title\x07 is not empty" in failed.stderr
    assert not {"\x1b", "\x07"} & set(made.output + inspected.output + failed.output)


def test_env_says_what_a_bug_report_should():
    shown = rrtc("env")
    assert shown.exit_code == 0 and __version__ in shown.stdout and "transformers" in shown.stdout
    found = json.loads(rrtc("env", "--json", "-").stdout)
    assert found["rrtc"] == __version__ and found["python"] == sys.version.split()[0]
    assert found["cache_folder"] == os.environ["RRTC_CACHE"] and found["device"]["type"]
    assert found["packages"]["torch"] and "vllm" in found["packages"]


def test_the_printed_recipe_is_the_default_one_with_every_field(tmp_path):
    printed = rrtc("recipe")
    assert printed.exit_code == 0 and printed.stdout == commented_recipe()
    (tmp_path / "recipe.yaml").write_text(printed.stdout, encoding="utf8")
    assert load_recipe(str(tmp_path / "recipe.yaml")) == Recipe()
    values = yaml.safe_load(printed.stdout)
    for part in ("init", "uptrain", "eval", "export"):
        assert list(values[part]) == list(Recipe.model_fields[part].annotation.model_fields)
    said = " ".join(line.strip().removeprefix("#").strip() for line in printed.stdout.splitlines())
    for part in ("init", "uptrain", "eval", "export"):
        for field in Recipe.model_fields[part].annotation.model_fields.values():
            assert field.description in said
    assert max(map(len, printed.stdout.splitlines())) <= 120


def test_the_schema_takes_every_shipped_recipe_and_no_misspelling():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(rrtc("recipe", "--schema").stdout)
    assert schema == recipe_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema).validate
    assert len(RECIPES) > 3
    for file in RECIPES:
        check(yaml.safe_load(file.read_text(encoding="utf8")))
    check(Recipe().model_dump())
    check({"init": {"rank": "q=64,ffn=8", "calibrate_on": "book.txt"}, "uptrain": {"data": "x", "data_weights": 1}})
    check({"uptrain": {"losses": ["next_token=1"], "shared_lr_scale": "visits"}, "eval": {"text": "book.txt"}})
    for wrong in ({"init": {"lops": 2}}, {"init": {"loops": "two"}}, {"init": {"sharing": "circle"}}, {"inti": {}}):
        with pytest.raises(jsonschema.ValidationError):
            check(wrong)


@pytest.mark.slow
def test_the_shell_completes_commands_flags_and_choices():
    def completed(words: str) -> set[str]:
        environment = os.environ | {
            "_RRTC_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1),
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", "from rrtc.cli.app import main; main()"], capture_output=True,
                              text=True, env=environment)  # fmt: skip
        return set(done.stdout.split())

    assert {"init", "inspect"} <= completed("rrtc in") and "eval" not in completed("rrtc in")
    assert {"--budget"} <= completed("rrtc init --bud")
    assert completed("rrtc export --format o") == {"onnx"}


def test_completion_can_be_installed():
    shown = rrtc("--help").stdout
    assert "--install-completion" in shown and "--show-completion" in shown
