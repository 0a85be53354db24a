"""Messages about a contrast name the section that was written, whichever command reads it."""

import pytest

import tiny_models
import tiny_vlms
from models.test_hidden_image import Attention, batch_of_two
from saefty.errors import ConfigError, MismatchError
from saefty.models.attention_off import make_switch
from saefty.models.contrast import ContrastSection, capture_contrast, require_contrast
from saefty.models.contrast_check import check_contrast
from saefty.records import Example, Site
from saefty.stages.encode import EncodeSection
from saefty.stages.extract import ExtractSection


def refused(family, site, *, name, **keys):
    model = (tiny_vlms if family in tiny_vlms.FAMILIES else tiny_models).load(family)
    with pytest.raises((ConfigError, MismatchError)) as error:
        require_contrast(model, [site], ContrastSection(**keys), name)
    return error.value.then


@pytest.mark.parametrize("name", [EncodeSection.SECTION, ExtractSection.SECTION])
@pytest.mark.parametrize(
    ("family", "site", "keys", "said"),
    [
        ("llama", Site(0, "resid_pre"), {"method": "zero_attention"}, "contrast.scope=joint"),
        ("llama", Site(0), {"method": "cross_attention"}, "contrast.method=knockout"),
        ("mllama", Site(0), {"method": "cross_attention"}, "layers to some of [1]"),
        ("mllama", Site(0), {"method": "knockout"}, "contrast.method=cross_attention"),
        ("bert", Site(0), {"method": "zero_attention"}, "contrast.method=none"),
    ],
)
def test_what_to_set_is_named_with_its_section(family, site, keys, said, name):
    told = refused(family, site, name=name, **keys)
    assert f"{name}.{said}" in told
    assert told.count("extract.") == (told.count(f"{name}.") if name == "extract" else 0)


@pytest.mark.parametrize("name", ["extract", "encode"])
def test_the_check_and_the_switch_name_it_too(name):
    model, section = tiny_vlms.load("llava"), ContrastSection(method="knockout")
    texts = model.collate(model.tokenize([Example("t", "no picture")]))
    with pytest.raises(MismatchError, match="no effect") as error:
        check_contrast(model, texts, [Site(1)], section, name)
    assert f"{name}.contrast.method=zero_attention" in error.value.then
    with pytest.raises(MismatchError, match="no effect"):
        check_contrast(model, texts, [Site(1)], section)
    joint = ContrastSection(method="cross_attention", scope="joint")
    mllama = tiny_vlms.load("mllama")
    image = Example("i", "What is it?", image=tiny_vlms.example_images()[0])
    batch = mllama.collate(mllama.tokenize([image]))
    with pytest.raises(MismatchError, match="no effect at layer 0") as error:
        check_contrast(mllama, batch, [Site(0), Site(1)], joint, name)
    assert error.value.then == f"Take other layers in {name}.layers."
    with pytest.raises(MismatchError) as error:
        capture_contrast(mllama, batch, [Site(0)], None, section, name)
    assert f"{name}.contrast" in error.value.then


def test_an_attention_without_a_mask_names_it_too():
    batch = batch_of_two()
    model = tiny_vlms.load("llava")
    switch = make_switch(model.blocks, batch, [0], "knockout", "encode")
    module = Attention("sdpa")
    switch.modules = {0: module}
    with switch.watching(), pytest.raises(MismatchError) as error:
        module(batch.ids.float())
    assert "encode.contrast.method=zero_attention" in error.value.then
