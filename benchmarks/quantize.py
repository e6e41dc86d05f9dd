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
from common import add_texts, texts_of
from rich.console import Console
from rich.table import Table

from rrtc.export.formats import FORMATS
from rrtc.export.quantize import quantize
from rrtc.io.folder import copy_companions
from rrtc.io.weights import Weights
from rrtc.storage import BITS
from rrtc.units import size

SHARD = 4_000_000_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what 'rrtc init' or 'rrtc uptrain' wrote")
    parser.add_argument("--dense", required=True, type=Path, help="the folder of the dense model")
    add_texts(parser, 4096)
    args = parser.parse_args()
    calibration, scored = texts_of(parser, args)

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


def write_bfloat16(source: Path, folder: Path) -> None:
    """The dense model in `source` in `folder`, in bfloat16."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
    copy_companions(source, folder)


if __name__ == "__main__":
    main()
