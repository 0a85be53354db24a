"""Rows that an SAE can be examined on: enough of them, of its width, finite, and not all equal."""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefty.diagnosis.base import Rows
from saefty.diagnosis.judgement import MIN_ROWS
from saefty.errors import InputError, MismatchError
from saefty.saes.base import SparseAutoencoder


def refuse_all_nonfinite(n: int, dtype: str | None) -> None:
    """Refuse rows of which none is finite.

    Args:
        n: How many there are.
        dtype: The number format that they were kept in, where it is known.

    Raises:
        InputError: Always.
    """
    why = "Look for where they were made: a division by zero, or a damaged file."
    if dtype == "float16":
        why = "Extract again in bfloat16 or float32: float16 holds no number above 65,504."
    raise InputError(
        f"all {n:,} rows hold NaN or infinity, so that there is nothing to measure.",
        then=why,
    )


def require_rows(sae: SparseAutoencoder, x: Float[Tensor, "rows d_in"]) -> None:
    """Refuse rows of another width than the SAE's, too few, or all equal.

    Raises:
        MismatchError: If the width differs.
        InputError: If there are too few rows, or all are equal.
    """
    n, width = x.shape
    if width != sae.d_in:
        raise MismatchError(
            f"the SAE reads activations {sae.d_in} wide, but the rows are {width} wide.",
            then="Give the activations of the model and place that the SAE was trained on.",
        )
    if n < MIN_ROWS:
        raise InputError(
            f"there are {n} usable rows, and at least {MIN_ROWS} are needed to say anything of an "
            "SAE.",
            then="Give more texts, or a larger --rows.",
        )
    if bool((x == x[0]).all()):
        value = "0" if not bool(x[0].any()) else "the same activation"
        raise InputError(
            f"all {n:,} rows are equal (each is {value}), so that nothing can be said of an SAE: "
            "what made these rows is broken.",
            then="Check the extraction (which tensor was read, and that files were not truncated), "
            "and extract again.",
        )


def given_rows(x: Any) -> Rows:
    """Return activations that are in memory as rows, of one text.

    Args:
        x: A float tensor or array [rows, d_in].

    Raises:
        InputError: If it has another shape, or no row.
    """
    values = torch.as_tensor(x).detach().cpu().float()
    if values.ndim != 2:
        raise InputError(
            f"activations are [rows, d_in], and these have the shape {list(values.shape)}.",
            then="Flatten batch and positions first: x.reshape(-1, x.shape[-1]).",
        )
    n = len(values)
    return Rows(values, np.zeros(n, dtype=np.int64), np.arange(n))
