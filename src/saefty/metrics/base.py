"""What the metrics share: the registry of latent scores, sparse columns, and their ranks.

`z` is a matrix [examples, d_sae] of pooled latents, sparse or dense, of which only non-zeros cost
anything; `harmful` is one bool an example. Columns are walked in blocks, so that memory does not
grow with d_sae. A column's ranks need only its non-zeros to be sorted, because all its zeros are
one block of ties whose mean rank is known.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.sparse import csc_array, csr_array

from saefty.errors import NumericError
from saefty.registry import Registry

Columns: TypeAlias = Float[csc_array, "examples d_sae"]
Pooled: TypeAlias = (
    Float[csr_array, "examples d_sae"]
    | Float[csc_array, "examples d_sae"]
    | Float[np.ndarray, "examples d_sae"]
)

BLOCK_VALUES = 1 << 20
BLOCK_COLUMNS = 4096
# From this share of non-zeros on, a dense product beats the sparse one (measured on two cores).
DENSE_SHARE = 0.04


class LatentScore(Protocol):
    """One number a latent from pooled latents and labels.

    A score is neutral (0, or 0.5 for an AUROC) for a latent that cannot tell harmful examples from
    the rest. It does not depend on the order of latents or examples.
    """

    def __call__(
        self, z: Pooled, harmful: Bool[np.ndarray, "examples"], *, eps: float = 0.0
    ) -> Float[np.ndarray, "d_sae"]:
        """Score each latent; it fires on an example where it exceeds `eps`."""
        ...


LATENT_SCORES: Registry[LatentScore] = Registry("latent score", "saefty.metrics")


def as_columns(z: Pooled) -> Columns:
    """Return the matrix by columns, in float64, without stored zeros.

    Raises:
        NumericError: If a value is NaN or infinite.
    """
    columns = csc_array(z, dtype=np.float64, copy=False)
    if not np.isfinite(columns.data).all():
        bad = int((~np.isfinite(columns.data)).sum())
        raise NumericError(
            f"{bad} of {columns.data.size} pooled latents are NaN or infinite.",
            then="Extract again with extract.nonfinite=mask, or find the layer that overflows.",
        )
    if not columns.has_canonical_format or not columns.data.all():
        columns = columns.copy()
        columns.sum_duplicates()
        columns.eliminate_zeros()
    return columns


def check_labels(harmful: Bool[np.ndarray, "examples"], examples: int) -> None:
    """Refuse labels that do not fit the rows or are all of one kind.

    Raises:
        ValueError: If there are not `examples` labels, or they are all alike.
    """
    if len(harmful) != examples:
        raise ValueError(f"there are {examples} rows of latents but {len(harmful)} labels")
    if harmful.all() or not harmful.any():
        kind = "harmful" if harmful.all() and len(harmful) else "harmless"
        raise ValueError(
            f"two groups are compared, but all {len(harmful)} examples are labelled {kind}"
        )


def group_codes(groups: Int[np.ndarray, "examples"] | None, examples: int) -> np.ndarray:
    """Return groups as codes 0 … n-1; None makes every example a group of its own.

    Raises:
        ValueError: If there is not one code an example.
    """
    if groups is None:
        return np.arange(examples)
    if len(groups) != examples:
        raise ValueError(f"there are {examples} examples but {len(groups)} group codes")
    return np.unique(groups, return_inverse=True)[1]


def firing(z: Pooled, eps: float = 0.0) -> Bool[np.ndarray, "d_sae"]:
    """Return which latents fire (exceed `eps`) on at least one example."""
    columns = as_columns(z)
    above = csc_array(
        (columns.data > eps, columns.indices, columns.indptr), shape=columns.shape, dtype=bool
    )
    return np.asarray(above.sum(axis=0)).ravel() > 0


def varying(z: Pooled) -> Bool[np.ndarray, "d_sae"]:
    """Return which latents take more than one value over the examples."""
    columns = as_columns(z)
    return (columns.max(axis=0).toarray() != columns.min(axis=0).toarray()).ravel()


def column_blocks(columns: Columns) -> Iterator[tuple[slice, Columns]]:
    """Walk a matrix in runs of neighbouring columns of bounded size."""
    start, d_sae = 0, columns.shape[1]
    while start < d_sae:
        limit = int(columns.indptr[start]) + BLOCK_VALUES
        stop = int(np.searchsorted(columns.indptr, limit, side="right")) - 1
        stop = min(max(stop, start + 1), start + BLOCK_COLUMNS, d_sae)
        yield slice(start, stop), columns[:, start:stop]
        start = stop


@dataclass(frozen=True)
class RankedColumns:
    """The ranks (1 = smallest, ties share their mean) of each column of a block.

    Attributes:
        above_zeros: Rank minus the rank of the column's zeros; sparse, 0 for a zero.
        zero_rank: The rank that a zero has in the column.
        ties: Σ(t³ - t) over each column's runs of t equal values, its zeros among them.
    """

    above_zeros: csc_array
    zero_rank: np.ndarray
    ties: np.ndarray

    def auroc(
        self, harmful: Bool[np.ndarray, "labellings examples"]
    ) -> Float[np.ndarray, "columns labellings"]:
        """Return each column's area under the ROC curve for each labelling."""
        labels = harmful.T.astype(np.float64)
        examples = labels.shape[0]
        positives = labels.sum(axis=0)
        if self.above_zeros.nnz > DENSE_SHARE * np.prod(self.above_zeros.shape):
            rank_sums = self.above_zeros.toarray().T @ labels
        else:
            rank_sums = self.above_zeros.T @ labels
        rank_sums = rank_sums + self.zero_rank[:, None] * positives
        pairs = positives * (examples - positives)
        return 0.5 + (rank_sums - positives * (examples + 1) / 2) / pairs


def rank_columns(block: Columns) -> RankedColumns:
    """Rank every column of a block, ties sharing their mean rank."""
    examples, width = block.shape
    stored = np.diff(block.indptr)
    column = np.repeat(np.arange(width), stored)
    # As np.lexsort((data, column)), but twice as fast: 16-bit keys are sorted by radix.
    order = np.argsort(block.data)
    order = order[np.argsort(column[order].astype(np.uint16), kind="stable")]
    values, first = block.data[order], block.indptr[:-1].astype(np.int64)
    # A run is a stretch of equal values in one column; order keeps columns contiguous.
    starts = np.ones(len(values), dtype=bool)
    starts[1:] = (values[1:] != values[:-1]) | (column[1:] != column[:-1])
    begin = np.flatnonzero(starts)
    length = np.diff(np.append(begin, len(values)))
    run_column = column[begin]
    zeros = examples - stored
    negative = np.bincount(column, weights=block.data < 0, minlength=width)
    rank = begin - first[run_column] + (length + 1) / 2
    rank = rank + np.where(values[begin] > 0, zeros[run_column], 0)
    zero_rank = negative + (zeros + 1) / 2
    above = np.empty(len(values))
    above[order] = np.repeat(rank - zero_rank[run_column], length)
    ties = np.bincount(run_column, weights=length.astype(float) ** 3 - length, minlength=width)
    return RankedColumns(
        csc_array((above, block.indices, block.indptr), shape=block.shape),
        zero_rank,
        ties + zeros.astype(float) ** 3 - zeros,
    )
