"""JumpReLU: a latent fires where its pre-activation exceeds its own threshold, which is learnt.

    z = pre · H(pre - θ),  loss = mean over rows of (|x - x̂|² + l0 · latents that fire) / d_in

Source: Rajamanoharan et al. 2024b, "Jumping ahead: improving reconstruction fidelity with JumpReLU
sparse autoencoders" (arXiv:2407.14435), equations 11 and 12. The gradients with respect to θ are
its straight-through estimates, with K the rectangle of width and height 1 and ε the bandwidth,

    d z / d θ = -(θ / ε) K((pre - θ) / ε)        d H(pre - θ) / d θ = -(1 / ε) K((pre - θ) / ε)

while pre has the ordinary gradient. Departures: θ itself is learnt and kept at 0 or above, where
the paper learns its logarithm; ε is larger, for activations of mean squared norm d_in instead of 1;
θ starts at 1, the standard deviation of such activations along a random direction, where the paper
starts near 0. An optimiser moves θ by about the learning rate a step, so that from near 0 a run of
a few thousand steps ends with thresholds that are still too low.

Dead latents: their pre-activations are pulled up to θ (the pre-activation loss of Anthropic's
"Circuits Updates - January 2025", here for dead latents only).
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saefty.kernels import pointwise
from saefty.kernels.base import SparseCode, SparseKernels
from saefty.saes.base import ARCHITECTURES, SaeConfig
from saefty.saes.elementwise import Elementwise, Entries, Slopes

WINDOW = 0.501
"""Half the window around θ, in bandwidths, and more than rounding can add to it."""


@ARCHITECTURES.register("jumprelu")
class JumpRelu(Elementwise):
    """Pre-activations above learnt thresholds.

    Its options are `l0`, the penalty's weight, `bandwidth` (ε) and `threshold`, where θ starts, all
    in units of scaled activations (mean squared norm d_in), and `warmup`, the share of the steps
    over which the penalty's weight rises.

    Args:
        config: Shape and options; k is not used.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = {
        "l0": 1.0,
        "bandwidth": 0.1,
        "threshold": 1.0,
        "warmup": 0.1,
    }
    uses_k = False

    def __init__(self, config: SaeConfig) -> None:
        super().__init__(config)
        self.threshold = nn.Parameter(torch.zeros(config.d_sae))

    def activate(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Keep what exceeds the threshold."""
        return pre.relu() * (pre > self.threshold)

    def select(self, x: Float[Tensor, "rows d_in"], kernels: SparseKernels) -> SparseCode:
        """Select without a dense array."""
        return kernels.above(x, self.W_enc, self.b_enc, self.threshold)

    def activate_in_training(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Keep the same, with the estimated gradient."""
        return _Jump.apply(pre, self.threshold, self.options["bandwidth"])

    def penalty(
        self, pre: Float[Tensor, "rows d_sae"], z: Float[Tensor, "rows d_sae"]
    ) -> Float[Tensor, ""]:
        """Return the weighted number of firing latents, with the estimated gradient."""
        del z
        fires = _Step.apply(pre, self.threshold, self.options["bandwidth"])
        return self.options["l0"] * self.penalty_share / self.d_in * fires.sum(dim=1).mean()

    def reached(self, pre: Float[Tensor, "rows d_sae"]) -> Bool[Tensor, "rows d_sae"]:
        """Return where θ learns from z: within half a bandwidth below it, too."""
        return pre > self.threshold - self.options["bandwidth"] / 2

    def floors(self) -> Float[Tensor, "d_sae"]:
        """Return where θ begins to learn."""
        return self.threshold - self.options["bandwidth"] * WINDOW

    def respond(self, entries: Entries) -> Float[Tensor, "*entries"]:
        """Keep the same of entries."""
        if entries.latents is None:
            z = pointwise.jump(entries.pre, self.threshold.detach())
            if z is not None:
                return z
        return entries.pre.relu() * (entries.pre > entries.of(self.threshold))

    def slopes(
        self,
        entries: Entries,
        z: Float[Tensor, "*entries"],
        by_z: Float[Tensor, "*entries"],
        by_opened: Float[Tensor, "*entries"] | None,
    ) -> Slopes:
        """Return the ordinary slopes, and what θ learns within the window around it."""
        del z, by_opened
        pre, threshold = entries.pre, entries.of(self.threshold)
        weight = self.options["l0"] * self.penalty_share / self.d_in / entries.rows
        if entries.latents is None:
            width = self.options["bandwidth"]
            sums = pointwise.jump_slopes(pre, threshold.detach(), width, weight, by_z)
            if sums is not None:
                return Slopes(by_z, weight * sums[1].sum(), {"threshold": sums[0]})
        near = _near(pre, threshold, self.options["bandwidth"])
        by_threshold = -entries.totals(near * (threshold * by_z + weight), self.d_sae)
        by_pre = by_z * (pre > threshold.clamp(min=0))
        penalty = weight * torch.count_nonzero(pre > threshold)
        return Slopes(by_pre, penalty, {"threshold": by_threshold})

    def revival(
        self,
        pre: Float[Tensor, "rows dead"],
        error: Float[Tensor, "rows d_in"],
        dead: Int[Tensor, "dead"],
    ) -> Float[Tensor, ""]:
        """Return how far the dead latents are below their thresholds, which stay."""
        del error
        below = (self.threshold.detach()[dead] - pre).relu() @ self.W_dec[dead].norm(dim=1)
        return self.config.aux_weight * below.mean() / self.d_in

    @torch.no_grad()
    def begin(self) -> None:
        """Set the first threshold."""
        self.threshold.fill_(self.options["threshold"])

    @torch.no_grad()
    def observe(self, code: SparseCode | None) -> None:
        """Keep thresholds at 0 or above."""
        del code
        self.threshold.clamp_(min=0)

    @torch.no_grad()
    def rescale_latents(self, factor: float) -> None:
        """Scale the thresholds with the pre-activations."""
        self.threshold.mul_(factor)

    def saelens(self) -> dict[str, Any]:
        """Return SAELens's `jumprelu`."""
        return {"architecture": "jumprelu"}


def _near(
    pre: Float[Tensor, "*rows entries"], threshold: Float[Tensor, "entries"], bandwidth: float
) -> Float[Tensor, "*rows entries"]:
    """Return K((pre - θ) / ε) / ε."""
    return ((pre - threshold).abs() < bandwidth / 2).to(pre) / bandwidth


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: Float[Tensor, "rows d_sae"],
        threshold: Float[Tensor, "d_sae"],
        bandwidth: float,
    ) -> Float[Tensor, "rows d_sae"]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre.relu() * (pre > threshold)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Float[Tensor, "rows d_sae"]
    ) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "d_sae"], None]:
        pre, threshold = ctx.saved_tensors
        (gradient,) = gradients
        by_threshold = -(threshold * _near(pre, threshold, ctx.bandwidth) * gradient).sum(dim=0)
        return gradient * (pre > threshold.clamp(min=0)), by_threshold, None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: Float[Tensor, "rows d_sae"],
        threshold: Float[Tensor, "d_sae"],
        bandwidth: float,
    ) -> Float[Tensor, "rows d_sae"]:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return (pre > threshold).to(pre)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Float[Tensor, "rows d_sae"]
    ) -> tuple[None, Float[Tensor, "d_sae"], None]:
        pre, threshold = ctx.saved_tensors
        (gradient,) = gradients
        return None, -(_near(pre, threshold, ctx.bandwidth) * gradient).sum(dim=0), None
