"""How far to push: the length of the training vectors that costs the model a set amount of loss.

A vector too short moves nothing, one too long leaves word salad whose latents say nothing of the
vector. So the length is the one at which the mean loss on clean text rises by a set number of nats.
The loss is the mean over a sample of the vectors, each row of a batch with a vector of its own.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saefty.errors import ConfigError, InputError, NumericError
from saefty.interventions.steer import steer
from saefty.models.base import ModelAdapter
from saefty.models.batching import plan_batches
from saefty.records import Example, Site

log = logging.getLogger(__name__)

TOLERANCE = 0.02
"""The rise may miss the level by this share of it."""
MOST_STEPS = 30
TOKEN_BUDGET = 16_384
"""Most tokens in one forward pass."""
LARGEST = 64.0
"""The longest vector tried, in mean norms of the activations."""


@dataclass(frozen=True)
class ScaleSearch:
    """What was tried, and what was found.

    Attributes:
        scale: Length of the vectors, in units of the activations.
        rise: By how much the loss rises at that length, in nats a token.
        clean: The loss without any vector.
        residual: Mean norm of the activations where the vectors are added.
        tried: Every (length, rise) that was measured, in that order.
    """

    scale: float
    rise: float
    clean: float
    residual: float
    tried: tuple[tuple[float, float], ...]


def residual_norm(model: ModelAdapter, site: Site, examples: Sequence[Example]) -> float:
    """Return the mean norm of the activations at a site, special tokens left out.

    Raises:
        InputError: If no example has a token to look at.
        NumericError: If the norms are not finite.
    """
    items = [item for item in model.tokenize(examples, truncate="right") if item.status == "ok"]
    total, tokens = 0.0, 0
    for batch in plan_batches([len(item.ids) for item in items], TOKEN_BUDGET // 2):
        read = model.collate([items[n] for n in batch])
        x = model.capture(read, [site], rows=read.mask & ~read.special)[site]
        total += float(x.double().norm(dim=1).sum())
        tokens += len(x)
    if tokens == 0:
        raise InputError(
            f"none of the {len(examples)} texts has a token whose activations could be measured.",
            then="Give texts that hold words and fit into the model's context.",
        )
    if not np.isfinite(total):
        raise NumericError(
            f"the activations at {site} are NaN or infinite.",
            then="Set model.dtype=bfloat16 or float32 if the model overflows in float16.",
        )
    return total / tokens


def find_scale(
    model: ModelAdapter,
    site: Site,
    units: Float[Tensor, "vectors d_model"],
    texts: Sequence[Example],
    *,
    rise: float,
) -> ScaleSearch:
    """Find the length of vectors at which the mean loss rises to a set level, by bisection.

    Args:
        model: The model.
        site: Where the vectors are added.
        units: Vectors of norm 1; a sample of the training vectors.
        texts: Clean text; each is read with each vector.
        rise: The level, in nats a token above the loss without a vector.

    Raises:
        ConfigError: If the level is not above 0, or is out of reach.
        InputError: If no text has two tokens.
        NumericError: If the loss on a token is NaN or infinite; it names the length.
    """
    if rise <= 0:
        raise ConfigError(
            f"the loss is to rise by {rise} nats, which is nothing.",
            then="Set effects.loss_rise above 0, or the length itself with effects.scale.",
        )
    items = [item for item in model.tokenize(texts, truncate="right") if item.status == "ok"]
    pairs = [(item, v) for item in items if len(item.ids) > 1 for v in range(len(units))]
    if not pairs:
        raise InputError(
            f"none of the {len(texts)} texts has two tokens, so there is no loss to raise.",
            then="Give longer texts.",
        )
    plan = plan_batches([len(item.ids) for item, _ in pairs], TOKEN_BUDGET, len(pairs))
    batches = [
        (model.collate([pairs[n][0] for n in batch]), units[[pairs[n][1] for n in batch]])
        for batch in plan
    ]

    def mean_loss(scale: float) -> float:
        total, tokens = 0.0, 0
        for read, rows in batches:
            if scale:
                with model.intervene(site, steer(rows, scale)):
                    loss = model.loss(read)
            else:
                loss = model.loss(read)
            real = (read.mask[:, 1:] & read.mask[:, :-1]).to(loss.device)
            total += float(loss[real].double().sum())
            tokens += int(real.sum())
        if not np.isfinite(total):
            raise NumericError(
                f"the loss on clean text is NaN or infinite at alpha = {scale:.4g}, the length of "
                "the vectors.",
                then="Set model.dtype=bfloat16 or float32 if the model overflows in float16, "
                "lower effects.loss_rise, or set the length with effects.scale.",
            )
        return total / tokens

    clean, residual = mean_loss(0.0), residual_norm(model, site, texts)
    tried: list[tuple[float, float]] = []

    def rise_at(scale: float) -> float:
        tried.append((scale, mean_loss(scale) - clean))
        return tried[-1][1]

    low, high = 0.0, 0.25 * residual
    reached = rise_at(high)
    while reached < rise and high < LARGEST * residual:
        low, high = high, 2 * high
        reached = rise_at(high)
    if reached < rise:
        raise ConfigError(
            f"the loss rises by {reached:.3g} nats at most, at vectors {high / residual:.0f} times "
            f"as long as the activations; {rise:.3g} was asked for.",
            then="Lower effects.loss_rise, or set the length with effects.scale.",
        )
    scale = high
    while abs(reached - rise) > TOLERANCE * rise and len(tried) < MOST_STEPS:
        scale = (low + high) / 2
        reached = rise_at(scale)
        low, high = (scale, high) if reached < rise else (low, scale)
    if abs(reached - rise) > TOLERANCE * rise:
        log.warning(
            "after %d lengths the loss rises by %.4g nats at %.4g, not by %.4g: it jumps there",
            len(tried), reached, scale, rise,
        )  # fmt: skip
    log.info(
        "vectors of length %.4g (%.2f mean norms) raise the loss by %.3f nats",
        scale, scale / residual, reached,
    )  # fmt: skip
    return ScaleSearch(scale, reached, clean, residual, tuple(tried))
