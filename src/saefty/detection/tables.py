"""The tables of a comparison of detectors, each once for people and once in full as CSV."""

from typing import Any

import numpy as np
from scipy.special import expit

from saefty.detection.comparison import Comparison, Detector
from saefty.detection.result import Detection
from saefty.metrics.intervals import Interval
from saefty.report import Column, Table

MAIN_COLUMNS = (
    Column("detector", "detector"),
    Column("read", "layer and pooling"),
    Column("inputs", "inputs", "d"),
    Column("auroc", "AUROC"),
    Column("auroc_low", "from"),
    Column("auroc_high", "to"),
    Column("average_precision", "average precision"),
    Column("f1", "F1"),
    Column("recall_at_1pct_fpr", "recall at 1 % FPR"),
    Column("ece", "ECE"),
    Column("ece_by_luck", "ECE by luck"),
    Column("brier", "Brier"),
    Column("p_holm_to_first", "p to first (Holm)"),
)
DETECTOR_COLUMNS = tuple(
    Column(key, key)
    for key in (
        "training", "detector", "name", "layer", "pooling", "k", "chosen", "inputs", "strength",
        "converged", "fold_log_loss",
        *(f"{measure}{end}" for measure in ("auroc", "average_precision", "f1",
          "recall_at_1pct_fpr", "brier") for end in ("", "_low", "_high")),
        "ece", "ece_by_luck", "threshold", "base_rate", "train_examples", "test_examples",
        "p_holm_to_first",
    )
)  # fmt: skip


def main_table(comparison: Comparison) -> Table:
    """Return the chosen detectors, the largest AUROC first."""
    return Table(MAIN_COLUMNS, tuple(_row(comparison, one) for one in comparison.main))


def detector_table(found: Detection) -> Table:
    """Return every candidate on every training set."""
    rows = [
        _row(comparison, one)
        for comparison in found.comparisons
        for one in sorted(comparison.detectors, key=lambda one: -one.auroc.estimate)
    ]
    return Table(DETECTOR_COLUMNS, tuple(rows))


def paired_table(found: Detection) -> Table:
    """Return every two chosen detectors on every training set."""
    rows = [
        {
            "training": comparison.training,
            "first": pair.first,
            "second": pair.second,
            **_ends("difference", pair.difference),
            "method": pair.difference.method,
            "p": pair.p,
            "p_holm": pair.p_holm,
            "told_apart": pair.told_apart,
        }
        for comparison in found.comparisons
        for pair in comparison.pairs
    ]
    columns = (
        Column("training", "training"),
        Column("first", "detector"),
        Column("second", "against"),
        Column("difference", "difference of AUROC", "+.3f"),
        Column("difference_low", "from", "+.3f"),
        Column("difference_high", "to", "+.3f"),
        Column("method", "method"),
        Column("p", "p", ".2g"),
        Column("p_holm", "p (Holm)", ".2g"),
        Column("told_apart", "told apart"),
    )
    return Table(columns, tuple(rows))


def source_table(found: Detection) -> Table:
    """Return what each detector does on each source that it did not learn from."""
    rows = [
        {
            "source": one.source,
            "detector": one.family,
            "chosen": one.chosen,
            "examples": one.examples,
            "harmful": one.harmful,
            **_ends("auroc", one.auroc),
            **_ends("auroc_on_test", one.on_test),
            **_ends("auroc_not_left_out", one.within),
            **_ends("recall_at_threshold", one.recall),
            **_ends("false_alarms_at_threshold", one.false_alarms),
        }
        for one in (found.left_out.results if found.left_out else ())
    ]
    rows += [
        {
            "source": f"mean of {one.sources}",
            "detector": one.family,
            **_ends("auroc_on_test", one.auroc),
            **_ends("auroc_not_left_out", one.within),
            **_ends("loss", one.loss),
        }
        for one in (found.left_out.averages if found.left_out else ())
    ]
    measures = ("auroc", "auroc_on_test", "auroc_not_left_out", "loss", "recall_at_threshold",
                "false_alarms_at_threshold")  # fmt: skip
    keys = (
        "source", "detector", "chosen", "examples", "harmful",
        *(f"{measure}{end}" for measure in measures for end in ("", "_low", "_high")),
    )  # fmt: skip
    return Table(tuple(Column(key, key) for key in keys), tuple(rows))


def average_table(found: Detection) -> Table:
    """Return leave-one-source-out in the mean, for people."""
    columns = (
        Column("detector", "detector"),
        Column("auroc", "AUROC, left out"),
        Column("auroc_low", "from"),
        Column("auroc_high", "to"),
        Column("within", "not left out"),
        Column("loss", "loss", "+.3f"),
        Column("loss_low", "from", "+.3f"),
        Column("loss_high", "to", "+.3f"),
    )
    averages = found.left_out.averages if found.left_out else ()
    rows = [
        {
            "detector": one.family,
            **_ends("auroc", one.auroc),
            "within": one.within.estimate,
            **_ends("loss", one.loss),
        }
        for one in sorted(averages, key=lambda one: -one.auroc.estimate)
    ]
    return Table(columns, tuple(rows))


def one_label_table(found: Detection) -> Table:
    """Return what is measured on sources that have one label, for people."""
    columns = (
        Column("source", "source"),
        Column("detector", "detector"),
        Column("measured", "measured"),
        Column("share", "share flagged"),
        Column("share_low", "from"),
        Column("share_high", "to"),
        Column("examples", "examples", "d"),
    )
    rows = []
    for one in found.left_out.results if found.left_out else ():
        if one.auroc is None:
            share = one.recall or one.false_alarms
            what = "recall (all are harmful)" if one.recall else "false alarms (all are harmless)"
            rows.append(
                {
                    "source": one.source,
                    "detector": one.family,
                    "measured": what,
                    **_ends("share", share),
                    "examples": one.examples,
                }
            )
    return Table(columns, tuple(rows))


def category_table(found: Detection) -> Table:
    """Return how each detector tells each category from all other examples."""
    rows = [
        {
            "category": one.category,
            "detector": one.family,
            "chosen": one.chosen,
            **_ends("auroc", one.auroc),
            **_ends("average_precision", one.average_precision),
            "base_rate": one.base_rate,
            "train_examples": one.train_examples,
            "test_examples": one.test_examples,
        }
        for one in found.rest
    ]
    keys = (
        "category", "detector", "chosen",
        *(f"{measure}{end}" for measure in ("auroc", "average_precision")
          for end in ("", "_low", "_high")),
        "base_rate", "train_examples", "test_examples",
    )  # fmt: skip
    return Table(tuple(Column(key, key) for key in keys), tuple(rows))


def score_table(found: Detection) -> Table:
    """Return what each chosen detector says of each test example, as a probability."""
    rows = []
    chances = {one.family: expit(one.probe.scores) for one in found.all.main}
    codes = found.data.sources
    for place, i in enumerate(np.flatnonzero(found.task.test).tolist()):
        rows.append(
            {
                "example_id": found.ids[i],
                "harmful": bool(found.data.harmful[i]),
                "source": found.sources[0 if codes is None else int(codes[i])],
                "category": found.categories[i],
                **{family: float(chance[place]) for family, chance in chances.items()},
            }
        )
    keys = ("example_id", "harmful", "source", "category", *chances)
    return Table(tuple(Column(key, key) for key in keys), tuple(rows))


def _row(comparison: Comparison, one: Detector) -> dict[str, Any]:
    candidate, probe, measured = one.candidate, one.probe, one.calibration
    first = comparison.main[0]
    pair = comparison.pair(first.family, one.family) if one.chosen else None
    return {
        "training": comparison.training,
        "detector": candidate.family,
        "name": candidate.name,
        "read": candidate.where,
        "layer": candidate.layer,
        "pooling": candidate.pooling,
        "k": candidate.k,
        "chosen": one.chosen,
        "inputs": probe.inputs,
        "strength": probe.strength,
        "converged": probe.converged,
        "fold_log_loss": one.fit.fold_loss,
        **_ends("auroc", probe.auroc),
        **_ends("average_precision", probe.average_precision),
        **_ends("recall_at_1pct_fpr", probe.recall_at_1pct_fpr),
        **_ends("f1", measured.f1),
        **_ends("brier", measured.brier),
        "ece": measured.ece,
        "ece_by_luck": measured.ece_by_luck,
        "threshold": measured.threshold,
        "base_rate": probe.base_rate,
        "train_examples": probe.examples[0],
        "test_examples": probe.examples[1],
        "p_holm_to_first": None if pair is None else pair.p_holm,
    }


def _ends(name: str, interval: Interval | None) -> dict[str, float]:
    if interval is None:
        return {}
    return {
        name: interval.estimate,
        f"{name}_low": interval.low,
        f"{name}_high": interval.high,
    }
