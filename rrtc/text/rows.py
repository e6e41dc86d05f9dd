"""The text in a row of data: a string, or a conversation that the tokenizer's chat template writes out.

A conversation is a list of messages with `role` and `content`, or with `from` and `value` as ShareGPT has them. It
needs no flag: a row without the text field that was asked for, but with `messages` or `conversations`, gives those.
"""

import json
from collections.abc import Iterable
from typing import Any

from rrtc.errors import RrtcError

Conversation = list[dict[str, Any]]

CONVERSATIONS = ("messages", "conversations")  # fields that hold one
ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's words for them
# Goes before a template. One that names the day (Llama 3's) is told of this one: on which day a conversation is read
# must not decide whether it is held out.
DAY = (
    "{% macro strftime_now(format) %}{{ format.replace('%d', '26').replace('%b', 'Jul').replace('%B', 'July')"
    ".replace('%m', '07').replace('%Y', '2024') }}{% endmacro %}\n"
)


def text_column(fields: Iterable, text_field: str, source: str) -> str:
    """The one of `fields` that the text is in: `text_field`, or one of CONVERSATIONS. Raises RrtcError for none."""
    fields = list(fields)
    for name in (text_field, *CONVERSATIONS):
        if name in fields:
            return name
    found = f"Its fields are {', '.join(map(str, fields))}; see text_field." if fields else "Its rows have no fields."
    raise RrtcError(f"{source} has no text field '{text_field}'.", found)


def row_text(row: Any, text_field: str, source: str) -> str | Conversation:
    """The text in a row; "" where the row says that it has none. Raises RrtcError where it has no such field."""
    column = text_column(row if isinstance(row, dict) else [], text_field, source)
    return text_of(row[column], column, source)


def text_of(value: Any, column: str, source: str) -> str | Conversation:
    """The `value` in a `column`, which is text or a conversation. Raises RrtcError where it is neither."""
    if value is None:
        return ""
    if column in CONVERSATIONS and isinstance(value, str) and value.lstrip()[:1] == "[":
        value = _read(value, column, source)
    if isinstance(value, str) or _is_conversation(value):
        return value
    raise RrtcError(
        f"The field '{column}' of {source} holds no text, but a value of the type {type(value).__name__}.",
        "Text is a string, or a list of messages, each with role and content; see text_field.",
    )


def _read(text: str, column: str, source: str) -> Any:
    """The conversation that a cell spells out, as tables that know no lists have it."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise RrtcError(
            f"The field '{column}' of {source} holds a list written as text, and that is not JSON: {text[:40]}",
            'Write it as JSON, as in [{"role": "user", "content": "Hello!"}].',
        ) from error


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict) and ("role" in message or "from" in message) for message in value
    )


def written_out(conversation: Conversation, tokenizer, source: str) -> str:
    """A conversation as the tokenizer's chat template writes it, special tokens included. `encoded` makes of it the ids
    that `tokenizer.apply_chat_template` gives, on 26 July 2024.

    Raises RrtcError where there is no template, or where it refuses the conversation.
    """
    if not tokenizer.chat_template:
        raise RrtcError(
            f"{source} holds conversations, and the tokenizer has no chat template to write them out with.",
            "Put the instruct model's chat_template.jinja beside the weights, or name a field of plain text "
            "(text_field).",
        )
    messages = [_message(message, source) for message in conversation]
    try:
        template = DAY + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
    except Exception as error:  # a template is a program, and can raise anything
        reason = " ".join(str(error).split())[:200].removesuffix(".") or type(error).__name__
        raise RrtcError(
            f"The tokenizer's chat template cannot write out a conversation of {source}: {reason}.",
            "Leave such conversations out, or use another template (chat_template.jinja beside the weights).",
        ) from error


def _message(message: dict[str, Any], source: str) -> dict[str, Any]:
    """A message as templates expect it: with role and content, the content one string, and nothing that is None."""
    if "role" not in message:
        message = {"role": ROLES.get(message["from"], message["from"]), "content": message.get("value")}
    content = message.get("content")
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else part for part in content]
        if all(isinstance(text, str) for text in texts):
            content = "".join(texts)
    if not isinstance(content, str | None):
        raise RrtcError(
            f"A message in {source} has a content that is not all text.", "rrtc reads no images and no audio."
        )
    return {key: value for key, value in (message | {"content": content}).items() if value is not None}
