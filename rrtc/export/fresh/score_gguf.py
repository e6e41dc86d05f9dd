"""Scores a GGUF file in llama.cpp, by llama-cpp-python alone. A program of its own: rrtc cannot be imported in it.

    python -P score_gguf.py JOB.json

JOB.json: file, windows (rows of token ids), and `report`, JSON with `loss`, the mean over all tokens of the windows but
the first of each, in nats, to write.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["rrtc"] = None  # "import rrtc" now fails, installed or not

import numpy


def main(job: dict) -> dict:
    import llama_cpp

    longest = len(job["windows"][0])
    model = llama_cpp.Llama(
        job["file"], n_ctx=longest, n_batch=longest, n_gpu_layers=0, logits_all=True, verbose=False, flash_attn=False,
    )  # fmt: skip
    losses = [loss(model, ids) for ids in job["windows"]]
    return {"loss": float(numpy.mean(losses))}


def loss(model, ids: list[int]) -> float:
    """The mean over `ids` but the first, in nats."""
    model.reset()
    model.eval(ids)
    logits = numpy.array(model.scores[: len(ids) - 1], dtype="float32")
    logits -= logits.max(-1, keepdims=True)
    log_sums = numpy.log(numpy.exp(logits).sum(-1, dtype="float64"))
    return float((log_sums - logits[numpy.arange(len(logits)), ids[1:]]).mean())


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["report"]).write_text(json.dumps(main(job)))
