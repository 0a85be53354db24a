"""The report of a comparison of detectors: the sentence first, then the tables it rests on."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from saefty.detection.comparison import (
    EXCHANGES_A_PAIR,
    LEAST_FOR_1PCT,
    Comparison,
    Detector,
)
from saefty.detection.inputs import DENSE, LATENTS, RANDOM, WORDS
from saefty.detection.result import Detection
from saefty.detection.sentence import honest_sentence, not_told_apart
from saefty.detection.tables import (
    average_table,
    category_table,
    detector_table,
    main_table,
    one_label_table,
    paired_table,
    score_table,
    source_table,
)
from saefty.metrics.calibration import BINS
from saefty.plots.base import save_plot
from saefty.plots.categories import Categories
from saefty.plots.detectors import Detectors
from saefty.plots.left_out_sources import LeftOutSources
from saefty.plots.reliability import Reliability
from saefty.probes import FOLDS, STRENGTHS
from saefty.report import Column, Section, Table, plain, write_report

DRAWN_BY_SOURCE = (LATENTS, DENSE, WORDS, RANDOM)


def write_detection_report(folder: Path, found: Detection) -> dict[str, Any]:
    """Write summary.md, summary.json, the tables as CSV and the pictures.

    Args:
        folder: The run's folder.
        found: What the comparison found out.

    Returns:
        The figures of summary.json, as JSON values.
    """
    figures = _figures(found)
    sections = [_detectors(folder, found), _reliability(folder, found)]
    sections += _sources(folder, found)
    sections += _categories(folder, found)
    if found.leaks:
        lines = "\n".join(f"- **{leak.name}**: {leak.message}" for leak in found.leaks)
        sections.append(Section("Warnings about the data", lines))
    sections.append(Section("How it was measured", _method(found)))
    write_report(
        folder,
        title="Detectors of harm on different inputs",
        lead=honest_sentence(found),
        sections=sections,
        figures=figures,
        tables={
            "detectors": detector_table(found),
            "paired": paired_table(found),
            "by_source": source_table(found),
            "by_category": category_table(found),
            "scores": score_table(found),
        },
    )
    values = plain(figures)
    assert isinstance(values, dict)
    return values


def _detectors(folder: Path, found: Detection) -> Section:
    main, balanced = found.all.main, found.balanced
    alike = not_told_apart(found.all)
    data = Detectors(
        names=tuple(one.family for one in main),
        auroc=tuple(one.auroc for one in main),
        balanced=None if balanced is None else tuple(_auroc(balanced, one) for one in main),
        told_apart=tuple(one.family not in alike and one is not main[0] for one in main),
        tested=int(found.task.test.sum()),
    )
    path = save_plot("detectors", data, folder / "figures" / "detectors.png", size=data.size)
    text = f"The largest AUROC on the test is that of **{main[0].family}**. " + (
        f"Not told apart from it: {', '.join(alike)}."
        if alike
        else "All others are worse beyond luck."
    )
    if found.saved is not None:
        text += (
            f" The detector that was saved as a guard is **{found.saved.candidate.name}**, "
            "which learnt on the training side alone."
        )
    return Section(
        f"Detectors on held-out {'examples' if found.data.clusters is None else 'prompt groups'}",
        text,
        table=main_table(found.all),
        figure=str(path.relative_to(folder)),
        caption="AUROC of each detector with its 95 % interval; the dashed line is chance.",
    )


def _auroc(comparison: Comparison, one: Detector) -> Any:
    other = comparison.of(one.family)
    assert other is not None  # the same inputs on every training set
    return other.auroc


def _reliability(folder: Path, found: Detection) -> Section:
    main = found.all.main
    data = Reliability(tuple(one.family for one in main), tuple(one.calibration for one in main))
    path = save_plot("reliability", data, folder / "figures" / "reliability.png", size=data.size)
    return Section(
        "Do the probabilities mean what they say",
        f"ECE is the mean distance between predicted and observed over {BINS} bins of equal mass "
        "(as many test examples in each; equal probabilities never parted). *luck* is the ECE that "
        "probabilities which are right would have on as many examples. A detector that learnt on a "
        "balanced subset presumes as much harm as harmlessness.",
        figure=str(path.relative_to(folder)),
        caption="Observed share of harmful examples against predicted probability.",
    )


def _sources(folder: Path, found: Detection) -> list[Section]:
    if found.left_out is None:
        return []
    title = "Sources left out of training"
    if len(found.sources) < 2:
        return [
            Section(
                title,
                "All examples come from one source. Set data.source, or mix datasets, to measure "
                "what a detector loses on a source that it did not learn from.",
            )
        ]
    sections = []
    results = {(one.source, one.family): one for one in found.left_out.results}
    measured = tuple(dict.fromkeys(one.source for one in found.left_out.results))
    families = tuple(name for name in DRAWN_BY_SOURCE if found.all.of(name) is not None)
    if measured:
        data = LeftOutSources(
            measured,
            families,
            tuple(tuple(results[s, f].auroc for s in measured) for f in families),
            tuple(tuple(results[s, f].within for s in measured) for f in families),
        )
        path = save_plot(
            "left_out_sources", data, folder / "figures" / "by_source.png", size=data.size
        )
        sections.append(
            Section(
                title,
                "Each source is judged by detectors that learnt on the other ones, choices of "
                "layer, pooling, penalty and threshold included; prompt groups that span sources "
                "are left out of their training. *Loss* compares with the detectors above on the "
                "same examples: those of the source that are in the test, in the mean over the "
                "sources that have both labels there.",
                table=average_table(found),
                figure=str(path.relative_to(folder)),
                caption="AUROC on each source, left out of training (filled; all its examples) "
                "and not (hollow; those in the test).",
            )
        )
        one_label = one_label_table(found)
        if one_label.rows:
            sections.append(
                Section(
                    "Sources with one label",
                    "They have no ROC curve; what is flagged at the threshold that was chosen in "
                    "training is measured instead.",
                    table=one_label,
                )
            )
    if found.left_out.skipped:
        sections.append(
            Section(
                "Sources that could not be left out",
                "What is left without them is too little to learn from.",
                table=_reasons("source", found.left_out.skipped),
            )
        )
    return sections


def _categories(folder: Path, found: Detection) -> list[Section]:
    sections = []
    if found.rest:
        names = tuple(dict.fromkeys(one.category for one in found.rest))
        families = tuple(one.family for one in found.all.main)
        areas = {(one.category, one.family): one.auroc.estimate for one in found.rest}
        tested = {one.category: one.test_examples for one in found.rest}
        data = Categories(
            names,
            families,
            np.array([[areas[c, f] for f in families] for c in names]),
            tuple(tested[c] for c in names),
        )
        path = save_plot("categories", data, folder / "figures" / "by_category.png", size=data.size)
        sections.append(
            Section(
                "Each category against all other examples",
                "The label is the category, whether harmful or not. The split is the same; layer, "
                "pooling, penalty and weights are chosen and learnt anew for each. Average "
                "precision and intervals stand in `by_category.csv`.",
                figure=str(path.relative_to(folder)),
                caption="AUROC of each category against the rest; 0.5 is chance.",
            )
        )
    if found.rest_left_out:
        n = len(found.rest_left_out)
        sections.append(
            Section(
                "Categories that were left out",
                f"{n} {'category was' if n == 1 else 'categories were'} not told from the rest: "
                "too few prompt groups on a side of the split, too far down the list, or, of two "
                "categories, the second, which is the rest of the first.",
                table=_reasons("category", found.rest_left_out[:50]),
            )
        )
    return sections


def _reasons(what: str, reasons: Sequence[tuple[str, str]]) -> Table:
    rows = tuple({what: name, "why": why} for name, why in reasons)
    return Table((Column(what, what), Column("why", "why")), rows)


def _method(found: Detection) -> str:
    task, data = found.task, found.data
    grouped = (
        "whole prompt groups are kept together"
        if data.clusters is not None
        else "every example stands alone (set data.group to keep variants of a prompt together)"
    )
    n = len(found.all.pairs)
    strengths = ", ".join(f"{one:g}" for one in STRENGTHS)
    balanced = (
        "The training side is (nearly) balanced already, so there is no balanced subset beside it."
        if found.balanced is None
        else f"The balanced subset holds {int(found.balanced.train.sum())} of them, "
        f"{int(data.harmful[found.balanced.train].sum())} harmful, and is judged on the same test."
    )
    unit = "examples" if data.clusters is None else "whole prompt groups"
    harmless = int((task.test & ~data.harmful).sum())
    few = (
        f" The test holds {harmless} harmless examples, fewer than {LEAST_FOR_1PCT}: recall at 1 % "
        "FPR is the recall without a single false alarm."
        if harmless < LEAST_FOR_1PCT
        else ""
    )
    return (
        f"{len(data.harmful)} labelled examples, {int(data.harmful.sum())} of them harmful, were "
        f"split into {int(task.train.sum())} to learn from and {int(task.test.sum())} to judge on; "
        f"{grouped}. {balanced} Every input is read by logistic regression with an L2 penalty, its "
        f"C chosen from {strengths} by the log loss on {FOLDS} folds of the training side (the "
        "same folds for all), in which vocabulary, scales and the k latents are learnt anew. By "
        "the same loss one layer and pooling of each kind of input was chosen; `detectors.csv` "
        "holds the others too. The threshold of F1 is the best on training examples that were left "
        "out of a fold. The test chose nothing of this; it only puts the detectors in order, so "
        "that the AUROC of the first of several close ones is a little too high. Intervals are "
        "95 %, by a bootstrap that "
        f"draws {unit} (by Wilson's or Newcombe's formula where all draws are alike); pairs are "
        f"tested by exchanging detectors of {unit}, at least {EXCHANGES_A_PAIR} times a pair, "
        f"with Holm's correction for the {n} pairs of a training set. The random SAE has the "
        "trained one's width, and its mean L0 on the training side."
        f"{few}"
    )


def _figures(found: Detection) -> dict[str, Any]:
    return {
        "sentence": honest_sentence(found),
        "examples": len(found.data.harmful),
        "harmful": int(found.data.harmful.sum()),
        "train_examples": int(found.task.train.sum()),
        "test_examples": int(found.task.test.sum()),
        "sources": list(found.sources),
        "d_sae": {str(layer): width for layer, width in found.d_sae.items()},
        "seed": found.task.seed,
        "winner": found.all.main[0].family,
        "not_told_apart_from_winner": not_told_apart(found.all),
        "detectors": {
            comparison.training: [_detector(one) for one in comparison.main]
            for comparison in found.comparisons
        },
        "paired": {comparison.training: comparison.pairs for comparison in found.comparisons},
        "left_out_sources": found.left_out,
        "categories": found.rest,
        "categories_left_out": [
            {"category": name, "why": why} for name, why in found.rest_left_out
        ],
        "leaks": found.leaks,
        "saved": None if found.saved is None else found.saved.candidate.name,
    }


def _detector(one: Detector) -> dict[str, Any]:
    probe = one.probe
    return {
        "detector": one.family,
        "name": one.candidate.name,
        "inputs": probe.inputs,
        "strength": probe.strength,
        "converged": probe.converged,
        "fold_log_loss": one.fit.fold_loss,
        "auroc": probe.auroc,
        "average_precision": probe.average_precision,
        "recall_at_1pct_fpr": probe.recall_at_1pct_fpr,
        "calibration": one.calibration,
    }
