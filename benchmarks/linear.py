"""Rows of benchmarks/attention.py: linear attention whose gains are matched, whose maps have learnt, or with one of its
halves zeroed.

A fit changes a model whose linear attention is as drawn, in place. ids: text to fit it on, (windows, context), int64.
What was learnt is kept in a file, so that several rows stand on it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from rrtc.attention import Attention
from rrtc.model import RrtForCausalLM
from rrtc.stock.linear import NONE, attention_distance, linear_maps, match_gains

RATE = 0.01  # of Adam


def by_mass(model: RrtForCausalLM, ids: Tensor, kept: Path) -> None:
    match_gains(model, ids[:2], by="mass")


def by_error(model: RrtForCausalLM, ids: Tensor, kept: Path) -> None:
    match_gains(model, ids[:2])


def learn(model: RrtForCausalLM, ids: Tensor, kept: Path) -> None:
    """Attention transfer, a window a step, once over `ids`; from `kept`, where that was done before."""
    found = linear_maps(model)
    if kept.exists():
        for maps, state in zip(found, torch.load(kept), strict=True):
            maps.load_state_dict(state)
        return
    by_error(model, ids, kept)
    optimizer = torch.optim.Adam([p for maps in found for p in maps.parameters()], lr=RATE, betas=(0.9, 0.95))
    for window in ids:
        distance = attention_distance(model, lambda window=window: model.base_model(window[None], use_cache=False))
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        print(f"attention transfer: {distance.item():.4f}", flush=True)
    torch.save([maps.state_dict() for maps in found], kept)


def learn_and_zero_the_sums(model: RrtForCausalLM, ids: Tensor, kept: Path) -> None:
    learn(model, ids, kept)
    for maps in linear_maps(model):
        maps.log_gain.data.fill_(NONE)


def without_window(near: Attention) -> Attention:
    """The query's own key and the sinks alone; all others are in the sums."""
    return replace(near, window=1)


# By the name of the row: what is changed in the attention of each visit, and how the model is fitted.
ROWS: dict[str, tuple[Callable[[Attention], Attention], Callable[[RrtForCausalLM, Tensor, Path], None]]] = {
    "linear, gains by mass": (lambda near: near, by_mass),
    "linear, gains by error": (lambda near: near, by_error),
    "linear, learnt": (lambda near: near, learn),
    "linear, learnt, its sums zeroed": (lambda near: near, learn_and_zero_the_sums),
    "linear, learnt, its window zeroed": (without_window, learn),
    "linear, learnt, both zeroed": (without_window, learn_and_zero_the_sums),
}
