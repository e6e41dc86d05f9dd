"""PEFT's PiSSA initialization (arXiv 2404.02948) of every linear layer, for benchmarks/init.py, which runs it with the
Python that has PEFT, as a process of its own:

    python benchmarks/pissa.py MODEL RANK FOLDER

Like the paper's initialization it takes one SVD of every matrix, so it is what times are compared with. What it makes
is another thing: adapters of the leading components beside the rest of every matrix, and no smaller model. Both are
written, as PEFT's own example does.
"""

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="PiSSA adapters for every linear layer of a model.")
    parser.add_argument("model", help="folder of the dense model")
    parser.add_argument("rank", type=int)
    parser.add_argument("output", type=Path, help="new folder, for the adapters and the rest of the model")
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.rank,
        lora_dropout=0,
        init_lora_weights="pissa",
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    adapted = get_peft_model(model, config)
    adapted.save_pretrained(arguments.output / "adapter")
    adapted.unload().save_pretrained(arguments.output / "rest")
