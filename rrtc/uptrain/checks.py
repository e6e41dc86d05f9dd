"""What the recipe alone can have wrong about an uptraining. Nothing here waits for torch."""

import os

from rrtc.errors import RrtcError, WrongUsage
from rrtc.recipe.section import OWN_TEXT
from rrtc.recipe.uptrain import UptrainRecipe


def check_recipe(recipe: UptrainRecipe) -> None:
    """Raises WrongUsage where the model is to be sharded and there is nobody to share it with, and where text that the
    teacher writes is among the data, and there is no teacher."""
    if recipe.fsdp and "WORLD_SIZE" not in os.environ:  # by torchrun, even one process is a group
        raise WrongUsage(
            "--fsdp shards the model over the processes of torchrun, and this was not started by it.",
            "Start it as 'torchrun --nproc-per-node 8 -m rrtc uptrain …' on 8 GPUs, or leave --fsdp out.",
        )
    if OWN_TEXT in recipe.data and not recipe.distills and recipe.teacher is None:
        raise WrongUsage(
            f"The data '{OWN_TEXT}' is text that the teacher writes, and this run has no teacher.",
            "Name one (teacher), distil from the dense original (losses), or name a text.",
        )


def check_owners(recipe: UptrainRecipe, reads_later: bool) -> None:
    """Raises RrtcError where `recipe` asks for what a model cannot do in which visits read another loop's keys.
    reads_later: whether some read those of a later loop."""
    wanted = {"--compile": recipe.compile, "--fsdp": recipe.fsdp}
    if reads_later:  # what a loop returns is not there before the last one has run
        wanted |= {
            "exits": recipe.exits != "none",
            "the loss 'hidden'": bool(recipe.losses.get("hidden")),
            "the regularizer 'bmi'": bool(recipe.regularizers.get("bmi")),
            "--stability admin": recipe.stability == "admin",
        }
    asked = [name for name, is_asked in wanted.items() if is_asked]
    if asked:
        raise RrtcError(
            f"This model's visits read keys and values of another loop (owner), and {asked[0]} is not for such a one.",
            "Leave it out.",
        )
