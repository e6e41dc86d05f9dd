"""Training data: from the recipe's sources to windows of tokens, in the one order in which training sees them.

The order is fixed by the recipe and the text alone. It does not depend on the number of processes, on the micro-batch,
on where a run was interrupted or on what the cache held, so that all of these give the same losses. In memory are 8
bytes a document and 8 a window; the tokens are read from disk, window by window.
"""

import hashlib
import math
from dataclasses import dataclass

import numpy
import torch
from accelerate import PartialState
from torch import Tensor

from rrtc.errors import RrtcError
from rrtc.io.source import Source
from rrtc.recipe.section import OWN_TEXT
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.text.shards import Shard, own_shard, text_shard
from rrtc.text.sources import check_split_alike
from rrtc.text.tokens import begin_and_end

ORDER = 2  # the version of how windows are cut and ordered: a run that another one began is not gone on with
LEAST = 2_000_000  # tokens to choose from, where a source has them: the first pages of a text do not stand for it


def given(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a base model is given of training inputs, whose last dimension is the context: all but the last token."""
    return {name: value[..., :-1] for name, value in inputs.items()}


class Packed:
    """One source as windows of `context` tokens, packed without padding as `rrtc.text.windows.pack` does. They come in
    an order drawn from the seed, and when they are used up in a new one. Documents keep their own order, so that every
    round, every seed and every longer run has the same windows: a teacher cache that knows them need not ask again.

    Where the documents are to be separate, they do not attend to each other, so each begins with `begin`, as it would
    alone.
    """

    def __init__(
        self, name: str, shard: Shard, context: int, begin: list[int], separate: bool = False, seed: tuple = (0,)
    ):
        """begin: the token that every window begins with, or []. seed: numbers from 0 up."""
        self.name, self.shard, self.context, self.seed = name, shard, context, seed
        self.begin, self.separate = begin, separate
        self.width = context - len(begin)  # tokens of text in a window
        self.of_each = begin if separate else []  # goes before each document
        self.ends = shard.offsets[1:] + len(self.of_each) * numpy.arange(1, shard.documents + 1)  # of the documents
        self.count = (shard.tokens + shard.documents * len(self.of_each)) // self.width  # of windows, once through
        self.round = -1

    def window(self, turn: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(token ids, whether a document begins there), both (context,), int64 and bool, of the window whose turn it
        is, counted from 0. A window begins one, whatever it cuts."""
        round_, place = divmod(turn, self.count)
        if round_ != self.round:
            self.round = round_
            self.windows = numpy.random.default_rng((*self.seed, round_)).permutation(self.count)
        ids = numpy.empty(self.context, numpy.int64)
        begins = numpy.zeros(self.context, bool)
        ids[: len(self.begin)] = self.begin
        begins[0] = True
        at, start = len(self.begin), int(self.windows[place]) * self.width
        number = int(numpy.searchsorted(self.ends, start, side="right"))
        while at < self.context:
            document = self._document(number)
            skipped = start - (int(self.ends[number]) - len(document))
            part = document[skipped : skipped + self.context - at]
            begins[at] |= skipped == 0
            ids[at : at + len(part)] = part
            at, start, number = at + len(part), start + len(part), number + 1
        return ids, begins

    def _document(self, number: int) -> numpy.ndarray:
        first, last = self.shard.offsets[number : number + 2]
        ids = self.shard.ids[first:last]
        return numpy.concatenate([self.of_each, ids]).astype(numpy.int64) if self.of_each else ids


@dataclass(frozen=True)
class Mixture:
    """Sources, and the share of the windows that comes from each: above 0, and 1 in all."""

    sources: list[Packed]
    shares: list[float]

    @property
    def context(self) -> int:
        return self.sources[0].context

    @property
    def tokens(self) -> int:
        """In all windows of all sources."""
        return sum(source.count for source in self.sources) * self.context

    @property
    def sha256(self) -> str:
        """Of the text. Its order follows from the recipe."""
        return hashlib.sha256(" ".join(source.shard.sha256 for source in self.sources).encode()).hexdigest()


def training_text(
    recipe: UptrainRecipe,
    tokenizer,
    vocabulary: int,
    context: int,
    windows: int,
    writer: Source | None,
    group: PartialState,
) -> Mixture:
    """What a run of so many windows learns from, tokenized. vocabulary: how many tokens the model has embeddings of.
    writer: the model that writes the text of its own, if that is among the data. Every process of `group` calls this.

    Raises RrtcError for a source that is missing, is empty, does not fill a window, or has a token beyond these.
    """
    begin, _ = begin_and_end(tokenizer)
    weights = recipe.data_weights or [1.0] * len(recipe.data)
    shares = [weight / sum(weights) for weight in weights]
    check_split_alike(source for source, share in zip(recipe.data, shares, strict=True) if share)
    found: dict[int, Packed] = {}
    # Text that is still to be written comes last: it takes the longest, and what is wrong elsewhere is said before.
    for number in sorted(range(len(shares)), key=lambda number: recipe.data[number] == OWN_TEXT):
        source, share = recipe.data[number], shares[number]
        if share == 0:
            continue
        if source == OWN_TEXT:
            shard = own_shard(writer, tokenizer, math.ceil(share * windows), context, recipe.seed, group)
        else:
            # Without weights, this may turn out to be the only source that has much.
            most = math.ceil(share * windows) if recipe.data_weights else windows
            enough = max(most * context, LEAST)
            shard = text_shard(source, recipe.text_field, tokenizer, vocabulary, enough, group)
        seed = (recipe.seed % 2**64, number)
        found[number] = Packed(source, shard, context, begin, recipe.separate_documents, seed)
        if found[number].count == 0:
            raise RrtcError(
                f"The text {source} has only {shard.tokens} tokens, fewer than one context of {context}.",
                "Give more text, or a smaller context.",
            )
    if not recipe.data_weights:
        # Text that is written has no size of its own. It keeps its equal share, and the others divide theirs.
        others = [number for number in found if recipe.data[number] != OWN_TEXT]
        theirs = sum(shares[number] for number in others)
        have = sum(found[number].count for number in others)
        for number in others:
            shares[number] = theirs * found[number].count / have
    return Mixture([found[number] for number in sorted(found)], [share for share in shares if share])


class Stream(torch.utils.data.Dataset):
    """`length` windows of a mixture, all that training will see.

    An item is {"input_ids": (context,)}, int64; where documents are separate, also {"position_ids": (context,)}, int64,
    which start anew with each document: from that, transformers masks attention between documents.
    """

    def __init__(self, mixture: Mixture, length: int):
        self.mixture, self.length = mixture, length
        self.order = interleaved(mixture.shares, length)

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Which window an item is, in words: its source, and the how manieth in the order in which that is seen."""
        number, turn = (int(order[index]) for order in self.order)
        return f"window {turn} of {self.mixture.sources[number].name}"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        number, turn = (int(order[index]) for order in self.order)
        source = self.mixture.sources[number]
        ids, begins = source.window(turn)
        item = {"input_ids": torch.from_numpy(ids)}
        if source.separate:
            places = numpy.arange(len(ids))
            item["position_ids"] = torch.from_numpy(places - numpy.maximum.accumulate(numpy.where(begins, places, 0)))
        return item


def interleaved(shares: list[float], length: int) -> tuple[numpy.ndarray, numpy.ndarray]:
    """For each of `length` windows, (the number of its source, the how manieth of that source it is), so that every
    beginning of the sequence has of each source about its share: window t of a source is due at (t + 1/2) / share."""
    turns = [numpy.arange(math.ceil(share * length) + len(shares)) for share in shares]
    due = numpy.concatenate([(turn + 0.5) / share for turn, share in zip(turns, shares, strict=True)])
    first = numpy.argsort(due, kind="stable")[:length]
    numbers = numpy.repeat(numpy.arange(len(shares), dtype=numpy.uint16), [len(turn) for turn in turns])
    return numbers[first], numpy.concatenate(turns)[first]
