"""Pass-key retrieval: a number is hidden in a long text, and the model is asked for it at the end.

Almost no token of ordinary text needs what stands far back, so perplexity hides whether a model can still find it. Here
nothing else counts: the filler says nothing, and the number cannot be guessed. (The probe is that of Mohtashami and
Jaggi, arXiv 2305.16300.)
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch
from numpy.typing import NDArray

from rrtc.errors import WrongUsage
from rrtc.text import begin_and_end

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # where the key is hidden: 0 is the start of the text, 1 its end
TASK = "One important number is hidden somewhere in the text below. Find it and remember it.\n\n"
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
KEY = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "\n\nWhat is the pass key? The pass key is"


@dataclass(frozen=True)
class Probe:
    """One hidden key. ids: the prompt's tokens, `length` or a few fewer; key: the tokens that are to follow."""

    length: int
    depth: float
    ids: tuple[int, ...]
    key: tuple[int, ...]


def make_probes(tokenizer, length: int, trials: int, seed: int, longest: int) -> list[Probe]:
    """`trials` probes of `length` tokens at each of DEPTHS, the same for every model with that tokenizer.

    longest: tokens that the model can see, key included. Raises WrongUsage where the probes are longer, and where they
    would have no room for any filler.
    """

    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    start, task, question = begin_and_end(tokenizer)[0], tokens(TASK), tokens(QUESTION)
    filler = tokens(FILLER * (length // len(tokens(FILLER)) + 1))
    draw, probes = random.Random(f"{seed} {length}"), []
    for depth in DEPTHS:
        for _ in range(trials):
            number = str(draw.randint(10_000, 99_999))
            hidden, key = tokens(KEY.format(key=number)), tokens(f" {number}")
            room = length - len(start) - len(task) - len(hidden) - len(question)
            if length + len(key) > longest:
                raise WrongUsage(f"The model sees {longest} tokens, its answer included.")
            if room <= 0:
                raise WrongUsage(f"The question alone takes {length - room} tokens.")
            before = round(depth * room)
            ids = [*start, *task, *filler[:before], *hidden, *filler[before:room], *question]
            probes.append(Probe(length, depth, tuple(ids), tuple(key)))
    return probes


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
