"""How few latents give nearly the same reconstruction: the test of a weak sparsity penalty.

Of a token's latents those are kept that add most to x̂ (|z| times the decoder row's norm): the k
strongest, or all above a common threshold. The truncated L0 is the smallest at which FVU is the
same, which is at most `SAME_FVU` of the variance more. Nothing is trained, so it is what a stronger
penalty reaches at least.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from saefty.diagnosis.base import Change, Figures, Rows, measure
from saefty.diagnosis.causes import Trial
from saefty.diagnosis.finding import WEAK_SPARSITY
from saefty.diagnosis.record import AIMED_L0, FIXED_L0
from saefty.diagnosis.reference import SAME_FVU, fvu_of
from saefty.saes.base import SparseAutoencoder

POINTS = 12
QUANTILE_ROWS = 256
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
"""Shares of the firing latents that the first thresholds keep."""
BISECTIONS = 6


@dataclass(frozen=True)
class Kept:
    """What is left at one truncation."""

    value: float
    """The k, or the least that a latent must add to x̂."""
    l0: float
    fvu: float


@dataclass(frozen=True)
class Truncation:
    """Both curves, and the truncation that keeps FVU with the fewest latents."""

    by_k: tuple[Kept, ...]
    by_threshold: tuple[Kept, ...]
    trial: Trial | None
    """None where no truncation keeps FVU with fewer latents."""


def truncations(sae: SparseAutoencoder, rows: Rows, as_it_is: Figures) -> Truncation:
    """Search both truncations for the smallest L0 of the same FVU.

    Args:
        sae: The SAE.
        rows: A part of the rows.
        as_it_is: The SAE's figures on this part.
    """
    limit, l0 = fvu_of(as_it_is) + SAME_FVU, as_it_is.l0.value
    if not limit < math.inf or l0 < 1:
        return Truncation((), (), None)
    most = min(sae.d_sae, math.ceil(2 * l0) + 1)
    grid = np.unique(np.geomspace(1, most, POINTS).round()).tolist()
    by_k = _searched(
        sae, rows, [int(k) for k in grid], limit, lambda k: Change(keep=round(k)), _middle_count
    )
    strengths = _strengths(sae, rows)
    grid = np.unique(np.quantile(strengths, [1 - share for share in SHARES])).tolist()
    by_threshold = _searched(
        sae, rows, grid, limit, lambda t: Change(least=float(t)), lambda a, b: (a + b) / 2
    )
    best = min(
        (one for one in (*by_k, *by_threshold) if one.fvu <= limit and one.l0 < l0),
        key=lambda one: one.l0,
        default=None,
    )
    if best is None:
        return Truncation(by_k, by_threshold, None)
    is_count = any(best is one for one in by_k)
    trial = _by_k(sae, round(best.value)) if is_count else _by_threshold(sae, best)
    return Truncation(by_k, by_threshold, trial)


def _searched(
    sae: SparseAutoencoder,
    rows: Rows,
    grid: Sequence[float],
    limit: float,
    change: Callable[[float], Change],
    middle: Callable[[float, float], float | None],
) -> tuple[Kept, ...]:
    """Measure a grid, then halve the interval in which FVU crosses the limit."""
    found: dict[float, Kept] = {}

    def tried(values: Sequence[float]) -> None:
        figures = measure(sae, rows, [change(value) for value in values])
        for value, one in zip(values, figures, strict=True):
            found[value] = Kept(value, one.l0.value, fvu_of(one))

    tried(grid)
    for _ in range(BISECTIONS):
        good = [one for one in found.values() if one.fvu <= limit]
        bad = [one for one in found.values() if one.fvu > limit]
        if not good or not bad:
            break
        least = min(good, key=lambda one: one.l0)
        below = max(
            (one for one in bad if one.l0 <= least.l0), key=lambda one: one.l0, default=None
        )
        between = middle(least.value, below.value) if below else None
        if between is None or between in found:
            break
        tried([between])
    return tuple(sorted(found.values(), key=lambda one: one.l0))


def _middle_count(a: float, b: float) -> float | None:
    return None if abs(a - b) <= 1 else float((int(a) + int(b)) // 2)


@torch.no_grad()
def _strengths(sae: SparseAutoencoder, rows: Rows) -> Float[np.ndarray, "firing"]:
    """Return what firing latents add to x̂ on some of the rows."""
    step = max(1, len(rows.x) // QUANTILE_ROWS)
    x = rows.x[::step].to(sae.W_enc.device, torch.float32)
    code = sae.encode_sparse(x)
    adds = sae.W_dec.detach().float().norm(dim=1)
    return (code.values.abs() * adds[code.indices.long()]).double().cpu().numpy()


def _by_k(sae: SparseAutoencoder, k: int) -> Trial:
    return Trial(
        WEAK_SPARSITY,
        f"{'the latent that adds' if k == 1 else f'the {k} latents that add'} most kept",
        f"{_too_weak(sae)}: {k} of a token's latents raise FVU by at most {SAME_FVU:g}.",
        _advice(sae, k),
        Change(keep=k),
        swept=True,
    )


def _by_threshold(sae: SparseAutoencoder, kept: Kept) -> Trial:
    return Trial(
        WEAK_SPARSITY,
        f"latents that add at least {kept.value:.4g} kept",
        f"{_too_weak(sae)}: {kept.l0:.1f} latents a token raise FVU by at most {SAME_FVU:g}.",
        _advice(sae, max(1, round(kept.l0))),
        Change(least=kept.value),
        swept=True,
    )


def _too_weak(sae: SparseAutoencoder) -> str:
    has_k = sae.config.arch in FIXED_L0 + AIMED_L0
    return f"k is too large ({sae.config.k})" if has_k else "The sparsity penalty is too weak"


def _advice(sae: SparseAutoencoder, k: int) -> str:
    if sae.config.arch in FIXED_L0 + AIMED_L0:
        return f"Train again with a smaller k: sae.k={k}."
    other = f"sae.arch=topk sae.k={k}"
    option = next((name for name in ("l1", "l0") if name in sae.options), None)
    if option is None:
        return f"Train again with {other}."
    return (
        f"Train again with a stronger penalty (sae.options.{option} of this package's "
        f"{sae.config.arch}; raise it until L0 is about {k}), or with {other}."
    )
