"""What the tests of exports share: a folder to export, and looks at what came out, here and in other processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch
from pico import pico_config, pico_tokenizer
from safetensors.torch import load_file, save_file

from rrtc.io.provenance import write_provenance
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.stock.architecture import read_architecture

IDS = (torch.arange(2 * 24) * 37 % 320).view(2, 24)

# What a stranger's machine does with recursive exports: no rrtc, remote code, logits and a greedy continuation.
STRANGER = """
import json, sys
sys.modules["rrtc"] = None
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
ids = torch.tensor(json.loads(sys.argv[1]))
results = {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.inference_mode():
        results[folder + ":logits"] = model(ids).logits
        results[folder + ":greedy"] = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
        )
        base, info = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not info["missing_keys"], info
        hidden = base.eval()(ids).last_hidden_state
        results[folder + ":hidden"] = hidden
        results[folder + ":expected_hidden"] = model(ids, output_hidden_states=True).hidden_states[-1]
save_file({name: tensor.contiguous().clone() for name, tensor in results.items()}, sys.argv[2])
"""

LAST_NORM = "model.norm.weight"


def make_rrt(folder: Path, architecture: str = "llama", norms: str = "per_visit", **changes) -> Path:
    """An rrtc folder of a pico model as `rrtc init` would write it, with random numbers in every parameter."""
    config, recipe = pico_config(architecture, **changes), InitRecipe(rank=6, norms=norms)
    plan = make_plan(read_architecture(config), recipe)
    torch.manual_seed(sum(architecture.encode()))
    model = RrtForCausalLM(RrtConfig.of(plan, config))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    base = {
        "uri": "maker/model", "path": "/nowhere/snapshots/1", "relative_path": "../nowhere", "sha256": "0", "bytes": 1,
    }  # fmt: skip
    measured = {"init": {"params_total": plan.parameters}}
    write_provenance(folder, "init", base, {"init": recipe.model_dump()}, measured, [])
    return Path(folder)


@torch.inference_mode()
def logits_of(model) -> torch.Tensor:
    return model.eval()(IDS).logits.float()


def recipe(**export) -> Recipe:
    return Recipe(export=export)


def run_python(code: str, *arguments: str, cwd: Path) -> str:
    """Runs `code` in a fresh process in `cwd`, with a cache for remote code of its own; returns its stdout."""
    environment = os.environ | {"HF_MODULES_CACHE": str(cwd / "modules"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
