"""The loss of one model on the texts of a recipe, for benchmarks/init.py, which runs it as a process of its own:

    python benchmarks/score.py RECIPE.yaml FOLDER RESULT.json

FOLDER holds a dense or a compressed model. All are scored on the same tokens: those that the tokenizer of the recipe's
model makes of the first eval.tokens tokens of each text of eval.text, in windows of eval.context.
"""

import argparse
from pathlib import Path

import torch

from rrtc.console import write_json
from rrtc.io.source import find_model, load_for_scoring, load_tokenizer, read_config
from rrtc.model import RrtConfig
from rrtc.recipe.schema import Recipe, load_recipe
from rrtc.scoring import score
from rrtc.stock.architecture import read_architecture, read_plan
from rrtc.text.windows import longest_context, scoring_texts


def scores(recipe: Recipe, folder: Path) -> dict:
    """`losses` in nats a token by text, and `params_non_embedding`; `tokens` scored in all, and `threads` used."""
    dense = find_model(recipe.model)
    context = longest_context(dense.config(), recipe.eval.context)
    vocabulary = dense.config().get_text_config().vocab_size
    texts = scoring_texts(recipe, load_tokenizer(dense.folder), vocabulary, context, recipe.eval.tokens)
    config = read_config(folder)
    counted = read_plan(config) if isinstance(config, RrtConfig) else read_architecture(config)
    model = load_for_scoring(folder)
    found = {name: score(model, windows) for name, windows in texts.items()}
    return {
        "params_non_embedding": counted.non_embedding,
        "losses": {name: one.loss for name, one in found.items()},
        "tokens": sum(one.tokens for one in found.values()),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="The loss of a model on the texts of a recipe.")
    parser.add_argument("recipe", help="with model, eval.text, eval.tokens and eval.context")
    parser.add_argument("folder", type=Path, help="the model")
    parser.add_argument("result", help="JSON file to write")
    arguments = parser.parse_args()
    write_json(scores(load_recipe(arguments.recipe), arguments.folder), arguments.result)
