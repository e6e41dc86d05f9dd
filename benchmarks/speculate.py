"""What guessing by an exit is worth: `generate` with and without, turn by turn on the same prompts in one process.

    python benchmarks/speculate.py FOLDER --text TEXT.txt [--exit LOOP] [--ideal] [--dtype bfloat16] [--sample]

FOLDER holds a recursive model. --ideal makes the layers after the exit idle: what they compute is thrown away, so that
the exit is right wherever it may guess. A ratio is the least processor time of a prompt without guesses, of all rounds,
over the least with them; that of all prompts is said first. Steps are counted: they are the same in every round and on
every machine. transformers' own early exit (assistant_early_exit) is timed beside it.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrtc.model import speculate_rrt
from rrtc.model.graft_rrt import find_layers
from rrtc.stock.architecture import read_plan


class Counting(speculate_rrt.Worth):
    """Counts rounds, tokens that ran in them, and tokens that were said in them; guesses, and how many were right."""

    rounds = ran = said = guesses = right = 0

    def learn(self, sure: float, right: bool) -> None:
        super().learn(sure, right)
        Counting.guesses, Counting.right = Counting.guesses + 1, Counting.right + right

    def end(self, tokens: int, said: int) -> None:
        super().end(tokens, said)
        Counting.rounds, Counting.ran, Counting.said = Counting.rounds + 1, Counting.ran + tokens, Counting.said + said


def make_idle(model, place: int) -> None:
    parent, name = find_layers(model.stock, len(model.config.visits))
    for visit in list(getattr(parent, name))[place + 1 :]:

        def idle(hidden, *args, forward=visit.forward, **kwargs):
            forward(hidden, *args, **kwargs)
            return hidden

        visit.forward = idle


def main(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype)).eval()
    place = read_plan(model.config).exits[options.exit - 1]
    if options.ideal:
        make_idle(model, place)
    speculate_rrt.Worth = Counting
    model.generation_config.speculate = False
    ways = {"generate": {}, "speculate": {"speculate": {"exit": place}}}
    if not (options.sample or options.ideal):
        ways["assistant_early_exit"] = {"assistant_early_exit": place + 1}
    settings = {"max_new_tokens": options.tokens, "pad_token_id": 0, "eos_token_id": None, "do_sample": options.sample}
    ids = tokenizer(options.text.read_text(errors="replace"), return_tensors="pt")["input_ids"][0]
    starts = torch.linspace(len(ids) // 2, len(ids) - options.prompt - 1, options.prompts).long().tolist()
    best: dict[tuple[str, int], float] = {}
    said: dict[tuple[str, int], torch.Tensor] = {}
    for turn in range(options.rounds):
        for start in starts:
            prompt = ids[start : start + options.prompt][None]
            for way in sorted(ways, reverse=bool(turn % 2)):
                torch.manual_seed(start)
                begun = time.process_time()
                found = model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings, **ways[way])
                spent = time.process_time() - begun
                best[way, start], said[way, start] = min(best.get((way, start), spent), spent), found
        print(f"round {turn + 1} of {options.rounds}", flush=True)

    texts = options.prompts * options.rounds
    print(
        f"{options.folder}, {options.dtype}, exit after layer {place}, {options.prompts} times {options.tokens} tokens"
    )
    print(
        f"generate: {sum(best['generate', n] for n in starts) / options.prompts / options.tokens * 1e3:.1f} ms a token"
    )
    for way in list(ways)[1:]:
        total = sum(best["generate", n] for n in starts) / sum(best[way, n] for n in starts)
        each = sorted(best["generate", n] / best[way, n] for n in starts)
        equal = sum(torch.equal(said["generate", n], said[way, n]) for n in starts)
        print(f"{way}: {total:.3f} times as fast ({each[0]:.3f} to {each[-1]:.3f}), {equal} texts equal")
    print(
        f"a text: {Counting.rounds / texts:.1f} rounds, in which {Counting.ran / texts:.1f} tokens ran and "
        f"{Counting.said / texts:.1f} were said; {Counting.right / max(1, Counting.guesses):.2f} of guesses right"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True, help="prompts are taken from its second half")
    parser.add_argument("--exit", type=int, default=1, help="after which loop the model is left to guess")
    parser.add_argument("--ideal", action="store_true")
    parser.add_argument("--sample", action="store_true", help="at temperature 1, with a seed for each prompt")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
