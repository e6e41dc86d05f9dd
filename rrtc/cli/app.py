"""The command line: parses, calls rrtc.api, shows what came back. Nothing else happens here.

Flags are made from the fields of the recipe, so that a command line and a recipe file say the same things. Nothing here
imports torch; rrtc.api does, when the cheap checks have passed.
"""

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from rrtc import __version__, api, console
from rrtc.cli import scores, tables
from rrtc.cli.chat import chat_command
from rrtc.cli.command import Resume, command, explained, needs_output, not_both
from rrtc.cli.description import description
from rrtc.cli.generate import generate_command
from rrtc.cli.help import Command, Group
from rrtc.cli.run import run_command
from rrtc.cli.serve import serve_command
from rrtc.recipe.commented import commented_recipe, recipe_schema
from rrtc.recipe.schema import Recipe

app = typer.Typer(
    cls=Group,
    help="Compress a language model: tie its layers, relax them with LoRA, heal by distillation, measure, export.",
    epilog="Start with: rrtc run quickstart -o runs/quickstart",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
Output = Annotated[str | None, typer.Option("-o", "--output", metavar="FOLDER", help="New folder to write.")]
Folder = Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that rrtc wrote.", show_default=False)]
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # how the user may have said that threads wait


def _command(name: str, part: str | None = None) -> Callable:
    """Registers a function as the command `name`; part: the section of the recipe whose fields are flags of it."""
    return lambda function: app.command(name, cls=Command)(command(part)(function))


@_command("init", "init")
def init_command(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="The dense model: a folder, a hub id, a .gguf file or package://import_name/path/in/package.",
            show_default=False,
        ),
    ] = None,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, its size and its memory; a config.json is enough.")
    ] = False,
    resume: Resume = False,
    *,
    recipe: Recipe,
    shown: bool,
):
    """Tie a dense model's layers and give each use its own LoRA.

    \b
    Example:
      rrtc init ./SmolLM2-135M -o small --size 0.7 --calibrate-on corpus.txt
    """
    if model is None and recipe.model is None:
        raise typer.BadParameter("name the dense model, here or in the recipe", param_hint="MODEL")
    not_both(dry_run, resume)
    if dry_run:
        result = api.plan(model, recipe, verbose=shown)
        return result, tables.plan(result)
    target = needs_output(output)
    result = api.init(model, target, recipe, resume=resume, verbose=shown)
    return result, tables.init(result, target, recipe.init.resolved())


@_command("uptrain", "uptrain")
def uptrain_command(
    folder: Folder,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a few steps and show steps, memory, FLOPs and time.")
    ] = False,
    resume: Resume = False,
    *,
    recipe: Recipe,
    shown: bool,
):
    """Heal a tied model by training it to do as its dense original does.

    \b
    Example:
      rrtc uptrain small -o healed --data corpus.jsonl --tokens 10000000
    On several GPUs:
      torchrun --nproc-per-node 8 -m rrtc uptrain small -o healed --batch-size 64
    """
    not_both(dry_run, resume)
    if dry_run:
        result = api.estimate(folder, recipe, verbose=shown)
        return result, tables.estimate(result)
    target = needs_output(output)
    result = api.uptrain(folder, target, recipe, resume=resume, verbose=shown)
    return result, tables.uptrain(result, target)


@_command("eval", "eval")
def eval_command(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="FOLDER", help="A folder that rrtc wrote, or several to compare.", show_default=False),
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FOLDER", help="New folder for the report.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The dense original, where it has moved.")
    ] = None,
    *,
    recipe: Recipe,
    shown: bool,
):
    """Measure a compressed model beside its dense original, on the same items in the same run.

    What was measured before is not measured again.

    \b
    Example:
      rrtc eval healed --text book.txt --tasks paper -o report
    On several GPUs:
      torchrun --nproc-per-node 8 -m rrtc eval healed -o report
    """
    result = api.evaluate(folders, output, against, recipe, verbose=shown)
    pictures = [] if output is None else [console.plain(f"Pictures: {os.path.join(output, 'report.html')}")]
    return result, scores.report(result), *pictures


@_command("export", "export")
def export_command(
    folder: Folder,
    output: Output = None,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="FOLDER", help="What 'rrtc eval -o' wrote, for the model card."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the verified export into a new repository."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository a private one.")] = False,
    *,
    recipe: Recipe,
    shown: bool,
):
    """Write a model that loads without rrtc, and check it in a fresh process before saying so.

    \b
    Example:
      rrtc export healed -o release --format dense
    """
    target = needs_output(output)
    result = api.export(folder, target, report, push_to_hub, private, recipe, verbose=shown)
    pushed = [console.plain(f"Pushed to {result['pushed_to']}.")] if "pushed_to" in result else []
    return result, tables.export(result, target), *pushed


_command("run")(run_command)
_command("chat")(chat_command)
_command("generate")(generate_command)
_command("serve")(serve_command)


@_command("inspect")
def inspect_command(folder: Folder, *, shown: bool):
    """Show what an rrtc folder is: plan, origin, sizes, and what was measured.

    \b
    Example:
      rrtc inspect runs/quickstart/uptrain
    """
    result = api.inspect(folder)
    return result, description(result)


@app.command("recipe", cls=Command)
def recipe_command(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of recipes instead, for editors.")
    ] = False,
):
    """Print a recipe to start from: every field with its default and what it means.

    \b
    Example:
      rrtc recipe > recipe.yaml
      rrtc recipe --schema > recipe.schema.json
    """
    if schema:
        console.write_json(recipe_schema(), "-")
    else:
        typer.echo(commented_recipe(), nl=False)


@_command("env")
def env_command(*, shown: bool):
    """Show what a bug report should say: versions, the machine, and where the cache is.

    \b
    Example:
      rrtc env --json env.json
    """
    with console.notes_shown(shown):
        console.note("Looking at this machine")
        result = api.env()
    return result, tables.environment(result)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"rrtc {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
):
    pass


def main() -> None:
    """The entry point of the `rrtc` command and of `python -m rrtc`."""
    if not any(name in os.environ for name in WAITING):
        # Threads of OpenMP that wait for the others by spinning take the very cores that these need, once anybody else
        # computes on the machine: a step then took 4 to 6 times as long (benchmarks/LOG.md). Read when torch is loaded.
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us
            setattr(sys, name, open(os.devnull, "w", encoding="utf8"))  # noqa: SIM115
        getattr(sys, name).reconfigure(errors="replace")  # a terminal without arrows still gets the rest
    try:
        app(prog_name="rrtc")
    except OSError as error:  # help or a recipe into a full disk
        console.show_error(explained(error))
        sys.exit(1)
