"""A saved guard as a judge: the probability it gives a reply."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from saefty.guards.scoring import load_guard
from saefty.judges.base import JUDGES, check_pairs
from saefty.models.chat import with_response
from saefty.records import Example


@JUDGES.register("guard")
class GuardJudge:
    """Scores the probability that a guard gives a reply, NaN where it could not read it.

    A guard that learnt from prompts with their responses reads the reply behind its prompt; another
    reads the reply alone, as a text of its own.

    Args:
        folder: The guard's folder, as `saefty probe --save` writes it.
        model: Where its model lies, if not where its record says.
        device: Where its model runs, as `model.device`.

    Raises:
        ConfigError: If the folder holds no guard.
        IntegrityError: If a file of it is missing or damaged.
    """

    def __init__(self, folder: str, *, model: str | None = None, device: str = "auto") -> None:
        self.guard = load_guard(folder, model, device=device)

    def score(
        self, prompts: Sequence[Example | str], replies: Sequence[str]
    ) -> Float[np.ndarray, "items"]:
        """Return the probability of each reply; a blank reply is NaN."""
        check_pairs(prompts, replies)
        scores = np.full(len(replies), np.nan)
        kept = [i for i, reply in enumerate(replies) if reply.strip()]
        if kept:
            scores[kept] = self.guard.score([self._text(prompts[i], replies[i]) for i in kept])
        return scores

    def _text(self, prompt: Example | str, reply: str) -> Example | str:
        if not self.guard.spec.with_response:
            return reply
        asked = Example(id="", prompt=prompt) if isinstance(prompt, str) else prompt
        return with_response(asked, reply)
