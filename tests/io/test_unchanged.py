"""Models that are deleted, replaced or written into while they are read: one sentence, or the right result; never a
folder or a measurement that says it is of one model and is of another."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from initialized import recipe
from moments import at_the
from safetensors.torch import load_file, save_file
from uptraining import ONE_STEP, curve, settings, weights

from rrtc import scoring
from rrtc.errors import RrtcError
from rrtc.eval.stage import evaluate
from rrtc.export import stage as exporting
from rrtc.init import stage as initializing
from rrtc.init.job import Job
from rrtc.io.source import content_hash, find_model
from rrtc.io.unchanged import Unchanged
from rrtc.io.weights import Weights
from rrtc.recipe.schema import Recipe
from rrtc.text import shards
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.trainer import DistillationTrainer

SCORING = {"tokens": 512, "context": 64, "passkey_trials": 0, "speed_rounds": 0, "sample_tokens": 0}


def others(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in `folder`, each twice as large."""
    return {name: 2 * tensor for name, tensor in load_file(folder / "model.safetensors").items()}


def replace(folder: Path) -> None:
    save_file(others(folder), folder / "new", metadata={"format": "pt"})
    (folder / "new").rename(folder / "model.safetensors")


def write_into(folder: Path) -> None:
    save_file(others(folder), folder / "new", metadata={"format": "pt"})
    with open(folder / "model.safetensors", "r+b") as file:
        file.write((folder / "new").read_bytes())
    (folder / "new").unlink()


def change_config(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace("1e-06", "1e-05"))
    assert (folder / "config.json").read_text() != text


def change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text() + "\n")


CHANGES = [replace, write_into, change_config, change_tokenizer, shutil.rmtree]


@pytest.mark.parametrize("change", CHANGES)
def test_every_way_to_be_another_model_is_seen(dense, tmp_path, change):
    folder = shutil.copytree(dense("llama"), tmp_path / "model")
    source = find_model(str(folder))
    (folder / "notes.txt").write_text("what is no part of the model may come and go")
    with source.files.blamed():
        source.files.check()
    change(folder)
    how = "deleted" if change is shutil.rmtree else "changed"
    with pytest.raises(RrtcError, match=rf"{folder}/.* was {how} while it was in use\.$"):
        source.files.check()
    with pytest.raises(RrtcError, match="while it was in use"), source.files.blamed():
        raise OSError("whatever comes of it")
    with pytest.raises(KeyboardInterrupt), source.files.blamed():
        raise KeyboardInterrupt


def test_what_is_mapped_minds_only_what_is_written_into_it(dense, tmp_path):
    for change in CHANGES:
        folder = shutil.copytree(dense("llama"), tmp_path / change.__name__)
        files = Unchanged(folder / "model.safetensors")
        change(folder)
        if change is write_into:
            with pytest.raises(RrtcError, match="model.safetensors was changed"):
                files.check_mapped()
        else:
            files.check_mapped()


def test_no_tensor_comes_from_another_file_than_the_header(dense, tmp_path):
    folder = shutil.copytree(dense("llama"), tmp_path / "model")
    opened = Weights(folder)
    name = next(iter(opened))
    opened.raw(name)
    replace(folder)
    with pytest.raises(RrtcError, match="model.safetensors was changed while it was in use"):
        opened.raw(name)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("place", [(2, Job, "save_slot"), (1, initializing, "_write")], ids=["in slots", "in the end"])
def test_init(dense, tmp_path, monkeypatch, change, place):
    base, out = shutil.copytree(dense("llama"), tmp_path / "base"), tmp_path / "out"
    number, where, name = place
    at_the(number, monkeypatch, where, name, lambda: change(base))
    with pytest.raises(RrtcError, match="while it was in use"):
        initializing.init(str(base), str(out), recipe(rank=4))
    assert not out.exists()


def straight(rrt: Path) -> Path:
    """What comes of `rrt` where nothing happens to it."""
    target = rrt.parent / "undisturbed"
    if not target.exists():
        uptrain(str(rrt), str(target), settings())
    return target


@pytest.fixture
def pair(dense, rrt, tmp_path) -> tuple[Path, Path]:
    """Copies of a folder that can be trained and of the dense model beside it, which it finds there."""
    shutil.copytree(dense("llama"), tmp_path / "dense")
    said = (shutil.copytree(rrt, tmp_path / "rrt") / "rrtc.yaml").read_text()
    (tmp_path / "rrt" / "rrtc.yaml").write_text(said.replace(str(dense("llama")), str(tmp_path / "dense")))
    return tmp_path / "rrt", tmp_path / "dense"


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_uptrain_of_a_folder_that_changes(pair, tmp_path, monkeypatch, change):
    at_the(5, monkeypatch, DistillationTrainer, "compute_loss", lambda: change(pair[0]))  # in step 3 of 6
    with pytest.raises(RrtcError, match=f"{pair[0]}/.* while it was in use"):
        uptrain(str(pair[0]), str(tmp_path / "out"), settings())
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.parametrize("change", [replace, write_into, shutil.rmtree])
def test_uptrain_with_a_teacher_that_changes(rrt, pair, tmp_path, monkeypatch, change):
    at_the(5, monkeypatch, DistillationTrainer, "compute_loss", lambda: change(pair[1]))
    if change is write_into:
        with pytest.raises(RrtcError, match=f"{pair[1]}/model.safetensors was changed while it was in use"):
            uptrain(str(pair[0]), str(tmp_path / "out"), settings())
        assert not (tmp_path / "out").exists()
    else:  # what was loaded is what it was
        uptrain(str(pair[0]), str(tmp_path / "out"), settings())
        expected = straight(rrt)
        assert curve(tmp_path / "out") == curve(expected)
        assert all(torch.equal(t, weights(expected)[n]) for n, t in weights(tmp_path / "out").items())


@pytest.mark.parametrize("change", [replace, write_into, shutil.rmtree])
@pytest.mark.parametrize("which", [0, 1])
def test_eval(pair, tmp_path, monkeypatch, change, which):
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    asked = Recipe.model_validate({"eval": SCORING})
    with monkeypatch.context() as patched:
        at_the(2, patched, scoring, "score_tokens", lambda: change(pair[which]))  # the first is of the dense model
        with pytest.raises(RrtcError, match=f"{pair[which]}/.* while it was in use"):
            evaluate(str(pair[0]), asked, output=str(tmp_path / "report"))
    assert not (tmp_path / "report").exists()
    assert len(list((tmp_path / "cache" / "eval").iterdir())) == 1  # what was measured before that


@pytest.mark.parametrize("change", CHANGES)
def test_export(pair, tmp_path, monkeypatch, change):
    at_the(1, monkeypatch, exporting, "whole_folder", lambda: change(pair[0]))  # after the logits to compare with
    with pytest.raises(RrtcError, match=f"{pair[0]}/.* while it was in use"):
        exporting.export(str(pair[0]), str(tmp_path / "out"), Recipe.model_validate({"export": {"format": "dense"}}))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_text_that_changes_while_it_is_tokenized_is_not_kept(rrt, tmp_path, monkeypatch):
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text("\n\n\n".join(f"Document {n} is about the number {n}. " * 8 for n in range(120)))
    asked = settings(data=[str(text)], tokens=ONE_STEP)
    at_the(1, monkeypatch, shards, "_write", lambda: text.write_text(text.read_text().replace("number", "figure")))
    with pytest.raises(RrtcError, match="text.txt was changed while it was in use"):
        uptrain(str(rrt), str(tmp_path / "out"), asked)
    assert not list((tmp_path / "cache").rglob("ids.bin"))
    uptrain(str(rrt), str(tmp_path / "out"), asked)


def test_a_gguf_file_that_changes_while_it_is_dequantized_is_not_kept(dense, tmp_path, monkeypatch):
    from gguf_file import write_gguf

    from rrtc.io import source as sources

    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    write_gguf(file)
    at_the(1, monkeypatch, sources, "dequantize", lambda: os.utime(file))
    with pytest.raises(RrtcError, match="model.gguf was changed while it was in use"):
        find_model(str(file))
    assert find_model(str(file)).folder.name == content_hash(file)
