"""The text that is read to learn what the layers of a model see: by `init`, and by `export` when it quantizes."""

import functools
import hashlib
import heapq
from collections.abc import Iterable

import torch
from torch import Tensor

from rrtc.console import warn
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.section import BUILT_IN_TEXT, OWN_TEXT
from rrtc.text.files import local_path
from rrtc.text.sources import beginning, cut, documents, training_documents
from rrtc.text.windows import pack


def own_windows(recipe: InitRecipe, context: int) -> int:
    """How many of the calibration windows the model is to write itself: a text's share, if that is one of the texts."""
    return -(-_share(recipe, context) // context) if OWN_TEXT in recipe.calibrate_on else 0


def _share(recipe: InitRecipe | ExportRecipe, context: int) -> int:
    """Tokens from each text."""
    return max(context, recipe.calibrate_tokens // len(recipe.calibrate_on))


def calibration_windows(recipe: InitRecipe | ExportRecipe, tokenizer, vocabulary: int, context: int) -> Tensor:
    """Token ids, (windows, context), int64: about `calibrate_tokens` in all, as many from each text of `calibrate_on`;
    without those that the model is to write itself (`own_windows`), which can be all.

    A text is cut into pieces of about a window, taken in the order of their hashes from what training may see: so the
    order of its documents does not matter, and a file's preface does not stand for the whole. vocabulary: how many
    tokens the model has embeddings of. Raises RrtcError as `documents` and `pack` do.
    """
    share, parts = _share(recipe, context), [torch.zeros(0, context, dtype=torch.long)]
    for source in recipe.calibrate_on:
        if source == OWN_TEXT:
            continue
        training = training_documents(_found(source, recipe.text_field, tokenizer, share))
        pieces = (piece for document in training for piece in cut(document, 4 * context))
        # The first by their hashes, one for every token: all that can be needed of a text that memory need not hold.
        order = functools.partial(_hash, recipe.seed)
        chosen = heapq.nsmallest(share + context, pieces, key=order)
        parts.append(pack(chosen, tokenizer, vocabulary, context, share).ids)
        if 2 * parts[-1].numel() < share:
            warn(f"The text {source} has only {parts[-1].numel()} tokens to calibrate on, where {share} were wanted.")
    return torch.cat(parts)


def _hash(seed: int, piece: str) -> bytes:
    return hashlib.sha256(f"{seed} {piece}".encode()).digest()


def _found(source: str, field: str, tokenizer, tokens: int) -> Iterable[str]:
    """All documents of a text on this machine; of a data set that is streamed from elsewhere, some from its start."""
    if source == BUILT_IN_TEXT or local_path(source) is not None:
        return documents(source, field, tokenizer)
    return beginning(source, field, tokenizer, tokens)
