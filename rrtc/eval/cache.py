"""Measurements that were made before: each is kept under a fingerprint of all that it depends on.

So an evaluation that was interrupted goes on where it stopped, a second one with other tasks measures only these, and
the dense model is measured once for all models that are compared with it. They lie in $RRTC_CACHE/eval; who wants them
made again deletes that folder.
"""

import functools
import hashlib
import json
from collections.abc import Callable

from numpy.typing import NDArray

from rrtc.console import warn
from rrtc.errors import RrtcError
from rrtc.io.cache import cache_folder
from rrtc.io.folder import whole_file
from rrtc.machine import from_first_process, is_first_process

VERSION = 2  # of what is measured and how; old measurements are not found under another

Measurement = dict[str, NDArray]  # figures of single items by what they are


def remembered(made_from: dict, measure: Callable[[], Measurement]) -> tuple[Measurement, bool]:
    """What `measure` returns, and whether it was there before and did not have to run.

    made_from: plain data that the measurement depends on. Of several processes the first one reads and writes, and all
    of them call `measure` or none does.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file, save_file

    key = hashlib.sha256(json.dumps({"version": VERSION, **made_from}, sort_keys=True).encode()).hexdigest()
    file = cache_folder() / "eval" / f"{key}.safetensors"
    found = None
    if is_first_process and file.exists():
        try:
            found = load_file(file)
        except (OSError, SafetensorError):  # damaged: measured again
            found = None
    found = from_first_process(found)
    if found is not None:
        return found, True
    made = measure()
    if is_first_process:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file) as temporary:
                save_file(made, temporary)
        except (OSError, RrtcError):  # a full or a foreign disk is no reason to lose what was measured
            _warn_once(f"Measurements cannot be kept in {file.parent}: another evaluation will make them again.")
    return made, False


@functools.cache
def _warn_once(text: str) -> None:
    warn(text)
