"""What interventions on an SAE's latents share: which latents, and the change they make."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saefty.errors import MismatchError
from saefty.interventions.base import Edit
from saefty.saes.base import SparseAutoencoder

ROWS_AT_ONCE = 256
"""Bounds the dense latents of a long prompt: 256 rows of 131,072 latents are 128 MiB."""


def chosen_latents(
    sae: SparseAutoencoder, latents: Sequence[int], use: str
) -> Int[Tensor, "chosen"]:
    """Return latents as an index, in the order given.

    Args:
        sae: Trained on the site where the intervention will act.
        latents: Which latents.
        use: What is done with them, for the message ("gating").

    Raises:
        MismatchError: If it is a transcoder, or scales each row by itself.
        ValueError: If a latent is out of range or named twice.
    """
    sae.require_autoencoder(use)
    chosen = [int(latent) for latent in latents]
    wrong = [latent for latent in chosen if not 0 <= latent < sae.d_sae]
    if wrong or len(set(chosen)) < len(chosen):
        what = (
            f"latent {wrong[0]} does not exist" if wrong else f"a latent occurs twice in {chosen}"
        )
        raise ValueError(f"{what}; the SAE has {sae.d_sae} latents, 0..{sae.d_sae - 1}")
    return torch.tensor(chosen, dtype=torch.long)


def adding(
    sae: SparseAutoencoder,
    latents: Int[Tensor, "chosen"],
    change: Callable[[Float[Tensor, "rows chosen"]], Float[Tensor, "rows chosen"]],
) -> Edit:
    """Return the edit h' = h + Σ_k change(z)_k W_dec,k over chosen latents, in raw units.

    The SAE's own error stays in place, and a change of 0 changes nothing.

    Args:
        sae: Trained on the site where the edit will act.
        latents: Which latents.
        change: By how much each of them is to differ, from their values.
    """

    @torch.no_grad()
    def edit(x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        if x.shape[-1] != sae.d_in:
            raise MismatchError(
                f"the SAE reads activations {sae.d_in} wide, but the model's are "
                f"{x.shape[-1]} wide.",
                then="Use an SAE trained on this model.",
            )
        index = latents.to(x.device)
        parts = []
        for part in x.to(sae.W_dec.device).split(ROWS_AT_ONCE):
            z = sae.encode(part)
            z[:, index] = change(z[:, index])
            parts.append(part + sae.contribution(z, index).float())
        return torch.cat(parts).to(x.device)

    return edit
