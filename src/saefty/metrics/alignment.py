"""Which latents fire on harmful text: one score a latent, from pooled features and labels.

All scores read the same two arrays: `z`, the latents of each example pooled over its tokens, and
`harmful`, one bool an example. A score is 0 (or 0.5 for `auroc`) for a latent that cannot tell
harmful examples from the rest, and grows with how well it can. Nothing here depends on a model.
Latents are non-negative (for signed codes pass |z|); a signed column, such as a raw neuron, is
ranked as it is and fires where it exceeds eps.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy.sparse import csc_array

from saefty.metrics.base import (
    LATENT_SCORES,
    Columns,
    Pooled,
    as_columns,
    check_labels,
    column_blocks,
    firing,
    rank_columns,
    varying,
)

VARIANCE_FLOOR = 0.01
KL_PERCENTILE = 99.0
HISTOGRAM_BINS = 20
CONSENSUS_WEIGHTS = {"dfreq": 1.0, "dmag": 1.0, "auroc": 1.0, "kl": 0.5}


@LATENT_SCORES.register("dfreq")
def dfreq(
    z: Pooled, harmful: Bool[np.ndarray, "examples"], *, eps: float = 0.0
) -> Float[np.ndarray, "d_sae"]:
    """Return how much more often each latent fires on harmful examples than on the rest.

    dfreq = P(z > eps | harmful) - P(z > eps | harmless)

    Args:
        z: Pooled latents, in the units of the activations they encode.
        harmful: True for the harmful examples; both kinds must be present.
        eps: A latent fires where it exceeds this, in the units of `z`.

    Returns:
        A difference of two frequencies for each latent, from -1 (fires only on harmless
        examples) to 1 (only on harmful ones).

    Example:
        >>> z = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
        >>> dfreq(z, np.array([True, True, False, False]))
        array([ 1. , -0.5])
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    fires = csc_array(
        ((columns.data > eps).astype(float), columns.indices, columns.indptr), shape=columns.shape
    )
    harmful_mean, harmless_mean = _group_means(fires, harmful)
    return harmful_mean - harmless_mean


@LATENT_SCORES.register("dmag")
def dmag(
    z: Pooled, harmful: Bool[np.ndarray, "examples"], *, eps: float = 0.0
) -> Float[np.ndarray, "d_sae"]:
    """Return how much larger each latent is on average on harmful examples than on the rest.

    dmag = E[z | harmful] - E[z | harmless], zeros included, so `eps` has no part in it.

    Args:
        z: Pooled latents, in the units of the activations they encode.
        harmful: True for the harmful examples; both kinds must be present.
        eps: Not used; every latent score takes it.

    Returns:
        A difference of two means for each latent, in the units of `z`.

    Example:
        >>> z = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
        >>> dmag(z, np.array([True, True, False, False]))
        array([ 1.5, -1.5])
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    harmful_mean, harmless_mean = _group_means(columns, harmful)
    return harmful_mean - harmless_mean


@LATENT_SCORES.register("auroc")
def auroc(
    z: Pooled, harmful: Bool[np.ndarray, "examples"], *, eps: float = 0.0
) -> Float[np.ndarray, "d_sae"]:
    """Return the probability that a latent is larger on a harmful example than on a harmless one.

    Ties count half, so a latent that is constant scores 0.5. Equal to the area under the ROC curve
    of the latent as a detector, and to U / (n_harmful · n_harmless) of Mann and Whitney.

    Args:
        z: Pooled latents, in any units: only their order matters.
        harmful: True for the harmful examples; both kinds must be present.
        eps: Not used; every latent score takes it.

    Returns:
        A probability for each latent, from 0 (always smaller on harmful) to 1 (always larger).

    Example:
        >>> z = np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0], [0.0, 1.0]])
        >>> auroc(z, np.array([True, True, False, False]))
        array([1.   , 0.125])
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    scores = np.full(columns.shape[1], 0.5)
    for where, block in column_blocks(columns):
        scores[where] = rank_columns(block).auroc(harmful[None])[:, 0]
    return scores


@LATENT_SCORES.register("kl")
def kl(
    z: Pooled, harmful: Bool[np.ndarray, "examples"], *, eps: float = 0.0
) -> Float[np.ndarray, "d_sae"]:
    """Return KL(harmful || harmless) of each latent, as if it were Gaussian in both groups.

    KL = ½ (v₁/v₀ + (m₁ - m₀)²/v₀ - 1 - ln(v₁/v₀)), m and v the mean and variance of the harmful (1)
    and harmless (0) examples. No variance counts as less than 1 % of the latent's variance over all
    examples, and no score exceeds the 99th percentile over the latents that fire: without the
    two, a latent that is constant in one group would be infinitely far from itself.

    Args:
        z: Pooled latents, in any units: the score does not change when a latent is scaled.
        harmful: True for the harmful examples; both kinds must be present.
        eps: A latent fires where it exceeds this; the percentile is over latents that do.

    Returns:
        Nats, 0 or more for each latent; 0 for a latent that is constant over all examples.
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    squares = columns.power(2)
    means = _group_means(columns, harmful)
    v1, v0 = (s - m**2 for s, m in zip(_group_means(squares, harmful), means, strict=True))
    total = np.asarray(squares.mean(axis=0)) - np.asarray(columns.mean(axis=0)) ** 2
    varies = varying(columns)
    floor = np.where(varies, VARIANCE_FLOOR * total, 1.0)
    v1, v0 = np.maximum(v1, floor), np.maximum(v0, floor)
    nats = 0.5 * (v1 / v0 + (means[0] - means[1]) ** 2 / v0 - 1.0 - np.log(v1 / v0))
    return _clip(np.where(varies, np.maximum(nats, 0.0), 0.0), firing(columns, eps))


@LATENT_SCORES.register("kl_histogram")
def kl_histogram(
    z: Pooled, harmful: Bool[np.ndarray, "examples"], *, eps: float = 0.0
) -> Float[np.ndarray, "d_sae"]:
    """Return KL(harmful || harmless) of each latent from histograms, without assuming a shape.

    A latent's range over all examples, zero included, is cut into 20 equal bins; one is added to
    each count, so that an empty bin is rare rather than impossible. Clipped as `kl` is.

    Args:
        z: Pooled latents, in any units.
        harmful: True for the harmful examples; both kinds must be present.
        eps: A latent fires where it exceeds this; the percentile is over latents that do.

    Returns:
        Nats, 0 or more for each latent; 0 for a latent that is constant over all examples.
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    nats = np.zeros(columns.shape[1])
    for where, block in column_blocks(columns):
        shares = [_histogram(block, rows) for rows in (harmful, ~harmful)]
        shares = [(counts + 1) / (counts + 1).sum(axis=1, keepdims=True) for counts in shares]
        distance = (shares[0] * np.log(shares[0] / shares[1])).sum(axis=1)
        nats[where] = np.where(varying(block), distance, 0.0)
    return _clip(nats, firing(columns, eps))


@LATENT_SCORES.register("consensus")
def consensus(
    z: Pooled, harmful: Bool[np.ndarray, "examples"], *, eps: float = 0.0
) -> Float[np.ndarray, "d_sae"]:
    """Return the weighted mean of the z-scores of dfreq, dmag, AUROC - ½ and sign(dmag)·KL.

    Each score is centred and scaled by its mean and standard deviation over the latents that fire;
    the weights are 1, 1, 1 and 0.5. Positive: fires on harmful examples.

    Args:
        z: Pooled latents, in the units of the activations they encode.
        harmful: True for the harmful examples; both kinds must be present.
        eps: A latent fires where it exceeds this, in the units of `z`.

    Returns:
        Standard deviations for each latent; 0 for one that never fires or is constant.
    """
    scores = {name: LATENT_SCORES[name](z, harmful, eps=eps) for name in CONSENSUS_WEIGHTS}
    fires = firing(z, eps)
    centred = scores | {
        "auroc": scores["auroc"] - 0.5,
        "kl": np.sign(scores["dmag"]) * scores["kl"],
    }
    total = np.zeros(len(fires))
    if not fires.any():
        return total
    for name, weight in CONSENSUS_WEIGHTS.items():
        spread = centred[name][fires].std()
        if spread > 0:
            total += weight * (centred[name] - centred[name][fires].mean()) / spread
    return np.where(fires & varying(z), total / sum(CONSENSUS_WEIGHTS.values()), 0.0)


def _group_means(
    columns: Columns, harmful: Bool[np.ndarray, "examples"]
) -> tuple[Float[np.ndarray, "d_sae"], Float[np.ndarray, "d_sae"]]:
    return (
        np.asarray(harmful.astype(float) @ columns) / harmful.sum(),
        np.asarray((~harmful).astype(float) @ columns) / (~harmful).sum(),
    )


def _clip(
    nats: Float[np.ndarray, "d_sae"], fires: Bool[np.ndarray, "d_sae"]
) -> Float[np.ndarray, "d_sae"]:
    if not fires.any():
        return nats
    return np.minimum(nats, np.percentile(nats[fires], KL_PERCENTILE))


def _histogram(
    block: Columns, rows: Bool[np.ndarray, "examples"]
) -> Float[np.ndarray, "columns bins"]:
    """Count, for each column, the chosen rows in equal bins over the range of all rows."""
    width = block.shape[1]
    low = np.minimum(block.min(axis=0).toarray(), 0.0).ravel()
    high = np.maximum(block.max(axis=0).toarray(), 0.0).ravel()
    span = np.where(high > low, high - low, 1.0)
    column = np.repeat(np.arange(width), np.diff(block.indptr))
    kept = rows[block.indices]
    position = (block.data[kept] - low[column[kept]]) / span[column[kept]]
    cell = np.minimum((position * HISTOGRAM_BINS).astype(int), HISTOGRAM_BINS - 1)
    counts = np.bincount(
        column[kept] * HISTOGRAM_BINS + cell, minlength=width * HISTOGRAM_BINS
    ).reshape(width, HISTOGRAM_BINS)
    zero_cell = np.minimum((-low / span * HISTOGRAM_BINS).astype(int), HISTOGRAM_BINS - 1)
    counts[np.arange(width), zero_cell] += rows.sum() - np.bincount(column[kept], minlength=width)
    return counts.astype(float)
