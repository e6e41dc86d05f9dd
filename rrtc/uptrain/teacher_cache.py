"""What a teacher says of the training windows, kept on disk: it is run once, and every epoch, restart and other student
of the same teacher reads.

Of each token's distribution the `top` most probable entries are kept, and the mass of all others, the tail. Within the
tail the teacher is taken to agree with the student, so that a divergence is the one between two distributions over
top + 1 outcomes, and so is its gradient: all of them are f-divergences, to which outcomes of one ratio q / p are one.

The cache is filled before training starts, not on the way. So teacher and student are never in memory together, what a
token is taught does not depend on which process or micro-batch met its window first, and a resumed run reads the very
numbers of the one that it continues.

    DIR/teacher.json     what the cache is for: a hash of the teacher's contents, its vocabulary, temperature and top
    DIR/*.arrow          segments, each an Arrow file with a row for every window: a hash of what the teacher was given,
                         the number of tokens, the compressed lesson and its checksum

A segment has its name once it is whole, and is never written again.
"""

import hashlib
import json
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import pyarrow
import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from rrtc.console import progress
from rrtc.errors import RrtcError
from rrtc.io.folder import check_space, whole_file
from rrtc.plain import read_json
from rrtc.uptrain.data import given
from rrtc.uptrain.losses import LOGITS_AT_ONCE, chunks
from rrtc.uptrain.teacher import LiveTeacher

FORMAT = 2
FINGERPRINT = "teacher.json"
SEGMENT_TOKENS = 2**16  # about 10 MB, which is what a kill can lose
TOKENS_AT_ONCE = 2**13  # in a forward pass of the teacher, which keeps no activations
CODEC = pyarrow.Codec("zstd")
LOWEST = float(torch.finfo(torch.float16).min)  # in place of log 0, with which a divergence would be infinite
SCHEMA = pyarrow.schema(
    [
        ("key", pyarrow.binary(16)),
        ("tokens", pyarrow.int64()),
        ("checksum", pyarrow.uint32()),
        ("lesson", pyarrow.large_binary()),
    ]
)
DAMAGE = (pyarrow.ArrowException, OSError, ValueError)  # what pyarrow raises of a file that is not as it should be

Packed = tuple[Tensor, Tensor, Tensor]  # see `pack`


def key(window: dict[str, Tensor]) -> bytes:
    """A hash (16 bytes) of all that a base model is given of one window: whole numbers, of whichever type."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(window):
        digest.update(f"{name} {tuple(window[name].shape)} ".encode())
        digest.update(window[name].to("cpu", torch.int64).numpy().tobytes())
    return digest.digest()


def pack(log_q: Tensor, top: int) -> Packed:
    """Of log-probabilities (tokens, vocabulary), float32: the `top` highest in falling order, float16, the ids that
    they belong to, int64 (both (tokens, top)), and the log of all others' mass, (tokens,), float32."""
    highest, ids = log_q.topk(top)
    tail = log_q.scatter(1, ids, -torch.inf).logsumexp(-1)
    return highest.clamp_(min=LOWEST).half(), ids, tail.clamp_(min=LOWEST)


class TeacherCache:
    """The lessons in the folder of a cache, found by the `key` of their window."""

    def __init__(self, folder: Path, teacher: str, vocabulary: int, temperature: float, top: int, arithmetic: str):
        """teacher: its content hash. arithmetic: the dtype that it computes in. `folder` may be missing or
        empty, and stays so until `fill` writes into it.

        Raises RrtcError where the folder is no cache, is one for something else, or is damaged.
        """
        self.folder, self.top = Path(folder), min(top, vocabulary - 1)
        self.made_for = {
            "format": FORMAT, "teacher": teacher, "vocabulary": vocabulary, "temperature": temperature,
            "teacher_cache_top": self.top, "arithmetic": arithmetic,
        }  # fmt: skip
        self._id_type = numpy.uint16 if vocabulary <= 2**16 else numpy.uint32
        self._places: dict[bytes, tuple[Path, int]] = {}  # of a window's lesson: its segment and row
        self._segments: set[Path] = set()
        self._tokens = self._bytes = 0
        self._check_folder()
        self.refresh()

    def _check_folder(self) -> None:
        file = self.folder / FINGERPRINT
        if self.folder.exists() and not self.folder.is_dir():
            raise RrtcError(f"The teacher cache {self.folder} is a file.", "Name a folder.")
        if not file.exists():
            if self.folder.exists() and any(path.suffix != ".tmp" for path in self.folder.iterdir()):
                raise RrtcError(f"The folder {self.folder} is not empty and is no teacher cache.", "Name a new folder.")
            return
        try:
            found = read_json(file)
            differs = next((name for name, value in self.made_for.items() if found[name] != value), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RrtcError(f"The file {file} of the teacher cache cannot be read.", "Name a new folder.") from error
        if differs is not None:
            theirs, ours = (str(values[differs])[:12] for values in (found, self.made_for))
            raise RrtcError(
                f"The teacher cache {self.folder} was made for another {differs}: {theirs}, and this run's is {ours}.",
                "Name a new folder with --teacher-cache, or go back to what this one was made for.",
            )

    def begin(self) -> None:
        """Makes the folder into a cache, before the first segment is written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / FINGERPRINT
        if not file.exists():
            # Whoever else begins at this moment writes the same.
            temporary = file.with_name(f"{uuid.uuid4().hex}.tmp")
            temporary.write_text(json.dumps(self.made_for, indent=2) + "\n", encoding="utf8")
            temporary.replace(file)

    @property
    def windows(self) -> int:
        """How many it has lessons of."""
        return len(self._places)

    @property
    def bytes_per_token(self) -> float:
        """On disk."""
        return self._bytes / max(1, self._tokens)

    def refresh(self) -> None:
        """Takes in the segments that were written meanwhile, by this process or others."""
        for file in sorted(set(self.folder.glob("*.arrow")) - self._segments):
            try:
                with pyarrow.memory_map(str(file)) as stream:
                    rows = pyarrow.ipc.open_file(stream).get_batch(0)
                    rows.validate(full=True)
                    if not rows.schema.equals(SCHEMA):
                        raise _damaged(file)
                    keys = rows["key"].to_pylist()
                    self._tokens += sum(rows["tokens"].to_pylist())
            except DAMAGE as error:
                raise _damaged(file) from error
            self._places |= {key: (file, row) for row, key in enumerate(keys)}
            self._bytes += file.stat().st_size
            self._segments.add(file)

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    def holds(self, windows: Dataset) -> bool:
        """Whether it has the lessons of all `windows`, whose items are training inputs."""
        return all(key(given(windows[place])) in self for place in range(len(windows)))

    def read(self, name: bytes) -> Packed:
        """The lesson of the window with that key. Raises RrtcError where it is missing or damaged."""
        if name not in self._places:
            raise RrtcError(f"A window of this run is not in the teacher cache {self.folder}.")
        file, row = self._places[name]
        try:
            with pyarrow.memory_map(str(file)) as stream:
                rows = pyarrow.ipc.open_file(stream).get_batch(0)
                tokens, checksum = rows["tokens"][row].as_py(), rows["checksum"][row].as_py()
                lesson = rows["lesson"][row].as_py()
        except DAMAGE as error:
            raise _damaged(file) from error
        if _checksum(name, tokens, lesson) != checksum:
            raise _damaged(file)
        return self._decoded(lesson, tokens)

    def write(self, names: list[bytes], lessons: list[Packed]) -> None:
        """A segment of the lessons of the windows with these keys."""
        tokens = [len(tail) for _, _, tail in lessons]
        packed = [self._encoded(*lesson) for lesson in lessons]
        checksums = list(map(_checksum, names, tokens, packed))
        rows = {"key": names, "tokens": tokens, "checksum": checksums, "lesson": packed}
        with (
            whole_file(self.folder / f"{uuid.uuid4().hex}.arrow") as temporary,
            pyarrow.OSFile(str(temporary), "wb") as sink,
            pyarrow.ipc.new_file(sink, SCHEMA) as writer,
        ):
            writer.write_batch(pyarrow.record_batch(rows, schema=SCHEMA))

    def bytes_of(self, tokens: int) -> int:
        """Of the lessons of so many tokens, before they are compressed."""
        return tokens * (self.top * (2 + self._id_type().itemsize) + 4)

    def _encoded(self, highest: Tensor, ids: Tensor, tail: Tensor) -> bytes:
        # Falling negative numbers have rising bit patterns, with small gaps between them. All high bytes before all low
        # ones: together this compresses the probabilities to half of what zstd alone makes of them.
        gaps = numpy.diff(highest.cpu().numpy().view(numpy.uint16), axis=1, prepend=numpy.uint16(0))
        halves = numpy.ascontiguousarray(gaps.view(numpy.uint8).reshape(-1, 2).T)
        parts = halves, ids.cpu().numpy().astype(self._id_type), tail.cpu().numpy()
        return CODEC.compress(b"".join(part.tobytes() for part in parts), asbytes=True)

    def _decoded(self, lesson: bytes, tokens: int) -> Packed:
        raw = CODEC.decompress(lesson, self.bytes_of(tokens), asbytes=True)
        count = tokens * self.top
        halves = numpy.frombuffer(raw, numpy.uint8, 2 * count).reshape(2, count)
        gaps = numpy.ascontiguousarray(halves.T).view(numpy.uint16).reshape(tokens, self.top)
        highest = numpy.cumsum(gaps, axis=1, dtype=numpy.uint16).view(numpy.float16)
        ids = numpy.frombuffer(raw, self._id_type, count, 2 * count).reshape(tokens, self.top)
        tail = numpy.frombuffer(raw, numpy.float32, tokens, len(raw) - 4 * tokens).copy()
        return torch.from_numpy(highest), torch.from_numpy(ids.astype(numpy.int64)), torch.from_numpy(tail)


def fill(cache: TeacherCache, windows: Dataset, teacher: Path | None, dtype: torch.dtype, group: PartialState) -> dict:
    """Asks the dense model in the folder `teacher` about all of `windows`, training inputs, that `cache` does not hold;
    None where that is none. Every process of `group` calls this, and asks about its share.

    Returns `windows`, how many different ones there are, `reused`, how many of them were there already,
    `bytes_per_token` of the whole cache, and `seconds` that this took. Raises RrtcError where the disk does not take
    the lessons, or where not all processes write to the same one.
    """
    began = time.perf_counter()
    places = {key(given(windows[place])): place for place in reversed(range(len(windows)))}
    missing = sorted((place, name) for name, place in places.items() if name not in cache)
    if missing:
        context = len(given(windows[0])["input_ids"])
        check_space(cache.folder / FINGERPRINT, cache.bytes_of(len(missing) * context) // 2)  # if it compresses so well
        cache.begin()
        model = LiveTeacher(teacher, dtype, group.device, cache.made_for["temperature"], keep_states=False)
        with progress("Asking the teacher", len(missing)) as advance:
            mine = missing[group.process_index :: group.num_processes]
            for segment in _cut(mine, max(1, SEGMENT_TOKENS // context)):
                lessons: list[Packed] = []
                for batch in _cut(segment, max(1, TOKENS_AT_ONCE // context)):
                    lessons += _asked(model, given(default_collate([windows[place] for place, _ in batch])), cache)
                    advance(len(batch) * group.num_processes)
                cache.write([name for _, name in segment], lessons)
    group.wait_for_everyone()
    cache.refresh()
    if not all(name in cache for name in places):
        raise RrtcError(
            f"Not all processes write their part of the teacher cache into the same folder {cache.folder}.",
            "Name a folder on a disk that all machines share.",
        )
    return {
        "windows": len(places),
        "reused": len(places) - len(missing),
        "bytes_per_token": round(cache.bytes_per_token, 1),
        "seconds": round(time.perf_counter() - began, 1),
    }


def _cut(items: list, at_once: int) -> Iterator[list]:
    for start in range(0, len(items), at_once):
        yield items[start : start + at_once]


def _asked(model: LiveTeacher, inputs: dict[str, Tensor], cache: TeacherCache) -> list[Packed]:
    """What `model` says of each window in a batch of inputs (windows, context)."""
    shape = inputs["input_ids"].shape
    inputs = {name: value.to(model.model.device) for name, value in inputs.items()}
    lesson = model(inputs.pop("input_ids"), **inputs)
    places = chunks(shape.numel(), cache.made_for["vocabulary"], LOGITS_AT_ONCE)
    parts = [pack(lesson.about(part)(slice(None), None), cache.top) for part in places]
    columns = [torch.cat(column).cpu().unflatten(0, shape) for column in zip(*parts, strict=True)]
    return list(zip(*columns, strict=True))


class CachedTeacher:
    """Looks up what LiveTeacher would have to be run for."""

    def __init__(self, cache: TeacherCache):
        self.cache = cache

    def __call__(self, ids: Tensor, **kwargs: Tensor) -> "CachedLesson":
        """ids: (windows, context), integers. kwargs, such as position_ids, have the same first dimension."""
        batch = {name: value.cpu() for name, value in ({"input_ids": ids} | kwargs).items()}
        names = [key({name: value[window] for name, value in batch.items()}) for window in range(len(ids))]
        columns = zip(*map(self.cache.read, names), strict=True)
        return CachedLesson(*(torch.cat(column).to(ids.device) for column in columns))


class CachedLesson:
    """What a CachedTeacher says of one batch."""

    def __init__(self, highest: Tensor, ids: Tensor, tail: Tensor):
        """As `pack` returns them, for the tokens of all windows."""
        self._highest, self._ids, self._tail = highest, ids, tail

    def about(self, part: slice) -> Callable[[slice, Tensor], Tensor]:
        """See rrtc.uptrain.losses.Lesson."""
        lessons = self._highest[part], self._ids[part], self._tail[part, None]

        @torch.no_grad()
        def log_q(rows: slice, log_p: Tensor) -> Tensor:
            highest, ids, tail = (lesson[rows] for lesson in lessons)
            highest = highest.float()
            total = torch.cat([highest, tail], dim=1).logsumexp(-1, keepdim=True)  # 0 but for the rounding to float16
            found = log_p.scatter(1, ids, -torch.inf)
            found += tail - total - found.logsumexp(-1, keepdim=True)
            return found.scatter_(1, ids, highest - total)

        return log_q


def _checksum(name: bytes, tokens: int, lesson: bytes) -> int:
    return zlib.crc32(lesson, zlib.crc32(name + tokens.to_bytes(8, signed=True)))


def _damaged(file: Path) -> RrtcError:
    return RrtcError(f"The segment {file} of the teacher cache is damaged.", "Delete it: its windows are asked again.")
