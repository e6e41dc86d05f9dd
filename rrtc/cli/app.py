"""The command line: parses, calls a stage, shows what came back. Nothing else happens here.

Flags are made from the fields of the recipe, so that a command line and a recipe file say the same things. Heavy
imports live inside the commands: `rrtc --help` must not wait for torch.
"""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from rrtc import __version__, console
from rrtc.cli import tables
from rrtc.cli.flags import with_fields
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.cache import cache_folder
from rrtc.recipe.eval import EvalRecipe
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe, load_recipe, with_flags
from rrtc.recipe.uptrain import UptrainRecipe

app = typer.Typer(
    help="Compress a language model: tie its layers, relax them with LoRA, heal by distillation, measure, export.",
    epilog="Start with: rrtc run recipes/quickstart.yaml -o runs/quickstart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Json = Annotated[
    str | None, typer.Option("--json", metavar="FILE", help="Write the result as JSON into FILE; - is stdout.")
]
Output = Annotated[str | None, typer.Option("-o", "--output", metavar="DIR", help="New folder to write.")]
Folder = Annotated[str, typer.Argument(metavar="DIR", help="A folder that rrtc wrote.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")]


def _guarded(command: Callable) -> Callable:
    """Turns what can go wrong into one sentence and an exit code: 1 failed, 2 wrong usage."""

    @functools.wraps(command)
    def run(*args, **kwargs):
        try:
            console.check_json_target(kwargs.get("json"))
            result = command(*args, **kwargs)
            console.write_json(result, kwargs.get("json"))
        except RrtcError as error:
            console.show_error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt as error:
            hint = (
                "What was finished is kept, and nothing unfinished has its final name; init, uptrain and run have "
                "--resume."
            )
            console.show_error(RrtcError("Interrupted.", hint))
            raise typer.Exit(1) from error
        except OSError as error:  # no permission, a full disk
            where = f" ({error.filename})" if error.filename else ""
            in_cache = Path(str(error.filename)).is_relative_to(cache_folder())
            hint = "RRTC_CACHE names another folder for what rrtc keeps." if in_cache else ""
            console.show_error(RrtcError(f"{error.strerror or error}{where}.", hint))
            raise typer.Exit(1) from error
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
                hint = (
                    "Lower --calibrate-tokens (init, export), or micro-batch, context or tokens, or turn on "
                    "--activation-checkpointing (uptrain)."
                )
                console.show_error(RrtcError("The machine ran out of memory.", hint))
                raise typer.Exit(1) from error
            raise

    return run


def _needs_output(output: str | None) -> str:
    if output is None:
        raise typer.BadParameter("say where to write with -o DIR, or use --dry-run", param_hint="--output")
    return output


def _needs_one_process(command: str) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise WrongUsage(f"'rrtc {command}' runs in one process.", "'rrtc uptrain' and 'rrtc eval' are for torchrun.")


def _quiet_libraries() -> None:
    """rrtc shows its own progress; transformers' bars and remarks would run through it."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not console.notes.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries have no place in a log file
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _print(renderable: Any, json: str | None) -> None:
    if json != "-":
        console.results.print(renderable)


@app.command("init")
@_guarded
@with_fields(("init", InitRecipe))
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
    json: Json = None,
    *,
    recipe: Recipe,
):
    """Tie a dense model's layers and give each use its own LoRA.

    Example: rrtc init ./SmolLM2-135M -o small --budget 0.7 --calibrate-on corpus.txt
    """
    model = model or recipe.model
    if model is None:
        raise typer.BadParameter("name the dense model, here or in the recipe", param_hint="MODEL")
    if dry_run and resume:
        raise WrongUsage("A dry run does no work that could be resumed.", "Leave out --dry-run or --resume.")
    target = None if dry_run else _needs_output(output)
    _needs_one_process("init")
    _quiet_libraries()
    from rrtc.init import stage

    if target is None:
        result = stage.dry_run(model, recipe)
        _print(tables.plan(result), json)
    else:
        result = stage.init(model, target, recipe, resume=resume)
        _print(tables.init(result, target), json)
    return result


@app.command("uptrain")
@_guarded
@with_fields(("uptrain", UptrainRecipe))
def uptrain_command(
    folder: Folder,
    output: Output = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Measure a few steps and show steps, memory, FLOPs and time.")
    ] = False,
    resume: Resume = False,
    json: Json = None,
    *,
    recipe: Recipe,
):
    """Heal a tied model by training it to do as its dense original does.

    Example: rrtc uptrain small -o healed --data corpus.jsonl --tokens 10000000. On several GPUs:
    torchrun --nproc-per-node 8 -m rrtc uptrain small -o healed
    """
    target = None if dry_run else _needs_output(output)
    _quiet_libraries()
    if target is None:
        from rrtc.uptrain.estimate import estimate

        result = estimate(folder, recipe)
        _print(tables.estimate(result), json)
    else:
        from rrtc.uptrain import stage

        result = stage.uptrain(folder, target, recipe, resume=resume)
        _print(tables.uptrain(result, target), json)
    return result


@app.command("eval")
@_guarded
@with_fields(("eval", EvalRecipe))
def eval_command(
    folders: Annotated[
        list[str],
        typer.Argument(metavar="DIR…", help="A folder that rrtc wrote, or several to compare.", show_default=False),
    ],
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The dense original, where it has moved.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="REPORT_DIR", help="New folder for the report.")
    ] = None,
    json: Json = None,
    *,
    recipe: Recipe,
):
    """Measure a compressed model beside its dense original, on the same items in the same run.

    Example: rrtc eval healed --text book.txt --tasks paper -o report. What was measured before is not measured again.
    On several GPUs: torchrun --nproc-per-node 8 -m rrtc eval healed -o report
    """
    _quiet_libraries()
    from rrtc.api import measure

    result = measure(folders, recipe, against, output)
    _print(tables.report(result), json)
    if output is not None:
        _print(f"Pictures: {os.path.join(output, 'report.html')}", json)
    return result


@app.command("export")
@_guarded
@with_fields(("export", ExportRecipe))
def export_command(
    folder: Folder,
    output: Output = None,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="REPORT_DIR", help="What 'rrtc eval -o' wrote, for the model card."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="USER/NAME", help="Upload the verified export into a new repository."),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make that repository a private one.")] = False,
    json: Json = None,
    *,
    recipe: Recipe,
):
    """Write a model that loads without rrtc, and check it in a fresh process before saying so.

    Example: rrtc export healed -o release --format dense
    """
    target = _needs_output(output)
    if private and push_to_hub is None:
        raise WrongUsage("Only what is pushed can be private.", "Add --push-to-hub USER/NAME, or leave out --private.")
    _needs_one_process("export")
    _quiet_libraries()
    from rrtc.export import stage
    from rrtc.export.push import check_push, push

    if push_to_hub is not None:
        check_push(push_to_hub)
    result = stage.export(folder, target, recipe, report)
    _print(tables.export(result, target), json)
    if push_to_hub is not None:
        result = result | {"pushed_to": push(target, push_to_hub, private)}
        _print(f"Pushed to {result['pushed_to']}.", json)
    return result


@app.command("run")
@_guarded
def run_command(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)],
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="New folder for the four stages.")],
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="Train on so many tokens instead of the recipe's.")
    ] = None,
    resume: Resume = False,
    json: Json = None,
):
    """Run a whole recipe: init, uptrain, eval and export, into DIR/init, DIR/uptrain, DIR/eval and DIR/export.

    Example: rrtc run recipes/quickstart.yaml -o runs/quickstart
    """
    loaded = load_recipe(recipe)
    loaded = loaded.model_copy(update={"uptrain": with_flags(loaded.uptrain, {"tokens": tokens})})
    _needs_one_process("run")
    _quiet_libraries()
    from rrtc.api import run

    result = run(loaded, output, resume)
    _print(tables.report(result["eval"]), json)
    _print(tables.export(result["export"], os.path.join(output, "export")), json)
    return result


@app.command("inspect")
@_guarded
def inspect_command(folder: Folder, json: Json = None):
    """Show what an rrtc folder is: plan, origin, sizes, and what was measured.

    Example: rrtc inspect runs/quickstart/uptrain
    """
    _quiet_libraries()
    from rrtc.api import describe

    result = describe(folder)
    _print(tables.description(result), json)
    return result


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
    app(prog_name="rrtc")
