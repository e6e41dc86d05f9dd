"""Lossless self-speculation: the tokens that `generate` gives, in fewer passes through the later loops.

The exit after an early loop guesses what comes next, and goes on from its guess as long as that pays. Then the later
loops run once over all of these tokens, from the states that the early ones left there, and say what is right. All
write the one KV cache: no prompt is read twice, and no layer runs twice (LayerSkip, arXiv 2404.16710; Kangaroo, arXiv
2404.18911).

    a round     early(t0) -> t1?, early(t1?) -> t2? …; late(t0, t1? …) -> what is right, and one token more
    greedy      a guess is right where it is what the whole model finds most probable
    sampling    every place in the text has random numbers of its own, for the guess as for the whole model's choice. A
                guess is right where both choose one token, and that is the token which `generate` draws with this seed
                (Daliri et al., arXiv 2408.07978)

Guesses change nothing but the time. `Worth` decides when to guess: never, where the exit is seldom right.

This file is shipped in every export beside modeling_rrt.py and imports nothing but torch and transformers.
"""

import torch
from torch import Tensor
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import GenerationMode, logits_process
from transformers.generation.utils import GENERATION_MODES_MAPPING

from .attention_rrt import KeptLayer
from .configuration_rrt import turns_at
from .halves_rrt import DraftHead, Halves, run
from .modeling_rrt import RrtForCausalLM

# Logits processors that are functions of the tokens and their scores alone, so that they may be asked about guesses.
FUNCTIONS = {
    logits_process.MinLengthLogitsProcessor, logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor, logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.TemperatureLogitsWarper, logits_process.TopKLogitsWarper, logits_process.TopPLogitsWarper,
    logits_process.MinPLogitsWarper,
}  # fmt: skip
# What a pass of several tokens costs more than one of one token, and what every further one costs, as parts of it. A
# processor multiplies matrices by a vector faster than by two, where it does not compute in 16 bits.
SEVERAL, FURTHER = {True: 0.55, False: 0.0}, 0.05


def _keeps_its_window() -> bool:
    """Whether stock places with a window show no more than it when several passes go on without taking anything back.
    Those of transformers 5.16 show more."""
    layer, token = DynamicSlidingWindowLayer(sliding_window=2), torch.zeros(1, 1, 1, 1)
    layer.activate_past_recording()
    return [layer.update(token, token)[0].shape[2] for _ in range(3)] == [1, 2, 2]


CROPPED = {DynamicLayer, KeptLayer}  # places in a cache that take tokens back
if _keeps_its_window():
    CROPPED.add(DynamicSlidingWindowLayer)


def speculate(model, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False,
              streamer=None, **model_kwargs):  # fmt: skip
    """Greedy and sampled generation, as transformers' `_sample`, in whose place it stands; also for `custom_generate`.

    generation_config.speculate: {"exit": the place in the list of visits after which the model is left to guess}.
    Returns (1, tokens), int64, prompt included: what the stock method returns, but where two tokens are equally good up
    to rounding. Where guesses could not be checked, the stock method runs: with beams or several rows, for scores and
    other outputs, with padding, with caches and logits processors that are not known here, and where the text may grow
    so long that the model encodes all its positions anew. Raises ValueError for an
    exit that cannot be.
    """
    place = _place(model, generation_config)
    if place is None or not (
        _can_be_asked(input_ids, logits_processor, generation_config, synced_gpus)
        and _can_be_halved(model, input_ids)
        and generation_config.max_length <= (turns_at(model.config) or generation_config.max_length)
        and _can_take_back(input_ids, model_kwargs)
    ):
        stock = getattr(GenerationMixin, GENERATION_MODES_MAPPING[generation_config.get_generation_mode()])
        return stock(
            model, input_ids, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
            generation_config=generation_config, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
        )  # fmt: skip
    cache = model_kwargs["past_key_values"]
    text = Text(input_ids, logits_processor, stopping_criteria, generation_config, streamer)
    try:
        logits = run(model, text.ids, cache, logits_to_keep=1)
        halves = Halves(model, place, cache, text.ids)
        worth = Worth(*halves.costs, SEVERAL[logits.is_cpu and logits.dtype.itemsize > 2])
        over = text.add(text.choose(logits[0, -1]))
        while not over:
            if worth.rests():
                over = text.add(text.choose(run(model, text.ids[:, -1:], cache, logits_to_keep=1)[0, -1]))
                continue
            _record(cache, True)  # no longer than it takes: places with a window keep more then
            over = _round(text, halves, worth, generation_config.max_length)
            _trim(cache, text.length - 1)
    finally:
        _record(cache, True)
        _trim(cache, text.length - 1)  # after an error, early and late layers may be at different places
        text.close()
    if streamer is not None:
        streamer.end()
    return text.ids


def _place(model, generation_config) -> int | None:
    """The exit that `generation_config` names. Raises ValueError where there is no such one."""
    asked = getattr(generation_config, "speculate", None)
    if not asked:
        return None
    place = asked.get("exit") if isinstance(asked, dict) else None
    if type(place) is not int or not 0 <= place < len(model.config.visits) - 1:
        raise ValueError(
            f"generation_config.speculate is {asked!r}, which names no layer of this model that others follow. It is "
            "{'exit': its number}, or False."
        )
    return place


def _can_be_asked(input_ids, logits_processor, generation_config, synced_gpus) -> bool:
    """Whether one token after the other is wanted, chosen in a way that can be asked about guesses too."""
    mode = generation_config.get_generation_mode()
    return (
        mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        and input_ids.shape[0] == 1
        and input_ids.device.type in ("cpu", "cuda")  # whose random numbers can be set back
        and {type(processor) for processor in logits_processor} <= FUNCTIONS
        and not (generation_config.return_dict_in_generate or generation_config.is_assistant or synced_gpus)
        and generation_config.prefill_chunk_size is None
    )


def _can_be_halved(model, input_ids) -> bool:
    """Whether a forward pass is nothing but what the modules do that it is made of."""
    records = any(getattr(model.config, name, False) for name in ("output_attentions", "output_hidden_states"))
    # A half would not ask what stands in for a forward pass, such as accelerate's that brings weights, nor what watches
    # the model as a whole.
    replaced = type(model).forward is not RrtForCausalLM.forward or any(
        "forward" in vars(module) for module in (model, model.stock, model.stock.base_model)
    )
    # Nor would it be given what stands in for the inputs, such as the prompt that PEFT has learnt.
    replaced = replaced or model.prepare_inputs_for_generation != model.stock.prepare_inputs_for_generation
    # And what an early half says beyond a window would need the late one first, where visits read later ones.
    reads = any((visit.get("attention") or {}).get("owner") for visit in model.config.visits)
    watched = reads or model._forward_hooks or model._forward_pre_hooks
    return input_ids.device == model.device and not (model.training or records or replaced or watched)


def _can_take_back(input_ids, model_kwargs) -> bool:
    """Whether the cache, which is empty, can forget guesses, and nothing beside the tokens is given."""
    given = {name: value for name, value in model_kwargs.items() if value is not None}
    cache, mask, positions = (given.pop(name, None) for name in ("past_key_values", "attention_mask", "position_ids"))
    return (
        type(cache) is DynamicCache
        and given.pop("use_cache", False)
        and given.keys() <= {"logits_to_keep"}
        and not cache.offloading
        and cache.get_seq_length() == 0
        and {type(layer) for layer in cache.layers} <= CROPPED
        and not any(getattr(layer, "record_past", False) for layer in cache.layers)
        and (mask is None or bool(mask.all()))
        and (positions is None or positions.tolist() == [list(range(input_ids.shape[1]))])
    )


def _record(cache: Cache, on: bool) -> None:
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = on


def _trim(cache: Cache, length: int) -> None:
    """Takes back what comes after the first `length` tokens, and goes on without recording."""
    for layer in cache.layers:
        if layer.is_initialized:
            layer.crop(min(0, length - layer.get_seq_length()))
    _record(cache, False)


def _round(text: "Text", halves: Halves, worth: "Worth", most: int) -> bool:
    """Guesses, and says what is right; whether that was the end. most: tokens that the text may have."""
    tokens, guesses = [int(text.ids[0, -1])], []
    worth.begin()
    while True:
        guess, sure = text.guess(tokens[1:], halves.early(tokens[-1]), halves.head)
        guesses.append((guess, sure))
        if guess is None or guess in text.ends or text.length + len(tokens) >= most or not worth.goes_on(sure):
            break
        tokens.append(guess)
    said = 0
    for (guess, sure), logits in zip(guesses, halves.late(), strict=True):
        token = text.choose(logits)
        worth.learn(sure, token == guess)
        over, said = text.add(token), said + 1
        halves.head.add(token)
        if over or token != guess:
            break
    worth.end(len(tokens), said)
    return over


class Text:
    """What was said, and how the next token is chosen. ids: (1, tokens)."""

    def __init__(self, ids: Tensor, processors, stopping_criteria, generation_config, streamer):
        self.ids, self.length, self.processors, self.streamer = ids, ids.shape[1], processors, streamer
        self.stopping_criteria, self.sample = stopping_criteria, generation_config.do_sample
        ends = generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends])
        self._cuda = ids.device if ids.is_cuda else None
        # What the random numbers of each place begin with.
        self._seeds = {self.length: self._seed()} if self.sample else {}

    def choose(self, logits: Tensor) -> int:
        """The next token, of `logits` (vocabulary,) of the whole model."""
        return self._choose(self.length, self.processors(self.ids, logits[None].to(torch.float32, copy=True)))

    def guess(self, guesses: list[int], logits: Tensor, head: DraftHead) -> tuple[int | None, float]:
        """What is chosen by the `logits` of an exit after the guesses before it, and how probable it is there; None
        where nothing is that it could choose."""
        logits = logits.float()
        if not self.processors and not self.sample:
            sure, column = logits.softmax(-1).max(-1)
            return head.token(int(column)), float(sure)
        ids = torch.cat([self.ids, self.ids.new_tensor([guesses])], -1) if guesses else self.ids
        scores = self.processors(ids, head.over_all(logits))
        if scores.max().isneginf():
            return None, 0.0
        token = self._choose(self.length + len(guesses), scores)
        return token, float(scores.softmax(-1)[0, token])

    def _choose(self, place: int, scores: Tensor) -> int:
        if not self.sample:
            return int(scores.argmax(-1))
        self._seed(self._seeds[place])
        token = int(torch.multinomial(scores.softmax(-1), 1))
        self._seeds.setdefault(place + 1, self._seed())
        return token

    def _seed(self, state: Tensor | None = None) -> Tensor:
        """Sets the state of the random numbers, or reads it."""
        if self._cuda is None:
            return torch.get_rng_state() if state is None else torch.set_rng_state(state)
        cuda = torch.cuda
        return cuda.get_rng_state(self._cuda) if state is None else cuda.set_rng_state(state, self._cuda)

    def add(self, token: int) -> bool:
        """Says a token; whether it is the last one."""
        new = self.ids.new_tensor([token])
        self.ids, self.length = torch.cat([self.ids, new[None]], -1), self.length + 1
        self._seeds = {place: state for place, state in self._seeds.items() if place >= self.length}
        over = bool(self.stopping_criteria(self.ids, None).all())
        if self.streamer is not None:
            self.streamer.put(new.cpu())
        return over

    def close(self) -> None:
        """Leaves the random numbers as they are where just these tokens were drawn."""
        if self.sample:
            self._seed(self._seeds[self.length])


class Worth:
    """Whether to guess, by what it costs and by how often guesses were right of which the exit was as sure.

    To decode a token costs as much as the weights that are read for it. A guess that is right saves a pass through the
    later layers, `late`; one that is wrong has cost `early`, and `draft` for the draft head; `several` as SEVERAL. All
    of it in passes through the whole model. Nothing goes by the clock: one text is made in the same steps every time.
    """

    FIXED, MOST = 0.03, 12  # of a round: what it costs beside reading weights; its most guesses
    BINS, PRIOR, MEMORY = 6, 4.0, 32.0  # of being sure; what all of them are worth in each; what is kept in mind
    LOSS, GAIN = 0.15, 3.0  # how much may be lost before guessing rests; how much of what was won counts against it
    SHORTEST, LONGEST = 8, 128  # tokens of a rest

    def __init__(self, early: float, late: float, draft: float, several: float):
        whole = early + late
        self.early, self.late, self.draft, self.several = early / whole, late / whole, draft / whole, several
        # How probable it must be that a guess and all before it are right: of the first, seldom alone; of the others.
        least = self.early + self.draft + FURTHER * self.late
        self.least = (least + several / 3 * self.late) / (1 + self.draft), least / (1 + self.draft)
        self._right, self._seen = [0.0] * self.BINS, [0.0] * self.BINS
        self._balance, self._rest, self._pause, self._reach = 0.0, 0, self.SHORTEST, 2

    def rests(self) -> bool:
        """Whether the next token is to be had without guessing."""
        self._rest -= 1
        return self._rest >= 0

    def begin(self) -> None:
        """A round begins."""
        self._all_right, self._guesses = 1.0, 0

    def goes_on(self, sure: float) -> bool:
        """Whether to take a guess of which the exit is so sure for right, and guess what comes after it."""
        # At first a little below what pays: nothing is built on a guess before the exit was right once.
        overall = (sum(self._right) + 1.6 * self.least[0]) / (sum(self._seen) + 2)
        number = self._bin(sure)
        self._all_right *= (self._right[number] + self.PRIOR * overall) / (self._seen[number] + self.PRIOR)
        self._guesses += 1
        return self._guesses <= self._reach and self._all_right >= self.least[self._guesses > 1]

    def learn(self, sure: float, right: bool) -> None:
        """Whether a guess of which the exit was so sure was right."""
        number = self._bin(sure)
        if self._seen[number] >= self.MEMORY:
            self._right[number], self._seen[number] = self._right[number] / 2, self._seen[number] / 2
        self._right[number] += right
        self._seen[number] += 1

    def end(self, tokens: int, said: int) -> None:
        """The round is over, in which so many tokens were run and so many said. Where guessing loses, it rests."""
        self._reach = min(2 * self._reach, self.MOST) if said == tokens else max(2, self._reach // 2)
        together = 1 + FURTHER * (tokens - 1) + (self.several if tokens > 1 else 0)
        spent = tokens * (self.early + self.draft) + self.late * together + self.FIXED
        self._balance = min(self._balance + said - spent, self.GAIN)
        if self._balance == self.GAIN:
            self._pause = self.SHORTEST
        if self._balance < -self.LOSS:
            self._balance, self._rest, self._pause = 0.0, self._pause, min(2 * self._pause, self.LONGEST)
            known = min(1.0, 2 / sum(self._seen))  # after the rest, what was seen before it will be long ago
            self._right, self._seen = ([known * number for number in kept] for kept in (self._right, self._seen))

    def _bin(self, sure: float) -> int:
        return min(int(sure * self.BINS), self.BINS - 1)
