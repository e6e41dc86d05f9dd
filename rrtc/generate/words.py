"""From text to token ids and back: prompts as a model wants them, and what it says in pieces, as they come."""

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rrtc.errors import RrtcError, WrongUsage, short

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedTokenizerBase

UNFINISHED = "\ufffd"  # what a tokenizer makes of the first bytes of a character
BEFORE = 8  # tokens of a prompt that what follows is decoded with
BYTE = re.compile("<0x[0-9A-F]{2}>")  # what tokenizers of the SentencePiece kind call the bytes of rare characters

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


def stops_of(asked: Sequence[str], config: "GenerationConfig") -> list[str]:
    """The texts before which an answer ends: those that are asked for, or else those of the model's own generation
    defaults."""
    own = config.stop_strings or []
    return list(asked) or [stop for stop in ([own] if isinstance(own, str) else own) if stop]


def ends_of(stops: Sequence[str], tokenizer: "PreTrainedTokenizerBase") -> set[int]:
    """The special tokens among `stops`: they are no part of a text, so that none is found in it.

    Raises WrongUsage where a stop has one of them beside other text.
    """
    if not stops:
        return set()
    special = {str(token): id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special}
    for stop in stops:
        if stop not in special and (inner := next((token for token in special if token in stop), None)):
            raise WrongUsage(f"An answer cannot end at {stop!r}, a special token and text.", f"Name {inner} alone.")
    return {special[stop] for stop in stops if stop in special}


class Words:
    """The text of an answer while its tokens come. show(piece) is called with each piece of it that no later token can
    change; stops: texts, or special tokens, before which it ends. before: the tokens of the text that it goes on with;
    without them it begins a text, as answers in a conversation do, and may lose its first space.

    Raises WrongUsage as `ends_of` does.
    """

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", show: Show = lambda piece: None, stops: Sequence[str] = (),
        before: Sequence[int] = (),
    ):  # fmt: skip
        self._tokenizer, self._show, self._stops = tokenizer, show, stops
        self._ends = ends_of(stops, tokenizer)
        self._ids = list(before[-BEFORE:])
        # What no later token can change, and of how many tokens it is the text.
        self._text, self._known = "", len(self._ids)
        # The first token of a text can lose its space. So the next ones are decoded with those that came before them,
        # from `_read` on, whose text has so many characters by itself.
        self._read = 0
        self._decoded = self._decode()
        self._again = len(self._decoded)
        self._shown = 0  # characters

    def add(self, token: int) -> bool:
        """Takes in the next token. Returns whether the text has come to one of the stops."""
        if token in self._ends:
            return True
        self._ids.append(token)
        before, self._decoded = self._decoded, self._decode()
        text = self._text + self._decoded[self._again :]
        if self._stop(text.rstrip(UNFINISHED)) is not None:
            return True
        # A special token says nothing, so that it is nothing to decode others with, and ends no character.
        if self._decoded == before or self._decoded.endswith(UNFINISHED) or self._is_byte(token):
            return False
        self._text, self._read, self._known = text, self._known, len(self._ids)
        self._decoded = self._decode()
        self._again = len(self._decoded)
        held = max((length for stop in self._stops for length in range(1, len(stop)) if text.endswith(stop[:length])),
                   default=0)  # fmt: skip
        self._show_until(text, len(text) - held)
        return False

    def finish(self) -> str:
        """The whole text, all of which has been shown then."""
        text = self._text + self._decoded[self._again :]
        text = text[: self._stop(text)]
        self._show_until(text, len(text))
        return text

    def _decode(self) -> str:
        return self._tokenizer.decode(self._ids[self._read :], skip_special_tokens=True)

    def _is_byte(self, token: int) -> bool:
        """Whether it is one byte, of which others may make another character, or none."""
        return BYTE.fullmatch(self._tokenizer.convert_ids_to_tokens(token) or "") is not None

    def _stop(self, text: str) -> int | None:
        """Where the first of the stops begins in `text`."""
        return min((at for stop in self._stops if (at := text.find(stop)) >= 0), default=None)

    def _show_until(self, text: str, end: int) -> None:
        if end > self._shown:
            self._show(text[self._shown : end])
            self._shown = end
