"""What the recipe alone can have wrong about an uptraining. Nothing here waits for torch."""

import os
from collections.abc import Collection
from pathlib import Path

from rrtc.errors import WrongUsage
from rrtc.features import check_carried
from rrtc.io.folder import partial_of
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


def training_flops(recipe: UptrainRecipe, model: int, teacher: int, exits: int, head: int) -> int:
    """Floating-point operations to train on one token, without attention over the context: forward, backward at twice
    its price, the forward pass repeated under activation checkpointing, the teacher's forward pass, and for each exit
    the head: forward, backward, and once more for what the model says in the end.

    model, teacher: of a forward pass over a token, 0 where there is no teacher. head: multiply-adds of a pass
    through the head. exits: how many are trained.
    """
    passes = 1 if recipe.freezes else 4 if recipe.activation_checkpointing else 3
    return passes * model + teacher + exits * 4 * 2 * head


def check_features(recipe: UptrainRecipe, features: Collection[str]) -> None:
    """Raises RrtcError where `recipe` asks for what cannot be done with a model that has these `features`."""
    wanted = {
        "--compile": recipe.compile,
        "--fsdp": recipe.fsdp,
        "--exits": recipe.exits != "none",
        "The loss 'hidden'": bool(recipe.losses.get("hidden")),
        "The regularizer 'bmi'": bool(recipe.regularizers.get("bmi")),
        "--stability admin": recipe.stability == "admin",
    }
    for name, is_asked in wanted.items():
        if is_asked:
            check_carried(name, features, "Leave it out.")


def check_tokens(recipe: UptrainRecipe, context: int) -> None:
    """Raises WrongUsage where there are too few tokens for one step of windows of `context` tokens."""
    per_step = recipe.batch_size * context
    if recipe.tokens < per_step:
        raise WrongUsage(
            f"{recipe.tokens} tokens are less than one batch: {recipe.batch_size} windows of {context} are {per_step}.",
            "Raise tokens, or lower batch_size or context.",
        )


def check_apart(recipe: UptrainRecipe, target: Path) -> None:
    """Raises WrongUsage where the teacher cache lies in the folder `target` that the run writes, or builds."""
    if recipe.teacher_cache is None:
        return
    cache = Path(recipe.teacher_cache).expanduser()
    for folder in (target, partial_of(target)):
        if cache.resolve().is_relative_to(folder.resolve()):
            raise WrongUsage(f"The teacher cache {cache} lies in the output {folder}.", "Name a folder outside it.")
