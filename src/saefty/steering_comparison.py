"""Ways to steer, compared on the same prompts: a score for each, and which differences hold."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from saefty.errors import InputError
from saefty.metrics.base import group_codes
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.metrics.paired import combined, is_certain
from saefty.metrics.significance import holm
from saefty.metrics.steering import (
    Outcomes,
    best_strength,
    exchange_p,
    halves,
    is_scored,
    product_interval,
    score,
)
from saefty.steering import PLAIN, Dose
from saefty.steering_scores import Scores, by_definition

EXCHANGES = 100
"""At least so many exchanges a pair that is tested, so that the least p after Holm is 0.01."""


@dataclass(frozen=True)
class Strength:
    """What one way did at one strength, on the prompts that are reported.

    Attributes:
        alpha: The strength; 0 is the model as it is.
        behaviour: Mean behaviour.
        coherence: Mean coherence.
        score: Their product; NaN where too few replies were scored.
        chosen_on: The same product on the prompts that the strength is chosen on.
        missing: Replies of the reported prompts without a score.
        scored: Share of them that have both scores.
    """

    alpha: float
    behaviour: Interval
    coherence: Interval
    score: Interval
    chosen_on: float
    missing: int
    scored: float

    @property
    def is_scored(self) -> bool:
        """Whether enough replies were scored, of both halves, for the strength to be chosen."""
        return not np.isnan(self.chosen_on)


@dataclass(frozen=True)
class Way:
    """One way to steer.

    Attributes:
        name: Its name.
        strengths: What it did at each alpha, ascending.
        best: The strength that scored best on the prompts for choosing; of several that did the
            weakest, so that it is 0 where none beats not steering.
    """

    name: str
    strengths: tuple[Strength, ...]
    best: Strength

    @property
    def steers(self) -> bool:
        """Whether a strength beats not steering, where strengths are chosen."""
        return self.best.alpha != 0


@dataclass(frozen=True)
class Difference:
    """How much better one way is than another, on the same prompts, each at its own strength.

    Attributes:
        first: A way.
        second: Another one.
        difference: Score of the first less that of the second.
        p: Two-sided, from exchanging the two ways' outcomes prompt by prompt.
        p_holm: The same, corrected for the number of pairs.
    """

    first: str
    second: str
    difference: Interval
    p: float
    p_holm: float = 1.0


@dataclass(frozen=True)
class Comparison:
    """The result.

    Attributes:
        ways: Each way, the best score first, those that do not steer last.
        unsteered: The model as it is, as a strength of 0.
        differences: Every pair of ways that steer, and of each with the unsteered model; of the
            random directions, only the rival has a part in them.
        rival: The random direction that scored best where it may be chosen; None without any.
        chosen_on: How many prompts the strengths were chosen on.
        reported: Which prompts the scores are of, by their places.
    """

    ways: tuple[Way, ...]
    unsteered: Strength
    differences: tuple[Difference, ...]
    rival: str | None
    chosen_on: int
    reported: tuple[int, ...]

    @property
    def reported_on(self) -> int:
        """How many prompts the scores are of."""
        return len(self.reported)

    def way(self, name: str) -> Way:
        """Return the way of a name."""
        return next(way for way in self.ways if way.name == name)


def compare(
    behaviour: Scores,
    coherence: Scores,
    arms: Sequence[str],
    alphas: Sequence[float],
    clusters: Int[np.ndarray, "prompts"] | None,
    *,
    controls: Collection[str] = (),
    relative: bool = False,
    coverage: float,
    boots: int,
    permutations: int,
    seed: int,
) -> Comparison:
    """Compare ways to steer.

    Args:
        behaviour: Scores of behaviour by dose; the unsteered dose is among them.
        coherence: Scores of coherence.
        arms: The ways.
        alphas: The strengths; 0 stands for the unsteered dose.
        clusters: A code a prompt, equal for prompts that belong together.
        controls: The ways that are random directions. The one that scored best where it may be
            chosen stands for all of them in the differences.
        relative: Coherence compares with the unsteered replies, whose own is 1 by definition.
        coverage: Share of the replies that must have both scores, on either half of the prompts,
            for a strength to be chosen: one that breaks the model leaves few, and these by luck.
        boots: Draws of each bootstrap.
        permutations: How often outcomes are exchanged between two ways, at least.
        seed: Fixes the halves and both of these.

    Raises:
        InputError: If there are too few prompts to choose on some and report on others, or too few
            replies of a way were scored at every strength.
    """
    prompts = len(behaviour[PLAIN])
    chosen_on = two_sides(prompts, clusters, seed=seed)
    reported = ~chosen_on
    codes = None if clusters is None else clusters[reported]
    draws = Bootstrap(int(reported.sum()), codes, boots=boots, seed=seed)
    ways: list[Way] = []
    best: dict[str, Outcomes] = {}
    weakest_first = sorted(range(len(alphas)), key=lambda n: abs(alphas[n]))
    for arm in arms:
        outcomes = [outcomes_of(behaviour, coherence, arm, alpha) for alpha in alphas]
        try:
            ordered = [outcomes[n] for n in weakest_first]
            at = weakest_first[best_strength(ordered, chosen_on, coverage=coverage)]
        except ValueError:
            most = max(min(one.of(chosen_on).share, one.of(reported).share) for one in outcomes)
            raise InputError(
                f"too few replies under {arm} have scores of both behaviour and coherence: "
                f"{most:.1%} at best, and {coverage:.0%} are needed.",
                safe="The replies and the scores that are there are kept.",
                then="Look at scores/ in the run's folder for the reasons; take other judges, or "
                "lower compare.coverage in a new run.dir.",
            ) from None
        strengths = tuple(
            _strength(alpha, one, chosen_on, coverage, draws, relative)
            for alpha, one in zip(alphas, outcomes, strict=True)
        )
        ways.append(Way(arm, strengths, strengths[at]))
        best[arm] = outcomes[at].of(reported)
    ways.sort(key=lambda way: (not way.steers, -way.best.score.estimate))
    rival = max(
        (way for way in ways if way.name in controls),
        key=lambda way: way.best.chosen_on,
        default=None,
    )
    named = [way.name for way in ways if way.steers and (way.name not in controls or way is rival)]
    plain = outcomes_of(behaviour, coherence, PLAIN.arm, 0.0)
    tested = {**{name: best[name] for name in named}, PLAIN.arm: plain.of(reported)}
    pairs = _differences(tested, codes, draws, permutations, seed)
    return Comparison(
        tuple(ways),
        _strength(0.0, plain, chosen_on, coverage, draws, relative),
        tuple(pairs),
        rival.name if rival else None,
        int(chosen_on.sum()),
        tuple(np.flatnonzero(reported).tolist()),
    )


def two_sides(
    prompts: int, clusters: Int[np.ndarray, "prompts"] | None, *, seed: int
) -> Bool[np.ndarray, "prompts"]:
    """Return which prompts strengths are chosen on; the others are those that are reported.

    Raises:
        InputError: If fewer than two clusters would be on one side.
    """
    chosen_on = halves(prompts, clusters, seed=seed)
    codes = group_codes(clusters, prompts)
    sides = [len(np.unique(codes[side])) for side in (chosen_on, ~chosen_on)]
    if min(sides) < 2:
        raise InputError(
            f"{prompts} prompts in {sum(sides)} clusters are too few to choose a strength on "
            f"{sides[0]} of these and report on {sides[1]}: each side needs two.",
            then="Give more prompts; those of one group count as one cluster.",
        )
    return chosen_on


def outcomes_of(behaviour: Scores, coherence: Scores, arm: str, alpha: float) -> Outcomes:
    """Return what a way did at one strength, on all prompts."""
    dose = PLAIN if alpha == 0 else Dose(arm, alpha)
    return Outcomes(behaviour[dose], coherence[dose])


def _strength(
    alpha: float,
    outcomes: Outcomes,
    chosen_on: Bool[np.ndarray, "prompts"],
    coverage: float,
    draws: Bootstrap,
    relative: bool,
) -> Strength:
    here = outcomes.of(~chosen_on)
    coherence = draws.mean(here.coherence)
    if relative and alpha == 0:
        coherence = by_definition(here.coherence, coherence)
    enough = is_scored(outcomes, chosen_on, coverage)
    nothing = Interval(np.nan, np.nan, np.nan, "too few scored", 0, draws.level)
    return Strength(
        alpha,
        draws.mean(here.behaviour),
        coherence,
        product_interval(draws, here.behaviour, here.coherence) if enough else nothing,
        float(score(outcomes.of(chosen_on))[0]) if enough else float("nan"),
        int((np.isnan(here.behaviour) | np.isnan(here.coherence)).sum()),
        here.share,
    )


def score_difference(draws: Bootstrap, first: Outcomes, second: Outcomes) -> Interval:
    """Return the score of one way less that of another, from draws that both share.

    Where every draw is the same the two intervals are put together as for independent scores,
    which is wider than it need be; one and the same outcomes differ by nothing.
    """
    found = draws.measured(lambda weights: score(first, weights) - score(second, weights))
    pairs = (first.behaviour, second.behaviour), (first.coherence, second.coherence)
    same = all(np.array_equal(*pair, equal_nan=True) for pair in pairs)
    if same or np.isnan(found.estimate) or not is_certain(found):
        return found
    sides = [product_interval(draws, one.behaviour, one.coherence) for one in (first, second)]
    return combined([(1.0, sides[0]), (-1.0, sides[1])])


def _differences(
    best: Mapping[str, Outcomes],
    codes: Int[np.ndarray, "prompts"] | None,
    draws: Bootstrap,
    permutations: int,
    seed: int,
) -> list[Difference]:
    names = list(best)
    # Holm multiplies the least p by the number of pairs: with few exchanges none could hold.
    permutations = max(permutations, EXCHANGES * len(names) * (len(names) - 1) // 2)
    found = []
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            a, b = best[first], best[second]
            p = exchange_p(a, b, codes, permutations=permutations, seed=seed)
            found.append(Difference(first, second, score_difference(draws, a, b), p))
    adjusted = holm(np.array([one.p for one in found]))
    return [replace(one, p_holm=float(p)) for one, p in zip(found, adjusted, strict=True)]
