"""What the regularizer bmi does: on the same start, with it and without, for the same time; in pieces.

    python benchmarks/bmi.py WORK FOLDER --data TEXT --text HELD_OUT [--weights 0.02] [--seeds 0 1 2] [--tokens 200k]
                             [--context 512] [--gaps 0 2 6] [--windows 64] [--set FIELD=VALUE]

FOLDER is what `rrtc init` made; where bmi could matter is a model whose attention was cut (`--kv-budget`), at gaps
beyond its window. A run with bmi sees --tokens; the run without it beside which it stands sees as many as it has time
for in the same seconds, by its own speed in a dry run. WORK keeps finished runs, and results.jsonl what was measured.

Of every run, and of the dense model, on windows of --context tokens of the held-out text:
infonce    a lower bound, at most log of the BATCH, of what a segment tells of the one GAP segments behind the next, in
           nats: a fresh critic learns on half of the windows, and is measured on the others
context    the loss of the last SCORED tokens with SHORT tokens before them, minus that with the whole window
kl, loss   of all tokens: from the dense model, and of the next token
"""

import argparse
import json
import math
import statistics
from pathlib import Path

import torch
from common import Results, add_runs, place_of, recipe_of_run, run
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoTokenizer

from rrtc.io.source import find_base, load_for_scoring
from rrtc.recipe.schema import Recipe
from rrtc.stock.parts import Parts, states_of
from rrtc.text.tokens import begin_and_end
from rrtc.uptrain.bmi import CRITIC_DECAY, CRITIC_LR, Critic, codes, segment_length
from rrtc.uptrain.estimate import estimate

SHORT, SCORED, BATCH = 64, 32, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    add_runs(parser)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--weights", nargs="+", type=float, default=[0.02])
    parser.add_argument("--gaps", nargs="+", type=int, default=[0, 2, 6], help="in segments")
    parser.add_argument("--windows", type=int, default=64, help="of the held-out text")
    parser.add_argument("--critic-steps", type=int, default=300)
    asked = parser.parse_args()
    done = Results(asked.work)
    dense = find_base(asked.folder, None, "FOLDER").folder
    ids = held_out(asked)

    def measure(name: str, folder: Path, seconds: float | None, tokens: int | None) -> None:
        row = {"seconds": seconds, "tokens": tokens}
        done.measured({"name": name}, lambda: row | measured(asked, folder, dense, ids))

    measure("dense", dense, None, None)
    measure("start", asked.folder, None, None)
    for seed in asked.seeds:
        for weight in asked.weights:
            name = f"bmi {weight:g}, seed {seed}"
            target, seconds = trained(asked, name, weight, seed, asked.tokens)
            measure(name, target, seconds, asked.tokens)
            name = f"without, as long as bmi {weight:g}, seed {seed}"
            if (row := done.find({"name": name})) is not None:
                tokens = row["tokens"]
            else:
                found = estimate(str(asked.folder), recipe_of(asked, 0.0, seed, asked.tokens))
                tokens = max(1, round(seconds / found["seconds_per_step"])) * found["tokens_per_step"]
            measure(name, *trained(asked, name, 0.0, seed, tokens), tokens)
    show(asked, done.rows)


def recipe_of(asked: argparse.Namespace, weight: float, seed: int, tokens: int) -> Recipe:
    return recipe_of_run(asked, {"tokens": tokens, "seed": seed, "regularizers": {"bmi": weight}})


def trained(asked: argparse.Namespace, name: str, weight: float, seed: int, tokens: int) -> tuple[Path, float]:
    """(the folder of a run, the seconds of its steps)"""
    target = place_of(asked.work, name)
    run(asked.folder, target, recipe_of(asked, weight, seed, tokens))
    return target, sum(json.loads(line)["seconds"] for line in (target / "metrics.jsonl").read_text().splitlines())


def held_out(asked: argparse.Namespace) -> torch.Tensor:
    """(windows, context)"""
    tokenizer = AutoTokenizer.from_pretrained(asked.folder)
    begin, _ = begin_and_end(tokenizer)
    width = asked.context - len(begin)
    text = asked.text.read_text(errors="replace")[: 16 * width * asked.windows]
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = ids[: len(ids) // width * width].view(-1, width)[: asked.windows]
    return torch.cat([torch.tensor(begin, dtype=torch.long).expand(len(windows), -1), windows], 1)


def measured(asked: argparse.Namespace, folder: Path, dense: Path, ids: torch.Tensor) -> dict:
    model, teacher = load_for_scoring(folder), load_for_scoring(dense)
    parts, sums, states = Parts(model), torch.zeros(3), []
    with torch.no_grad():
        for window in ids.to(model.device).split(1):
            _, (last,) = parts.run(window, [len(parts.layers) - 1])
            states.append(states_of(last)[0].float().cpu())
            ours, theirs = (m(window, use_cache=False).logits[0, :-1].float().log_softmax(-1) for m in (model, teacher))
            losses = cross_entropy(ours, window[0, 1:], reduction="none")
            short = model(window[:, -SHORT - SCORED :], use_cache=False).logits[0, -SCORED - 1 : -1].float()
            kl = kl_div(ours, theirs, log_target=True, reduction="sum") / len(ours)
            gain = cross_entropy(short, window[0, -SCORED:]) - losses[-SCORED:].mean()
            sums += torch.stack([kl, losses.mean(), gain]).cpu()
    code = codes([torch.stack(states)], segment_length(ids.shape[1]))
    kl, loss, gain = (sums / len(ids)).tolist()
    infonce = {str(gap): information(code, gap, asked.critic_steps) for gap in asked.gaps if gap + 1 < code.shape[1]}
    return {"kl": kl, "loss": loss, "context": gain, "infonce": infonce}


def information(code: torch.Tensor, gap: int, steps: int) -> float:
    """InfoNCE (van den Oord et al., arXiv 1807.03748) of segments and those `gap` segments behind their neighbors."""
    half, generator = len(code) // 2, torch.Generator().manual_seed(0)
    pairs = [
        (part[:, : -gap - 1].flatten(0, 1), part[:, gap + 1 :].flatten(0, 1)) for part in (code[:half], code[half:])
    ]
    torch.manual_seed(0)
    critic = Critic(code.shape[-1], 0)
    optimizer = torch.optim.Adam(critic.parameters(), CRITIC_LR, weight_decay=CRITIC_DECAY)

    def lost(x: torch.Tensor, y: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        x, y = x[order], y[order]
        many = len(order)
        scores = critic(x[:, None].expand(-1, many, -1), y[None].expand(many, -1, -1))
        return cross_entropy(scores, torch.arange(many))

    for _ in range(steps):
        order = torch.randperm(len(pairs[0][0]), generator=generator)[:BATCH]
        optimizer.zero_grad()
        lost(*pairs[0], order).backward()
        optimizer.step()
    critic.eval()
    with torch.no_grad():
        parts = torch.randperm(len(pairs[1][0]), generator=generator).split(BATCH)
        losses = [lost(*pairs[1], part).item() for part in parts if len(part) == BATCH]
    if not losses:
        raise SystemExit(f"{half} windows have fewer than {BATCH} pairs: raise --windows")
    return math.log(BATCH) - statistics.mean(losses)


def show(asked: argparse.Namespace, done: list[dict]) -> None:
    shown = Table(title=f"bmi, {asked.windows} windows of {asked.context} held-out tokens; InfoNCE by gap, in segments")
    gaps = [str(gap) for gap in asked.gaps]
    for column in (
        "",
        "tokens",
        "seconds",
        "KL",
        "loss",
        f"loss with {SHORT} - all",
        *(f"InfoNCE {gap}" for gap in gaps),
    ):
        shown.add_column(column)
    for one in done:
        cells = [f"{one[name]:.4f}" for name in ("kl", "loss", "context")]
        cells += [f"{one['infonce'][gap]:.3f}" if gap in one["infonce"] else "–" for gap in gaps]
        shown.add_row(one["name"], str(one["tokens"] or "–"), f"{one['seconds'] or 0:.0f}", *cells)
    Console(width=140).print(shown)


if __name__ == "__main__":
    main()
