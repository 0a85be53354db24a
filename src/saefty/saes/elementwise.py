"""Architectures whose latents depend on their own pre-activations alone, and their slopes by hand.

A latent and all that is learnt through it are 0 where its pre-activation does not exceed a floor.
So what an architecture says about one entry, its latent and its slopes, can be asked of all entries
of some rows, or of the few above their floors alone: `gradients.py` does what costs less. The same
formulas stand in `activate_in_training`, `auxiliary` and `penalty`, for autograd; tests hold both
against each other.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float, Int
from torch import Tensor

from saefty.saes.base import SparseAutoencoder


@dataclass(frozen=True)
class Entries:
    """Pre-activations of some rows: all of them, or chosen ones."""

    pre: Float[Tensor, "*entries"]
    latents: Int[Tensor, "entries"] | None
    """Whose they are; None where they are [rows, d_sae]."""
    rows: int
    """How many rows the loss is a mean over."""

    def of(self, per_latent: Float[Tensor, "d_sae"]) -> Float[Tensor, "*entries"]:
        """Return each entry's latent's number."""
        return per_latent if self.latents is None else per_latent[self.latents]

    def totals(self, values: Float[Tensor, "*entries"], d_sae: int) -> Float[Tensor, "d_sae"]:
        """Return the sum over each latent's entries."""
        if self.latents is None:
            return values.sum(dim=0)
        return values.new_zeros(d_sae).index_add_(0, self.latents, values)


@dataclass(frozen=True)
class Slopes:
    """What an architecture learns from entries, besides through the decoder."""

    by_pre: Float[Tensor, "*entries"]
    """The loss's slope by each pre-activation."""
    penalty: Float[Tensor, ""]
    """What is added to the loss."""
    own: Mapping[str, Float[Tensor, "d_sae"]] = field(default_factory=dict)
    """Gradients of the architecture's own weights, and of b_enc if it is not that of `by_pre`."""
    along_decoder: Float[Tensor, "d_sae"] | None = None
    """The slope by the length of each latent's row of W_dec, where the loss knows it."""


class Elementwise(SparseAutoencoder):
    """Base of these architectures."""

    def floors(self) -> Float[Tensor, "d_sae"]:
        """Return what a pre-activation must exceed for anything to depend on it."""
        raise NotImplementedError

    def respond(self, entries: Entries) -> Float[Tensor, "*entries"]:
        """Return the latents of entries in training."""
        raise NotImplementedError

    def opened(self, entries: Entries) -> Float[Tensor, "*entries"] | None:
        """Return a second code, which reconstructs with the decoder held constant; None here."""
        del entries
        return None

    def both(
        self, entries: Entries
    ) -> tuple[Float[Tensor, "*entries"], Float[Tensor, "*entries"] | None]:
        """Return the latents of entries, and the second code."""
        return self.respond(entries), self.opened(entries)

    def slopes(
        self,
        entries: Entries,
        z: Float[Tensor, "*entries"],
        by_z: Float[Tensor, "*entries"],
        by_opened: Float[Tensor, "*entries"] | None,
    ) -> Slopes:
        """Return what is learnt from entries.

        Args:
            entries: The pre-activations; by_pre must be 0 where they do not exceed their floor.
            z: What they are answered by.
            by_z: The reconstruction's slope by z; it may be overwritten.
            by_opened: That of the second reconstruction by the second code.
        """
        raise NotImplementedError
