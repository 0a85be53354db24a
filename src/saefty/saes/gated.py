"""Gated: one path decides which latents fire, another, with the same directions, how strongly.

    gate = x W_enc + b_gate,  magnitude = exp(r_mag) · x W_enc + b_mag,  z = H(gate) relu(magnitude)

    loss = mean over rows of (|x - x̂|² + l1 · sum of relu(gate) + |x - x̂(relu(gate))|²) / d_in

Source: Rajamanoharan et al. 2024a, "Improving dictionary learning with gated sparse autoencoders"
(arXiv:2404.16014), equations 6 to 8. As there, the decoder of the last term is held constant, the
gate learns from the last two terms alone, and decoder rows have norm 1. Other than there, b_dec is
not subtracted from the input (b_gate and b_mag absorb it), and the penalty's weight rises over half
of the steps, as in `relu.py` and for the same reason. b_gate is our `b_enc`.

Dead latents: their gates are pulled up to 0 (the pre-activation loss of Anthropic's "Circuits
Updates - January 2025", here for dead latents only); the paper resamples them.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saefty.kernels import pointwise
from saefty.kernels.products import differentiable_decode
from saefty.saes.base import ARCHITECTURES, SaeConfig
from saefty.saes.elementwise import Elementwise, Entries, Slopes


@ARCHITECTURES.register("gated")
class Gated(Elementwise):
    """Magnitudes where gates are open.

    Its options are `l1`, the penalty's weight in units of scaled activations (mean squared norm
    d_in), and `warmup`, the share of the steps over which that weight rises.

    Args:
        config: Shape and options; k is not used.
    """

    OPTIONS: ClassVar[Mapping[str, float]] = {"l1": 5.0, "warmup": 0.5}
    uses_k = False
    saved_names: ClassVar[Mapping[str, str]] = {"b_enc": "b_gate"}

    def __init__(self, config: SaeConfig) -> None:
        super().__init__(config)
        self.r_mag = nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = nn.Parameter(torch.zeros(config.d_sae))

    def activate(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Return the magnitudes where the gate, which is `pre`, is above 0."""
        magnitude = self.r_mag.exp() * (pre - self.b_enc) + self.b_mag
        return magnitude.relu() * (pre > 0)

    def auxiliary(
        self, x: Float[Tensor, "rows d_in"], pre: Float[Tensor, "rows d_sae"]
    ) -> Float[Tensor, ""]:
        """Return the loss of the gate's own reconstruction, which holds the decoder constant."""
        own = differentiable_decode(pre.relu(), self.W_dec.detach()) + self.b_dec.detach() - x
        return own.square().mean()

    def penalty(
        self, pre: Float[Tensor, "rows d_sae"], z: Float[Tensor, "rows d_sae"]
    ) -> Float[Tensor, ""]:
        """Return the weighted L1 norm of the open gates."""
        del z
        weight = self.options["l1"] * self.penalty_share / self.d_in
        return weight * pre.relu().sum(dim=1).mean()

    def floors(self) -> Float[Tensor, "d_sae"]:
        """Return where gates open."""
        return torch.zeros_like(self.b_enc)

    def respond(self, entries: Entries) -> Float[Tensor, "*entries"]:
        """Return the magnitudes of entries whose gates are open."""
        raw = entries.pre - entries.of(self.b_enc)
        magnitude = entries.of(self.r_mag.exp()) * raw + entries.of(self.b_mag)
        return magnitude.relu() * (entries.pre > 0)

    def opened(self, entries: Entries) -> Float[Tensor, "*entries"]:
        """Return how far gates are open."""
        return entries.pre.relu()

    def both(
        self, entries: Entries
    ) -> tuple[Float[Tensor, "*entries"], Float[Tensor, "*entries"] | None]:
        """Return both, read once."""
        if entries.latents is None:
            weights = (t.detach() for t in (self.r_mag.exp(), self.b_enc, self.b_mag))
            found = pointwise.gate(entries.pre, *weights)
            if found is not None:
                return found
        return super().both(entries)

    def slopes(
        self,
        entries: Entries,
        z: Float[Tensor, "*entries"],
        by_z: Float[Tensor, "*entries"],
        by_opened: Float[Tensor, "*entries"] | None,
    ) -> Slopes:
        """Return the slopes of both paths; b_enc is the gates' alone."""
        assert by_opened is not None, "the gates reconstruct"
        weight = self.options["l1"] * self.penalty_share / self.d_in / entries.rows
        if entries.latents is None:
            scale, bias = self.r_mag.exp().detach(), self.b_enc.detach()
            sums = pointwise.gate_slopes(entries.pre, z, scale, bias, weight, by_z, by_opened)
            if sums is not None:
                own = dict(zip(("b_enc", "b_mag", "r_mag"), sums, strict=False))
                return Slopes(by_z, weight * sums[3].sum(), own)
        is_open = entries.pre > 0
        by_gate = (by_opened + weight) * is_open
        by_magnitude = by_z * (z > 0)
        scaled = by_magnitude * entries.of(self.r_mag.exp())
        raw = entries.pre - entries.of(self.b_enc)
        own = {
            "b_enc": entries.totals(by_gate, self.d_sae),
            "b_mag": entries.totals(by_magnitude, self.d_sae),
            "r_mag": entries.totals(scaled * raw, self.d_sae),
        }
        penalty = weight * (entries.pre * is_open).sum()
        return Slopes(scaled + by_gate, penalty, own)

    def revival(
        self,
        pre: Float[Tensor, "rows dead"],
        error: Float[Tensor, "rows d_in"],
        dead: Int[Tensor, "dead"],
    ) -> Float[Tensor, ""]:
        """Return how far the gates of the dead latents are from opening."""
        del error, dead
        return self.config.aux_weight * (-pre).relu().sum(dim=1).mean() / self.d_in

    @torch.no_grad()
    def begin(self) -> None:
        """Let magnitudes equal gates."""
        self.r_mag.zero_()
        self.b_mag.copy_(self.b_enc)

    @torch.no_grad()
    def shift_input(self, shift: Float[Tensor, "d_sae"]) -> None:
        """Take what x W_enc has grown by out of the magnitudes' bias, times their scale."""
        self.b_mag.copy_(self.b_mag.to(shift) - self.r_mag.to(shift).exp() * shift)

    @torch.no_grad()
    def rescale_latents(self, factor: float) -> None:
        """Scale the magnitudes' bias with the pre-activations."""
        self.b_mag.mul_(factor)

    def saelens(self) -> dict[str, Any]:
        """Return SAELens's `gated`."""
        return {"architecture": "gated"}
