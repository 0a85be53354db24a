"""A reading becomes a store: what the manifest counts, and what a second run leaves alone."""

import json

import pytest
import torch

import tiny_models
from planted_model import INF, NAN, planted
from saefty.errors import NumericError
from saefty.extraction import write_activations
from saefty.reading import PoolingSection, ReadingSection, SaveSection, prepare
from saefty.records import Example, Site, example_from

SITES = [Site(0), Site(2)]
TEXTS = ["How do I bake bread at home?", "Mix flour.", "the model reads a prompt", "a b c"]
EXAMPLES = [Example(f"e{i}", t, label=[True, False, None][i % 3], raw=True)
            for i, t in enumerate(TEXTS)]  # fmt: skip


def extract(folder, model=None, **settings):
    model = model or tiny_models.load("llama")
    section = ReadingSection(**settings)
    reading = prepare(model, EXAMPLES, section, len(SITES))
    return write_activations(folder, "fingerprint", model, reading, SITES, section)


def small(**settings):
    return {"save": SaveSection(shard_size=6), **settings}


def test_the_manifest_says_what_the_store_is(tmp_path):
    store = extract(tmp_path, **small())
    facts = store.manifest
    assert facts["layers"] == [0, 2]
    assert facts["sites"] == {"0": "blocks.0.hook_resid_post", "2": "blocks.2.hook_resid_post"}
    assert (facts["d_in"], facts["dtype"], facts["pooling"]) == (32, "float32", "none")
    assert facts["n_rows"] == store.n_rows == sum(p["rows"] for p in store.pieces)
    assert facts["masked"] == {}


def test_the_example_table_holds_every_example_that_came_in(tmp_path):
    records = extract(tmp_path, **small()).examples()
    assert [example_from(record) for record in records] == EXAMPLES
    assert [record["status"] for record in records] == ["ok"] * 4
    assert [record["text"] for record in records] == TEXTS


def test_a_model_in_bfloat16_is_stored_bit_for_bit(tmp_path):
    model = tiny_models.load("llama", torch.bfloat16)
    store = extract(tmp_path, model)
    assert store.dtype == "bfloat16"
    items = model.tokenize(EXAMPLES)
    batch = model.collate(sorted(items, key=lambda item: -len(item.ids)))
    first = next(i for i, item in enumerate(batch.items) if item.example.id == "e0")
    wanted = model.capture(batch, [Site(2)])[Site(2)][first, 1 : len(items[0].ids)]
    found = store.shard(2, 0)[: len(wanted)]
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def test_pooled_rows_are_float32(tmp_path):
    model = tiny_models.load("llama", torch.bfloat16)
    store = extract(tmp_path, model, pooling=PoolingSection(name="text_only_mean"))
    assert store.dtype == "float32"
    assert store.shard(0, 0).dtype == torch.float32
    assert store.n_rows == len(EXAMPLES)


BAD = [(0, "e1", 1, NAN), (2, "e1", 1, INF), (2, "e3", 2, NAN)]


def test_masked_rows_are_counted_for_each_layer_and_none_is_stored(tmp_path):
    clean = extract(tmp_path / "clean", **small())
    model = planted(tiny_models.load("llama"), BAD)
    store = extract(tmp_path / "masked", model, nonfinite="mask", **small())
    assert store.manifest["masked"] == {"0": 1, "2": 2}
    assert store.n_rows == clean.n_rows - 2
    for layer in (0, 2):
        assert torch.isfinite(torch.cat(list(store.batches(layer, 100)))).all()


def test_a_piece_of_which_nothing_is_left_is_empty_and_the_store_is_whole(tmp_path):
    n = len(tiny_models.load("llama").tokenize(EXAMPLES[1:2])[0].ids)
    model = planted(tiny_models.load("llama"), [(0, "e1", at, NAN) for at in range(1, n)])
    store = extract(tmp_path, model, nonfinite="mask", save=SaveSection(shard_size=1))
    assert [piece["rows"] > 0 for piece in store.pieces] == [True, False, True, True]
    assert store.manifest["masked"] == {"0": n - 1}
    assert not store.verify()
    assert 1 not in store.rows()["example"]
    assert len(torch.cat(list(store.batches(2, 4, seed=0)))) == store.n_rows


def test_a_store_of_which_nothing_is_left_is_refused(tmp_path):
    bad = [(0, f"e{i}", at, NAN) for i in range(4) for at in range(1, 60)]
    with pytest.raises(NumericError, match=r"no row is left.*layer 0"):
        extract(tmp_path, planted(tiny_models.load("llama"), bad), nonfinite="mask")
    assert not (tmp_path / "manifest.json").exists()


def test_stop_keeps_the_pieces_before_the_bad_one(tmp_path):
    bad = [(2, "e3", 1, NAN)]
    with pytest.raises(NumericError, match="first in examples e3"):
        extract(tmp_path, planted(tiny_models.load("llama"), bad), save=SaveSection(shard_size=1))
    assert len(list((tmp_path / "records").iterdir())) == 3
    assert not (tmp_path / "manifest.json").exists()


def test_pieces_that_are_there_are_not_read_again(tmp_path):
    def refuse(*args, **kwargs):
        raise AssertionError("the model was run")

    extract(tmp_path, **small())
    model = planted(tiny_models.load("llama"), [])
    model.capture = refuse
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    extract(tmp_path, model, **small())
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file()}


def test_the_plan_is_on_disk_and_names_every_example_once(tmp_path):
    extract(tmp_path, **small())
    pieces = json.loads((tmp_path / "plan.json").read_text())["pieces"]
    assert sorted(i for piece in pieces for batch in piece for i in batch) == [0, 1, 2, 3]
