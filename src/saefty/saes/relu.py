"""ReLU with an L1 penalty weighted by decoder norms, which leaves the decoder's norms free.

    loss = mean over rows of (|x - x̂|² + l1 · sum over i of z_i |W_dec[i]|) / d_in

Source: Anthropic 2024, "Circuits Updates - April 2024: Update on how we train SAEs"
(transformer-circuits.pub/2024/april-update). As there, l1 is 5, its weight rises from 0, and the
latents are rescaled at the end so that every row of W_dec has norm 1. Other than there, decoder
rows start at norm 1, the learning rate follows the common schedule, and the weight rises over half
of the steps. There it is 5 % of 200,000 steps; 5 % of a few thousand brings the full penalty before
the latents have found a feature, and they never do (docs/architectures.md has the figures).

Dead latents: their pre-activations are pulled up to 0 (the pre-activation loss of Anthropic's
"Circuits Updates - January 2025", here for dead latents only). AuxK cannot help them: the
pre-activations of a dead ReLU latent are all below 0, where it has no gradient.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.saes.base import ARCHITECTURES
from saefty.saes.elementwise import Elementwise, Entries, Slopes


@ARCHITECTURES.register("relu")
class Relu(Elementwise):
    """All positive pre-activations.

    Its options are `l1`, the penalty's weight in units of scaled activations (mean squared norm
    d_in), and `warmup`, the share of the steps over which that weight rises.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = {"l1": 5.0, "warmup": 0.5}
    unit_decoder = False
    uses_k = False

    def activate(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Keep what is positive."""
        return pre.relu()

    def penalty(
        self, pre: Float[Tensor, "rows d_sae"], z: Float[Tensor, "rows d_sae"]
    ) -> Float[Tensor, ""]:
        """Return the weighted L1 norm of the latents."""
        del pre
        weight = self.options["l1"] * self.penalty_share / self.d_in
        return weight * (z @ self.W_dec.norm(dim=1)).mean()

    def floors(self) -> Float[Tensor, "d_sae"]:
        """Return where latents begin to fire."""
        return torch.zeros_like(self.b_enc)

    def respond(self, entries: Entries) -> Float[Tensor, "*entries"]:
        """Keep what is positive."""
        return entries.pre.relu()

    def slopes(
        self,
        entries: Entries,
        z: Float[Tensor, "*entries"],
        by_z: Float[Tensor, "*entries"],
        by_opened: Float[Tensor, "*entries"] | None,
    ) -> Slopes:
        """Return the slopes of the reconstruction and of the weighted L1 norm."""
        del by_opened
        weight = self.options["l1"] * self.penalty_share / self.d_in / entries.rows
        norms = self.W_dec.norm(dim=1)
        fired = weight * entries.totals(z, self.d_sae)
        by_pre = (by_z + weight * entries.of(norms)) * (z > 0)
        return Slopes(by_pre, fired @ norms, along_decoder=fired)

    def revival(
        self,
        pre: Float[Tensor, "rows dead"],
        error: Float[Tensor, "rows d_in"],
        dead: Int[Tensor, "dead"],
    ) -> Float[Tensor, ""]:
        """Return how far the dead latents are below firing, weighted by decoder norms."""
        del error
        below = (-pre).relu() @ self.W_dec[dead].norm(dim=1)
        return self.config.aux_weight * below.mean() / self.d_in

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Move the norms of the decoder rows into the latents; the output stays as it is."""
        del x
        norms = self.W_dec.norm(dim=1)
        norms[norms == 0] = 1.0
        self.W_enc.mul_(norms)
        self.b_enc.mul_(norms)
        self.W_dec.div_(norms[:, None])

    def saelens(self) -> dict[str, Any]:
        """Return SAELens's `standard`."""
        return {"architecture": "standard"}
