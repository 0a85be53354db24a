"""The readings that may mend an SAE without a record, parameter-free ones and sweeps of one number.

Parameter-free readings use nothing but what the SAE says of itself and the rows' own statistics.
A sweep chooses one number for its gain (see `reference`); it is chosen on a part of the texts
and measured on all, and one number chosen from dozens cannot fit thousands of rows.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saefty.diagnosis.base import Change, Figures, Rows, measure
from saefty.diagnosis.causes import Trial, reading_trial, trials
from saefty.diagnosis.finding import (
    BOS,
    DECODER_BIAS,
    ENCODER_BIAS,
    GATING,
    INPUT_OFFSET,
    SCALE,
    SPECIAL_TOKENS,
    STANDARDISATION,
    THRESHOLDS,
    WRONG_TENSOR,
)
from saefty.diagnosis.reference import Reference, fvu_of
from saefty.errors import SaeftyError
from saefty.saes.base import SparseAutoencoder
from saefty.saes.native import SCALER, load_scaler
from saefty.saes.published import RowNorm

THRESHOLD_ARCHS = ("jumprelu", "batch_topk", "matryoshka")
ROUNDS = 3
"""How often a sweep looks on both sides of its best value, each time half as far."""
SPREADS = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
"""Shifts of the encoder's bias to try, both ways, in standard deviations of pre-activations."""
SCALES = tuple(10.0 ** (i / 4) for i in range(-8, 9))
FACTORS = tuple(2.0 ** (i / 2) for i in range(-7, 8))
PRE_ROWS = 512
"""Rows from which the spread of pre-activations is taken."""
_CAUSES = {
    "norm factor": SCALE, "decoder-norm gating": GATING, "b_dec": DECODER_BIAS,
    "input ": INPUT_OFFSET, "scaler": STANDARDISATION, "layer": WRONG_TENSOR, "BOS": BOS,
    "outlier": SPECIAL_TOKENS, "dtype": "number format",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """One value of a sweep."""

    value: float
    l0: float
    fvu: float
    gain: float


@dataclass(frozen=True)
class Sweep:
    """One number that is searched for; `trial` says what a value of it means."""

    name: str
    unit: str
    grid: tuple[float, ...]
    logarithmic: bool
    trial: Callable[[float], Trial]


def plain_trials(sae: SparseAutoencoder, rows: Rows) -> list[Trial]:
    """Return the readings of the same rows in which no number is chosen for its figures."""
    known = [_named(one) for one in trials(sae, rows)]
    own = [*_moved_mean(sae, rows), *_standardised(sae, rows), *_row_norms(sae)]
    return [*known, *own, *_without_bias(sae)]


def other_reading(key: str, named_by_sae: bool) -> Trial:
    """Return the experiment of another tensor, or of the texts read otherwise."""
    return _named(reading_trial(key, named_by_sae))


def _named(trial: Trial) -> Trial:
    """Return a trial under the cause that the doctor names."""
    cause = next(cause for start, cause in _CAUSES.items() if trial.cause.startswith(start))
    return replace(trial, cause=cause)


def _moved_mean(sae: SparseAutoencoder, rows: Rows) -> list[Trial]:
    """Return the experiment that undoes a constant offset of the rows."""
    trained, whose = sae.b_dec.detach().double().cpu(), "b_dec"
    if sae.folder is not None and (sae.folder / SCALER).is_file():
        with suppress(SaeftyError):  # a damaged one says nothing
            scaler = load_scaler(sae.folder)
            if len(scaler.mean) == sae.d_in and bool(scaler.mean.any()):
                trained, whose = scaler.mean.double().cpu(), "scaler.json's, that of its training"
    if not bool(trained.any()):
        return []
    shift = trained - rows.mean
    return [
        Trial(
            INPUT_OFFSET,
            f"the activations' mean moved by {float(shift.norm()):.4g} (norm) to {whose}",
            "A constant is added to the input, or missing from it: the SAE was trained on "
            "activations of another mean.",
            "Look for where the constant was added to the activations or taken off, and give the "
            "SAE those that it was trained on.",
            Change(shift=shift, out_shift=shift),
            estimated=True,
        )
    ]


def _standardised(sae: SparseAutoencoder, rows: Rows) -> list[Trial]:
    if sae.config.row_norm != "none":
        return []
    mean = rows.mean
    variance = torch.zeros_like(mean)
    for part in rows.x.split(4096):
        variance += (part.double() - mean).square().sum(dim=0)
    deviation = (variance / len(rows.x)).sqrt()
    deviation = torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    common = float(deviation.square().mean().sqrt())
    kinds: tuple[tuple[str, float | Tensor], ...] = (
        ("each dimension divided by its deviation", deviation),
        (f"divided by their common deviation {common:.4g}", common),
    )
    found = []
    for what, by in kinds:
        change = Change(
            scale=1 / by, shift=-mean / by, out_scale=1 / by, out_shift=-mean / by
        )  # fmt: skip
        found.append(
            Trial(
                STANDARDISATION,
                f"the mean subtracted, {what}",
                "The SAE expects standardised activations and is fed raw ones.",
                "Fold the scaling into the weights (SparseAutoencoder.folded with the scaler of "
                f"training), or standardise before encoding: the mean subtracted, {what}. Training "
                "with train.normalize of this package folds it by itself.",
                change,
                estimated=True,
            )
        )
    return found


def _row_norms(sae: SparseAutoencoder) -> list[Trial]:
    words = {
        "layer_norm": "each row standardised by its own mean and deviation (layer norm)",
        "constant_norm_rescale": "each row scaled to norm √d",
    }
    return [
        Trial(
            STANDARDISATION,
            what,
            f"The SAE expects {what}.",
            f"Set what its format has for that (SAELens: normalize_activations {kind}).",
            Change(row_norm=kind),
        )
        for kind, what in words.items()
        if sae.config.row_norm != kind
    ]


def _without_bias(sae: SparseAutoencoder) -> list[Trial]:
    b_enc = sae.b_enc.detach()
    if not bool(b_enc.any()):
        return []
    return [
        Trial(
            ENCODER_BIAS,
            "b_enc set to 0",
            "The encoder's bias is wrong: the SAE is better without it.",
            "Set b_enc to 0 in the weights, and look for where it was added or changed.",
            Change(b_enc=torch.zeros_like(b_enc)),
        )
    ]


def sweeps(sae: SparseAutoencoder, rows: Rows) -> list[Sweep]:
    """Return the searches for one number.

    Args:
        sae: The SAE.
        rows: Rows from which the spread of pre-activations and the mean are taken.
    """
    found = [_bias_sweep(sae, rows)]
    if sae.config.arch in THRESHOLD_ARCHS:
        found.append(_threshold_sweep(sae))
    if sae.config.row_norm == "none":
        found += [_scale_sweep(None), _scale_sweep(rows.mean)]
    return found


def pre_deviation(sae: SparseAutoencoder, rows: Rows) -> float:
    """Return the standard deviation of the pre-activations over rows and latents."""
    x = rows.x[:: max(1, len(rows.x) // PRE_ROWS)].to(sae.W_enc.device, torch.float32)
    if sae.config.row_norm != "none":
        x = RowNorm.of(x, sae.config.row_norm).apply(x)
    pre = x @ sae.W_enc.detach().float() + sae.b_enc.detach().float()
    return float(pre.double().std())


def _bias_sweep(sae: SparseAutoencoder, rows: Rows) -> Sweep:
    b_enc, spread = sae.b_enc.detach().float(), pre_deviation(sae, rows)

    def trial(value: float) -> Trial:
        moved = "raised" if value > 0 else "lowered"
        wrong = "low" if value > 0 else "high"
        return Trial(
            ENCODER_BIAS,
            f"b_enc {moved} by {abs(value):.4g}",
            f"The encoder's bias is too {wrong}, by about {abs(value):.4g} for every latent.",
            f"Add {value:.4g} to b_enc, and look for where it was changed; or train again with "
            "b_enc starting at 0.",
            Change(b_enc=b_enc + value),
            swept=True,
        )

    values = [sign * share * spread for share in SPREADS for sign in (-1, 1)]
    return Sweep("encoder bias", "added to b_enc", tuple(sorted(values)), False, trial)


def _threshold_sweep(sae: SparseAutoencoder) -> Sweep:
    def trial(factor: float) -> Trial:
        return Trial(
            THRESHOLDS,
            f"every threshold times {factor:.4g}",
            f"The thresholds are off by a factor of {factor:.4g}.",
            f"Multiply the thresholds by {factor:.4g} (`threshold` in the weights).",
            Change(gate=torch.full((sae.d_sae,), 1 / factor)),
            swept=True,
        )

    return Sweep("threshold", "times", FACTORS, True, trial)


def _scale_sweep(mean: Float[Tensor, "d_in"] | None) -> Sweep:
    def trial(s: float) -> Trial:
        if mean is None:
            what, change = f"activations times {s:.4g}", Change(scale=s, out_scale=s)
        else:
            what = f"the mean subtracted, and times {s:.4g}"
            change = Change(scale=s, shift=-s * mean, out_scale=s, out_shift=-s * mean)
        return Trial(
            SCALE if mean is None else STANDARDISATION,
            what,
            f"The input's scale is off: the SAE expects {what}.",
            f"Scale before encoding and back after decoding ({what}), or fold that into the "
            "weights; look for a norm factor that was applied twice or not at all.",
            change,
            swept=True,
        )

    name = "scale" if mean is None else "scale about the mean"
    return Sweep(name, "times", SCALES, True, trial)


def search(
    sweep: Sweep,
    sae: SparseAutoencoder,
    rows: Rows,
    as_it_is: Figures,
    reference: Reference,
) -> tuple[float, list[Point]]:
    """Return the value of the largest gain, and every value tried in order.

    Args:
        sweep: What to search.
        sae: The SAE.
        rows: A part of the rows.
        as_it_is: The SAE's figures on this part.
        reference: What the gain counts against.
    """
    points: dict[float, Point] = {}

    def tried(values: Sequence[float]) -> None:
        new = [value for value in values if value not in points]
        figures = measure(sae, rows, [sweep.trial(value).change for value in new])
        for value, one in zip(new, figures, strict=True):
            gain = reference.gain(as_it_is, one)
            points[value] = Point(value, one.l0.value, fvu_of(one), gain)

    tried(sweep.grid)
    for _ in range(ROUNDS):
        held = sorted(points)
        best = held.index(max(held, key=lambda value: _worth(points[value])))
        near = [i for i in (best - 1, best + 1) if 0 <= i < len(held)]
        tried([_between(held[best], held[i], sweep.logarithmic) for i in near])
    ordered = [points[value] for value in sorted(points)]
    return max(ordered, key=_worth).value, ordered


def _worth(point: Point) -> tuple[float, float]:
    """Return what is larger of the better point: of gains that are alike, that of lower FVU."""
    return round(point.gain, 2), -point.fvu


def _between(a: float, b: float, logarithmic: bool) -> float:
    return math.sqrt(a * b) if logarithmic else (a + b) / 2


def part_of(rows: Rows, n_rows: int) -> Rows:
    """Return about so many rows, whole texts where there are many, spread over all of them."""
    if len(rows.x) <= n_rows:
        return rows
    step = math.ceil(len(rows.x) / n_rows)
    if rows.n_units > 2 * step:
        return rows.only(rows.unit % step == 0)
    return rows.only(np.arange(len(rows.x)) % step == 0)
