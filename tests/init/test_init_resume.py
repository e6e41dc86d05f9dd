"""init interrupted and resumed: the same bytes as in one go, nothing done twice, refusals that name what changed."""

import json
import resource
import shutil
import sys
from pathlib import Path

import pytest
import ready
from pico import save_pico
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from rrtc.api import run
from rrtc.cli.app import app
from rrtc.errors import RrtcError, WrongUsage
from rrtc.init.job import resumable
from rrtc.init.stage import init
from rrtc.io.folder import check_not_interrupted, only_run
from rrtc.io.shard_writer import HEADER_ROOM
from rrtc.recipe.schema import Recipe
from rrtc.stock.streamed import StreamedModel

BUDGET = {"budget": 0.7, "calibrate_tokens": 512, "measure_tokens": 0}
PAPER = {"rank": 4, "measure_tokens": 0}
JOINT = {"shared_init": "joint", "sharing": "sequence", "rank": 6, "calibrate_tokens": 512, "measure_tokens": 0}

CASES = {
    "paper, several shards": ("llama", PAPER | {"max_shard_size": "100KB", "dtype": "bfloat16"}),
    "joint": ("llama", JOINT),
    "size, and no pattern": ("llama", BUDGET | {"budget": None, "size": 0.8}),
    "budget, auto": ("llama", BUDGET | {"sharing": "auto"}),
    "budget for a pattern": ("gpt2", BUDGET | {"sharing": "middle_cycle"}),
}
# For each case runs init once in one go, and then in child processes, each of which kills itself before one of the next
# files gets its name, until one comes to the end. The parent computes nothing: threads do not survive a fork.
KILLED_AGAIN_AND_AGAIN = """
import json, os, signal, sys
from pathlib import Path
from rrtc.init.job import resumable
from rrtc.init.stage import init
from rrtc.recipe.schema import Recipe

rename = Path.rename

def attempt(model, target, recipe, files):
    def rename_or_die(path, to):
        nonlocal files
        files -= 1
        if files < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, to)

    child = os.fork()
    if child == 0:
        Path.rename = rename_or_die
        init(model, str(target), recipe, resume=bool(resumable(target).finished()))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

for folder, (model, recipe) in json.loads(sys.argv[1]).items():
    folder, recipe = Path(folder), Recipe.model_validate(recipe)
    first = 5 if recipe.init.start == "joint" else 4  # files and folders, so that something is finished
    codes = [attempt(model, folder / "whole", recipe, 1000), attempt(model, folder / "out", recipe, first)]
    while codes[-1] == -signal.SIGKILL and len(codes) < 30:
        assert resumable(folder / "out").finished()
        codes.append(attempt(model, folder / "out", recipe, 2 + len(codes)))
    print(json.dumps(codes))
"""


def asked(**choices) -> Recipe:
    return Recipe.model_validate({"init": {"calibrate_context": 64} | choices, "eval": {"context": 64}})


def weights(folder: Path) -> dict[str, bytes]:
    """The files by which a model is told from another."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name == "config.json" or p.suffix == ".safetensors"}


@pytest.fixture(scope="module")
def whole(dense, tmp_path_factory):
    """A folder made from the pico Llama by `choices` in one go, once."""
    made: dict[str, Path] = {}

    def get(choices: dict) -> Path:
        key = json.dumps(choices)
        if key not in made:
            made[key] = tmp_path_factory.mktemp("whole") / "out"
            init(str(dense("llama")), str(made[key]), asked(**choices))
        return made[key]

    return get


def interrupted_before(name: str, monkeypatch, make) -> None:
    """Has make() interrupted when a file or folder is about to get its `name`."""
    rename = Path.rename

    def interrupt(self, to):
        if Path(to).name == name:
            raise KeyboardInterrupt
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            make()


@pytest.fixture(scope="module")
def killed(dense, tmp_path_factory):
    """(folder, exit codes) of KILLED_AGAIN_AND_AGAIN for each case."""
    folders = {case: tmp_path_factory.mktemp("killed") for case in CASES}
    arguments = {
        str(folders[case]): (str(dense(architecture)), asked(**choices).model_dump())
        for case, (architecture, choices) in CASES.items()
    }
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, json.dumps(arguments)]
    done = ready.run(command)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, zip(folders.values(), map(json.loads, done.stdout.splitlines()), strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_killed_again_and_again_it_comes_to_the_same_end(killed, case):
    folder, codes = killed[case]
    assert codes == [0, *[-9] * (len(codes) - 2), 0]
    assert len(codes) - 2 >= (2 if "paper" in case else 4)
    assert weights(folder / "out") == weights(folder / "whole")
    listings = [sorted(p.name for p in (folder / name).rglob("*")) for name in ("out", "whole")]
    assert listings[0] == listings[1] and "work" not in listings[0]
    assert sorted(p.name for p in folder.iterdir()) == ["out", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["output-gradients-2.safetensors", "group-2-4.pt", "slot-1"])
def test_what_is_finished_is_not_done_again(dense, whole, tmp_path, monkeypatch, name):
    target, work = tmp_path / "out", tmp_path / "out.partial" / "work"
    interrupted_before(name, monkeypatch, lambda: init(str(dense("llama")), str(target), asked(**BUDGET)))
    finished = [p for p in work.iterdir() if p.suffix != ".tmp" and p.name != "writing"]
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in finished}
    assert len(before) > 6
    interrupted_before("out", monkeypatch, lambda: init(str(dense("llama")), str(target), asked(**BUDGET), resume=True))
    for path, was in before.items():
        if path.name.startswith(("states", "gradient")):
            assert not path.exists()
        else:
            assert (path.stat().st_ino, path.stat().st_mtime_ns) == was
    init(str(dense("llama")), str(target), asked(**BUDGET), resume=True)
    assert weights(target) == weights(whole(BUDGET))
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not (target / "work").exists()


def test_interrupted_while_it_measures(dense, whole, tmp_path, monkeypatch, capsys):
    choices, target = PAPER | {"measure_tokens": 256}, tmp_path / "out"
    loss = StreamedModel.loss

    def interrupt(*args):
        if (tmp_path / "out.partial" / "model.safetensors").exists():  # not of the dense model, before all work
            raise KeyboardInterrupt
        return loss(*args)

    with monkeypatch.context() as patched:
        patched.setattr(StreamedModel, "loss", interrupt)
        with pytest.raises(KeyboardInterrupt):
            init(str(dense("llama")), str(target), asked(**choices))
    assert "--resume goes on from there" in capsys.readouterr().err
    assert (tmp_path / "out.partial" / "model.safetensors").exists()
    measured = init(str(dense("llama")), str(target), asked(**choices), resume=True)
    straight = init(str(dense("llama")), str(tmp_path / "straight"), asked(**choices))
    assert measured | {"seconds": 0} == straight | {"seconds": 0} and measured["residual_energy_kept"]
    assert weights(target) == weights(tmp_path / "straight")


def test_interrupted_before_anything_is_finished_nothing_is_left(dense, tmp_path, monkeypatch):
    for choices, name in ((PAPER, "slot-0"), (BUDGET, "inputs-0.safetensors"), (BUDGET, "started.json")):
        interrupted_before(
            name, monkeypatch, lambda c=choices: init(str(dense("llama")), str(tmp_path / "out"), asked(**c))
        )
        assert not list(tmp_path.iterdir())


def test_killed_before_anything_is_finished_it_starts_over(dense, whole, tmp_path):
    work = tmp_path / "out.partial" / "work"
    work.mkdir(parents=True)
    (work / "started.json").write_text("")
    (work / "writing").mkdir()
    with pytest.raises(RrtcError, match="nothing to resume: .* holds no finished work"):
        init(str(dense("llama")), str(tmp_path / "out"), asked(**PAPER), resume=True)
    init(str(dense("llama")), str(tmp_path / "out"), asked(**PAPER))
    assert weights(tmp_path / "out") == weights(whole(PAPER))


def test_a_full_disk_leaves_what_can_be_resumed(dense, whole, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = HEADER_ROOM + 300_000  # more than a slot, less than the model
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(RrtcError, match="Writing shard-0.tmp failed"):
            init(str(dense("llama")), str(tmp_path / "out"), asked(**PAPER))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    init(str(dense("llama")), str(tmp_path / "out"), asked(**PAPER), resume=True)
    assert weights(tmp_path / "out") == weights(whole(PAPER))


@pytest.fixture(scope="module")
def halfway(tmp_path_factory):
    """(model, target, text) of a run on a text of its own that was interrupted when a slot was finished."""
    folder = tmp_path_factory.mktemp("halfway")
    model, text = save_pico(folder / "dense"), folder / "text.txt"
    text.write_text("\n\n\n".join(f"Document {n} is about the number {n}. " * 8 for n in range(120)))
    with pytest.MonkeyPatch.context() as patched:
        make = lambda: init(str(model), str(folder / "out"), asked(**BUDGET, calibrate_on=[str(text)]))  # noqa: E731
        interrupted_before("slot-1", patched, make)
    return model, folder / "out", text


def test_a_changed_tensor_is_named(halfway, tmp_path):
    model, target, text = halfway
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.3.mlp.up_proj.weight"][40, 24] += 1  # neither at its beginning nor at its end
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RrtcError, match=r"the tensor model\.layers\.3\.mlp\.up_proj\.weight has changed") as refused:
        init(str(other), str(target), asked(**BUDGET, calibrate_on=[str(text)]), resume=True)
    assert "start a new one" in refused.value.hint and resumable(target).finished()


def test_a_changed_config_is_named(halfway, tmp_path):
    model, target, text = halfway
    other = shutil.copytree(model, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-4}))
    with pytest.raises(RrtcError, match="the model's config has changed"):
        init(str(other), str(target), asked(**BUDGET, calibrate_on=[str(text)]), resume=True)


def test_a_changed_recipe_is_named(halfway):
    model, target, text = halfway
    for change, says in (
        ({"budget": 0.8}, "budget was 0.7 and is now 0.8"),
        ({"sharing": "cycle"}, "sharing was middle_cycle and is now cycle"),
        ({"seed": 1}, "seed was 0 and is now 1"),
    ):
        with pytest.raises(RrtcError, match=says):
            init(str(model), str(target), asked(**BUDGET | change, calibrate_on=[str(text)]), resume=True)
    narrower = asked(**BUDGET, calibrate_on=[str(text)], calibrate_context=32)
    with pytest.raises(RrtcError, match="context was 64 and is now 32"):
        init(str(model), str(target), narrower, resume=True)


def test_a_changed_calibration_text_is_named(halfway):
    model, target, text = halfway
    contents = text.read_text()
    try:
        text.write_text(contents.replace("number", "figure"))
        with pytest.raises(RrtcError, match="the calibration text has changed"):
            init(str(model), str(target), asked(**BUDGET, calibrate_on=[str(text)]), resume=True)
    finally:
        text.write_text(contents)


def test_unfinished_work_is_not_swept_away(halfway, dense):
    model, target, text = halfway
    result = CliRunner().invoke(app, ["init", str(model), "-o", str(target), "--rank", "4"])
    assert result.exit_code == 1 and "holds the work of an interrupted run" in result.stderr
    assert "Continue it with --resume" in result.stderr
    with pytest.raises(RrtcError, match="holds the work of an interrupted run") as refused:
        check_not_interrupted(target, "checkpoints")  # as uptrain, eval and export ask
    assert "rrtc init --resume" in refused.value.hint and resumable(target).finished()


def test_what_matters_only_at_the_end_may_change_and_the_model_may_move(halfway, tmp_path):
    model, target, text = halfway
    for name in ("out", "out.partial"):
        if (target.parent / name).exists():
            shutil.copytree(target.parent / name, tmp_path / name)
    choices = BUDGET | {"calibrate_on": [str(text)], "max_shard_size": "100KB", "measure_tokens": 128}
    there = shutil.copytree(model, tmp_path / "there")
    measured = init(str(there), str(tmp_path / "out"), asked(**choices), resume=True)
    assert measured["loss"]["tokens"] == 126 and len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def test_nothing_to_resume(dense, whole, tmp_path):
    with pytest.raises(RrtcError, match="nothing to resume: .* holds no finished work"):
        init(str(dense("llama")), str(tmp_path / "new"), asked(**PAPER), resume=True)
    assert not list(tmp_path.iterdir())
    done = shutil.copytree(whole(PAPER), tmp_path / "done")
    (done / "work").mkdir()  # killed while it was removed
    with pytest.raises(RrtcError, match="nothing to resume: .* is complete") as refused:
        init(str(dense("llama")), str(done), asked(**PAPER), resume=True)
    assert str(done / "work") in refused.value.hint
    result = CliRunner().invoke(app, ["init", str(dense("llama")), "--dry-run", "--resume"])
    assert result.exit_code == 2 and "A dry run does no work that could be resumed." in result.stderr


def test_an_init_that_is_still_running_is_left_alone(dense, whole, tmp_path, monkeypatch):
    model, target = str(dense("llama")), tmp_path / "out"
    interrupted_before("slot-1", monkeypatch, lambda: init(model, str(target), asked(**PAPER)))
    with only_run(target), pytest.raises(RrtcError, match="Another run is writing"):
        init(model, str(target), asked(**PAPER), resume=True)
    init(model, str(target), asked(**PAPER), resume=True)
    assert weights(target) == weights(whole(PAPER))


@pytest.mark.slow
def test_text_that_was_written_is_not_written_again(dense, whole, tmp_path, monkeypatch):
    model, target = str(dense("llama")), str(tmp_path / "out")
    choices = {"budget": 0.7, "calibrate_on": ["self"], "calibrate_tokens": 512}
    expected = weights(whole(choices))
    interrupted_before("inputs-0.safetensors", monkeypatch, lambda: init(model, target, asked(**choices)))
    monkeypatch.setattr("rrtc.init.stage.own_text", lambda *_: pytest.fail("written again"))
    init(model, target, asked(**choices), resume=True)
    assert weights(tmp_path / "out") == expected


def test_run_refuses_too_few_tokens_before_it_begins(dense, tmp_path):
    recipe = Recipe.model_validate({"model": str(dense("llama")), "uptrain": {"tokens": 100}})
    with pytest.raises(WrongUsage, match="100 tokens are less than one batch: 2 windows of"):
        run(recipe, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_run_resumes_a_half_done_init(dense, whole, tmp_path, monkeypatch):
    """Up to the training that follows, which has too little text to start."""
    (tmp_path / "short.txt").write_text("Too short.")
    recipe = asked(**PAPER).model_copy(update={"model": str(dense("llama"))})
    recipe = recipe.model_copy(
        update={"uptrain": recipe.uptrain.model_copy(update={"data": [str(tmp_path / "short.txt")]})}
    )
    out = tmp_path / "out"
    interrupted_before("slot-1", monkeypatch, lambda: run(recipe, str(out)))
    first = out / "init.partial" / "work" / "slot-0"
    assert first.exists() and not (out / "init").exists()
    with pytest.raises(RrtcError, match="fewer than one context"):
        run(recipe, str(out), resume=True)
    assert weights(out / "init") == weights(whole(PAPER))
