"""How sharp the self-check of a contrast is: in half precision, beside huge tokens, early on."""

import logging

import pytest
import torch

import tiny_models
import tiny_vlms
from contrast_truth import hooked
from family_truth import EXAMPLES
from saefty.errors import MismatchError
from saefty.models.contrast import ContrastSection
from saefty.models.contrast_check import check_contrast
from saefty.records import Example, Site

ZERO = ContrastSection(method="zero_attention")
KNOCKOUT = ContrastSection(method="knockout")


def batch_of(model):
    return model.collate(model.tokenize(EXAMPLES))


def with_a_huge_first_token(model):
    """Let the first token grow as the BOS of large models does, in one dimension."""

    def grow(module, args, kwargs):
        x = args[0].clone()
        x[:, 0, 0] += 1000 * x.abs().amax()
        return (x, *args[1:]), kwargs

    return model.blocks[0].register_forward_pre_hook(grow, with_kwargs=True)


def drifting(model, layer, by):
    """Let an MLP give a little more with every call."""
    calls = []

    def drift(module, args, output):
        calls.append(None)
        return output * (1 + by * len(calls))

    return model.blocks[layer].mlp.register_forward_hook(drift)


@pytest.mark.parametrize(
    ("dtype", "by"), [(torch.float32, 1e-3), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_another_delta_is_found_out_beside_a_token_a_thousand_times_as_large(dtype, by):
    model = tiny_models.load("llama", dtype)
    with hooked(with_a_huge_first_token(model)):
        check_contrast(model, batch_of(model), [Site(2)], ZERO)
        refused = pytest.raises(MismatchError, match="cannot be measured by computing the layer")
        with hooked(drifting(model, 2, by)), refused:
            check_contrast(model, batch_of(model), [Site(2)], ZERO)


def test_the_rounding_of_a_huge_token_that_nobody_keeps_does_not_count():
    model = tiny_models.load("llama", torch.bfloat16)
    plain = check_contrast(model, batch_of(model), [Site(2)], ZERO)
    with hooked(with_a_huge_first_token(model)):
        beside = check_contrast(model, batch_of(model), [Site(2)], ZERO)
    assert beside.rounding[Site(2)] == pytest.approx(plain.rounding[Site(2)], rel=0.5)


def images_of(model):
    paths = tiny_vlms.example_images()[:2]
    examples = [Example(f"i{i}", "What is shown?", image=path) for i, path in enumerate(paths)]
    return model.collate(model.tokenize(examples))


def leaking(model, batch, share):
    """Let a share of the image reach the text past attention, in front of the first block."""

    def pass_on(module, args, kwargs):
        x = args[0]
        image = (x * batch.image[..., None]).mean(dim=1, keepdim=True)
        return (x + share * image, *args[1:]), kwargs

    return model.blocks[0].register_forward_pre_hook(pass_on, with_kwargs=True)


def hardly_seeing(model, share):
    """Let the first layer's attention give a share of what it gave."""
    return model.blocks[0].self_attn.o_proj.register_forward_hook(lambda m, a, out: share * out)


def test_a_leak_is_found_out_where_the_image_is_hardly_seen_in_half_precision():
    model = tiny_vlms.load("llava", torch.bfloat16)
    batch, site = images_of(model), Site(0, "post_attn_resid")
    with hooked(hardly_seeing(model, 0.02)):
        checked = check_contrast(model, batch, [site], KNOCKOUT)
        assert 0.02 < checked.image_seen < 0.1
        assert checked.image_seen_when_off == 0
        refused = pytest.raises(MismatchError, match="in another way too")
        with hooked(leaking(model, batch, 0.02)), refused:
            check_contrast(model, batch, [site], KNOCKOUT)


def test_an_image_that_is_hardly_seen_is_not_called_unseen(caplog):
    model = tiny_vlms.load("llava", torch.bfloat16)
    with hooked(hardly_seeing(model, 0.005)), caplog.at_level(logging.WARNING):
        checked = check_contrast(model, images_of(model), [Site(0, "post_attn_resid")], KNOCKOUT)
    assert 0.008 < checked.image_seen < 0.02
    assert "does not depend on the image" not in caplog.text
