"""Cost: that what is timed and weighed is the right model, in the right order; never how long it took."""

from pathlib import Path

import pytest
import torch
from pico import pico_model, save_pico

from rrtc.errors import RrtcError
from rrtc.eval.cost import NEW, peak_memory, speed


def test_both_models_take_turns_and_do_the_same():
    dense, model = (pico_model("llama", num_hidden_layers=layers) for layers in (6, 3))
    calls = []
    for name, one in (("dense", dense), ("model", model)):
        one.register_forward_hook(lambda module, args, out, name=name: calls.append((name, args[0].shape[1])))
    rounds = []
    found = speed(dense, model, 3, lambda: rounds.append(1))
    prompt, new = found["prompt_tokens"], found["new_tokens"]
    assert prompt + new <= 256 and new == NEW and found["rounds"] == 3 and len(rounds) == 4
    order = [name for name, tokens in calls if tokens == prompt]
    assert order == ["model", "dense", "dense", "model"] * 2
    assert sum(tokens == 1 for _, tokens in calls) == 8 * new
    for what in ("prefill", "decode"):
        assert 0 < found[what]["low"] <= found[what]["ratio"] <= found[what]["high"]


def test_a_short_context_is_not_exceeded():
    tiny = pico_model("gpt2", max_position_embeddings=40)
    found = speed(tiny, tiny, 1)
    assert found["prompt_tokens"] + found["new_tokens"] == 40
    assert found["decode"]["low"] == found["decode"]["ratio"] == found["decode"]["high"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel tells on Linux alone")
def test_more_weights_take_more_memory(tmp_path, cold):
    wide = {"hidden_size": 1024, "intermediate_size": 4096}
    small, large = (save_pico(tmp_path / str(n), num_hidden_layers=n, **wide) for n in (1, 3))
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (small, large)]
    peaks = [peak_memory(folder, torch.float32) for folder in (small, large)]
    assert peaks[0] > sizes[0] and peaks[1] - peaks[0] > 0.7 * (sizes[1] - sizes[0])


@pytest.mark.slow
def test_a_model_that_does_not_load_says_so(tmp_path):
    with pytest.raises(RrtcError, match="The memory of .* could not be measured"):
        peak_memory(tmp_path, torch.float32)
