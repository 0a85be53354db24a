"""Gating, against the formula in float64 and in the real forward pass of four families."""

import numpy as np
import pytest
import torch

import tiny_models
from saefty.errors import MismatchError
from saefty.interventions.gate import gate, subtract
from saefty.models.base import Positions
from saefty.records import Example, Site
from saefty.saes.base import SaeConfig

SITE = Site(1)
EXAMPLES = [
    Example("a", "How do I bake bread?", "Mix flour and water."),
    Example("b", "the lazy dog", raw=True),
]


@pytest.fixture(params=["topk", "batch_topk"])
def sae(request):
    return random_sae(request.param)


def random_sae(arch="topk", d_in=tiny_models.D_MODEL, d_sae=64, k=8):
    sae = SaeConfig(arch=arch, d_in=d_in, d_sae=d_sae, k=k).build()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return sae


def all_tokens(batch, seq):
    mask = torch.ones(batch, seq, dtype=torch.bool)
    return Positions(mask, mask.cumsum(1) - 1, ~mask, ~mask, is_prefill=True)


def test_gating_takes_out_exactly_what_the_latents_contribute(sae):
    """h - Σ z_k W_dec[k], in float64 NumPy from the SAE's own latents."""
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    latents = [3, 17, 40, 41]
    z = sae.encode(x).detach().double().numpy()
    W_dec = sae.W_dec.detach().double().numpy()
    expected = x.double().numpy() - z[..., latents] @ W_dec[latents]
    assert np.abs(expected - x.numpy()).max() > 0.05, "some of them fire"
    found = gate(sae, latents)(x, all_tokens(2, 5))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_gating_is_decoding_without_the_latents_plus_the_sae_s_error(sae):
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    latents = [3, 17, 40, 41]
    z = sae.encode(x).detach()
    without = z.clone()
    without[..., latents] = 0
    expected = sae.decode(without) + (x - sae.decode(z))
    found = gate(sae, latents)(x, all_tokens(2, 5))
    torch.testing.assert_close(found, expected.detach(), atol=1e-5, rtol=1e-5)


def test_gating_without_latents_changes_nothing(sae):
    x = torch.randn(2, 5, 32)
    assert torch.equal(gate(sae, [])(x, all_tokens(2, 5)), x)


def test_gating_latents_that_do_not_fire_changes_no_bit(sae):
    x = torch.randn(1, 4, 32).bfloat16()
    silent = [i for i in range(64) if not sae.encode(x.float())[..., i].any()]
    assert silent
    assert torch.equal(gate(sae, silent)(x, all_tokens(1, 4)), x)


def test_subtract_scales_with_its_strength(sae):
    x = torch.randn(1, 6, 32)
    once = x - gate(sae, range(64))(x, all_tokens(1, 6))
    for strength in (0.0, 0.5, 2.0):
        part = x - subtract(sae, range(64), strength)(x, all_tokens(1, 6))
        torch.testing.assert_close(part, strength * once, atol=1e-5, rtol=1e-5)


def test_many_rows_are_gated_in_pieces_alike(sae):
    x = torch.randn(1, 700, 32)
    whole = gate(sae, range(20))(x, all_tokens(1, 700))
    for start in (0, 300, 690):
        alone = gate(sae, range(20))(x[:, start : start + 5], all_tokens(1, 5))
        torch.testing.assert_close(whole[:, start : start + 5], alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("latents", [[64], [-1], [2, 5, 2]])
def test_latents_out_of_range_or_named_twice_are_refused(sae, latents):
    with pytest.raises(ValueError, match=r"64 latents, 0\.\.63"):
        gate(sae, latents)


def test_an_sae_of_another_width_is_refused():
    x = torch.randn(1, 3, 32)
    with pytest.raises(MismatchError, match="16 wide, but the model's are 32 wide"):
        gate(random_sae(d_in=16), [1])(x, all_tokens(1, 3))


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_gating_in_the_model_spares_special_tokens_and_padding(family, sae):
    model = tiny_models.load(family)
    batch = model.collate(model.tokenize(EXAMPLES))
    before = model.capture(batch, [SITE])[SITE]
    with model.intervene(SITE, gate(sae, range(64))):
        after = model.capture(batch, [SITE])[SITE]
    spared = batch.special | ~batch.mask
    assert torch.equal(after[spared], before[spared])
    expected = before[~spared] - sae.contribution(sae.encode(before[~spared]), list(range(64)))
    torch.testing.assert_close(after[~spared], expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_gating_without_latents_leaves_every_reply_as_it_was(family, sae):
    model = tiny_models.load(family)
    plain = model.generate(EXAMPLES, max_new_tokens=8)
    with model.intervene(SITE, gate(sae, [])):
        assert model.generate(EXAMPLES, max_new_tokens=8) == plain


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_gated_generation_gates_each_token_once(family, sae):
    """A reply written with a cache, teacher-forced under the same gate, is again the likeliest."""
    model = tiny_models.load(family)
    prompt = Example("a", "the lazy dog", raw=True)
    ids = model.tokenize([prompt])[0].ids.tolist()
    with model.intervene(SITE, gate(sae, range(64))):
        reply = model.generate([prompt], max_new_tokens=8)[0]
        for _ in range(8):
            given = torch.tensor([ids])
            token = int(model.model(input_ids=given, use_cache=False).logits[0, -1].argmax())
            if token in model._stop_ids():
                break
            ids.append(token)
    item = model.tokenize([prompt])[0]
    assert reply == model.text.decode_reply(item, ids[len(item.ids) :])
    assert reply != model.generate([prompt], max_new_tokens=8)[0]


def test_gating_the_response_alone_leaves_the_prompt(sae):
    model = tiny_models.load("llama")
    batch = model.collate(model.tokenize(EXAMPLES[:1]))
    before = model.capture(batch, [SITE])[SITE]
    with model.intervene(SITE, gate(sae, range(64), where="response")):
        after = model.capture(batch, [SITE])[SITE]
    start = batch.items[0].response_start
    assert torch.equal(after[:, :start], before[:, :start])
    assert not torch.equal(after[:, start:], before[:, start:])
