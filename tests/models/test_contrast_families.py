"""δ of vision-language models: every family and method, against two whole forward passes."""

import logging
from dataclasses import replace
from functools import cache

import pytest
import torch

import tiny_models
import tiny_vlms
from contrast_truth import attention_of, blocks_of, by_two_passes, hooked, states
from family_truth import n_hooks
from saefty.errors import MismatchError
from saefty.models.base import load_model
from saefty.models.contrast import ContrastSection, capture_contrast
from saefty.models.contrast_check import check_contrast
from saefty.records import Example, Site

IN_SEQUENCE = [family for family in tiny_vlms.FAMILIES if family != "mllama"]
CROSS = 1  # the block of the tiny Mllama that reads the image
READ = ("post_attn_resid", "post_attn_ln", "resid_post")
KNOCKOUT = ContrastSection(method="knockout")
CROSS_ATTENTION = ContrastSection(method="cross_attention")


@cache
def loaded(family, attn="sdpa"):
    return load_model(str(tiny_vlms.folder_of(family)), attn=attn)


def examples(swapped=False):
    """Return two examples with images of unequal sizes and one without."""
    paths = tiny_vlms.example_images()
    return [
        Example("short", "What is this?", image=paths[1 if swapped else 0]),
        Example("long", "Describe the picture.", "a robot that learns to paint", image=paths[2]),
        Example("text", "no picture is here"),
    ]


def batch_of(model, side="right"):
    return model.collate(model.tokenize(examples()), side)


def with_other_pixels(batch):
    """Return the batch with the first image's pixels mirrored and brighter."""
    pixels = batch.inputs["pixel_values"]
    other = torch.where(pixels != 0, pixels.flip(-1) * 0.7 + 0.4, pixels)
    return replace(batch, inputs={**batch.inputs, "pixel_values": other})


def check_against_two_passes(model, family, parts, layers, section):
    batch = batch_of(model)
    for part in parts:
        expected = by_two_passes(model, family, batch, part, layers, section.method, section.scope)
        on = states(model, family, batch, part, layers)
        sites = [Site(layer, part) for layer in layers]
        found = capture_contrast(model, batch, sites, batch.mask, section)
        for layer, site in zip(layers, sites, strict=True):
            assert found[site].dtype == torch.float32
            scale = float(on[layer].abs().max())
            torch.testing.assert_close(
                found[site], expected[layer][batch.mask], atol=3e-6 * scale, rtol=1e-5
            )
            assert found[site].norm() > 1e-3 * on[layer].norm()


@pytest.mark.parametrize(
    ("scope", "attn"), [("per_layer", "sdpa"), ("per_layer", "eager"), ("joint", "sdpa")]
)
@pytest.mark.parametrize("family", IN_SEQUENCE)
def test_knockout_gives_what_two_passes_with_masks_made_by_hand_give(family, scope, attn):
    section = ContrastSection(method="knockout", scope=scope)
    check_against_two_passes(loaded(family, attn), family, READ, [0, 2], section)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_zero_attention_gives_what_two_passes_give(family, scope):
    section = ContrastSection(method="zero_attention", scope=scope)
    check_against_two_passes(loaded(family), family, READ, [0, 1, 2], section)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_cross_attention_gives_what_two_passes_give(scope):
    section = ContrastSection(method="cross_attention", scope=scope)
    check_against_two_passes(loaded("mllama"), "mllama", READ, [CROSS], section)


def test_joint_cross_attention_is_read_in_layers_behind_too():
    section = ContrastSection(method="cross_attention", scope="joint")
    check_against_two_passes(loaded("mllama"), "mllama", ["resid_post"], [CROSS, 2], section)


@pytest.mark.parametrize("family", IN_SEQUENCE)
def test_a_layers_knockout_is_zero_but_for_text_behind_an_image(family):
    model = loaded(family)
    batch = batch_of(model)
    delta = capture_contrast(model, batch, [Site(1)], None, KNOCKOUT)[Site(1)]
    behind = batch.mask & ~batch.image & (batch.image.cumsum(1) > 0)
    if family == "paligemma":  # what is before the image sees it as well
        behind = batch.mask & ~batch.image & batch.image.any(1, keepdim=True)
    assert (delta[behind].norm(dim=-1) > 1e-3).all()
    assert delta[batch.mask & ~behind].abs().max() == 0


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_with_all_layers_off_the_text_does_not_depend_on_the_image(family):
    """What is left when joint δ is taken away is the same for another image of equal size."""
    model = loaded(family)
    method, layers = ("cross_attention", [CROSS]) if family == "mllama" else ("knockout", [2])
    section = ContrastSection(method=method, scope="joint")
    one = batch_of(model)
    other = with_other_pixels(one)
    text = one.mask & ~one.image & one.image.any(1, keepdim=True)
    sites = [Site(layer) for layer in layers]
    on = [model.capture(b, sites, text) for b in (one, other)]
    delta = [capture_contrast(model, b, sites, text, section) for b in (one, other)]
    for site in sites:
        assert (on[0][site] - on[1][site]).norm(dim=-1).max() > 0.05
        torch.testing.assert_close(
            on[0][site] - delta[0][site], on[1][site] - delta[1][site], atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("family", tiny_vlms.FAMILIES)
def test_the_self_check_passes_and_says_how_much_the_image_is_seen(family):
    model = loaded(family)
    crossing = family == "mllama"
    method = "cross_attention" if crossing else "knockout"
    sites = [Site(CROSS)] if crossing else [Site(0), Site(2, "post_attn_resid")]
    for scope in ("per_layer", "joint"):
        section = ContrastSection(method=method, scope=scope)
        checked = check_contrast(model, batch_of(model), sites, section)
        assert checked.image_seen > 0.05
        assert checked.image_seen_when_off < 1e-6


def test_what_attention_gave_the_image_is_shared_out_among_the_rest():
    """By the weights that attention reports: hidden ones are 0, the others keep their ratios."""
    model, weights = loaded("llava", "eager"), []
    batch = batch_of(model)
    module = attention_of(model, "llava", 1)
    with hooked(module.register_forward_hook(lambda m, a, out: weights.append(out[1]))):
        site = Site(1, "attn_out")
        found = capture_contrast(model, batch, [site, Site(2)], None, KNOCKOUT)[site]
        with hooked(module.v_proj.register_forward_hook(lambda m, a, out: weights.append(out))):
            model.logits(batch)
    on, off, values, _ = (w.double() for w in weights)
    text, image = batch.mask & ~batch.image, batch.image
    hidden = (text[:, :, None] & image[:, None, :])[:, None].expand_as(on)
    assert on[hidden].max() > 0.01
    assert off[hidden].max() == 0
    expected = on.masked_fill(hidden, 0)
    expected /= expected.sum(dim=-1, keepdim=True)
    torch.testing.assert_close(off, expected, atol=1e-6, rtol=1e-5)
    of_image = image[:, None, :, None].expand_as(on)  # an image's own tokens attend as before
    assert torch.equal(off[of_image], on[of_image])
    values = values.unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
    values = values.repeat_interleave(module.num_key_value_groups, dim=1)
    change = ((on - expected) @ values).transpose(1, 2).flatten(2)
    by_hand = change @ module.o_proj.weight.double().T
    torch.testing.assert_close(
        found.double()[batch.mask], by_hand[batch.mask], atol=1e-5, rtol=1e-4
    )


def test_padding_and_its_side_change_nothing():
    model = loaded("llava")
    sites = [Site(0), Site(2)]
    batches = [batch_of(model), batch_of(model, "left")]
    right, left = (capture_contrast(model, b, sites, b.mask, KNOCKOUT) for b in batches)
    for site in sites:
        torch.testing.assert_close(right[site], left[site], atol=1e-5, rtol=1e-4)
    alone = model.collate(model.tokenize(examples()[:1]))  # no padding: the model builds no mask
    found = capture_contrast(model, alone, sites, alone.mask, KNOCKOUT)
    for site in sites:
        first = right[site][: len(alone.ids[0])]
        torch.testing.assert_close(found[site], first, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("part", "scope", "attention", "mlp"),
    [
        # Layers 0 and 1 are read, of three: the last is never computed.
        ("post_attn_resid", "per_layer", [2, 2, 0], [1, 0, 0]),
        ("post_attn_ln", "per_layer", [2, 2, 0], [1, 0, 0]),
        ("resid_post", "per_layer", [2, 2, 0], [2, 2, 0]),
        ("post_attn_resid", "joint", [2, 2, 0], [2, 0, 0]),
    ],
)
def test_knockout_costs_one_pass_and_the_layers_read_once_more(part, scope, attention, mlp):
    model = loaded("llava")
    blocks, _ = blocks_of(model, "llava")
    tower = model.model.model.vision_tower
    modules = [*(b.self_attn for b in blocks), *(b.mlp for b in blocks), tower]
    counts = dict.fromkeys(modules, 0)

    def count(module, args, kwargs):
        counts[module] += 1

    handles = [m.register_forward_pre_hook(count, with_kwargs=True) for m in modules]
    section = ContrastSection(method="knockout", scope=scope)
    with hooked(*handles):
        capture_contrast(model, batch_of(model), [Site(0, part), Site(1, part)], None, section)
    assert [counts[b.self_attn] for b in blocks] == attention
    assert [counts[b.mlp] for b in blocks] == mlp
    assert counts[tower] == (2 if scope == "joint" else 1)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_nothing_is_left_behind_after_an_exception(scope):
    model, calls = loaded("llava"), []
    batch = batch_of(model)
    before, hooks = model.logits(batch), n_hooks(model)

    def fail_when_off(x, positions):
        calls.append(None)
        if len(calls) == 2:
            raise RuntimeError("the edit failed")
        return x

    section = ContrastSection(method="knockout", scope=scope)
    with (
        pytest.raises(RuntimeError, match="the edit failed"),
        model.intervene(Site(1, "attn_out"), fail_when_off),
    ):
        capture_contrast(model, batch, [Site(1), Site(2)], None, section)
    assert n_hooks(model) == hooks
    assert torch.equal(model.logits(batch), before)


def test_images_beside_the_sequence_cannot_be_hidden_and_cross_attention_is_named():
    model = loaded("mllama")
    with pytest.raises(MismatchError, match="keeps the image beside the sequence") as refused:
        capture_contrast(model, batch_of(model), [Site(0)], None, KNOCKOUT)
    assert "contrast.method=cross_attention" in str(refused.value)


@pytest.mark.parametrize("scope", ["per_layer", "joint"])
def test_layers_without_cross_attention_are_refused_and_those_with_it_named(scope):
    model = loaded("mllama")
    section = ContrastSection(method="cross_attention", scope=scope)
    with pytest.raises(MismatchError, match="layers 0, 2 of .* have no cross-attention") as refused:
        capture_contrast(model, batch_of(model), [Site(0), Site(2)], None, section)
    assert "layer 1." in str(refused.value)


def refused_without_effect(model, batch, sites, section):
    with pytest.raises(MismatchError, match="the intervention had no effect at layer") as refused:
        check_contrast(model, batch, sites, section)
    return str(refused.value)


class Zeroed:
    """Sets weights to zero, and puts them back."""

    def __init__(self, *weights):
        self.weights = weights

    def __enter__(self):
        self.kept = [weight.detach().clone() for weight in self.weights]
        for weight in self.weights:
            weight.detach().zero_()

    def __exit__(self, *error):
        for weight, kept in zip(self.weights, self.kept, strict=True):
            weight.detach().copy_(kept)


def test_a_closed_gate_is_named_as_the_cause():
    model = loaded("mllama")
    with Zeroed(model.blocks[CROSS].cross_attn_attn_gate):
        said = refused_without_effect(model, batch_of(model), [Site(CROSS)], CROSS_ATTENTION)
    assert "no effect at layer 1:" in said
    assert "cross_attn_attn_gate" in said
    assert "closed" in said


def test_a_projector_of_zeros_is_named_as_the_cause():
    model = loaded("mllama")
    with Zeroed(*model.model.model.multi_modal_projector.parameters()):
        said = refused_without_effect(model, batch_of(model), [Site(CROSS)], CROSS_ATTENTION)
    assert "projector of the image holds zeros" in said


def test_layers_before_all_that_is_off_are_named():
    section = ContrastSection(method="cross_attention", scope="joint")
    model = loaded("mllama")
    said = refused_without_effect(model, batch_of(model), [Site(0), Site(CROSS)], section)
    assert "no effect at layer 0:" in said
    assert "Nothing before it is off" in said


@pytest.mark.parametrize("family", ["llava", "mllama", "a text model"])
def test_a_batch_without_images_is_named_as_the_cause(family):
    model = tiny_models.load("llama") if family == "a text model" else loaded(family)
    section = CROSS_ATTENTION if family == "mllama" else KNOCKOUT
    batch = model.collate(model.tokenize(examples()[2:]))
    said = refused_without_effect(model, batch, [Site(CROSS)], section)
    assert "No token of the 1 examples of the first batch stands for an image" in said
    assert "data.image" in said


def test_a_text_before_its_image_is_named_as_the_cause():
    model = loaded("llava")
    path = tiny_vlms.example_images()[0]
    items = model.tokenize([Example("turned", "What is this? <image>", image=path, raw=True)])
    said = refused_without_effect(model, model.collate(items), [Site(1)], KNOCKOUT)
    assert "No token of the text stands behind an image" in said


def test_an_image_that_makes_no_difference_is_told(caplog):
    model = loaded("llava")
    weights = model.model.model.multi_modal_projector.parameters()
    with Zeroed(*weights), caplog.at_level(logging.WARNING):
        checked = check_contrast(model, batch_of(model), [Site(2)], KNOCKOUT)
    assert checked.image_seen == 0
    assert "does not depend on the image" in caplog.text


def test_another_way_from_the_image_to_the_text_is_found_out():
    model = loaded("llava")
    batch = batch_of(model)

    def pass_on(module, args, kwargs):
        x = args[0]
        image = batch.image[..., None]
        return (x + (x * image).mean(dim=1, keepdim=True), *args[1:]), kwargs

    handle = model.blocks[1].register_forward_pre_hook(pass_on, with_kwargs=True)
    with hooked(handle), pytest.raises(MismatchError, match="in another way too") as refused:
        check_contrast(model, batch, [Site(2)], KNOCKOUT)
    assert "all layers up to 2 off" in str(refused.value)
