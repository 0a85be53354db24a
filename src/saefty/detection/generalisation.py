"""What holds beyond the split: sources that were left out of training, and single categories.

A source that has one label says how many false alarms are raised there, or how much harm is found,
at the threshold that was chosen in training; it has no ROC curve.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from saefty.detection.comparison import (
    Comparison,
    choose_candidates,
    codes_of,
    f1_threshold,
    fit_candidates,
    label_clusters,
    too_few_for_folds,
)
from saefty.detection.inputs import Candidate
from saefty.log import progress
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.metrics.paired import auroc_of, combined, is_certain
from saefty.probes import FOLDS, ProbeTask, make_folds

LEAST_JUDGED = 2
"""Clusters of the test that a category needs, and so do the others; to learn from, one a fold."""

MOST_CATEGORIES = 20
"""Categories told from the rest, the most frequent ones."""


@dataclass(frozen=True)
class SourceResult:
    """One family of detectors on a source that it did not learn from.

    Attributes:
        source: Its name.
        family: Of detectors.
        chosen: The candidate that was chosen on the other sources.
        examples: Of the source.
        harmful: How many of them are harmful.
        auroc: On all of its examples; None if they have one label.
        on_test: On those of its examples that are in the test; None if they have one label.
        within: On these, by the detector that learnt on all sources.
        recall: Share of its harmful examples that are flagged; None if there are none.
        false_alarms: Share of its harmless examples that are flagged; None if there are none.
    """

    source: str
    family: str
    chosen: str
    examples: int
    harmful: int
    auroc: Interval | None
    on_test: Interval | None
    within: Interval | None
    recall: Interval | None
    false_alarms: Interval | None


@dataclass(frozen=True)
class SourceAverage:
    """One family over the sources on which an AUROC can be measured both ways.

    Both are measured on the same examples: those of the sources that are in the test.

    Attributes:
        family: Of detectors.
        sources: How many.
        auroc: Mean over the sources, each left out of training.
        within: Mean over the same sources by the detector that learnt on all of them.
        loss: `within` minus `auroc`.
    """

    family: str
    sources: int
    auroc: Interval
    within: Interval
    loss: Interval


@dataclass(frozen=True)
class LeftOut:
    """Leave-one-source-out as a whole.

    Attributes:
        results: One for each source and family.
        averages: One for each family.
        skipped: Why a source was not measured, by its name.
    """

    results: tuple[SourceResult, ...] = ()
    averages: tuple[SourceAverage, ...] = ()
    skipped: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class CategoryResult:
    """One family of detectors that tells one category from all other examples.

    Attributes:
        category: Its name.
        family: Of detectors.
        chosen: The candidate that was chosen for this category.
        auroc: On the test examples.
        average_precision: Likewise; its chance level is `base_rate`.
        base_rate: Share of the category in the test.
        train_examples: Of the category, to learn from.
        test_examples: Of the category, to judge on.
    """

    category: str
    family: str
    chosen: str
    auroc: Interval
    average_precision: Interval
    base_rate: float
    train_examples: int
    test_examples: int


Draws = Float[np.ndarray, "draws examples"]
Scored = tuple[SourceResult, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""A result, the source's rows and scores when it was left out, and its test rows and scores when it
was not."""


def leave_one_source_out(
    candidates: Sequence[Candidate],
    comparison: Comparison,
    task: ProbeTask,
    sources: Int[np.ndarray, "examples"],
    names: Sequence[str],
) -> LeftOut:
    """Train on all sources but one, choices included, and judge on that one.

    Args:
        candidates: The inputs.
        comparison: The detectors that learnt on the training side of all sources.
        task: Labels, clusters and seed; its split is that of the comparison.
        sources: A code an example.
        names: The name of each code.
    """
    everything = Bootstrap(len(task.harmful), task.clusters, boots=task.boots, seed=task.seed)
    codes = codes_of(task)
    results: list[SourceResult] = []
    skipped: list[tuple[str, str]] = []
    scored: dict[str, list[Scored]] = {}
    with progress("sources left out", len(names), "sources") as bar:
        for code, name in enumerate(names):
            asked = sources == code
            train = ~asked & ~np.isin(codes, codes[asked])
            reason = too_few_for_folds(task, train)
            if reason:
                skipped.append((name, f"prompt groups it has no part in hold {reason}"))
                continue
            for one in _on_source(name, candidates, comparison, task, train, asked):
                results.append(one[0])
                if one[0].auroc is not None and one[0].within is not None:
                    scored.setdefault(one[0].family, []).append(one)
            bar.advance()
    averages = tuple(_average(family, found, task, everything) for family, found in scored.items())
    return LeftOut(tuple(results), averages, tuple(skipped))


def one_vs_rest(
    candidates: Sequence[Candidate], task: ProbeTask, categories: Sequence[str | None]
) -> tuple[list[CategoryResult], list[tuple[str, str]]]:
    """Tell each category from all other examples; all choices are made anew for each.

    Args:
        candidates: The inputs.
        task: The split and the seed.
        categories: The category of each example; None for one without.

    Returns:
        One result for each category and family, and why the other categories were left out.
    """
    counts = Counter(name for name in categories if name is not None)
    results: list[CategoryResult] = []
    left_out: list[tuple[str, str]] = []
    codes = codes_of(task)
    measured: list[tuple[str, Bool[np.ndarray, "examples"]]] = []
    for rank, (name, _) in enumerate(counts.most_common()):
        inside = np.array([one == name for one in categories])
        reason = _too_few(inside, codes, task)
        if rank >= MOST_CATEGORIES:
            left_out.append((name, f"not among the {MOST_CATEGORIES} most frequent"))
        elif reason:
            left_out.append((name, reason))
        elif measured and len(counts) == 2 and None not in categories:
            left_out.append((name, f"the rest of {measured[0][0]}: one AUROC says both"))
        else:
            measured.append((name, inside))
    with progress("categories", len(measured), "categories") as bar:
        for name, inside in measured:
            results += _told_from_rest(name, inside, candidates, task)
            bar.advance()
    return results, left_out


def _told_from_rest(
    name: str,
    inside: Bool[np.ndarray, "examples"],
    candidates: Sequence[Candidate],
    task: ProbeTask,
) -> list[CategoryResult]:
    truth, codes = inside[task.test], codes_of(task)[task.test]
    bootstrap = Bootstrap(len(truth), codes, boots=task.boots, seed=task.seed)
    fits = fit_candidates(candidates, inside, codes_of(task), task.train, task.seed)
    found = []
    for i in choose_candidates(candidates, fits):
        candidate, fit = candidates[i], fits[i]
        measured = bootstrap.ranking(fit.linear.score(candidate.rows[task.test]), truth)
        found.append(
            CategoryResult(
                name,
                candidate.family,
                candidate.name,
                measured["auroc"],
                measured["average_precision"],
                float(truth.mean()),
                int(inside[task.train].sum()),
                int(truth.sum()),
            )
        )
    return found


def _too_few(
    inside: Bool[np.ndarray, "examples"], codes: Int[np.ndarray, "examples"], task: ProbeTask
) -> str:
    """Return why a category cannot be told from the rest; nothing if it can."""
    sides = (
        (task.train, FOLDS, f"to learn from in {FOLDS} folds"),
        (task.test, LEAST_JUDGED, "to judge on"),
    )
    words = []
    for part, least, what in sides:
        counts = label_clusters(inside, codes, part)
        for kind, whose in ((True, ""), (False, " of other examples")):
            n = counts[kind]
            if n < least:
                groups = "group" if n == 1 else "groups"
                words.append(f"{n} {groups}{whose} {what}, which needs {least}")
    if words:
        return "; ".join(words)
    if not make_folds(inside[task.train], codes[task.train], task.seed):
        return f"groups so large that {FOLDS} folds would leave nothing to learn from"
    return ""


def _on_source(
    name: str,
    candidates: Sequence[Candidate],
    comparison: Comparison,
    task: ProbeTask,
    train: Bool[np.ndarray, "examples"],
    asked: Bool[np.ndarray, "examples"],
) -> list[Scored]:
    """Fit on the other sources, choose one candidate of each family, and judge it on this one."""
    fits = fit_candidates(candidates, task.harmful, codes_of(task), train, task.seed)
    rows, tested = np.flatnonzero(asked), np.flatnonzero(task.test & asked)
    truth = task.harmful[asked]
    found = []
    for i in choose_candidates(candidates, fits):
        candidate, fit = candidates[i], fits[i]
        main = comparison.of(candidate.family)
        assert main is not None  # every family has a chosen candidate
        within = main.probe.scores[asked[task.test]]
        scores = fit.linear.score(candidate.rows[asked])
        flagged = (scores >= f1_threshold(fit, task.harmful[train])).astype(np.float64)
        result = SourceResult(
            source=name,
            family=candidate.family,
            chosen=candidate.name,
            examples=len(truth),
            harmful=int(truth.sum()),
            auroc=_auroc(scores, rows, task),
            on_test=_auroc(scores[task.test[asked]], tested, task),
            within=_auroc(within, tested, task),
            recall=_share(flagged[truth], rows[truth], task),
            false_alarms=_share(flagged[~truth], rows[~truth], task),
        )
        found.append((result, rows, scores, tested, within))
    return found


def _auroc(
    scores: Float[np.ndarray, "rows"], rows: Int[np.ndarray, "rows"], task: ProbeTask
) -> Interval | None:
    truth = task.harmful[rows]
    if truth.all() or not truth.any():
        return None
    bootstrap = Bootstrap(len(rows), codes_of(task)[rows], boots=task.boots, seed=task.seed)
    return bootstrap.ranking(scores, truth)["auroc"]


def _share(
    flagged: Float[np.ndarray, "rows"], rows: Int[np.ndarray, "rows"], task: ProbeTask
) -> Interval | None:
    if len(rows) == 0:
        return None
    bootstrap = Bootstrap(len(rows), codes_of(task)[rows], boots=task.boots, seed=task.seed)
    return bootstrap.mean(flagged)


def _average(
    family: str,
    found: Sequence[Scored],
    task: ProbeTask,
    bootstrap: Bootstrap,
) -> SourceAverage:
    """Average over sources, with draws that the two ways of training share."""

    def mean(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> Callable[[Draws], np.ndarray]:
        def of(weights: Draws) -> Float[np.ndarray, "draws"]:
            areas = [
                auroc_of(scores, task.harmful[rows], weights[:, rows]) for rows, scores in parts
            ]
            return np.mean(areas, axis=0)

        return of

    out = mean([(one[3], one[2][task.test[one[1]]]) for one in found])
    within = mean([(one[3], one[4]) for one in found])
    averages = [bootstrap.measured(out), bootstrap.measured(within)]
    for i, key in enumerate(("on_test", "within")):
        if is_certain(averages[i]):
            averages[i] = combined([(1 / len(found), getattr(one[0], key)) for one in found])
    loss = bootstrap.measured(lambda weights: within(weights) - out(weights))
    if is_certain(loss):
        loss = combined([(1.0, averages[1]), (-1.0, averages[0])])
    return SourceAverage(family, len(found), averages[0], averages[1], loss)
