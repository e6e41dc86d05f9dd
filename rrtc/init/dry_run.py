"""`rrtc init --dry-run`: the plan, from the config and, where there are weights, their headers.

Torch and transformers are needed to look at a model for the first time, and not again (rrtc/io/architectures.py).
"""

from rrtc import machine
from rrtc.init.first_plan import first_plan, propose_16_bits
from rrtc.init.memory import PROGRAM_BYTES, init_bytes
from rrtc.io.source import find_model, read_config
from rrtc.kv_budget import KvBudget
from rrtc.plan import KV_CONTEXTS, Plan, kv_bytes_at
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.recipe.section import OWN_TEXT
from rrtc.storage import NUMBER_BYTES
from rrtc.target import numbers_of, target_of
from rrtc.units import parse_size


def dry_run(model: str, recipe: Recipe) -> dict:
    """What `init` would do, from the config and, where there are weights, their headers: the plan as plain data.

    Raises RrtcError or WrongUsage for what would stop `init` itself, as far as headers show it.
    """
    parse_size(recipe.init.max_shard_size)  # raises for what is none
    source = find_model(model, config_only=True)
    plan, dtype = first_plan(source, recipe.init)
    propose_16_bits(source, recipe.init.dtype, dtype)
    architecture = plan.architecture
    spent, windows, context, width = [plan], None, 0, NUMBER_BYTES[dtype]
    if recipe.init.kv_budget is not None:
        budget = KvBudget(architecture, recipe.init)
        if "linear" in budget.kinds:
            from rrtc.stock.trial import check_kinds

            config = read_config(source.folder)
            check_kinds(config.base_config if source.is_recursive else config, budget.kinds)
        spent = [way.spend(plan, {}, {}) for way in budget.ways]
        windows, context = budget.explain(spent[0], {}), budget.calibration_context
        if any(kv_bytes_at(made, width) != kv_bytes_at(spent[0], width) for made in spent):
            windows += " Of the cache, figures here are the most that any of these takes."
        if not budget.is_measured:  # else which heads they are is known once they are measured
            plan = spent[0]
        elif "linear" in budget.kinds:
            maps = _maps(plan, recipe.init)
            windows += f" The feature maps of linear attention are not counted here: up to {maps:,} parameters more."
    joint = recipe.init.start == "joint"
    tokens = max(recipe.init.measure_tokens, recipe.init.calibrate_tokens if recipe.init.reads_text else 0)
    most = {length: max(made.kv_bytes(length, width) for made in spent) for length in KV_CONTEXTS}
    known = {"kv_bytes": most, "windows": windows}
    summary = plan.summary(width) | known | {"init_peak_bytes": init_bytes(plan, tokens, joint, context)}
    if joint and OWN_TEXT in recipe.init.calibrate_on:  # the whole model writes it
        from rrtc.text.own import check_writer_fits

        check_writer_fits(architecture.parameters)
        writing = architecture.parameters * machine.scoring_dtype().itemsize
        summary["init_peak_bytes"] = max(summary["init_peak_bytes"], PROGRAM_BYTES + writing)
    source_bytes = source.bytes_on_disk if source.is_gguf else None
    if recipe.init.has_target and joint:
        # What is stored how, and so what it computes, is known once the layers are measured; how much is known now.
        target = target_of(architecture, recipe.init, dtype)
        unknown, taken = ["params_by_part", "flops_per_token", "visits"], {"bytes": target.limit}
        if (total := target.parameters) is None:
            unknown += ["params_total", "params_non_embedding"]
        else:
            taken = {
                "params_total": total,
                "params_non_embedding": total - architecture.embedding - architecture.head,
                "bytes": total * width,
            }
        summary |= taken | dict.fromkeys(unknown)
    else:
        summary["bytes"] = numbers_of(recipe.init, dtype).bytes(plan)
    asked = {"model": model, "dtype": dtype, "source_bytes": source_bytes, "recipe": recipe.init.resolved()}
    return asked | summary


def _maps(plan: Plan, recipe: InitRecipe) -> int:
    """Parameters in the feature maps of linear attention, if all heads have it that do not see everything."""
    budget = KvBudget(plan.architecture, recipe.model_copy(update={"kv_kinds": ["linear"]}))
    return max(way.spend(plan, {}, {}).parameters for way in budget.ways) - plan.parameters
