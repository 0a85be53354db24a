"""Patch-back on models that are read rightly, and on ones that are not."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import tiny_models
from saefty.errors import MismatchError
from saefty.models.decoder import Decoder
from saefty.models.selfcheck import check_patch_back, check_unlisted
from saefty.records import PARTS, Example, Site

EXAMPLES = [Example(str(i), "the dog " * (i + 1), raw=True) for i in range(4)]


class Misread(Decoder):
    """Captures the neighbouring block's activations."""

    def capture(self, batch, sites, rows=None):
        found = super().capture(batch, [Site(site.layer + 1, site.part) for site in sites], rows)
        return dict(zip(sites, found.values(), strict=True))


class Deaf(Decoder):
    """Lets no edit through."""

    def intervene(self, site, edit):
        return nullcontext()


def unlisted(kind):
    llama = tiny_models.load("llama")
    return kind(llama.model, llama.tokenizer, replace(llama.info, family="brand_new"), {})


def batch_of(model):
    return model.collate(model.tokenize(EXAMPLES))


@pytest.mark.parametrize("family", [*tiny_models.CAUSAL_FAMILIES, "bert"])
def test_a_model_that_is_read_rightly_passes(family):
    model = tiny_models.load(family)
    check_patch_back(model, batch_of(model), [Site(0), Site(2), Site(1, "resid_pre")])


def test_every_part_passes_in_bfloat16():
    model = tiny_models.load("llama", torch.bfloat16)
    check_patch_back(model, batch_of(model), [Site(1, part) for part in PARTS])


def test_an_unlisted_family_that_is_read_rightly_passes():
    model = unlisted(Decoder)
    check_unlisted(model, batch_of(model), [Site(1)])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Misread, "writing the captured activations back moves"), (Deaf, "output stays the same")],
)
def test_an_unlisted_family_that_is_misread_is_refused(kind, reason):
    model = unlisted(kind)
    with pytest.raises(MismatchError, match=rf"blocks\.1\.hook_resid_post.*{reason}"):
        check_unlisted(model, batch_of(model), [Site(1)])


def test_a_listed_family_costs_nothing(monkeypatch):
    model = tiny_models.load("llama")
    monkeypatch.setattr(Decoder, "_forward", lambda *args, **kwargs: pytest.fail("a forward pass"))
    check_unlisted(model, batch_of(model), [Site(1)])
