"""What can be said without torch and transformers is said without them: they take seconds to import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from pico import pico_config, save_pico
from safetensors.torch import load_file, save_file

from rrtc import api
from rrtc.errors import RrtcError
from rrtc.init.dry_run import dry_run
from rrtc.io import architectures
from rrtc.io.architectures import dense_of, read_dense
from rrtc.io.source import find_model
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture

HEAVY = ("torch", "transformers", "numpy", "scipy", "datasets", "accelerate", "matplotlib")
REPORT = f"print('HEAVY', sorted({set(HEAVY)} & set(sys.modules)), file=sys.stderr)"
RUN = f"import sys\nfrom rrtc.cli.app import main\ntry:\n    main()\nfinally:\n    {REPORT}"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of the test's own, empty."""
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def python(code: str, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def light(*arguments, code: int = 0) -> subprocess.CompletedProcess:
    """Runs rrtc, which must not import anything HEAVY."""
    done = python(RUN, *arguments)
    assert done.returncode == code, done.stderr
    assert "HEAVY []" in done.stderr, done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("statement", ["import rrtc.cli.app", "from rrtc import api", "import rrtc.init.dry_run"])
def test_imports_are_light(statement):
    done = python(f"import sys\n{statement}\n{REPORT}")
    assert done.stderr == "HEAVY []\n"


@pytest.mark.slow
def test_what_needs_no_torch_waits_for_none(rrt):
    for arguments in (["--version"], ["init", "--help"], ["recipe"], ["recipe", "--schema"], ["inspect", rrt]):
        light(*arguments)
    assert json.loads(light("inspect", rrt, "--json", "-").stdout)["stage"] == "init"


@pytest.mark.slow
def test_errors_that_flags_or_the_recipe_alone_decide(dense, rrt, tmp_path):
    model, out, there = dense("llama"), tmp_path / "out", tmp_path / "there"
    there.mkdir()
    (there / "file").write_text("in use")
    (tmp_path / "bad.yaml").write_text("init:\n  lops: 2\n")
    (tmp_path / "exits.yaml").write_text(yaml.safe_dump({"model": str(model), "uptrain": {"exits": True}}))
    for says, code, arguments in (
        ("budget and rank both say", 2, ["init", model, "-o", out, "--budget", "0.7", "--rank", "4"]),
        ("'huge' is not a size", 2, ["init", model, "-o", out, "--max-shard-size", "huge"]),
        ("'few' is neither a part nor a size", 2, ["init", model, "--dry-run", "--size", "few"]),
        ("There is no model at", 1, ["init", tmp_path / "no" / "where", "-o", out]),
        ("has no config.json", 1, ["init", tmp_path, "-o", out]),
        ("is not empty", 1, ["init", model, "-o", there]),
        ("no key 'init.lops'", 2, ["init", model, "--recipe", tmp_path / "bad.yaml", "--dry-run"]),
        ("is not empty", 1, ["uptrain", rrt, "-o", there]),
        ("was not written by rrtc", 1, ["uptrain", model, "-o", out]),
        ("not a multiple of micro_batch", 2, ["uptrain", rrt, "-o", out, "--micro-batch", "3"]),
        ("--fsdp shards the model", 2, ["uptrain", rrt, "-o", out, "--fsdp"]),
        ("this run has no teacher", 2, ["uptrain", rrt, "--dry-run", "--data", "self", "--losses", "next_token=1"]),
        ("There is no folder", 1, ["eval", tmp_path / "nowhere"]),
        ("Only what is pushed can be private", 2, ["export", rrt, "-o", out, "--private"]),
        ("int8 is not for the format gguf", 2, ["export", rrt, "-o", out, "--format", "gguf", "--quantize", "int8"]),
        ("a run only heals it", 2, ["run", tmp_path / "exits.yaml", "-o", out]),
        ("was not written by rrtc", 1, ["inspect", model]),
        ("There is no key 'init.lops'", 2, ["run", "quickstart", "-o", out, "--set", "init.lops=2"]),
        ("fields of init and uptrain", 2, ["run", "quickstart", "-o", out, "--sweep", "eval.seed=1,2"]),
        ("only a config", 1, ["run", "gemma-2b-2-loops", "-o", out]),
        ("There is no model at", 1, ["chat", tmp_path / "no" / "where", "--prompt", "x"]),
        ("so top_p says nothing", 2, ["chat", rrt, "--prompt", "x", "--temperature", "0", "--top-p", "0.5"]),
        ("was not written by rrtc", 1, ["chat", model, "--prompt", "x", "--against", "dense"]),
        ("There is no model at", 1, ["serve", tmp_path / "no" / "where", "--port", "0"]),
        ("Nothing can listen at no such host", 1, ["serve", rrt, "--host", "no such host"]),
        ("'port' is wrong", 2, ["serve", rrt, "--port", "65536"]),
    ):
        assert says in light(*arguments, code=code).stderr, says


@pytest.mark.slow
def test_the_first_word_comes_before_torch(dense, tmp_path):
    """What is on its way is said by the line before the import."""
    code = f"""
import sys, rrtc.api
from rrtc.cli.app import main
before = rrtc.api.call.note
def note(text):
    before(text)
    {REPORT}
    raise SystemExit(0)
rrtc.api.call.note = note
main()
"""
    for arguments in (["init", dense("llama"), "--dry-run"], ["init", dense("llama"), "-o", tmp_path / "out"]):
        said = python(code, *arguments).stderr.splitlines()
        assert said == [f"Reading {dense('llama')}", "HEAVY []"]


@pytest.mark.slow
def test_the_second_dry_run_of_a_model_needs_no_torch_and_says_the_same(dense, cache):
    arguments = ["init", dense("llama"), "--dry-run", "--json", "-", "--loops", "3", "--rank", "4"]
    first = python(RUN, *arguments)
    assert first.returncode == 0 and "'torch'" in first.stderr
    assert light(*arguments).stdout == first.stdout
    light("run", "tinyllama-2-loops", "--model", dense("llama"), "--set", "init.rank=4", "--dry-run")
    light("init", dense("llama"), "--dry-run", "--loops", "4", code=2)  # refused by the plan, not by the model
    budget = json.loads(light("init", dense("llama"), "--dry-run", "--json", "-", "--budget", "0.7").stdout)
    assert budget["visits"] is None and budget["params_total"] < budget["dense_params_total"]


def test_what_is_kept_is_what_would_be_read(dense, cache):
    architectures = ("llama", "gpt2", "gemma3", "phi3")
    for number, architecture in enumerate(architectures, 1):
        source = find_model(str(dense(architecture)))
        first, again = dense_of(source), dense_of(source)
        assert first == again == read_dense(source)
        assert again.architecture == read_architecture(source.config()) and again.dtype == "float32"
        assert len(list((cache / "architectures").iterdir())) == number


def test_a_config_alone_is_kept_apart_from_a_model_with_weights(dense, tmp_path, cache):
    pico_config("llama", dtype="bfloat16").save_pretrained(tmp_path / "config")
    alone = api.plan(tmp_path / "config", rank=4)
    assert alone["dtype"] == "bfloat16" and api.plan(tmp_path / "config", rank=4) == alone
    (tmp_path / "config" / "model.safetensors").write_bytes((dense("llama") / "model.safetensors").read_bytes())
    assert api.plan(tmp_path / "config", rank=4)["dtype"] == "float32"


def test_what_is_kept_never_hides_a_refusal(tmp_path, cache):
    folder = save_pico(tmp_path / "dense")
    plan = api.plan(folder, rank=4)
    tensors = load_file(folder / "model.safetensors")

    def refused(says: str, changed: dict):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        for _ in range(2):
            with pytest.raises(RrtcError, match=says):
                api.plan(folder, rank=4)

    name = "model.layers.5.mlp.down_proj.weight"
    refused("is missing", {n: t for n, t in tensors.items() if n != name})
    refused("has shape", tensors | {name: tensors[name][:, :7].contiguous()})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert api.plan(folder, rank=4) == plan
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 10)
    with pytest.raises(RrtcError, match="truncated or damaged"):
        api.plan(folder, rank=4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 12}))
    with pytest.raises(RrtcError, match="is missing"):
        api.plan(folder, rank=4)
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "nothing", "auto_map": {"AutoModel": "x.y"}})
    )
    with pytest.raises(RrtcError, match="needs Python code of its own"):
        api.plan(folder, rank=4)


def test_a_head_that_gets_numbers_of_its_own_is_seen(tmp_path, cache):
    """config.json and the headers stay the same."""
    folder = save_pico(tmp_path / "dense", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    table = tensors["model.embed_tokens.weight"]
    counted = []
    for head in (table.clone(), table + 1):
        save_file(tensors | {"lm_head.weight": head}, folder / "model.safetensors", metadata={"format": "pt"})
        counted += [api.plan(folder, rank=4)["dense_params_total"] for _ in range(2)]
    assert counted == [counted[0]] * 2 + [counted[0] + table.numel()] * 2


def test_what_is_kept_and_damaged_or_of_another_version_is_read_anew(dense, cache, monkeypatch):
    source = find_model(str(dense("llama")))
    found = dense_of(source)
    (file,) = (cache / "architectures").iterdir()
    for contents in ("", "{}", file.read_text()[:-5], file.read_text().replace('"layers"', '"leyers"')):
        file.write_text(contents)
        assert dense_of(source) == found
    monkeypatch.setattr(architectures.rrtc, "__version__", "0.0.0")
    assert dense_of(source) == found and len(list(file.parent.iterdir())) == 2


def test_a_cache_that_cannot_be_written_to_stops_no_dry_run(dense, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "file"))
    assert dry_run(str(dense("llama")), Recipe())["params_total"] > 0
