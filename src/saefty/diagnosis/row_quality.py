"""Rows that spoil a measurement: special tokens, NaN and infinity, numbers cut off in float16."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool

from saefty.diagnosis.base import Rows
from saefty.diagnosis.readings import Tokens
from saefty.records import ROLES

HALF_MAX = 65504.0
"""The largest float16."""
SAME_TOKEN = 0.9
"""Share of texts that begin with one token, from which it counts as put there (BOS)."""
MIN_TEXTS = 5


@dataclass(frozen=True)
class RowQuality:
    """What is wrong with rows, counted.

    Attributes:
        n_rows: Rows there were.
        nonfinite: Rows that hold NaN or infinity; they are left out of everything else.
        cut_off: Rows that hold the largest float16 exactly, as numbers do that were clipped to it.
        above_half: Rows with a larger number than float16 holds.
        special: Which of the finite rows are special tokens.
        bos: The token with which nearly all texts begin, where one does.
        half: Whether the rows were kept in float16.
    """

    n_rows: int
    nonfinite: int
    cut_off: int
    above_half: int
    special: Bool[np.ndarray, "finite"]
    bos: int | None
    half: bool = False

    @property
    def overflowed(self) -> bool:
        """Whether float16 explains NaN and infinity: rows were kept in it, or cut off there."""
        return self.half or self.cut_off > 0


def finite_rows(rows: Rows) -> Bool[np.ndarray, "rows"]:
    """Return which rows hold neither NaN nor infinity."""
    return np.asarray(torch.isfinite(rows.x).all(dim=1).numpy())


def row_quality(
    rows: Rows, tokens: Tokens | None, nonfinite: int, *, half: bool = False
) -> RowQuality:
    """Count what is wrong with rows.

    Args:
        rows: The finite rows.
        tokens: Their tokens, where they are known.
        nonfinite: Rows that were left out before.
        half: Whether they were kept in float16.
    """
    largest = torch.cat([part.abs().amax(dim=1) for part in rows.x.split(4096)])
    special, bos = np.zeros(len(rows.x), dtype=bool), None
    if tokens is not None:
        special = tokens.role == ROLES.index("special")
        first = (rows.place == 0) & (tokens.token_pos == 0)
        ids, counts = np.unique(tokens.token_id[first], return_counts=True)
        if first.sum() >= MIN_TEXTS and counts.max() >= SAME_TOKEN * len(np.unique(rows.text)):
            bos = int(ids[counts.argmax()])
            special = special | (first & (tokens.token_id == bos))
    return RowQuality(
        len(rows.x) + nonfinite,
        nonfinite,
        int((largest == HALF_MAX).sum()),
        int((largest > HALF_MAX).sum()),
        special,
        bos,
        half,
    )
