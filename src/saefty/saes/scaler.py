"""How activations are scaled for training: fitted on the training split, then folded away.

An SAE trains on (x - mean) / scale. On saving, mean and scale are folded into its weights, so that
a saved SAE reads and writes raw activations; `scaler.json` records what was folded in.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.errors import InputError, NumericError

Normalize = Literal["scalar", "per_dimension", "none"]


@dataclass(frozen=True)
class Scaler:
    """An affine map; mean and scale are float64 and in raw activation units."""

    mean: Float[Tensor, "d_in"]
    scale: Float[Tensor, "d_in"]
    normalize: Normalize
    n_rows: int

    @property
    def unit(self) -> float:
        """The raw size of 1 after scaling: the root mean square of `scale` over dimensions."""
        return float(self.scale.square().mean().sqrt())

    def apply(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Return (x - mean) / scale, in the precision of x."""
        return (x - self.mean.to(x)) / self.scale.to(x)

    def undo(self, x: Float[Tensor, "rows d_in"]) -> Float[Tensor, "rows d_in"]:
        """Return x * scale + mean, in the precision of x."""
        return x * self.scale.to(x) + self.mean.to(x)

    def record(self) -> dict[str, Any]:
        """Return the scaler as plain JSON values."""
        return {
            "normalize": self.normalize,
            "n_rows": self.n_rows,
            "folded": True,
            "mean": self.mean.tolist(),
            "scale": self.scale.tolist(),
        }

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> "Scaler":
        """Read what `record` returned."""
        return cls(
            torch.tensor(record["mean"], dtype=torch.float64),
            torch.tensor(record["scale"], dtype=torch.float64),
            record["normalize"],
            record["n_rows"],
        )


def fit_scaler(
    batches: Iterable[Float[Tensor, "_ d_in"]], normalize: Normalize = "scalar"
) -> Scaler:
    """Fit a scaler to rows, in one pass and in float64.

    Args:
        batches: The rows, a few thousand at a time.
        normalize: `scalar` subtracts the mean and divides by one number, so that the mean squared
            norm of a row becomes d_in and directions keep their relative sizes; `per_dimension`
            divides each dimension by its own standard deviation; `none` changes nothing.

    Raises:
        InputError: If there is no row, or the rows do not vary.
        NumericError: If a value is NaN or infinite.
    """
    n_rows, mean, squares = 0, torch.zeros(()), torch.zeros(())
    for batch in batches:
        x = batch.to(torch.float64)
        if not bool(torch.isfinite(x).all()):
            raise NumericError("the activations hold NaN or infinity, so no scale can be fitted.")
        batch_mean = x.mean(dim=0)
        batch_squares = (x - batch_mean).square().sum(dim=0)
        total = n_rows + len(x)
        shift = batch_mean - mean
        mean = mean + shift * (len(x) / total)
        squares = squares + batch_squares + shift.square() * (n_rows * len(x) / total)
        n_rows = total
    if n_rows == 0:
        raise InputError("there are no activations to train on.")
    mean, variance = mean.cpu(), (squares / n_rows).cpu()
    if normalize == "none":
        return Scaler(torch.zeros_like(mean), torch.ones_like(mean), normalize, n_rows)
    overall = variance.mean().sqrt()
    if float(overall) == 0.0:
        raise InputError(
            f"all {n_rows} activations are equal, so there is nothing for an SAE to learn.",
            then="Check the layer and the hook point of the extraction.",
        )
    if normalize == "scalar":
        return Scaler(mean, overall.expand(len(mean)).clone(), normalize, n_rows)
    # A dimension that does not vary has no scale of its own; the overall one keeps it finite.
    std = variance.sqrt()
    return Scaler(mean, torch.where(std > 1e-6 * overall, std, overall), normalize, n_rows)
