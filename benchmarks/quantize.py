"""What quantizing costs a recursive model beside its dense original, in one table.

    python benchmarks/quantize.py RRTC_FOLDER --dense FOLDER --calibrate-on TEXT... --score-on TEXT... --work DIR

Both models are written plain in bfloat16 and then quantized by the same code, the one of `rrtc export --quantize`, to 8
and to 4 bits, by the same calibration text; nothing else of them changes. Bits per byte are those of all texts to score
on together: of the plain model, with every weight rounded to its nearest number, and as rrtc writes it. The last column
is what the written model loses beside the plain one of its own row. DIR is made, and holds the quantized models.
"""

import argparse
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rrtc.export.formats import FORMATS
from rrtc.export.quantize import quantize
from rrtc.io.folder import copy_companions
from rrtc.io.source import load_tokenizer, read_config
from rrtc.io.weights import Weights
from rrtc.recipe.export import ExportRecipe
from rrtc.storage import BITS
from rrtc.text.calibration import calibration_windows
from rrtc.text.sources import beginning
from rrtc.text.windows import Windows, pack
from rrtc.units import size

CONTEXT = 512
SHARD = 4_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what 'rrtc init' or 'rrtc uptrain' wrote")
    parser.add_argument("--dense", required=True, type=Path, help="the folder of the dense model")
    parser.add_argument("--calibrate-on", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--score-on", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--score-tokens", type=int, default=4096, help="of each text")
    parser.add_argument("--work", required=True, type=Path)
    args = parser.parse_args()
    if set(args.score_on) & set(args.calibrate_on):
        parser.error("a text to score on is also calibrated on")
    tokenizer = load_tokenizer(args.dense)
    vocabulary = read_config(args.dense).get_text_config().vocab_size
    calibration = calibration_windows(ExportRecipe(calibrate_on=args.calibrate_on), tokenizer, vocabulary, CONTEXT)
    scored = scored_windows(args.score_on, tokenizer, vocabulary, args.score_tokens)

    table = Table("model", "size", "plain", "rounded to nearest", "as written", "size", "lost")
    for name in ("dense", "recursive"):
        for number, bits in BITS.items():
            folder = args.work / f"{name}-{number}"
            folder.mkdir(parents=True)
            if name == "dense":
                write_bfloat16(args.dense, folder)
            else:
                FORMATS[name].write(args.folder, folder, torch.bfloat16, SHARD)
            before = Weights(folder).bytes_on_disk
            found = quantize(folder, bits, calibration, scored, SHARD).bits_per_byte
            table.add_row(
                f"{name}, {number}", size(before), *(f"{found[key]:.4f}" for key in found),
                size(Weights(folder).bytes_on_disk), f"{found['calibrated'] - found['plain']:+.4f}",
            )  # fmt: skip
    Console(width=120).print(table)


def scored_windows(sources: list[str], tokenizer, vocabulary: int, tokens: int) -> Windows:
    """The first so many tokens of each text, all in one."""
    texts = []
    for source in sources:
        texts.append(pack(beginning(source, "text", tokenizer, tokens), tokenizer, vocabulary, CONTEXT, tokens))
    return Windows(torch.cat([t.ids for t in texts]), sum(t.bytes_per_token for t in texts) / len(texts))


def write_bfloat16(source: Path, folder: Path) -> None:
    """The dense model in `source` in `folder`, in bfloat16."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    copy_companions(source, folder)


if __name__ == "__main__":
    main()
