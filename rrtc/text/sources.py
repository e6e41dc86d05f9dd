"""Text sources: from the name of a source to its documents, and which of them are held out.

A source is `pydoc` (the language reference that Python ships), a file, a folder of files, or the name of a dataset that
the `datasets` library can load. Files are read by rrtc/text/files.py, rows of data by rrtc/text/rows.py.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.folder import file_hash
from rrtc.recipe.section import BUILT_IN_TEXT, OWN_TEXT
from rrtc.text.files import files_in, kind, local_path, texts_in
from rrtc.text.rows import Conversation, row_text, written_out

HELD_OUT_OF = 10  # a document, or a character, of so many is held out
FEW = 100  # documents: of fewer, a part of each is held out
RULE = [HELD_OUT_OF, FEW, "whole conversations"]  # what is held out follows from: other text where it changes
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer puts into one on average


class WrittenOut(str):
    """A conversation as a chat template writes it out. Half of one is none: who answers last would have no end."""


def documents(source: str, text_field: str, tokenizer) -> Iterator[str]:
    """The documents of one source, in its own order. A conversation is one, as the chat template of `tokenizer` writes
    it out.

    Raises RrtcError for a source that does not exist, is empty, or has no field of that name, and for conversations
    that the tokenizer has no template for.
    """
    for found in _found(source, text_field):
        plain = isinstance(found, str)
        text = found if plain else written_out(found, tokenizer, source)
        text = text.encode("utf8", "replace").decode()  # JSON can spell half a surrogate pair, which is no text
        yield text if plain else WrittenOut(text)


def check_source(source: str, text_field: str) -> None:
    """Raises RrtcError as `documents` does before the first one, but for what takes a tokenizer to tell."""
    next(_found(source, text_field))


def _found(source: str, text_field: str) -> Iterator[str | Conversation]:
    """What is in a source and is not empty."""
    empty = True
    for found in _everything(source, text_field):
        if found.strip() if isinstance(found, str) else found:
            empty = False
            yield found
    if empty:
        raise RrtcError(f"The text {source} is empty.")


def _everything(source: str, text_field: str) -> Iterator[str | Conversation]:
    if source == BUILT_IN_TEXT:
        yield from _built_in()
        return
    path = local_path(source)
    if path is None:
        yield from _from_datasets(source, text_field)
        return
    for file in files_in(path):
        yield from texts_in(file, text_field)


def source_fingerprint(source: str) -> list:
    """What the documents of a source depend on, as plain data: a hash of the contents of files, and of a dataset the
    name alone."""
    if source == BUILT_IN_TEXT:
        return [hashlib.sha256("\0".join(_built_in()).encode()).hexdigest()]
    path, found = local_path(source), []
    if path is None:
        return [source]
    for file in files_in(path):
        found.append([*kind(file), file_hash(file)])
    return found


def text_hash(fingerprint: list) -> str:
    """SHA-256 of what `source_fingerprint` returned."""
    return hashlib.sha256(json.dumps(fingerprint).encode()).hexdigest()


def check_split_alike(sources: Iterable[str]) -> None:
    """Raises WrongUsage where a file is in two of `sources` that are not the same files: each holds out other parts,
    and what one holds out would be learned from the other."""
    on_disks = [source for source in dict.fromkeys(sources) if source != OWN_TEXT]
    for one, other in itertools.combinations(on_disks, 2):
        both = shared_files(one, other)
        if both and any(len(source_files(source)) > len(both) for source in (one, other)):
            raise WrongUsage(
                f"{min(both)} is in two of the texts, {one} and {other}, which hold out different parts of it.",
                "Name it once; data_weights says how much of the training each text is.",
            )


def source_folders(sources: Iterable[str]) -> list[Path]:
    """Those of `sources` that are folders on this machine's disks."""
    found = (None if source in (BUILT_IN_TEXT, OWN_TEXT) else local_path(source) for source in sources)
    return [path for path in found if path is not None and path.is_dir()]


def source_files(source: str) -> list[Path]:
    """The files that a source consists of; none of one that is not on this machine's disks."""
    path = None if source == BUILT_IN_TEXT else local_path(source)
    return [] if path is None else list(files_in(path))


def shared_files(one: str, other: str) -> set[Path]:
    """The files that two sources have in common, links resolved."""
    return set.intersection(*({file.resolve() for file in source_files(source)} for source in (one, other)))


def _built_in() -> list[str]:
    """Python's own language reference, one document a topic, one line a paragraph: laid out for a terminal as it comes,
    much of it would be line breaks and indentation."""
    from pydoc_data.topics import topics

    return [
        "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", topic))
        for topic in sorted(set(topics.values()))
    ]


def _from_datasets(name: str, text_field: str) -> Iterator[str | Conversation]:
    from datasets import load_dataset

    (path, _, config), read = name.partition(":"), 0
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        for row in rows:
            yield row_text(row, text_field, name)
            read += 1
    except RrtcError:
        raise
    except Exception as error:  # no network, no such dataset, no permission: datasets raises many kinds
        reason = " ".join(str(error).split())[:200].removesuffix(".") or type(error).__name__
        if read:
            raise RrtcError(
                f"Reading the dataset {name} ended after {read} documents: {reason}.",
                "Start again. A file on this machine (.jsonl, .parquet) does not depend on the network.",
            ) from error
        raise RrtcError(
            f"There is no file or folder {name}, and no dataset of that name could be loaded: {reason}.",
            "Name a file (.txt, .jsonl, .json, .csv, .parquet), or 'pydoc' for the text that Python ships.",
        ) from error


def beginning(source: str, text_field: str, tokenizer, tokens: int) -> list[str]:
    """Documents of one source, from its start, that hold at least `tokens` tokens in any tokenizer we know of, or all
    there are. A source can be larger than memory, and text that will not be used would only cost time."""
    found, characters = [], 0
    for document in documents(source, text_field, tokenizer):
        found.append(document)
        characters += len(document)
        # With at least FEW documents, what is held out does not depend on how many more there are.
        if characters >= CHARACTERS_PER_TOKEN * tokens and len(found) >= FEW:
            break
    return found


def split(found: list[str]) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents): a tenth is held out.

    It is chosen by hash, so that the same document is always on the same side, wherever it stands. Of fewer than FEW
    documents, where a hash could choose none, the last tenth of each is held out; of conversations, those with the
    lowest hashes.
    """
    if len(found) >= FEW:
        training = [document for document in found if not _is_held_out(document)]
        return training, [document for document in found if _is_held_out(document)]
    whole = sorted({document for document in found if isinstance(document, WrittenOut)}, key=_hash)
    unseen = set(whole[: max(1, round(len(whole) / HELD_OUT_OF))])
    training, held_out = [], []
    for document in found:
        end = len(document) - len(document) // HELD_OUT_OF
        if len(whole) > 1 and isinstance(document, WrittenOut):
            end = 0 if document in unseen else len(document)
        training += [document[:end]] if end else []
        held_out += [document[end:]] if document[end:] else []
    return training, held_out


def training_documents(found: Iterable[str]) -> Iterator[str]:
    """The training documents of `split`, one at a time. `found`: all documents of a source, or its beginning of at
    least FEW; no more than FEW of them are in memory."""
    found = iter(found)
    first = list(itertools.islice(found, FEW))
    yield from split(first)[0]
    if len(first) == FEW:
        yield from (document for document in found if not _is_held_out(document))


def cut(document: str, characters: int) -> Iterator[str]:
    """`document` in pieces of at most so many characters, cut between words where it has any."""
    start = 0
    while start < len(document):
        end = start + characters
        if end < len(document):
            end = document.rfind(" ", start + 1, end) + 1 or end
        yield document[start:end]
        start = end


def _is_held_out(document: str) -> bool:
    return _hash(document) % HELD_OUT_OF == 0


def _hash(document: str) -> int:
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8])
