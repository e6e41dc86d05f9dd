"""Prompts in a file, and the answers to them in another, which an interrupted run has a part of already."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from rrtc.errors import RrtcError
from rrtc.io.folder import only_run, partial_of, whole_file
from rrtc.plain import from_json
from rrtc.results import GeneratedResult

FIELDS = ("prompt", "messages")
ANSWERED = ("text", "tokens", "ended")  # what an answer adds to a row

Prompt = str | list[dict[str, str]]


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, each with a `prompt` or `messages`, and whatever else there is in it.

    Raises RrtcError, which names the line, where a row has neither or both, or has not what these are, or has a field
    of its own that the answer would take the place of.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise RrtcError(f"The prompts {file} cannot be read.", "They are a .jsonl file, in UTF-8.") from error
    rows = [_row(line, f"Line {number} of {file}") for number, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise RrtcError(f"There are no prompts in {file}.")
    return rows


def prompt_of(row: dict[str, Any]) -> Prompt:
    """What is asked in a row of `read_prompts`."""
    return row["prompt"] if "prompt" in row else row["messages"]


def _row(line: str, where: str) -> dict[str, Any]:
    hint = 'A line is {"prompt": "…"} or {"messages": [{"role": "user", "content": "…"}]}.'
    try:
        row = from_json(line)
    except ValueError as error:
        raise RrtcError(f"{where} is not JSON.", hint) from error
    if not isinstance(row, dict) or not any(field in row for field in FIELDS):
        raise RrtcError(f"{where} has neither a prompt nor messages.", hint)
    if all(field in row for field in FIELDS):
        raise RrtcError(f"{where} has both a prompt and messages.", hint)
    if own := [field for field in ANSWERED if field in row]:
        raise RrtcError(f"{where} has a field '{own[0]}', which is where the answer goes.", "Rename that field.")
    check_prompt_value(prompt_of(row), where, hint)
    return row


def check_prompt_value(prompt: Any, where: str, hint: str = "") -> None:
    """Raises RrtcError unless it is text, or messages that each have a role and content, with something in it."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RrtcError(f"{where} has an empty prompt.", hint)
        return
    messages = prompt if isinstance(prompt, list) else [None]
    for message in messages or [None]:
        texts = [message.get(key) for key in ("role", "content")] if isinstance(message, dict) else [None]
        if not all(isinstance(text, str) for text in texts):
            raise RrtcError(f"{where} has a prompt that is neither text nor messages.", hint)


class AnswersFile:
    """`target`, with a line for every one of `rows`: the row, and in it `text`, `tokens` and `ended`. Until all are
    there, they are in `target`.partial, in the order in which they were made; it begins with the first of them.

    fingerprint: what the answers depend on beside the rows.
    """

    def __init__(self, target: Path, rows: list[dict[str, Any]], fingerprint: dict[str, Any]):
        self.target, self._partial, self._rows = target, partial_of(target), rows
        made_for = json.dumps([rows, fingerprint], sort_keys=True)
        self._head = {"made_for": hashlib.sha256(made_for.encode()).hexdigest()}
        self.done: dict[int, GeneratedResult] = {}
        self._stream: TextIO | None = None

    def check(self, resume: bool) -> None:
        """Raises RrtcError where the file cannot be written, or begun anew, or gone on with. Reads what is done."""
        if self.target.exists() or self.target.is_symlink():
            raise RrtcError(f"The output {self.target} is there already.", "Name a new file: rrtc overwrites nothing.")
        parent = self.target.absolute().parent
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            raise RrtcError(f"The output {self.target} cannot be made: {parent} is no folder that can be written to.")
        if not self._partial.exists():
            if resume:
                raise RrtcError(f"There is nothing to resume: {self._partial} is not there.", "Leave out --resume.")
            return
        if not resume:
            raise RrtcError(
                f"{self._partial} holds the answers of an interrupted run.", "Go on with --resume, or delete that file."
            )
        lines = self._partial.read_text(encoding="utf8").split("\n")[:-1]  # what has no end of line was cut off
        if lines and lines[0] != json.dumps(self._head):
            sentence = f"{self._partial} was made of other prompts, another model or other settings."
            raise RrtcError(sentence, "Give the same again, or delete that file.")
        for line in lines[1:]:
            number, answer = json.loads(line)
            self.done[number] = answer

    @contextmanager
    def writing(self) -> Iterator["AnswersFile"]:
        """Takes answers by `add` in the block; where that ends with all of them there, the file is whole."""
        with only_run(self.target):
            with ExitStack() as self._open:
                yield self
            with whole_file(self.target) as temporary:
                rows = [row | self.done[number] for number, row in enumerate(self._rows)]
                temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf8")
            with suppress(OSError):
                self._partial.unlink()

    def add(self, number: int, answer: GeneratedResult) -> None:
        if self._stream is None:
            # Anew, because the last line may have been cut off; and in one go, so that none is lost.
            with whole_file(self._partial) as temporary:
                temporary.write_text(_lines(self._head, *map(list, self.done.items())), encoding="utf8")
            self._stream = self._open.enter_context(self._partial.open("a", encoding="utf8"))
        self.done[number] = answer
        self._stream.write(_lines([number, answer]))
        self._stream.flush()


def _lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)
