"""Runs a GGUF file in llama.cpp, by llama-cpp-python alone. A program of its own: rrtc cannot be imported in it.

    python -P run_gguf.py JOB.json

JOB.json: file, ids (rows of token ids), text, prompt (token ids), new_tokens, and the files to write: `logits`,
safetensors with one tensor (rows, tokens, vocabulary) for `ids`, and `report`, JSON with

    version      of llama-cpp-python
    token_ids    of the text
    greedy       the tokens that greedy generation adds to the prompt, `new_tokens` of them
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["rrtc"] = None  # "import rrtc" now fails, installed or not

import numpy
from safetensors.numpy import save_file


def main(job: dict) -> dict:
    import llama_cpp

    longest = max(len(job["ids"][0]), len(job["prompt"]) + job["new_tokens"])
    model = llama_cpp.Llama(
        job["file"], n_ctx=longest, n_batch=longest, n_gpu_layers=0, logits_all=True, verbose=False, flash_attn=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,  # as transformers keeps them in float32
    )  # fmt: skip
    save_file({"logits": numpy.stack([evaluate(model, ids) for ids in job["ids"]])}, job["logits"])
    greedy, logits = [], evaluate(model, job["prompt"])
    while len(greedy) < job["new_tokens"]:
        greedy.append(int(logits[-1].argmax()))
        model.eval(greedy[-1:])
        logits = model.scores[: model.n_tokens]
    return {
        "version": llama_cpp.__version__,
        "token_ids": model.tokenize(job["text"].encode(), add_bos=True, special=True),
        "greedy": greedy,
    }


def evaluate(model, ids: list[int]):
    """The logits (tokens, vocabulary), float32, of `ids` from an empty cache on."""
    model.reset()
    model.eval(ids)
    return numpy.array(model.scores[: len(ids)], dtype="float32")


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["report"]).write_text(json.dumps(main(job)))
