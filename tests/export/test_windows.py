"""Exports of a model whose visits see a window: the same windows elsewhere, full attention where that is no worse, or a
refusal."""

import json
import re
from pathlib import Path

import pytest
import torch
from exports import STRANGER, make_rrt, recipe, run_python
from pico import pico_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from windowed import KINDS, SINKS, WINDOW, by_brute_force, see_windows, without_windows

from rrtc import api, machine
from rrtc.cli import tables
from rrtc.errors import RrtcError
from rrtc.export import card, full_attention, stage, verify
from rrtc.export.formats import FORMATS, recursive
from rrtc.export.formats.gguf import SCRIPT, VARIABLE
from rrtc.io.provenance import read_provenance
from rrtc.stock.architecture import read_plan
from rrtc.units import size

IDS = torch.arange(2 * 60).view(2, 60) * 37 % 320
TEXT = "It rained, and then it rained again. def f(x): return x * 0x1f\n" * 400


@pytest.fixture
def source(tmp_path) -> Path:
    return see_windows(make_rrt(tmp_path / "rrt"))


def on_text(folder: Path, **export):
    (folder / "text.txt").write_text(TEXT)
    return recipe(calibrate_on=[str(folder / "text.txt")], **export)


@pytest.mark.slow
def test_recursive_has_the_windows_where_rrtc_is_not(source, tmp_path, cold):
    target = tmp_path / "out"
    result = stage.export(str(source), str(target), recipe())
    assert "attention_rrt.py" in result["files"]
    run_python(STRANGER, json.dumps(IDS.tolist()), str(tmp_path / "found"), str(target), cwd=tmp_path)
    found = load_file(tmp_path / "found")
    torch.testing.assert_close(found[f"{target}:logits"], by_brute_force(source, IDS), atol=1e-4, rtol=0)
    card = " ".join((target / "README.md").read_text().split())
    plan = read_plan(recursive.recursive_config(source))
    assert f"- 6 of 12 KV heads: the last {WINDOW} tokens, itself included, and the first {SINKS} of its" in card
    assert "- 6 KV heads: everything. As layer.head: `0.1 2.0 2.1 3.1 5.0 5.1`" in card
    assert f"takes {size(plan.kv_bytes(2048, 4))} at 2,048 tokens" in card and "0.503, 0.501, 0.500 of the base" in card
    assert "saves 49.9% of the KV cache at 8,192 tokens" in card


@pytest.mark.slow
def test_an_export_that_lost_its_windows_is_noticed(source, tmp_path, monkeypatch):
    write = recursive.write_config

    def without(folder, target, dtype):
        write(folder, target, dtype)
        config = json.loads((target / "config.json").read_text())
        for visit in config["visits"]:
            visit.pop("attention", None)
        (target / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(recursive, "write_config", without)
    with pytest.raises(RrtcError, match="it is not the model it was made from: a logit differs"):
        stage.export(str(source), str(tmp_path / "out"), recipe())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_quantized_it_keeps_its_windows(bits, source, tmp_path):
    result = stage.export(str(source), str(tmp_path / "out"), on_text(tmp_path, quantize=bits, calibrate_tokens=512))
    assert result["quantize"] == bits and result["max_logit_difference"] < 1e-3
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert [visit.get("attention") for visit in model.config.visits] == [*KINDS, *KINDS]


@pytest.mark.slow
def test_a_model_with_windows_larger_than_memory_is_checked_from_disk(source, tmp_path, monkeypatch):
    in_memory = verify.reference(source, torch.bfloat16)
    from_disk = verify.reference(source, torch.bfloat16, from_disk=True)
    assert in_memory.ids.shape[1] == verify.TOKENS + WINDOW + SINKS and in_memory.logits.shape[1] == verify.TOKENS
    torch.testing.assert_close(from_disk.logits, in_memory.logits, atol=1e-5, rtol=0)
    monkeypatch.setattr(full_attention, "TOLERANCE", 100.0)  # of random weights, either can be better
    losses = full_attention.measure_full_attention
    held_out = stage._held_out(on_text(tmp_path).export, source, recursive.recursive_config(source), 64, 256)
    one, other = (losses(source, held_out, "dense", there) for there in (False, True))
    assert one == pytest.approx(other, abs=1e-5)
    monkeypatch.setattr(machine, "MODEL_SHARE", 0)
    result = stage.export(str(source), str(tmp_path / "out"), recipe(dtype="bfloat16", max_shard_size="100KB"))
    assert result["max_logit_difference"] <= 1e-3 * result["largest_logit"]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_dense_attends_to_everything_where_that_is_no_worse(architecture, tmp_path, monkeypatch, capsys):
    source = see_windows(make_rrt(tmp_path / "rrt", architecture))
    plain = without_windows(source, tmp_path / "plain")
    monkeypatch.setattr(full_attention, "TOLERANCE", 100.0)  # of random weights, either can be better
    result = stage.export(str(source), str(tmp_path / "out"), on_text(tmp_path, format="dense"))
    found = result["full_attention"]
    ids = torch.tensor(pico_tokenizer()(TEXT[len(TEXT) - len(TEXT) // 10 :])["input_ids"])
    ids = ids[: len(ids) // 256 * 256].view(-1, 256)
    assert (found["tokens"], found["context"]) == (ids.numel() - len(ids), 256)
    for name, logits in (("windows", by_brute_force(source, ids)), ("full", logits_of(plain, ids))):
        log_p = logits[:, :-1].log_softmax(-1)
        assert found[name] == pytest.approx(-log_p.gather(2, ids[:, 1:, None]).mean().item(), abs=1e-4), name
    torch.testing.assert_close(logits_of(tmp_path / "out", IDS), logits_of(plain, IDS), atol=1e-4, rtol=0)
    assert "attention" not in json.loads((tmp_path / "out" / "config.json").read_text()).get("visits", "")
    assert read_provenance(tmp_path / "out")["measured"]["export"]["full_attention"] == found
    said = f"loses {found['full']:.4f} nats a token, and with the windows that it was made with {found['windows']:.4f}"
    assert said in " ".join((tmp_path / "out" / "README.md").read_text().split())
    assert f"Full attention is no worse: {found['full']:.4f}" in capsys.readouterr().err
    assert f"attends to everything: {found['full']:.4f}" in str(tables.export(result, "out").renderables[1])


def logits_of(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture(scope="module")
def learnt(tmp_path_factory) -> Path:
    """A model that has learnt with its windows, which let its visits see three tokens."""
    root = tmp_path_factory.mktemp("learnt")
    folder = see_windows(make_rrt(root / "rrt"), ({"window": 3, "sinks": 0, "heads": []},))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    ids = torch.tensor(pico_tokenizer()(TEXT)["input_ids"][: 20 * 8 * 32]).view(20, 8, 32)
    for batch in ids:
        model(batch, labels=batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("form", ["dense", "gguf"])
def test_full_attention_that_is_worse_is_refused_with_the_figures(form, learnt, tmp_path, monkeypatch):
    (tmp_path / SCRIPT).touch()
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(stage, "reference", None)  # nothing was done yet
    said = (
        rf"The {form} format attends to everything, .* loses (\d\.\d+) nats a token so, and (\d\.\d+) with its windows"
    )
    with pytest.raises(RrtcError, match=said) as error:
        stage.export(str(learnt), str(tmp_path / "out"), on_text(tmp_path, format=form))
    full, windows = map(float, re.search(said, str(error.value)).groups())
    assert full > windows + full_attention.TOLERANCE and not (tmp_path / "out").exists()
    assert "recursive" in error.value.hint


def test_landmark_blocks_are_on_the_card_and_in_what_is_checked(tmp_path):
    kind = {"window": WINDOW, "sinks": SINKS, "heads": [0], "landmark": {"size": 4, "count": 2, "seed": 3}}
    config = recursive.recursive_config(see_windows(make_rrt(tmp_path / "rrt"), (kind,)))
    said = f"- 6 of 12 KV heads: the last {WINDOW} tokens, itself included, 2 blocks of 4 tokens before them, and the"
    assert said in card._windows(read_plan(config))
    assert verify.fixed_ids(config).shape[1] == verify.TOKENS + WINDOW + SINKS + 8


def test_onnx_is_refused_before_any_work(source, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "reference", None)
    with pytest.raises(RrtcError, match="The onnx format is not for models with KV heads that see a window"):
        stage.export(str(source), str(tmp_path / "out"), recipe(format="onnx"))
    assert not (tmp_path / "out").exists()


def test_a_run_that_would_end_in_such_an_export_is_refused_at_once(dense, tmp_path):
    asked = {"model": str(dense("llama")), "init": {"kv_budget": 0.5}, "export": {"format": "onnx"}}
    with pytest.raises(RrtcError, match="The onnx format is not for models with KV heads that see a window"):
        api.run(asked, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "asked, said",
    [
        (
            {"init": {"kv_kinds": "linear"}, "export": {"format": "gguf"}},
            "The gguf format is not for .*linear attention",
        ),
        (
            {"init": {"kv_kinds": "window,linear"}, "eval": {"engine": True}},
            "The engine for many requests is not for .*linear attention",
        ),
        (
            {"init": {"kv_kinds": "last_loop"}, "export": {"format": "dense"}},
            "The dense format is not for models with visits that read keys and values of another loop",
        ),
        (
            {"init": {"kv_kinds": "last_loop"}, "uptrain": {"compile": True}},
            "--compile is not for models with visits that read",
        ),
        ({"init": {}, "uptrain": {"losses": {"attention": 1}}}, "The loss 'attention' is about linear attention"),
    ],
)
def test_a_run_whose_stages_do_not_fit_what_visits_may_see_is_refused_at_once(asked, said, dense, tmp_path):
    choice = {"kv_choice": "last"} if asked["init"].get("kv_kinds") == "last_loop" else {}
    asked |= {"model": str(dense("llama")), "init": {"kv_budget": 0.5} | choice | asked["init"]}
    with pytest.raises(RrtcError, match=said):
        api.run(asked, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_each_format_says_what_cache_it_takes(source):
    config = recursive.recursive_config(source)
    plan = read_plan(config)
    token = plan.architecture.kv_bytes_per_token(1)
    found = {name: made_as.kv_bytes(config, 1000, torch.float32) for name, made_as in FORMATS.items()}
    assert found == {
        "recursive": plan.kv_bytes(1000, 4), "dense": 4000 * token, "onnx": 4000 * token, "gguf": 2000 * token,
    }  # fmt: skip
    assert plan.kv_bytes(1000, 4) < 2100 * token
