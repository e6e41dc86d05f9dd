"""In a narrow terminal no figure is lost and no word is broken: tables, progress, and the panel of a training."""

import io
import time

import pytest
from fuzzing import sample_report
from rich.console import Console

from rrtc import console
from rrtc.cli import scores, tables
from rrtc.cli.description import description
from rrtc.progress_line import Line, Phase, Work
from rrtc.uptrain.display import Display

ALTERNATIVES = [
    {"way": "tied in two loops", "flags": "--sharing middle_cycle", "made": True, "predicted_excess": 0.1499,
     "params_total": 93_600_000, "flops_per_token": 255_800_000, "exits": 1, "shared_params": 34_280_000},
    {"way": "tied in sequence", "flags": "--sharing middle_sequence", "made": False, "predicted_excess": 0.1281,
     "params_total": 93_600_000, "flops_per_token": 255_800_000, "exits": 0, "shared_params": 34_280_000},
]  # fmt: skip
KV = {2048: 47_190_000, 8192: 188_700_000, 32768: 755_000_000}
MADE = {
    "params_total": 93_635_904, "params_non_embedding": 65_324_352, "dense_params_total": 134_515_008,
    "dense_params_non_embedding": 106_203_456, "bytes": 187_271_808, "dense_bytes": 269_030_016,
    "bytes_on_disk": 188_320_384, "flops_per_token": 255_768_576, "dense_flops_per_token": 268_959_744,
    "source_bytes": 90_000_000, "kv_bytes": KV, "dense_kv_bytes": KV, "alternatives": ALTERNATIVES, "seconds": 100.0,
    "residual_energy_kept": {"self_attn.q_proj": 0.41, "mlp.down_proj": 0.28},
    "residual_energy_kept_by_layer": {0: 0.9, 1: 0.4, 2: 0.35, 3: 0.3},
    "loss": {"tokens": 4096, "dense": 3.5437, "after_init": 4.7199},
}  # fmt: skip
RECIPE = {"quantize": "none", "keep": 1, "sharing": "middle_cycle", "loops": 2, "size": 0.7, "budget": None}
PLAN = MADE | {
    "model": "MODEL", "dtype": "bfloat16", "visits": None, "params_by_part": None, "flops_per_token": None,
    "windows": None, "init_peak_bytes": 682_100_000, "recipe": RECIPE,
}  # fmt: skip
INSPECTED = {
    "folder": "small", "rrtc": "0.1.0", "stage": "init", "made": "2026-11-29T07:53:21+0000", "history": [],
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"}, "dtype": "bfloat16", "bytes_on_disk": 188_320_384,
    "base": {"uri": "MODEL", "bytes": 538_100_000, "sha256": "6b00051d8574"}, "kv_bytes": KV, "dense_kv_bytes": KV,
    "recipe": {"model": "MODEL", "init": RECIPE | {"calibrate_on": ["corpus.txt", "self"]}}, "measured": {"init": MADE},
}  # fmt: skip
UPTRAINED = {
    "tokens": 24_576, "seconds": 300.0, "first_loss": 4.1, "last_loss": 3.2, "first_kl": 0.7, "last_kl": 0.5,
    "first_exit_1_loss": 5.0, "last_exit_1_loss": 4.5, "temperature": 1.0, "exits": "joint",
}  # fmt: skip


def compared() -> dict:
    """A report with several texts, tasks and models."""
    report = sample_report()
    rows = report["models"]
    for row in rows:
        row["texts"]["another text"] = row["scores"]
        row["tasks"]["lambada_openai"] = row["tasks"]["piqa"]
    rows[1]["cost"]["kv_bytes"] = {context: kept // 5 for context, kept in rows[1]["cost"]["kv_bytes"].items()}
    report["samples"].append({"model": "after init", "text": "Hello again."})
    return report | {"prompt": "What do you say to a stranger?"}


SHOWN = {
    "init": lambda: tables.init(MADE, "small", RECIPE),
    "plan": lambda: tables.plan(PLAN),
    "inspect": lambda: description(INSPECTED),
    "eval": lambda: scores.report(compared()),
    "uptrain": lambda: tables.uptrain(UPTRAINED, "healed"),
}


def lines_of(shown, width: int) -> list[str]:
    paper = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    paper.print(shown)
    return paper.file.getvalue().splitlines()


def words(lines: list[str]) -> set[str]:
    return {word.strip(":;,") for line in lines for word in line.split() if set(word) - set("─━")}


@pytest.mark.parametrize("command", SHOWN)
@pytest.mark.parametrize("width", [100, 80, 50])
def test_every_word_and_figure_is_whole(command, width):
    wide, narrow = (lines_of(SHOWN[command](), columns) for columns in (400, width))
    assert max(map(len, narrow)) <= width
    assert words(wide) <= words(narrow)


def test_a_table_that_is_too_wide_is_a_list_of_records():
    made = console.table(
        "Scores", ["model", "bits per byte", "against the dense model"], [["a/b", "1.2", "+0.1 [0, 1]"]]
    )
    assert lines_of(made, 60)[1].split() == ["model", "bits", "per", "byte", "against", "the", "dense", "model"]
    assert [line.rstrip() for line in lines_of(made, 22)] == [
        "Scores", "model: a/b", "  bits per byte: 1.2", "  against the dense", "  model: +0.1 [0, 1]", ""
    ]  # fmt: skip


def test_lines_are_left_whole_in_a_pipe(capsys):
    console.note("word " * 60)
    assert len(capsys.readouterr().err.splitlines()) == 1


def line(width: int, amounts: bool, **phases: Phase) -> str:
    work = Work({name.replace("_", " "): phase for name, phase in phases.items()}, time.monotonic() - 100)
    shown = Line(work, amounts)
    shown.show(next(name for name, phase in work.phases.items() if phase.began is not None and not phase.over))
    (found,) = lines_of(shown, width)
    return found


@pytest.mark.parametrize("width", [200, 80, 50, 34])
def test_a_progress_line_keeps_its_figures(width):
    done = Phase(30.0, 10, 10, over=True, began=0.0)
    now = Phase(60.0, 240, 120, began=time.monotonic() - 60)
    shown = line(width, False, Calibrating=done, Trying_in_sequence=now, Tying_slots=Phase(10.0))
    assert len(shown.rstrip()) <= width and shown.startswith("2/3 T")
    # 60 of 100 are done in 100 s: the rest of this phase takes 60 s, the next one 10 at 100 s for 60.
    assert " 60% 0:01:40 left 0:01:17" in shown
    assert ("Trying in sequence" in shown) == (width >= 50) and ("━" in shown) == (width > 60)
    alone = line(width, True, **{"after uptrain: pass keys": Phase(1.0, 240, 60, began=time.monotonic() - 60)})
    assert "60/240 0:01:40 left 0:03:00" in alone and len(alone.rstrip()) <= width


def test_what_an_earlier_run_had_done_tells_nothing_of_the_speed():
    now = Phase(1.0, 100, 60, before=50, began=time.monotonic() - 100)
    assert " 60/100 0:01:40 left 0:06:40" in line(80, True, Calibrating=now)
    assert "50/100 0:01:40 left -:--:--" in line(80, True, Calibrating=Phase(1.0, 100, 50, before=50, began=1.0))


def test_one_line_goes_over_all_phases(monkeypatch):
    paper = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=60)
    monkeypatch.setattr(console, "notes", paper)
    with console.whole_progress({"first": 1.0, "second": 3.0}):
        for name in ("first", "second"):
            with console.progress(name, 4) as advance:
                advance()
                advance(3)
                paper.print(f"in {name}")
        with console.progress("another", 2) as advance:  # which nobody had named
            advance()
    shown = paper.file.getvalue()
    assert "1/2 first" in shown and "2/2 second" in shown and "100%" in shown
    assert shown.index("in first") < shown.index("2/2 second")
    assert console._phases is None


def test_the_panel_of_a_training_fits():
    paper = Console(width=50, file=io.StringIO(), force_terminal=True, color_system=None)
    with Display(1000, 4_100_000, paper) as display:
        display.losses, display.kls = [4.0, 3.5, 3.412], [1.0, 0.8, 0.712]
        lines = lines_of(display._panel(312, "1.28M of 4.1M tokens · 5.32k tokens/s · 8 min 50 s left", 3.1e-4), 50)
    assert max(map(len, lines)) <= 50
    assert words(lines) >= {"step", "312", "1000", "1.28M", "5.32k", "tokens/s", "left", "3.412", "0.712", "3.1e-04"}
