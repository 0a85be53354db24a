"""How many scores there are, and what the missing ones could change.

A reply without a score is left out of a mean, never counted as 0. That may tilt the mean (replies
that cannot be judged are often the strangest), so a mean comes with how many are missing and with
its bounds: what it would be if every missing score were 0, or 1. Below 95 % a curve is not drawn.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from saefty.errors import InputError

LEAST = 0.95
"""Share of scores that must be there for a picture."""


@dataclass(frozen=True)
class Coverage:
    """The mean of scores, with what is missing.

    Attributes:
        mean: Of the scores that are there; NaN if there are none.
        low: What the mean of all would be if every missing score were 0.
        high: The same if every missing score were 1.
        judged: Scores that are there.
        total: Scores that should be.

    Example:
        >>> print(coverage(np.array([1.0, 0.5, np.nan, 0.0])))
        0.500 of 3; 1 of 4 missing, so 0.375 to 0.625
    """

    mean: float
    low: float
    high: float
    judged: int
    total: int

    @property
    def missing(self) -> int:
        """Scores that are not there."""
        return self.total - self.judged

    @property
    def share(self) -> float:
        """Share of scores that are there; 0 of no replies."""
        return self.judged / self.total if self.total else 0.0

    def __str__(self) -> str:
        text = f"{self.mean:.3f} of {self.judged}"
        if self.missing:
            text += (
                f"; {self.missing} of {self.total} missing, so {self.low:.3f} to {self.high:.3f}"
            )
        return text


def coverage(scores: Float[np.ndarray, "items"]) -> Coverage:
    """Return the mean of scores from 0 to 1, NaN for missing, with its bounds.

    Raises:
        ValueError: If a score lies outside 0 to 1.
    """
    there = scores[~np.isnan(scores)]
    if ((there < 0) | (there > 1)).any():
        raise ValueError(f"a score lies outside 0 to 1: {there.min()} to {there.max()}")
    n, total, given = len(there), len(scores), float(there.sum())
    if total == 0:
        return Coverage(float("nan"), 0.0, 1.0, 0, 0)
    mean = given / n if n else float("nan")
    return Coverage(mean, given / total, (given + total - n) / total, n, total)


def require_coverage(
    judged: int, total: int, least: float = LEAST, *, what: str = "this picture"
) -> None:
    """Refuse to show what rests on too few scores.

    Args:
        judged: Scores that are there.
        total: Scores that should be.
        least: Share that must be there.
        what: What would be shown.

    Raises:
        InputError: If fewer are there.
    """
    if total == 0 or judged < least * total:
        share = judged / total if total else 0.0
        raise InputError(
            f"{judged} of {total} replies have a score ({share:.1%}); {what} needs {least:.0%}, "
            "because those without one may be unlike the rest.",
            safe="The scores that are there are kept.",
            then="Judge the rest (the same command asks only what is missing), or take another "
            "judge.",
        )
