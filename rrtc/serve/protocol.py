"""OpenAI's protocol, as far as this server speaks it: requests as they are read, answers as they are written.

It is that of /v1/completions and /v1/chat/completions in https://platform.openai.com/docs/api-reference; top_k and
repetition_penalty are known beside it, as to other servers of open models. What a request asks for and would not get is
refused, never left out in silence; a field that is null, or says what holds anyway, asks for nothing.
"""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rrtc.errors import RrtcError, WrongUsage, nearest
from rrtc.generate.words import Turns
from rrtc.plain import from_json
from rrtc.recipe.generate import AnswerOptions
from rrtc.recipe.schema import checked
from rrtc.serve.worker import End, Prompt
from rrtc.text.prompts import check_prompt_value

DRAWN = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
READ = {"model", "stream", "stream_options", "max_tokens", "stop", *DRAWN}
# Who asks, and how the work is to be booked: no answer depends on it.
BOOKED = {
    "user", "safety_identifier", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
}  # fmt: skip
# What is not done here, and the values by which it is not asked for.
REFUSED: dict[str, tuple] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "suffix": ("",), "logprobs": (False,), "top_logprobs": (0,),
    "logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,), "response_format": ({"type": "text"},),
    "tools": ([],), "tool_choice": ("none", "auto"), "parallel_tool_calls": (True, False), "functions": ([],),
    "function_call": ("none", "auto"), "modalities": (["text"],), "audio": (), "prediction": (),
    "reasoning_effort": ("none",), "verbosity": (), "web_search_options": (), "moderation": (),
}  # fmt: skip
REFUSED_OF_STREAMS: dict[str, tuple] = {"include_obfuscation": (False,)}
# What chat templates call them: they know no developers.
ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
IN_MESSAGES = {"role", "content", "name"}
FEW = 16  # tokens of a completion where nobody says how many; of a chat as many as there is room for
UNBOUNDED = 10**9
REASONS = {"by itself": "stop", "stopped": "stop"}  # others were cut off: "length"
WHERE = "the request"


class UnknownModel(RrtcError):
    """Another model than the one that is served."""


@dataclass(frozen=True)
class Call:
    """What a request asks for. usage: whether a stream is to end with the numbers of tokens."""

    prompts: list[Prompt]
    options: AnswerOptions
    stream: bool
    usage: bool


def read_call(body: bytes, chat: bool, served: str) -> Call:
    """The request in `body`, to go on with messages (chat) or with prompts. served: the name of the model.

    Raises WrongUsage for what is no such request, or asks for what is not done here; UnknownModel.
    """
    try:
        values = from_json(body.decode())
        json.dumps(values, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except ValueError as error:
        raise WrongUsage("The request is not JSON in UTF-8.") from error
    if not isinstance(values, dict):
        raise WrongUsage("The request is JSON, but no object with fields.")
    given = {name: value for name, value in values.items() if value is not None}
    own = {"messages", "max_completion_tokens"} if chat else {"prompt"}
    _check_fields(given, READ | own | BOOKED, REFUSED)
    if given.get("model", served) != served:
        raise UnknownModel(f"The model {json.dumps(given['model'])} is not served here.", f"It is '{served}'.")
    prompts: list[Prompt] = [_turns(given.get("messages"))] if chat else _prompts(given.get("prompt"))
    stream, usage = _flag(given, "stream"), False
    if "stream_options" in given:
        if not stream or not isinstance(given["stream_options"], dict):
            raise WrongUsage("'stream_options' is an object, for requests with 'stream'.")
        more = {name: value for name, value in given["stream_options"].items() if value is not None}
        _check_fields(more, {"include_usage"}, REFUSED_OF_STREAMS)
        usage = _flag(more, "include_usage")
    return Call(prompts, _options(given, UNBOUNDED if chat else FEW), stream, usage)


def _check_fields(given: dict[str, Any], read: set[str], refused: dict[str, tuple]) -> None:
    for name, value in given.items():
        if name in refused:
            if not any(value == idle and isinstance(value, bool) == isinstance(idle, bool) for idle in refused[name]):
                raise WrongUsage(f"'{name}' is not supported by this server.", "Leave it out.")
        elif name not in read:
            raise WrongUsage(f"There is no field '{name}' in such a request.", nearest(name, sorted(read - BOOKED)))


def _options(given: dict[str, Any], most: int) -> AnswerOptions:
    drawn = {name: given[name] for name in DRAWN if name in given}
    if drawn.get("temperature") == 0:  # many clients send top_p all the same
        drawn = {name: value for name, value in drawn.items() if name not in ("top_p", "top_k")}
    asked = {given[name] for name in ("max_tokens", "max_completion_tokens") if isinstance(given.get(name), int)}
    if len(asked) > 1:
        raise WrongUsage("'max_tokens' and 'max_completion_tokens' say different things.", "Send one of them.")
    most = given.get("max_completion_tokens", given.get("max_tokens", most))
    stop = given.get("stop", [])
    return checked(
        AnswerOptions, drawn | {"max_tokens": most, "stop": [stop] if isinstance(stop, str) else stop}, WHERE
    )


def _flag(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise WrongUsage(f"'{name}' is true or false.")
    return value


def _prompts(value: Any) -> list[Prompt]:
    several = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not several or not all(isinstance(prompt, str) or _is_ids(prompt) for prompt in several):
        raise WrongUsage("The request has no 'prompt' that is text, token ids, or a list of those.")
    for prompt in several:
        if isinstance(prompt, str):
            check_prompt_value(prompt, "The request")
    return several


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _turns(messages: Any) -> Turns:
    if not isinstance(messages, list) or not messages:
        raise WrongUsage("The request has no 'messages'.")
    return [_turn(message, f"Message {number}") for number, message in enumerate(messages, 1)]


def _turn(message: Any, which: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise WrongUsage(f"{which} is no object with a role and content.")
    given = {name: value for name, value in message.items() if value not in (None, [], {})}
    role, content = given.get("role"), message.get("content")
    if not isinstance(role, str) or role not in ROLES:
        raise WrongUsage(f"{which} has no role that is supported here.", f"These are: {', '.join(ROLES)}.")
    if isinstance(content, list):
        are_text = all(isinstance(part, dict) and part.get("type") == "text" for part in content)
        parts = [part.get("text") for part in content] if are_text else [None]
        beside = {name for part in content for name in part if part[name] is not None} if are_text else set()
        if more := beside - {"type", "text"}:
            raise WrongUsage(f"{which} has '{min(more)}', which is not supported by this server.", "Leave it out.")
        content = "\n".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str) or not isinstance(given.get("name", ""), str):
        raise WrongUsage(f"{which} has content that is no text.")
    if more := given.keys() - IN_MESSAGES:
        raise WrongUsage(f"{which} has '{min(more)}', which is not supported by this server.", "Leave it out.")
    return given | {"role": ROLES[role], "content": content}


# ---- answers ----


class Writer:
    """Writes what a call is answered, of one kind or the other, by one model."""

    def __init__(self, chat: bool, model: str):
        self._chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, texts: Sequence[str], ends: Sequence[End], prompt_tokens: int) -> dict[str, Any]:
        """All answers at once."""
        choices = [
            self._choice(number, {"message": {"role": "assistant", "content": text, "refusal": None}}, text, end)
            for number, (text, end) in enumerate(zip(texts, ends, strict=True))
        ]
        return self._head | {"choices": choices, "usage": usage(prompt_tokens, ends)}

    def begin(self, number: int) -> dict[str, Any] | None:
        """The first chunk of a streamed answer, where there has to be one."""
        return self._chunk(number, {"role": "assistant", "content": ""}, "", None) if self._chat else None

    def piece(self, number: int, text: str) -> dict[str, Any]:
        """A chunk with more of the text."""
        return self._chunk(number, {"content": text}, text, None)

    def end(self, number: int, end: End) -> dict[str, Any]:
        """The last chunk of an answer."""
        return self._chunk(number, {}, "", end)

    def counted(self, prompt_tokens: int, ends: Sequence[End]) -> dict[str, Any]:
        """The last chunk of all, for those who ask for it."""
        return self._of_stream([]) | {"usage": usage(prompt_tokens, ends)}

    def _chunk(self, number: int, delta: dict[str, Any], text: str, end: End | None) -> dict[str, Any]:
        return self._of_stream([self._choice(number, {"delta": delta}, text, end)])

    def _of_stream(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = {"object": "chat.completion.chunk"} if self._chat else {}
        return self._head | kind | {"choices": choices}

    def _choice(self, number: int, chatted: dict[str, Any], text: str, end: End | None) -> dict[str, Any]:
        said = chatted if self._chat else {"text": text}
        reason = None if end is None else REASONS.get(end.why, "length")
        return {"index": number} | said | {"logprobs": None, "finish_reason": reason}


def usage(prompt_tokens: int, ends: Sequence[End]) -> dict[str, int]:
    """Numbers of tokens, those that end an answer included."""
    said = sum(end.tokens for end in ends)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": said, "total_tokens": prompt_tokens + said}


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """What is wrong, as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}
