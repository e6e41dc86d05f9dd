"""Token ids of documents: how a tokenizer is asked, and what is refused of what it answers.

What is learned from and scored on is, for every document, what the tokenizer makes of it without special tokens of its
own, and the end-of-text token. A document that spells these out, as a chat template does, has each of them once: of a
conversation the ids are those of `tokenizer.apply_chat_template`, and the end-of-text token where they do not end with
it. The token that the tokenizer begins every text with (Gemma's <bos>) is left to whoever cuts windows: it begins each
of them, and each document where these are kept apart.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from rrtc.errors import RrtcError
from rrtc.io.source import is_tokenizer_fault


def begin_and_end(tokenizer) -> tuple[list[int], list[int]]:
    """(the token that the tokenizer begins every text with, the end-of-text token); [] for one that there is not.
    Raises RrtcError where the tokenizer fails."""
    always = _asked(tokenizer, "")["input_ids"]
    begin = always[:1] if always[:1] == [tokenizer.bos_token_id] else []
    return begin, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def encoded(
    texts: Sequence[str], tokenizer, vocabulary: int, sizes: bool = False
) -> Iterator[tuple[list[int], Sequence[float]]]:
    """(token ids, UTF-8 bytes of the text of each) of every one of `texts`, with an end-of-text token after it, without
    the token that begins every text. sizes: whether the bytes are wanted; without, they are 0. A tokenizer that cannot
    say which token stands for which characters shares out the bytes of a text equally.

    vocabulary: how many tokens the model has embeddings of. Raises RrtcError for a token beyond these, and where the
    tokenizer fails.
    """
    begin, end = begin_and_end(tokenizer)
    placed = sizes and tokenizer.is_fast
    options = {"add_special_tokens": False, "return_offsets_mapping": placed, "verbose": False}
    answer = _asked(tokenizer, list(texts), **options)
    for number, (text, ids) in enumerate(zip(texts, answer["input_ids"], strict=True)):
        _check_known([*begin, *ids, *end], tokenizer, vocabulary)
        if placed:
            lengths = _lengths(text, answer["offset_mapping"][number])
        else:
            lengths = [len(text.encode()) / len(ids) for _ in ids] if sizes else [0] * len(ids)
        if begin and ids[:1] == begin:
            ids, lengths = ids[1:], lengths[1:]
        if ids[-1:] != end:
            ids, lengths = ids + end, lengths + [0] * len(end)
        yield ids, lengths


def _lengths(text: str, places: Sequence[tuple[int, int]]) -> list[float]:
    """UTF-8 bytes of each token of `text`, from where in it each begins and ends."""
    found: list[float] = []
    end = 0
    for _, stop in places:  # a character can take several tokens, which all have its end
        found.append(len(text[end:stop].encode()))
        end = max(end, stop)
    return found


def _check_known(ids: list[int], tokenizer, vocabulary: int) -> None:
    highest = max(ids, default=0)
    if highest >= vocabulary:
        raise RrtcError(
            f"The text has the token {tokenizer.convert_ids_to_tokens(highest)}, which is number {highest} of the "
            f"tokenizer, and the model has embeddings of {vocabulary} tokens only.",
            "Leave it out of the text, or give the model an embedding of it first (resize_token_embeddings).",
        )


def _asked(tokenizer, texts: str | list[str], **options):
    try:
        return tokenizer(texts, **options)
    except BaseException as error:
        if not is_tokenizer_fault(error):
            raise
        reason = " ".join(str(error).split())[:200].removesuffix(".") or type(error).__name__
        raise RrtcError(
            f"The model's tokenizer fails: {reason}.", "Its tokenizer.json is damaged, or does not know such text."
        ) from error


def tokenizer_fingerprint(tokenizer) -> str:
    """A hash of all that the tokens of a text depend on, the chat template too."""
    inside = [*begin_and_end(tokenizer), tokenizer.special_tokens_map, tokenizer.chat_template]
    if tokenizer.is_fast:
        # The call above has cleared what an earlier one may have left in it.
        inside.append(tokenizer.backend_tokenizer.to_str())
    else:
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(file).read_bytes() for file in tokenizer.save_vocabulary(folder) or ()]
        hashes = [hashlib.sha256(content).hexdigest() for content in files]
        inside += [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), hashes]
    return hashlib.sha256(json.dumps(inside, default=str).encode()).hexdigest()
