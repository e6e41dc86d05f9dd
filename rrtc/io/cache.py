"""Where rrtc keeps what it can make again."""

import os
from pathlib import Path

from rrtc.errors import RrtcError


def cache_folder() -> Path:
    """$RRTC_CACHE, or rrtc in the user's cache folder. Raises RrtcError where this user has none."""
    if named := os.environ.get("RRTC_CACHE"):
        return Path(named).expanduser()
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "rrtc"
    try:
        return Path.home() / ".cache" / "rrtc"
    except RuntimeError as error:  # no HOME, and a user that is in no list: a container, a service
        raise RrtcError("This user has no home folder for rrtc's cache.", "Set RRTC_CACHE to a folder.") from error
