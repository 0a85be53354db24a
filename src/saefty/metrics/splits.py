"""Splits by whole clusters, with every source and label in each part.

Latents are chosen on one part and reported on another; a probe learns on one and is judged on
another. If a prompt's variants stood on both sides, the second part would repeat the first.
"""

import numpy as np
from jaxtyping import Bool, Int

from saefty.errors import InputError
from saefty.metrics.base import group_codes


def split_clusters(
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    sources: Int[np.ndarray, "examples"] | None = None,
    *,
    shares: tuple[float, ...] = (0.5, 0.5),
    seed: int = 0,
    setting: str | None = None,
) -> tuple[Bool[np.ndarray, "examples"], ...]:
    """Divide examples by cluster, with the labels and sources of the whole in each part.

    Clusters with the same sources and labels (all harmful, all harmless, both) are dealt out in
    random order, the largest first, each to the part that is furthest below its share.

    Args:
        harmful: The labels; both kinds must be present.
        clusters: A code an example, equal for examples that belong together; None if all are apart.
        sources: A code an example for the dataset it came from; None if there is one.
        shares: What share of the examples each part should hold; they are scaled to 1.
        seed: The same seed makes the same split.
        setting: The setting that says the last part's share, for the message.

    Returns:
        One mask a part. Every example is in exactly one part, no cluster in two.

    Raises:
        InputError: If a part cannot hold at least two clusters of each label.
    """
    codes = group_codes(clusters, len(harmful))
    source = np.zeros(len(harmful), dtype=int) if sources is None else sources
    wanted = np.asarray(shares, dtype=float) / sum(shares)
    rng = np.random.default_rng([seed, 3])
    strata: dict[tuple[tuple[int, ...], tuple[bool, ...]], list[np.ndarray]] = {}
    order = np.argsort(codes, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(codes[order])) + 1):
        key = (tuple(np.unique(source[rows]).tolist()), tuple(np.unique(harmful[rows]).tolist()))
        strata.setdefault(key, []).append(rows)
    part = np.zeros(len(harmful), dtype=int)
    overall = np.zeros(len(shares))
    for key in sorted(strata):
        units = [strata[key][i] for i in rng.permutation(len(strata[key]))]
        filled = np.zeros(len(shares))
        for rows in sorted(units, key=len, reverse=True):
            lack = wanted * (filled.sum() + len(rows)) - filled
            # Between parts that lack as much in this stratum, the one that lacks more over all.
            spare = wanted * (overall.sum() + len(rows)) - overall
            chosen = int(np.lexsort((-spare.round(9), -lack.round(9)))[0])
            part[rows] = chosen
            filled[chosen] += len(rows)
            overall[chosen] += len(rows)
    parts = tuple(part == i for i in range(len(shares)))
    _check(parts, harmful, codes, setting)
    return parts


def balanced_subset(
    harmful: Bool[np.ndarray, "examples"],
    clusters: Int[np.ndarray, "examples"] | None = None,
    *,
    seed: int = 0,
) -> Bool[np.ndarray, "examples"]:
    """Return as many harmful as harmless examples: all of the rarer label, some of the other.

    Of the commoner label whole clusters are left out, in random order, as long as they are not too
    many; then single examples.

    Args:
        harmful: The labels; both kinds must be present.
        clusters: A code an example, equal for examples that belong together; None if all are apart.
        seed: The same seed makes the same choice.
    """
    rng = np.random.default_rng([seed, 7])
    common = harmful if 2 * harmful.sum() > len(harmful) else ~harmful
    excess = int(2 * common.sum() - len(harmful))
    codes = group_codes(clusters, len(harmful))
    mixed = np.isin(codes, codes[~common])
    kept = np.ones(len(harmful), dtype=bool)
    sizes, dropped = np.bincount(codes), []
    for code in rng.permutation(np.unique(codes[~mixed])).tolist():
        if sizes[code] <= excess:
            dropped.append(code)
            excess -= int(sizes[code])
    kept[np.isin(codes, np.array(dropped, dtype=codes.dtype))] = False
    kept[rng.permutation(np.flatnonzero(common & kept))[:excess]] = False
    return kept


def _check(
    parts: tuple[np.ndarray, ...], harmful: np.ndarray, codes: np.ndarray, setting: str | None
) -> None:
    for place, mask in enumerate(parts):
        for label, name in ((True, "harmful"), (False, "harmless")):
            n = len(np.unique(codes[mask & (harmful == label)]))
            if n < 2:
                total = len(np.unique(codes[harmful == label]))
                then = f"Add {name} examples, or set data.group to a finer column."
                if setting and total >= 2 * len(parts):
                    size = "larger" if place == len(parts) - 1 else "smaller"
                    then = f"Set {setting} to a {size} share (0.3, say)."
                raise InputError(
                    f"the {len(harmful)} examples hold {total} independent groups with {name} "
                    f"examples; {len(parts)} parts need at least 2 each, and one would get {n}.",
                    then=then,
                )
