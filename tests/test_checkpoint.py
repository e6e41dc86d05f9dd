"""Model folders: tensors read and written one at a time, damage found early, and nothing unfinished left behind."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from pico import pico_model, save_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rrtc import __version__, checkpoint
from rrtc.checkpoint import (
    PROVENANCE,
    ShardWriter,
    Weights,
    base_seen_from,
    check_space,
    check_target,
    copy_companions,
    earlier_stages,
    next_history,
    partial_of,
    read_provenance,
    whole_folder,
    without_places,
    write_provenance,
)
from rrtc.errors import RrtcError, WrongUsage
from rrtc.recipe import parse_size

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(4, dtype=torch.bfloat16),
    "c": torch.tensor([1.5, -2.5], dtype=torch.float16),
}


def refused(folder: Path) -> RrtcError:
    with pytest.raises(RrtcError) as error:
        Weights(folder)
    return error.value


def with_index(folder: Path, weight_map) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


# Reading


def test_tensors_are_read_by_name_in_float32_or_as_they_are(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"format": "pt"})
    weights = Weights(tmp_path)
    assert set(weights) == set(TENSORS) and "a" in weights and "z" not in weights
    for name, tensor in TENSORS.items():
        assert weights.shape(name) == list(tensor.shape)
        assert weights.raw(name).dtype == tensor.dtype and torch.equal(weights.raw(name), tensor)
        assert weights.read(name).dtype == torch.float32 and torch.equal(weights.read(name), tensor.float())
    assert weights.bytes_on_disk == (tmp_path / "model.safetensors").stat().st_size


def test_shards_are_read_as_one(tmp_path):
    model = pico_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    weights = Weights(tmp_path)
    assert len(weights.files) > 2
    for name, tensor in model.state_dict().items():
        assert torch.equal(weights.read(name), tensor)
    assert weights.bytes_on_disk == sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))


def test_a_single_file_of_another_name_is_found(tmp_path):
    save_file(TENSORS, tmp_path / "pytorch_model.safetensors")
    assert set(Weights(tmp_path)) == set(TENSORS)


def test_the_number_format_is_that_of_most_parameters(tmp_path):
    small, large = torch.ones(3), torch.ones(50, dtype=torch.bfloat16)
    save_file({"x": small, "y": small.clone(), "z": large}, tmp_path / "model.safetensors")
    assert Weights(tmp_path).dtype == "bfloat16"
    save_file({"x": torch.ones(50, dtype=torch.int8), "y": small}, tmp_path / "model.safetensors")
    with pytest.raises(RrtcError, match="holds its weights as I8, a quantised format"):
        _ = Weights(tmp_path).dtype


@pytest.mark.parametrize("length", [0, 4, 8, 60, -1])
def test_a_truncated_file_is_refused_from_its_header_alone(tmp_path, length):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    os.truncate(file, length if length >= 0 else file.stat().st_size + length)
    assert refused(tmp_path).sentence == f"The weights file {file} is truncated or damaged."


def test_a_file_that_is_too_long_is_refused(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    with open(file, "ab") as stream:
        stream.write(b"more")
    assert "is truncated or damaged" in refused(tmp_path).sentence


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": 3}',
        b'{"a": {}}',
        b'{"a": {"data_offsets": []}}',
        b'{"a": {"data_offsets": 7}}',
        b"\xff\xfe",
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, "x"]}}',
    ],
)
def test_a_damaged_header_is_refused(tmp_path, header):
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert "is truncated or damaged" in refused(tmp_path).sentence


def test_a_header_that_claims_to_be_longer_than_the_file_is_refused(tmp_path):
    (tmp_path / "model.safetensors").write_bytes((10**18).to_bytes(8, "little") + b"{}")
    assert "is truncated or damaged" in refused(tmp_path).sentence


def test_offsets_that_contradict_the_shape_are_refused_when_read(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    weights = Weights(tmp_path)
    with pytest.raises(RrtcError, match="is truncated or damaged"):
        weights.read("a")


def test_a_missing_shard_is_named(tmp_path):
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00001-of-00002.safetensors")
    with_index(tmp_path, {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"})
    assert f"model-00002-of-00002.safetensors is missing from {tmp_path}" in refused(tmp_path).sentence


def test_shards_without_an_index_are_refused(tmp_path):
    save_file(TENSORS, tmp_path / "model-00001-of-00002.safetensors")
    assert "holds shards but no model.safetensors.index.json" in refused(tmp_path).sentence


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/hostname", "deep/model.safetensors", "..", "a.bin"])
def test_an_index_cannot_point_outside_its_folder(tmp_path, name):
    save_file(TENSORS, tmp_path / "secret.safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    error = refused(with_index(folder, {"a": name}))
    assert f"points to {name}, which is no weights file in its folder" in error.sentence


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\x00"])
def test_a_damaged_index_is_refused(tmp_path, content):
    (tmp_path / "model.safetensors.index.json").write_text(content)
    assert "model.safetensors.index.json is damaged" in refused(tmp_path).sentence


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_unread(tmp_path, name):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "ran").encode() + b"'\ntR.")
    error = refused(tmp_path)
    assert name in error.sentence and "pickle" in error.sentence and "safetensors" in error.hint
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_is_refused(tmp_path):
    assert refused(tmp_path).sentence == f"There are no weights in {tmp_path} (no *.safetensors)."


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nan_and_infinity_are_refused_naming_the_tensor(tmp_path, value, dtype):
    broken = torch.ones(3, 4, dtype=dtype)
    broken[1, 2] = value
    save_file({"fine": torch.ones(3), "layers.3.bad": broken}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert weights.read("fine").tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(RrtcError, match="The tensor layers.3.bad in .*model.safetensors holds NaN or infinity."):
        weights.read("layers.3.bad")


# Writing


@pytest.mark.parametrize("max_bytes", [1, 20_000, 60_000, 10**9])
def test_written_shards_load_with_transformers(tmp_path, max_bytes):
    model = pico_model("llama")
    model.config.save_pretrained(tmp_path)
    writer = ShardWriter(tmp_path, max_bytes)
    for name, tensor in reversed(model.state_dict().items()):
        writer.add(name, tensor)
    writer.finish()
    files = sorted(tmp_path.glob("*.safetensors"))
    sizes = [sum(4 * tensor.numel() for tensor in load_file(file).values()) for file in files]
    assert all(size <= max_bytes or len(load_file(file)) == 1 for size, file in zip(sizes, files, strict=True))
    assert sum(sizes) == writer.total_bytes == 4 * model.num_parameters()
    index = tmp_path / "model.safetensors.index.json"
    if len(files) == 1:
        assert files[0].name == "model.safetensors" and not index.exists()
    else:
        assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
        said = json.loads(index.read_text())
        assert said["metadata"]["total_size"] == writer.total_bytes
        assert said["weight_map"] == {name: file.name for file in files for name in load_file(file)}
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert set(Weights(tmp_path)) == set(model.state_dict())
    assert not list(tmp_path.glob("*.tmp"))


def test_a_transposed_view_is_written_as_what_it_shows(tmp_path):
    writer = ShardWriter(tmp_path, 10**9)
    writer.add("a", TENSORS["a"].T)
    writer.finish()
    assert torch.equal(Weights(tmp_path).raw("a"), TENSORS["a"].T)


def test_a_tensor_comes_in_blocks_of_its_rows(tmp_path):
    tensor, alive = torch.randn(50, 7), []

    def blocks():
        for part in tensor.split(20):
            block = part.bfloat16()
            alive.append(weakref.ref(block))
            yield block
            del block
            assert sum(reference() is not None for reference in alive) <= 1

    writer = ShardWriter(tmp_path, 10**9)
    writer.add_blocks("table", blocks())
    writer.add("scalar", torch.tensor(1.5))
    writer.finish()
    weights = Weights(tmp_path)
    assert torch.equal(weights.raw("table"), tensor.bfloat16()) and weights.raw("scalar").shape == ()
    assert torch.equal(weights.read("table", slice(18, 23)), tensor.bfloat16()[18:23].float())


def test_shards_of_several_number_formats_are_laid_out_as_safetensors_does(tmp_path):
    (tmp_path / "ours").mkdir()
    writer = ShardWriter(tmp_path / "ours", 10**9)
    tensors = TENSORS | {"d": torch.ones(3, dtype=torch.float64), "e": torch.empty(0, 4), "f": torch.ones(3)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    save_file(tensors, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours" / "model.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert list(ours) == list(theirs)
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype and torch.equal(ours[name], tensor)
        assert torch.equal(Weights(tmp_path / "ours").raw(name), tensor)


def test_a_large_shard_keeps_the_room_for_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "HEADER_ROOM", 4096)
    monkeypatch.setattr(checkpoint, "LARGE_SHARD", 3000)
    writer = ShardWriter(tmp_path, 4000)
    tensors = {name: torch.randn(250) for name in "dcba"}  # of 1000 bytes, and then some that do not fit the shard
    tensors |= {"odd": torch.ones(3, dtype=torch.int8), "after": torch.randn(900)}
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    first, second = sorted(tmp_path.glob("*.safetensors"))
    assert first.stat().st_size == 4096 + 4000
    assert second.stat().st_size < 4096 + 3603  # after three bytes nothing is aligned, so it was copied
    assert set(load_file(first)) == set("abcd") and set(load_file(second)) == {"after", "odd"}
    for name, tensor in tensors.items():
        assert torch.equal(Weights(tmp_path).raw(name), tensor)
        assert torch.equal((load_file(first) | load_file(second))[name], tensor)


def test_no_places_are_told():
    told = {"on": ["/home/me/a.txt", "b/c.txt", 3], "/home/me/a.txt": 1, "/home/you/a.txt": {"at": None}}
    assert without_places(told) == {"on": ["a.txt", "b/c.txt", 3], "a.txt": 1, "a.txt (2)": {"at": None}}


STREAM_A_LOT = """
import sys, torch
from pathlib import Path
from rrtc.checkpoint import ShardWriter, Weights

def peak():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

folder = Path(sys.argv[1])
before = peak()
writer = ShardWriter(folder, 10**9)
for number in range(30):
    writer.add(f"t{number}", torch.full((1000, 10_000), 1.0, dtype=torch.bfloat16))
writer.finish()
weights = Weights(folder)
assert sum(weights.read(name)[0, 0].item() for name in weights) == 30
print(1024 * (peak() - before))
"""


def test_reading_and_writing_take_the_memory_of_a_tensor_whatever_the_size_of_the_file(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STREAM_A_LOT, str(tmp_path)], capture_output=True, text=True, check=True
    )
    # As stored, in float32 and whether each number is finite; two of the 30 tensors of 20 MB are alive at a time.
    assert int(done.stdout) < 150_000_000


def test_a_file_larger_than_memory_is_read(tmp_path):
    size = 2**42  # 4 TiB, of which the disk holds what was written: nothing
    header = {"big": {"dtype": "F32", "shape": [2**20, 2**20 - 1], "data_offsets": [0, size - 2**22]}}
    header["small"] = {"dtype": "F32", "shape": [2**20], "data_offsets": [size - 2**22, size]}
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + size)
    assert Weights(tmp_path).read("small").tolist() == [0.0] * 2**20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9), ("500MB", 5 * 10**8), ("1.5gb", 15 * 10**8), (" 20 KB ", 20_000), ("2T", 2 * 10**12),
        ("100", 100), ("100B", 100),
    ],
)  # fmt: skip
def test_sizes_are_decimal(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "four", "-4GB", "4GBB", "4 G B", "4,5GB", "4GiB", "1e9"])
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
    assert listing(tmp_path) == ["out.partial", "out.partial/checkpoint"]
    with whole_folder(tmp_path / "out", keep_partial=True) as folder:
        assert (folder / "checkpoint").read_text() == "half"
    assert listing(tmp_path) == ["out", "out/checkpoint"]


def test_a_killed_runs_leftovers_are_cleared_by_the_next(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "stale").write_text("from before")
    with whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("new")
    assert listing(tmp_path) == ["out", "out/file"]


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
    with pytest.raises(
        RrtcError, match=r"The output needs 1000000000.0 GB, but only [\d.]+ GB are free on the disk of"
    ):
        check_space(tmp_path / "deep" / "out", 10**18)


WRITE_A_LOT = """
import resource, sys, torch
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
from pathlib import Path
from rrtc.checkpoint import ShardWriter, whole_folder
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


@pytest.mark.parametrize("what", ["tensors", "text"])
def test_a_full_disk_is_one_clear_sentence_and_leaves_nothing(tmp_path, what):
    command = [sys.executable, "-c", WRITE_A_LOT, str(tmp_path / "out"), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    sentence, hint = done.stdout.strip().split(" | ")
    assert sentence.startswith("Writing ") and "File too large" in sentence and sentence.count(". ") == 0
    assert hint == "Free some space, or write to another disk."
    assert listing(tmp_path) == []


# What goes along


def test_tokenizer_generation_defaults_and_licence_go_along_and_weights_do_not(tmp_path):
    source, target = save_pico(tmp_path / "source"), tmp_path / "target"
    target.mkdir()
    for name in ("LICENSE.txt", "NOTICE", "chat_template.jinja", "README.md", "training_args.bin"):
        (source / name).write_text(name)
    (source / "tokenizer_folder").mkdir()
    copy_companions(source, target)
    assert listing(target) == [
        "LICENSE.txt", "NOTICE", "chat_template.jinja", "generation_config.json", "tokenizer.json",
        "tokenizer_config.json",
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
