from itertools import product

import numpy as np
import pytest
from scipy.stats import norm, rankdata
from sklearn.metrics import roc_auc_score

from saefty.metrics.intervals import Bootstrap, Interval
from saefty.metrics.paired import combined, difference_interval, paired_auroc, swap_p


def two_detectors(n=60, seed=0, gain=(1.0, 0.4)):
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2 == 0
    common = rng.normal(size=n)
    first, second = (common + rng.normal(size=n) + one * y for one in gain)
    return first, second, y


def test_the_difference_equals_scikit_learns_and_its_draws_those_of_repeated_rows():
    first, second, y = two_detectors()
    clusters = np.arange(60) // 3
    bootstrap = Bootstrap(60, clusters, boots=200)
    found = difference_interval(first, second, y, bootstrap)
    assert found.estimate == pytest.approx(roc_auc_score(y, first) - roc_auc_score(y, second))
    draws = []
    for weights in bootstrap.weights:
        rows = np.repeat(np.arange(60), weights.astype(int))
        if len(set(y[rows])) == 2:
            areas = [roc_auc_score(y[rows], one[rows]) for one in (first, second)]
            draws.append(areas[0] - areas[1])
    np.testing.assert_allclose((found.low, found.high), np.quantile(draws, [0.025, 0.975]))


def exhaustive_p(first, second, y, clusters):
    """Exchange every subset of clusters, by hand."""
    ranks = [rankdata(first), rankdata(second)]
    observed = abs(roc_auc_score(y, ranks[0]) - roc_auc_score(y, ranks[1]))
    codes = np.unique(clusters)
    as_large = 0
    for chosen in product((False, True), repeat=len(codes)):
        swap = np.isin(clusters, codes[list(chosen)])
        areas = [roc_auc_score(y, np.where(swap, ranks[i], ranks[1 - i])) for i in (0, 1)]
        as_large += abs(areas[0] - areas[1]) >= observed - 1e-10
    return as_large / 2 ** len(codes)


def test_the_permutation_p_equals_that_of_all_exchanges():
    first, second, y = two_detectors(24, seed=3)
    clusters = np.arange(24) // 3
    expected = exhaustive_p(first, second, y, clusters)
    assert 0.02 < expected < 0.9
    found = swap_p(first, second, y, clusters, permutations=20_000)
    assert found == pytest.approx(expected, abs=0.015)


def delong_p(first, second, y):
    """DeLong, DeLong and Clarke-Pearson (1988), with loops."""
    kernels = []
    for scores in (first, second):
        kernel = np.array(
            [[(a > b) + 0.5 * (a == b) for b in scores[~y]] for a in scores[y]], dtype=float
        )
        kernels.append(kernel)
    rows = np.array([kernel.mean(axis=1) for kernel in kernels])
    columns = np.array([kernel.mean(axis=0) for kernel in kernels])
    covariance = np.cov(rows) / y.sum() + np.cov(columns) / (~y).sum()
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    return 2 * norm.sf(abs(rows[0].mean() - rows[1].mean()) / np.sqrt(variance))


@pytest.mark.parametrize("seed", range(4))
def test_for_independent_rows_the_p_is_close_to_delongs(seed):
    first, second, y = two_detectors(200, seed=seed, gain=(1.0, 0.7))
    found = swap_p(first, second, y, permutations=4000)
    assert found == pytest.approx(delong_p(first, second, y), abs=0.05)


def test_detectors_that_are_alike_are_told_apart_no_more_often_than_promised():
    rng = np.random.default_rng(5)
    clusters = np.arange(80) // 4
    claims = 0
    for seed in range(100):
        y = np.repeat(rng.random(20) < 0.5, 4)
        if y.all() or not y.any():
            continue
        shared = np.repeat(rng.normal(size=(2, 20)), 4, axis=1)
        first, second = shared + 0.3 * rng.normal(size=(2, 80)) + y
        claims += swap_p(first, second, y, clusters, permutations=200, seed=seed) <= 0.05
    assert claims <= 11  # binomial(100, 0.05) lies above with probability 0.004


def test_a_detector_is_not_told_apart_from_itself_in_another_unit():
    first, _, y = two_detectors()
    found = paired_auroc(first, 10 * first + 3, y, boots=100, permutations=100)
    assert (found.difference.estimate, found.difference.low, found.difference.high) == (0, 0, 0)
    assert found.p == 1.0


def test_two_detectors_without_an_error_are_not_called_equal():
    y = np.arange(40) % 2 == 0
    rng = np.random.default_rng(7)
    first, second = rng.random((2, 40)) + 2 * y
    found = paired_auroc(first, second, y, boots=100, permutations=100)
    one = Bootstrap(40).ranking(first, y)["auroc"]
    assert found.difference.estimate == 0.0
    assert found.difference.high == pytest.approx(1 - one.low)
    assert found.difference.low == pytest.approx(one.low - 1)


def test_intervals_are_put_together_by_hand():
    a, b = Interval(0.9, 0.8, 0.95, "", 10), Interval(0.7, 0.6, 0.82, "", 8)
    found = combined([(1.0, a), (-1.0, b)])
    assert found.estimate == pytest.approx(0.2)
    assert found.low == pytest.approx(0.2 - np.hypot(0.1, 0.12))
    assert found.high == pytest.approx(0.2 + np.hypot(0.05, 0.1))
    assert found.clusters == 8
