"""Detectors side by side: the same learner, folds, seed and budget for every input.

Whatever is chosen is chosen on the training side: the penalty, the k latents, the vocabulary, the
scales, the layer and pooling of each family, and the threshold of F1. All of it but the threshold
is chosen by the mean log loss on three folds of the training clusters, in which everything else is
learnt anew. Only what is chosen is compared in pairs, with Holm's correction for all pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from jaxtyping import Bool, Float, Int

from saefty.detection.inputs import Candidate
from saefty.errors import InputError
from saefty.metrics.base import group_codes
from saefty.metrics.calibration import Calibration, best_f1_threshold, calibration
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.metrics.paired import paired_auroc
from saefty.metrics.significance import holm
from saefty.probes import (
    FOLDS,
    Fit,
    ProbeResult,
    ProbeTask,
    fit_probe,
    make_folds,
    measure_probe,
)

ALPHA = 0.05
EXCHANGES_A_PAIR = 100
"""Exchanges of each test for each pair that is tested: else Holm's correction would leave no p
small enough to tell any two apart."""

LEAST_FOR_1PCT = 100
"""Harmless examples from which on one in a hundred can be told."""


@dataclass(frozen=True)
class Detector:
    """One detector on one training set.

    Attributes:
        candidate: What it reads.
        chosen: Whether it is the one of its family that is compared.
        fit: What it learnt.
        probe: How it ranks the test examples.
        calibration: How its probabilities and decisions fit them.
    """

    candidate: Candidate
    chosen: bool
    fit: Fit
    probe: ProbeResult
    calibration: Calibration

    @property
    def family(self) -> str:
        """What kind of input it reads."""
        return self.candidate.family

    @property
    def auroc(self) -> Interval:
        """Area under the ROC curve on the test examples."""
        return self.probe.auroc


@dataclass(frozen=True)
class Pair:
    """Two detectors on the same test examples.

    Attributes:
        first: A family.
        second: Another one.
        difference: AUROC of the first minus that of the second.
        p: Two-sided p of the permutation test.
        p_holm: The same, adjusted for all pairs of the training set.
    """

    first: str
    second: str
    difference: Interval
    p: float
    p_holm: float

    @property
    def told_apart(self) -> bool:
        """Whether one is better than the other beyond luck."""
        return self.p_holm <= ALPHA


@dataclass(frozen=True)
class Comparison:
    """All detectors that learnt on one training set.

    Attributes:
        training: `all` or `balanced`.
        detectors: Every candidate, in the order of the inputs.
        pairs: Every two chosen ones.
        train: Which examples they learnt on.
    """

    training: str
    detectors: tuple[Detector, ...]
    pairs: tuple[Pair, ...]
    train: Bool[np.ndarray, "examples"]

    @property
    def main(self) -> list[Detector]:
        """The chosen detector of each family, the largest AUROC first.

        Of equals the one with less loss on the training folds comes first.
        """
        chosen = [one for one in self.detectors if one.chosen]
        return sorted(chosen, key=lambda one: (-one.auroc.estimate, one.fit.fold_loss))

    def of(self, family: str) -> Detector | None:
        """Return the chosen detector of a family, if there is one."""
        return next((one for one in self.main if one.family == family), None)

    def pair(self, first: str, second: str) -> Pair | None:
        """Return two families' comparison, seen from the first."""
        for one in self.pairs:
            if (one.first, one.second) == (first, second):
                return one
            if (one.second, one.first) == (first, second):
                return _turned(one)
        return None


def compare(
    candidates: Sequence[Candidate],
    task: ProbeTask,
    training: str,
    *,
    permutations: int,
    advance: Callable[[], object] = lambda: None,
) -> Comparison:
    """Fit every candidate, choose one of each family, and compare those in pairs.

    Args:
        candidates: The inputs.
        task: Labels, split, clusters and seed.
        training: What the training set is called.
        permutations: Exchanges of each paired test, at least; more where there are many pairs.
        advance: Called when a candidate is done.

    Raises:
        InputError: If a label of the training side has fewer clusters than there are folds.
    """
    check_folds(task)
    fits = fit_candidates(candidates, task.harmful, codes_of(task), task.train, task.seed, advance)
    kept = choose_candidates(candidates, fits)
    detectors = tuple(
        judged(candidate, fit, task, chosen=i in kept)
        for i, (candidate, fit) in enumerate(zip(candidates, fits, strict=True))
    )
    pairs = _pairs([one for one in detectors if one.chosen], task, permutations)
    return Comparison(training, detectors, pairs, task.train)


def check_folds(task: ProbeTask) -> None:
    """Refuse a training side too small to choose on.

    Raises:
        InputError: If a label has fewer clusters there than there are folds, or the clusters are
            so large that they cannot be divided.
    """
    reason = too_few_for_folds(task, task.train)
    if reason:
        raise InputError(
            f"the training side holds {reason}.",
            then="Add such examples, lower probe.test_share, or set data.group to a finer column.",
        )


def too_few_for_folds(task: ProbeTask, train: Bool[np.ndarray, "examples"]) -> str:
    """Return what a part holds that cannot be divided into folds; nothing if it can."""
    counts = label_clusters(task.harmful, codes_of(task), train)
    for kind, word in ((True, "harmful"), (False, "harmless")):
        if counts[kind] < FOLDS:
            return (
                f"{counts[kind] or 'no'} independent group{'' if counts[kind] == 1 else 's'} with "
                f"{word} examples, and {FOLDS} folds need at least {FOLDS}"
            )
    if not make_folds(task.harmful[train], codes_of(task)[train], task.seed):
        return f"groups so large that {FOLDS} folds would leave no two labels to learn from"
    return ""


def codes_of(task: ProbeTask) -> Int[np.ndarray, "examples"]:
    """Return a code an example, equal for examples that belong together."""
    return group_codes(task.clusters, len(task.harmful))


def label_clusters(
    harmful: Bool[np.ndarray, "examples"],
    codes: Int[np.ndarray, "examples"],
    part: Bool[np.ndarray, "examples"],
) -> dict[bool, int]:
    """Return how many clusters a part holds with harmful examples, and with harmless ones."""
    return {kind: len(np.unique(codes[part & (harmful == kind)])) for kind in (True, False)}


def fit_candidates(
    candidates: Sequence[Candidate],
    labels: Bool[np.ndarray, "examples"],
    codes: Int[np.ndarray, "examples"],
    train: Bool[np.ndarray, "examples"],
    seed: int,
    advance: Callable[[], object] = lambda: None,
) -> list[Fit]:
    """Fit every input on the same examples, in the same folds.

    Args:
        candidates: The inputs.
        labels: The labels of all examples.
        codes: A code an example, equal for examples that belong together.
        train: The examples to learn from.
        seed: Fixes the folds.
        advance: Called when a candidate is done.
    """
    folds = make_folds(labels[train], codes[train], seed)
    fits = []
    for candidate in candidates:
        fits.append(fit_probe(candidate.rows[train], labels[train], folds, candidate.learn))
        advance()
    return fits


def choose_candidates(candidates: Sequence[Candidate], fits: Sequence[Fit]) -> list[int]:
    """Return the place of the candidate of each family whose loss on held-out folds is the least.

    Of equals the first is taken.
    """
    best: dict[str, int] = {}
    for i, candidate in enumerate(candidates):
        j = best.get(candidate.family)
        if j is None or fits[i].fold_loss < fits[j].fold_loss:
            best[candidate.family] = i
    return list(best.values())


def judged(candidate: Candidate, fit: Fit, task: ProbeTask, *, chosen: bool) -> Detector:
    """Measure a fitted input on the test side."""
    scores = fit.linear.score(candidate.rows[task.test])
    truth = task.harmful[task.test]
    bootstrap = Bootstrap(len(truth), codes_of(task)[task.test], boots=task.boots, seed=task.seed)
    threshold = f1_threshold(fit, task.harmful[task.train])
    return Detector(
        candidate,
        chosen,
        fit,
        measure_probe(candidate.name, fit, scores, task),
        calibration(scores, truth, threshold, bootstrap, seed=task.seed),
    )


def f1_threshold(fit: Fit, labels: Bool[np.ndarray, "train"]) -> float:
    """Return the log-odds with the largest F1 on training examples that were left out of a fold."""
    known = ~np.isnan(fit.held_out)
    return best_f1_threshold(fit.held_out[known], labels[known])


def threshold_1pct(fit: Fit, labels: Bool[np.ndarray, "train"]) -> float | None:
    """Return the log-odds above which 1 % of the harmless examples left out of a fold lie.

    None if there are fewer than a hundred of them.
    """
    harmless: Float[np.ndarray, "harmless"] = fit.held_out[~np.isnan(fit.held_out) & ~labels]
    if len(harmless) < LEAST_FOR_1PCT:
        return None
    allowed = len(harmless) // 100
    below, above = np.sort(harmless)[::-1][[allowed, allowed - 1]]
    return float((below + above) / 2) if above > below else float(np.nextafter(below, np.inf))


def _pairs(chosen: Sequence[Detector], task: ProbeTask, permutations: int) -> tuple[Pair, ...]:
    truth, codes = task.harmful[task.test], codes_of(task)[task.test]
    couples = list(combinations(chosen, 2))
    permutations = max(permutations, EXCHANGES_A_PAIR * len(couples))
    found = []
    for a, b in couples:
        result = paired_auroc(
            a.probe.scores,
            b.probe.scores,
            truth,
            codes,
            boots=task.boots,
            permutations=permutations,
            seed=task.seed,
        )
        found.append((a.family, b.family, result))
    adjusted = holm(np.array([result.p for _, _, result in found]))
    return tuple(
        Pair(a, b, result.difference, result.p, float(p))
        for (a, b, result), p in zip(found, adjusted, strict=True)
    )


def _turned(pair: Pair) -> Pair:
    d = pair.difference
    turned = Interval(-d.estimate, -d.high, -d.low, d.method, d.clusters, d.level)
    return Pair(pair.second, pair.first, turned, pair.p, pair.p_holm)
