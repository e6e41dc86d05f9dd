"""What a model costs to use: the memory it takes, and how fast it is beside the dense one.

Times on a machine that others share say nothing by themselves. Dense and compressed model take turns, so that what
slows one slows the other, and only their ratio is kept.
"""

import copy
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import quantiles

import torch

from rrtc.errors import RrtcError
from rrtc.text.windows import longest_context

PROMPT, NEW = 256, 32  # tokens that are read at once, and said one by one
CHUNK = 1024  # tokens of a long prompt that are read at once, to bound memory


@torch.inference_mode()
def speed(dense, model, rounds: int, advance: Callable[[], None] = lambda: None) -> dict:
    """The `speed` of rrtc/io/report.py, but for `long`: how fast `model` reads and says tokens, as a multiple of
    `dense`. advance is called after each of 1 + rounds rounds; the first one warms up and does not count."""
    context = longest_context(dense.config, PROMPT + NEW)
    prompt = context - NEW if context > 2 * NEW else context // 2
    new, ids = context - prompt, _prompt(dense, prompt)
    prefill, decode = _in_turn((dense, model), rounds, lambda one: _read_and_say(one, ids, new), advance)
    return {
        "device": dense.device.type, "rounds": rounds, "prompt_tokens": prompt, "new_tokens": new, "prefill": prefill,
        "decode": decode,
    }  # fmt: skip


@torch.inference_mode()
def speed_after(dense, model, rounds: int, context: int, advance: Callable[[], None] = lambda: None) -> dict | None:
    """The `long` of a `speed` of rrtc/io/report.py: the same for saying tokens at the end of a context of `context`
    tokens, or of as many as the models can see. None where that is no longer than what `speed` measures.

    Each model reads its prompt once. advance is called after that, and after each of 1 + rounds rounds.
    """
    prompt = longest_context(dense.config, context) - NEW
    if prompt <= PROMPT:
        return None
    ids, read = _prompt(dense, prompt), {}
    for one in (dense, model):
        read[id(one)] = _read(one, ids)
        advance()
    (decode,) = _in_turn((dense, model), rounds, lambda one: (_say(one, copy.deepcopy(read[id(one)]), NEW),), advance)
    return {"prompt_tokens": prompt, "new_tokens": NEW, "decode": decode}


def _prompt(dense, tokens: int) -> torch.Tensor:
    """Token ids (1, tokens), the same every time."""
    return (torch.arange(tokens, device=dense.device) * 7919 % dense.config.get_text_config().vocab_size)[None]


def _in_turn(pair: tuple, rounds: int, timed: Callable, advance: Callable[[], None]) -> list[dict]:
    """For each of the times that `timed` takes of a model: by how much those of the first of `pair` are longer than
    those of the second, {ratio, low, high}, the median and the quartiles of all rounds."""
    ratios = []
    for number in range(1 + rounds):
        # Who goes first changes, so that neither always finds the machine as the other left it.
        took = {id(one): timed(one) for one in (pair if number % 2 else pair[::-1])}
        if number:
            ratios.append([theirs / ours for theirs, ours in zip(*(took[id(one)] for one in pair), strict=True)])
        advance()
    found = []
    for values in map(list, zip(*ratios, strict=True)):
        low, middle, high = quantiles(values, n=4, method="inclusive") if rounds > 1 else values * 3
        found.append({"ratio": middle, "low": low, "high": high})
    return found


def _read_and_say(model, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """Seconds (to read `ids` (1, prompt), to say `new` tokens after them one by one, with the cache)."""
    began = _now(model)
    output = model(ids, use_cache=True, logits_to_keep=1)
    return _now(model) - began, _say(model, output, new)


def _read(model, ids: torch.Tensor):
    """The output of `model` for the last part of `ids` (1, prompt), with the cache of all of them."""
    cache = None
    for part in ids.split(CHUNK, 1):
        output = model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
    return output


def _say(model, output, new: int) -> float:
    """Seconds to say `new` tokens one by one after `output`."""
    began = _now(model)
    for _ in range(new):  # whatever the model says: an end of text does not stop it
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return _now(model) - began


def _now(model) -> float:
    if model.device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def peak_memory(folder: Path, dtype: torch.dtype) -> int | None:
    """Bytes at the peak of a fresh process that has loaded the model in `folder` in `dtype`, while it generates a few
    tokens: see footprint.py. None without an accelerator on systems that do not tell (other than Linux). Raises
    RrtcError where it fails."""
    if not torch.accelerator.is_available() and not Path("/proc/self/clear_refs").exists():
        return None
    # -P, and the path of this process: what lies in the user's current folder is not to be imported.
    command = [sys.executable, "-P", "-m", "rrtc.eval.footprint", str(folder), str(dtype).removeprefix("torch.")]
    alone = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    alone["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    child = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if child.returncode:
        said = child.stderr.strip().splitlines() if child.returncode > 0 else []  # a killed one says nothing of use
        reason = (said or [f"it ended with code {child.returncode}"])[-1][:300]
        raise RrtcError(f"The memory of {folder} could not be measured: {reason.rstrip('.')}.")
    return int(child.stdout.split()[-1])
