"""report.json as it is read: with all that whoever reads it goes by, or refused at once."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from fuzzing import sample_report

from rrtc.errors import RrtcError
from rrtc.io.report import read_report

MAY_BE_ABSENT = {"layers_computed", "kl", "top1_agreement", "calibration_error", "passkey", "cost", "texts"}


def every_key(value: Any) -> Iterator[tuple[dict, str]]:
    """(a dictionary in a report, a key of it that the schema names)."""
    for key, inside in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        if isinstance(value, dict) and key not in MAY_BE_ABSENT:
            yield value, key
        if key not in ("made_with", "layers", "training"):  # which are shown as they are
            yield from every_key(inside)


@pytest.fixture
def write(tmp_path):
    def write(report: Any) -> None:
        (tmp_path / "report.json").write_text(report if isinstance(report, str) else json.dumps(report))

    return write


def test_a_whole_report_is_read(tmp_path, write):
    write(sample_report())
    assert read_report(tmp_path) == sample_report()


def test_a_report_of_an_older_version_is_read(tmp_path, write):
    report = sample_report()
    for row in report["models"]:
        del row["cost"]["kv_bytes"], row["passkey"][0]["low"], row["passkey"][0]["high"]
    del report["speed"]["long"], report["prompt"]
    write(report)
    assert read_report(tmp_path) == report


def test_a_value_of_another_kind_anywhere_is_damage(tmp_path, write):
    report = sample_report()
    places = [(inside, key) for inside, key in every_key(report) if key != "schema"]
    assert len(places) > 100
    for inside, key in places:
        before, inside[key] = inside[key], [[]]
        write(report)
        with pytest.raises(RrtcError, match="report.json is damaged"):
            read_report(tmp_path)
        inside[key] = before


@pytest.mark.parametrize("text", ["", "[]", "5", "[" * 100_000, '{"schema": 2}', '{"schema": 2, "models": []}'])
def test_what_is_no_report_is_damage(text, tmp_path, write):
    write(text)
    with pytest.raises(RrtcError, match="report.json is damaged"):
        read_report(tmp_path)


def test_rows_that_do_not_go_together_are_damage(tmp_path, write):
    for spoil in (
        lambda rows: rows[1]["tasks"].update(other=rows[1]["tasks"].pop("piqa")),
        lambda rows: rows[1].pop("task_average"),
        lambda rows: rows[1].update(passkey=[]),
        lambda rows: rows[1]["passkey"][0].update(length=512),
        lambda rows: rows[2].pop("layers_computed"),
        lambda rows: rows[1]["scores"].update(other=rows[1]["scores"]["loss"]),
        lambda rows: rows[1].pop("scores"),
        lambda rows: rows[1]["cost"]["kv_bytes"].pop("8192"),
        lambda rows: rows[1]["passkey"][0].update(items=0),
        lambda rows: rows[1]["passkey"][0].update(value=1.5),
    ):
        report = sample_report()
        spoil(report["models"])
        write(report)
        with pytest.raises(RrtcError, match="report.json is damaged"):
            read_report(tmp_path)
