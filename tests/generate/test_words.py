"""Text at both ends of the engine: prompts, pieces as they come, and texts that end an answer."""

import json
import random
from pydoc_data.topics import topics

import pytest
from pico import VOCABULARY, pico_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

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


def spaced_tokenizer(decoder: decoders.Decoder) -> PreTrainedTokenizerFast:
    """A tokenizer as Llama 2 has it: spaces are a part of the word behind them, and characters that it does not know
    are bytes."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, special = pre_tokenizers.Metaspace(prepend_scheme="first"), ["<s>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=special, show_progress=False)
    made.train_from_iterator(sorted(topics.values())[:20], trainer)
    values = json.loads(made.to_str())
    model, known = values["model"], len(values["model"]["vocab"])
    model["vocab"] |= {f"<0x{byte:02X}>": known + byte for byte in range(256)}
    made = Tokenizer.from_str(json.dumps(values | {"model": model | {"byte_fallback": True, "unk_token": "<unk>"}}))
    made.decoder = decoder
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SPACED = {
    "strip": decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    ),
    "metaspace": decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]),
}
TOKENIZERS = {"bytes": pico_tokenizer} | {
    name: lambda made=made: spaced_tokenizer(made) for name, made in SPACED.items()
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_whatever_tokens_come_the_text_is_what_the_tokenizer_makes_of_all_of_them(name):
    tokenizer, draw = TOKENIZERS[name](), random.Random(0)
    spaces = [token for token in range(len(tokenizer)) if set(tokenizer.convert_ids_to_tokens(token)) <= {"▁", "Ġ"}]
    for _ in range(300):
        ids = [
            draw.choice([0, 1, *spaces, draw.randrange(len(tokenizer)), draw.randrange(VOCABULARY)]) for _ in range(20)
        ]
        shown: list[str] = []
        words = Words(tokenizer, shown.append)
        assert not any(words.add(token) for token in ids)
        assert words.finish() == "".join(shown) == tokenizer.decode(ids, skip_special_tokens=True), ids


def test_a_word_behind_a_special_token_keeps_its_space():
    tokenizer = TOKENIZERS["strip"]()
    ids = tokenizer("a in")["input_ids"]
    shown: list[str] = []
    words = Words(tokenizer, shown.append)
    for token in [*ids, 0, 0, *ids, 1, *ids]:
        words.add(token)
    assert words.finish() == "".join(shown) == "a in a in a in"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_goes_on_with_a_text_keeps_its_first_space(name):
    tokenizer, draw = TOKENIZERS[name](), random.Random(1)
    before = tokenizer("a in a in a in a in")["input_ids"]
    words = Words(tokenizer, before=before)
    for token in tokenizer(" in a")["input_ids"]:
        words.add(token)
    assert words.finish().startswith(" ") and Words(tokenizer, before=before).finish() == ""
    for _ in range(100):
        ids = [draw.choice([0, 1, draw.randrange(len(tokenizer))]) for _ in range(12)]
        words = Words(tokenizer, before=before)
        assert not any(words.add(token) for token in ids)
        whole = tokenizer.decode([*before, *ids], skip_special_tokens=True)
        assert tokenizer.decode(before, skip_special_tokens=True) + words.finish() == whole, ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_special_token_can_be_a_stop(name):
    tokenizer = TOKENIZERS[name]()
    end, ids = tokenizer.eos_token, tokenizer("a in")["input_ids"]
    words = Words(tokenizer, stops=["no such text", end])
    assert [words.add(token) for token in [*ids, tokenizer.eos_token_id]] == [False] * len(ids) + [True]
    assert words.finish() == "a in"
    with pytest.raises(WrongUsage, match="cannot end at .*a special token and text"):
        Words(tokenizer, stops=[f"{end}\n"])


def test_a_byte_that_is_a_stop_ends_the_answer_at_once():
    tokenizer = TOKENIZERS["strip"]()
    shown: list[str] = []
    words = Words(tokenizer, shown.append, ["\n"])
    ids = [*tokenizer("a in")["input_ids"], tokenizer.convert_tokens_to_ids("<0x0A>")]
    assert [words.add(token) for token in ids] == [False] * (len(ids) - 1) + [True]
    assert words.finish() == "".join(shown) == "a in"


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
