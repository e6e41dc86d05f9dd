"""Whatever happens to a file that rrtc reads, it is read, or refused with one sentence, within seconds. The same with
many more cases: benchmarks/fuzz.py."""

import itertools
import os
from dataclasses import replace

import pytest
from fuzzing import Kind, kinds, spoiled, try_case

LIGHT, HEAVY = 25, 4  # cases of a kind


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Kind]:
    return kinds(tmp_path_factory.mktemp("fuzz"))


def test_a_spoiled_file_is_read_or_refused(files):
    found = []
    for kind in files:
        for number in range(HEAVY if kind.heavy else LIGHT):
            outcome = try_case(kind, spoiled(kind, 0, number))
            if outcome.what == "fault":
                found.append(f"{kind.name}, case {number}: {outcome.error}")
    assert not found, os.linesep.join(found)


def test_whole_files_are_read(files):
    """So that what is refused above is refused for what was done to it."""
    refused = [k.name for k in files if try_case(k, k.file.read_bytes()).what != "read"]
    assert not refused


def test_what_is_neither_is_a_fault(files, monkeypatch):
    monkeypatch.setattr("fuzzing.SECONDS", 0.1)
    for read in (lambda: 1 / 0, lambda: [None for _ in itertools.count()], lambda: [].pop()):
        assert try_case(replace(files[0], read=read), b"").what == "fault"
    assert files[0].file.stat().st_size > 1000  # and the file is whole again


def test_a_case_is_the_same_for_the_same_seed(files):
    for kind in files:
        assert [spoiled(kind, 1, n) for n in range(3)] == [spoiled(kind, 1, n) for n in range(3)]
        assert len({spoiled(kind, 1, n) for n in range(20)}) > 10
