import numpy as np
import pytest
from scipy.stats import binomtest, norm
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from saefty.metrics.intervals import Bootstrap, ranking_measures

RNG = np.random.default_rng(0)
HARMFUL = RNG.random(300) < 0.4
SCORES = (RNG.normal(size=300) + HARMFUL).round(1)


def recall_at_one_percent(harmful, scores, weights):
    false, true, _ = roc_curve(harmful, scores, sample_weight=weights, drop_intermediate=False)
    return true[false <= 0.01 + 1e-12].max()


@pytest.mark.parametrize("draw", range(4))
def test_measures_equal_scikit_learns_for_any_weights(draw):
    weights = RNG.integers(0, 4, 300).astype(float) if draw else np.ones(300)
    measured = ranking_measures(SCORES, HARMFUL, weights[None])
    kept = weights > 0
    arguments = (HARMFUL[kept], SCORES[kept])
    expected = {
        "auroc": roc_auc_score(*arguments, sample_weight=weights[kept]),
        "average_precision": average_precision_score(*arguments, sample_weight=weights[kept]),
        "recall_at_1pct_fpr": recall_at_one_percent(*arguments, weights[kept]),
    }
    for name, value in expected.items():
        assert measured[name][0] == pytest.approx(value, abs=1e-12), name


def test_a_cluster_is_drawn_as_a_whole():
    weights = Bootstrap(6, np.array([5, 5, 5, 9, 9, 1]), boots=50).weights
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3] == weights[:, 4]).all()
    # Three clusters are drawn each time.
    assert (weights[:, [0, 3, 5]].sum(axis=1) == 3).all()


def test_a_rate_of_lone_examples_has_wilsons_interval():
    values = np.array([1.0] * 7 + [0.0] * 3)
    expected = binomtest(7, 10).proportion_ci(0.95, method="wilson")
    interval = Bootstrap(10).mean(values)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.method == "Wilson over 10 examples"


@pytest.mark.parametrize(("value", "successes"), [(0.0, 0), (1.0, 10)])
def test_a_rate_without_exceptions_is_not_certain(value, successes):
    expected = binomtest(successes, 10).proportion_ci(0.95, method="wilson")
    interval = Bootstrap(10).mean(np.full(10, value))
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_equal_answers_of_few_clusters_leave_a_wider_interval():
    same = np.ones(40)
    few = Bootstrap(40, np.arange(40) // 10).mean(same)
    many = Bootstrap(40).mean(same)
    assert few.low < many.low
    assert few.clusters == 4


def test_no_change_in_any_pair_is_not_certain_either():
    interval = Bootstrap(10).mean(np.zeros(10), bounds=(-1.0, 1.0))
    # Wilson's upper end for 0 of 10, on both sides.
    end = binomtest(0, 10).proportion_ci(0.95, method="wilson").high
    assert (interval.low, interval.high) == pytest.approx((-end, end))


def test_the_mean_of_numbers_has_about_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    interval = Bootstrap(400, boots=4000).mean(values)
    half = 1.96 * values.std() / 20
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.02)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.02)


def test_rows_that_repeat_each_other_add_no_certainty():
    once = np.random.default_rng(1).normal(size=50)
    alone = Bootstrap(50, boots=2000).mean(once)
    tenfold = Bootstrap(500, np.repeat(np.arange(50), 10), boots=2000).mean(np.repeat(once, 10))
    assert tenfold.low == pytest.approx(alone.low, abs=1e-12)
    assert tenfold.high == pytest.approx(alone.high, abs=1e-12)


def test_what_could_not_be_judged_is_left_out():
    values = np.array([1.0, np.nan, 0.0, 1.0, np.nan])
    assert Bootstrap(5).mean(values) == Bootstrap(3).mean(np.array([1.0, 0.0, 1.0]))


def test_without_values_there_is_no_interval():
    interval = Bootstrap(2).mean(np.full(2, np.nan))
    assert np.isnan([interval.estimate, interval.low, interval.high]).all()
    assert interval.clusters == 0


def test_one_cluster_gives_an_estimate_without_ends():
    interval = Bootstrap(3, np.zeros(3, dtype=int)).mean(np.array([0.1, 0.2, 0.9]))
    assert interval.estimate == pytest.approx(0.4)
    assert np.isnan([interval.low, interval.high]).all()


def test_the_difference_of_groups_has_about_the_normal_interval():
    values = SCORES
    interval = Bootstrap(300, boots=4000).difference(values, HARMFUL)
    a, b = values[HARMFUL], values[~HARMFUL]
    half = 1.96 * np.sqrt(a.var() / len(a) + b.var() / len(b))
    assert interval.estimate == pytest.approx(a.mean() - b.mean())
    assert interval.low == pytest.approx(a.mean() - b.mean() - half, abs=0.03)
    assert interval.high == pytest.approx(a.mean() - b.mean() + half, abs=0.03)


def test_an_auroc_has_about_the_interval_of_drawing_rows_one_by_one():
    rng = np.random.default_rng(2)
    rows = [rng.integers(0, 300, 300) for _ in range(1000)]
    slow = np.quantile([roc_auc_score(HARMFUL[r], SCORES[r]) for r in rows], [0.025, 0.975])
    interval = Bootstrap(300, boots=2000).ranking(SCORES, HARMFUL)["auroc"]
    assert interval.estimate == pytest.approx(roc_auc_score(HARMFUL, SCORES))
    assert (interval.low, interval.high) == pytest.approx(tuple(slow), abs=0.01)


def test_a_perfect_auroc_is_not_certain():
    harmful = np.arange(40) < 20
    interval = Bootstrap(40).ranking(harmful.astype(float), harmful)["auroc"]
    assert interval.estimate == interval.high == 1.0
    # Newcombe's own equation holds at the lower end.
    low, z = interval.low, 1.959964
    variance = low * (1 - low) / 400 * (1 + 19 * ((1 - low) / (2 - low) + low / (1 + low)))
    assert 1 - low == pytest.approx(z * np.sqrt(variance), rel=1e-5)
    assert 0.8 < low < 0.95
    reverse = Bootstrap(40).ranking(-harmful.astype(float), harmful)["auroc"]
    assert (reverse.low, reverse.high) == pytest.approx((0.0, 1 - low))


@pytest.mark.parametrize(
    ("scores", "area"), [((2, 0, 0, 0), 0.75), ((0, 0, 0, 0), 0.5), ((0, 0, 0, 2), 0.25)]
)
def test_an_auroc_that_every_cluster_repeats_is_not_certain(scores, area):
    harmful = np.tile([True, False, True, False], 12)
    clusters = np.repeat(np.arange(12), 4)
    interval = Bootstrap(48, clusters).ranking(np.tile(scores, 12).astype(float), harmful)["auroc"]
    assert interval.estimate == area
    assert interval.method == "Newcombe over 12 + 12 clusters"
    assert 0 < interval.low < area < interval.high < 1
    # Newcombe's own equation, squared, holds at both ends.
    for end in (interval.low, interval.high):
        variance = end * (1 - end) / 144 * (1 + 11 * ((1 - end) / (2 - end) + end / (1 + end)))
        assert (end - area) ** 2 == pytest.approx(norm.ppf(0.975) ** 2 * variance, rel=1e-6)
    alone = Bootstrap(4, np.zeros(4, dtype=int)).ranking(np.array([2.0, 0, 0, 0]), harmful[:4])
    assert np.isnan([alone["auroc"].low, alone["auroc"].high]).all()


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    # 25 clusters of 4 correlated answers; the true rate is 0.5.
    held = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        clusters = np.repeat(np.arange(25), 4)
        values = (rng.random(100) < rng.beta(1, 1, 25)[clusters]).astype(float)
        interval = Bootstrap(100, clusters, boots=300, seed=seed).mean(values)
        held += interval.low <= 0.5 <= interval.high
    assert 0.88 <= held / 200 <= 0.99


def test_an_interval_reads_as_a_line():
    text = str(Bootstrap(8).mean(np.array([1.0] * 7 + [0.0])))
    assert text == "0.875 [0.529, 0.978]"


def test_what_no_draw_can_change_has_wilsons_interval_over_the_harmful_clusters():
    harmful = np.arange(40) < 20
    clusters = np.arange(40) // 2  # 10 of them are harmful
    found = Bootstrap(40, clusters).ranking(harmful.astype(float), harmful)
    low = 10 / (10 + norm.ppf(0.975) ** 2)  # Wilson's lower end of 10 in 10
    for name in ("average_precision", "recall_at_1pct_fpr"):
        assert found[name].estimate == 1.0
        assert found[name].low == pytest.approx(low)
        assert found[name].high == 1.0
        assert found[name].method == "Wilson over 10 clusters"
    none = Bootstrap(40, clusters).ranking(-harmful.astype(float), harmful)
    recall = none["recall_at_1pct_fpr"]
    assert (recall.estimate, recall.low) == (0.0, 0.0)
    assert recall.high == pytest.approx(1 - low)
