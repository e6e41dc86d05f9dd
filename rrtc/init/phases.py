"""The kinds of work that `init` does one after the other, and how long each takes beside the others, about.

Known before are the arithmetic and the bytes of each. How much longer decompositions take for their arithmetic than
products of large matrices was measured (benchmarks/LOG.md, one core of a processor); on the way, the time that is left
goes by the speed of what is done.
"""

from rrtc.architecture import Layer
from rrtc.init.alternatives import MEASURED, ways
from rrtc.init.job import Job
from rrtc.init.windows import LOOKUP_WINDOWS

OWN_TEXT = "Writing own text"
CALIBRATING = "Calibrating"
LOOKUPS = "Finding look-up heads"
PLANNING = "Measuring slots"
TYING = "Tying slots"
WRITING = "Writing the model"
SCORING = "Measuring the loss"

# Seconds on that core, which others used as well: what counts is how they compare.
PRODUCT = 3e-11  # of a multiply-add of large matrices
TOKEN = 4e-10  # of one where a few tokens are written at a time
ALONE, TOGETHER = 1.5, 2.3  # of planning a layer by itself, or each of those that share a slot, for WIDEST^3
JOINING, TYING_ONE = 1.7, 0.2  # of tying one by what the loss feels, or as in the paper
WIDEST = 1536  # the widest matrix of SmolLM2-135M
BYTE = 2e-9  # of writing


def trying(way: str) -> str:
    """The measuring of an alternative."""
    return f"Trying {way.removeprefix('tied ')}"


def weights(job: Job) -> dict[str, float]:
    """About the seconds of each kind of work that `job` has before it, in their order, by the name of its progress."""
    plan, recipe = job.plan, job.recipe.init
    layers = plan.architecture.layers
    numbers = sum(matrix.size for layer in layers for matrix in layer.matrices)
    found: dict[str, float] = {}
    if job.own_windows and job.calibration is not None:
        found[OWN_TEXT] = TOKEN * job.own_windows * job.calibration.shape[1] * numbers
    if job.calibration is not None:
        windows, context = job.calibration.shape
        # Forward, forward again and back; and the squares of what is gathered on both sides of a matrix.
        products = 4 * numbers + sum(m.inputs**2 + m.outputs**2 for layer in layers for m in layer.matrices) / 2
        found[CALIBRATING] = PRODUCT * (windows + job.own_windows) * context * products
        if job.kv_budget is not None and job.kv_budget.is_measured:
            found[LOOKUPS] = 2 * PRODUCT * min(windows, LOOKUP_WINDOWS) * context * numbers
    if not job.is_replan:
        if job.target is not None and recipe.start == "joint":
            free = 3 if recipe.pattern == "auto" else 1  # every layer, and beside it every two neighbors
            found[PLANNING] = free * sum(
                (TOGETHER if len(visits) > 1 else ALONE) * _cube(layers[visit.layer])
                for visits in plan.slots
                for visit in visits
            )
            if recipe.sharing is None:
                for way, _, asked in ways(recipe):
                    if (asked.pattern, asked.loops) != (recipe.pattern, recipe.loops):
                        slot = TOGETHER * asked.loops if asked.loops > 1 else ALONE
                        found[trying(way)] = slot * min(MEASURED, len(layers) // asked.loops) * _cube(layers[-1])
        one = JOINING if recipe.start == "joint" else TYING_ONE
        found[TYING] = sum(one * _cube(layer) for layer in layers)
        found[WRITING] = BYTE * job.disk_bytes() / 2
    if job.scoring is not None:
        tokens = job.scoring.ids.numel()
        found[SCORING] = 2 * PRODUCT * tokens * (numbers + plan.architecture.head_flops)
    return found


def _cube(layer: Layer) -> float:
    return (max(max(matrix.inputs, matrix.outputs) for matrix in layer.matrices) / WIDEST) ** 3
