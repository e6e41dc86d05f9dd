"""Between-sentence mutual information (Cao and Xu, AISTATS 2020, arXiv 1905.11978), as a regularizer: what the model
makes of a segment of text is to say something about the one that follows.

    phase 1 (first half of the steps)   L1 = softplus(-T(x, y)) + softplus(T(x, y'))     y' another segment of the batch
    phase 2 (second half)               L1 + RAML · sum_i w_i NLL(ỹ_i | x_i),            ỹ a segment behind x at a
                                        w ~ softmax((T(x, ỹ) - T(x, y)) / TAU) / G       distance drawn from G(P)

and the objective has `regularizers.bmi` times that. x and y are segments that follow each other, and are encoded by the
maximum over their tokens of the hidden states at the end of each loop, side by side; the paper takes those of all
layers. T, the critic, learns along with the model, and only the run's own checkpoints have it, beside the model.
Sizes, rates and weights are those of the paper's code. Ours is the norm before the critic, because in hidden states of
pre-norm models some channels are a thousand times as large as others. Windows are packed, so some pairs reach from one
document into the next.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, softplus

SEGMENT = 40  # tokens, at most; LEAST of them are in a window
LEAST = 4
HIDDEN, DROPOUT = (300, 100), (0.3, 0.1)
CRITIC_LR, CRITIC_DECAY = 2e-4, 1e-6
RAML, TAU, P = 0.05, 1.0, 0.3
PAIRS = 4  # of a window, at most, that phase 2 runs the model on
SECOND_PHASE = 0.5  # of the steps


class Critic(nn.Module):
    """T(a, b), a number for each pair of codes (..., width): the mean of what one network says of (a, b) and another of
    (b, a). The same seed gives the same critic."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.forth, self.back = (
                nn.Sequential(
                    nn.Linear(5 * width, HIDDEN[0]),
                    nn.ReLU(),
                    nn.Dropout(DROPOUT[0]),
                    nn.Linear(HIDDEN[0], HIDDEN[1]),
                    nn.ReLU(),
                    nn.Dropout(DROPOUT[1]),
                    nn.Linear(HIDDEN[1], 1),
                )
                for _ in range(2)
            )

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        both = self.forth(_features(a, b)) + self.back(_features(b, a))
        return both[..., 0] / 2


def _features(a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([a, b, a - b, a * b, (a - b).abs()], -1)


def segment_length(tokens: int) -> int:
    """Of the segments of a window of so many tokens."""
    return min(SEGMENT, tokens // LEAST)


def codes(states: list[Tensor], length: int) -> Tensor:
    """(windows, segments, width of all states), float32. states: (windows, tokens, width), at the end of each loop;
    what is left after the last whole segment is left out."""
    pooled = []
    for state in states:
        windows, tokens, width = state.shape
        whole = state.float()[:, : tokens // length * length].unflatten(1, (-1, length))
        pooled.append(layer_norm(whole.amax(2), (width,)))
    return torch.cat(pooled, -1)


def first_phase(critic: Critic, code: Tensor) -> Tensor:
    """L1, the mean over all pairs of neighbors in `code` (windows, segments, width). The other segment is any of the
    batch but the right one."""
    x, y = code[:, :-1].flatten(0, 1), code[:, 1:].flatten(0, 1)
    right = torch.arange(len(y))
    other = (right + torch.randint(1, len(y), (len(y),))) % len(y)
    return (softplus(-critic(x, y)) + softplus(critic(x, y[other.to(y.device)]))).mean()


def second_pairs(critic: Critic, code: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What phase 2 runs on, PAIRS of each window: (the number of the window, that of the segment x, that of ỹ, the
    weights w), each (pairs,); the weights have no gradient and are 1 in all."""
    windows, segments, _ = code.shape
    many = min(PAIRS, segments - 1)
    x = torch.stack([torch.randperm(segments - 1)[:many] for _ in range(windows)]).flatten()
    window = torch.arange(windows).repeat_interleave(many)
    distance = torch.empty(len(x)).geometric_(P).long()
    distance = torch.minimum(distance, segments - 1 - x)  # the end of the window cuts it off
    likelihood = P * (1 - P) ** (distance - 1).float()
    with torch.no_grad():
        a, y, behind = code[window, x], code[window, x + 1], code[window, x + distance]
        weight = ((critic(a, behind) - critic(a, y)) / TAU).softmax(0) / likelihood.to(code.device)
    return window, x, x + distance, weight / weight.sum()
