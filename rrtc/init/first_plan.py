"""The plan of a compression before anything is measured, and the dtype that it writes: from config and headers."""

from collections.abc import Sequence

from rrtc.console import note
from rrtc.errors import WrongUsage
from rrtc.io.architectures import dense_of, has_weights
from rrtc.io.source import Source
from rrtc.kv_budget import without_windows
from rrtc.kv_kinds import LAST_LOOP, NOTHING_TO_READ
from rrtc.kv_owners import readable
from rrtc.patterns import make_plan
from rrtc.plan import Plan
from rrtc.recipe.init import InitRecipe
from rrtc.storage import NUMBER_BYTES

# What there is to choose, besides the KV budget, of a model that is recursive already.
REPLANNED = ("calibrate_on", "calibrate_tokens", "calibrate_context", "text_field", "seed", "measure_tokens")


def first_plan(source: Source, recipe: InitRecipe) -> tuple[Plan, str]:
    """(plan, dtype) of what `recipe` makes of `source`: for a recursive one its own plan, with the attention of its
    dense original. Imports neither torch nor transformers where a dense `source` was read before. Raises RrtcError or
    WrongUsage for what cannot be tied, or planned anew, as asked."""
    if source.is_recursive:
        from rrtc.io.recursive import plan_by_layer

        _check_replan(source.uri, recipe)
        plan, dtype = without_windows(plan_by_layer(source.folder)), _stored_dtype(source, "auto")
    else:
        dense = dense_of(source)
        dtype = _stored_dtype(source, recipe.dtype, None if has_weights(source) else dense.dtype or "bfloat16")
        plan = make_plan(dense.architecture, recipe, dtype)
    _check_last_loop(plan, recipe, source.is_recursive)
    return plan, dtype


def _check_replan(uri: str, recipe: InitRecipe) -> None:
    """Raises WrongUsage where `recipe` asks for more of a recursive model than another plan of what it attends to."""
    if recipe.kv_budget is None:
        raise WrongUsage(
            f"{uri} is compressed already.",
            "Name the dense model it was made from; or give a --kv-budget, to plan its KV cache anew.",
        )
    for name, field in InitRecipe.model_fields.items():
        if name not in REPLANNED and not name.startswith("kv_") and getattr(recipe, name) != field.default:
            raise WrongUsage(
                f"{uri} is compressed already: its weights stay as they are, and {name} is about them.",
                "Leave it out, or name the dense model.",
            )


def _check_last_loop(plan: Plan, recipe: InitRecipe, is_tied: bool) -> None:
    """Raises WrongUsage where `recipe` asks what last_loop costs in `plan`, and that cannot be measured. is_tied:
    whether the model is recursive already."""
    if LAST_LOOP not in recipe.kv_kinds or recipe.kv_choice != "measured":
        return
    if not is_tied:
        raise WrongUsage(
            "What last_loop costs is known once the model is tied, and this one is dense.",
            "Leave the KV budget out, and plan the cache of the folder that is written: rrtc init FOLDER --kv-budget …",
        )
    if not readable(plan, LAST_LOOP):
        raise WrongUsage(NOTHING_TO_READ, "Leave last_loop out of --kv-kinds.")


def _stored_dtype(source: Source, asked: str, named: str | None = None) -> str:
    """What was `asked` for, or for "auto" the source's own, or bfloat16 for a GGUF, which had fewer bits than that
    before it was dequantized. named: the source's own, for a source without weights; by default that of its weights."""
    if asked != "auto":
        return asked
    if source.is_gguf:
        return "bfloat16"
    dtype = named or source.weights().dtype
    return dtype if dtype in NUMBER_BYTES else "float32"


def propose_16_bits(source: Source, asked: str, dtype: str) -> None:
    """A note where float32 is written because the dense `source` has it, and nobody asked for it."""
    if asked == "auto" and dtype == "float32" and not source.is_recursive:
        note("The model is stored in float32, and so will this one be. --dtype bfloat16 makes it half as large.")


def say_rounded(names: Sequence[str], dtype: str) -> None:
    """A note where there are tensors, the `names`, whose numbers `dtype` does not hold as they are."""
    if names:
        such = "1 tensor" if len(names) == 1 else f"{len(names)} tensors"
        hint = "" if dtype == "float32" else " --dtype float32 keeps all numbers as they are."
        named = f"{', '.join(names[:2])}{', …' if len(names) > 2 else ''}"
        note(f"{such} ({named}) will be rounded to {dtype}.{hint}")
