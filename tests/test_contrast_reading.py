"""A contrast in the loop that reads a model: float32 rows, checked once, refused where it is 0."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny_models
import tiny_vlms
from piece_reading import Quiet, read_pieces, task_of
from saefty import fsio, pieces
from saefty.errors import InputError, MismatchError
from saefty.evaluation_inputs import read_again, recorded_reading
from saefty.extraction import write_activations
from saefty.pieces import PieceReader
from saefty.reading import ReadingSection, SaveSection, prepare
from saefty.records import ROLES, Example, Site
from saefty.space import planned_rows

SITES = [Site(0, "post_attn_resid"), Site(2, "post_attn_resid")]
EXAMPLES = [Example(f"e{i}", f"Mix flour {i} " + "and bake bread " * (i % 3), raw=True)
            for i in range(7)]  # fmt: skip
ZERO = {"method": "zero_attention", "scope": "per_layer"}


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


def section_of(**keys):
    return ReadingSection(hook_point="post_attn_resid", contrast=ZERO, **keys)


def attention_of(model, example, layer):
    """Return what a layer's attention adds, read where it does: at its own output."""
    (item,) = model.tokenize([example])
    return model.capture(model.collate([item]), [Site(layer, "attn_out")])[Site(layer, "attn_out")][
        0
    ]


def read(model, **keys):
    section = section_of(**keys)
    reading = prepare(model, EXAMPLES, section, len(SITES))
    return list(read_pieces(model, reading, SITES, section)), reading


def test_what_is_left_of_the_residual_without_attention_is_what_attention_adds(model):
    (piece,), _ = read(model)
    for site in SITES:
        wanted = torch.cat([attention_of(model, one, site.layer)[1:] for one in EXAMPLES])
        torch.testing.assert_close(piece.activations[site], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["none", "text_only_mean"])
def test_rows_are_float32_whatever_the_model_computes_in(tmp_path, name):
    half = tiny_models.load("llama", torch.bfloat16)
    section = section_of(pooling={"name": name})
    reading = prepare(half, EXAMPLES, section, len(SITES))
    store = write_activations(tmp_path, "key", half, reading, SITES, section)
    assert store.dtype == "float32"
    assert store.contrast == ZERO
    x = store.shard(0, 0)
    assert x.dtype == torch.float32
    assert len(x) == planned_rows(reading, section)


def test_the_rest_of_the_rows_stays_as_it_is(tmp_path, model):
    plain = ReadingSection(hook_point="post_attn_resid")
    stores = [
        write_activations(
            tmp_path / str(i), "key", model, prepare(model, EXAMPLES, one, 2), SITES, one
        )
        for i, one in enumerate((plain, section_of()))
    ]
    assert stores[0].contrast is None
    assert "contrast" not in stores[0].manifest
    one, other = (store.rows() for store in stores)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


def test_the_check_is_made_once_by_each_reader_also_of_a_run_that_goes_on(model, monkeypatch):
    seen = []

    def check(model, batch, sites, section, name):
        seen.append([item.example.id for item in batch.items])

    monkeypatch.setattr(pieces, "check_contrast", check)
    section = section_of(save=SaveSection(shard_size=10))
    reading = prepare(model, EXAMPLES, section, 2)
    assert len(reading.plan.pieces) > 2
    list(read_pieces(model, reading, SITES, section))
    assert len(seen) == 1
    assert len(seen[0]) <= 2
    list(read_pieces(model, reading, SITES, section, done=[0]))
    first = [EXAMPLES[i].id for i in reading.plan.pieces[1][0]]
    assert seen[1:] == [first[:2]]


def test_a_check_that_fails_stops_before_anything_is_read(model, monkeypatch):
    def check(model, batch, sites, section, name):
        raise MismatchError("the intervention had no effect at layer 2")

    monkeypatch.setattr(pieces, "check_contrast", check)
    monkeypatch.setattr(pieces, "capture_contrast", lambda *_: pytest.fail("it was read"))
    section = section_of()
    reading = prepare(model, EXAMPLES, section, 2)
    with pytest.raises(MismatchError, match="no effect at layer 2"):
        PieceReader(model, SITES, section).read(task_of(reading), Quiet())


def test_rows_that_are_all_zero_in_a_layer_are_refused(model, monkeypatch):
    captured = pieces.capture_contrast

    def zeros_in_layer_2(model, batch, sites, rows, section, name):
        found = captured(model, batch, sites, rows, section, name)
        return {site: x * (site.layer == 0) for site, x in found.items()}

    monkeypatch.setattr(pieces, "capture_contrast", zeros_in_layer_2)
    with pytest.raises(MismatchError, match="no effect at layer 2 .*0 in all") as error:
        read(model)
    assert "extract.pooling" in error.value.then


def test_text_before_an_image_which_has_no_contrast_is_counted_in_a_warning(caplog):
    model = tiny_vlms.load("llava")
    path = tiny_vlms.example_images()[0]
    asked = [Example("a", "Look at this: <image> What is it?", image=path, raw=True)]
    section = ReadingSection(contrast={"method": "knockout"})
    reading = prepare(model, asked, section)
    with caplog.at_level(logging.WARNING):
        (piece,) = read_pieces(model, reading, SITES[:1], section)
    (item,) = model.tokenize(asked)
    behind = np.flatnonzero(item.roles == ROLES.index("image"))[-1]
    before = piece.rows["token_pos"] < behind
    empty = ~piece.activations[SITES[0]].any(dim=1).numpy()
    np.testing.assert_array_equal(empty, before)
    assert f"the contrast is 0 in {before.sum()} of the first {len(before)} rows" in caplog.text
    assert "extract.pooling.name=text_only_mean" in caplog.text
    caplog.clear()
    section = ReadingSection(contrast={"method": "knockout"}, pooling={"name": "text_only_mean"})
    with caplog.at_level(logging.WARNING):
        list(read_pieces(model, prepare(model, asked, section), SITES[:1], section))
    assert "the contrast is 0" not in caplog.text


@pytest.mark.parametrize("method", ["knockout", "cross_attention", "cross_attn_off"])
def test_a_contrast_of_images_needs_some_and_says_so(model, method):
    section = ReadingSection(contrast={"method": method})
    with pytest.raises(InputError, match="no_image 7") as error:
        prepare(model, EXAMPLES, section)
    assert "set data.image to the column of images" in error.value.then


def test_texts_among_images_are_counted_where_their_delta_is_another_thing(caplog):
    model = tiny_vlms.load("llava")
    path = tiny_vlms.example_images()[0]
    mixed = [*EXAMPLES[:2], Example("a", "What is it?", image=path)]

    def told(examples, method, **pooling):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(model, examples, ReadingSection(contrast={"method": method}, **pooling))
        return caplog.text

    mean = {"pooling": {"name": "text_only_mean"}}
    assert "2 of 3 examples have no image" in told(mixed, "zero_attention", **mean)
    assert "instead of that behind an image" in caplog.text
    assert "extract.contrast.method=knockout" in caplog.text
    assert "2 of 3 examples have no image" in told(mixed, "zero_attention")
    assert "instead of that behind" not in caplog.text
    assert "no_image 2" in told(mixed, "knockout", **mean)
    assert "have no image" not in caplog.text
    for alike in (mixed[:2], mixed[2:]):
        assert not told(alike, "zero_attention", **mean)


def test_what_was_read_as_a_contrast_is_read_again_as_one_but_the_embedding(tmp_path, model):
    (piece,), reading = read(model)
    again = read_again(
        list(reading.records()), model, section_of(), SITES, tmp_path / "again", "key"
    )
    for site in SITES:
        assert torch.equal(again.shard(site.layer, 0), piece.activations[site])
    embedding = [Site(0, "resid_pre")]
    store = read_again(
        list(reading.records()), model, section_of(), embedding, tmp_path / "embedding", "key"
    )
    assert store.contrast is None
    (item,) = model.tokenize(EXAMPLES[:1])
    wanted = model.capture(model.collate([item]), embedding)[embedding[0]][0][1:]
    torch.testing.assert_close(store.shard(0, 0)[: len(wanted)], wanted)


def test_a_run_says_that_it_read_a_contrast(tmp_path):
    settings = {"tokens": "all", "contrast": ZERO, "max_bad_images": 0.5}
    config = {"extract": {"layers": [0], **settings}}
    fsio.commit_sealed(tmp_path / "metadata.json", {"stage": "extract", "config": config})
    found = recorded_reading(tmp_path)
    assert found.contrast.model_dump() == ZERO
    assert (found.tokens, found.max_bad_images) == ("all", 0.5)  # what may be left out as well


def test_a_span_of_the_dataset_survives_the_example_table(tmp_path, model):
    spans = [replace(one, span=(1, 3)) for one in EXAMPLES]
    section = section_of(pooling={"name": "span_mean"})
    reading = prepare(model, spans, section, 2)
    store = write_activations(tmp_path / "a", "key", model, reading, SITES, section)
    again = read_again(store.examples(), model, section, SITES, tmp_path / "b", "key")
    assert torch.equal(store.shard(2, 0), again.shard(2, 0))
