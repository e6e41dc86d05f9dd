"""Files of text: which of them are read, and what each kind of file gives.

| .txt             | documents, with two empty lines between them; so is every other file of text that is named itself |
| .jsonl, .ndjson  | one object a line, read one at a time                                                             |
| .json            | the same, or an array of objects, which is read as a whole                                        |
| .csv, .tsv       | rows under a header that names the columns                                                        |
| .parquet         | rows                                                                                              |

All but .parquet may be compressed (.gz, .zst), capitals in a suffix do not matter, and a byte order mark is skipped.
What is data of another kind is refused by its name: as plain text, a model would learn its tags and brackets.
"""

import csv
import functools
import io
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rrtc.console import note
from rrtc.errors import RrtcError
from rrtc.text.rows import Conversation, row_text, text_column, text_of

CHARACTERS_AT_ONCE = 1_000_000  # of a plain file
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NOT_TEXT = {
    ".html", ".htm", ".xhtml", ".xml", ".svg", ".rtf", ".ipynb", ".pdf", ".ps", ".doc", ".docx", ".odt", ".epub",
    ".ppt", ".pptx", ".xls", ".xlsx", ".ods", ".zip", ".tar", ".tgz", ".7z", ".rar", ".bz2", ".xz", ".lz4", ".arrow",
    ".feather", ".orc", ".avro", ".pkl", ".npy", ".npz", ".db", ".sqlite", ".bin", ".safetensors", ".gguf",
}  # fmt: skip
NAMED = 5  # files that a note lists


def local_path(source: str) -> Path | None:
    """The file or folder that `source` names, with ~ for the home folder; None where it can only be a dataset's name.

    Raises RrtcError where nothing is there, or something that cannot be read to its end.
    """
    path = Path(os.path.expanduser(source))
    if os.path.isfile(path) or os.path.isdir(path):
        return path
    if os.path.lexists(path):  # a pipe, a device, a socket; a link to nowhere or to itself
        raise RrtcError(f"The text {source} is neither a file nor a folder.")
    if kind(path)[0] in READERS or source.startswith((".", "/", "~")):
        raise RrtcError(f"There is no text at {source}.")
    return None


def kind(file: Path) -> tuple[str, str | None]:
    """(the suffix of what is in the file, in lower case, how it is compressed)."""
    suffix = file.suffix.lower()
    if suffix in COMPRESSIONS:
        return Path(file.stem).suffix.lower(), COMPRESSIONS[suffix]
    return suffix, None


def files_in(path: Path) -> list[Path]:
    """The files to read of a file or folder, in the order of their names: of a folder, those of READERS in it, at any
    depth. Hidden ones are not looked at, and a note names the others. Raises RrtcError where there is none to read."""
    if not path.is_dir():
        if kind(path)[0] in NOT_TEXT:
            raise RrtcError(f"rrtc does not read text from {kind(path)[0]} files: {path}.", _what_is_read())
        return [path]
    found = [file for file in sorted(path.rglob("*")) if not _is_hidden(file.relative_to(path))]
    read = [file for file in found if kind(file)[0] in READERS and file.is_file()]
    if not read:
        raise RrtcError(f"The folder {path} holds no text.", _what_is_read())
    others = set(found) - set(read)
    _say_unread(path, tuple(sorted(str(file.relative_to(path)) for file in others if not _is_own_folder(file))))
    return read


def _what_is_read() -> str:
    return f"rrtc reads {', '.join(READERS)}, all but the last also as .gz or .zst."


def _is_hidden(inside: Path) -> bool:
    """Whether the system keeps it from users: .git, .DS_Store, and the ._NAME that macOS puts beside NAME."""
    return any(part.startswith(".") for part in inside.parts)


def _is_own_folder(file: Path) -> bool:
    return file.is_dir() and not file.is_symlink()  # links to folders are not followed: they can lead round in circles


@functools.cache  # a run reads its text several times
def _say_unread(folder: Path, names: tuple[str, ...]) -> None:
    if names:
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        note(f"Not read in {folder}: {', '.join(names[:NAMED])}{more}")


def texts_in(file: Path, text_field: str) -> Iterator[str | Conversation]:
    """The texts and conversations in one file, in its own order; empty ones too.

    Raises RrtcError where the file is damaged, is not what its name says, or has no such field.
    """
    try:
        yield from READERS.get(kind(file)[0], _from_plain)(file, text_field)
    except UnicodeDecodeError as error:
        raise RrtcError(f"The text {file} is not UTF-8.") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise RrtcError(f"The text {file} is damaged, or is not what its name says.") from error  # pyarrow's


def _opened(file: Path, newline: str | None = None) -> TextIO:
    compression = kind(file)[1]
    if compression is None:
        return open(file, encoding="utf-8-sig", newline=newline)
    import pyarrow

    stream: Any = pyarrow.input_stream(str(file), compression=compression)
    return io.TextIOWrapper(stream, encoding="utf-8-sig", newline=newline)


def _from_plain(file: Path, text_field: str) -> Iterator[str]:
    with _opened(file) as stream:
        rest = ""
        # A document that is longer than a piece makes the pieces longer, or it would be copied once for each of them.
        while piece := stream.read(max(CHARACTERS_AT_ONCE, len(rest))):
            *found, rest = (rest + piece).split("\n\n\n")
            yield from found
        yield rest


def _from_jsonl(file: Path, text_field: str, hint: str = "") -> Iterator[str | Conversation]:
    with _opened(file) as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RrtcError(f"Line {number} of {file} is not JSON.", hint) from error
            yield row_text(row, text_field, str(file))


def _from_json(file: Path, text_field: str) -> Iterator[str | Conversation]:
    hint = "A .json file of text holds an array of objects, or one object a line."
    with _opened(file) as stream:
        first = next((character for character in iter(lambda: stream.read(1), "") if not character.isspace()), "")
    if first != "[":
        yield from _from_jsonl(file, text_field, hint)
        return
    with _opened(file) as stream:
        try:
            rows = json.load(stream)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise RrtcError(f"The array in {file} is not JSON.", hint) from error
    for row in rows:
        yield row_text(row, text_field, str(file))


def _from_csv(file: Path, text_field: str, delimiter: str = ",") -> Iterator[str | Conversation]:
    csv.field_size_limit(sys.maxsize)  # of a whole document in one cell
    with _opened(file, newline="") as stream:
        rows = csv.DictReader(stream, delimiter=delimiter, strict=True)
        try:
            column = text_column(rows.fieldnames or [], text_field, str(file))
            for row in rows:
                if None in row:  # of text with commas that is not quoted, only the part before the first would be read
                    raise RrtcError(f"Line {rows.reader.line_num} of {file} has more columns than the header.")
                yield text_of(row[column], column, str(file))
        except csv.Error as error:
            name = "CSV" if delimiter == "," else "TSV"
            raise RrtcError(f"Line {rows.reader.line_num} of {file} is not {name}: {error}.") from error


def _from_tsv(file: Path, text_field: str) -> Iterator[str | Conversation]:
    return _from_csv(file, text_field, "\t")


def _from_parquet(file: Path, text_field: str) -> Iterator[str | Conversation]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        column = text_column(table.schema_arrow.names, text_field, str(file))
        for batch in table.iter_batches(columns=[column]):
            for value in batch.column(0).to_pylist():
                yield text_of(value, column, str(file))
    except pyarrow.ArrowException as error:
        raise RrtcError(f"{file} is not a parquet file, or is damaged.") from error


READERS: dict[str, Callable[[Path, str], Iterator[str | Conversation]]] = {
    ".txt": _from_plain,
    ".jsonl": _from_jsonl,
    ".ndjson": _from_jsonl,
    ".json": _from_json,
    ".csv": _from_csv,
    ".tsv": _from_tsv,
    ".parquet": _from_parquet,
}
