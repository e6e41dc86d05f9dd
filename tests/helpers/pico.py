"""Pico models: every supported architecture in a size that builds in milliseconds, with a real tokenizer.

They are built from configs with random weights, seeded by the architecture's name. Sizes differ from dimension to
dimension, so that a transposed or mixed-up matrix cannot pass unseen.
"""

import functools
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCABULARY = 320
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2, "initializer_range": 0.1, "tie_word_embeddings": False,
}  # fmt: skip
WINDOWED = {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 3}

ARCHITECTURES: dict[str, tuple[str, dict]] = {
    "llama": ("LlamaConfig", {}),
    "gemma": ("GemmaConfig", {"head_dim": 16, "tie_word_embeddings": True}),
    "gemma2": ("Gemma2Config", WINDOWED | {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}),
    "gemma3": ("Gemma3TextConfig", WINDOWED | {"tie_word_embeddings": True, "query_pre_attn_scalar": 16}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 8}),
    "phi3": ("Phi3Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "olmo2": ("Olmo2Config", {}),
    "smollm3": ("SmolLM3Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 2.0, "residual_multiplier": 0.7}),
    "gpt2": ("GPT2Config", {"tie_word_embeddings": True}),
}
# For parametrize. The fast lane has the plain one, one with windows, norms of 1 + weight and a tied head, one of fused
# matrices, and one with biases and transposed matrices.
EVERY_ARCHITECTURE = [
    pytest.param(name, marks=() if name in ("llama", "gemma3", "phi3", "gpt2") else pytest.mark.slow)
    for name in ARCHITECTURES
]


def pico_config(architecture: str, **changes) -> PreTrainedConfig:
    """The config of a pico model; `changes` replace its fields."""
    class_name, own = ARCHITECTURES[architecture]
    return getattr(transformers, class_name)(**(COMMON | own | changes))


def pico_model(architecture: str, **changes) -> PreTrainedModel:
    """A dense pico model with random weights in every parameter, norms and biases too; float32, in eval mode."""
    torch.manual_seed(sum(architecture.encode()))
    model = AutoModelForCausalLM.from_config(pico_config(architecture, **changes), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@functools.cache
def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of VOCABULARY tokens, learned from Python's own documentation."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sorted(topics.values())[:20], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", padding_side="left"
    )


def save_pico(folder: Path, architecture: str = "llama", **changes) -> Path:
    """Writes a dense pico model and its tokenizer into `folder`, as a user would have it, and returns the folder."""
    pico_model(architecture, **changes).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    return Path(folder)
