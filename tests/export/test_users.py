"""The recursive format where its users load it: a process that cannot import rrtc, and what people do with models.

One process does it all, because it takes longer to start than what it does; each test looks at one part of what it
found.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from exports import IDS, logits_of, make_rrt
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoTokenizer
from warm import cold_run

from rrtc.export import stage
from rrtc.export.formats.recursive import AUTO_MAP
from rrtc.model import RrtForCausalLM
from rrtc.recipe.schema import Recipe

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}A:{% endif %}"
)
CHAT = [{"role": "user", "content": "What is a with statement?"}]
ITEMS = [{"text": f"The {n}th of", "choices": [" May", " import", " statement"], "answer": n % 3} for n in range(3)]
GREEDY = {"max_new_tokens": 8, "do_sample": False}

USER = """
import json, os, sys
sys.modules["rrtc"] = None  # "import rrtc" now fails, installed or not
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

job = json.loads(sys.argv[1])
folder, ids, greedy = job["folder"], torch.tensor(job["ids"]), job["greedy"]
tensors, said = {}, {}
trust = {"trust_remote_code": True}


@torch.inference_mode()
def keep(name, model):
    tensors[name] = model.eval()(ids.to(model.device)).logits.float().cpu()


def load(where=folder, **kwargs):
    return AutoModelForCausalLM.from_pretrained(where, **trust, **kwargs)


tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
model = load()
keep("plain", model)
said["classes"] = [type(thing).__name__ for thing in (AutoConfig.from_pretrained(folder, **trust), model)]
said["modules"] = sorted({type(thing).__module__.split(".")[0] for thing in (model, model.config)})

base = AutoModel.from_pretrained(folder, **trust).eval()
with torch.inference_mode():
    tensors["hidden"] = base(ids).last_hidden_state
    tensors["expected_hidden"] = model(ids, output_hidden_states=True).hidden_states[-1]

talk = pipeline("text-generation", model=folder, tokenizer=tokenizer, device="cpu", **trust)
said["pipeline"] = talk("The with statement", return_full_text=False, **greedy)[0]["generated_text"]
said["chat"] = talk(job["chat"], **greedy)[0]["generated_text"][-1]
given = tokenizer.apply_chat_template(job["chat"], add_generation_prompt=True, return_tensors="pt")
made = model.generate(**given, **greedy)[0, given["input_ids"].shape[1]:]
said["chat_by_hand"] = tokenizer.decode(made, skip_special_tokens=True)

keep("auto", load(device_map="auto"))
parts = load(device_map="auto", max_memory={"cpu": job["bytes"] // 2}, offload_folder="offloaded")
said["places"] = sorted({str(place) for place in parts.hf_device_map.values()})
keep("offloaded", parts)

torch._dynamo.reset()
compiled = torch.compile(load(), backend="eager", fullgraph=True)
with torch.inference_mode():
    tensors["compiled"] = compiled(ids, use_cache=False).logits

model.save_pretrained("again")
tokenizer.save_pretrained("again")
again = load("again")
keep("again", again)
again.save_pretrained("and_again")
said["saved"] = {name: sorted(os.listdir(name)) for name in ("again", "and_again")}
said["auto_map"] = json.load(open("again/config.json"))["auto_map"]

from peft import LoraConfig, PeftModel, get_peft_model
torch.manual_seed(0)
lora = LoraConfig(r=2, target_modules=job["targets"], init_lora_weights=False, task_type="CAUSAL_LM")
adapted = get_peft_model(load(), lora)
said["adapted"] = sorted(adapted.targeted_module_names)
keep("adapted", adapted)
adapted.train()
adapted(ids, labels=ids).loss.backward()
said["without_gradient"] = [n for n, p in adapted.named_parameters() if p.requires_grad and p.grad is None]
adapted.save_pretrained("adapter")
said["adapter_file"] = sorted(os.listdir("adapter"))
keep("adapter_loaded", PeftModel.from_pretrained(load(), "adapter"))
merged = adapted.merge_and_unload()
keep("merged", merged)
merged.save_pretrained("merged")
keep("merged_loaded", load("merged"))

import lm_eval
result = lm_eval.simple_evaluate(
    model="hf", model_args={"pretrained": folder, "dtype": "float32", **trust}, tasks=[job["task"]], device="cpu",
    bootstrap_iters=0, log_samples=True,
)
said["lm_eval"] = [[answer[0] for answer in sample["filtered_resps"]] for sample in result["samples"]["pico"]]

save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, "tensors.safetensors")
json.dump(said, open("said.json", "w"))
"""


class Found:
    """What the user's process found, and the model and export it was about."""

    def __init__(self, workplace: Path, source: Path, export: Path):
        self.export, self.workplace = export, workplace
        self.said = json.loads((workplace / "said.json").read_text())
        self.tensors = load_file(workplace / "tensors.safetensors")
        self.model = RrtForCausalLM.from_pretrained(source).eval()

    def check(self, name: str, expected: torch.Tensor | None = None, atol: float = 1e-5) -> None:
        """That the logits of that name are the `expected` ones, by default the model's."""
        torch.testing.assert_close(
            self.tensors[name], logits_of(self.model) if expected is None else expected, atol=atol, rtol=0
        )


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> Found:
    workplace = tmp_path_factory.mktemp("user")
    source, export = make_rrt(workplace / "rrt"), workplace / "export"
    (source / "chat_template.jinja").write_text(TEMPLATE)
    stage.export(str(source), str(export), Recipe())
    card = ModelCard.load(export / "README.md").text
    (workplace / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))
    files = {"data_files": {"test": str(workplace / "items.jsonl")}}
    task = {
        "task": "pico", "dataset_path": "json", "dataset_kwargs": files,
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{text}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "target_delimiter": "", "metric_list": [{"metric": "acc"}], "num_fewshot": 0,
    }  # fmt: skip
    job = {
        "folder": str(export), "ids": IDS.tolist(), "chat": CHAT, "greedy": GREEDY, "task": task,
        "bytes": (export / "model.safetensors").stat().st_size,
        "targets": re.search(r'target_modules=r"(.*?)"', card)[1],
    }  # fmt: skip
    environment = os.environ | {
        "HF_MODULES_CACHE": str(workplace / "modules"), "HF_HOME": str(workplace / "home"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = cold_run(
        [sys.executable, "-P", "-c", USER, json.dumps(job)],
        cwd=workplace, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return Found(workplace, source, export)


def test_the_auto_classes(found):
    found.check("plain")
    assert found.said["classes"] == ["RrtConfig", "RrtForCausalLM"]
    assert found.said["modules"] == ["transformers_modules"]
    torch.testing.assert_close(found.tensors["hidden"], found.tensors["expected_hidden"], atol=1e-6, rtol=0)


def test_pipelines_and_chat_templates(found):
    tokenizer = AutoTokenizer.from_pretrained(found.export, trust_remote_code=False)
    given = tokenizer("The with statement", return_tensors="pt")
    made = found.model.generate(**given, **GREEDY)[0, given["input_ids"].shape[1] :]
    assert found.said["pipeline"] == tokenizer.decode(made, skip_special_tokens=True)
    assert found.said["chat"] == {"role": "assistant", "content": found.said["chat_by_hand"]}
    text = "<bos>user: What is a with statement?<eos>A:"
    given = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    made = found.model.generate(**given, **GREEDY)[0, given["input_ids"].shape[1] :]
    assert found.said["chat_by_hand"] == tokenizer.decode(made, skip_special_tokens=True)


def test_a_device_map_with_half_of_the_model_on_disk(found):
    found.check("auto")
    assert found.said["places"] == ["cpu", "disk"]
    found.check("offloaded")


def test_it_compiles_into_one_graph(found):
    found.check("compiled")


def test_saved_again_it_loads_again(found):
    found.check("again")
    code = {"configuration_rrt.py", "modeling_rrt.py"}
    assert all(code <= set(files) for files in found.said["saved"].values())
    assert found.said["auto_map"].keys() == AUTO_MAP.keys()
    first, again = (load_file(folder / "model.safetensors") for folder in (found.export, found.workplace / "again"))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)


def test_peft_adapts_the_shared_matrices_that_the_card_names(found):
    matrices = found.model.config.visits[0]["ranks"]
    shared = [name for name, module in found.model.named_modules() if ".shared." in name and hasattr(module, "weight")]
    assert found.said["adapted"] == sorted(shared) and len(shared) == 3 * len(matrices)
    assert found.said["without_gradient"] == [] and "adapter_model.safetensors" in found.said["adapter_file"]
    assert (found.tensors["adapted"] - found.tensors["plain"]).abs().max() > 1e-2
    for name in ("adapter_loaded", "merged", "merged_loaded"):
        found.check(name, found.tensors["adapted"], 1e-4)


def test_lm_eval_by_path(found):
    tokenizer = AutoTokenizer.from_pretrained(found.export, trust_remote_code=False)
    for item, answers in zip(ITEMS, found.said["lm_eval"], strict=True):
        for choice, answer in zip(item["choices"], answers, strict=True):
            before, whole = (tokenizer(text)["input_ids"] for text in (item["text"], item["text"] + choice))
            with torch.inference_mode():
                log_p = found.model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(whole[1:])
            expected = log_p.gather(1, targets[:, None])[len(before) - 1 :].sum().item()
            assert answer == pytest.approx(expected, abs=1e-3)
