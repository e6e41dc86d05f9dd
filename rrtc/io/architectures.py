"""What dense models are made of, remembered: to read it off a config takes torch and transformers, and seconds.

It is kept in rrtc's cache under a key of all that it depends on: the contents of config.json, the headers of the
weights files (names, shapes and dtypes of the tensors), the code that reads it, and the versions of rrtc and
transformers. Whether a head is the embedding depends on what the files hold, too: their places, sizes and times stand
for that. Nothing is kept of a model that was refused.
"""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter

import rrtc
from rrtc.architecture import Architecture
from rrtc.console import quiet_libraries
from rrtc.errors import RrtcError
from rrtc.io.cache import cache_folder
from rrtc.io.folder import whole_file
from rrtc.io.source import Source
from rrtc.io.weights import Weights

# Files of the package.
READ_BY = ("architecture.py", "io/dense.py", "model/eyes_rrt.py", "model/graft_rrt.py", "stock/architecture.py")


@dataclass(frozen=True)
class Dense:
    """A dense model: its architecture, and the dtype that its config names (None where it names none)."""

    architecture: Architecture
    dtype: str | None


def dense_of(source: Source) -> Dense:
    """What the model `source` is made of; its weights, where there are any, have the tensors that its config asks for.

    Imports neither torch nor transformers where the same was read before. Raises RrtcError as read_architecture and
    DenseModel do, and for weights files that are damaged or missing.
    """
    kind, file = TypeAdapter(Dense), cache_folder() / "architectures" / f"{_key(source)}.json"
    with suppress(OSError, ValueError):
        return kind.validate_json(file.read_bytes())
    found = read_dense(source)
    with suppress(OSError, RrtcError):  # nobody can write to the cache; that is no reason not to go on
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary:
            temporary.write_bytes(kind.dump_json(found))
    return found


def read_dense(source: Source) -> Dense:
    """As dense_of, from the model itself."""
    from rrtc.io.dense import DenseModel
    from rrtc.stock.architecture import read_architecture

    with quiet_libraries():
        config = DenseModel(source).config if has_weights(source) else source.config()
        architecture = read_architecture(config)
    dtype = getattr(config, "dtype", None)
    return Dense(architecture, dtype and str(dtype).removeprefix("torch."))


def has_weights(source: Source) -> bool:
    return any(source.folder.glob("*.safetensors"))


def _key(source: Source) -> str:
    """SHA-256 of all that the answer depends on."""
    code = [Path(rrtc.__file__).parent / file for file in READ_BY]
    parts = [rrtc.__version__.encode(), version("transformers").encode()]
    parts += [file.read_bytes() for file in [*code, source.folder / "config.json"]]
    if has_weights(source):
        for file in Weights(source.folder).files:
            with open(file, "rb") as stream:
                parts.append(stream.read(int.from_bytes(stream.read(8), "little")))
            found = file.stat()
            parts.append(f"{file.resolve()} {found.st_size} {found.st_mtime_ns}".encode("utf8", "surrogateescape"))
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()
