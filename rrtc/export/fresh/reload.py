"""Loads an exported folder as somebody without rrtc does. A program of its own: rrtc cannot be imported in it.

    python -P reload.py JOB.json

JOB.json: folder, gguf_file (the name of the file in it that is to be read; null for safetensors), trust_remote_code,
from_disk (whether the model must not be in memory whole), scratch (a folder that accelerate may then use), frequencies
(of the rotary embedding, in place of those that transformers reads; or null), ids (rows of token ids), logits_to_keep
(of how many tokens at their end logits are wanted), text, and the files to write: `logits`, safetensors with one tensor
(rows, tokens, vocabulary), computed in float32, and `report`, JSON with

    problems             the keys that were missing, unexpected or of the wrong shape on loading
    token_ids            of the text; null where transformers cannot build the tokenizer of a GGUF file
    hidden_difference    with trust_remote_code: by how much AutoModel's last hidden state differs from
                         AutoModelForCausalLM's, as a part of its largest number
    greedy, guessed      where an exit of the model is to guess: the tokens of greedy generation without that, each with
                         the lead of its logit over the second largest, and those with it
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.modules["rrtc"] = None  # "import rrtc" now fails, installed or not

import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

NEW = 24  # tokens that are generated with and without guesses


def main(job: dict) -> dict:
    ids = torch.tensor(job["ids"])
    model, problems = load(AutoModelForCausalLM, job)
    last = []  # hidden states: a model that runs in blocks has no others to show
    # Whichever it is that the model calls: OPT calls its decoder, inside of the base model. The outermost ends last.
    hooks = [
        module.register_forward_hook(lambda module, args, output: last.append(output[0]))
        for module in model.base_model.modules()
        if isinstance(module, PreTrainedModel)
    ]
    with torch.inference_mode():
        output = model(ids, use_cache=False, logits_to_keep=job["logits_to_keep"])
    for hook in hooks:
        hook.remove()
    save_file({"logits": output.logits.float().contiguous()}, job["logits"])
    report = {"problems": problems, "token_ids": token_ids(job)}
    if getattr(model.generation_config, "speculate", None) and not job["from_disk"]:  # that would read it many times
        report |= generated(model, ids[:1, : len(job["prompt"])])
    if job["trust_remote_code"]:
        inside = f"unexpected {model.base_model_prefix}."
        del model
        base, base_problems = load(AutoModel, job)
        # AutoModel has no output projection, and rightly does not expect it.
        report["problems"] += [p for p in base_problems if not p.startswith("unexpected") or p.startswith(inside)]
        with torch.inference_mode():
            hidden = base(ids, use_cache=False).last_hidden_state
        expected = last[-1]
        report["hidden_difference"] = ((hidden - expected).abs().max() / expected.abs().max()).item()
    return report


def load(auto_class, job: dict):
    """(the model in `job["folder"]`, what was wrong on loading as "missing NAME", "unexpected NAME" and so on)."""
    placed = {"device_map": {"": "disk"}, "offload_folder": job["scratch"]} if job["from_disk"] else {}
    model, info = auto_class.from_pretrained(
        job["folder"],
        gguf_file=job["gguf_file"],
        dtype=torch.float32,
        trust_remote_code=job["trust_remote_code"],
        output_loading_info=True,
        **placed,
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    for module in model.modules() if job["frequencies"] else ():
        if isinstance(getattr(module, "inv_freq", None), torch.Tensor):
            module.inv_freq = torch.tensor(job["frequencies"])
    problems = [f"{kind.removesuffix('_keys')} {key}" for kind in kinds for key in sorted(map(str, info[kind]))]
    return model.eval(), problems


def generated(model, prompt: torch.Tensor) -> dict:
    settings = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    settings |= {"inputs": prompt, "attention_mask": torch.ones_like(prompt)}
    plain = model.generate(**settings, speculate=False, output_logits=True, return_dict_in_generate=True)
    best = torch.stack(plain.logits)[:, 0].float().topk(2).values
    tokens = plain.sequences[0, prompt.shape[1] :].tolist()
    guessed = model.generate(**settings)[0, prompt.shape[1] :].tolist()
    return {"greedy": list(zip(tokens, (best[:, 0] - best[:, 1]).tolist(), strict=True)), "guessed": guessed}


def token_ids(job: dict) -> list[int] | None:
    read_from = {"gguf_file": job["gguf_file"]} if job["gguf_file"] else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(job["folder"], trust_remote_code=False, **read_from)
    except Exception:  # tokenizers raises nothing more special
        if job["gguf_file"]:
            return None
        raise
    return tokenizer(job["text"])["input_ids"]


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(job["report"]).write_text(json.dumps(main(job)))
