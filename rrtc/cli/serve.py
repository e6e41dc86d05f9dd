"""`rrtc serve`: an OpenAI-compatible server."""

from typing import Annotated

import typer

from rrtc import api
from rrtc.cli import tables
from rrtc.cli.command import AnyModel
from rrtc.recipe.generate import ServeOptions
from rrtc.recipe.schema import with_flags

FIELDS = ServeOptions.model_fields
HELP = {name: field.description or "" for name, field in FIELDS.items()}
for shown in ("host", "port", "batch", "waiting"):
    HELP[shown] += f" [default: {FIELDS[shown].default}]"


def serve_command(
    model: AnyModel,
    port: Annotated[int | None, typer.Option("--port", metavar="N", help=HELP["port"])] = None,
    host: Annotated[str | None, typer.Option("--host", metavar="ADDRESS", help=HELP["host"])] = None,
    api_key: Annotated[
        str | None,
        typer.Option("--api-key", metavar="KEY", envvar="RRTC_API_KEY", show_envvar=True, help=HELP["api_key"]),
    ] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help=HELP["batch"])] = None,
    context: Annotated[int | None, typer.Option("--context", metavar="TOKENS", help=HELP["context"])] = None,
    waiting: Annotated[int | None, typer.Option("--waiting", metavar="N", help=HELP["waiting"])] = None,
    speculate: Annotated[int | None, typer.Option("--speculate", metavar="N", help=HELP["speculate"])] = None,
    exit_threshold: Annotated[
        float | None, typer.Option("--exit-threshold", metavar="SHARE", help=HELP["exit_threshold"])
    ] = None,
    exit_quality: Annotated[
        float | None, typer.Option("--exit-quality", metavar="NATS", help=HELP["exit_quality"])
    ] = None,
    catch_up: Annotated[bool, typer.Option("--catch-up", help=HELP["catch_up"])] = False,
    *,
    shown: bool,
):
    """Serve a model to OpenAI's clients: completions and chat, streamed or whole.

    Many requests go on at once. Ctrl-C or SIGTERM ends it: requests have a few seconds to end.

    \b
    Example:
      rrtc serve healed
      curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
        -d '{"prompt": "Once upon a time", "max_tokens": 40}'
    """
    options = {
        "port": port, "host": host, "api_key": api_key, "batch": batch, "context": context, "waiting": waiting,
        "speculate": speculate, "exit_threshold": exit_threshold, "exit_quality": exit_quality,
        "catch_up": catch_up or None,
    }  # fmt: skip
    with_flags(ServeOptions(), options, "the command line")
    result = api.serve(model, **options, verbose=shown)
    return result, tables.served(result)
