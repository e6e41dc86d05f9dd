"""Scores of a language model on packed windows: loss, bits per byte, and closeness to a reference model.

Used by init for its closing figure and by eval for its table, so that both mean the same.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rrtc.checkpoint import Weights
from rrtc.model.forward import outputs_of, run_exit, run_head
from rrtc.model.skeleton import decoder_layers
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
    Weights(folder)  # refuses what it holds besides safetensors, and paths in its index
    safe = {"use_safetensors": True, "trust_remote_code": False}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **safe).to(device()).eval()


def score(model, windows: Windows, reference=None, advance=lambda: None) -> Scores:
    """Scores `model` on every token of `windows` but the first of each.

    reference: a model with the same vocabulary, for KL(reference || model) and top-1 agreement. advance is called after
    each window.
    """
    return score_with_exits(model, windows, (), reference, advance)[0]


@torch.inference_mode()
def score_with_exits(
    model, windows: Windows, exits: Sequence[int], reference=None, advance=lambda: None
) -> list[Scores]:
    """`score` of the model, and then of what it says if it is left after the layer at each of the places `exits`."""
    sums = [[0.0, 0.0, 0.0] for _ in range(1 + len(exits))]  # of loss, kl and agreement
    for ids in windows.ids:
        ids = ids.unsqueeze(0).to(model.device)  # (1, context)
        targets = ids[0, 1:]
        reference_logits = None if reference is None else reference(ids, use_cache=False).logits[0, :-1]
        logits = _logits(model, ids, exits)
        for total in sums:  # one table of logits at a time, so nothing here holds on to it
            _add(total, next(logits), targets, reference_logits)
        advance()
    tokens = windows.ids.shape[0] * (windows.ids.shape[1] - 1)
    scores = []
    for loss, kl, agree in sums:
        beside = () if reference is None else (kl / tokens, agree / tokens)
        bits = loss / tokens / math.log(2) / windows.bytes_per_token
        scores.append(Scores(tokens, loss / tokens, bits, *beside))
    return scores


def _add(sums: list[float], logits: Tensor, targets: Tensor, reference_logits: Tensor | None) -> None:
    """Adds the loss, kl and agreement of `targets` (tokens,) to `sums`. Both logits: (tokens, vocabulary)."""
    for start in range(0, len(targets), TOKENS_AT_ONCE):
        part = slice(start, start + TOKENS_AT_ONCE)
        log_p = logits[part].float().log_softmax(-1)
        sums[0] -= log_p.gather(1, targets[part, None]).sum().item()
        if reference_logits is not None:
            log_q = reference_logits[part].float().log_softmax(-1)
            sums[1] += (log_q.exp() * (log_q - log_p)).sum().item()
            sums[2] += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()


def _logits(model, ids: Tensor, exits: Sequence[int]) -> Iterator[Tensor]:
    """The logits (context - 1, vocabulary) that predict the next token of `ids` (1, context): in the end, and at each
    of `exits`, one after the other."""
    layers = decoder_layers(model) if exits else ()
    with outputs_of([layers[place] for place in exits]) as outputs:
        final = model(ids, use_cache=False).logits[0, :-1]
    yield final
    del final
    for output in outputs:
        yield run_head(model, run_exit(model, ids, output)[0, :-1])
