"""Scores of a language model on packed windows: loss, bits per byte, and closeness to a reference model.

Used by init for its closing figure and by eval for its table, so that both mean the same.
"""

import math
from dataclasses import dataclass

import torch

from rrtc.text import Windows

TOKENS_AT_ONCE = 128  # distributions of so many tokens are compared at a time, to bound memory


@dataclass(frozen=True)
class Scores:
    """Means over the scored tokens. loss and kl are in nats per token; kl and top1_agreement are against the reference
    model and None where there is none; top1_agreement is a share from 0 to 1."""

    tokens: int
    loss: float
    bits_per_byte: float
    kl: float | None = None
    top1_agreement: float | None = None


def device() -> torch.device:
    """The accelerator of this machine, or its CPU."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def fast_bfloat16() -> bool:
    """Whether this machine computes in bfloat16 faster than in float32: an accelerator that has it, or AMX."""
    if device().type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device().type == "cpu" and torch.cpu._is_amx_tile_supported()


def load_for_scoring(folder):
    """The causal language model in `folder`, ready to score: in float32 on a CPU, in bfloat16 on an accelerator."""
    from transformers import AutoModelForCausalLM

    import rrtc.model  # noqa: F401 - registers the recursive model

    dtype = torch.float32 if device().type == "cpu" else torch.bfloat16
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device()).eval()


@torch.inference_mode()
def score(model, windows: Windows, reference=None, advance=lambda: None) -> Scores:
    """Scores `model` on every token of `windows` but the first of each.

    reference: a model with the same vocabulary, for KL(reference || model) and top-1 agreement. advance is called after
    each window.
    """
    loss = kl = agree = 0.0
    for ids in windows.ids:
        ids = ids.unsqueeze(0).to(model.device)  # (1, context)
        targets = ids[0, 1:]
        logits = model(ids, use_cache=False).logits[0, :-1]  # (context - 1, vocabulary)
        reference_logits = None if reference is None else reference(ids, use_cache=False).logits[0, :-1]
        for start in range(0, len(targets), TOKENS_AT_ONCE):
            part = slice(start, start + TOKENS_AT_ONCE)
            log_p = logits[part].float().log_softmax(-1)
            loss -= log_p.gather(1, targets[part, None]).sum().item()
            if reference_logits is not None:
                log_q = reference_logits[part].float().log_softmax(-1)
                kl += (log_q.exp() * (log_q - log_p)).sum().item()
                agree += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
        advance()
    tokens = windows.ids.shape[0] * (windows.ids.shape[1] - 1)
    bits = loss / tokens / math.log(2) / windows.bytes_per_token
    if reference is None:
        return Scores(tokens, loss / tokens, bits)
    return Scores(tokens, loss / tokens, bits, kl / tokens, agree / tokens)
