import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score

from saefty.errors import InputError
from saefty.metrics.splits import split_clusters
from saefty.probes import (
    ProbeTask,
    bag_of_words,
    probe_dense,
    probe_k_sparse,
    probe_latents,
    probe_words,
)


@pytest.fixture
def task():
    """Two hundred examples in pairs of variants, half of them harmful."""
    clusters = np.repeat(np.arange(100), 2)
    harmful = (np.random.default_rng(0).permutation(100) < 50)[clusters]
    train, test = split_clusters(harmful, clusters)
    return ProbeTask(harmful, train, test, clusters, boots=200)


def test_words_that_give_the_label_away_are_found(task):
    rng = np.random.default_rng(1)
    texts = [f"show me {'poison' if h and rng.random() < 0.9 else 'soup'}" for h in task.harmful]
    result = probe_words(texts, task)
    expected = np.array(["poison" in text for text in texts])[task.test]
    assert result.auroc.estimate == pytest.approx(roc_auc_score(task.harmful[task.test], expected))


def test_the_order_of_words_is_not_seen(task):
    texts = ["steal then pay" if h else "pay then steal" for h in task.harmful]
    assert probe_words(texts, task).auroc.estimate == 0.5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello, hello world", ["hello", "hello", "world"]),
        ("東京へ", ["東", "京", "へ", "東京", "京へ", "東京へ"]),
        ("독을", ["독", "을", "독을"]),
        ("Привет, мир!", ["привет", "мир"]),
        ("कि ABC１", ["कि", "abc1"]),
        ("", []),
    ],
)
def test_a_bag_of_words_fits_the_script(text, words):
    assert list(bag_of_words(text)) == words


@pytest.mark.parametrize(
    "words", [("爆弾の作り方", "料理の作り方"), ("독약을 만들어", "국수를 만들어")]
)
def test_scripts_without_spaces_can_leak_too(task, words):
    texts = [words[0] if h else words[1] for h in task.harmful]
    assert probe_words(texts, task).auroc.estimate == 1.0


def test_texts_without_words_are_refused(task):
    with pytest.raises(InputError, match="none of the 100 training texts holds a word"):
        probe_words(["?!"] * 200, task)


def test_a_dense_probe_is_logistic_regression_on_standardised_columns(task):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 10)) * np.arange(1, 11) + task.harmful[:, None] * 0.6
    x[:, 4] = 3.0  # a constant coordinate is left out
    result = probe_dense(x, task)
    train, test, y = task.train, task.test, task.harmful
    kept = np.arange(10) != 4
    z = (x - x[train].mean(axis=0))[:, kept] / x[train].std(axis=0)[kept]
    model = LogisticRegression(C=result.strength).fit(z[train], y[train])
    np.testing.assert_allclose(result.scores, model.decision_function(z[test]), atol=1e-6)
    assert result.auroc.estimate == pytest.approx(roc_auc_score(y[test], result.scores))
    assert result.average_precision.estimate == pytest.approx(
        average_precision_score(y[test], result.scores)
    )
    assert result.inputs == 9


def test_a_probe_learns_nothing_from_the_test_side(task):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(200, 10)) + task.harmful[:, None]
    flipped = ProbeTask(
        np.where(task.test, ~task.harmful, task.harmful), task.train, task.test, task.clusters
    )
    np.testing.assert_array_equal(probe_dense(x, task).scores, probe_dense(x, flipped).scores)


def test_latents_give_one_score_sparse_or_dense(task):
    rng = np.random.default_rng(4)
    z = rng.exponential(size=(200, 50)) * (rng.random((200, 50)) < 0.3)
    z[:, :3] += task.harmful[:, None] * 2.0
    sparse, dense = probe_latents(csr_array(z), task), probe_latents(z, task)
    np.testing.assert_allclose(sparse.scores, dense.scores, atol=1e-9)
    assert sparse.auroc.estimate > 0.8


def test_a_k_sparse_probe_reads_the_latents_that_separate_best(task):
    rng = np.random.default_rng(5)
    z = rng.exponential(size=(200, 50)) * (rng.random((200, 50)) < 0.3)
    z[:, 7] = task.harmful * 2.0
    result = probe_k_sparse(csr_array(z), task, k=1)
    assert (result.inputs, result.name, result.auroc.estimate) == (1, "1 latent", 1.0)
    assert result.auroc.low < 1.0


def test_inputs_that_do_not_vary_score_one_half(task):
    assert probe_dense(np.ones((200, 3)), task).auroc.estimate == 0.5
    assert probe_latents(csr_array((200, 5)), task).auroc.estimate == 0.5


def test_shuffled_labels_are_not_learnt(task):
    x = np.random.default_rng(6).normal(size=(200, 30)) + task.harmful[:, None]
    areas = []
    for seed in range(1, 6):
        labels = np.random.default_rng(seed).permutation(100)[task.clusters] < 50
        areas.append(
            probe_dense(
                x, ProbeTask(labels, task.train, task.test, task.clusters, boots=10)
            ).auroc.estimate
        )
    assert 0.35 < np.mean(areas) < 0.65


def test_a_cluster_on_both_sides_is_refused(task):
    with pytest.raises(ValueError, match="1 clusters are on both sides"):
        ProbeTask(
            task.harmful,
            np.arange(200) < 101,
            np.arange(200) >= 101,
            task.clusters,
        )


def test_a_budget_that_did_not_suffice_is_said(task, monkeypatch):
    monkeypatch.setattr("saefty.probes.STEPS", 1)
    x = np.random.default_rng(7).normal(size=(200, 10)) + task.harmful[:, None]
    assert not probe_dense(x, task).converged
