"""report.json, what `rrtc eval` writes and export, run, inspect and the report's page read. Schema 2:

of             the folder that was measured: its stage, and when it was made; null where several are compared
against        the dense model's URI
made_with      versions (name: version), device, dtype (of the arithmetic), seed, resamples (of the bootstrap)
tokens         scored tokens of each text, by the text's name
models         a row a model, dense first, then the stages that the folder went through, the folder itself as the last
               of these, its exits, and the baselines of its size. A row has
                   model            its name: dense, after init, after uptrain, exit after loop 1, whitened SVD …
                   kind             dense, stage, exit or baseline
                   layers_computed  share from 0 to 1; in all rows where exits were trained, else in none
                   params_total, params_non_embedding, bytes (as stored; the dense model's in the same dtype),
                   parts            parameters by part: embeddings, head, shared, own, lora, low_rank, norms_and_biases
                   scores           loss (nats per token), bits_per_byte, calibration_error (share from 0 to 1: how far
                                    the probability of the most probable token is from how often it is right), kl
                                    (nats per token, from the dense model) and top1_agreement (share from 0 to 1), over
                                    all texts; the last two not for dense
                   texts            the same five by the text's name
                   by_position      loss over the tokens that have so many before them in their window: a list of
                                    {from, to (not included), and a score}
                   tasks            by name: {metric, items, and a score, a share from 0 to 1}
                   task_average     score: the mean over these tasks
                   passkey          a list of {length (tokens), depth (share from 0, the start, to 1), items, and a
                                    score: the share of keys that were found}
                   cost             kv_bytes_per_token, flops_per_token, peak_memory_bytes (of a process that has
                                    loaded the model in made_with's dtype, while it generates; or null)
               where the last four are in the rows for which they were measured
not_run        what was asked for and not measured: a list of {task, why}
layers         a dict a layer of the compressed model: layer, slot, loop, tied (whether others share the slot), ranks
               (by matrix; null where a matrix is full), residual (share of the energy of the hidden states after this
               layer that differs from the dense model's; null where that has other layers). [] where the folder holds
               a dense form, or several are compared
speed          null, or the compressed model's speed over the dense one's, measured in turn: device, rounds,
               prompt_tokens, new_tokens, and for each of prefill and decode {ratio, low, high} (median and quartiles)
training       the training curve of each stage that has one: stage, and points: [tokens, loss, kl or null]
source_bytes   the size of the file the dense model was read from, where that is a GGUF
samples        a continuation by each model: model, text

A score is {value, stderr, difference}: the bootstrap's standard error over the items (windows, questions, keys), null
for fewer than 8 items; and the difference from the dense model on the same items with its 95 % interval, {value, low,
high}, the latter two null for fewer than 8 items, all of it null for the dense model and for what is a comparison with
it already.
"""

import json
from pathlib import Path

from rrtc.errors import RrtcError

SCHEMA = 2
FILE = "report.json"
PAGE = "report.html"
KEYS = ("of", "against", "made_with", "tokens", "models", "not_run", "layers", "speed", "training", "source_bytes",
        "samples")  # fmt: skip


def write_report(folder: Path, report: dict) -> None:
    """Writes `report`, which has all of the schema, into `folder`."""
    (Path(folder) / FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def read_report(folder: Path) -> dict:
    """The report in an eval folder. Raises RrtcError where there is none, or one of another schema."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise RrtcError(f"There is no evaluation report {file}.", "Make one with 'rrtc eval FOLDER -o REPORT_DIR'.")
    damaged = RrtcError(f"The evaluation report {file} is damaged.", "Make a new one with 'rrtc eval'.")
    try:
        report = json.loads(file.read_text(encoding="utf8"))
    except ValueError as error:
        raise damaged from error
    if not isinstance(report, dict):
        raise damaged
    if report.get("schema") != SCHEMA:
        raise RrtcError(f"The evaluation report {file} is of another version than this rrtc reads.", damaged.hint)
    if not all(key in report for key in KEYS):
        raise damaged
    return report
