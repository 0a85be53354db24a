"""The detector that is saved as a guard: which one, what it reads, and what is known of it.

What is saved is what was measured: it learnt on the training side alone, and its figures are those
of the test side.
"""

import csv
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from jaxtyping import Bool

from saefty.detection.comparison import Detector, codes_of, threshold_1pct
from saefty.detection.generalisation import LeftOut, SourceResult
from saefty.detection.inputs import DENSE, RANDOM, WORDS, Candidate
from saefty.detection.result import Detection
from saefty.errors import ConfigError, MismatchError
from saefty.guards.files import save_guard
from saefty.guards.spec import DEFAULT, FPR_1PCT, GuardFacts, GuardModel, GuardSpec, reading_of
from saefty.linear import Linear
from saefty.metrics.intervals import Bootstrap, Interval
from saefty.reading import ReadingSection
from saefty.records import Example, Site
from saefty.saes.base import SparseAutoencoder


@dataclass(frozen=True)
class MeasuredDetector:
    """A detector of a finished comparison, as its tables tell of it.

    Attributes:
        name: Of the candidate.
        family: What kind of input it reads.
        fold_loss: Its loss on the training folds.
        auroc: On the test examples.
        left_out: The sources that it did not learn from.
    """

    name: str
    family: str
    fold_loss: float
    auroc: float
    left_out: LeftOut

    @classmethod
    def read(cls, folder: Path, figures: Mapping[str, Any], name: str | None) -> "MeasuredDetector":
        """Find the detector that `detector_to_save` would take in a finished run's folder.

        Raises:
            ConfigError: If there is none of that name.
        """
        with open(folder / "detectors.csv", newline="", encoding="utf-8") as file:
            rows = [
                row
                for row in csv.DictReader(file)
                if row["training"] == "all" and row["detector"] != RANDOM
            ]
        chosen = [row for row in rows if row["chosen"] == "true"]
        if name is not None:
            exact = [row for row in rows if row["name"] == name]
            chosen = exact or [row for row in chosen if row["detector"] == name]
        if not chosen:
            refuse_name(str(name), [row["detector"] for row in rows])
        row = min(chosen, key=lambda one: float(one["fold_log_loss"]))
        results = (figures["left_out_sources"] or {}).get("results", ())
        ours = [one for one in results if one["family"] == row["detector"] and one["auroc"]]
        return cls(
            name=row["name"],
            family=row["detector"],
            fold_loss=float(row["fold_log_loss"]),
            auroc=float(row["auroc"]),
            left_out=LeftOut(tuple(_source_result(one) for one in ours)),
        )

    def check(self, detector: Detector, folder: Path) -> None:
        """Refuse what did not come out as it was measured.

        Raises:
            MismatchError: If its loss or its AUROC is another one.
        """
        now = (detector.fit.fold_loss, detector.auroc.estimate)
        if not np.allclose(now, (self.fold_loss, self.auroc), rtol=1e-4, atol=1e-5):
            raise MismatchError(
                f"{self.name}, fitted again, is not what {folder} measured: loss {now[0]:.6f} "
                f"instead of {self.fold_loss:.6f}, AUROC {now[1]:.6f} instead of {self.auroc:.6f}.",
                safe="No guard was written; the run is unchanged.",
                then="Set run.dir to a new folder, with probe.save from the start.",
            )


def _source_result(values: Mapping[str, Any]) -> SourceResult:
    measures = ("auroc", "on_test", "within", "recall", "false_alarms")
    intervals = {
        key: None if values.get(key) is None else Interval(**values[key]) for key in measures
    }
    return SourceResult(**{**values, **intervals})


def check_name(name: str | None, candidates: Sequence[Candidate]) -> None:
    """Refuse a detector that is not among the inputs, or cannot be saved.

    Raises:
        ConfigError: If it is none of them, or a random SAE.
    """
    if name is None:
        return
    known = dict.fromkeys(one.family for one in candidates if one.family != RANDOM)
    if any(name in (one.family, one.name) and one.family != RANDOM for one in candidates):
        return
    refuse_name(name, list(known))


def refuse_name(name: str, known: Sequence[str]) -> NoReturn:
    """Say that there is no detector of that name to save.

    Raises:
        ConfigError: Always.
    """
    what = (
        "a random SAE is a control, which is not saved"
        if name.startswith(RANDOM)
        else f"there is no detector {name!r}"
    )
    raise ConfigError(
        f"probe.save_detector: {what}.",
        then=f"Name one of {', '.join(dict.fromkeys(known))}, or leave it out: then the one with "
        "the least loss on folds of the training side is saved.",
    )


def detector_to_save(found: Detection, name: str | None) -> Detector:
    """Return the detector of that name, or the one with the least loss on the training folds.

    Detectors that learnt on all training examples; never a random SAE.
    """
    able = [one for one in found.all.detectors if one.family != RANDOM]
    if name is not None:
        named = [one for one in able if name in (one.candidate.name, one.family)]
        exact = [one for one in named if one.candidate.name == name]
        return (exact or [one for one in named if one.chosen])[0]
    return min((one for one in able if one.chosen), key=lambda one: one.fit.fold_loss)


def save_detector(
    folder: Path,
    found: Detection,
    detector: Detector,
    *,
    examples: Sequence[Example],
    reading: ReadingSection,
    model: GuardModel | None,
    site: Site | None,
    signed: bool,
    sae: SparseAutoencoder | None,
    data: dict[str, Any],
    run: Path,
) -> Path:
    """Write a detector as a guard.

    Args:
        folder: Where to.
        found: What the comparison found out.
        detector: One of its detectors.
        examples: The examples it was fitted and judged on.
        reading: How they were read.
        model: The model, of a detector that reads one.
        site: Where that is read.
        signed: Whether the SAE's latents keep their sign.
        sae: The SAE, of a detector that reads latents.
        data: Fingerprint of the examples.
        run: The run that it comes from.
    """
    candidate = detector.candidate
    labels = found.data.harmful[found.task.train]
    linear = detector.fit.linear
    vocabulary: tuple[str, ...] = ()
    if candidate.family == WORDS:
        linear, vocabulary = _words_read(linear, candidate.vocabulary)
    thresholds = _thresholds(detector, labels)
    reads = {WORDS: "words", DENSE: "dense"}.get(candidate.family, "latents")
    spec = GuardSpec(
        reads=reads,  # type: ignore[arg-type]  # one of the three
        threshold=thresholds[DEFAULT],
        threshold_1pct=thresholds.get(FPR_1PCT),
        vocabulary=vocabulary,
        model=model,
        site=site,
        pooling=candidate.pooling,
        signed=signed,
        tokens=reading.tokens,
        truncate=reading.truncate,
        **reading_of(examples),
    )
    fitted_on = [examples[i] for i in np.flatnonzero(found.task.train).tolist()]
    return save_guard(folder, spec, linear, _facts(found, detector, data, run), sae, fitted_on)


def _words_read(linear: Linear, vocabulary: Sequence[str]) -> tuple[Linear, tuple[str, ...]]:
    """Leave words out that stand in the test side alone: nothing was learnt of them."""
    words = tuple(vocabulary[i] for i in linear.columns)
    return replace(linear, columns=np.arange(len(words)), width=len(words)), words


def _thresholds(detector: Detector, labels: Bool[np.ndarray, "train"]) -> dict[str, float]:
    """Return the thresholds by name; who asks for few false alarms never gets a lower one.

    Where the detector tells the folds apart well, the threshold of 1 % may lie below that of the
    best F1.
    """
    default = detector.calibration.threshold
    least = threshold_1pct(detector.fit, labels)
    return {DEFAULT: default} | ({} if least is None else {FPR_1PCT: max(least, default)})


def _rates(found: Detection, detector: Detector) -> dict[str, dict[str, Interval]]:
    """Return how many of the test examples each threshold flags, of each kind."""
    task = found.task
    truth = task.harmful[task.test]
    codes = codes_of(task)[task.test]
    bootstrap = Bootstrap(len(truth), codes, boots=task.boots, seed=task.seed)
    rates = {}
    for name, least in _thresholds(detector, found.data.harmful[task.train]).items():
        flagged = (detector.probe.scores >= least).astype(float)
        rates[name] = {
            "recall": bootstrap.mean(np.where(truth, flagged, np.nan)),
            "false_positive_rate": bootstrap.mean(np.where(truth, np.nan, flagged)),
        }
    return rates


def _facts(found: Detection, detector: Detector, data: dict[str, Any], run: Path) -> GuardFacts:
    probe, task = detector.probe, found.task
    codes = found.data.sources
    names = [found.sources[0 if codes is None else int(codes[i])] for i in range(len(found.ids))]
    results = found.left_out.results if found.left_out else ()
    measured = [one for one in results if one.family == detector.family and one.auroc is not None]
    left_out = {one.source: one.auroc for one in measured if one.auroc is not None}
    others = {one.chosen for one in measured}
    return GuardFacts(
        probe=detector.candidate.name,
        examples=int(task.train.sum()),
        harmful=int(task.harmful[task.train].sum()),
        tested=int(task.test.sum()),
        tested_harmful=int(task.harmful[task.test].sum()),
        auroc=probe.auroc,
        recall_at_1pct_fpr=None
        if math.isnan(probe.recall_at_1pct_fpr.estimate)
        else probe.recall_at_1pct_fpr,
        rates=_rates(found, detector),
        sources=dict(Counter(names)),
        left_out=left_out,
        left_out_by=() if others <= {detector.candidate.name} else tuple(sorted(others)),
        data=data,
        run=str(run),
    )
