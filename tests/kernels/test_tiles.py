"""Selecting in tiles gives the k largest of float64, whatever a row's neighbours look like."""

import pytest
import torch

from saefty.kernels import tiles
from saefty.kernels.base import KERNELS
from saefty.kernels.compiled import library

D_IN, D_SAE, K = 96, 2080, 8

pytestmark = pytest.mark.skipif(not tiles.ready(), reason="no compiler, or no tile registers")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def kernels(monkeypatch):
    """Kernels that fail where a row falls back on the float32 product of all latents."""
    found = KERNELS["cpu"]()
    monkeypatch.setattr(type(found), "table", lambda *_: pytest.fail("a row was not certain"))
    return found


def latents(n=D_SAE):
    return draw(n, D_IN, seed=1) / 10, draw(n, seed=2) / 10


def assert_largest(code, x, W, b, k=K):
    pre = (x.double() @ W.double().T + b.double()).relu()
    wanted = pre.topk(k, dim=1).values
    got = code.dense(len(W)).double()
    scale = x.double().norm(dim=1, keepdim=True) * W.double().norm(dim=1).max() + b.abs().max()
    chosen = torch.where(got > 0, pre, 0.0).topk(k, dim=1).values
    assert ((chosen - wanted).abs() <= 1e-6 * scale).all()
    assert (torch.where(got > 0, got - pre, 0.0).abs() <= 1e-6 * scale).all()
    assert ((got > 0).sum(1) == (wanted > 0).sum(1)).all()


@pytest.mark.parametrize("rows", [256, 300, 1025])
def test_any_number_of_rows_is_selected_without_a_float32_product(kernels, rows):
    x, (W, b) = draw(rows, D_IN), latents()
    assert_largest(kernels.topk(x, W.T, b, K), x, W, b)


def test_rows_below_what_the_first_ones_suggest_are_done_again(kernels):
    x, (W, b) = draw(1400, D_IN), latents()
    x[:512] = W[torch.arange(512)] + 0.1 * x[:512]  # one latent each, and what is left is small
    x[1000:] = x[1000:] * 1e-3
    assert_largest(kernels.topk(x, W.T, b * 0, K), x, W, b * 0)
    assert_largest(kernels.topk(x.flip(0), W.T, b * 0, K), x.flip(0), W, b * 0)


def test_rows_with_fewer_than_k_positive_latents_keep_those_they_have(kernels):
    x, (W, b) = draw(700, D_IN), latents()
    b = b - 3.2
    code = kernels.topk(x, W.T, b, K)
    assert 0 < (code.l0 < K).sum() < len(x)
    assert_largest(code, x, W, b)


def test_of_equal_latents_the_lower_one_goes_first(kernels):
    x, (W, b) = draw(400, D_IN), latents(D_SAE // 2)
    code = kernels.topk(x, W.repeat(2, 1).T, b.repeat(2), K)
    order = code.indices.view(-1, K)
    values = code.values.view(-1, K)
    assert torch.equal(values[:, ::2], values[:, 1::2])
    assert torch.equal(order[:, ::2] + D_SAE // 2, order[:, 1::2])


def test_rows_that_bfloat16_cannot_tell_apart_are_left_to_float32():
    x, (W, b) = draw(300, D_IN), latents()
    W = W[:1] + 1e-4 * W
    assert_largest(KERNELS["cpu"]().topk(x, W.T, b * 1e-5, K), x, W, b * 1e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_changes_no_other(bad):
    x, (W, b) = draw(600, D_IN), latents()
    clean = KERNELS["cpu"]().topk(x, W.T, b, K)
    x[70, 3] = bad
    code = KERNELS["cpu"]().topk(x, W.T, b, K)
    assert torch.equal(code.values[: 70 * K], clean.values[: 70 * K])
    assert torch.equal(code.values[-529 * K :], clean.values[-529 * K :])
    assert torch.equal(code.indices[-529 * K :], clean.indices[-529 * K :])


def test_threads_change_no_bit(kernels):
    x, (W, b) = draw(1100, D_IN), latents()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(kernels.topk(x, W.T, b, K))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other.values, found[0].values)
        assert torch.equal(other.indices, found[0].indices)


def test_torch_multiplies_as_before_in_between(kernels):
    x, (W, b) = draw(512, D_IN), latents()
    a = draw(256, 256).bfloat16()
    before = a @ a
    for _ in range(3):
        kernels.topk(x, W.T, b, K)
        assert torch.equal(a @ a, before)


def test_weights_that_moved_are_rounded_anew(kernels):
    x, (W, b) = draw(300, D_IN), latents()
    kernels.topk(x, W.T, b, K)
    moved = draw(D_SAE, D_IN, seed=5) / 10
    assert_largest(kernels.topk(x, moved.T, b, K), x, moved, b)


def test_without_tiles_the_selection_is_the_same(monkeypatch):
    x, (W, b) = draw(600, D_IN), latents()
    with_tiles = KERNELS["cpu"]().topk(x, W.T, b, K)
    assert library().functions is not None
    monkeypatch.setattr(tiles, "ready", lambda: False)
    without = KERNELS["cpu"]().topk(x, W.T, b, K)
    torch.testing.assert_close(with_tiles.dense(D_SAE), without.dense(D_SAE))
