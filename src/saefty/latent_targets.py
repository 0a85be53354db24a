"""Which latents a vector is to move, with which weights, and what it remembers of their SAE."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from saefty.errors import ConfigError
from saefty.sae_sets import sae_checksum
from saefty.saes.base import SparseAutoencoder

FORM = re.compile(r"(\d+)(?::([-+.\deE]+))?")


def parse_targets(words: Sequence[str]) -> dict[int, float]:
    """Read latents and weights: `12`, `12:0.5`, several as words or with commas between them.

    Raises:
        ConfigError: If a word is not of that form, or names a latent twice.

    Example:
        >>> parse_targets(["7", "12:0.5,40:-1"])
        {7: 1.0, 12: 0.5, 40: -1.0}
    """
    found: dict[int, float] = {}
    for word in (part.strip() for given in words for part in given.split(",")):
        match = FORM.fullmatch(word)
        try:
            weight = float(match.group(2) or 1.0) if match else None
        except ValueError:
            weight = None
        if match is None or weight is None:
            raise ConfigError(
                f"{word!r} names no latent.", then="Write a number, or number:weight: 12 or 12:0.5."
            )
        if int(match.group(1)) in found:
            raise ConfigError(
                f"latent {match.group(1)} is named twice.", then="Name each latent once."
            )
        found[int(match.group(1))] = weight
    return found


def target_weights(targets: Mapping[int, float], d_sae: int) -> Float[np.ndarray, "d_sae"]:
    """Return weights of latents as one row.

    Raises:
        ConfigError: If there is no latent, one is out of range, or a weight is not finite or 0.
    """
    wrong = [latent for latent in targets if not 0 <= latent < d_sae]
    if wrong or not targets:
        what = f"latent {wrong[0]} does not exist" if wrong else "no latent is named"
        raise ConfigError(
            f"{what}: the SAE has {d_sae} latents, 0..{d_sae - 1}.",
            then="Name latents in that range; saefty eval tells which follow a label.",
        )
    if not all(map(np.isfinite, targets.values())) or not any(targets.values()):
        raise ConfigError(
            f"the weights {listed(targets)} are not usable: each is a finite number, and not all "
            "are 0.",
            then="Give weights such as 12:1,40:0.5.",
        )
    row = np.zeros(d_sae)
    row[list(targets)] = list(targets.values())
    return row


def sae_facts(sae: SparseAutoencoder) -> dict[str, Any]:
    """Return what a vector remembers of the SAE it was made from."""
    return {
        "sae": str(sae.folder) if sae.folder else None,
        "sae_xxh3_128": sae_checksum(sae),
        "model": sae.metadata.get("model_name"),
    }


def listed(weights: Mapping[int, float]) -> list[list[float]]:
    """Return latents and weights as JSON holds them."""
    return [[int(latent), float(weight)] for latent, weight in weights.items()]
