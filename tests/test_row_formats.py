"""The number format of stored rows: what the model computes in, or what was asked for."""

import dataclasses

import numpy as np
import pytest
import torch

import tiny_models
from planted_model import planted
from saefty.engine import EngineSection
from saefty.errors import NumericError
from saefty.extraction import write_activations
from saefty.piece_rows import finite_rows
from saefty.reading import SaveSection, prepare
from saefty.records import Example, Site
from saefty.stages.extract import ExtractSection

SITES = [Site(0), Site(2)]
EXAMPLES = [Example(f"e{i}", "Mix flour " + "and bake bread at home " * (i % 5), raw=True)
            for i in range(12)]  # fmt: skip
MANY = {"save": SaveSection(shard_size=20)}


@pytest.fixture(scope="module")
def model():
    return tiny_models.load("llama")


def extract(folder, model, engine=None, **settings):
    section = ExtractSection(layers=(0, 2), **settings)
    reading = prepare(model, EXAMPLES, section, len(SITES))
    return write_activations(folder, "key", model, reading, SITES, section, engine), reading


def values(store, layer):
    return torch.cat([store.shard(layer, i) for i in range(len(store.pieces))])


def naive(model, reading, layer):
    """Rows of transformers' own hidden states, over the planned batches, padded, with a mask."""
    rows = {}
    for batch in (batch for piece in reading.plan.pieces for batch in piece):
        tokens = model.collate([reading.items([i])[i] for i in batch])
        with torch.no_grad():
            states = model.model(
                input_ids=tokens.ids, attention_mask=tokens.mask.long(), output_hidden_states=True
            ).hidden_states
        for place, i in enumerate(batch):
            item = tokens.items[place]
            kept = torch.from_numpy(np.flatnonzero(~item.special))
            rows[i] = states[layer + 1][place, kept]
    return torch.cat([rows[i] for i in sorted(rows)])


def alone(model, layer):
    """The same, each text by itself."""
    found = []
    for item in model.tokenize(EXAMPLES):
        ids = torch.from_numpy(item.ids.astype(np.int64))[None]
        with torch.no_grad():
            states = model.model(input_ids=ids, output_hidden_states=True).hidden_states
        found.append(states[layer + 1][0, torch.from_numpy(~item.special)])
    return torch.cat(found)


def far(x, y):
    """How far rows are from others, relative to the largest value."""
    return float((x.double() - y.double()).abs().max() / y.double().abs().max())


def test_a_store_in_bfloat16_is_a_naive_forward_in_bfloat16(tmp_path):
    model = tiny_models.load("llama", torch.bfloat16)
    store, reading = extract(tmp_path, model)
    assert store.dtype == "bfloat16"
    x = values(store, 0)
    assert x.dtype == torch.bfloat16
    assert far(x, naive(model, reading, 0)) < 0.01
    assert far(x, alone(model, 0)) < 0.01
    exact = values(extract(tmp_path / "exact", tiny_models.load("llama"))[0], 0)
    assert 1e-4 < far(x, exact) < 0.02  # bfloat16 keeps 8 bits: 0.004 a rounding


def test_a_store_in_float32_is_a_naive_forward(tmp_path, model):
    store, reading = extract(tmp_path, model)
    assert far(values(store, 0), naive(model, reading, 0)) < 1e-6
    assert far(values(store, 0), alone(model, 0)) < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_rows_are_rounded_once_to_the_format_that_was_asked_for(tmp_path, model, dtype):
    exact, _ = extract(tmp_path / "exact", model)
    store, _ = extract(tmp_path / dtype, model, dtype=dtype)
    assert store.dtype == dtype
    for layer in (0, 2):
        wanted = values(exact, layer).to(getattr(torch, dtype))
        assert torch.equal(values(store, layer), wanted)
    assert not store.verify()


def test_a_model_in_bfloat16_may_be_stored_as_float32(tmp_path):
    model = tiny_models.load("llama", torch.bfloat16)
    own, _ = extract(tmp_path / "own", model)
    wide, _ = extract(tmp_path / "wide", model, dtype="float32")
    assert values(wide, 2).dtype == torch.float32
    assert torch.equal(values(wide, 2), values(own, 2).float())


def test_means_are_float32_unless_another_format_is_asked_for(tmp_path, model):
    pooling = {"name": "text_only_mean"}
    exact, _ = extract(tmp_path / "exact", model, pooling=pooling)
    half, _ = extract(tmp_path / "half", model, pooling=pooling, dtype="float16")
    assert (exact.dtype, half.dtype) == ("float32", "float16")
    assert torch.equal(values(half, 0), values(exact, 0).half())


BEYOND = [(2, "e3", 2, 70_000.0), (2, "e5", 1, -123_456.0)]


def test_a_value_that_float16_cannot_hold_stops_the_run_and_says_so(tmp_path, model):
    with pytest.raises(NumericError, match=r"up to 123,456 do not fit into float16.*65,504") as e:
        extract(tmp_path, planted(model, BEYOND), dtype="float16")
    assert "layer 2: 2 rows" in e.value.message
    assert "e3, e5" in e.value.message
    assert "extract.dtype=bfloat16" in e.value.then
    assert not (tmp_path / "manifest.json").exists()


def test_a_row_that_float16_cannot_hold_may_be_dropped_and_is_counted(tmp_path, model, caplog):
    whole, _ = extract(tmp_path / "whole", model, dtype="float16")
    store, _ = extract(tmp_path / "masked", planted(model, BEYOND), dtype="float16",
                       nonfinite="mask")  # fmt: skip
    assert store.manifest["masked"] == {"2": 2}
    assert store.n_rows == whole.n_rows - 2
    assert torch.isfinite(values(store, 2)).all()
    assert "dropped rows that are not finite (layer 2: 2 rows)" in caplog.text
    kept, _ = extract(tmp_path / "wide", planted(model, BEYOND), dtype="bfloat16")
    assert kept.n_rows == whole.n_rows


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_rows_are_those_without_nan_and_infinity_even_if_their_sum_overflows(kind):
    largest = torch.finfo(kind).max
    x = torch.randn(7, 40, generator=torch.Generator().manual_seed(0)).to(kind)
    x[1, 3], x[2, 0], x[3, 39] = float("nan"), float("inf"), -float("inf")
    x[4, :2] = torch.tensor([float("inf"), -float("inf")])
    x[5, :] = largest
    x[6, 1:3] = torch.tensor([largest, -largest])
    assert finite_rows(x).tolist() == [True, False, False, False, False, True, True]
    assert finite_rows(x).tolist() == np.isfinite(x.double().numpy()).all(axis=1).tolist()
    assert finite_rows(x[:0]).tolist() == []


def test_bytes_do_not_depend_on_whether_writing_overlaps_reading(tmp_path, model):
    found = []
    for overlap in (True, False):
        folder = tmp_path / str(overlap)
        store, _ = extract(folder, model, EngineSection(overlap=overlap), **MANY)
        assert len(store.pieces) > 5
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        found.append({str(path.relative_to(folder)): path.read_bytes() for path in files})
    assert found[0] == found[1]


def unread(batch):
    return dataclasses.replace(batch, reads_padding=False)


def test_padding_is_hidden_from_attention_unless_nobody_sees_it(model, monkeypatch):
    seen = []
    forward = model._forward

    def note(ids, mask, positions, **options):
        seen.append(mask)
        return forward(ids, mask, positions, **options)

    monkeypatch.setattr(model, "_forward", note)
    batch, left = (model.collate(model.tokenize(EXAMPLES[:3]), side) for side in ("right", "left"))
    for read in (batch, unread(batch), unread(left)):
        model.capture(read, [Site(0)])
    monkeypatch.setattr(model, "_looks_ahead", True)
    model.capture(unread(batch), [Site(0)])
    assert [bool(mask.all()) for mask in seen] == [False, True, False, False]


@pytest.mark.parametrize("family", tiny_models.CAUSAL_FAMILIES)
def test_rows_are_those_of_a_pass_that_hides_the_padding(family):
    model = tiny_models.load(family)
    batch = model.collate(model.tokenize(EXAMPLES[:4]))
    other = dataclasses.replace(batch, ids=torch.where(batch.mask, batch.ids, 7))
    for site in SITES:
        true = model.capture(batch, [site], rows=batch.mask)[site]
        one, two = (model.capture(unread(b), [site], rows=batch.mask)[site] for b in (batch, other))
        torch.testing.assert_close(one, true)
        if family != "qwen3_moe":  # experts take what they are given together
            assert torch.equal(one, two)
