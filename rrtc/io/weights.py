"""Safetensors on disk: reading tensors one at a time, or in blocks of their rows, and writing them shard by shard."""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter

from rrtc.errors import RrtcError
from rrtc.io.cache import cache_folder
from rrtc.plain import from_json, read_json

# Numbers of a block. What is done to a block stays in a processor's cache, and in memory that the process has already:
# the pages of a larger tensor come from the kernel anew at every step, which takes longer than the arithmetic.
BLOCK_NUMBERS = 1 << 19
# The dtypes of safetensors as torch calls them, widest first.
DTYPES = {
    "F64": "float64", "I64": "int64", "F32": "float32", "I32": "int32", "BF16": "bfloat16", "F16": "float16",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
FLOATS = ("F64", "F32", "BF16", "F16")
_Size = Annotated[int, Field(strict=True, ge=0, lt=2**63)]
_METADATA = TypeAdapter(dict[str, str])


class Weights:
    """The tensors of a model folder, read one at a time from its safetensors files.

    Only headers are read until a tensor is asked for, which takes memory as long as someone holds it. Raises RrtcError
    for a folder without safetensors, a missing shard, or a file whose length does not match its header.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self.files = sorted({self.folder / name for name in self._file_names()})
        self._where: dict[str, Path] = {}
        self._headers: dict[str, dict] = {}
        self._data_starts: dict[Path, int] = {}
        self._states: dict[Path, tuple] = {}
        for file in self.files:
            header, self._data_starts[file], self._states[file] = _header(file)
            for name, entry in header.items():
                if name in self._where:
                    where = f"{self._where[name].name} and {file.name}"
                    raise RrtcError(f"The tensor {name} is in two files of {self.folder}: {where}.", "Keep one.")
                if name != "__metadata__":
                    self._where[name], self._headers[name] = file, entry
        if not self._where:
            raise RrtcError(f"There are no tensors in the weights files of {self.folder}.", "Download it again.")

    def _file_names(self) -> list[str]:
        """The files that transformers would load: of the two that a folder can have, the one that it looks for first,
        so that a folder which was saved into twice is the same model to both."""
        index = self.folder / "model.safetensors.index.json"
        if (self.folder / "model.safetensors").exists():
            return ["model.safetensors"]
        if index.exists():
            try:
                names = sorted(set(read_json(index)["weight_map"].values()))
                outside = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise RrtcError(f"The index {index} is damaged.", "Download the model again.") from error
            if outside:
                raise RrtcError(f"The index {index} points to {outside[0]}, which is no weights file in its folder.")
            missing = [name for name in names if not os.path.isfile(self.folder / name)]
            if missing:
                raise RrtcError(
                    f"The weights file {missing[0]} is missing from {self.folder}.", "Download the model again."
                )
            return names
        others = sorted(p.name for p in self.folder.glob("*.safetensors"))
        if any(re.search(r"-\d+-of-\d+", name) for name in others):
            raise RrtcError(f"{self.folder} holds shards but no model.safetensors.index.json.", "Download it again.")
        if others:
            raise RrtcError(
                f"{self.folder} holds {others[0]}, which transformers does not look for.",
                "Call the file with the model's weights model.safetensors.",
            )
        pickles = [*self.folder.glob("*.bin"), *self.folder.glob("*.pt")]
        if pickles:
            raise RrtcError(
                f"{self.folder} holds its weights as a pickle ({pickles[0].name}), which can run code when it is read.",
                "Convert it to safetensors first (transformers' save_pretrained writes them).",
            )
        hint = "Name the .gguf file itself." if any(self.folder.glob("*.gguf")) else ""
        if any(self.folder.rglob("*.onnx")):
            hint = "It holds an ONNX graph, which ONNX Runtime runs; its README.md says how."
        raise RrtcError(f"There are no weights in {self.folder} (no *.safetensors).", hint)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def bytes_on_disk(self) -> int:
        return sum(file.stat().st_size for file in self.files)

    @property
    def parameters(self) -> int:
        """How many numbers there are."""
        return sum(math.prod(self.shape(name)) for name in self)

    def format(self, name: str) -> str:
        """The dtype of the tensor `name` as safetensors calls it, such as BF16."""
        return self._headers[name]["dtype"]

    def shape(self, name: str) -> list[int]:
        return self._headers[name]["shape"]

    @property
    def dtype(self) -> str:
        """The dtype that most of the parameters are in, as torch calls it."""
        counts = {"BOOL": 0}
        for entry in (one for one in self._headers.values() if one["dtype"] != "BOOL"):  # masks are no parameters
            counts[entry["dtype"]] = counts.get(entry["dtype"], 0) + math.prod(entry["shape"])
        most = max(counts, key=counts.__getitem__)
        if most not in FLOATS:
            raise RrtcError(f"{self.folder} holds its weights as {most}, a quantized format.", "Use the 16-bit model.")
        return DTYPES[most]

    def read(self, name: str, rows: slice = slice(None)):
        """The tensor `name`, or some of its rows, in float32. Raises RrtcError where it holds NaN or infinity."""
        import torch

        tensor = self.raw(name)[rows].to(torch.float32)
        self._check_finite(name, tensor)
        return tensor

    def blocks(self, name: str, dtype=None, each: Callable = map) -> Iterator:
        """The tensor `name` in blocks of its rows, in `dtype`, or as it is stored where that is None. Raises RrtcError
        where it holds NaN or infinity. each: a `map` that may work ahead."""

        def read(rows: slice):
            if dtype is not None:
                return self.read(name, rows).to(dtype)
            block = self.raw(name)[rows]
            self._check_finite(name, block)
            return block

        return each(read, row_blocks(self.shape(name)))

    def _check_finite(self, name: str, tensor) -> None:
        if not all_finite(tensor):
            raise RrtcError(f"The tensor {name} in {self._where[name]} holds NaN or infinity.", "The file is damaged.")

    def hash_of(self, name: str) -> str:
        """SHA-256 of the header and the contents of the tensor `name`."""
        import torch

        header = [self._headers[name]["dtype"], self._headers[name]["shape"]]
        found = hashlib.sha256(json.dumps(header).encode())
        found.update(self.raw(name).flatten().view(torch.uint8).numpy())  # mapped, so that it takes no memory
        return found.hexdigest()

    def raw(self, name: str):
        """The tensor `name` as it is stored: a view of the file, mapped anew at every call; pages take memory once
        they are looked at. (safetensors maps the whole file, which fails where that is larger than memory.)"""
        import numpy
        import torch

        file, entry = self._where[name], self._headers[name]
        try:
            start, end = (self._data_starts[file] + offset for offset in entry["data_offsets"])
            dtype = getattr(torch, DTYPES[entry["dtype"]])
            if start == end:
                return torch.empty(entry["shape"], dtype=dtype)
            with open(file, "rb") as stream:
                if file_state(os.fstat(stream.fileno())) != self._states[file]:
                    raise RrtcError(f"{file} was changed while it was in use.", "Start again when it stays as it is.")
                stored = numpy.memmap(stream, numpy.uint8, "c", start, (end - start,))
            return torch.from_numpy(stored).view(dtype).view(entry["shape"])
        except (LookupError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise _damaged(file) from error


def row_blocks(shape: Sequence[int], first: int = 0) -> Iterator[slice]:
    """Slices of the rows of a tensor of that shape, each with about BLOCK_NUMBERS numbers. first: the number of the
    first row."""
    rows, *others = shape
    at_once = max(1, BLOCK_NUMBERS // max(1, math.prod(others)))
    for start in range(first, first + rows, at_once):
        yield slice(start, min(start + at_once, first + rows))


def all_finite(tensor) -> bool:
    """Whether there is neither NaN nor infinity in `tensor`. Unlike isfinite it makes no other tensor of that size."""
    return not tensor.numel() or all(bound.isfinite().item() for bound in tensor.aminmax())


def file_state(found: os.stat_result) -> tuple[int, ...]:
    """What tells a file from one that has taken its place, or from itself with other contents."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _header(file: Path) -> tuple[dict, int, tuple]:
    """(the header of a safetensors file: tensor name -> dtype, shape and data_offsets; where the data start; the state
    of the file). Checks the file's length."""
    with open(file, "rb") as stream:
        state = file_state(found := os.fstat(stream.fileno()))
        length = found.st_size
        header_length = int.from_bytes(stream.read(8), "little")
        if length < 8 or header_length > min(length - 8, 100_000_000):
            raise _damaged(file)
        try:
            header = from_json(stream.read(header_length).decode("utf8"))
            entries = [_Entry.model_validate(entry) for name, entry in header.items() if name != "__metadata__"]
            _METADATA.validate_python(header.get("__metadata__", {}))
        except (ValueError, AttributeError) as error:
            raise _damaged(file) from error
    end = 0  # tensors lie one behind the other: where two overlap or leave a hole, other readers refuse the file
    for entry in sorted(entries, key=lambda entry: entry.data_offsets):
        start, stop = entry.data_offsets
        if start != end or entry.bytes not in (None, stop - start):
            raise _damaged(file)
        end = stop
    if 8 + header_length + end != length:
        raise _damaged(file)
    return header, 8 + header_length, state


class _Entry(BaseModel):
    """What a header says of one tensor. data_offsets: where it begins and ends."""

    dtype: str = Field(strict=True)
    shape: list[_Size]
    data_offsets: tuple[_Size, _Size]

    @property
    def bytes(self) -> int | None:
        """How many bytes it has; None where its dtype is none of DTYPES."""
        if self.dtype not in DTYPES:
            return None
        bits = 8 if self.dtype == "BOOL" else int(self.dtype.strip("BFIU"))
        return math.prod(self.shape) * bits // 8


def _damaged(file: Path) -> RrtcError:
    return RrtcError(f"The weights file {file} is truncated or damaged.", "Download it again.")


def disk_error(path: Path, error: Exception) -> RrtcError:
    """What a failed write means to the user, who knows the folder that was asked for, but not rrtc's cache."""
    reason = getattr(error, "strerror", None) or str(error)
    if Path(path).is_relative_to(cache_folder()):
        hint = "Free some space, or have RRTC_CACHE name a folder on another disk."
        return RrtcError(f"Writing {path} failed: {reason}.", hint)
    return RrtcError(f"Writing {path.name} failed: {reason}.", "Free some space, or write to another disk.")


def missing_tensors(found: Mapping[str, Any]) -> str:
    """The tensors that were not there, for people: the first, and how many more. found: what transformers says of how
    it loaded a model."""
    first, *others = sorted(found["missing_keys"]) or [""]
    return first + (f" and {len(others)} more tensors" if others else "")
