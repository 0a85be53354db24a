"""Hiding an image from an attention: which mask it gets, and which attention takes none."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import tiny_vlms
from saefty.errors import MismatchError
from saefty.models.attention_off import HiddenImage
from saefty.records import Example


def batch_of_two():
    model, path = tiny_vlms.load("llava"), tiny_vlms.example_images()[1]
    examples = [Example("image", "What is this?", image=path), Example("text", "no picture")]
    return model.collate(model.tokenize(examples))


def hidden_from(module, batch):
    switch = HiddenImage({0: module})
    switch.reading(batch.mask & ~batch.image, batch.image)
    return switch


class Attention(nn.Module):
    """Takes a mask, and is of a kind."""

    def __init__(self, kind, causal=True):
        super().__init__()
        self.config, self.is_causal = SimpleNamespace(_attn_implementation=kind), causal
        self.given = []

    def forward(self, x, attention_mask=None):
        self.given.append(attention_mask)
        return x


@pytest.mark.parametrize("causal", [True, False])
def test_a_mask_that_is_left_out_is_made_as_sdpa_reads_it(causal):
    batch = batch_of_two()
    module, x = Attention("sdpa", causal), torch.zeros(*batch.ids.shape, 4)
    switch = hidden_from(module, batch)
    with switch.watching():
        module(x, attention_mask=None)
        with switch.off([0]):
            module(x, attention_mask=None)
    length = batch.ids.shape[1]
    whole = torch.ones(length, length, dtype=torch.bool)
    whole = (whole.tril() if causal else whole).expand(len(x), 1, -1, -1)
    assert torch.equal(module.given[0], whole)
    hidden = (batch.mask & ~batch.image)[:, None, :, None] & batch.image[:, None, None]
    assert torch.equal(module.given[1], whole & ~hidden)


@pytest.mark.parametrize(
    ("kind", "mask", "said"),
    [
        ("flash_attention_2", None, "flash_attention_2"),
        ("flash_attention_2", "of padding", "flash_attention_2"),
        ("eager", None, "eager"),
    ],
)
def test_attention_that_takes_no_mask_of_pairs_is_refused(kind, mask, said):
    batch = batch_of_two()
    module = Attention(kind)
    given = batch.mask if mask else None
    with (
        hidden_from(module, batch).watching(),
        pytest.raises(MismatchError, match=f"attention of the kind {said}") as refused,
    ):
        module(torch.zeros(1), attention_mask=given)
    assert "model.attn=sdpa or eager" in str(refused.value)


def test_attention_that_is_given_no_mask_by_name_is_refused():
    batch, module = batch_of_two(), Attention("sdpa")
    with (
        hidden_from(module, batch).watching(),
        pytest.raises(MismatchError, match="not given its attention mask by name"),
    ):
        module(torch.zeros(1))
