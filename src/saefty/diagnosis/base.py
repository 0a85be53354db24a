"""Rows to measure an SAE on, a change of convention to try on them, and the figures of each.

A *change* is another convention of reading the same SAE: it encodes a x + c in the place of x,
takes its reconstruction for one of o x + t, and may compare thresholds with other multiples of the
pre-activations. FVU is always of x itself, in raw units: x̂ is brought back by (x̂ - t) / o. Sums
are kept by text, because the tokens of a text resemble each other: sampling errors come from
drawing whole texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefty.errors import InputError, NumericError
from saefty.fidelity import ALWAYS_ON
from saefty.kernels.base import SparseCode
from saefty.saes.base import SparseAutoencoder
from saefty.saes.published import RowNorm

GROUPS = 10
"""Groups of texts that are left out in turn, for the sampling errors of shares of latents."""
DRAWS = 400
MIN_TEXTS = 20
FIRST_POSITIONS = 4
CODE_NUMBERS = 1 << 24  # pre-activations held at once
SPARSE_FROM = 2048  # latents; below, a dense product is quicker whatever fires
SPARSE_BELOW = 0.1  # share of firing latents under which a sparse product is the quicker one


@dataclass(frozen=True)
class Rows:
    """Activations of tokens that are neither padding nor special, and the text each one is of."""

    x: Float[Tensor, "rows d_in"]
    text: Int[np.ndarray, "rows"]
    """Number of each row's text, ascending from 0."""
    place: Int[np.ndarray, "rows"]
    """0 for the first row of its text."""

    def __post_init__(self) -> None:
        if len(self.x) == 0:
            raise InputError("there are no rows to measure the SAE on.")

    def only(self, keep: Bool[np.ndarray, "rows"]) -> "Rows":
        """Return some of the rows; texts without any are no more counted."""
        _, text = np.unique(self.text[keep], return_inverse=True)
        return Rows(self.x[torch.from_numpy(keep)], text.astype(np.int64), self.place[keep])

    @cached_property
    def unit(self) -> Int[np.ndarray, "rows"]:
        """What is drawn as a whole: the text, or a stretch of tokens where there are few texts."""
        if self.text[-1] + 1 >= MIN_TEXTS:
            return self.text
        return np.arange(len(self.x)) * min(MIN_TEXTS, len(self.x)) // len(self.x)

    @cached_property
    def mean(self) -> Float[Tensor, "d_in"]:
        """Mean of the rows, float64."""
        return self.x.double().mean(dim=0)

    @cached_property
    def norms(self) -> Float[Tensor, "rows"]:
        """Norm of each row, float64."""
        return self.x.double().norm(dim=1)

    @cached_property
    def variation(self) -> Float[np.ndarray, "draws_plus_1"]:
        """Σ‖x - x̄‖² of all rows, then of each draw of units about the draw's own mean."""
        squares = np.zeros(self.n_units)
        sums = np.zeros((self.n_units, self.x.shape[1]))
        for part in torch.arange(len(self.x)).split(4096):
            centred = (self.x[part].double() - self.mean).numpy()
            unit = self.unit[part.numpy()]
            squares += np.bincount(unit, (centred**2).sum(axis=1), self.n_units)
            np.add.at(sums, unit, centred)
        drawn = self.draws @ self.sizes
        spread = self.draws @ squares - ((self.draws @ sums) ** 2).sum(axis=1) / drawn
        return np.concatenate([[squares.sum()], spread])

    @property
    def n_units(self) -> int:
        """How many texts, or stretches, there are."""
        return int(self.unit[-1]) + 1

    @cached_property
    def sizes(self) -> Int[np.ndarray, "units"]:
        """Rows of each unit."""
        return np.bincount(self.unit, minlength=self.n_units)

    @cached_property
    def draws(self) -> Int[np.ndarray, "draws units"]:
        """How often each unit is in each draw; the same for every change, so that they compare."""
        n = self.n_units
        return np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS)


@dataclass(frozen=True, eq=False)
class Change:
    """Another convention: encode `scale` x + `shift`; the reconstruction is one of out_* x."""

    scale: float | Float[Tensor, "d_in"] = 1.0
    shift: Float[Tensor, "d_in"] | None = None
    out_scale: float | Float[Tensor, "d_in"] = 1.0
    out_shift: Float[Tensor, "d_in"] | None = None
    gate: Float[Tensor, "d_sae"] | None = None
    """What each pre-activation is multiplied by before it is compared or ranked."""
    rounded_to: torch.dtype | None = None
    """A number format that rows and weights are rounded to first."""
    b_enc: Float[Tensor, "d_sae"] | None = None
    """An encoder bias in the place of the SAE's; magnitudes of gated SAEs move by as much."""
    row_norm: str | None = None
    """What is done to each row, in the place of what the SAE does; see `saes/published.py`."""
    keep: int | None = None
    """Keep so many latents of a token, those that add most to x̂: |z| times the decoder row's
    norm."""
    least: float | None = None
    """Keep the latents that add at least this much to x̂."""


@dataclass(frozen=True)
class Estimate:
    """A figure and its sampling error: the standard deviation over draws of whole texts."""

    value: float
    error: float


@dataclass(frozen=True)
class Figures:
    """What an SAE does to rows under one convention."""

    n_rows: int
    d_sae: int
    l0: Estimate
    """Mean number of firing latents a token."""
    fvu: Estimate | None
    """Fraction of variance unexplained; None where the rows do not vary."""
    silent_share: Estimate
    """Share of latents that fire on none of these rows."""
    always_on_share: Estimate
    """Share of latents that fire on at least 99 % of these rows."""
    by_place: tuple[tuple[float, float], ...] = ()
    """(L0, squared error over the mean variance of a row) at the first places of texts, then of
    all rows behind them."""


@torch.no_grad()
def measure(sae: SparseAutoencoder, rows: Rows, changes: Sequence[Change]) -> list[Figures]:
    """Measure an SAE on rows under several conventions, in one pass.

    The product x W_enc is shared by all changes that only scale and shift.

    Args:
        sae: The SAE, with float32 weights.
        rows: The activations, in raw units, float32.
        changes: The conventions; `Change()` is the SAE as it is.

    Raises:
        MismatchError: If the rows have another width than the SAE reads.
        NumericError: If a row holds NaN or infinity.
    """
    device, W_enc = sae.W_enc.device, sae.W_enc.detach().float()
    sums = [_Sums(rows, sae.d_sae) for _ in changes]
    weights = [_prepared(sae, change, W_enc) for change in changes]
    adds = sae.W_dec.detach().float().norm(dim=1)
    size = max(16, min(2048, CODE_NUMBERS // sae.d_sae))
    for part in torch.arange(len(rows.x)).split(size):
        x = rows.x[part].to(device, torch.float32)
        _check(sae, x)
        product = x @ W_enc if sae.config.row_norm == "none" else None
        for change, (b_enc, W_dec), one in zip(changes, weights, sums, strict=True):
            norm, pre = _pre(sae, change, x, product, W_enc)
            z = _truncated(_activated(sae, pre + b_enc, change.gate), change, adds)
            back = _decoded(sae, z, W_dec)
            back = (back if norm is None else norm.undo(back)).double()
            if change.out_shift is not None:
                back = back - change.out_shift.double().to(device)
            error = (x.double() - back / _on(change.out_scale, device)).square().sum(dim=1)
            one.add(part.numpy(), z != 0, error.cpu().numpy())
    return [one.figures() for one in sums]


def _check(sae: SparseAutoencoder, x: Float[Tensor, "rows width"]) -> None:
    sae.encode_sparse(x[:1])  # says what is wrong with the width
    bad = int((~torch.isfinite(x)).any(dim=1).sum())
    if bad:
        raise NumericError(
            f"{bad} of {len(x)} activations to measure on hold NaN or infinity.",
            then="Leave such rows out: extract.nonfinite=mask.",
        )


def _on(scale: float | Tensor, device: torch.device) -> float | Tensor:
    return scale.double().to(device) if isinstance(scale, Tensor) else scale


def _prepared(
    sae: SparseAutoencoder, change: Change, W_enc: Float[Tensor, "d_in d_sae"]
) -> tuple[Float[Tensor, "d_sae"], Float[Tensor, "d_sae d_in"]]:
    """Return the encoder's bias with what the input's shift adds to it, and the decoder."""
    b_enc = (sae.b_enc.detach() if change.b_enc is None else change.b_enc).to(W_enc)
    W_dec = sae.W_dec.detach().float()
    if change.rounded_to is not None:
        return b_enc, W_dec.to(change.rounded_to).float()
    if change.shift is not None and _row_norm(sae, change) == "none":
        b_enc = (b_enc.double() + change.shift.to(W_enc).double() @ W_enc.double()).float()
    return b_enc, W_dec


def _pre(
    sae: SparseAutoencoder,
    change: Change,
    x: Float[Tensor, "rows d_in"],
    product: Float[Tensor, "rows d_sae"] | None,
    W_enc: Float[Tensor, "d_in d_sae"],
) -> tuple[RowNorm | None, Float[Tensor, "rows d_sae"]]:
    """Return the pre-activations but for the bias, and how rows were normalised, if they were."""
    kind = change.rounded_to
    if kind is not None:
        x, W_enc, product = x.to(kind).float(), W_enc.to(kind).float(), None
    per_row = _row_norm(sae, change)
    if product is not None and per_row == "none" and not isinstance(change.scale, Tensor):
        return None, product * change.scale
    x = x * (change.scale.to(x) if isinstance(change.scale, Tensor) else change.scale)
    if per_row == "none":
        return None, x @ W_enc
    x = x if change.shift is None else x + change.shift.to(x)
    norm = RowNorm.of(x, per_row)
    return norm, norm.apply(x) @ W_enc


def _row_norm(sae: SparseAutoencoder, change: Change) -> str:
    return change.row_norm or sae.config.row_norm


def _activated(
    sae: SparseAutoencoder,
    pre: Float[Tensor, "rows d_sae"],
    gate: Float[Tensor, "d_sae"] | None,
) -> Float[Tensor, "rows d_sae"]:
    """Return the latents, chosen by `gate` times the pre-activations; their values stay."""
    if gate is None:
        return sae.activate(pre)
    factors = gate.to(pre)
    return sae.activate(pre * factors) / factors


def _truncated(
    z: Float[Tensor, "rows d_sae"], change: Change, adds: Float[Tensor, "d_sae"]
) -> Float[Tensor, "rows d_sae"]:
    """Return the latents that a change keeps of those that fire."""
    if change.keep is None and change.least is None:
        return z
    strength = z.abs() * adds
    if change.least is not None:
        z = z * (strength >= change.least)
    if change.keep is not None and change.keep < z.shape[1]:
        kept = strength.topk(change.keep, dim=1).indices
        z = torch.zeros_like(z).scatter(1, kept, z.gather(1, kept))
    return z


def _decoded(
    sae: SparseAutoencoder, z: Float[Tensor, "rows d_sae"], W_dec: Float[Tensor, "d_sae d_in"]
) -> Float[Tensor, "rows d_in"]:
    if sae.d_sae < SPARSE_FROM or int(torch.count_nonzero(z)) > SPARSE_BELOW * z.numel():
        return z @ W_dec + sae.b_dec.detach()
    rows, latents = z.nonzero(as_tuple=True)
    ends = torch.bincount(rows, minlength=len(z)).cumsum(0)
    code = SparseCode(z[rows, latents], latents, torch.cat([ends.new_zeros(1), ends]))
    return sae.kernels.decode(code, W_dec) + sae.b_dec.detach()


class _Sums:
    """What is added up over the parts of the rows, for one change."""

    def __init__(self, rows: Rows, d_sae: int) -> None:
        self.rows = rows
        self.l0, self.error = np.zeros(rows.n_units), np.zeros(rows.n_units)
        self.fired = np.zeros((GROUPS, d_sae))
        self.places = np.zeros((3, FIRST_POSITIONS + 1))

    def add(
        self,
        part: Int[np.ndarray, "part"],
        fires: Bool[Tensor, "part d_sae"],
        error: Float[np.ndarray, "part"],
    ) -> None:
        unit, place = self.rows.unit[part], np.minimum(self.rows.place[part], FIRST_POSITIONS)
        l0 = fires.sum(dim=1).cpu().numpy()
        self.l0 += np.bincount(unit, l0, len(self.l0))
        self.error += np.bincount(unit, error, len(self.error))
        group = torch.from_numpy(unit % GROUPS).to(fires.device)
        members = torch.nn.functional.one_hot(group, GROUPS).float()
        self.fired += (members.T @ fires.float()).double().cpu().numpy()
        for i, values in enumerate((np.ones(len(part)), l0, error)):
            self.places[i] += np.bincount(place, values, FIRST_POSITIONS + 1)

    def figures(self) -> Figures:
        rows = self.rows
        drawn = rows.draws @ rows.sizes
        l0 = np.concatenate([[self.l0.sum() / len(rows.x)], rows.draws @ self.l0 / drawn])
        fvu = None
        if rows.variation[0] > 0:
            errors = np.concatenate([[self.error.sum()], rows.draws @ self.error])
            with np.errstate(divide="ignore", invalid="ignore"):
                fvu = _estimate(errors / rows.variation)
        per_row = rows.variation[0] / len(rows.x)
        counts = np.maximum(self.places[0], 1)
        by_place = tuple(
            (float(a), float(b / per_row) if per_row > 0 else 0.0)
            for a, b in zip(self.places[1] / counts, self.places[2] / counts, strict=True)
        )
        shares = self._shares()
        return Figures(len(rows.x), self.fired.shape[1], _estimate(l0), fvu, *shares, by_place)

    def _shares(self) -> tuple[Estimate, Estimate]:
        """Return the shares of latents that never and always fire, errors by the jackknife.

        Whether rare latents are silent is a matter of luck that a jackknife misses: a latent that
        fired f times is silent in another such sample with a chance of e^-f (one that did not fire
        is taken as of f = 1), independently.
        """
        sizes = np.bincount(self.rows.unit % GROUPS, minlength=GROUPS)
        held = np.concatenate([[0], np.flatnonzero(sizes)])
        fired = (
            self.fired.sum(axis=0)
            - np.where(np.arange(len(held)) > 0, 1, 0)[:, None] * (self.fired[held])
        )
        counts = len(self.rows.x) - np.where(np.arange(len(held)) > 0, 1, 0) * sizes[held]
        silent = (fired == 0).mean(axis=1)
        always = (fired >= ALWAYS_ON * counts[:, None]).mean(axis=1)
        chance = np.exp(-np.maximum(self.fired.sum(axis=0), 1))
        luck = float(np.sqrt((chance * (1 - chance)).sum())) / self.fired.shape[1]
        never = _jackknifed(silent)
        return Estimate(never.value, max(never.error, luck)), _jackknifed(always)


def _jackknifed(values: Float[np.ndarray, "groups_plus_1"]) -> Estimate:
    rest, n = values[1:], len(values) - 1
    return Estimate(float(values[0]), float(np.sqrt((n - 1) * rest.var())) if n > 1 else 0.0)


def _estimate(values: Float[np.ndarray, "draws_plus_1"]) -> Estimate:
    rest = values[1:][np.isfinite(values[1:])]
    return Estimate(float(values[0]), float(rest.std(ddof=1)) if len(rest) > 1 else 0.0)
