"""Text: from the names of sources to packed windows of tokens.

A source is `pydoc` (the language reference that Python ships), a .txt, .jsonl or .parquet file, a folder of them, or
the name of a dataset that the `datasets` library can load. Documents in a .txt file are separated by two empty lines.
A tenth is held out: training never sees it and evaluation scores on it.
"""

import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rrtc.errors import RrtcError
from rrtc.recipe import BUILT_IN_TEXT, OWN_TEXT, Recipe

if TYPE_CHECKING:
    import torch

HELD_OUT_OF = 10  # a document, or a character, of so many is held out
FEW = 100  # documents: of fewer, a part of each is held out
CHARACTERS_PER_TOKEN = 32  # more than any tokenizer puts into one on average
CHARACTERS_AT_ONCE = 1_000_000  # of a plain file
SUFFIXES = (".txt", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Windows:
    """Token ids packed without padding: `ids` is (windows, context), int64. `bytes_per_token` is the UTF-8 length of
    the text over the number of its tokens, separators too, which makes losses comparable across tokenizers."""

    ids: "torch.Tensor"
    bytes_per_token: float


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


def begin_and_end(tokenizer) -> tuple[list[int], list[int]]:
    """(the token that the tokenizer begins every text with, the end-of-text token); [] for one that there is not."""
    always = tokenizer("")["input_ids"]
    begin = always[:1] if always[:1] == [tokenizer.bos_token_id] else []
    return begin, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def pack(texts: Iterable[str], tokenizer, context: int, limit: int | None = None) -> Windows:
    """Documents as windows of `context` tokens, packed without padding, an end-of-text token after each document.

    Where the tokenizer begins every text with a token (Gemma's <bos>, without which it is lost), every window begins
    with it. limit: stop after so many tokens, rounded up to whole windows. Raises RrtcError where the text does not
    fill a window.
    """
    import torch

    beginning_token, separator = begin_and_end(tokenizer)
    width = context - len(beginning_token)  # tokens of text in a window
    wanted = math.inf if limit is None else max(1, -(-limit // context)) * width
    ids: list[int] = []
    sizes: list[int] = []  # UTF-8 bytes of each token
    for text in texts:
        if wanted < math.inf:
            text = text[: CHARACTERS_PER_TOKEN * (wanted - len(ids))]  # no more of a long document than will be used
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids += [*encoded["input_ids"], *separator]
        end = 0
        for _, stop in encoded["offset_mapping"]:  # a character can take several tokens, which all have its end
            sizes.append(len(text[end:stop].encode()))
            end = max(end, stop)
        sizes += [0] * len(separator)
        if len(ids) >= wanted:
            break
    windows = min(len(ids), wanted) // width
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


def scoring_texts(recipe: Recipe, tokenizer, context: int, limit: int) -> dict[str, Windows]:
    """What a model is scored on, by name: the recipe's eval texts, whole, or else what training holds out of its data.

    `limit` tokens of each at most, rounded up to whole windows. Of text that the teacher writes nothing is held out: a
    model that was trained on nothing else is scored on a part of the built-in text. Raises RrtcError as `documents` and
    `pack` do.
    """
    if recipe.eval.text:
        field = recipe.eval.text_field
        short = [Path(source).name for source in recipe.eval.text]
        return {
            name if short.count(name) == 1 else source: pack(beginning(source, field, limit), tokenizer, context, limit)
            for name, source in zip(short, recipe.eval.text, strict=True)
        }
    return {"held out": held_out_windows(recipe.uptrain.data, recipe.uptrain.text_field, tokenizer, context, limit)}


def readable(sources: Sequence[str]) -> list[str]:
    """`sources` but the text that the teacher writes, or the built-in text where there is no other."""
    return [source for source in sources if source != OWN_TEXT] or [BUILT_IN_TEXT]


def held_out_windows(sources: Sequence[str], text_field: str, tokenizer, context: int, limit: int) -> Windows:
    """`limit` tokens at most of what is held out of the `readable` ones of `sources`."""
    held_out = [d for source in readable(sources) for d in split(beginning(source, text_field, HELD_OUT_OF * limit))[1]]
    return pack(held_out, tokenizer, context, limit)
