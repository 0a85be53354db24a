"""The linear fit of effects, and its vectors, against scikit-learn, SciPy and NumPy."""

import logging

import numpy as np
import pytest
import scipy.sparse as sp
from scipy.linalg import orthogonal_procrustes
from sklearn.linear_model import LinearRegression, Ridge

from saefty.errors import ConfigError, NumericError
from saefty.records import Site
from saefty.sae_ts.effects import Effects
from saefty.sae_ts.fit import (
    PENALTIES,
    DescentMap,
    RidgeMap,
    choose_penalty,
    held_out,
    pseudo_inverse,
    rotation,
    sae_ts,
)

N, D, M = 120, 12, 30


def effects_of(noise=0.0, n=N, seed=0, dead=(), shift=0.0):
    """Return effects y = x A + c + noise and A, with latents that never fire where `dead`."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, D))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    matrix, common = rng.normal(size=(D, M)), rng.normal(size=M)
    baseline = 20 + rng.random(M)
    common += shift * (1 + np.arange(M) % 3)
    steered = baseline + x @ matrix + common + noise * rng.normal(size=(n, M))
    for latent in dead:
        steered[:, latent], baseline[latent], matrix[:, latent] = 0.0, 0.0, 0.0
    return Effects(x, sp.csr_matrix(steered), baseline, 1.0, Site(1), {}), matrix


def dense(effects):
    return effects.steered.toarray() - effects.baseline


def matrix_of(effect_map):
    return np.concatenate([block for _, block in effect_map.blocks()], axis=1)


def ridge(penalty):
    return lambda some: RidgeMap(some, penalty)


def one_hot(*latents):
    row = np.zeros(M)
    row[list(latents)] = 1.0
    return row


def unit(v):
    return v / np.linalg.norm(v)


def cosine(a, b):
    return float(unit(a) @ unit(b))


@pytest.mark.parametrize("penalty", [1e-3, 0.3, 10.0])
def test_the_ridge_fit_is_scikit_learn_s(penalty):
    effects, _ = effects_of(noise=0.5)
    centred = effects.vectors - effects.vectors.mean(axis=0)
    other = Ridge(alpha=penalty * (centred**2).sum() / D).fit(effects.vectors, dense(effects))
    fitted = RidgeMap(effects, penalty)
    np.testing.assert_allclose(matrix_of(fitted), other.coef_.T, atol=1e-9)
    np.testing.assert_allclose(fitted.bias, other.intercept_, atol=1e-9)
    weights = np.random.default_rng(1).normal(size=M)
    np.testing.assert_allclose(fitted.toward(weights), other.coef_.T @ weights, atol=1e-9)
    np.testing.assert_allclose(fitted.gram(), other.coef_.T @ other.coef_, atol=1e-8)


def test_columns_come_in_blocks_that_join_to_the_whole(monkeypatch):
    effects, _ = effects_of(noise=0.5)
    whole = matrix_of(RidgeMap(effects, 0.1))
    monkeypatch.setattr("saefty.sae_ts.fit.BLOCK", 7)
    parts = list(RidgeMap(effects, 0.1).blocks())
    assert [part.shape[1] for _, part in parts] == [7, 7, 7, 7, 2]
    np.testing.assert_allclose(matrix_of(RidgeMap(effects, 0.1)), whole, atol=1e-12)


@pytest.mark.parametrize("shift", [0.0, 20.0, 2000.0])
def test_gradient_descent_arrives_by_default_whatever_all_vectors_do(shift, caplog):
    effects, _ = effects_of(noise=0.2, shift=shift)
    other = LinearRegression().fit(effects.vectors, dense(effects))
    fitted = DescentMap(effects)
    found = matrix_of(fitted)
    assert min(cosine(found[:, k], other.coef_[k]) for k in range(M)) >= 0.9999
    np.testing.assert_allclose(fitted.bias, other.intercept_, atol=1e-3 * (1 + shift))
    for lam in (0.0, 1.0):
        own, exact = (sae_ts(one, one_hot(4), lam) for one in (fitted, RidgeMap(effects, 1e-9)))
        assert cosine(own, exact) >= 0.99
    assert "did not arrive" not in caplog.text


def test_a_descent_that_did_not_arrive_is_told(caplog):
    DescentMap(effects_of(noise=0.2)[0], rate=1e-5)
    assert "gradient descent did not arrive" in caplog.text


def test_gradient_descent_reaches_least_squares():
    effects, _ = effects_of(noise=0.2)
    other = LinearRegression().fit(effects.vectors, dense(effects))
    fitted = DescentMap(effects, batch=N)
    np.testing.assert_allclose(matrix_of(fitted), other.coef_.T, atol=5e-3)
    np.testing.assert_allclose(fitted.bias, other.intercept_, atol=5e-3)
    weights = one_hot(3)
    np.testing.assert_allclose(fitted.toward(weights), matrix_of(fitted)[:, 3], atol=1e-12)


@pytest.mark.parametrize("kind", [lambda e: RidgeMap(e, 1e-3), lambda e: DescentMap(e, batch=N)])
def test_the_effect_matrix_of_a_linear_world_is_recovered(kind):
    effects, matrix = effects_of(noise=0.05)
    found = matrix_of(kind(effects))
    cosines = [cosine(found[:, k], matrix[:, k]) for k in range(M)]
    assert min(cosines) >= 0.99


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_direction_is_the_formula(lam):
    effects, _ = effects_of(noise=0.3)
    fitted, target = RidgeMap(effects, 0.1), one_hot(4, 9)
    m, b = matrix_of(fitted), fitted.bias
    np.testing.assert_allclose(
        sae_ts(fitted, target, lam), unit(unit(m @ target) - lam * unit(m @ b)), atol=1e-12
    )
    inverse = np.linalg.pinv(m)
    np.testing.assert_allclose(
        pseudo_inverse(fitted, target, lam),
        unit(unit(target @ inverse) - lam * unit(b @ inverse)),
        atol=1e-6,
    )


def test_the_rotation_is_scipy_s_procrustes():
    effects, _ = effects_of(noise=0.3)
    fitted, target = RidgeMap(effects, 0.1), one_hot(4, 9)
    decoder = np.random.default_rng(5).normal(size=(M, D)) * np.linspace(1, 3, M)[:, None]
    units = decoder / np.linalg.norm(decoder, axis=1, keepdims=True)
    turn, _ = orthogonal_procrustes(units, matrix_of(fitted).T)
    expected = unit(unit((target @ units) @ turn) - 0.5 * unit(fitted.toward(fitted.bias)))
    np.testing.assert_allclose(rotation(fitted, decoder, target, 0.5), expected, atol=1e-9)


def test_a_rotated_decoder_is_turned_back():
    """Where the matrix is the decoder under one rotation, the variant finds a dead target too."""
    rng = np.random.default_rng(2)
    decoder = rng.normal(size=(M, D))
    turn = np.linalg.qr(rng.normal(size=(D, D)))[0]
    x = effects_of()[0].vectors
    steered = 20 + x @ (decoder @ turn).T
    steered[:, 7] = 0.0
    effects = Effects(x, sp.csr_matrix(steered), np.where(steered[0] == 0, 0.0, 20.0), 1.0,
                      Site(1), {})  # fmt: skip
    fitted = RidgeMap(effects, 1e-6)
    with pytest.raises(NumericError, match="moved under none"):
        sae_ts(fitted, one_hot(7))
    assert cosine(rotation(fitted, decoder, one_hot(7), 0.0), decoder[7] @ turn) > 0.99


def test_the_penalty_is_that_of_leaving_one_out_by_hand():
    effects, _ = effects_of(noise=3.0, n=40)
    target = one_hot(2)
    y, x = dense(effects)[:, 2], effects.vectors
    size = float(((x - x.mean(axis=0)) ** 2).sum()) / D
    errors = []
    for penalty in PENALTIES:
        missed = [
            y[i]
            - Ridge(alpha=penalty * size)
            .fit(np.delete(x, i, axis=0), np.delete(y, i))
            .predict(x[i : i + 1])[0]
            for i in range(len(x))
        ]
        errors.append(np.mean(np.square(missed)))
    assert choose_penalty(effects, target) == PENALTIES[int(np.argmin(errors))]
    assert 0 < int(np.argmin(errors)) < len(PENALTIES) - 1, "neither end is chosen by default"


def test_what_is_held_out_is_predicted_from_the_rest_alone():
    effects, _ = effects_of(noise=1.0)
    target = one_hot(2, 3)
    found = held_out(effects, target, ridge(0.1), share=0.25, seed=4)
    order = np.random.default_rng([4, 6]).permutation(N)
    test, train = order[:30], order[30:]
    x, y = effects.vectors, dense(effects)
    size = float(((x[train] - x[train].mean(axis=0)) ** 2).sum()) / D
    other = Ridge(alpha=0.1 * size).fit(x[train], y[train])
    predicted = other.predict(x[test])
    expected = np.corrcoef(predicted @ target, y[test] @ target)[0, 1]
    assert found.correlation == pytest.approx(expected, abs=1e-9)
    assert found.low < expected < found.high
    error = ((y[test] - predicted) ** 2).sum()
    spread = ((y[test] - y[train].mean(axis=0)) ** 2).sum()
    assert found.overall_r2 == pytest.approx(1 - error / spread, abs=1e-9)
    both = (y[test] - predicted) @ target
    around = (y[test] - y[train].mean(axis=0)) @ target
    assert found.r2 == pytest.approx(1 - (both**2).sum() / (around**2).sum(), abs=1e-9)
    assert (found.vectors, found.moved) == (30, 1.0)
    assert not found.is_low
    assert found.warning([2, 3]) is None


def test_the_map_that_is_judged_never_sees_what_is_held_out():
    effects, _ = effects_of(noise=1.0)
    seen = []

    def make(some):
        seen.append(some.vectors)
        return DescentMap(some)

    found = held_out(effects, one_hot(2), make, seed=4)
    order = np.random.default_rng([4, 6]).permutation(N)
    test, train = order[: found.vectors], order[found.vectors :]
    assert len(seen) == 1
    np.testing.assert_array_equal(seen[0], effects.vectors[train])
    other = LinearRegression().fit(effects.vectors[train], dense(effects)[train])
    predicted = other.predict(effects.vectors[test])[:, 2]
    expected = np.corrcoef(predicted, dense(effects)[test, 2])[0, 1]
    assert found.correlation == pytest.approx(expected, abs=1e-4)


def test_a_target_that_does_not_move_is_told():
    effects, _ = effects_of(dead=(5,))
    found = held_out(effects, one_hot(5), ridge(0.1))
    assert np.isnan(found.correlation)
    assert found.is_low
    assert "did not move" in found.warning([5])
    assert "moved under 0%" in found.warning([5])


def test_a_target_of_noise_is_told():
    effects, _ = effects_of(noise=50.0, n=600)
    warning = held_out(effects, one_hot(5), ridge(0.1)).warning([5])
    assert "predicted badly: held-out correlation" in warning


def test_taking_out_all_there_is_leaves_no_direction():
    effects, _ = effects_of()
    fitted = RidgeMap(effects, 1e-3)
    with pytest.raises(NumericError, match="nothing is left"):
        sae_ts(fitted, fitted.bias, 1.0)


def test_too_few_vectors_are_refused(caplog):
    caplog.set_level(logging.WARNING)
    effects, _ = effects_of(n=8)
    with pytest.raises(ConfigError, match="too few to hold any out"):
        held_out(effects, one_hot(1), ridge(0.1))
    with pytest.raises(ConfigError, match="penalty above 0"):
        RidgeMap(effects, 0.0)
