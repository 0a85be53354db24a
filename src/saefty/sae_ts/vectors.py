"""From effect data to a vector: the fit, how far to trust it, and the direction it recommends."""

import logging
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, Literal

import numpy as np
import torch

from saefty.errors import ConfigError, MismatchError
from saefty.interventions.vectors import SteeringVector
from saefty.latent_targets import listed, sae_facts, target_weights
from saefty.report import plain
from saefty.sae_ts.effects import Effects
from saefty.sae_ts.fit import (
    DescentMap,
    EffectMap,
    HeldOut,
    RidgeMap,
    choose_penalty,
    held_out,
    pseudo_inverse,
    rotation,
    sae_ts,
)
from saefty.saes.base import SparseAutoencoder

log = logging.getLogger(__name__)

Way = Literal["sae_ts", "pseudo_inverse", "rotation"]
Fit = Literal["ridge", "descent"]


def targeted_vector(
    effects: Effects,
    sae: SparseAutoencoder,
    targets: Mapping[int, float],
    *,
    way: Way = "sae_ts",
    lam: float = 1.0,
    fit: Fit = "ridge",
    penalty: float | None = None,
    seed: int = 0,
) -> SteeringVector:
    """Return the vector that moves chosen latents and little else, by measured effects.

    Its norm is 1. How well the effect on the target was predicted for vectors that the fit had not
    seen stands in its provenance (`held_out`), and is warned of where it is low.

    Args:
        effects: What training vectors did.
        sae: Whose latents they moved.
        targets: Latents and weights.
        way: `sae_ts`; or its variants `pseudo_inverse` and `rotation`.
        lam: λ: how much of what every vector does is taken out.
        fit: `ridge`, or gradient `descent`.
        penalty: Of the ridge fit, in units of the mean eigenvalue; None chooses the one that
            predicts the target best when each vector is left out in turn (for `held_out`, of those
            that are not held out).
        seed: Chooses the held-out vectors, and the order of the descent.

    Raises:
        ConfigError: If a latent is out of range or a weight not usable, λ is not finite, or there
            are too few vectors.
        MismatchError: If the effects are those of another SAE.
        NumericError: If the target moved under no vector.
    """
    check_same_sae(effects, sae)
    if not np.isfinite(lam):
        raise ConfigError(f"lambda is {lam}.", then="Set it to a number such as 0 or 1.")
    weights = target_weights(targets, sae.d_sae)

    def make(some: Effects) -> EffectMap:
        if fit == "descent":
            return DescentMap(some, seed=seed)
        return RidgeMap(some, choose_penalty(some, weights) if penalty is None else penalty)

    trust = held_out(effects, weights, make, seed=seed)
    fitted = make(effects)
    if way == "rotation":
        decoder = sae.W_dec.detach().double().cpu().numpy()
        values = rotation(fitted, decoder, weights, lam)
    else:
        values = (sae_ts if way == "sae_ts" else pseudo_inverse)(fitted, weights, lam)
    warning = trust.warning(list(targets))
    if warning:
        log.warning("%s", warning)
    moved = effects.moved(list(targets))
    unmoved = [latent for place, latent in enumerate(targets) if not moved[:, place].any()]
    if unmoved and len(unmoved) < len(targets):
        log.warning(
            "%d of the %d latents of the target moved under none of the %d training vectors and "
            "have no part in the vector: %s", len(unmoved), len(targets), len(effects.vectors),
            ", ".join(map(str, unmoved)),
        )  # fmt: skip
    provenance: dict[str, Any] = {
        "latents": listed(targets),
        "unmoved": unmoved,
        "lambda": lam,
        "fit": fit,
        "penalty": fitted.penalty if isinstance(fitted, RidgeMap) else None,
        "vectors": len(effects.vectors),
        "scale": effects.scale,
        "held_out": {"fit": fit, **_record(trust)},
        **sae_facts(sae),
    }
    norms = {"residual": residual} if (residual := effects.facts.get("residual")) else {}
    return SteeringVector(torch.from_numpy(values), effects.site, way, norms, provenance)


def trust_of(vector: SteeringVector) -> HeldOut | None:
    """Return how well the effect that a vector was fitted to was predicted; None where it was not.

    It is read from the vector's provenance, so that it can be told long after the fit.
    """
    found = vector.provenance.get("held_out")
    if not found:
        return None
    given: dict[str, Any] = {one.name: found.get(one.name) for one in fields(HeldOut)}
    given |= {key: float("nan") for key, one in given.items() if one is None}
    return HeldOut(**given)


def check_same_sae(effects: Effects, sae: SparseAutoencoder) -> None:
    """Check that effects are those on an SAE's latents.

    Raises:
        MismatchError: If they are another's.
    """
    own, found = sae_facts(sae)["sae_xxh3_128"], effects.facts.get("sae_xxh3_128")
    if found is not None and found != own:
        raise MismatchError(
            f"the effects were measured with the SAE of checksum {found} "
            f"({effects.facts.get('sae')}), but this one's is {own}.",
            then="Name the SAE of that run, or measure the effects with this one: saefty steer "
            "effects.",
        )
    if effects.d_sae != sae.d_sae:
        raise MismatchError(
            f"the effects are on {effects.d_sae} latents, but the SAE has {sae.d_sae}.",
            then="Name the SAE of that run.",
        )


def _record(trust: HeldOut) -> dict[str, Any]:
    return dict(plain(asdict(trust)))
