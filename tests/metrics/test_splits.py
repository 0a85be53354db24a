import numpy as np
import pytest

from saefty.errors import InputError
from saefty.metrics.splits import split_clusters


@pytest.fixture
def grouped():
    """Sixty clusters of 1 to 6 examples of two sources; some all harmful, some mixed."""
    rng = np.random.default_rng(0)
    clusters = np.repeat(np.arange(60), rng.integers(1, 7, 60))
    sources = (clusters % 3 == 0).astype(int)
    harmful = np.where(clusters % 5 == 0, rng.random(len(clusters)) < 0.5, clusters % 2 == 0)
    order = rng.permutation(len(clusters))
    return harmful[order], clusters[order], sources[order]


def test_every_example_is_in_one_part_and_no_cluster_in_two(grouped):
    first, second = split_clusters(*grouped)
    assert (first ^ second).all()
    assert not set(grouped[1][first]) & set(grouped[1][second])


def test_parts_hold_alike_shares_of_every_source_and_label(grouped):
    harmful, _, sources = grouped
    first, _ = split_clusters(*grouped)
    for source in (0, 1):
        for label in (True, False):
            share = first[(sources == source) & (harmful == label)].mean()
            assert 0.35 < share < 0.65


def test_halves_of_lone_examples_differ_by_one_at_most():
    harmful = np.arange(101) < 31
    first, second = split_clusters(harmful)
    assert abs(int(first.sum()) - int(second.sum())) == 1
    assert abs(int(first[harmful].sum()) - int(second[harmful].sum())) == 1


def test_three_parts_follow_their_shares(grouped):
    parts = split_clusters(*grouped, shares=(0.6, 0.2, 0.2))
    sizes = np.array([part.mean() for part in parts])
    np.testing.assert_allclose(sizes, [0.6, 0.2, 0.2], atol=0.05)


def test_the_seed_decides_the_split(grouped):
    same = [split_clusters(*grouped, seed=4)[0] for _ in range(2)]
    assert (same[0] == same[1]).all()
    assert (same[0] != split_clusters(*grouped, seed=5)[0]).any()


def test_too_few_groups_of_a_label_are_refused_with_their_number():
    harmful = np.array([True] * 9 + [False] * 9)
    clusters = np.array([0] * 3 + [1] * 3 + [2] * 3 + list(range(3, 12)))
    with pytest.raises(InputError, match="hold 3 independent groups with harmful"):
        split_clusters(harmful, clusters)
