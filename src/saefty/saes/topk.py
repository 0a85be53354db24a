"""TopK: keep the k largest pre-activations of each row, and no others.

Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3
(arXiv:2406.04093). As there, a ReLU follows the selection, so a row can hold fewer than k firing
latents but never more. Of equal pre-activations the lower latent index is kept.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.kernels.base import SparseCode, SparseKernels, largest
from saefty.saes.base import ARCHITECTURES, SparseAutoencoder


@ARCHITECTURES.register("topk")
class TopK(SparseAutoencoder):
    """The k largest of each row."""

    def activate(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Keep the k largest of each row, then apply ReLU."""
        _, indices = largest(pre.detach(), self.config.k)
        kept = torch.zeros_like(pre, dtype=torch.bool).scatter_(1, indices, value=True)
        return pre.relu() * kept

    def select(self, x: Float[Tensor, "rows d_in"], kernels: SparseKernels) -> SparseCode:
        """Select without a dense array."""
        return kernels.topk(x, self.W_enc, self.b_enc, self.config.k)

    def training_code(self, x: Float[Tensor, "rows d_in"], kernels: SparseKernels) -> SparseCode:
        """Return the same code in training as at inference."""
        return self.select(x, kernels)

    def saelens(self) -> dict[str, Any]:
        """Return SAELens's `topk`, which selects as here when it does not rescale by norms."""
        return {"architecture": "topk", "k": self.config.k, "rescale_acts_by_decoder_norm": False}
