"""`rrtc generate`: a text gone on with, or many prompts from a file."""

from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from rrtc import api, console
from rrtc.cli import tables
from rrtc.cli.command import AnyModel, Resume
from rrtc.errors import WrongUsage
from rrtc.recipe.chat import check_prompt
from rrtc.recipe.generate import WayOptions
from rrtc.recipe.schema import with_flags
from rrtc.text.prompts import prompt_of, read_prompts

FIELDS = WayOptions.model_fields
HELP = {name: field.description or "" for name, field in FIELDS.items()}
for shown in ("max_tokens", "batch"):
    HELP[shown] += f" [default: {FIELDS[shown].default}]"


def generate_command(
    model: AnyModel,
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="Text to go on with.", show_default=False)
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(
            "--prompts", metavar="FILE", help='A .jsonl file, a line for each: {"prompt": …} or {"messages": …}.'
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option("-o", "--output", metavar="FILE", help='New .jsonl file: the lines of --prompts, with "text".'),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", metavar="TOKENS", help=HELP["max_tokens"])] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="NUMBER", help=HELP["temperature"])
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", metavar="SHARE", help=HELP["top_p"])] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", metavar="N", help=HELP["top_k"])] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", metavar="NUMBER", help=HELP["repetition_penalty"])
    ] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help=HELP["stop"])] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help=HELP["seed"])] = None,
    batch: Annotated[int | None, typer.Option("--batch", metavar="N", help=HELP["batch"])] = None,
    speculate: Annotated[int | None, typer.Option("--speculate", metavar="N", help=HELP["speculate"])] = None,
    exit_threshold: Annotated[
        float | None, typer.Option("--exit-threshold", metavar="SHARE", help=HELP["exit_threshold"])
    ] = None,
    exit_quality: Annotated[
        float | None, typer.Option("--exit-quality", metavar="NATS", help=HELP["exit_quality"])
    ] = None,
    catch_up: Annotated[bool, typer.Option("--catch-up", help=HELP["catch_up"])] = False,
    resume: Resume = False,
    *,
    json: str | None,
    shown: bool,
):
    """Go on with a text, or answer many prompts at once.

    \b
    Example:
      rrtc generate healed "Once upon a time"
      rrtc generate healed --prompts questions.jsonl -o answers.jsonl
    With a model whose exits were trained (rrtc uptrain --exits frozen):
      rrtc generate exits --prompts questions.jsonl --exit-quality 0.02
    """
    options = {
        "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "top_k": top_k,
        "repetition_penalty": repetition_penalty, "stop": stop or None, "seed": seed, "batch": batch,
        "speculate": speculate, "exit_threshold": exit_threshold, "exit_quality": exit_quality,
        "catch_up": catch_up or None,
    }  # fmt: skip
    with_flags(WayOptions(), options, "the command line")
    if (prompt is None) == (prompts is None):
        raise WrongUsage("There has to be one kind of prompts.", "Give either PROMPT or --prompts FILE.")
    if prompts is None and (output is not None or resume):
        raise WrongUsage("-o and --resume are for the prompts of a file.", "Add --prompts FILE, or leave them out.")
    if prompt is not None:
        check_prompt(prompt)
        visible = json != "-"
        result = api.generate(model, prompt, show=console.say if visible else None, verbose=shown, **options)
        if visible:
            console.say("\n")
        return result, *([tables.generated(result)] if shown else [])
    if output is None:
        rows = read_prompts(Path(prompts).expanduser())
        result = api.generate(model, [prompt_of(row) for row in rows], verbose=shown, **options)
        for row, answer in zip(rows, result["answers"], strict=True):
            if json != "-":
                console.say(dumps(row | answer, ensure_ascii=False) + "\n")
        return result, *([tables.generated(result)] if shown else [])
    result = api.generate_file(model, prompts, output, resume=resume, verbose=shown, **options)
    return result or {}, console.plain(f"Wrote {output}."), *([tables.generated(result)] if result else [])
