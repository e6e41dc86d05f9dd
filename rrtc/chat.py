"""What a model answers to what is said to it, as it comes; through its chat template, or as plain continuation."""

import time
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from transformers import TextStreamer

from rrtc.console import quiet_libraries
from rrtc.errors import RrtcError, WrongUsage, short
from rrtc.generate.engine import UNBOUNDED
from rrtc.generate.words import Show, Turns, prompt_ids
from rrtc.recipe.chat import ChatOptions, check_prompt
from rrtc.results import AnswerResult, ChatResult
from rrtc.text.windows import longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOM = 4  # a fourth of the context at least is for the answer, as long as there are older turns to forget


class Speaker:
    """One model and what was said between it and the user. `turns` are messages as chat templates take them."""

    def __init__(self, name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", options: ChatOptions):
        self.name, self.model, self.tokenizer, self.options = name, model, tokenizer, options
        self.turns: Turns = []

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
        streamer, begun = _Streamer(self.tokenizer, show), time.perf_counter()
        room = self._longest - ids.shape[1]
        try:
            new = self._generate(ids, streamer, min(self.options.max_tokens, room))
        except BaseException:
            self.turns.append({"role": "assistant", "content": streamer.text})
            raise
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        self.turns.append({"role": "assistant", "content": text})
        ended = "by itself" if len(new) < min(self.options.max_tokens, room) else "max_tokens"
        return {
            "model": self.name,
            "chat_template": self.has_template,
            "text": text,
            "tokens": len(new),
            "seconds": time.perf_counter() - begun,
            "forgotten": forgotten,
            "ended": "context" if ended == "max_tokens" and room < self.options.max_tokens else ended,
        }

    def clear(self) -> None:
        """Forgets what was said."""
        self.turns = []

    @property
    def _longest(self) -> int:
        return longest_context(self.model.config, UNBOUNDED)

    def _generate(self, ids: torch.Tensor, streamer: TextStreamer, most: int) -> torch.Tensor:
        seed, tokenizer = self.options.seed, self.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        ids = ids.to(self.model.device)
        with quiet_libraries(), torch.inference_mode(), torch.random.fork_rng() if seed is not None else nullcontext():
            if seed is not None:
                torch.manual_seed(seed)
            try:
                said = self.model.generate(
                    ids, attention_mask=torch.ones_like(ids), streamer=streamer, max_new_tokens=most,
                    pad_token_id=padding, tokenizer=tokenizer, num_beams=1, num_return_sequences=1,
                    return_dict_in_generate=False, **self.options.of_generate(),
                )  # fmt: skip
            except ValueError as error:  # what its generation_config.json asks for cannot be done
                raise RrtcError(f"{self.name} cannot generate: {short(error)}") from error
        return said[0, ids.shape[1] :]

    def _that_fit(self, turns: Turns) -> tuple[Turns, torch.Tensor]:
        """The latest of the turns and their token ids (1, length): all but the oldest that would leave no room for an
        answer."""
        ids = self._ids(turns)
        while ids.shape[1] > self._longest - min(self.options.max_tokens, self._longest // ROOM) and turns[2:]:
            turns = turns[2:]  # without what was said first, and its answer
            ids = self._ids(turns)
        if ids.shape[1] >= self._longest:
            sentence = f"The prompt has {ids.shape[1]} tokens, and {self.name} can see {self._longest}."
            raise WrongUsage(sentence, "Say it in fewer words.")
        return turns, ids

    def _ids(self, turns: Turns) -> torch.Tensor:
        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        return torch.tensor([prompt_ids(turns, self.tokenizer, vocabulary, self.name)])


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


class _Streamer(TextStreamer):
    """Hands the text on in whole words. `text` is all of it until now."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", show: Show):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self._show = "", show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        if text:
            self._show(text)
