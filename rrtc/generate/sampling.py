"""Which token comes next: drawn by transformers' own rules, and by those of speculative decoding where it was drafted.

Speculation is Leviathan et al. 2023 (arXiv 2211.17192): a draft that was drawn from q is kept with probability
min(1, p/q), and replaced by a draw from what p has more than q where it is not; so what is said is distributed as p.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rrtc.errors import RrtcError, short


class Drawing:
    """How the tokens of one request are chosen: `settings` are arguments of `model.generate`, and mean what they mean
    there, the model's own generation defaults included. most: tokens of its answer at most.

    Raises RrtcError where these cannot be used.
    """

    def __init__(self, model: PreTrainedModel, prompt: Sequence[int], most: int, seed: int | None, **settings):
        ids = torch.tensor([list(prompt)], device=model.device)
        single = {"num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False, "max_new_tokens": most}
        try:
            self._processors, config = model.generate(
                ids, attention_mask=torch.ones_like(ids), custom_generate=_asked, **single, **settings
            )
        except ValueError as error:
            raise RrtcError(f"The model cannot generate: {short(error)}") from error
        self.draws, self.device = bool(config.do_sample), model.device
        ends = config.eos_token_id
        self.ends = frozenset([] if ends is None else [ends] if isinstance(ends, int) else ends)
        self._generator = torch.Generator(model.device)
        self._generator.seed() if seed is None else self._generator.manual_seed(seed)

    def scores(self, said: Sequence[int], logits: Tensor) -> Tensor:
        """What processors make of `logits` (vocabulary,), float32. said: all tokens before this one."""
        scores = logits[None].to(torch.float32)
        if self._processors:
            scores = self._processors(torch.tensor([list(said)], device=logits.device), scores)
        return scores[0]

    def pick(self, scores: Tensor) -> int:
        """A token, drawn from `scores` or the most probable one."""
        if not self.draws:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))

    def keeps(self, drafted: Tensor, scores: Tensor) -> float:
        """With which probability `judge` keeps what `pick` draws from `drafted`."""
        if not self.draws:
            return float(drafted.argmax() == scores.argmax())
        return float(torch.minimum(drafted.softmax(-1), scores.softmax(-1)).sum())

    def judge(self, draft: int, drafted: Tensor, scores: Tensor) -> tuple[int, bool]:
        """(the token that is said where `draft` was drafted, whether it is the draft). drafted, scores: the scores
        (vocabulary,) of the exit, from which the draft was drawn, and of the model itself."""
        if not self.draws:
            token = int(scores.argmax())
            return token, token == draft
        q, p = drafted.softmax(-1), scores.softmax(-1)
        if torch.rand((), generator=self._generator, device=p.device) * q[draft] < p[draft]:
            return draft, True
        more = (p - q).clamp(min=0)
        return int(torch.multinomial(more if more.any() else p, 1, generator=self._generator)), False


def _asked(model, input_ids, logits_processor, generation_config, **others):
    """What `generate` calls in place of its own loop: it says how it would go on."""
    return logits_processor, generation_config
