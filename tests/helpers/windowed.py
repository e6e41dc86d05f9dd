"""Gives an rrtc folder visits that see a window, as `rrtc init --kv-budget` would, and looks at what they see."""

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from rrtc.model.attention_rrt import KeptLayer
from rrtc.model.graft_rrt import find_layers

WINDOW, SINKS = 9, 3
# In turn: one KV head sees everything, none does, all do.
KINDS = ({"window": WINDOW, "sinks": SINKS, "heads": [1]}, {"window": WINDOW, "sinks": SINKS, "heads": []}, None)


def see_windows(folder: Path, kinds: tuple = KINDS) -> Path:
    """Writes `kinds` of attention into the config in `folder`, one visit after the other, where the stock layer has no
    window of its own; returns the folder."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    types = config["base_config"].get("layer_types") or ["full_attention"] * len(config["visits"])
    free = [visit for visit, kind in zip(config["visits"], types, strict=True) if kind == "full_attention"]
    for number, visit in enumerate(free):
        if (kind := kinds[number % len(kinds)]) is not None:
            visit["attention"] = kind
    file.write_text(json.dumps(config))
    return folder


def without_windows(folder: Path, target: Path) -> Path:
    """Writes the same weights into `target`, every visit of which attends to everything."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for visit in model.config.visits:
        visit.pop("attention", None)
    model.save_pretrained(target)
    return target


def by_brute_force(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """The logits (rows, tokens, vocabulary) of the recursive model in `folder`: without its windows, and with a mask of
    its own for each head of each visit instead."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = [visit.get("attention") for visit in model.config.visits]
    plain = AutoModelForCausalLM.from_config(_plain(model.config)).eval()
    plain.load_state_dict(model.state_dict())
    parent, name = find_layers(plain.stock, len(wanted))
    for visit, attention in zip(getattr(parent, name), wanted, strict=True):
        if attention is not None:
            heads = plain.config.num_attention_heads, plain.config.num_key_value_heads
            mask = mask_of_each_head(attention, *heads, ids.shape[1])
            forward = visit.forward
            visit.forward = lambda *args, f=forward, m=mask, **kwargs: f(*args, **kwargs | {"attention_mask": m})
    with torch.no_grad():
        return plain(ids, use_cache=False).logits


def mask_of_each_head(attention: dict, query_heads: int, kv_heads: int, length: int) -> torch.Tensor:
    """What is to be added to the scores of each query head of a visit with that `attention`: (1, query heads, length,
    length), 0 where a key is seen."""
    tokens = torch.arange(length)
    query, key = tokens[:, None], tokens[None]
    near = (query - key < attention["window"]) | (key < attention["sinks"])
    if landmark := attention.get("landmark"):
        near |= drawn_by_lot(**landmark, window=attention["window"], sinks=attention["sinks"], length=length)
    far = torch.tensor([head // (query_heads // kv_heads) in attention["heads"] for head in range(query_heads)])
    seen = (key <= query) & (near[None] | far[:, None, None])
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None]


def drawn_by_lot(size: int, count: int, seed: int, window: int, sinks: int, length: int) -> torch.Tensor:
    """Which keys each query sees of landmark blocks, by their definition: (length, length), bool. Of the keys in one
    place of their blocks that have left the window, those of the blocks with the least lots."""
    chance, seen = random.Random(seed), torch.zeros(length, length, dtype=torch.bool)
    lots = [chance.random() for _ in range(length)]
    for query in range(length):
        gone = range(sinks, query - window + 1)
        for place in range(size):
            blocks = [(key - sinks) // size for key in gone if (key - sinks) % size == place]
            for block in sorted(blocks, key=lots.__getitem__)[:count]:
                seen[query, sinks + block * size + place] = True
    return seen


def live_bytes(cache) -> int:
    """What the keys and values in a cache take."""
    layers = (layer.parts if isinstance(layer, KeptLayer) else [layer] for layer in cache.layers)
    tensors = [tensor for parts in layers for part in parts for tensor in (part.keys, part.values)]
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def padded(model, ids: torch.Tensor, pads: int, cuts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of `ids`, (2, tokens), whose first row has so many `pads` on its left, at once and in chunks of the
    lengths `cuts`."""
    row = torch.cat([torch.full((1, pads), 2), ids[:1, : ids.shape[1] - pads]], 1)
    batch, mask = torch.cat([row, ids[1:]]), torch.ones_like(ids)
    mask[0, :pads] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, parts = DynamicCache(config=model.config), []
    for part in torch.arange(ids.shape[1]).split(cuts):
        given = {"attention_mask": mask[:, : part[-1] + 1], "position_ids": positions[:, part]}
        parts.append(model(batch[:, part], past_key_values=cache, **given).logits)
    whole = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return whole, torch.cat(parts, 1)


def cropped(model, ids: torch.Tensor, tokens: int) -> DynamicCache:
    """The cache of `model` after `ids` less the last `tokens`; one that has not recorded its past gives none back."""
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        model(ids, use_cache=True).past_key_values.crop(-1)
    cache, before = DynamicCache(config=model.config), ids.shape[1] - tokens - 30
    model(ids[:, :before], past_key_values=cache)
    cache.activate_past_recording()
    model(ids[:, before:], past_key_values=cache)
    cache.crop(-tokens)
    return cache


def _plain(config):
    values = config.to_diff_dict()
    values["visits"] = [{k: v for k, v in visit.items() if k != "attention"} for visit in values["visits"]]
    values.pop("model_type")
    return type(config)(**values)
