"""Which way a model's exits are used: the one that the user asks for, unless nothing is to be won by it."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from rrtc.console import note, progress, warn
from rrtc.errors import RrtcError, WrongUsage
from rrtc.generate.agreement import TRIAL, TRIAL_NEW, agreement, said_a_round
from rrtc.generate.forecast import WORTH_IT, Costs, measure_costs
from rrtc.generate.quality import Scored, Threshold, find_threshold, passes
from rrtc.generate.sampling import Drawing
from rrtc.generate.stages import Stages
from rrtc.generate.ways import FullDepth, Leave, Speculate
from rrtc.io.remembered import remembered
from rrtc.recipe.generate import AnswerOptions, EngineOptions
from rrtc.recipe.section import BUILT_IN_TEXT
from rrtc.text.windows import held_out_windows, longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DRAFTS = 4  # at most, where the user does not say
QUALITY = (16, 256)  # windows and tokens of the text on which a threshold is found
Way = Callable[[int, int], FullDepth]


@dataclass(frozen=True)
class Choice:
    """way: for the engine. name: full depth, speculation or early exits. forecast: times full depth, None where no
    other way was looked at. why: a sentence for people; "" where there is nothing to say."""

    way: Way
    name: str
    forecast: float | None = None
    why: str = ""

    def tell(self, options: EngineOptions) -> None:
        """Says why: with emphasis where the user asked for another way."""
        if self.why:
            (warn if options.uses_exits and self.name == "full depth" else note)(self.why)


def choose(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    options: EngineOptions,
    has_exits: bool,
    requests: int,
    fingerprint: str,
) -> Choice:
    """The way to generate with so many requests at once. has_exits: whether the model's exits were trained.
    fingerprint: of the model's files, for each of which it is found once how sure exits must be.

    Raises WrongUsage where exits are asked for and there are none; RrtcError where tokens cannot leave the model early.
    """
    if options.speculate == 0 or not (options.uses_exits or has_exits):
        return Choice(FullDepth, "full depth")
    if not has_exits:
        raise WrongUsage(
            "The model has no exits that were trained.",
            "Train them: rrtc uptrain FOLDER -o NEW --exits frozen. It takes a cycle of loops.",
        )
    stages = Stages(model)
    if stages.loops == 1:
        if not options.uses_exits:
            return Choice(FullDepth, "full depth")
        raise RrtcError("The layers that share weights in this model differ in kind, so tokens cannot leave it early.")
    if options.exit_threshold:
        return Choice(partial(Leave, threshold=options.exit_threshold, catch_up=options.catch_up), "early exits")
    if not options.exit_quality and not Drawing(model, [0], 1, None, **_settings(options)).foresees:
        why = "No tokens are drafted: what is asked for makes scores by rules that remember what they were asked."
        return Choice(FullDepth, "full depth", None, why)
    note("Finding out what early exits are worth here")
    costs = measure_costs(model, requests)
    if options.exit_quality:
        return _by_quality(model, tokenizer, options, fingerprint, costs)
    right = _agreement(model, tokenizer, options, fingerprint)
    most = options.speculate or DRAFTS
    said = partial(said_a_round, right)
    drafts = costs.best(said, most) or 1
    forecast = costs.speculating(said(drafts), drafts)
    why = f"The first exit is right about {right.mean():.0%} of what the model says, so speculation would be "
    if forecast < WORTH_IT:
        why += f"{forecast:.2f} times as fast as full depth, which it therefore is."
        return Choice(FullDepth, "full depth", forecast, why)
    way = partial(Speculate, drafts=most, best=costs.best)
    return Choice(way, "speculation", forecast, f"{why}{forecast:.2f} times as fast as full depth.")


def _agreement(model, tokenizer, options: EngineOptions, fingerprint: str) -> NDArray:
    """As `agreement` finds it, with the settings of the answers that are to come; once for each model and settings."""
    prompts = trial_text(model, tokenizer, *TRIAL)
    settings = _settings(options)

    def find() -> dict:
        with progress("How often the first exit is right", total=len(prompts) * (TRIAL_NEW + 1)) as advance:
            return {"right": agreement(model, prompts, TRIAL_NEW, settings, advance)}

    made_from = _made_from("agreement", model, prompts, fingerprint) | {"new": TRIAL_NEW, "settings": settings}
    return remembered(made_from, find)[0]["right"]


def _settings(options: EngineOptions) -> dict[str, Any]:
    """Arguments of transformers' `generate` by which the answers that are to come are drawn."""
    return options.of_generate() if isinstance(options, AnswerOptions) else {}


def _made_from(what: str, model, text: Tensor, fingerprint: str) -> dict:
    return {
        "what": what, "model": fingerprint, "text": sha256(text.numpy().tobytes()).hexdigest(),
        "dtype": str(model.dtype), "device": model.device.type,
    }  # fmt: skip


def _by_quality(model, tokenizer, options: EngineOptions, fingerprint: str, costs: Costs) -> Choice:
    windows, context = QUALITY
    text = trial_text(model, tokenizer, windows, context)

    def find() -> dict:
        with progress("How sure exits must be", total=passes(windows, costs.loops)) as advance:
            found = find_threshold(Scored(model, text, options.catch_up, advance), options.exit_quality)
        return {name: numpy.array(numpy.nan if one is None else one) for name, one in asdict(found).items()}

    made_from = _made_from("threshold", model, text, fingerprint)
    made_from |= {"limit": options.exit_quality, "catch_up": options.catch_up}
    kept = {name: array.tolist() for name, array in remembered(made_from, find)[0].items()}
    kept["value"] = None if math.isnan(kept["value"]) else kept["value"]
    found = Threshold(**kept | {"shares": tuple(kept["shares"])})
    if found.value is None:
        return Choice(
            FullDepth, "full depth", None, f"The loss would grow by {options.exit_quality} nats a token or more, "
            "however few of them left early: all go through all loops.",
        )  # fmt: skip
    forecast = costs.leaving(found.shares)
    left = ", ".join(f"{share:.0%} after loop {loop}" for loop, share in enumerate(found.shares[:-1], 1))
    said = (
        f"Leaving where an exit is surer than {found.value:.3f} ({left}) costs {found.growth:.4f} nats a token, at "
        f"most {found.most:.4f}, and would be {forecast:.2f} times as fast as full depth"
    )
    if forecast < WORTH_IT:
        return Choice(FullDepth, "full depth", forecast, f"{said}, which it therefore is.")
    return Choice(partial(Leave, threshold=found.value, catch_up=options.catch_up), "early exits", forecast, f"{said}.")


def trial_text(model, tokenizer, windows: int, context: int) -> Tensor:
    """Text that Python ships and that no training of ours has seen: (windows, context) token ids."""
    context = longest_context(model.config, context)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    found = held_out_windows([BUILT_IN_TEXT], "text", tokenizer, vocabulary, context, windows * context)
    return torch.as_tensor(found.ids[:windows]).long()
