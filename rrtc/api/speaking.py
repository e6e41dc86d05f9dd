"""What a model says: in a conversation, to many prompts at once, and to whoever asks a server."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rrtc.api.call import Place, check_one_process, home, work
from rrtc.api.models import load
from rrtc.console import quiet_libraries
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.provenance import PROVENANCE
from rrtc.io.source import Source, answers_hash, check_tokenizer, find_base, find_model
from rrtc.recipe.chat import ChatOptions
from rrtc.recipe.generate import ServeOptions, WayOptions
from rrtc.recipe.schema import with_flags
from rrtc.results import GeneratedResult, GenerateResult, ServeResult
from rrtc.serve.place import bind, check_installed
from rrtc.text.prompts import AnswersFile, Prompt, check_prompt_value, prompt_of, read_prompts

if TYPE_CHECKING:
    from rrtc.chat import Chat
    from rrtc.generate.words import Show


def chat(
    model: Place, against: Place | None = None, *, max_tokens: int | None = None, temperature: float | None = None,
    top_p: float | None = None, seed: int | None = None, verbose: bool = False,
) -> "Chat":  # fmt: skip
    """A conversation with `model`, which may be all that `load` takes:

        print(api.chat("healed").answer("Why is the sky blue?")["answers"][0]["text"])

    What is said next is said after that. Where the tokenizer has a chat template, it is used; where it has none, the
    model goes on with the text. against: another model that is told the same, or "dense": the one that the folder
    `model` was made from. The others: of ChatOptions; as the model's own generation defaults have it where not given.
    Raises RrtcError where one of the models cannot be found or has no tokenizer.
    """
    options = {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    asked, name = with_flags(ChatOptions(), options, "the call"), home(model)
    with work(verbose, f"Reading {name}", heavy=False):
        sources = [find_model(name)]
        if against is not None:
            sources.append(_dense_of(Path(name), home(against)))
        for source in sources:
            source.weights()
            check_tokenizer(source.folder)
        with quiet_libraries():
            from rrtc.chat import Chat, Speaker
            from rrtc.machine import device

            return Chat([Speaker(one.uri, *load(one.folder, device=device()), asked) for one in sources])


def generate(
    model: Place, prompts: "Prompt | Sequence[Prompt]", *, show: "Show | None" = None,
    done: "Callable[[int, GeneratedResult], None] | None" = None, verbose: bool = False, **options: Any,
) -> GenerateResult:  # fmt: skip
    """Goes on with many prompts at once, with `model`, which may be all that `load` takes:

        for answer in api.generate("healed", ["Once upon a time", "The sky is"], max_tokens=40)["answers"]:
            print(answer["text"])

    A prompt is text that is gone on with, or a list of messages for the chat template. show(piece) is called with each
    piece of text as it comes, done(number, answer) with each answer as soon as it is whole. options: of WayOptions in
    rrtc/recipe/generate.py. What a request is answered does not depend on the others.

    Raises WrongUsage for prompts that hold nothing or more than the model can see, and for exits that the model does
    not have; RrtcError where the model cannot be found, or has no tokenizer.
    """
    given = [prompts] if isinstance(prompts, str | Mapping) or not isinstance(prompts, Iterable) else list(prompts)
    several = cast("list[Prompt]", [given] if given and isinstance(given[0], dict) else given)
    if not several:
        raise WrongUsage("There are no prompts.")
    for number, prompt in enumerate(several, 1):
        check_prompt_value(prompt, f"Prompt {number}")
    return _generate(home(model), several, with_flags(WayOptions(), options, "the call"), verbose, show, done)


def _generate(
    name: str, prompts: "list[Prompt]", options: WayOptions, verbose: bool, show: "Show | None" = None,
    done: "Callable[[int, GeneratedResult], None] | None" = None, numbers: Sequence[int] | None = None,
    fingerprint: str | None = None,
) -> GenerateResult:  # fmt: skip
    """`generate`, of checked arguments. numbers: as for rrtc.generate.answers.answer_all. fingerprint: the model's
    `answers_hash`, where it is known already: all weights are read for it."""
    with work(verbose, f"Reading {name}"):
        source = find_model(name)
        source.weights()
        check_tokenizer(source.folder)
        from rrtc.generate.answers import answer_all
        from rrtc.generate.words import stops_of
        from rrtc.io.recursive import trained_exits
        from rrtc.machine import device

        loaded, tokenizer = load(source.folder, device=device())
        options = options.model_copy(update={"stop": stops_of(options.stop, loaded.generation_config)})
        return answer_all(
            name, loaded, tokenizer, prompts, options, bool(trained_exits(source.folder)),
            fingerprint or answers_hash(source.folder), show, done, numbers,
        )  # fmt: skip


def generate_file(
    model: Place, prompts: Place, output: Place, *, resume: bool = False, verbose: bool = False, **options: Any
) -> GenerateResult | None:
    """`generate` for the .jsonl file `prompts`, a line of which is {"prompt": …} or {"messages": …}, into the new
    .jsonl file `output`: the same lines, with `text`, `tokens` and `ended`. resume: goes on from what an interrupted
    run has answered already. What is returned is about the prompts that were answered now; None where all had been."""
    asked, name = with_flags(WayOptions(), options, "the call"), home(model)
    rows = read_prompts(Path(home(prompts)))
    fingerprint = answers_hash(find_model(name).folder)
    file = AnswersFile(Path(home(output)), rows, asked.model_dump(mode="json") | {"model": fingerprint})
    file.check(resume)
    left = [number for number in range(len(rows)) if number not in file.done]
    with file.writing():
        if not left:
            return None
        return _generate(
            name, [prompt_of(rows[number]) for number in left], asked, verbose,
            done=lambda number, answer: file.add(left[number], answer), numbers=left, fingerprint=fingerprint,
        )  # fmt: skip


def serve(model: Place, *, verbose: bool = False, **options: Any) -> ServeResult:
    """Answers requests of OpenAI's protocol with `model`, which may be all that `load` takes, until Ctrl-C or SIGTERM:
    /v1/completions, /v1/chat/completions, /v1/models and /health. options: of ServeOptions in rrtc/recipe/generate.py.

    Raises RrtcError, before it listens, where the packages of the extra `serve` are not installed, nothing can listen
    at the address, the model cannot be found or has no tokenizer, or there is no room for so many requests; WrongUsage
    for exits that the model does not have, and a context that it cannot see.
    """
    asked, name = with_flags(ServeOptions(), options, "the call"), home(model)
    check_one_process("serve")
    check_installed()
    with work(verbose, f"Reading {name}", heavy=False), bind(asked.host, asked.port) as place:
        source = find_model(name)
        source.weights()
        check_tokenizer(source.folder)
        with quiet_libraries():
            from rrtc.io.recursive import trained_exits
            from rrtc.machine import device
            from rrtc.serve.server import serve

            loaded, has_exits = load(source.folder, device=device()), bool(trained_exits(source.folder))
            return serve(*loaded, name, asked, has_exits, answers_hash(source.folder), place)


def _dense_of(folder: Path, named: str) -> Source:
    """The model that the user named to compare the one in `folder` with; "dense" is the one that it was made from."""
    if named == "dense" and not (folder / PROVENANCE).exists():
        sentence = f"{folder} was not written by rrtc, so nothing says which dense model it was made from."
        raise RrtcError(sentence, "Name a model in place of 'dense'.")
    return find_base(folder, None if named == "dense" else named, "--against")
