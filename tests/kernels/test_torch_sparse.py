"""Gradients that are written into memory that is there are those of fresh memory, to the bit."""

import numpy as np
import pytest
import torch

from saefty.kernels import torch_sparse
from saefty.kernels.base import KERNELS, LatentGradients, SparseCode

D_SAE, ROWS, K = 96, 50, 6
KERNEL = KERNELS["torch_sparse"]()
PARTS = ("W_enc", "b_enc", "W_dec", "squared")


def case(d_in, seed=0):
    """Return a code in which every seventh latent is silent, its slopes, x, an error, a decoder."""
    generator = np.random.default_rng(seed)
    awake = np.array([latent for latent in range(D_SAE) if latent % 7])
    indices = np.stack([generator.choice(awake, K, replace=False) for _ in range(ROWS)])
    code = SparseCode(
        torch.from_numpy(generator.random(ROWS * K).astype(np.float32)),
        torch.from_numpy(indices.reshape(-1)),
        torch.arange(0, ROWS * K + 1, K),
    )
    numbers = (generator.normal(size=(n, d_in)).astype(np.float32) for n in (ROWS, ROWS, D_SAE))
    x, error, unit = (torch.from_numpy(some) for some in numbers)
    by_value = torch.from_numpy(generator.normal(size=ROWS * K).astype(np.float32))
    return code, by_value, x, error, unit / unit.norm(dim=1, keepdim=True)


def gradients(given, into=None):
    code, by_value, x, error, unit = given
    return KERNEL.latent_gradients(code, by_value, x, error, 0.5, D_SAE, unit, into)


def filled(d_in, number):
    memory = LatentGradients.empty(D_SAE, torch.empty(1, d_in))
    for part in PARTS:
        getattr(memory, part).fill_(number)
    return memory


@pytest.mark.parametrize("d_in", [1, 3, 64, 100, 513])
def test_what_stood_in_the_memory_does_not_matter(d_in):
    given = case(d_in)
    fresh = gradients(given)
    for number in (float("nan"), float("inf"), 7.0):
        memory = filled(d_in, number)
        found = gradients(given, memory)
        for part in PARTS:
            assert torch.equal(getattr(found, part), getattr(fresh, part))
            assert getattr(found, part).data_ptr() == getattr(memory, part).data_ptr()


@pytest.mark.parametrize("d_in", [1, 3, 64, 100, 513])
def test_sparse_products_and_embedding_bag_agree_to_the_bit(d_in, monkeypatch):
    given = case(d_in)
    one = gradients(given)
    monkeypatch.setattr(torch_sparse, "multiplies_in_place", lambda *_: False)
    two = gradients(given)
    for part in PARTS:
        assert torch.equal(getattr(one, part), getattr(two, part))


def test_gradients_are_those_of_dense_products_in_float64():
    code, by_value, x, error, unit = case(64)
    found = gradients((code, by_value, x, error, unit))
    z, slopes = np.zeros((ROWS, D_SAE)), np.zeros((ROWS, D_SAE))
    z[code.row_of, code.indices] = code.values
    slopes[code.row_of, code.indices] = by_value
    W_dec = 0.5 * z.T @ error.double().numpy()
    u = unit.double().numpy()
    W_dec -= (W_dec * u).sum(1, keepdims=True) * u
    wanted = {"W_enc": slopes.T @ x.double().numpy(), "b_enc": slopes.sum(0), "W_dec": W_dec}
    squares = [np.square(one.reshape(D_SAE, -1)).sum(1) for one in wanted.values()]
    for part, numbers in {**wanted, "squared": sum(squares)}.items():
        np.testing.assert_allclose(getattr(found, part).numpy(), numbers, rtol=1e-4, atol=1e-5)
    assert not found.W_enc[::7].any()
    assert not found.squared[::7].any()


def test_the_number_of_threads_changes_no_bit():
    given, before = case(513), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gradients(given)
        torch.set_num_threads(2)
        two = gradients(given)
    finally:
        torch.set_num_threads(before)
    for part in PARTS:
        assert torch.equal(getattr(one, part), getattr(two, part))
