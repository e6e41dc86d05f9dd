"""`rrtc inspect`: what a folder that rrtc wrote is."""

from pathlib import Path

from rrtc.checkpoint import read_provenance
from rrtc.report import read_report
from rrtc.source import read_config
from rrtc.weights import Weights


def describe(folder: str) -> dict:
    """What rrtc.yaml says of `folder`, with the visits of its model and its size on disk where it holds a model.

    Raises RrtcError where rrtc did not write the folder, or where its weights are damaged.
    """
    path = Path(folder)
    description = {"folder": folder} | read_provenance(path)
    if (path / "config.json").exists():
        weights = Weights(path)
        description["dtype"] = weights.dtype
        description["bytes_on_disk"] = weights.bytes_on_disk
        description["visits"] = getattr(read_config(path), "visits", None)  # a dense export has none
    if description["stage"] == "eval":
        description["report"] = read_report(path)
    return description
