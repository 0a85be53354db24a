"""What a judge is: prompts and replies in, a score from 0 to 1 for each reply out.

A reply that cannot be judged (an empty one, say) scores NaN, never 0: it is missing, and whoever
averages says how many are.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float

from saefty.records import Example
from saefty.registry import Registry


@runtime_checkable
class Judge(Protocol):
    """Scores replies."""

    def score(
        self, prompts: Sequence[Example | str], replies: Sequence[str]
    ) -> Float[np.ndarray, "items"]:
        """Return a score from 0 to 1 for each reply, NaN where it could not be judged.

        Args:
            prompts: What was replied to.
            replies: One for each prompt, in the same order.
        """


JUDGES: Registry[Callable[..., Judge]] = Registry("judge", "saefty.judges")


def check_pairs(prompts: Sequence[Example | str], replies: Sequence[str]) -> None:
    """Refuse lists that do not belong together.

    Raises:
        ValueError: If there is not one reply for each prompt.
    """
    if len(prompts) != len(replies):
        raise ValueError(f"{len(replies)} replies were given for {len(prompts)} prompts")
