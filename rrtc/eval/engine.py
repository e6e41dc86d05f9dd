"""What early exits, speculation and many requests at once are worth on this machine: the forecast, and what is measured
beside it."""

import time
from collections.abc import Callable
from functools import partial
from statistics import quantiles
from typing import TYPE_CHECKING

import torch
from transformers import GenerationConfig

from rrtc.generate.agreement import TRIAL, TRIAL_NEW, agreement, said_a_round
from rrtc.generate.choice import QUALITY, trial_text
from rrtc.generate.engine import Engine
from rrtc.generate.forecast import measure_costs
from rrtc.generate.quality import Scored, find_threshold, passes
from rrtc.generate.stages import Stages
from rrtc.generate.ways import FullDepth, Leave, Speculate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REQUESTS = (1, 8)  # at once
FEWEST = 4  # prompts: of one alone, all may hang on how it is gone on with
PROMPT, NEW = 64, 32  # tokens
LONGEST = max(PROMPT + NEW, TRIAL[1] + TRIAL_NEW + 1, QUALITY[1])  # tokens of a text that the engine reads here
LIMITS = (0.01, 0.05)  # nats a token that early exits may cost
MOST_DRAFTS = 4
SETTINGS = {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, "max_time": None}

Way = Callable[[int, int], FullDepth]


def engine_passes(loops: int, rounds: int) -> int:
    """How often `measure_engine` advances, at most."""
    return passes(QUALITY[0], loops, len(LIMITS)) + (1 + rounds) * len(REQUESTS)


@torch.inference_mode()
def measure_engine(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", has_exits: bool, rounds: int,
    advance: Callable[[], None],
) -> dict:  # fmt: skip
    """The `engine` of rrtc/io/report.py. has_exits: whether the exits of `model` were trained."""
    stages, thresholds, right = Stages(model), {}, None
    if has_exits and stages.loops > 1:
        right = agreement(model, trial_text(model, tokenizer, *TRIAL), TRIAL_NEW, SETTINGS)
        scored = Scored(model, trial_text(model, tokenizer, *QUALITY), advance=advance)
        thresholds = {limit: found for limit in LIMITS if (found := find_threshold(scored, limit)).value is not None}
    # Other prompts than those that the forecast is made from.
    prompts = trial_text(model, tokenizer, 2 * max(REQUESTS), PROMPT)[max(REQUESTS) :].tolist()
    ways = []
    for requests in REQUESTS:
        costs = measure_costs(model, requests) if right is not None else None
        tried: dict[str, tuple[Way, float | None]] = {"full depth": (FullDepth, None)}
        if costs is not None and right is not None:
            said = partial(said_a_round, right)
            drafts = costs.best(said, MOST_DRAFTS) or 1
            name = f"speculation, {drafts} draft{'s' * (drafts > 1)}"
            tried[name] = partial(Speculate, drafts=drafts), costs.speculating(said(drafts), drafts)
            for limit, found in thresholds.items():
                tried[f"early exits, {limit} nats"] = (
                    partial(Leave, threshold=found.value),
                    costs.leaving(found.shares),
                )
        ways += _in_turn(model, prompts[: max(requests, FEWEST)], requests, tried, rounds, advance)
    return {
        "loops": stages.loops, "right": None if right is None else float(right.mean()),
        "rounds": rounds, "prompt_tokens": PROMPT, "new_tokens": NEW,
        "thresholds": [
            {"limit": limit, "threshold": found.value, "growth": found.growth, "left": 1 - found.shares[-1]}
            for limit, found in thresholds.items()
        ],
        "ways": ways,
    }  # fmt: skip


def _in_turn(
    model: "PreTrainedModel", prompts: list[list[int]], requests: int, tried: dict[str, tuple[Way, float | None]],
    rounds: int, advance: Callable[[], None],
) -> list[dict]:  # fmt: skip
    """Each way's speed over that of full depth, with so many requests at once; transformers' own one request after the
    other is one of them."""
    runs = {name: partial(_by_engine, model, prompts, requests, way) for name, (way, _) in tried.items()}
    runs["transformers, one by one"] = partial(_by_transformers, model, prompts)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - begun)
        advance()
    found = []
    for name, took in times.items():
        ratios = [full / own for full, own in zip(times["full depth"], took, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3
        forecast = tried[name][1] if name in tried else None
        found.append(
            {"way": name, "requests": requests, "forecast": forecast, "ratio": middle, "low": low, "high": high}
        )
    return found


def _by_engine(model: "PreTrainedModel", prompts: list[list[int]], requests: int, way: Way) -> None:
    engine = Engine(model, way, requests, PROMPT + NEW)
    for prompt in prompts:
        engine.submit(prompt, NEW, eos_token_id=None, **SETTINGS)
    engine.run()
    torch.accelerator.synchronize() if model.device.type != "cpu" else None


def _by_transformers(model: "PreTrainedModel", prompts: list[list[int]]) -> None:
    kept, model.generation_config = model.generation_config, GenerationConfig(max_new_tokens=NEW, do_sample=False)
    try:
        for prompt in prompts:
            ids = torch.tensor([prompt], device=model.device)
            model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0)
    finally:
        model.generation_config = kept
