"""`rrtc inspect`: what a folder that rrtc wrote is."""

from pathlib import Path

from rrtc.checkpoint import read_provenance
from rrtc.export.writing import weights_bytes
from rrtc.report import read_report
from rrtc.source import read_config
from rrtc.weights import Weights


def describe(folder: str) -> dict:
    """What rrtc.yaml says of `folder`, with the visits of its model, and its size on disk and its number formats where
    it holds a model.

    Raises RrtcError where rrtc did not write the folder, or where its weights are damaged.
    """
    path = Path(folder)
    description = {"folder": folder} | read_provenance(path)
    exported = description["measured"].get("export") if description["stage"] == "export" else None
    exported = exported if isinstance(exported, dict) else {}
    if exported.get("format") in ("onnx", "gguf"):  # whose weights are no safetensors
        description["dtype"] = exported.get("dtype")
        description["bytes_on_disk"] = weights_bytes(path, exported["format"])
    elif (path / "config.json").exists():
        weights = Weights(path)
        quantised = exported.get("quantize")  # and LoRA, norms and embeddings in the other format
        description["dtype"] = f"{quantised} and {exported.get('dtype')}" if quantised else weights.dtype
        description["bytes_on_disk"] = weights.bytes_on_disk
        description["visits"] = getattr(read_config(path), "visits", None)  # a dense export has none
    if description["stage"] == "eval":
        description["report"] = read_report(path)
    return description
