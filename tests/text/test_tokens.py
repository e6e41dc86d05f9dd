"""Tokenizers that differ from the usual: without offsets, with more tokens than the model, and broken ones."""

import json

import numpy
import pytest
import torch
from accelerate import PartialState
from pico import VOCABULARY, pico_tokenizer
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rrtc.errors import RrtcError
from rrtc.recipe.init import InitRecipe
from rrtc.text.calibration import calibration_windows
from rrtc.text.shards import text_shard
from rrtc.text.tokens import begin_and_end, encoded, tokenizer_fingerprint
from rrtc.text.windows import pack

TEXTS = ["Ein schöner Tag, 漢字. " * 9, "Another day. " * 5]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RRTC_CACHE", str(tmp_path / "cache"))


def changed(tmp_path, change) -> PreTrainedTokenizerFast:
    """The pico tokenizer with a change in its tokenizer.json."""
    values = json.loads(pico_tokenizer().backend_tokenizer.to_str())
    change(values)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    return PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<eos>")


# Without offsets


def test_a_tokenizer_of_python_alone_works(tmp_path):
    tokenizer = ByT5Tokenizer()
    windows = pack(TEXTS, tokenizer, 384, 16)
    expected = [token for text in TEXTS for token in (*(3 + byte for byte in text.encode()), 1)]
    assert windows.ids.flatten().tolist() == expected[: windows.ids.numel()] and len(windows.ids) == len(expected) // 16
    ends = (windows.ids == 1).sum().item()
    assert windows.bytes_per_token == pytest.approx(1 - ends / windows.ids.numel())
    source = tmp_path / "a.txt"
    source.write_text("\n\n\n".join(f"{n} words" for n in range(150)), encoding="utf8")
    shard = text_shard(str(source), "text", tokenizer, 384, 10**9, PartialState(cpu=True))
    again = text_shard(str(source), "text", ByT5Tokenizer(), 384, 10**9, PartialState(cpu=True))
    assert shard.sha256 == again.sha256
    assert shard.ids[: shard.offsets[1]].tolist() == [*(3 + byte for byte in b"0 words"), 1]


def test_without_offsets_the_bytes_of_a_text_are_shared_out():
    fast = pico_tokenizer()

    class Slow(PreTrainedTokenizerFast):
        is_fast = False

        def __call__(self, text, return_offsets_mapping=False, **options):
            assert not return_offsets_mapping
            return super().__call__(text, **options)

    slow = Slow(tokenizer_object=fast.backend_tokenizer, eos_token="<eos>")
    with_offsets, without = (list(encoded(TEXTS, one, VOCABULARY, sizes=True)) for one in (fast, slow))
    for text, (ids, sizes), (others, shared) in zip(TEXTS, with_offsets, without, strict=True):
        assert ids == others and len(sizes) == len(shared) == len(ids)
        assert sum(sizes) == len(text.encode()) and sum(shared) == pytest.approx(len(text.encode()))
        assert numpy.ptp(shared[:-1]) == 0 and shared[-1] == sizes[-1] == 0
    for tokenizer in (fast, slow):
        assert list(encoded(["", "<eos>"], tokenizer, VOCABULARY, sizes=True)) == [([1], [0]), ([1], [5])]


def test_fingerprints_differ_with_what_the_tokenizer_does():
    one, other = ByT5Tokenizer(), ByT5Tokenizer(extra_ids=7)
    found = [tokenizer_fingerprint(tokenizer) for tokenizer in (one, other, pico_tokenizer())]
    assert len(set(found)) == 3 and tokenizer_fingerprint(ByT5Tokenizer()) == found[0]


# Beyond the model


def test_a_token_that_the_model_has_no_embedding_of_is_refused_before_any_work(tmp_path):
    def more(values):
        token = {"id": VOCABULARY, "content": "word", "single_word": False, "lstrip": False, "rstrip": False}
        values["added_tokens"].append(token | {"normalized": False, "special": False})

    tokenizer = changed(tmp_path, more)
    assert pack(["no such thing here " * 9], tokenizer, VOCABULARY, 16).ids.shape[1] == 16
    source = tmp_path / "a.txt"
    source.write_text("\n\n\n".join(f"{n} is a word too" for n in range(150)))
    for read in (
        lambda: pack(["This is a word. " * 9], tokenizer, VOCABULARY, 16),
        lambda: text_shard(str(source), "text", tokenizer, VOCABULARY, 10**9, PartialState(cpu=True)),
        lambda: calibration_windows(InitRecipe(calibrate_on=[str(source)]), tokenizer, VOCABULARY, 16),
    ):
        with pytest.raises(RrtcError) as error:
            read()
        assert error.value.sentence == (
            "The text has the token word, which is number 320 of the tokenizer, and the model has embeddings of 320 "
            "tokens only."
        )
    assert not list((tmp_path / "cache" / "tokens").glob("*/about.json"))
    # A model that has it takes it, and of the same text another shard.
    assert text_shard(str(source), "text", tokenizer, 321, 10**9, PartialState(cpu=True)).ids.max() == 320


def test_an_end_of_text_that_the_model_does_not_have_is_refused():
    tokenizer = pico_tokenizer()
    assert torch.equal(pack(TEXTS, tokenizer, VOCABULARY, 8).ids, pack(TEXTS, tokenizer, 10**6, 8).ids)
    highest = max(tokenizer(TEXTS[1])["input_ids"])
    with pytest.raises(RrtcError, match=f"which is number {highest} of the tokenizer"):
        pack(TEXTS[1:], tokenizer, highest, 8)
    with pytest.raises(RrtcError, match="the token <eos>, which is number 1 of"):
        list(encoded([""], tokenizer, 1))


# Broken


def test_a_tokenizer_that_fails_is_one_sentence(tmp_path):
    def no_unknown(values):
        values["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<nope>"}

    def panics(values):
        values["post_processor"] = {
            "type": "TemplateProcessing", "pair": [], "special_tokens": {},
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
        }  # fmt: skip

    with pytest.raises(RrtcError, match="^The model's tokenizer fails: WordLevel error: Missing "):
        pack(TEXTS, changed(tmp_path, no_unknown), VOCABULARY, 8)
    with pytest.raises(RrtcError, match="^The model's tokenizer fails: "):
        begin_and_end(changed(tmp_path, panics))


def test_ending_a_run_is_no_fault_of_the_tokenizer():
    class Interrupted(PreTrainedTokenizerFast):
        def __call__(self, *_, **__):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        begin_and_end(Interrupted(tokenizer_object=pico_tokenizer().backend_tokenizer))
