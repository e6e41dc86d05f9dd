"""Uptraining of a pico model: the losses are what they should be, whatever the batch is cut into; runs can be
interrupted and resumed; and what a user can get wrong is said before any work."""

import io
import json
import math
import resource
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ready
import torch
from pico import pico_model, pico_tokenizer, save_pico
from rich.console import Console
from rich.text import Text
from safetensors.torch import save_file
from torch._dynamo.backends.debugging import aot_eager
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from uptraining import (
    BATCH,
    CONTEXT,
    ONE_STEP,
    SETTINGS,
    STEPS,
    curve,
    interrupt_at,
    make_rrt,
    metrics,
    settings,
    uptrain_on_two_processes,
    weights,
)

from rrtc import scoring
from rrtc.errors import RrtcError
from rrtc.export.stage import export
from rrtc.io.folder import only_run
from rrtc.io.provenance import read_provenance
from rrtc.io.source import content_hash, load_for_scoring
from rrtc.io.weights import Weights
from rrtc.recipe.schema import Recipe
from rrtc.text.sources import _built_in
from rrtc.text.windows import Windows
from rrtc.uptrain.checkpoints import whole_checkpoints
from rrtc.uptrain.data import Stream
from rrtc.uptrain.display import Display, sparkline
from rrtc.uptrain.estimate import estimate
from rrtc.uptrain.job import Job, prepare
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.trainer import DistillationTrainer


@pytest.fixture(scope="module")
def trained(rrt) -> Path:
    """The straight run that others are compared with."""
    uptrain(str(rrt), str(rrt.parent / "trained"), settings())
    return rrt.parent / "trained"


def first_of(job: Job, windows: int) -> list[dict[str, torch.Tensor]]:
    """The first windows that training sees."""
    stream = Stream(job.text, windows)
    return [stream[number] for number in range(windows)]


def stop_after_checkpoint(rrt: Path, target: Path, monkeypatch) -> Path:
    """An interrupted run with checkpoints at steps 1 and 3; returns its partial folder."""
    with monkeypatch.context() as patched:
        interrupt_at(patched, 8)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings())
    return target.with_name(target.name + ".partial")


# -- the losses


@pytest.mark.slow
def test_first_step_is_what_measure_says(rrt, dense, trained):
    job = prepare(rrt, settings().uptrain)
    windows = Windows(torch.stack([item["input_ids"] for item in first_of(job, BATCH)]), 1.0)
    scores = scoring.score(load_for_scoring(rrt), windows, load_for_scoring(dense("llama")))
    assert curve(trained)[0] == pytest.approx((scores.loss, scores.kl), abs=1e-5)


@pytest.mark.slow
def test_a_model_made_with_dropout_learns_without_it(tmp_path):
    rrt = make_rrt(tmp_path / "rrt", save_pico(tmp_path / "dense", "gpt2"), "gpt2")
    assert load_for_scoring(rrt).config.base_config.attn_pdrop == 0.1
    windows = Windows(torch.stack([i["input_ids"] for i in first_of(prepare(rrt, settings().uptrain), BATCH)]), 1.0)
    scores = scoring.score(load_for_scoring(rrt), windows, load_for_scoring(tmp_path / "dense"))
    uptrain(str(rrt), str(tmp_path / "out"), settings(tokens=2 * ONE_STEP))
    assert curve(tmp_path / "out")[0] == pytest.approx((scores.loss, scores.kl), abs=1e-5)
    assert load_for_scoring(tmp_path / "out").config.base_config.attn_pdrop == 0.1


@pytest.mark.slow
def test_training_heals(rrt, tmp_path):
    measured = uptrain(
        str(rrt),
        str(tmp_path / "out"),
        settings(tokens=CONTEXT * BATCH * 40, losses={"forward_kl": 1.0}, learning_rate=3e-3),
    )
    assert measured["last_kl"] < 0.6 * measured["first_kl"]
    assert measured["steps"] == 40 and measured["tokens"] == CONTEXT * BATCH * 40


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"micro_batch": 4}, {"micro_batch": 1}, {"activation_checkpointing": True}])
def test_cutting_the_batch_changes_nothing(rrt, trained, tmp_path, changes):
    uptrain(str(rrt), str(tmp_path / "out"), settings(**changes))
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "out")), torch.tensor(curve(trained)), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_layers_give_the_same_losses(rrt, trained, tmp_path, monkeypatch):
    """One graph serves every visit. Not with the default backend, which takes a C++ compiler and a minute."""
    whole, graphs = torch.nn.Module.compile, []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: whole(module, backend=backend))
    uptrain(str(rrt), str(tmp_path / "out"), settings(compile=True, micro_batch=4))
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "out")), torch.tensor(curve(trained)), rtol=0, atol=1e-5)
    assert len(graphs) == 1


@pytest.mark.slow
def test_two_processes_give_the_losses_of_one(rrt, trained, tmp_path):
    said = uptrain_on_two_processes(rrt, tmp_path / "out", settings(micro_batch=1))
    torch.testing.assert_close(torch.tensor(curve(tmp_path / "out")), torch.tensor(curve(trained)), rtol=0, atol=1e-5)
    assert read_provenance(tmp_path / "out")["measured"]["uptrain"]["processes"] == 2
    assert not (tmp_path / "out.partial").exists()
    assert said.count(f"step {STEPS} of {STEPS}") == 1  # only the first process speaks


@pytest.mark.slow
def test_what_accelerate_launch_says_of_training_is_for_the_recipe_to_say(rrt, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    uptrain(str(rrt), str(tmp_path / "out"), settings())
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    unheard = "Not used, because the recipe says it (precision, compile, micro_batch, fsdp): "
    assert f"{unheard}ACCELERATE_MIXED_PRECISION, ACCELERATE_USE_FSDP\n" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_teacher(rrt, tmp_path, monkeypatch):
    monkeypatch.setattr("rrtc.uptrain.job.find_base", lambda *_: pytest.fail("no teacher is needed"))
    measured = uptrain(str(rrt), str(tmp_path / "out"), settings(losses={"next_token": 1.0}))
    assert measured["teacher"] is None and measured["first_kl"] is None
    assert measured["last_loss"] < measured["first_loss"]
    assert all(
        step["kl"] is None and step["objective"] == pytest.approx(step["loss"]) for step in metrics(tmp_path / "out")
    )


@pytest.mark.slow
def test_weights_of_the_losses(rrt, tmp_path):
    uptrain(
        str(rrt),
        str(tmp_path / "out"),
        settings(losses={"next_token": 0.25, "forward_kl": 3.0}, tokens=ONE_STEP),
    )
    (step,) = metrics(tmp_path / "out")
    assert step["objective"] == pytest.approx(0.25 * step["loss"] + 3 * step["kl"], rel=1e-5)


@pytest.mark.slow
def test_bfloat16_arithmetic_keeps_float32_weights(rrt, tmp_path):
    job = prepare(rrt, settings(precision="bfloat16").uptrain)
    trainer = DistillationTrainer(job, 2, tmp_path, save=False, callbacks=[])
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.dtype for p in trainer.teacher.model.parameters()} == {torch.bfloat16}
    precise = DistillationTrainer(prepare(rrt, settings().uptrain), 2, tmp_path, save=False, callbacks=[])
    precise.train()
    pairs = zip(trainer.state.log_history, precise.state.log_history, strict=True)
    differences = [abs(a["kl"] - b["kl"]) for a, b in pairs if "kl" in a]
    assert len(differences) == 2 and 0 < max(differences) < 0.02


@pytest.mark.slow
def test_learning_rates_are_logged(rrt, tmp_path):
    uptrain(str(rrt), str(tmp_path / "out"), settings(warmup=0.5))
    rates = [step["learning_rate"] for step in metrics(tmp_path / "out")]
    # Three steps up from 0, then the half cosine down towards 0.
    expected = [0, 1 / 3, 2 / 3, *(0.5 * (1 + math.cos(math.pi * i / 3)) for i in range(3))]
    assert rates == pytest.approx([1e-2 * rate for rate in expected])


# -- the folder


@pytest.mark.slow
def test_the_folder_is_whole(rrt, dense, trained):
    assert {p.name for p in trained.iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "rrtc.yaml", "metrics.jsonl",
        "loss.png", *(p.name for p in rrt.glob("generation_config.json")),
    }  # fmt: skip
    before, after = weights(rrt), weights(trained)
    assert before.keys() == after.keys()
    assert all(before[n].shape == after[n].shape and before[n].dtype == after[n].dtype for n in before)
    assert all(not torch.equal(before[n], after[n]) for n in before)  # everything learns
    said = read_provenance(trained)
    assert said["stage"] == "uptrain" and said["history"][0]["stage"] == "init"
    assert said["base"]["sha256"] == content_hash(dense("llama"))
    assert said["recipe"]["init"]["rank"] == 4 and said["recipe"]["uptrain"]["tokens"] == SETTINGS["tokens"]
    assert said["measured"]["init"] == {"bytes": 1} and said["measured"]["uptrain"]["steps"] == STEPS
    assert (trained / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    steps = metrics(trained)
    assert [step["tokens"] for step in steps] == [CONTEXT * BATCH * (i + 1) for i in range(STEPS)]
    # What was written is the model that training ended with: the loss on the next batch has gone down.
    model = AutoModelForCausalLM.from_pretrained(trained)
    windows = first_of(prepare(rrt, settings().uptrain), 8)
    scores = scoring.score(model.eval(), Windows(torch.stack([item["input_ids"] for item in windows]), 1.0))
    assert scores.loss < steps[0]["loss"]


@pytest.mark.slow
def test_dtype_shards_and_tied_embeddings_stay(tmp_path, rrt):
    dense = save_pico(tmp_path / "dense", "gemma")
    source = make_rrt(tmp_path / "rrt", dense, "gemma", dtype=torch.bfloat16, max_shard_size="60KB")
    fingerprint = content_hash(source)
    uptrain(str(source), str(tmp_path / "out"), settings(tokens=ONE_STEP))
    written = Weights(tmp_path / "out")
    assert len(written.files) > 1 and written.dtype == "bfloat16"
    assert set(written) == set(Weights(source)) and "lm_head.weight" not in written
    assert content_hash(source) == fingerprint
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16 and model.config.use_cache


@pytest.mark.slow
def test_shard_size_is_what_init_was_asked_for(rrt, dense, tmp_path):
    import yaml

    source = make_rrt(tmp_path / "rrt", dense("llama"), max_shard_size="100KB")
    assert len(Weights(source).files) == 1
    # What the input folder says goes before the recipe of this run ...
    uptrain(str(source), str(tmp_path / "several"), settings(tokens=ONE_STEP))
    assert len(Weights(tmp_path / "several").files) > 1
    # ... which is asked where the folder says nothing.
    said = read_provenance(source)
    del said["recipe"]["init"]
    (source / "rrtc.yaml").write_text(yaml.safe_dump(said))
    small = Recipe.model_validate({"init": {"max_shard_size": "100KB"}, "uptrain": SETTINGS | {"tokens": ONE_STEP}})
    for recipe, name in ((settings(tokens=ONE_STEP), "one"), (small, "small")):
        uptrain(str(source), str(tmp_path / name), recipe)
    assert len(Weights(tmp_path / "one").files) == 1 and len(Weights(tmp_path / "small").files) > 1


@pytest.mark.slow
def test_a_trained_folder_can_be_trained_again(trained, tmp_path):
    uptrain(str(trained), str(tmp_path / "again"), settings(tokens=ONE_STEP, seed=5))
    assert [entry["stage"] for entry in read_provenance(tmp_path / "again")["history"]] == ["init", "uptrain"]


# -- interrupting and resuming


@pytest.mark.slow
def test_resumed_run_equals_a_straight_one(rrt, trained, tmp_path, monkeypatch):
    target = tmp_path / "out"
    partial = stop_after_checkpoint(rrt, target, monkeypatch)
    saved = [c.name for c in whole_checkpoints(partial / "checkpoints")]
    assert not target.exists() and saved == ["checkpoint-1", "checkpoint-3"]
    # A checkpoint that was cut off while it was written does not count.
    (partial / "checkpoints" / "checkpoint-5").mkdir()
    measured = uptrain(str(rrt), str(target), settings(), resume=True)
    assert curve(target) == curve(trained)
    ours, theirs = weights(target), weights(trained)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert not partial.exists() and not list(target.rglob("checkpoint*"))
    assert measured["steps"] == STEPS


@pytest.mark.slow
def test_killed_while_checkpoints_are_removed(rrt, trained, tmp_path):
    """The moment is when the last states of the trainer are gone, but not yet the rest of the checkpoints."""
    script, target = tmp_path / "script.py", tmp_path / "out"
    script.write_text(
        "import os, pathlib, shutil, signal, sys\n"
        "from rrtc.recipe.schema import Recipe\nfrom rrtc.uptrain.stage import uptrain\n"
        "whole = shutil.rmtree\n"
        "def cut_off(path, *args, **kwargs):\n"
        "    states = list(pathlib.Path(path).rglob('trainer_state.json'))\n"
        "    if pathlib.Path(path).name != 'checkpoints' or not states: return whole(path, *args, **kwargs)\n"
        "    for state in states: state.unlink()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shutil.rmtree = cut_off\n"
        "uptrain(sys.argv[1], sys.argv[2], Recipe.model_validate_json(sys.argv[3]))\n"
    )
    run = ready.run([sys.executable, script, rrt, target, settings().model_dump_json()])
    assert run.returncode == -signal.SIGKILL, run.stderr
    # The model is whole, and what is left of the checkpoints is not taken for any.
    assert not target.with_name("out.partial").exists()
    left = target / "checkpoints"
    assert list(left.glob("checkpoint-*")) and not whole_checkpoints(left)
    assert {p.name for p in target.iterdir()} == {"checkpoints", *(p.name for p in trained.iterdir())}
    assert content_hash(target) == content_hash(trained) and curve(target) == curve(trained)
    with pytest.raises(RrtcError, match="nothing to resume: .* is complete") as refused:
        uptrain(str(rrt), str(target), settings(), resume=True)
    assert str(left) in refused.value.hint
    # Later stages do not see it.
    uptrain(str(target), str(tmp_path / "again"), settings(tokens=ONE_STEP))
    export(str(target), str(tmp_path / "dense"), Recipe.model_validate({"export": {"format": "dense"}}))
    for folder in ("again", "dense"):
        assert not list((tmp_path / folder).rglob("checkpoint*"))


@pytest.mark.slow
def test_killed_before_the_folder_gets_its_name(rrt, trained, tmp_path, monkeypatch):
    target, rename = tmp_path / "out", Path.rename

    def interrupted(self, to):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings())
    assert not target.exists()
    uptrain(str(rrt), str(target), settings(), resume=True)
    assert content_hash(target) == content_hash(trained) and curve(target) == curve(trained)
    assert {p.name for p in target.iterdir()} == {p.name for p in trained.iterdir()}


@pytest.mark.slow
def test_killed_again_beside_a_checkpoint_that_was_cut_off(rrt, trained, tmp_path, monkeypatch):
    target, rename = tmp_path / "out", Path.rename
    partial = stop_after_checkpoint(rrt, target, monkeypatch)
    (partial / "checkpoints" / "checkpoint-5").mkdir()

    def interrupted(self, name):
        if Path(name).parent.name == "checkpoint-6":  # its mark
            raise KeyboardInterrupt
        return rename(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupted)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings(), resume=True)
    assert [c.name for c in whole_checkpoints(partial / "checkpoints")][-1] == "checkpoint-3"
    uptrain(str(rrt), str(target), settings(), resume=True)
    assert content_hash(target) == content_hash(trained) and curve(target) == curve(trained)


@pytest.mark.slow
def test_interrupted_before_a_checkpoint_leaves_nothing(rrt, tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        uptrain(str(rrt), str(tmp_path / "out"), settings())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_resume_is_refused_where_something_changed(rrt, dense, tmp_path, monkeypatch):
    target = tmp_path / "out"
    partial = stop_after_checkpoint(rrt, target, monkeypatch)
    with pytest.raises(RrtcError, match="holds the checkpoints of an interrupted run") as refused:
        uptrain(str(rrt), str(target), settings())
    assert "--resume" in refused.value.hint
    with pytest.raises(RrtcError, match="learning_rate was 0.01 and is now 0.02"):
        uptrain(str(rrt), str(target), settings(learning_rate=0.02), resume=True)
    other = make_rrt(tmp_path / "other", dense("llama"), dtype=torch.bfloat16)
    with pytest.raises(RrtcError, match="the model has changed"):
        uptrain(str(other), str(target), settings(), resume=True)
    # The built-in text with one word more is another text.
    text = [*_built_in(), "word"]
    with monkeypatch.context() as patched:
        patched.setattr("rrtc.text.sources._built_in", lambda: text)
        with pytest.raises(RrtcError, match="the text has changed"):
            uptrain(str(rrt), str(target), settings(), resume=True)
    saved = (partial / "checkpoints" / "started.json").read_text()
    (partial / "checkpoints" / "started.json").write_text(saved[:40])
    with pytest.raises(RrtcError, match="which says what it was started with, is damaged"):
        uptrain(str(rrt), str(target), settings(), resume=True)
    (partial / "checkpoints" / "started.json").write_text(saved)
    assert whole_checkpoints(partial / "checkpoints")
    # What only changes the cost of a step may change, as after running out of memory.
    uptrain(str(rrt), str(target), settings(micro_batch=1), resume=True)


@pytest.mark.slow
def test_what_the_checkpoints_take_already_need_not_be_free_on_resume(rrt, tmp_path, monkeypatch):
    checkpoints = stop_after_checkpoint(rrt, tmp_path / "out", monkeypatch) / "checkpoints"
    there = sum(file.stat().st_size for file in checkpoints.glob("checkpoint-*/*"))
    free = prepare(rrt, settings().uptrain).checkpoint_bytes() - there
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free - 1))
    with pytest.raises(RrtcError, match="This needs .* GB, but only"):
        uptrain(str(rrt), str(tmp_path / "out"), settings(), resume=True)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    uptrain(str(rrt), str(tmp_path / "out"), settings(), resume=True)


@pytest.mark.slow
def test_a_run_that_is_still_going_on_is_left_alone(rrt, tmp_path, monkeypatch):
    partial = stop_after_checkpoint(rrt, tmp_path / "out", monkeypatch)
    before = {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()}
    with only_run(tmp_path / "out"), pytest.raises(RrtcError, match="Another run is writing"):
        uptrain(str(rrt), str(tmp_path / "out"), settings(), resume=True)
    assert {file: file.read_bytes() for file in partial.rglob("*") if file.is_file()} == before


def test_nothing_to_resume(rrt, tmp_path):
    with pytest.raises(RrtcError, match="nothing to resume"):
        uptrain(str(rrt), str(tmp_path / "out"), settings(), resume=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_full_disk(rrt, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(RrtcError, match="Writing .* failed"):
            uptrain(str(rrt), str(tmp_path / "out"), settings())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_loss_that_is_not_finite(dense, tmp_path):
    source = make_rrt(tmp_path / "rrt", dense("llama"))
    tensors = weights(source)
    for name, tensor in tensors.items():
        if "up_proj" in name or "down_proj" in name:
            tensor *= 1e25
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(RrtcError, match="The loss became (nan|inf) at step"):
        uptrain(str(source), str(tmp_path / "out"), settings())
    assert [path.name for path in tmp_path.iterdir()] == ["rrt"]


# -- what a user can get wrong, before any model is loaded


def other_words(folder: Path) -> None:
    """The pico tokenizer with two words exchanged."""
    state = json.loads(pico_tokenizer().backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    from tokenizers import Tokenizer

    PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="<eos>").save_pretrained(
        folder
    )


def wrong_size(tmp_path, rrt):
    return rrt, {"teacher": str(save_pico(tmp_path / "teacher", vocab_size=400))}


def wrong_words(tmp_path, rrt):
    pico_model("llama").save_pretrained(tmp_path / "teacher")
    other_words(tmp_path / "teacher")
    return rrt, {"teacher": str(tmp_path / "teacher")}


def wrong_depth(tmp_path, rrt):
    teacher = save_pico(tmp_path / "teacher", num_hidden_layers=4)
    return rrt, {"teacher": str(teacher), "losses": {"forward_kl": 1.0, "hidden": 1.0}}


def short_sighted(tmp_path, rrt):
    return rrt, {"teacher": str(save_pico(tmp_path / "teacher", max_position_embeddings=16))}


def same_file_twice(tmp_path, rrt):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text("Once upon a time. " * 200)
    (tmp_path / "link.txt").symlink_to(tmp_path / "texts" / "a.txt")
    return rrt, {"data": [str(tmp_path / "texts"), str(tmp_path / "link.txt")]}


def empty_text(tmp_path, rrt):
    (tmp_path / "empty.txt").write_text("\n")
    return rrt, {"data": str(tmp_path / "empty.txt")}


def short_text(tmp_path, rrt):
    (tmp_path / "short.txt").write_text("A few words.")
    return rrt, {"data": str(tmp_path / "short.txt")}


def no_tokenizer(tmp_path, rrt):
    for name in ("config.json", "model.safetensors", "rrtc.yaml"):
        (tmp_path / name).write_bytes((rrt / name).read_bytes())
    return tmp_path, {}


def truncated(tmp_path, rrt):
    for file in rrt.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes((rrt / "model.safetensors").read_bytes()[:-10])
    return tmp_path, {}


def base_gone(tmp_path, rrt):
    for file in rrt.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    text = (rrt / "rrtc.yaml").read_text()
    (tmp_path / "rrtc.yaml").write_text(text.replace("/dense", "/moved"))
    return tmp_path, {}


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (wrong_size, "has a vocabulary of 400 tokens and the model one of 320"),
        (wrong_words, "gives its tokens other meanings"),
        (wrong_depth, "has 4 layers of width 48 where the model has 6 of width 48"),
        (lambda tmp_path, rrt: (rrt, {"tokens": 127}), "127 tokens are less than one batch: 4 windows of 32 are 128"),
        (short_sighted, r"teacher .* can see 16 tokens, and windows have 32"),
        (same_file_twice, "a.txt is in two of the texts, .*texts and .*link.txt, which hold out different parts of it"),
        (empty_text, "is empty"),
        (short_text, "fewer than one context of 32"),
        (no_tokenizer, "There is no tokenizer"),
        (truncated, "truncated or damaged"),
        (base_gone, "no longer where it was"),
        (lambda tmp_path, rrt: (rrt.parent / "dense", {}), "was not written by rrtc"),
        (lambda tmp_path, rrt: (rrt, {"batch_size": 9, "micro_batch": 3, "data": "gone.txt"}), "no text at gone.txt"),
    ],
)
def test_error_comes_first(make, sentence, rrt, tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    folder, changes = make(made, rrt)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded too early"))
    for run in (lambda: uptrain(str(folder), str(tmp_path / "out"), settings(**changes)),
                lambda: estimate(str(folder), settings(**changes))):  # fmt: skip
        with pytest.raises(RrtcError, match=sentence) as error:
            run()
        assert "\n" not in error.value.sentence
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_output_is_never_overwritten(rrt, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RrtcError, match="is not empty"):
        uptrain(str(rrt), str(tmp_path), settings())
    with pytest.raises(RrtcError, match="from which it is made"):
        uptrain(str(rrt), str(rrt), settings())
    for cache in ("new", "new/cache", "new.partial/cache"):
        with pytest.raises(RrtcError, match=f"The teacher cache .*{cache} lies in the output"):
            uptrain(str(rrt), str(tmp_path / "new"), settings(teacher_cache=str(tmp_path / cache)))


def test_batch_must_divide_over_the_processes(rrt, monkeypatch):
    import rrtc.uptrain.job as job

    class Three:
        num_processes = 3

    monkeypatch.setattr(job, "process_group", Three)
    with pytest.raises(RrtcError, match="batch_size of 4 cannot be divided into micro-batches of 2 on 3 processes"):
        prepare(rrt, settings().uptrain)
    with pytest.raises(RrtcError, match="batch_size of 4 cannot be divided on 3 processes"):
        prepare(rrt, settings(micro_batch=None).uptrain)


@pytest.mark.parametrize(("batch_size", "micro_batch", "accumulation"), [(1, 1, 1), (3, 1, 3), (6, 2, 3)])
def test_a_batch_of_any_size_is_divided_where_nobody_says_how(rrt, batch_size, micro_batch, accumulation):
    job = prepare(rrt, settings(batch_size=batch_size, micro_batch=None).uptrain)
    assert (job.micro_batch, job.accumulation) == (micro_batch, accumulation)


# -- estimate and display


def test_estimate_writes_nothing(rrt, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in rrt.iterdir()}
    result = estimate(str(rrt), settings())
    assert {p: p.stat().st_mtime_ns for p in rrt.iterdir()} == before and not list(tmp_path.iterdir())
    job = prepare(rrt, settings().uptrain)
    # Forward and backward of the student, forward of the teacher, whose matrices are as many.
    dense = job.plan.architecture.flops_per_token
    assert result["flops_per_token"] == 3 * job.plan.flops_per_token + dense
    assert result["flops_total"] == result["flops_per_token"] * CONTEXT * BATCH * STEPS
    assert (result["steps"], result["measured_steps"], result["tokens_per_step"]) == (STEPS, 3, CONTEXT * BATCH)
    assert result["seconds_total"] == result["seconds_before"] + STEPS * result["seconds_per_step"]
    assert result["peak_memory_bytes"] > 16 * job.plan.parameters and result["device"] == "cpu"
    json.dumps(result)


def test_sparkline():
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0] * 100, 5) == "▁▁▁▁▁" and sparkline([2.0]) == "▁"
    assert len(sparkline(list(range(1000)))) == 24


@pytest.mark.slow
def test_display(trained):
    class State:
        global_step = 0

    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    plain = Console(file=io.StringIO(), force_terminal=False, width=300)
    for console in (terminal, plain):
        with Display(STEPS, SETTINGS["tokens"], console) as display:
            display.on_train_begin(None, State(), None)
            for step in metrics(trained):
                state = State()
                state.global_step = step["step"]
                display.on_log(None, state, None, logs=step)
            if console is terminal:
                panel = display.live.renderable
    lines = plain.file.getvalue().splitlines()
    assert len(lines) == STEPS  # fewer steps than reports: every one
    with terminal.capture() as shown:
        terminal.print(panel)
    last = metrics(trained)[-1]
    for text in (lines[-1], shown.get()):
        text = Text.from_ansi(text).plain
        assert f"step {STEPS} of {STEPS}" in text and "tokens/s" in text and "0 s left" in text
        assert f"{last['loss']:.3f}" in text and f"{last['kl']:.3f}" in text and "learning rate" in text
