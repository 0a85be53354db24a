import pytest

from saefty.errors import ConfigError
from saefty.records import Example, Site, Span, example_from, example_record


@pytest.mark.parametrize(
    ("text", "layer", "part"),
    [
        ("blocks.20.hook_resid_post", 20, "resid_post"),
        ("blocks.3.hook_mlp_out", 3, "mlp_out"),
        ("blocks.3.hook_resid_mid", 3, "post_attn_resid"),
        ("layers.20", 20, "resid_post"),
        ("model.layers.7.self_attn", 7, "attn_out"),
        ("transformer.h.2.mlp", 2, "mlp_out"),
        ("20", 20, "resid_post"),
        ("20.post_mlp", 20, "resid_post"),
        ("0.resid_pre", 0, "resid_pre"),
    ],
)
def test_a_site_is_read_in_every_spelling(text, layer, part):
    assert Site.parse(text) == Site(layer, part)


def test_a_site_reads_its_own_name():
    site = Site(5, "attn_out")
    assert Site.parse(site.name) == site


@pytest.mark.parametrize("text", ["", "resid_post", "blocks.x.hook_z", "20.hook_z", "-1"])
def test_what_names_no_place_is_refused(text):
    with pytest.raises(ConfigError, match="names no place in a model"):
        Site.parse(text)


def test_a_span_has_a_known_role():
    with pytest.raises(ValueError, match="not 'robot'"):
        Span(0, 1, "robot")


WRITTEN_BEFORE = {
    "example_id": "7",
    "prompt": "p",
    "response": None,
    "messages": None,
    "image": None,
    "label": True,
    "group": "g",
    "source": "s",
    "raw": False,
}


def test_a_table_written_before_there_were_categories_is_read_and_written_the_same():
    example = example_from(WRITTEN_BEFORE)
    assert example == Example("7", "p", label=True, group="g", source="s")
    assert example_record(example) == WRITTEN_BEFORE
    assert list(example_record(example)) == list(WRITTEN_BEFORE)


def test_a_category_is_written_and_read():
    example = Example("7", "p", category="Privacy Violations")
    assert example_record(example)["category"] == "Privacy Violations"
    assert example_from(example_record(example)) == example


def test_a_span_is_written_and_read():
    example = Example("7", "p", span=(3, 8))
    assert example_record(example)["span"] == [3, 8]
    assert example_from(example_record(example)) == example
