"""What JumpReLU and gated latents are, and their slopes, entry by entry.

In torch each operation reads and writes all entries; compiled, each entry of whole rows is read and
written once. Chosen entries, which come with one number of their latent each, are few: torch does.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saefty.kernels.compiled import call, library, plain

Sums = tuple[Float[Tensor, "d_sae"], ...]


def jump(
    pre: Float[Tensor, "rows d_sae"], threshold: Float[Tensor, "d_sae"]
) -> Float[Tensor, "rows d_sae"] | None:
    """Return relu(pre) where pre exceeds the threshold, else 0; None where it is not compiled."""
    found = library().functions if plain(pre, threshold) else None
    if found is None:
        return None
    z = torch.empty_like(pre)
    call(found.jump, pre, threshold, *pre.shape, z)
    return z


def jump_slopes(
    pre: Float[Tensor, "rows d_sae"],
    threshold: Float[Tensor, "d_sae"],
    bandwidth: float,
    weight: float,
    slope: Float[Tensor, "rows d_sae"],
) -> Sums | None:
    """Turn slopes by z into those by pre, in place.

    Args:
        pre: The pre-activations.
        threshold: What they must exceed.
        bandwidth: Width of the window around the threshold in which it learns.
        weight: The loss's slope by the number of entries that exceed their thresholds.
        slope: The loss's slopes by z.

    Returns:
        The slopes by the threshold, and how many exceed it; None where it is not compiled.
    """
    found = library().functions if plain(pre, threshold, slope) else None
    if found is None:
        return None
    sums = tuple(torch.empty_like(threshold) for _ in range(2))
    numbers = bandwidth / 2, 1 / bandwidth, float(weight)
    call(found.jump_slopes, pre, threshold, *pre.shape, *numbers, slope, *sums)
    return sums


def gate(
    pre: Float[Tensor, "rows d_sae"],
    scale: Float[Tensor, "d_sae"],
    b_gate: Float[Tensor, "d_sae"],
    b_mag: Float[Tensor, "d_sae"],
) -> tuple[Float[Tensor, "rows d_sae"], Float[Tensor, "rows d_sae"]] | None:
    """Return the magnitudes where gates are open, and the gates; None where it is not compiled."""
    found = library().functions if plain(pre, scale, b_gate, b_mag) else None
    if found is None:
        return None
    z, opened = torch.empty_like(pre), torch.empty_like(pre)
    call(found.gate, pre, scale, b_gate, b_mag, *pre.shape, z, opened)
    return z, opened


def gate_slopes(
    pre: Float[Tensor, "rows d_sae"],
    z: Float[Tensor, "rows d_sae"],
    scale: Float[Tensor, "d_sae"],
    b_gate: Float[Tensor, "d_sae"],
    weight: float,
    slope: Float[Tensor, "rows d_sae"],
    by_opened: Float[Tensor, "rows d_sae"],
) -> Sums | None:
    """Turn slopes by z into those by pre, in place.

    Returns:
        The slopes by the gates' bias, the magnitudes' bias and the logarithm of their scale, and
        the sum of the open gates; None where it is not compiled.
    """
    found = library().functions if plain(pre, z, scale, b_gate, slope, by_opened) else None
    if found is None:
        return None
    sums = tuple(torch.empty_like(scale) for _ in range(4))
    call(
        found.gate_slopes, pre, z, scale, b_gate, *pre.shape, float(weight), slope, by_opened, *sums
    )
    return sums
