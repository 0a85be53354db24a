import numpy as np
import pytest
import torch

from saefty.errors import ConfigError
from saefty.saes.base import SaeConfig

D_IN, D_SAE, K = 5, 12, 2
X = torch.randn(40, D_IN, generator=torch.Generator().manual_seed(0)).double()


def make():
    sae = SaeConfig("matryoshka", D_IN, D_SAE, K, options={"prefixes": 3}).build().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return sae


def test_prefixes_are_halvings():
    assert make().prefixes == [3, 6, 12]


def test_loss_and_gradient_are_the_mean_over_prefixes():
    sae = make()
    w, x = {name: value.detach().numpy() for name, value in sae.state_dict().items()}, X.numpy()
    pre = x @ w["W_enc"] + w["b_enc"]
    z = np.where(pre >= np.sort(pre, axis=None)[-K * len(x)], np.maximum(pre, 0), 0)
    errors = [z[:, :m] @ w["W_dec"][:m] + w["b_dec"] - x for m in (3, 6, 12)]
    loss = sae.loss(X)
    assert loss.total.item() == pytest.approx(np.mean([(e**2).mean() for e in errors]), rel=1e-12)
    assert loss.reconstruction.item() == pytest.approx((errors[2] ** 2).mean(), rel=1e-12)
    loss.total.backward()
    by_row = np.zeros_like(w["W_dec"])
    for m, error in zip((3, 6, 12), errors, strict=True):
        by_row[:m] += 2 / x.size / 3 * (z.T @ error)[:m]
    np.testing.assert_allclose(sae.W_dec.grad, by_row, rtol=1e-9, atol=1e-14)


def test_the_threshold_lets_k_latents_fire_on_average():
    sae = make()
    sae.calibrate(X)
    assert sae.encode_sparse(X).l0.double().mean() == K


@pytest.mark.parametrize("n", [0, 5])
def test_more_prefixes_than_halvings_are_refused(n):
    with pytest.raises(ConfigError, match="12 latents can be halved into 1 to 4 prefixes"):
        SaeConfig("matryoshka", D_IN, D_SAE, K, options={"prefixes": n}).build()
