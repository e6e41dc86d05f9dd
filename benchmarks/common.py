"""What benchmarks share: results that are kept as they come, uptrainings that go on where they were left, and texts."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rrtc.io.folder import partial_of
from rrtc.io.source import load_tokenizer, read_config
from rrtc.recipe.export import ExportRecipe
from rrtc.recipe.schema import Recipe
from rrtc.recipe.settings import parse_settings, with_settings
from rrtc.text.calibration import calibration_windows
from rrtc.text.sources import beginning
from rrtc.text.windows import Windows, pack
from rrtc.units import parse_count
from rrtc.uptrain.checkpoints import whole_checkpoints
from rrtc.uptrain.stage import CHECKPOINTS, uptrain

CONTEXT = 512  # tokens in a window of text to calibrate and to score on


class Results:
    """What was measured, a line each in results.jsonl of the folder `work`, which is made."""

    def __init__(self, work: Path):
        work.mkdir(parents=True, exist_ok=True)
        self.file = work / "results.jsonl"
        lines = self.file.read_text(encoding="utf8").splitlines() if self.file.exists() else []
        self.rows: list[dict] = [json.loads(line) for line in lines]

    def find(self, key: dict) -> dict | None:
        """The line that has all of `key`."""
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def measured(self, key: dict, measure: Callable[..., dict], *given: Any) -> dict:
        """The same line; where there is none, measure(*given) makes the rest of it, and it is written and printed."""
        if (found := self.find(key)) is None:
            found = key | measure(*given)
            self.rows.append(found)
            with open(self.file, "a", encoding="utf8") as lines:
                lines.write(json.dumps(found) + "\n")
            print(found, flush=True)
        return found


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """--dtype, of the weights and of the arithmetic: a processor without AMX is slow in bfloat16."""
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])


def add_runs(parser: argparse.ArgumentParser) -> None:
    """The arguments of benchmarks that uptrain one start in several ways."""
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=parse_count, default=200_000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of uptrain, for all runs")


def recipe_of_run(asked: argparse.Namespace, values: dict) -> Recipe:
    """The recipe of a run with these `values` of uptrain, and those that are asked for."""
    recipe = Recipe.model_validate({"uptrain": {"data": asked.data, "context": asked.context} | values})
    return with_settings(recipe, parse_settings(f"uptrain.{one}" for one in asked.set), "--set")


def place_of(work: Path, name: str) -> Path:
    """The folder in `work` of the run that is called so."""
    return work / "".join(letter if letter.isalnum() or letter in "-." else "_" for letter in name)


def run(folder: Path, target: Path, recipe: Recipe) -> None:
    """Uptrains `folder` into `target`, if it is not there. It goes on where it was left."""
    if not target.exists():
        left = bool(whole_checkpoints(partial_of(target) / CHECKPOINTS))
        uptrain(str(folder), str(target), recipe, resume=left)


def add_texts(parser: argparse.ArgumentParser, score_tokens: int) -> None:
    """The arguments of benchmarks that calibrate on texts and score on others."""
    parser.add_argument("--calibrate-on", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--calibrate-tokens", type=int, default=16_384)
    parser.add_argument("--score-on", required=True, nargs="+", metavar="TEXT")
    parser.add_argument("--score-tokens", type=int, default=score_tokens, help="of each text")
    parser.add_argument("--work", required=True, type=Path)


def texts_of(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> tuple[torch.Tensor, Windows]:
    """(ids to calibrate on, (windows, CONTEXT); the first tokens of each text to score on), for the model `dense`."""
    if set(asked.score_on) & set(asked.calibrate_on):
        parser.error("a text to score on is also calibrated on")
    tokenizer = load_tokenizer(asked.dense)
    vocabulary, tokens = read_config(asked.dense).get_text_config().vocab_size, asked.score_tokens
    recipe = ExportRecipe(calibrate_on=asked.calibrate_on, calibrate_tokens=asked.calibrate_tokens)
    texts = [
        pack(beginning(source, "text", tokenizer, tokens), tokenizer, vocabulary, CONTEXT, tokens)
        for source in asked.score_on
    ]
    scored = Windows(torch.cat([t.ids for t in texts]), sum(t.bytes_per_token for t in texts) / len(texts))
    return calibration_windows(recipe, tokenizer, vocabulary, CONTEXT), scored
