"""Text: what is read from which source, what is held out, and how it becomes windows of tokens."""

import copy
import json
import re
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow
import pyarrow.parquet
import pytest
import torch
from pico import VOCABULARY, pico_config, pico_tokenizer
from reading import read, refused
from tokenizers.processors import TemplateProcessing

from rrtc.errors import RrtcError
from rrtc.recipe.eval import EvalRecipe
from rrtc.recipe.schema import Recipe
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.text.sources import FEW, HELD_OUT_OF, beginning, documents, split, training_documents
from rrtc.text.windows import held_out_windows, longest_context, pack, scoring_texts


def in_rows(file: Path, rows: list[dict]) -> Path:
    """Writes rows as the suffix of `file` asks."""
    if file.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows, indent=1), encoding="utf8")
    else:
        file.write_text("\n".join(map(json.dumps, rows)), encoding="utf8")
    return file


def numbered(count: int) -> list[str]:
    return [f"Document {number} says {number * number}. " * 3 for number in range(count)]


# Sources


def test_a_text_file_is_cut_at_two_empty_lines(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("One.\n\nStill one.\n\n\nTwo, with ü and 漢.\n\n\n\n\n\n  \n", encoding="utf8")
    assert read(file) == ["One.\n\nStill one.", "Two, with ü and 漢."]


def test_windows_line_ends_are_line_ends(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\n\r\n\r\nTwo.")
    assert read(tmp_path / "a.txt") == ["One.", "Two."]


def test_any_other_file_is_read_as_text(tmp_path):
    (tmp_path / "notes.md").write_text("# Title")
    assert read(tmp_path / "notes.md") == ["# Title"]


def test_jsonl_gives_its_text_field(tmp_path):
    file = tmp_path / "a.jsonl"
    rows = [{"text": "One.\n\n\nStill one."}, {"text": ""}, {"text": None}, {"text": "Zwölf", "id": 3}]
    file.write_text("\n\n".join(json.dumps(row) for row in rows), encoding="utf8")
    assert read(file) == ["One.\n\n\nStill one.", "Zwölf"]


def test_half_a_surrogate_pair_in_json_does_not_stop_the_reading(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "bad \\ud83d end"}')
    assert read(tmp_path / "a.jsonl") == ["bad ? end"]


def test_parquet_gives_its_text_field(tmp_path):
    file = tmp_path / "a.parquet"
    body = pyarrow.array(["One.", None, "", "Zwölf"])
    for column in (body, body.cast(pyarrow.large_string()), body.dictionary_encode()):
        pyarrow.parquet.write_table(pyarrow.table({"id": [1, 2, 3, 4], "body": column}), file)
        assert read(file, "body") == ["One.", "Zwölf"]


def test_a_folder_gives_its_files_in_the_order_of_their_names(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "deep.txt").write_text("from b/deep.txt")
    (tmp_path / "c.jsonl").write_text('{"text": "from c.jsonl"}')
    (tmp_path / "a.txt").write_text("from a.txt")
    (tmp_path / "ignored.png").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.txt").mkdir()
    assert read(tmp_path) == ["from a.txt", "from b/deep.txt", "from c.jsonl"]


def test_pydoc_is_the_same_text_every_time():
    assert read("pydoc") == read("pydoc")
    words = [document.split() for document in read("pydoc")]
    assert words == [topic.split() for topic in sorted(set(topics.values()))] and len(words) > 50
    assert not any("\n\n" in document or "  " in document for document in read("pydoc"))


@pytest.mark.parametrize("content", ["", "\n\n\n\n\n\n", "   \n"])
def test_an_empty_file_is_refused(tmp_path, content):
    (tmp_path / "a.txt").write_text(content)
    assert refused(tmp_path / "a.txt").sentence == f"The text {tmp_path / 'a.txt'} is empty."


def test_empty_jsonl_and_parquet_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text("")
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        assert refused(tmp_path / name).sentence.endswith(f"{name} is empty.")


def test_a_missing_field_names_the_fields_there_are(tmp_path):
    row = {"id": 1, "content": "words"}
    (tmp_path / "a.csv").write_text("id,content\n1,words\n")
    for name in ("a.jsonl", "a.json", "a.parquet"):
        in_rows(tmp_path / name, [row])
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        file = tmp_path / name
        error = refused(file)
        assert error.sentence == f"{file} has no text field 'text'."
        assert error.hint == "Its fields are id, content; see text_field."


@pytest.mark.parametrize("value", [7, ["a", "list"], {"an": "object"}, [{"no": "role"}]])
def test_a_field_that_holds_no_text_is_refused_by_what_it_holds(tmp_path, value):
    for name in ("a.jsonl", "a.json", "a.parquet"):
        file = in_rows(tmp_path / name, [{"id": 1, "text": value}])
        kind = type(value).__name__
        assert refused(file).sentence == f"The field 'text' of {file} holds no text, but a value of the type {kind}."


def test_rows_that_are_no_objects_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('"just text"')
    assert refused(tmp_path / "a.jsonl").hint == "Its rows have no fields."


def test_files_that_are_not_what_their_names_say_are_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n{"text": "cut o')
    assert refused(tmp_path / "a.jsonl").sentence == f"Line 2 of {tmp_path / 'a.jsonl'} is not JSON."
    (tmp_path / "a.parquet").write_bytes(b"PAR1 but no more")
    assert "is not a parquet file" in refused(tmp_path / "a.parquet").sentence
    for name, content in (("a.txt", b"caf\xe9"), ("b.jsonl", b'{"text": "caf\xe9"}')):
        (tmp_path / name).write_bytes(content)
        assert refused(tmp_path / name).sentence == f"The text {tmp_path / name} is not UTF-8."


def test_a_source_that_is_nowhere_is_refused(tmp_path):
    assert refused(tmp_path / "nowhere.txt").sentence == f"There is no text at {tmp_path / 'nowhere.txt'}."
    assert "There is no text at ./nowhere" in refused("./nowhere").sentence
    assert "holds no text" in refused(tmp_path).sentence
    error = refused("no_such_dataset")
    # And why: a name that is misspelled, a network that is down and a gate that is closed are three things.
    assert re.search("no dataset of that name could be loaded: .*no_such_dataset.*[^.]\\.$", error.sentence)
    assert "pydoc" in error.hint


def test_a_dataset_that_ends_in_the_middle_is_not_called_missing(monkeypatch):
    def rows(*args, **kwargs):
        yield {"text": "one"}
        raise ConnectionError("the line is dead.")

    monkeypatch.setattr("datasets.load_dataset", rows)  # there is no network here
    found = documents("maker/corpus", "text", pico_tokenizer())
    assert next(found) == "one"
    with pytest.raises(
        RrtcError, match="^Reading the dataset maker/corpus ended after 1 documents: the line is dead.$"
    ):
        next(found)


# Held out


@pytest.mark.parametrize("count", [1, 3, 9, FEW - 1, FEW, FEW + 1, 2000])
def test_about_a_tenth_is_held_out_and_training_sees_none_of_it(count):
    found = numbered(count)
    training, held_out = split(found)
    total = sum(map(len, found))
    assert sum(map(len, training)) + sum(map(len, held_out)) == total
    assert 0.02 * total < sum(map(len, held_out)) < 0.2 * total
    assert not set(training) & set(held_out)


def test_of_few_documents_the_end_of_each_is_held_out():
    found = ["a" * 90 + "z" * 10, "b" * 45 + "y" * 5, "short"]
    assert split(found) == (["a" * 90, "b" * 45, "short"], ["z" * 10, "y" * 5])


@pytest.mark.parametrize("count", [2, 9, 30, FEW - 1])
def test_of_few_conversations_some_are_held_out_whole(tmp_path, count):
    turns = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}] for n in range(count)
    ]
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    tokenizer = copy.deepcopy(pico_tokenizer())  # which all tests share
    tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}: {{ turn.content }}</s>{% endfor %}"
    found = list(documents(str(file), "text", tokenizer))
    assert len(set(found)) == count
    training, held_out = split(found)
    assert sorted([*training, *held_out]) == sorted(found) and len(held_out) == max(1, round(count / 10))
    assert sorted(training_documents(iter(found))) == sorted(training)
    assert set(split(found[::-1])[1]) == set(held_out)


def test_a_document_stays_on_its_side_wherever_it_stands():
    found = numbered(300)
    held_out = set(split(found)[1])
    assert set(split(found[::-1])[1]) == held_out
    assert set(split(found + numbered(1000)[300:])[1]) >= held_out
    assert set(split(found + found)[1]) == held_out


def test_a_large_source_is_read_only_as_far_as_it_is_needed(tmp_path):
    file = tmp_path / "a.jsonl"
    with open(file, "w") as lines:
        lines.writelines(json.dumps({"text": text}) + "\n" for text in numbered(5000))
        lines.write("this line is not JSON, and is never reached")
    found = beginning(str(file), "text", pico_tokenizer(), 200)
    assert FEW <= len(found) < 1000 and found == numbered(len(found))
    assert len(pico_tokenizer()("".join(found))["input_ids"]) >= 200
    with pytest.raises(RrtcError, match="Line 5001"):
        beginning(str(file), "text", pico_tokenizer(), 10**6)


def test_training_and_scoring_agree_on_what_is_held_out_however_much_each_reads(tmp_path):
    for count in (3, FEW - 1, FEW, 3000):
        file = tmp_path / f"{count}.jsonl"
        file.write_text("\n".join(json.dumps({"text": text}) for text in numbered(count)))
        little, much = (beginning(str(file), "text", pico_tokenizer(), tokens) for tokens in (10, 10**9))
        trained, scored = "\n".join(split(much)[0]), split(little)[1]
        assert scored and not any(text in trained for text in scored if len(text) > 20)


# Windows


def test_documents_are_packed_one_after_the_other_with_an_end_after_each():
    tokenizer, texts = pico_tokenizer(), numbered(4)
    windows = pack(texts, tokenizer, VOCABULARY, context=16)
    expected = []
    for text in texts:
        expected += [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    count = len(expected) // 16
    assert windows.ids.dtype == torch.int64 and windows.ids.shape == (count, 16)
    assert windows.ids.flatten().tolist() == expected[: count * 16]
    assert (windows.ids == tokenizer.eos_token_id).sum() == expected[: count * 16].count(tokenizer.eos_token_id) >= 3
    assert tokenizer.decode(windows.ids[0]) == texts[0][: len(tokenizer.decode(windows.ids[0]))]


@pytest.mark.parametrize("limit", [16, 64, None])
def test_bytes_per_token_is_that_of_the_tokens_kept(limit):
    """A byte-level token is written with one character a byte, so the bytes of the kept tokens can be counted."""
    tokenizer, texts = pico_tokenizer(), ["Ein schöner Tag, 漢字. " * 9 + "0f3c9a" * 40, "Another day." * 5]
    windows = pack(texts, tokenizer, VOCABULARY, 8, limit)
    kept = windows.ids.flatten().tolist()
    end = tokenizer.eos_token_id
    expected = sum(len(token) for token, i in zip(tokenizer.convert_ids_to_tokens(kept), kept, strict=True) if i != end)
    # The last character can be cut in the middle of its three bytes.
    assert windows.bytes_per_token == pytest.approx(expected / len(kept), abs=2 / len(kept))


def test_a_long_document_is_cut_before_it_is_tokenized():
    seen = []

    class Recording(type(pico_tokenizer())):
        def __call__(self, text, **options):
            seen.extend(map(len, text))
            return super().__call__(text, **options)

    tokenizer = Recording(tokenizer_object=pico_tokenizer().backend_tokenizer, eos_token="<eos>")
    assert len(pack(["word " * 100_000], tokenizer, VOCABULARY, 8, 16).ids) == 2
    assert max(seen) <= 32 * 16


def test_every_window_begins_as_the_tokenizer_begins_a_text():
    plain = pico_tokenizer()
    backend = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    tokenizer = type(plain)(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    windows = pack(["abc def " * 30], tokenizer, VOCABULARY, 8).ids
    without = pack(["abc def " * 30], plain, VOCABULARY, 7).ids
    assert (windows[:, 0] == 0).all()
    assert torch.equal(windows[:, 1:], without)


def test_a_tokenizer_without_an_end_token_packs_without_ends():
    tokenizer = type(pico_tokenizer())(tokenizer_object=pico_tokenizer().backend_tokenizer)
    assert tokenizer.eos_token_id is None
    windows = pack(["abcdefgh" * 4], tokenizer, VOCABULARY, context=8)
    ids = tokenizer("abcdefgh" * 4)["input_ids"]
    assert windows.ids.flatten().tolist() == ids[: len(ids) // 8 * 8]


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (16, 1), (17, 2), (160, 10), (10**9, 30), (None, 30)])
def test_a_limit_is_rounded_up_to_a_window(limit, count):
    tokenizer = pico_tokenizer()
    tokens = len(tokenizer("a b c d", add_special_tokens=False)["input_ids"]) + 1
    texts = ["a b c d"] * (30 * 16 // tokens + 1)
    assert len(pack(texts, tokenizer, VOCABULARY, 16, limit).ids) == count


def test_with_a_limit_no_more_text_is_taken_than_needed():
    taken = []

    def texts():
        for text in numbered(100):
            taken.append(text)
            yield text

    pack(texts(), pico_tokenizer(), VOCABULARY, context=16, limit=32)
    assert len(taken) < 5


def test_a_text_shorter_than_one_context_is_refused():
    tokenizer = pico_tokenizer()
    tokens = len(tokenizer("Too short.", add_special_tokens=False)["input_ids"]) + 1
    with pytest.raises(RrtcError) as error:
        pack(["Too short."], tokenizer, VOCABULARY, context=512)
    assert error.value.sentence == f"The text has only {tokens} tokens, fewer than one context of 512."
    assert "smaller context" in error.value.hint
    assert pack(["Too short."], tokenizer, VOCABULARY, context=tokens).ids.shape == (1, tokens)


def test_a_context_is_at_most_what_the_model_can_see():
    assert longest_context(pico_config("llama"), 512) == 256
    assert longest_context(pico_config("llama"), 64) == 64


def test_scoring_texts_are_the_named_ones_whole_or_else_what_training_holds_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("\n\n\n".join(f"{name} {text}" for text in numbered(20)))
    sources = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    tokenizer = pico_tokenizer()
    named = scoring_texts(Recipe(eval=EvalRecipe(text=sources)), tokenizer, VOCABULARY, 16, 10**6)
    assert list(named) == ["a.txt", "b.txt"]
    assert torch.equal(named["b.txt"].ids, pack(read(sources[1]), tokenizer, VOCABULARY, 16).ids)
    held_out = scoring_texts(Recipe(uptrain=UptrainRecipe(data=sources)), tokenizer, VOCABULARY, 16, 10**6)
    ends = [end for source in sources for end in split(read(source))[1]]
    assert list(held_out) == ["held out"]
    assert torch.equal(held_out["held out"].ids, pack(ends, tokenizer, VOCABULARY, 16).ids)
    assert sum(map(len, ends)) < sum(len(text) for source in sources for text in read(source)) / (HELD_OUT_OF - 1)


def test_as_much_is_scored_of_each_text_that_training_had(tmp_path):
    short = in_rows(tmp_path / "a.jsonl", [{"text": f"a {n}"} for n in range(1000)])
    long = in_rows(tmp_path / "b.jsonl", [{"text": "b b " * 99 + str(n)} for n in range(1000)])
    tokenizer = pico_tokenizer()

    def scored(*files: Path, limit: int) -> list[int]:
        found = held_out_windows(list(map(str, files)), "text", tokenizer, VOCABULARY, 16, limit)
        return found.ids.flatten().tolist()

    for limit in (64, 640):
        half = limit // 2
        assert scored(short, long, limit=limit) == scored(short, limit=half) + scored(long, limit=half)
    most = scored(short, limit=4000)
    assert len(most) < 2000  # that is all of it, and the other makes up for it
    both = scored(short, long, limit=4000)
    assert len(both) == 4000 and both[: len(most)] == most
    assert set(tokenizer.decode(both[len(most) + 16 :], skip_special_tokens=True).replace("b", " b ").split()) <= {
        "b",
        *map(str, range(1000)),
    }


def test_scoring_texts_of_the_same_file_name_are_all_scored(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "test.txt").write_text(f"{folder} " * 200)
    sources = [str(tmp_path / folder / "test.txt") for folder in ("one", "two")]
    recipe = Recipe(eval=EvalRecipe(text=sources))
    assert list(scoring_texts(recipe, pico_tokenizer(), VOCABULARY, 16, 10**6)) == sources
