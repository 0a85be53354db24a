"""What steering with a vector does to the latents of the text that a model writes.

Many vectors are tried at once: a batch holds one rollout of every vector, each row steered by its
own, so that the prompt they share is read once. Rollout r of each vector starts from the same
prompt and draws from the same stream of random numbers, so that two vectors differ by what they do
and not by luck, and a vector of zeros does nothing at all. The text is then read again by the model
*without* steering: the latents are those of what was written, not the vector's own shadow in them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.interventions.steer import steer
from saefty.models.base import ModelAdapter, TokenizedExample
from saefty.models.batching import plan_batches
from saefty.models.chat import with_response
from saefty.records import ROLES, Example, Site
from saefty.saes.base import SparseAutoencoder

ENCODED_ROWS = 8192
"""Tokens whose latents are taken at once."""
READ_TOKENS = 16_384
"""Most tokens of a batch that is read again."""


@dataclass(frozen=True)
class Rollouts:
    """How each vector is tried.

    Attributes:
        rows: What each rollout starts from; ids tell rollouts of one prompt apart.
        max_new_tokens: Longest rollout.
        temperature: Of sampling.
        seed: Of sampling; the same for all vectors.
    """

    rows: tuple[Example, ...]
    max_new_tokens: int
    temperature: float = 1.0
    seed: int = 0


def plan_rollouts(
    prompts: Sequence[Example],
    count: int,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> Rollouts:
    """Return rollouts that start from prompts in turn.

    Args:
        prompts: What to start from; responses are ignored.
        count: Rollouts of each vector.
        max_new_tokens: Longest rollout.
        temperature: Of sampling.
        seed: Of sampling.

    Raises:
        ValueError: If there are no prompts.
    """
    if not prompts:
        raise ValueError("rollouts need at least one prompt")
    rows = [
        replace(with_response(prompts[r % len(prompts)], None), id=f"rollout-{r}")
        for r in range(count)
    ]
    return Rollouts(tuple(rows), max_new_tokens, temperature, seed)


def roll_out(
    model: ModelAdapter,
    site: Site,
    vectors: Float[Tensor, "vectors d_model"] | None,
    rollouts: Rollouts,
) -> list[str]:
    """Return what the model writes under each vector.

    Args:
        model: The model.
        site: Where the vectors are added.
        vectors: At the length at which they are added; None adds nothing.
        rollouts: How each is tried.

    Returns:
        Texts, for each rollout those of all vectors in order: text n is of vector n % vectors.
    """

    def generate(rows: Sequence[Example]) -> list[str]:
        return model.generate(
            rows,
            max_new_tokens=rollouts.max_new_tokens,
            seed=rollouts.seed,
            temperature=rollouts.temperature,
            batch_size=len(rows),
        )

    if vectors is None:
        return generate(rollouts.rows)
    texts: list[str] = []
    with model.intervene(site, steer(vectors, [1.0] * len(vectors))):
        for row in rollouts.rows:
            texts += generate([row] * len(vectors))
    return texts


@dataclass(frozen=True)
class MeanLatents:
    """Mean latents over the tokens that were written.

    Attributes:
        means: One row a vector; NaN for a vector that wrote nothing.
        tokens: How many tokens each row is the mean of.
    """

    means: Float[np.ndarray, "vectors d_sae"]
    tokens: Int[np.ndarray, "vectors"]


def mean_latents(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    site: Site,
    prompts: Sequence[Example],
    replies: Sequence[str],
    owners: Int[np.ndarray, "replies"],
    count: int,
) -> MeanLatents:
    """Return the mean latents of replies, read by the model without any intervention.

    Args:
        model: The model.
        sae: Whose latents.
        site: Where the SAE reads.
        prompts: What each reply answers; its own tokens are not counted.
        replies: The texts.
        owners: For each reply, which row of the result it belongs to.
        count: Rows of the result.
    """
    asked = [with_response(*pair) for pair in zip(prompts, replies, strict=True)]
    sums = torch.zeros(count * sae.d_sae, dtype=torch.float64)
    tokens = np.zeros(count, dtype=np.int64)
    for start, stop in _runs(prompts):
        items = model.tokenize(asked[start:stop])
        usable = [n for n, item in enumerate(items) if item.status == "ok"]
        lengths = [len(items[n].ids) for n in usable]
        for batch in plan_batches(lengths, READ_TOKENS, len(usable) or 1):
            members = [items[usable[place]] for place in batch]
            whose = owners[start:stop][[usable[place] for place in batch]]
            read = model.collate(members)
            rows = _reply_tokens(members, read.ids.shape[1])
            x = model.capture_behind(read, [site], rows.to(read.ids.device))[site]
            each = rows.sum(dim=1).numpy()
            np.add.at(tokens, whose, each)
            _add(sums, sae, x, torch.from_numpy(np.repeat(whose, each)))
    means = sums.view(count, sae.d_sae).numpy()
    with np.errstate(invalid="ignore"):
        return MeanLatents(means / np.where(tokens > 0, tokens, np.nan)[:, None], tokens)


def measure(
    model: ModelAdapter,
    sae: SparseAutoencoder,
    site: Site,
    vectors: Float[Tensor, "vectors d_model"] | None,
    rollouts: Rollouts,
) -> MeanLatents:
    """Return the mean latents of what the model writes under each vector; see `roll_out`."""
    count = 1 if vectors is None else len(vectors)
    replies = roll_out(model, site, vectors, rollouts)
    rows = [row for row in rollouts.rows for _ in range(count)]
    owners = np.arange(len(rows)) % count
    return mean_latents(model, sae, site, rows, replies, owners, count)


def _reply_tokens(items: Sequence[TokenizedExample], length: int) -> Tensor:
    """Return which tokens of right-padded examples are the reply's own."""
    rows = torch.zeros(len(items), length, dtype=torch.bool)
    for place, item in enumerate(items):
        own = (item.roles == ROLES.index("response")) & ~item.special
        rows[place, : len(own)] = torch.from_numpy(own)
    return rows


def _runs(prompts: Sequence[Example]) -> list[tuple[int, int]]:
    """Return where stretches of one prompt begin and end; prompts that differ make one together."""
    edges = [n for n in range(1, len(prompts)) if prompts[n] is not prompts[n - 1]]
    if len(edges) + 1 == len(prompts):
        return [(0, len(prompts))] if prompts else []
    return list(zip([0, *edges], [*edges, len(prompts)], strict=True))


def _add(
    sums: Float[Tensor, "owners_d_sae"],
    sae: SparseAutoencoder,
    x: Float[Tensor, "rows d_model"],
    owner: Int[Tensor, "rows"],
) -> None:
    """Add the latents of rows to the sums of their owners."""
    for part, whose in zip(x.split(ENCODED_ROWS), owner.split(ENCODED_ROWS), strict=True):
        code = sae.encode_sparse(part.to(sae.W_enc.device))
        place = whose.repeat_interleave(code.l0.cpu()) * sae.d_sae + code.indices.cpu().long()
        sums.index_add_(0, place, code.values.cpu().double())
