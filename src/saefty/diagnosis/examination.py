"""All experiments on an SAE's rows: screened on a part of the texts, confirmed on all of them.

Plain readings and sweeps are first measured on a part of the texts; of each cause the best is then
measured on all rows, together with the SAE as it is, so that their sampling errors compare. Other
tensors are few and measured on all rows at once.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from saefty.diagnosis.base import Change, Figures, Rows, measure
from saefty.diagnosis.causes import AS_IT_IS, READ, Trial
from saefty.diagnosis.experiments import (
    Point,
    other_reading,
    part_of,
    plain_trials,
    search,
    sweeps,
)
from saefty.diagnosis.finding import SPECIAL_TOKENS
from saefty.diagnosis.reference import Reference, fvu_of
from saefty.diagnosis.truncation import Truncation, truncations
from saefty.metrics.rarity import unseen
from saefty.saes.base import SparseAutoencoder

log = logging.getLogger(__name__)

SCREEN_ROWS = 2048
"""Rows on which readings are screened and numbers are searched for."""
OF_EACH_CAUSE = 2
"""Readings of a cause that are measured on all rows."""
OWN_SWEEPS = ("encoder bias", "threshold", "scale")
"""Sweeps that trade L0 for FVU and read nothing else."""
WITHOUT_SPECIAL = "without_special"
ENCODED = 1024
SAME = 1e-4
"""Relative difference under which a reading changes nothing."""


@dataclass(frozen=True)
class Repair:
    """One experiment on all rows, and what it is worth."""

    trial: Trial
    figures: Figures
    gain: float
    """How many times better, as a logarithm; see `reference`."""
    removed: float | None
    """Share of the excess L0 that goes away; None where there is no excess."""
    idle: bool
    """It changes neither L0 nor FVU."""

    @property
    def fvu(self) -> float:
        """FVU, infinite where it is not a number."""
        return fvu_of(self.figures)


@dataclass(frozen=True)
class Silence:
    """Latents that fire on no row, and how many of them more texts would wake."""

    silent: int
    once: int
    """Latents that fire in one text alone."""
    twice: int
    texts: int
    d_sae: int

    @property
    def unseen(self) -> float:
        """How many silent latents are only rare, at least."""
        return max(0.0, min(float(self.silent), unseen(self.once, self.twice, self.texts)[0]))

    @property
    def error(self) -> float:
        """Standard error of the share of dead latents."""
        return unseen(self.once, self.twice, self.texts)[1] / self.d_sae

    @property
    def dead_share(self) -> float:
        """Share of the latents that are silent and not only rare."""
        return (self.silent - self.unseen) / self.d_sae


@dataclass(frozen=True)
class Examination:
    """What was measured of one SAE."""

    as_it_is: Figures
    reference: Reference
    repairs: tuple[Repair, ...]
    """Every reading but the truncation, by gain."""
    truncated: Repair | None
    truncation: Truncation
    swept: Mapping[str, tuple[Point, ...]]
    """The values that each sweep tried, on the screened part."""
    silence: Silence
    screened_rows: int

    def own_best(self, l0: float) -> float:
        """Return the least FVU that the SAE as it is read reaches by firing up to so many latents.

        By another threshold, bias or scale: what its own trade-off gives.
        """
        points = [one for name in OWN_SWEEPS for one in self.swept.get(name, ())]
        return min([fvu_of(self.as_it_is), *(one.fvu for one in points if one.l0 <= l0)])


def examine(
    sae: SparseAutoencoder,
    held: Mapping[str, Rows],
    reference: Reference,
    *,
    named: bool = True,
) -> Examination:
    """Run every experiment.

    Args:
        sae: The SAE, with float32 weights.
        held: The rows of each reading; `read` is the one asked for.
        reference: What L0 is held against.
        named: Whether the place that was read is the one the SAE's own settings name.
    """
    rows = held[READ]
    part = part_of(rows, SCREEN_ROWS)
    (first,) = measure(sae, part, [Change()])
    plain = plain_trials(sae, rows)
    log.info("%d readings are tried on %d of %d rows", len(plain), len(part.x), len(rows.x))
    figures = measure(sae, part, [one.change for one in plain])
    gains = [reference.gain(first, one) for one in figures]
    chosen = _best_of_each(plain, gains)
    swept = {}
    for sweep in sweeps(sae, rows):
        value, points = search(sweep, sae, part, first, reference)
        chosen.append(sweep.trial(value))
        swept[sweep.name] = tuple(points)
    truncation = truncations(sae, part, first)
    confirmed = [*chosen, *([truncation.trial] if truncation.trial else [])]
    as_it_is, *others = measure(
        sae, rows, [AS_IT_IS.change, *(trial.change for trial in confirmed)]
    )
    repairs = [
        _repair(trial, one, as_it_is, reference)
        for trial, one in zip(confirmed, others, strict=True)
    ]
    truncated = repairs.pop() if truncation.trial else None
    for key in held:
        if key != READ:
            trial = _special_trial(key) or other_reading(key, named)
            (one,) = measure(sae, held[key], [trial.change])
            repairs.append(_repair(trial, one, as_it_is, reference))
    repairs.sort(key=lambda one: -one.gain)
    return Examination(
        as_it_is, reference, tuple(repairs), truncated, truncation, swept, silence(sae, rows),
        len(part.x),
    )  # fmt: skip


def _repair(trial: Trial, figures: Figures, as_it_is: Figures, reference: Reference) -> Repair:
    def same(a: float, b: float) -> bool:
        return a == b or abs(a - b) <= SAME * max(abs(a), abs(b))

    idle = same(figures.l0.value, as_it_is.l0.value) and same(fvu_of(figures), fvu_of(as_it_is))
    gain = 0.0 if idle else reference.gain(as_it_is, figures)
    return Repair(trial, figures, gain, reference.removed(as_it_is, figures), idle)


def _best_of_each(tried: list[Trial], gains: list[float]) -> list[Trial]:
    """Return the best trials of each cause; evidence is always among them."""
    found: list[Trial] = []
    for cause in dict.fromkeys(one.cause for one in tried):
        of_it = [i for i, one in enumerate(tried) if one.cause == cause]
        of_it.sort(key=lambda i: -gains[i])
        found += [tried[i] for i in of_it[:OF_EACH_CAUSE]]
    return found


def _special_trial(key: str) -> Trial | None:
    if key != WITHOUT_SPECIAL:
        return None
    return Trial(
        SPECIAL_TOKENS,
        "rows of special tokens (BOS) left out",
        "Special tokens are among the rows, and the SAE was not made for them.",
        "Leave them out: extract with extract.tokens=text, which is the default, and leave out "
        "BOS wherever the SAE is used.",
        rows=WITHOUT_SPECIAL,
    )


@torch.no_grad()
def silence(sae: SparseAutoencoder, rows: Rows) -> Silence:
    """Count latents that fire in no text, in one, and in two; texts are those of `Rows.unit`."""
    in_texts = np.zeros(sae.d_sae, dtype=np.int64)
    last = np.full(sae.d_sae, -1)
    for part in torch.arange(len(rows.x)).split(ENCODED):
        code = sae.encode_sparse(rows.x[part].to(sae.W_enc.device, torch.float32))
        unit = np.repeat(rows.unit[part.numpy()], code.l0.cpu().numpy())
        keys = np.unique(unit * sae.d_sae + code.indices.cpu().numpy())
        unit, latent = keys // sae.d_sae, keys % sae.d_sae
        new = last[latent] != unit  # its text may have begun in the part before
        np.add.at(in_texts, latent[new], 1)
        last[latent] = unit  # ascending, so the last text of each latent stays
    counts = [int((in_texts == n).sum()) for n in range(3)]
    return Silence(counts[0], counts[1], counts[2], rows.n_units, sae.d_sae)
