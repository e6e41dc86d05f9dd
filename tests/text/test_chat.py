"""Conversations: every source of text takes them, and what is learned from is what the chat template says."""

import json
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from accelerate import PartialState
from pico import VOCABULARY, pico_tokenizer
from tokenizers.processors import TemplateProcessing

from rrtc.errors import RrtcError
from rrtc.recipe.eval import EvalRecipe
from rrtc.recipe.init import InitRecipe
from rrtc.recipe.schema import Recipe
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.text.calibration import calibration_windows
from rrtc.text.shards import Shard, text_shard
from rrtc.text.sources import check_source, documents, split
from rrtc.text.windows import pack, scoring_texts
from rrtc.uptrain.data import Stream, training_text

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported.') }}{% endif %}{% endfor %}"
)
BOTH = pytest.mark.parametrize("template", [CHATML, LLAMA], ids=["without special tokens", "bos and eos"])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))


def chat_tokenizer(template: str | None = CHATML, begins: bool = False):
    """The pico tokenizer with a chat template. begins: it begins every text with <bos> by itself, as Llama's does."""
    plain = pico_tokenizer()
    backend = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    if begins:
        backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return type(plain)(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", chat_template=template)


def chats(number: int) -> list[list[dict]]:
    return [
        [
            {"role": "user", "content": f"What is {n} and {n}?"},
            {"role": "assistant", "content": f"It is {2 * n}. " * (1 + n % 3)},
        ]
        for n in range(number)
    ]


def share_gpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt"}
    return [{"from": names.get(m["role"], m["role"]), "value": m["content"]} for m in messages]


def write(file: Path, rows: list[dict]) -> str:
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    else:
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(file)


def ids_of(messages: list[dict], tokenizer) -> list[int]:
    """What the tokenizer itself makes of a conversation, ended where the template does not end it."""
    ids = list(tokenizer.apply_chat_template(messages, tokenize=True)["input_ids"])
    return ids if ids[-1] == tokenizer.eos_token_id else [*ids, tokenizer.eos_token_id]


def in_shard(shard: Shard) -> list[list[int]]:
    return [shard.ids[a:b].tolist() for a, b in pairwise(shard.offsets)]


def shard_of(source: str, tokenizer, field: str = "text") -> Shard:
    return text_shard(source, field, tokenizer, VOCABULARY, 10**9, PartialState(cpu=True))


def refused(source: str, tokenizer, field: str = "text") -> RrtcError:
    with pytest.raises(RrtcError) as error:
        list(documents(source, field, tokenizer))
    return error.value


# What is learned from


@BOTH
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_a_conversation_is_trained_on_as_the_template_writes_it(tmp_path, name, template):
    tokenizer, every = chat_tokenizer(template), chats(150)
    source = write(tmp_path / name, [{"id": n, "messages": messages} for n, messages in enumerate(every)])
    expected = [ids_of(messages, tokenizer) for messages in every]
    found = in_shard(shard_of(source, tokenizer))
    written = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in every]
    training = set(split(written)[0])
    assert found == [ids for ids, text in zip(expected, written, strict=True) if text in training]
    assert 120 < len(found) < 150
    # Scoring and calibration have the same ids.
    named = scoring_texts(Recipe(eval=EvalRecipe(text=[source])), tokenizer, VOCABULARY, 16, 10**6)[name]
    everything = [token for ids in expected for token in ids]
    assert named.ids.flatten().tolist() == everything[: named.ids.numel()] and len(everything) - named.ids.numel() < 16
    wanted = InitRecipe(calibrate_on=[source], calibrate_tokens=10**5)
    calibrated = calibration_windows(wanted, tokenizer, VOCABULARY, 100).flatten().tolist()
    assert set(map(tuple, split_at_ends(calibrated, tokenizer)[1:-1])) <= set(map(tuple, found))


def split_at_ends(ids: list[int], tokenizer) -> list[list[int]]:
    found: list[list[int]] = [[]]
    for token in ids:
        found[-1].append(token)
        if token == tokenizer.eos_token_id:
            found.append([])
    return found


@BOTH
def test_the_token_that_begins_every_text_does_not_come_twice(tmp_path, template):
    tokenizer, every = chat_tokenizer(template, begins=True), chats(120)
    source = write(tmp_path / "a.jsonl", [{"messages": messages} for messages in every])
    expected = [ids_of(messages, tokenizer) for messages in every]
    bodies = [ids[1:] if ids[0] == 0 else ids for ids in expected]
    found = in_shard(shard_of(source, tokenizer))
    assert len(found) > 90 and all(ids in bodies for ids in found)
    # Kept apart, each begins with it, once: as the template writes it.
    recipe = UptrainRecipe(data=[source], separate_documents=True)
    text = training_text(recipe, tokenizer, VOCABULARY, 256, 8, None, PartialState(cpu=True))
    seen = 0
    for item in Stream(text, 8):
        starts = [*(item["position_ids"] == 0).nonzero().flatten().tolist(), 256]
        for a, b in list(pairwise(starts))[1:-1]:
            assert item["input_ids"][a:b].tolist() in ([0, *body] for body in bodies)
            seen += 1
    assert seen > 8
    # Packed, it begins every window.
    windows = pack(documents(source, "text", tokenizer), tokenizer, VOCABULARY, 16).ids
    assert (windows[:, 0] == 0).all() and windows[:, 1:].flatten().tolist() == sum(bodies, [])[: len(windows) * 15]


def test_special_tokens_that_plain_text_spells_out_do_not_come_twice_either():
    tokenizer = chat_tokenizer(begins=True)
    spelled = pack(["<bos>Some words.<eos>", "More words. " * 9], tokenizer, VOCABULARY, 8)
    plain = pack(["Some words.", "More words. " * 9], tokenizer, VOCABULARY, 8)
    assert torch.equal(spelled.ids, plain.ids)
    assert spelled.bytes_per_token > plain.bytes_per_token  # the five bytes that spell <eos> are text


@BOTH
def test_share_gpt_and_parts_of_text_say_the_same(tmp_path, template):
    tokenizer, every = chat_tokenizer(template), chats(5)
    expected = [tokenizer.apply_chat_template(messages, tokenize=False) for messages in every]
    parts = [
        [{"role": m["role"], "content": [{"type": "text", "text": m["content"][:4]}, m["content"][4:]]} for m in chat]
        for chat in every
    ]
    null = [[{**m, "tool_calls": None, "name": None} for m in messages] for messages in every]
    for name, rows in {
        "share.jsonl": [{"conversations": share_gpt(messages)} for messages in every],
        "share.parquet": [{"conversations": share_gpt(messages)} for messages in every],
        "parts.json": [{"messages": messages} for messages in parts],
        "spelled.jsonl": [{"messages": json.dumps(messages)} for messages in every],
        "null.jsonl": [{"text": None} | {"messages": messages} for messages in null],
    }.items():
        field = "messages" if name == "null.jsonl" else "text"
        assert list(documents(write(tmp_path / name, rows), field, tokenizer)) == expected, name


def test_a_conversation_that_is_spelled_out_otherwise_is_no_text(tmp_path):
    for spelled in (str(chats(1)[0]), '["a", "b"]'):  # as pandas writes a list, and a list of something else
        source = write(tmp_path / "a.jsonl", [{"messages": spelled}])
        with pytest.raises(RrtcError, match="The field 'messages' of .* holds (a list written as text|no text)"):
            list(documents(source, "text", chat_tokenizer()))


def test_the_text_field_can_name_the_conversations_and_goes_before_them(tmp_path):
    tokenizer = chat_tokenizer()
    (first, second) = chats(2)
    both = write(tmp_path / "a.jsonl", [{"text": "Plain words.", "messages": first, "dialog": second}])
    assert list(documents(both, "text", tokenizer)) == ["Plain words."]
    for field, messages in (("messages", first), ("dialog", second)):
        assert list(documents(both, field, tokenizer)) == [tokenizer.apply_chat_template(messages, tokenize=False)]
    # Rows of both kinds in one file, and conversations that are empty.
    mixed = write(tmp_path / "b.jsonl", [{"text": "Plain words."}, {"messages": first}, {"messages": []}])
    found = ["Plain words.", tokenizer.apply_chat_template(first, tokenize=False)]
    assert list(documents(mixed, "text", tokenizer)) == found


def test_a_dataset_of_conversations_is_read(monkeypatch):
    rows = [{"prompt": "one", "messages": messages} for messages in chats(3)]
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter(rows))  # there is no network here
    tokenizer = chat_tokenizer()
    expected = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in rows]
    assert list(documents("maker/chat", "text", tokenizer)) == expected


def test_on_which_day_it_is_read_changes_nothing(tmp_path):
    """Or what is held out today would be trained on tomorrow."""
    dated = "{% if strftime_now is defined %}\nToday is {{ strftime_now('%d %b %Y') }}. {% endif %}" + CHATML
    source = write(tmp_path / "a.jsonl", [{"messages": messages} for messages in chats(1)])
    (text,) = documents(source, "text", chat_tokenizer(dated))
    assert text.startswith("Today is 26 Jul 2024. <|im_start|>user")


def test_another_template_is_another_shard(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": messages} for messages in chats(5)])
    first, second = (shard_of(source, chat_tokenizer(template)) for template in (CHATML, LLAMA))
    assert first.fingerprint != second.fingerprint and first.sha256 != second.sha256


# Refused


def test_a_tokenizer_without_a_template_is_refused_before_any_work(tmp_path):
    source = write(tmp_path / "a.jsonl", [{"messages": messages} for messages in chats(150)])
    error = refused(source, chat_tokenizer(None))
    assert error.sentence == (
        f"{source} holds conversations, and the tokenizer has no chat template to write them out with."
    )
    assert "chat_template.jinja" in error.hint and "text_field" in error.hint
    check_source(source, "text")  # which knows no tokenizer
    for read in (
        lambda: shard_of(source, chat_tokenizer(None)),
        lambda: calibration_windows(InitRecipe(calibrate_on=[source]), chat_tokenizer(None), VOCABULARY, 16),
        lambda: scoring_texts(Recipe(eval=EvalRecipe(text=[source])), chat_tokenizer(None), VOCABULARY, 16, 64),
    ):
        with pytest.raises(RrtcError, match="no chat template"):
            read()


def test_a_conversation_that_the_template_refuses_is_named(tmp_path):
    for name, messages, template, reason in (
        ("a.jsonl", [{"role": "tool", "content": "x"}], LLAMA, "Only user and assistant roles are supported"),
        ("b.jsonl", [{"role": "user", "content": "x"}], "{{ messages[0].content + 1 }}", "can only concatenate str"),
        ("c.jsonl", [{"role": "user", "content": "x"}], "{{ never ends", "unexpected '.*'|expected token"),
    ):
        source = write(tmp_path / name, [{"messages": messages}])
        sentence = f"The tokenizer's chat template cannot write out a conversation of {source}: .*"
        with pytest.raises(RrtcError, match=sentence) as error:
            list(documents(source, "text", chat_tokenizer(template)))
        assert name == "c.jsonl" or reason in error.value.sentence


@pytest.mark.parametrize("content", [[{"type": "image", "url": "x.png"}], {"an": "object"}, 7, [7]])
def test_what_is_no_text_in_a_message_is_refused(tmp_path, content):
    source = write(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": content}]}])
    assert refused(source, chat_tokenizer()).sentence == f"A message in {source} has a content that is not all text."


@pytest.mark.parametrize("start", ["", "\n", "  ", "\n\n  ", "{%- set x = 1 %}\n  "])
def test_a_template_keeps_the_space_it_begins_with(tmp_path, start):
    source = write(tmp_path / "a.jsonl", [{"messages": messages} for messages in chats(1)])
    for template in (start + CHATML, start + "Chat: " + CHATML):
        tokenizer = chat_tokenizer(template)
        expected = tokenizer.apply_chat_template(chats(1)[0], tokenize=False)
        assert list(documents(source, "text", tokenizer)) == [expected]
