"""What KV heads may have that do not see everything, at one number of KV bytes, on one model in one run.

    python benchmarks/attention.py MODEL --calibrate-on TEXT --text TEXT [--text TEXT …] --work FOLDER
                                   [--context 8192] [--windows 1] [--budget 0.2] [--speed-context 4096] [--rows ROW …]
                                   [--train-tokens 200k --data TEXT … [--train-context 2048] [--set FIELD=VALUE …]]

KL and loss against the dense model on windows of --context tokens of each text (its last fifth, from which nothing was
chosen), at every fourth position from a quarter of the window on; and of pass keys hidden at five depths of
--passkey-length tokens, how many are found, and the mean negative log likelihood of their tokens. With --speed-context,
tokens a second of reading so many and of saying more behind them, over the full one's, in turn. With --train-tokens,
each row is also uptrained on so many tokens of --data, the same in the same order, at `uptrain`'s rate for the loss
that the row has (--set learning_rate: for all), and measured again.
From the third row on the same heads see everything: those that windows cost most. Every row has the bytes of the budget
at --context tokens, but for the full one and the control that has fewer.

FOLDER keeps what was measured of the heads and the rows that are done, so that a run can be broken off, or given other
--rows later; other settings take another FOLDER. The table has all rows that are there. A training that was broken off
goes on.
"""

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import linear
import torch
from common import add_dtype, place_of, recipe_of_run, run
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache
from windows import log_probabilities, recursive, texts, with_plan

from rrtc import api
from rrtc.attention import Attention
from rrtc.eval.passkey import Probe, make_probes
from rrtc.init import windows as choosing
from rrtc.init.calibrate import calibrate
from rrtc.init.job import prepare
from rrtc.io.folder import copy_companions, whole_file, whole_folder
from rrtc.io.provenance import PROVENANCE, read_provenance
from rrtc.kv_budget import Head, KindLosses, KvBudget, cheapest, predicted
from rrtc.model import RrtForCausalLM
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.stock.streamed import StreamedModel
from rrtc.units import parse_count
from rrtc.uptrain.rate import default_rate


@dataclass(frozen=True)
class Found:
    """What rows are made of. full: the plan in which all heads see everything. ways, lookups: what was measured."""

    full: Plan
    recipe: InitRecipe
    ways: list[tuple[KvBudget, KindLosses]]
    lookups: dict[Head, float]
    text: Tensor  # from which this was measured: ids, (windows, context)

    def planned(self, *kinds: str) -> Plan:
        """Under the budget, where heads that do not see everything may have these kinds, window first."""
        recipe = self.recipe.model_copy(update={"kv_kinds": list(kinds)})
        ways = KvBudget(self.full.architecture, recipe).ways
        measured = [{kind: losses[kind] for kind in kinds} for _, losses in self.ways]
        return cheapest(list(zip(ways, measured, strict=True)), self.full, self.lookups)[0]

    def predicted(self, plan: Plan) -> float | None:
        """What `plan` costs in nats a token; None where it has what was not measured."""
        near = [(visit.layer, replace(visit.attention, heads=())) for visit in plan.visits if visit.attention]
        for way, losses in self.ways:
            longer = lengthened(way, way.lengthened(way.seeing_everything(plan)))
            if near and all(any(one == of[layer] for of in longer.values()) for layer, one in near):
                return predicted(plan, losses)
        return None

    def all_of(self, kind: str, change: Callable[[Attention], Attention] = lambda near: near) -> Plan:
        """The windows of `planned("window")`, replaced by that kind everywhere, and each of these changed."""
        windows = self.planned("window")
        window = next(visit.attention.window for visit in windows.visits if visit.attention)
        way = next(way for way, _ in self.ways if way.lengthened(way.seeing_everything(windows)) == window)
        kinds = lengthened(way, window)[kind]
        return with_attention(windows, lambda layer, old: change(replace(kinds[layer], heads=old.heads)))


def lengthened(way: KvBudget, window: int) -> dict[str, dict[int, Attention]]:
    """The kinds of `way`, by name and layer, where the windows whose bytes they have are that long."""
    more = window - way.window.window
    return {
        kind: {layer: replace(one, window=one.window + more) for layer, one in of_kind.items()}
        for kind, of_kind in way.kinds.items()
    }


def with_attention(plan: Plan, change: Callable[[int, Attention], Attention]) -> Plan:
    """`plan`, in which the attention of each visit that does not see everything is change(layer, attention)."""
    visits = [v if v.attention is None else replace(v, attention=change(v.layer, v.attention)) for v in plan.visits]
    return replace(plan, visits=tuple(visits))


def window_of_all(found: Found) -> Plan:
    """No head sees everything, and all see the window that the budget allows."""
    context = KvBudget(found.full.architecture, found.recipe).context
    sinks, free = found.recipe.kv_sinks, [layer for layer in found.full.architecture.layers if not layer.window]
    spare = found.recipe.kv_budget * found.full.kv_bytes(context, 1)
    spare -= sum(layer.kv_numbers(context) for layer in found.full.architecture.layers if layer.window)
    near = Attention(int(spare / sum(layer.kv_width for layer in free)) - sinks + 1, sinks)
    layers = enumerate(found.full.architecture.layers)
    given = {number: near for number, layer in layers if layer.kv_heads and not layer.window}
    visits = [replace(visit, attention=given.get(visit.layer)) for visit in found.full.visits]
    return replace(found.full, visits=tuple(visits))


def one_seed(near: Attention) -> Attention:
    return replace(near, landmark=replace(near.landmark, seed=0))


ROUNDS, NEW = 3, 16  # of speeds
ALL_ALIKE = "window, all heads alike"
ROWS: dict[str, Callable[[Found], Plan]] = {
    "full": lambda found: found.full,
    ALL_ALIKE: window_of_all,
    "window, by head": lambda found: found.planned("window"),
    "landmark": lambda found: found.all_of("landmark"),
    "landmark, one seed": lambda found: found.all_of("landmark", one_seed),
    "landmark of 0 blocks": lambda found: found.all_of("landmark", lambda near: replace(near, landmark=None)),
    "linear, as drawn": lambda found: found.all_of("linear"),
    "measured": lambda found: found.planned("window", "landmark", "linear"),
} | {name: lambda found, change=change: found.all_of("linear", change) for name, (change, _) in linear.ROWS.items()}


def recipe_of(args: argparse.Namespace) -> Recipe:
    init = {"budget": 1, "kv_budget": args.budget, "kv_context": args.context, "calibrate_on": args.calibrate_on}
    init |= {"calibrate_tokens": args.calibrate_tokens, "measure_tokens": 0, "kv_kinds": "window,landmark,linear"}
    return Recipe.model_validate({"init": init})


def measured(args: argparse.Namespace) -> Found:
    """From the folder, where the heads were measured before."""
    job = prepare(args.model, args.work / "none", recipe_of(args))
    budget, folder = job.kv_budget, args.work / "heads"
    folder.mkdir(exist_ok=True)
    device, model = torch.device("cpu"), StreamedModel(job.dense.config, job.dense.raw, torch.device("cpu"))
    calibration = calibrate(
        job.dense,
        model,
        [],
        job.calibration,
        folder,
        device,
        lambda n: None,
        choosing.rules(budget, job.plan, model.layers, job.dense),
        moments=False,
    )
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    able = choosing.lookups(budget, job.dense, model, tokenizer, job.calibration, 0, folder, device, lambda n: None)
    return Found(job.plan, job.recipe.init, choosing.measured_ways(budget, calibration), able, job.calibration)


@torch.inference_mode()
def said_of_keys(model, probes: list[Probe]) -> tuple[int, float]:
    """(keys that are said, mean negative log likelihood of their tokens)."""
    hits, losses = 0, []
    for probe in probes:
        key = torch.tensor(probe.key)
        ids = torch.tensor([[*probe.ids, *probe.key[:-1]]])
        logits = model(ids, use_cache=False, logits_to_keep=len(key)).logits[0].float()
        hits += torch.equal(logits.argmax(-1), key)
        losses.append(torch.nn.functional.cross_entropy(logits, key).item())
    return hits, sum(losses) / len(losses)


def measure(model, plan: Plan, reference: list[tuple[Tensor, Tensor]], probes: list[Probe], context: int) -> dict:
    """What one row says. reference: (ids (1, context), the dense model's log probabilities at `places`)."""
    found, kept = places(context), []
    for ids, known in reference:
        said, label = log_probabilities(model, ids, found), ids[0, found + 1, None]
        kl = (known.exp() * (known - said)).sum(-1).mean().item()
        kept.append((kl, (known.gather(-1, label) - said.gather(-1, label)).mean().item()))
    kl, loss = (sum(column) / len(kept) for column in zip(*kept, strict=True))
    hits, key_loss = said_of_keys(model, probes)
    share = plan.kv_bytes(context, 2) / plan.architecture.kv_bytes(context, 2)
    return {"kl": kl, "loss": loss, "keys": f"{hits} of {len(probes)}", "key_loss": key_loss, "kv": share}


@torch.inference_mode()
def speeds(full, model, context: int) -> dict[str, float]:
    """Tokens a second of `model` over those of `full`, medians of rounds: of a prompt, and of the tokens after it."""
    ids, ratios = torch.arange(context)[None] * 7919 % full.config.vocab_size, {"prefill": [], "decode": []}
    for number in range(ROUNDS):
        took = {name: {} for name in ratios}
        for one in (full, model) if number % 2 else (model, full):
            cache, began = DynamicCache(config=one.config), time.perf_counter()
            one(ids, past_key_values=cache, logits_to_keep=1)
            read = time.perf_counter()
            for place in range(NEW):
                one(ids[:, place : place + 1], past_key_values=cache)
            took["prefill"][one], took["decode"][one] = read - began, time.perf_counter() - read
        for name, of_each in took.items():
            ratios[name].append(of_each[full] / of_each[model])
    return {name: median(found) for name, found in ratios.items()}


def trained(args: argparse.Namespace, name: str, model: RrtForCausalLM, lost: float) -> tuple[RrtForCausalLM, dict]:
    """(`model`, uptrained; what its training took). lost: nats a token that the row has lost."""
    base, start = args.work / "base", place_of(args.work, name)
    target = start.with_name(f"{start.name}-healed")
    if not base.exists():
        api.init(args.model, base, budget=1, measure_tokens=0)
    if not start.exists():
        with whole_folder(start) as folder:
            model.save_pretrained(folder)
            copy_companions(base, folder)
            shutil.copyfile(base / PROVENANCE, folder / PROVENANCE)
    rate = default_rate(max(lost, 0), args.batch_size * args.train_context)
    values = {"learning_rate": rate, "tokens": args.train_tokens, "context": args.train_context}
    values |= {"batch_size": args.batch_size, "micro_batch": 1}
    run(start, target, recipe_of_run(args, values))
    took = read_provenance(target)["measured"]["uptrain"]
    healed = RrtForCausalLM.from_pretrained(target, dtype=args.dtype).eval()
    return healed, {name: took[name] for name in ("tokens", "seconds", "learning_rate", "first_kl", "last_kl")}


def places(context: int) -> Tensor:
    return torch.arange(context // 4, context - 1, 4)


def table(rows: dict[str, dict]) -> None:
    columns = ["heads that do not see everything have", "KV", "predicted", "KL", "loss", "keys found", "loss of keys"]
    print("\n| " + " | ".join([*columns, "prefill", "decode"]) + " |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in [*(name for name in ROWS if name in rows), *(name for name in rows if name not in ROWS)]:
        row = rows[name]
        shown = "–" if row["predicted"] is None else f"{row['predicted']:.4f}"
        fast = " | ".join(f"{row[name]:.2f}" if name in row else "–" for name in ("prefill", "decode"))
        print(f"| {name} | {row['kv']:.3f} | {shown} | {row['kl']:.4f} | {row['loss']:+.4f} | {row['keys']} "
              f"| {row['key_loss']:.3f} | {fast} |", flush=True)  # fmt: skip


def table_of_trained(rows: dict[str, dict]) -> None:
    print("\n| after training | rate | seconds | KL | loss | keys found | loss of keys |")
    print("|---|---|---|---|---|---|---|")
    for name, row in ((name, rows[name]["trained"]) for name in ROWS if "trained" in rows.get(name, {})):
        print(f"| {name} | {row['learning_rate']:.1e} | {row['seconds']:.0f} | {row['kl']:.4f} | {row['loss']:+.4f} "
              f"| {row['keys']} | {row['key_loss']:.3f} |", flush=True)  # fmt: skip


def whole(row: dict | None, args: argparse.Namespace) -> bool:
    """Whether nothing of it is left to be measured. The dense model has nothing to learn from itself."""
    return row is not None and (not args.train_tokens or "trained" in row or row["kv"] == 1)


def keep(done: dict, file: Path) -> None:
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(done, indent=1))


def main(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("work", "rows")}
    file = args.work / "results.json"
    done = json.loads(file.read_text()) if file.exists() else {"settings": settings, "rows": {}}
    if done["settings"] != settings:
        sys.exit(f"{args.work} holds rows that were made with other settings. Name another --work.")
    if missing := [name for name in args.rows if not whole(done["rows"].get(name), args)]:
        found = measured(args)
        base, stock = recursive(args, found.full)
        tokenizer, at = AutoTokenizer.from_pretrained(args.model), places(args.context)
        reference = [(ids, log_probabilities(stock, ids, at)) for ids in texts(args, tokenizer)]
        probes = make_probes(tokenizer, args.passkey_length, args.passkey_trials, 0, 1 << 30)
        for name in missing:
            plan = ROWS[name](found)
            model = with_plan(base, plan)
            if name in linear.ROWS:
                linear.ROWS[name][1](model, found.text, args.work / "maps.pt")
            if name not in done["rows"]:
                row = measure(model, plan, reference, probes, args.context)
                if args.speed_context:
                    row |= speeds(base, model, args.speed_context)
                known = name not in (ALL_ALIKE, *linear.ROWS)  # whose windows or fit were not measured
                done["rows"][name] = row | {"predicted": found.predicted(plan) if known else None}
                keep(done, file)
            row = done["rows"][name]
            if not whole(row, args):
                healed, took = trained(args, name, model, row["loss"])
                row["trained"] = took | measure(healed, plan, reference, probes, args.context)
                keep(done, file)
            print(name, row, flush=True)
    table(done["rows"])
    if args.train_tokens:
        table_of_trained(done["rows"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    add_dtype(parser)
    parser.add_argument("--calibrate-on", action="append", required=True, metavar="TEXT")
    parser.add_argument("--calibrate-tokens", type=int, default=8192, help="in windows as rrtc init has them")
    parser.add_argument("--text", action="append", required=True, metavar="TEXT")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--context", type=int, default=8192, help="at which the budget counts, and of the windows")
    parser.add_argument("--windows", type=int, default=1, help="of each text")
    parser.add_argument("--budget", type=float, default=0.2)
    parser.add_argument("--passkey-length", type=int, default=2000)
    parser.add_argument("--passkey-trials", type=int, default=1)
    parser.add_argument("--speed-context", type=int, default=0, metavar="TOKENS", help="by default no speeds")
    parser.add_argument("--train-tokens", type=parse_count, default=0, help="by default nothing is trained")
    parser.add_argument("--data", action="append", default=[], metavar="TEXT", help="to train on")
    parser.add_argument("--train-context", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=2, help="windows of a step of training")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of uptrain, for all rows")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help="by default all")
    main(parser.parse_args())
