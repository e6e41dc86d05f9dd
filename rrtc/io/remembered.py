"""Measurements that were made before: each is kept under a fingerprint of all that it depends on.

So an evaluation that was interrupted goes on where it stopped, a second one with other tasks measures only these, the
dense model is measured once for all models that are compared with it, and how sure an exit must be is found once. They
lie in $RRTC_CACHE/eval; who wants them made again deletes that folder.
"""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from numpy.typing import NDArray

import rrtc
from rrtc.console import warn
from rrtc.errors import RrtcError
from rrtc.io.cache import cache_folder
from rrtc.io.folder import whole_file
from rrtc.machine import from_first_process, is_first_process

# What a measurement is made by: with another line in one of these files, it is another measurement.
CODE = ("eval", "generate", "model", "stock", "scoring.py")

Measurement = dict[str, NDArray]  # figures of single items by what they are


def remembered(made_from: dict, measure: Callable[[], Measurement]) -> tuple[Measurement, bool]:
    """What `measure` returns, and whether it was there before and did not have to run.

    made_from: plain data that the measurement depends on, beside the code that makes it. Of several processes the first
    one reads and writes, and all of them call `measure` or none does. What is damaged is measured again.
    """
    from safetensors.numpy import save_file

    key = hashlib.sha256(json.dumps({"code": _code(), **made_from}, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "eval" / f"{key}.safetensors"
    found = from_first_process(_read(file) if is_first_process else None)
    if found is not None:
        return found, True
    made = measure()
    if is_first_process:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as temporary:
                save_file(made, temporary, {"sha256": _sha256(made)})
        except (OSError, RrtcError):  # a full or a foreign disk is no reason to lose what was measured
            _warn_once(f"Measurements cannot be kept in {file.parent}: another evaluation will make them again.")
    return made, False


def _read(file: Path) -> Measurement | None:
    """The measurement in `file`; None where there is none, or where it is not as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "numpy") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - no dictionary
            return found if tensors.metadata().get("sha256") == _sha256(found) else None
    except (OSError, SafetensorError, AttributeError):
        return None


def _sha256(made: Measurement) -> str:
    digest = hashlib.sha256()
    for name in sorted(made):
        digest.update(f"{name} {made[name].dtype} {made[name].shape} ".encode() + made[name].tobytes())
    return digest.hexdigest()


@functools.cache
def _code() -> str:
    """SHA-256 of the files that make measurements."""
    root, digest = Path(rrtc.__file__).parent, hashlib.sha256()
    for name in CODE:
        for file in sorted((root / name).rglob("*.py")) or [root / name]:
            digest.update(file.read_bytes())
    return digest.hexdigest()


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)
