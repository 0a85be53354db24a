"""Sums by slices of columns are those of whole rows, to the last bit, and those of float64."""

import pytest
import torch

from saefty.kernels import cpu
from saefty.kernels.base import KERNELS, SparseCode
from saefty.kernels.compiled import library

pytestmark = pytest.mark.skipif(library().functions is None, reason="no compiler")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(code, by_value, x, error, unit, d_sae):
    return KERNELS["cpu"]().latent_gradients(code, by_value, x, error, 0.25, d_sae, unit)


@pytest.mark.parametrize("rows", [700, 2100])  # slices of 128 inputs, and of 64
@pytest.mark.parametrize("width", [384, 424])
@pytest.mark.parametrize("tangent", [False, True])
def test_slices_give_the_bits_of_whole_rows(monkeypatch, rows, width, tangent):
    d_sae, k = 333, 8
    pre = draw(rows, d_sae)
    pre[:, 7] = -100.0  # one latent never fires
    values, indices = pre.topk(k, dim=1)
    code = SparseCode.from_table(values, indices)
    x, error, by_value = (
        draw(rows, width, seed=1),
        draw(rows, width, seed=2),
        draw(rows * k, seed=3),
    )
    unit = torch.nn.functional.normalize(draw(d_sae, width, seed=4)) if tangent else None
    monkeypatch.setattr(cpu, "MANY", 10**9)
    monkeypatch.setattr(cpu, "SOME", 10**9)
    whole = gradients(code, by_value, x, error, unit, d_sae)
    monkeypatch.setattr(cpu, "SOME", 1)
    monkeypatch.setattr(cpu, "CACHED", rows * 64)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            sliced = gradients(code, by_value, x, error, unit, d_sae)
            for part in ("W_enc", "W_dec", "b_enc", "squared"):
                assert torch.equal(getattr(sliced, part), getattr(whole, part)), (part, threads)
    finally:
        torch.set_num_threads(before)
    z = torch.zeros(rows, d_sae, dtype=torch.double)
    z[code.row_of, code.indices] = by_value.double()
    torch.testing.assert_close(sliced.W_enc.double(), z.T @ x.double(), rtol=1e-5, atol=1e-4)
    assert not sliced.W_enc[7].any() and not sliced.W_dec[7].any()


def test_rows_that_no_cache_holds_are_sliced(monkeypatch):
    called = []
    call = cpu.call
    watched = lambda function, *given: (called.append(function.__name__), call(function, *given))  # noqa: E731
    monkeypatch.setattr(cpu, "call", watched)
    values, indices = draw(1024, 512).topk(8, dim=1)
    code = SparseCode.from_table(values, indices)
    x = draw(1024, 512)
    gradients(code, code.values, x, x, None, 512)
    gradients(code, code.values, x[:, :64].contiguous(), x[:, :64].contiguous(), None, 512)
    kinds = [name for name in called if name != "by_latent"]
    assert kinds == ["latent_gradients_by_slices", "latent_gradients"]
