"""The command line: every error a user can cause is one sentence, soon, and leaves no output folder behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ready
import torch
import yaml
from pico import save_pico
from safetensors.torch import load_file, save_file
from transformers import BertConfig, MixtralConfig, T5Config, ViTConfig
from typer.testing import CliRunner

from rrtc.cli.app import app

SMALL = ["--rank", "4", "--measure-tokens", "0"]
TEXT = "All happy families are alike; each unhappy family is unhappy in its own way. " * 200


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    return save_pico(tmp_path_factory.mktemp("cli") / "dense")


@pytest.fixture(scope="module")
def tied(dense, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "tied"
    assert rrtc("init", dense, "-o", folder, *SMALL).exit_code == 0
    return folder


def rrtc(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "200", "NO_COLOR": "1"})


def fails(*arguments, says: str, code: int = 1, output: Path | None = None) -> str:
    """Runs a command that must fail with one sentence that matches `says`, and without an output folder."""
    result = rrtc(*arguments)
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert re.search(says, result.stderr), result.stderr
    assert "Traceback" not in result.output
    if output is not None:
        assert not output.exists() and not output.with_name(output.name + ".partial").exists()
    return result.stderr


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_help_of_every_command_teaches_with_an_example():
    assert rrtc("--help").exit_code == 0
    for command in ("init", "uptrain", "eval", "export", "run", "inspect"):
        result = rrtc(command, "--help")
        assert result.exit_code == 0 and f"rrtc {command} " in result.stdout and "Example" in result.stdout


@pytest.mark.slow
def test_help_does_not_import_torch():
    script = "import sys, rrtc.cli.app; print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_version_and_usage_errors():
    assert rrtc("--version").stdout.startswith("rrtc 0.")
    assert rrtc("init", "--no-such-flag").exit_code == 2
    assert rrtc("init").exit_code == 2
    assert rrtc("no-such-command").exit_code == 2


def test_a_dry_run_prints_the_plan_and_writes_it_as_json(dense, tmp_path):
    result = rrtc("init", dense, "--dry-run", "--json", tmp_path / "plan.json", "--sharing", "sequence", "--keep", "1")
    assert result.exit_code == 0, result.output
    assert "layers 1, 2, LoRA rank" in result.stdout and "slot   0   layer 0, its own weights" in result.stdout
    plan = json.loads((tmp_path / "plan.json").read_text())
    keys = {"params_total", "params_non_embedding", "dense_params_total", "dense_params_non_embedding", "visits"}
    assert keys <= plan.keys()
    assert [v["slot"] for v in plan["visits"]] == [0, 1, 1, 2, 2, 3]


def test_json_on_stdout_is_nothing_but_json(dense, tied, tmp_path):
    plan = rrtc("init", dense, "--dry-run", "--json", "-")
    assert json.loads(plan.stdout)["model"] == str(dense)
    assert json.loads(rrtc("inspect", tied, "--json", "-").stdout)["stage"] == "init"
    made = rrtc("init", dense, "-o", tmp_path / "out", *SMALL, "--json", "-")
    assert json.loads(made.stdout)["params_total"] > 0


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(dense, tmp_path):
    out = tmp_path / "out"
    for target in (tmp_path, tmp_path / "no" / "such.json"):
        fails("init", dense, "-o", out, "--json", target, says="cannot be written", code=2, output=out)


def test_flags_override_the_recipe_file(dense, tmp_path):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(dense), "init": {"loops": 3, "rank": 4}}))
    shown = json.loads(
        rrtc("init", "--recipe", tmp_path / "recipe.yaml", "--rank", "q=2,ffn=3", "--dry-run", "--json", "-").stdout
    )
    assert shown["recipe"]["loops"] == 3 and shown["recipe"]["rank"] == {"q": 2, "ffn": 3}
    assert shown["visits"][0]["ranks"]["self_attn.q_proj"] == 2
    assert shown["visits"][0]["ranks"]["self_attn.o_proj"] == 0


def test_layers_that_cannot_be_divided(dense, tmp_path):
    out = tmp_path / "out"
    error = fails(
        "init", dense, "-o", out, "--loops", "4", says="6 layers cannot be divided into 4 loops", code=2, output=out
    )
    assert "2, 3, 6" in error


def test_a_misspelled_recipe_key_names_the_nearest_valid_one(tmp_path):
    (tmp_path / "recipe.yaml").write_text("init:\n  lops: 2\n")
    out = tmp_path / "out"
    error = fails("run", tmp_path / "recipe.yaml", "-o", out, says="no key 'init.lops'", code=2, output=out)
    assert "Did you mean 'loops'?" in error


def test_damaged_weights(dense, tmp_path):
    out = tmp_path / "out"
    short = copy(dense, tmp_path / "short")
    with open(short / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1000)
    fails("init", short, "-o", out, says="is truncated or damaged", output=out)

    sharded = copy(dense, tmp_path / "sharded")
    (sharded / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    fails("init", sharded, "-o", out, says="model-00001-of-00002.safetensors is missing", output=out)

    tensors = load_file(dense / "model.safetensors")
    for value in (float("nan"), float("inf")):
        broken = copy(dense, tmp_path / f"broken-{value}")
        name = "model.layers.5.mlp.down_proj.weight"
        save_file(
            tensors | {name: tensors[name].clone().index_fill_(0, torch.tensor([1]), value)},
            broken / "model.safetensors",
        )
        # Met before any work, and nothing is left to be resumed.
        fails("init", broken, "-o", out, says=f"{name} .* holds NaN or infinity", output=out)


@pytest.mark.parametrize(
    "config, says",
    [
        (ViTConfig(num_hidden_layers=2), "'vit' model is not a decoder"),
        (T5Config(num_layers=2), "'t5' model is not a decoder"),
        (BertConfig(num_hidden_layers=2), "is an encoder"),
        (MixtralConfig(num_hidden_layers=2, hidden_size=32, intermediate_size=32, num_local_experts=2), "experts.*raw"),
    ],
)
def test_models_without_layers_that_can_be_tied(config, says, tmp_path):
    config.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    fails("init", tmp_path / "model", "-o", out, says=says, output=out)
    fails("init", tmp_path / "model", "--dry-run", says=says)


def test_places_that_hold_no_model(tmp_path):
    out = tmp_path / "out"
    fails("init", tmp_path / "nowhere", "-o", out, says="There is no model at", output=out)
    fails("init", tmp_path, "-o", out, says="no config.json", output=out)
    error = fails("init", "package://llm_no_such/x.gguf", "-o", out, says="llm_no_such is not installed", output=out)
    assert "pip install" in error
    fails("init", "nobody/no-such-model", "-o", out, says="no folder nobody/no-such-model", output=out)
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    fails("init", tmp_path / "x.gguf", "-o", out, says="GGUF file .* cannot be read", output=out)


def test_an_output_folder_that_is_in_use(dense, tied, tmp_path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("precious")
    for command in (["init", dense], ["uptrain", tied], ["eval", tied], ["export", tied]):
        fails(*command, "-o", tmp_path / "used", says="is not empty")
    assert [p.name for p in (tmp_path / "used").iterdir()] == ["thesis.txt"]


def test_an_output_that_cannot_become_a_new_folder(dense, tied, tmp_path, monkeypatch):
    for folder, command in ((dense, "init"), (tied, "uptrain"), (tied, "eval"), (tied, "export")):
        inside = folder / "inside"
        fails(command, folder, "-o", inside, says="from which it is made", code=2, output=inside)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    fails("init", dense, "-o", ".", *SMALL, says="cannot be replaced by a new one")


def test_checkpoints_of_an_interrupted_run_are_not_swept_away(dense, tmp_path):
    saved = tmp_path / "out.partial" / "checkpoints" / "checkpoint-5"
    saved.mkdir(parents=True)
    (saved.parent / "started.json").touch()
    fails("init", dense, "-o", tmp_path / "out", *SMALL, says="holds the checkpoints of an interrupted run")
    assert saved.exists()


def test_what_runs_in_one_process_says_so(dense, tied, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for command, folder in (("init", dense), ("export", tied)):
        fails(command, folder, "-o", tmp_path / "out", says="runs in one process", code=2, output=tmp_path / "out")


def test_a_damaged_config_of_a_compressed_model(tied, tmp_path):
    broken = copy(tied, tmp_path / "broken")
    (broken / "config.json").write_text("{")
    for command in ("inspect", "eval"):
        fails(command, broken, says="config .* cannot be read")


def test_a_cache_in_a_place_that_cannot_be_written_to(tied, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "file"))
    result = rrtc("uptrain", tied, "-o", tmp_path / "out", "--context", "32", "--tokens", "256")
    assert result.exit_code == 1 and not (tmp_path / "out").exists()
    assert str(tmp_path / "file") in result.stderr and "RRTC_CACHE names another folder" in result.stderr


def test_a_failed_run_leaves_no_folder(dense, tmp_path):
    tensors = load_file(dense / "model.safetensors")
    broken = copy(dense, tmp_path / "broken")
    name = "model.layers.0.mlp.down_proj.weight"
    save_file(tensors | {name: tensors[name] * float("nan")}, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"model": str(broken), "init": {"rank": 4}}))
    fails("run", tmp_path / "recipe.yaml", "-o", tmp_path / "out", says="NaN or infinity", output=tmp_path / "out")


def test_a_missing_tokenizer(dense, tmp_path):
    bare = copy(dense, tmp_path / "bare")
    for file in bare.glob("*token*"):
        file.unlink()
    fails("init", bare, "-o", tmp_path / "out", says="no tokenizer in", output=tmp_path / "out")


def test_texts_that_are_no_use(tied, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("Too short.")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"content": "here"}) + "\n")
    for command, option in (("uptrain", "--data"), ("eval", "--text")):
        fails(command, tied, "-o", out, option, tmp_path / "empty.txt", says="empty.txt is empty", output=out)
        fails(command, tied, "-o", out, option, tmp_path / "short.txt", says="fewer than one context", output=out)
        fails(command, tied, "-o", out, option, tmp_path / "no.txt", says="no text at", output=out)
        error = fails(
            command, tied, "-o", out, option, tmp_path / "rows.jsonl", says="no text field 'text'", output=out
        )
        assert "content" in error


def test_a_teacher_with_another_vocabulary(tied, tmp_path):
    other = save_pico(tmp_path / "other", vocab_size=400)
    out = tmp_path / "out"
    fails("uptrain", tied, "-o", out, "--teacher", other, says="vocabulary of 400 tokens", output=out)
    fails("eval", tied, "-o", out, "--against", other, says="vocabulary of 400 tokens", output=out)


@pytest.mark.slow
def test_a_dense_model_that_has_moved(dense, tmp_path):
    here = copy(dense, tmp_path / "here")
    assert rrtc("init", here, "-o", tmp_path / "tied", *SMALL).exit_code == 0
    here.rename(tmp_path / "there")
    error = fails("eval", tmp_path / "tied", says="no longer where it was")
    assert "--against MODEL" in error
    error = fails(
        "uptrain", tmp_path / "tied", "-o", tmp_path / "out", says="no longer where it was", output=tmp_path / "out"
    )
    assert "--teacher MODEL" in error
    assert (
        rrtc("eval", tmp_path / "tied", "--against", tmp_path / "there", "--tokens", "500", "--context", "64").exit_code
        == 0
    )


def test_folders_that_rrtc_did_not_write(dense, tmp_path):
    for command in (["uptrain", "-o", tmp_path / "out"], ["eval"], ["export", "-o", tmp_path / "out"], ["inspect"]):
        fails(command[0], dense, *command[1:], says="was not written by rrtc")
        fails(command[0], tmp_path / "nowhere", *command[1:], says="no folder")


def limited_run(arguments: list, limit: int) -> subprocess.CompletedProcess:
    """Runs rrtc where no file may grow beyond `limit` bytes, which is how a full disk looks to a writer."""
    script = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}));"
        "from rrtc.cli.app import main; main()"
    )
    return ready.run([sys.executable, "-c", script, *arguments])


@pytest.mark.slow
def test_no_space_left(dense, tmp_path):
    result = limited_run(["init", dense, "-o", tmp_path / "out", *SMALL], 50_000)
    assert result.returncode == 1, result.stderr
    assert (
        re.search(r"Error: Writing .* failed: .*[Ff]ile too large", result.stderr) and "Traceback" not in result.stderr
    )
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_under_the_final_name(dense, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    assert rrtc("init", dense, "-o", tmp_path / "tied", *SMALL).exit_code == 0
    # What a shell starts in the background ignores Ctrl-C, and so do the tests then, and what they start.
    listening = "import faulthandler, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code = f"{listening}; faulthandler.enable(); from rrtc.cli.app import main; main()"
    running = ready.Ready(
        [
            *(sys.executable, "-c", code, "uptrain", tmp_path / "tied", "-o", tmp_path / "out"),
            *("--data", tmp_path / "text.txt", "--context", "32", "--tokens", "10000000", "--save-every", "5"),
        ]
    )
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out.partial").glob("checkpoints/checkpoint-*/rrtc-whole")) and running.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    running.send_signal(signal.SIGINT)
    try:
        running.wait(timeout=60)
    except subprocess.TimeoutExpired:
        running.send_signal(signal.SIGABRT)  # has every thread say where it is
        running.wait()
        pytest.fail(f"It goes on after Ctrl-C: {running.stderr}")
    errors = running.stderr
    assert running.returncode == 130 and "Traceback" not in errors
    assert re.search(r"^Error: Ctrl-C stopped the run after step \d+ of \d+; --resume goes on from there", errors, re.M)
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()


def test_inspect_tells_plan_origin_and_figures(dense, tied):
    shown = rrtc("inspect", tied)
    assert shown.exit_code == 0, shown.output
    for piece in ("init", str(dense), "residual energy kept", "LoRA rank 4", "recipe, init", "of the dense model's"):
        assert piece in shown.stdout, piece
