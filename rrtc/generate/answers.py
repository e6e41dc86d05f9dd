"""Answers to many prompts: the engine, with text at both ends."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from rrtc.console import progress
from rrtc.errors import WrongUsage
from rrtc.generate.choice import choose
from rrtc.generate.engine import UNBOUNDED, Engine
from rrtc.generate.request import Request
from rrtc.generate.stages import check_context
from rrtc.generate.ways import Leave, Speculate
from rrtc.generate.words import Show, Turns, Words, ends_of, prompt_ids
from rrtc.recipe.generate import WayOptions
from rrtc.results import GeneratedResult, GenerateResult
from rrtc.text.windows import longest_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def answer_all(
    name: str, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", prompts: Sequence[str | Turns],
    options: WayOptions, has_exits: bool, fingerprint: str, show: Show | None = None,
    done: Callable[[int, GeneratedResult], None] | None = None, numbers: Sequence[int] | None = None,
) -> GenerateResult:  # fmt: skip
    """The answers of `model`, which the user calls `name`, to all prompts. has_exits: whether its exits were trained.
    fingerprint: of its files. show(piece) is called with each piece of text as it comes, done(place, answer) with each
    answer when it is whole. numbers: which of all prompts these are, by default the first ones; what is drawn for each
    follows from that and options.seed.

    Raises, before any of them is answered, WrongUsage for a prompt that holds nothing or more than the model can see,
    and as `check_context`, `ends_of` and `choose` do.
    """
    vocabulary, context = model.get_input_embeddings().weight.shape[0], longest_context(model.config, UNBOUNDED)
    asked = []
    for number, prompt in enumerate(prompts, 1):
        ids = prompt_ids(prompt, tokenizer, vocabulary, name)
        if len(ids) >= context:
            which = f"Prompt {number}" if len(prompts) > 1 else "The prompt"
            raise WrongUsage(f"{which} has {len(ids)} tokens, and {name} can see {context}.", "Say it in fewer words.")
        asked.append(ids)
    rows, longest = min(options.batch, len(asked)), min(context, max(map(len, asked)) + options.max_tokens)
    # As Engine and Words do, but before anything is measured.
    check_context(model.config, longest)
    ends_of(options.stop, tokenizer)
    choice = choose(model, tokenizer, options, has_exits, rows, fingerprint)
    choice.tell(options)
    engine = Engine(model, choice.way, rows, longest)
    begun, found = time.perf_counter(), {}
    with progress("answers", total=len(asked)) as advance:
        drawn_as = range(len(asked)) if numbers is None else numbers
        texts_before = [ids if isinstance(prompt, str) else () for prompt, ids in zip(prompts, asked, strict=True)]
        given = engine, tokenizer, asked, texts_before, drawn_as, options
        for number, answer in _answers(*given, show or (lambda piece: None)):
            found[number] = answer
            if done is not None:
                done(number, answer)
            advance()
    way = engine.way
    return {
        "model": name,
        "answers": [found[number] for number in range(len(asked))],
        "way": choice.name,
        "why": choice.why,
        "forecast": choice.forecast,
        "tokens": sum(answer["tokens"] for answer in found.values()),
        "seconds": time.perf_counter() - begun,
        "loops": engine.stages.loops,
        "passes": engine.passes,
        "left": way.left if isinstance(way, Leave) else [],
        "drafted": way.drafted if isinstance(way, Speculate) else 0,
        "accepted": way.accepted if isinstance(way, Speculate) else 0,
    }


def _answers(
    engine: Engine,
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence[Sequence[int]],
    texts_before: Sequence[Sequence[int]],
    drawn_as: Sequence[int],
    options: WayOptions,
    show: Show,
) -> Iterator[tuple[int, GeneratedResult]]:
    """(place of a prompt in `asked`, its answer), in the order in which they are done. texts_before: of each the tokens
    that its answer goes on with as one text."""
    waiting, numbers = deque(enumerate(asked)), {}
    while waiting or engine.busy:
        while waiting and len(numbers) < engine.store.rows:
            number, ids = waiting.popleft()
            words = Words(tokenizer, show, options.stop, texts_before[number])
            # A seed of its own, so that what is drawn does not depend on the company.
            seed = None if options.seed is None else (options.seed + drawn_as[number]) % 2**32
            request: Request = engine.submit(ids, options.max_tokens, seed, words.add, **options.of_generate())
            numbers[request] = number, words
        for request in engine.step():
            number, words = numbers.pop(request)
            if request.error is not None:
                raise request.error
            yield number, {"text": words.finish(), "tokens": len(request.said), "ended": request.ended or ""}
