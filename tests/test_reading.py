"""The loop that reads a model: poolings by hand, truncation, NaN, a plan that never changes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from pydantic import ValidationError

import tiny_models
from piece_reading import read_pieces
from planted_model import INF, NAN, planted
from saefty.errors import InputError, NumericError
from saefty.reading import (
    PoolingSection,
    ReadingSection,
    SaveSection,
    computed_part,
    kept_tokens,
    prepare,
)
from saefty.records import ROLES, Example, Site

SITES = [Site(0), Site(2)]
TEXTS = ["How do I bake bread at home?", "Mix flour.", "the model reads a prompt", "a"]
EXAMPLES = [Example(f"e{i}", text, raw=True) for i, text in enumerate(TEXTS)]


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


def read(model, examples=EXAMPLES, done=(), **settings):
    section = ReadingSection(**settings)
    reading = prepare(model, examples, section, len(SITES))
    return list(read_pieces(model, reading, SITES, section, done)), reading


def alone(model, example, layer):
    """Return all activations of one example, read by itself."""
    (item,) = model.tokenize([example])
    return item, model.capture(model.collate([item]), [Site(layer)])[Site(layer)][0]


def pooled(model, **pooling):
    pieces, _ = read(model, pooling=PoolingSection(**pooling))
    (piece,) = pieces
    assert piece.rows["token_pos"].tolist() == [-1] * len(EXAMPLES)
    assert piece.rows["example"].tolist() == [0, 1, 2, 3]
    return piece.activations[Site(2)], piece.rows


def by_hand(model, rows_of):
    wanted = []
    for example in EXAMPLES:
        item, x = alone(model, example, 2)
        wanted.append(x[rows_of(len(item.ids))].mean(dim=0))
    return torch.stack(wanted)


def close(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_text_only_mean_is_the_mean_over_tokens_that_are_not_special(model):
    found, rows = pooled(model, name="text_only_mean")
    close(found, by_hand(model, lambda n: slice(1, n)))  # position 0 is BOS
    assert rows["char_start"].tolist() == [0] * 4
    assert rows["char_end"].tolist() == [len(text) for text in TEXTS]


def test_eos_is_the_last_token(model):
    close(pooled(model, name="eos")[0], by_hand(model, lambda n: slice(n - 1, n)))


def test_last_k_mean_is_the_mean_of_the_last_k_or_of_all_there_are(model):
    found, _ = pooled(model, name="last_k_mean", last_k=3)
    close(found, by_hand(model, lambda n: slice(max(1, n - 3), n)))


def test_span_mean_is_the_mean_over_the_positions_named(model):
    found, _ = pooled(model, name="span_mean", span=(1, 2))
    close(found, by_hand(model, lambda n: slice(1, 2)))


def test_an_example_that_a_span_does_not_reach_is_left_out_and_counted(model):
    lengths = [len(item.ids) for item in model.tokenize(EXAMPLES)]
    pooling = PoolingSection(name="span_mean", span=(lengths[1], lengths[1] + 2))
    pieces, reading = read(model, pooling=pooling)
    kept = [i for i, n in enumerate(lengths) if n > lengths[1]]
    assert pieces[0].rows["example"].tolist() == kept
    assert reading.ledger.as_record()["skipped"] == {"no_tokens": len(TEXTS) - len(kept)}


def with_spans(*spans):
    return [replace(one, span=span) for one, span in zip(EXAMPLES, spans, strict=True)]


def test_span_mean_takes_each_examples_own_span_where_none_is_set_for_all(model):
    spans = [(1, 4), (2, 3), (0, 2), (1, 2)]
    (piece,), reading = read(model, with_spans(*spans), pooling=PoolingSection(name="span_mean"))
    wanted = [
        alone(model, example, 2)[1][slice(*span)].mean(dim=0)
        for example, span in zip(EXAMPLES, spans, strict=True)
    ]
    close(piece.activations[Site(2)], torch.stack(wanted))
    assert [one["pooled_tokens"] for one in reading.records()] == [list(span) for span in spans]


def test_an_example_without_a_span_is_left_out_counted_and_told_how_to_get_one(model):
    some = with_spans((1, 3), None, (1, 2), (1, 2))
    pieces, reading = read(model, some, pooling=PoolingSection(name="span_mean"))
    assert pieces[0].rows["example"].tolist() == [0, 2, 3]
    assert reading.ledger.as_record()["skipped"] == {"no_span": 1}
    with pytest.raises(InputError, match="no_span 4") as error:
        read(model, pooling=PoolingSection(name="span_mean"))
    assert "set data.span to a column of them" in error.value.then
    assert "extract.pooling.span=[start,end]" in error.value.then


def test_the_table_says_which_tokens_were_averaged(model):
    _, reading = read(model, pooling=PoolingSection(name="last_k_mean", last_k=2))
    lengths = [len(item.ids) for item in model.tokenize(EXAMPLES)]
    assert [one["pooled_tokens"] for one in reading.records()] == [
        [max(1, n - 2), n] for n in lengths
    ]
    assert "pooled_tokens" not in next(read(model)[1].records())


def with_image(model, example, image):
    """Return an example of which some tokens are said to stand for an image."""
    (item,) = model.tokenize([example])
    roles = item.roles.copy()
    roles[image] = ROLES.index("image")
    return replace(item, roles=roles)


def test_text_only_mean_begins_behind_the_last_image_token(model):
    item = with_image(model, EXAMPLES[0], slice(2, 5))
    section = ReadingSection(pooling=PoolingSection(name="text_only_mean"))
    assert np.flatnonzero(kept_tokens(item, section)).tolist() == [*range(5, len(item.ids))]
    plain = ReadingSection()
    assert np.flatnonzero(kept_tokens(item, plain)).tolist() == [*range(1, len(item.ids))]


def test_an_image_is_never_cut_though_what_is_kept_lies_before_it(model):
    item = with_image(model, EXAMPLES[0], slice(4, 7))
    section = ReadingSection(tokens="prompt_end")
    whole = replace(item, response_start=3)  # the prompt ends before the image
    assert np.flatnonzero(kept_tokens(whole, section)).tolist() == [2]
    assert len(computed_part(whole, section, model).ids) == 7
    behind = replace(item, response_start=9)
    assert len(computed_part(behind, section, model).ids) == 9


@pytest.mark.parametrize(
    ("spelled", "part"),
    [("post_mlp", "resid_post"), ("hook_resid_mid", "post_attn_resid"), ("mlp", "mlp_out")],
)
def test_a_hook_point_is_read_in_other_spellings(spelled, part):
    assert ReadingSection(hook_point=spelled).hook_point == part
    with pytest.raises(ValidationError, match="hook_point"):
        ReadingSection(hook_point=f"{spelled}_")


@pytest.mark.parametrize("bad", [{"span": (3, 3)}, {"span": (-1, 2)}])
def test_a_span_that_cannot_be_meant_is_refused_in_the_configuration(bad):
    with pytest.raises(ValidationError, match="span"):
        PoolingSection(**bad)


def test_a_special_token_in_the_text_is_not_kept(model):
    (item,) = model.tokenize([Example("s", "a<|eot|>b", raw=True)])
    special = model.tokenizer.convert_tokens_to_ids("<|eot|>")
    assert special in item.ids
    assert special not in item.ids[kept_tokens(item, ReadingSection())]


@pytest.mark.parametrize(
    "part", ["resid_pre", "post_attn_resid", "post_attn_ln", "resid_post", "attn_out", "mlp_out"]
)
def test_every_hook_point_is_read(model, part):
    section = ReadingSection(hook_point=part)
    reading = prepare(model, EXAMPLES, section)
    (piece,) = read_pieces(model, reading, [Site(1, part)], section)
    wanted = []
    for example in EXAMPLES:
        (item,) = model.tokenize([example])
        wanted.append(model.capture(model.collate([item]), [Site(1, part)])[Site(1, part)][0][1:])
    close(piece.activations[Site(1, part)], torch.cat(wanted))


def test_a_blocks_parts_add_up(model):
    parts = ("resid_pre", "attn_out", "post_attn_resid", "mlp_out", "resid_post")
    sites = [Site(1, part) for part in parts]
    section = ReadingSection()
    reading = prepare(model, EXAMPLES, section)
    (piece,) = read_pieces(model, reading, sites, section)
    before, attention, middle, mlp, after = (piece.activations[site] for site in sites)
    close(before + attention, middle)
    close(middle + mlp, after)


def test_limit_examples_reads_the_first(model):
    pieces, reading = read(model, limit_examples=2)
    assert set(pieces[0].rows["example"].tolist()) == {0, 1}
    assert reading.ledger.total == 2


LONG = Example("long", " ".join(f"word{i}" for i in range(60)), raw=True)


def test_a_text_too_long_is_left_out_and_counted(model):
    pieces, reading = read(model, [EXAMPLES[0], LONG, EXAMPLES[1]])
    assert set(pieces[0].rows["example"].tolist()) == {0, 2}
    assert str(reading.ledger) == "in 3 = ok 2 + skipped 1 (too_long 1) + failed 0"
    assert list(reading.records())[1]["status"] == "too_long"


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_keeps_the_other_end_and_offsets_point_into_the_whole_text(model, side):
    (whole,) = model.tokenize([LONG])
    pieces, _ = read(model, [LONG], truncate=side)
    rows = pieces[0].rows
    n = tiny_models.MAX_LENGTH - 1  # BOS stays
    kept = slice(1, 1 + n) if side == "right" else slice(len(whole.ids) - n, None)
    np.testing.assert_array_equal(rows["token_id"], whole.ids[kept])
    np.testing.assert_array_equal(rows["char_start"], whole.offsets[kept, 0])
    np.testing.assert_array_equal(rows["char_end"], whole.offsets[kept, 1])


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_a_text_at_the_edge_of_the_context(model, extra):
    (item,) = model.tokenize([LONG])
    text = LONG.prompt[: item.offsets[tiny_models.MAX_LENGTH + extra - 1, 1]]
    assert len(model.tokenize([Example("x", text, raw=True)])[0].ids) == (
        tiny_models.MAX_LENGTH + extra
    )
    pieces, reading = read(model, [Example("x", text, raw=True), EXAMPLES[0]])
    assert reading.ledger.skipped["too_long"] == (extra > 0)
    assert (0 in pieces[0].rows["example"]) == (extra <= 0)


def test_nothing_to_read_says_why_and_what_to_set(model):
    with pytest.raises(InputError, match="too_long 1") as error:
        read(model, [LONG])
    assert "extract.truncate=right" in error.value.then
    assert "up to 96 tokens" in error.value.then


BAD = [(0, "e0", 2, NAN), (2, "e0", 2, INF), (2, "e2", 1, NAN), (2, "e2", 3, -INF)]


def test_a_number_that_is_not_finite_stops_the_reading_and_names_layer_and_example(model):
    with pytest.raises(NumericError, match=r"layer 0: 1 rows, layer 2: 3 rows.*e0, e2") as error:
        read(planted(model, BAD))
    assert "extract.nonfinite=mask" in error.value.then
    assert "new folder" in error.value.then


def test_mask_drops_such_rows_in_all_layers_and_counts_them_exactly(model):
    (clean,), _ = read(model)
    (piece,), _ = read(planted(model, BAD), nonfinite="mask")
    assert piece.masked == {"0": 1, "2": 3}
    dropped = {(0, 2), (2, 1), (2, 3)}
    places = list(
        zip(clean.rows["example"].tolist(), clean.rows["token_pos"].tolist(), strict=True)
    )
    good = [place not in dropped for place in places]
    assert len(piece.rows["example"]) == sum(good) == len(places) - 3
    for site in SITES:
        assert torch.equal(piece.activations[site], clean.activations[site][torch.tensor(good)])
        assert torch.isfinite(piece.activations[site]).all()


@pytest.mark.parametrize("size", [1, 3, 20, 1000])
def test_pieces_are_consecutive_examples_and_together_the_dataset_in_order(model, size):
    pieces, reading = read(model, save=SaveSection(shard_size=size))
    owners = np.concatenate([piece.rows["example"] for piece in pieces])
    assert (np.diff(owners) >= 0).all()
    assert set(owners.tolist()) == {0, 1, 2, 3}
    assert [piece.index for piece in pieces] == list(range(len(pieces)))
    for batches, piece in zip(reading.plan.pieces, pieces, strict=True):
        assert {i for batch in batches for i in batch} == set(piece.rows["example"].tolist())
        assert len(piece.rows["example"]) <= size or len(set(piece.rows["example"])) == 1


def test_a_piece_read_alone_has_the_bytes_it_has_among_others(model):
    pieces, _ = read(model, save=SaveSection(shard_size=10))
    (last,), _ = read(
        model, save=SaveSection(shard_size=10), done=[piece.index for piece in pieces[:-1]]
    )
    assert last.index == pieces[-1].index
    for site in SITES:
        assert torch.equal(last.activations[site], pieces[-1].activations[site])


@pytest.mark.parametrize("budget", [8, 40, 4096])
def test_the_token_budget_changes_rounding_only(model, budget):
    (one,), _ = read(model)
    (other,), _ = read(model, token_budget=budget)
    for site in SITES:
        close(other.activations[site], one.activations[site])
