"""The optimizer of a run: which parameters take which steps.

    role         what it is                                              Muon         weight decay
    embeddings   matrices outside the slots: embedding, head             no           yes
    factors      A and B of a visit's LoRA or low-rank matrix, and       no           yes
                 feature maps of linear attention
    matrices     full matrices in the slots, shared or a visit's own     if asked     yes
    vectors      norms, biases and gains                                 no           no
    exits        maps of exits, at a rate of their own                   no           no
    critic       of the regularizer bmi, at a rate of its own            no           its own

A parameter that several visits use gets the sum of their gradients. AdamW and Muon ignore the scale of a gradient: the
parameter takes a step as long as any other's, and every visit feels it, so that the output moves 1.5 to 5.5 times as
far as it does untied (2 to 8 visits). What is to be undone is therefore undone in the learning rate.
"""

from collections import Counter

import torch

from rrtc.model.graft_rrt import Reference, RelaxedLinear, Slot
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.stock.linear import linear_maps
from rrtc.uptrain.bmi import CRITIC_DECAY, CRITIC_LR, Critic
from rrtc.uptrain.exits import exits_of
from rrtc.uptrain.rate import EXITS


def make_optimizer(model: torch.nn.Module, recipe: UptrainRecipe, rate: float, adamw: dict) -> torch.optim.Optimizer:
    """The optimizer of all parameters of `model` that are trained. rate: the peak learning rate. adamw: the keyword
    arguments of its AdamW.

    Muon takes only `matrices`, and each of its steps is as long as AdamW's would be (0.2 of the learning rate for an
    entry, as the root of the mean square), so one learning rate serves both. The factors stay with AdamW: Muon makes
    all singular values of a step equal, which means something for the matrix that acts on the hidden states. For one
    factor of B·A it says nothing of the product, and lets the smallest directions of an SVD move as far as its largest.
    """
    groups = parameter_groups(model, recipe, rate)
    muon = [group for group in groups if group["role"] == "matrices"]
    if recipe.optimizer == "adamw" or not muon:  # as where exits learn alone
        return torch.optim.AdamW(groups, **adamw)
    rest = [group for group in groups if group["role"] != "matrices"]
    return Together(
        torch.optim.AdamW(rest, **adamw),
        torch.optim.Muon(muon, lr=rate, adjust_lr_fn="match_rms_adamw"),
    )


def parameter_groups(model: torch.nn.Module, recipe: UptrainRecipe, rate: float) -> list[dict]:
    """The trained parameters of `model` as an optimizer takes them, each in one group: params, role, visits (that use
    each of these parameters), lr and weight_decay. The first group has the learning rate `rate` itself, which is the
    one that the Trainer logs; so have exits, where nothing else learns."""
    modules = list(model.modules())
    references = (module.shared for module in modules if isinstance(getattr(module, "shared", None), Reference))
    uses = Counter(reference() for reference in references)
    visits = {parameter: count for module, count in uses.items() for parameter in module.parameters()}
    in_slots = {p for module in modules if isinstance(module, Slot) for p in module.parameters()}
    factors = {
        p for module in modules if isinstance(module, RelaxedLinear) and module.rank for p in (module.A, module.B)
    } | {p for maps in linear_maps(model) for p in maps.parameters()}
    critic = [p for module in modules if isinstance(module, Critic) for p in module.parameters()]
    exits = [parameter for parameter in exits_of(model).values() if parameter.requires_grad]
    groups: dict[tuple[int, str], list] = {}
    aside = {*critic, *exits}
    for parameter in model.parameters():
        if not parameter.requires_grad or parameter in aside:
            continue
        if parameter.dim() < 2:
            role = "vectors"
        elif parameter in factors:
            role = "factors"
        else:
            role = "matrices" if parameter in in_slots else "embeddings"
        groups.setdefault((visits.get(parameter, 1), role), []).append(parameter)
    found = [
        {
            "params": parameters,
            "role": role,
            "visits": count,
            "lr": rate * _scale(recipe, count),
            "weight_decay": 0.0 if role == "vectors" else recipe.weight_decay,
        }
        for (count, role), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]
    if exits:
        lr = EXITS if found else rate
        found.append({"params": exits, "role": "exits", "visits": 1, "lr": lr, "weight_decay": 0.0})
    if critic:
        found.append({"params": critic, "role": "critic", "visits": 1, "lr": CRITIC_LR, "weight_decay": CRITIC_DECAY})
    return found


def _scale(recipe: UptrainRecipe, visits: int) -> float:
    """What the learning rate of a parameter that so many visits use is multiplied by."""
    if visits == 1:
        return 1.0
    return 1 / visits if recipe.shared_lr_scale == "visits" else recipe.shared_lr_scale


class Together(torch.optim.Optimizer):
    """Several optimizers, each for parameters of its own, as one: for what wants one to wrap, to schedule and to save.

    The groups and the state are this object's. The members get them anew for every step, because to load a state, or
    to shard a model, replaces them.
    """

    def __init__(self, *members: torch.optim.Optimizer):
        self.members = members
        super().__init__([group for member in members for group in member.param_groups], defaults={})

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        start = 0
        for member in self.members:
            end = start + len(member.param_groups)
            member.param_groups, member.state = self.param_groups[start:end], self.state
            member.step()
            start = end
        return loss
