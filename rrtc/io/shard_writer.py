"""Writing safetensors shard by shard, holding no more than a block of one tensor."""

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

from rrtc.errors import RrtcError
from rrtc.io.weights import DTYPES, all_finite, disk_error
from rrtc.storage import HEADER_ROOM, LARGE_SHARD

COPIED_AT_ONCE = 16_000_000  # bytes


class ShardWriter:
    """Writes tensors into safetensors files with at most `max_bytes` of them each, holding no more than a block of one.

    `add` tensors in any order, then `finish`: files get their final names and, where there are several, an index. The
    header of a safetensors file comes first and lists all tensors, so room is left for it. A large shard keeps that
    room, filled up with spaces. A small one is copied, into the order in which safetensors itself writes; so is one
    whose header is larger, or where formats of several widths came in an order that does not keep them aligned.
    """

    def __init__(self, folder: Path, max_bytes: int):
        self.folder, self.max_bytes = Path(folder), max_bytes
        self._entries: dict[str, dict] = {}  # of the shard that is being written: its header
        self._end = 0  # of its data, in bytes
        self._shards: list[list[str]] = []
        self.total_bytes = 0

    def add(self, name: str, tensor) -> None:
        """Adds a tensor. Raises RrtcError where it holds NaN or infinity, and where the disk is full."""
        self.add_blocks(name, [tensor])

    def add_blocks(self, name: str, blocks: Iterable) -> None:
        """Adds a tensor in blocks of its rows, one after the other. Raises as `add` does."""
        file, size, shapes = self._file(), 0, []
        try:
            with open(file, "r+b" if self._entries else "w+b") as stream:
                stream.seek(HEADER_ROOM + self._end)
                for block in blocks:
                    dtype = str(block.dtype).removeprefix("torch.")
                    check_fits(name, block)
                    size += stream.write(block.contiguous().flatten().view(torch.uint8).numpy())
                    shapes.append(list(block.shape))
                if self._entries and self._end + size > self.max_bytes:
                    self._move_to_next(stream)
        except OSError as error:
            raise disk_error(file, error) from error
        shape = [sum(rows for rows, *_ in shapes), *shapes[0][1:]] if shapes[0] else []
        code = next(code for code, called in DTYPES.items() if called == dtype)
        offsets = [self._end, self._end + size]
        self._entries[name] = {"dtype": code, "shape": shape, "data_offsets": offsets}
        self._end += size
        self.total_bytes += size

    def _file(self) -> Path:
        return self.folder / f"shard-{len(self._shards)}.tmp"

    def _move_to_next(self, stream) -> None:
        """Ends this shard before the tensor that was written last, which begins the next one."""
        stream.seek(HEADER_ROOM + self._end)
        with open(self.folder / f"shard-{len(self._shards) + 1}.tmp", "wb") as following:
            following.seek(HEADER_ROOM)
            shutil.copyfileobj(stream, following, COPIED_AT_ONCE)
        stream.truncate(HEADER_ROOM + self._end)
        stream.flush()
        self._flush()

    def _flush(self) -> None:
        """Makes a shard of the tensors that wait."""
        formats, shard = list(DTYPES), self._file()
        in_place = _header_bytes(self._entries, HEADER_ROOM)
        is_aligned = all(
            entry["data_offsets"][0] % getattr(torch, DTYPES[entry["dtype"]]).itemsize == 0
            for entry in self._entries.values()
        )
        try:
            if self._end >= LARGE_SHARD and is_aligned and len(in_place) == HEADER_ROOM:
                with open(shard, "r+b") as stream:
                    stream.write(in_place)
            else:
                # Widest first, so that all are aligned.
                names = sorted(self._entries, key=lambda name: (formats.index(self._entries[name]["dtype"]), name))
                header, end, copied = {}, 0, shard.with_suffix(".copy")
                for name in names:
                    start, stop = self._entries[name]["data_offsets"]
                    header[name] = self._entries[name] | {"data_offsets": [end, end + stop - start]}
                    end += stop - start
                with open(shard, "rb") as stream, open(copied, "wb") as ordered:
                    ordered.write(_header_bytes(header))
                    for name in names:
                        start, stop = self._entries[name]["data_offsets"]
                        stream.seek(HEADER_ROOM + start)
                        for left in range(stop - start, 0, -COPIED_AT_ONCE):
                            ordered.write(stream.read(min(left, COPIED_AT_ONCE)))
                copied.replace(shard)
        except OSError as error:
            raise disk_error(shard, error) from error
        self._shards.append(list(self._entries))
        self._entries, self._end = {}, 0

    def finish(self) -> None:
        self._flush()
        total = len(self._shards)
        names = [
            "model.safetensors" if total == 1 else f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)
        ]
        for i, name in enumerate(names):
            (self.folder / f"shard-{i}.tmp").rename(self.folder / name)
        if total > 1:
            weight_map = {tensor: name for name, tensors in zip(names, self._shards, strict=True) for tensor in tensors}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _header_bytes(entries: dict[str, dict], room: int = 0) -> bytes:
    """The header of a safetensors file, its length first, with spaces up to `room` bytes or a multiple of 8."""
    text = json.dumps({"__metadata__": {"format": "pt"}} | entries, separators=(",", ":")).encode()  # for transformers
    text = text.ljust(max(room - 8, -(-len(text) // 8) * 8))
    return len(text).to_bytes(8, "little") + text


def check_fits(name: str, tensor) -> None:
    """Raises RrtcError where `tensor`, made from finite ones, is not finite: a number is too large for its format."""
    if not all_finite(tensor):
        format_name = str(tensor.dtype).removeprefix("torch.")
        raise RrtcError(f"The tensor {name} does not fit {format_name}.", "Choose bfloat16 or float32.")


@contextmanager
def map_ahead() -> Iterator[Callable]:
    """A `map` that works a few items ahead, in threads, while the caller writes what it has. Every thread works alone
    on its block: blocks are so small that threads which share one mostly wait for each other."""
    cores = torch.get_num_threads()  # one for each thread: the caller mostly waits for the disk
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(cores) as pool:

            def ahead(function: Callable, items: Iterable) -> Iterator:
                waiting: deque[Future] = deque()
                for item in items:
                    waiting.append(pool.submit(function, item))
                    if len(waiting) > cores:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()

            yield ahead
    finally:
        torch.set_num_threads(cores)
