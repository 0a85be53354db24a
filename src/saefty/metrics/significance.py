"""How sure a difference is: tests for each latent, and corrections for having looked at thousands.

Three questions, three answers. Is this latent related to harm at all: Mann and Whitney's test, and
over all latents the false-discovery rate of Benjamini and Hochberg. Would the best of thousands of
latents look as good by luck: the maximum statistic (Westfall and Young 1993) against labels that
were permuted. Do the few latents that are reported hold on new data: Holm's correction.

Labels are permuted as they could have been given: whole clusters (prompt groups) change places
where a cluster has one label, and labels change places inside a cluster that has both; never
between sources. Rows of one cluster resemble each other, and a test that takes them for independent
finds something in noise.
"""

from math import lgamma, log

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.stats import norm

from saefty.metrics.base import (
    Pooled,
    as_columns,
    check_labels,
    column_blocks,
    group_codes,
    rank_columns,
)

# A permuted statistic that differs from the observed one by rounding alone is as large as it.
ROUNDING = 1e-10


def mann_whitney(z: Pooled, harmful: Bool[np.ndarray, "examples"]) -> Float[np.ndarray, "d_sae"]:
    """Return the two-sided p of Mann and Whitney's test for each latent.

    Normal approximation with the correction for ties and for continuity, as
    `scipy.stats.mannwhitneyu(method="asymptotic")`. It takes examples for independent.

    Args:
        z: Pooled latents.
        harmful: True for the harmful examples; both kinds must be present.

    Returns:
        p for each latent; 1 for one that is constant.
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    examples, positives = len(harmful), int(harmful.sum())
    pairs = positives * (examples - positives)
    p = np.ones(columns.shape[1])
    for where, block in column_blocks(columns):
        ranks = rank_columns(block)
        u = pairs * ranks.auroc(harmful[None])[:, 0]
        variance = pairs / 12 * (examples + 1 - ranks.ties / (examples * (examples - 1)))
        spread = np.sqrt(np.maximum(variance, 0.0))
        varies = spread > ROUNDING
        shift = np.maximum(u, pairs - u) - pairs / 2 - 0.5
        p[where] = np.where(
            varies, np.minimum(2 * norm.sf(shift / np.where(varies, spread, 1.0)), 1.0), 1.0
        )
    return p


def benjamini_hochberg(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
    """Return q: the false-discovery rate at which each test would just be called significant."""
    n = len(p)
    order = np.argsort(p)[::-1]
    raised = p[order] * n / np.arange(n, 0, -1)
    q = np.empty(n)
    q[order] = np.minimum(np.minimum.accumulate(raised), 1.0)
    return q


def holm(p: Float[np.ndarray, "tests"]) -> Float[np.ndarray, "tests"]:
    """Return p adjusted so that the chance of any false claim among all tests stays bounded."""
    n = len(p)
    order = np.argsort(p)
    raised = p[order] * np.arange(n, 0, -1)
    adjusted = np.empty(n)
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1.0)
    return adjusted


def permuted_labels(
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    sources: Int[np.ndarray, "examples"] | None = None,
    *,
    permutations: int = 1000,
    seed: int = 0,
) -> Bool[np.ndarray, "permutations examples"]:
    """Return labellings that could have been given if harm had nothing to do with the latents.

    A cluster whose examples share one label keeps one label and changes places with other such
    clusters of its source; in a cluster with both labels they change places among its examples of
    one source. A cluster that spans sources changes places with those that span the same ones.

    Args:
        harmful: The labels as given.
        clusters: A code an example, equal for examples that belong together (a prompt and its
            variants); None if every example stands alone.
        sources: A code an example for the dataset it came from; None if there is one.
        permutations: How many labellings to draw.
        seed: The same seed draws the same labellings.

    Returns:
        One labelling a row. Where the source or the cluster fixes every label, all equal `harmful`.
    """
    rng = np.random.default_rng([seed, 1])
    drawn = np.tile(harmful, (permutations, 1))
    for units in _exchangeable(harmful, clusters, sources):
        labels = harmful[[unit[0] for unit in units]]
        if labels.all() or not labels.any():
            continue
        shuffled = rng.permuted(np.tile(labels, (permutations, 1)), axis=1)
        sizes = [len(unit) for unit in units]
        drawn[:, np.concatenate(units)] = np.repeat(shuffled, sizes, axis=1)
    return drawn


def log10_arrangements(
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    sources: Int[np.ndarray, "examples"] | None = None,
) -> float:
    """Return log₁₀ of how many labellings `permuted_labels` can draw.

    Below log₁₀ 20 = 1.3 no permutation p can reach 0.05, whatever the latents do.
    """
    total = 0.0
    for units in _exchangeable(harmful, clusters, sources):
        n, k = len(units), int(harmful[[unit[0] for unit in units]].sum())
        total += lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
    return total / log(10)


def permutation_p(
    z: Pooled,
    harmful: Bool[np.ndarray, "examples"],
    permuted: Bool[np.ndarray, "permutations examples"],
) -> Float[np.ndarray, "d_sae"]:
    """Return each latent's two-sided p for |AUROC - ½| against permuted labels.

    p = (1 + b) / (1 + B), b the number of the B labellings for which the latent does at least as
    well. Valid for correlated rows if whole clusters were permuted.

    Args:
        z: Pooled latents.
        harmful: The labels as given.
        permuted: Labellings from `permuted_labels`.

    Returns:
        p for each latent, at least 1 / (1 + B).
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    p = np.ones(columns.shape[1])
    for where, block in column_blocks(columns):
        ranks = rank_columns(block)
        observed = np.abs(ranks.auroc(harmful[None]) - 0.5)
        as_good = np.zeros(len(observed))
        for part in np.array_split(permuted, max(1, len(permuted) // 1000)):
            as_good += (np.abs(ranks.auroc(part) - 0.5) >= observed - ROUNDING).sum(axis=1)
        p[where] = (1 + as_good) / (1 + len(permuted))
    return p


def maximum_statistic(
    z: Pooled,
    harmful: Bool[np.ndarray, "examples"],
    permuted: Bool[np.ndarray, "permutations examples"],
) -> tuple[Float[np.ndarray, "d_sae"], Float[np.ndarray, "permutations"]]:
    """Return each latent's p against the best of all latents under permuted labels.

    The statistic is max over latents of |AUROC - ½|, which answers for having picked the best of
    d_sae latents however they depend on one another: p = (1 + b) / (1 + B), b the number of the B
    labellings under which *some* latent does at least as well as this one.

    Args:
        z: Pooled latents.
        harmful: The labels as given.
        permuted: Labellings from `permuted_labels`.

    Returns:
        p for each latent, and the maximum under each labelling (from 0 to ½).
    """
    columns = as_columns(z)
    check_labels(harmful, columns.shape[0])
    observed = np.zeros(columns.shape[1])
    best = np.zeros(len(permuted))
    for where, block in column_blocks(columns):
        ranks = rank_columns(block)
        observed[where] = np.abs(ranks.auroc(harmful[None])[:, 0] - 0.5)
        best = np.maximum(best, np.abs(ranks.auroc(permuted) - 0.5).max(axis=0))
    below = np.searchsorted(np.sort(best), observed - ROUNDING, side="left")
    return (1 + len(best) - below) / (1 + len(best)), best


def _exchangeable(
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None,
    sources: Int[np.ndarray, "examples"] | None,
) -> list[list[np.ndarray]]:
    """Return sets of units (rows that share a label) whose labels may change places."""
    cluster = group_codes(clusters, len(harmful))
    source = np.zeros(len(harmful), dtype=int) if sources is None else sources
    order = np.argsort(cluster, kind="stable")
    whole: dict[tuple[int, ...], list[np.ndarray]] = {}
    sets = []
    for rows in np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1):
        inside = harmful[rows]
        if inside.all() or not inside.any():
            whole.setdefault(tuple(np.unique(source[rows]).tolist()), []).append(rows)
        else:
            sets += [
                [rows[source[rows] == s][i : i + 1] for i in range((source[rows] == s).sum())]
                for s in np.unique(source[rows])
            ]
    return list(whole.values()) + sets
