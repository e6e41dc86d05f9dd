"""Admin (Liu et al., EMNLP 2020, arXiv 2004.08249) for models that are tied already: what each residual branch adds is
brought to the size that it has in the dense model.

Its finding is that an update is amplified by what depends on the residual branches, Var[branch] / Var[stream]. It
profiles both, and sets a vector for each sublayer before training. Here the target is the dense model's profile, and
every visit gets a gain for each of its branches, output by output:

    g = sqrt(Var[branch of the dense layer] / Var[branch of the visit])        over the tokens, for each output

in running order, so that a visit is profiled on what those before it make with their gains. Where the branch ends in a
tied matrix, the gain is a parameter of the visit (`gain` of RelaxedLinear), because the matrix is not its own. Where it
ends in a norm, in a matrix of the visit's own or in a low-rank one, it is multiplied into that. Visits that share no
matrix stay as they are. The other half of it, the step of a weight that acts in every loop, is the learning rate's:
`shared_lr_scale` (optimizer.py).
"""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rrtc.architecture import Matrix
from rrtc.errors import WrongUsage
from rrtc.model.graft_rrt import RelaxedLinear
from rrtc.plan import Plan, Visit
from rrtc.stock.architecture import decoder_layers
from rrtc.stock.parts import watching
from rrtc.stock.trial import Branch, find_branches

PROFILED = 4096  # tokens that both models are run on, or one window where that is longer
FURTHEST = 4.0  # a gain is no more than this, and no less than 1 over it: beyond, an output hardly says anything


@dataclass(frozen=True)
class Variances:
    """Of one branch of one layer, over tokens, for each of the outputs: float32, on the CPU. stream: of the hidden
    states that the branch is added to."""

    branch: Tensor
    stream: Tensor


def branches_of(plan: Plan, base) -> list[Branch]:
    """Where the branches of a layer end. base: the dense model's config. Raises WrongUsage where a visit of `plan`
    cannot have a gain there."""
    branches = find_branches(base)
    if not branches:
        raise WrongUsage(
            f"In a '{base.model_type}' model no branch is added to the hidden states as it is, so that stability admin "
            "has no gain to set.",
            "Leave stability out.",
        )
    matrices = {matrix.name for visit in plan.visits for matrix in plan.matrices(visit)}
    norms = [branch.path for branch in branches if branch.path not in matrices]
    if norms and plan.norms == "shared":
        raise WrongUsage(
            f"The branches of this model end in norms ({norms[0]}), and its visits share them, so that stability admin "
            "has no gain to set for each.",
            "Leave stability out, or compress it with --norms per_visit.",
        )
    return branches


def with_gains(plan: Plan, branches: Sequence[Branch]) -> Plan:
    """`plan` with a gain wherever a branch ends in a matrix that several visits use."""
    uses, ends = _uses(plan), {branch.path for branch in branches}
    visits = [
        replace(
            visit,
            gains=tuple(
                matrix.name
                for matrix in plan.matrices(visit)
                if matrix.name in visit.gains or (matrix.name in ends and _is_tied(visit, matrix, uses))
            ),
        )
        for visit in plan.visits
    ]
    return replace(plan, visits=tuple(visits))


def add_gains(model: PreTrainedModel, plan: Plan) -> None:
    """Gives the recursive `model` the gains that `plan` has and it has not, each 1."""
    for layer, visit in zip(decoder_layers(model), plan.visits, strict=True):
        for path in visit.gains:
            module = _inside(layer, path)
            if module.gain is None:
                module.gain = nn.Parameter(module.shared().weight.new_ones(module.out_features))
    model.config.visits = [visit.fields() for visit in plan.visits]


def gains_of(model: nn.Module) -> list[str]:
    """The names of all gains among the parameters of `model`."""
    modules = model.named_modules()
    return [f"{name}.gain" for name, m in modules if isinstance(m, RelaxedLinear) and m.gain is not None]


def profile(model: PreTrainedModel, branches: Sequence[Branch], ids: Tensor) -> list[list[Variances]]:
    """For each layer and each of its branches, what they are on `ids` (windows, context), int64. model: a dense one or
    a recursive one."""
    return _watched(model, branches, ids, lambda place, branch, output: None)


def match(
    model: PreTrainedModel, plan: Plan, branches: Sequence[Branch], dense: list[list[Variances]], ids: Tensor
) -> list[list[Tensor | None]]:
    """Multiplies the branches of the tied visits of `model`, in place, so that their variances on `ids` are those in
    `dense`, the `profile` of the dense model on the same tokens. Returns the gain of each layer's branches, (outputs,),
    float32; None where nothing is tied."""
    uses = _uses(plan)
    tied = [any(_is_tied(visit, matrix, uses) for matrix in plan.matrices(visit)) for visit in plan.visits]
    gains: list[list[Tensor | None]] = [[None] * len(branches) for _ in plan.visits]

    def bring(place: int, number: int, output: Tensor) -> Tensor | None:
        if not tied[place]:
            return None
        is_now = _variance(output)
        gain = (dense[place][number].branch / branches[number].factor ** 2 / is_now).sqrt()
        gain = torch.where(gain.isfinite() & (gain > 0), gain, 1.0).clamp(1 / FURTHEST, FURTHEST)
        gains[place][number] = gain
        gain = gain.to(output.device)
        multiply(_inside(decoder_layers(model)[place], branches[number].path), gain, branches[number].offset)
        return output * gain

    _watched(model, branches, ids, bring)
    return gains


@torch.no_grad()
def multiply(module: nn.Module, gain: Tensor, offset: float) -> None:
    """Has `module`, the end of a branch of one visit, say `gain` (outputs,) times what it said. offset: as a Branch
    has it."""
    gain = gain.to(next(module.parameters()).device)
    own = [module.weight] if isinstance(module, nn.Linear) else []
    if isinstance(module, RelaxedLinear):
        if module.gain is not None:
            module.gain.mul_(gain)
        else:
            own = [] if module.shared is None else [module.shared().weight]  # which no other visit uses
            own += [module.B] if module.rank else []
    elif not own:
        module.weight.copy_((module.weight + offset) * gain - offset)
    for matrix in own:
        matrix.mul_(gain[:, None])
    if getattr(module, "bias", None) is not None:
        module.bias.mul_(gain)


def rows(
    plan: Plan,
    branches: Sequence[Branch],
    dense: list[list[Variances]],
    tied: list[list[Variances]],
    gains: list[list[Tensor | None]],
) -> list[dict]:
    """The profiles of both models and the gains as plain data, a row a branch: means over the outputs."""
    return [
        {
            "layer": visit.layer,
            "slot": visit.slot,
            "loop": visit.loop,
            "branch": branch.path,
            "dense_branch": theirs.branch.mean().item(),
            "dense_stream": theirs.stream.mean().item(),
            "tied_branch": ours.branch.mean().item(),
            "tied_stream": ours.stream.mean().item(),
            "gain": None if gain is None else gain.square().mean().sqrt().item(),
        }
        for visit, all_theirs, all_ours, all_gains in zip(plan.visits, dense, tied, gains, strict=True)
        for branch, theirs, ours, gain in zip(branches, all_theirs, all_ours, all_gains, strict=True)
    ]


@torch.no_grad()
def _watched(
    model: PreTrainedModel, branches: Sequence[Branch], ids: Tensor, see: Callable[[int, int, Tensor], Tensor | None]
) -> list[list[Variances]]:
    """`profile`, while see(layer, branch, output) is called for each branch, whose output it may replace."""
    found: list[list[Variances]] = []
    stream = torch.empty(0)

    def enter(hidden: Tensor) -> None:
        nonlocal stream
        stream = hidden
        found.append([])

    def leave(place: int, number: int, output: Tensor) -> Tensor | None:
        nonlocal stream
        instead = see(place, number, output)
        added = branches[number].factor * (output if instead is None else instead)
        found[place].append(Variances(_variance(branches[number].factor * output), _variance(stream)))
        stream = stream + added
        return instead

    layers = decoder_layers(model)
    ends = {
        _inside(layer, branch.path): functools.partial(leave, place, number)
        for place, layer in enumerate(layers)
        for number, branch in enumerate(branches)
    }
    # Compiled layers would be compiled with what watches them.
    with torch.compiler.set_stance("force_eager"), watching(inputs=dict.fromkeys(layers, enter), outputs=ends):
        model.base_model(ids.to(model.device), use_cache=False)
    return found


def _variance(states: Tensor) -> Tensor:
    """(windows, context, width) -> (width,), float32, on the CPU: over all tokens."""
    return states.float().flatten(0, 1).var(0, correction=0).cpu()


def _inside(layer: nn.Module, path: str) -> nn.Module:
    """The module at `path` of a decoder layer, or of the one behind a visit."""
    return functools.reduce(getattr, path.split("."), layer)


def _uses(plan: Plan) -> Counter:
    """How many visits use the shared matrix of each slot and name."""
    return Counter(
        (visit.slot, matrix.name)
        for visit in plan.visits
        for matrix in plan.matrices(visit)
        if visit.form(matrix) == "tied"
    )


def _is_tied(visit: Visit, matrix: Matrix, uses: Counter) -> bool:
    return visit.form(matrix) == "tied" and uses[visit.slot, matrix.name] > 1
