"""Where rrtc keeps what it can make again, and the locks that keep two runs from writing the same folder."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from rrtc.errors import RrtcError


def cache_folder() -> Path:
    """$RRTC_CACHE, or rrtc in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rrtc"
    return Path(os.environ.get("RRTC_CACHE", default))


@contextmanager
def only_run(target: Path) -> Iterator[None]:
    """Keeps `target` from the other runs of this user on this machine until the block ends, or the process does.

    Raises RrtcError where one of them has it.
    """
    name = hashlib.sha256(str(Path(target).resolve()).encode()).hexdigest()[:32]
    file = cache_folder() / "locks" / f"{name}.lock"
    lock = FileLock(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise RrtcError(f"Another run is writing {target}.", "Wait for its end, or name another folder.") from error
    except OSError:
        pass  # nobody can write to the cache; that is no reason not to work
    try:
        yield
    finally:
        lock.release()
