"""Safetensors: tensors read and written one at a time, and damage found early."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from pico import pico_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rrtc.errors import RrtcError
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.weights import Weights

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


def test_a_file_that_transformers_does_not_look_for_is_refused(tmp_path):
    save_file(TENSORS, tmp_path / "pytorch_model.safetensors")
    with pytest.raises(RrtcError, match=r"holds pytorch_model\.safetensors, which transformers does not look for"):
        Weights(tmp_path)


def test_the_number_format_is_that_of_most_parameters(tmp_path):
    small, large = torch.ones(3), torch.ones(50, dtype=torch.bfloat16)
    save_file({"x": small, "y": small.clone(), "z": large}, tmp_path / "model.safetensors")
    assert Weights(tmp_path).dtype == "bfloat16"
    save_file({"x": torch.ones(50, dtype=torch.int8), "y": small}, tmp_path / "model.safetensors")
    with pytest.raises(RrtcError, match="holds its weights as I8, a quantized format"):
        _ = Weights(tmp_path).dtype
    masks = torch.ones(1, 1, 99, 99, dtype=torch.bool)  # as old GPT-NeoX models have them
    save_file({"x": large, "masks": masks}, tmp_path / "model.safetensors")
    assert Weights(tmp_path).dtype == "bfloat16"


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


def test_offsets_that_contradict_the_shape_are_refused(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [9, 9], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    assert "is truncated or damaged" in refused(tmp_path).sentence


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


def test_a_tensor_is_read_in_blocks_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("rrtc.io.weights.BLOCK_NUMBERS", 30)
    tensor = torch.randn(50, 7).bfloat16()
    save_file({"table": tensor, "norm": tensor[:, 0].contiguous()}, tmp_path / "model.safetensors")
    weights = Weights(tmp_path)
    assert weights.parameters == 400 and [len(block) for block in weights.blocks("norm")] == [30, 20]
    for dtype in (None, torch.float32, torch.float16):
        blocks = list(weights.blocks("table", dtype))
        assert [len(block) for block in blocks] == [4] * 12 + [2] and blocks[0].dtype == (dtype or tensor.dtype)
        assert torch.equal(torch.cat(blocks), tensor if dtype is None else tensor.to(dtype))
    tensor[41, 3] = float("nan")
    save_file({"table": tensor}, tmp_path / "model.safetensors")
    for dtype in (None, torch.float16):
        blocks = Weights(tmp_path).blocks("table", dtype)
        assert len([next(blocks) for _ in range(10)]) == 10
        with pytest.raises(RrtcError, match="The tensor table in .*model.safetensors holds NaN or infinity."):
            next(blocks)


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
    monkeypatch.setattr("rrtc.io.shard_writer.HEADER_ROOM", 4096)
    monkeypatch.setattr("rrtc.io.shard_writer.LARGE_SHARD", 3000)
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


STREAM_A_LOT = """
import sys, torch
from pathlib import Path
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.weights import Weights

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


@pytest.mark.slow
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
