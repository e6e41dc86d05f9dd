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
                                    score: the share of keys that were found, from low to high (its 95 % interval, by
                                    Wilson)}
                   cost             kv_bytes_per_token (where nothing is let go of), kv_bytes (by the number of tokens
                                    in the context), flops_per_token, peak_memory_bytes (of a process that has loaded
                                    the model in made_with's dtype, while it generates; or null)
                   layers, speed    as below, of each model where several are compared
               where the last six are in the rows for which they were measured
not_run        what was asked for and not measured: a list of {task, why}
layers         a dict a layer of the compressed model: layer, slot, loop, tied (whether others share the slot), ranks
               (by matrix; null where a matrix is full), residual (share of the energy of the hidden states after this
               layer that differs from the dense model's; null where that has other layers), kv_heads (0: not known),
               window (of the dense model's layer; 0: none), attention (null where it attends to what that does, else
               window, sinks, heads and, if it has one, landmark, linear or owner, as in the plan). [] where the folder
               holds a dense form, or several are compared
speed          null, as where several are compared, or the compressed model's speed over the dense one's, measured in
               turn: device, rounds, prompt_tokens, new_tokens, and for each of prefill and decode {ratio, low, high}
               (median and quartiles); where visits see a window, also long: prompt_tokens, new_tokens and decode after
               a long prompt
engine         null, as where several are compared, or what `rrtc generate` could win: loops, right (share of what
               the model says itself about which the first exit is right; null without trained exits), rounds,
               prompt_tokens, new_tokens, thresholds: a list of {limit (nats a token that early exits may cost),
               threshold, growth (nats), left (share of the tokens)}, and ways: a list of {way, requests (at once),
               forecast (times full depth; or null), ratio, low, high (measured: times full depth, median, quartiles)}
training       the training curve of each stage that has one: stage, and points: [tokens, loss, kl or null]
source_bytes   the size of the file the dense model was read from, where that is a GGUF
samples        a continuation by each model: model, text
prompt         what the samples continue or answer (absent in reports of older versions)

A score is {value, stderr, difference}: the bootstrap's standard error over the items (windows, questions, keys), null
for fewer than 8 items; and the difference from the dense model on the same items with its 95 % interval, {value, low,
high}, the latter two null for fewer than 8 items, all of it null for the dense model and for what is a comparison with
it already.
"""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rrtc.errors import RrtcError
from rrtc.io.provenance import PROVENANCE
from rrtc.plain import read_json
from rrtc.plan import KV_CONTEXTS

SCHEMA = 2
FILE = "report.json"
PAGE = "report.html"


class _Part(BaseModel):
    model_config = ConfigDict(strict=True)


class _Difference(_Part):
    value: float
    low: float | None
    high: float | None


class _Score(_Part):
    value: float
    stderr: float | None
    difference: _Difference | None


class _Scores(_Part):
    model_config = ConfigDict(strict=True, extra="forbid")

    loss: _Score
    bits_per_byte: _Score
    calibration_error: _Score | None = None
    kl: _Score | None = None
    top1_agreement: _Score | None = None


class _Position(_Part):
    start: int = Field(alias="from")
    to: int
    loss: _Score


class _Task(_Score):
    metric: str
    items: int


class _Passkey(_Score):
    value: float = Field(ge=0, le=1)
    length: int
    depth: float
    items: int = Field(ge=1, le=10**12)
    low: float = 0.0  # reports of older versions have no interval
    high: float = 1.0


class _Cost(_Part):
    kv_bytes_per_token: int
    kv_bytes: dict[str, int] = {}  # reports of older versions have none
    flops_per_token: int
    peak_memory_bytes: int | None

    @field_validator("kv_bytes")
    @classmethod
    def _at_every_context(cls, value: dict[str, int]) -> dict[str, int]:
        if value and value.keys() != {str(context) for context in KV_CONTEXTS}:
            raise ValueError("the KV cache is not that of the usual contexts")
        return value


class _Row(_Part):
    model: str
    kind: str
    layers_computed: float = 1.0
    params_total: int
    params_non_embedding: int
    bytes: int
    parts: dict[str, int]
    scores: _Scores
    texts: dict[str, _Scores]
    by_position: list[_Position]
    tasks: dict[str, _Task] = {}
    task_average: _Score | None = None
    passkey: list[_Passkey] = []
    cost: _Cost | None = None
    layers: list[dict[str, Any]] = []
    speed: "_Speed | None" = None

    @model_validator(mode="after")
    def _has_what_goes_together(self) -> "_Row":
        if self.kind == "exit" and "layers_computed" not in self.model_fields_set:
            raise ValueError("an exit has no layers_computed")
        if ("tasks" in self.model_fields_set) != (self.task_average is not None):
            raise ValueError("tasks have no average")
        return self


class _Ratio(_Part):
    ratio: float
    low: float
    high: float


class _Decoding(_Part):
    prompt_tokens: int
    new_tokens: int
    decode: _Ratio


class _Speed(_Decoding):
    device: str
    rounds: int
    prefill: _Ratio
    long: _Decoding | None = None


class _Way(_Ratio):
    way: str
    requests: int
    forecast: float | None


class _Threshold(_Part):
    limit: float
    threshold: float
    growth: float
    left: float


class _Engine(_Part):
    loops: int
    right: float | None
    rounds: int
    prompt_tokens: int
    new_tokens: int
    thresholds: list[_Threshold]
    ways: list[_Way]


class _NotRun(_Part):
    task: str
    why: str


class _Of(_Part):
    stage: str
    made: str


class _Sample(_Part):
    model: str
    text: str


class _Report(_Part):
    of: _Of | None
    against: str
    made_with: dict[str, Any]
    tokens: dict[str, int]
    models: list[_Row]
    not_run: list[_NotRun]
    layers: list[dict[str, Any]]
    speed: _Speed | None
    engine: _Engine | None = None  # reports of older versions have none
    training: list[dict[str, Any]]
    source_bytes: int | None
    samples: list[_Sample]
    prompt: str | None = None  # reports of older versions have none

    @model_validator(mode="after")
    def _same_in_all_rows(self) -> "_Report":
        tasks = {frozenset(row.tasks) for row in self.models if "tasks" in row.model_fields_set}
        lengths = {frozenset(p.length for p in row.passkey) for row in self.models if "passkey" in row.model_fields_set}
        if len(tasks) > 1 or len(lengths) > 1:
            raise ValueError("the models were asked different things")
        return self


KEYS = tuple(_Report.model_fields)


def parts_by_model(report: dict, part: str) -> dict[str, Any]:
    """`layers` or `speed` of each compressed model for which there are any, by its name: of the one that was measured,
    or of several that were compared."""
    stages = [row for row in report["models"] if row["kind"] == "stage"]
    if report[part]:
        return {stages[-1]["model"] if stages else "": report[part]}
    return {row["model"]: row[part] for row in stages if row.get(part)}


def write_report(folder: Path, report: dict) -> None:
    """Writes `report`, which has all of the schema, into `folder`."""
    (Path(folder) / FILE).write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf8")


def is_report(folder: Path) -> bool:
    """Whether `folder` holds what `rrtc eval` writes into one, and nothing else."""
    return folder.is_dir() and {path.name for path in folder.iterdir()} <= {FILE, PAGE, PROVENANCE}


def read_report(folder: Path) -> dict:
    """The report in an eval folder. Raises RrtcError where there is none, one of another schema, or one that
    lacks something of it."""
    file = Path(folder) / FILE
    if not file.is_file():
        raise RrtcError(f"There is no evaluation report {file}.", "Make one with 'rrtc eval FOLDER -o REPORT_DIR'.")
    damaged = RrtcError(f"The evaluation report {file} is damaged.", "Make a new one with 'rrtc eval'.")
    try:
        report = read_json(file)
        if isinstance(report, dict) and report.get("schema") != SCHEMA:
            raise RrtcError(f"The evaluation report {file} is of another version than this rrtc reads.", damaged.hint)
        _Report.model_validate(report)
    except (OSError, ValueError) as error:
        raise damaged from error
    return report
