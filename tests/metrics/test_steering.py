"""Scores of ways to steer, and the exchange test against every exchange there is."""

from itertools import product

import numpy as np
import pytest
from scipy.stats import binomtest

from saefty.metrics.intervals import Bootstrap
from saefty.metrics.steering import (
    Outcomes,
    best_strength,
    exchange_p,
    halves,
    is_scored,
    product_interval,
    score,
)

NAN = float("nan")


def outcomes(seed, n=6, shift=0.0):
    rng = np.random.default_rng(seed)
    return Outcomes(np.clip(rng.random(n) + shift, 0, 1), rng.random(n))


def test_the_score_is_the_product_of_means_of_what_was_scored():
    found = score(Outcomes(np.array([1.0, 0.5, NAN, 0.0]), np.array([0.8, NAN, 0.4, 0.6])))
    assert found[0] == pytest.approx(0.5 * 0.6)


def test_weights_count_prompts_as_often_as_they_say():
    one = outcomes(0)
    weights = np.array([[2, 0, 1, 0, 0, 3.0]])
    rows = np.repeat(np.arange(6), weights[0].astype(int))
    expected = one.behaviour[rows].mean() * one.coherence[rows].mean()
    assert score(one, weights)[0] == pytest.approx(expected)


def test_what_has_no_score_scores_nan():
    assert np.isnan(score(Outcomes(np.full(3, NAN), np.ones(3)))[0])


def test_the_best_strength_is_found_on_the_chosen_prompts_alone():
    weak = Outcomes(np.array([0.1, 0.9]), np.ones(2))
    strong = Outcomes(np.array([0.5, 0.2]), np.ones(2))
    missing = Outcomes(np.full(2, NAN), np.ones(2))
    first, second = np.array([True, False]), np.array([False, True])
    assert best_strength([missing, weak, strong], first, coverage=0.0) == 2
    assert best_strength([missing, weak, strong], second, coverage=0.0) == 1
    with pytest.raises(ValueError, match="no strength"):
        best_strength([missing], first, coverage=0.0)


@pytest.mark.parametrize("side", [0, 1])
def test_a_strength_that_leaves_few_scores_is_never_chosen(side):
    """6 of 64 replies have a score, and all six are perfect; 58 are missing."""
    chosen_on = np.arange(64) < 32
    good = outcomes(3, n=64)
    few = np.full(64, NAN)
    few[:6] = few[32:38] = 1.0
    full = np.ones(64)
    lucky = Outcomes(few, full)
    assert best_strength([good, lucky], chosen_on, coverage=0.0) == 1
    assert best_strength([good, lucky], chosen_on, coverage=0.95) == 0
    half = full.copy()
    half[32 * side : 32 * side + 26] = NAN
    assert best_strength([good, Outcomes(full, half)], chosen_on, coverage=0.95) == 0
    assert not is_scored(Outcomes(full, half), chosen_on, 0.95)
    assert is_scored(good, chosen_on, 1.0)


def test_a_score_that_is_the_same_in_all_draws_claims_no_certainty():
    draws = Bootstrap(32, boots=200)
    found = product_interval(draws, np.ones(32), np.ones(32))
    end = binomtest(32, 32).proportion_ci(0.95, method="wilson").low
    assert (found.estimate, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(end**2, abs=1e-9)
    assert np.isnan(product_interval(draws, np.full(32, NAN), np.ones(32)).estimate)


def test_the_interval_of_a_score_is_the_quantiles_of_its_draws():
    one, draws = outcomes(5, n=30), Bootstrap(30, boots=300, seed=2)
    by_hand = [
        np.average(one.behaviour, weights=row) * np.average(one.coherence, weights=row)
        for row in draws.weights
    ]
    found = product_interval(draws, one.behaviour, one.coherence)
    np.testing.assert_allclose((found.low, found.high), np.quantile(by_hand, [0.025, 0.975]))


def test_half_of_the_prompts_choose_and_no_cluster_is_divided():
    clusters = np.repeat(np.arange(20), 3)
    chosen = halves(60, clusters, seed=1)
    assert chosen.sum() == 30
    assert all(len(set(chosen[clusters == c])) == 1 for c in range(20))
    assert not np.array_equal(chosen, halves(60, clusters, seed=2))
    assert halves(101, None, seed=0).sum() in {50, 51}


def test_one_large_cluster_leaves_prompts_on_both_sides():
    clusters = np.array([0] * 9 + [1])
    chosen = halves(10, clusters, seed=0)
    assert 0 < chosen.sum() < 10


@pytest.mark.parametrize("shift", [0.0, 0.6])
def test_the_exchange_p_is_that_of_all_exchanges(shift):
    first, second = outcomes(1, shift=shift), outcomes(2)
    gaps = []
    for kept in product([True, False], repeat=6):
        mask = np.array(kept)
        mixed = [
            Outcomes(
                np.where(mask, a.behaviour, b.behaviour), np.where(mask, a.coherence, b.coherence)
            )
            for a, b in ((first, second), (second, first))
        ]
        gaps.append(score(mixed[0])[0] - score(mixed[1])[0])
    observed = abs(score(first)[0] - score(second)[0])
    exact = np.mean(np.abs(gaps) >= observed - 1e-12)
    found = exchange_p(first, second, None, permutations=20_000, seed=0)
    assert found == pytest.approx(exact, abs=0.02)


def test_clusters_are_exchanged_whole():
    rng = np.random.default_rng(0)
    first = Outcomes(np.repeat(rng.random(3) + 0.5, 10).clip(0, 1), np.ones(30))
    second = Outcomes(np.repeat(rng.random(3) * 0.4, 10), np.ones(30))
    clusters = np.repeat(np.arange(3), 10)
    apart = exchange_p(first, second, None, permutations=2000, seed=0)
    whole = exchange_p(first, second, clusters, permutations=2000, seed=0)
    assert apart < 0.01
    assert whole == pytest.approx(2 / 8, abs=0.05), "three clusters have eight exchanges"


def test_equal_ways_are_found_different_as_seldom_as_promised():
    p = []
    for seed in range(200):
        rng = np.random.default_rng([7, seed])
        draws = [Outcomes(rng.random(24), rng.random(24)) for _ in range(2)]
        p.append(exchange_p(*draws, None, permutations=199, seed=seed))
    assert np.mean(np.array(p) <= 0.05) <= 0.09
    assert np.mean(np.array(p) <= 0.5) == pytest.approx(0.5, abs=0.1)


def test_a_way_without_scores_differs_from_nothing():
    mute = Outcomes(np.full(6, NAN), np.ones(6))
    assert exchange_p(mute, outcomes(0), None, permutations=100, seed=0) == 1.0
