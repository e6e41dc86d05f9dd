"""Training data: from the recipe's sources to windows of tokens, in the one order in which training sees them.

The order is fixed before training starts and does not depend on the number of processes, on the micro-batch or on
where a run was interrupted, so that all of these give the same losses.
"""

import random

import torch

from rrtc.console import progress
from rrtc.recipe import UptrainRecipe
from rrtc.text import Windows, beginning, pack, split


def training_texts(recipe: UptrainRecipe, tokens: int) -> list[str]:
    """The documents to learn from, without those that are held out, shuffled by the seed.

    tokens: how many will be needed. Raises RrtcError for a source that is missing or empty.
    """
    texts = []
    for source in recipe.data:
        texts += split(beginning(source, recipe.text_field, tokens))[0]
    random.Random(recipe.seed).shuffle(texts)
    return texts


def training_windows(recipe: UptrainRecipe, tokenizer, context: int, tokens: int) -> Windows:
    """At most `tokens` tokens of training text, packed into windows of `context`.

    Raises RrtcError as `training_texts` and `rrtc.text.pack` do.
    """
    texts = training_texts(recipe, tokens)
    with progress("Tokenising", len(texts)) as advance:

        def counted():
            for text in texts:
                yield text
                advance()

        return pack(counted(), tokenizer, context, tokens)


class Stream(torch.utils.data.Dataset):
    """`length` windows, all that training will see: the given ones, in a new order each time they are used up.

    An item is {"input_ids": (context,)}.
    """

    def __init__(self, windows: Windows, length: int, seed: int):
        self.ids = windows.ids
        generator = torch.Generator().manual_seed(seed)
        epochs = -(-length // len(self.ids))
        self.order = torch.cat([torch.randperm(len(self.ids), generator=generator) for _ in range(epochs)])[:length]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[self.order[index]]}
