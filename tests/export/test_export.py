"""Export: the recursive and the dense format are the model they were made from, load where rrtc is not, and say the
truth about themselves."""

import hashlib
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from exports import IDS, LAST_NORM, STRANGER, change_tensors, logits_of, make_rrt, recipe, run_python
from huggingface_hub import ModelCard
from pico import ARCHITECTURES, EVERY_ARCHITECTURE, pico_config, save_pico
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.dynamic_module_utils import HF_MODULES_CACHE

from rrtc import machine
from rrtc.errors import RrtcError, WrongUsage
from rrtc.export import stage, verify
from rrtc.export.formats import FORMATS
from rrtc.export.formats.recursive import AUTO_MAP
from rrtc.io import license
from rrtc.io.provenance import read_provenance
from rrtc.io.shard_writer import ShardWriter, map_ahead
from rrtc.io.source import find_model
from rrtc.io.weights import Weights
from rrtc.model import RrtForCausalLM
from rrtc.stock.architecture import read_architecture

SHARDS = 100_000  # bytes: several of them even for a pico model
REPORT = {
    "schema": 2,
    "of": {"stage": "init", "made": "long ago"},
    "against": "maker/model",
    "tokens": {"held out": 512},
    "made_with": {},
    "models": [],
    "not_run": [{"task": "hellaswag", "why": "There is no network."}],
    "layers": [],
    "speed": None,
    "training": [],
    "source_bytes": 1500,
    "samples": [{"model": "dense", "text": "a blue sky"}],
}
CHOSEN = [("llama", "per_visit"), ("gemma3", "shared"), ("gpt2", "per_visit"), ("gpt_neox", "shared")]


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def test_noise_is_about_what_float32_itself_is_wrong_by(tmp_path):
    source = make_rrt(tmp_path / "rrt")
    expected = verify.reference(source, None)
    exact = RrtForCausalLM.from_pretrained(source, dtype=torch.float64).eval()(expected.ids).logits[:, -verify.TOKENS :]
    wrong = (expected.logits - exact).abs().max().item()
    assert 0.5 * wrong < expected.noise < 50 * wrong

    scale = expected.logits.abs().max().item()
    assert expected.allowed(torch.float32) == pytest.approx(1e-4 * scale)  # of a model that enlarges nothing
    for noise, allowed in ((0.001, 0.004), (0.1, 0.01)):
        enlarging = replace(expected, noise=noise * scale)
        assert enlarging.allowed(torch.float32) == pytest.approx(allowed * scale)
        found = expected.logits.clone()
        found[0, 0, 0] += 0.99 * allowed * scale
        assert verify.check_logits(found, enlarging, torch.float32) == pytest.approx(0.99 * allowed * scale, rel=1e-3)
        found[0, 0, 0] += 0.02 * allowed * scale
        with pytest.raises(RrtcError, match="a logit differs"):
            verify.check_logits(found, enlarging, torch.float32)


@pytest.mark.parametrize("norms", ["per_visit", "shared"])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_dense_is_the_same_model_in_the_stock_architecture(tmp_path, architecture, norms, monkeypatch):
    monkeypatch.setattr("rrtc.io.weights.BLOCK_NUMBERS", 500)  # several blocks even for a pico model
    source, target = make_rrt(tmp_path / "rrt", architecture, norms), tmp_path / "dense"
    target.mkdir()
    parameters = FORMATS["dense"].write(source, target, torch.float32, SHARDS)
    model, info = AutoModelForCausalLM.from_pretrained(target, output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__module__.startswith("transformers.")
    assert parameters == model.num_parameters() == read_architecture(pico_config(architecture)).parameters
    expected = logits_of(RrtForCausalLM.from_pretrained(source))
    torch.testing.assert_close(logits_of(model), expected, atol=1e-4, rtol=0)
    config = json.loads((target / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert not {"auto_map", "base_config", "visits"} & config.keys()
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:  # as transformers 4 spells it, too
        older = dict(config.get("rope_scaling") or {"rope_type": "default"}, rope_theta=config["rope_theta"])
        older |= {"partial_rotary_factor": config["partial_rotary_factor"]} if "partial_rotary_factor" in config else {}
        assert older == rope == model.config.rope_parameters
    assert (target / "model.safetensors.index.json").exists()
    assert ("lm_head.weight" in Weights(target)) is not config["tie_word_embeddings"]


@pytest.mark.slow
def test_recursive_loads_and_generates_where_rrtc_is_not(tmp_path, cold):
    sources, targets = [], []
    for architecture, norms in CHOSEN:
        sources.append(make_rrt(tmp_path / f"{architecture}-rrt", architecture, norms))
        targets.append(tmp_path / f"{architecture}-{norms}")
        targets[-1].mkdir()
        parameters = FORMATS["recursive"].write(sources[-1], targets[-1], None, 4_000_000_000)
        size = Weights(targets[-1]).bytes_on_disk
        assert parameters * 4 < size < parameters * 4 * 1.05
        assert parameters == read_provenance(sources[-1])["measured"]["init"]["params_total"]
        config = json.loads((targets[-1] / "config.json").read_text())
        assert config["auto_map"].keys() == AUTO_MAP.keys()
    run_python(STRANGER, json.dumps(IDS.tolist()), "out.safetensors", *map(str, targets), cwd=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    for source, target in zip(sources, targets, strict=True):
        model = RrtForCausalLM.from_pretrained(source).eval()
        torch.testing.assert_close(found[f"{target}:logits"], logits_of(model), atol=1e-6, rtol=0)
        torch.testing.assert_close(found[f"{target}:hidden"], found[f"{target}:expected_hidden"], atol=1e-6, rtol=0)
        greedy = model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False)
        assert torch.equal(found[f"{target}:greedy"], greedy)


@pytest.mark.slow
def test_a_recursive_export_is_checked_where_the_model_calls_a_decoder_inside_its_base_model(tmp_path, monkeypatch):
    opt = ("OPTConfig", {"word_embed_proj_dim": 32, "ffn_dim": 80})  # and what leaves its layers is projected
    monkeypatch.setitem(ARCHITECTURES, "opt", opt)
    measured = stage.export(make_rrt(tmp_path / "rrt", "opt"), tmp_path / "out", recipe())
    assert measured["max_logit_difference"] == 0 and (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.slow
def test_recursive_export_with_report_and_license(tmp_path):
    source = make_rrt(tmp_path / "rrt")
    (source / "LICENSE").write_text("Apache License\nVersion 2.0, January 2004\n")
    (source / "tokenizer_config.json").unlink()  # old models have none that says much
    before, caches = digests(source), sorted(Path(HF_MODULES_CACHE).rglob("*"))
    size = read_provenance(source)["measured"]["init"]["params_total"]
    scores = ({"bits_per_byte": 0.87654, "loss": 2.5}, {"bits_per_byte": 1.98765, "loss": 4.5, "kl": 2.25})
    models = [
        {
            "model": name,
            "kind": kind,
            "params_total": params,
            "params_non_embedding": params,
            "bytes": bytes_,
            "parts": {},
            "scores": {k: {"value": v, "stderr": None, "difference": None} for k, v in found.items()},
            "texts": {},
            "by_position": [],
        }
        for name, kind, params, bytes_, found in (
            ("dense", "dense", 999, 4000, scores[0]),
            ("after init", "stage", size, 2000, scores[1]),
        )
    ]
    average = {"value": 0.6125, "stderr": 0.021, "difference": None}
    models[1] |= {"tasks": {"piqa": average | {"metric": "acc_norm", "items": 500}}, "task_average": average}
    made = read_provenance(source)["made"]
    report = REPORT | {"models": models, "of": {"stage": "init", "made": made}}
    (tmp_path / "report").mkdir()
    (tmp_path / "report/report.json").write_text(json.dumps(report))

    target = tmp_path / "out"
    result = stage.export(str(source), str(target), recipe(dtype="bfloat16"), str(tmp_path / "report"))
    assert digests(source) == before
    assert sorted(Path(HF_MODULES_CACHE).rglob("*")) == caches
    assert not list(tmp_path.glob("*.partial"))
    assert result["files"] == sorted(file.name for file in target.iterdir())
    assert {"LICENSE", "configuration_rrt.py", "modeling_rrt.py", "tokenizer.json"} <= set(result["files"])
    assert (result["format"], result["parameters"]) == ("recursive", size)
    assert result["bytes"] == (target / "model.safetensors").stat().st_size
    assert result["max_logit_difference"] < 1e-5 < result["rounding_logit_difference"]
    assert {tensor.dtype for tensor in load_file(target / "model.safetensors").values()} == {torch.bfloat16}
    provenance = read_provenance(target)
    assert provenance["measured"]["export"] == result
    assert [entry["stage"] for entry in provenance["history"]] == ["init"]

    card = ModelCard.load(target / "README.md")
    assert (card.data.license, card.data.base_model, card.data.library_name) == (
        "apache-2.0", "maker/model", "transformers",
    )  # fmt: skip
    assert (card.data.base_model_relation, card.data.model_name) == ("finetune", "out")
    assert [(r.dataset_name, r.metric_type, r.metric_value) for r in card.data.eval_results] == [
        ("held out", "bits_per_byte", 1.9876), ("held out", "loss", 4.5), ("held out", "kl", 2.25),
        ("piqa", "acc_norm", 0.6125),
    ]  # fmt: skip
    assert card.data.eval_results[-1].metric_name == "acc_norm of 500 items"
    stage.export(str(source), str(tmp_path / "int8"), recipe(quantize="int8"), str(tmp_path / "report"))
    assert ModelCard.load(tmp_path / "int8" / "README.md").data.eval_results is None  # these weights were not scored
    rows = [line for line in card.text.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| dense | 999 | 999 | 4 kB | 0.8765 | 2.5000 | – | – |",
        f"| after init | {size / 1000:.4g}k | {size / 1000:.4g}k | 2 kB | 1.9876 | 4.5000 | 2.2500 | 61.3% |",
        "| task (metric, items) | after init |",
        "| --- | ---: |",
        "| piqa (acc_norm, 500) | 61.3% ± 2.1% |",
    ]
    for words in (
        "Not measured: hellaswag. There is no network.",
        "512 tokens of 'held out'",
        "a blue sky",
        "`0 1 2 0 1 2`",
        "quantized file of 1.5 kB",
    ):
        assert words in card.text
    assert yaml.safe_load(re.search(r"## Recipe\n\n```yaml\n(.*?)```", card.text, re.S)[1]) == provenance["recipe"]
    snippet = re.search(r"```python\n(.*?)```", card.text, re.S)[1]
    said = run_python("import sys; sys.modules['rrtc'] = None\n" + snippet, cwd=tmp_path)
    assert said.strip() and "Do you wish to run" not in said


@pytest.mark.slow
def test_dense_export_in_16_bits_of_a_recursive_export_with_tied_embeddings(tmp_path, monkeypatch, capsys):
    made, source, target = make_rrt(tmp_path / "rrt", "gemma3", "shared"), tmp_path / "recursive", tmp_path / "out"
    source.mkdir()
    FORMATS["recursive"].write(made, source, None, SHARDS)
    (source / "rrtc.yaml").write_bytes((made / "rrtc.yaml").read_bytes())
    before = digests(source)
    options = recipe(format="dense", dtype="bfloat16", max_shard_size="100KB")
    result = stage.export(str(source), str(target), options)
    assert digests(source) == before
    assert result["max_logit_difference"] < 1e-3 * result["largest_logit"]
    assert result["files"] == sorted(file.name for file in target.iterdir())
    assert not set(result["files"]) & {"modeling_rrt.py", "LICENSE"}
    model = AutoModelForCausalLM.from_pretrained(target)
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight

    card = ModelCard.load(target / "README.md")
    assert card.data.license is None and "Not known" in card.text
    assert "No evaluation report was given" in card.text and "has the size of the original" in card.text
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"```python\n(.*?)```", card.text, re.S)[1], {})
    assert capsys.readouterr().out.strip()


def damage(name: str, tensor: torch.Tensor):
    return (name, tensor.flip(0)) if name.endswith("layers.3.mlp.up_proj.weight") else (name, tensor)


def drop(name: str, tensor: torch.Tensor):
    return None if name.endswith("layers.3.mlp.up_proj.weight") else (name, tensor)


@pytest.mark.slow
@pytest.mark.parametrize("fault, words", [(damage, "a logit differs by"), (drop, "missing model.layers.3.mlp.up_proj")])
def test_a_wrong_export_leaves_no_folder(tmp_path, monkeypatch, fault, words):
    source, add = make_rrt(tmp_path / "rrt"), ShardWriter.add_blocks

    def faulty(self, name, blocks):
        wanted = fault(name, torch.cat(list(blocks)))
        if wanted is not None:
            add(self, wanted[0], [wanted[1]])

    monkeypatch.setattr(ShardWriter, "add_blocks", faulty)
    with pytest.raises(RrtcError, match=words):
        stage.export(str(source), str(tmp_path / "out"), recipe(format="dense"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rrt"]


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def without_visits(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["visits"] = config["visits"][:-1]
    (folder / "config.json").write_text(json.dumps(config))


FAULTS = {
    "is truncated or damaged": (truncate, {}),
    "holds a 'llama' model": (lambda folder: save_pico(folder), {}),
    "no tokenizer": (lambda folder: [file.unlink() for file in folder.glob("tokenizer*")], {}),
    "was not written by rrtc": (lambda folder: (folder / "rrtc.yaml").unlink(), {}),
    "mismatched .*model.norm.weight": (
        lambda folder: change_tensors(folder, lambda t: t.update({LAST_NORM: t[LAST_NORM][:-1].clone()})), {},
    ),
    "The visits do not stand for the 6 layers": (without_visits, {}),
    "missing model.norm.weight": (lambda folder: change_tensors(folder, lambda t: t.pop(LAST_NORM)), {}),
    "NaN or infinity": (lambda folder: change_tensors(folder, lambda t: t[LAST_NORM].fill_(float("nan"))), {}),
    "does not fit float16": (
        lambda folder: change_tensors(folder, lambda t: t[LAST_NORM].fill_(1e6)), {"dtype": "float16"},
    ),
    "is not a size": (lambda folder: None, {"max_shard_size": "huge"}),
}  # fmt: skip


@pytest.mark.parametrize("words", FAULTS)
def test_a_faulty_folder_is_one_sentence_and_no_output(tmp_path, words):
    fault, options = FAULTS[words]
    fault(make_rrt(tmp_path / "rrt"))
    with pytest.raises(RrtcError, match=words):
        stage.export(str(tmp_path / "rrt"), str(tmp_path / "out"), recipe(format="dense", **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rrt"]


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "no evaluation report"),
        ("{", "is damaged"),
        ('{"schema": 1}', "of another version"),
        ('{"schema": 2}', "is damaged"),
        (json.dumps(REPORT), "about another"),
    ],
)
def test_a_report_that_is_none(tmp_path, content, words):
    source, report = make_rrt(tmp_path / "rrt"), tmp_path / "report"
    report.mkdir()
    if content is not None:
        (report / "report.json").write_text(content)
    with pytest.raises(RrtcError, match=words):
        stage.export(str(source), str(tmp_path / "out"), recipe(), str(report))
    assert not (tmp_path / "out").exists()


def test_the_output_is_a_new_folder_outside_the_input(tmp_path):
    source = make_rrt(tmp_path / "rrt")
    with pytest.raises(WrongUsage, match="lies in the folder"):
        stage.export(str(source), str(source / "out"), recipe())
    with pytest.raises(RrtcError, match="is not empty"):
        stage.export(str(source), str(tmp_path), recipe())


def test_licenses_are_found_and_not_guessed(tmp_path):
    from gguf import GGUFWriter

    def found(name: str, **files: str) -> dict:
        folder = tmp_path / name
        folder.mkdir()
        for file, text in files.items():
            (folder / file.replace("_", ".")).write_text(text)
        return license.find_license(folder)

    assert found("none") == {}
    assert found("card", README_md="---\nlicense: gemma\n---\n") == {"license": "gemma"}
    assert found("broken", README_md="---\nlicense: [\n---\n") == {}
    assert found("llama", LICENSE="LLAMA 3.2 COMMUNITY LICENSE AGREEMENT") == {"license": "llama3.2"}
    assert found("mit", LICENSE="Permission is hereby granted, free of charge, to any") == {"license": "mit"}
    assert found("own", LICENSE_txt="All yours.") == {"license": "other", "license_link": "LICENSE.txt"}
    mit = "MIT License"
    assert found("two", LICENSE_code=mit, LICENSE_model="Ours.") == {"license": "other", "license_link": "LICENSE.code"}
    assert found("same", LICENSE_code=mit, LICENSE_model=mit) == {"license": "mit"}
    assert found("both", README_md="---\nlicense: gemma\n---\n", LICENSE="All yours.") == {"license": "gemma"}
    (tmp_path / "folder" / "LICENSES").mkdir(parents=True)
    assert license.find_license(tmp_path / "folder") == {}
    (tmp_path / "half.gguf").write_bytes(b"GGUF, but no more")
    assert license.find_license(tmp_path / "half.gguf") == {}

    writer = GGUFWriter(tmp_path / "none/model.gguf", "llama")
    writer.add_tags(["text-generation", "small"])
    writer.add_license("apache-2.0")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert license.find_license(tmp_path / "none/model.gguf") == {"license": "apache-2.0"}
    assert find_model(str(save_pico(tmp_path / "mit"))).provenance(tmp_path)["license"] == {"license": "mit"}


def test_what_is_made_ahead_comes_in_order_and_so_do_its_errors():
    cores = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        with map_ahead() as each:
            assert torch.get_num_threads() == 1
            seen = each(lambda n: time.sleep(0.01 * (n % 3)) or n * n, range(20))
            assert list(seen) == [n * n for n in range(20)]
            with pytest.raises(ZeroDivisionError):
                list(each(lambda n: 1 / (5 - n), range(20)))
        assert torch.get_num_threads() == 4
    finally:
        torch.set_num_threads(cores)


@pytest.mark.slow
@pytest.mark.parametrize(("architecture", "norms"), CHOSEN)
def test_a_model_on_disk_is_rounded_and_checked_as_one_in_memory(tmp_path, architecture, norms):
    source = make_rrt(tmp_path / "rrt", architecture, norms)
    for name, dtype in (("recursive", None), ("recursive", torch.bfloat16), ("dense", torch.bfloat16)):
        inside, outside = (
            verify.reference(source, dtype, from_disk, FORMATS[name].MULTIPLIED_OUT) for from_disk in (False, True)
        )
        assert torch.equal(inside.logits, outside.logits)
        assert inside.rounding == outside.rounding
        assert (inside.rounding > 0) is (dtype is not None)


@pytest.mark.slow
def test_a_model_larger_than_memory_is_checked_from_disk(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "MODEL_SHARE", 0)
    source, asked = make_rrt(tmp_path / "rrt"), recipe(dtype="bfloat16", max_shard_size="100KB")
    result = stage.export(str(source), str(tmp_path / "out"), asked)
    assert "read from disk, matrix by matrix" in " ".join(capsys.readouterr().err.split())
    assert result["max_logit_difference"] <= 1e-3 * result["largest_logit"]


@pytest.mark.slow
def test_a_wrong_matrix_of_a_model_larger_than_memory_is_found(tmp_path, monkeypatch):
    def write_wrong(source, folder, *args, write=FORMATS["dense"].write):
        parameters = write(source, folder, *args)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return parameters

    monkeypatch.setattr(machine, "MODEL_SHARE", 0)
    monkeypatch.setattr(FORMATS["dense"], "write", write_wrong)
    source = make_rrt(tmp_path / "rrt")
    with pytest.raises(RrtcError, match="it is not the model it was made from: a logit differs"):
        stage.export(str(source), str(tmp_path / "out"), recipe(format="dense", dtype="bfloat16"))
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rrt"]
