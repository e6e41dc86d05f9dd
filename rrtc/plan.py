"""The plan: which layer becomes which visit, in which form, and what that costs. Pure arithmetic, no torch.

    architecture (what the dense model is) + recipe (what is asked for)  ->  plan (visits)  ->  parameters, bytes, FLOPs

Init, model, accounting, export and reports all read the plan; none of them works it out again.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import ConfigDict, TypeAdapter

from rrtc.architecture import Architecture, Layer, Matrix
from rrtc.attention import SUM_BYTES, Attention, Linear, check_attention, check_numbers
from rrtc.errors import WrongUsage, nearest

FORMS = ("tied", "low_rank", "own")  # what a visit's matrix can be: see Visit
SAVINGS_CONTEXT = 8192
KV_CONTEXTS = (2048, 8192, 32768)  # the lengths, in tokens, at which people are told the size of the KV cache


@dataclass(frozen=True)
class Visit:
    """One use of a slot in one loop; it stands for exactly one dense layer. `ranks` has an entry for each matrix.

    forms: what a matrix is in this visit, by its name: "tied" (where it has no entry), the slot's W' + B·A; "low_rank",
    B·A alone; "own", a full matrix that no other visit uses, at rank 0. A slot holds W' where a visit of it is tied.
    shapes: (inputs, outputs) of the matrices that are smaller than the dense layer's, because neurons of the FFN were
    removed. It is the same for all tied visits of a slot.
    attention: None where the visit attends to what the stock layer does.
    gains: the tied matrices whose product the visit multiplies, output by output, by a gain of its own.
    exit: whether what the visit returns goes through a linear map to the final norm, where the model is left after it.
    """

    layer: int
    slot: int
    loop: int
    ranks: dict[str, int]
    forms: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, int]] = field(default_factory=dict)
    attention: Attention | None = None
    gains: tuple[str, ...] = ()
    exit: bool = False
    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")  # for read_visits

    def __post_init__(self):
        # A config.json has lists where the plan has tuples.
        object.__setattr__(self, "shapes", {name: tuple(shape) for name, shape in self.shapes.items()})

    def form(self, matrix: Matrix) -> str:
        return self.forms.get(matrix.name, "tied")

    def shape(self, matrix: Matrix) -> tuple[int, int]:
        """(inputs, outputs)."""
        return self.shapes.get(matrix.name, (matrix.inputs, matrix.outputs))

    def size(self, matrix: Matrix) -> int:
        """Parameters of the full matrix, W' or the visit's own; 0 where the visit has only factors."""
        return 0 if self.form(matrix) == "low_rank" else math.prod(self.shape(matrix))

    def factors(self, matrix: Matrix) -> int:
        """Parameters of B·A."""
        return self.ranks[matrix.name] * sum(self.shape(matrix))

    def fields(self) -> dict[str, Any]:
        """The visit as config.json has it: what attends to everything, or has no gains or no exit, does not say so."""
        attention = self.attention and {"attention": self.attention.fields()}
        found = asdict(self) | (attention or {})
        return {name: value for name, value in found.items() if not (value is None or value is False or value == ())}


def read_visits(values: Any) -> tuple[Visit, ...]:
    """The visits in a config.json. Raises ValueError where they are damaged, or absurd by themselves."""
    visits = TypeAdapter(tuple[Visit, ...]).validate_json(json.dumps(values))
    for visit in visits:
        if visit.attention is not None:
            try:
                check_numbers(visit.attention, f"of layer {visit.layer}")
            except WrongUsage as error:
                raise ValueError(error.sentence) from error
    return visits


def features_of(visits: Iterable[Visit]) -> set[str]:
    """What the visits have, or any of them, by the names in rrtc/features.py."""
    found: set[str] = set()
    for visit in visits:
        if visit.attention is not None:
            found |= {name for name, value in visit.attention.fields().items() if value}
            if visit.attention.owner is not None and visit.attention.owner.loop > visit.loop:
                found.add("later")
    return found


@dataclass(frozen=True)
class Plan:
    """All visits in the order they run, and the architecture they are about.

    Raises WrongUsage where layers of one slot differ, and for numbers, ranks, forms and shapes that no visit has.
    """

    architecture: Architecture
    visits: tuple[Visit, ...]
    norms: str

    def __post_init__(self):
        _check_numbers(self.visits, len(self.architecture.layers))
        _check_exits(self.visits)
        for visits in self.slots:
            _check_alike(self.architecture, [visit.layer for visit in visits])
            for visit in visits:
                _check_visit(visit, self.matrices(visit))
                layer = self.architecture.layers[visit.layer]
                if visit.attention is not None:
                    check_attention(visit.attention, f"of layer {visit.layer}", layer.kv_heads, layer.window)
                _check_owner(visit, visits, self.architecture.layers)
            for matrix in self.matrices(visits[0]):
                shapes = {visit.shape(matrix): visit.layer for visit in visits if visit.form(matrix) == "tied"}
                if len(shapes) > 1:
                    one, other = sorted(shapes.values())[:2]
                    raise WrongUsage(f"Layers {one} and {other} cannot share {matrix.name}, whose shapes differ.")

    def matrices(self, visit: Visit) -> tuple[Matrix, ...]:
        return self.architecture.layers[visit.layer].matrices

    @property
    def exits(self) -> tuple[int, ...]:
        """The places in `visits` after which the model can be left early: see `ends_of_loops`. None where visits read
        later ones, which run with them."""
        return () if "later" in self.features else ends_of_loops(self.visits)

    @property
    def slots(self) -> list[list[Visit]]:
        """The visits of each slot, in the order of their loops."""
        slots: list[list[Visit]] = [[] for _ in range(max(visit.slot for visit in self.visits) + 1)]
        for visit in self.visits:
            slots[visit.slot].append(visit)
        return slots

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part: embeddings, head, shared matrices (that several visits use), own ones (that one visit
        uses), LoRA, low_rank (factors without a W' to correct; no entry where all is tied), norms and biases, and
        feature_maps and exits, where there are any."""
        parts: Counter[str] = Counter(embeddings=self.architecture.embedding, head=self.architecture.head, lora=0)
        for visits in self.slots:
            layer = self.architecture.layers[visits[0].layer]
            for matrix in layer.matrices:
                tied = [visit for visit in visits if visit.form(matrix) == "tied"]
                alone = [visit for visit in visits if visit.form(matrix) != "tied"]
                if tied:
                    parts["shared" if len(tied) > 1 else "own"] += tied[0].size(matrix)
                    parts["lora"] += sum(visit.factors(matrix) for visit in tied)
                for visit in alone:  # with a full matrix or with factors, never with both
                    parts["own"] += visit.size(matrix)
                    parts["low_rank"] += visit.factors(matrix)
                if matrix.bias:  # tied along with W', where norms are
                    holders = visits if self.norms == "per_visit" else tied[:1] + alone
                    parts["norms_and_biases"] += sum(visit.shape(matrix)[1] for visit in holders)
            vectors = sum(size for _, size in layer.vectors)
            parts["norms_and_biases"] += vectors * (len(visits) if self.norms == "per_visit" else 1)
            gains = (visit.shape(m)[1] for visit in visits for m in layer.matrices if m.name in visit.gains)
            parts["norms_and_biases"] += sum(gains)
        parts["norms_and_biases"] += self.architecture.rest
        if maps := self._linear_numbers(Linear.parameters):
            parts["feature_maps"] = maps
        if exits := sum(visit.exit for visit in self.visits):
            parts["exits"] = exits * self.architecture.width**2
        return dict(parts)

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def non_embedding(self) -> int:
        return self.parameters - self.architecture.embedding - self.architecture.head

    @property
    def flops_per_token(self) -> int:
        """As Architecture.flops_per_token: looping saves none, LoRA adds to it, low rank and narrow FFNs save some."""
        matrices = sum(v.size(m) + v.factors(m) for v in self.visits for m in self.matrices(v))
        return 2 * (self.architecture.head_flops + matrices)

    def kv_bytes_per_token(self, width: int) -> int:
        """As Architecture.kv_bytes_per_token: every visit has a place of its own, so looping saves none."""
        return width * sum(self.architecture.layers[visit.layer].kv_width for visit in self.visits)

    def kv_bytes(self, context: int, width: int) -> int:
        """As Architecture.kv_bytes: heads that see a window keep no more than it and their sinks."""
        numbers = sum(self._kv_numbers(visit, context) for visit in self.visits)
        return width * numbers + SUM_BYTES * self._linear_numbers(Linear.numbers)

    def _kv_numbers(self, visit: Visit, context: int) -> int:
        layer, attention = self.architecture.layers[visit.layer], visit.attention
        if attention is None:
            return layer.kv_numbers(context)
        everything = len(attention.heads)
        tokens = everything * context + (layer.kv_heads - everything) * attention.kept(context)
        return layer.kv_width // layer.kv_heads * tokens

    def _linear_numbers(self, count: Callable[[Linear, int], int]) -> int:
        """What count(kind, width of a head's keys) adds up to over the heads with linear attention."""
        found = 0
        for visit in self.visits:
            if visit.attention is not None and visit.attention.linear is not None:
                layer = self.architecture.layers[visit.layer]
                heads = layer.kv_heads - len(visit.attention.heads)
                found += heads * count(visit.attention.linear, layer.kv_width // (2 * layer.kv_heads))
        return found

    @property
    def features(self) -> set[str]:
        """As `features_of`; empty where every visit attends to what its stock layer does."""
        return features_of(self.visits)

    @property
    def ties(self) -> bool:
        """Whether layers share weights."""
        return len(self.slots) < len(self.visits)

    @property
    def savings(self) -> str:
        """What this model saves beside the dense one, its cache in 16 bits, as a sentence: see `savings`."""
        dense = self.architecture
        kv, dense_kv = (counted.kv_bytes(SAVINGS_CONTEXT, 2) for counted in (self, dense))
        return savings(self.flops_per_token, dense.flops_per_token, kv, dense_kv)

    def summary(self, width: int) -> dict:
        """The plan as plain data for `--json`, at `width` bytes a parameter."""
        dense = self.architecture
        return {
            "model_type": dense.model_type,
            "params_total": self.parameters,
            "params_non_embedding": self.non_embedding,
            "dense_params_total": dense.parameters,
            "dense_params_non_embedding": dense.non_embedding,
            "params_by_part": self.parts,
            "bytes": self.parameters * width,
            "dense_bytes": dense.parameters * width,
            "flops_per_token": self.flops_per_token,
            "dense_flops_per_token": dense.flops_per_token,
            "kv_bytes_per_token": self.kv_bytes_per_token(width),
            "dense_kv_bytes_per_token": dense.kv_bytes_per_token(width),
            "kv_bytes": kv_bytes_at(self, width),
            "dense_kv_bytes": kv_bytes_at(dense, width),
            "visits": [visit.fields() for visit in self.visits],
        }


def kv_bytes_at(counted: Plan | Architecture, width: int) -> dict[int, int]:
    """Bytes of the KV cache by the number of tokens in it, for people, at `width` bytes a number."""
    return {context: counted.kv_bytes(context, width) for context in KV_CONTEXTS}


def savings(flops: float | None, dense_flops: float, kv_bytes: float, dense_kv_bytes: float) -> str:
    """What one token saves of the dense model's arithmetic and KV cache, as a sentence for people. flops: None where
    they are not known yet; then the sentence is about the cache alone. kv_bytes: at SAVINGS_CONTEXT tokens."""
    arithmetic = [] if flops is None else [_saving(flops, dense_flops, "arithmetic")]
    cache = "KV cache" if kv_bytes == dense_kv_bytes else f"KV cache at {SAVINGS_CONTEXT:,} tokens of context"
    parts = [*arithmetic, _saving(kv_bytes, dense_kv_bytes, cache)]
    return f"Beside the dense model, a token {' and '.join(parts)}."


def _saving(now: float, dense: float, what: str) -> str:
    change = f"{abs(1 - now / dense):.1%}"
    if change == "0.0%":
        return f"saves no {what}"
    return f"saves {change} of the {what}" if now < dense else f"takes {change} more {what}"


def ends_of_loops(visits: Sequence[Visit]) -> tuple[int, ...]:
    """The places in `visits`, which are in running order, where a loop has gone through all layers that are tied, and
    another one follows. None where nothing is tied, or where a slot's visits follow each other (sequence)."""
    uses = Counter(visit.slot for visit in visits)
    tied = [(place, visit.loop) for place, visit in enumerate(visits) if uses[visit.slot] > 1]
    loops = [loop for _, loop in tied]
    return tuple(place for done, (place, _) in enumerate(tied[:-1], 1) if max(loops[:done]) < min(loops[done:]))


def _check_numbers(visits: Sequence[Visit], layers: int) -> None:
    """Raises WrongUsage where `visits` are not of the dense model's `layers`, or leave out slots."""
    if [visit.layer for visit in visits] != list(range(layers)):
        raise WrongUsage(f"The visits do not stand for the {layers} layers of the dense model, one for each in order.")
    if (slots := {visit.slot for visit in visits}) != set(range(len(slots))):
        raise WrongUsage("The slots of the visits are not numbered from 0 up without a gap.")


def _check_exits(visits: Sequence[Visit]) -> None:
    """Raises WrongUsage where a visit has an exit that is not the last one of a loop which another one follows."""
    ends = ends_of_loops(visits)
    for place, visit in enumerate(visits):
        if visit.exit and place not in ends:
            raise WrongUsage(f"Layer {visit.layer} has an exit, and does not end a loop that another one follows.")


def _check_visit(visit: Visit, matrices: tuple[Matrix, ...]) -> None:
    """Raises WrongUsage for ranks, a form or a shape of `visit` that its layer's `matrices` cannot have."""
    known, where = {m.name: m for m in matrices}, f"in layer {visit.layer}"
    for name in [*visit.ranks, *visit.forms, *visit.shapes, *visit.gains]:
        if name not in known:
            raise WrongUsage(f"There is no matrix '{name}' {where}.", nearest(name, known))
    for matrix in matrices:
        if not 0 <= visit.ranks.get(matrix.name, -1) <= max(matrix.inputs, matrix.outputs):
            raise WrongUsage(f"{matrix.name} {where} has no rank, or one that is no rank of such a matrix.")
    for name, form in visit.forms.items():
        if form not in FORMS:
            raise WrongUsage(f"'{form}' is no form of a matrix ({name} {where}).", nearest(form, FORMS))
        if form != "tied" and (form == "low_rank") != (visit.ranks[name] > 0):
            raise WrongUsage(
                f"{name} {where} has the form '{form}' and the rank {visit.ranks[name]}.",
                "A low-rank matrix has a rank of at least 1, and a visit's own matrix has rank 0.",
            )
    for name in visit.gains:
        if visit.form(known[name]) != "tied":
            raise WrongUsage(f"{name} {where} is not tied, and has a gain, which only tied matrices have.")
    for name, (inputs, outputs) in visit.shapes.items():
        matrix = known[name]
        fits = 1 <= inputs <= matrix.inputs and 1 <= outputs <= matrix.outputs and not outputs % len(matrix.parts)
        if not fits or {group for group, _ in matrix.parts} != {"ffn"}:
            raise WrongUsage(
                f"{name} {where}, of {matrix.inputs} inputs and {matrix.outputs} outputs, cannot have {inputs} and "
                f"{outputs}.",
                "Only neurons of the FFN can be removed, equally many from each half of a fused matrix.",
            )


def keeps_for(owner: Visit, reader: Visit, layers: Sequence[Layer]) -> bool:
    """Whether `owner` keeps all keys of the KV heads that do not see everything in `reader`. layers: by visit.layer."""
    heads = () if reader.attention is None else reader.attention.heads
    near = {*range(layers[reader.layer].kv_heads)} - {*heads}
    return not layers[owner.layer].window and (owner.attention is None or near <= {*owner.attention.heads})


def _check_owner(visit: Visit, visits: list[Visit], layers: Sequence[Layer]) -> None:
    """Raises WrongUsage where what `visit` reads is not stored. visits: those of its slot."""
    attention = visit.attention
    if attention is None or attention.owner is None:
        return
    loop, where = attention.owner.loop, f"of layer {visit.layer}"
    if not 0 <= loop < len(visits) or loop == visit.loop:
        others = [str(other.loop) for other in visits if other is not visit]
        raise WrongUsage(
            f"The attention {where} has an owner in loop {loop}, and there is no other visit of its slot.",
            f"Its slot has {'visits in loop ' + ', '.join(others) if others else 'no other visit'} to read from.",
        )
    owner = visits[loop]
    if not keeps_for(owner, visit, layers):
        raise WrongUsage(
            f"The attention {where} reads KV heads of layer {owner.layer}, which do not all see everything.",
            "Let the owner's heads see everything, or give the reader's heads no owner.",
        )


def _check_alike(architecture: Architecture, layers: list[int]) -> None:
    first, *others = layers
    for other in others:
        a, b = architecture.layers[first], architecture.layers[other]
        if a == b:
            continue
        names = {m.name: m for m in a.matrices} | dict(a.vectors), {m.name: m for m in b.matrices} | dict(b.vectors)
        different = sorted(n for n in names[0].keys() | names[1].keys() if names[0].get(n) != names[1].get(n))
        raise WrongUsage(
            f"Layers {first} and {other} cannot share weights, because they differ in {', '.join(different[:4])}"
            f"{' and more' if len(different) > 4 else ''}.",
            "Keep the layers that are different (keep), or choose a sharing that ties layers of one kind.",
        )
