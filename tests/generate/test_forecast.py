"""What exits would win, from times; and thresholds, from the loss of text that is scored as it would be generated."""

from functools import partial

import numpy
import pytest
import torch
from recursive_models import double, idle_after_the_first_loop, nearly_idle, recursive, tokens

from rrtc.generate.agreement import agreement, said_a_round
from rrtc.generate.engine import Engine
from rrtc.generate.forecast import Costs, measure_costs
from rrtc.generate.quality import NEVER, PROMPT, Scored, find_threshold, passes
from rrtc.generate.ways import Leave, Speculate

COSTS = Costs(loops=2, whole=2.2, first=1.0, head=0.2, rest=1.2, rest_more=0.0)
WINDOWS = tokens(8, 40)


@pytest.mark.parametrize(
    "said, drafts, expected",
    [
        (2.0, 1, 2 * 2.2 / (2 * 1.0 + 0.2 + 1.2)),
        (4.0, 3, 4 * 2.2 / (4 * 1.0 + 3 * 0.2 + 1.2)),
        (1.75, 2, 1.75 * 2.2 / (3 * 1.0 + 2 * 0.2 + 1.2)),
        (1.0, 0, 1.0),
    ],
)
def test_speculation_by_hand(said, drafts, expected):
    assert COSTS.speculating(said, drafts) == pytest.approx(expected)


def said_each(kept: float, drafts: int) -> float:
    return sum(kept**number for number in range(drafts + 1))


def test_the_best_number_of_drafts():
    best = {kept: COSTS.best(partial(said_each, kept), 8) for kept in (0.1, 0.8, 1.0)}
    assert best == {0.1: 0, 0.8: 2, 1.0: 8}
    assert max(range(1, 9), key=lambda drafts: COSTS.speculating(said_each(0.8, drafts), drafts)) == 2
    assert COSTS.best(partial(said_each, 1.0), 0) == 0


def test_leaving_by_hand():
    assert COSTS.leaving([0.0, 1.0]) == pytest.approx(2.2 / (1.2 + 1.2))  # the head is asked twice
    assert COSTS.leaving([1.0, 0.0]) == pytest.approx(2.2 / 1.2)
    three = Costs(loops=3, whole=3.2, first=1.0, head=0.2, rest=2.2, rest_more=0.0)
    assert three.leaving([0.5, 0.25, 0.25]) == pytest.approx(3.2 / (1.2 + 0.5 * 1.1 + 0.25 * 1.1))


@pytest.mark.parametrize("recipe", [{"sharing": "middle_cycle"}, {"loops": 3}], ids=str)
def test_costs_are_measured_where_tokens_can_leave(recipe):
    found = measure_costs(recursive("llama", **recipe), requests=2, context=20)
    assert found.loops == recipe.get("loops", 2)
    assert min(found.whole, found.first, found.rest) > 0 <= min(found.head, found.rest_more)
    assert measure_costs(recursive("llama", sharing="sequence")) is None


PROMPTS, NEW = tokens(3, 12), 24
GREEDY = {"do_sample": False}


def test_an_exit_agrees_with_the_end_where_nothing_follows():
    advanced = []
    assert (agreement(idle_after_the_first_loop(), PROMPTS, NEW, GREEDY, lambda: advanced.append(1)) == 1).all()
    assert len(advanced) == len(PROMPTS) * (NEW + 1)


@pytest.mark.parametrize("loops", [2, 3])
def test_rounds_say_what_the_agreement_on_the_models_own_text_says(loops):
    model = nearly_idle(loops)
    right = agreement(model, PROMPTS, NEW, GREEDY)
    assert right.shape == (len(PROMPTS), NEW) and set(right.flatten()) == {0, 1} and 0.3 < right.mean() < 0.98
    rounds = []

    class Counted(Speculate):
        def _check(self, request, *others):
            rounds.append(request)
            super()._check(request, *others)

    engine = Engine(model, partial(Counted, drafts=3), rows=2, context=64)
    for ids in PROMPTS.tolist():  # the first token of an answer follows from the prompt
        engine.submit(ids, NEW + 1, **GREEDY, eos_token_id=None)
    engine.run()
    assert said_a_round(right, 3) == pytest.approx(right.size / len(rounds))


def test_with_sampling_drafts_are_right_as_often_as_they_are_kept():
    settings = {"do_sample": True, "temperature": 1.5}
    right = agreement(nearly_idle(2), tokens(16, 12), NEW, settings)
    engine = Engine(nearly_idle(2), partial(Speculate, drafts=1), rows=16, context=64)
    for seed, ids in enumerate(tokens(16, 12).tolist()):
        engine.submit(ids, NEW + 1, seed, **settings, eos_token_id=None)
    engine.run()
    assert 0.3 < right.mean() < 0.95 and abs(engine.way.accepted / engine.way.drafted - right.mean()) < 0.08


def test_a_round_by_hand():
    # Three drafts at a time: 1 1 0* | 1 1 1 * | 0*, where * is the token that the round itself adds.
    assert said_a_round(numpy.array([[1, 1, 0, 1, 1, 1, 0, 0]], bool), 3) == pytest.approx(8 / 3)
    assert said_a_round(numpy.array([[1, 1, 1], [0, 1, 0]], bool), 1) == pytest.approx(6 / 4)
    assert said_a_round(numpy.array([[1, 0]], bool), 0) == 1.0


@pytest.mark.parametrize("recipe", [{"sharing": "middle_cycle"}, {"loops": 3}], ids=str)
@pytest.mark.parametrize("catch_up", [False, True])
@torch.inference_mode()
def test_text_is_scored_as_it_would_be_generated(recipe, catch_up):
    model = double("llama", **recipe)
    scored = Scored(model, WINDOWS[:1], catch_up)
    ids, threshold = WINDOWS[0], scored.sureness(0.4)
    losses, loops = scored._losses(0, threshold)
    assert loops[:PROMPT].eq(scored.stages.loops - 1).all() and 3 < loops[PROMPT:].eq(0).sum() < len(ids) - PROMPT
    # The engine, made to say what the text says.
    said = []

    class Forced(Leave):
        def say(self, request, logits):
            at = len(request.tokens)
            said.append((-float(logits.float().log_softmax(-1)[ids[at]]), request.span.loop))
            request.take(int(ids[at]))
            if request.ended is None:
                request.enter(request.said[-1:], at)

    engine = Engine(model, partial(Forced, threshold=threshold, catch_up=catch_up), context=64)
    engine.submit(ids[:PROMPT].tolist(), len(ids) - PROMPT, do_sample=False, eos_token_id=None)
    engine.run()
    assert [loop for _, loop in said] == loops[PROMPT - 1 : -1].tolist()
    assert torch.tensor([loss for loss, _ in said]) == pytest.approx(losses[PROMPT - 1 : -1].float(), abs=1e-5)


@torch.inference_mode()
def test_the_growth_of_the_loss_is_from_full_depth():
    model = double("llama")
    scored = Scored(model, WINDOWS[:2])
    growth, shares = scored.leaving(NEVER)
    assert growth == [0.0, 0.0] and shares == [0.0, 1.0]
    logits = model(WINDOWS[:2]).logits.float().log_softmax(-1)
    full = -logits[:, :-1].gather(-1, WINDOWS[:2, 1:, None])[..., 0]
    assert scored._full[1][:-1].float() == pytest.approx(full[1], abs=1e-5)


def test_the_threshold_keeps_to_the_limit():
    model, advanced = double("llama"), []
    scored = Scored(model, WINDOWS, advance=lambda: advanced.append(1))
    strict, loose = (find_threshold(scored, limit) for limit in (0.1, 5.0))
    assert len(advanced) <= passes(len(WINDOWS), 2, 2)
    assert loose.most < 5.0 and loose.shares[0] >= strict.shares[0]
    assert strict.value is None or strict.most < 0.1
    idle = find_threshold(Scored(idle_after_the_first_loop(), WINDOWS), 0.001)
    assert idle.growth == pytest.approx(0, abs=1e-6) and idle.shares[0] > 0.7
    with pytest.raises(ValueError, match="7 windows are too few"):
        find_threshold(Scored(model, WINDOWS[:7]), 0.1)
