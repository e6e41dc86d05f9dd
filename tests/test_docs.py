"""What README and docs/ say is true of the code: commands and flags exist, Python runs, links and files are there, and
the wheel has the recipe that is promised with it."""

import ast
import importlib.util
import json
import re
import shlex
import tomllib
import zipfile
from pathlib import Path

import pytest
import typer
from pico import save_pico
from typer.testing import CliRunner

from rrtc.cli.app import app
from rrtc.recipe.schema import SHIPPED, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = {
    str(file.relative_to(ROOT)): file.read_text(encoding="utf8")
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
}
GROUP = typer.main.get_command(app)
COMMANDS = GROUP.commands
PARAMETERS = [one for command in (GROUP, *COMMANDS.values()) for one in command.params]
FLAGS = {flag for one in PARAMETERS for flag in (*one.opts, *one.secondary_opts)}
OTHERS_FLAGS = {"--help", "--no-deps", "--target", "--dist"}  # of every command, pip and pytest
TEXT = "\n\n\n".join(f"Chapter {n}. It was the {n}th of May, and the rain had not stopped. " * 30 for n in range(40))


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The arguments of every `rrtc …` and `torchrun … -m rrtc …` in the bash blocks of a page."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    asked = [re.match(r"rrtc (.*)|torchrun .* -m rrtc (.*)", line) for line in lines]
    return [shlex.split(match[1] or match[2], comments=True) for match in asked if match]


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_command_is_one_that_the_command_line_takes(page):
    for name, *arguments in commands(page):
        COMMANDS[name].make_context(name, arguments)  # raises for an unknown flag, or a value of the wrong kind


def test_there_are_commands_to_check():
    assert {name for page in PAGES for name, *_ in commands(page)} >= {"init", "uptrain", "eval", "export", "run"}
    with pytest.raises(Exception, match="No such option"):
        COMMANDS["init"].make_context("init", ["MODEL", "--bugdet", "0.7"])


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_the_text_exists(page):
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    own = [span for span in spans if not span.startswith(("torchrun", "pip", "pytest"))]
    used = {flag for span in own for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", span)}
    assert used <= FLAGS | OTHERS_FLAGS


@pytest.mark.parametrize("page", PAGES)
def test_every_python_block_compiles_and_imports_what_there_is(page):
    for block in blocks(page, "python"):
        for node in ast.walk(compile(block, page, "exec", ast.PyCF_ONLY_AST)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "rrtc":
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}")


@pytest.mark.slow
def test_the_lines_of_python_in_the_readme_run(tmp_path, monkeypatch, capsys):
    (lines,) = blocks("README.md", "python")
    assert len(lines.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    save_pico(tmp_path / "MODEL", num_hidden_layers=4)
    for name in ("corpus.txt", "book.txt"):
        Path(name).write_text(TEXT)
    exec(compile(lines, "README.md", "exec"), {})
    assert "Once upon a time" in capsys.readouterr().out
    assert Path("report/report.html").exists() and Path("release/model.safetensors").exists()


def test_the_readme_is_a_door():
    assert len(PAGES["README.md"].split()) <= 900


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere_and_files_exist(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", PAGES[page]):
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), target
        if anchor:
            prose = re.sub(r"```.*?```", "", file.read_text(encoding="utf8"), flags=re.DOTALL)
            assert anchor in {slug(heading) for heading in re.findall(r"^#+ (.*)$", prose, re.MULTILINE)}
    named = re.findall(r"`((?:rrtc|recipes|benchmarks|tests|docs)/[\w./-]*)`", PAGES[page])
    assert not [path for path in named if not (ROOT / path).exists()]


def test_nothing_is_left_to_fill_in():
    files = [*(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "benchmarks").glob("*.md"), ROOT / "CHANGELOG.md"]
    for name, text in PAGES.items() | {(str(file), file.read_text(encoding="utf8")) for file in files}:
        assert not re.search(r"TODO|TBD|QUICKSTART_", text), name


def test_the_picture_shows_the_figures_that_the_log_has():
    log = (ROOT / "benchmarks" / "LOG.md").read_text(encoding="utf8")
    picture = (ROOT / "docs" / "quality.svg").read_text(encoding="utf8")
    assert len(picture) < 60_000
    for model in json.loads((ROOT / "benchmarks" / "picture.json").read_text(encoding="utf8"))["models"]:
        assert model["name"] in picture
        for row in model["rows"]:
            for _, loss in row["points"]:
                assert f"{loss + 1e-9:.2f}<" in picture and f"{loss:.3f}" in log


# ---- the package ----


def test_the_quickstart_is_found_by_name_where_no_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe("quickstart")
    assert shipped == load_recipe(str(ROOT / "recipes" / "quickstart.yaml"))
    Path("quickstart").write_text("model: mine")
    assert load_recipe("quickstart").model == "mine"
    result = CliRunner().invoke(app, ["run", "quickstrat", "-o", "x"])
    assert result.exit_code == 2 and "quickstart" in result.stderr and not Path("x").exists()


def test_the_wheel_has_the_recipe_and_says_that_it_is_typed(tmp_path):
    with (ROOT / "pyproject.toml").open("rb") as file:
        wheel = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["packages"] == ["rrtc"] and (ROOT / "rrtc" / "py.typed").exists()
    shipped = ("recipes/quickstart.yaml", "recipes/paper")
    assert wheel["force-include"] == {place: f"rrtc/{place}" for place in shipped}
    assert SHIPPED[0] == ROOT / "rrtc" / "recipes"
    if importlib.util.find_spec("hatchling") is None:
        pytest.skip("what was checked is what the wheel is to have; building it needs hatchling")
    from hatchling.builders.wheel import WheelBuilder

    (made,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(made).namelist())
    assert {
        "rrtc/recipes/quickstart.yaml",
        "rrtc/recipes/paper/gemma-2b-2-loops.yaml",
        "rrtc/recipes/paper/gemma-2b/config.json",
        "rrtc/py.typed",
        "rrtc/eval/page.html",
    } <= names
