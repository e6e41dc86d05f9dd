"""Pass keys: where they are hidden, and that a model has found one where it says it."""

import pytest
import torch
from pico import pico_model, pico_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from rrtc.errors import WrongUsage
from rrtc.eval.passkey import DEPTHS, found, make_probes

LONG = 10_000


@pytest.fixture(scope="module")
def tokenizer():
    return pico_tokenizer()


def test_a_prompt_has_its_length_and_its_key_at_its_depth(tokenizer):
    probes = make_probes(tokenizer, 400, 3, 0, LONG)
    assert [probe.depth for probe in probes] == [depth for depth in DEPTHS for _ in range(3)]
    places = []
    for probe in probes:
        number = tokenizer.decode(probe.key).strip()
        prompt = tokenizer.decode(probe.ids)
        assert 380 < len(probe.ids) <= probe.length == 400 and len(number) == 5
        assert prompt.count(number) == 1 and prompt.endswith("\n\nThe pass key is")
        places.append(prompt.index(f"The pass key is {number}") / len(prompt))
    middles = [sum(places[start : start + 3]) / 3 for start in range(0, len(places), 3)]
    assert middles == sorted(middles) and middles[0] < 0.35 and middles[-1] > 0.6
    assert len({probe.key for probe in probes}) == len(probes)


def test_probes_are_drawn_by_the_seed(tokenizer):
    one, same, other = (make_probes(tokenizer, 400, 2, seed, LONG) for seed in (1, 1, 2))
    assert one == same and {p.key for p in one}.isdisjoint({p.key for p in other})


def test_a_tokenizer_that_begins_every_text_begins_these(tokenizer):
    beginning = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, bos_token="<bos>", eos_token="<eos>")
    begin = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    before, beginning.backend_tokenizer.post_processor = tokenizer.backend_tokenizer.post_processor, begin
    try:
        probe = make_probes(beginning, 400, 1, 0, LONG)[0]
    finally:
        tokenizer.backend_tokenizer.post_processor = before
    assert probe.ids[0] == 0 and 0 not in probe.ids[1:] and 0 not in probe.key and len(probe.ids) <= 400


def test_a_length_that_cannot_be_says_why(tokenizer):
    with pytest.raises(WrongUsage, match="The model sees 402 tokens"):
        make_probes(tokenizer, 400, 1, 0, 402)
    with pytest.raises(WrongUsage, match="takes 1.. tokens at least"):
        make_probes(tokenizer, 50, 1, 0, LONG)


def test_found_is_what_greedy_generation_says(tokenizer):
    """With a key made of what the model says anyway, and with one that differs in its last token."""
    from dataclasses import replace

    model = pico_model("llama", max_position_embeddings=512)
    probe = make_probes(tokenizer, 300, 1, 0, 512)[0]
    ids = torch.tensor([probe.ids])
    said = model.generate(
        ids, attention_mask=torch.ones_like(ids), min_new_tokens=4, max_new_tokens=4, do_sample=False, pad_token_id=2
    )
    key = tuple(said[0, ids.shape[1] :].tolist())
    wrong = (*key[:-1], key[-1] + 1)
    calls = []
    probes = [probe, replace(probe, key=key), replace(probe, key=wrong)]
    assert found(model, probes, lambda: calls.append(1)).tolist() == [0, 1, 0]
    assert len(calls) == 3 and isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
