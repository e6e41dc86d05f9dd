"""Where rrtc keeps what it can make again, and the locks that keep two runs from writing the same folder."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """$RRTC_CACHE, or rrtc in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "rrtc"
    return Path(os.environ.get("RRTC_CACHE", default))
