"""What the engine is worth beside transformers' own ways to generate, on one model in one run.

    python benchmarks/engine.py MODEL [--batches 1 8] [--new 32] [--rounds 3] [--dtype float32]
                                [--threshold 0.9] [--drafts 1 3 5] [--quieten 0.3] [--only NAME …]

MODEL: a recursive model of two loops or more, or a dense one. Requests, so many at once, have prompts of mixed length,
and greedy answers of `--new` tokens; there are eight prompts at least. All ways take their turn in every round; shown
are medians of tokens a second over those of generate, one request after the other, in processor time on a CPU and in
time on an accelerator, with the least and the most; and for the engine its steps and the tokens that went through a
loop, which are the same in every run. "Ideal drafts" are taken to be right whatever they are, which shows what the
machinery costs. Arrivals: requests that come at random, at the rate that full depth can just serve, and the seconds
until an answer is whole.

--quieten: what the norms after the first loop give is multiplied by so much. Later loops then change little, and the
first exit is right about most tokens: not a model that anybody wants, but one of a real size with exits as good as
they would have to be, on which the forecast and the machinery can be tried.
"""

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedModel

import rrtc.model  # noqa: F401 - registers the recursive model
from rrtc.console import quiet_libraries
from rrtc.generate.agreement import TRIAL, TRIAL_NEW, agreement, said_a_round
from rrtc.generate.choice import trial_text
from rrtc.generate.engine import Engine
from rrtc.generate.forecast import measure_costs
from rrtc.generate.stages import Stages
from rrtc.generate.ways import FullDepth, Leave, Speculate
from rrtc.stock.architecture import decoder_layers
from rrtc.text.sources import documents

LENGTHS = (16, 96)  # tokens of a prompt
FEWEST = 8  # prompts: a few requests at a time answer several ones, one after the other
ARRIVALS = 24  # requests

Run = Callable[[], list[list[int]]]


class Ideal(Speculate):
    """Every draft is taken to be right."""

    def _token(self, request, number, logits):
        token = super()._token(request, number, logits)  # which costs what it does
        return request.drafts[number] if number < len(request.drafts) else token


def quieten(model: PreTrainedModel, scale: float) -> None:
    for visit in decoder_layers(model)[Stages(model).body[-1] + 1 :]:
        for name, weight in visit.slot().loops[visit.loop].named_parameters():
            if "norm" in name:
                weight.data *= scale


def clock(model: PreTrainedModel) -> float:
    if model.device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def prompts_of(tokenizer, count: int) -> list[list[int]]:
    """Pieces of Python's documentation."""
    ids = tokenizer("\n".join(documents("pydoc", "text", tokenizer))[:400_000])["input_ids"]
    chance = random.Random(0)
    starts = [chance.randrange(len(ids) - LENGTHS[1]) for _ in range(count)]
    return [ids[start : start + chance.randint(*LENGTHS)] for start in starts]


def alone(model: PreTrainedModel, prompts: Sequence[list[int]], new: int, **settings) -> list[list[int]]:
    said = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=model.device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **greedy(new), **settings)
        said.append(out[0, len(prompt) :].tolist())
    return said


def padded(model: PreTrainedModel, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    return model.generate(ids, attention_mask=mask, **greedy(new))[:, width:].tolist()


def continuous(model: PreTrainedModel, prompts: Sequence[list[int]], new: int) -> list[list[int]]:
    config = GenerationConfig(**greedy(new) | {"eos_token_id": -1})
    found = model.generate_batch(list(prompts), generation_config=config, progress_bar=False)
    return [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.rpartition("_")[2]))]


def greedy(new: int) -> dict:
    return {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def by_engine(model: PreTrainedModel, prompts: Sequence[list[int]], new: int, way, rows: int, seen: dict):
    engine = Engine(model, way, rows, LENGTHS[1] + new)
    requests = [engine.submit(prompt, new, do_sample=False, eos_token_id=None) for prompt in prompts]
    engine.run()
    seen["steps"], seen["passes"] = engine.steps, engine.passes
    if isinstance(engine.way, Speculate):
        seen["right"] = engine.way.accepted / max(engine.way.drafted, 1)
    if isinstance(engine.way, Leave):
        seen["left"] = 1 - engine.way.left[-1] / max(sum(engine.way.left), 1)
    return [request.said for request in requests]


def engine_ways(given: argparse.Namespace) -> dict[str, Callable]:
    ways: dict[str, Callable] = {"engine, full depth": FullDepth, "engine, by depth": partial(Leave, threshold=1.0)}
    ways |= {f"engine, {n} drafts": partial(Speculate, drafts=n) for n in given.drafts}
    ways |= {f"engine, {n} ideal drafts": partial(Ideal, drafts=n) for n in given.drafts}
    return ways | {f"engine, leaving above {t}": partial(Leave, threshold=t) for t in given.threshold}


def compare(model: PreTrainedModel, tokenizer, batch: int, given: argparse.Namespace) -> None:
    prompts, new = prompts_of(tokenizer, max(batch, FEWEST)), given.new
    seen: dict[str, dict] = {}
    runs: dict[str, Run] = {"generate, one by one": lambda: alone(model, prompts, new)}
    if batch > 1:
        runs["generate, padded"] = lambda: padded(model, prompts, new)
        runs["generate_batch"] = lambda: continuous(model, prompts, new)
    elif hasattr(model.config, "visits"):
        half = len(model.config.visits) // 2
        runs["assistant_early_exit"] = lambda: alone(model, prompts, new, assistant_early_exit=half)
    for name, way in engine_ways(given).items():
        runs[name] = partial(by_engine, model, prompts, new, way, batch, seen.setdefault(name, {}))
    runs = {name: run for name, run in runs.items() if not given.only or name in given.only or "one by one" in name}
    times: dict[str, list[float]] = {name: [] for name in runs}
    said: dict[str, list] = {}
    for turn in range(given.rounds + 1):  # the first is for warmth
        for name, run in list(runs.items()):
            begun = clock(model)
            try:
                said[name] = run()
            except Exception as error:  # of transformers' own, for some architectures
                print(f"{name}: fails with {type(error).__name__}: {' '.join(str(error).split())[:90]}")
                del runs[name], times[name]
                continue
            if turn:
                times[name].append(clock(model) - begun)
    baseline, truth = times["generate, one by one"], said["generate, one by one"]
    print(
        f"\n{batch} of {len(prompts)} requests at once, {new} tokens each: tokens a second over generate's, one by one"
    )
    for name, own in times.items():
        ratios = sorted(b / t for b, t in zip(baseline, own, strict=True))
        same = f"{sum(a == b for a, b in zip(said[name], truth, strict=True))} of {len(prompts)} the same"
        more = ", ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in seen.get(name, {}).items())
        print(f"  {name:<28}{median(ratios):6.2f} ({ratios[0]:.2f}, {ratios[-1]:.2f})  {same}  {more}", flush=True)


def arrivals(model: PreTrainedModel, tokenizer, given: argparse.Namespace) -> None:
    """Requests that come at random. Time is counted in seconds of the engine's steps, so that waiting costs nothing."""
    prompts, rows = prompts_of(tokenizer, ARRIVALS), 8
    ways = {n: w for n, w in engine_ways(given).items() if "ideal" not in n and (not given.only or n in given.only)}
    begun = clock(model)
    by_engine(model, prompts[:rows], given.new, FullDepth, rows, {})
    each = (clock(model) - begun) / rows  # seconds that full depth takes for one
    chance, comes, at = random.Random(1), [], 0.0
    for _ in prompts:
        at += chance.expovariate(1 / each)
        comes.append(at)
    print(f"\n{ARRIVALS} requests that come at random, one every {each:.2f} s: seconds until an answer is whole")
    for name, way in ways.items():
        engine, now, waiting, since, took = Engine(model, way, rows, LENGTHS[1] + given.new), 0.0, 0, {}, []
        while waiting < len(prompts) or engine.busy:
            if not engine.busy:
                now = max(now, comes[waiting])
            while waiting < len(prompts) and comes[waiting] <= now:
                request = engine.submit(prompts[waiting], given.new, do_sample=False, eos_token_id=None)
                since[request] = comes[waiting]
                waiting += 1
            begun = clock(model)
            ended = engine.step()
            now += clock(model) - begun
            took += [now - since[request] for request in ended]
        print(f"  {name:<28}median {median(took):.2f}, most {max(took):.2f}; all done after {now:.1f} s", flush=True)


def said_each(kept: float, drafts: int) -> float:
    """Tokens that a round says where such a share of the drafts is right, each whatever the others are (Leviathan et
    al. 2023, (1))."""
    return sum(kept**number for number in range(drafts + 1))


def main(given: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=given.dtype).to(device).eval()
    model.generation_config = GenerationConfig()
    if device == "cpu":
        torch.set_num_threads(1)
    if given.quieten != 1:
        quieten(model, given.quieten)
    costs = {batch: measure_costs(model, batch) for batch in given.batches}
    if all(costs.values()):
        right = agreement(model, trial_text(model, tokenizer, *TRIAL), TRIAL_NEW, {"do_sample": False})
        print(f"the first exit is right about {right.mean():.0%} of what the model says")
    for batch, cost in costs.items():
        if cost:
            here = ", ".join(f"{cost.speculating(said_a_round(right, n), n):.2f} by {n}" for n in given.drafts)
            even = next((kept for kept in range(101) if cost.best(partial(said_each, kept / 100), 8)), 101)
            print(f"\nforecast with {batch} requests at once, over full depth: {here}; it pays from {even} % on")
        compare(model, tokenizer, batch, given)
    if "arrivals" in given.parts:
        arrivals(model, tokenizer, given)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The engine beside transformers' own ways to generate.")
    parser.add_argument("model")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threshold", type=float, nargs="*", default=[0.9])
    parser.add_argument("--drafts", type=int, nargs="*", default=[1, 3])
    parser.add_argument("--quieten", type=float, default=1.0)
    parser.add_argument("--only", nargs="*", default=[], help="names of ways, as they are shown")
    parser.add_argument("--parts", nargs="*", default=["arrivals"])
    with quiet_libraries(), torch.no_grad():
        main(parser.parse_args())
