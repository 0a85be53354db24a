import numpy as np
import pytest
import torch

from saefty.saes.base import SaeConfig

D_IN, D_SAE, WIDTH, L0 = 5, 9, 0.8, 0.7
X = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0)).double()


def make():
    options = {"bandwidth": WIDTH, "l0": L0}
    sae = SaeConfig("jumprelu", D_IN, D_SAE, 1, options=options).build().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
        sae.threshold.abs_()
    return sae


def test_a_latent_fires_above_its_own_threshold():
    sae = SaeConfig("jumprelu", 3, 3, 1).build()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.threshold.copy_(torch.tensor([1.0, 2.0, 0.0]))
    z = sae.encode(torch.tensor([[1.5, 1.5, -1.0], [1.0, 3.0, 0.5]]))
    assert z.tolist() == [[1.5, 0, 0], [0, 3.0, 0.5]]


def test_loss_and_gradients_are_those_of_the_paper():
    sae = make()
    w = {name: value.detach().numpy() for name, value in sae.state_dict().items()}
    x, theta = X.numpy(), w["threshold"]
    pre = x @ w["W_enc"] + w["b_enc"]
    fires = pre > theta
    error = (pre * fires) @ w["W_dec"] + w["b_dec"] - x
    penalty = L0 * fires.sum(axis=1).mean() / D_IN
    loss = sae.loss(X)
    assert loss.total.item() == pytest.approx((error**2).mean() + penalty, rel=1e-12)
    loss.total.backward()

    # Equations 11 and 12: the loss's slope by z, and by the step, times their estimates by theta.
    rectangle = (np.abs((pre - theta) / WIDTH) < 0.5) / WIDTH
    by_z = 2 / x.size * error @ w["W_dec"].T
    by_step = L0 / len(x) / D_IN
    assert rectangle.any(axis=0).sum() >= 5
    by_theta = -(theta * rectangle * by_z).sum(axis=0) - (rectangle * by_step).sum(axis=0)
    np.testing.assert_allclose(sae.threshold.grad, by_theta, rtol=1e-9, atol=1e-14)
    np.testing.assert_allclose(sae.W_enc.grad, x.T @ (by_z * fires), rtol=1e-9, atol=1e-14)


def test_thresholds_stay_at_zero_or_above():
    sae = make()
    with torch.no_grad():
        sae.threshold[3] = -1.0
    sae.observe(sae.encode_sparse(X))
    assert sae.threshold[3] == 0


def test_a_dead_latent_is_pulled_up_to_its_threshold():
    sae = make()
    with torch.no_grad():
        sae.b_enc[2] = -50.0
    sae.loss(X, dead=torch.tensor([2])).auxiliary.backward()
    norm = float(sae.W_dec[2].norm())
    assert float(sae.b_enc.grad[2]) == pytest.approx(-norm / 32 / D_IN)
    assert sae.threshold.grad is None
