"""Runs an exported ONNX folder as somebody without rrtc does. A program of its own: rrtc cannot be imported in it.

    python -P reload_onnx.py JOB.json

JOB.json: folder, ids (rows of token ids), text, prompt (token ids), new_tokens, and the files to write: `logits`,
safetensors with one tensor (rows, tokens, vocabulary), for `ids` given in pieces, so that all but the first piece need
the cache; and `report`, JSON with

    problems     the inputs and outputs that are not those of the config's number of layers
    token_ids    of the text
    greedy       the tokens that greedy generation with the cache adds to the prompt, `new_tokens` of them
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["rrtc"] = None  # "import rrtc" now fails, installed or not

import numpy
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoTokenizer

FIRST = 7  # tokens given at once; the others follow one by one


def main(job: dict) -> dict:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors alone
    (graph,) = Path(job["folder"], "onnx").glob("*.onnx")
    session = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
    ids, pieces, start, past = numpy.array(job["ids"]), [], 0, empty(session, len(job["ids"]))
    while start < ids.shape[1]:
        end = start + (FIRST if start == 0 else 1)
        logits, past = step(session, ids[:, start:end], start, past)
        pieces.append(logits)
        start = end
    save_file({"logits": numpy.concatenate(pieces, axis=1)}, job["logits"])
    tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    return {
        "problems": problems(session, AutoConfig.from_pretrained(job["folder"]).num_hidden_layers),
        "token_ids": tokenizer(job["text"])["input_ids"],
        "greedy": greedy(session, job["prompt"], job["new_tokens"]),
    }


def problems(session, layers: int) -> list[str]:
    """The inputs and outputs that transformers.js works out from a config of so many layers and the graph lacks, or the
    other way round."""
    entries = [f"{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]
    inputs = {"input_ids", "attention_mask", "position_ids", *(f"past_key_values.{entry}" for entry in entries)}
    outputs = {"logits", *(f"present.{entry}" for entry in entries)}
    differing = inputs ^ {value.name for value in session.get_inputs()}
    differing |= outputs ^ {value.name for value in session.get_outputs()}
    return [f"mismatched {name}" for name in sorted(differing)]


def empty(session, rows: int) -> dict:
    """A cache of no tokens for `rows` rows, by the names of the graph's inputs."""
    caches = [value for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    return {value.name: numpy.zeros((rows, value.shape[1], 0, value.shape[3]), numpy.float32) for value in caches}


def step(session, ids, start: int, past: dict) -> tuple:
    """(logits, longer cache) for `ids` (rows, tokens), which come after `start` tokens that are in the cache `past`."""
    rows, tokens = ids.shape
    given = {
        "input_ids": ids.astype(numpy.int64),
        "attention_mask": numpy.ones((rows, start + tokens), numpy.int64),
        "position_ids": numpy.tile(numpy.arange(start, start + tokens), (rows, 1)),
    }
    logits, *present = session.run(None, given | past)
    return logits, dict(zip(past, present, strict=True))


def greedy(session, prompt: list[int], new_tokens: int) -> list[int]:
    tokens, done, past = list(prompt), 0, empty(session, 1)
    for _ in range(new_tokens):
        logits, past = step(session, numpy.array([tokens[done:]]), done, past)
        done = len(tokens)
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["report"]).write_text(json.dumps(main(job)))
