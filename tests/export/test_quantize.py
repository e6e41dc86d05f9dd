"""Quantized exports: the rounding against brute force, and the folders that others load."""

import importlib.util
import json
import re

import pytest
import torch
from exports import IDS, STRANGER, logits_of, make_rrt, run_python
from mixed_forms import save_mixed
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from rrtc import machine
from rrtc.api import inspect
from rrtc.cli.app import app
from rrtc.errors import RrtcError, WrongUsage
from rrtc.export import quantize as quantizing
from rrtc.export import stage
from rrtc.export.formats import FORMATS
from rrtc.export.formats.recursive import recursive_config
from rrtc.io.provenance import read_provenance
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.source import load_model, load_tokenizer
from rrtc.io.weights import Weights
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.schema import Recipe, load_recipe
from rrtc.scoring import score
from rrtc.text.calibration import calibration_windows
from rrtc.text.windows import Windows
from rrtc.tying import rounding
from rrtc.uptrain.stage import uptrain

BITS = {"int8": 8, "int4": 4}


def spoiled(*shape: int) -> torch.Tensor:
    """Second moments of inputs that depend on each other."""
    x = torch.randn(4 * shape[0], shape[0]) @ torch.randn(shape[0], shape[0])
    return x.T @ x / len(x)


def lost(change: torch.Tensor, moments: torch.Tensor) -> float:
    return (change @ moments @ change.T).trace().item()


def recipe(**export) -> Recipe:
    return Recipe(export={"calibrate_tokens": 1024} | export)


@pytest.mark.parametrize("bits", [4, 8])
def test_every_rounded_weight_is_a_multiple_of_its_scale_that_fits(bits):
    torch.manual_seed(0)
    weight, moments = torch.randn(24, 64), spoiled(64)
    weight[3, 16:32] = 0  # a group that has no largest weight
    for scale in (rounding.widest_scales(weight, bits, 16), rounding.best_scales(weight, bits, 16, moments.diagonal())):
        assert scale.shape == (24, 4)
        for found in (rounding.round_to_nearest(weight, scale, bits), rounding.gptq(weight, moments, scale, bits)):
            whole = found / scale.repeat_interleave(16, 1)
            torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
            assert whole.min() >= -(2 ** (bits - 1)) - 1e-4
            assert whole.max() <= 2 ** (bits - 1) - 1 + 1e-4
    nearest = rounding.round_to_nearest(weight, rounding.widest_scales(weight, bits, 16), bits)
    assert (
        (nearest - weight).abs() <= rounding.widest_scales(weight, bits, 16).repeat_interleave(16, 1) / 2 + 1e-6
    ).all()


def test_gptq_rounds_to_the_nearest_where_inputs_do_not_depend_on_each_other():
    torch.manual_seed(1)
    weight = torch.randn(16, 200)
    scale = rounding.widest_scales(weight, 4, 8)
    found = rounding.gptq(weight, torch.diag(torch.rand(200) + 0.1), scale, 4)
    torch.testing.assert_close(found, rounding.round_to_nearest(weight, scale, 4), atol=1e-6, rtol=0)


def test_gptq_is_the_greedy_choice_that_least_squares_gives():
    """Input by input: round, then choose all that are still to come anew by least squares."""
    torch.manual_seed(2)
    weight, moments = torch.randn(3, 12), spoiled(12)
    scale = rounding.widest_scales(weight, 4, 4)
    damped = rounding._damped(moments).float()
    left, fixed = weight.clone(), torch.zeros_like(weight)
    for i in range(12):
        fixed[:, i] = rounding._nearest(left[:, i], scale[:, i // 4], 4)
        error = (weight - fixed)[:, : i + 1]  # of what is fixed; the rest makes up for it
        rest = torch.linalg.solve(damped[i + 1 :, i + 1 :], damped[i + 1 :, : i + 1] @ error.T).T
        left[:, i + 1 :] = weight[:, i + 1 :] + rest
    torch.testing.assert_close(rounding.gptq(weight, moments, scale, 4), fixed, atol=1e-4, rtol=0)


def test_what_is_counted_loses_less_than_what_is_not():
    torch.manual_seed(3)
    weight, moments = torch.randn(32, 96), spoiled(96)
    weight[:, ::7] *= 6  # some that make a whole group coarse
    widest, best = rounding.widest_scales(weight, 4, 16), rounding.best_scales(weight, 4, 16, moments.diagonal())
    costs = [lost(weight - rounding.round_to_nearest(weight, scale, 4), moments) for scale in (widest, best)]
    costs.append(lost(weight - rounding.gptq(weight, moments, best, 4), moments))
    diagonal = torch.diag(moments.diagonal())
    by_scale = [lost(weight - rounding.round_to_nearest(weight, scale, 4), diagonal) for scale in (widest, best)]
    assert by_scale[1] < by_scale[0]
    assert costs[2] < 0.8 * min(costs[:2])


@pytest.mark.parametrize("shape", [(20, 36), (36, 20)])
def test_factors_lose_what_a_truncation_must(shape):
    torch.manual_seed(4)
    wanted, moments = torch.randn(*shape), rounding._damped(spoiled(shape[1])).float()
    b, a = rounding.best_factors(wanted, moments, 5)
    assert b.shape == (shape[0], 5)
    assert a.shape == (5, shape[1])
    values, vectors = torch.linalg.eigh(rounding._damped(moments))
    root = vectors * values.sqrt()
    tail = torch.linalg.svdvals(wanted.double() @ root)[5:].square().sum().item()
    assert lost((wanted - b @ a).double(), rounding._damped(moments)) == pytest.approx(tail, rel=1e-4)


def test_a_shared_matrix_is_rounded_by_what_all_its_visits_see(tmp_path):
    source = make_rrt(tmp_path / "rrt")
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    matrices = quantizing._matrices(model)
    assert len(matrices) == 3 * 7
    assert {len(matrix.readers) for matrix in matrices} == {2}
    inputs: dict[torch.nn.Module, list] = {}

    def keep(module, args):
        inputs.setdefault(module, []).append(args[0].flatten(0, 1))

    hooks = [reader.register_forward_pre_hook(keep) for matrix in matrices for reader in matrix.readers]
    with torch.no_grad():
        for ids in IDS:
            model(ids[None])
    for hook in hooks:
        hook.remove()
    found = quantizing._moments(model, matrices, IDS, lambda: None)
    for module, seen in inputs.items():
        x = torch.cat(seen)
        torch.testing.assert_close(found[module], x.T @ x / len(x), atol=1e-5, rtol=1e-4)
    queries, keys = (m for m in matrices if m.name.startswith("model.slots.0.") and re.search("[qk]_proj", m.name))
    assert found[queries.readers[0]] is found[keys.readers[0]]


@pytest.mark.slow
@pytest.mark.parametrize(("made_as", "number"), [("recursive", "int4"), ("dense", "int8")])
def test_a_quantized_export_loads_where_rrtc_is_not(tmp_path, monkeypatch, made_as, number):
    monkeypatch.setattr(quantizing, "MOMENTS_AT_ONCE", 100_000)  # several readings, even of a pico model
    source, target, plain = save_mixed(tmp_path / "rrt", "llama"), tmp_path / "out", tmp_path / "plain"
    result = stage.export(str(source), str(target), recipe(format=made_as, quantize=number, max_shard_size="60KB"))
    plain.mkdir()
    FORMATS[made_as].write(source, plain, torch.float32, 10**9)
    assert result["max_logit_difference"] <= 1e-4 * result["largest_logit"]
    before, files = Weights(plain), Weights(target)
    assert len(files.files) > 1
    shown = inspect(str(target))
    numbers = "int4, int8 and float32" if made_as == "recursive" else "int8 and float32"
    assert (shown["dtype"], shown["bytes_on_disk"]) == (numbers, result["bytes"])
    assert result["bytes"] == files.bytes_on_disk < before.bytes_on_disk * (0.5 if number == "int4" else 0.75)
    packed = {name.removesuffix("_packed") for name in files if name.endswith("_packed")}
    tables = {"model.embed_tokens.weight", "lm_head.weight"} if made_as == "recursive" else set()
    assert {name for name in before if name not in files} == packed | tables
    for name in tables:
        module = name.removesuffix(".weight")
        rows, scale = files.raw(f"{module}.table.numbers"), files.raw(f"{module}.table.scale")
        assert (rows.dtype, list(rows.shape), list(scale.shape)) == (torch.int8, before.shape(name), [len(rows), 1])
        assert ((rows * scale - before.raw(name)).abs() <= scale / 2 + 1e-6).all()
    assert sum(part["bytes"] for part in result["parts"].values()) == sum(files.raw(name).nbytes for name in files)
    for name in files:
        if name in before and not name.endswith((".A", ".B")):
            assert torch.equal(files.raw(name), before.raw(name)), name
    for name in packed:
        outputs, inputs = before.shape(name)
        assert files.raw(f"{name}_shape").tolist() == [outputs, inputs]
        assert files.shape(f"{name}_packed") == [outputs, -(-inputs * BITS[number] // 32)]
    run_python(STRANGER, json.dumps(IDS.tolist()), "out.safetensors", str(target), cwd=tmp_path)
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found[f"{target}:hidden"], found[f"{target}:expected_hidden"], atol=1e-6, rtol=0)
    written = AutoModelForCausalLM.from_pretrained(target)
    torch.testing.assert_close(found[f"{target}:logits"], logits_of(written), atol=1e-6, rtol=0)
    plain_logits = logits_of(AutoModelForCausalLM.from_pretrained(plain))
    error = (logits_of(written) - plain_logits).std() / plain_logits.std()
    assert error < (0.1 if number == "int8" else 0.5)
    card = (target / "README.md").read_text()
    assert f"Its numbers: matrices of the layers in {number} (" in card
    assert ("; embeddings and output projection in int8 (" in card) is (made_as == "recursive")
    assert "; everything else in float32 (" in card
    assert "`compressed-tensors`" in card and "LoraConfig" not in card
    assert ("as it would the original" in card) is (made_as == "dense")


def test_calibrated_rounding_moves_the_model_less_than_rounding_to_the_nearest(tmp_path):
    source, target = make_rrt(tmp_path / "rrt"), tmp_path / "out"
    target.mkdir()
    FORMATS["recursive"].write(source, target, torch.float32, 10**9)
    plain = logits_of(AutoModelForCausalLM.from_pretrained(target))
    nearest = AutoModelForCausalLM.from_pretrained(target)
    for matrix in quantizing._matrices(nearest):
        scale = rounding.widest_scales(matrix.linear.weight.data, 4, matrix.group)
        matrix.linear.weight.data = rounding.round_to_nearest(matrix.linear.weight.data, scale, 4)
    found = quantizing.quantize(target, 4, IDS.repeat(4, 1), Windows(IDS, 1.0), 10**9)
    written = logits_of(AutoModelForCausalLM.from_pretrained(target))
    assert (written - plain).square().mean() < 0.5 * (logits_of(nearest) - plain).square().mean()
    assert found.bits_per_byte.keys() == {"plain", "nearest", "calibrated"}
    assert len(set(found.bits_per_byte.values())) == 3
    # A part of the model is run, before any pass of the whole.
    again = score(load_model(target, dtype=torch.float32), Windows(IDS, 1.0)).bits_per_byte
    assert again == pytest.approx(found.bits_per_byte["calibrated"], abs=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_too_small_for_a_stored_scale_become_zero(bits):
    torch.manual_seed(5)
    weight, moments = torch.randn(8, 32), spoiled(32)
    weight[2] = 1e-8 * torch.randn(32)
    weight[2, 5] = 0
    for scale in (rounding.widest_scales(weight, bits, 16), rounding.best_scales(weight, bits, 16, moments.diagonal())):
        stored = quantizing._stored_scale(scale, torch.float16)
        for found in (rounding.round_to_nearest(weight, stored, bits), rounding.gptq(weight, moments, stored, bits)):
            assert found.isfinite().all() and not found[2].any() and found[3].any()


def test_where_inputs_were_never_seen_the_whole_range_is_kept():
    weight, importance = torch.randn(4, 32), torch.ones(32)
    importance[:16] = 0
    widest, best = rounding.widest_scales(weight, 4, 16), rounding.best_scales(weight, 4, 16, importance)
    assert torch.equal(best[:, 0], widest[:, 0])


def test_a_quantized_export_is_not_worked_on(tmp_path):
    source = make_rrt(tmp_path / "rrt")
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {}}
    (source / "config.json").write_text(json.dumps(config))
    for work in (
        lambda: stage.export(str(source), str(tmp_path / "out"), recipe(format="dense")),
        lambda: uptrain(str(source), str(tmp_path / "out"), Recipe()),
    ):
        with pytest.raises(RrtcError, match="is quantized, and what was rounded away is gone"):
            work()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["rrt"]


def test_a_model_larger_than_memory_is_not_quantized(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "MODEL_SHARE", 0)
    with pytest.raises(RrtcError, match="To be quantized, the whole model has to be in memory, and its .* do not fit"):
        stage.export(str(make_rrt(tmp_path / "rrt")), str(tmp_path / "out"), recipe(quantize="int4"))


def test_the_text_is_by_default_what_the_model_was_made_with(tmp_path):
    source, text = make_rrt(tmp_path / "rrt"), tmp_path / "own.txt"
    text.write_text("\n\n\n".join(f"Sentence number {n} of a text of its own. " * 9 for n in range(300)))
    provenance = read_provenance(source)
    provenance["recipe"]["init"]["calibrate_on"] = [str(text)]
    config = recursive_config(source)
    asked = [
        stage._with_text(recipe(calibrate_tokens=512, calibrate_on=on), provenance, source)
        for on in ([], str(text), "pydoc")
    ]
    tokenizer = load_tokenizer(source)
    default, named, built_in = (calibration_windows(one, tokenizer, config.vocab_size, 64) for one in asked)
    assert torch.equal(default, named) and not torch.equal(default, built_in)
    held_out = [stage._held_out(one, source, config, 64, 512).ids for one in asked]
    assert torch.equal(held_out[0], held_out[1]) and not torch.equal(held_out[0], held_out[2])


@pytest.mark.parametrize(
    ("export", "words"),
    [
        ({"quantize": "q4_k_m"}, "quantize q4_k_m is not for the format recursive: there it is one of int8, int4"),
        ({"format": "gguf", "quantize": "int4"}, "for the format gguf: there it is one of q8_0, q6_k, q5_k_m, q4_k_m"),
        ({"quantize": "int4", "calibrate_on": ["self"]}, "calibrate_on cannot be self"),
    ],
)
def test_what_cannot_be_quantized_is_wrong_usage(tmp_path, export, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps({"export": export}))
    with pytest.raises(WrongUsage, match=words):
        load_recipe(str(file))


def test_a_dense_gpt2_cannot_be_quantized(tmp_path):
    source = make_rrt(tmp_path / "rrt", "gpt2")
    with pytest.raises(RrtcError, match="A dense 'gpt2' model keeps its matrices transposed"):
        stage.export(str(source), str(tmp_path / "out"), recipe(format="dense", quantize="int4"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rrt"]


def test_without_the_package_it_says_how_to_get_it(tmp_path, monkeypatch):
    source, find = make_rrt(tmp_path / "rrt"), importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "compressed_tensors" else find(name))
    with pytest.raises(RrtcError, match="compressed-tensors, which is not installed") as raised:
        stage.export(str(source), str(tmp_path / "out"), recipe(quantize="int8"))
    assert raised.value.hint == "Install it with 'pip install rrtc[quantize]'."


@pytest.mark.slow
def test_the_command_shows_what_it_cost(tmp_path):
    source, target = make_rrt(tmp_path / "rrt"), tmp_path / "out"
    command = ["export", str(source), "-o", str(target), "--quantize", "int4", "--calibrate-tokens", "512"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    cost = read_provenance(target)["measured"]["export"]["bits_per_byte"]
    shown = " ".join(done.output.split())
    assert f"{cost['plain']:.4f} before, {cost['calibrated']:.4f} in int4" in shown
    assert f"rounded without calibration: {cost['nearest']:.4f}" in shown


@pytest.mark.slow
def test_what_is_quantized_is_compared_with_the_model_before(tmp_path, monkeypatch):
    source, add = make_rrt(tmp_path / "rrt"), ShardWriter.add_blocks

    def faulty(self, name, blocks):
        spoilt = name.endswith("layers.3.mlp.up_proj.weight")
        add(self, name, [torch.cat(list(blocks)).flip(0)] if spoilt else blocks)

    monkeypatch.setattr(ShardWriter, "add_blocks", faulty)
    with pytest.raises(RrtcError, match="not the model it was made from: a logit differs by"):
        stage.export(str(source), str(tmp_path / "out"), recipe(format="dense", quantize="int8"))
    assert [path.name for path in tmp_path.iterdir()] == ["rrt"]


@pytest.mark.parametrize("other", [{}, {"dtype": "float32"}, {"quantize": "int8"}, {"format": "dense"}])
def test_other_numbers_than_a_size_was_planned_for_are_told(other, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(stage, "note", said.append)
    asked, made = ExportRecipe(**({"quantize": "int4"} | other)), {"init": {"size": "60MB", "quantize": "int4"}}
    stage._say_what_was_planned(asked, {"recipe": made}, "bfloat16")
    planned = "The size of 60MB was planned for --format recursive --quantize int4 --dtype bfloat16."
    assert said == ([planned] if other else [])
