"""Activation-whitened SVD with nothing tied (rrtc/baselines.py): the baseline that a budget is to beat.
benchmarks/init.py runs it as a process of its own:

    python benchmarks/whitened_svd.py RECIPE.yaml FOLDER

The calibration text is read as `rrtc init` reads it, and what is written is an ordinary rrtc folder: it loads, trains
and exports like any other.
"""

import argparse
from pathlib import Path

from rrtc.init.baselines import low_rank_plan, write_low_rank
from rrtc.io.dense import DenseModel
from rrtc.io.folder import whole_folder
from rrtc.io.provenance import write_provenance
from rrtc.io.source import find_model, load_tokenizer
from rrtc.recipe.schema import load_recipe
from rrtc.stock.architecture import read_architecture
from rrtc.text.calibration import calibration_windows
from rrtc.text.windows import longest_context


def main(recipe_file: str, output: Path) -> None:
    recipe = load_recipe(recipe_file)
    source = find_model(recipe.model)
    dense, architecture = DenseModel(source), read_architecture(source.config())
    context = longest_context(source.config(), recipe.eval.context)
    vocabulary = source.config().get_text_config().vocab_size
    text = calibration_windows(recipe.init, load_tokenizer(source.folder), vocabulary, context)
    plan = low_rank_plan(architecture, int(recipe.init.budget * architecture.non_embedding))
    with whole_folder(output) as folder:
        write_low_rank(dense, plan, text, dense.weights.dtype, folder)
        measured = {"params_total": plan.parameters, "params_non_embedding": plan.non_embedding}
        kept = {"model": source.uri, "init": recipe.init.resolved()}
        write_provenance(folder, "init", source.provenance(output), kept, {"init": measured}, [])
    print(f"{plan.non_embedding / architecture.non_embedding:.4f} of the parameters without embeddings")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Whitened SVD of every matrix, at the budget of a recipe.")
    parser.add_argument("recipe", help="with model, init.budget, init.calibrate_on and init.calibrate_tokens")
    parser.add_argument("output", type=Path, help="new folder to write")
    arguments = parser.parse_args()
    main(arguments.recipe, arguments.output)
