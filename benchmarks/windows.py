"""What a smaller KV cache costs and what it gains: ways to choose what stays global, on one model in one run.

    python benchmarks/windows.py MODEL --calibrate-on TEXT --text TEXT [--text TEXT …] --work FOLDER
                                 [--context 8192] [--windows 1] [--budgets 0.2] [--only cost speed training]

cost: KL and loss of every way against the dense model, on windows of `--context` tokens of each text (its last fifth,
from which nothing was chosen), positions from a quarter of the window on. speed: tokens a second of decoding with the
measured choice over those of the dense model, in turn, at several lengths of context that is made up. training: time
of a step (forward and backward) with windows over that of the same step without, in turn. FOLDER is made, and kept:
what was measured of the heads is in it.
"""

import argparse
import ast
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
from common import add_dtype
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from rrtc.init import calibrate as gathering
from rrtc.init import windows as choosing
from rrtc.init.calibrate import calibrate
from rrtc.init.job import Job, prepare
from rrtc.kv_budget import KvBudget, predicted, without_windows
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.model.linear_rrt import Maps
from rrtc.plan import Plan
from rrtc.recipe.schema import Recipe
from rrtc.stock.heads import Losses
from rrtc.stock.streamed import StreamedModel
from rrtc.text.tokens import begin_and_end

SPEED_CONTEXTS, ROUNDS, NEW = (2048, 8192, 32768), 5, 8
CONTROLS = [  # name, what of the recipe is another than by default
    ("measured", {}),
    ("measured, no look-ups", {"kv_lookups": 0.0}),
    ("look-ups alone", {"kv_lookups": 1.0}),
    ("by unweighted error", {"kv_lookups": 0.0}),
    ("measured, no sinks", {"kv_sinks": 0}),
    ("whole visits, measured", {"kv_grain": "visits"}),
    ("even", {"kv_choice": "even"}),
    ("last", {"kv_choice": "last"}),
]


class Both(Losses):
    """As Losses; beside it, without asking what the loss feels, the mean square of what a window changes in a head's
    output, (KV heads,), which is added to `unweighted`, one layer after the other."""

    unweighted: list[Tensor] = []

    def __init__(self, *given, **others):
        super().__init__(*given, **others)
        self._changes: Tensor | float = 0.0

    def finish(self) -> dict[str, Tensor]:
        self.unweighted.append(self._changes)
        return super().finish()

    def add(self, kind: str, gradient: Tensor, change: Tensor, kv_heads: int) -> None:
        super().add(kind, gradient, change, kv_heads)
        each = change.square().sum(-1).unflatten(-1, (kv_heads, -1)).sum(-1)
        self._changes = self._changes + each.double().sum((0, 1)).cpu()


def recipe_of(args: argparse.Namespace, window: int | None, budget: float) -> Recipe:
    init = {"budget": 1, "kv_budget": budget, "kv_window": window, "calibrate_on": args.calibrate_on}
    init |= {"calibrate_tokens": args.calibrate_tokens, "calibrate_context": args.calibrate_context}
    init |= {"measure_tokens": 0}
    return Recipe.model_validate({"init": init})


def measured(args: argparse.Namespace, window: int) -> tuple[Plan, dict[str, dict]]:
    """(the plan without windows, what was measured of every head: weighted and unweighted errors, look-ups); from the
    folder where that was done before."""
    job = prepare(args.model, args.work / "none", recipe_of(args, window, 1.0))
    file = args.work / f"window-{window}.json"
    if not file.exists():
        by_head = {
            name: {str(head): v for head, v in one.items()} for name, one in _measured(args, job, window).items()
        }
        file.write_text(json.dumps(by_head))
    found = json.loads(file.read_text())
    return job.plan, {name: {ast.literal_eval(head): v for head, v in one.items()} for name, one in found.items()}


def _measured(args: argparse.Namespace, job: Job, window: int) -> dict[str, dict]:
    device, dense, found, folder = torch.device("cpu"), job.dense, {}, args.work / f"window-{window}"
    model = StreamedModel(dense.config, dense.raw, device)
    rules = choosing.rules(job.kv_budget, job.plan, model.layers, dense)
    folder.mkdir()
    Both.unweighted.clear()
    gathering.Losses = Both
    calibration = calibrate(dense, model, [], job.calibration, folder, device, lambda n: None, rules, moments=False)
    ((_, losses),) = choosing.measured_ways(job.kv_budget, calibration)
    found["weighted"] = losses["window"]
    by_layer = dict(zip(sorted(rules, reverse=True), Both.unweighted, strict=True))
    found["unweighted"] = {layer: one.diag().tolist() for layer, one in by_layer.items()}
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found["look-ups"] = choosing.lookups(
        job.kv_budget, dense, model, tokenizer, job.calibration, 0, folder, device, lambda n: None
    )
    return found


def planned(args, window: int, budget: float, name: str, changes: dict, plan: Plan, found: dict) -> tuple[Plan, float]:
    asked = recipe_of(args, window, budget).init.model_copy(update=changes)
    losses = found["unweighted" if "unweighted" in name else "weighted"]
    made = KvBudget(plan.architecture, asked).spend(without_windows(plan), {"window": losses}, found["look-ups"])
    return made, predicted(made, {"window": found["weighted"]})


def texts(args: argparse.Namespace, tokenizer) -> Iterator[Tensor]:
    """Windows (1, context) of the last fifth of each text."""
    begin, _ = begin_and_end(tokenizer)
    for file in args.text:
        whole = Path(file).read_text(errors="replace")
        part = whole[int(0.8 * len(whole)) :][: 8 * args.context * args.windows]
        ids = tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        width = args.context - len(begin)
        for number in range(args.windows):
            yield torch.tensor([[*begin, *ids[number * width : (number + 1) * width]]])


@torch.inference_mode()
def log_probabilities(model, ids: Tensor, places: Tensor) -> Tensor:
    hidden = model.base_model(ids, use_cache=False)[0][0, places]
    logits = model.get_output_embeddings()(hidden).float()
    if cap := getattr(model.config.get_text_config(), "final_logit_softcapping", None):
        logits = cap * torch.tanh(logits / cap)
    return logits.log_softmax(-1)


def with_plan(model: RrtForCausalLM, plan: Plan) -> RrtForCausalLM:
    """A model with the weights of `model`, which are not copied, that attends to what `plan` says; feature maps are as
    drawn."""
    config = RrtConfig.of(plan, model.config.base_config)
    with torch.device("meta"):
        made = RrtForCausalLM(config)
    drawn = {
        f"{name}.{key}": tensor
        for name, module in made.named_modules()
        if isinstance(module, Maps)
        for key, tensor in Maps(*module.maps.shape, module.seed).state_dict().items()
    }
    made.load_state_dict(model.state_dict() | drawn, assign=True)
    made.tie_weights()
    for name, buffer in model.named_buffers():
        parent, _, last = name.rpartition(".")
        setattr(made.get_submodule(parent), last, buffer)
    return made.eval()


def recursive(args: argparse.Namespace, plan: Plan) -> tuple[RrtForCausalLM, torch.nn.Module]:
    """(the dense model as a recursive one in which nothing is tied, the stock one), in args.dtype."""
    from rrtc import api

    stock = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    return api.tie(stock, without_windows(plan)).eval(), stock


def cost(args: argparse.Namespace, base: RrtForCausalLM, stock, ways: list[tuple[str, Plan, float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    places = torch.arange(args.context // 4, args.context - 1, 4)
    windows = [(ids, ids[0, places + 1, None]) for ids in texts(args, tokenizer)]
    reference = [log_probabilities(stock, ids, places) for ids, _ in windows]
    losses = [-known.gather(-1, label).mean().item() for known, (_, label) in zip(reference, windows, strict=True)]
    print(f"\n{len(windows)} windows of {args.context} tokens, dense loss {sum(losses) / len(losses):.4f}\n")
    print("| what sees everything | window + sinks | predicted | KL | loss | top-1 | KV 2k | KV 8k | KV 32k |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, plan, expected in ways:
        model, found = with_plan(base, plan), []
        for known, (ids, label), loss in zip(reference, windows, losses, strict=True):
            said = log_probabilities(model, ids, places)
            kl = (known.exp() * (known - said)).sum(-1).mean().item()
            agree = (said.argmax(-1) == known.argmax(-1)).float().mean().item()
            found.append((kl, -said.gather(-1, label).mean().item() - loss, agree))
        kl, more, agree = (sum(column) / len(found) for column in zip(*found, strict=True))
        saved = [plan.architecture.kv_bytes(n, 1) / plan.kv_bytes(n, 1) for n in SPEED_CONTEXTS]
        window = next((v.attention for v in plan.visits if v.attention), None)
        shown = f"{window.window} + {window.sinks}" if window else "–"
        ratios = " | ".join(f"{ratio:.2f} ×" for ratio in saved)
        print(f"| {name} | {shown} | {expected:.3f} | {kl:.4f} | {more:+.4f} | {agree:.1%} | {ratios} |", flush=True)


@torch.inference_mode()
def decoding(model, context: int) -> float:
    """Seconds a token after a context of made-up keys and values."""
    cache = DynamicCache(config=model.config)
    ids = (torch.arange(256) * 7919 % model.config.get_text_config().vocab_size)[None]
    model(ids[:, :1], past_key_values=cache)
    for layer in cache.layers:  # as if the context had been read
        parts = getattr(layer, "parts", [layer])
        if not hasattr(layer, "parts"):
            length = min(context, getattr(layer, "sliding_window", context + 1) - 1)
            layer.keys, layer.values = (t.repeat(1, 1, length, 1) for t in (layer.keys, layer.values))
            if hasattr(layer, "cumulative_length"):
                layer.cumulative_length = context
            continue
        rule = layer.rule
        for part in parts:
            columns = torch.arange(context)
            if part is layer.nearby:
                columns = columns[rule.visible(torch.tensor(context), columns, torch.tensor(0))]
            part.keys, part.values = (t.repeat(1, 1, len(columns), 1) for t in (part.keys, part.values))
            part.columns = columns
        layer.cumulative_length = context
    model(ids[:, :1], past_key_values=cache)
    began = time.perf_counter()
    for number in range(NEW):
        model(ids[:, number : number + 1], past_key_values=cache)
    return (time.perf_counter() - began) / NEW


def speed(base: RrtForCausalLM, plan: Plan) -> None:
    local = with_plan(base, plan)
    print("\n| context | tokens a second over the same model with full attention | least, most of the rounds |")
    print("|---|---|---|", flush=True)
    for context in SPEED_CONTEXTS:
        ratios = []
        for number in range(ROUNDS):
            pair = (base, local) if number % 2 else (local, base)
            took = {id(model): decoding(model, context) for model in pair}
            ratios.append(took[id(base)] / took[id(local)])
        print(f"| {context} | {median(ratios):.2f} | {min(ratios):.2f}, {max(ratios):.2f} |", flush=True)


def training(base: RrtForCausalLM, plan: Plan) -> None:
    models = (base.float(), with_plan(base.float(), plan))
    print("\n| context, rows | time of a step over that with full attention | least, most of the rounds |")
    print("|---|---|---|", flush=True)
    for context, rows in ((512, 4), (2048, 1), (4096, 1)):
        ids, ratios = torch.randint(0, 1000, (rows, context)), []
        positions = torch.arange(context)[None].expand(rows, -1)
        for number in range(ROUNDS):
            took = []
            for model in models if number % 2 else models[::-1]:
                began = time.perf_counter()
                model(ids, position_ids=positions, labels=ids, use_cache=False).loss.backward()
                took.append(time.perf_counter() - began)
                model.zero_grad()
            full, local = took if number % 2 else took[::-1]
            ratios.append(local / full)
        print(f"| {context}, {rows} | {median(ratios):.2f} | {min(ratios):.2f}, {max(ratios):.2f} |", flush=True)


def main(args: argparse.Namespace) -> None:
    args.work.mkdir(exist_ok=True)
    ways = []
    for window in args.window:
        plan, found = measured(args, window)
        for share in args.budgets:
            for name, changes in (CONTROLS[number] for number in args.ways):
                try:
                    ways.append((name, *planned(args, window, share, name, changes, plan, found)))
                except Exception as error:
                    print(f"{name}, window {window}, budget {share}: {error}")
    base, stock = recursive(args, plan)
    if "cost" in args.only:
        cost(args, base, stock, ways)
    if "speed" in args.only:
        speed(base, ways[0][1])
    if "training" in args.only:
        training(base, ways[0][1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    add_dtype(parser)
    parser.add_argument("--calibrate-on", action="append", required=True, metavar="TEXT")
    parser.add_argument("--calibrate-tokens", type=int, default=16_384)
    parser.add_argument("--calibrate-context", type=int, default=512, help="more than that where a window asks for it")
    parser.add_argument("--text", action="append", required=True, metavar="TEXT")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=1, help="of each text")
    parser.add_argument("--window", type=int, nargs="+", default=[512])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.2])
    parser.add_argument("--ways", type=int, nargs="+", default=list(range(len(CONTROLS))), help="rows of CONTROLS")
    parser.add_argument("--only", nargs="+", default=["cost", "speed", "training"])
    main(parser.parse_args())
