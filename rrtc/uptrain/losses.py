"""The losses of uptraining, and their gradient worked out on the way, so that logits never exist for all tokens.

    objective = sum over losses of weight * loss            (means over all predicted tokens of a step)

With s the model's logits, p = softmax(s / T) its distribution, q the teacher's and y the next token:

    next_token        -log p_y, at T = 1
    forward_kl        KL(q || p)                                            (paper §3.2: what it trains with)
    reverse_kl        KL(p || q)
    jensen_shannon    KL(q || m) / 2 + KL(p || m) / 2, m = (p + q) / 2
    total_variation   sum |p - q| / 2
    hidden            |h - g|² / |g|², h the model's hidden state after a visit, g the teacher's after that layer,
                      mean over visits
    attention         |o - f|² / |f|², o what a head with linear attention finds, f what it would if it saw everything,
                      mean over such heads (LoLCATs' attention transfer, arXiv 2410.10254, §3.1; stock/linear.py)

The four divergences are the ones the paper compares (appendix I). In the objective they are multiplied by T², so that
their gradients keep their size when T changes (Hinton et al., arXiv 1503.02531, §2). All but total_variation, hidden
and attention are in nats.

For any loss of the form sum_i g(p_i, q_i) the gradient by the logits is (h - p sum(h)) / T, where h_i = p_i dg/dp_i:
the Jacobian of the softmax is the same for all of them, and each only brings its value and its h.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

# Logits at a time: 128 MiB in float32, and as much for the teacher's and for their gradient. Fewer would save little
# memory beside a model, and every piece writes a gradient as large as the head.
LOGITS_AT_ONCE = 2**25
# To compare them takes a few more tables in float32. On a CPU so many numbers are compared at a time, whose tables its
# cache holds; an accelerator, which is faster the more it is given, compares all of them at once.
COMPARED_AT_ONCE = 2**19

Head = Callable[[Tensor], Tensor]  # hidden states (tokens, width) -> logits (tokens, vocabulary)


class Lesson(Protocol):
    """What a teacher says of a batch."""

    def about(self, part: slice) -> Callable[[slice, Tensor], Tensor]:
        """What it says of the batch's tokens `part`: a function log_q(rows, log_p) that returns log-probabilities
        (rows, vocabulary), float32, of some of these tokens, given the model's own."""


def reverse_kl(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """(sum over tokens of KL(p || q), h). All are (tokens, vocabulary), float32; so for the next two."""
    h = p * (log_p - log_q)  # and p, which the Jacobian takes out again
    return h.sum(), h


def jensen_shannon(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2))
    h = (p * (log_p - log_m)).div_(2)
    return h.sum() + (q * (log_q - log_m)).sum() / 2, h


def total_variation(p: Tensor, log_p: Tensor, q: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    return (p - q).abs_().sum() / 2, p * (p - q).sign_() / 2


# All but forward_kl, whose h is -q and sums to -1, so that it costs two passes over the table fewer.
OTHERS = {"reverse_kl": reverse_kl, "jensen_shannon": jensen_shannon, "total_variation": total_variation}
REPORTED = {"next_token": "loss", "forward_kl": "kl"}  # a loss's name in metrics, where it is another


def losses_and_gradient(
    logits: Tensor, targets: Tensor, weights: dict[str, float], temperature: float, log_q_of: Callable | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Sums over the tokens of `loss` (next token), of `kl` (forward, with a teacher) and of the other divergences that
    have a weight; and the gradient of the weighted sum by the logits, (tokens, vocabulary).

    logits: (tokens, vocabulary), float32, and so is all that is made of them: under autocast, the inner products would
    be bfloat16, in which a KL of 0.01 is lost. targets: (tokens,). log_q_of(log_p): the teacher's log-probabilities at
    `temperature`, given the model's; None without a teacher. Every line that makes or changes a table is a pass over
    memory, and these passes are what the loss costs: hence the work in place.
    """
    log_p, target = logits.log_softmax(-1), targets[:, None]
    sums = {"loss": -log_p.gather(1, target).sum()}
    p, next_token = log_p.exp(), weights.get("next_token", 0.0)
    if log_q_of is None:
        gradient = p.mul_(next_token)
    else:
        at_one = None  # the next token's part, where it is not at the teacher's temperature
        if temperature != 1:
            at_one = p.mul_(next_token)
            log_p = (logits / temperature).log_softmax(-1)
            p = log_p.exp()
        log_q = log_q_of(log_p)
        q, forward = log_q.exp(), weights.get("forward_kl", 0.0) * temperature
        sums["kl"] = (_row_products(q, log_q) - _row_products(q, log_p)).sum()
        others = []
        for name, divergence in OTHERS.items():
            if weights.get(name):
                sums[name], h = divergence(p, log_p, q, log_q)
                others.append((weights[name] * temperature, h.addcmul_(p, h.sum(-1, keepdim=True), value=-1)))
        gradient = p.mul_(forward + (next_token if at_one is None else 0.0)).sub_(q, alpha=forward)
        for weight, part in others:
            gradient.add_(part, alpha=weight)
        if at_one is not None:
            gradient.add_(at_one)
    gradient.scatter_add_(1, target, torch.full_like(gradient[:, :1], -next_token))
    return sums, gradient


def _row_products(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each row of `a` with that of `b`, without a table of products."""
    return torch.einsum("tv,tv->t", a, b)


def chunked_losses(
    hidden: Tensor,
    head: Head,
    parameters: list[Tensor],
    vocabulary: int,
    targets: Tensor,
    weights: dict[str, float],
    temperature: float,
    lesson: "Lesson | None",
) -> dict[str, Tensor]:
    """Means over the tokens, all but `hidden` of the module's docstring: `objective`, their weighted sum, which has a
    gradient, `loss` and, with a teacher, `kl` and every other divergence that has a weight.

    hidden: (tokens, width). head: reads `parameters` and makes `vocabulary` logits of a token. targets: (tokens,).
    """
    names = ["loss"]
    if lesson is not None:
        names += ["kl", *(name for name in OTHERS if weights.get(name))]
    objective, means = _ChunkedLosses.apply(
        hidden, head, vocabulary, targets, weights, temperature, lesson, names, *parameters
    )
    return {"objective": objective} | dict(zip(names, means, strict=True))


class _ChunkedLosses(torch.autograd.Function):
    """(objective, the means of what `losses_and_gradient` sums up, (names,)).

    LOGITS_AT_ONCE logits are made, compared a few tokens at a time, and turned into gradients of the hidden states and
    of the head's parameters before the next ones are made. Autograd would keep several tables of (tokens, vocabulary).
    """

    @staticmethod
    def forward(ctx, hidden, head, vocabulary, targets, weights, temperature, lesson, names, *parameters):
        tokens, learns = len(targets), ctx.needs_input_grad[0]
        wanted = [parameter for parameter in parameters if parameter.requires_grad] if learns else []
        hidden_gradient, gradients = torch.empty_like(hidden), []
        totals: dict[str, Tensor] = {}
        for part in chunks(tokens, vocabulary, LOGITS_AT_ONCE):
            given = hidden[part].detach().requires_grad_(learns)
            with torch.set_grad_enabled(learns):
                logits = head(given)
            log_q = None if lesson is None else lesson.about(part)
            gradient = torch.empty_like(logits) if learns else None
            on_cpu = logits.device.type == "cpu"
            for rows in chunks(len(logits), vocabulary, COMPARED_AT_ONCE if on_cpu else LOGITS_AT_ONCE):
                log_q_of = None if log_q is None else functools.partial(log_q, rows)
                compared = logits.detach()[rows].float(), targets[part][rows]
                with torch.autocast(logits.device.type, enabled=False):  # whatever the model computes in
                    sums, gradient_of_rows = losses_and_gradient(*compared, weights, temperature, log_q_of)
                if learns:
                    gradient[rows] = gradient_of_rows.div_(tokens)
                totals = {name: totals.get(name, 0) + value for name, value in sums.items()}
            if learns:
                hidden_gradient[part], *grown = torch.autograd.grad(logits, (given, *wanted), gradient)
                for whole, piece in zip(gradients, grown, strict=False):
                    whole += piece
                gradients = gradients or grown
        means = {name: value / tokens for name, value in totals.items()}
        objective = weights.get("next_token", 0.0) * means["loss"]
        for name in ("forward_kl", *OTHERS):
            if weights.get(name):
                objective = objective + weights[name] * temperature**2 * means[REPORTED.get(name, name)]
        ctx.save_for_backward(hidden_gradient, *gradients)
        ctx.places = [learns and parameter.requires_grad for parameter in parameters]
        means = torch.stack([means[name] for name in names])
        ctx.mark_non_differentiable(means)
        return objective, means

    @staticmethod
    def backward(ctx, scale, _):
        hidden_gradient, *gradients = (
            gradient.mul_(scale) for gradient in ctx.saved_tensors
        )  # in place: large, and used once
        left = iter(gradients)
        return hidden_gradient, *(None,) * 7, *(next(left) if place else None for place in ctx.places)


def chunks(tokens: int, vocabulary: int, logits: int) -> Iterator[slice]:
    """Slices of as many tokens as have so many logits."""
    at_once = max(1, logits // vocabulary)
    for start in range(0, tokens, at_once):
        yield slice(start, min(start + at_once, tokens))


def hidden_distance(ours: list[Tensor], theirs: list[Tensor]) -> Tensor:
    """|h - g|² / |g|² as a mean over tokens and visits. Both: (windows, context, width) for each visit."""
    distances = [
        ((h.float() - g.float()).square().sum(-1) / g.float().square().sum(-1)).mean()
        for h, g in zip(ours, theirs, strict=True)
    ]
    return torch.stack(distances).mean()
