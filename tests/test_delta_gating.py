"""SAEs of a contrast in the forward pass, against hooks on the transformers model set by hand."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tiny_models
import tiny_vlms
from contrast_truth import attention_of, blocks_of
from interventions.test_gate import random_sae
from saefty.delta_gating import (
    ForwardPlace,
    TokenFit,
    forward_place,
    measure_token_fit,
    training_fvu,
)
from saefty.gating import Silencer
from saefty.models.attention_off import cross_layers
from saefty.models.contrast import ContrastSection, capture_contrast
from saefty.models.live_contrast import LiveContrast
from saefty.records import Example, Site
from saefty.silencing import Silencing

LATENTS = list(range(0, 64, 2))
ZERO = {"method": "zero_attention", "scope": "per_layer"}
CROSS = {"method": "cross_attention", "scope": "per_layer"}
TEXTS = [
    Example("a", "How do I bake bread?", "Mix flour and water."),
    Example("b", "the lazy dog", raw=True),
]


def with_images(n=3):
    paths = tiny_vlms.example_images()
    words = ("What is shown here?", "Say more about it, please.", "Why?")
    return [Example(f"i{i}", words[i], image=paths[i]) for i in range(n)]


@pytest.mark.parametrize("contrast", [ZERO, CROSS])
def test_what_attention_adds_is_known_at_once_behind_it_and_at_its_output(contrast):
    behind = ForwardPlace(Site(3, "post_attn_resid"), Site(3, "resid_pre"))
    assert forward_place(Site(3, "post_attn_resid"), contrast, [3]) == behind
    assert forward_place(Site(3, "attn_out"), contrast, [3]) == ForwardPlace(Site(3, "attn_out"))
    assert behind.reads == "which is what attention adds"


def test_an_sae_of_plain_activations_acts_where_it_was_trained():
    assert forward_place(Site(3, "mlp_out"), None, [3]) == ForwardPlace(Site(3, "mlp_out"))


@pytest.mark.parametrize(
    ("part", "method", "scope", "said"),
    [
        ("post_attn_resid", "knockout", "per_layer",
         "layer 3 is computed a second time, with the image hidden from the text"),
        ("resid_post", "zero_attention", "per_layer",
         "layer 3 is computed a second time, with attention zero"),
        ("post_attn_ln", "cross_attention", "per_layer",
         "layer 3 is computed a second time, with cross-attention zero"),
        ("post_attn_resid", "zero_attention", "joint",
         "the model is run a second time, with attention zero in the layers 0, 3, 5"),
        ("post_attn_resid", "knockout", "joint",
         "run a second time, with the image hidden from the text in all layers up to 3"),
    ],
)  # fmt: skip
def test_elsewhere_what_is_off_is_computed_beside_the_pass(part, method, scope, said):
    site, layers = Site(3, part), (0, 3, 5)
    place = forward_place(site, {"method": method, "scope": scope}, list(layers))
    section = ContrastSection(method=method, scope=scope)
    assert place == ForwardPlace(site, contrast=LiveContrast(site, section, layers))
    assert said in place.reads


@pytest.mark.parametrize(
    ("part", "method", "scope", "said"),
    [
        ("post_attn_resid", "unknown", "unknown", "the contrast unknown and the scope unknown"),
        ("post_attn_resid", "knockout", "unknown", "the contrast knockout and the scope unknown"),
        ("resid_pre", "knockout", "per_layer", "is zero: nothing there depends on the attention"),
    ],
)
def test_a_contrast_of_which_too_little_is_known_is_refused_with_the_reason(
    part, method, scope, said
):
    assert said in forward_place(Site(1, part), {"method": method, "scope": scope}, [1])


def sae_of(part, layer=1):
    sae = random_sae()
    sae.site = Site(layer, part)
    return sae


def naive(sae, added, strength=1.0):
    """What is left of δ of some tokens: δ - c Σ z_k(δ) W_k, in float64 NumPy."""
    z = sae.encode(added).detach().double().numpy()
    W_dec = sae.W_dec.detach().double().numpy()
    return torch.from_numpy(added.double().numpy() - strength * z[..., LATENTS] @ W_dec[LATENTS])


def logits_by_hand(model, module, batch, sae, acts, strength, gate=1.0):
    """Run the transformers model with a hook of our own on its attention."""

    def hook(_, __, output):
        first = output[0] if isinstance(output, tuple) else output
        edited = first.clone()
        left = naive(sae, (gate * first[acts]).float(), strength) / gate
        edited[acts] = left.to(first.dtype)
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = module.register_forward_hook(hook)
    try:
        with torch.no_grad():
            return model.logits(batch)
    finally:
        handle.remove()


def silenced_logits(model, batch, sae, place, strength=1.0):
    silencer = Silencer(sae, place.site, strength, place.less, place.contrast)
    with torch.no_grad(), silencer.acting(model, LATENTS):
        return model.logits(batch)


@pytest.mark.parametrize("part", ["post_attn_resid", "attn_out"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_latents_of_delta_are_taken_out_of_what_attention_adds_to_each_token(family, part):
    model = tiny_models.load(family)
    batch = model.collate(model.tokenize(TEXTS))
    sae = sae_of(part)
    module = attention_of(model, family, 1) if family == "llama" else model.blocks[1].attn
    acts = batch.mask & ~batch.special
    for strength in (1.0, 2.0):
        expected = logits_by_hand(model, module, batch, sae, acts, strength)
        found = silenced_logits(model, batch, sae, forward_place(sae.site, ZERO, [1]), strength)
        torch.testing.assert_close(found[batch.mask], expected[batch.mask], atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, model.logits(batch), atol=1e-3)


@pytest.mark.parametrize("family", ["llava", "gemma3", "mllama"])
def test_tokens_of_an_image_are_left_alone(family):
    model = tiny_vlms.load(family)
    batch = model.collate(model.tokenize(with_images()))
    layer = 1
    contrast = ZERO
    gate = 1.0
    if family == "mllama":
        layer, contrast = cross_layers(model.blocks)[0], CROSS
        gate = float(model.blocks[layer].cross_attn_attn_gate.detach().tanh())
    sae = sae_of("post_attn_resid", layer)
    acts = batch.mask & ~batch.special & ~batch.image
    assert batch.image.any()
    if family == "gemma3":  # what is added is what the norm behind the attention gives
        module = blocks_of(model, family)[0][layer].post_attention_layernorm
    else:
        module = attention_of(model, family, layer)
    expected = logits_by_hand(model, module, batch, sae, acts, 1.0, gate)
    found = silenced_logits(model, batch, sae, forward_place(sae.site, contrast, [layer]))
    torch.testing.assert_close(found[batch.mask], expected[batch.mask], atol=5e-5, rtol=1e-3)
    assert not torch.allclose(found[batch.mask], model.logits(batch)[batch.mask], atol=1e-3)


@pytest.mark.parametrize("method", ["zero_attention", "knockout"])
def test_silencing_no_latents_is_the_model_as_it_is(method):
    model, items = tiny_vlms.load("llava"), with_images()
    sae = sae_of("post_attn_resid")
    place = forward_place(sae.site, {"method": method, "scope": "per_layer"}, [1])
    plain = model.generate(items, max_new_tokens=8)
    silencer = Silencer(sae, place.site, 4.0, place.less, place.contrast)
    with silencer.acting(model, []):
        assert model.generate(items, max_new_tokens=8) == plain
    with silencer.acting(model, LATENTS):
        assert model.generate(items, max_new_tokens=8) != plain


@pytest.mark.parametrize(
    ("part", "method"),
    [
        ("post_attn_resid", "zero_attention"),
        ("attn_out", "zero_attention"),
        ("resid_post", "zero_attention"),
        ("post_attn_resid", "knockout"),
    ],
)
def test_the_fit_to_single_tokens_is_that_of_their_delta_by_hand(part, method):
    model = tiny_vlms.load("llava")
    items = model.tokenize([*with_images(), *TEXTS])
    sae = sae_of(part)
    contrast = {"method": method, "scope": "per_layer"}
    fit = measure_token_fit(model, sae, forward_place(sae.site, contrast, [1]), items)
    rows, fired = [], []
    for item in items:  # each by itself, through the contrast of the extraction
        batch = model.collate([item])
        acts = batch.mask & ~batch.special & ~batch.image
        section = ContrastSection(method=method)
        found = capture_contrast(model, batch, [sae.site], acts, section)[sae.site]
        rows.append(found.double().numpy())
        fired.append((sae.encode(found) > 0).sum(dim=1).double().numpy())
    x = np.concatenate(rows)
    z = sae.encode(torch.from_numpy(x).float()).detach().double().numpy()
    made = z @ sae.W_dec.detach().double().numpy() + sae.b_dec.detach().double().numpy()
    fvu = ((x - made) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert fit.fvu == pytest.approx(fvu, rel=1e-4)
    assert fit.l0 == pytest.approx(np.concatenate(fired).mean())
    assert fit.tokens == len(x)


@pytest.mark.parametrize(
    ("fvu", "training", "far"),
    [(0.19, 0.1, False), (0.21, 0.1, True), (0.69, 0.5, False), (0.71, 0.5, True),
     (0.9, None, False), (None, 0.1, False)],
)  # fmt: skip
def test_single_tokens_are_far_above_twice_the_training_or_two_tenths_more(fvu, training, far):
    fit = TokenFit(fvu, 3.0, 10, training)
    assert fit.far is far
    assert fit.record()["far"] is far


def test_the_fvu_of_training_is_read_beside_the_sae(tmp_path):
    sae = random_sae()
    assert training_fvu(sae) is None
    sae.folder = tmp_path
    assert training_fvu(sae) is None
    (tmp_path / "metrics.json").write_text('{"fvu": 0.25}')
    assert training_fvu(sae) == 0.25
    (tmp_path / "metrics.json").write_text('{"fvu": null}')
    assert training_fvu(sae) is None


def test_responses_are_not_among_what_an_sae_will_act_on():
    """The model replies to prompts alone, whatever answers the dataset holds."""
    model = tiny_vlms.load("llava")
    prompts = with_images()
    answered = [replace(one, response="It is a long answer of many words.") for one in prompts]
    sae = sae_of("attn_out")
    place = forward_place(sae.site, ZERO, [1])
    job = SimpleNamespace(model=model)
    alone = Silencing._fit_to_tokens(job, 1, sae, place, prompts)
    assert Silencing._fit_to_tokens(job, 1, sae, place, answered) == alone
