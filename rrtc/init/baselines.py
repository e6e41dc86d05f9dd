"""Baselines of the same size as a compressed model, so that one sees what tying buys. Neither is trained.

    whitened SVD    nothing tied: every matrix of every layer becomes B·A, the best approximation of its outputs on the
                    calibration text (the first step of SVD-LLM, arXiv 2403.07378), at the same share of its own size
    layers dropped  layers left out whole, those first that change the hidden states least (block influence; ShortGPT,
                    arXiv 2403.03853, equation 1), until the others fit

Both are made in one pass of the dense model over calibration text, of which one layer at a time is in memory.
"""

import copy
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from rrtc.architecture import Architecture
from rrtc.console import progress
from rrtc.errors import RrtcError
from rrtc.init.slots import joint_slot
from rrtc.io.dense import DenseModel
from rrtc.io.folder import check_space, copy_companions, whole_folder
from rrtc.io.provenance import read_provenance
from rrtc.io.recursive import in_slot, write_recursive
from rrtc.io.shard_writer import ShardWriter
from rrtc.io.source import Source, find_base, load_tokenizer, read_config
from rrtc.io.trust import text_of_folder
from rrtc.io.weights import Weights
from rrtc.machine import device
from rrtc.model import RrtConfig
from rrtc.plan import Plan, Visit
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import checked
from rrtc.stock.architecture import decoder_layers, layers_path, read_architecture, read_plan, stock_model
from rrtc.stock.streamed import TOKENS_AT_ONCE, StreamedModel
from rrtc.text.calibration import calibration_windows, own_windows
from rrtc.text.own import own_text
from rrtc.text.windows import longest_context
from rrtc.tying.moments import DiagonalMoment, Gathering, Moment
from rrtc.tying.whiten import Seen
from rrtc.units import parse_size

CALIBRATION = (
    "calibrate_on",
    "calibrate_tokens",
    "calibrate_context",
    "text_field",
    "seed",
)  # what of an init recipe says on which text


def make_baselines(
    folder: Path, work: Path, against: str | None = None, by_user: Collection[str] = ()
) -> tuple[dict[str, Path], list[dict[str, str]]]:
    """Makes the baselines for the compressed model in the rrtc folder `folder`. Returns their model folders, new ones
    in `work`, by name; and {task, why} of one that cannot be made.

    They have at most as many parameters without embeddings, in the same dtype, and learn from the text that
    `folder` was calibrated on, in the same windows; where it was on none, from the text that is the default.
    against: the dense model, by default the one that `folder` was made from. by_user: text that the user has named, and
    not the folder alone. The same folder gives the same baselines on the same machine. Raises RrtcError, before any
    work, for a folder as large as the dense model or too small, and where the dense model or the text is gone.
    """
    folder, work = Path(folder), Path(work)
    source = find_base(folder, against, "--against")
    dense, dtype, size = DenseModel(source), Weights(folder).dtype, _size_of(folder)
    architecture = read_architecture(dense.config)
    if size >= architecture.non_embedding:
        raise RrtcError(
            f"{folder} has {size:,} parameters without embeddings and the dense model {architecture.non_embedding:,}, "
            "so there is nothing that a baseline of its size would have to leave out."
        )
    plan = low_rank_plan(architecture, size)
    # Each waits tensor by tensor before it is put together.
    check_space(work, 2 * (2 * plan.parameters * getattr(torch, dtype).itemsize))
    ids = calibration_text(folder, source, by_user)
    made, missing = {"whitened SVD, nothing tied": work / "whitened-svd"}, []
    with whole_folder(work / "whitened-svd") as partial:
        influences = write_low_rank(dense, plan, ids, dtype, partial)
    try:
        kept = layers_kept(architecture, influences, size)
        with whole_folder(work / "layers-dropped") as partial:
            write_shorter(dense, kept, dtype, partial)
        made[f"layers dropped, {len(kept)} left"] = work / "layers-dropped"
    except RrtcError as error:
        missing.append({"task": "layers dropped", "why": error.sentence})
    return made, missing


def _size_of(folder: Path) -> int:
    """Parameters without embeddings of the compressed model in `folder`. Those of a dense form are as many as the dense
    model's, so what counts is the recursive model that it was multiplied out from."""
    config = read_config(folder)
    if isinstance(config, RrtConfig):
        return read_plan(config).non_embedding
    try:
        return int(read_provenance(folder)["measured"]["init"]["params_non_embedding"])
    except (LookupError, TypeError, ValueError) as error:
        raise RrtcError(f"{folder} does not say how large the model was that init made.") from error


def calibration_text(folder: Path, source: Source, by_user: Collection[str]) -> Tensor:
    """The text that `folder` was calibrated on: ids (windows, context), int64."""
    asked, tokenizer = read_provenance(folder)["recipe"].get("init") or {}, load_tokenizer(source.folder)
    said = {name: asked[name] for name in CALIBRATION if name in asked}  # a folder of rrtc 0.1 lacks some
    recipe = checked(InitRecipe, said if asked.get("shared_init") == "joint" else {}, f"the rrtc.yaml of {folder}")
    context = longest_context(source.config(), recipe.calibrate_context)
    try:
        text_of_folder(folder, recipe.calibrate_on, by_user)
        ids = calibration_windows(recipe, tokenizer, source.config().get_text_config().vocab_size, context)
    except RrtcError as error:
        raise RrtcError(
            error.sentence, f"The baselines need the text that {folder} was calibrated on: a recipe can name it."
        ) from error
    own = own_windows(recipe, context)
    if own:
        with progress("Writing own text", own * (context - 1)) as advance:
            ids = torch.cat([ids, *own_text(source.folder, tokenizer, own, context, recipe.seed, advance)])
    return ids


def low_rank_plan(architecture: Architecture, size: int) -> Plan:
    """The plan in which every matrix is of low rank and keeps the same share of its own size, the largest share with
    which there are at most `size` parameters without embeddings. Raises RrtcError where rank 1 is too large."""
    least = _plan_with(architecture, 0.0).non_embedding
    if least > size:
        raise RrtcError(
            f"A baseline of {size:,} parameters without embeddings cannot be made: with every matrix at rank 1 the "
            f"dense model still has {least:,}."
        )
    low, high = 0.0, 1.0
    for _ in range(30):
        share = (low + high) / 2
        low, high = (share, high) if _plan_with(architecture, share).non_embedding <= size else (low, share)
    return _plan_with(architecture, low)


def _plan_with(architecture: Architecture, share: float) -> Plan:
    visits = []
    for number, layer in enumerate(architecture.layers):
        ranks = {m.name: max(1, int(share * m.size / (m.inputs + m.outputs))) for m in layer.matrices}
        visits.append(Visit(number, number, 0, ranks, dict.fromkeys(ranks, "low_rank")))
    return Plan(architecture, tuple(visits), "per_visit")


def write_low_rank(dense: DenseModel, plan: Plan, ids: Tensor, dtype: str, folder: Path) -> list[float]:
    """Writes the model of `plan`, made by `low_rank_plan`, into `folder`, calibrated on `ids` (windows, context).
    Returns the influence of each layer of the dense model."""
    stored, influences = getattr(torch, dtype), []

    def slots(advance: Callable[[], None]) -> Iterator[tuple[str, Tensor]]:
        for visit, (tensors, seen, influence) in zip(plan.visits, _layers_seen(dense, ids), strict=True):
            for name, tensor in joint_slot(plan, [visit], {visit.layer: tensors}, {visit.layer: seen}, []):
                yield in_slot(dense.parent, visit.slot, name), tensor.to(stored).cpu()
            influences.append(influence)
            advance()

    with progress("Whitened SVD of every layer", dense.depth) as advance:
        write_recursive(folder, dense, plan, slots(advance), dtype, parse_size(InitRecipe().max_shard_size))
    return influences


def _layers_seen(dense: DenseModel, ids: Tensor) -> Iterator[tuple[dict[str, Tensor], dict[str, Seen], float]]:
    """For each layer its tensors; its matrices as their inputs on `ids` (windows, context) weigh them, while errors of
    all outputs count alike; and its influence: 1 - the mean over tokens of the cosine of what enters it and what leaves
    it."""
    model = StreamedModel(dense.config, dense.raw, device())
    states = model.embed(ids)
    for number in range(dense.depth):
        tensors, gatherings, cosines = dense.layer(number, device()), {}, 0.0

        def gather(names, inputs, gatherings=gatherings):
            gatherings.setdefault(names, Gathering(ids.numel())).add(inputs)

        for batch in states.split(max(1, TOKENS_AT_ONCE // ids.shape[1])):
            entering = batch.clone()
            model.run_layer(number, tensors, batch, gather)
            cosines += torch.cosine_similarity(entering, batch, dim=-1).double().sum().item()
        seen = {}
        for names, gathering in gatherings.items():
            moment = Moment.estimated(gathering.finish(), ids.numel())
            for name in names:
                weight = tensors[f"{name}.weight"]
                seen[name] = Seen(weight, moment, DiagonalMoment(torch.ones(len(weight), device=weight.device)))
        yield tensors, seen, 1 - cosines / ids.numel()


def layers_kept(architecture: Architecture, influences: list[float], size: int) -> list[int]:
    """The layers that are left, in their order, when those of least influence are gone until there are at most `size`
    parameters without embeddings. Raises RrtcError where none is left."""
    kept = list(range(len(influences)))
    for number in sorted(kept, key=influences.__getitem__):
        if _only(architecture, kept).non_embedding <= size:
            break
        kept.remove(number)
    if not kept:
        raise RrtcError(f"Not one layer of the dense model fits into {size:,} parameters without embeddings.")
    return kept


def _only(architecture: Architecture, kept: list[int]) -> Architecture:
    return replace(architecture, layers=tuple(architecture.layers[number] for number in kept))


def write_shorter(dense: DenseModel, kept: list[int], dtype: str, folder: Path) -> None:
    """Writes the layers `kept` of `dense` and all that lies outside its layers into `folder`, a stock model folder.
    Raises RrtcError where a layer would not be the same in its new place."""
    config = shorter_config(dense.config, kept)
    config.dtype = dtype
    config.save_pretrained(folder)
    if not _are_same(dense.config, folder, kept):
        raise RrtcError(
            f"What a layer of this '{config.model_type}' model is depends on its place or its neighbors, so layers "
            "cannot be dropped."
        )
    stored = getattr(torch, dtype)
    _, layers = layers_path(stock_model(dense.config))
    renamed = {name: name for name in dense.others()}
    for place, number in enumerate(kept):
        old, new = (f"{dense.parent}.{layers}.{n}" for n in (number, place))
        renamed |= {f"{old}.{path}": f"{new}.{path}" for path in dense.paths(number)}
    writer = ShardWriter(folder, parse_size(InitRecipe().max_shard_size))
    with progress("Writing the layers that are left", len(renamed)) as advance:
        for old, new in renamed.items():
            writer.add_blocks(new, dense.blocks(old, stored))
            advance()
    writer.finish()
    copy_companions(dense.weights.folder, folder)


def shorter_config(config: PreTrainedConfig, kept: list[int]) -> PreTrainedConfig:
    """The config of the same model with the layers `kept` alone. Whatever `config` lists layer by layer is cut down
    alike."""
    made = copy.deepcopy(config)
    text = made.get_text_config()
    for name, value in list(vars(text).items()):
        # Token ids are the one kind of list that can have this length by chance.
        if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers and not name.endswith("token_id"):
            setattr(text, name, [value[number] for number in kept])
    text.num_hidden_layers = len(kept)
    return made


def _are_same(config: PreTrainedConfig, folder: Path, kept: list[int]) -> bool:
    """Whether the layers of the model whose config is in `folder` are the layers `kept` of the model of `config`."""
    before = decoder_layers(stock_model(config))
    try:
        # As it is read, because some fields are worked out from others.
        after = decoder_layers(stock_model(read_config(folder)))
    except RrtcError:
        return False
    return all(_are_alike(before[number], number, after[place], place) for place, number in enumerate(kept))


def _are_alike(layer: nn.Module, number: int, other: nn.Module, place: int) -> bool:
    """Whether two decoder layers differ in nothing but their weights and what they know of their places in the model,
    `number` and `place`."""
    traits, others = _traits(layer), _traits(other)
    return traits.keys() == others.keys() and all(
        value == others[name] or ((value, others[name]) == (number, place) and type(value) is int)
        for name, value in traits.items()
    )


def _traits(layer: nn.Module) -> dict[str, object]:
    """What distinguishes a decoder layer without its weights: shapes, classes and plain attributes, by path."""
    found: dict[str, object] = {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
    for path, module in layer.named_modules():
        found[path or "its class"] = type(module)
        plain = {name: value for name, value in vars(module).items() if isinstance(value, int | float | str)}
        found |= {f"{path}.{name}".removeprefix("."): value for name, value in plain.items()}
    return found
