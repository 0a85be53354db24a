"""What gating latents leaves of the evidence of harm in stored activations, without the model.

x' = x - c Σ_T z_k W_k, in raw units. A linear probe that learnt on the ungated activations of the
selection half is shown those of the report half, before and after: how many of the harmful examples
that it called harmful it no longer calls so (*safety*), what is left of its AUROC, and what gating
does to harmless examples. A second probe, which learns anew on the gated selection half, says
whether the evidence is gone or only out of the first one's sight.

An example's activation is the mean over its rows. Gating is linear in x and z, so the mean of gated
rows is the gated mean, and nothing is approximated.

A probe is weaker evidence than the forward pass: it reads one place linearly, and what it no longer
sees the layers behind it may still use.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saefty.gating import Condition
from saefty.metrics.base import group_codes
from saefty.metrics.intervals import LEVEL, Bootstrap, Interval
from saefty.probes import Fit, ProbeTask, fit_probe, make_folds, standardise

LEFT_OUT = "the selection half, each example scored by a probe that had not seen it"
SEEN = "the selection half, which the probe learnt from (too few groups to leave any out)"


@dataclass(frozen=True)
class GatedRows:
    """What is gated: one row an example, the means over its tokens.

    Attributes:
        x: Raw activations.
        z: The latents that may be gated, signed, in the SAE's units.
        latents: Which latents the columns of z are.
        decoder: What each adds to the activations for each unit of z.
    """

    x: Float[np.ndarray, "examples d_in"]
    z: Float[np.ndarray, "examples chosen"]
    latents: tuple[int, ...]
    decoder: Float[np.ndarray, "chosen d_in"]

    def without(
        self, latents: Sequence[int], strength: float = 1.0
    ) -> Float[np.ndarray, "examples d_in"]:
        """Return x - c Σ z_k W_k over some of the latents."""
        columns = [self.latents.index(latent) for latent in latents]
        return self.x - strength * (self.z[:, columns] @ self.decoder[columns])


@dataclass(frozen=True)
class RowChange:
    """What gating does to the examples of one label.

    Attributes:
        called: Share that the probe calls harmful.
        relative: Mean of ‖x' - x‖ / ‖x‖.
        cosine: Mean cosine of x' and x.
    """

    called: Interval
    relative: Interval
    cosine: Interval


@dataclass(frozen=True)
class LatentPoint:
    """One condition, on the report half.

    Attributes:
        condition: Which latents were gated.
        safety: Of the harmful examples that the probe called harmful ungated, the share that it no
            longer calls so.
        changed: Share of the harmless examples whose call changes, either way.
        auroc: Of the probe that learnt on ungated activations.
        relearnt: AUROC of a probe that learnt on activations gated likewise.
        harmful: What happens to harmful examples.
        harmless: What happens to harmless ones.
    """

    condition: Condition
    safety: Interval
    changed: Interval
    auroc: Interval
    relearnt: Interval
    harmful: RowChange
    harmless: RowChange

    @property
    def count(self) -> int:
        """How many latents were gated."""
        return len(self.condition.latents)


@dataclass(frozen=True)
class LatentGating:
    """The curve of one layer.

    Attributes:
        points: Every condition, the ungated one first.
        targets: The latents whose effect is claimed, in the order in which they were gated.
        controls: The equally active latents beside them.
        strength: How many times what they contribute was taken out.
        false_alarms: The share of harmless examples of the selection half that the probe was
            allowed to call harmful.
        threshold: The log-odds above which it does.
        threshold_from: What the threshold was set on.
        converged: Whether the optimiser of every probe came to rest.
    """

    points: tuple[LatentPoint, ...]
    targets: tuple[int, ...]
    controls: tuple[int, ...]
    strength: float
    false_alarms: float
    threshold: float
    threshold_from: str
    converged: bool


def gate_stored(
    rows: GatedRows,
    wanted: Sequence[Condition],
    task: ProbeTask,
    *,
    targets: Sequence[int],
    controls: Sequence[int],
    strength: float = 1.0,
    false_alarms: float = 0.05,
) -> LatentGating:
    """Gate stored activations under each condition, and ask probes what is left.

    Args:
        rows: The activations and latents of all examples.
        wanted: The conditions, the ungated one first.
        task: The labels and the split: probes learn on `train` and are asked on `test`.
        targets: The latents whose effect is claimed.
        controls: The equally active latents beside them.
        strength: How many times what the latents contribute is taken out.
        false_alarms: The share of harmless training examples that may be called harmful.
    """
    labels = task.harmful[task.train]
    codes = group_codes(task.clusters, len(task.harmful))
    folds = make_folds(labels, codes[task.train], task.seed)
    probe = fit_probe(rows.x[task.train], labels, folds, standardise)
    threshold, source = _threshold(probe, rows.x[task.train], labels, false_alarms)
    x, harmful = rows.x[task.test], task.harmful[task.test]
    before = probe.linear.score(x) > threshold
    draws = _Draws(harmful, codes[task.test], task)
    points, converged = [], probe.converged
    for condition in wanted:
        gated = rows.without(condition.latents, strength)
        anew = probe
        if condition.latents:
            anew = fit_probe(gated[task.train], labels, folds, standardise, nested=False)
        converged = converged and anew.converged
        points.append(_point(condition, probe, anew, threshold, before, x, gated[task.test], draws))
    return LatentGating(
        points=tuple(points),
        targets=tuple(targets),
        controls=tuple(controls),
        strength=strength,
        false_alarms=false_alarms,
        threshold=threshold,
        threshold_from=source,
        converged=converged,
    )


class _Draws:
    """The bootstraps of the report half: of all its examples, and of those of each label."""

    def __init__(
        self, harmful: Bool[np.ndarray, "test"], codes: Int[np.ndarray, "test"], task: ProbeTask
    ) -> None:
        self.harmful = harmful
        self.all = Bootstrap(len(harmful), codes, boots=task.boots, seed=task.seed)
        self.of = {
            label: Bootstrap(int(mask.sum()), codes[mask], boots=task.boots, seed=task.seed)
            for label, mask in ((True, harmful), (False, ~harmful))
        }


def _point(
    condition: Condition,
    probe: Fit,
    anew: Fit,
    threshold: float,
    before: Bool[np.ndarray, "test"],
    x: Float[np.ndarray, "test d_in"],
    gated: Float[np.ndarray, "test d_in"],
    draws: _Draws,
) -> LatentPoint:
    harmful = draws.harmful
    scores = probe.linear.score(gated)
    called = scores > threshold
    lost = np.where(before, ~called, np.nan)[harmful]  # of those that it called harmful at first
    changed = (called != before)[~harmful].astype(float)
    caught = int(np.nansum(~np.isnan(lost)))
    return LatentPoint(
        condition=condition,
        safety=draws.of[True].mean(lost) if condition.latents else _exactly(0.0, caught),
        changed=draws.of[False].mean(changed)
        if condition.latents
        else _exactly(0.0, int((~harmful).sum())),
        auroc=draws.all.ranking(scores, harmful)["auroc"],
        relearnt=draws.all.ranking(anew.linear.score(gated), harmful)["auroc"],
        harmful=_change(x[harmful], gated[harmful], called[harmful], draws.of[True], condition),
        harmless=_change(
            x[~harmful], gated[~harmful], called[~harmful], draws.of[False], condition
        ),
    )


def _change(
    x: Float[np.ndarray, "rows d_in"],
    gated: Float[np.ndarray, "rows d_in"],
    called: Bool[np.ndarray, "rows"],
    draws: Bootstrap,
    condition: Condition,
) -> RowChange:
    rate = draws.mean(called.astype(float))
    if not condition.latents:
        return RowChange(rate, _exactly(0.0, len(x)), _exactly(1.0, len(x)))
    norm, other = np.linalg.norm(x, axis=1), np.linalg.norm(gated, axis=1)
    # An example without a row in the store is 0 throughout: there is nothing to compare.
    known = (norm > 0) & (other > 0)
    cosine = np.full(len(x), np.nan)
    cosine[known] = (x * gated).sum(axis=1)[known] / (norm * other)[known]
    relative = np.full(len(x), np.nan)
    relative[norm > 0] = np.linalg.norm(gated - x, axis=1)[norm > 0] / norm[norm > 0]
    most = max(1.0, float(np.nan_to_num(relative).max(initial=0.0)))
    return RowChange(
        rate, draws.mean(relative, bounds=(0.0, most)), draws.mean(cosine, bounds=(-1.0, 1.0))
    )


def _exactly(value: float, rows: int) -> Interval:
    """Return what is so by definition, where nothing was gated."""
    return Interval(value, value, value, "by definition", rows, LEVEL)


def _threshold(
    probe: Fit,
    x: Float[np.ndarray, "train d_in"],
    labels: Bool[np.ndarray, "train"],
    false_alarms: float,
) -> tuple[float, str]:
    """Return the log-odds above which at most a share of the harmless training examples lie.

    The scores are those that each example got while it was left out of the training: the probe
    scores what it learnt from too well.
    """
    scores, source = probe.held_out[~labels], LEFT_OUT
    if np.isnan(scores).any():
        scores, source = probe.linear.score(x)[~labels], SEEN
    ordered = np.sort(scores)[::-1]
    allowed = min(int(false_alarms * len(ordered) * (1 + 1e-12)), len(ordered) - 1)
    return float(ordered[allowed]), source
