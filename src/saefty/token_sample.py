"""A seeded uniform sample of tokens, and exact figures of the values in it without a dense matrix.

The codes of the sampled tokens are kept as blocks. A block of which few entries are not 0 is sparse
and lies in memory; another is dense and lies in a scratch file that is mapped, so that memory does
not grow with density. Percentiles are exact: the ranks wanted are found by counting the values' bit
patterns, 16 bits at a time, zeros that are not stored included.

Active is |z| > eps, as everywhere in saefty: for codes that are never below zero that is z > eps.
Values (least, mean, percentiles, largest) are those of z itself, sign and all.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array

from saefty import fsio
from saefty.metrics.firing import widened

Block: TypeAlias = csr_array | np.ndarray
"""Codes of some tokens, [tokens, d_sae]; dense ones are floating point."""

EPSILONS = (0.0, 1e-4, 1e-3, 1e-2, 0.1)
PERCENTILES = (1, 5, 50, 95, 99)
L0_PERCENTILES = (95, 99)
DENSE_SHARE = 0.1  # from this share of non-zeros on, a block is kept dense
BLOCK_VALUES = 1 << 22  # of a dense block looked at together
DIGIT = 16


@dataclass(frozen=True)
class TokenSample:
    """The codes of some tokens.

    Attributes:
        parts: Sparse blocks in memory, and dense blocks.
        width: The number of latents.
    """

    parts: tuple[Block, ...]
    width: int

    @property
    def n_tokens(self) -> int:
        """How many tokens there are."""
        return sum(part.shape[0] for part in self.parts)

    def blocks(self) -> Iterator[Block]:
        """Yield the codes; dense blocks in parts of some megabytes."""
        rows = max(1, BLOCK_VALUES // max(self.width, 1))
        for part in self.parts:
            if isinstance(part, csr_array):
                yield part
            else:
                yield from (part[first : first + rows] for first in range(0, len(part), rows))

    def l0(self) -> Int[np.ndarray, "tokens"]:
        """Return how many latents are active on each token."""
        counts = [
            np.diff(block.indptr)
            if isinstance(block, csr_array)
            else np.array([np.count_nonzero(row) for row in widened(block)])
            for block in self.blocks()
        ]
        return np.concatenate([*counts, np.zeros(0, np.int64)]).astype(np.int64)


@dataclass(frozen=True)
class SampleReport:
    """What the codes of the sample are like; units are those of the codes.

    Attributes:
        shape: Tokens and latents.
        least: The smallest value.
        median: The value in the middle of all of them, zeros counted.
        mean: Their mean.
        largest: The largest value.
        percentiles: Of all values, by percentage.
        negative_share: Share of values below zero.
        active_share: Share of values with |z| > eps, by eps.
        active_per_token: Mean number of latents of a token with |z| > eps, by eps.
        l0_mean: Mean number of latents of a token that are not 0.
        l0_median: Its median over tokens.
        l0_percentiles: Its percentiles over tokens, by percentage.
    """

    shape: tuple[int, int]
    least: float
    median: float
    mean: float
    largest: float
    percentiles: dict[int, float]
    negative_share: float
    active_share: dict[float, float]
    active_per_token: dict[float, float]
    l0_mean: float
    l0_median: float
    l0_percentiles: dict[int, float]

    def as_record(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        return {
            "X_shape": list(self.shape),
            "min": self.least,
            "median": self.median,
            "mean": self.mean,
            "max": self.largest,
            "percentiles": {f"p{share}": value for share, value in self.percentiles.items()},
            "negative_share": self.negative_share,
            "active": [
                {"eps": eps, "frac": self.active_share[eps], "per_token": count}
                for eps, count in self.active_per_token.items()
            ],
            "L0": {
                "mean": self.l0_mean,
                "median": self.l0_median,
                **{f"p{share}": value for share, value in self.l0_percentiles.items()},
            },
        }


def draw_tokens(n_tokens: int, sample: int, seed: int) -> Int[np.ndarray, "sample"]:
    """Return which tokens are sampled, in order: every set of that size is as likely.

    The draw depends on its arguments alone, not on how the tokens lie in chunks.

    Args:
        n_tokens: How many tokens there are.
        sample: How many to draw; all of them, if there are no more.
        seed: Of the draw.
    """
    if sample >= n_tokens:
        return np.arange(n_tokens, dtype=np.int64)
    chosen = np.random.default_rng(seed).choice(n_tokens, sample, replace=False)
    return np.sort(chosen).astype(np.int64)


class SampleTaker:
    """Keeps the sampled tokens of blocks that pass by.

    Args:
        chosen: Which tokens, in order (`draw_tokens`).
        scratch: A file for dense blocks; without one they are kept in memory.
    """

    def __init__(self, chosen: Int[np.ndarray, "sample"], scratch: Path | None = None) -> None:
        self._chosen, self._scratch = chosen, scratch
        self._parts: list[Block | _Aside] = []
        self._width = 0

    def watch(self, blocks: Iterable[tuple[int, Block]]) -> Iterator[Block]:
        """Yield blocks as they are and keep the sampled tokens of each.

        Args:
            blocks: The number of each block's first token, and its codes.
        """
        for first, block in blocks:
            self._width = block.shape[1]
            ends = np.searchsorted(self._chosen, [first, first + block.shape[0]])
            rows = self._chosen[ends[0] : ends[1]] - first
            step = max(1, BLOCK_VALUES // max(block.shape[1], 1))
            if isinstance(block, csr_array):
                self._keep_sparse(csr_array(block[rows]), step)
            else:
                for begin in range(0, len(rows), step):
                    self._keep_dense(block[rows[begin : begin + step]])
            yield block

    def sample(self) -> TokenSample:
        """Return what was kept."""
        held: np.ndarray = np.zeros(0, np.uint8)
        if self._scratch is not None and self._scratch.exists():
            # Mapped once, because each mapping takes a file descriptor.
            held = np.memmap(self._scratch, dtype=np.uint8, mode="r")
        parts = (part.of(held) if isinstance(part, _Aside) else part for part in self._parts)
        return TokenSample(tuple(parts), self._width)

    def _keep_sparse(self, kept: csr_array, step: int) -> None:
        kept.eliminate_zeros()
        if kept.nnz < DENSE_SHARE * kept.shape[0] * kept.shape[1] or not kept.shape[0]:
            self._parts.append(kept)
            return
        for begin in range(0, kept.shape[0], step):
            self._put_aside(csr_array(kept[begin : begin + step]).toarray())

    def _keep_dense(self, dense: Float[np.ndarray, "rows d_sae"]) -> None:
        if np.count_nonzero(widened(dense)) < DENSE_SHARE * dense.size:
            half = dense.dtype.itemsize < 4  # which SciPy does not multiply
            self._parts.append(csr_array(dense.astype(np.float32) if half else dense))
        else:
            self._put_aside(dense)

    def _put_aside(self, dense: Float[np.ndarray, "rows d_sae"]) -> None:
        dense = np.ascontiguousarray(dense)
        if self._scratch is None:
            self._parts.append(dense)
            return
        with fsio.disk_errors(self._scratch), open(self._scratch, "ab") as file:
            self._parts.append(_Aside(file.tell(), dense.shape, dense.dtype))
            file.write(dense.data)


@dataclass(frozen=True)
class _Aside:
    """A dense block in the scratch file."""

    place: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    def of(self, held: np.ndarray) -> np.ndarray:
        return np.ndarray(self.shape, self.dtype, buffer=held, offset=self.place)


def report_sample(sample: TokenSample) -> SampleReport:
    """Return the figures of a sample, equal to those of its dense matrix in float64.

    Raises:
        ValueError: If it holds no token.
    """
    tokens, width = sample.n_tokens, sample.width
    size = tokens * width
    if size == 0:
        raise ValueError("a sample without tokens has no figures")
    total, negative = 0.0, 0
    least, largest, stored = np.inf, -np.inf, 0
    above = dict.fromkeys(EPSILONS, 0)
    for block in sample.blocks():
        values = widened(_values(block))
        stored += values.size
        if values.size == 0:
            continue
        total += float(values.sum(dtype=np.float64))
        least, largest = min(least, float(values.min())), max(largest, float(values.max()))
        negative += int(np.count_nonzero(values < 0)) if least < 0 else 0
        magnitudes = np.abs(values) if least < 0 else values
        for eps in EPSILONS:
            above[eps] += int(np.count_nonzero(magnitudes > below(eps, values.dtype)))
    if stored < size:
        least, largest = min(least, 0.0), max(largest, 0.0)
    shares = sorted({50, *PERCENTILES})
    found = percentiles(sample, shares)
    l0 = sample.l0()
    return SampleReport(
        shape=(tokens, width),
        least=least,
        median=found[50],
        mean=total / size,
        largest=largest,
        percentiles={share: found[share] for share in PERCENTILES},
        negative_share=negative / size,
        active_share={eps: count / size for eps, count in above.items()},
        active_per_token={eps: count / tokens for eps, count in above.items()},
        l0_mean=float(l0.mean()),
        l0_median=float(np.median(l0)),
        l0_percentiles={share: float(np.percentile(l0, share)) for share in L0_PERCENTILES},
    )


def below(eps: float, dtype: Any) -> Any:
    """Return the largest number of a type that is not above eps: z > it just where z > eps."""
    kind = np.dtype(dtype).type
    near = kind(eps)
    return np.nextafter(near, kind(-np.inf)) if float(near) > eps else near


def percentiles(sample: TokenSample, shares: Sequence[float]) -> dict[float, float]:
    """Return exact percentiles of all values, linear between neighbours as `numpy.percentile`."""
    size = sample.n_tokens * sample.width
    places = {share: (size - 1) * share / 100 for share in shares}
    ranks = sorted({int(f(place)) for place in places.values() for f in (np.floor, np.ceil)})
    value = dict(zip(ranks, _of_ranks(sample, ranks), strict=True))
    found = {}
    for share, place in places.items():
        low, high = value[int(np.floor(place))], value[int(np.ceil(place))]
        rest = place - np.floor(place)
        # As NumPy: from the nearer end, so that equal ends give that value.
        gap = high - low
        found[share] = high - gap * (1 - rest) if rest >= 0.5 else low + gap * rest
    return found


def _of_ranks(sample: TokenSample, ranks: Sequence[int]) -> list[float]:
    """Return the values of given ranks among all values, 0 for the smallest."""
    kind = np.result_type(np.float16, *(part.dtype for part in sample.parts))
    bits = 8 * kind.itemsize
    size = sample.n_tokens * sample.width
    prefixes = dict.fromkeys(ranks, 0)
    left = {rank: rank for rank in ranks}
    for shift in range(bits - DIGIT, -1, -DIGIT):
        tables = _digit_counts(sample, kind, shift, set(prefixes.values()), size)
        for rank in ranks:
            counts = np.cumsum(tables[prefixes[rank]])
            digit = int(np.searchsorted(counts, left[rank], side="right"))
            left[rank] -= int(counts[digit - 1]) if digit else 0
            prefixes[rank] = prefixes[rank] << DIGIT | digit
    return [_value(prefixes[rank], kind) for rank in ranks]


def _digit_counts(
    sample: TokenSample, kind: np.dtype[Any], shift: int, prefixes: set[int], size: int
) -> dict[int, Int[np.ndarray, "digits"]]:
    """Count the next 16 bits of all keys that begin with each of the prefixes."""
    tables = {prefix: np.zeros(1 << DIGIT, dtype=np.int64) for prefix in prefixes}
    first = shift == 8 * kind.itemsize - DIGIT
    stored = 0
    for block in sample.blocks():
        values = _values(block)
        stored += values.size
        keys = _keys(values.astype(kind, copy=False))
        rest = keys >> keys.dtype.type(shift)
        digits = (rest & keys.dtype.type((1 << DIGIT) - 1)).astype(np.uint16)
        heads = None if first else rest >> rest.dtype.type(DIGIT)
        for prefix, table in tables.items():
            chosen = np.sort(digits if heads is None else digits[heads == prefix])
            if len(chosen):
                # Sorting is quicker than counting, which stalls where values repeat.
                last = np.append(np.flatnonzero(chosen[1:] != chosen[:-1]), len(chosen) - 1)
                table[chosen[last]] += np.diff(last, prepend=-1)
    zero = int(_keys(np.zeros(1, kind))[0]) >> shift
    owner = tables.get(0 if first else zero >> DIGIT)
    if owner is not None:
        owner[zero & ((1 << DIGIT) - 1)] += size - stored
    return tables


def _keys(values: Float[np.ndarray, "n"]) -> np.ndarray:
    """Return unsigned integers in the order of the values: -0 is 0."""
    unsigned = np.dtype(f"u{values.dtype.itemsize}")
    bits = np.ascontiguousarray(values).view(unsigned)
    sign = unsigned.type(1 << (8 * unsigned.itemsize - 1))
    below_zero = bits > sign
    if not below_zero.any():
        return bits | sign
    return np.where(below_zero, ~bits, bits | sign)


def _values(block: Block) -> Float[np.ndarray, "n"]:
    """Return the values that a block stores."""
    return block.data if isinstance(block, csr_array) else np.asarray(block).reshape(-1)


def _value(key: int, kind: np.dtype[Any]) -> float:
    sign = 1 << (8 * kind.itemsize - 1)
    bits = key ^ sign if key & sign else ~key & (2 * sign - 1)
    return float(np.array([bits], dtype=f"u{kind.itemsize}").view(kind)[0])
