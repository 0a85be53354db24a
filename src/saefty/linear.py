"""A linear detector as numbers alone: which columns it reads, how it scales them, what it weighs.

log-odds = Σ_j weights_j (x_j - center_j) / scale_j + bias, over the columns it reads. Centre and
scale are those of the training side. Sums run in float64 along one row at a time, so that a row's
score does not depend on the rows beside it.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, issparse

from saefty.errors import MismatchError, NumericError

Rows = csr_array | Float[np.ndarray, "rows width"]

BLOCK_VALUES = 1 << 20
"""Values scaled at once: a wide matrix is not held twice."""


@dataclass(frozen=True)
class Linear:
    """What a linear probe has learnt.

    Attributes:
        columns: The columns it reads, ascending, each once.
        center: What is taken from each; zeros where zeros of the input are to stay zeros.
        scale: What each is divided by, above 0.
        weights: The weight of each after that.
        bias: The log-odds of an input that lies at the centre.
        width: Columns of its input, those it does not read included.

    Raises:
        ValueError: If the parts do not belong together, or a number is NaN or infinite.
    """

    columns: Int[np.ndarray, "read"]
    center: Float[np.ndarray, "read"]
    scale: Float[np.ndarray, "read"]
    weights: Float[np.ndarray, "read"]
    bias: float
    width: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", np.asarray(self.columns, dtype=np.int64))
        for name in ("center", "scale", "weights"):
            values = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, values)
            if values.shape != self.columns.shape or self.columns.ndim != 1:
                raise ValueError(
                    f"there are {self.columns.shape} columns, but {values.shape} of {name}"
                )
            if not np.isfinite(values).all():
                bad = int((~np.isfinite(values)).sum())
                raise ValueError(f"{bad} of {values.size} values of {name} are NaN or infinite")
        if not np.isfinite(self.bias):
            raise ValueError(f"the bias is {self.bias}")
        if self.width < 0:
            raise ValueError(f"the width is {self.width}")
        if len(self.columns) and not 0 <= self.columns[0] <= self.columns[-1] < self.width:
            first, last = int(self.columns[0]), int(self.columns[-1])
            raise ValueError(f"columns {first} to {last} do not lie in range({self.width})")
        if (np.diff(self.columns) <= 0).any():
            raise ValueError("the columns are not ascending, each once")
        if (self.scale <= 0).any():
            raise ValueError(f"a scale is {self.scale.min()}, and must be above 0")

    def score(self, x: Rows) -> Float[np.ndarray, "rows"]:
        """Return the log-odds of each row.

        Args:
            x: The input, dense or sparse, as wide as what was learnt on.

        Raises:
            MismatchError: If it has another width.
            NumericError: If it holds NaN or infinity in a column that is read.
        """
        if x.ndim != 2 or x.shape[1] != self.width:
            raise MismatchError(
                f"the detector reads rows of {self.width} columns, but these have {x.shape[-1]}.",
                then="Give it what it was fitted on: the same model, site and SAE, or the same "
                "vocabulary.",
            )
        raw = self._sparse(csr_array(x)) if issparse(x) else self._dense(np.asarray(x))
        bad = int((~np.isfinite(raw)).sum())
        if bad:
            raise NumericError(
                f"{bad} of {len(raw)} rows to score hold NaN or infinity, or overflow.",
                then="Leave such rows out, or read the model in bfloat16 or float32 if they come "
                "from float16.",
            )
        return raw

    def probability(self, x: Rows) -> Float[np.ndarray, "rows"]:
        """Return the probability of each row, from 0 to 1.

        Args:
            x: As for `score`.

        Raises:
            MismatchError: As `score`.
            NumericError: As `score`.
        """
        return probability(self.score(x))

    def _dense(self, x: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows"]:
        raw = np.full(len(x), self.bias)
        step = max(1, BLOCK_VALUES // max(len(self.columns), 1))
        for start in range(0, len(x), step):
            rows = np.ascontiguousarray(x[start : start + step, self.columns], dtype=np.float64)
            rows = (rows - self.center) / self.scale * self.weights
            raw[start : start + step] += rows.sum(axis=1)
        return raw

    def _sparse(self, x: csr_array) -> Float[np.ndarray, "rows"]:
        each = np.zeros(self.width)
        each[self.columns] = self.weights / self.scale
        read = np.zeros(self.width, dtype=bool)
        read[self.columns] = True
        values = np.where(read[x.indices], x.data, 0.0)  # NaN times a weight of 0 is NaN
        kept = csr_array((values, x.indices, x.indptr), shape=x.shape, dtype=np.float64)
        center = float((self.center * self.weights / self.scale).sum())
        return np.asarray(kept @ each) + (self.bias - center)


def probability(log_odds: Float[np.ndarray, "rows"]) -> Float[np.ndarray, "rows"]:
    """Return the probability that log-odds stand for; of any size, without overflow."""
    small = np.exp(-np.abs(log_odds))
    return np.where(log_odds >= 0, 1.0, small) / (1.0 + small)
