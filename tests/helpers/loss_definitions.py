"""The losses of uptraining as they are defined, to compare with."""

import torch
from torch.nn.functional import cross_entropy, kl_div


def definitions(logits: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, temperature: float) -> dict:
    """Every loss as a mean over the tokens, by autograd over the whole table, with torch's own functions."""
    p, q = (logits / temperature).softmax(-1), (teacher / temperature).softmax(-1)
    m = (p + q) / 2
    return {
        "next_token": cross_entropy(logits, targets),
        "forward_kl": kl_div(p.log(), q, reduction="batchmean"),
        "reverse_kl": kl_div(q.log(), p, reduction="batchmean"),
        "jensen_shannon": (kl_div(m.log(), p, reduction="batchmean") + kl_div(m.log(), q, reduction="batchmean")) / 2,
        "total_variation": (p - q).abs().sum(-1).mean() / 2,
    }
