"""Models whose visits have matrices of different forms and FFNs of different widths."""

import functools
from dataclasses import asdict, replace
from pathlib import Path

import torch
from pico import COMMON, pico_config, pico_tokenizer

from rrtc.architecture import Matrix
from rrtc.io.provenance import write_provenance
from rrtc.model import RrtConfig, RrtForCausalLM
from rrtc.patterns import make_plan
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.stock.architecture import read_architecture

HIDDEN = COMMON["hidden_size"]

# Slot 0 is tied as ever. In slot 1 every second matrix is tied to nobody in visit 1, which leaves it to visit 4 alone;
# both are narrowed to one width. Slot 2 shares nothing, and its visits have different widths.
FORMS = {0: ("tied",), 3: ("tied",), 1: ("low_rank", "tied"), 4: ("tied",), 2: ("own",), 5: ("low_rank",)}

WIDTHS = {1: 44, 4: 44, 2: 52, 5: 70}

RANKS = {"tied": 3, "low_rank": 7, "own": 0}


def narrowed(matrices: tuple[Matrix, ...], width: int) -> dict[str, tuple[int, int]]:
    """The shapes of the FFN's matrices at `width` neurons."""
    ffn = [matrix for matrix in matrices if matrix.parts[0][0] == "ffn"]
    return {m.name: (width, HIDDEN) if m.outputs == HIDDEN else (HIDDEN, width * len(m.parts)) for m in ffn}


@functools.cache
def mixed_plan(architecture: str, norms: str = "per_visit") -> Plan:
    plan = make_plan(read_architecture(pico_config(architecture)), InitRecipe(rank=3, norms=norms))
    visits = []
    for visit in plan.visits:
        matrices, pattern = plan.matrices(visit), FORMS[visit.layer]
        forms = {matrix.name: pattern[number % len(pattern)] for number, matrix in enumerate(matrices)}
        shapes = narrowed(matrices, WIDTHS[visit.layer]) if visit.layer in WIDTHS else {}
        ranks = {name: RANKS[form] for name, form in forms.items()}
        visits.append(replace(visit, ranks=ranks, shapes=shapes, forms=forms if visit.layer else {}))
    return replace(plan, visits=tuple(visits))


def mixed_config(architecture: str, norms: str = "per_visit") -> RrtConfig:
    plan = mixed_plan(architecture, norms)
    visits = [asdict(visit) for visit in plan.visits]
    return RrtConfig(base_config=pico_config(architecture), visits=visits, norms=norms)


@functools.cache
def mixed(architecture: str, norms: str = "per_visit") -> RrtForCausalLM:
    """A model of `mixed_plan` with random numbers everywhere; shared by tests, which must not change it."""
    torch.manual_seed(sum(architecture.encode()))
    model = RrtForCausalLM(mixed_config(architecture, norms)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif name.endswith((".A", ".B")):
                parameter.copy_(0.25 * torch.randn_like(parameter))
    return model


def save_mixed(folder: Path, architecture: str, norms: str = "per_visit") -> Path:
    """`mixed` in an rrtc folder, as `init` would write it."""
    mixed(architecture, norms).save_pretrained(folder)
    pico_tokenizer().save_pretrained(folder)
    base = {"uri": "maker/model", "path": "/nowhere", "relative_path": "../nowhere", "sha256": "0", "bytes": 1}
    recipe = {"init": InitRecipe(rank=3, norms=norms).model_dump()}
    write_provenance(folder, "init", base, recipe, {"init": {}}, [])
    return folder
