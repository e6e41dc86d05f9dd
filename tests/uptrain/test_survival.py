"""What an uptraining run survives: a kill at any moment, SIGTERM, a checkpoint that cannot be read back, a loss that is
lost; and what it shows on the way."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from pico import save_pico
from ready import Ready
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer
from uptraining import BATCH, CONTEXT, by_torchrun, interrupt_at, make_rrt, metrics, settings, weights

from rrtc.cli.app import app
from rrtc.errors import RrtcError
from rrtc.io.provenance import read_provenance
from rrtc.io.resumable import check_unchanged
from rrtc.io.weights import Weights
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.uptrain import checkpoints
from rrtc.uptrain.checkpoints import whole_checkpoints
from rrtc.uptrain.curve import draw, steps_of, summary
from rrtc.uptrain.data import Stream
from rrtc.uptrain.estimate import estimate
from rrtc.uptrain.guards import WINDOW, LossGuard, Stopped, Terminated
from rrtc.uptrain.job import FREE_ON_RESUME, prepare
from rrtc.uptrain.stage import uptrain
from rrtc.uptrain.trainer import DistillationTrainer

STEPS = 40
LONG = {"tokens": CONTEXT * BATCH * STEPS, "learning_rate": 3e-3, "save_every": 5}


@pytest.fixture(scope="module")
def straight(rrt) -> Path:
    """The run that nothing happens to, which others are compared with."""
    uptrain(str(rrt), str(rrt.parent / "straight"), settings(**LONG))
    return rrt.parent / "straight"


def figures(folder: Path) -> list[dict]:
    """What a run has measured, without the clock."""
    return [{name: value for name, value in step.items() if name != "seconds"} for step in metrics(folder)]


def start(folder: Path, target: Path, **changes) -> Ready:
    """`rrtc uptrain` in a process of its own."""
    recipe = target.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings(**changes).model_dump(include={"uptrain"})))
    return Ready([sys.executable, "-m", "rrtc", "uptrain", folder, "-o", target, "--recipe", recipe])


def wait_for_checkpoint(run: Ready, target: Path, step: int) -> None:
    """Until the checkpoint of that step, or a later one, is whole."""
    checkpoints = target.with_name(target.name + ".partial") / "checkpoints"
    until = time.monotonic() + 300
    while not any(int(c.name.split("-")[1]) >= step for c in whole_checkpoints(checkpoints)):
        assert run.poll() is None, run.stderr
        assert time.monotonic() < until
        time.sleep(0.005)


def resume(folder: Path, target: Path) -> None:
    """`rrtc uptrain --resume` with the recipe of `start`, as the command line does it."""
    from typer.testing import CliRunner

    arguments = ["uptrain", folder, "-o", target, "--recipe", target.with_suffix(".yaml"), "--resume"]
    result = CliRunner().invoke(app, list(map(str, arguments)))
    assert result.exit_code == 0, result.output


def check_same(folder: Path, expected: Path) -> None:
    """The same losses at every step and the same weights, bit for bit. The loss of a step depends on its windows, so
    that this is the order of the data too."""
    assert figures(folder) == figures(expected)
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- killed and asked to stop


@pytest.mark.slow
def test_killed_run_goes_on_as_if_nothing_had_happened(rrt, straight, tmp_path):
    target = tmp_path / "out"
    run = start(rrt, target, **LONG)
    wait_for_checkpoint(run, target, 15)
    run.kill()
    assert run.wait() == -signal.SIGKILL
    assert not target.exists()
    partial = target.with_name("out.partial")
    saved = whole_checkpoints(partial / "checkpoints")[-1]
    assert 15 <= int(saved.name.split("-")[1]) < STEPS
    # What can be watched while it runs is what there will be in the end, and a picture that is one.
    seen = figures(partial)
    assert seen == figures(straight)[: len(seen)] and len(seen) >= 15
    assert (partial / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    resume(rrt, target)
    check_same(target, straight)
    assert not partial.exists() and not (target / "checkpoints").exists()


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint(rrt, straight, tmp_path):
    target = tmp_path / "out"
    run = start(rrt, target, **LONG)
    wait_for_checkpoint(run, target, 5)
    run.terminate()
    assert run.wait() == 143, run.stderr
    said = run.stderr
    (step,) = re.findall(rf"^Error: SIGTERM stopped the run after step (\d+) of {STEPS}; --resume goes on", said, re.M)
    assert "Traceback" not in said and said.count("--resume") == 1
    partial = target.with_name("out.partial")
    assert whole_checkpoints(partial / "checkpoints")[-1].name == f"checkpoint-{step}"
    assert figures(partial) == figures(straight)[: int(step)]
    resume(rrt, target)
    check_same(target, straight)


def send_to_itself(monkeypatch, number: int, micro_batch: int) -> None:
    """The signal `number` in the middle of that micro-batch."""
    original, calls = DistillationTrainer.compute_loss, []

    def asked(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == micro_batch:
            signal.raise_signal(number)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", asked)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "micro_batch", "step"),  # of 6 steps with 2 micro-batches each
    [("SIGTERM", 1, 1), ("SIGTERM", 8, 4), ("SIGTERM", 12, 6), ("SIGHUP", 8, 4), ("SIGINT", 8, 4)],
)
def test_a_signal_lets_the_step_be_finished(rrt, tmp_path, monkeypatch, name, micro_batch, step):
    target, number = tmp_path / "out", getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # nohup and a shell's background ignore some
    try:
        with monkeypatch.context() as patched:
            send_to_itself(patched, number, micro_batch)
            said = f"{'Ctrl-C' if name == 'SIGINT' else name} stopped the run after step {step} of 6; --resume goes on"
            with pytest.raises(Terminated, match=said) as stopped:
                uptrain(str(rrt), str(target), settings())
        assert stopped.value.exit_code == 128 + number and signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert whole_checkpoints(tmp_path / "out.partial" / "checkpoints")[-1].name == f"checkpoint-{step}"
    uptrain(str(rrt), str(target), settings(), resume=True)
    assert [entry["step"] for entry in metrics(target)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_a_moment_when_python_drops_it_ends_the_run_after_the_step(rrt, tmp_path, monkeypatch):
    class Dying:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)  # and what a destructor raises goes nowhere

    def dying(self, *args, original=DistillationTrainer.compute_loss, **kwargs):
        if self.state.global_step == 2:
            Dying()
        return original(self, *args, **kwargs)

    target = tmp_path / "out"
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with monkeypatch.context() as patched:
            patched.setattr(DistillationTrainer, "compute_loss", dying)
            with pytest.raises(KeyboardInterrupt):
                uptrain(str(rrt), str(target), settings())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert not target.exists() and [entry["step"] for entry in metrics(tmp_path / "out.partial")] == [1, 2]
    uptrain(str(rrt), str(target), settings(), resume=True)
    assert [entry["step"] for entry in metrics(target)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_all_processes_stop_at_the_same_step(rrt, tmp_path):
    """SIGTERM reaches only one of two, in the middle of step 3, in which the other one is told at its end."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, signal, sys\n"
        "from rrtc.cli.app import main\nfrom rrtc.uptrain.trainer import DistillationTrainer\n"
        "original, calls = DistillationTrainer.compute_loss, []\n"
        "def asked(self, *args, **kwargs):\n"
        "    calls.append(0)\n"
        "    if os.environ['RANK'] == '1' and len(calls) == 6: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return original(self, *args, **kwargs)\n"
        "DistillationTrainer.compute_loss = asked\n"
        "main()\n"
    )
    recipe, target = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(yaml.safe_dump(settings(micro_batch=1, save_every=100).model_dump(include={"uptrain"})))
    run = by_torchrun(script, "uptrain", rrt, "-o", target, "--recipe", recipe)
    assert run.returncode != 0
    assert run.stderr.count("SIGTERM stopped the run after step 3 of 6") == 1, run.stderr
    assert whole_checkpoints(tmp_path / "out.partial" / "checkpoints")[-1].name == "checkpoint-3"
    uptrain(str(rrt), str(target), settings(save_every=100), resume=True)  # on one process
    assert [entry["step"] for entry in metrics(target)] == [1, 2, 3, 4, 5, 6]


# -- the checkpoint after step 1


@pytest.mark.slow
def test_step_1_is_saved_and_compared(rrt, tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(checkpoints, "_missing", lambda folder, state: looked_at.append((folder, set(state))))
    interrupt_at(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        uptrain(str(rrt), str(tmp_path / "out"), settings(save_every=100))
    assert [folder for folder, _ in looked_at] == [rrt]
    assert [c.name for c in whole_checkpoints(tmp_path / "out.partial" / "checkpoints")] == ["checkpoint-1"]


def flip(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def forget(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut_optimizer(folder: Path) -> None:
    os.truncate(folder / "optimizer.pt", 1000)


def other_moments(folder: Path) -> None:
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    saved["state"][3]["exp_avg"].flatten()[0] += 1
    torch.save(saved, folder / "optimizer.pt")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (flip, "the tensor .* has another shape or other numbers"),
        (cut, "truncated or damaged"),
        (forget, "it has no tensor"),
        (cut_optimizer, "reading it raised"),
        (other_moments, "the optimizer's exp_avg of parameter 3 has other numbers"),
    ],
)
def test_damaged_checkpoint_is_found_after_step_1(rrt, tmp_path, monkeypatch, damage, sentence):
    original, steps = Trainer._save_checkpoint, []

    def damaged(self, *args):
        original(self, *args)
        steps.append(self.state.global_step)
        damage(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")

    monkeypatch.setattr(Trainer, "_save_checkpoint", damaged)
    with pytest.raises(
        RrtcError, match=f"checkpoint after step 1 is not what was to be written: .*{sentence}"
    ) as error:
        uptrain(str(rrt), str(tmp_path / "out"), settings())
    assert "\n" not in error.value.sentence
    assert steps == [1] and not list(tmp_path.iterdir())  # no later run takes it for a checkpoint


@pytest.mark.slow
def test_what_the_written_model_would_lack_is_found_after_step_1(rrt, tmp_path, monkeypatch):
    original = Weights.shape
    monkeypatch.setattr(Weights, "shape", lambda self, name: [*original(self, name), 1])
    with pytest.raises(RrtcError, match="the model in memory has no tensor .* of the shape"):
        uptrain(str(rrt), str(tmp_path / "out"), settings())
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tied_embeddings_are_read_back(tmp_path):
    folder = make_rrt(tmp_path / "rrt", save_pico(tmp_path / "dense", "gemma"), "gemma")
    assert uptrain(str(folder), str(tmp_path / "out"), settings())["steps"] == 6


def test_disk_space_counts_the_first_checkpoint(rrt):
    def at_once(**changes) -> int:
        job = prepare(rrt, settings(**changes).uptrain)
        return job.checkpoint_bytes() // (3 * 4 * job.plan.parameters)

    assert [at_once(save_every=n) for n in (1, 3, 100)] == [3, 3, 2]
    assert at_once(tokens=CONTEXT * BATCH) == 1


def test_a_clock_that_is_set_back_costs_no_checkpoint(rrt, tmp_path, monkeypatch):
    """Each checkpoint is older than the one before it, by its times. The last two stay, and the last one is gone on
    from."""
    original, now = checkpoints.mark_whole, 2e9

    def marked(checkpoint: Path) -> None:
        nonlocal now
        original(checkpoint)
        now -= 3600
        for file in (*checkpoint.iterdir(), checkpoint):
            os.utime(file, (now, now))

    monkeypatch.setattr("rrtc.uptrain.trainer.mark_whole", marked)
    target = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 10)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings(save_every=1))
    kept = tmp_path / "out.partial" / "checkpoints"
    assert sorted(path.name for path in kept.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    interrupt_at(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        uptrain(str(rrt), str(target), settings(save_every=1), resume=True)
    assert [entry["step"] for entry in metrics(tmp_path / "out.partial")] == [1, 2, 3, 4, 5]


# -- a loss that is lost


def poison(monkeypatch, micro_batch: int, gradients_only: bool = False) -> None:
    """The loss of the micro-batch of that number is NaN, or only its gradient."""
    original, calls = DistillationTrainer.compute_loss, []

    def poisoned(self, *args, **kwargs):
        calls.append(0)
        loss = original(self, *args, **kwargs)
        if len(calls) == micro_batch:
            loss = loss + 0 * (loss - loss.detach()).sqrt() if gradients_only else loss * float("nan")
        return loss

    monkeypatch.setattr(DistillationTrainer, "compute_loss", poisoned)


@pytest.mark.slow
@pytest.mark.parametrize("gradients_only", [False, True])
def test_a_batch_that_gives_nan(rrt, tmp_path, monkeypatch, gradients_only):
    poison(monkeypatch, 12, gradients_only)  # the second half of step 6, after which a checkpoint would be written
    with pytest.raises(Stopped, match="at step 6, on window") as error:
        uptrain(str(rrt), str(tmp_path / "out"), settings(tokens=CONTEXT * BATCH * 9))
    what = "The norm of the gradients" if gradients_only else "The loss"
    job = prepare(rrt, settings(tokens=CONTEXT * BATCH * 9).uptrain)
    stream = DistillationTrainer(job, 9, tmp_path / "t", save=False, callbacks=[]).train_dataset
    windows = ", ".join(f"window {n} of pydoc" for n in (20, 21, 22, 23))
    assert error.value.sentence.startswith(f"{what} became nan at step 6, on {windows}, the first of which begins")
    from rrtc.io.source import load_tokenizer

    shown = error.value.sentence.split("begins '")[1].removesuffix("'.")
    text = " ".join(load_tokenizer(rrt).decode(stream[20]["input_ids"]).split())
    assert len(shown) > 10 and text.startswith(shown)
    # What is left is sound: not the weights that the step has poisoned.
    (*_, kept) = whole_checkpoints(tmp_path / "out.partial" / "checkpoints")
    assert kept.name == "checkpoint-3" and str(kept) in error.value.hint
    assert all(tensor.isfinite().all() for tensor in load_file(kept / "model.safetensors").values())
    assert [entry["step"] for entry in metrics(tmp_path / "out.partial")] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_a_checkpoint_that_the_next_step_disproves_goes(rrt, tmp_path, monkeypatch):
    poison(monkeypatch, 7 * 2)  # the first step with what step 6 has written
    with pytest.raises(Stopped, match="at step 7"):
        uptrain(str(rrt), str(tmp_path / "out"), settings(tokens=CONTEXT * BATCH * 9))
    saved = whole_checkpoints(tmp_path / "out.partial" / "checkpoints")
    assert [c.name for c in saved] == ["checkpoint-3"]


@pytest.mark.slow
def test_a_learning_rate_that_diverges(rrt, tmp_path):
    """It rises so slowly that the first steps are sound. With a checkpoint at every second step, those before the loss
    was lost would be gone if the later ones took their place."""
    recipe = settings(tokens=CONTEXT * BATCH * 200, learning_rate=20.0, warmup=0.95, save_every=2)
    with pytest.raises(Stopped, match="The loss has diverged: .* on window") as error:
        uptrain(str(rrt), str(tmp_path / "out"), recipe)
    sentence = error.value.sentence
    bad = int(re.search(r"since step (\d+)", sentence)[1])
    limit = float(re.search(r"it is above ([\d.]+)", sentence)[1])
    course = metrics(tmp_path / "out.partial")
    mean, last = re.search(r"steps is ([\d.e+]+) at step (\d+)", sentence).groups()
    assert float(mean) > limit and [step["step"] for step in course] == list(range(1, int(last)))
    assert all(step["objective"] > 0.99 * limit for step in course[bad - 1 :])
    (*_, kept) = whole_checkpoints(tmp_path / "out.partial" / "checkpoints")
    step = int(kept.name.split("-")[1])
    assert step < bad - 1 and str(kept) in error.value.hint
    assert course[step]["objective"] <= 1.01 * limit  # what the next step has measured of it
    model = AutoModelForCausalLM.from_pretrained(kept)
    text = prepare(rrt, settings().uptrain).text
    ids = torch.stack([Stream(text, 8)[i]["input_ids"] for i in range(8)])
    assert model(ids, labels=ids).loss < limit
    # It can be trained on, as the error says.
    again = tmp_path / "again"
    uptrain(str(kept), str(again), settings(learning_rate=1e-3))
    assert all(step["objective"] < limit for step in metrics(again))
    history = read_provenance(again)["history"]
    assert [(entry["stage"], Path(entry["path"]).name) for entry in history] == [
        ("init", "rrt"),
        ("uptrain", kept.name),
    ]
    assert read_provenance(kept)["measured"]["uptrain"]["tokens"] == step * CONTEXT * BATCH


def alarm(rrt: Path, objectives: list[float]) -> int | None:
    """The step at which a LossGuard sees that the mean has gone over its limit."""
    guard = LossGuard(prepare(rrt, settings().uptrain))
    for step, objective in enumerate(objectives, 1):
        if guard._take(step, objective) > guard.limit:
            return step
    return None


def test_noise_and_warm_up_raise_no_alarm(rrt):
    torch.manual_seed(0)
    noise = torch.randn(400).tolist()
    bump = [1.5 if 20 < i < 60 else 0.0 for i in range(400)]
    for base in (0.01, 4.0, 20.0):
        # Falling, with noise of a nat, and a rise at the end of the warm-up.
        course = [max(0.0, base * (0.5 + 0.5 * 0.99**i) + noise[i] + bump[i]) for i in range(400)]
        assert alarm(rrt, course) is None
        odd = list(course)
        odd[200] += 30  # one batch
        assert alarm(rrt, odd) is None
        lost = course[:200] + [3 * base + 8.0 + n for n in noise[200:]]
        assert 200 < alarm(rrt, lost) <= 200 + WINDOW


# -- what may change on resume


@pytest.mark.parametrize(
    "field", sorted(UptrainRecipe.model_fields.keys() - {"teacher_cache"})
)  # see test_teacher_cache.py
@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
def test_every_field_is_compared_on_resume(rrt, field):
    job = prepare(rrt, settings().uptrain)
    changed = {"bmi": 0.5} if field == "regularizers" else "changed"
    other = replace(job, recipe=job.recipe.model_copy(update={field: changed}))
    before = json.loads(json.dumps(job.fingerprint()))  # as it comes back from the disk
    check_unchanged(before, job.fingerprint())
    if field in FREE_ON_RESUME:
        check_unchanged(before, other.fingerprint())
    else:
        with pytest.raises(RrtcError, match=re.escape(f" and is now {changed}")) as refused:
            check_unchanged(before, other.fingerprint())
        assert f"because {field} was " in str(refused.value)


def test_exits_that_learn_jointly_go_on_with_the_same_micro_batches(rrt):
    job = prepare(rrt, settings(exits="joint").uptrain)
    before = json.loads(json.dumps(job.fingerprint()))
    other = replace(job, micro_batch=1)
    with pytest.raises(RrtcError, match="because micro_batch was 2 and is now 1"):
        check_unchanged(before, other.fingerprint())


def test_a_machine_that_computes_otherwise_does_not_go_on(rrt, monkeypatch):
    begun = prepare(rrt, settings(precision="auto").uptrain).fingerprint()
    monkeypatch.setattr("rrtc.uptrain.job.fast_bfloat16", lambda: begun["arithmetic"] == "float32")
    with pytest.raises(RrtcError, match="because the arithmetic has changed since"):
        check_unchanged(begun, prepare(rrt, settings(precision="auto").uptrain).fingerprint())


def test_a_run_that_cut_its_windows_otherwise_is_not_gone_on_with(rrt):
    now = prepare(rrt, settings().uptrain).fingerprint()
    begun = {name: value for name, value in now.items() if name != "order of the text"}  # as before there were two
    with pytest.raises(RrtcError, match="because the order of the text has changed since it was started"):
        check_unchanged(begun, now)


@pytest.mark.slow
def test_checkpoints_may_be_more_frequent_after_a_kill(rrt, tmp_path, monkeypatch):
    target = tmp_path / "out"
    for save_every, micro_batch in ((100, 5), (3, 8)):  # in step 3, in step 5
        with monkeypatch.context() as patched:
            interrupt_at(patched, micro_batch)
            with pytest.raises(KeyboardInterrupt):
                uptrain(str(rrt), str(target), settings(save_every=save_every), resume=save_every == 3)
    saved = whole_checkpoints(tmp_path / "out.partial" / "checkpoints")
    assert [c.name for c in saved] == ["checkpoint-1", "checkpoint-3"]


# -- what is seen on the way


@pytest.mark.slow
def test_metrics_have_each_step_once_after_a_kill_behind_the_checkpoint(rrt, tmp_path, monkeypatch):
    target = tmp_path / "out"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 11)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings())
    watched = metrics(tmp_path / "out.partial")
    assert [entry["step"] for entry in watched] == [1, 2, 3, 4, 5]  # the checkpoint is of step 3
    with monkeypatch.context() as patched:
        interrupt_at(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings(), resume=True)
    assert [entry["step"] for entry in metrics(tmp_path / "out.partial")] == [1, 2, 3, 4]
    uptrain(str(rrt), str(target), settings(), resume=True)
    assert [entry["step"] for entry in metrics(target)] == [1, 2, 3, 4, 5, 6]


def test_the_curve_takes_whatever_losses_there_are(tmp_path):
    log = [
        {"loss": 3.0 - i, "hidden": 0.5 * i, "objective": 1.0, "learning_rate": 0.1, "grad_norm": 1.0, "tokens": 8 * i,
         "seconds": 0.1, "epoch": 0.5, "step": i}
        for i in (1, 2)
    ]  # fmt: skip
    steps = steps_of([*log, {"train_loss": 2.0, "step": 2}])
    assert [step["hidden"] for step in steps] == [0.5, 1.0] and "epoch" not in steps[0]
    said = {"first_loss": 2.0, "last_loss": 1.0, "first_kl": None, "last_kl": None}
    assert summary(steps) == said | {"first_hidden": 0.5, "last_hidden": 1.0}
    heights = []
    for name, kept in (("two", steps), ("one", [{k: v for k, v in step.items() if k != "hidden"} for step in steps])):
        draw(kept, "title", tmp_path / f"{name}.png")
        heights.append(int.from_bytes((tmp_path / f"{name}.png").read_bytes()[20:24]))
    assert heights[0] > heights[1]  # a panel more


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_tracker_that_is_not_installed(name, rrt, tmp_path, monkeypatch):
    if importlib.util.find_spec(name):
        pytest.skip("it is installed")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded too early"))
    for run in (lambda: uptrain(str(rrt), str(tmp_path / "out"), settings(report_to=name)),
                lambda: estimate(str(rrt), settings(report_to=name))):  # fmt: skip
        with pytest.raises(RrtcError, match=f"The package {name} is not installed") as error:
            run()
        assert f"pip install {name}" in error.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tensorboard_logs_stay(rrt, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    uptrain(str(rrt), str(tmp_path / "out"), settings(report_to="tensorboard"))
    events = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    written = [event.value for event in events.Scalars("train/loss")]
    assert written == pytest.approx([step["loss"] for step in metrics(tmp_path / "out")])
    assert "train/kl" in events.Tags()["scalars"]


# -- checkpoints that are damaged


@pytest.mark.slow
@pytest.mark.parametrize(
    "file", ["optimizer.pt", "model.safetensors", "trainer_state.json", "rng_state.pth", "scheduler.pt"]
)
@pytest.mark.parametrize("damage", ["cut off", "missing"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(file, damage, stopped, straight_short, tmp_path, capsys):
    shutil.copytree(stopped.with_name("out.partial"), tmp_path / "out.partial")
    last = whole_checkpoints(tmp_path / "out.partial" / "checkpoints")[-1]
    if damage == "missing":
        (last / file).unlink()
    else:
        (last / file).write_bytes((last / file).read_bytes()[:-20])
    uptrain(str(stopped.with_name("rrt")), str(tmp_path / "out"), settings(save_every=1), resume=True)
    said = " ".join(capsys.readouterr().err.split())
    assert f"{last.name} is damaged ({file}): the run goes on from the checkpoint before it." in said
    check_same(tmp_path / "out", straight_short)


@pytest.mark.slow
def test_without_a_sound_checkpoint_the_run_is_not_resumed(stopped, tmp_path):
    shutil.copytree(stopped.with_name("out.partial"), tmp_path / "out.partial")
    for checkpoint in whole_checkpoints(tmp_path / "out.partial" / "checkpoints"):
        (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(RrtcError, match=r"checkpoint-\d is damaged \(optimizer.pt\), and there is no other") as refused:
        uptrain(str(stopped.with_name("rrt")), str(tmp_path / "out"), settings(save_every=1), resume=True)
    assert "start anew" in refused.value.hint


@pytest.fixture(scope="module")
def straight_short(rrt, tmp_path_factory) -> Path:
    """A run of six steps in one go."""
    target = tmp_path_factory.mktemp("short") / "straight"
    uptrain(str(rrt), str(target), settings(save_every=1))
    return target


@pytest.fixture(scope="module")
def stopped(rrt, tmp_path_factory) -> Path:
    """The target of a run with checkpoints of the steps 3 and 4 that was interrupted in step 5; the folder that it
    trains is beside it."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "rrt").symlink_to(rrt)
    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        interrupt_at(patched, 10)
        uptrain(str(folder / "rrt"), str(folder / "out"), settings(save_every=1))
    return folder / "out"
