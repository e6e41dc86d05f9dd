"""Model folders: whole or not there, and where they came from."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pico import save_pico

from rrtc import __version__, api
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.cache import cache_folder
from rrtc.io.folder import (
    MARK,
    check_space,
    check_target,
    copy_companions,
    only_run,
    partial_of,
    whole_file,
    whole_folder,
)
from rrtc.io.provenance import (
    PROVENANCE,
    base_seen_from,
    earlier_stages,
    next_history,
    read_provenance,
    without_places,
    write_provenance,
)
from rrtc.units import parse_size


def test_no_places_are_told():
    told = {"on": ["/home/me/a.txt", "b/c.txt", 3], "/home/me/a.txt": 1, "/home/you/a.txt": {"at": None}}
    assert without_places(told | {"in": ["../acme/pay.txt", "~/pay.txt", "a/b/c.txt"]})["in"] == ["pay.txt"] * 2 + [
        "c.txt"
    ]
    said = ["1/2 or 3/4 and / or", "https://a/b/c", "package://a/b/c", "user/model", "no path"]
    assert without_places(said) == said
    assert without_places(told) == {"on": ["a.txt", "b/c.txt", 3], "a.txt": 1, "a.txt (2)": {"at": None}}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9), ("500MB", 5 * 10**8), ("1.5gb", 15 * 10**8), (" 20 KB ", 20_000), ("2T", 2 * 10**12),
        ("100", 100), ("100B", 100),
    ],
)  # fmt: skip
def test_sizes_are_decimal(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0.4", "GB", "four", "-4GB", "4GBB", "4 G B", "4,5GB", "4GiB", "1e9"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(WrongUsage) as error:
        parse_size(text)
    assert error.value.sentence == f"'{text}' is not a size." and "4GB" in error.value.hint


# Whole folders


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_gets_its_name_when_it_is_whole(tmp_path):
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as folder:
        assert folder == partial_of(target) == tmp_path / "deep" / "out.partial"
        (folder / "file").write_text("done")
        assert not target.exists()
    assert listing(tmp_path) == ["deep", "deep/out", "deep/out/file"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), RrtcError("No."), FileNotFoundError(2, "x")])
def test_after_any_error_nothing_is_left(tmp_path, error):
    with pytest.raises(type(error)) as raised, whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("half")
        raise error
    assert raised.value is error
    assert listing(tmp_path) == []


def test_a_run_that_can_be_resumed_keeps_its_partial_folder_and_finds_it_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", keep_partial=True) as folder:
        (folder / "checkpoint").write_text("half")
        raise KeyboardInterrupt
    assert listing(tmp_path) == ["out.partial", f"out.partial/{MARK}", "out.partial/checkpoint"]
    with whole_folder(tmp_path / "out", keep_partial=True) as folder:
        assert (folder / "checkpoint").read_text() == "half"
    assert listing(tmp_path) == ["out", "out/checkpoint"]


def test_a_link_is_no_output(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RrtcError, match="The output .*out is a link"), whole_folder(tmp_path / "out"):
        raise AssertionError("the work must not begin")
    assert listing(tmp_path) == ["elsewhere", "out"]


def test_a_killed_runs_leftovers_are_cleared_by_the_next(tmp_path):
    for mark in (MARK, "work/started.json", "checkpoints/started.json"):
        (tmp_path / "out.partial" / mark).parent.mkdir(parents=True)
        (tmp_path / "out.partial" / mark).touch()
        (tmp_path / "out.partial" / "stale").write_text("from before")
        check_target(tmp_path / "out")
        shutil.rmtree(tmp_path / "out.partial")
    (tmp_path / "out.partial").mkdir()  # and one that was killed before all
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert listing(tmp_path) == ["out", "out/file"]
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out.partial" / "deep").mkdir(parents=True)
    (tmp_path / "out.partial" / MARK).touch()
    (tmp_path / "out.partial" / "deep" / "stale").write_text("from before")
    with whole_folder(tmp_path / "out") as folder:
        assert listing(folder) == [MARK]


def test_what_rrtc_did_not_make_is_never_removed(tmp_path):
    """Not even where it has the name under which an output is built; the model itself may have it."""
    dense = save_pico(tmp_path / "model.partial")
    (tmp_path / "small.partial").write_text("mine")
    (tmp_path / "link.partial").symlink_to(dense)
    before = listing(tmp_path)
    for name in ("model", "small", "link"):
        with pytest.raises(RrtcError, match="is in the way: .* rrtc did not make what is there"):
            api.init(dense, tmp_path / name, rank=4)
        with pytest.raises(RrtcError, match="is in the way"), whole_folder(tmp_path / name):
            raise AssertionError("the work must not begin")
    assert listing(tmp_path) == before and (tmp_path / "small.partial").read_text() == "mine"


HOLD = """
import sys
from pathlib import Path
from rrtc.io.folder import whole_folder
with whole_folder(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("theirs")
    print("there", flush=True)
    sys.stdin.read()
"""


@pytest.mark.slow
def test_two_runs_cannot_write_the_same_folder_and_a_killed_one_is_not_in_the_way(tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert run.stdout.readline() == "there\n"
    for target in (tmp_path / "out", tmp_path / "." / "out"):
        with pytest.raises(RrtcError) as refused, whole_folder(target):
            raise AssertionError("the work must not begin")
        assert refused.value.sentence == f"Another run is writing {target}."
    assert (tmp_path / "out.partial" / "file").read_text() == "theirs"
    with whole_folder(tmp_path / "another"):
        pass
    run.kill()
    run.communicate()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "mine").write_text("mine")
    assert listing(tmp_path) == ["another", "out", "out/mine"]


def test_a_run_that_can_be_resumed_is_held_by_its_stage(tmp_path):
    with only_run(tmp_path / "out"), whole_folder(tmp_path / "out", keep_partial=True):
        pass
    assert listing(tmp_path) == ["out"]


def test_a_cache_that_cannot_be_written_to_is_no_reason_to_refuse(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "file"))
    assert cache_folder() == tmp_path / "file"
    with whole_folder(tmp_path / "out"):
        pass
    assert listing(tmp_path) == ["file", "out"]


def test_an_empty_target_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("done")
    assert listing(tmp_path) == ["out", "out/file"]


def test_a_target_that_is_not_empty_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(RrtcError) as error, whole_folder(tmp_path / "out"):
        raise AssertionError("the work must not begin")
    assert error.value.sentence == f"The output folder {tmp_path / 'out'} is not empty."
    assert "overwrites nothing" in error.value.hint
    assert listing(tmp_path) == ["out", "out/mine"]


def test_a_target_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RrtcError, match="The output .*file is a file."):
        check_target(tmp_path / "file")
    with pytest.raises(RrtcError, match="cannot be made: .*file is a file."):
        check_target(tmp_path / "file" / "out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_place_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(RrtcError, match="is read-only"):
        check_target(tmp_path / "out")


def test_too_little_space_is_found_before_the_work(tmp_path):
    check_space(tmp_path / "deep" / "out", 1000)
    with pytest.raises(RrtcError, match=r"This needs 1000000000.0 GB, but only [\d.]+ GB are free on the disk of"):
        check_space(tmp_path / "deep" / "out", 10**18)


WRITE_A_LOT = """
import resource, sys, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from pathlib import Path
from rrtc.io.folder import whole_folder
from rrtc.io.shard_writer import ShardWriter
from rrtc.errors import RrtcError
try:
    with whole_folder(Path(sys.argv[1])) as folder:
        if sys.argv[2] == "tensors":
            writer = ShardWriter(folder, 10**9)
            writer.add("big", torch.ones(100_000))
            writer.finish()
        else:
            (folder / "big.txt").write_text("x" * 100_000)
except RrtcError as error:
    print(error.sentence, "|", error.hint)
"""


@pytest.mark.slow
@pytest.mark.parametrize("what", ["tensors", "text"])
def test_a_full_disk_is_one_clear_sentence_and_leaves_nothing(tmp_path, what):
    command = [sys.executable, "-c", WRITE_A_LOT, str(tmp_path / "out"), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sentence, hint = done.stdout.strip().split(" | ")
    assert sentence.startswith("Writing ") and "File too large" in sentence and sentence.count(". ") == 0
    assert hint == "Free some space, or write to another disk."
    assert listing(tmp_path) == []


def test_a_file_that_two_write_at_once_is_that_of_the_last_one_and_whole(tmp_path):
    file = tmp_path / "file"
    with whole_file(file) as one:
        one.write_text("one")
        with whole_file(file) as other:
            other.write_text("other")
        assert file.read_text() == "other"
    assert file.read_text() == "one" and listing(tmp_path) == ["file"]
    with pytest.raises(KeyboardInterrupt), whole_file(file) as third:
        third.write_text("th")
        raise KeyboardInterrupt
    assert file.read_text() == "one" and listing(tmp_path) == ["file"]


# What goes along


def test_tokenizer_generation_defaults_and_license_go_along_and_weights_do_not(tmp_path):
    source, target = save_pico(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    for name in ("LICENSE.txt", "NOTICE", "chat_template.jinja", "README.md", "training_args.bin"):
        (source / name).write_text(name)
    (source / "tokenizer_folder").mkdir()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    copy_companions(source, target)
    assert listing(target) == [
        "LICENSE.txt", "NOTICE", "additional_chat_templates", "additional_chat_templates/tool_use.jinja",
        "chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


BASE = {"uri": "some/model", "path": "/models/dense", "relative_path": "../dense", "sha256": "0", "bytes": 1}


def test_provenance_says_what_was_done_with_what(tmp_path):
    with whole_folder(tmp_path / "out") as folder:
        written = write_provenance(folder, "init", BASE, {"rank": 3}, {"loss": 1.5}, [])
    said = read_provenance(tmp_path / "out")
    assert said == written == yaml.safe_load((tmp_path / "out" / PROVENANCE).read_text())
    assert said["rrtc"] == __version__ and said["stage"] == "init" and said["base"] == BASE
    assert said["path"] == str(tmp_path / "out")
    assert said["versions"] == {"torch": str(torch.__version__), "transformers": __import__("transformers").__version__}
    assert next_history(said) == [{"stage": "init", "path": str(tmp_path / "out"), "made": said["made"]}]


def test_earlier_stages_are_found_also_when_all_folders_moved_together(tmp_path):
    first, second = tmp_path / "runs" / "init", tmp_path / "runs" / "uptrain"
    with whole_folder(first) as folder:
        said = write_provenance(folder, "init", BASE, {}, {}, [])
    with whole_folder(second) as folder:
        write_provenance(folder, "uptrain", BASE, {}, {}, next_history(said))
    assert earlier_stages(second) == [("init", first)]
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert earlier_stages(tmp_path / "moved" / "uptrain") == [("init", tmp_path / "moved" / "init")]
    (tmp_path / "moved" / "init" / PROVENANCE).unlink()
    assert earlier_stages(tmp_path / "moved" / "uptrain") == []


def test_a_base_is_seen_from_the_next_folder(tmp_path):
    base, folder = tmp_path / "models" / "dense", tmp_path / "runs" / "init"
    base.mkdir(parents=True)
    said = {"base": BASE | {"path": "/gone", "relative_path": "../../models/dense"}}
    seen = base_seen_from(tmp_path / "elsewhere" / "deep" / "out", folder, said)
    assert seen == BASE | {"path": str(base), "relative_path": "../../../models/dense"}


@pytest.mark.parametrize("content", ["", "stage: init", "[1]", "words", "{", "\x00"])
def test_damaged_provenance_is_refused(tmp_path, content):
    (tmp_path / PROVENANCE).write_text(content)
    with pytest.raises(RrtcError, match="rrtc.yaml is damaged"):
        read_provenance(tmp_path)


def test_folders_of_other_origin_are_refused(tmp_path):
    with pytest.raises(RrtcError, match="There is no folder .*nowhere."):
        read_provenance(tmp_path / "nowhere")
    with pytest.raises(RrtcError) as error:
        read_provenance(tmp_path)
    assert "was not written by rrtc" in error.value.sentence and "rrtc init" in error.value.hint
