"""--help at 80 columns: every flag and every choice is there, whole; common flags come first."""

import re
from typing import Literal, get_args, get_origin

import pytest
import typer
from typer.testing import CliRunner

from rrtc.cli.app import app
from rrtc.cli.flags import COMMON, WORDS
from rrtc.recipe.schema import Recipe

PARTS = ("init", "uptrain", "eval", "export")
COMMANDS = typer.main.get_command(app).commands


def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.output
    return result.stdout


def words(text: str) -> list[str]:
    return re.split(r"[\s,.\[\]]+", text)


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_every_option_is_whole_and_no_line_is_wider(command):
    shown = help_of(*command)
    assert max(map(len, shown.splitlines())) <= 80
    assert "…-" not in shown and "<" not in shown
    group = typer.main.get_command(app)
    for parameter in (COMMANDS[command[0]] if command else group).params:
        for name in (*parameter.opts, *parameter.secondary_opts):
            assert parameter.param_type_name == "argument" or name in words(shown), name


@pytest.mark.parametrize("part", PARTS)
def test_every_field_is_a_flag_of_the_right_kind_with_its_choices(part):
    shown = help_of(part)
    for name, field in Recipe.model_fields[part].annotation.model_fields.items():
        flag = "--" + name.replace("_", "-")
        line = next(line for line in shown.splitlines() if re.match(rf"  {flag}\b(?!-)", line))
        kinds = {kind for kind in (field.annotation, *get_args(field.annotation)) if kind is not type(None)}
        if bool in kinds:
            assert f"{flag} / --no-{flag[2:]}" in line
        else:
            assert re.match(rf"  {flag} [A-Z]", line), line
        if int in kinds and str not in kinds and len(kinds) == 1:
            assert re.search(rf"{flag} (N|TOKENS)\b", line), line
        for kind in kinds:
            if get_origin(kind) is Literal:
                assert set(get_args(kind)) <= set(words(shown)), name


@pytest.mark.parametrize("part", PARTS)
def test_common_flags_come_first_and_the_others_in_a_section_of_their_own(part):
    first, more = help_of(part).split(f"\nMore: {part}:\n")
    fields = Recipe.model_fields[part].annotation.model_fields
    assert set(COMMON[part]) < set(fields)
    for name in fields:
        flag, place = "--" + name.replace("_", "-"), first if name in COMMON[part] else more
        assert re.search(rf"^  {flag}\b(?!-)", place, re.MULTILINE), name
    order = ["-o, --output", *("--" + name.replace("_", "-") for name in COMMON[part]), "--recipe", "--json"]
    places = [first.index(f"\n  {flag} ") for flag in order]
    assert places == sorted(places)
    for flag in ("-q, --quiet", "-v, --verbose", "--json FILE", "-h, --help"):
        assert f"\n  {flag}" in first


def test_the_words_are_those_of_fields():
    fields = {name for part in PARTS for name in Recipe.model_fields[part].annotation.model_fields}
    assert set(WORDS) <= fields


def test_help_of_every_command_teaches_with_an_example():
    for command in COMMANDS:
        shown = help_of(command)
        assert re.search(rf"Example:\n    rrtc {command}\b", shown), command
    listed = help_of()
    assert all(re.search(rf"^  {command} ", listed, re.MULTILINE) for command in COMMANDS)


def test_a_wrong_flag_or_value_is_named_in_one_line():
    for arguments, says in (
        (["init", "--no-such-flag"], "No such option: --no-such-flag"),
        (["init", "x", "--loops", "many"], "'--loops': Input should be a valid integer"),
        (["init", "x", "--budget", "half"], "'--budget': Input should be a valid number"),
        (["init", "x", "--dtype", "int3"], "'int3' is not one of 'auto', 'float32'"),
        (["inti"], "No such command 'inti'. Did you mean 'init'?"),
    ):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 2 and says in result.stderr, result.stderr
