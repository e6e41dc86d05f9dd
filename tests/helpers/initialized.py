"""What the tests of init have in common: recipes that measure nothing, and the logits of a folder."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from rrtc.recipe.schema import Recipe


def recipe(**choices) -> Recipe:
    return Recipe.model_validate({"init": {"measure_tokens": 0} | choices})


def logits(folder: Path) -> torch.Tensor:
    """Logits of the model in `folder` on fixed tokens, longer than the pico models' attention window."""
    import rrtc.model  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(3, 300, (2, 24), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return model(ids).logits
