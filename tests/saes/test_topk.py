import torch

from saefty.saes.base import SaeConfig


def make(k):
    sae = SaeConfig("topk", 4, 4, k).build()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(4))
        sae.W_dec.copy_(torch.eye(4))
    return sae


def test_the_k_largest_of_each_row_are_kept():
    x = torch.tensor([[1.0, 4.0, 3.0, 2.0], [5.0, -1.0, 0.5, 6.0]])
    assert make(2).encode(x).tolist() == [[0, 4, 3, 0], [5, 0, 0, 6]]


def test_a_row_with_fewer_positive_values_fires_fewer_latents():
    x = torch.tensor([[1.0, -4.0, -3.0, -2.0]])
    assert make(2).encode(x).tolist() == [[1, 0, 0, 0]]
    assert make(2).encode_sparse(x).l0.tolist() == [1]


def test_of_equal_values_the_lower_latent_is_kept():
    x = torch.tensor([[2.0, 2.0, 2.0, 2.0]])
    assert make(3).encode(x).tolist() == [[2, 2, 2, 0]]


def test_the_gradient_flows_through_the_kept_latents_alone():
    x = torch.tensor([[1.0, 4.0, 3.0, 2.0]], requires_grad=True)
    make(2).encode(x).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 0]]
