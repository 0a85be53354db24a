"""Comparing ways to steer: one score a way, chosen on some prompts and reported on others.

A way's score at one strength is mean(behaviour) · mean(coherence) over prompts; its score is the
largest over strengths (Chalnev, Siu and Conmy 2024). The largest of several noisy numbers is too
large, the more so the more strengths were tried, so the strength is chosen on one half of the
prompts and the score reported on the other. All ways answer the same prompts: their differences
are taken prompt by prompt.

Means are over the replies that were scored. A strength that breaks the model leaves few of these,
and what is left may score well by luck: such a strength cannot be chosen.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saefty.metrics.base import group_codes
from saefty.metrics.intervals import Bootstrap, Interval

VALUES_AT_ONCE = 1 << 22
ROUNDING = 1e-10
"""Values that differ by rounding alone are alike."""


@dataclass(frozen=True)
class Outcomes:
    """What one way did at one strength, prompt by prompt; NaN where there is no score.

    Attributes:
        behaviour: From 0 to 1.
        coherence: From 0 to 1.
    """

    behaviour: Float[np.ndarray, "prompts"]
    coherence: Float[np.ndarray, "prompts"]

    @property
    def share(self) -> float:
        """Share of the prompts that have both scores."""
        both = ~(np.isnan(self.behaviour) | np.isnan(self.coherence))
        return float(both.mean()) if len(both) else 0.0

    def of(self, prompts: Bool[np.ndarray, "prompts"]) -> "Outcomes":
        """Return the outcomes of some prompts."""
        return Outcomes(self.behaviour[prompts], self.coherence[prompts])


def halves(
    prompts: int, clusters: Int[np.ndarray, "prompts"] | None, *, seed: int
) -> Bool[np.ndarray, "prompts"]:
    """Return which prompts the strength is chosen on: half of them, by whole clusters.

    Args:
        prompts: How many there are.
        clusters: A code a prompt, equal for prompts that belong together.
        seed: The same seed makes the same halves.
    """
    codes = group_codes(clusters, prompts)
    groups = np.unique(codes)
    order = np.random.default_rng([seed, 7]).permutation(groups)
    sizes = np.array([(codes == group).sum() for group in order])
    # As many groups as come nearest to half of the prompts, and not all.
    filled = np.abs(sizes.cumsum() - prompts / 2)
    return np.isin(codes, order[: min(int(filled.argmin()) + 1, max(len(order) - 1, 1))])


def score(
    outcomes: Outcomes, weights: Float[np.ndarray, "draws prompts"] | None = None
) -> Float[np.ndarray, "draws"]:
    """Return mean(behaviour) · mean(coherence), each over the prompts that have it.

    Args:
        outcomes: Of one way at one strength.
        weights: How often each prompt counts; None counts each once, in one draw.

    Returns:
        One value a draw; NaN where no prompt has a value.
    """
    if weights is None:
        weights = np.ones((1, len(outcomes.behaviour)))
    product = np.ones(len(weights))
    for values in (outcomes.behaviour, outcomes.coherence):
        there = ~np.isnan(values)
        counts = weights @ there
        sums = weights @ np.where(there, values, 0.0)
        product *= np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return product


def product_interval(
    draws: Bootstrap,
    behaviour: Float[np.ndarray, "prompts"],
    coherence: Float[np.ndarray, "prompts"],
) -> Interval:
    """Return the score with its interval; NaN where behaviour or coherence has no value.

    Where every draw is the same, which is no certainty, the ends are the products of both means'.
    """
    outcomes = Outcomes(behaviour, coherence)
    found = draws.measured(lambda weights: score(outcomes, weights))
    if np.isnan(found.estimate):
        return Interval(np.nan, np.nan, np.nan, "no values", 0, draws.level)
    if found.high - found.low >= ROUNDING:
        return found
    ends = draws.mean(behaviour), draws.mean(coherence)
    low, high = ends[0].low * ends[1].low, ends[0].high * ends[1].high
    method = "product of both means' ends"
    return Interval(found.estimate, low, high, method, draws.clusters, draws.level)


def best_strength(
    outcomes: Sequence[Outcomes], prompts: Bool[np.ndarray, "prompts"], *, coverage: float
) -> int:
    """Return at which strength some prompts score best; the first of several that do.

    Args:
        outcomes: At each strength, on all prompts.
        prompts: Those on which it is chosen; the others are those that are reported.
        coverage: Share of the replies of either half that must have both scores.

    Raises:
        ValueError: If no strength has enough scores.
    """
    scores = np.array(
        [
            float(score(one.of(prompts))[0]) if is_scored(one, prompts, coverage) else np.nan
            for one in outcomes
        ]
    )
    if np.isnan(scores).all():
        raise ValueError("no strength has enough scores")
    return int(np.nanargmax(scores))


def is_scored(outcomes: Outcomes, prompts: Bool[np.ndarray, "prompts"], coverage: float) -> bool:
    """Return whether enough replies have both scores, on some prompts and on all others."""
    sides = outcomes.of(prompts), outcomes.of(~prompts)
    return all(one.share > 0 and one.share >= coverage for one in sides)


def exchange_p(
    first: Outcomes,
    second: Outcomes,
    clusters: Int[np.ndarray, "prompts"] | None,
    *,
    permutations: int,
    seed: int,
) -> float:
    """Return the two-sided p of a difference in score: whole clusters change ways.

    p = (1 + b) / (1 + B), b the number of the B exchanges after which the scores differ at least
    as much as they do. Behaviour and coherence of a reply go together.
    """
    codes = group_codes(clusters, len(first.behaviour))
    rng = np.random.default_rng([seed, 8])
    observed = abs(float(score(first)[0] - score(second)[0]))
    if np.isnan(observed):
        return 1.0
    at_once = max(1, VALUES_AT_ONCE // max(len(codes), 1))
    as_large = done = 0
    while done < permutations:
        n = min(at_once, permutations - done)
        kept = (rng.random((n, int(codes.max()) + 1)) < 0.5)[:, codes].astype(np.float64)
        gaps = _mixed(first, second, kept) - _mixed(second, first, kept)
        as_large += int((np.abs(gaps) >= observed - ROUNDING).sum())
        done += n
    return (1 + as_large) / (1 + permutations)


def _mixed(
    one: Outcomes, other: Outcomes, kept: Float[np.ndarray, "draws prompts"]
) -> Float[np.ndarray, "draws"]:
    """Return the score of a way that has some prompts' outcomes and the other's for the rest."""
    both = Outcomes(
        np.concatenate([one.behaviour, other.behaviour]),
        np.concatenate([one.coherence, other.coherence]),
    )
    return score(both, np.concatenate([kept, 1 - kept], axis=1))
