"""The thread in which the engine steps, and what passes between it and the event loop.

    event loop (many connections)                 this thread (one engine)
    submit ─────────── a job ───────────────────▶ tokenize, engine.submit
    Answers ◀───────── pieces and ends ────────── engine.step
    Answers.cancel ─── a job ───────────────────▶ engine.cancel

Model, tokenizer and engine are touched by this thread alone. Jobs that wait are done between two steps.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from rrtc.errors import RrtcError, WrongUsage, short
from rrtc.generate.engine import Engine
from rrtc.generate.request import Request
from rrtc.generate.words import Turns, Words, prompt_ids, stops_of
from rrtc.recipe.generate import AnswerOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Prompt = str | Turns | list[int]


class Failed(RrtcError):
    """An answer that could not be made, through no fault of the request."""


@dataclass(frozen=True)
class End:
    """How one of the answers ended. tokens: how many it has. why: as Request.ended says it."""

    tokens: int
    why: str


class Answers:
    """The answers to the prompts of one call, as they come. prompt_tokens: of all prompts."""

    def __init__(self, worker: "Worker"):
        self.prompt_tokens = 0
        self.requests: list[Request] = []  # for the worker's thread
        self._worker, self._loop = worker, asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, str | End | Exception]] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[tuple[int, str | End]]:
        """(number of a prompt, the next piece of its answer or how it ended), until all have ended. Raises what kept
        one of them from being made."""
        left = len(self.requests)
        while left:
            number, event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            left -= isinstance(event, End)
            yield number, event

    def put(self, number: int, event: str | End | Exception) -> None:
        """Called in the worker's thread."""
        with suppress(RuntimeError):  # the loop is closed, and nobody listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, (number, event))

    def cancel(self) -> None:
        """Ends those that have not ended. Nothing of them stays behind."""
        self._worker.do(partial(self._worker.forget, self))


class Worker:
    """A context manager, in which the thread runs. name: the model's, for errors."""

    def __init__(self, engine: Engine, tokenizer: "PreTrainedTokenizerBase", name: str):
        self.engine, self._tokenizer, self._name = engine, tokenizer, name
        self._vocabulary = engine.model.get_input_embeddings().weight.shape[0]
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._known: dict[Request, tuple[Answers, int, Words]] = {}
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self.answered = self.tokens = 0  # requests that were answered whole, and the tokens of all answers

    def __enter__(self) -> "Worker":
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._jobs.put(None)
        self._thread.join()

    async def submit(self, prompts: Sequence[Prompt], options: AnswerOptions) -> Answers:
        """Has the engine answer all prompts, or none of them.

        Raises as `prompt_ids` and `Engine.submit` do, WrongUsage for token ids that the model does not know and more
        prompts than can ever wait, and Failed where the thread has ended.
        """
        if not self.alive:
            raise Failed("The engine has stopped.")
        answers = Answers(self)
        try:
            await asyncio.wrap_future(self.do(partial(self._enter, answers, prompts, options)))
        except BaseException:
            answers.cancel()
            raise
        return answers

    def do(self, job: Callable[[], Any]) -> Future:
        """Has the thread do it before the next step. Returns what comes of it."""
        future: Future = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(job())
                except BaseException as error:
                    future.set_exception(error)

        self._jobs.put(run)
        return future

    @property
    def load(self) -> dict[str, int]:
        """How many requests the engine answers, and how many wait."""
        return {"active": len(self.engine.active), "waiting": len(self.engine.queue)}

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    # ---- in the thread ----

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(block=not self.engine.busy)
            except Empty:
                self._step()
                continue
            if job is None:
                return
            job()

    def _step(self) -> None:
        try:
            ended = self.engine.step()
        except Exception as error:  # whose fault it is is not known: such as a machine that is out of memory
            ended = list(self.engine.active or self._known)
            for request in ended:
                self.engine.cancel(request)
                request.error = error
        for request in ended:
            answers, number, words = self._known.pop(request)
            self.tokens += len(request.said)
            try:
                if request.error is not None:
                    raise request.error
                words.finish()
            except Exception as error:
                answers.put(number, Failed(f"The answer could not be made: {short(error)}"))
            else:
                self.answered += 1
                answers.put(number, End(len(request.said), request.ended or ""))

    def _enter(self, answers: Answers, prompts: Sequence[Prompt], options: AnswerOptions) -> None:
        if len(prompts) > self.engine.most:
            sentence = f"The request has {len(prompts):,} prompts, and this server takes {self.engine.most:,} at once."
            raise WrongUsage(sentence, "Send them in several requests.")
        stops = stops_of(options.stop, self.engine.model.generation_config)
        for number, prompt in enumerate(prompts):
            ids = self._ids(prompt)
            is_text = isinstance(prompt, str) or isinstance(prompt[0], int)
            words = Words(self._tokenizer, partial(answers.put, number), stops, ids if is_text else ())
            seed = None if options.seed is None else (options.seed + number) % 2**32
            request = self.engine.submit(ids, options.max_tokens, seed, words.add, **options.of_generate())
            answers.requests.append(request)
            answers.prompt_tokens += len(ids)
            self._known[request] = answers, number, words

    def _ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            if not all(0 <= token < self._vocabulary for token in prompt):
                raise WrongUsage(f"The prompt has token ids that {self._name} does not know.")
            return prompt
        return prompt_ids(prompt, self._tokenizer, self._vocabulary, self._name)

    def forget(self, answers: Answers) -> None:
        """Cancels what has not ended."""
        for request in answers.requests:
            if self._known.pop(request, None) is not None:
                self.engine.cancel(request)

    def end_all(self, why: RrtcError) -> None:
        """Ends all requests, and says why."""
        for answers, number, _ in self._known.values():
            answers.put(number, why)
        for request in list(self._known):
            self.engine.cancel(request)
        self._known.clear()
