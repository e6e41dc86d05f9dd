"""Text sources: from the name of a source to its documents, and which of them are held out."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from rrtc.errors import RrtcError
from rrtc.recipe.section import BUILT_IN_TEXT

HELD_OUT_OF = 10  # a document, or a character, of so many is held out
FEW = 100  # documents: of fewer, a part of each is held out
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer puts into one on average
CHARACTERS_AT_ONCE = 1_000_000  # of a plain file
SUFFIXES = (".txt", ".jsonl", ".parquet")


def documents(source: str, text_field: str = "text") -> Iterator[str]:
    """The documents of one source, in its own order.

    Raises RrtcError for a source that does not exist, is empty, or has no field of that name.
    """
    empty = True
    for text in _documents(source, text_field):
        if text.strip():
            empty = False
            yield text
    if empty:
        raise RrtcError(f"The text {source} is empty.")


def _documents(source: str, text_field: str) -> Iterator[str]:
    if source == BUILT_IN_TEXT:
        yield from _built_in()
        return
    path = Path(source)
    if path.exists():
        for file in _files(path):
            yield from _from_file(file, text_field)
    elif path.suffix in SUFFIXES or source.startswith((".", "/", "~")):
        raise RrtcError(f"There is no text at {source}.")
    else:
        yield from _from_datasets(source, text_field)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise RrtcError(f"The folder {path} holds no text.", f"rrtc reads {', '.join(SUFFIXES)}.")
    return files


def source_fingerprint(source: str) -> list:
    """What the documents of a source depend on, as plain data: a hash of the contents of files, and of a dataset the
    name alone."""
    if source == BUILT_IN_TEXT:
        return [hashlib.sha256("\0".join(_built_in()).encode()).hexdigest()]
    if not Path(source).exists():
        return [source]
    found = []
    for file in _files(Path(source)):
        with open(file, "rb") as stream:
            found.append([file.suffix, hashlib.file_digest(stream, "sha256").hexdigest()])
    return found


def _built_in() -> list[str]:
    """Python's own language reference, one document a topic, one line a paragraph: laid out for a terminal as it comes,
    much of it would be line breaks and indentation."""
    from pydoc_data.topics import topics

    return [
        "\n".join(" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", topic))
        for topic in sorted(set(topics.values()))
    ]


def _from_file(file: Path, text_field: str) -> Iterator[str]:
    readers = {".jsonl": _from_jsonl, ".parquet": _from_parquet}
    try:
        yield from readers.get(file.suffix, _from_plain)(file, text_field)
    except UnicodeDecodeError as error:
        raise RrtcError(f"The text {file} is not UTF-8.") from error


def _from_plain(file: Path, text_field: str) -> Iterator[str]:
    with open(file, encoding="utf8") as stream:
        rest = ""
        # A document that is longer than a piece makes the pieces longer, or it would be copied once for each of them.
        while piece := stream.read(max(CHARACTERS_AT_ONCE, len(rest))):
            *found, rest = (rest + piece).split("\n\n\n")
            yield from found
        yield rest


def _from_jsonl(file: Path, text_field: str) -> Iterator[str]:
    with open(file, encoding="utf8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise RrtcError(f"Line {number} of {file} is not JSON.") from error
            # JSON can spell half a surrogate pair, which is no text.
            yield _field(row, text_field, str(file)).encode("utf8", "replace").decode()


def _from_parquet(file: Path, text_field: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid as error:
        raise RrtcError(f"{file} is not a parquet file, or is damaged.") from error
    fields = table.schema_arrow.names
    if text_field not in fields:
        raise _no_field(text_field, str(file), fields)
    for batch in table.iter_batches(columns=[text_field]):
        for text in batch.column(0).to_pylist():
            if not isinstance(text, str | None):
                raise _no_field(text_field, str(file), fields)
            yield text or ""


def _from_datasets(name: str, text_field: str) -> Iterator[str]:
    from datasets import load_dataset

    (path, _, config), read = name.partition(":"), 0
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        for row in rows:
            yield _field(row, text_field, name)
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
            "Name a .txt, .jsonl or .parquet file, or 'pydoc' for the text that Python ships.",
        ) from error


def _field(row: dict, name: str, source: str) -> str:
    """The text in a row; "" where the row says that it has none."""
    if not isinstance(row, dict) or not isinstance(row.get(name, 0), str | None):
        raise _no_field(name, source, row.keys() if isinstance(row, dict) else [])
    return row[name] or ""


def _no_field(name: str, source: str, fields) -> RrtcError:
    found = f"Its fields are {', '.join(map(str, fields))}; see text_field." if fields else "Its rows have no fields."
    return RrtcError(f"{source} has no text field '{name}'.", found)


def beginning(source: str, text_field: str, tokens: int) -> list[str]:
    """Documents of one source, from its start, that hold at least `tokens` tokens in any tokenizer we know of, or all
    there are. A source can be larger than memory, and text that will not be used would only cost time."""
    found, characters = [], 0
    for document in documents(source, text_field):
        found.append(document)
        characters += len(document)
        # With at least FEW documents, what is held out does not depend on how many more there are.
        if characters >= CHARACTERS_PER_TOKEN * tokens and len(found) >= FEW:
            break
    return found


def split(found: list[str]) -> tuple[list[str], list[str]]:
    """(training documents, held-out documents): a tenth is held out.

    It is chosen by hash, so that the same document is always on the same side, wherever it stands. Of fewer than FEW
    documents, where a hash could choose none, the last tenth of each is held out.
    """
    if len(found) < FEW:
        cuts = [len(document) - len(document) // HELD_OUT_OF for document in found]
        training = [document[:cut] for document, cut in zip(found, cuts, strict=True)]
        held_out = [document[cut:] for document, cut in zip(found, cuts, strict=True) if document[cut:]]
    else:
        training = [document for document in found if not _is_held_out(document)]
        held_out = [document for document in found if _is_held_out(document)]
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
    return int.from_bytes(hashlib.sha256(document.encode()).digest()[:8]) % HELD_OUT_OF == 0
