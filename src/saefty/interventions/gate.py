"""Taking what chosen latents contribute out of the activations.

h' = h - c Σ_T z_k W_dec,k, the sum over the chosen latents T, in raw units. With c = 1 this is
decode(z with z_T = 0) + (h - decode(z)): the SAE's own error stays in place, so it is not mistaken
for the effect of gating, and gating no latents changes nothing.
"""

from collections.abc import Sequence

from saefty.interventions.base import INTERVENTIONS, Intervention, Where, acting_at
from saefty.interventions.latents import adding, chosen_latents
from saefty.saes.base import SparseAutoencoder


@INTERVENTIONS.register("gate")
def gate(
    sae: SparseAutoencoder,
    latents: Sequence[int],
    *,
    where: Where = "both",
    skip_special: bool = True,
) -> Intervention:
    """Return the intervention that silences latents: h' = h - Σ_T z_k W_dec,k.

    Args:
        sae: Trained on the site where the intervention will act.
        latents: Which latents; none is the identity.
        where: At which tokens to act.
        skip_special: Leave special tokens alone, as the SAE was not trained on them.

    Raises:
        MismatchError: If it is a transcoder, or scales each row by itself.
        ValueError: If a latent is out of range or named twice.
    """
    return subtract(sae, latents, 1.0, where=where, skip_special=skip_special)


@INTERVENTIONS.register("subtract")
def subtract(
    sae: SparseAutoencoder,
    latents: Sequence[int],
    strength: float = 1.0,
    *,
    where: Where = "both",
    skip_special: bool = True,
) -> Intervention:
    """Return the intervention h' = h - c Σ_T z_k W_dec,k.

    Args:
        sae: Trained on the site where the intervention will act.
        latents: Which latents; none is the identity.
        strength: c; 1 takes out what the latents contribute, more over-corrects, 0 is the identity.
        where: At which tokens to act.
        skip_special: Leave special tokens alone, as the SAE was not trained on them.

    Raises:
        MismatchError: If it is a transcoder, or scales each row by itself.
        ValueError: If a latent is out of range or named twice.
    """
    index = chosen_latents(sae, latents, "gating")
    if not latents or strength == 0:
        return lambda x, positions: x
    edit = adding(sae, index, lambda z: -strength * z)
    return acting_at(edit, where, skip_special=skip_special)
