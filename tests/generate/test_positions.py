"""RoPE that goes by the length of the text: up to its limit everything runs as ever; beyond it nothing goes wrong in
silence."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from pico import pico_config, pico_tokenizer, save_pico
from recursive_models import randomize, rrt_config
from said import greedy

from rrtc import api
from rrtc.errors import RrtcError
from rrtc.eval import stage
from rrtc.generate import answers
from rrtc.generate.engine import Engine
from rrtc.model import RrtForCausalLM
from rrtc.model.configuration_rrt import turns_at
from rrtc.plan import ends_of_loops, read_visits
from rrtc.recipe.generate import ServeOptions
from rrtc.recipe.schema import Recipe
from rrtc.serve import server

LIMIT = 64
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 6, "long_factor": [4.0] * 6,
}  # fmt: skip
KINDS = {
    "longrope": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": LIMIT}),
    "dynamic": (
        "llama",
        {
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
            "max_position_embeddings": LIMIT,
        },
    ),
}
BOTH = pytest.mark.parametrize("kind", KINDS)
PROMPT = torch.randint(3, 300, (1, 100), generator=torch.Generator().manual_seed(3))
SAYS = r"runs this model up to 64 tokens, beyond which it encodes positions by the length of the text; .* {} here\."


@functools.cache
def model_of(kind: str) -> RrtForCausalLM:
    architecture, changes = KINDS[kind]
    torch.manual_seed(0)
    return randomize(RrtForCausalLM(rrt_config(architecture, pico_config(architecture, **changes)))).double()


def folder_of(kind: str, folder: Path, is_recursive: bool) -> Path:
    architecture, changes = KINDS[kind]
    save_pico(folder, architecture, **changes)
    if is_recursive:
        copy.deepcopy(model_of(kind)).float().save_pretrained(folder)
    return folder


def test_it_is_read_off_the_config():
    assert {kind: turns_at(pico_config(name, **changes)) for kind, (name, changes) in KINDS.items()} == {
        "longrope": LIMIT, "dynamic": LIMIT,
    }  # fmt: skip
    assert turns_at(model_of("longrope").config) == LIMIT
    alike = LONGROPE | {"long_factor": LONGROPE["short_factor"]}
    for other in (
        pico_config("llama"),
        pico_config("gpt2"),
        pico_config("gemma3"),  # of each kind of layer its own
        pico_config("phi3", rope_parameters=alike, original_max_position_embeddings=LIMIT),
        pico_config("llama", rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}),
    ):
        assert turns_at(other) is None
    of_a_kind = {"full_attention": LONGROPE | {"original_max_position_embeddings": 32}, "sliding_attention": LONGROPE}
    of_a_kind["sliding_attention"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert turns_at(pico_config("gemma3", rope_parameters=of_a_kind)) == 32


@BOTH
def test_up_to_the_limit_the_engine_says_what_generate_says(kind):
    model, lengths = model_of(kind), (58, 50, 54)
    engine = Engine(model, rows=3, context=LIMIT, chunk=16)
    requests = [engine.submit(PROMPT[0, :length].tolist(), LIMIT - length, do_sample=False) for length in lengths]
    engine.run()
    for length, request in zip(lengths, requests, strict=True):
        alone = model.generate(PROMPT[:, :length], max_new_tokens=LIMIT - length, do_sample=False)
        assert request.tokens == alone[0].tolist()


@BOTH
def test_beyond_the_limit_the_engine_says_that_it_is_not_for_that(kind):
    with pytest.raises(RrtcError, match=SAYS.format(65)) as error:
        Engine(model_of(kind), context=LIMIT + 1)
    assert error.value.hint.startswith("Keep them within 64 tokens.") and "AutoModelForCausalLM" in error.value.hint


@pytest.mark.parametrize("is_recursive", [False, True], ids=["dense", "recursive"])
def test_answers_of_a_short_prompt_do_not_depend_on_a_long_one(is_recursive, tmp_path, monkeypatch):
    folder = folder_of("longrope", tmp_path / "model", is_recursive)
    short, long = "Once upon a time", "The end of the story is " * 10
    found = api.generate(folder, [short, "Why?"], max_tokens=12, temperature=0)["answers"]
    assert found[0]["text"] == greedy(folder, short)
    monkeypatch.setattr(answers, "choose", lambda *given: pytest.fail("exits are measured first"))
    with pytest.raises(RrtcError, match=SAYS.format(r"\d+")):
        api.generate(folder, [short, long], max_tokens=12, temperature=0)


def test_a_server_has_no_more_room_than_that():
    model = model_of("longrope")
    engine = server._engine("pico", model, pico_tokenizer(), ServeOptions(batch=1), False, "")
    assert engine.context == LIMIT
    with pytest.raises(RrtcError, match=SAYS.format(128)):
        server._engine("pico", model, pico_tokenizer(), ServeOptions(batch=1, context=128), False, "")


@pytest.mark.parametrize("is_recursive", [False, True], ids=["dense", "recursive"])
def test_chats_go_on_beyond_it_by_transformers(is_recursive, tmp_path):
    folder = folder_of("longrope", tmp_path / "model", is_recursive)
    chat = api.chat(folder, max_tokens=12, temperature=0)
    (speaker,), prompt = chat.speakers, "Once upon a time there was a model"
    text = prompt
    assert chat.answer(prompt)["answers"][0]["text"] == greedy(folder, text)
    assert speaker._engine is not None
    text += speaker.turns[-1]["content"] + "\n" + prompt
    assert chat.answer(prompt)["answers"][0]["text"] == greedy(folder, text)
    assert LIMIT - 12 < len(pico_tokenizer()(text)["input_ids"]) < LIMIT and speaker._engine is None


def test_eval_says_before_it_measures_that_the_engine_is_not_for_that(tmp_path, monkeypatch):
    dense, made = folder_of("longrope", tmp_path / "dense", False), tmp_path / "made"
    api.init(dense, made, loops=2, rank=2)
    monkeypatch.setattr(stage, "scoring_texts", None)
    with pytest.raises(RrtcError, match=SAYS.format(256)):
        stage.evaluate(str(made), Recipe(eval={"engine": True}))


@BOTH
@pytest.mark.parametrize("length", [8, 50, 70])
def test_guesses_change_nothing_where_the_limit_is_crossed(kind, length):
    asked = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 2}

    def said(**settings) -> torch.Tensor:
        """By a model that has read nothing yet: RoPE of one of the kinds remembers the longest text."""
        model = copy.deepcopy(model_of(kind))
        exits = ends_of_loops(read_visits(model.config.visits))
        model.generation_config.speculate = settings.pop("guesses", False) and {"exit": exits[0]}
        return model.generate(PROMPT[:, :length], **asked, **settings)

    expected = said()
    assert torch.equal(said(guesses=True), expected)
    if kind == "longrope":  # keys that the other kind has read before the limit stay as they are
        assert torch.equal(said(use_cache=False), expected)
