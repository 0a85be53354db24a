"""A step by hand is autograd on the dense formula: in float32, sparse and dense, at larger sizes.

`tests/contracts/test_architectures.py` holds the same in float64 for every architecture.
"""

from dataclasses import replace

import pytest
import torch

from saefty.kernels.base import KERNELS, choose_kernels
from saefty.kernels.compiled import library
from saefty.saes import gradients
from saefty.saes.base import SaeConfig
from saefty.saes.gradients import training_step

D_IN, D_SAE, ROWS, K = 64, 2048, 520, 16
OWN = ["jumprelu", "gated", "relu"]
NONE = torch.tensor([], dtype=torch.long)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(arch, shift=2.2):
    """Return an SAE whose latents are active where a nearly normal number exceeds `shift`."""
    sae = SaeConfig(arch, D_IN, D_SAE, K).build()
    with torch.no_grad():
        sae.W_dec.copy_(torch.nn.functional.normalize(draw(D_SAE, D_IN, seed=1)))
        sae.W_enc.copy_((sae.W_dec + draw(D_SAE, D_IN, seed=2) / 50).T)
        sae.b_enc.copy_(draw(D_SAE, seed=3) / 20)
        sae.b_dec.copy_(draw(D_IN, seed=4) / 10)
        if arch == "jumprelu":
            sae.threshold.copy_(shift + draw(D_SAE, seed=5).abs() / 10)
        else:
            sae.b_enc.sub_(shift)
        if arch == "gated":
            sae.b_mag.copy_(sae.b_enc + draw(D_SAE, seed=6) / 10)
            sae.r_mag.copy_(draw(D_SAE, seed=7) / 10)
    return sae


def assert_as_autograd(sae, x, dead=NONE, kernels=None):
    step = training_step(sae, x, dead, kernels or choose_kernels("cpu"))
    double = replace(sae.config).build().double()
    double.load_state_dict({name: value.double() for name, value in sae.state_dict().items()})
    double.penalty_share = sae.penalty_share
    loss = double.loss(x.double(), dead=dead)
    loss.total.backward()
    assert float(step.loss) == pytest.approx(loss.total.item(), rel=1e-5)
    assert float(step.squared_error) == pytest.approx(
        float(loss.reconstruction * x.numel()), rel=1e-5
    )
    squares = 0.0
    for name, parameter in double.named_parameters():
        wanted = parameter.grad.T if name == "W_enc" else parameter.grad
        error = (step.gradients[name].double() - wanted).norm()
        # Where an entry lies within rounding of a threshold, float32 may decide otherwise.
        assert float(error) <= 2e-5 * float(wanted.norm()), name
        squares += float(wanted.square().sum())
    assert float(step.length) == pytest.approx(squares**0.5, rel=1e-5)
    fires = loss.z != 0
    assert torch.equal(step.fired, fires.any(dim=0))
    assert step.n_fired == int(fires.sum())
    return step


@pytest.mark.parametrize("dead", [[], [3], [1, 5, 6, 7, 900]])
@pytest.mark.parametrize("arch", OWN)
def test_few_active_latents_are_summed_sparsely(arch, dead, monkeypatch):
    monkeypatch.setattr(gradients._Sums, "add_dense", lambda *_: pytest.fail("dense"))
    step = assert_as_autograd(make(arch), draw(ROWS, D_IN), torch.tensor(dead, dtype=torch.long))
    assert 0 < step.n_fired < 0.05 * ROWS * D_SAE


@pytest.mark.parametrize("dead", [[], [1, 5, 6, 7, 900]])
@pytest.mark.parametrize("arch", OWN)
def test_many_active_latents_are_multiplied_densely(arch, dead, monkeypatch):
    monkeypatch.setattr(gradients._Sums, "add_sparse", lambda *_: pytest.fail("sparse"))
    sae = make(arch, shift=0.05)
    step = assert_as_autograd(sae, draw(ROWS, D_IN), torch.tensor(dead, dtype=torch.long))
    assert 0.3 * ROWS * D_SAE < step.n_fired < 0.6 * ROWS * D_SAE


@pytest.mark.parametrize("arch", OWN)
@pytest.mark.parametrize("name", list(KERNELS))
def test_both_ways_agree_on_all_kernels(arch, name, monkeypatch):
    if name == "cpu" and library().functions is None:
        pytest.skip(library().reason)
    try:
        kernels = KERNELS[name]()
    except RuntimeError as error:
        pytest.skip(str(error))
    for share in (0.0, 1.0):
        monkeypatch.setattr(gradients, "SPARSE_UP_TO", share)
        assert_as_autograd(make(arch), draw(300, D_IN), kernels=kernels)


@pytest.mark.parametrize("arch", OWN)
def test_without_a_compiler_nothing_changes(arch, monkeypatch):
    monkeypatch.setattr("saefty.kernels.pointwise.plain", lambda *_: False)
    assert_as_autograd(make(arch, shift=0.05), draw(300, D_IN))


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("arch", OWN)
def test_rows_without_any_active_latent_teach_the_bias_alone(arch, share, monkeypatch):
    monkeypatch.setattr(gradients, "SPARSE_UP_TO", share)
    sae, x = make(arch, shift=50.0), draw(ROWS, D_IN)
    step = assert_as_autograd(sae, x)
    assert step.n_fired == 0
    assert not step.gradients["W_enc"].any()
    wanted = 2 * (sae.b_dec - x).sum(dim=0) / x.numel()
    torch.testing.assert_close(step.gradients["b_dec"], wanted.detach())


@pytest.mark.parametrize("share", [0.0, 1.0], ids=["dense", "sparse"])
def test_all_latents_can_be_dead(share, monkeypatch):
    monkeypatch.setattr(gradients, "SPARSE_UP_TO", share)
    assert_as_autograd(make("jumprelu"), draw(100, D_IN), torch.arange(D_SAE))


@pytest.mark.parametrize("dead", [[], [3, 900], list(range(0, 400, 3))])
@pytest.mark.parametrize("arch", ["batch_topk", "matryoshka"])
def test_a_shared_budget_learns_as_by_autograd(arch, dead):
    assert_as_autograd(make(arch), draw(ROWS, D_IN), torch.tensor(dead, dtype=torch.long))


@pytest.mark.parametrize("arch", [*OWN, "batch_topk", "matryoshka"])
def test_a_decoder_gradient_can_be_had_without_what_lengthens_rows(arch):
    sae, x = make(arch), draw(ROWS, D_IN)
    free, tangent = (
        training_step(sae, x, NONE, choose_kernels("cpu"), tangent=tangent).gradients["W_dec"]
        for tangent in (False, True)
    )
    along = (free.double() * sae.W_dec.double()).sum(dim=1, keepdim=True)
    wanted = free.double() - along * sae.W_dec.double()
    assert float((tangent.double() - wanted).norm()) <= 1e-5 * float(wanted.norm())
    assert float(along.norm()) > 1e-3 * float(wanted.norm())
