from itertools import permutations

import numpy as np
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu

from saefty.metrics.alignment import auroc
from saefty.metrics.significance import (
    benjamini_hochberg,
    holm,
    log10_arrangements,
    mann_whitney,
    maximum_statistic,
    permutation_p,
    permuted_labels,
)

HARMFUL = np.array([True, True, False, False])


@pytest.fixture
def many():
    """Ninety examples, sparse latents with ties, the first three related to harm."""
    rng = np.random.default_rng(5)
    harmful = rng.random(90) < 0.4
    z = rng.exponential(size=(90, 40)).round(1) * (rng.random((90, 40)) < 0.4)
    z[:, :3] += harmful[:, None] * 0.8
    z[:, 38], z[:, 39] = 0.0, 0.1
    return z, harmful


def test_mann_whitney_equals_scipys(many):
    z, harmful = many
    expected = mannwhitneyu(z[harmful, :38], z[~harmful, :38], method="asymptotic").pvalue
    np.testing.assert_allclose(mann_whitney(z, harmful)[:38], expected, rtol=1e-9)


def test_mann_whitney_of_a_constant_latent_is_one(many):
    assert mann_whitney(*many)[38:].tolist() == [1.0, 1.0]


def test_benjamini_hochberg_by_hand():
    # p·n/rank: .01·4/1, .02·4/2, .03·4/3, .5·4/4.
    np.testing.assert_allclose(
        benjamini_hochberg(np.array([0.5, 0.01, 0.03, 0.02])), [0.5, 0.04, 0.04, 0.04]
    )


def test_benjamini_hochberg_equals_scipys():
    p = np.random.default_rng(0).random(500) ** 3
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p), rtol=1e-12)


def test_holm_by_hand():
    # Sorted .01·4, .02·3, .03·2, .5·1, never falling.
    np.testing.assert_allclose(holm(np.array([0.5, 0.01, 0.03, 0.02])), [0.5, 0.04, 0.06, 0.06])


def test_corrections_of_no_tests_are_empty():
    assert len(holm(np.array([]))) == len(benjamini_hochberg(np.array([]))) == 0


def test_lone_examples_are_permuted_freely():
    drawn = permuted_labels(HARMFUL, permutations=600, seed=0)
    assert (drawn.sum(axis=1) == 2).all()
    kinds, counts = np.unique(drawn, axis=0, return_counts=True)
    assert len(kinds) == 6  # 4 choose 2
    assert counts.min() > 60


def test_a_cluster_with_one_label_keeps_one_label():
    harmful = np.array([True, True, True, False, False, False, True, False])
    clusters = np.array([0, 0, 0, 1, 1, 2, 3, 3])
    drawn = permuted_labels(harmful, clusters, permutations=200)
    for cluster in (0, 1, 2):
        inside = drawn[:, clusters == cluster]
        assert (inside.all(axis=1) | ~inside.any(axis=1)).all()
    assert drawn[:, :6].any(axis=0).all()  # each of them is harmful at some time


def test_a_cluster_with_both_labels_keeps_how_many_of_each():
    harmful = np.array([True, True, False, True, False, False])
    clusters = np.array([0, 0, 0, 1, 1, 1])
    drawn = permuted_labels(harmful, clusters, permutations=200)
    assert (drawn[:, :3].sum(axis=1) == 2).all()
    assert (drawn[:, 3:].sum(axis=1) == 1).all()
    assert len(np.unique(drawn, axis=0)) == 9


def test_labels_stay_inside_their_source():
    harmful = np.array([True, True, False, False, True, False])
    sources = np.array([0, 0, 0, 1, 1, 1])
    drawn = permuted_labels(harmful, None, sources, permutations=200)
    assert (drawn[:, :3].sum(axis=1) == 2).all()
    assert (drawn[:, 3:].sum(axis=1) == 1).all()


def test_a_source_with_one_label_cannot_be_permuted():
    drawn = permuted_labels(HARMFUL, None, np.array([0, 0, 1, 1]), permutations=50)
    assert (drawn == HARMFUL).all()


def test_the_same_seed_draws_the_same_labellings():
    np.testing.assert_array_equal(
        permuted_labels(HARMFUL, permutations=50, seed=3),
        permuted_labels(HARMFUL, permutations=50, seed=3),
    )


@pytest.mark.parametrize(
    ("clusters", "sources", "arrangements"),
    [
        (None, None, 6),
        (None, [0, 0, 1, 1], 1),
        ([0, 0, 1, 1], None, 2),
        ([0, 1, 0, 1], None, 4),
        ([0, 1, 0, 1], [0, 0, 1, 1], 1),
    ],
)
def test_arrangements_are_counted(clusters, sources, arrangements):
    arrays = [None if a is None else np.array(a) for a in (clusters, sources)]
    assert 10 ** log10_arrangements(HARMFUL, *arrays) == pytest.approx(arrangements)
    assert len(np.unique(permuted_labels(HARMFUL, *arrays), axis=0)) == arrangements


def test_permutation_p_over_all_labellings_is_the_exact_p():
    z = np.array([[5.0], [4.0], [3.0], [1.0], [0.0]])
    harmful = np.array([True, True, False, False, False])
    every = np.array(sorted(set(permutations(harmful.tolist()))))
    exact = mannwhitneyu(z[harmful, 0], z[~harmful, 0], method="exact").pvalue
    # (1 + b) / (1 + B) counts the labelling as given once more.
    b = permutation_p(z, harmful, every)[0] * (1 + len(every)) - 1
    assert b / len(every) == pytest.approx(exact)


def test_permutation_p_follows_its_formula(many):
    z, harmful = many
    drawn = permuted_labels(harmful, permutations=99, seed=1)
    observed = np.abs(auroc(z, harmful) - 0.5)
    b = sum(np.abs(auroc(z, labels) - 0.5) >= observed - 1e-12 for labels in drawn)
    np.testing.assert_allclose(permutation_p(z, harmful, drawn), (1 + b) / 100)


def test_maximum_statistic_follows_its_formula(many):
    z, harmful = many
    drawn = permuted_labels(harmful, permutations=99, seed=1)
    best = np.array([np.abs(auroc(z, labels) - 0.5).max() for labels in drawn])
    observed = np.abs(auroc(z, harmful) - 0.5)
    p, null = maximum_statistic(z, harmful, drawn)
    np.testing.assert_allclose(null, best, atol=1e-12)
    np.testing.assert_allclose(p, [(1 + (best >= o - 1e-12).sum()) / 100 for o in observed])
    assert (p[:3] <= 0.02).all()
    assert p[38:].tolist() == [1.0, 1.0]


def test_the_p_of_correlated_rows_is_uniform_only_if_clusters_are_permuted():
    # 30 clusters of 10 identical rows and a label that knows nothing of them.
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(30), 10)
    z = rng.random((30, 300))[clusters]
    harmful = (np.arange(30) < 15)[clusters]
    by_cluster = permutation_p(z, harmful, permuted_labels(harmful, clusters, permutations=199))
    by_row = permutation_p(z, harmful, permuted_labels(harmful, permutations=199))
    assert (by_cluster <= 0.05).mean() < 0.09
    assert (by_row <= 0.05).mean() > 0.4
