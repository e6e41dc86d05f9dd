"""Training text: tokenized once into shards, from which training reads its windows in an order of its own."""

import copy
import gc
import json
import random
import shutil
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy
import pyarrow
import pytest
import ready
import torch
from accelerate import PartialState
from pico import EVERY_ARCHITECTURE, VOCABULARY, pico_model, pico_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM
from uptraining import curve, settings

from rrtc.api import run
from rrtc.errors import RrtcError, WrongUsage
from rrtc.io.cache import cache_folder
from rrtc.io.source import find_model
from rrtc.io.unchanged import Unchanged
from rrtc.recipe.schema import Recipe
from rrtc.recipe.uptrain import UptrainRecipe
from rrtc.text import files, shards
from rrtc.text.own import AT_ONCE, own_text
from rrtc.text.shards import Shard, own_shard, text_shard
from rrtc.text.sources import FEW, documents, split
from rrtc.text.windows import pack, scoring_texts
from rrtc.uptrain import data
from rrtc.uptrain.data import Mixture, Stream, interleaved, training_text
from rrtc.uptrain.estimate import estimate
from rrtc.uptrain.stage import uptrain

ALL = 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own for every test."""
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "tokens"


def beginning_tokenizer():
    """The pico tokenizer, but it begins every text with <bos>, as Gemma's does."""
    plain = pico_tokenizer()
    backend = type(plain.backend_tokenizer).from_str(plain.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return type(plain)(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


def texts(number: int, word: str = "says", most: int = 30) -> list[str]:
    """So many documents, all different, of a few to so many numbers."""
    draw = random.Random(word)
    return [f"{i} {word} " + " ".join(str(draw.random()) for _ in range(draw.randrange(most))) for i in range(number)]


def write(file: Path, found: list[str]) -> str:
    file.write_text("\n".join(json.dumps({"text": text}) for text in found))
    return str(file)


def tokenized(source: str, tokens: int = ALL, tokenizer=None, field: str = "text") -> Shard:
    return text_shard(source, field, tokenizer or pico_tokenizer(), VOCABULARY, tokens, PartialState(cpu=True))


def mixture(
    sources: list[str], windows: int = 10, context: int = 16, tokenizer=None, writer=None, **choices
) -> Mixture:
    recipe = UptrainRecipe(data=sources, **choices)
    tokenizer = tokenizer or pico_tokenizer()
    return training_text(recipe, tokenizer, VOCABULARY, context, windows, writer, PartialState(cpu=True))


def words(shard: Shard) -> list[str]:
    """The documents of a shard as text."""
    ends = pico_tokenizer().eos_token_id
    found = [shard.ids[a:b].tolist() for a, b in zip(shard.offsets, shard.offsets[1:], strict=False)]
    assert all(ids[-1] == ends for ids in found)
    return [pico_tokenizer().decode(ids[:-1]) for ids in found]


# -- what is in a shard


@pytest.mark.parametrize("number", [3, FEW - 1, FEW, 400])
def test_a_shard_has_the_training_documents_and_nothing_held_out(tmp_path, number):
    source = write(tmp_path / "a.jsonl", texts(number))
    training, held_out = split(texts(number))
    shard = tokenized(source)
    assert words(shard) == training and shard.complete
    assert held_out and not any(text in document for text in held_out for document in words(shard) if len(text) > 20)
    # Of a beginning nothing more.
    assert words(tokenized(source, 500)) == training[: tokenized(source, 500).documents]


def test_windows_are_what_pack_makes_of_the_documents(tmp_path):
    source = write(tmp_path / "a.jsonl", texts(150))
    training, orders = split(texts(150))[0], []
    for tokenizer in (pico_tokenizer(), beginning_tokenizer()):
        expected = pack(training, tokenizer, VOCABULARY, 24).ids
        (packed,) = mixture([source], context=24, tokenizer=tokenizer, seed=3).sources
        for epoch in range(2):
            turns = range(epoch * packed.count, (epoch + 1) * packed.count)
            found = torch.stack([torch.from_numpy(packed.window(turn)[0]) for turn in turns])
            assert sorted(packed.windows) == list(range(packed.count)) and found.dtype == torch.int64
            assert torch.equal(found, expected[packed.windows])
            orders.append(tuple(packed.windows))
        assert orders[-2] != orders[-1] and list(range(packed.count)) not in map(list, orders[-2:])


def test_longer_runs_and_other_seeds_have_the_windows_of_shorter_ones(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LEAST", 1)
    source = write(tmp_path / "a.jsonl", texts(400))
    for choices in ({}, {"separate_documents": True}):
        (short,) = mixture([source], windows=20, **choices).sources
        (longer,) = mixture([source], windows=200, seed=5, **choices).sources
        assert 20 <= short.count < 40 and longer.count >= 200
        every = {tuple(longer.window(turn)[0].tolist()) for turn in range(longer.count)}
        assert {tuple(short.window(turn)[0].tolist()) for turn in range(2 * short.count)} < every


def test_ids_are_as_short_as_the_vocabulary_allows(tmp_path):
    for vocabulary, dtype in ((2**16, "uint16"), (2**16 + 1, "uint32")):
        found = [numpy.array([0, vocabulary - 1]), numpy.array([1])]
        shard = shards._shard(
            "", {"of": vocabulary}, Unchanged(), 10, vocabulary, iter_of(found), PartialState(cpu=True)
        )
        assert shard.ids.dtype == dtype and shard.ids.tolist() == [0, vocabulary - 1, 1]
        assert shard.offsets.tolist() == [0, 2, 3] and shard.complete


def iter_of(found):
    yield from found


def test_a_long_document_is_cut_into_several(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "LONGEST", 100)
    whole = "some words and more " * 300
    found = words(tokenized(write(tmp_path / "a.jsonl", [whole])))
    assert "".join(found) == whole[: len("".join(found))] and len("".join(found)) == len(whole) * 9 // 10
    assert min(map(len, found[:-1])) >= 80 and max(map(len, found)) <= 100


@pytest.fixture
def usual_collection():
    """Garbage is looked for as often as in a user's process, and not as seldom as conftest.py has it."""
    seldom = gc.get_threshold()
    gc.set_threshold(700, 10, 10)
    yield
    gc.set_threshold(*seldom)


def peak_of_tokenizing(source: Path, number: int, tokenizer) -> int:
    """The most bytes that Python held. Other threads' are among them, so the least of several says what it took."""
    shutil.rmtree(cache_folder() / "tokens")
    tracemalloc.start()
    assert len(tokenized(str(source), ALL, tokenizer).ids) > 100 * number
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.usefixtures("usual_collection")
@pytest.mark.parametrize("suffix", ["jsonl", "txt", "csv", "jsonl.gz", "chat.jsonl.zst"])
def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch, suffix):
    for module in (shards, files):
        monkeypatch.setattr(module, "CHARACTERS_AT_ONCE", 10_000)
    peaks, tokenizer = [], copy.deepcopy(pico_tokenizer())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    for number in (200, 2000):
        source = tmp_path / f"{number}.{suffix}"
        chat = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in texts(number)]
        lines = "\n".join(chat) if "chat" in suffix else Path(write(tmp_path / "lines", texts(number))).read_text()
        content = {"txt": "\n\n\n".join(texts(number)), "csv": "\n".join(["text", *texts(number)])}.get(suffix, lines)
        compression = {".gz": "gzip", ".zst": "zstd"}.get(source.suffix)
        with pyarrow.output_stream(source, compression=compression) as stream:
            stream.write(content.encode())
        del chat, lines, content
        tokenized(str(source), 1000, tokenizer)  # whatever is loaded only once
        peaks.append(min(peak_of_tokenizing(source, number, tokenizer) for _ in range(3)))
    assert peaks[1] < 1.5 * peaks[0]


# -- the cache


def test_it_is_tokenized_once(tmp_path, cache, capfd, monkeypatch):
    source = write(tmp_path / "a.jsonl", texts(150))
    first = tokenized(source)
    assert "already" not in capfd.readouterr().err
    monkeypatch.setattr(shards, "_write", lambda *_: pytest.fail("tokenized again"))
    # The contents count, not the place.
    moved = tmp_path / "elsewhere.jsonl"
    Path(source).rename(moved)
    second = tokenized(str(moved))
    (line,) = capfd.readouterr().err.splitlines()
    assert f"{moved} is tokenized already" in line and str(cache) in line
    assert second.sha256 == first.sha256 and numpy.array_equal(second.ids, first.ids)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("ids.bin", lambda found: bytes(len(found))),
        ("ids.bin", lambda found: b"\xff" * len(found)),
        ("ids.bin", lambda found: found[:100]),
        ("ids.bin", lambda found: found[:101]),
        ("ids.bin", lambda found: None),
        ("offsets.bin", lambda found: found[:16]),
        ("offsets.bin", lambda found: found[8:] + found[:8]),
        ("about.json", lambda found: b"{"),
        ("about.json", lambda found: b"[]"),
        ("about.json", lambda found: b"\xff"),
        ("about.json", lambda found: b"[" * 100_000),
        ("about.json", lambda found: b'{"complete": true, "dtype": "uint16"}'),
        ("about.json", lambda found: found.replace(b"uint16", b"uint36")),
        ("about.json", lambda found: None),
    ],
)
def test_a_damaged_shard_is_made_again(tmp_path, cache, capfd, file, damage):
    source = write(tmp_path / "a.jsonl", texts(150))
    first = tokenized(source)
    ids, offsets, found = first.ids.tolist(), first.offsets.tolist(), cache / first.fingerprint / file
    written = damage(found.read_bytes())
    found.unlink()  # the shard that is mapped stays as it was
    if written is not None:
        found.write_bytes(written)
    capfd.readouterr()
    again = tokenized(source)
    assert f"The tokens in {found.parent} are damaged, and are made again." in capfd.readouterr().err
    assert again.ids.tolist() == ids and again.offsets.tolist() == offsets and again.sha256 == first.sha256
    assert tokenized(source).sha256 == first.sha256 and "is tokenized already" in capfd.readouterr().err
    assert {path.suffix for path in cache.iterdir()} == {"", ".lock"}


def test_another_text_field_or_tokenizer_is_another_shard(tmp_path):
    rows = [{"text": text, "title": f"{number}"} for number, text in enumerate(texts(20))]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = str(tmp_path / "a.jsonl")
    found = [tokenized(source), tokenized(source, field="title"), tokenized(source, tokenizer=beginning_tokenizer())]
    write(tmp_path / "a.jsonl", [*texts(20), "One more."])
    found.append(tokenized(source))
    assert len({shard.fingerprint for shard in found}) == len({shard.sha256 for shard in found}) == 4


def test_no_more_is_tokenized_than_is_needed_and_a_shorter_one_is_made_anew(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(shards, "CHARACTERS_AT_ONCE", 5000)
    source = write(tmp_path / "a.jsonl", texts(300))
    with open(source, "a") as file:
        file.write("\nthis line is not JSON")
    short = tokenized(source, 1000)
    assert 1000 <= short.tokens < 1500 and short.tokens - (short.offsets[-1] - short.offsets[-2]) < 1000
    assert not short.complete
    longer = tokenized(source, 3000)
    assert longer.tokens >= 3000 and len(list(cache.glob("*/ids.bin"))) == 1
    # What a run sees does not depend on what others have left in the cache.
    again = tokenized(source, 1000)
    assert again.sha256 == short.sha256 and numpy.array_equal(again.offsets, short.offsets)
    with pytest.raises(RrtcError, match="Line 301 of .* is not JSON"):
        tokenized(source)
    # Nothing half written stays, and what a kill would leave is not in the way.
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    (cache / f"{short.fingerprint}.partial").mkdir()
    (cache / f"{short.fingerprint}.partial" / "ids.bin").write_bytes(b"1234")
    assert tokenized(source, 1000).sha256 == short.sha256
    assert {path.suffix for path in cache.iterdir()} == {"", ".lock"}


def test_killed_while_a_shorter_one_is_removed(tmp_path, cache, monkeypatch):
    source = write(tmp_path / "a.jsonl", texts(300))
    short = tokenized(source, 1000)

    def cut_off(folder, *args, **kwargs):
        if not Path(folder).exists():
            return
        next(Path(folder).glob("*.bin")).unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", cut_off)
        with pytest.raises(KeyboardInterrupt):
            tokenized(source)
    again = tokenized(source)
    assert again.complete and numpy.array_equal(again.ids[: short.tokens], short.ids)


def test_a_dataset_is_known_by_its_name(monkeypatch):
    monkeypatch.setattr(
        "rrtc.text.sources._from_datasets", lambda name, field: iter(texts(150))
    )  # there is no network here
    first = tokenized("some/dataset")
    monkeypatch.setattr("rrtc.text.sources._from_datasets", lambda *_: pytest.fail("asked for again"))
    assert tokenized("some/dataset").sha256 == first.sha256


@pytest.mark.slow
def test_of_two_processes_one_tokenizes(tmp_path, cache):
    source, script = write(tmp_path / "a.jsonl", texts(150)), tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\nfrom accelerate import PartialState\nfrom rrtc.io.source import load_tokenizer\n"
        "from rrtc.text import shards\nwhole = shards._write\n"
        "def slowly(*args):\n"
        "    print('written by', os.environ['RANK'], flush=True)\n    time.sleep(1)\n    return whole(*args)\n"
        "shards._write = slowly\n"
        "tokenizer = load_tokenizer(sys.argv[2])\n"
        "shard = shards.text_shard(sys.argv[1], 'text', tokenizer, 320, 10**9, PartialState(cpu=True))\n"
        "print('has', shard.sha256, flush=True)\n"
    )
    pico_tokenizer().save_pretrained(tmp_path / "tokenizer")
    result = ready.run_two([sys.executable, script, source, tmp_path / "tokenizer"])
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("written by 0") == 1 and result.stdout.count("written by") == 1
    (shard,) = {line for line in result.stdout.splitlines() if line.startswith("has")}
    assert result.stdout.count(shard) == 2


# -- order and mixture


def test_each_epoch_has_every_window_once_in_an_order_of_its_own(tmp_path):
    source = write(tmp_path / "a.jsonl", texts(40))
    text = mixture([source], seed=1)
    epoch = text.sources[0].count
    stream = Stream(text, 2 * epoch + 3)
    seen = [tuple(item["input_ids"].tolist()) for item in stream]
    assert len(seen) == len(stream) == 2 * epoch + 3 and set(stream[0]) == {"input_ids"}
    # All tokens but those after the last whole window.
    everything = Counter(text.sources[0].shard.ids.tolist())
    for part in (seen[:epoch], seen[epoch : 2 * epoch]):
        rest = everything - Counter(token for window in part for token in window)
        assert rest.total() == text.sources[0].shard.tokens - 16 * epoch
    assert seen[:epoch] != seen[epoch : 2 * epoch] and set(seen[:epoch]) == set(seen[epoch : 2 * epoch])
    # It can be read from anywhere, and another seed gives another order.
    for number in (2 * epoch, 5, epoch + 1, 5):
        assert tuple(stream[number]["input_ids"].tolist()) == seen[number]
    assert [tuple(item["input_ids"].tolist()) for item in Stream(mixture([source], seed=2), epoch)] != seen[:epoch]


def test_every_beginning_of_a_mixture_has_the_shares():
    shares = [0.5, 0.3, 0.15, 0.05]
    numbers, turns = interleaved(shares, 1000)
    assert len(numbers) == len(turns) == 1000
    for source, share in enumerate(shares):
        so_far = (numbers == source).cumsum()
        assert abs(so_far - share * numpy.arange(1, 1001)).max() <= 1
        assert turns[numbers == source].tolist() == list(range(so_far[-1]))
    # A longer run begins in the same way.
    assert interleaved(shares, 2000)[0][:1000].tolist() == numbers.tolist()


def origins(text: Mixture, windows: int) -> list[str]:
    decoded = [pico_tokenizer().decode(item["input_ids"]) for item in Stream(text, windows)]
    return ["b" if "bees" in window else "a" if "ants" in window else "?" for window in decoded]


def test_sources_are_mixed_by_weight(tmp_path):
    a = write(tmp_path / "a.jsonl", ["ants " * 30] * 60)
    b = write(tmp_path / "b.jsonl", ["bees " * 30] * 20)
    weighted = mixture([a, b], data_weights=[1, 3], windows=400)
    assert Counter(origins(weighted, 400)) == {"a": 100, "b": 300}
    assert origins(weighted, 400)[:8].count("b") == 6
    assert weighted.sources[1].count < 300  # it came round again
    # Without weights, as much from each as it has.
    plain = mixture([a, b])
    windows = sum(source.count for source in plain.sources)
    assert Counter(origins(plain, windows)) == {"a": plain.sources[0].count, "b": plain.sources[1].count}
    assert plain.sources[0].count == pytest.approx(3 * plain.sources[1].count, rel=0.05)
    # What has no weight is not read, and a source named twice is not the same windows twice.
    (only,) = mixture([str(tmp_path / "nowhere.txt"), a], data_weights=[0, 1]).sources
    assert only.name == a
    twice = Stream(mixture([a, a], data_weights=[1, 1]), 2 * plain.sources[0].count)
    assert twice.mixture.sources[0].window(0)[0].tolist() != twice.mixture.sources[1].window(0)[0].tolist()


def test_a_short_run_chooses_from_more_than_the_first_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "LEAST", 3000)
    source = write(tmp_path / "a.jsonl", texts(300))
    (short,) = mixture([source], windows=1).sources
    assert 3000 <= short.shard.tokens < 4000
    (long,) = mixture([source], windows=400).sources
    assert 400 * 16 <= long.shard.tokens < 400 * 16 + 1000 and long.count >= 400


def test_text_that_is_held_out_as_a_whole(tmp_path):
    """A document that stands there often is on one side with all its copies."""
    document = split(texts(300))[1][0]
    with pytest.raises(RrtcError, match="copies.jsonl has only 0 tokens"):
        mixture([write(tmp_path / "copies.jsonl", [document] * 150)])


def test_text_that_fills_no_window_is_named(tmp_path):
    long, short = write(tmp_path / "long.jsonl", texts(30)), write(tmp_path / "short.jsonl", ["A few."])
    with pytest.raises(RrtcError, match=r"short.jsonl has only \d+ tokens, fewer than one context of 64"):
        mixture([long, short], context=64)
    for name, error in (("empty.txt", "is empty"), ("gone.txt", "There is no text"), ("a.jsonl", "no text field")):
        if name != "gone.txt":
            (tmp_path / name).write_text("" if name == "empty.txt" else '{"body": "words"}')
        with pytest.raises(RrtcError, match=error):
            mixture([long, str(tmp_path / name)])


@pytest.mark.parametrize(
    ("weights", "sentence"),
    [
        ([1.0], "data names 2 texts and data_weights has 1 weights"),
        ([1.0, -1.0], "a weight in data_weights is a number from 0 to 1,000,000"),
        ([1.0, 2e6], "a weight in data_weights is a number from 0 to 1,000,000"),
        ([1.0, float("nan")], "should be a finite number"),
        ([0.0, 0.0], "data_weights are all 0"),
    ],
)
def test_wrong_weights(weights, sentence):
    with pytest.raises(ValueError, match=sentence):
        UptrainRecipe(data=["a", "b"], data_weights=weights)


def test_weights_on_the_command_line():
    assert UptrainRecipe(data=["a", "b"], data_weights="3, 0.5").data_weights == [3, 0.5]
    assert UptrainRecipe(data=["a"], data_weights=2).data_weights == [2]


# -- separate documents


def segments(item: dict[str, torch.Tensor]) -> list[slice]:
    """The documents in a window, as its position_ids say."""
    starts = (item["position_ids"] == 0).nonzero().flatten().tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(item["input_ids"])], strict=True)]


def separated(tmp_path: Path, tokenizer, context: int = 64) -> list[dict[str, torch.Tensor]]:
    source = write(tmp_path / "a.jsonl", texts(60, most=3))
    return list(Stream(mixture([source], context=context, tokenizer=tokenizer, separate_documents=True), 6))


@pytest.mark.parametrize("begins", [False, True])
def test_positions_start_anew_with_each_document(tmp_path, begins):
    tokenizer = beginning_tokenizer() if begins else pico_tokenizer()
    training, items = split(texts(60, most=3))[0], separated(tmp_path, tokenizer)
    assert sum(len(segments(item)) for item in items) > 15
    for item in items:
        ids, positions = item["input_ids"], item["position_ids"]
        assert positions.dtype == torch.int64 and positions.shape == ids.shape and positions[0] == 0
        parts = segments(item)
        for part in parts:
            assert positions[part].tolist() == list(range(part.stop - part.start))
            assert not begins or ids[part.start] == tokenizer.bos_token_id  # as the document alone would begin
        for part in parts[1:-1]:  # those that are whole
            body = ids[part].tolist()[begins:]
            assert body[-1] == tokenizer.eos_token_id and tokenizer.decode(body[:-1]) in training


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
def test_a_packed_document_is_computed_as_if_alone(tmp_path, architecture, attention):
    """Its windows are longer than the sliding window of the architectures that have one."""
    items = separated(tmp_path, pico_tokenizer())
    model = pico_model(architecture)
    if attention == "sdpa" and not model._supports_sdpa:
        pytest.skip("it has eager attention only")
    model.set_attn_implementation(attention)
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits
        attending = model(batch["input_ids"], use_cache=False).logits
        for number, item in enumerate(items):
            for part in segments(item):
                alone = model(item["input_ids"][None, part], use_cache=False).logits[0]
                torch.testing.assert_close(packed[number, part], alone, rtol=0, atol=1e-5)
    assert max(part.stop - part.start for item in items for part in segments(item)) > 16
    assert (packed - attending).abs().max() > 0.1  # without position_ids they do attend to each other


@pytest.mark.slow
def test_teacher_and_student_both_keep_documents_apart(rrt, dense, tmp_path):
    source = write(tmp_path / "a.jsonl", texts(60, most=3))
    recipe = settings(data=[source], separate_documents=True, tokens=64 * 4, context=64)
    uptrain(str(rrt), str(tmp_path / "out"), recipe)
    stream = Stream(mixture([source], context=64, separate_documents=True), recipe.uptrain.batch_size)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (rrt, dense("llama")))
    losses, divergences = [], []
    for item in stream:
        ids, parts = item["input_ids"], segments(item)
        with torch.no_grad():
            log_p, log_q = (
                torch.cat([model(ids[None, part]).logits[0] for part in parts])[:-1].log_softmax(-1)
                for model in (student, teacher)
            )
        losses.append(torch.nn.functional.nll_loss(log_p, ids[1:]))
        divergences.append((log_q.exp() * (log_q - log_p)).sum(-1).mean())
    expected = (torch.stack(losses).mean().item(), torch.stack(divergences).mean().item())
    assert curve(tmp_path / "out") == [pytest.approx(expected, abs=1e-5)]


# -- text that the teacher writes


def test_own_text_is_what_the_teacher_writes_window_for_window(dense):
    teacher = find_model(str(dense("llama")))
    for tokenizer in (pico_tokenizer(), beginning_tokenizer()):
        text = mixture(["self"], windows=40, writer=teacher, tokenizer=tokenizer, seed=5)
        written = torch.cat(list(own_text(dense("llama"), tokenizer, 2 * AT_ONCE, 16, 5, lambda _: None)))
        assert text.sources[0].count == len(written) and text.tokens == written.numel()
        stream = Stream(text, len(written))
        assert sorted(item["input_ids"].tolist() for item in stream) == sorted(written.tolist())


def test_own_text_is_written_once_and_its_beginning_is_always_the_same(dense, capfd, monkeypatch, cache):
    teacher, group = find_model(str(dense("llama"))), PartialState(cpu=True)
    few, many, others = (
        own_shard(teacher, pico_tokenizer(), windows, 16, seed, group) for windows, seed in ((1, 0), (40, 0), (1, 1))
    )
    assert few.tokens == 16 * AT_ONCE and many.tokens == 2 * few.tokens and not few.complete
    assert numpy.array_equal(many.ids[: few.tokens], few.ids) and not numpy.array_equal(others.ids, few.ids)
    monkeypatch.setattr(shards, "own_text", lambda *_: pytest.fail("written again"))
    capfd.readouterr()
    assert own_shard(teacher, pico_tokenizer(), 5, 16, 0, group).sha256 == few.sha256
    assert "is written already" in capfd.readouterr().err
    assert len(list(cache.glob("*/about.json"))) == 2


def test_own_text_has_an_equal_share_without_weights(dense, tmp_path):
    long, short = (write(tmp_path / f"{number}.jsonl", texts(number)) for number in (90, 30))
    text = mixture([long, "self", short], windows=90, writer=find_model(str(dense("llama"))))
    assert [source.name for source in text.sources] == [long, "self", short]
    assert text.shares[1] == pytest.approx(1 / 3) and sum(text.shares) == pytest.approx(1)
    assert text.shares[0] / text.shares[2] == pytest.approx(text.sources[0].count / text.sources[2].count)
    assert text.sources[1].count == AT_ONCE  # 30 rounded up: none comes twice


@pytest.mark.slow
def test_training_on_own_text_and_another(rrt, dense, tmp_path, monkeypatch):
    recipe = settings(data=["self", "pydoc"], data_weights=[1, 1])
    assert uptrain(str(rrt), str(tmp_path / "out"), recipe)["last_kl"] > 0
    # Without distillation a teacher that is named writes all the same, and estimating lets it write for a few steps.
    alone = settings(data="self", teacher=str(dense("llama")), losses={"next_token": 1.0}, tokens=10**7, seed=9)
    written = []
    monkeypatch.setattr(shards, "own_text", lambda *a: written.append(a[2]) or own_text(*a))
    assert estimate(str(rrt), alone)["tokens"] >= 10**7
    assert written == [AT_ONCE]


def test_own_text_without_a_teacher_is_refused(rrt, tmp_path, monkeypatch):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded too early"))
    recipe = settings(data=["pydoc", "self"], losses={"next_token": 1.0})
    whole = Recipe.model_validate(recipe.model_dump() | {"model": str(rrt)})
    for start in (lambda: uptrain(str(rrt), str(tmp_path / "out"), recipe), lambda: run(whole, str(tmp_path / "run"))):
        with pytest.raises(WrongUsage, match="'self' is text that the teacher writes, and this run has no teacher"):
            start()
    # What is wrong with another text is said before the teacher starts to write.
    with pytest.raises(RrtcError, match="no text at gone.txt"):
        uptrain(str(rrt), str(tmp_path / "out"), settings(data=["self", "gone.txt"]))
    assert not (tmp_path / "out").exists() and not (tmp_path / "run").exists()


def test_a_model_trained_on_own_text_is_scored_on_what_others_hold_out():
    def scored(*sources: str) -> torch.Tensor:
        recipe = Recipe(uptrain=UptrainRecipe(data=list(sources)))
        return scoring_texts(recipe, pico_tokenizer(), VOCABULARY, 16, 2000)["held out"].ids

    assert torch.equal(scored("self"), scored("pydoc")) and torch.equal(scored("self", "pydoc"), scored("pydoc"))
    held_out = split(list(documents("pydoc", "text", pico_tokenizer())))[1]
    assert pico_tokenizer().decode(scored("self")[0]) in held_out[0]
