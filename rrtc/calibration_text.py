"""The text that is read to learn what the layers of a model see: by `init`, and by `export` when it quantises."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from rrtc.recipe import BUILT_IN_TEXT, OWN_TEXT, ExportRecipe, InitRecipe
from rrtc.text import beginning, cut, documents, pack, split


def own_windows(recipe: InitRecipe, context: int) -> int:
    """How many of the calibration windows the model is to write itself: a text's share, if that is one of the texts."""
    return -(-_share(recipe, context) // context) if OWN_TEXT in recipe.calibrate_on else 0


def _share(recipe: InitRecipe | ExportRecipe, context: int) -> int:
    """Tokens from each text."""
    return max(context, recipe.calibrate_tokens // len(recipe.calibrate_on))


def calibration_windows(recipe: InitRecipe | ExportRecipe, tokenizer, context: int) -> Tensor:
    """Token ids, (windows, context), int64: about `calibrate_tokens` in all, as many from each text of `calibrate_on`;
    without those that the model is to write itself (`own_windows`), which can be all.

    A text is cut into pieces of about a window, taken in the order of their hashes from what training may see: so the
    order of its documents does not matter, and a file's preface does not stand for the whole. Raises RrtcError as
    `documents` and `pack` do.
    """
    share, parts = _share(recipe, context), [torch.zeros(0, context, dtype=torch.long)]
    for source in recipe.calibrate_on:
        if source == OWN_TEXT:
            continue
        training, _ = split(_found(source, recipe.text_field, share))
        pieces = [piece for document in training for piece in cut(document, 4 * context)]
        pieces.sort(key=lambda piece: hashlib.sha256(f"{recipe.seed} {piece}".encode()).digest())
        parts.append(pack(pieces, tokenizer, context, share).ids)
    return torch.cat(parts)


def _found(source: str, field: str, tokens: int) -> list[str]:
    """All documents of a text on this machine; of a data set that is streamed from elsewhere, some from its start."""
    if source == BUILT_IN_TEXT or Path(source).exists():
        return list(documents(source, field))
    return beginning(source, field, tokens)
