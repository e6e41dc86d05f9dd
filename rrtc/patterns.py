"""From what a recipe asks for to a plan: patterns of sharing, ranks and budgets."""

import bisect

from rrtc.architecture import Architecture, Matrix
from rrtc.errors import WrongUsage
from rrtc.plan import Plan, Visit
from rrtc.recipe.init import TARGETS, InitRecipe
from rrtc.storage import Numbers
from rrtc.target import target_of


def make_plan(architecture: Architecture, recipe: InitRecipe, dtype: str = "float32") -> Plan:
    """The plan that `recipe` asks for, stored in `dtype`.

    Under a size or a budget the rank is the largest that meets it; but with a joint start, where every matrix gets a
    rank of its own once it is measured, the plan has rank 0 here. Raises WrongUsage where the layers cannot be divided
    as asked, where layers to be tied differ (the message names them and what differs), and for a size or a budget that
    is too small, or larger than the dense model.
    """
    if not recipe.has_target:
        return _plan_of_pattern(architecture, recipe)
    target = target_of(architecture, recipe, dtype)
    given = dict.fromkeys(TARGETS) | {"sharing": recipe.pattern, "shared_init": recipe.start}
    if recipe.keeps_weights:
        alone = {"sharing": "cycle", "loops": 1, "keep": 0, "rank": 0}
        return _plan_of_pattern(architecture, recipe.model_copy(update=given | alone))
    widest = max(min(m.inputs, m.outputs) for layer in architecture.layers for m in layer.matrices)

    def at(rank: int) -> Plan:
        return _plan_of_pattern(architecture, recipe.model_copy(update=given | {"rank": rank}))

    try:
        unrelaxed = at(0)
    except WrongUsage as error:
        if recipe.sharing is not None:
            raise
        hint = "By default all layers but the first and the last are tied in loops."
        others = "--sharing auto ties neighbors where that is cheaper, --loops 1 nothing."
        raise WrongUsage(error.sentence, f"{hint} {error.hint} Or {others}") from error
    if recipe.start == "joint":
        target.check(_least(unrelaxed, target.numbers))
        return unrelaxed
    target.check(target.taken(unrelaxed))
    return at(bisect.bisect_right(range(widest + 1), target.limit, key=lambda rank: target.taken(at(rank))) - 1)


def _least(plan: Plan, numbers: Numbers) -> int:
    """How many bytes, in these `numbers`, `plan` cannot go below: what is shared stays whole, but for about half of an
    FFN's neurons. Layers by themselves can become nearly nothing."""
    shared = (plan.matrices(visits[0]) for visits in plan.slots if len(visits) > 1)
    kept = sum(
        int(numbers.matrix(m.outputs, m.inputs) * (0.45 if m.parts[0][0] == "ffn" else 1))
        for matrices in shared
        for m in matrices
    )
    return numbers.tables(plan.architecture) + numbers.width * kept


def _plan_of_pattern(architecture: Architecture, recipe: InitRecipe) -> Plan:
    depth, keep, loops = len(architecture.layers), recipe.kept_at_each_end, recipe.loops
    tied = depth - 2 * keep
    if recipe.pattern == "auto":
        loops = 1
    if tied < loops:
        raise WrongUsage(
            f"With keep {keep}, only {max(tied, 0)} of the model's {depth} layers are left to tie, too few for "
            f"{loops} loops.",
            "Lower keep or loops.",
        )
    if tied % loops:
        valid = [str(n) for n in range(2, tied + 1) if tied % n == 0]
        kept = f" less {2 * keep} kept ones" if keep else ""
        others = [n for n in range(depth // 2) if depth - 2 * n >= loops and (depth - 2 * n) % loops == 0]
        nearest_keep = min(others, key=lambda n: (abs(n - keep), n), default=None)
        instead = "" if nearest_keep is None else f"; for {loops}, --sharing {recipe.order} --keep {nearest_keep}"
        raise WrongUsage(
            f"{depth} layers{kept} cannot be divided into {loops} loops.",
            f"With keep {keep}, loops can be {', '.join(valid)}{instead}.",
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
        ranks = {m.name: rank_of(m, recipe) if shares else 0 for m in architecture.layers[layer].matrices}
        visits.append(Visit(layer, slot, loop, ranks))
    return Plan(architecture, tuple(visits), recipe.norms)


def rank_of(matrix: Matrix, recipe: InitRecipe) -> int:
    """The LoRA rank of `matrix`, at most min(inputs, outputs).

    A fused projection gets the rank at which its LoRA costs what the LoRAs of its parts would cost apart: for
    Pythia's qkv that is 1.5 r, which is how the paper counts.
    """
    apart = sum(
        min(recipe.rank_of(group), matrix.inputs, outputs) * (matrix.inputs + outputs)
        for group, outputs in matrix.parts
    )
    return min(round(apart / (matrix.inputs + matrix.outputs)), matrix.inputs, matrix.outputs)
