import numpy as np
import pytest

from saefty.metrics.splits import balanced_subset


def test_of_the_commoner_label_whole_clusters_are_left_out():
    harmful = np.repeat([True, False], [6, 18])
    clusters = np.repeat(np.arange(8), 3)
    kept = balanced_subset(harmful, clusters)
    assert (kept & harmful).sum() == (kept & ~harmful).sum() == 6
    assert all(len(set(kept[clusters == code])) == 1 for code in range(8))


def test_clusters_with_both_labels_lose_single_examples_and_none_of_the_rarer_label():
    harmful = np.tile([True, False, False, False], 10)
    clusters = np.repeat(np.arange(10), 4)
    kept = balanced_subset(harmful, clusters)
    assert kept[harmful].all()
    assert kept.sum() == 20


def test_examples_that_are_balanced_already_all_stay():
    assert balanced_subset(np.arange(10) % 2 == 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_the_subset_is_balanced_whatever_the_clusters(seed):
    rng = np.random.default_rng(seed)
    harmful = rng.random(200) < rng.choice([0.2, 0.7])
    clusters = rng.integers(0, 30, 200)
    kept = balanced_subset(harmful, clusters, seed=seed)
    rarer = harmful if harmful.sum() < 100 else ~harmful
    assert 2 * harmful[kept].sum() == kept.sum()
    assert kept[rarer].all()


def test_the_same_seed_makes_the_same_choice():
    harmful = np.arange(100) < 20
    same, again, other = (balanced_subset(harmful, seed=seed) for seed in (1, 1, 2))
    assert (same == again).all()
    assert (same != other).any()


@pytest.mark.parametrize("seed", range(5))
def test_it_leaves_out_the_clusters_that_one_cluster_after_the_other_would(seed):
    """The same choice, made the slow way: one pass over all examples for each cluster."""
    draw = np.random.default_rng(seed)
    clusters = np.sort(draw.integers(0, 60, 200))
    clusters = np.unique(clusters, return_inverse=True)[1]
    harmful = (draw.random(60) < 0.25)[clusters]
    kept, excess = np.ones(200, dtype=bool), int((~harmful).sum() - harmful.sum())
    rng = np.random.default_rng([seed, 7])
    for code in rng.permutation(np.unique(clusters[~harmful])):
        if (clusters == code).sum() <= excess:
            kept[clusters == code] = False
            excess -= int((clusters == code).sum())
    kept[rng.permutation(np.flatnonzero(~harmful & kept))[:excess]] = False
    np.testing.assert_array_equal(balanced_subset(harmful, clusters, seed=seed), kept)
