import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from saefty.saes.base import SaeConfig
from saefty.saes.native import save_sae

D_IN, D_SAE, L1 = 5, 9, 0.7
X = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(0)).double()


def make():
    sae = SaeConfig("gated", D_IN, D_SAE, 1, options={"l1": L1}).build().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in sae.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))
    return sae


def test_a_closed_gate_silences_a_magnitude():
    sae = SaeConfig("gated", 2, 2, 1).build()
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(2))
        sae.b_enc.copy_(torch.tensor([-1.0, 0.0]))
        sae.b_mag.copy_(torch.tensor([0.5, -3.0]))
        sae.r_mag.copy_(torch.tensor([2.0, 1.0]).log())
    # gates 2 and 1, then -0.5 and 5; magnitudes 2·3 + 0.5 and 1 - 3, then 1.5 (shut out) and 2.
    z = sae.encode(torch.tensor([[3.0, 1.0], [0.5, 5.0]]))
    torch.testing.assert_close(z, torch.tensor([[6.5, 0.0], [0.0, 2.0]]))


def test_loss_and_gradients_are_those_of_the_paper():
    sae = make()
    w = {name: value.detach().numpy() for name, value in sae.state_dict().items()}
    x = X.numpy()
    gate, scale = x @ w["W_enc"] + w["b_enc"], np.exp(w["r_mag"])
    magnitude = x @ w["W_enc"] * scale + w["b_mag"]
    fires = (gate > 0) & (magnitude > 0)
    error = (magnitude * fires) @ w["W_dec"] + w["b_dec"] - x
    own = np.maximum(gate, 0) @ w["W_dec"] + w["b_dec"] - x
    penalty = L1 * np.maximum(gate, 0).sum(axis=1).mean() / D_IN
    loss = sae.loss(X)
    assert loss.auxiliary.item() == pytest.approx((own**2).mean(), rel=1e-12)
    total = (error**2).mean() + (own**2).mean() + penalty
    assert loss.total.item() == pytest.approx(total, rel=1e-12)
    loss.total.backward()

    g = 2 / x.size
    by_magnitude = g * error @ w["W_dec"].T * fires
    by_gate = (g * own @ w["W_dec"].T + L1 / len(x) / D_IN) * (gate > 0)
    wanted = {
        "W_enc": x.T @ (by_magnitude * scale + by_gate),
        "b_enc": by_gate.sum(axis=0),
        "b_mag": by_magnitude.sum(axis=0),
        "r_mag": (by_magnitude * scale * (x @ w["W_enc"])).sum(axis=0),
        "W_dec": g * (magnitude * fires).T @ error,  # the gate's own loss holds the decoder
        "b_dec": g * error.sum(axis=0),
    }
    for name, parameter in sae.named_parameters():
        np.testing.assert_allclose(
            parameter.grad, wanted[name], rtol=1e-9, atol=1e-13, err_msg=name
        )


def test_a_dead_latents_gate_is_pulled_up_until_it_opens():
    sae = make()
    with torch.no_grad():
        sae.b_enc[2] = -50.0
    alive, revived = (sae.loss(X, dead=dead).auxiliary for dead in (None, torch.tensor([2])))
    (revived - alive).backward()
    assert float(sae.b_enc.grad[2]) == pytest.approx(-1 / 32 / D_IN)


def test_the_file_holds_the_gates_bias_under_saelens_name(tmp_path):
    sae = make()
    save_sae(sae, tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert sorted(weights) == ["W_dec", "W_enc", "b_dec", "b_gate", "b_mag", "r_mag"]
    assert torch.equal(weights["b_gate"], sae.b_enc.float())
