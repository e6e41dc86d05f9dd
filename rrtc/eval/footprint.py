"""The memory that a model takes where it is used. A program of its own, so that nothing else is counted with it.

    python -m rrtc.eval.footprint FOLDER DTYPE

loads the model in that dtype, generates a few tokens, and prints the peak meanwhile in bytes: of the
accelerator's memory where there is one, else of this process's resident size. Loading does not count: for a file in
another dtype it takes more, and how much depends on the file and not on the model. It imports no more than a user of
the model would, because modules are resident, too.
"""

import gc
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import rrtc.model  # noqa: F401 - registers the recursive model

PROMPT, NEW = 24, 8  # tokens


def main(folder: str, dtype: str) -> int:
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    safe = {"use_safetensors": True, "trust_remote_code": False, "return_dict": True}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **safe)
    model.to(accelerator or "cpu").eval()
    gc.collect()
    reset_peak(accelerator)
    ids = (torch.arange(PROMPT, device=model.device) % model.config.get_text_config().vocab_size)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False,
                   pad_token_id=0)  # fmt: skip
    return peak(accelerator)


def reset_peak(accelerator) -> None:
    if accelerator is not None:
        torch.accelerator.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # see proc(5)


def peak(accelerator) -> int:
    if accelerator is not None:
        return torch.accelerator.max_memory_allocated()
    # Not getrusage's ru_maxrss: that of a child process begins with its parent's.
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
