"""Detectors side by side: nothing is learnt or chosen on the test side, and all get the same."""

from functools import partial

import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, brier_score_loss, f1_score, roc_auc_score

from saefty.detection.comparison import compare, fit_candidates, threshold_1pct
from saefty.detection.generalisation import leave_one_source_out, one_vs_rest
from saefty.detection.inputs import Candidate, word_input
from saefty.errors import InputError
from saefty.linear import Linear
from saefty.metrics.calibration import best_f1_threshold
from saefty.metrics.significance import holm
from saefty.metrics.splits import split_clusters
from saefty.probes import (
    FOLDS,
    STRENGTHS,
    Fit,
    ProbeTask,
    divide_by_deviation,
    fit_probe,
    make_folds,
    read_best,
    sparse_family,
    standardise,
)

N = 240


@pytest.fixture(scope="module")
def task():
    clusters = np.arange(N) // 2
    harmful = (np.random.default_rng(0).permutation(N // 2) < N // 4)[clusters]
    train, test = split_clusters(harmful, clusters, shares=(0.6, 0.4))
    return ProbeTask(harmful, train, test, clusters, boots=100)


def dense(task, gain, name="dense activations", seed=1, **where):
    x = np.random.default_rng(seed).normal(size=(N, 6))
    x[:, 0] += gain * task.harmful
    return Candidate(name, x, standardise, **where)


def compared(task, *candidates, training="all"):
    return compare(candidates, task, training, permutations=200)


@pytest.fixture(scope="module")
def comparison(task):
    return compared(
        task, dense(task, 2.0), dense(task, 0.7, "SAE latents", 2), dense(task, 0.0, "noise", 3)
    )


def test_every_measure_equals_scikit_learns(task, comparison):
    y = task.harmful[task.test]
    for one in comparison.detectors:
        scores, measured = one.probe.scores, one.calibration
        assert one.auroc.estimate == pytest.approx(roc_auc_score(y, scores))
        expected = average_precision_score(y, scores)
        assert one.probe.average_precision.estimate == pytest.approx(expected)
        assert measured.brier.estimate == pytest.approx(brier_score_loss(y, expit(scores)))
        expected = f1_score(y, scores >= measured.threshold)
        assert measured.f1.estimate == pytest.approx(expected)


def test_the_weights_reproduce_scikit_learns_decision_function(task):
    candidate = dense(task, 1.0)
    fit = fit_candidates([candidate], task.harmful, task.clusters, task.train, 0)[0]
    x, y = candidate.rows, task.harmful
    z = (x - x[task.train].mean(axis=0)) / x[task.train].std(axis=0)
    model = LogisticRegression(C=fit.strength, max_iter=1000).fit(z[task.train], y[task.train])
    np.testing.assert_allclose(fit.linear.score(x), model.decision_function(z), atol=1e-12)


def test_the_sparse_weights_reproduce_it_too_and_read_the_chosen_latents_alone(task):
    rng = np.random.default_rng(4)
    z = rng.exponential(size=(N, 40)) * (rng.random((N, 40)) < 0.4)
    z[:, [30, 7]] += 2.0 * task.harmful[:, None] * rng.random((N, 2))
    learn = partial(read_best, k=2)
    candidate = Candidate("2 latents", csr_array(z), learn, 1, "max", 2)
    fit = fit_candidates([candidate], task.harmful, task.clusters, task.train, 0)[0]
    assert fit.linear.columns.tolist() == [7, 30]
    scaled = (z / z[task.train].std(axis=0))[:, [7, 30]]
    model = LogisticRegression(C=fit.strength, max_iter=1000)
    model.fit(scaled[task.train], task.harmful[task.train])
    np.testing.assert_allclose(
        fit.linear.score(csr_array(z)), model.decision_function(scaled), atol=1e-5
    )


def test_scores_of_examples_left_out_of_a_fold_equal_the_same_by_hand(task):
    candidate, y = dense(task, 1.0), task.harmful[task.train]
    x, codes = candidate.rows[task.train], task.clusters[task.train]
    folds = make_folds(y, codes)
    fit = fit_probe(x, y, folds, standardise)
    losses = []
    for strength in STRENGTHS:
        held_out, loss = np.zeros(len(y)), []
        for inner, outer in folds:
            z = (x - x[inner].mean(axis=0)) / x[inner].std(axis=0)
            model = LogisticRegression(C=strength, max_iter=1000).fit(z[inner], y[inner])
            held_out[outer] = model.decision_function(z[outer])
            p = expit(held_out[outer])
            loss.append(-np.log(np.where(y[outer], p, 1 - p)).mean())
        losses.append(np.mean(loss))
        if strength == fit.strength:
            np.testing.assert_allclose(fit.held_out, held_out, atol=1e-9)
    assert fit.strength == STRENGTHS[int(np.argmin(losses))]
    assert fit.fold_loss == pytest.approx(min(losses))


def test_folds_keep_clusters_whole_and_every_input_gets_the_same_ones(task, monkeypatch):
    seen = []

    def spied(x, labels, folds, learn):
        seen.append(folds)
        return fit_probe(x, labels, folds, learn)

    monkeypatch.setattr("saefty.detection.comparison.fit_probe", spied)
    compared(task, dense(task, 1.0), dense(task, 1.0, "SAE latents", 2))
    assert len(seen) == 2
    assert seen[0] is seen[1]
    assert len(seen[0]) == FOLDS
    codes = task.clusters[task.train]
    for inner, outer in seen[0]:
        assert not set(codes[inner]) & set(codes[outer])


def test_the_candidate_of_a_family_is_chosen_on_the_training_side_alone(task):
    looks_good = dense(task, 0.4, layer=1, pooling="max").rows.copy()
    looks_good[task.test, 0] = 9.0 * task.harmful[task.test]  # perfect, but in the test only
    learnt = dense(task, 1.2, seed=8).rows.copy()
    learnt[task.test] = np.random.default_rng(9).normal(size=(task.test.sum(), 6))
    a = Candidate("dense activations", looks_good, standardise, 1, "max")
    b = Candidate("dense activations", learnt, standardise, 1, "mean")
    found = compared(task, a, b)
    assert [one.candidate.pooling for one in found.main] == ["mean"]
    assert found.detectors[0].auroc.estimate > found.detectors[1].auroc.estimate


def test_a_shortcut_that_the_test_alone_holds_is_not_learnt(task):
    rng = np.random.default_rng(5)
    texts = [f"word{rng.integers(30)} word{rng.integers(30)}" for _ in range(N)]
    planted = [
        f"{text} xyzzy" if task.test[i] and task.harmful[i] else text
        for i, text in enumerate(texts)
    ]
    plain, leaking = (compared(task, word_input(one)).main[0] for one in (texts, planted))
    words = [leaking.candidate.vocabulary[i] for i in leaking.fit.linear.columns]
    assert "xyzzy" not in words
    np.testing.assert_allclose(plain.probe.scores, leaking.probe.scores, atol=1e-12)


def test_the_test_side_changes_nothing_of_what_is_learnt(task):
    before = dense(task, 1.0)
    changed = before.rows.copy()
    changed[task.test] *= -1000
    after = Candidate(before.family, changed, standardise)
    fits = [
        fit_candidates([one], task.harmful, task.clusters, task.train, 0)[0]
        for one in (before, after)
    ]
    np.testing.assert_array_equal(fits[0].linear.weights, fits[1].linear.weights)
    np.testing.assert_array_equal(fits[0].linear.scale, fits[1].linear.scale)
    assert fits[0].fold_loss == fits[1].fold_loss


def test_latents_chosen_on_noise_do_not_look_good_on_the_folds(task):
    z = csr_array(np.random.default_rng(6).exponential(size=(N, 3000)))
    y, codes = task.harmful[task.train], task.clusters[task.train]
    learn, folds = partial(read_best, k=5), make_folds(y, codes)
    honest = fit_probe(z[task.train], y, folds, learn)
    peeking = fit_probe(z[task.train], y, folds, learn, nested=False)
    assert honest.fold_loss > 0.68
    assert peeking.fold_loss < 0.62


def test_pairs_are_all_pairs_of_the_chosen_ones_with_holms_correction(comparison):
    assert len(comparison.pairs) == 3
    raw = np.array([pair.p for pair in comparison.pairs])
    np.testing.assert_allclose([pair.p_holm for pair in comparison.pairs], holm(raw))
    there = comparison.pair("dense activations", "noise")
    back = comparison.pair("noise", "dense activations")
    assert there.difference.estimate == -back.difference.estimate
    assert (there.difference.low, there.difference.high) == (
        -back.difference.high,
        -back.difference.low,
    )
    assert there.told_apart


def test_with_many_pairs_the_least_corrected_p_is_still_small_enough(task):
    many = [dense(task, 3.0 * (i == 0), f"d{i}", seed=i + 1) for i in range(5)]
    found = compare(many, task, "all", permutations=100)
    assert len(found.pairs) == 10
    assert min(pair.p_holm for pair in found.pairs) == pytest.approx(10 / 1001)


def test_detectors_stand_in_the_order_of_their_auroc(comparison):
    areas = [one.auroc.estimate for one in comparison.main]
    assert areas == sorted(areas, reverse=True)
    assert comparison.main[0].family == "dense activations"


def test_too_few_groups_for_the_folds_are_refused_with_both_numbers():
    harmful = np.arange(40) < 8
    clusters = np.concatenate([np.repeat(np.arange(4), 2), np.arange(4, 36)])
    train = np.isin(clusters, [0, 1, *range(4, 20)])
    task = ProbeTask(harmful, train, ~train, clusters)
    with pytest.raises(InputError, match=r"2 independent groups with harmful .* 3 folds") as error:
        compared(task, Candidate("x", np.ones((40, 2)), standardise))
    assert "data.group" in str(error.value)


def test_the_threshold_of_one_percent_lets_one_harmless_example_in_a_hundred_through():
    held_out = np.concatenate([np.arange(300) / 10, [50.0, 60.0]])
    labels = np.arange(302) >= 300
    fit = Fit(Linear(np.arange(1), *np.ones((3, 1)), 0.0, 1), 1.0, True, 0.1, held_out)
    found = threshold_1pct(fit, labels)
    assert (held_out[~labels] >= found).sum() == 3
    assert threshold_1pct(fit, np.arange(302) >= 99) is None


SOURCES = np.arange(N) // 80


def left_out(task, *candidates, sources=SOURCES):
    names = [f"s{i}" for i in range(sources.max() + 1)]
    return leave_one_source_out(candidates, compared(task, *candidates), task, sources, names)


def test_a_source_is_judged_by_a_detector_that_never_saw_it_nor_its_groups(task):
    """Column 0 holds the row's number; what is learnt notes which rows it was shown."""
    seen = []

    def noting(x, labels):
        seen.append(set(x[:, 0].astype(int)))
        return standardise(x[:, 1:], labels)

    def learn(x, labels):
        scaling = noting(x, labels)
        return type(scaling)(scaling.columns + 1, scaling.center, scaling.scale)

    clusters = np.arange(N) // 2
    clusters[0] = clusters[200]  # a group that spans the sources 0 and 2
    shared = np.isin(clusters, clusters[200])
    train = task.train & ~shared
    spanning = ProbeTask(task.harmful, train, task.test & ~shared, clusters, boots=50)
    x = np.column_stack([np.arange(N), dense(task, 1.5).rows])
    candidate = Candidate("dense activations", x, learn)
    compared(spanning, candidate)
    seen.clear()
    result = left_out(spanning, candidate)
    per_fit = len(seen) // 4  # the comparison's own fit, then one for each source
    for source in range(3):
        here = seen[per_fit * (source + 1) : per_fit * (source + 2)]
        allowed = set(np.flatnonzero(SOURCES - source).tolist())
        if source != 1:
            allowed -= set(np.flatnonzero(shared).tolist())
        assert set().union(*here) == allowed
    assert [one.source for one in result.results] == ["s0", "s1", "s2"]


def test_the_auroc_on_a_source_and_the_mean_equal_the_same_by_hand(task):
    candidate = dense(task, 1.0)
    result = left_out(task, candidate)
    areas, within, on_test = [], [], []
    main = compared(task, candidate).main[0]
    for source in range(3):
        train, asked = source != SOURCES, source == SOURCES
        fit = fit_candidates([candidate], task.harmful, task.clusters, train, 0)[0]
        areas.append(roc_auc_score(task.harmful[asked], fit.linear.score(candidate.rows[asked])))
        tested = task.test & asked
        left = fit.linear.score(candidate.rows[tested])
        on_test.append(roc_auc_score(task.harmful[tested], left))
        inside = roc_auc_score(task.harmful[tested], main.probe.scores[asked[task.test]])
        within.append(inside)
    assert [one.auroc.estimate for one in result.results] == pytest.approx(areas)
    average = result.averages[0]
    assert [one.on_test.estimate for one in result.results] == pytest.approx(on_test)
    assert average.auroc.estimate == pytest.approx(np.mean(on_test))
    assert average.loss.estimate == pytest.approx(np.mean(within) - np.mean(on_test))
    assert average.loss.low < average.loss.estimate < average.loss.high


def test_what_fails_on_one_source_is_a_loss_there(task):
    x = dense(task, 2.0).rows.copy()
    x[SOURCES == 2, 0] -= 4.0 * task.harmful[SOURCES == 2]  # the sign is turned round
    result = left_out(task, Candidate("dense activations", x, standardise))
    areas = {one.source: one.auroc.estimate for one in result.results}
    assert areas["s2"] < 0.3


def test_a_source_with_one_label_has_a_false_alarm_rate_and_no_auroc(task):
    sources = np.where(task.harmful, 0, SOURCES % 2 + 1)
    sources[task.clusters % 3 == 0] = 0
    candidate = dense(task, 1.0)
    result = left_out(task, candidate, sources=sources)
    one = next(one for one in result.results if one.source == "s1")
    assert one.auroc is None
    assert one.within is None
    assert one.recall is None
    asked = sources == 1
    assert not task.harmful[asked].any()
    train = ~asked & ~np.isin(task.clusters, task.clusters[asked])
    fit = fit_candidates([candidate], task.harmful, task.clusters, train, 0)[0]
    threshold = best_f1_threshold(fit.held_out, task.harmful[train])
    flagged = fit.linear.score(candidate.rows[asked]) >= threshold
    assert one.false_alarms.estimate == pytest.approx(flagged.mean())
    assert result.averages == ()
    # Without source 0 no harm is left to learn from.
    assert [name for name, _ in result.skipped] == ["s0"]
    assert "no independent groups with harmful" in result.skipped[0][1]


def test_each_category_is_told_from_the_rest_and_rare_ones_are_named(task):
    names = [f"c{i // 2 % 3}" for i in range(N)]
    names[10] = names[11] = "two rows"
    x = np.random.default_rng(3).normal(size=(N, 4))
    x[:, 1] += 2.5 * np.array([name == "c1" for name in names])
    results, rare = one_vs_rest([Candidate("dense activations", x, standardise)], task, names)
    areas = {one.category: one.auroc.estimate for one in results}
    assert areas["c1"] > 0.85
    assert [name for name, _ in rare] == ["two rows"]
    assert "group" in rare[0][1]
    assert set(areas) == {"c0", "c1", "c2"}
    for name, area in areas.items():
        inside = np.array(names) == name
        folds = make_folds(inside[task.train], task.clusters[task.train])
        fit = fit_probe(x[task.train], inside[task.train], folds, standardise)
        expected = roc_auc_score(inside[task.test], fit.linear.score(x[task.test]))
        assert area == pytest.approx(expected)


def test_a_category_of_fewer_groups_than_folds_is_left_out_by_name(task):
    learnt, judged = (np.unique(task.clusters[part]) for part in (task.train, task.test))
    groups = {"two": [*learnt[:2], *judged[:9]], "three": [*learnt[2:5], *judged[9:11]],
              "one": [*learnt[5:15], judged[11]]}  # fmt: skip
    where = {group: name for name, members in groups.items() for group in members}
    names = [where.get(code) for code in task.clusters]
    candidate = Candidate("dense activations", np.eye(N, 3), standardise)
    results, left_out = one_vs_rest([candidate], task, names)
    assert [one.category for one in results] == ["three"]
    assert dict(left_out) == {
        "two": "2 groups to learn from in 3 folds, which needs 3",
        "one": "1 group to judge on, which needs 2",
    }


def test_of_two_categories_that_are_all_there_is_one_is_told_from_the_other(task):
    names = ["a" if i % 6 < 4 else "b" for i in range(N)]
    candidate = dense(task, 1.0)
    results, left_out = one_vs_rest([candidate], task, names)
    assert [one.category for one in results] == ["a"]
    assert left_out == [("b", "the rest of a: one AUROC says both")]
    some = [None if i < 12 else name for i, name in enumerate(names)]
    assert len(one_vs_rest([candidate], task, some)[0]) == 2


def test_examples_without_a_category_belong_to_the_rest(task):
    names = ["c" if i % 4 < 2 else None for i in range(N)]
    candidate = Candidate("dense activations", np.eye(N, 3), standardise)
    results, rare = one_vs_rest([candidate], task, names)
    assert [one.category for one in results] == ["c"]
    assert rare == []
    assert results[0].base_rate == pytest.approx(np.mean(np.arange(N)[task.test] % 4 < 2))


def test_all_latents_and_one_latent_are_different_families():
    assert (sparse_family(1), sparse_family(16)) == ("1 latent", "16 latents")
    whole = Candidate("SAE latents", csr_array((3, 2)), divide_by_deviation, 4, "last")
    assert whole.name == "SAE latents, layer 4, last token"
