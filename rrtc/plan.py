"""The plan: which layer becomes which visit, with which ranks, and what that costs. Pure arithmetic, no torch.

    architecture (what the dense model is) + recipe (what is asked for)  ->  plan (visits)  ->  parameters, bytes, FLOPs

Init, model, accounting, export and reports all read the plan; none of them works it out again.
"""

from collections import Counter
from dataclasses import asdict, dataclass

from rrtc.errors import WrongUsage
from rrtc.recipe import InitRecipe

PROGRAM_BYTES = 400_000_000  # Python, torch and transformers themselves


@dataclass(frozen=True)
class Matrix:
    """A weight matrix of a decoder layer, y = W x + b.

    `parts` are the projections it holds, as (group, outputs): one, or several where the architecture fuses them.
    """

    name: str  # path inside the layer, such as self_attn.q_proj
    inputs: int
    outputs: int
    bias: bool
    parts: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return self.inputs * self.outputs

    def rank(self, recipe: InitRecipe) -> int:
        """The LoRA rank of this matrix, at most min(inputs, outputs).

        A fused projection gets the rank at which its LoRA costs what the LoRAs of its parts would cost apart: for
        Pythia's qkv that is 1.5 r, which is how the paper counts.
        """
        apart = sum(
            min(recipe.rank_of(group), self.inputs, outputs) * (self.inputs + outputs) for group, outputs in self.parts
        )
        return min(round(apart / (self.inputs + self.outputs)), self.inputs, self.outputs)


@dataclass(frozen=True)
class Layer:
    """One decoder layer: its matrices, and the sizes of its other parameters (norms and the like) by name."""

    matrices: tuple[Matrix, ...]
    vectors: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Architecture:
    """What a dense model is made of, in parameters. `rrtc.model.skeleton` reads it off a config."""

    model_type: str
    layers: tuple[Layer, ...]
    embedding: int  # all embedding tables
    head: int  # the output projection; 0 where it is tied to the embedding
    head_flops: int  # multiply-adds of the output projection for one token
    rest: int  # what is left: the final norm
    kv_width: int  # numbers that one layer stores in the KV cache for one token

    @property
    def parameters(self) -> int:
        return self.embedding + self.head + self.non_embedding

    @property
    def non_embedding(self) -> int:
        return self.rest + sum(
            sum(m.size + m.bias * m.outputs for m in layer.matrices) + sum(size for _, size in layer.vectors)
            for layer in self.layers
        )

    @property
    def flops_per_token(self) -> int:
        """Floating-point operations of one token's forward pass, without attention over the context."""
        return 2 * (self.head_flops + sum(m.size for layer in self.layers for m in layer.matrices))


@dataclass(frozen=True)
class Visit:
    """One use of a slot in one loop; it stands for exactly one dense layer. `ranks` has an entry for each matrix."""

    layer: int
    slot: int
    loop: int
    ranks: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """All visits in the order they run, and the architecture they are about."""

    architecture: Architecture
    visits: tuple[Visit, ...]
    norms: str

    @property
    def slots(self) -> list[list[Visit]]:
        """The visits of each slot, in the order of their loops."""
        slots: list[list[Visit]] = [[] for _ in range(max(visit.slot for visit in self.visits) + 1)]
        for visit in self.visits:
            slots[visit.slot].append(visit)
        return slots

    def lora_parameters(self, visit: Visit) -> int:
        return sum(visit.ranks[m.name] * (m.inputs + m.outputs) for m in self.architecture.layers[visit.layer].matrices)

    @property
    def parts(self) -> dict[str, int]:
        """Parameters by part: embeddings, head, shared matrices, own matrices (of slots used once), LoRA, vectors."""
        parts: Counter[str] = Counter(embeddings=self.architecture.embedding, head=self.architecture.head)
        for visits in self.slots:
            layer = self.architecture.layers[visits[0].layer]
            parts["shared" if len(visits) > 1 else "own"] += sum(m.size for m in layer.matrices)
            vectors = sum(m.outputs for m in layer.matrices if m.bias) + sum(size for _, size in layer.vectors)
            parts["norms_and_biases"] += vectors * (len(visits) if self.norms == "per_visit" else 1)
            parts["lora"] += sum(self.lora_parameters(visit) for visit in visits)
        parts["norms_and_biases"] += self.architecture.rest
        return dict(parts)

    @property
    def parameters(self) -> int:
        return sum(self.parts.values())

    @property
    def non_embedding(self) -> int:
        return self.parameters - self.architecture.embedding - self.architecture.head

    @property
    def flops_per_token(self) -> int:
        """As Architecture.flops_per_token: looping saves none of it, and LoRA adds to it."""
        return self.architecture.flops_per_token + 2 * sum(self.lora_parameters(visit) for visit in self.visits)

    def kv_bytes_per_token(self, width: int) -> int:
        """Bytes that one token takes in the KV cache, at `width` bytes a number: every visit has a place of its own."""
        return len(self.visits) * self.architecture.kv_width * width

    def init_bytes(self, width: int, shard_bytes: int, measured: bool) -> int:
        """An estimate of the peak memory of `init` in bytes, files it maps aside: four copies in float32 of the layers
        of the largest slot and one shard to be written; or later, for the closing measurement (if it is `measured`),
        the larger of the two models in float32."""
        sizes = [
            sum(m.size for m in self.architecture.layers[visits[0].layer].matrices) * len(visits)
            for visits in self.slots
        ]
        tying = 4 * 4 * max(sizes) + min(width * self.parameters, shard_bytes)
        scoring = 4 * max(self.architecture.parameters, self.parameters) if measured else 0
        return PROGRAM_BYTES + max(tying, scoring)

    def summary(self, width: int, shard_bytes: int, measured: bool) -> dict:
        """The plan as plain data for `--json`, at `width` bytes a parameter; the rest is as in `init_bytes`."""
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
            "init_peak_bytes": self.init_bytes(width, shard_bytes, measured),
            "flops_per_token": self.flops_per_token,
            "dense_flops_per_token": dense.flops_per_token,
            "kv_bytes_per_token": self.kv_bytes_per_token(width),
            "visits": [asdict(visit) for visit in self.visits],
        }


def make_plan(architecture: Architecture, recipe: InitRecipe) -> Plan:
    """The plan that `recipe` asks for.

    Raises WrongUsage where the layers cannot be divided as asked, or where layers to be tied differ; the message names
    the layers and what differs.
    """
    depth, keep, loops = len(architecture.layers), recipe.kept_at_each_end, recipe.loops
    tied = depth - 2 * keep
    if tied < loops:
        raise WrongUsage(
            f"With keep {keep}, only {max(tied, 0)} of the model's {depth} layers are left to tie, too few for "
            f"{loops} loops.",
            "Lower keep or loops.",
        )
    if tied % loops:
        valid = [str(n) for n in range(2, tied + 1) if tied % n == 0]
        kept = f" less {2 * keep} kept ones" if keep else ""
        raise WrongUsage(
            f"{depth} layers{kept} cannot be divided into {loops} loops.",
            f"With keep {keep}, loops can be {', '.join(valid)}; or choose another keep.",
        )
    per_loop = tied // loops
    visits = []
    for layer in range(depth):
        middle = layer - keep
        if middle < 0:
            slot, loop = layer, 0
        elif middle >= tied:
            slot, loop = layer - tied + per_loop, 0
        elif recipe.order == "cycle":
            slot, loop = keep + middle % per_loop, middle // per_loop
        else:
            slot, loop = keep + middle // loops, middle % loops
        shares = loops > 1 and 0 <= middle < tied
        ranks = {m.name: m.rank(recipe) if shares else 0 for m in architecture.layers[layer].matrices}
        visits.append(Visit(layer, slot, loop, ranks))
    plan = Plan(architecture, tuple(visits), recipe.norms)
    for group in plan.slots:
        _check_alike(architecture, [visit.layer for visit in group])
    return plan


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
