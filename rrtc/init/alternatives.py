"""The ways to be as small that `init` did not take: what they would cost, from what calibration has gathered.

Only where no pattern was asked for. Of an alternative a few slots are measured, spread over the model, and the others
taken to be like the nearest of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

from rrtc.errors import WrongUsage
from rrtc.init.allocate import Group
from rrtc.patterns import make_plan
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.target import Target

# Slots of an alternative that are measured. On SmolLM2-135M, so many predicted within 5 % of what all of them do, and 6
# within 18 % (benchmarks/LOG.md).
MEASURED = 8
USUAL_LOOPS = 2
COUNTED = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}


def ways(recipe: InitRecipe) -> Iterator[tuple[str, str, InitRecipe]]:
    """What could be chosen in place of a pattern that `recipe` leaves open, which itself is among them: (name, flags,
    the recipe that says so)."""
    loops = USUAL_LOOPS if recipe.loops == 1 else recipe.loops
    more = "" if loops == USUAL_LOOPS else f" --loops {loops}"
    middle, kept = ("middle_", "") if recipe.keep is None else ("", f" --keep {recipe.keep}")
    cycle = recipe.model_copy(update={"sharing": f"{middle}cycle", "loops": loops})
    sequence = cycle.model_copy(update={"sharing": f"{middle}sequence"})
    yield f"tied in {COUNTED.get(loops, loops)} loops", f"--sharing {cycle.sharing}{kept}{more}", cycle
    yield "tied in sequence", f"--sharing {sequence.sharing}{kept}{more}", sequence
    yield "nothing tied", "--loops 1", cycle.model_copy(update={"loops": 1})


def alternatives(
    recipe: InitRecipe,
    target: Target,
    made: tuple[Plan, float],
    measure: Callable[[Plan, int, str], list[Group]],
    choose: Callable[[Plan, list[Group]], tuple[Plan, float]],
) -> list[dict[str, Any]]:
    """A row of results.AlternativeResult for what is `made` (plan, nats a token that it is predicted to cost), and one
    for each other way that can be as small. measure(pattern, most, way): its groups, of which so many are measured.
    choose(pattern, groups): the plan under the target and its predicted cost."""
    rows = []
    for name, flags, asked in ways(recipe):
        is_made = (asked.pattern, asked.loops) == (recipe.pattern, recipe.loops)
        try:
            if is_made:
                plan, predicted = made
            else:
                pattern = make_plan(target.architecture, asked, target.numbers.dtype)
                plan, predicted = choose(pattern, measure(pattern, MEASURED, name))
        except WrongUsage:  # these layers cannot be tied so, or not be so small
            continue
        rows.append(
            {
                "way": name,
                "flags": flags,
                "made": is_made,
                "predicted_excess": round(predicted, 4),
                "params_total": plan.parameters,
                "flops_per_token": plan.flops_per_token,
                "exits": len(plan.exits),
                "shared_params": plan.parts.get("shared", 0),
            }
        )
    return rows


def said(rows: list[dict[str, Any]]) -> str:
    """What the other ways are predicted to cost, in a sentence for the user."""
    others = [f"{row['way']} {row['predicted_excess']:.2f} ({row['flags']})" for row in rows if not row["made"]]
    return f"At the same size at least about: {', '.join(others)}."
