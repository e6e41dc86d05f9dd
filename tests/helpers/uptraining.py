"""What the tests of uptraining have in common: a small run, a folder to train, and looks at what came out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ready
import torch
from pico import pico_config, pico_tokenizer
from safetensors.torch import load_file

from rrtc.io.provenance import write_provenance
from rrtc.io.source import find_model
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture
from rrtc.uptrain.trainer import DistillationTrainer

CONTEXT, BATCH, STEPS = 32, 4, 6
ONE_STEP = CONTEXT * BATCH  # tokens
SETTINGS = {
    "data": ["pydoc"], "tokens": CONTEXT * BATCH * STEPS, "context": CONTEXT, "batch_size": BATCH, "micro_batch": 2,
    "warmup": 0.0, "learning_rate": 1e-2, "precision": "float32", "save_every": 3,
    "losses": {"next_token": 1.0, "forward_kl": 1.0},
}  # fmt: skip


def settings(**changes) -> Recipe:
    return Recipe.model_validate({"uptrain": SETTINGS | changes})


def make_rrt(folder: Path, dense: Path, architecture: str = "llama", dtype=torch.float32, **init) -> Path:
    """An rrtc folder as `init` writes one, with random weights, but in one shard."""
    config = pico_config(architecture)
    recipe = InitRecipe(rank=4, **init)
    plan = make_plan(read_architecture(config), recipe)
    torch.manual_seed(1)
    model = RrtForCausalLM(RrtConfig.of(plan, config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    base = find_model(str(dense)).provenance(folder)
    write_provenance(folder, "init", base, {"init": recipe.model_dump()}, {"init": {"bytes": 1}}, [])
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve(folder: Path) -> list[tuple[float, float]]:
    return [(step["loss"], step["kl"]) for step in metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def interrupt_at(monkeypatch, micro_batch: int) -> None:
    """Ctrl-C in the middle of the micro-batch of that number."""
    original, calls = DistillationTrainer.compute_loss, []

    def interrupted(self, *args, **kwargs):
        calls.append(0)
        if len(calls) == micro_batch:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(DistillationTrainer, "compute_loss", interrupted)


def by_torchrun(script: Path, *arguments) -> subprocess.CompletedProcess:
    """Runs a Python file by torchrun, on two processes of one thread each. (Most tests take ready.run_two, which does
    the same in a fraction of the time.)"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], env=threads, capture_output=True, text=True, timeout=300)


def uptrain_on_two_processes(rrt: Path, target: Path, recipe: Recipe) -> str:
    """What a run on two processes says on stderr. It has to end well."""
    script = target.with_name("script.py")
    script.write_text(
        "import sys\nfrom rrtc.recipe.schema import Recipe\nfrom rrtc.uptrain.stage import uptrain\n"
        "uptrain(sys.argv[1], sys.argv[2], Recipe.model_validate_json(sys.argv[3]))\n"
    )
    run = ready.run_two([sys.executable, script, rrt, target, recipe.model_dump_json()])
    assert run.returncode == 0, run.stderr
    return run.stderr
