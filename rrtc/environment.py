"""What a bug report should say of where rrtc runs."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from rrtc import __version__, machine
from rrtc.io.cache import cache_folder
from rrtc.results import DeviceResult, EnvResult

PACKAGES = (
    "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface-hub", "numpy", "scipy", "pydantic",
    "typer", "rich", "gguf", "lm_eval", "compressed-tensors", "onnx", "onnxruntime", "llama-cpp-python", "vllm",
    "starlette", "uvicorn",
)  # fmt: skip


def describe_environment() -> EnvResult:
    import psutil

    return {
        "rrtc": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": _device(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "cache_folder": str(cache_folder()),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device() -> DeviceResult:
    import torch

    kind = machine.device().type
    if kind != "cuda":
        count = 1 if kind == "cpu" else torch.accelerator.device_count()
        return {"type": kind, "name": platform.processor() or platform.machine(), "count": count, "memory_bytes": None}
    found = torch.cuda.get_device_properties(0)
    return {
        "type": kind,
        "name": found.name,
        "count": torch.cuda.device_count(),
        "memory_bytes": found.total_memory,
    }
