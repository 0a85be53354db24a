import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from saefty.evaluation import evaluate_latents, shuffled_control
from saefty.metrics.significance import permuted_labels


def world(seed=0, examples=240, d_sae=120, signal=1.5):
    """Latents 0-3 are larger on harmful examples, 4 and 5 on harmless ones; 119 never fires."""
    rng = np.random.default_rng(seed)
    harmful = rng.permutation(np.arange(examples) % 2 == 0)
    z = rng.exponential(size=(examples, d_sae)) * (rng.random((examples, d_sae)) < 0.3)
    z[:, :4] += signal * harmful[:, None] * (rng.random((examples, 4)) < 0.6)
    z[:, 4:6] += signal * ~harmful[:, None] * (rng.random((examples, 2)) < 0.6)
    z[:, 119] = 0.0
    return csr_array(z), harmful


def clustered_noise(seed, clusters=60, size=8, d_sae=150):
    """Rows of a cluster nearly repeat each other; labels go by cluster and mean nothing."""
    rng = np.random.default_rng(seed)
    codes = np.repeat(np.arange(clusters), size)
    centre = rng.exponential(size=(clusters, d_sae)) * (rng.random((clusters, d_sae)) < 0.4)
    z = centre[codes] * rng.uniform(0.9, 1.1, (len(codes), d_sae))
    harmful = rng.permutation(np.arange(clusters) % 2 == 0)[codes]
    return csr_array(z), harmful, codes


def test_latents_that_follow_harm_are_found_and_lead_the_ranking():
    found = evaluate_latents(*world(), top=10, boots=200)
    assert found.finding
    assert set(found.top(4)) == {0, 1, 2, 3}
    assert {one.latent for one in found.latents if one.found} == {0, 1, 2, 3}


def test_without_signal_there_is_no_finding():
    assert not evaluate_latents(*world(signal=0.0), top=10, boots=100).finding


def test_latents_of_the_harmless_side_are_reported_when_asked_for():
    both = evaluate_latents(*world(), top=6, side="both", boots=100)
    directions = {one.latent: one.direction for one in both.latents}
    assert directions[4] == directions[5] == -1
    assert directions[0] == 1
    # Only harm-positive latents are offered for gating.
    assert not {4, 5} & set(both.top(50))


def test_selection_numbers_come_from_the_selection_half_alone():
    z, harmful = world()
    before = evaluate_latents(z, harmful, boots=50)
    changed = z.toarray()
    changed[before.report] *= 7.0
    changed[before.report, 50] = 100.0
    after = evaluate_latents(csr_array(changed), harmful, boots=50)
    for name, scores in before.scores.items():
        np.testing.assert_array_equal(after.scores[name], scores)
    assert after.top(50) == before.top(50)


def test_reported_numbers_come_from_the_report_half():
    z, harmful = world()
    found = evaluate_latents(z, harmful, top=5, boots=100)
    held_out, labels = z.toarray()[found.report], harmful[found.report]
    raw = []
    for one in found.latents:
        column = held_out[:, one.latent]
        fires = column > 0
        assert one.auroc.estimate == pytest.approx(roc_auc_score(labels, column))
        assert one.dfreq.estimate == pytest.approx(fires[labels].mean() - fires[~labels].mean())
        raw.append(mannwhitneyu(column[labels], column[~labels], method="asymptotic").pvalue)
        assert one.p == pytest.approx(raw[-1])
    assert found.test == "Mann-Whitney"
    assert min(one.p_holm for one in found.latents) == pytest.approx(min(5 * min(raw), 1.0))


def test_a_finding_needs_all_three_gates():
    found = evaluate_latents(*world(), top=20, boots=50)
    for one in found.latents:
        gates = (one.selection["q"], one.selection["max_p"], one.p_holm)
        assert one.found == all(gate <= 0.05 for gate in gates)


def test_fewer_latents_than_asked_for_are_reported_when_fewer_fire():
    z, harmful = world(d_sae=120)
    only = z.toarray()
    only[:, 2:] = 0.0
    found = evaluate_latents(csr_array(only), harmful, top=50, boots=50)
    assert {one.latent for one in found.latents} == {0, 1}


def test_a_store_in_which_nothing_fires_gives_no_latents():
    _, harmful = world()
    found = evaluate_latents(csr_array((240, 30)), harmful, boots=50)
    assert found.latents == ()
    assert found.best is None
    assert not found.finding


def test_counts_add_up():
    found = evaluate_latents(*world(), boots=50)
    assert found.counts["examples"] == 240
    assert found.counts["selection_examples"] + found.counts["report_examples"] == 240
    assert found.counts["firing_latents"] == 119


def test_the_same_seed_gives_the_same_evaluation():
    one, other = (evaluate_latents(*world(), top=5, boots=50, seed=7) for _ in range(2))
    assert one.latents == other.latents
    np.testing.assert_array_equal(one.null_maximum, other.null_maximum)


def test_a_source_that_fixes_the_label_leaves_nothing_to_find():
    z, harmful = world()
    found = evaluate_latents(z, harmful, sources=harmful.astype(int), boots=50)
    assert found.log10_arrangements == 0.0
    assert not found.finding


def test_clustered_rows_are_tested_by_cluster_permutation():
    assert evaluate_latents(*clustered_noise(0), top=5, boots=50).test == "cluster permutation"


def test_a_real_difference_between_clusters_is_found():
    z, harmful, codes = clustered_noise(0)
    z = z.toarray()
    z[:, 3] += 2.0 * harmful * np.random.default_rng(0).random(60)[codes]
    found = evaluate_latents(csr_array(z), harmful, codes, top=5, boots=50)
    assert [one.latent for one in found.latents if one.found] == [3]


def test_a_finding_is_claimed_in_at_most_5_of_100_shuffles_of_clustered_labels():
    z, harmful, codes = clustered_noise(1)
    shuffles = permuted_labels(harmful, codes, permutations=100, seed=11)
    claimed = sum(
        evaluate_latents(z, labels, codes, top=10, boots=10, permutations=200, seed=i).finding
        for i, labels in enumerate(shuffles)
    )
    assert claimed <= 5


def test_a_finding_is_claimed_in_at_most_5_of_100_shuffles_of_lone_labels():
    z, harmful = world()
    shuffles = permuted_labels(harmful, permutations=100, seed=12)
    claimed = sum(
        evaluate_latents(z, labels, top=10, boots=10, permutations=200, seed=i).finding
        for i, labels in enumerate(shuffles)
    )
    assert claimed <= 5


def test_the_shuffled_control_lies_around_one_half():
    areas = shuffled_control(*world(), shuffles=20)
    assert areas.shape == (20,)
    assert abs(areas.mean() - 0.5) < 0.05
    assert areas.std() > 0.01
