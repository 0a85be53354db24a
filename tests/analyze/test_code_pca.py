"""Principal components of sampled codes, against dense singular values in float64."""

import numpy as np
import pytest
from scipy.sparse import csr_array
from sklearn.utils.extmath import randomized_svd

from saefty import code_pca
from saefty.code_pca import project_codes
from saefty.token_sample import TokenSample

FORMS = ("raw", "centred", "standardised")
WITHIN = 0.015  # of σ, where no direction stands out


def codes(tokens=400, width=150, rate=0.1, offset=0.0):
    rng = np.random.default_rng(0)
    # Two kinds of token, each with latents of its own, and noise.
    kinds = rng.random((tokens, 2)) < (0.5, 0.3)
    groups = rng.random((2, width)) < [[0.4], [0.2]]
    fires = (rng.random((tokens, width)) < rate) | (
        (kinds @ groups) & (rng.random((tokens, width)) < 0.8)
    )
    z = rng.exponential(size=(tokens, width)) * fires * (1 + 3 * (kinds @ groups))
    z[:, 0] = 0.0
    z[:, 1] = 3.0
    return z + offset


def form_of(z, form):
    if form == "raw":
        return z
    a = z - z.sum(axis=0) / max(len(z), 1)
    if form == "standardised":
        deviation = np.sqrt((a**2).sum(axis=0) / max(len(z), 1))
        a = np.where(deviation > 1e-6, a / np.where(deviation > 1e-6, deviation, 1), 0.0)
    return a


CASES = {
    "sparse": TokenSample(tuple(map(csr_array, np.array_split(codes(), 3))), 150),
    "dense": TokenSample(tuple(np.array_split(codes(rate=0.6), 3)), 150),
    "dense with a large mean": TokenSample((codes(rate=0.6, offset=500.0),), 150),
    "mixed": TokenSample((csr_array(codes()[:200]), codes()[200:]), 150),
    "wider than long": TokenSample((csr_array(codes(tokens=40)),), 150),
}


def matrix(sample):
    return np.concatenate([b.toarray() if isinstance(b, csr_array) else b for b in sample.blocks()])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", list(CASES))
def test_scores_shares_and_components_are_those_of_the_dense_svd(case, form):
    a = form_of(matrix(CASES[case]), form)
    u, s, vt = np.linalg.svd(a, full_matrices=False)
    found = project_codes(CASES[case]).forms[form]
    np.testing.assert_allclose(found.shares, s[:2] ** 2 / (a**2).sum(), rtol=1e-6)
    for i in range(2):
        sign = np.sign(found.components[i] @ vt[i])
        np.testing.assert_allclose(sign * found.components[i], vt[i], atol=1e-5)
        np.testing.assert_allclose(sign * found.scores[:, i], u[:, i] * s[i], atol=1e-5 * s[i])
        assert found.scores[np.argmax(np.abs(found.scores[:, i])), i] > 0
    assert all(found.stands_out)


def test_the_first_raw_component_of_codes_with_a_large_mean_is_the_mean():
    assert project_codes(CASES["dense with a large mean"]).mean_cosine > 0.9999


def test_another_seed_gives_the_same_components():
    one, other = project_codes(CASES["sparse"], seed=0), project_codes(CASES["sparse"], seed=9)
    for form in FORMS:
        np.testing.assert_allclose(one.forms[form].scores, other.forms[form].scores, atol=1e-4)


@pytest.mark.parametrize(
    "z",
    [
        np.zeros((6, 4)),
        np.ones((1, 5)),
        np.zeros((1, 1)),
        np.ones((5, 3)),
        np.eye(2),
        np.zeros((0, 3)),
    ],
    ids=["all zero", "one token", "one number", "all the same", "two tokens", "no token"],
)
def test_codes_without_two_directions_leave_the_others_at_zero(z):
    found = project_codes(TokenSample((csr_array(z),), z.shape[1]))
    for form in FORMS:
        a = form_of(z, form)
        s = np.pad(np.linalg.svd(a, compute_uv=False), (0, 2))[:2]
        projection = found.forms[form]
        assert projection.scores.shape == (len(z), 2)
        np.testing.assert_allclose(np.linalg.norm(projection.scores, axis=0), s, atol=1e-9)


@pytest.mark.parametrize("times", [2, 3, 5])
def test_components_of_equal_length_are_all_found(times):
    z = np.kron(np.eye(times), codes(tokens=60, width=30)[:, 2:])
    found = project_codes(TokenSample((csr_array(z),), z.shape[1]))
    for form in FORMS:
        a = form_of(z, form)
        s = np.linalg.svd(a, compute_uv=False)
        ours = found.forms[form]
        np.testing.assert_allclose(np.linalg.norm(ours.scores, axis=0), s[:2], rtol=1e-6)
        np.testing.assert_allclose(ours.components @ ours.components.T, np.eye(2), atol=1e-9)
        if times < 5:
            assert ours.stands_out == (s[0] ** 2 >= 1.1 * s[2] ** 2, s[1] ** 2 >= 1.1 * s[2] ** 2)


def test_as_many_equal_directions_as_there_are_tokens_do_not_stand_out():
    found = project_codes(TokenSample((csr_array(np.eye(7)),), 7))
    assert not any(any(projection.stands_out) for projection in found.forms.values())


def test_codes_that_are_not_held_in_double_precision_give_the_same(monkeypatch):
    held = project_codes(CASES["sparse"])
    monkeypatch.setattr(code_pca, "HELD_VALUES", 0)
    read = project_codes(CASES["sparse"])
    for form in FORMS:
        np.testing.assert_allclose(read.forms[form].scores, held.forms[form].scores, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_of_sparse_codes_without_structure_more_variance_is_found_than_by_scikit_learn(form):
    rng = np.random.default_rng(3)
    z = rng.exponential(size=(900, 1200)) * (rng.random((900, 1200)) < 0.02)
    ours = project_codes(TokenSample((csr_array(z),), 1200)).forms[form]
    a = form_of(z, form)
    s = np.linalg.svd(a, compute_uv=False)[:2]
    _, theirs, _ = randomized_svd(a, 2, random_state=0)
    found = np.linalg.norm(ours.scores, axis=0)
    assert (found >= s * (1 - WITHIN)).all()
    assert (found**2).sum() >= (theirs**2).sum()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("power", [1, 3])
def test_where_no_direction_stands_out_sigma_is_right_from_any_start(seed, power):
    rng = np.random.default_rng([900, 1200])
    z = (rng.exponential(size=(900, 1200)) * (rng.random((900, 1200)) < 0.02)) ** power
    found = project_codes(TokenSample((csr_array(z),), 1200), seed)
    for form in FORMS:
        a = form_of(z, form)
        squares = np.linalg.eigvalsh(a @ a.T)[:-3:-1]
        ours = np.linalg.norm(found.forms[form].scores, axis=0) ** 2
        assert (ours <= squares * (1 + 1e-9)).all()
        assert (ours >= squares * (1 - WITHIN) ** 2).all()


def test_parts_with_indices_of_64_bits_give_the_same():
    parts = [part.copy() for part in CASES["sparse"].parts]
    for part in parts:
        part.indices, part.indptr = part.indices.astype(np.int64), part.indptr.astype(np.int64)
    found, same = project_codes(TokenSample(tuple(parts), 150)), project_codes(CASES["sparse"])
    for form in FORMS:
        np.testing.assert_array_equal(found.forms[form].scores, same.forms[form].scores)


def test_codes_in_which_no_direction_stands_out_say_so():
    z = np.random.default_rng(0).standard_normal((800, 800))
    found = project_codes(TokenSample((z,), 800))
    assert not any(any(projection.stands_out) for projection in found.forms.values())
    for form in FORMS:
        a = form_of(z, form)
        s = np.linalg.svd(a, compute_uv=False)[:2]
        ours = np.linalg.norm(found.forms[form].scores, axis=0)
        assert (ours <= s * (1 + 1e-9)).all()
        np.testing.assert_allclose(ours, s, rtol=0.01)
