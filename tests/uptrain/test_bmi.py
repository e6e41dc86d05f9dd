"""The regularizer bmi: its sums are those of the paper, it goes on where it was left, and no model has its critic."""

import json
import math

import pytest
import torch
from initialized import logits
from safetensors import safe_open
from uptraining import BATCH, SETTINGS, STEPS, interrupt_at, metrics, settings, weights

from rrtc.errors import WrongUsage
from rrtc.recipe.schema import Recipe, checked, with_flags
from rrtc.uptrain import bmi
from rrtc.uptrain.bmi import LEAST, PAIRS, SEGMENT, TAU, Critic, P, codes, first_phase, second_pairs, segment_length
from rrtc.uptrain.estimate import estimate
from rrtc.uptrain.stage import uptrain

BMI = {"regularizers": {"bmi": 0.5}}


def critic(width: int) -> Critic:
    return Critic(width, 0).eval()


def test_segments_are_pooled_over_their_tokens_and_side_by_side():
    first, second = torch.randn(2, 11, 6), torch.randn(2, 11, 6)
    found = codes([first, second], 3)
    assert found.shape == (2, 3, 12)  # the last two tokens are left out
    for state, part in ((first, found[..., :6]), (second, found[..., 6:])):
        largest = torch.stack([state[:, 3 * k : 3 * k + 3].amax(1) for k in range(3)], 1)
        expected = (largest - largest.mean(-1, keepdim=True)) / largest.std(-1, correction=0, keepdim=True)
        torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)
    assert segment_length(511) == SEGMENT and segment_length(31) == 31 // LEAST


def test_the_first_phase_tells_the_right_segment_from_another():
    code = torch.randn(2, 4, 6)
    judge, drawn = critic(6), torch.get_rng_state()
    found = first_phase(judge, code)
    torch.set_rng_state(drawn)
    shift = torch.randint(1, 6, (6,)).tolist()
    pairs = [(window, place) for window in range(2) for place in range(3)]
    expected = 0.0
    for number, (window, place) in enumerate(pairs):
        other, behind = pairs[(number + shift[number]) % 6]
        right = judge(code[window, place], code[window, place + 1]).item()
        wrong = judge(code[window, place], code[other, behind + 1]).item()
        expected += (math.log1p(math.exp(-right)) + math.log1p(math.exp(wrong))) / 6
    assert found.item() == pytest.approx(expected, rel=1e-5)
    one, other = code[0, 0], code[1, 2]
    a, b = ([one, other, one - other, one * other, (one - other).abs()] for one, other in ((one, other), (other, one)))
    by_hand = (judge.forth(torch.cat(a)) + judge.back(torch.cat(b))) / 2
    assert judge(one, other).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_the_second_phase_weighs_segments_behind():
    code, judge = torch.randn(3, 9, 6), critic(6)
    window, x, behind, weights = second_pairs(judge, code)
    assert len(x) == 3 * PAIRS and (behind > x).all() and (behind < 9).all()
    assert weights.sum().item() == pytest.approx(1) and not weights.requires_grad
    score = judge(code[window, x], code[window, behind]) - judge(code[window, x], code[window, x + 1])
    expected = (score / TAU).exp() / (P * (1 - P) ** (behind - x - 1).float())
    torch.testing.assert_close(weights, (expected / expected.sum()).detach())
    assert critic(6).state_dict()["forth.0.weight"].equal(judge.state_dict()["forth.0.weight"])


@pytest.mark.slow
def test_an_estimate_takes_a_step_of_each_phase(rrt, monkeypatch):
    seconds = []
    monkeypatch.setattr(bmi, "second_pairs", lambda *given: seconds.append(given) or second_pairs(*given))
    assert estimate(str(rrt), settings(**BMI))["measured_steps"] == 3
    assert len(seconds) == BATCH // SETTINGS["micro_batch"]


@pytest.mark.slow
def test_a_run_goes_on_with_its_critic_and_leaves_none_behind(rrt, tmp_path, monkeypatch):
    uptrain(str(rrt), str(tmp_path / "straight"), settings(**BMI))
    steps = metrics(tmp_path / "straight")
    assert all(step["bmi"] > 0 for step in steps)
    assert [step.get("raml") is not None for step in steps] == [False] * (STEPS // 2) + [True] * (STEPS // 2)
    assert sorted(weights(tmp_path / "straight")) == sorted(weights(rrt))
    for step in steps:
        expected = step["loss"] + step["kl"] + 0.5 * (step["bmi"] + 0.05 * (step.get("raml") or 0))
        assert step["objective"] == pytest.approx(expected, rel=1e-4)

    target = tmp_path / "resumed"
    with monkeypatch.context() as patched:
        interrupt_at(patched, 8)
        with pytest.raises(KeyboardInterrupt):
            uptrain(str(rrt), str(target), settings(**BMI))
    checkpoint = target.with_name("resumed.partial") / "checkpoints" / "checkpoint-3"
    assert "critic.pt" in json.loads((checkpoint / "rrtc-whole").read_text())
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        assert not [name for name in list(file.keys()) if "critic" in name]
    assert torch.isfinite(logits(checkpoint)).all()
    uptrain(str(rrt), str(target), settings(**BMI), resume=True)
    assert (target / "model.safetensors").read_bytes() == (tmp_path / "straight" / "model.safetensors").read_bytes()
    assert [step["bmi"] for step in metrics(target)] == [step["bmi"] for step in steps]


def test_what_is_no_regularizer_is_refused():
    for value, said in (
        (["mbi=1"], "there is no regularizer 'mbi'. Did you mean 'bmi'"),
        (["bmi=-1"], "the weight of bmi is -1.0, and it should be from 0 to 1,000,000"),
        (["bmi"], "uptrain.regularizers|'regularizers.bmi' is wrong"),
    ):
        with pytest.raises(WrongUsage, match=said):
            with_flags(settings().uptrain, {"regularizers": value}, "the command line")
    with pytest.raises(WrongUsage, match="there is no regularizer"):
        checked(Recipe, {"uptrain": {"regularizers": {"critic": 1}}}, "a file")
