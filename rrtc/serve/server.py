"""From a model to a server that listens, until it is stopped."""

import asyncio
import json
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import uvicorn

from rrtc.console import note, warn
from rrtc.errors import RrtcError, WrongUsage
from rrtc.generate.choice import Way, choose
from rrtc.generate.engine import UNBOUNDED, Engine
from rrtc.generate.stages import check_context
from rrtc.machine import free_memory
from rrtc.model.configuration_rrt import turns_at
from rrtc.recipe.generate import CONTEXT, ServeOptions
from rrtc.results import ServeResult
from rrtc.serve.app import Stopping, make_app
from rrtc.serve.place import is_open, url_of
from rrtc.serve.worker import Worker
from rrtc.text.windows import longest_context
from rrtc.units import size

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GRACE = 5  # seconds that requests have to end when the server is stopped
CUT = 3  # more seconds until connections are cut
SIGNALS = (signal.SIGINT, signal.SIGTERM)


def serve(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", source: str, options: ServeOptions, has_exits: bool,
    fingerprint: str, place: socket.socket,
) -> ServeResult:  # fmt: skip
    """Answers requests that come to `place` until a signal stops it. source: what the user calls the model. has_exits,
    fingerprint: for `choose`.

    Raises WrongUsage for a context that the model cannot see; RrtcError where the keys and values of so many requests
    do not fit into the memory, or the model cannot generate; and as `check_context` and `choose` do.
    """
    name = source if not Path(source).exists() and "://" not in source else Path(source).absolute().name
    engine = _engine(name, model, tokenizer, options, has_exits, fingerprint)
    url = url_of(place)
    if is_open(place) and options.api_key is None:
        warn(f"Whoever reaches {url} can use the model; --api-key has them send a key.")

    if not tokenizer.chat_template:
        note(f"{name} has no chat template: it goes on with what messages say, as with any text.")

    def ready() -> None:
        note(f"Serving '{name}' at {url}/v1; Ctrl-C ends it. Try:")
        note(_example(url, bool(tokenizer.chat_template), options.api_key is not None))

    with Worker(engine, tokenizer, name) as worker:
        app = make_app(worker, name, options.api_key, only_here=not is_open(place))
        server, begun = _Server(_config(app), worker, ready), time.perf_counter()
        with _stopped_by_signals():
            server.run([place])
    return {
        "model": name,
        "url": url,
        "answered": worker.answered,
        "tokens": worker.tokens,
        "seconds": time.perf_counter() - begun,
    }


def _engine(name: str, model, tokenizer, options: ServeOptions, has_exits: bool, fingerprint: str) -> Engine:
    sees = longest_context(model.config, UNBOUNDED)
    if (options.context or 0) > sees:
        raise WrongUsage(f"{name} can see {sees:,} tokens.", f"Give --context {sees} or less, or leave it out.")
    context = options.context or min(CONTEXT, sees, turns_at(model.config) or CONTEXT)
    check_context(model.config, context)
    choice = choose(model, tokenizer, options, has_exits, options.batch, fingerprint)
    choice.tell(options)
    taken, free = _memory(model, choice.way, options.batch, context), free_memory(model.device)
    what = f"{options.batch} requests at once, of {context:,} tokens each"
    if taken > free:
        sentence = f"Keys and values of {what}, take {size(taken)}, and {size(free)} of memory are free."
        raise RrtcError(sentence, "Lower --context or --batch.")
    note(f"Room for {what}: keys and values take {size(taken)} at most")
    return Engine(model, choice.way, options.batch, context, waiting=options.waiting)


def _memory(model, way: Way, rows: int, context: int) -> int:
    """Bytes of keys and values, seen in an engine that answers with one token. That it does is tried by this, too."""
    small = Engine(model, way, 1, 2)
    small.submit([0], 1)
    small.run()
    return small.store.bytes_of(rows, context)


def _config(app) -> uvicorn.Config:
    quiet = {"log_config": None, "log_level": "error", "access_log": False}
    return uvicorn.Config(app, lifespan="off", ws="none", timeout_graceful_shutdown=GRACE + CUT, **quiet)


class _Server(uvicorn.Server):
    """Calls `ready` when it listens. When it is stopped, requests have some seconds to end, and are told why then."""

    def __init__(self, config: uvicorn.Config, worker: Worker, ready: Callable[[], None]):
        super().__init__(config)
        self._worker, self._ready, self._ended = worker, ready, False

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    async def shutdown(self, sockets=None) -> None:
        if any(self._worker.load.values()):
            note(f"Stopping: what is being answered has {GRACE} s to end; Ctrl-C stops at once.")
        asyncio.get_running_loop().call_later(GRACE, self._end_all)
        await super().shutdown(sockets=sockets)

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit and not self._ended:
            self._end_all()
        else:
            super().handle_exit(sig, frame)

    def _end_all(self) -> None:
        self._ended = True
        self._worker.do(lambda: self._worker.end_all(Stopping("The server was stopped.")))


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """uvicorn raises the signal that has stopped it once more. That it has is enough."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _example(url: str, chat: bool, key: bool) -> str:
    """A line to try in a shell."""
    asked = (
        {"messages": [{"role": "user", "content": "Why is the sky blue?"}]} if chat else {"prompt": "Once upon a time"}
    )
    headers = " -H 'Authorization: Bearer KEY'" if key else ""
    body = json.dumps(asked | {"max_tokens": 40})
    path = "chat/completions" if chat else "completions"
    return f"curl {url}/v1/{path}{headers} -H 'Content-Type: application/json' -d '{body}'"
