"""Which of the readings that mend an SAE is its cause, and which are not told apart from it.

Causes are ranked by gain (see `reference`), less what a chosen number must be worth: one without a
chosen number goes before a swept one that is hardly better. The gain tells FVU's of a few
hundredths hardly apart, so that a reading of no smaller gain whose FVU is *surely* lower goes
before all others whatever was chosen for it, and is listed beside them where it is lower by little;
but not where there is excess L0 and the other brings most of the gain, that of removing it: a
scale that makes up for shrunk latents lowers any FVU.
"""

import math
from collections.abc import Sequence

from saefty.diagnosis.examination import Repair

SAMPLING = 3.0
APART = math.log(1.25)
"""Gains, and logarithms of FVU's, that differ by less are not told apart."""
A_LITTLE = math.log(1.1)
"""A surely lower FVU that differs by less is not worth a word."""
MOST = 0.85
"""Share of a gain that is as good as all of it."""


def ranked_causes(candidates: Sequence[Repair]) -> list[Repair]:
    """Return the best repair, and those of other causes that are not told apart from it.

    Args:
        candidates: Repairs that mend the SAE.
    """
    by_cause: dict[str, list[Repair]] = {}
    for one in candidates:
        by_cause.setdefault(one.trial.cause, []).append(one)
    held = [_best(of_it) for of_it in by_cause.values()]
    if not held:
        return []
    best = _best(held)
    others = sorted((one for one in held if one is not best), key=_standing, reverse=True)
    return [best, *(one for one in others if _alike(best, one))]


def _best(repairs: Sequence[Repair]) -> Repair:
    """Return the repair that stands first, or the one of surely lower FVU that beats it."""
    best = max(repairs, key=_standing)
    return max(
        (one for one in repairs if _surely_better(one, best, APART)),
        key=lambda one: one.gain,
        default=best,
    )


def _alike(best: Repair, one: Repair) -> bool:
    if _surely_better(one, best, A_LITTLE):
        return True
    if _surely_better(best, one, APART) or _standing(best) - _standing(one) >= APART:
        return False
    return best.trial.swept or not one.trial.swept


def _surely_better(one: Repair, other: Repair, by: float) -> bool:
    """Return whether FVU is lower by a factor e^`by`, beyond sampling, at no smaller gain.

    Both are measured on the same draws of texts and move together, so that the two sampling errors
    taken as independent are the larger bound of the difference's own.
    """
    mine, its = one.figures.fvu, other.figures.fvu
    if mine is None or its is None or not mine.value < math.inf:
        return False
    if one.gain < other.gain:
        return False
    if one.removed is not None and other.gain >= MOST * one.gain:
        return False
    apart = its.value - mine.value
    return (
        apart > SAMPLING * math.hypot(mine.error, its.error)
        and its.value >= math.exp(by) * mine.value
    )


def _standing(one: Repair) -> float:
    """Return a repair's gain, less what a chosen number must be worth."""
    return one.gain - (APART if one.trial.swept else 0.0)
