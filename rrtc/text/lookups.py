"""Windows of text at whose end something is to be looked up that stands far back: to find the KV heads that do it.

Half of them end with a copy of an earlier passage, the others with a fact out of several that were scattered over the
text. The wording is not that of the pass-key test, which would otherwise be passed by what was chosen on it.
"""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

PASSAGE = 24  # tokens that are copied
GUESSED = 4  # of them at the start, before it can be known what is copied
FACTS = 6  # in a window, of which one is asked for
NAMES = ("Harlan", "Odette", "Ruben", "Marisol", "Piotr", "Ingrid", "Tobias", "Leila", "Casper", "Yvonne")
THINGS = ("brass keys", "old maps", "glass beads", "silver coins", "letters", "candles", "watches", "spoons")
FACT = "\nIn the drawer of {name} there are {number} {thing}.\n"


@dataclass(frozen=True)
class Lookups:
    """ids: (windows, context), int64. wanted: for each window what is to be looked up, as (the place of the token after
    which it is to be said, the places where it stands)."""

    ids: Tensor
    wanted: list[list[tuple[int, tuple[int, ...]]]]


def make_lookups(filler: Tensor, tokenizer, seed: int) -> Lookups:
    """Lookups in windows of text, `filler` (windows, context), which is left as it is; the same for the same seed. What
    is looked up stands in the first half of its window. Where a window is too short for facts, all are copies."""
    ids, wanted = filler.clone(), []
    for number, row in enumerate(ids):
        chance = random.Random(f"{seed} {number}")
        facts = _facts(tokenizer, chance)
        if number % 2 and len(row) >= 2 * (sum(map(len, facts)) + 2 * len(facts)):
            wanted.append(_ask_for_a_fact(row, facts, chance))
        else:
            wanted.append(_copy_a_passage(row, chance))
    return Lookups(ids, wanted)


def _copy_a_passage(row: Tensor, chance: random.Random) -> list[tuple[int, tuple[int, ...]]]:
    """Ends `row` with a passage from its first half, in place."""
    length = min(PASSAGE, len(row) // 4)
    at = chance.randrange(1, max(2, len(row) // 2 - length))
    row[-length:] = row[at : at + length].clone()
    first = len(row) - length
    return [(first + place, (at + place + 1,)) for place in range(min(GUESSED, length - 2), length - 1)]


def _facts(tokenizer, chance: random.Random) -> list[list[int]]:
    """The tokens of some facts about people who have one name each."""
    found = []
    for name in chance.sample(NAMES, FACTS):
        fact = FACT.format(name=name, number=chance.randint(11, 99), thing=chance.choice(THINGS))
        found.append(tokenizer(fact, add_special_tokens=False, verbose=False)["input_ids"])
    return found


def _ask_for_a_fact(row: Tensor, facts: list[list[int]], chance: random.Random) -> list[tuple[int, tuple[int, ...]]]:
    """Scatters `facts` over the first half of `row` and ends it with one of them once more, in place. To be looked up
    is what is behind all that it shares with another fact."""
    room = (len(row) // 2 - sum(map(len, facts))) // len(facts)
    places, at = [], 1
    for fact in facts:
        at += chance.randrange(max(1, room))
        row[at : at + len(fact)] = torch.tensor(fact)
        places.append(at)
        at += len(fact)
    asked = chance.randrange(len(facts))
    fact, begins = facts[asked], len(row) - len(facts[asked])
    row[begins:] = torch.tensor(fact)
    # The name must have been said: half of the fact is behind it in every tokenizer.
    return [(begins + place, (places[asked] + place + 1,)) for place in range(len(fact) // 2, len(fact) - 1)]
