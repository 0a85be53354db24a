"""How often and how strongly latents fire, over all tokens of a feature store, exactly.

The codes come as blocks [tokens, d_sae], sparse or dense, in any number of blocks: only sums,
maxima and counts are kept, the sums in float64. Of signed latents the magnitudes |z| count.
Statistics need no dense matrix and no sampling; quantiles of a latent need its values together and
so take the whole matrix, still sparse.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array

from saefty.metrics.base import Pooled, as_columns, column_blocks

ALWAYS_ON = 0.99
FREQUENT = 0.1
RARE = 1e-4
DENSE_VALUES = 1 << 18  # of a dense block looked at together: what the processor's cache holds


@dataclass(frozen=True)
class FiringStats:
    """Activity of each latent and of each token.

    Attributes:
        firing_rate: Share of tokens on which each latent exceeds eps.
        mean_all: Mean of each latent over all tokens, in its own units.
        mean_when_active: Its mean over the tokens on which it exceeds eps; 0 if there are none.
        max_all: Its largest value; 0 if it never fires.
        active_count: On how many tokens it exceeds eps.
        l0_counts: How many tokens have 0, 1, 2, … firing latents.
        token_count: How many tokens were read.
    """

    firing_rate: Float[np.ndarray, "d_sae"]
    mean_all: Float[np.ndarray, "d_sae"]
    mean_when_active: Float[np.ndarray, "d_sae"]
    max_all: Float[np.ndarray, "d_sae"]
    active_count: Int[np.ndarray, "d_sae"]
    l0_counts: Int[np.ndarray, "counts"]
    token_count: int

    @property
    def dead_share(self) -> float:
        """Share of latents that fire on none of these tokens."""
        return float((self.active_count == 0).mean())

    @property
    def always_on_share(self) -> float:
        """Share of latents that fire on at least 99 % of these tokens."""
        return float((self.firing_rate >= ALWAYS_ON).mean())

    @property
    def mean_l0(self) -> float:
        """Mean number of firing latents of a token; NaN without tokens."""
        if self.token_count == 0:
            return float("nan")
        return float(self.l0_counts @ np.arange(len(self.l0_counts)) / self.token_count)

    def l0_quantile(self, share: float) -> float:
        """Return the L0 that `share` of the tokens do not exceed, as `numpy.quantile` does."""
        if self.token_count == 0:
            return float("nan")
        below = np.cumsum(self.l0_counts)
        place = share * (self.token_count - 1)
        low, high = np.searchsorted(below, [np.floor(place), np.ceil(place)], side="right")
        return float(low + (place % 1.0) * (high - low))


def firing_stats(
    codes: Float[csr_array, "tokens d_sae"]
    | Iterable[Float[csr_array, "_ d_sae"] | Float[np.ndarray, "_ d_sae"]],
    *,
    eps: float = 0.0,
) -> FiringStats:
    """Return the activity of each latent over all tokens.

    Args:
        codes: The latents of each token, as one matrix or as blocks of tokens, each sparse or
            dense.
        eps: A latent fires where it exceeds this, in the units of the codes.

    Returns:
        The statistics, equal to those of the dense matrix.

    Raises:
        ValueError: If there is no block to tell d_sae from.
    """
    blocks = [codes] if isinstance(codes, csr_array) else _small(codes)
    totals: tuple[np.ndarray, ...] | None = None
    l0_counts, tokens = np.zeros(1, dtype=np.int64), 0
    for block in blocks:
        d_sae = block.shape[1]
        if totals is None:
            totals = (*np.zeros((3, d_sae)), np.zeros(d_sae, dtype=np.int64))
        everywhere, active, largest, count = totals
        if isinstance(block, np.ndarray):
            l0 = _add_dense(block, eps, totals)
            l0_counts, tokens = _counted(l0, l0_counts), tokens + len(block)
            continue
        # The rows of a code may hold their latents in any order, but each at most once.
        values = np.abs(block.data).astype(np.float64)
        fires = values > eps
        everywhere += np.bincount(block.indices, weights=values, minlength=d_sae)
        ids = block.indices[fires]
        active += np.bincount(ids, weights=values[fires], minlength=d_sae)
        count += np.bincount(ids, minlength=d_sae)
        np.maximum.at(largest, block.indices, values)
        l0 = np.diff(np.concatenate([[0], np.cumsum(fires)])[block.indptr])
        l0_counts, tokens = _counted(l0, l0_counts), tokens + block.shape[0]
    if totals is None:
        raise ValueError("firing_stats was given no block of codes")
    everywhere, active, largest, count = totals
    return FiringStats(
        firing_rate=count / max(tokens, 1),
        mean_all=everywhere / max(tokens, 1),
        mean_when_active=active / np.maximum(count, 1),
        max_all=largest,
        active_count=count,
        l0_counts=l0_counts,
        token_count=tokens,
    )


def _small(
    blocks: Iterable[csr_array | np.ndarray],
) -> Iterator[csr_array | np.ndarray]:
    """Yield sparse blocks as they are, dense ones in parts that stay in the processor's cache."""
    for block in blocks:
        if isinstance(block, csr_array):
            yield block
            continue
        rows = max(1, DENSE_VALUES // max(block.shape[1], 1))
        yield from (block[first : first + rows] for first in range(0, max(len(block), 1), rows))


def _add_dense(
    block: Float[np.ndarray, "tokens d_sae"], eps: float, totals: tuple[np.ndarray, ...]
) -> Int[np.ndarray, "tokens"]:
    """Add a dense block to the totals; return how many latents fire on each of its tokens."""
    everywhere, active, largest, count = totals
    values = np.abs(widened(block))
    # Compared in double precision, unless that makes no difference.
    fires = values > 0 if eps == 0 else values.astype(np.float64) > eps
    total = values.sum(axis=0, dtype=np.float64)
    everywhere += total
    active += total if eps == 0 else np.where(fires, values, 0).sum(axis=0, dtype=np.float64)
    count += fires.view(np.uint8).sum(axis=0, dtype=np.uint32)
    np.maximum(largest, values.max(axis=0, initial=0), out=largest)
    return np.array([np.count_nonzero(row) for row in fires], dtype=np.int64)


def widened(block: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Return values of half precision in single precision; others as they are.

    By a table of all 65,536 values, which takes an eighth of the time of NumPy's conversion.
    """
    if block.dtype != np.float16:
        return block
    return _halves().take(np.ascontiguousarray(block).view(np.uint16))


@cache
def _halves() -> Float[np.ndarray, "values"]:
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _counted(
    l0: Int[np.ndarray, "tokens"], before: Int[np.ndarray, "counts"]
) -> Int[np.ndarray, "longer"]:
    counted = np.bincount(l0, minlength=len(before))
    counted[: len(before)] += before
    return counted


def firing_regions(stats: FiringStats) -> dict[str, Bool[np.ndarray, "d_sae"]]:
    """Return which latents are dead, rare, healthy, frequent and always on; each is one of them.

    Dead latents never fired on these tokens, rare ones on fewer than 1 token in 10,000, healthy
    ones on up to one in ten, frequent ones on up to 99 %, always-on ones on 99 % or more.
    """
    rate = stats.firing_rate
    dead, always = stats.active_count == 0, rate >= ALWAYS_ON
    return {
        "dead": dead,
        "rare": ~dead & (rate < RARE),
        "healthy": (rate >= RARE) & (rate <= FREQUENT) & ~dead,
        "frequent": (rate > FREQUENT) & ~always,
        "always on": always & ~dead,
    }


def latent_quantiles(
    codes: Pooled, shares: Float[np.ndarray, "shares"], *, active_only: bool = False
) -> Float[np.ndarray, "shares d_sae"]:
    """Return exact quantiles of each latent, linear between neighbours as `numpy.quantile`.

    Args:
        codes: The latents of each token, the whole matrix; of signed ones |z| counts.
        shares: Which quantiles, from 0 to 1.
        active_only: Over the tokens on which the latent is not 0, instead of all of them.

    Returns:
        One row a quantile, in the units of the codes; with `active_only`, NaN for a latent that
        never fires.
    """
    signed = as_columns(codes)
    columns = csc_array((np.abs(signed.data), signed.indices, signed.indptr), shape=signed.shape)
    result = np.full((len(shares), columns.shape[1]), np.nan)
    for where, block in column_blocks(columns):
        result[:, where] = _block_quantiles(block, shares, active_only)
    return result


def _block_quantiles(
    block: csc_array, shares: np.ndarray, active_only: bool
) -> Float[np.ndarray, "shares columns"]:
    tokens, width = block.shape
    stored = np.diff(block.indptr).astype(np.int64)
    # A place before the stored values is one of the zeros.
    values = np.append(_sorted_columns(block), 0.0)
    zeros = np.zeros(width, dtype=np.int64) if active_only else tokens - stored
    place = shares[:, None] * np.maximum(stored + zeros - 1, 0)
    ends = []
    for index in (np.floor(place), np.ceil(place)):
        offset = index.astype(np.int64) - zeros
        at = np.where((offset >= 0) & (stored > 0), block.indptr[:-1] + offset, len(values) - 1)
        ends.append(values[at])
    quantiles = ends[0] + (place % 1.0) * (ends[1] - ends[0])
    return np.where((stored == 0) & active_only, np.nan, quantiles)


def _sorted_columns(block: csc_array) -> Float[np.ndarray, "stored"]:
    """Return the values of a block, none of them below zero, by column and in order."""
    column = np.repeat(np.arange(block.shape[1], dtype=np.uint64), np.diff(block.indptr))
    short = block.data.astype(np.float32)
    if not np.array_equal(short, block.data):
        return np.asarray(block.data[np.lexsort((block.data, column))])
    # As one integer, column before value, which sorts ten times as fast: the bits of floats that
    # are not below zero are in the order of their values.
    keys = np.sort(column << np.uint64(32) | short.view(np.uint32))
    return keys.astype(np.uint32).view(np.float32).astype(np.float64)
