"""What is told of a saved detector: its thresholds and rates, counted by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from saefty.baselines import Labelled
from saefty.detection.comparison import compare, f1_threshold, threshold_1pct
from saefty.detection.generalisation import LeftOut, SourceResult
from saefty.detection.inputs import Candidate
from saefty.detection.result import Detection
from saefty.detection.saving import save_detector
from saefty.guards.files import read_guard
from saefty.guards.spec import GuardModel
from saefty.metrics.intervals import Interval
from saefty.probes import ProbeTask, standardise
from saefty.reading import ReadingSection
from saefty.records import Example, Site

TRAIN = 320
HARMFUL = np.array([i % 2 == 0 for i in range(TRAIN)] + [True] * 4 + [False] * 4)
TESTED = np.arange(len(HARMFUL)) >= TRAIN
SCORES = np.array([5.0, 2.0, 0.25, -1.0, 2.0, 0.25, -1.0, -5.0])
"""Planted scores of the 8 test examples: four harmful ones, then four harmless ones."""
AREA = Interval(0.7, 0.6, 0.8, "by hand", 9)


@pytest.fixture(scope="module")
def found():
    """A comparison of one detector of activations, on examples of two sources."""
    x = np.random.default_rng(0).normal(size=(len(HARMFUL), 3))
    x[:, 0] += 2 * HARMFUL
    task = ProbeTask(HARMFUL, ~TESTED, TESTED, boots=100)
    candidate = Candidate("dense activations", x, standardise, layer=1, pooling="mean")
    comparison = compare([candidate], task, "all", permutations=100)
    rows = np.arange(len(HARMFUL))
    texts = tuple(f"text {i}" for i in rows)
    data = Labelled(rows, texts, HARMFUL, None, rows % 2, len(rows))
    ids = [str(i) for i in rows]
    nobody = [None] * len(rows)
    return Detection(
        data, ids, nobody, ["a", "b"], task, (comparison,), None, (), (), (), {1: 0}
    )  # fmt: skip


def with_held_out(found, held_out):
    """Return the detector as if its folds had given these scores, and its test `SCORES`."""
    one = found.all.detectors[0]
    fit = replace(one.fit, held_out=held_out)
    least = f1_threshold(fit, HARMFUL[~TESTED])
    return replace(
        one,
        fit=fit,
        probe=replace(one.probe, scores=SCORES),
        calibration=replace(one.calibration, threshold=least),
    )


def saved(folder, found, detector):
    """Save the detector and read it again."""
    examples = [
        Example(one, text, raw=True) for one, text in zip(found.ids, found.data.texts, strict=True)
    ]
    save_detector(
        folder, found, detector, examples=examples, reading=ReadingSection(),
        model=GuardModel("a model", 3), site=Site(1), signed=False, sae=None, data={},
        run=Path("run"),
    )  # fmt: skip
    return read_guard(folder)


def test_the_rates_at_each_threshold_are_counts_of_the_test_examples(found, tmp_path):
    harmful = HARMFUL[~TESTED]
    # Harmful from 1 to 3, harmless from -3 to 0, and two of these 160 at 2: the best F1 lies
    # midway, and more than 1 % of the harmless examples above it.
    held_out = np.where(harmful, np.linspace(1, 3, TRAIN), np.linspace(-3, 0, TRAIN))
    held_out[[1, 3]] = 2.0
    guard = saved(tmp_path / "guard", found, with_held_out(found, held_out))
    assert guard.spec.threshold == 0.5
    assert guard.spec.threshold_1pct == pytest.approx(2.0, abs=1e-9)
    assert guard.spec.threshold_1pct > 2.0  # one of 160 may be flagged, and two lie at 2
    by_default, by_few = guard.facts.rates["default"], guard.facts.rates["fpr_1pct"]
    assert by_default["recall"].estimate == 2 / 4  # 5 and 2
    assert by_default["false_positive_rate"].estimate == 1 / 4  # 2
    assert by_few["recall"].estimate == 1 / 4  # 5
    assert by_few["false_positive_rate"].estimate == 0.0
    assert by_default["recall"].method == "Wilson over 4 examples"
    assert (guard.facts.tested, guard.facts.tested_harmful) == (8, 4)
    assert guard.facts.sources == {"a": 164, "b": 164}


@pytest.mark.parametrize("apart", [0.5, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_few_false_alarms_never_flag_more_than_the_default(apart, seed, found, tmp_path):
    harmful = HARMFUL[~TESTED]
    held_out = np.random.default_rng(seed).normal(size=TRAIN) + apart * harmful
    detector = with_held_out(found, held_out)
    spec = saved(tmp_path / "guard", found, detector).spec
    assert spec.threshold == f1_threshold(detector.fit, harmful)
    assert spec.threshold_1pct >= spec.threshold
    assert (held_out[~harmful] >= spec.threshold_1pct).mean() <= 0.01
    if apart == 8.0:  # told apart without an error: 1 % alone would lie among the harmless ones
        assert threshold_1pct(detector.fit, harmful) < spec.threshold == spec.threshold_1pct


def test_with_few_harmless_examples_there_is_no_threshold_of_one_in_a_hundred(found, tmp_path):
    harmful = HARMFUL[~TESTED]
    held_out = np.where(harmful, 1.0, -1.0)
    held_out[np.flatnonzero(~harmful)[99:]] = np.nan
    guard = saved(tmp_path / "guard", found, with_held_out(found, held_out))
    assert guard.spec.threshold_1pct is None
    assert set(guard.facts.rates) == {"default"}


def test_detectors_chosen_without_a_source_are_named_where_they_are_others(found, tmp_path):
    detector = found.all.detectors[0]
    name, other = detector.candidate.name, "dense activations, layer 0, last token"

    def result(source, chosen, family="dense activations", auroc=AREA):
        return SourceResult(source, family, chosen, 9, 4, auroc, None, None, None, None)

    def facts_with(folder, *results):
        whole = replace(found, left_out=LeftOut(results))
        return saved(tmp_path / folder, whole, detector).facts

    same = facts_with("same", result("a", name), result("b", name))
    assert same.left_out == {"a": AREA, "b": AREA}
    assert same.left_out_by == ()
    mixed = facts_with(
        "mixed", result("a", name), result("b", other), result("c", "x", auroc=None),
        result("a", "words", "bag of words"),
    )  # fmt: skip
    assert mixed.left_out == {"a": AREA, "b": AREA}
    assert mixed.left_out_by == tuple(sorted((name, other)))
