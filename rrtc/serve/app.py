"""The routes: /v1/completions, /v1/chat/completions, /v1/models and /health, as an ASGI application."""

import asyncio
import json
import secrets
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.generate.engine import Busy
from rrtc.serve.place import is_this_machine
from rrtc.serve.protocol import Call, End, UnknownModel, Writer, error_body, read_call
from rrtc.serve.worker import Answers, Failed, Worker

PROSE = 64  # bytes for each token of the context, far more than text takes, that the body of a request may have
LARGEST = 1_000_000  # bytes, beside them
NOBODY = Response(status_code=499)  # to a client that has gone


class Refused(RrtcError):
    """A request that is refused with an HTTP status of its own."""

    def __init__(self, status: int, sentence: str, hint: str = ""):
        super().__init__(sentence, hint)
        self.status = status


class Stopping(RrtcError):
    """The server ends before the answer did."""


def make_app(worker: Worker, model: str, api_key: str | None = None, only_here: bool = False) -> Starlette:
    """The application that answers with the engine of `worker`, whose model clients know by the name `model`. api_key:
    what they have to send, where they have to. only_here: whether they have to call the server by a name of the machine
    that it runs on."""
    check = partial(_check_client, api_key=api_key, only_here=only_here)
    begun = int(time.time())
    listed = {"id": model, "object": "model", "created": begun, "owned_by": "rrtc"}

    async def models(request: Request) -> Response:
        check(request)
        return JSONResponse({"object": "list", "data": [listed]})

    async def one_model(request: Request) -> Response:
        check(request)
        if request.path_params["name"] != model:
            raise UnknownModel(f"The model '{request.path_params['name']}' is not served here.", f"It is '{model}'.")
        return JSONResponse(listed)

    async def health(request: Request) -> Response:
        status = {"status": "ok" if worker.alive else "failed"}
        return JSONResponse(status | worker.load, 200 if worker.alive else 503)

    async def complete(request: Request, chat: bool) -> Response:
        check(request)
        body = await _body(request, LARGEST + PROSE * worker.engine.context)
        call, writer = read_call(body, chat, model), Writer(chat, model)
        answers = await worker.submit(call.prompts, call.options)
        if call.stream:
            return _Events(answers, writer, call)
        try:
            return await _unless_gone(request, _whole(answers, writer, len(call.prompts)))
        finally:
            answers.cancel()

    routes = [
        Route("/v1/completions", partial(complete, chat=False), methods=["POST"]),
        Route("/v1/chat/completions", partial(complete, chat=True), methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", one_model),
        Route("/health", health),
    ]
    return Starlette(
        routes=routes,
        exception_handlers={
            RrtcError: _explain, HTTPException: _no_such_place, ClientDisconnect: _leave, Exception: _fail,
        },
    )  # fmt: skip


async def _whole(answers: Answers, writer: Writer, count: int) -> Response:
    texts, ends, begun = [""] * count, [End(0, "")] * count, time.perf_counter()
    async for number, event in answers:
        if isinstance(event, End):
            ends[number] = event
        else:
            texts[number] += event
    _note(answers, ends, begun)
    return JSONResponse(writer.whole(texts, ends, answers.prompt_tokens))


class _Events(StreamingResponse):
    """Server-sent events, while the client listens."""

    def __init__(self, answers: Answers, writer: Writer, call: Call):
        self._answers = answers
        headers = {"Cache-Control": "no-cache"}
        super().__init__(self._lines(answers, writer, call), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()

    async def _lines(self, answers: Answers, writer: Writer, call: Call) -> AsyncIterator[str]:
        ends, begun = [], time.perf_counter()
        for number in range(len(call.prompts)):
            if first := writer.begin(number):
                yield _event(first)
        try:
            async for number, event in answers:
                if isinstance(event, End):
                    ends.append(event)
                yield _event(writer.end(number, event) if isinstance(event, End) else writer.piece(number, event))
        except RrtcError as error:
            note(error.sentence)
            yield _event(error_body(_sentence(error), "server_error"))
            return
        if call.usage:
            yield _event(writer.counted(answers.prompt_tokens, ends))
        _note(answers, ends, begun)
        yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"  # in ASCII, which has no other ends of lines than those that SSE has


def _note(answers: Answers, ends: list[End], begun: float) -> None:
    said = sum(end.tokens for end in ends)
    note(f"Said {said} tokens after {answers.prompt_tokens}, in {time.perf_counter() - begun:.1f} s")


async def _unless_gone(request: Request, answer) -> Response:
    """The answer, if the client waits for it."""

    async def gone() -> Response:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        return NOBODY

    tasks = [asyncio.ensure_future(one) for one in (answer, gone())]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()


async def _body(request: Request, largest: int) -> bytes:
    """Raises Refused for another kind than JSON, by which a page in a browser could ask without asking whether it may,
    and for what is longer than any prompt."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused(415, "The request is not said to be JSON.", "Send the header 'Content-Type: application/json'.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > largest:
            raise Refused(413, f"The request has more than {largest:,} bytes.", "Say it in fewer words.")
    return bytes(body)


def _check_client(request: Request, api_key: str | None, only_here: bool) -> None:
    host = request.url.hostname or ""
    if only_here and not is_this_machine(host):  # a page in a browser, of a site whose name leads here now
        raise Refused(403, f"This server is not known as '{host}'.", "Call it by localhost or 127.0.0.1.")
    sent = request.headers.get("authorization", "")
    if api_key is not None and not secrets.compare_digest(sent.encode(), f"Bearer {api_key}".encode()):
        raise Refused(401, "The API key is missing or wrong.", "It is what the server was started with.")


# ---- what goes wrong ----


def _sentence(error: RrtcError) -> str:
    return f"{error.sentence} {error.hint}".strip()


async def _explain(request: Request, error: RrtcError) -> Response:
    status, kind, code, headers = 400, "invalid_request_error", None, {}
    match error:
        case Refused():
            status = error.status
            code = "invalid_api_key" if status == 401 else None
        case UnknownModel():
            status, code = 404, "model_not_found"
        case Busy():
            status, kind, headers = 429, "rate_limit_error", {"Retry-After": "1"}
        case Stopping():
            status, kind = 503, "server_error"
        case Failed():
            status, kind = 500, "server_error"
    note(f"{status}: {error.sentence}")
    return JSONResponse(error_body(_sentence(error), kind, code), status, headers)


async def _no_such_place(request: Request, error: HTTPException) -> Response:
    message = f"There is nothing at {request.method} {request.url.path}."
    return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)


async def _leave(request: Request, error: ClientDisconnect) -> Response:
    return NOBODY


async def _fail(request: Request, error: Exception) -> Response:
    return JSONResponse(error_body("The server failed.", "server_error"), 500)
