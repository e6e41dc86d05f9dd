"""`rrtc run`: a whole recipe, with single fields of it set, or a sweep over them."""

import os
from typing import Annotated, Any

import typer

from rrtc import api, console
from rrtc.cli import scores, tables
from rrtc.cli.command import Resume, needs_output, not_both
from rrtc.recipe.settings import parse_settings, parse_sweep

SETTING = "Another value for a field of the recipe, as in init.rank=64. Can be given several times."
SWEEP = (
    "Several values for a field, as in init.rank=0,64,128: init and uptrain with each, and one report on all. Of "
    "several of these, all combinations."
)


def run_command(
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe file, or one that rrtc brings: quickstart, gemma-2b-2-loops and others of the paper.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str | None, typer.Option("-o", "--output", metavar="FOLDER", help="New folder for the stages.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Compress this dense model instead of the recipe's.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help=SETTING)] = None,
    sweep: Annotated[list[str] | None, typer.Option("--sweep", metavar="FIELD=V,V,…", help=SWEEP)] = None,
    tokens: Annotated[
        str | None, typer.Option("--tokens", metavar="TOKENS", help="Train on so many tokens instead of the recipe's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the whole recipe, the plan and its size; a config.json is enough.")
    ] = False,
    resume: Resume = False,
    *,
    shown: bool,
):
    """Run a whole recipe: init, uptrain, eval and export, each into a folder of its name in FOLDER.

    \b
    Example:
      rrtc run quickstart -o runs/quickstart
      rrtc run quickstart -o runs/small --set init.budget=0.5 --tokens 50k
      rrtc run recipe.yaml -o runs/ranks --sweep init.rank=0,64,128
    """
    over = parse_sweep(sweep or [])
    given: dict[str, Any] = {
        "tokens": tokens,
        "model": model,
        "settings": parse_settings(settings or []),
        "verbose": shown,
    }
    not_both(dry_run, resume)
    if dry_run:
        planned = api.plan_run(recipe, over, **given)
        return planned if over else planned["run"], tables.planned(planned)
    target = needs_output(output)
    if over:
        swept = api.sweep(recipe, target, over, resume, **given)
        page = os.path.join(target, "report", "report.html")
        return swept, scores.report(swept["report"]), console.plain(f"Pictures: {page}")
    result = api.run(recipe, target, resume, **given)
    return result, scores.report(result["eval"]), tables.export(result["export"], os.path.join(target, "export"))
