"""`rrtc chat`: a conversation in a terminal, or one answer."""

import re
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, TextIO

import typer

from rrtc import api, console
from rrtc.cli.command import AnyModel
from rrtc.errors import RrtcError, WrongUsage, nearest
from rrtc.recipe.chat import ChatOptions, check_prompt
from rrtc.recipe.schema import with_flags

if TYPE_CHECKING:
    from rrtc.chat import Chat, Speaker
    from rrtc.results import AnswerResult

COMMANDS = ("/clear", "/exit")
FIELDS = ChatOptions.model_fields
HELP = {name: field.description for name, field in FIELDS.items()}
HELP["max_tokens"] += f" [default: {FIELDS['max_tokens'].default}]"


def chat_command(
    model: AnyModel,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", metavar="TEXT", help="Answer this and end. By default, text that is piped in."),
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--against",
            metavar="MODEL",
            help="Show this model's answer too; dense is the original that FOLDER was made from.",
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option("--max-tokens", metavar="TOKENS", help=HELP["max_tokens"]),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", metavar="NUMBER", help=HELP["temperature"])
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", metavar="SHARE", help=HELP["top_p"])] = None,
    seed: Annotated[int | None, typer.Option("--seed", metavar="N", help=HELP["seed"])] = None,
    *,
    json: str | None,
    shown: bool,
):
    """Talk to a model: a conversation in a terminal, or one answer.

    In a conversation, /clear begins anew, /exit or Ctrl-D ends it, and Ctrl-C stops an answer.

    \b
    Example:
      rrtc chat healed
      rrtc chat healed --prompt "Why is the sky blue?" --against dense
      cat question.txt | rrtc chat healed
    """
    if prompt is None and not _is_terminal(sys.stdin):
        prompt = _piped()
    if prompt is None and json is not None:
        raise WrongUsage("One answer alone is written as JSON.", "Add --prompt TEXT, or leave out --json.")
    if prompt is not None:
        check_prompt(prompt)
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    with_flags(ChatOptions(), options, "the command line")
    with console.notes_shown(shown):
        chat = api.chat(model, against, **options, verbose=shown)
        for speaker in chat.speakers:
            how = (
                "asked through its chat template"
                if speaker.has_template
                else "going on with the text, without a chat template"
            )
            console.note(f"{speaker.name}: {how}")
        if prompt is None:
            _converse(chat)
            return (None,)
        return ({"prompt": prompt, "answers": [_answer(chat, one, prompt, json != "-") for one in chat.speakers]},)


def _converse(chat: "Chat") -> None:
    """Until the user ends it."""
    console.note("/clear begins anew, /exit or Ctrl-D ends, Ctrl-C stops an answer.")
    with suppress(ImportError):
        import readline  # noqa: F401 - arrow keys in what `input` reads
    sys.stdin.reconfigure(errors="surrogateescape")  # a prompt that is no text is refused like any other
    while True:
        try:
            prompt = input("> " if _is_terminal(sys.stdout) else "").strip()
        except EOFError:
            console.say("\n")
            return
        except KeyboardInterrupt:
            console.say("\n")
            continue
        if prompt == "/exit":
            return
        if prompt == "/clear":
            chat.clear()
            console.note("What was said is forgotten.")
        elif re.fullmatch("/[a-z]+", prompt):
            console.note(f"There is no command {prompt}. {nearest(prompt, COMMANDS)}")
        elif prompt:
            _answer_all(chat, prompt)


def _answer_all(chat: "Chat", prompt: str) -> None:
    """One turn: Ctrl-C stops the answer of one model, and what cannot be answered ends nothing."""
    for speaker in chat.speakers:
        try:
            _answer(chat, speaker, prompt, True)
        except KeyboardInterrupt:
            console.say("\n")
            console.note("Stopped.")
        except RrtcError as error:
            console.show_error(error)


def _answer(chat: "Chat", speaker: "Speaker", prompt: str, shown: bool) -> "AnswerResult":
    if shown and len(chat.speakers) > 1:
        console.results.print(console.plain(f"{speaker.name}:", "bold"))
    found = speaker.answer(prompt, console.say if shown else lambda piece: None)
    if shown:
        console.say("\n")
    if found["forgotten"]:
        console.note(f"{speaker.name} does not see the beginning of this conversation any more.")
    return found


def _piped() -> str:
    """What came through a pipe, without the end of its last line."""
    if sys.stdin is None:
        return ""
    return sys.stdin.buffer.read().decode("utf8", errors="surrogateescape").removesuffix("\n").removesuffix("\r")


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()
