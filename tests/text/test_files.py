"""Files of text as people have them: which are read, which are refused by name, and which are passed over."""

import gzip
import json
import os
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pico import VOCABULARY, pico_tokenizer
from reading import read, refused

from rrtc.errors import RrtcError
from rrtc.recipe.init import InitRecipe
from rrtc.text.calibration import calibration_windows
from rrtc.text.files import NOT_TEXT, READERS
from rrtc.text.sources import check_source, source_fingerprint
from rrtc.text.windows import held_out_windows

TEXTS = ["One, with a comma.", "Zwölf 漢字.", 'He said "no".', "Two\nlines."]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS)) + "\n"


def table(delimiter: str) -> str:
    cells = [[f"{row['id']}", '"' + row["text"].replace('"', '""') + '"'] for row in ROWS]
    return "\r\n".join(delimiter.join(row) for row in [["id", "text"], *cells])


CONTENTS = {
    "a.txt": "\n\n\n".join(TEXTS),
    "a.jsonl": LINES,
    "a.ndjson": LINES,
    "lines.json": LINES,
    "array.json": json.dumps(ROWS, indent=2, ensure_ascii=False),
    "spaced.json": " \n" + json.dumps(ROWS),
    "a.csv": table(","),
    "a.tsv": table("\t"),
}


def compressed(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    stream = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(stream, "zstd") as out:
        out.write(content)
    return stream.getvalue().to_pybytes()


# Read


@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_gives_the_same_texts_whatever_it_is_packed_in(tmp_path, name):
    content = CONTENTS[name].encode()
    marked = b"\xef\xbb\xbf" + content
    for file, written in {
        name: content,
        name.upper(): content,
        f"marked-{name}": marked,
        f"{name}.gz": compressed(content, ".gz"),
        f"{name.upper()}.GZ": compressed(marked, ".gz"),
        f"{name}.zst": compressed(content, ".zst"),
    }.items():
        (tmp_path / file).write_bytes(written)
        assert read(tmp_path / file) == TEXTS, file
        check_source(str(tmp_path / file), "text")


def test_what_looks_like_a_number_or_like_nothing_in_a_table_is_text(tmp_path):
    (tmp_path / "a.csv").write_text("text,n\n007,1\nNA,2\n,3\n1e5,4\nnull,5\n")
    assert read(tmp_path / "a.csv") == ["007", "NA", "1e5", "null"]


def test_a_long_cell_is_read(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "word " * 100_000)
    assert read(tmp_path / "a.csv") == ["word " * 100_000]


def test_other_text_is_read_where_it_is_named_itself(tmp_path):
    for name in ("README.md", "code.py", "page.rst", "run.log", "LICENSE", "notes.text"):
        (tmp_path / name).write_text(f"This is {name}.")
        assert read(tmp_path / name) == [f"This is {name}."]


def test_a_tilde_is_the_home_folder_for_everyone_who_reads_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.txt").write_text("Hello world. " * 300)
    tokenizer = pico_tokenizer()
    assert read("~/t.txt") == ["Hello world. " * 300]
    assert source_fingerprint("~/t.txt") == source_fingerprint(str(tmp_path / "t.txt"))
    calibrated = calibration_windows(
        InitRecipe(calibrate_on=["~/t.txt"], calibrate_tokens=64), tokenizer, VOCABULARY, 32
    )
    assert calibrated.shape == (2, 32)
    assert held_out_windows(["~/t.txt"], "text", tokenizer, VOCABULARY, 16, 64).ids.shape[1] == 16
    assert refused("~/gone.txt").sentence == "There is no text at ~/gone.txt."
    assert refused("~nobody/gone").sentence == "There is no text at ~nobody/gone."


# Folders


def test_of_a_folder_hidden_files_are_passed_over_and_a_note_names_what_else_is_not_read(tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text(LINES)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(CONTENTS["a.csv"].encode()))
    (tmp_path / "._a.jsonl").write_bytes(b"\x00\x05\x16\x07\x00\x02\xff\xfe")
    (tmp_path / ".DS_Store").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config.json").write_text("{}")
    assert read(tmp_path) == TEXTS * 2 and not capfd.readouterr().err
    for name in ("c.pdf", "README.md", "d.JSONL.bz2"):
        (tmp_path / name).write_bytes(b"\xff")
    (tmp_path / "link").symlink_to(tmp_path)  # round in a circle
    os.mkfifo(tmp_path / "pipe.jsonl")
    for _ in range(2):
        assert read(tmp_path) == TEXTS * 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"Not read in {tmp_path}: README.md, c.pdf, d.JSONL.bz2, link, pipe.jsonl"


def test_a_folder_of_nothing_that_is_read_is_refused(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"%PDF")
    (tmp_path / ".a.jsonl").write_text(LINES)
    error = refused(tmp_path)
    assert error.sentence == f"The folder {tmp_path} holds no text."
    assert all(suffix in error.hint for suffix in READERS)


# Refused


@pytest.mark.parametrize("suffix", sorted(NOT_TEXT))
def test_data_of_another_kind_is_never_read_as_plain_text(tmp_path, suffix):
    for file in (tmp_path / f"a{suffix.upper()}", tmp_path / f"a{suffix}.gz"):
        file.write_text("<p>Hello</p>")
        assert refused(file).sentence == f"rrtc does not read text from {suffix} files: {file}."


def test_a_json_file_that_holds_no_rows_is_refused(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"text": "a setting"}, indent=2))
    assert refused(file).sentence == f"Line 1 of {file} is not JSON."
    assert "an array of objects, or one object a line" in refused(file).hint
    file.write_text(json.dumps(ROWS)[:-9])
    assert refused(file).sentence == f"The array in {file} is not JSON."
    file.write_text('["just", "strings"]')
    assert refused(file).hint == "Its rows have no fields."
    file.write_bytes(b'[{"text": "caf\xe9"}]')
    assert refused(file).sentence == f"The text {file} is not UTF-8."


def test_deep_json_is_refused_by_its_line(tmp_path):
    deep = "[" * 100_000 + "]" * 100_000
    (tmp_path / "a.jsonl").write_text(LINES + '{"text": ' + deep + "}\n")
    assert refused(tmp_path / "a.jsonl").sentence == f"Line 5 of {tmp_path / 'a.jsonl'} is not JSON."
    (tmp_path / "a.json").write_text(deep)
    assert refused(tmp_path / "a.json").sentence == f"The array in {tmp_path / 'a.json'} is not JSON."


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("id,text\n1,fine\n2,Well, that is not quoted\n", "Line 3 of {} has more columns than the header."),
        ('text\n"a quote that never ends\nand all the rest\n', "Line 3 of {} is not CSV: unexpected end of data."),
        ("id,body\n1,words\n", "{} has no text field 'text'."),
        ("text\n", "The text {} is empty."),
        ("", "{} has no text field 'text'."),
    ],
)
def test_a_damaged_table_is_refused_by_its_line(tmp_path, content, sentence):
    file = tmp_path / "a.csv"
    file.write_text(content)
    assert refused(file).sentence == sentence.format(file)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_refused(tmp_path, suffix):
    whole = compressed((LINES * 500).encode(), suffix)
    for name, content in (("cut", whole[:-50]), ("plain", LINES.encode()), ("empty", b"")):
        file = tmp_path / f"{name}.jsonl{suffix}"
        file.write_bytes(content)
        assert refused(file).sentence in (
            f"The text {file} is damaged, or is not what its name says.",
            f"The text {file} is empty.",
        )
        assert name == "empty" or "damaged" in refused(file).sentence


def test_a_damaged_page_of_a_parquet_file_is_refused(tmp_path):
    file = tmp_path / "a.parquet"
    for compression in ("snappy", "zstd", "none"):
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [f"{n} words " * 30 for n in range(500)]}), file, compression=compression
        )
        whole = bytearray(file.read_bytes())
        whole[4:60] = bytes(56)
        file.write_bytes(whole)
        assert refused(file).sentence in (
            f"{file} is not a parquet file, or is damaged.",
            f"The text {file} is damaged, or is not what its name says.",
        )


def test_pipes_devices_and_links_to_nowhere_are_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path)
    for source in ("/dev/zero", "/dev/stdin" if Path("/dev/stdin").is_char_device() else "/dev/null"):
        assert refused(source).sentence == f"The text {source} is neither a file nor a folder."
    for name in ("pipe.txt", "loop", "gone.jsonl"):
        for source in (name, str(tmp_path / name)):
            assert refused(source).sentence == f"The text {source} is neither a file nor a folder."
            with pytest.raises(RrtcError, match="neither a file nor a folder"):
                check_source(source, "text")
            with pytest.raises(RrtcError, match="neither a file nor a folder"):
                source_fingerprint(source)


def test_the_contents_of_a_compressed_file_count_not_its_place(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(compressed(LINES.encode(), ".gz"))
    first = source_fingerprint(str(tmp_path / "a.jsonl.gz"))
    shutil.move(tmp_path / "a.jsonl.gz", tmp_path / "b.JSONL.GZ")
    assert source_fingerprint(str(tmp_path / "b.JSONL.GZ")) == first
