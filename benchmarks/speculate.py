"""What guessing by an exit is worth: `generate` of one model with and without, turn by turn on the same prompts.

    python benchmarks/speculate.py FOLDER --text TEXT.txt [--exit N] [--ideal] [--dtype bfloat16] [--sample]

FOLDER holds a recursive model. --ideal makes the layers after the exit idle: they compute all that they did, and it is
thrown away, so that the exit is always right where it may guess. Ratios are of the least processor time that a prompt
took in any round. Guesses are counted as they are made, so these figures are the same every time.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rrtc.model import speculate_rrt
from rrtc.model.modeling_rrt import find_layers
from rrtc.stock.architecture import read_plan


class Counting(speculate_rrt.Worth):
    """Counts rounds, the tokens that ran in them, and those that were said."""

    counts = [0, 0, 0, 0]

    def end(self, tokens: int, said: int) -> None:
        super().end(tokens, said)
        for place, number in enumerate((1, tokens, said, tokens == 1)):
            self.counts[place] += number


def make_idle(model, place: int) -> None:
    parent, name = find_layers(model.stock, len(model.config.visits))
    for visit in list(getattr(parent, name))[place + 1 :]:
        visit.forward = lambda hidden, *args, forward=visit.forward, **kwargs: (
            forward(hidden, *args, **kwargs),
            hidden,
        )[1]


def main(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=getattr(torch, options.dtype)).eval()
    place = read_plan(model.config).exits[options.exit - 1]
    if options.ideal:
        make_idle(model, place)
    speculate_rrt.Worth = Counting
    ids = tokenizer(options.text.read_text(errors="replace"), return_tensors="pt")["input_ids"][0]
    starts = torch.linspace(len(ids) // 2, len(ids) - options.prompt - 1, options.prompts).long()
    settings = {"max_new_tokens": options.tokens, "pad_token_id": 0, "eos_token_id": None, "do_sample": options.sample}
    model.generation_config.speculate = None
    ways = {"generate": None, "speculate": {"exit": place}}
    best: dict[tuple[str, int], float] = {}
    said: dict[tuple[str, int], torch.Tensor] = {}
    for turn in range(options.rounds):
        for number, start in enumerate(starts.tolist()):
            prompt = ids[start : start + options.prompt][None]
            for way, asked in list(ways.items())[:: 1 if turn % 2 else -1]:
                Counting.counts = [0, 0, 0, 0] if (turn, number) == (0, 0) and asked else Counting.counts
                torch.manual_seed(number)
                begun = time.process_time()
                found = model.generate(prompt, attention_mask=torch.ones_like(prompt), speculate=asked, **settings)
                spent = time.process_time() - begun
                best[way, number] = min(best.get((way, number), spent), spent)
                said[way, number] = found
        ratios = [best["generate", n] / best["speculate", n] for n in range(options.prompts)]
        total = sum(best["generate", n] for n in range(options.prompts)) / sum(
            best["speculate", n] for n in range(options.prompts)
        )
        equal = sum(torch.equal(said["generate", n], said["speculate", n]) for n in range(options.prompts))
        rounds, ran, tokens, alone = (count / (turn + 1) / options.prompts for count in Counting.counts)
        print(
            f"round {turn + 1}: {total:.3f} times as fast ({min(ratios):.3f} to {max(ratios):.3f}); "
            f"{best['generate', 0] / options.tokens * 1e3:.1f} ms a token by generate; equal texts {equal} of "
            f"{options.prompts}; a text of {options.tokens} tokens: {rounds:.1f} rounds, {alone:.1f} without a guess that "
            f"was built on, {ran:.1f} tokens run, {tokens:.1f} said",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--text", type=Path, required=True, help="prompts are taken from its second half")
    parser.add_argument("--exit", type=int, default=1, help="after which loop the model is left to guess")
    parser.add_argument("--ideal", action="store_true")
    parser.add_argument("--sample", action="store_true")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    main(parser.parse_args())
