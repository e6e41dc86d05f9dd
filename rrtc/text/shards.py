"""Shards: the training text of one source as token ids on disk, written once and read where it is needed.

A shard is a folder in rrtc's cache, named by a hash of what its tokens depend on:

    ids.bin      the tokens of its documents, an end-of-text token after each of them: uint16 or uint32
    offsets.bin  where in it each document begins, and where the last one ends: int64
    about.json   what it is, whether it is all that the source has, and hashes of the two others

It is built beside its place and renamed when it is whole, and made again where its files are not what about.json says.
Of processes that come for it at once, one writes and the others wait. A source is read only as far as a run needs it; a
later run that needs more writes the shard anew. What a run sees does not depend on how much was there before:
`Shard.beginning`.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from accelerate import PartialState
from filelock import FileLock

from rrtc.console import note, progress
from rrtc.io.cache import cache_folder
from rrtc.io.folder import file_hash, partial_of, whole_folder
from rrtc.io.source import Source, content_hash
from rrtc.io.unchanged import Unchanged
from rrtc.text.own import AT_ONCE, own_text
from rrtc.text.sources import RULE, cut, documents, source_files, source_fingerprint, text_hash, training_documents
from rrtc.text.tokens import begin_and_end, encoded, tokenizer_fingerprint
from rrtc.units import count

LONGEST = 1_000_000  # characters of a document: a longer one is cut, and each piece counts as a document
CHARACTERS_AT_ONCE = 1_000_000  # are given to the tokenizer, which spreads documents over the cores
SAMPLE = 1_000_000  # tokens at each end of a shard that its hash looks at
VERSION = 2  # of the files, and of how documents become tokens


@dataclass(frozen=True)
class Shard:
    """Documents as token ids. ids: (tokens,), uint16 or uint32; offsets: (documents + 1,), int64: document d has the
    tokens from offsets[d] to offsets[d + 1]. Both are memory-mapped. complete: whether the source has no more. text:
    the `text_hash` of the source; None of text that a model wrote."""

    fingerprint: str
    text: str | None
    ids: numpy.ndarray
    offsets: numpy.ndarray
    complete: bool

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def tokens(self) -> int:
        return len(self.ids)

    def beginning(self, tokens: int) -> "Shard":
        """As many of the first documents as it takes for `tokens` tokens, or all of them."""
        number = min(int(numpy.searchsorted(self.offsets, tokens)), self.documents)
        complete = self.complete and number == self.documents
        ids, offsets = self.ids[: self.offsets[number]], self.offsets[: number + 1]
        return replace(self, ids=ids, offsets=offsets, complete=complete)

    @property
    def sha256(self) -> str:
        """Of what it was made from, the lengths of all documents, and the tokens at both ends."""
        digest = hashlib.sha256(self.fingerprint.encode())
        for part in (self.offsets, self.ids[:SAMPLE], self.ids[-SAMPLE:]):
            digest.update(numpy.ascontiguousarray(part))
        return digest.hexdigest()


def text_shard(source: str, text_field: str, tokenizer, vocabulary: int, tokens: int, group: PartialState) -> Shard:
    """The documents of `source` that may be trained on, from its start: `tokens` tokens or a little more, or all there
    are. vocabulary: how many tokens the model has embeddings of. Every process of `group` calls this.

    Raises RrtcError as `documents` and `encoded` do.
    """
    files = Unchanged(*source_files(source))
    made_from = {
        "text": source_fingerprint(source),
        "text_field": text_field,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocabulary": vocabulary,
        "held out": RULE,
        "longest": LONGEST,
    }
    whole = training_documents(documents(source, text_field, tokenizer))
    texts = (piece for text in whole for piece in cut(text, LONGEST))
    found = _tokenized(texts, tokenizer, vocabulary, f"Tokenizing {source}", tokens)
    return _shard(f"The text {source} is tokenized already", made_from, files, tokens, vocabulary, found, group)


def own_shard(teacher: Source, tokenizer, windows: int, context: int, seed: int, group: PartialState) -> Shard:
    """Text that `teacher` writes itself, in documents that fill a window of `context` tokens each: `windows` of them or
    a few more. Every process of `group` calls this; the one that writes has the whole model in memory meanwhile.

    Raises RrtcError as `own_text` does.
    """
    begin, end = begin_and_end(tokenizer)
    made_from = {
        "teacher": content_hash(teacher.file),
        "begin and end": [begin, tokenizer.bos_token_id, end],
        "context": context,
        "seed": seed,
    }
    windows = -(-windows // AT_ONCE) * AT_ONCE  # whole batches, so that more windows begin with the same ones

    def found() -> Iterator[numpy.ndarray]:
        with progress("Writing text to train on", windows * (context - 1)) as advance:
            for batch in own_text(teacher.folder, tokenizer, windows, context, seed, advance):
                yield from batch[:, len(begin) :].numpy()  # packing begins every window with that token

    tokens = windows * (context - len(begin))
    vocabulary = teacher.config().get_text_config().vocab_size
    cached = f"Text by {teacher.uri} is written already"
    return _shard(cached, made_from, teacher.files, tokens, vocabulary, found(), group)


def _tokenized(texts: Iterable[str], tokenizer, vocabulary: int, title: str, total: int) -> Iterator[list[int]]:
    """The token ids of each text, and an end-of-text token."""
    with progress(title, total) as advance:
        for batch in _batches(texts):
            for ids, _ in encoded(batch, tokenizer, vocabulary):
                yield ids
                advance(len(ids))


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch, characters = [], 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _shard(
    cached: str,
    made_from: dict,
    files: Unchanged,
    tokens: int,
    vocabulary: int,
    found: Iterator[Sequence[int]],
    group: PartialState,
) -> Shard:
    """The shard made from `made_from`, as far as it takes for `tokens` tokens: what is in the cache where that is
    enough, or else written from `found`, the token ids of its documents, all smaller than `vocabulary`. cached: what
    to say in the first case. files: those that `made_from` has hashes of."""
    fingerprint = hashlib.sha256(json.dumps({"version": VERSION, **made_from}, sort_keys=True).encode()).hexdigest()
    folder = cache_folder() / "tokens" / fingerprint
    with _one_at_a_time(folder, group):
        shard = _read(folder)
        if shard is not None and (shard.complete or shard.tokens >= tokens):
            note(f"{cached}: {count(shard.tokens)} tokens in {folder}")
            return shard.beginning(tokens)
        partial = partial_of(folder)  # of the cache, where everything is rrtc's
        shutil.rmtree(partial, ignore_errors=True)
        if folder.exists():
            folder.rename(partial)  # a kill meanwhile leaves half of it there
            shutil.rmtree(partial, ignore_errors=True)
        with whole_folder(folder) as partial, closing(found):
            dtype = "uint16" if vocabulary <= 2**16 else "uint32"
            complete = _write(partial, found, dtype, tokens)
            files.check()
            about = {"complete": complete, "dtype": dtype, "sha256": _hashes(partial), "made_from": made_from}
            (partial / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf8")
        return _opened(folder, about).beginning(tokens)


@contextmanager
def _one_at_a_time(folder: Path, group: PartialState) -> Iterator[None]:
    """Only one process of this machine is inside for the same `folder`; of `group`, the first one goes first, because
    only its progress is seen."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not group.is_main_process:
        group.wait_for_everyone()
    with FileLock(folder.with_suffix(".lock")):
        if group.is_main_process:
            group.wait_for_everyone()  # the others wait for the lock now, where no time limit ends their patience
        yield


def _write(folder: Path, found: Iterable[Sequence[int]], dtype: str, tokens: int) -> bool:
    """Writes documents until there are `tokens` tokens. Returns whether there were fewer."""
    written = 0
    with open(folder / "ids.bin", "wb") as ids_file, open(folder / "offsets.bin", "wb") as offsets_file:
        offsets_file.write(numpy.int64(0).tobytes())
        for ids in found:
            ids_file.write(numpy.asarray(ids, dtype).tobytes())
            written += len(ids)
            offsets_file.write(numpy.int64(written).tobytes())
            if written >= tokens:
                return False
    return True


def _read(folder: Path) -> Shard | None:
    """The shard in `folder`; None where there is none, or one that is damaged, which a note says."""
    if not folder.exists():
        return None
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf8"))
        if about["sha256"] == _hashes(folder):
            return _opened(folder, about)
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        pass  # whatever else it says, it is not what was written
    note(f"The tokens in {folder} are damaged, and are made again.")
    return None


def _hashes(folder: Path) -> dict[str, str]:
    return {name: file_hash(folder / name) for name in ("ids.bin", "offsets.bin")}


def _opened(folder: Path, about: dict) -> Shard:
    ids, offsets = _mapped(folder / "ids.bin", about["dtype"]), _mapped(folder / "offsets.bin", "int64")
    read = about["made_from"].get("text")
    return Shard(folder.name, read and text_hash(read), ids, offsets, about["complete"])


def _mapped(file: Path, dtype: str) -> numpy.ndarray:
    if not file.stat().st_size:  # of a text that is held out as a whole; nothing cannot be mapped
        return numpy.empty(0, dtype)
    return numpy.asarray(numpy.memmap(file, dtype, "r"))
