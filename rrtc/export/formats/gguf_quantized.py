"""GGUF files in fewer bits, by llama.cpp's own quantizer, with what the calibration text says of each matrix's inputs.

llama.cpp rounds block by block, each by the error that its weights make; how much each input counts, its importance
matrix tells: the mean squares of what enters every matrix, which is gathered here from the dense form. Embeddings and
the output projection are rounded without one, as llama.cpp's own tool has it by default.

The file is scored in llama.cpp on text held out of the calibration: before, without the importance matrix, and with it.
"""

import importlib.util
import math
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from rrtc.console import note, progress
from rrtc.errors import RrtcError
from rrtc.export.verify import run_fresh
from rrtc.stock.architecture import decoder_layers
from rrtc.stock.parts import watching
from rrtc.text.windows import Windows

BY_IMPORTANCE = ("q6_k", "q5_k_m", "q4_k_m", "q3_k_m")  # q8_0 is rounded to the nearest
BLOCK = 256  # numbers in a row that a type of the K family rounds together
# Of the mean over all inputs of a matrix, which an input counts at least: where all of a block count nothing, such as
# those of FFN neurons that were removed, llama.cpp would divide by nothing.
LEAST = 1e-6
FAILED = "llama.cpp's quantizer failed: "
NOT_RUN = "The GGUF file was written, but llama.cpp cannot run it: "
HINT = "Update llama-cpp-python, or choose another --quantize."


def check_installed() -> None:
    """Raises RrtcError where llama-cpp-python is not."""
    if importlib.util.find_spec("llama_cpp") is None:
        raise RrtcError(
            "A GGUF file is quantized by llama.cpp, and llama-cpp-python is not installed.",
            "Install it with 'pip install rrtc[gguf]'.",
        )


def quantize_file(
    file: Path, target: Path, number: str, importance: dict[str, Tensor], held_out: Windows
) -> dict[str, float]:
    """Writes the GGUF `file` as `target`, in llama.cpp's type `number`, such as q4_k_m.

    importance: as `importance_of` gives it. Returns the bits per byte of llama.cpp on `held_out`: plain (of `file`),
    nearest (rounded without the importance) and calibrated (of `target`). Raises RrtcError where llama.cpp fails.
    """
    found = {"plain": _bits_per_byte(file, held_out)}
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="rounding-") as scratch:
        _quantize(file, target, number, None)
        found["nearest"] = found["calibrated"] = _bits_per_byte(target, held_out)
        if importance:
            save_file(importance, f"{scratch}/importance.safetensors")
            _quantize(file, target, number, f"{scratch}/importance.safetensors")
            found["calibrated"] = _bits_per_byte(target, held_out)
    return found


def _quantize(file: Path, target: Path, number: str, importance: str | None) -> None:
    note(f"Rounding to {number} in llama.cpp" + (", by what the text says" if importance else ""))
    job = {"file": str(file.absolute()), "target": str(target.absolute()), "type": number.upper()}
    run_fresh("quantize_gguf.py", job | {"importance": importance}, FAILED, HINT)


def _bits_per_byte(file: Path, windows: Windows) -> float:
    note(f"Scoring {windows.ids.numel():,} tokens in llama.cpp")
    job = {"file": str(file.absolute()), "windows": windows.ids.tolist()}
    loss = run_fresh("score_gguf.py", job, NOT_RUN, HINT)["loss"]
    return loss / math.log(2) / windows.bytes_per_token


def importance_of(model: nn.Module, file: Path, calibration: Tensor) -> dict[str, Tensor]:
    """For each matrix inside the decoder layers of the dense `model`, by its name in its GGUF `file`, the mean squares
    over all tokens of what enters it: (inputs,) float32.

    calibration: token ids (windows, context).
    """
    names = _names(model, file)
    sums: dict[nn.Module, Tensor] = {}

    def read(module: nn.Module, inputs: Tensor) -> None:
        squares = inputs.flatten(0, -2).double().square().sum(0)
        sums[module] = sums[module] + squares if module in sums else squares

    with (
        progress("Reading the calibration text", len(calibration)) as advance,
        watching(inputs={module: partial(read, module) for module in names.values()}),
        torch.inference_mode(),
    ):
        for ids in calibration:
            model(ids[None], use_cache=False, logits_to_keep=1)
            advance()
    means = {module: (total / calibration.numel()).float() for module, total in sums.items()}
    return {name: means[module].clamp(min=LEAST * means[module].mean()).cpu() for name, module in names.items()}


def _names(model: nn.Module, file: Path) -> dict[str, nn.Module]:
    """The modules with the matrices of the layers in the GGUF `file`, by their names there."""
    from gguf import MODEL_ARCH_NAMES, GGUFReader, get_tensor_name_map

    content = GGUFReader(file)
    called = content.fields["general.architecture"].contents()
    architecture = next(key for key, name in MODEL_ARCH_NAMES.items() if name == called)
    known = get_tensor_name_map(architecture, len(decoder_layers(model)))
    modules = {known.get_name(name): module for name, module in model.named_modules()}
    wanted = [t.name for t in content.tensors if t.name.startswith("blk.") and len(t.shape) == 2]
    missing = [name for name in wanted if modules.get(name.removesuffix(".weight")) is None]
    if missing:
        note(f"{len(missing)} matrices are rounded without an importance matrix, because llama.cpp has others there")
    return {name: modules[name.removesuffix(".weight")] for name in wanted if name not in missing}


def parts_of(file: Path) -> dict[str, dict[str, str | int]]:
    """Of what the GGUF `file` has, by what it is for (layers, tables, rest): llama.cpp's types, the most frequent
    first, and bytes."""
    from gguf import GGUFReader

    types: dict[str, Counter[str]] = {"layers": Counter(), "tables": Counter(), "rest": Counter()}
    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(file).tensors:
        inside = "layers" if tensor.name.startswith("blk.") else "tables"
        part = inside if len(tensor.shape) == 2 else "rest"
        types[part][tensor.tensor_type.name] += 1
        sizes[part] += int(tensor.n_bytes)
    return {
        part: {"number": ", ".join(kind for kind, _ in found.most_common()), "bytes": sizes[part]}
        for part, found in types.items()
        if found
    }


def say_what_fell_back(file: Path, number: str) -> None:
    """Says which matrices of the GGUF `file` are in a larger type than `number`, because of their width."""
    from gguf import GGUFReader

    matrices = [t for t in GGUFReader(file).tensors if len(t.shape) == 2]
    odd = [t.tensor_type.name for t in matrices if t.shape[0] % BLOCK]
    if "_k" in number and odd:
        note(
            f"llama.cpp rounds to {number} in rows of multiples of {BLOCK}, and {len(odd)} of {len(matrices)} matrices "
            f"have others: it wrote those in {' and '.join(sorted(set(odd)))}, which are larger"
        )
