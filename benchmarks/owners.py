"""What memory over loops costs: visits that read another loop beside those that see a window alone, at the same bytes.

    python benchmarks/owners.py FOLDER --text TEXT [--text TEXT …] --fit TEXT [--context 2048] [--window 128]
                                [--folders WORK]

FOLDER is a recursive model of two loops or more. KL from, and loss above, the same model with everything in its cache,
on windows of --context tokens of each text (its last fifth), at every fourth position from a quarter of the window on.
Nothing is trained; --folders writes the rows as folders, which `benchmarks/healing.py` trains.

"mapped" rows read through linear maps with an intercept, of keys before their positions are in them and of values, that
are fitted by ridge regression for each KV head on --fit-tokens of the text --fit: rrtc itself has no such maps.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from common import add_dtype
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from windows import log_probabilities, texts, with_plan

from rrtc.eval.passkey import make_probes
from rrtc.io.provenance import PROVENANCE
from rrtc.io.recursive import RecursiveModel, copy_with_plan
from rrtc.kv_budget import without_windows
from rrtc.kv_owners import local_but, with_owners
from rrtc.model.owner_rrt import Look, OwnerRule
from rrtc.plan import Plan

MAPPED = {"moved": (False, False), "keys mapped": (True, None), "mapped": (True, True)}  # by name: see Maps
SHARD = 4 * 10**9  # bytes of a file, at most
RIDGE = 1e-2  # of the mean square of an input


def rows(plan: Plan, window: int, sinks: int) -> Iterator[tuple[str, Plan]]:
    """(what it is, the plan) for every row; the first attends to everything, and the others take the same bytes."""
    plan = without_windows(plan)
    yield "full", plan
    for owner, local in (("last_loop", "early loop local"), ("first_loop", "late loop local")):
        alone = local_but(plan, owner, window, sinks)
        yield local, alone
        yield owner.replace("_", " "), with_owners(alone, owner)


class Maps:
    """What visits read of their owners, fitted to what they would have of their own."""

    def __init__(self, model, ids: Tensor):
        """ids: (windows, context). model: attends to everything."""
        self._model, attention = model, model.model.layers[0].self_attn
        self._rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        found = [model(row[None], use_cache=True, logits_to_keep=1).past_key_values.layers for row in ids]
        self._keys, self._values = (
            [torch.cat([change(getattr(window[place], name)[0].float()) for window in found], 1)  # (heads, tokens, d)
             for place in range(len(found[0]))]
            for name, change in (("keys", lambda keys: self.turned(keys, 0, -1)), ("values", lambda values: values))
        )  # fmt: skip
        self._fits: dict[tuple, tuple[Tensor, Tensor]] = {}

    def turned(self, keys: Tensor, begin: int, sign: int) -> Tensor:
        """`keys` (heads, tokens, d) of positions from `begin` on, with these put in (sign 1) or taken out (-1)."""
        places = torch.arange(begin, begin + keys.shape[-2])[None]
        cos, sin = self._model.model.rotary_emb(keys[None], places)
        return self._rotate(keys[None], keys[None], cos, sign * sin)[0][0]

    def fitted(self, name: str, owner: int, reader: int, linear: bool) -> tuple[Tensor, Tensor]:
        """(heads, d, d), (heads, 1, d): the map of "keys" or "values", the identity where it is not `linear`."""
        if (name, owner, reader, linear) not in self._fits:
            of = self._keys if name == "keys" else self._values
            x, y = of[owner], of[reader]
            dx, dy = x - x.mean(1, keepdim=True), y - y.mean(1, keepdim=True)
            matrix = torch.eye(x.shape[-1]).expand(len(x), -1, -1)
            if linear:
                square = dx.mT @ dx
                ridge = RIDGE * square.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None] * matrix
                matrix = torch.linalg.solve(square + ridge, dx.mT @ dy)
            self._fits[name, owner, reader, linear] = matrix, y.mean(1, keepdim=True) - x.mean(1, keepdim=True) @ matrix
        return self._fits[name, owner, reader, linear]

    def put_into(self, model, keys: bool, values: bool | None) -> None:
        """Has the visits of `model` read through maps: linear ones, or (False) shifts; None: values as they are."""
        maps = self

        class Mapped(Look):
            def attend(self, run, module, *args, **kwargs):
                self.place = module.layer_idx
                return super().attend(run, module, *args, **kwargs)

            def _read(self, heads, begin, end, like):
                read = [tensor[0].float() for tensor in super()._read(heads, begin, end, like)]
                read[0] = maps.turned(read[0], begin, -1)
                for n, linear in enumerate((keys, values)):
                    if linear is not None:
                        fitted = maps.fitted(("keys", "values")[n], self.rule.owner, self.place, linear)
                        matrix, shift = (one[heads] for one in fitted)
                        read[n] = read[n] @ matrix + shift
                read[0] = maps.turned(read[0], begin, 1)
                return tuple(tensor[None].to(like.dtype) for tensor in read)

        for visit in model.model.layers:
            if visit.eyes is not None and isinstance(visit.eyes.rule, OwnerRule):
                visit.eyes.sight = Mapped


def measure(args: argparse.Namespace, ways: list[tuple[str, Plan]]) -> None:
    base = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype).eval()
    tokenizer, places = AutoTokenizer.from_pretrained(args.model), torch.arange(args.context // 4, args.context - 1, 4)
    windows = [(ids, ids[0, places + 1, None]) for ids in texts(args, tokenizer)]
    reference = [log_probabilities(base, ids, places) for ids, _ in windows]
    loss = sum(-known.gather(-1, label).mean().item() for known, (_, label) in zip(reference, windows, strict=True))
    print(f"\n{len(windows)} windows of {args.context} tokens, loss {loss / len(windows):.4f}\n")
    columns = "| | KV | KL | loss | by window, KL | loss of pass keys |"
    print(f"{columns}\n|---|---|---|---|---|---|", flush=True)
    fit = torch.tensor(tokenizer(args.fit.read_text(errors="replace")[: 8 * args.fit_tokens])["input_ids"])
    maps = Maps(base, fit[: args.fit_tokens // 1024 * 1024].view(-1, 1024))
    probes = make_probes(tokenizer, args.passkey_length, 1, 0, 1 << 30) if args.passkey_length else []
    for name, plan in ways:
        for how, mapped in ({"": None} | (MAPPED if "owner" in plan.features else {})).items():
            model, found = with_plan(base, plan), []
            if mapped is not None:
                maps.put_into(model, *mapped)
            for known, (ids, label) in zip(reference, windows, strict=True):
                said = log_probabilities(model, ids, places)
                kl = (known.exp() * (known - said)).sum(-1).mean().item()
                found.append((kl, (known.gather(-1, label) - said.gather(-1, label)).mean().item()))
            kl, more = (sum(column) / len(found) for column in zip(*found, strict=True))
            share = plan.kv_bytes(args.context, 1) / plan.architecture.kv_bytes(args.context, 1)
            each, title = " ".join(f"{one:.2f}" for one, _ in found), ", ".join(filter(None, (name, how)))
            keys = [loss_of_key(model, probe) for probe in probes]
            looked = f"{sum(keys) / len(keys):.3f}" if keys else "–"
            print(f"| {title} | {share:.3f} | {kl:.4f} | {more:+.4f} | {each} | {looked} |", flush=True)


def loss_of_key(model, probe) -> float:
    """The mean negative log likelihood of a pass key's tokens."""
    key = torch.tensor(probe.key)
    logits = model(torch.tensor([[*probe.ids, *probe.key[:-1]]]), use_cache=False, logits_to_keep=len(key)).logits[0]
    return torch.nn.functional.cross_entropy(logits.float(), key).item()


@torch.inference_mode()
def main(args: argparse.Namespace) -> None:
    source = RecursiveModel(args.model)
    ways = [(name, plan) for name, plan in rows(source.plan, args.window, args.sinks) if name in (args.rows or [name])]
    if args.folders is None:
        measure(args, ways)
    for name, plan in ways if args.folders is not None else ():
        folder = args.folders / name.replace(" ", "-")
        folder.mkdir(parents=True)
        copy_with_plan(source, plan, folder, SHARD)
        shutil.copyfile(args.model / PROVENANCE, folder / PROVENANCE)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    add_dtype(parser)
    parser.add_argument("--text", action="append", default=[], metavar="TEXT")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=1, help="of each text")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--sinks", type=int, default=4)
    parser.add_argument("--fit", type=Path, help="text for the maps")
    parser.add_argument("--fit-tokens", type=int, default=8192)
    parser.add_argument("--passkey-length", type=int, default=0, help="of prompts with something to look up; 0: none")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="by default all")
    parser.add_argument("--folders", type=Path, help="writes the rows there, and measures nothing")
    main(parser.parse_args())
