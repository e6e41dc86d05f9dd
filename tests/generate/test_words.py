"""Text at both ends of the engine: prompts, pieces as they come, and texts that end an answer."""

import pytest
from pico import VOCABULARY, pico_tokenizer

from rrtc.errors import RrtcError, WrongUsage
from rrtc.generate.words import Words, prompt_ids

TEXT = "Ein Café über dem Fluß, 日本語 and 🙂 at the end."


def pieces(text: str, stops=()) -> tuple[list[str], str, int]:
    """(what is shown, the whole text, how many tokens were taken) of an answer that would say `text`."""
    shown: list[str] = []
    words, taken = Words(pico_tokenizer(), shown.append, stops), 0
    for token in pico_tokenizer()(text)["input_ids"]:
        taken += 1
        if words.add(token):
            break
    return shown, words.finish(), taken


def test_characters_of_several_tokens_are_shown_whole():
    shown, whole, _ = pieces(TEXT)
    assert whole == "".join(shown) == TEXT
    assert all("\ufffd" not in piece for piece in shown)
    assert len(shown) > len(TEXT) / 4  # as they come


def test_bytes_that_are_no_character_do_not_hold_back_what_follows():
    tokenizer, shown = pico_tokenizer(), []
    broken = tokenizer("é")["input_ids"][:1]
    words = Words(tokenizer, shown.append)
    for token in broken * 5 + tokenizer(" the end")["input_ids"]:
        words.add(token)
    assert " the" in "".join(shown)
    assert words.finish() == tokenizer.decode(broken * 5 + tokenizer(" the end")["input_ids"]) == "".join(shown)


@pytest.mark.parametrize(
    "stops, expected", [(["Fluß"], "Ein Café über dem "), (["at the", "日"], "Ein Café über dem Fluß, "), (["?"], TEXT)]
)
def test_an_answer_ends_before_a_stop_of_which_nothing_is_shown(stops, expected):
    shown, whole, taken = pieces(TEXT, stops)
    assert whole == "".join(shown) == expected
    assert (taken < len(pico_tokenizer()(TEXT)["input_ids"])) == (expected != TEXT)


def test_special_tokens_are_not_shown():
    words = Words(pico_tokenizer())
    for token in [0, *pico_tokenizer()("hello")["input_ids"], 1]:
        words.add(token)
    assert words.finish() == "hello"


def test_prompts_are_text_or_go_through_the_chat_template():
    tokenizer = pico_tokenizer()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "?"},
    ]
    assert prompt_ids("hello", tokenizer, VOCABULARY, "it") == tokenizer("hello")["input_ids"]
    assert prompt_ids(turns, tokenizer, VOCABULARY, "it") == tokenizer("hiho\n?")["input_ids"]
    templated = type(tokenizer)(tokenizer_object=tokenizer._tokenizer)
    templated.chat_template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
    written = "<user>hi<assistant>ho<user>?<assistant>"
    assert prompt_ids(turns, templated, VOCABULARY, "it") == tokenizer(written)["input_ids"]
    templated.chat_template = "{{ raise_exception('no such turn') }}"
    with pytest.raises(RrtcError, match="The chat template of it fails with 'no such turn'."):
        prompt_ids(turns, templated, VOCABULARY, "it")
    with pytest.raises(WrongUsage, match="There is nothing in the prompt"):
        prompt_ids("", tokenizer, VOCABULARY, "it")
    with pytest.raises(RrtcError, match="The tokenizer of it has tokens that the model does not know."):
        prompt_ids("hello", tokenizer, 10, "it")
