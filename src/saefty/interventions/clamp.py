"""Holding latents of an SAE at a value, or below one.

h' = h + Σ_T (v_k - z_k) W_dec,k: what a latent adds to the activations becomes what it would add at
the value v. The SAE's own error stays in place. Clamping to 0 is gating.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saefty.interventions.base import INTERVENTIONS, Intervention, Where, acting_at
from saefty.interventions.latents import adding, chosen_latents
from saefty.saes.base import SparseAutoencoder


@INTERVENTIONS.register("clamp")
def clamp(
    sae: SparseAutoencoder,
    latents: Sequence[int],
    values: float | Sequence[float],
    *,
    where: Where = "both",
    skip_special: bool = True,
) -> Intervention:
    """Return the intervention that sets latents to values: h' = h + Σ_T (v_k - z_k) W_dec,k.

    Args:
        sae: Trained on the site where the intervention will act.
        latents: Which latents; none is the identity.
        values: The value of each, or one for all, in the SAE's units of z.
        where: At which tokens to act.
        skip_special: Leave special tokens alone, as the SAE was not trained on them.

    Raises:
        MismatchError: If it is a transcoder, or scales each row by itself.
        ValueError: If a latent is out of range or named twice, or there is not one value for each.
    """
    return _held(sae, latents, values, lambda z, value: value, where, skip_special)


@INTERVENTIONS.register("cap_latents")
def cap_latents(
    sae: SparseAutoencoder,
    latents: Sequence[int],
    most: float | Sequence[float],
    *,
    where: Where = "both",
    skip_special: bool = True,
) -> Intervention:
    """Return the intervention that lets latents go no higher than a maximum.

    h' = h + Σ_T (min(z_k, c_k) - z_k) W_dec,k; rows where none is higher keep their values.

    Args:
        sae: Trained on the site where the intervention will act.
        latents: Which latents; none is the identity.
        most: The maximum of each, or one for all, in the SAE's units of z.
        where: At which tokens to act.
        skip_special: Leave special tokens alone, as the SAE was not trained on them.

    Raises:
        MismatchError: If it is a transcoder, or scales each row by itself.
        ValueError: If a latent is out of range or named twice, or there is not one maximum for
            each.
    """
    return _held(sae, latents, most, torch.minimum, where, skip_special)


def _held(
    sae: SparseAutoencoder,
    latents: Sequence[int],
    values: float | Sequence[float],
    wanted: Callable[[Tensor, Tensor], Tensor],
    where: Where,
    skip_special: bool,
) -> Intervention:
    """Return the intervention that gives latents what is wanted of their z and a value of each."""
    index = chosen_latents(sae, latents, "clamping")
    count = len(latents)
    listed = [float(values)] * count if isinstance(values, int | float) else list(values)
    if len(listed) != count:
        raise ValueError(f"{len(listed)} values were given for {count} latents")
    if not latents:
        return lambda x, positions: x
    each = torch.tensor(listed, dtype=torch.float32)
    edit = adding(sae, index, lambda z: wanted(z, each.to(z)) - z)
    return acting_at(edit, where, skip_special=skip_special)
