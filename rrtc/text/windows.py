"""Windows of tokens: documents packed one after the other, and the windows that a model is scored on.

Of all text that training is given, a tenth is held out: training never sees it and evaluation scores on it.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rrtc.errors import RrtcError
from rrtc.recipe.schema import Recipe
from rrtc.recipe.section import BUILT_IN_TEXT, OWN_TEXT
from rrtc.text.sources import CHARACTERS_PER_TOKEN, HELD_OUT_OF, beginning, split
from rrtc.text.tokens import begin_and_end, encoded

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Windows:
    """Token ids packed without padding: `ids` is (windows, context), int64. `bytes_per_token` is the UTF-8 length of
    the text over the number of its tokens, separators too, which makes losses comparable across tokenizers."""

    ids: "torch.Tensor"
    bytes_per_token: float


def pack(texts: Iterable[str], tokenizer, vocabulary: int, context: int, limit: int | None = None) -> Windows:
    """Documents as windows of `context` tokens, packed without padding, an end-of-text token after each document.

    Where the tokenizer begins every text with a token (Gemma's <bos>, without which it is lost), every window begins
    with it. limit: stop after so many tokens, rounded up to whole windows. vocabulary: how many tokens the model has
    embeddings of. Raises RrtcError where the text does not fill a window, and as `encoded` does.
    """
    return _packed([texts], tokenizer, vocabulary, context, limit)


def _packed(sources: Sequence[Iterable[str]], tokenizer, vocabulary: int, context: int, limit: int | None) -> Windows:
    """As `pack`, for the documents of several sources: with a limit, as many tokens of each, or all that it has."""
    import torch

    beginning_token, _ = begin_and_end(tokenizer)
    width = context - len(beginning_token)  # tokens of text in a window
    wanted = math.inf if limit is None else max(1, -(-limit // context)) * width
    ids: list[int] = []
    sizes: list[float] = []  # UTF-8 bytes of each token
    for place, texts in enumerate(sources):
        end = len(ids) + (wanted - len(ids)) / (len(sources) - place)  # what one lacks, those behind it make up for
        for text in texts:
            if end < math.inf:
                text = text[: CHARACTERS_PER_TOKEN * math.ceil(end - len(ids))]  # no more of a long one than is used
            for tokens, lengths in encoded([text], tokenizer, vocabulary, sizes=True):
                ids += tokens
                sizes += lengths
            if len(ids) >= end:
                del ids[math.ceil(end) :], sizes[math.ceil(end) :]
                break
    windows = len(ids) // width
    if windows == 0:
        raise RrtcError(
            f"The text has only {len(ids)} tokens, fewer than one context of {context}.",
            "Give more text, or a smaller context.",
        )
    used = windows * width
    packed = torch.tensor(ids[:used]).view(windows, width)
    first = torch.tensor(beginning_token, dtype=torch.long).expand(windows, len(beginning_token))
    return Windows(torch.cat([first, packed], dim=1), sum(sizes[:used]) / used)


def longest_context(config, wanted: int) -> int:
    """`wanted` tokens of context, or as many as the model of that transformers config can see."""
    return min(wanted, getattr(config.get_text_config(), "max_position_embeddings", None) or wanted)


def scoring_texts(recipe: Recipe, tokenizer, vocabulary: int, context: int, limit: int) -> dict[str, Windows]:
    """What a model is scored on, by name: the recipe's eval texts, whole, or else what training holds out of its data.

    `limit` tokens of each at most, rounded up to whole windows. Of text that the teacher writes nothing is held out: a
    model that was trained on nothing else is scored on a part of the built-in text. Raises RrtcError as `documents` and
    `pack` do.
    """
    if recipe.eval.text:
        field = recipe.eval.text_field
        short = [Path(source).name for source in recipe.eval.text]
        return {
            name if short.count(name) == 1 else source: pack(
                beginning(source, field, tokenizer, limit), tokenizer, vocabulary, context, limit
            )
            for name, source in zip(short, recipe.eval.text, strict=True)
        }
    used = recipe.uptrain
    return {"held out": held_out_windows(used.data, used.text_field, tokenizer, vocabulary, context, limit)}


def readable(sources: Sequence[str]) -> list[str]:
    """`sources` but the text that the teacher writes, or the built-in text where there is no other."""
    return [source for source in sources if source != OWN_TEXT] or [BUILT_IN_TEXT]


def held_out_windows(
    sources: Sequence[str], text_field: str, tokenizer, vocabulary: int, context: int, limit: int
) -> Windows:
    """`limit` tokens at most of what is held out of the `readable` ones of `sources`, as many of each."""
    held_out = [split(beginning(source, text_field, tokenizer, HELD_OUT_OF * limit))[1] for source in readable(sources)]
    return _packed(held_out, tokenizer, vocabulary, context, limit)
