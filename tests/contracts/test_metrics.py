"""What every latent score must do, whoever registered it."""

import numpy as np
import pytest
from scipy.sparse import csc_array, csr_array

from saefty.metrics.base import LATENT_SCORES


@pytest.fixture
def examples():
    rng = np.random.default_rng(0)
    harmful = rng.random(400) < 0.5
    z = rng.exponential(size=(400, 30)) * (rng.random((400, 30)) < 0.4)
    z[:, :5] += 2 * harmful[:, None] * (rng.random((400, 5)) < 0.5)
    z[:, 10], z[:, 11] = 0.0, 0.3  # never fires; always the same
    return z, harmful


@pytest.fixture(params=list(LATENT_SCORES))
def score(request):
    return LATENT_SCORES[request.param]


def test_there_is_one_finite_number_a_latent(score, examples):
    values = score(*examples)
    assert values.shape == (30,)
    assert np.isfinite(values).all()


def test_permuting_latents_permutes_scores(score, examples):
    z, harmful = examples
    order = np.random.default_rng(1).permutation(30)
    np.testing.assert_allclose(score(z[:, order], harmful), score(z, harmful)[order], atol=1e-9)


def test_permuting_examples_changes_nothing(score, examples):
    z, harmful = examples
    order = np.random.default_rng(1).permutation(400)
    np.testing.assert_allclose(score(z[order], harmful[order]), score(z, harmful), atol=1e-9)


def test_a_constant_latent_scores_what_a_silent_one_does(score, examples):
    values = score(*examples)
    np.testing.assert_allclose(values[11], values[10], atol=1e-12)
    assert np.isclose(values[10], 0.0) or np.isclose(values[10], 0.5)


def test_sparse_and_dense_matrices_score_alike(score, examples):
    z, harmful = examples
    for sparse in (csr_array, csc_array):
        np.testing.assert_array_equal(score(sparse(z), harmful), score(z, harmful))


def test_float32_scores_as_its_float64_values_do(score, examples):
    z, harmful = examples
    narrow = z.astype(np.float32)
    np.testing.assert_array_equal(score(narrow, harmful), score(narrow.astype(float), harmful))


def test_latents_that_follow_the_label_score_above_the_rest(score, examples):
    values = score(*examples)
    assert values[:5].mean() > values[12:].mean()
