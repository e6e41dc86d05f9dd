"""What all commands have in common: how their flags, results and errors reach the user."""

import functools
import inspect
import os
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from rrtc import console
from rrtc.cli.flags import with_fields
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.cache import cache_folder
from rrtc.recipe.schema import Recipe

ANY_MODEL = "A folder that rrtc wrote, or any model: a folder, a hub id, a .gguf file or package://…."
AnyModel = Annotated[str, typer.Argument(metavar="FOLDER", help=ANY_MODEL, show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from where an interrupted run stopped.")]
JSON_HELP = "Write the result as JSON into FILE; - is stdout."
QUIET_HELP = "Show the result, warnings and errors, and nothing on the way."
VERBOSE_HELP = "Show what transformers says, too, and the traceback of an error."
SHARED = {  # by all commands: their kind and default
    "json": (Annotated[str | None, typer.Option("--json", metavar="FILE", help=JSON_HELP)], None),
    "quiet": (Annotated[bool, typer.Option("-q", "--quiet", help=QUIET_HELP)], False),
    "verbose": (Annotated[bool, typer.Option("-v", "--verbose", help=VERBOSE_HELP)], False),
}


def command(part: str | None = None) -> Callable:
    """Makes a command of a function that returns a result, and what to print of it, with what all commands have in
    common: --json, --quiet and --verbose, and one sentence and an exit code for what can go wrong: 1 failed, 2 wrong
    usage.

    part: the section of the recipe whose fields are flags of it. The function is called with `shown`, whether notes and
    progress are, and, if it has a parameter `json`, with where the result is written as JSON.
    """

    def decorate(function: Callable) -> Callable:
        function = with_fields(part, Recipe.model_fields[part].annotation)(function) if part else function
        own = [p for key, p in inspect.signature(function).parameters.items() if key not in ("shown", "json")]
        told_json = "json" in inspect.signature(function).parameters
        shared = [
            inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, annotation=kind, default=default)
            for key, (kind, default) in SHARED.items()
        ]

        @functools.wraps(function)
        def run(*, json: str | None, quiet: bool, verbose: bool, **given):
            _set_up_libraries(verbose)
            try:
                with _warnings_are_notes():
                    target = json and os.path.expanduser(json)
                    console.check_json_target(target)
                    more = {"json": target} if told_json else {}
                    result, *shown = function(**given, **more, shown=not quiet)
                    for renderable in shown if target != "-" else ():
                        console.results.print(renderable)
                    console.write_json(result, target)
            except (RrtcError, KeyboardInterrupt, OSError, MemoryError, RuntimeError) as error:
                if verbose:
                    traceback.print_exception(error)
                told = explained(error)
                console.show_error(told)
                raise typer.Exit(told.exit_code) from error

        parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + shared
        run.__signature__ = inspect.Signature(parameters)
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def explained(error: BaseException) -> RrtcError:
    """What to tell the user of `error`. Raises it again where it is no fault of the machine's or the user's."""
    if isinstance(error, RrtcError):
        return error
    if isinstance(error, KeyboardInterrupt):
        kept = "What was finished is kept, and nothing unfinished has its final name;"
        return RrtcError("Interrupted.", f"{kept} init, uptrain and run have --resume.")
    if isinstance(error, OSError):  # no permission, a full disk
        where = f" ({error.filename})" if error.filename else ""
        in_cache = Path(str(error.filename)).is_relative_to(cache_folder())
        hint = "RRTC_CACHE names another folder for what rrtc keeps." if in_cache else ""
        return RrtcError(f"{error.strerror or error}{where}.", hint)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        return RrtcError(
            "The machine ran out of memory.",
            "Lower --calibrate-tokens (init, export), or micro-batch, context or tokens, or turn on "
            "--activation-checkpointing (uptrain).",
        )
    raise error


def _set_up_libraries(verbose: bool) -> None:
    """Before they are imported: what they are to say."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not console.notes.is_terminal:
        os.environ.setdefault("TQDM_DISABLE", "1")  # bars of other libraries have no place in a log file
    if verbose:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")


@contextmanager
def _warnings_are_notes() -> Iterator[None]:
    """With --quiet too, a warning of rrtc's is a line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", console.RrtcWarning)
        others = warnings.showwarning

        def show(message, category, *place, **more):
            if issubclass(category, console.RrtcWarning):
                console.show_warning(str(message))
            else:
                others(message, category, *place, **more)

        warnings.showwarning = show
        yield


def not_both(dry_run: bool, resume: bool) -> None:
    """Raises WrongUsage where a dry run is to go on with something."""
    if dry_run and resume:
        raise WrongUsage("A dry run does no work that could be resumed.", "Leave out --dry-run or --resume.")


def needs_output(output: str | None) -> str:
    """`output`. Raises BadParameter where it was not given."""
    if output is None:
        raise typer.BadParameter("say where to write with -o FOLDER, or use --dry-run", param_hint="--output")
    return output
