"""report.json, what `rrtc eval` writes and export, run and inspect read. Schema 1:

of             the folder that was measured: its stage, and when it was made
against        the dense model's URI
tokens         scored tokens of each text, by the text's name
table          a row a model, dense first: model, params_total, params_non_embedding, bytes, loss (nats per token),
               bits_per_byte, kl (nats per token, from the dense model) and top1_agreement (share from 0 to 1), both
               null for the dense model itself; and the same four scores for each text under texts. Where exits were
               trained, they have rows of their own after the model's ("exit after loop 1"; the sizes are the whole
               model's), and every row has layers_computed, a share from 0 to 1
source_bytes   the size of the file the dense model was read from, where that is a GGUF
samples        a continuation by each model: model, text
"""

import json
from pathlib import Path

from rrtc.errors import RrtcError

SCHEMA = 1
FILE = "report.json"


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
    if not all(key in report for key in ("of", "against", "tokens", "table", "source_bytes", "samples")):
        raise damaged
    return report
