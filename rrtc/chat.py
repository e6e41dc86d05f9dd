"""What a model answers to what is said to it, as it comes; through its chat template, or as plain continuation."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from transformers.generation.streamers import BaseStreamer

from rrtc.console import quiet_libraries
from rrtc.errors import RrtcError, WrongUsage, short
from rrtc.generate.engine import UNBOUNDED, Engine
from rrtc.generate.sampling import beyond_tokens
from rrtc.generate.words import Show, Turns, Words, prompt_ids
from rrtc.model.configuration_rrt import turns_at
from rrtc.recipe.chat import ChatOptions, check_prompt
from rrtc.results import AnswerResult, ChatResult
from rrtc.text.windows import longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOM = 4  # a fourth of the context at least is for the answer, as long as there are older turns to forget
THEIRS = ("speculate", "stop_strings")  # in a model's generation defaults, what transformers does in a way of its own
TWICE = 2  # as much room as a prompt and its answer take: the conversation goes on


class Speaker:
    """One model and what was said between it and the user. `turns` are messages as chat templates take them."""

    def __init__(self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", options: ChatOptions):
        self.name, self.model, self.tokenizer, self.options = name, model, tokenizer, options
        self.turns: Turns = []
        self._engine: Engine | None = None  # which has the keys and values of what was said
        defaults = model.generation_config
        self._by_transformers = any(getattr(defaults, name, None) for name in THEIRS) or bool(beyond_tokens(defaults))

    @property
    def has_template(self) -> bool:
        return bool(self.tokenizer.chat_template)

    def answer(self, prompt: str, show: Show) -> AnswerResult:
        """What the model says to `prompt` after all that was said before; show(piece) is called with each piece of it
        as it comes. What was said until a KeyboardInterrupt is kept among the turns, and it goes on.

        Raises WrongUsage for a prompt that holds no text, or more than the model can see; RrtcError where the chat
        template fails, or the model's own generation defaults cannot be used.
        """
        check_prompt(prompt)
        turns, ids = self._that_fit([*self.turns, {"role": "user", "content": prompt}])
        forgotten = (len(self.turns) + 1 - len(turns)) // 2
        self.turns = turns
        pieces: list[str] = []

        def tell(piece: str) -> None:
            pieces.append(piece)
            show(piece)

        words, begun = Words(self.tokenizer, tell), time.perf_counter()
        most = min(self.options.max_tokens, self._longest - len(ids))
        try:
            with quiet_libraries():
                tokens, by_itself = self._say(ids, most, words.add)
            words.finish()
        finally:
            self.turns.append({"role": "assistant", "content": "".join(pieces)})
        return {
            "model": self.name,
            "chat_template": self.has_template,
            "text": "".join(pieces),
            "tokens": tokens,
            "seconds": time.perf_counter() - begun,
            "forgotten": forgotten,
            "ended": "by itself" if by_itself else "max_tokens" if most == self.options.max_tokens else "context",
        }

    def clear(self) -> None:
        """Forgets what was said."""
        self.turns = []

    @property
    def _longest(self) -> int:
        return longest_context(self.model.config, UNBOUNDED)

    def _say(self, ids: list[int], most: int, add: Callable[[int], bool]) -> tuple[int, bool]:
        """Calls add(token) with each token of an answer to `ids` of `most` at most. Returns how many they are, and
        whether the model came to an end by itself."""
        engine, self._engine = self._engine, None  # one that is interrupted is not used again
        if engine is None or engine.context < len(ids) + most:
            try:
                # No more than the engine can do, as long as that is enough.
                least, limit = len(ids) + most, turns_at(self.model.config) or UNBOUNDED
                room = max(least, min(self._longest, limit, TWICE * least))
                engine = None if self._by_transformers else Engine(self.model, rows=1, context=room, keeps=True)
            except RrtcError:  # its attention cannot be told which keys to see, or keeps what no row has; or it is long
                self._by_transformers = True
        if self._by_transformers:
            return self._generate(ids, most, add)
        request = engine.submit(ids, most, self.options.seed, add, **self.options.of_generate())
        engine.run()
        if request.error is not None:
            raise request.error
        self._engine = engine
        return len(request.said), request.ended == "by itself"

    def _generate(self, ids: list[int], most: int, add: Callable[[int], bool]) -> tuple[int, bool]:
        """The same by transformers, for models that the engine cannot run."""
        seed, tokenizer = self.options.seed, self.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        prompt = torch.tensor([ids], device=self.model.device)
        beams = (self.model.generation_config.num_beams or 1) > 1  # of which none is the answer until all have ended
        with torch.inference_mode(), torch.random.fork_rng() if seed is not None else nullcontext():
            if seed is not None:
                torch.manual_seed(seed)
            try:
                said = self.model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), streamer=None if beams else _Streamer(add),
                    max_new_tokens=most, pad_token_id=padding, tokenizer=tokenizer, num_return_sequences=1,
                    return_dict_in_generate=False, **self.options.of_generate(),
                )  # fmt: skip
            except ValueError as error:  # what its generation_config.json asks for cannot be done
                raise RrtcError(f"{self.name} cannot generate: {short(error)}") from error
        new = said[0, len(ids) :].tolist()
        for token in new if beams else ():
            add(token)
        return len(new), len(new) < most

    def _that_fit(self, turns: Turns) -> tuple[Turns, list[int]]:
        """The latest of the turns and their token ids: all but the oldest that would leave no room for an answer."""
        ids = self._ids(turns)
        while len(ids) > self._longest - min(self.options.max_tokens, self._longest // ROOM) and turns[2:]:
            turns = turns[2:]  # without what was said first, and its answer
            ids = self._ids(turns)
        if len(ids) >= self._longest:
            sentence = f"The prompt has {len(ids)} tokens, and {self.name} can see {self._longest}."
            raise WrongUsage(sentence, "Say it in fewer words.")
        return turns, ids

    def _ids(self, turns: Turns) -> list[int]:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return prompt_ids(turns, self.tokenizer, vocabulary, self.name)


class Chat:
    """A conversation with a model, or with several that are told the same: `speakers`, each with its own answers."""

    def __init__(self, speakers: list[Speaker]):
        self.speakers = speakers

    def answer(self, prompt: str, show: Show = lambda piece: None) -> ChatResult:
        """What each of them says to `prompt`, one after the other. Raises as `Speaker.answer` does."""
        return {"prompt": prompt, "answers": [speaker.answer(prompt, show) for speaker in self.speakers]}

    def clear(self) -> None:
        """Begins anew."""
        for speaker in self.speakers:
            speaker.clear()


class _Streamer(BaseStreamer):
    """Hands new tokens on as they come."""

    def __init__(self, add: Callable[[int], bool]):
        self._add, self._is_prompt = add, True

    def put(self, value: torch.Tensor) -> None:
        """value: token ids; the first that come are the prompt."""
        for token in () if self._is_prompt else value.flatten().tolist():
            self._add(token)
        self._is_prompt = False

    def end(self) -> None:
        """Nothing is held back."""
