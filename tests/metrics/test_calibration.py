import numpy as np
import pytest
from scipy.special import logit
from sklearn.metrics import brier_score_loss, f1_score

from saefty.metrics.calibration import (
    best_f1_threshold,
    calibration,
    equal_mass_bins,
    reliability,
)
from saefty.metrics.intervals import Bootstrap

P = np.array([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9])
Y = np.array([False, False, True, False, True, False, True, True])


def measured(p, y, threshold=0.0, bins=4, boots=200):
    return calibration(logit(p), y, threshold, Bootstrap(len(p), boots=boots), bins=bins)


def test_the_calibration_error_of_eight_rows_equals_the_same_by_hand():
    # Bins {.1 .2} {.3 .4} {.6 .7} {.8 .9}: means .15 .35 .65 .85, observed 0 .5 .5 1.
    expected = 0.25 * (0.15 + 0.15 + 0.15 + 0.15)
    assert measured(P, Y).ece == pytest.approx(expected)


def test_bins_hold_as_many_examples_each_and_never_part_equal_values():
    assert equal_mass_bins(P, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert equal_mass_bins(np.array([0.5, 0.5, 0.5, 0.9]), 2).tolist() == [0, 0, 0, 1]
    assert len(set(equal_mass_bins(np.full(50, 0.3)).tolist())) == 1


def test_the_order_of_examples_does_not_matter():
    rng = np.random.default_rng(0)
    p, order = rng.integers(0, 5, 60) / 5 + 0.1, rng.permutation(60)
    y = rng.random(60) < p
    assert measured(p, y).ece == pytest.approx(measured(p[order], y[order]).ece)


def test_brier_and_f1_equal_scikit_learns():
    rng = np.random.default_rng(1)
    p = rng.uniform(0.01, 0.99, 300)
    y = rng.random(300) < p
    found = measured(p, y, threshold=float(logit(0.4)))
    assert found.brier.estimate == pytest.approx(brier_score_loss(y, p))
    assert found.f1.estimate == pytest.approx(f1_score(y, p >= 0.4))
    assert found.f1.low < found.f1.estimate < found.f1.high


@pytest.mark.parametrize("variants", [1, 5])
def test_the_calibration_error_by_luck_is_what_simulated_right_probabilities_have(variants):
    """Probabilities that are right, labels that all variants of a prompt share, 400 times."""
    rng = np.random.default_rng(2)
    prompts = 200 // variants
    clusters = np.repeat(np.arange(prompts), variants)
    p = rng.uniform(0.05, 0.95, prompts)[clusters]
    place = equal_mass_bins(p)
    errors = []
    for _ in range(400):
        miss = p - (rng.random(prompts)[clusters] < p)
        errors.append(sum(abs(miss[place == b].sum()) for b in range(10)) / 200)
    y = rng.random(prompts)[clusters] < p
    found = calibration(logit(p), y, 0.0, Bootstrap(200, clusters, boots=2))
    assert found.ece_by_luck == pytest.approx(np.mean(errors), rel=0.06)
    apart = calibration(logit(p), y, 0.0, Bootstrap(200, boots=2))
    assert (apart.ece_by_luck < 0.6 * np.mean(errors)) == (variants == 5)


def test_clusters_of_both_labels_are_as_many_chances_as_they_have_examples():
    rng = np.random.default_rng(4)
    p = rng.uniform(0.2, 0.8, 200)
    y = np.arange(200) % 2 == 0
    pairs, alone = (
        calibration(logit(p), y, 0.0, Bootstrap(200, codes, boots=2)).ece_by_luck
        for codes in (np.arange(200) // 2, None)
    )
    assert pairs == pytest.approx(alone, rel=0.04)


def test_what_luck_alone_makes_of_the_calibration_error_is_the_mean_of_a_binomial():
    # One bin of 100 rows at ½: E|mean - ½| = √(¼/100) √(2/π), nearly.
    found = measured(np.full(100, 0.5), np.arange(100) % 2 == 0)
    assert found.ece_by_luck == pytest.approx(0.05 * np.sqrt(2 / np.pi), abs=0.006)
    assert found.ece == 0.0


def test_the_bins_of_the_picture_hold_every_example_once():
    bins = reliability(P, Y, equal_mass_bins(P, 3))
    assert sum(one.examples for one in bins) == 8
    assert sum(one.observed * one.examples for one in bins) == pytest.approx(Y.sum())


def test_the_threshold_of_f1_is_the_best_of_all_that_could_be_chosen():
    rng = np.random.default_rng(3)
    for _ in range(20):
        scores = rng.integers(-4, 5, 30) / 2.0
        y = rng.random(30) < 0.4
        y[0] = True
        chosen = best_f1_threshold(scores, y)
        best = max(f1_score(y, scores >= t) for t in np.unique(scores))
        assert f1_score(y, scores >= chosen) == pytest.approx(best)


def test_the_threshold_lies_in_the_middle_between_two_scores():
    assert best_f1_threshold(np.array([0.0, 1.0, 3.0]), np.array([False, False, True])) == 2.0


def test_an_f1_without_an_error_is_not_certain():
    harmful = np.arange(40) < 20
    found = calibration(np.where(harmful, 3.0, -3.0), harmful, 0.0, Bootstrap(40)).f1
    assert found.estimate == found.high == 1.0
    assert found.low == pytest.approx(20 / (20 + 1.959964**2), abs=1e-6)
