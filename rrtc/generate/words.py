"""From text to token ids and back: prompts as a model wants them, and what it says in pieces, as they come."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rrtc.errors import RrtcError, WrongUsage, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character
LONGEST_CHARACTER = 4  # tokens that one character takes at most: UTF-8 has no longer ones

Show = Callable[[str], None]
Turns = list[dict[str, str]]  # messages as chat templates take them


def prompt_ids(prompt: str | Turns, tokenizer: "PreTrainedTokenizerBase", vocabulary: int, name: str) -> list[int]:
    """Token ids of a text to be gone on with, or of a conversation, through the chat template where there is one.
    name: the model's, for errors.

    Raises WrongUsage where the prompt holds nothing; RrtcError where the chat template fails, or the tokenizer has
    tokens of which the model, with its `vocabulary`, has no embeddings.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt)["input_ids"]
    elif not tokenizer.chat_template:
        ends = {"assistant": "\n"}  # what is said next begins a line
        ids = tokenizer("".join(turn["content"] + ends.get(turn["role"], "") for turn in prompt))["input_ids"]
    else:
        try:
            ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        except Exception as error:  # a template is a program, which can fail in any way
            raise RrtcError(f"The chat template of {name} fails with '{short(error)}'.") from error
    if not ids:
        raise WrongUsage("There is nothing in the prompt that the tokenizer has a token for.")
    if max(ids) >= vocabulary:
        raise RrtcError(f"The tokenizer of {name} has tokens that the model does not know.")
    return list(ids)


class Words:
    """The text of an answer while its tokens come. show(piece) is called with each piece of it that no later token can
    change; stops: texts before which it ends."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", show: Show = lambda piece: None, stops: Sequence[str] = ()
    ):
        self._tokenizer, self._show, self._stops = tokenizer, show, stops
        self._ids: list[int] = []
        self._read = self._known = 0  # tokens before those that are decoded together; those whose text is known
        self._text = ""  # of all tokens that are known
        self._shown = 0  # characters

    def add(self, token: int) -> bool:
        """Takes in the next token. Returns whether the text has come to one of the stops."""
        self._ids.append(token)
        before = self._decoded(self._ids[self._read : self._known])
        both = self._decoded(self._ids[self._read :])
        if both.endswith(UNFINISHED) and len(self._ids) - self._known < LONGEST_CHARACTER:
            return False
        self._text += both[len(before) :]
        self._read, self._known = self._known, len(self._ids)
        if self._stop() is not None:
            return True
        held = max((length for stop in self._stops for length in range(1, len(stop)) if self._ends_with(stop[:length])),
                   default=0)  # fmt: skip
        self._show_until(len(self._text) - held)
        return False

    def finish(self) -> str:
        """The whole text, all of which has been shown then."""
        rest = self._decoded(self._ids[self._read :])
        self._text += rest[len(self._decoded(self._ids[self._read : self._known])) :]
        stop = self._stop()
        self._text = self._text if stop is None else self._text[:stop]
        self._show_until(len(self._text))
        return self._text

    def _stop(self) -> int | None:
        """Where the first of the stops begins."""
        return min((at for stop in self._stops if (at := self._text.find(stop)) >= 0), default=None)

    def _ends_with(self, beginning: str) -> bool:
        return self._text.endswith(beginning)

    def _show_until(self, end: int) -> None:
        if end > self._shown:
            self._show(self._text[self._shown : end])
            self._shown = end

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
