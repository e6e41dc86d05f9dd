"""Text that the dense model writes itself, to calibrate on or to train on.

Text from elsewhere says what its own kind needs, and is silent about the rest. What a model says when it is asked for
nothing is spread over all that it was trained on (self-calibration; Williams et al., arXiv 2410.17170).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from rrtc import machine
from rrtc.errors import RrtcError
from rrtc.io.source import load_for_scoring
from rrtc.recipe.section import OWN_TEXT

AT_ONCE = 32  # windows


class _Steps(StoppingCriteria):
    """Stops nothing: is called after every token."""

    def __init__(self, advance: Callable[[int], None]):
        self._advance = advance

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        self._advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def check_writer_fits(parameters: int) -> None:
    """Raises RrtcError where a model of so many parameters does not fit into memory, as it must to write text."""
    dtype = machine.scoring_dtype()
    if machine.is_too_large(parameters, dtype):
        hint = f"Name a text in place of '{OWN_TEXT}': what is read is streamed."
        raise machine.too_large("To write text", parameters, dtype, hint)


def own_text(
    folder: Path, tokenizer, windows: int, context: int, seed: int, advance: Callable[[int], None]
) -> Iterator[Tensor]:
    """Token ids drawn from the model in `folder` at temperature 1, (AT_ONCE, context) at a time, in the last batch what
    is left of `windows`; int64. The whole model is in memory meanwhile. advance(windows) is called for every token but
    the first of each window.

    A document that ends is followed by the next, as in packed text. The same seed gives the same text on the same
    machine, and more windows begin with the same whole batches. Raises RrtcError where the tokenizer has no token to
    begin with.
    """
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if first is None:
        raise RrtcError("This model has no token that begins a text, so it cannot write one.", "Name a text instead.")
    model = load_for_scoring(folder)
    # In place of the model's own, which may ask for repetition penalties and the like. No token ends a window.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=context - 1, pad_token_id=first
    )
    for start in range(0, windows, AT_ONCE):
        begun = torch.full((min(AT_ONCE, windows - start), 1), first, device=model.device)
        # Each batch has random numbers of its own, because whoever takes it may draw some before asking for the next.
        (batch_seed,) = numpy.random.SeedSequence((seed % 2**64, start)).generate_state(1)
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(int(batch_seed))
            steps = [_Steps(advance)]
            ids = model.generate(begun, attention_mask=torch.ones_like(begun), stopping_criteria=steps).cpu()
        yield ids
