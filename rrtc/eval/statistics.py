"""How sure a score is: bootstrap standard errors, and differences from the dense model on the same items.

An item is what could have been another one: a window of text, a question, a hidden key. The bootstrap draws as many
items as there are, with replacement, many times over; what a score does meanwhile is its uncertainty. For a difference
both models are looked at on the same drawn items, so that what makes items hard for both does not count.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
from numpy.typing import NDArray

RESAMPLES = 1000
INTERVAL = (2.5, 97.5)  # percentiles
BINS = 15  # of probabilities, equally wide
NORMAL = 1.96  # standard deviations on either side that hold 95 % of a normal distribution
FEWEST = 8  # items: a spread of fewer says little of what others would have been, and nothing where all are alike
AT_ONCE = 50  # resamples: bounds the memory for tasks of many items


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums over items, and what it was in each of RESAMPLES bootstrap samples (None for fewer than FEWEST
    items); the same for its difference from the dense model's, None where there is nothing to compare with."""

    value: float
    resampled: NDArray | None
    difference: float | None = None
    difference_resampled: NDArray | None = None

    def as_score(self) -> dict:
        """The score, in the form in which rrtc/io/report.py describes it."""
        stderr = None if self.resampled is None else float(self.resampled.std(ddof=1))
        difference = None
        if self.difference is not None:
            low, high = (
                (None, None)
                if self.difference_resampled is None
                else (float(end) for end in numpy.percentile(self.difference_resampled, INTERVAL))
            )
            difference = {"value": self.difference, "low": low, "high": high}
        return {"value": self.value, "stderr": stderr, "difference": difference}


def estimate(values: NDArray, sizes: NDArray | None, dense: NDArray | None, seed: Sequence[int]) -> Estimate:
    """The sum of `values` over the sum of `sizes`, all (items,); without sizes the mean. dense: the values of the dense
    model on the same items. seed: of the bootstrap; items that have nothing to do with each other need other ones."""
    from scipy.stats import bootstrap

    values = numpy.asarray(values, float)
    sizes = numpy.ones(len(values)) if sizes is None else numpy.asarray(sizes, float)

    def ratio(ours, sizes, axis=-1):
        return ours.sum(axis=axis) / sizes.sum(axis=axis)

    def resampled(ours):
        if len(ours) < FEWEST:
            return None
        drawn = bootstrap(
            (ours, sizes), ratio, paired=True, vectorized=True, n_resamples=RESAMPLES, batch=AT_ONCE,
            method="percentile", rng=numpy.random.default_rng(seed),
        )  # fmt: skip
        return drawn.bootstrap_distribution

    if dense is None:
        return Estimate(float(ratio(values, sizes)), resampled(values))
    beside = values - numpy.asarray(dense, float)
    return Estimate(float(ratio(values, sizes)), resampled(values), float(ratio(beside, sizes)), resampled(beside))


def wilson(found: float, items: int) -> tuple[float, float]:
    """The 95 % interval (from, to) of a share of which `found` of `items` were counted: Wilson's (1927), which says how
    sure even none or all of a few are."""
    middle, spread = found + NORMAL**2 / 2, NORMAL * (found * (items - found) / items + NORMAL**2 / 4) ** 0.5
    return max(0.0, (middle - spread) / (items + NORMAL**2)), min(1.0, (middle + spread) / (items + NORMAL**2))


def over_depths(passkey: Sequence[dict]) -> dict[int, tuple[float, float, float, int]]:
    """By the length of the text, of the pass keys at all depths together: (the share that was found, the ends of its
    interval, keys). passkey: as in a row of rrtc/io/report.py."""
    found = {}
    for length in dict.fromkeys(one["length"] for one in passkey):
        cells = [(one["value"] * one["items"], one["items"]) for one in passkey if one["length"] == length]
        keys, items = (sum(column) for column in zip(*cells, strict=True))
        found[length] = keys / items, *wilson(keys, items), items
    return found


def calibration_error(
    confidence: NDArray, correct: NDArray, dense: tuple[NDArray, NDArray] | None, seed: Sequence[int]
) -> Estimate:
    """By how much the probability of a model's most probable token differs from how often that token is right: the mean
    over tokens, where those of like probability count together (BINS; Guo et al., arXiv 1706.04599, equation 3).

    confidence, correct: (windows, tokens), with 1 where the token was right. dense: the same two of the dense model.
    """
    windows, tokens = confidence.shape

    def gaps(confidence, correct):  # (windows, BINS): how far the sums are apart
        places = numpy.minimum((confidence * BINS).astype(int), BINS - 1) + BINS * numpy.arange(windows)[:, None]
        found = numpy.bincount(places.ravel(), (confidence.astype(float) - correct).ravel(), windows * BINS)
        return found.reshape(windows, BINS)

    def errors(gaps, drawn):  # drawn: how often each window was, (samples, windows)
        return numpy.abs(drawn @ gaps).sum(-1) / (windows * tokens)

    once = numpy.ones((1, windows))
    drawn = numpy.random.default_rng(seed).multinomial(windows, numpy.full(windows, 1 / windows), RESAMPLES)
    ours = gaps(confidence, correct)
    value, resampled = float(errors(ours, once)[0]), errors(ours, drawn) if windows >= FEWEST else None
    if dense is None:
        return Estimate(value, resampled)
    theirs = gaps(*dense)
    difference = None if resampled is None else resampled - errors(theirs, drawn)
    return Estimate(value, resampled, value - float(errors(theirs, once)[0]), difference)


def average(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of estimates whose items have nothing to do with each other, such as those of several tasks."""

    def mean(parts):
        return None if any(part is None for part in parts) else sum(parts) / len(parts)

    names = ("value", "resampled", "difference", "difference_resampled")
    return Estimate(**{name: mean([getattr(estimate, name) for estimate in estimates]) for name in names})
