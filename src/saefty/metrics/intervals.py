"""Confidence intervals: a bootstrap over clusters, and what to say where a bootstrap cannot.

Rows of one cluster (a prompt and its variants) resemble each other, so clusters are drawn, not
rows. Where every row has the same value, a score separates the groups without an error, or every
cluster gives a score the same AUROC, each draw is the same and a bootstrap would claim certainty;
there the interval is Wilson's (1927) for a mean of bounded values and Newcombe's (2006, method 5)
for an AUROC, both with the number of clusters for the number of observations. Recall, average
precision and F1 are treated alike: as the mean over the clusters with a harmful example of a value
from 0 to 1.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import brentq
from scipy.stats import norm

from saefty.metrics.base import group_codes

LEVEL = 0.95
FPR = 0.01
# Draws that differ by rounding alone are alike.
ROUNDING = 1e-10


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The value on all rows; NaN if there are none.
        low: Lower end.
        high: Upper end.
        method: How the ends were found, in words.
        clusters: The independent units it rests on.
        level: The share of intervals made this way that hold the true value.
    """

    estimate: float
    low: float
    high: float
    method: str
    clusters: int
    level: float = LEVEL

    def __str__(self) -> str:
        return f"{self.estimate:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Bootstrap:
    """Draw whole clusters again and again, once for all the intervals of one set of examples.

    Args:
        examples: How many examples there are.
        clusters: A code an example, equal for examples that belong together (a prompt and its
            variants); None if every example stands alone.
        boots: How many draws.
        seed: The same seed makes the same draws.
        level: Confidence level of the intervals.

    Example:
        >>> refused = np.array([1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
        >>> str(Bootstrap(8).mean(refused))
        '0.875 [0.529, 0.978]'
    """

    def __init__(
        self,
        examples: int,
        clusters: Int[np.ndarray, "examples"] | None = None,
        *,
        boots: int = 1000,
        seed: int = 0,
        level: float = LEVEL,
    ) -> None:
        self.codes = group_codes(clusters, examples)
        self.clusters = len(np.unique(self.codes))
        self.level = level
        rng = np.random.default_rng([seed, 2])
        odds = np.full(self.clusters, 1 / max(self.clusters, 1))
        drawn = rng.multinomial(self.clusters, odds, size=boots).astype(np.float64)
        # How often each example counts in each draw.
        self.weights: Float[np.ndarray, "boots examples"] = drawn[:, self.codes]

    def mean(
        self, values: Float[np.ndarray, "examples"], *, bounds: tuple[float, float] = (0.0, 1.0)
    ) -> Interval:
        """Return the mean of values with its interval.

        For a rate pass 0s and 1s; for a paired difference pass after - before and bounds (-1, 1).
        A rate of examples that stand alone gets Wilson's interval, all else the bootstrap.

        Args:
            values: One number an example; NaN (could not be judged) is left out.
            bounds: The least and the largest value possible, for the case that all are equal.

        Returns:
            The interval; NaN throughout if no value is left.
        """
        kept = ~np.isnan(values)
        n = len(np.unique(self.codes[kept]))
        if n == 0:
            return Interval(np.nan, np.nan, np.nan, "no values", 0, self.level)
        there = values[kept]
        mean = float(there.mean())
        if (there == there[0]).all():
            room = self._wilson(0.0, n)[1]
            low, high = mean - room * (mean - bounds[0]), mean + room * (bounds[1] - mean)
            return Interval(mean, low, high, f"Wilson over {n} clusters", n, self.level)
        if n == len(there) and np.isin(there, (0.0, 1.0)).all():
            low, high = self._wilson(mean, n)
            return Interval(mean, low, high, f"Wilson over {n} examples", n, self.level)
        draws = ratio(self.weights @ np.where(kept, values, 0.0), self.weights @ kept)
        return self._percentiles(mean, draws, n)

    def difference(
        self, values: Float[np.ndarray, "examples"], harmful: Bool[np.ndarray, "examples"]
    ) -> Interval:
        """Return mean(values | harmful) - mean(values | harmless) with its interval.

        On 0/1 values for firing it is dfreq, on pooled latents dmag. For differences within a pair
        use `mean` of the differences.

        Args:
            values: One number an example; NaN is left out.
            harmful: The two groups; both must be present.

        Returns:
            The interval; NaN throughout if a group has no values.
        """
        kept = ~np.isnan(values)
        filled = np.where(kept, values, 0.0)
        means, ends = [], []
        for group in (harmful & kept, ~harmful & kept):
            if not group.any():
                return Interval(np.nan, np.nan, np.nan, "no values in one group", 0, self.level)
            means.append(float(filled[group].mean()))
            ends.append(ratio(self.weights @ (filled * group), self.weights @ group))
        n = len(np.unique(self.codes[kept]))
        return self._percentiles(means[0] - means[1], ends[0] - ends[1], n)

    def ranking(
        self, scores: Float[np.ndarray, "examples"], harmful: Bool[np.ndarray, "examples"]
    ) -> dict[str, Interval]:
        """Return AUROC, average precision and recall at 1 % false positives, with intervals.

        Args:
            scores: A detector's score for each example; larger means harmful.
            harmful: The truth; both kinds must be present.

        Returns:
            Intervals under `auroc`, `average_precision` and `recall_at_1pct_fpr`. With fewer than
            100 harmless examples 1 % of them is none: the last is then the recall without a false
            alarm.
        """
        measured = ranking_measures(scores, harmful, np.ones((1, len(scores))))
        both = (self.weights @ harmful > 0) & (self.weights @ ~harmful > 0)
        draws = ranking_measures(scores, harmful, self.weights[both])
        found = len(np.unique(self.codes[harmful]))
        intervals = {
            name: self._percentiles(
                float(measured[name][0]),
                draws[name],
                self.clusters,
                None if name == "auroc" else found,
            )
            for name in measured
        }
        found_area = intervals["auroc"]
        area = found_area.estimate
        if area in {0.0, 1.0} or found_area.high - found_area.low < ROUNDING:
            counts = [len(np.unique(self.codes[group])) for group in (harmful, ~harmful)]
            low, high = _newcombe(area, counts[0], counts[1], self.level)
            method = f"Newcombe over {counts[0]} + {counts[1]} clusters"
            intervals["auroc"] = Interval(area, low, high, method, self.clusters, self.level)
        return intervals

    def measured(
        self,
        measure: Callable[[Float[np.ndarray, "draws examples"]], Float[np.ndarray, "draws"]],
        *,
        over: Bool[np.ndarray, "examples"] | None = None,
    ) -> Interval:
        """Return any measure with its interval.

        Args:
            measure: Gives one value for each row of weights, which say how often each example
                counts; NaN for a row from which it cannot be found.
            over: Of a measure from 0 to 1: the examples that it is a mean over, so that there is an
                interval (Wilson's, over their clusters) where all draws are alike.
        """
        estimate = float(measure(np.ones((1, len(self.codes))))[0])
        alike = None if over is None else len(np.unique(self.codes[over]))
        return self._percentiles(estimate, measure(self.weights), self.clusters, alike)

    def _percentiles(
        self,
        estimate: float,
        draws: Float[np.ndarray, "draws"],
        clusters: int,
        alike: int | None = None,
    ) -> Interval:
        """Return the ends of the draws; Wilson's over `alike` clusters where they do not differ."""
        draws = draws[~np.isnan(draws)]
        if len(draws) == 0 or clusters < 2:
            return Interval(estimate, np.nan, np.nan, "too few clusters", clusters, self.level)
        low, high = np.quantile(draws, [(1 - self.level) / 2, (1 + self.level) / 2])
        if alike and high - low < ROUNDING:
            low, high = self._wilson(min(max(estimate, 0.0), 1.0), alike)
            method = f"Wilson over {alike} clusters"
            return Interval(estimate, low, high, method, clusters, self.level)
        method = f"bootstrap over {clusters} clusters"
        return Interval(estimate, float(low), float(high), method, clusters, self.level)

    def _wilson(self, rate: float, n: int) -> tuple[float, float]:
        z2 = norm.ppf((1 + self.level) / 2) ** 2
        centre = (rate + z2 / (2 * n)) / (1 + z2 / n)
        half = np.sqrt(z2 * rate * (1 - rate) / n + z2**2 / (4 * n**2)) / (1 + z2 / n)
        # Rounding must not leave the estimate outside its own interval.
        return float(min(max(centre - half, 0.0), rate)), float(max(min(centre + half, 1.0), rate))


def ranking_measures(
    scores: Float[np.ndarray, "examples"],
    harmful: Bool[np.ndarray, "examples"],
    weights: Float[np.ndarray, "draws examples"],
) -> dict[str, Float[np.ndarray, "draws"]]:
    """Return AUROC, average precision and recall at 1 % false positives for each row of weights.

    Equal, for weights of one, to scikit-learn's `roc_auc_score`, `average_precision_score` and the
    largest recall on `roc_curve` whose false-positive rate is at most 0.01.

    Args:
        scores: A detector's score for each example; larger means harmful.
        harmful: The truth.
        weights: How often each example counts; each row must give both groups some weight.

    Returns:
        One value a row of weights, under the names of `Bootstrap.ranking`.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, truth, counts = scores[order], harmful[order], weights[:, order]
    begin = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    hits = np.add.reduceat(counts * truth, begin, axis=1)
    alarms = np.add.reduceat(counts, begin, axis=1) - hits
    found, false = hits.cumsum(axis=1), alarms.cumsum(axis=1)
    positives, negatives = found[:, -1], false[:, -1]
    area = (hits * (negatives[:, None] - false + alarms / 2)).sum(axis=1) / (positives * negatives)
    flagged = found + false
    precision = np.divide(found, flagged, out=np.zeros_like(found), where=flagged > 0)
    allowed = false <= FPR * negatives[:, None] * (1 + 1e-12)
    return {
        "auroc": area,
        "average_precision": (precision * hits).sum(axis=1) / positives,
        "recall_at_1pct_fpr": np.where(allowed, found, 0.0).max(axis=1) / positives,
    }


def ratio(
    sums: Float[np.ndarray, "draws"], counts: Float[np.ndarray, "draws"]
) -> Float[np.ndarray, "draws"]:
    """Return sums divided by counts; NaN where there is nothing to count."""
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def _newcombe(area: float, positives: int, negatives: int, level: float) -> tuple[float, float]:
    """Return the smallest and the largest AUROC that an observed one does not refute."""
    low = 0.0 if area == 0.0 else _least(area, positives, negatives, level)
    high = 1.0 if area == 1.0 else 1.0 - _least(1.0 - area, positives, negatives, level)
    return low, high


def _least(area: float, positives: int, negatives: int, level: float) -> float:
    z, middle = norm.ppf((1 + level) / 2), (positives + negatives) / 2 - 1

    def excess(theta: float) -> float:
        variance = theta * (1 - theta) / (positives * negatives)
        variance *= 1 + middle * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        return float(area - theta - z * np.sqrt(variance))

    # excess is 0 at 1 too (no spread there); the end sought is the root below it.
    return float(brentq(excess, 0.0, min(area, 1.0 - 1e-9)))
