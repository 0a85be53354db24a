import numpy as np
import pytest
from scipy.sparse import csr_array
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from saefty.metrics import base
from saefty.metrics.alignment import auroc, consensus, dfreq, dmag, kl, kl_histogram

# Four examples, three latents: latent 0 fires on both harmful examples and no other, latent 1 on
# one of each, latent 2 on both harmless ones.
Z = np.array([[2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 5.0]])
HARMFUL = np.array([True, True, False, False])


@pytest.fixture
def many():
    """Two hundred examples, sparse latents with ties, each more or less related to harm."""
    rng = np.random.default_rng(3)
    harmful = rng.random(200) < 0.4
    z = rng.exponential(size=(200, 50)).round(1) * (rng.random((200, 50)) < 0.3)
    z[:, :20] += harmful[:, None] * rng.random(20) * (rng.random((200, 20)) < 0.5)
    z[:, 48], z[:, 49] = 0.0, 0.1
    return z, harmful


def test_dfreq_is_difference_of_firing_frequencies():
    np.testing.assert_allclose(dfreq(Z, HARMFUL), [1.0, 0.0, -1.0])


def test_dfreq_counts_only_what_exceeds_eps():
    np.testing.assert_allclose(dfreq(Z, HARMFUL, eps=1.0), [0.5, -0.5, -0.5])


def test_dfreq_changes_sign_when_the_labels_swap():
    np.testing.assert_allclose(dfreq(Z, ~HARMFUL), -dfreq(Z, HARMFUL))


def test_dmag_is_difference_of_means_with_zeros_counted():
    np.testing.assert_allclose(dmag(Z, HARMFUL), [1.5, -1.0, -3.0])


def test_auroc_counts_pairs_won_and_half_of_ties():
    # latent 1: harmful 1, 0 against harmless 3, 0: won 1, tied 1 of 4 pairs.
    np.testing.assert_allclose(auroc(Z, HARMFUL), [1.0, 0.375, 0.0])


def test_auroc_equals_scikit_learns(many):
    z, harmful = many
    expected = [roc_auc_score(harmful, z[:, j]) for j in range(z.shape[1])]
    np.testing.assert_allclose(auroc(csr_array(z), harmful), expected, rtol=0, atol=1e-12)


def test_auroc_of_signed_columns_equals_scikit_learns(many):
    z, harmful = many
    z = z - 0.5 * (z > 0)
    expected = [roc_auc_score(harmful, z[:, j]) for j in range(z.shape[1])]
    np.testing.assert_allclose(auroc(z, harmful), expected, rtol=0, atol=1e-12)


def test_auroc_does_not_depend_on_the_size_of_blocks(many, monkeypatch):
    z, harmful = many
    whole = auroc(z, harmful)
    monkeypatch.setattr(base, "BLOCK_VALUES", 300)
    np.testing.assert_array_equal(auroc(z, harmful), whole)


def test_kl_equals_the_integral_between_two_gaussians(many):
    z, harmful = many
    grid = np.linspace(-20, 20, 400_001)
    a, b = z[harmful, 0], z[~harmful, 0]
    p, q = norm(a.mean(), a.std()), norm(b.mean(), b.std())
    integral = np.trapezoid(p.pdf(grid) * (p.logpdf(grid) - q.logpdf(grid)), grid)
    np.testing.assert_allclose(kl(z, harmful)[0], integral, rtol=1e-6)


def test_kl_floors_each_variance_at_one_percent_of_the_whole():
    # Constant in both groups, 1 and 0: variance of the whole ¼, floor 0.0025, KL = ½ · 1 / 0.0025.
    z = np.array([[1.0], [1.0], [0.0], [0.0]])
    np.testing.assert_allclose(kl(z, HARMFUL), [200.0])


def test_kl_is_clipped_at_its_99th_percentile_over_firing_latents(many):
    z, harmful = many
    z = np.hstack([z, harmful[:, None] * 1.0, np.zeros((200, 500))])
    scores = kl(z, harmful)
    # Latent 50 is the label itself: m differs by 1, and the floor is 1 % of p (1 - p).
    before = np.append(scores[:50], 0.5 / (0.01 * harmful.mean() * (1 - harmful.mean())))
    fires = (z[:, :51] > 0).any(axis=0)
    np.testing.assert_allclose(scores[50], np.percentile(before[fires], 99))


def test_kl_does_not_change_when_a_latent_is_scaled(many):
    z, harmful = many
    np.testing.assert_allclose(kl(z * 1000, harmful), kl(z, harmful), rtol=1e-9)


def test_kl_histogram_follows_its_definition(many):
    z, harmful = many
    z = z * (1 + 1e-3 * np.random.default_rng(0).random(z.shape))  # off the edges of the bins
    z[:, 49] = 0.1
    expected = []
    for column in z.T:
        edges = np.linspace(min(column.min(), 0), max(column.max(), 1e-9), 21)
        counts = [np.histogram(column[g], edges)[0] + 1.0 for g in (harmful, ~harmful)]
        p, q = (c / c.sum() for c in counts)
        expected.append((p * np.log(p / q)).sum() if np.ptp(column) else 0.0)
    expected = np.minimum(expected, np.percentile(np.array(expected)[(z > 0).any(axis=0)], 99))
    np.testing.assert_allclose(kl_histogram(z, harmful), expected, atol=1e-12)


def test_consensus_is_the_weighted_mean_of_z_scores_over_firing_latents(many):
    z, harmful = many
    fires = (z > 0).any(axis=0)
    parts = [
        dfreq(z, harmful),
        dmag(z, harmful),
        auroc(z, harmful) - 0.5,
        np.sign(dmag(z, harmful)) * kl(z, harmful),
    ]
    z_scores = [(part - part[fires].mean()) / part[fires].std() for part in parts]
    expected = np.average(z_scores, axis=0, weights=[1, 1, 1, 0.5])
    expected[[48, 49]] = 0.0  # one that never fires, one that is constant
    np.testing.assert_allclose(consensus(z, harmful), expected, atol=1e-9)


def test_consensus_of_latents_that_never_fire_is_zero():
    assert consensus(np.zeros((4, 3)), HARMFUL).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("score", [dfreq, dmag, auroc, kl, kl_histogram, consensus])
def test_scores_refuse_labels_of_one_kind(score):
    with pytest.raises(ValueError, match="all 4 examples are labelled harmful"):
        score(Z, np.ones(4, dtype=bool))
