"""Does a detector's probability mean what it says, and how good are its yes and no.

Of all examples that get 0.8, eight in ten should be harmful. The expected calibration error (ECE)
is the mean distance between the two over ten bins that hold as many examples each; the Brier score
is the mean squared distance of each probability from the label, and punishes a probability that
says nothing too. Yes and no need a threshold; it is chosen where the detector learnt, never where
it is judged.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.special import expit
from scipy.stats import rankdata

from saefty.metrics.intervals import Bootstrap, Interval, ratio

BINS = 10
LABELLINGS = 200
"""Labellings that `ece_by_luck` is a mean over."""


@dataclass(frozen=True)
class ReliabilityBin:
    """Examples with neighbouring probabilities.

    Attributes:
        predicted: Their mean probability.
        observed: The share of them that is harmful.
        examples: How many there are.
    """

    predicted: float
    observed: float
    examples: int


@dataclass(frozen=True)
class Calibration:
    """How a detector's probabilities and decisions fit the truth.

    Attributes:
        ece: Expected calibration error, over bins of equal mass. Chance makes it larger, so that
            an interval of bootstrap draws, which add chance once more, would lie too high; it
            stands beside `ece_by_luck` instead.
        ece_by_luck: What the ECE of probabilities that are right would be on average, with as many
            examples: labels are drawn with these very probabilities, once for each cluster whose
            labels are alike.
        brier: Mean squared distance of the probability from the label.
        f1: At the threshold.
        threshold: The log-odds from which an example is called harmful.
        bins: The bins, from the least probable.
    """

    ece: float
    ece_by_luck: float
    brier: Interval
    f1: Interval
    threshold: float
    bins: tuple[ReliabilityBin, ...]


def calibration(
    scores: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    threshold: float,
    bootstrap: Bootstrap,
    *,
    bins: int = BINS,
    seed: int = 0,
) -> Calibration:
    """Measure probabilities and decisions on examples that had no part in making them.

    Args:
        scores: Log-odds that an example is harmful.
        harmful: The truth.
        threshold: Log-odds from which an example is called harmful.
        bootstrap: Draws of these examples.
        bins: How many bins of equal mass.
        seed: Fixes the labels that `ece_by_luck` draws.
    """
    p, truth = expit(scores), harmful.astype(np.float64)
    place = equal_mass_bins(p, bins)
    called = scores >= threshold

    def f1(weights: Float[np.ndarray, "draws examples"]) -> Float[np.ndarray, "draws"]:
        hits, flagged = weights @ (called & harmful), weights @ called
        return ratio(2 * hits, flagged + weights @ truth)

    lucky = _lucky_labels(p, harmful, bootstrap.codes, np.random.default_rng([seed, 5]))
    return Calibration(
        ece=float(_ece((p - truth)[None], place)[0]),
        ece_by_luck=float(_ece(p - lucky, place).mean()),
        brier=bootstrap.mean((p - truth) ** 2),
        f1=bootstrap.measured(f1, over=harmful),
        threshold=threshold,
        bins=reliability(p, harmful, place),
    )


def equal_mass_bins(
    p: Float[np.ndarray, "examples"], bins: int = BINS
) -> Int[np.ndarray, "examples"]:
    """Return each example's bin: as many examples a bin as can be, equal values never parted.

    An example of mean rank r (1 = smallest) of n goes to bin ⌊(r - ½) · bins / n⌋, so that the
    order of the examples does not matter; with many equal values bins stay empty.
    """
    return np.floor((rankdata(p) - 0.5) * bins / max(len(p), 1)).astype(np.int64)


def reliability(
    p: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    place: Int[np.ndarray, "examples"],
) -> tuple[ReliabilityBin, ...]:
    """Return the bins that hold an example, from the least probable."""
    found = []
    for number in np.unique(place):
        rows = place == number
        found.append(
            ReliabilityBin(float(p[rows].mean()), float(harmful[rows].mean()), int(rows.sum()))
        )
    return tuple(found)


def best_f1_threshold(
    scores: Float[np.ndarray, "examples"], harmful: Bool[np.ndarray, "examples"]
) -> float:
    """Return the threshold with the largest F1: the middle between two neighbouring scores.

    Of thresholds that are equally good the largest is taken: it raises fewest alarms.

    Args:
        scores: Log-odds, of examples that the detector did not learn from.
        harmful: The truth; at least one example must be harmful.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.flatnonzero(np.append(ordered[1:] != ordered[:-1], True))
    hits = harmful[order].cumsum()[ends]
    f1 = 2 * hits / (ends + 1 + harmful.sum())
    best = int(np.argmax(f1))
    end = ends[best]
    if end + 1 == len(ordered):
        return float(ordered[end])
    return float((ordered[end] + ordered[end + 1]) / 2)


def _ece(
    misses: Float[np.ndarray, "draws examples"], place: Int[np.ndarray, "examples"]
) -> Float[np.ndarray, "draws"]:
    order = np.argsort(place, kind="stable")
    starts = np.flatnonzero(np.append(True, np.diff(place[order])))
    gaps = np.add.reduceat(misses[:, order], starts, axis=1)
    return np.abs(gaps).sum(axis=1) / len(place)


def _lucky_labels(
    p: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    codes: Int[np.ndarray, "examples"],
    rng: np.random.Generator,
) -> Bool[np.ndarray, "draws examples"]:
    """Draw labels with these probabilities, together where a cluster's true labels are alike.

    Variants of one prompt are harmful or harmless together: they are as many chances as there are
    prompts. Each still has its own probability.
    """
    sizes, hits = np.bincount(codes), np.bincount(codes, weights=harmful)
    alike = ((hits == 0) | (hits == sizes))[codes]
    apart = rng.random((LABELLINGS, len(p)))
    together = rng.random((LABELLINGS, len(sizes)))[:, codes]
    return np.where(alike, together, apart) < p
