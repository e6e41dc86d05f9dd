"""What other methods make of a dense model at the same size, nothing trained: so that a user sees what tying buys.

    whitened SVD     every matrix of low rank, chosen by its inputs on the calibration text: SVD-LLM's first step
                     (arXiv 2403.07378); every matrix keeps the same share of its own size
    layers dropped   whole layers left out, those of the least block influence: ShortGPT (arXiv 2403.03853)

Both run the dense model layer by layer and read its tensors one at a time, as `rrtc init` does.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from rrtc.checkpoint import ShardWriter, Weights, copy_companions, read_provenance, write_provenance
from rrtc.console import progress
from rrtc.errors import RrtcError
from rrtc.init.calibrate import calibration_windows
from rrtc.init.dense import DenseModel
from rrtc.init.moments import DiagonalMoment, Moment
from rrtc.init.slots import joint_slot
from rrtc.init.streamed import StreamedModel
from rrtc.init.whiten import Seen
from rrtc.measure import device
from rrtc.model import RrtConfig
from rrtc.model.modeling_rrt import find_layers
from rrtc.model.skeleton import read_architecture, read_plan, stock_model
from rrtc.plan import Architecture, Plan, Visit
from rrtc.recipe import BUILT_IN_TEXT, OWN_TEXT, InitRecipe, parse_size
from rrtc.source import Source, find_base, load_tokenizer, read_config
from rrtc.text import longest_context

CONTEXT = 512  # tokens in a window of calibration text


def make_baselines(folder: Path, work: Path, against: str | None = None) -> dict[str, Path]:
    """Makes both in `work`, at the number of parameters without embeddings that the model in the rrtc folder `folder`
    has, calibrated on the text that its own init used; returns their folders by what they are.

    against: the dense model, where it has moved. Raises RrtcError where not one layer would be left.
    """
    config, source = read_config(folder), find_base(folder, against, "--against")
    counted = read_plan(config) if isinstance(config, RrtConfig) else read_architecture(config)
    recipe = InitRecipe.model_validate(read_provenance(folder)["recipe"].get("init") or {})
    texts = [text for text in recipe.calibrate_on if text != OWN_TEXT] or [BUILT_IN_TEXT]
    recipe = recipe.model_copy(update={"calibrate_on": texts})
    context = longest_context(source.config(), CONTEXT)
    text = calibration_windows(recipe, load_tokenizer(source.folder), context)
    dtype = getattr(torch, Weights(folder).dtype)
    low_rank, dropped = work / "whitened-svd", work / "layers-dropped"
    whitened_svd(source, counted.non_embedding, text, recipe, low_rank, dtype)
    left = drop_layers(source, counted.non_embedding, text, recipe, dropped, dtype)
    return {"whitened SVD, nothing tied": low_rank, f"layers dropped, {left} left": dropped}


def whitened_svd(
    source: Source, target: int, text: Tensor, recipe: InitRecipe, folder: Path, dtype: torch.dtype
) -> Plan:
    """Writes an ordinary rrtc folder, without tied layers, into `folder`; returns its plan. target: parameters
    without embeddings, at most. text: token ids (windows, context)."""
    dense = DenseModel(source)
    plan = plan_at(read_architecture(dense.config), target)
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, parse_size(recipe.max_shard_size))
    with progress("Whitened SVD", dense.depth) as advance:
        for visit, (tensors, seen) in zip(plan.visits, layers_seen(dense, text), strict=True):
            for name, tensor in joint_slot(plan, [visit], {visit.layer: tensors}, {visit.layer: seen}, []):
                writer.add(f"{dense.parent}.slots.{visit.slot}.{name}", tensor.to(dtype).cpu())
            advance()
    for name in dense.others():
        writer.add_blocks(name, dense.blocks(name, dtype))
    writer.finish()
    made = RrtConfig(base_config=dense.config, visits=[asdict(visit) for visit in plan.visits], norms=plan.norms)
    made.architectures, made.dtype = ["RrtForCausalLM"], dtype
    made.save_pretrained(folder)
    copy_companions(source.folder, folder)
    measured = {"params_total": plan.parameters, "params_non_embedding": plan.non_embedding}
    kept = {"model": source.uri, "init": recipe.resolved()}
    write_provenance(folder, "init", source.provenance(folder), kept, {"init": measured}, [])
    return plan


def plan_at(architecture: Architecture, target: int) -> Plan:
    """The plan in which every matrix is of low rank and keeps the same share of its size, the largest share with which
    there are at most `target` parameters without embeddings."""
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


def drop_layers(source: Source, target: int, text: Tensor, recipe: InitRecipe, folder: Path, dtype: torch.dtype) -> int:
    """Writes a stock model with the layers of most influence, as many as `target` parameters without embeddings allow,
    into `folder`; returns how many. text: token ids (windows, context). Raises RrtcError where that is none."""
    dense = DenseModel(source)
    left = layers_left(read_architecture(dense.config), block_influence(dense, text), target)
    config = with_layers(dense.config, left)
    stock = stock_model(config)
    parent, name = find_layers(stock, len(left))
    prefix = f"{next(path for path, module in stock.named_modules() if module is parent)}.{name}."
    folder.mkdir(parents=True, exist_ok=True)
    writer = ShardWriter(folder, parse_size(recipe.max_shard_size))
    others = set(dense.others())
    for place, _ in stock.named_parameters():
        if place.startswith(prefix):
            number, path = place.removeprefix(prefix).split(".", 1)
            writer.add(place, dense.raw(f"{prefix}{left[int(number)]}.{path}").to(dtype))
        elif place in others:
            writer.add_blocks(place, dense.blocks(place, dtype))
    writer.finish()
    config.architectures, config.dtype = [type(stock).__name__], dtype
    config.save_pretrained(folder)
    copy_companions(source.folder, folder)
    return len(left)


@torch.no_grad()
def block_influence(dense: DenseModel, ids: Tensor) -> list[float]:
    """Of each layer: 1 − cos(x, y) of what enters and what leaves it, mean over the tokens of `ids` (windows, context);
    ShortGPT, equation 1."""
    model, found = StreamedModel(dense.config, dense.raw, device()), []
    states = model.embed(ids)
    with progress("Block influence", dense.depth) as advance:
        for number in range(dense.depth):
            before = states.clone()
            model.run_layer(number, dense.layer(number, device()), states)
            found.append(1 - torch.cosine_similarity(before, states, dim=-1).mean().item())
            advance()
    return found


def layers_left(architecture: Architecture, influence: list[float], target: int) -> list[int]:
    """The layers that stay, in order: those of least influence go, until at most `target` parameters without embeddings
    are left. Raises RrtcError where none would."""
    left, size = list(range(len(influence))), architecture.non_embedding
    for number in sorted(left, key=influence.__getitem__):
        if size <= target:
            return left
        layer = architecture.layers[number]
        size -= sum(m.size + m.bias * m.outputs for m in layer.matrices) + sum(n for _, n in layer.vectors)
        left = [other for other in left if other != number]
    if not left:
        raise RrtcError(f"Not one layer fits into {target:,} parameters, so there is no model with layers dropped.")
    return left


def with_layers(config, left: list[int]):
    """The transformers config of a model with these layers alone. Whatever the config lists layer by layer (which ones
    attend to a window, say) is cut down alike."""
    text = config.get_text_config()
    depth, made = text.num_hidden_layers, copy.deepcopy(config)
    inner = made.get_text_config()
    for name, value in text.to_dict().items():
        if isinstance(value, list) and len(value) == depth:
            setattr(inner, name, [value[number] for number in left])
    inner.num_hidden_layers = len(left)
    return made
