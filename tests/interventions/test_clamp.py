"""Holding latents at a value, against float64 NumPy and in the real forward pass."""

import numpy as np
import pytest
import torch

import tiny_models
from interventions.test_gate import EXAMPLES, SITE, all_tokens, random_sae
from saefty.errors import MismatchError
from saefty.interventions.clamp import cap_latents, clamp
from saefty.interventions.gate import gate

LATENTS = [3, 17, 40]


@pytest.fixture
def sae():
    return random_sae()


def test_clamping_adds_what_the_latents_lack(sae):
    """h + Σ (v - z_k) W_dec[k], in float64 from the SAE's own latents."""
    x = torch.randn(2, 300, 32, generator=torch.Generator().manual_seed(1))
    values = np.array([2.0, 0.0, -1.0])
    z = sae.encode(x).detach().double().numpy()[..., LATENTS]
    assert (z > 0).any()
    W_dec = sae.W_dec.detach().double().numpy()[LATENTS]
    expected = x.double().numpy() + (values - z) @ W_dec
    found = clamp(sae, LATENTS, values.tolist())(x, all_tokens(2, 300))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_clamping_to_0_is_gating(sae):
    x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(3))
    assert (sae.encode(x)[..., LATENTS] > 0).any()
    found = clamp(sae, LATENTS, 0.0)(x, all_tokens(1, 9))
    torch.testing.assert_close(found, gate(sae, LATENTS)(x, all_tokens(1, 9)))


def test_capping_lowers_the_latents_that_are_higher_and_no_others(sae):
    x = torch.randn(1, 200, 32, generator=torch.Generator().manual_seed(2))
    z = sae.encode(x).detach().double().numpy()[..., LATENTS]
    most = float(np.median(z[z > 0]))
    W_dec = sae.W_dec.detach().double().numpy()[LATENTS]
    expected = x.double().numpy() - np.maximum(z - most, 0) @ W_dec
    found = cap_latents(sae, LATENTS, most)(x, all_tokens(1, 200)).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    below = (z <= most).all(-1)
    assert below.any()
    assert not below.all()
    assert np.array_equal(found[below], x.numpy()[below])


def test_no_latents_change_nothing(sae):
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(3))
    for edit in (clamp(sae, [], 1.0), cap_latents(sae, [], 1.0)):
        assert torch.equal(edit(x, all_tokens(1, 3)), x)


def test_one_value_for_each_latent_is_wanted(sae):
    with pytest.raises(ValueError, match="2 values were given for 3 latents"):
        clamp(sae, LATENTS, [1.0, 2.0])


@pytest.mark.parametrize("latents", [[64], [-1], [2, 5, 2]])
def test_latents_out_of_range_or_named_twice_are_refused(sae, latents):
    for edit in (clamp, cap_latents):
        with pytest.raises(ValueError, match=r"64 latents, 0\.\.63"):
            edit(sae, latents, 1.0)


def test_an_sae_of_another_width_is_refused():
    with pytest.raises(MismatchError, match="16 wide, but the model's are 32 wide"):
        clamp(random_sae(d_in=16), [1], 1.0)(torch.ones(1, 3, 32), all_tokens(1, 3))


@pytest.mark.parametrize("where", ["prefill", "decode", "both"])
@pytest.mark.parametrize("edit", [clamp, cap_latents, gate])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_replies_with_and_without_a_cache_are_the_same(family, edit, where, sae):
    model = tiny_models.load(family)
    values = {gate: (), clamp: (20.0,), cap_latents: (0.5,)}[edit]
    latents = range(64) if edit is gate else LATENTS
    plain = model.generate(EXAMPLES, max_new_tokens=8)
    with model.intervene(SITE, edit(sae, list(latents), *values, where=where)):
        replies = model.generate(EXAMPLES, max_new_tokens=8)
        assert replies != plain
        assert replies == model.generate(EXAMPLES, max_new_tokens=8, cache=False)
