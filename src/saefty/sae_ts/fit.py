"""The linear map from a steering vector to its effects, and the vectors it recommends.

Effects are approximated by ŷ = x M + b for training vectors x of norm 1 (Chalnev, Siu and Conmy
2024, arXiv:2411.02193). A vector that moves the target t and not what every vector moves is
s = norm(norm(M t) - λ norm(M b)).

A ridge fit is M = P Y with P = (XᵀX + ρI)⁻¹ Xᵀ on centred X, so M t, M b and M Mᵀ are products with
the sparse effects: M itself, [d_model, d_sae], is never formed.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import pearsonr

from saefty.errors import ConfigError, NumericError
from saefty.sae_ts.effects import Effects

log = logging.getLogger(__name__)

BLOCK = 4096
"""Latents whose columns of M are formed at once."""
PENALTIES = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 100.0)
"""Penalties to choose from, in units of the mean eigenvalue of XᵀX."""
LOW_CORRELATION = 0.3
LEAST_STEPS = 1500
"""Of a gradient descent, however few vectors there are."""
ARRIVED = 0.02
"""Share of its first gradient that may be left at a descent's end."""


class EffectMap(ABC):
    """ŷ = x M + b, with M [d_model, d_sae]."""

    bias: Float[np.ndarray, "d_sae"]
    """b: what every vector does."""

    @abstractmethod
    def toward(self, weights: Float[np.ndarray, "d_sae"]) -> Float[np.ndarray, "d_model"]:
        """Return M w: the direction in which a weighted sum of latents grows fastest."""

    @abstractmethod
    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "d_model block"]]]:
        """Yield the columns of M in blocks, each with the latents it is about."""

    def gram(self) -> Float[np.ndarray, "d_model d_model"]:
        """Return M Mᵀ."""
        return np.sum([block @ block.T for _, block in self.blocks()], axis=0)


class RidgeMap(EffectMap):
    """The map that minimises ‖Y - X M - b‖² + ρ‖M‖²; b is not penalised.

    Args:
        effects: What to learn from.
        penalty: ρ, in units of the mean eigenvalue of the centred XᵀX.

    Raises:
        ConfigError: If the penalty is not above 0, or there are fewer than two vectors.
    """

    def __init__(self, effects: Effects, penalty: float) -> None:
        if penalty <= 0 or len(effects.vectors) < 2:
            raise ConfigError(
                f"a ridge fit needs a penalty above 0 and two vectors at least, not {penalty} and "
                f"{len(effects.vectors)}.",
                then="Set the penalty above 0, or measure more vectors.",
            )
        self.penalty = penalty
        x = effects.vectors.astype(np.float64)
        self._mean = x.mean(axis=0)
        centred = x - self._mean
        gram = centred.T @ centred
        rho = penalty * float(np.trace(gram)) / len(gram)
        # P maps effects to M. It takes constants to 0, so that the effects need no centring.
        self._solve = np.linalg.solve(gram + rho * np.eye(len(gram)), centred.T)
        self._effects = effects
        # b = ȳ - x̄ M = (1/n - x̄ P) (steered - baseline)
        share = 1 / len(x) - self._mean @ self._solve
        self.bias = np.asarray(share @ effects.steered) - share.sum() * effects.baseline

    def toward(self, weights: Float[np.ndarray, "d_sae"]) -> Float[np.ndarray, "d_model"]:
        """Return M w; see `EffectMap.toward`."""
        return self._solve @ self._effects.toward(weights)

    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "d_model block"]]]:
        """Yield the columns of M; see `EffectMap.blocks`."""
        by_latent = self._effects.steered.tocsc()
        for start in range(0, by_latent.shape[1], BLOCK):
            where = slice(start, min(start + BLOCK, by_latent.shape[1]))
            yield where, self._solve @ by_latent[:, where].toarray()


class DescentMap(EffectMap):
    """The least-squares map by stochastic gradient descent (Adam), without a penalty.

    M is fitted on centred vectors and effects, so that what every vector does, however large, takes
    no steps to learn: b = ȳ - x̄ M follows. A descent that has not arrived is warned of.

    Args:
        effects: What to learn from.
        epochs: How often each vector is seen; more where that makes fewer than `LEAST_STEPS` steps.
        rate: Step size at the start; it falls to 0 along half a cosine.
        batch: Vectors in a step.
        seed: Of the order.
    """

    def __init__(
        self,
        effects: Effects,
        *,
        epochs: int = 200,
        rate: float = 3e-2,
        batch: int = 128,
        seed: int = 0,
    ) -> None:
        vectors = effects.vectors.astype(np.float64)
        mean, common = vectors.mean(axis=0), np.asarray(effects.steered.mean(axis=0)).ravel()
        spread = _spread(effects)
        # Coordinates of unit size, so that one step size fits any number of them.
        size = float(np.sqrt(((vectors - mean) ** 2).mean())) or 1.0
        x = torch.from_numpy(((vectors - mean) / size).astype(np.float32))
        generator = torch.Generator().manual_seed(seed)
        matrix = torch.zeros(x.shape[1], effects.d_sae, requires_grad=True)
        optimizer = torch.optim.Adam([matrix], lr=rate)
        epochs = max(epochs, -(-LEAST_STEPS // -(-len(x) // batch)))
        steps = epochs * -(-len(x) // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=generator).split(batch):
                y = torch.from_numpy((effects.steered[rows.numpy()] - common) / spread).float()
                loss = (x[rows] @ matrix - y).square().mean(dim=0).sum()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        fitted = matrix.detach().double().numpy()
        self._matrix = spread * fitted / size
        self.bias = common - effects.baseline - mean @ self._matrix
        self._tell_arrival(effects, x.double().numpy(), fitted, spread)

    def _tell_arrival(
        self,
        effects: Effects,
        x: Float[np.ndarray, "vectors d_model"],
        fitted: Float[np.ndarray, "d_model d_sae"],
        spread: Float[np.ndarray, "d_sae"],
    ) -> None:
        """Warn if the gradient has not all but vanished; x is centred, so the effects need not."""
        start = (effects.steered.T @ x).T / spread
        first, last = (float(np.linalg.norm(one)) for one in (start, start - x.T @ x @ fitted))
        if last > ARRIVED * first:
            log.warning(
                "gradient descent did not arrive: %.1f%% of the gradient is left. "
                "The ridge fit (--fit ridge) is exact.", 100 * last / first,
            )  # fmt: skip

    def toward(self, weights: Float[np.ndarray, "d_sae"]) -> Float[np.ndarray, "d_model"]:
        """Return M w; see `EffectMap.toward`."""
        return self._matrix @ weights

    def blocks(self) -> Iterator[tuple[slice, Float[np.ndarray, "d_model block"]]]:
        """Yield the columns of M; see `EffectMap.blocks`."""
        for start in range(0, self._matrix.shape[1], BLOCK):
            where = slice(start, min(start + BLOCK, self._matrix.shape[1]))
            yield where, self._matrix[:, where]


def choose_penalty(effects: Effects, weights: Float[np.ndarray, "d_sae"]) -> float:
    """Return the penalty that predicts the target best when each vector is left out in turn.

    Leaving one out needs no new fit: its error is that of the whole fit over 1 - leverage.
    """
    x = effects.vectors.astype(np.float64)
    y = effects.toward(weights)
    centred, residue = x - x.mean(axis=0), y - y.mean()
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    unit = float((s**2).sum()) / x.shape[1]
    errors = []
    for penalty in PENALTIES:
        kept = s**2 / (s**2 + penalty * unit)
        fitted = u @ (kept * (u.T @ residue))
        leverage = (u**2) @ kept + 1 / len(x)
        errors.append(float((((residue - fitted) / (1 - leverage)) ** 2).mean()))
    return PENALTIES[int(np.argmin(errors))]


def sae_ts(
    effect_map: EffectMap, weights: Float[np.ndarray, "d_sae"], lam: float = 1.0
) -> Float[np.ndarray, "d_model"]:
    """Return s = norm(norm(M t) - λ norm(M b)).

    Args:
        effect_map: The fitted map.
        weights: t.
        lam: λ: how much of what every vector does is taken out.

    Raises:
        NumericError: If the target moved under no vector, or nothing is left of it.
    """
    return _against(effect_map.toward(weights), effect_map.toward(effect_map.bias), lam)


def pseudo_inverse(
    effect_map: EffectMap, weights: Float[np.ndarray, "d_sae"], lam: float = 1.0
) -> Float[np.ndarray, "d_model"]:
    """Return the vector whose predicted effects are nearest to t alone: t M⁺, less λ b M⁺.

    M⁺ = Mᵀ(M Mᵀ)⁻¹, so directions that move many latents at once are discounted.

    Raises:
        NumericError: If the target moved under no vector, or nothing is left of it.
    """
    inverse = np.linalg.pinv(effect_map.gram(), hermitian=True)
    return _against(
        inverse @ effect_map.toward(weights),
        inverse @ effect_map.toward(effect_map.bias),
        lam,
    )


def rotation(
    effect_map: EffectMap,
    decoder: Float[np.ndarray, "d_sae d_model"],
    weights: Float[np.ndarray, "d_sae"],
    lam: float = 1.0,
) -> Float[np.ndarray, "d_model"]:
    """Return the decoder's direction for t, turned as decoder rows turn into what moves them.

    One rotation R for all latents, the orthogonal matrix that maximises Σ_k ⟨R d_k, M e_k⟩ over
    unit decoder rows d_k (Schönemann 1966): a latent that hardly moved learns from the others. The
    direction is norm(norm(R Σ t_k d_k) - λ norm(M b)).

    Raises:
        NumericError: If the target's decoder rows are zero, or nothing is left of it.
    """
    lengths = np.linalg.norm(decoder, axis=1)
    units = decoder / np.where(lengths > 0, lengths, 1.0)[:, None]
    cross = sum(block @ units[where] for where, block in effect_map.blocks())
    u, _, v = np.linalg.svd(cross)
    return _against((u @ v) @ (weights @ units), effect_map.toward(effect_map.bias), lam)


@dataclass(frozen=True)
class HeldOut:
    """How well effects on the target are predicted for vectors that were not learned from.

    Attributes:
        correlation: Pearson's, of predicted with measured effects on the target; NaN where the
            target does not vary.
        low: Lower end of its 95 % interval (Fisher's).
        high: Upper end.
        r2: 1 - error / variance, of the target.
        overall_r2: The same over all latents.
        vectors: Vectors that were held out.
        moved: Share of all training vectors under which a latent of the target moved at all.
    """

    correlation: float
    low: float
    high: float
    r2: float
    overall_r2: float
    vectors: int
    moved: float

    @property
    def is_low(self) -> bool:
        """Whether the target is predicted too badly to rely on."""
        return not (self.correlation >= LOW_CORRELATION and self.low > 0)

    def warning(self, targets: Sequence[int]) -> str | None:
        """Return what to tell the user if the prediction is bad."""
        if not self.is_low:
            return None
        what = "latent" if len(targets) == 1 else "latents"
        names = f"{what} {', '.join(map(str, targets))}"
        if np.isnan(self.correlation):
            return (
                f"{names} did not move among {self.vectors} held-out vectors (moved under "
                f"{self.moved:.0%} of all): the vector for it is guesswork."
            )
        return (
            f"the effect on {names} is predicted badly: held-out correlation "
            f"{self.correlation:.2f} [{self.low:.2f}, {self.high:.2f}] over {self.vectors} vectors "
            f"(moved under {self.moved:.0%} of all). Measure more vectors, raise the scale, or "
            "target a group of latents."
        )


def held_out(
    effects: Effects,
    weights: Float[np.ndarray, "d_sae"],
    fit: Callable[[Effects], EffectMap],
    *,
    share: float = 0.2,
    seed: int = 0,
) -> HeldOut:
    """Make the map from part of the vectors and predict the others.

    Args:
        effects: What was measured.
        weights: The target.
        fit: Makes the map; whatever it chooses, it chooses by the vectors that it gets.
        share: What share of the vectors is held out.
        seed: Chooses which.

    Raises:
        ConfigError: If there are too few vectors for a correlation.
    """
    order = np.random.default_rng([seed, 6]).permutation(len(effects.vectors))
    count = round(share * len(order))
    if count < 4 or len(order) - count < 4:
        raise ConfigError(
            f"{len(order)} vectors are too few to hold any out: {count} would be.",
            then="Measure at least 20 vectors: effects.vectors=20.",
        )
    test, train = effects.subset(order[:count]), effects.subset(order[count:])
    fitted = fit(train)
    x = test.vectors.astype(np.float64)
    y, predicted = test.toward(weights), x @ fitted.toward(weights) + fitted.bias @ weights
    centre = float(train.toward(weights).mean())
    varies = np.ptp(y) > 0 and np.ptp(predicted) > 0
    found = pearsonr(y, predicted) if varies else None
    interval = found.confidence_interval() if found is not None else None
    moved = effects.moved(np.flatnonzero(weights).tolist()).any(axis=1)
    return HeldOut(
        float(found.statistic) if found is not None else float("nan"),
        float(interval.low) if interval is not None else float("nan"),
        float(interval.high) if interval is not None else float("nan"),
        _r2(((y - predicted) ** 2).sum(), ((y - centre) ** 2).sum()),
        _overall_r2(fitted, train, test),
        count,
        float(moved.mean()),
    )


def _overall_r2(fitted: EffectMap, train: Effects, test: Effects) -> float:
    x = test.vectors.astype(np.float64)
    error = spread = 0.0
    learned, held = train.steered.tocsc(), test.steered.tocsc()
    for where, block in fitted.blocks():
        y = held[:, where].toarray() - test.baseline[where]
        centre = np.asarray(learned[:, where].mean(axis=0)).ravel() - test.baseline[where]
        error += float(((y - x @ block - fitted.bias[where]) ** 2).sum())
        spread += float(((y - centre) ** 2).sum())
    return _r2(error, spread)


def _r2(error: float, spread: float) -> float:
    return float(1 - error / spread) if spread > 0 else float("nan")


def _spread(effects: Effects) -> Float[np.ndarray, "d_sae"]:
    """Return each latent's standard deviation over the vectors, 1 where it does not vary."""
    rows = effects.steered
    mean = np.asarray(rows.mean(axis=0)).ravel()
    square = np.asarray(rows.multiply(rows).mean(axis=0)).ravel()
    deviation = np.sqrt(np.maximum(square - mean**2, 0.0))
    return np.where(deviation > 0, deviation, 1.0)


def _against(
    wanted: Float[np.ndarray, "d_model"],
    common: Float[np.ndarray, "d_model"],
    lam: float,
) -> Float[np.ndarray, "d_model"]:
    """Return norm(norm(wanted) - λ norm(common))."""
    if not np.linalg.norm(wanted) > 0:
        raise NumericError(
            "the target moved under none of the training vectors, so nothing says how to move it.",
            then="Measure more vectors or at a greater scale, or target other latents; a group of "
            "latents moves more easily than one.",
        )
    direction = _unit(wanted)
    if lam and np.linalg.norm(common) > 0:
        direction = direction - lam * _unit(common)
    if not np.linalg.norm(direction) > 1e-9:
        raise NumericError(
            f"nothing is left of the target's direction when {lam} times what every vector "
            "does is taken out.",
            then="Set a smaller lambda.",
        )
    return _unit(direction)


def _unit(vector: Float[np.ndarray, "d_model"]) -> Float[np.ndarray, "d_model"]:
    return vector / np.linalg.norm(vector)
