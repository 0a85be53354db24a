import numpy as np
import pytest
from scipy.sparse import csr_array

from saefty.metrics import base, firing
from saefty.metrics.firing import firing_stats, latent_quantiles

# Four tokens, three latents: 0 fires always, 1 once, 2 never.
CODES = np.array([[1.0, 0.0, 0.0], [2.0, 4.0, 0.0], [3.0, 0.0, 0.0], [2.0, 0.0, 0.0]])


@pytest.fixture
def codes():
    rng = np.random.default_rng(0)
    z = rng.exponential(size=(500, 60)) * (rng.random((500, 60)) < rng.random(60) ** 2)
    z[:, 0], z[:, 1], z[100] = 0.0, 1.5, 0.0
    return z


def test_four_tokens_by_hand():
    stats = firing_stats(csr_array(CODES))
    assert stats.firing_rate.tolist() == [1.0, 0.25, 0.0]
    assert stats.mean_all.tolist() == [2.0, 1.0, 0.0]
    assert stats.mean_when_active.tolist() == [2.0, 4.0, 0.0]
    assert stats.max_all.tolist() == [3.0, 4.0, 0.0]
    assert stats.active_count.tolist() == [4, 1, 0]
    assert stats.l0_counts.tolist() == [0, 3, 1]
    assert (stats.dead_share, stats.always_on_share) == pytest.approx((1 / 3, 1 / 3))
    assert stats.mean_l0 == 1.25


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_statistics_equal_the_dense_matrixs(codes, eps):
    stats = firing_stats(csr_array(codes), eps=eps)
    fires = codes > eps
    np.testing.assert_allclose(stats.firing_rate, fires.mean(axis=0))
    np.testing.assert_allclose(stats.mean_all, codes.mean(axis=0))
    active = np.where(fires, codes, np.nan)
    active[:, ~fires.any(axis=0)] = 0.0
    np.testing.assert_allclose(stats.mean_when_active, np.nanmean(active, axis=0))
    np.testing.assert_allclose(stats.max_all, codes.max(axis=0))
    l0 = fires.sum(axis=1)
    assert stats.mean_l0 == pytest.approx(l0.mean())
    for share in (0.0, 0.05, 0.5, 0.95, 0.99, 1.0):
        assert stats.l0_quantile(share) == pytest.approx(np.quantile(l0, share))
    assert stats.dead_share == (~fires).all(axis=0).mean()
    assert stats.always_on_share == (fires.mean(axis=0) >= 0.99).mean()


def test_blocks_give_what_the_whole_gives(codes):
    whole = firing_stats(csr_array(codes))
    blocks = firing_stats(csr_array(part) for part in np.array_split(codes, 7))
    for name in ("firing_rate", "mean_all", "mean_when_active", "max_all", "l0_counts"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name))
    assert blocks.token_count == 500


def test_codes_stored_by_falling_value_count_the_same():
    shuffled = csr_array(([4.0, 2.0, 1.0], [1, 0, 0], [0, 2, 3]), shape=(2, 3))
    stats = firing_stats(shuffled)
    assert stats.active_count.tolist() == [2, 1, 0]
    assert stats.l0_counts.tolist() == [0, 1, 1]


def test_no_blocks_are_refused():
    with pytest.raises(ValueError, match="no block of codes"):
        firing_stats([])


def test_a_store_without_tokens_has_no_l0():
    stats = firing_stats(csr_array((0, 3)))
    assert np.isnan(stats.mean_l0)
    assert stats.firing_rate.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("block", [1 << 20, 100])
def test_quantiles_equal_numpys(codes, block, kind, monkeypatch):
    monkeypatch.setattr(base, "BLOCK_VALUES", block)
    codes = codes.astype(kind).astype(np.float64)
    shares = np.array([0.0, 0.01, 0.5, 0.77, 0.99, 1.0])
    np.testing.assert_allclose(
        latent_quantiles(csr_array(codes), shares), np.quantile(codes, shares, axis=0), atol=1e-12
    )


def test_quantiles_of_active_values_leave_the_zeros_out(codes):
    shares = np.array([0.1, 0.5, 0.9])
    result = latent_quantiles(csr_array(codes), shares, active_only=True)
    fires = (codes > 0).any(axis=0)
    np.testing.assert_array_equal(np.isnan(result).all(axis=0), ~fires)
    for j in np.flatnonzero(fires):
        active = codes[codes[:, j] > 0, j]
        np.testing.assert_allclose(result[:, j], np.quantile(active, shares), atol=1e-12)


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_of_signed_codes_the_magnitudes_count(codes, eps):
    signed = codes * np.random.default_rng(1).choice([-1.0, 1.0], size=codes.shape)
    assert (signed < 0).any()
    ours, plain = firing_stats(csr_array(signed), eps=eps), firing_stats(csr_array(codes), eps=eps)
    for name in vars(plain):
        np.testing.assert_array_equal(getattr(ours, name), getattr(plain, name), err_msg=name)
    shares = np.array([0.1, 0.5, 0.9])
    wanted = np.quantile(np.abs(signed), shares, axis=0)
    np.testing.assert_allclose(latent_quantiles(signed, shares), wanted)
    np.testing.assert_allclose(latent_quantiles(csr_array(signed), shares), wanted)


@pytest.mark.parametrize("eps", [0.0, 0.5])
@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64])
def test_dense_blocks_give_what_the_dense_matrix_gives(codes, eps, kind, monkeypatch):
    monkeypatch.setattr(firing, "DENSE_VALUES", 700)
    z = (codes * np.random.default_rng(1).choice([-1.0, 1.0], size=codes.shape)).astype(kind)
    x = np.abs(z.astype(np.float64))
    stats = firing_stats(
        iter([z[:100], csr_array(z[100:130].astype(np.float64)), z[130:]]), eps=eps
    )
    fires = x > eps
    np.testing.assert_array_equal(stats.active_count, fires.sum(axis=0))
    np.testing.assert_allclose(stats.mean_all, x.mean(axis=0), rtol=1e-13)
    wanted = np.where(fires, x, 0).sum(axis=0) / np.maximum(fires.sum(axis=0), 1)
    np.testing.assert_allclose(stats.mean_when_active, wanted, rtol=1e-13)
    np.testing.assert_array_equal(stats.max_all, x.max(axis=0))
    np.testing.assert_array_equal(stats.l0_counts, np.bincount(fires.sum(axis=1)))
    assert stats.token_count == 500


def test_half_precision_is_widened_exactly():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    np.testing.assert_array_equal(firing.widened(every), every.astype(np.float32))
    single = np.ones(3, np.float32)
    assert firing.widened(single) is single
