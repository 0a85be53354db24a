"""A budget of k · rows firing latents in training, one threshold at inference.

Shared by the architectures that train so. Rows share one budget in training, so a row may use more
or fewer than k latents; at inference a latent fires where its pre-activation exceeds one global
threshold, and no row depends on its neighbours. While training, the threshold is a moving average
of each batch's smallest selected positive value; at the end it is set so that held-out rows have k
firing latents on average. A saved SAE is a JumpReLU with that threshold in raw units.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.kernels.base import SparseCode, SparseKernels
from saefty.saes.base import SaeConfig, SparseAutoencoder

KEEP_OF_AVERAGE = 0.99


class Thresholded(SparseAutoencoder):
    """The k · rows largest of a batch; a fixed threshold once trained.

    Args:
        config: Shape and sparsity; k is the mean number of firing latents.
    """

    threshold: Tensor

    def __init__(self, config: SaeConfig) -> None:
        super().__init__(config)
        self.register_buffer("threshold", torch.zeros(config.d_sae))

    def activate(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Keep what exceeds the threshold."""
        return pre.relu() * (pre > self.threshold)

    def select(self, x: Float[Tensor, "rows d_in"], kernels: SparseKernels) -> SparseCode:
        """Select without a dense array."""
        return kernels.above(x, self.W_enc, self.b_enc, self.threshold)

    def activate_in_training(self, pre: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Keep the k · rows largest of the batch; of equal ones the earlier row's."""
        flat = pre.detach().relu().flatten()
        wanted = min(self.config.k * len(pre), len(flat))
        least = _nth_largest(flat, wanted)
        kept = flat > least
        equal = (flat == least).nonzero().squeeze(1)
        kept[equal[: wanted - int(kept.sum())]] = True
        return pre.relu() * kept.view_as(pre)

    def training_code(self, x: Float[Tensor, "rows d_in"], kernels: SparseKernels) -> SparseCode:
        """Select the k · rows largest of the batch."""
        return kernels.batch_topk(x, self.W_enc, self.b_enc, self.config.k * len(x))

    @torch.no_grad()
    def observe(self, code: SparseCode | None) -> None:
        """Move the threshold towards the batch's smallest selected value."""
        if code is None or len(code.values) == 0:
            return
        least = code.values.min()
        started = bool(self.threshold[0] > 0)
        share = KEEP_OF_AVERAGE if started else 0.0
        self.threshold.mul_(share).add_((1 - share) * least)

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "rows d_in"]) -> None:
        """Set the threshold so that these rows have k firing latents on average.

        It lies halfway between the last pre-activation that fires and the first that does not.
        """
        wanted = self.config.k * len(x)
        code = self.kernels.batch_topk(x, self.W_enc, self.b_enc, wanted + 1)
        if len(code.values) <= wanted:
            self.threshold.zero_()
            return
        last, first = code.values.double().topk(wanted + 1).values[-2:].tolist()
        self.threshold.fill_((last + first) / 2)

    def rescale_latents(self, factor: float) -> None:
        """Scale the threshold with the pre-activations."""
        self.threshold.mul_(factor)

    def saelens(self) -> dict[str, Any]:
        """Return SAELens's `jumprelu`, its form for SAEs trained with a budget a batch."""
        return {"architecture": "jumprelu"}


def _nth_largest(values: Float[Tensor, "entries"], n: int) -> Float[Tensor, ""]:
    """Return the n-th largest value; a part's is a bound that leaves few of the whole to search."""
    part = values[: len(values) // 8]
    if n <= len(part):
        values = values[values >= part.topk(n, sorted=False).values.min()]
    return values.topk(n, sorted=False).values.min()
