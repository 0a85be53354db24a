import numpy as np
import pytest
import torch
from sklearn.preprocessing import StandardScaler

from saefty.errors import InputError, NumericError
from saefty.saes.scaler import Scaler, fit_scaler

# Mean (2, 10); squared distances from it sum to 8 + 32 over 4 rows of 2 dimensions.
X = torch.tensor([[0.0, 6.0], [2.0, 10.0], [2.0, 10.0], [4.0, 14.0]])


def test_a_scalar_scale_makes_the_mean_squared_norm_d_in():
    scaler = fit_scaler([X], "scalar")
    assert scaler.mean.tolist() == [2, 10]
    np.testing.assert_allclose(scaler.scale, [np.sqrt(5), np.sqrt(5)])
    assert scaler.apply(X.double()).square().sum(dim=1).mean() == pytest.approx(2)


def test_a_scale_per_dimension_equals_scikit_learns():
    scaler = fit_scaler([X], "per_dimension")
    np.testing.assert_allclose(scaler.apply(X), StandardScaler().fit_transform(X), rtol=1e-6)


def test_none_changes_nothing():
    assert fit_scaler([X], "none").apply(X).tolist() == X.tolist()


def test_batches_give_what_one_batch_gives():
    x = torch.randn(1000, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100
    whole, parts = fit_scaler([x]), fit_scaler(x.split(7))
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(parts.scale, whole.scale, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.mean, x.double().numpy().mean(axis=0), rtol=1e-12)


def test_undo_takes_apply_back():
    scaler = fit_scaler([X], "per_dimension")
    torch.testing.assert_close(scaler.undo(scaler.apply(X.double())), X.double())


def test_a_dimension_that_does_not_vary_keeps_a_finite_scale():
    x = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    scaled = fit_scaler([x], "per_dimension").apply(x)
    assert scaled.tolist() == [[-1, 0], [1, 0]]


def test_equal_rows_are_refused():
    with pytest.raises(InputError, match="all 3 activations are equal"):
        fit_scaler([torch.ones(3, 2)])


def test_no_rows_are_refused():
    with pytest.raises(InputError, match="no activations"):
        fit_scaler([])


def test_nan_is_refused():
    with pytest.raises(NumericError):
        fit_scaler([torch.tensor([[1.0, float("nan")]])])


def test_a_record_reads_back_exactly():
    scaler = fit_scaler([X / 3])
    again = Scaler.from_record(scaler.record())
    assert again.mean.tolist() == scaler.mean.tolist()
    assert again.scale.tolist() == scaler.scale.tolist()
