"""What a slot stores: from the tensors of its dense layers to those of its shared matrices and visits.

`paper_slot` ties as the paper does (tie.py), `joint_slot` by what the loss feels (joint.py), with the forms and widths
that the plan chose. Both yield (name within the slot, float32 tensor).
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from rrtc.architecture import Matrix
from rrtc.init.lineup import Lineup, line_up
from rrtc.io.recursive import own_name, shared_name
from rrtc.plan import Plan, Visit
from rrtc.recipe.init import InitRecipe
from rrtc.tying.joint import joint
from rrtc.tying.neurons import Neurons, narrowed, reordered, reordered_seen
from rrtc.tying.tie import Tied, tie
from rrtc.tying.whiten import Seen

Layers = dict[int, dict[str, Tensor]]  # the tensors of layers by their paths, norms folded, matrices (outputs, inputs)
Named = Iterator[tuple[str, Tensor]]


def paper_slot(
    plan: Plan, visits: list[Visit], layers: Layers, sources: list[int], recipe: InitRecipe, dtype: torch.dtype,
    energies: dict[str, dict[int, tuple[float, float]]],
) -> Named:  # fmt: skip
    """A slot tied as in the paper. sources: the layers whose mean W' is. dtype: the format that will be stored.
    `energies` gets for each matrix, by layer, (energy the factors restored, energy that tying lost)."""
    for matrix in plan.matrices(visits[0]):
        name = f"{matrix.name}.weight"
        found: Tied = tie(
            [layers[visit.layer][name] for visit in visits],
            [layers[number][name] for number in sources],
            [visit.ranks[matrix.name] for visit in visits],
            recipe.lora_init,
            dtype,
        )
        yield shared_name(name), found.shared
        for visit, factors in zip(visits, found.factors, strict=True):
            if factors is not None:
                yield from _factors(visit, matrix.name, factors)
        if len(visits) > 1:
            found_of = zip(visits, found.restored, found.lost, strict=True)
            energies[matrix.name] = {visit.layer: (restored, lost) for visit, restored, lost in found_of}
    yield from _vectors(plan, visits, layers, sources)


def joint_slot(
    plan: Plan, visits: list[Visit], layers: Layers, seen: dict[int, Mapping[str, Seen]], neurons: list[Neurons],
    lineups: Iterable[Lineup] = (),
) -> Named:  # fmt: skip
    """A slot whose shared matrices and factors are chosen together. seen: for each layer how its matrices are seen, of
    which one matrix, or those of one FFN, are asked for at a time. lineups: of FFNs, as far as they are known already.
    The FFNs' matrices are taken out of `layers`."""
    matrices = {matrix.name: matrix for matrix in plan.matrices(visits[0])}
    inside = {name for inner in neurons for name in inner.matrices}

    def take(names: Iterable[str]) -> dict[int, dict[str, Seen]]:
        found = {v.layer: {name: seen[v.layer][name] for name in names} for v in visits}
        for layer in found:
            for name in names:
                del layers[layer][f"{name}.weight"]
        return found

    for name in matrices:
        if name not in inside:
            yield from _joint_matrix(visits, matrices[name], {n: one.pop(name) for n, one in take([name]).items()})
    for inner in neurons:
        ffns = take(inner.matrices)
        known = {one.layers: one for one in lineups if one.reader == inner.reader}
        _line_up(plan, visits, layers, ffns, inner, known)
        for name in inner.matrices:
            yield from _joint_matrix(visits, matrices[name], {n: ffn.pop(name) for n, ffn in ffns.items()})
    yield from _vectors(plan, visits, layers, [visit.layer for visit in visits])


def _joint_matrix(visits: list[Visit], matrix: Matrix, seen: dict[int, Seen]) -> Named:
    """One matrix of a slot: W' where visits tie it, and what each visit has of its own. seen: by layer."""
    tied = [visit for visit in visits if visit.form(matrix) == "tied"]
    if len(tied) == 1:  # at rank 0, the layer's own
        yield shared_name(f"{matrix.name}.weight"), seen[tied[0].layer].weight
    elif tied:
        rank = tied[0].ranks[matrix.name]
        found = joint([seen[visit.layer] for visit in tied], rank)
        yield shared_name(f"{matrix.name}.weight"), found.shared
        for visit, factors in zip(tied, found.factors, strict=True):
            if rank:
                yield from _factors(visit, matrix.name, factors)
    for visit in visits:
        rank, one = visit.ranks[matrix.name], seen[visit.layer]
        if visit.form(matrix) == "own":
            yield own_name(visit, f"{matrix.name}.weight"), one.weight
        elif visit.form(matrix) == "low_rank":
            yield from _factors(visit, matrix.name, one.spectrum(rank).factors(slice(0, rank)))


def _line_up(
    plan: Plan, visits: list[Visit], layers: Layers, ffns: dict[int, dict[str, Seen]], inner: Neurons,
    known: dict[tuple[int, ...], Lineup],
) -> None:  # fmt: skip
    """Puts the neurons of tied layers in one order and takes out those that the plan leaves out, in place. ffns: for
    each layer how the matrices of `inner` are seen. Of `layers`, the biases are concerned. known: by their layers."""
    reader = next(m for m in plan.matrices(visits[0]) if m.name == inner.reader)
    matrices = [m for m in plan.matrices(visits[0]) if m.name in inner.matrices]
    tied = tuple(v.layer for v in visits if any(v.form(m) == "tied" for m in matrices))
    width_of = {visit.layer: visit.shape(reader)[0] for visit in visits}
    for group in [tied, *((visit.layer,) for visit in visits if visit.layer not in tied)]:
        leave = inner.width - width_of[group[0]] if group else 0
        if not leave and len(group) < 2:
            continue
        found = known.get(group)
        if found is None or leave not in found.gone.removed:
            found = line_up(group, [ffns[layer] for layer in group], inner, removes=leave > 0)
        for layer, (index, signs) in zip(group[1:], found.orders, strict=True):
            for name, one in ffns[layer].items():
                ffns[layer][name] = reordered_seen(name, one, inner, index, signs)
            layers[layer] |= reordered(_vectors_of(layers[layer]), inner, index, signs)
        if not leave:
            continue
        kept = found.gone.kept(found.gone.removed.index(leave))
        for layer in group:
            layers[layer] |= reordered(_vectors_of(layers[layer]), inner, kept)
            for name, one in ffns[layer].items():
                ffns[layer][name] = narrowed(name, one, inner, kept)


def _vectors_of(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in layer.items() if tensor.dim() == 1}


def _factors(visit: Visit, matrix: str, factors: tuple[Tensor, Tensor]) -> Named:
    for letter, factor in zip("BA", factors, strict=True):
        yield own_name(visit, f"{matrix}.{letter}"), factor


def _vectors(plan: Plan, visits: list[Visit], layers: Layers, sources: list[int]) -> Named:
    """Norms and biases: for each visit its layer's own, or for all visits the mean of the source layers'. The bias of a
    matrix that a visit does not share is the visit's own in any case."""
    matrices = {m.name: m for m in plan.matrices(visits[0])}
    for name in layers[visits[0].layer]:
        owner, _, kind = name.rpartition(".")
        if owner in matrices and kind == "weight":
            continue
        untied = [visit for visit in visits if owner in matrices and visit.form(matrices[owner]) != "tied"]
        if plan.norms == "shared":
            sharing = [number for number in sources if number not in {visit.layer for visit in untied}]
            if sharing:
                yield shared_name(name), torch.stack([layers[number][name] for number in sharing]).mean(0)
        for visit in untied if plan.norms == "shared" else visits:
            yield own_name(visit, name), layers[visit.layer][name]


def source_layers(plan: Plan, shared_init: str) -> list[list[int]]:
    """For each slot, the layers whose mean its shared weights start from (paper §2.2 and appendix F).

    average: all layers of the slot. lower, upper: the first or last of them. stepwise: slot k of K takes layer
    round(k (n - 1) / (K - 1)) of the n tied ones, so that the first and the last tied layer are among the sources;
    that layer can be one that another slot stands for.
    """
    tied_slots = [k for k, visits in enumerate(plan.slots) if len(visits) > 1]
    tied_layers = [visit.layer for visit in plan.visits if visit.slot in set(tied_slots)]
    step = (len(tied_layers) - 1) / max(len(tied_slots) - 1, 1)
    sources = []
    for k, visits in enumerate(plan.slots):
        layers = [visit.layer for visit in visits]
        if len(layers) == 1 or shared_init == "average":
            sources.append(layers)
        elif shared_init == "stepwise":
            sources.append([tied_layers[round(tied_slots.index(k) * step)]])
        else:
            sources.append([layers[0] if shared_init == "lower" else layers[-1]])
    return sources
