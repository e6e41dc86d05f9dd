"""init to a size: the files are that large, and what else could be had at that size is said."""

import re

import pytest
import torch
from initialized import recipe
from pico import VOCABULARY, save_pico
from safetensors.torch import load_file, save_file

from rrtc import console
from rrtc.cli import tables
from rrtc.errors import RrtcError
from rrtc.export.stage import export
from rrtc.init.budget import measure_groups
from rrtc.init.calibrate import calibrate
from rrtc.init.dry_run import dry_run
from rrtc.init.job import prepare
from rrtc.init.stage import init
from rrtc.io.dense import DenseModel
from rrtc.io.provenance import read_provenance
from rrtc.io.source import find_model, load_tokenizer
from rrtc.io.weights import Weights
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture
from rrtc.stock.streamed import StreamedModel
from rrtc.stock.trial import find_folds, find_neurons
from rrtc.text.calibration import calibration_windows

CPU = torch.device("cpu")


def small(**choices):
    return recipe(calibrate_tokens=512, **choices)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3", "gpt2"])
def test_the_files_are_as_large_as_was_asked(dense, tmp_path, architecture, dtype):
    folder = dense(architecture)
    half = small(size="70%", dtype=dtype)
    measured = init(str(folder), str(tmp_path / "out"), half)
    file = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0.9 * 0.7 * measured["dense_bytes"] < file <= 0.7 * measured["dense_bytes"]
    assert measured["bytes_on_disk"] == file
    assert file - measured["bytes"] <= 0.1 * file  # a header, of so small a model
    assert dry_run(str(folder), half)["bytes"] >= measured["bytes"]


@pytest.mark.slow
def test_the_export_is_as_large_as_was_asked(tmp_path):
    folder = save_pico(tmp_path / "dense", "gemma3", hidden_size=256, intermediate_size=512, head_dim=64)
    asked = 1_300_000
    planned = small(size="1300KB", quantize="int4", dtype="bfloat16", sharing="middle_cycle")
    dry = dry_run(str(folder), planned)
    measured = init(str(folder), str(tmp_path / "out"), planned)
    assert dry["params_total"] is None and dry["bytes"] >= measured["quantized_bytes"]
    asking = Recipe(export={"quantize": "int4", "calibrate_tokens": 512})
    exported = export(str(tmp_path / "out"), str(tmp_path / "small"), asking)
    tensors = Weights(tmp_path / "small")
    assert sum(tensors.raw(name).nbytes for name in tensors) == measured["quantized_bytes"]
    assert 0.97 * asked <= exported["bytes"] <= asked < measured["bytes_on_disk"]


@pytest.mark.slow
def test_several_files_together_are_as_large_as_was_asked(dense, tmp_path):
    measured = init(str(dense("llama")), str(tmp_path / "out"), small(size="480KB", max_shard_size="100KB"))
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 3 and sum(file.stat().st_size for file in files) == measured["bytes_on_disk"] <= 480_000


@pytest.mark.slow
def test_what_else_could_be_had_is_what_its_flags_make(dense, tmp_path, capfd):
    """Of six layers all are measured, so that nothing is estimated."""
    folder = str(dense("llama"))
    measured = init(folder, str(tmp_path / "out"), small(size=0.7))
    rows = measured["alternatives"]
    assert read_provenance(tmp_path / "out")["measured"]["init"]["alternatives"] == rows
    assert [(row["way"], row["made"]) for row in rows] == [
        ("tied in two loops", True), ("tied in sequence", False), ("nothing tied", False)
    ]  # fmt: skip
    assert rows[0]["predicted_excess"] == measured["predicted_excess"]
    assert [row["exits"] for row in rows] == [1, 0, 0]
    assert [row["shared_params"] > 0 for row in rows] == [True, True, False]
    assert "At the same size at least about: tied in sequence" in " ".join(capfd.readouterr().err.split())
    for row, choices in zip(
        rows, ({"sharing": "middle_cycle"}, {"sharing": "middle_sequence"}, {"loops": 1}), strict=True
    ):
        assert row["flags"] == " ".join(f"--{name} {value}" for name, value in choices.items())
        other = init(folder, str(tmp_path / row["way"]), small(size=0.7, **choices))
        assert ("alternatives" in other) == ("sharing" not in choices)
        for ours, theirs in (("predicted_excess",) * 2, ("params_total",) * 2, ("flops_per_token",) * 2):
            assert row[ours] == other[theirs], (row["way"], ours)
        if row["made"]:
            assert (
                load_file(tmp_path / "out" / "model.safetensors").keys()
                == load_file(tmp_path / row["way"] / "model.safetensors").keys()
            )
    with console.results.capture() as shown:
        console.results.print(tables.init(measured, "out", small(size=0.7).init.resolved()))
    assert all(said in shown.get() for said in ("(made)", "middle_cycle", "middle_sequence", "--loops 1"))


@pytest.mark.slow
def test_a_way_that_cannot_be_is_left_out(tmp_path):
    folder = save_pico(tmp_path / "dense", num_hidden_layers=5)
    with pytest.raises(RrtcError, match="5 layers less 2 kept ones cannot be divided into 2 loops"):
        init(str(folder), str(tmp_path / "out"), small(size=0.8))
    (row,) = init(str(folder), str(tmp_path / "out"), small(size=0.8, loops=1))["alternatives"]
    assert row["way"] == "nothing tied" and row["made"]


def test_a_few_slots_stand_for_the_others(dense, tmp_path):
    source = find_model(str(dense("llama")))
    model, neurons = DenseModel(source, find_folds(source.config())[0]), find_neurons(source.config())
    windows = calibration_windows(InitRecipe(calibrate_tokens=256), load_tokenizer(source.folder), VOCABULARY, 64)
    streamed = StreamedModel(source.config(), model.raw, CPU)
    calibration = calibrate(model, streamed, neurons, windows, tmp_path, CPU, lambda windows: None)
    alone = make_plan(read_architecture(source.config()), InitRecipe(size=0.7, loops=1))
    groups = measure_groups(alone, False, model, calibration, neurons, CPU, tmp_path, most=2)
    assert sorted(file.name for file in tmp_path.glob("group-*")) == [f"group-{n}.pt" for n in (0, 2, 4, 5)]
    assert [group.layers for group in groups] == [(n,) for n in range(6)]
    for number, like in ((1, 2), (3, 2)):
        for ways, theirs in zip(groups[number].parts, groups[like].parts, strict=True):
            for way, other in zip(ways, theirs, strict=True):
                assert [layers for layers, *_ in way.narrowed] == [(number,)] * len(other.narrowed)
                for curve, same in zip(way.curves, other.curves, strict=True):
                    assert curve.layers == (number,) and torch.equal(curve.costs, same.costs)


def test_numbers_that_will_be_rounded_are_named(tmp_path, capfd):
    """Norms in float32 in a bfloat16 model: nothing else of it would be rounded, and nobody asked for that."""
    folder = save_pico(tmp_path / "dense")
    tensors = load_file(folder / "model.safetensors")
    mixed = {name: t if t.dim() < 2 else t.bfloat16() for name, t in tensors.items()}
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    says = "will be rounded to bfloat16. --dtype float32 keeps all"
    for dtype, is_said in (("auto", True), ("bfloat16", False), ("float32", False)):
        prepare(str(folder), tmp_path / "out", small(size=0.7, dtype=dtype))
        assert (says in capfd.readouterr().err) is is_said
    assert DenseModel(find_model(str(folder))).finer_than("bfloat16") == [n for n, t in tensors.items() if t.dim() < 2]


def test_16_bits_are_proposed_where_the_source_has_32(dense, tmp_path, capfd):
    says = "--dtype bfloat16 makes it half as large"
    dry_run(str(dense("llama")), small(size=0.7))
    assert says in capfd.readouterr().err
    for dtype in ("float32", "bfloat16"):
        dry_run(str(dense("llama")), small(size=0.7, dtype=dtype))
    dry_run(str(save_pico(tmp_path / "half").parent / "half"), small(size=0.7, dtype="float16"))
    assert says not in capfd.readouterr().err


def test_sizes_are_told_in_the_unit_of_the_question():
    made = {
        "params_total": 67_000_000, "params_non_embedding": 40_000_000, "dense_params_total": 134_000_000,
        "dense_params_non_embedding": 106_000_000, "bytes": 134_000_000, "dense_bytes": 268_000_000,
        "bytes_on_disk": 135_000_000, "source_bytes": None, "kv_bytes": {}, "folded_norms": [], "seconds": 1.0,
    }  # fmt: skip
    said = {
        "size": "Wrote out: 135 MB, 0.504 of the dense model in the same format; 67M parameters",
        "budget": "Wrote out: 67M parameters, 40M of them without embeddings, 0.377 of the dense model's; 135 MB",
        "rank": "Wrote out: 67M parameters, 135 MB, 0.504 of the dense model in the same format",
    }
    for asked, line in said.items():
        with console.results.capture() as shown:
            console.results.print(tables.init(made, "out", {asked: 0.5}))
        assert re.sub(r"\s+", " ", shown.get()).startswith(line)
