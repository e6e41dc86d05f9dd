"""What a model costs to use: the memory it takes, and how fast it is beside the dense one.

Times on a machine that others share say nothing by themselves. Dense and compressed model take turns, so that what
slows one slows the other, and only their ratio is kept.
"""

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


@torch.inference_mode()
def speed(dense, model, rounds: int, advance: Callable[[], None] = lambda: None) -> dict:
    """The `speed` of rrtc/io/report.py: how fast `model` reads and says tokens, as a multiple of `dense`. advance is
    called after each of 1 + rounds rounds; the first one warms up and does not count."""
    context = longest_context(dense.config, PROMPT + NEW)
    prompt = context - NEW if context > 2 * NEW else context // 2
    new = context - prompt
    vocabulary = dense.config.get_text_config().vocab_size
    ids = (torch.arange(prompt, device=dense.device) * 7919 % vocabulary)[None]
    ratios: dict[str, list[float]] = {"prefill": [], "decode": []}
    for number in range(1 + rounds):
        # Who goes first changes, so that neither always finds the machine as the other left it.
        pair = (dense, model) if number % 2 else (model, dense)
        took = {id(one): _seconds(one, ids, new) for one in pair}
        if number:
            for what, theirs, ours in zip(ratios, took[id(dense)], took[id(model)], strict=True):
                ratios[what].append(theirs / ours)
        advance()
    found = {"device": dense.device.type, "rounds": rounds, "prompt_tokens": prompt, "new_tokens": new}
    for what, values in ratios.items():
        low, middle, high = quantiles(values, n=4, method="inclusive") if rounds > 1 else values * 3
        found[what] = {"ratio": middle, "low": low, "high": high}
    return found


def _seconds(model, ids: torch.Tensor, new: int) -> tuple[float, float]:
    """(to read `ids` (1, prompt), to say `new` tokens after them one by one, with the cache)."""
    began = _now(model)
    output = model(ids, use_cache=True, logits_to_keep=1)
    read = _now(model)
    for _ in range(new):  # whatever the model says: an end of text does not stop it
        token = output.logits[:, -1:].argmax(-1)
        output = model(token, past_key_values=output.past_key_values, use_cache=True)
    return read - began, _now(model) - read


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
