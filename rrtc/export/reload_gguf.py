"""Reads an exported GGUF file with transformers. A program of its own: rrtc cannot be imported in it.

    python -P reload_gguf.py JOB.json

JOB.json and what is written: as reload.py has them, without `trust_remote_code` and `hidden_difference`.
"""

import json
import sys
from pathlib import Path

sys.modules["rrtc"] = None  # "import rrtc" now fails, installed or not

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def main(job: dict) -> dict:
    file = next(Path(job["folder"]).glob("*.gguf")).name
    model, info = AutoModelForCausalLM.from_pretrained(
        job["folder"], gguf_file=file, dtype=torch.float32, output_loading_info=True
    )
    with torch.inference_mode():
        logits = model.eval()(torch.tensor(job["ids"]), use_cache=False).logits
    save_file({"logits": logits.float().contiguous()}, job["logits"])
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    return {
        "problems": [f"{kind.removesuffix('_keys')} {key}" for kind in kinds for key in sorted(map(str, info[kind]))],
        "token_ids": token_ids(job["folder"], file, job["text"]),
    }


def token_ids(folder: str, file: str, text: str) -> list[int] | None:
    """None where the file's tokenizer cannot be built: the converter guesses at those it does not know."""
    try:
        return AutoTokenizer.from_pretrained(folder, gguf_file=file)(text)["input_ids"]
    except Exception as error:  # tokenizers raises nothing more special
        print(f"The tokenizer cannot be built: {error}", file=sys.stderr)
        return None


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["report"]).write_text(json.dumps(main(job)))
