"""Pass-key retrieval: a number is hidden in a long text, and the model is asked for it at the end.

Almost no token of ordinary text needs what stands far back, so perplexity hides whether a model can still find it. Here
nothing else counts: the filler says nothing, and the number cannot be guessed. (The probe is that of Mohtashami and
Jaggi, arXiv 2305.16300.)
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

import numpy
import torch
from numpy.typing import NDArray

from rrtc.errors import WrongUsage
from rrtc.text.tokens import begin_and_end

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the key is hidden: 0 is before all of the filler, 1 after it
# The wording matters more to a small model than the distance: with the key said twice, or asked for by a question,
# SmolLM2-135M itself fails where the key comes last (benchmarks/LOG.md).
TASK = "A pass key is hidden in the text below. Find it and remember it.\n\n"
FILLER = ("The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again.")
KEY = "The pass key is {number}. Remember it."
QUESTION = "\n\nThe pass key is"
FEWEST = len(DEPTHS) - 1  # sentences of filler: with fewer, two depths would be the same place


@dataclass(frozen=True)
class Probe:
    """One hidden key. ids: the prompt's tokens, `length` or, by less than a sentence, fewer; key: the tokens that are
    to follow."""

    length: int
    depth: float
    ids: tuple[int, ...]
    key: tuple[int, ...]


def make_probes(tokenizer, length: int, trials: int, seed: int, longest: int) -> list[Probe]:
    """`trials` probes of `length` tokens at each of DEPTHS, the same for every model with that tokenizer; each depends
    on its own length, depth and trial and on the seed, not on what else is asked.

    longest: tokens that the model can see, the key included. Raises WrongUsage for a length beyond that, or one that is
    too short to hide anything in.
    """
    begin, probes = begin_and_end(tokenizer)[0], []

    def tokens(text: str) -> list[int]:
        return [*begin, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]

    sentence = len(tokens(" ".join(FILLER * 4))) / (4 * len(FILLER))  # tokens on average, for a first guess
    for depth in DEPTHS:
        for trial in range(trials):
            number = str(random.Random(f"{seed} {length} {depth} {trial}").randint(10_000, 99_999))
            least = len(tokens(_prompt(FEWEST, depth, number)))
            if length < least:
                raise WrongUsage(f"To hide a pass key takes {least} tokens at least.")
            sentences = FEWEST + int((length - least) / sentence)
            while len(tokens(_prompt(sentences, depth, number))) > length:
                sentences -= 1
            while len(tokens(_prompt(sentences + 1, depth, number))) <= length:
                sentences += 1
            prompt = _prompt(sentences, depth, number)
            asked, whole = tokens(prompt), tokens(f"{prompt} {number}")
            # A tokenizer may join the prompt's end with what follows: then that token is the first of the key.
            cut = len(os.path.commonprefix([asked, whole]))
            if length + len(whole) - cut > longest:
                raise WrongUsage(f"The model sees {longest} tokens, its answer included.")
            probes.append(Probe(length, depth, tuple(whole[:cut]), tuple(whole[cut:])))
    return probes


def _prompt(sentences: int, depth: float, number: str) -> str:
    """The text, with so many sentences of filler."""
    text = list(islice(cycle(FILLER), sentences))
    text.insert(round(depth * sentences), KEY.format(number=number))
    return TASK + " ".join(text) + QUESTION


@torch.inference_mode()
def found(model, probes: Sequence[Probe], advance: Callable[[], None] = lambda: None) -> NDArray:
    """(probes,), float64: 1 where `model` says the whole key, greedily; advance is called after each probe.

    The key is given to the model along with the prompt: it is said greedily where each of its tokens is the most
    probable one after those before it.
    """
    right = []
    for probe in probes:
        ids = torch.tensor([[*probe.ids, *probe.key[:-1]]], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=len(probe.key)).logits[0]
        right.append(logits.argmax(-1).tolist() == list(probe.key))
        advance()
    return numpy.array(right, dtype=float)
