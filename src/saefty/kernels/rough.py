"""Kernels whose selection rests on a product in bfloat16, for training alone.

The product only proposes latents: the pre-activations of those proposed are computed in float32,
and so are all sums and gradients. A latent that bfloat16 takes for smaller than the last ones
proposed can be missed, which training forgives (the FVU it reaches is the same to 1e-3, tested) and
encoding for results must not. On a GPU a few more latents than k are proposed. On a CPU the
screening of `screened` is used without its bound on the error, so that fewer are looked at again.
"""

from dataclasses import replace
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from saefty.kernels.base import SparseKernels, has_bfloat16_units
from saefty.kernels.screened import Screen, Screened


@runtime_checkable
class Halving(Protocol):
    """Kernels that have a rough form of their own."""

    def in_bfloat16(self) -> SparseKernels:
        """Return kernels that do the encoder's product in bfloat16."""
        ...


class Uncertified(Screened):
    """Screened kernels that take the product in bfloat16 for exact but for its last digit."""

    caution = 0.0

    def screen(
        self, W_enc: Float[Tensor, "d_in d_sae"], b_enc: Float[Tensor, "d_sae"], coarser: int
    ) -> Screen:
        """Return a screen whose bound leaves out what rounding the weights and rows does."""
        screen = super().screen(W_enc, b_enc, coarser)
        return replace(
            screen,
            longest=screen.longest * self.caution,
            farthest=screen.farthest * self.caution,
        )


def in_bfloat16(kernels: SparseKernels) -> SparseKernels | None:
    """Return kernels that select by a product in bfloat16, or None where that gains nothing."""
    if isinstance(kernels, Halving):
        return kernels.in_bfloat16()
    if isinstance(kernels, Screened) and has_bfloat16_units():
        return type(f"Uncertified{type(kernels).__name__}", (Uncertified, type(kernels)), {})()
    return None
