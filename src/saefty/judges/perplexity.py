"""Fluency of edited replies, by the perplexity the unedited model gives them.

fluency = min(1, ppl(unsteered reply) / ppl(steered reply)), both to the same prompt, both teacher-
forced through the model without intervention. Text that the model itself finds as likely as what it
would have written scores 1; word salad scores near 0. It measures form, not sense: fluent text
beside the point scores high, and so does endless repetition, which models find likely.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from saefty.judges.base import JUDGES, check_pairs
from saefty.models.base import ModelAdapter
from saefty.models.batching import plan_batches
from saefty.models.chat import with_response
from saefty.records import ROLES, Example, as_examples


def perplexity(
    model: ModelAdapter, prompts: Sequence[Example | str], replies: Sequence[str]
) -> Float[np.ndarray, "items"]:
    """Return the perplexity of each reply given its prompt: exp of the mean of -log p, from 1 on.

    The mean runs over the reply's own tokens; what a chat template adds behind it does not count.
    NaN for a reply without tokens, or one that is too long for the model together with its prompt.

    Args:
        model: The judge; call this outside any intervention.
        prompts: What was replied to.
        replies: One for each prompt.
    """
    check_pairs(prompts, replies)
    asked = zip(as_examples(prompts), replies, strict=True)
    items = model.tokenize([with_response(*pair) for pair in asked])
    found = np.full(len(items), np.nan)
    usable = [i for i, item in enumerate(items) if item.status == "ok"]
    for batch in plan_batches([len(items[i].ids) for i in usable]):
        members = [usable[place] for place in batch]
        losses = model.loss(model.collate([items[i] for i in members])).cpu().double().numpy()
        for i, loss in zip(members, losses, strict=True):
            own = items[i].roles[1:] == ROLES.index("response")
            values = loss[: len(own)][own]
            if len(values):
                found[i] = np.exp(values.mean())
    return found


@JUDGES.register("perplexity")
class Fluency:
    """Score how likely the unedited model finds replies, beside its own to the same prompts.

    Args:
        model: The model, without intervention when `score` is called.
        unsteered: Its own replies to the prompts that `score` will be given, in the same order.
    """

    def __init__(self, model: ModelAdapter, unsteered: Sequence[str]) -> None:
        self.model = model
        self.unsteered = tuple(unsteered)
        self._own: dict[tuple[Example | str, ...], Float[np.ndarray, "items"]] = {}

    def score(
        self, prompts: Sequence[Example | str], replies: Sequence[str]
    ) -> Float[np.ndarray, "items"]:
        """Return min(1, ppl(unsteered) / ppl(reply)); NaN where either reply has no tokens."""
        check_pairs(prompts, replies)
        if not replies:
            return np.empty(0)
        key = tuple(prompts)
        if key not in self._own:
            self._own[key] = perplexity(self.model, prompts, self.unsteered)
        return np.minimum(1.0, self._own[key] / perplexity(self.model, prompts, replies))
