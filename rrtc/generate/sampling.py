"""Which token comes next: drawn by transformers' own rules, with random numbers that belong to its place in the answer.

An exit's draft and the model's own choice for a place are drawn with the same numbers (Daliri et al., 2408.07978).
A draft is right where both are one token. So what is said is what full depth says with this seed, however many drafts
there were; and the better the exit, the more often they are right.
"""

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation import GenerationMode

from rrtc.errors import RrtcError, short
from rrtc.generate.stages import INSTEAD
from rrtc.model.speculate_rrt import FUNCTIONS

# One token after the other; the last one says what the others do, with guesses.
ONE_BY_ONE = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE, GenerationMode.ASSISTED_GENERATION}


class Drawing:
    """How the tokens of one request are chosen: `settings` are arguments of `model.generate`, and mean what they mean
    there, the model's own generation defaults included, but for stop strings: what ends an answer by its text is a
    matter of who has the text (`stops_of` in words.py). most: tokens of its answer at most.

    Raises RrtcError where these cannot be used, or ask for what is not done here.
    """

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], most: int, seed: int | None, **settings):
        ids = torch.tensor([list(prompt)], device=model.device)
        single = {"num_return_sequences": 1, "return_dict_in_generate": False, "stop_strings": None}
        try:
            self._processors, config = model.generate(
                ids, attention_mask=torch.ones_like(ids), custom_generate=_asked, max_new_tokens=most,
                **single, **settings,
            )  # fmt: skip
        except ValueError as error:
            raise RrtcError(f"The model cannot generate: {short(error)}") from error
        if beyond := beyond_tokens(config):
            raise RrtcError(
                f"The model's generation defaults ask for {beyond}, which the engine for many requests does not do.",
                f"Take it out of generation_config.json. Or else: {INSTEAD}",
            )
        self.draws, self.device = bool(config.do_sample), model.device
        ends = config.eos_token_id
        self.ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self._generator = torch.Generator(model.device)
        self._generator.seed() if seed is None else self._generator.manual_seed(seed)
        self._begins = deque([self._generator.get_state()])  # before the numbers of the next place, and of later ones

    @property
    def foresees(self) -> bool:
        """Whether processors may be asked about tokens that are not said yet: none remembers what it was asked."""
        return {type(processor) for processor in self._processors} <= FUNCTIONS

    def scores(self, said: Sequence[int], logits: Tensor) -> Tensor:
        """What processors make of `logits` (vocabulary,), float32. said: all tokens before this one."""
        scores = logits[None].to(torch.float32)
        if self._processors:
            scores = self._processors(torch.tensor([list(said)], device=logits.device), scores)
        return scores[0]

    def pick(self, scores: Tensor, ahead: int = 0) -> int:
        """A token, drawn from `scores` or the most probable one, for the place so many places behind the one that is
        said next, which is no further than one behind those that were drawn for. `go_on` says it."""
        if not self.draws:
            return int(scores.argmax())
        self._generator.set_state(self._begins[ahead])
        token = int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))
        if ahead + 1 == len(self._begins):
            self._begins.append(self._generator.get_state())
        return token

    def go_on(self) -> None:
        """The next place has its token now."""
        if self.draws:
            self._begins.popleft()


def beyond_tokens(config: GenerationConfig) -> str | None:
    """What `generate` does, asked in this way, beside saying one token after the other by their scores; None where that
    is nothing."""
    if (config.num_beams or 1) > 1:
        return f"num_beams={config.num_beams}"
    if config.max_time is not None:
        return f"max_time={config.max_time}"
    mode = config.get_generation_mode()
    return None if mode in ONE_BY_ONE else mode.value.replace("_", " ")


def _asked(model, input_ids, logits_processor, generation_config, **others):
    """What `generate` calls in place of its own loop: it says how it would go on."""
    return logits_processor, generation_config
