"""Activation-whitened SVD with nothing tied, as SVD-LLM's first step does it (arXiv 2403.07378): the baseline that a
budget is to beat. benchmarks/init.py runs it as a process of its own:

    python benchmarks/whitened_svd.py RECIPE.yaml FOLDER

Every matrix of every layer becomes B·A, the best approximation of its outputs on the recipe's calibration text, and
every matrix gets the same share of its own size. Norms, biases and embeddings stay. The calibration text is read as
`rrtc init` reads it, and what is written is an ordinary rrtc folder: it loads, trains and exports like any other.
"""

import argparse
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from rrtc.checkpoint import ShardWriter, copy_companions, whole_folder, write_provenance
from rrtc.init.calibrate import calibration_windows
from rrtc.init.dense import DenseModel
from rrtc.init.moments import DiagonalMoment, Moment
from rrtc.init.slots import joint_slot
from rrtc.init.streamed import StreamedModel
from rrtc.init.whiten import Seen
from rrtc.measure import device
from rrtc.model import RrtConfig
from rrtc.model.skeleton import read_architecture
from rrtc.plan import Architecture, Plan, Visit
from rrtc.recipe import Recipe, load_recipe, parse_size
from rrtc.source import find_model, load_tokenizer
from rrtc.text import longest_context


def plan_at(architecture: Architecture, budget: float) -> Plan:
    """The plan in which every matrix is of low rank and keeps the same share of its size, the largest share with which
    the parameters without embeddings are at most `budget` of the dense model's."""
    target = budget * architecture.non_embedding
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        low, high = (share, high) if _plan_with(architecture, share).non_embedding <= target else (low, share)
    return _plan_with(architecture, low)


def _plan_with(architecture: Architecture, share: float) -> Plan:
    visits = []
    for number, layer in enumerate(architecture.layers):
        ranks = {m.name: max(1, int(share * m.size / (m.inputs + m.outputs))) for m in layer.matrices}
        visits.append(Visit(number, number, 0, ranks, dict.fromkeys(ranks, "low_rank")))
    return Plan(architecture, tuple(visits), "per_visit")


def layers_seen(dense: DenseModel, ids: Tensor) -> Iterator[tuple[dict[str, Tensor], dict[str, Seen]]]:
    """For each layer its tensors, and its matrices as their inputs on `ids` (windows, context) weigh them. Errors of
    all outputs count alike: the gradient metric is the identity."""
    model = StreamedModel(dense.config, dense.raw, device())
    states = model.embed(ids)
    for number in range(dense.depth):
        tensors, sums = dense.layer(number, device()), {}

        def gather(names, inputs, sums=sums):
            product = inputs.T @ inputs
            sums[names] = sums[names].add_(product) if names in sums else product

        model.run_layer(number, tensors, states, gather)
        seen = {}
        for names, total in sums.items():
            moment = Moment.estimated(total / ids.numel(), ids.numel())
            for name in names:
                weight = tensors[f"{name}.weight"]
                seen[name] = Seen(weight, moment, DiagonalMoment(torch.ones(len(weight), device=weight.device)))
        yield tensors, seen


def whitened_svd(recipe: Recipe, output: Path) -> Plan:
    """Compresses the recipe's model to its budget into the new folder `output`; returns the plan."""
    source = find_model(recipe.model)
    config, dense = source.config(), DenseModel(source)
    plan = plan_at(read_architecture(config), recipe.init.budget)
    context = longest_context(config, recipe.eval.context)
    text = calibration_windows(recipe.init, load_tokenizer(source.folder), context)
    dtype = getattr(torch, dense.weights.dtype)
    with whole_folder(output) as folder:
        writer = ShardWriter(folder, parse_size(recipe.init.max_shard_size))
        for visit, (tensors, seen) in zip(plan.visits, layers_seen(dense, text), strict=True):
            for name, tensor in joint_slot(plan, [visit], {visit.layer: tensors}, {visit.layer: seen}, []):
                writer.add(f"{dense.parent}.slots.{visit.slot}.{name}", tensor.to(dtype).cpu())
        for name in dense.others():
            writer.add_blocks(name, dense.blocks(name, dtype))
        writer.finish()
        made = RrtConfig(base_config=config, visits=[asdict(visit) for visit in plan.visits], norms=plan.norms)
        made.architectures, made.dtype = ["RrtForCausalLM"], dense.weights.dtype
        made.save_pretrained(folder)
        copy_companions(source.folder, folder)
        measured = {"params_total": plan.parameters, "params_non_embedding": plan.non_embedding}
        kept = {"model": source.uri, "init": recipe.init.resolved()}
        write_provenance(folder, "init", source.provenance(output), kept, {"init": measured}, [])
    return plan


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Whitened SVD of every matrix, at the budget of a recipe.")
    parser.add_argument("recipe", help="with model, init.budget, init.calibrate_on and init.calibrate_tokens")
    parser.add_argument("output", type=Path, help="new folder to write")
    arguments = parser.parse_args()
    made = whitened_svd(load_recipe(arguments.recipe), arguments.output)
    print(f"{made.non_embedding / made.architecture.non_embedding:.4f} of the parameters without embeddings")
