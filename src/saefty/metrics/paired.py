"""Is one detector better than another on the same examples?

Both were asked about the same examples, so their errors go together, and two overlapping intervals
say nothing. The difference of two AUROCs gets an interval from a bootstrap that draws whole
clusters for both at once, and a p from a permutation test: if the two detectors were alike, each
cluster's ranks could as well have come from the other one (Venkatraman and Begg 1996, Bandos,
Rockette and Gur 2005; here with whole clusters). Ranks, because two detectors' scores need not have
one scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import rankdata

from saefty.metrics.base import check_labels, group_codes
from saefty.metrics.intervals import Bootstrap, Interval, ranking_measures

VALUES_AT_ONCE = 1 << 22
# A permuted difference that differs from the observed one by rounding alone is as large as it.
ROUNDING = 1e-10


@dataclass(frozen=True)
class PairedDifference:
    """How much larger the AUROC of the first detector is than the second's.

    Attributes:
        difference: AUROC of the first minus AUROC of the second.
        p: Two-sided p of the permutation test.
    """

    difference: Interval
    p: float


def paired_auroc(
    first: Float[np.ndarray, "examples"],
    second: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    *,
    boots: int = 1000,
    permutations: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """Compare two detectors' AUROC on the same examples.

    Args:
        first: A detector's scores; larger means harmful.
        second: Another one's.
        harmful: The truth; both kinds must be present.
        clusters: A code an example, equal for examples that belong together; None if all are apart.
        boots: Draws of the bootstrap.
        permutations: How often clusters change detectors.
        seed: Fixes both.
    """
    check_labels(harmful, len(first))
    bootstrap = Bootstrap(len(harmful), clusters, boots=boots, seed=seed)
    return PairedDifference(
        difference_interval(first, second, harmful, bootstrap),
        swap_p(first, second, harmful, clusters, permutations=permutations, seed=seed),
    )


def difference_interval(
    first: Float[np.ndarray, "examples"],
    second: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    bootstrap: Bootstrap,
) -> Interval:
    """Return AUROC of the first minus that of the second, from draws that both share.

    Where both separate the groups in every draw the bootstrap knows no doubt; then the two
    intervals are put together as for independent detectors (Zou and Donner's MOVER, 2008), which
    is wider than it need be.
    """

    def difference(weights: Float[np.ndarray, "draws examples"]) -> Float[np.ndarray, "draws"]:
        return auroc_of(first, harmful, weights) - auroc_of(second, harmful, weights)

    found = bootstrap.measured(difference)
    if not is_certain(found) or np.array_equal(rankdata(first), rankdata(second)):
        return found
    a, b = (bootstrap.ranking(scores, harmful)["auroc"] for scores in (first, second))
    return combined([(1.0, a), (-1.0, b)])


def is_certain(interval: Interval) -> bool:
    """Return whether all draws were alike, so that a bootstrap knows no doubt."""
    return interval.high - interval.low < ROUNDING


def combined(terms: Sequence[tuple[float, Interval]]) -> Interval:
    """Return the interval of a weighted sum of independent estimates (MOVER).

    Args:
        terms: The weight and the interval of each; at least one.
    """
    estimate = sum(weight * one.estimate for weight, one in terms)
    below = [w * (i.estimate - (i.low if w > 0 else i.high)) for w, i in terms]
    above = [w * ((i.high if w > 0 else i.low) - i.estimate) for w, i in terms]
    n = min(one.clusters for _, one in terms)
    low, high = estimate - np.linalg.norm(below), estimate + np.linalg.norm(above)
    method = f"MOVER over {n} clusters"
    return Interval(float(estimate), float(low), float(high), method, n, terms[0][1].level)


def auroc_of(
    scores: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    weights: Float[np.ndarray, "draws examples"],
) -> Float[np.ndarray, "draws"]:
    """Return the AUROC for each row of weights; NaN for one that has no example of a kind."""
    both = (weights @ harmful > 0) & (weights @ ~harmful > 0)
    areas = np.full(len(weights), np.nan)
    if both.any():
        areas[both] = ranking_measures(scores, harmful, weights[both])["auroc"]
    return areas


def swap_p(
    first: Float[np.ndarray, "examples"],
    second: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    *,
    permutations: int = 2000,
    seed: int = 0,
) -> float:
    """Return the two-sided p of a difference of AUROCs: whole clusters change detectors.

    p = (1 + b) / (1 + B), b the number of the B exchanges after which the AUROCs differ at least
    as much as they do.
    """
    rank = rankdata(np.stack([first, second]), axis=1)
    codes = group_codes(clusters, len(harmful))
    rng = np.random.default_rng([seed, 6])
    observed = abs(float(np.diff(_areas(rank, harmful))[0]))
    as_large, done = 0, 0
    at_once = max(1, VALUES_AT_ONCE // max(len(harmful), 1))
    while done < permutations:
        n = min(at_once, permutations - done)
        swapped = (rng.random((n, int(codes.max()) + 1)) < 0.5)[:, codes]
        areas = [
            _areas(rankdata(np.where(swapped, rank[i], rank[1 - i]), axis=1), harmful)
            for i in (0, 1)
        ]
        as_large += int((np.abs(areas[0] - areas[1]) >= observed - ROUNDING).sum())
        done += n
    return (1 + as_large) / (1 + permutations)


def _areas(
    ranks: Float[np.ndarray, "rows examples"], harmful: Bool[np.ndarray, "examples"]
) -> Float[np.ndarray, "rows"]:
    positives = int(harmful.sum())
    pairs = positives * (len(harmful) - positives)
    return (ranks[:, harmful].sum(axis=1) - positives * (positives + 1) / 2) / pairs
