"""Errors and intervals of scores: beside formulas where there are any, and beside repeated draws where not."""

import math

import numpy
import pytest

from rrtc.eval.statistics import FEWEST, average, calibration_error, estimate

ITEMS = numpy.random.default_rng(1).normal(2.0, 3.0, 400)


def test_the_standard_error_is_that_of_a_mean():
    score = estimate(ITEMS, None, None, [0]).as_score()
    assert score["value"] == pytest.approx(ITEMS.mean())
    assert score["stderr"] == pytest.approx(ITEMS.std() / math.sqrt(len(ITEMS)), rel=0.1)
    assert score["difference"] is None


def test_a_ratio_weighs_items_by_their_size():
    sizes = numpy.random.default_rng(2).uniform(1, 9, len(ITEMS))
    score = estimate(ITEMS * sizes, sizes, None, [0]).as_score()
    assert score["value"] == pytest.approx((ITEMS * sizes).sum() / sizes.sum())
    # The delta method, for large samples.
    spread = (ITEMS * sizes - score["value"] * sizes).std() / sizes.mean() / math.sqrt(len(ITEMS))
    assert score["stderr"] == pytest.approx(spread, rel=0.1)


def test_a_difference_is_paired():
    """What makes items hard for both models is not in the interval of their difference."""
    beside = numpy.random.default_rng(3).normal(0.1, 0.02, len(ITEMS))
    score = estimate(ITEMS + beside, None, ITEMS, [0]).as_score()
    found, half = score["difference"], 1.96 * beside.std() / math.sqrt(len(ITEMS))
    assert found["value"] == pytest.approx(beside.mean())
    assert found["low"] == pytest.approx(beside.mean() - half, abs=0.2 * half)
    assert found["high"] == pytest.approx(beside.mean() + half, abs=0.2 * half)
    assert score["stderr"] > 20 * (found["high"] - found["low"])


def test_the_interval_covers_the_truth_as_often_as_it_says():
    draw = numpy.random.default_rng(4)
    inside = 0
    for number in range(200):
        right = (draw.random(120) < 0.3).astype(float)
        found = estimate(right, None, numpy.zeros(120), [number]).as_score()["difference"]
        inside += found["low"] <= 0.3 <= found["high"]
    assert 0.89 <= inside / 200 <= 0.985


def test_the_same_seed_gives_the_same_numbers_and_another_one_others():
    one, same, other = (estimate(ITEMS, None, ITEMS[::-1], [seed]).as_score() for seed in (7, 7, 8))
    assert one == same and one["stderr"] != other["stderr"] and one["value"] == other["value"]


def test_an_average_has_the_error_of_independent_parts():
    parts = [estimate(ITEMS[:200], None, ITEMS[200:], [number]) for number in range(4)]
    score, single = average(parts).as_score(), parts[0].as_score()
    assert score["value"] == pytest.approx(single["value"])
    assert score["stderr"] == pytest.approx(single["stderr"] / 2, rel=0.1)
    assert score["difference"]["value"] == pytest.approx(single["difference"]["value"])
    width, whole = (s["difference"]["high"] - s["difference"]["low"] for s in (score, single))
    assert width == pytest.approx(whole / 2, rel=0.15)


def test_a_model_that_is_as_often_right_as_it_says_is_calibrated():
    draw = numpy.random.default_rng(5)
    confidence = draw.uniform(0.05, 1, (40, 500))
    right = (draw.random(confidence.shape) < confidence).astype(float)
    honest = calibration_error(confidence, right, None, [0]).as_score()
    assert honest["value"] < 0.015 and honest["stderr"] < 0.005
    boasting = calibration_error(numpy.minimum(confidence + 0.2, 1), right, (confidence, right), [0]).as_score()
    expected = (numpy.minimum(confidence + 0.2, 1) - confidence).mean()
    assert boasting["value"] == pytest.approx(expected, abs=0.01)
    assert boasting["difference"]["value"] == pytest.approx(boasting["value"] - honest["value"])
    assert boasting["difference"]["low"] < boasting["difference"]["value"] < boasting["difference"]["high"]


def test_calibration_is_counted_by_the_bin():
    confidence = numpy.array([[0.05, 0.06, 0.95], [1.0, 0.5, 0.52]])
    right = numpy.array([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]])
    # Bins of 1/15: {0.05, 0.06}, {0.95, 1.0}, {0.5, 0.52}: |0.11 - 1|, |1.95 - 2|, |1.02 - 1|
    assert calibration_error(confidence, right, None, [0]).value == pytest.approx((0.89 + 0.05 + 0.02) / 6)


def test_a_single_item_has_no_error():
    score = estimate(ITEMS[:1], None, ITEMS[1:2], [0]).as_score()
    assert score["stderr"] is None and score["difference"]["low"] is None
    assert score["difference"]["value"] == pytest.approx(ITEMS[0] - ITEMS[1])
    assert (
        average([estimate(ITEMS[:1], None, None, [0]), estimate(ITEMS, None, None, [0])]).as_score()["stderr"] is None
    )


def test_too_few_items_have_no_interval():
    few, enough = ITEMS[: FEWEST - 1], ITEMS[:FEWEST]
    score = estimate(few, None, few - 1, [0]).as_score()
    assert score["value"] == pytest.approx(few.mean()) and score["stderr"] is None
    assert score["difference"] == {"value": pytest.approx(1.0), "low": None, "high": None}
    assert estimate(enough, None, enough - 1, [0]).as_score()["stderr"] > 0
    confidence, correct = numpy.full((FEWEST - 1, 4), 0.9), numpy.ones((FEWEST - 1, 4))
    assert calibration_error(confidence, correct, None, [0]).as_score()["stderr"] is None
