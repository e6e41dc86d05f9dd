"""The ONNX format: the model it was made from, with any lengths, padding and cache, and shared weights stored once."""

import importlib.util
import json
import re
from pathlib import Path

import numpy
import pytest
import torch
import yaml
from exports import IDS, LAST_NORM, change_tensors, make_rrt, recipe, run_python
from huggingface_hub import ModelCard
from onnx_graph import DATA, GRAPH, HYBRID, LAYERS, padded_greedy
from pico import VOCABULARY
from tokenizers import Tokenizer
from transformers import GenerationConfig

from rrtc import machine
from rrtc.api import inspect
from rrtc.errors import RrtcError
from rrtc.export import stage, verify
from rrtc.export.formats import FORMATS, onnx_blocks
from rrtc.export.formats import onnx as onnx_format
from rrtc.io.provenance import read_provenance
from rrtc.io.source import load_tokenizer
from rrtc.io.weights import Weights
from rrtc.model import RrtForCausalLM

onnxruntime = pytest.importorskip("onnxruntime", reason="needs rrtc[onnx]")
ir = pytest.importorskip("onnx_ir", reason="needs rrtc[onnx]")

GRAPH_BYTES = 60_000  # the graph itself, of two layers


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path, dict]:
    """(an rrtc folder, its ONNX export, what export returned); tests must not change them."""
    folder = tmp_path_factory.mktemp("onnx")
    source = make_rrt(folder / "rrt", **LAYERS)
    return source, folder / "out", stage.export(str(source), str(folder / "out"), recipe(format="onnx"))


def graph_of(folder: Path):
    return ir.load(folder / GRAPH)


def traced(made: tuple[Path, Path, dict], monkeypatch) -> Path:
    """The rrtc folder that was exported before, which is not traced again."""
    monkeypatch.setattr(onnx_format, "_trace", lambda model: graph_of(made[1]))
    return made[0]


def store_as_vocabulary_and_merges(folder: Path) -> list[int]:
    """Stores the tokenizer in `folder` in the older way, without a tokenizer.json; returns what it makes of a text."""
    before = load_tokenizer(folder)("The with statement")["input_ids"]
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"])))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    assert load_tokenizer(folder)("The with statement")["input_ids"] == before
    return before


def compare_padded_greedy(source: Path, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Asserts that both generate the same, for rows of different lengths and past a sliding window of 8 tokens; the
    weights in `folder` are rounded to `dtype`."""
    model = RrtForCausalLM.from_pretrained(source).eval()
    onnx_format.round_tensors(model, dtype)
    model.generation_config = GenerationConfig(pad_token_id=2)
    ids, mask = IDS[:, :11], torch.ones_like(IDS[:, :11])
    mask[1, :4] = 0
    expected = model.generate(
        ids, attention_mask=mask, max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    tokens, logits = padded_greedy(folder, ids, mask, 8)
    assert torch.equal(tokens, expected.sequences)
    torch.testing.assert_close(logits, torch.stack(expected.logits), atol=1e-5, rtol=0)


def check_stored_once(graph, source: Path) -> None:
    """Asserts that the matrices in `graph` are those of the recursive model, each as often as there."""
    weights = Weights(source)
    shapes = sorted(sorted(weights.shape(name)) for name in weights if len(weights.shape(name)) == 2)
    found = [list(value.shape) for value in graph.graph.initializers.values() if len(value.shape) == 2]
    assert sorted(map(sorted, found)) == shapes
    uses = [len(value.uses()) for value in graph.graph.initializers.values() if len(value.shape) == 2]
    assert max(uses) == 2  # a shared one is read by both visits


@pytest.mark.slow
def test_the_export_is_small_verified_and_says_so(made, tmp_path):
    source, target, result = made
    recursive = (source / "model.safetensors").stat().st_size
    assert result["files"] == sorted(
        file.relative_to(target).as_posix() for file in target.rglob("*") if file.is_file()
    )
    assert {"onnx/model.onnx", "onnx/model.onnx_data", "tokenizer.json"} < set(result["files"])
    assert "model.safetensors" not in result["files"]
    assert (target / DATA).stat().st_size <= recursive
    assert result["bytes"] < recursive + GRAPH_BYTES
    check_stored_once(graph_of(target), source)
    assert (result["format"], result["dtype"]) == ("onnx", "float32")
    assert result["parameters"] == read_provenance(source)["measured"]["init"]["params_total"]
    assert 0 < result["max_logit_difference"] < 1e-5 < result["largest_logit"]
    assert read_provenance(target)["measured"]["export"] == result
    shown = inspect(str(target))
    assert (shown["dtype"], shown["bytes_on_disk"]) == ("float32", result["bytes"])

    config = json.loads((target / "config.json").read_text())
    assert (config["model_type"], config["num_hidden_layers"], config["head_dim"]) == ("llama", 2, 12)
    assert config["transformers.js_config"] == {"dtype": "fp32", "use_external_data_format": {"model.onnx": 1}}
    cache = graph_of(target).graph.inputs[3]
    assert (cache.name, [str(length) for length in cache.shape]) == (
        "past_key_values.0.key", ["batch_size", "2", "past_sequence_length", "12"],
    )  # fmt: skip

    card = ModelCard.load(target / "README.md")
    assert (card.data.library_name, "onnx" in card.data.tags) == ("transformers.js", True)
    written = yaml.safe_load(re.search(r"## Recipe\n\n```yaml\n(.*?)```", card.text, re.S)[1])
    assert written["export"]["format"] == "onnx"
    snippet = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    assert run_python("import sys; sys.modules['rrtc'] = None\n" + snippet, cwd=target.parent).strip()


@pytest.mark.slow
def test_more_files_than_a_browser_reads_are_refused(made, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_format, "MOST_FILES", 3)
    source = traced(made, monkeypatch)
    with pytest.raises(RrtcError, match="would be [0-9]+ files, and transformers.js reads at most 3") as error:
        stage.export(str(source), str(tmp_path / "out"), recipe(format="onnx", max_shard_size="8KB"))
    assert "--max-shard-size" in error.value.hint and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_padding_cache_and_any_length(made):
    compare_padded_greedy(*made[:2])


@pytest.mark.slow
def test_sliding_windows_and_shared_norms(tmp_path):
    source, target = make_rrt(tmp_path / "rrt", "gemma3", "shared", **HYBRID), tmp_path / "out"
    target.mkdir()
    said = store_as_vocabulary_and_merges(source)
    FORMATS["onnx"].write(source, target, torch.float32, 10**9)
    # transformers.js reads no other file of a tokenizer.
    assert Tokenizer.from_file(str(target / "tokenizer.json")).encode("The with statement").ids == said
    assert (target / DATA).stat().st_size <= (source / "model.safetensors").stat().st_size
    compare_padded_greedy(source, target)


@pytest.mark.slow
def test_sixteen_bits_take_half_the_space_and_compute_the_rounded_model(tmp_path):
    source, target = make_rrt(tmp_path / "rrt", "gpt2", **LAYERS), tmp_path / "out"
    result = stage.export(str(source), str(target), recipe(format="onnx", dtype="float16"))
    assert result["max_logit_difference"] < 1e-5 < result["rounding_logit_difference"]
    assert (target / DATA).stat().st_size < 0.55 * (source / "model.safetensors").stat().st_size
    matrices = [value for value in graph_of(target).graph.initializers.values() if len(value.shape) == 2]
    assert {value.dtype for value in matrices} == {ir.DataType.FLOAT16}
    compare_padded_greedy(source, target, torch.float16)


@pytest.mark.slow
def test_large_weights_are_several_files(made, tmp_path, monkeypatch):
    source, target = traced(made, monkeypatch), tmp_path / "out"
    result = stage.export(str(source), str(target), recipe(format="onnx", max_shard_size="62KB"))
    files = [target / f"{DATA}{end}" for end in ("", "_1", "_2", "_3")]
    assert sorted((target / "onnx").iterdir()) == [target / GRAPH, *files]
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 62_000 < sizes[0] + sizes[1]
    assert result["bytes"] == (target / GRAPH).stat().st_size + sum(sizes)
    config = json.loads((target / "config.json").read_text())
    assert config["transformers.js_config"]["use_external_data_format"] == {"model.onnx": 4}
    check_stored_once(graph_of(target), source)
    compare_padded_greedy(source, target)


@pytest.mark.slow
def test_a_wrong_graph_leaves_no_folder(made, tmp_path, monkeypatch):
    def damaged(model):
        graph = graph_of(made[1])
        value = max(graph.graph.initializers.values(), key=lambda value: value.const_value.size)
        value.const_value = ir.tensor(value.const_value.numpy()[::-1].copy(), name=value.name)
        return graph

    monkeypatch.setattr(onnx_format, "_trace", damaged)
    with pytest.raises(RrtcError, match="a logit differs by"):
        stage.export(str(made[0]), str(tmp_path / "out"), recipe(format="onnx"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_other_tokens_are_a_failure_unless_two_were_equally_good(made):
    source, target, _ = made
    expected = verify.reference(source, None, generates=True)
    assert len(expected.greedy) == verify.NEW_TOKENS
    (token, lead), *others = expected.greedy
    expected.greedy[:] = [(token + 1, 0.0), *others]
    onnx_format.verify(target, expected, torch.float32, from_disk=False)
    expected.greedy[:] = [(token + 1, lead), *others]
    with pytest.raises(RrtcError, match="greedy generation differs from token 1 on"):
        onnx_format.verify(target, expected, torch.float32, from_disk=False)


@pytest.mark.slow
def test_what_cannot_be_exported_is_one_sentence(made, tmp_path, monkeypatch):
    source, output = make_rrt(tmp_path / "rrt", **LAYERS), tmp_path / "out"

    def untraceable(self, input_ids, attention_mask, position_ids, past):
        raise NotImplementedError("no such operation\nand much advice")

    with monkeypatch.context() as patched:
        patched.setattr(onnx_format._Cached, "forward", untraceable)
        with pytest.raises(RrtcError, match="ONNX graph: NotImplementedError no such operation$"):
            stage.export(str(source), str(output), recipe(format="onnx"))
    with monkeypatch.context() as patched:
        known = importlib.util.find_spec
        patched.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else known(name))
        with pytest.raises(RrtcError, match="needs onnxscript, which is not installed") as error:
            stage.export(str(source), str(output), recipe(format="onnx"))
        assert "pip install rrtc[onnx]" in error.value.hint
    with monkeypatch.context() as patched:
        patched.setattr(machine, "MODEL_SHARE", 0)
        with pytest.raises(RrtcError, match=r"For this format, the .* and 2 times its 271\.3 kB do not fit"):
            stage.export(str(source), str(output), recipe(format="onnx"))
    change_tensors(source, lambda tensors: tensors[LAST_NORM].fill_(1e6))
    with pytest.raises(RrtcError, match="does not fit float16"):
        stage.export(str(source), str(output), recipe(format="onnx", dtype="float16"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rrt"]


@pytest.mark.parametrize(
    ("inputs", "groups", "bits", "part"), [(36, 1, 4, "layers"), (96, 3, 4, "layers"), (48, 1, 8, "tables")]
)
def test_blocks_are_the_matrix(inputs, groups, bits, part):
    torch.manual_seed(0)
    low = 2 ** (bits - 1)
    whole = torch.randint(-low, low, (20, inputs), dtype=torch.int8)
    matrix = onnx_blocks.Rounded(whole, torch.rand(20, groups) + 0.1, bits, part)
    numbers, scales = matrix.blocks
    assert numbers.shape == (20, -(-inputs // matrix.block), matrix.block * bits // 8)
    assert scales.shape == numbers.shape[:2]
    unpacked = numbers if bits == 8 else numpy.stack([numbers & 15, numbers >> 4], -1).reshape(20, -1, matrix.block)
    found = ((unpacked.astype("float32") - low) * scales[..., None]).reshape(20, -1)
    assert not found[:, inputs:].any()
    torch.testing.assert_close(torch.from_numpy(found[:, :inputs]), matrix.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "number", "dtype", "file"),
    [("llama", "int4", "float32", "model_q4.onnx"), ("gemma3", "int8", "float16", "model_quantized.onnx")],
)
def test_fewer_bits_are_shared_too_and_compute_the_rounded_model(tmp_path, architecture, number, dtype, file):
    changes = HYBRID if architecture == "gemma3" else LAYERS
    source, target = make_rrt(tmp_path / "rrt", architecture, **changes), tmp_path / "out"
    asked = {"dtype": dtype, "calibrate_tokens": 1024, "calibrate_context": 128}
    result = stage.export(str(source), str(target), recipe(format="onnx", quantize=number, **asked))
    assert result["max_logit_difference"] < 1e-5 < result["rounding_logit_difference"]
    assert result["bits_per_byte"].keys() == {"plain", "nearest", "calibrated"}
    assert {path.name for path in (target / "onnx").iterdir()} == {file, f"{file}_data"}
    config = json.loads((target / "config.json").read_text())
    called = {"int4": "q4", "int8": "q8"}[number]
    assert config["transformers.js_config"] == {"dtype": called, "use_external_data_format": {file: 1}}

    graph = ir.load(target / "onnx" / file)
    stored = {value.name: value for value in graph.graph.initializers.values()}
    blocks = {name.removesuffix(".blocks"): value for name, value in stored.items() if name.endswith(".blocks")}
    weights, bits = Weights(source), {"int4": 4, "int8": 8}[number]
    tables = {name.removesuffix(".weight") for name in weights if weights.shape(name)[0] == VOCABULARY}
    shared = {name.removesuffix(".weight") for name in weights if ".slots." in name and len(weights.shape(name)) == 2}
    shared = {name for name in shared if name.endswith("_proj")}
    assert blocks.keys() == shared | tables
    # A matrix of the layers is read by both visits; a tied table by the look-up, after it was laid flat, and the head.
    tied = len(tables) == 1
    assert {name: len(value.uses()) for name, value in blocks.items()} == dict.fromkeys(blocks, 2) | (
        {} if tied else dict.fromkeys(tables, 1)
    )
    expected = {"layers": 0, "tables": 0}
    for name, value in blocks.items():
        outputs, inputs = weights.shape(f"{name}.weight")
        part, one = ("tables", 8) if name in tables else ("layers", bits)
        count = -(-inputs // 16)  # 48, 80 and 64 are multiples of 16, and of no more or of one block
        scales = value.shape[0] * value.shape[1] * (2 if dtype == "float16" else 4)
        assert value.const_value.nbytes == outputs * inputs * one // 8 and value.shape[1] <= count
        expected[part] += value.const_value.nbytes + scales
    assert {part: result["parts"][part]["bytes"] for part in expected} == expected
    assert sum(part["bytes"] for part in result["parts"].values()) == sum(v.const_value.nbytes for v in stored.values())
    card = (target / "README.md").read_text()
    assert f"onnx/{file}" in card and f"matrices of the layers in {number}" in card
