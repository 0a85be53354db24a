"""Stores of either kind, described, verified, exported and brought back."""

from pathlib import Path

import numpy as np
import pytest
import torch

from saefty.errors import ConfigError, InputError, MismatchError, UnknownNameError
from saefty.storekeeping import (
    export_store,
    import_store,
    list_stores,
    open_store,
    repair_store,
    verify_store,
)
from saefty.stores.activations import ActivationStore
from stores import planted_store


@pytest.fixture
def store(tmp_path):
    return planted_store.make(tmp_path / "x")


def test_a_store_is_described_by_its_layers_shards_rows_and_size(tmp_path, store):
    (found,) = list_stores(tmp_path)
    sizes = [path.stat().st_size for path in (tmp_path / "x").rglob("*.safetensors")]
    assert found["store"] == str(tmp_path / "x")
    assert (found["kind"], found["layers"], found["shards"], found["rows"]) == (
        "activations", [0, 2], 3, 16,
    )  # fmt: skip
    assert found["bytes"] >= sum(sizes)
    assert found["whole"] is None


def test_a_store_of_contrasts_is_listed_with_their_method_and_scope(tmp_path, store):
    contrast = {"method": "zero_attention", "scope": "per_layer"}
    planted_store.make(tmp_path / "d", contrast=contrast)
    of_contrasts, plain = list_stores(tmp_path)
    assert of_contrasts["contrast"] == contrast
    assert "contrast" not in plain


def test_verifying_the_list_says_which_store_is_damaged(tmp_path, store):
    planted_store.make(tmp_path / "y")
    shard = tmp_path / "x" / "layer_2" / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert [found["whole"] for found in list_stores(tmp_path, verify=True)] == [False, True]


def test_a_manifest_that_cannot_be_read_is_listed_as_a_problem(tmp_path, store):
    (tmp_path / "x" / "manifest.json").write_text("{")
    (found,) = list_stores(tmp_path)
    assert "is not valid JSON" in found["problem"]


def test_an_unfinished_store_is_not_listed(tmp_path, store):
    (tmp_path / "x" / "manifest.json").unlink()
    assert list_stores(tmp_path) == []


def test_a_whole_store_has_no_damage_and_every_damaged_file_a_line(store):
    assert verify_store(store.folder) == []
    for name in ("layer_0/shard_00000.safetensors", "rows/shard_00002.safetensors"):
        path = store.folder / name
        path.write_bytes(path.read_bytes()[::-1])
    damage = verify_store(store.folder)
    assert len(damage) == 2
    assert "layer_0/shard_00000" in damage[0]
    assert "rows/shard_00002" in damage[1]


def test_a_manifest_that_names_a_file_outside_its_folder_is_refused(tmp_path, store):
    from saefty import fsio
    from saefty.errors import UnsafeArtifactError

    record = fsio.read_sealed(store.folder / "manifest.json")
    record["extra"]["../secret"] = {"bytes": 1, "xxh3_128": "0"}
    fsio.commit_sealed(store.folder / "manifest.json", record)
    with pytest.raises(UnsafeArtifactError, match="does not stay inside"):
        verify_store(store.folder)


def test_a_folder_that_is_missing_is_said_to_be(tmp_path):
    for call in (open_store, verify_store, repair_store, list_stores):
        with pytest.raises(UnknownNameError, match="there is no folder"):
            call(tmp_path / "nowhere")


def test_a_store_that_does_not_say_how_it_was_made_cannot_be_repaired(store):
    with pytest.raises(ConfigError, match=r"it has no metadata\.json"):
        repair_store(store.folder)


def test_an_export_comes_back_with_the_same_rows(tmp_path, store):
    files = export_store(store.folder, tmp_path / "npz")
    assert [path.name for path in files[:2]] == [
        "layer_0_shard_00000.npz", "layer_2_shard_00000.npz",
    ]  # fmt: skip
    outcome = import_store(tmp_path / "npz", tmp_path / "back")
    assert outcome.figures == {"layers": [0, 2], "rows": 16, "d_in": 3}
    back = ActivationStore.open(tmp_path / "back")
    for layer in (0, 2):
        found, wanted = (torch.cat(list(s.batches(layer, 5))) for s in (back, store))
        assert torch.equal(found, wanted)
    for name in ("example", "token_pos", "token_id"):
        np.testing.assert_array_equal(back.rows()[name], store.rows()[name])
    assert [e["label"] for e in back.examples()] == [e["label"] for e in store.examples()]


def test_layers_of_activations_are_not_exported_apart_and_it_is_said(tmp_path, store):
    with pytest.raises(MismatchError, match="exported as a whole, but --layer 2 is given"):
        export_store(store.folder, tmp_path / "npz", layers=["2"])
    with pytest.raises(ConfigError, match="alone has --texts and --context, but the format is npz"):
        export_store(store.folder, tmp_path / "npz", texts=3, context=1)
    assert not (tmp_path / "npz").exists()


@pytest.mark.parametrize("form", ["parquet", "jsonl", "dump", None])
def test_limits_of_texts_are_refused_where_no_texts_are_shown(tmp_path, store, form):
    from saefty.saes.base import SaeConfig
    from test_encoding import features

    features(tmp_path / "f", store, {0: SaeConfig("topk", 3, 8, 2).build()})
    for name in ("texts", "context"):
        said = f"neuronpedia alone has --{name}, but the format is {form or 'parquet'}"
        with pytest.raises(ConfigError, match=said):
            export_store(tmp_path / "f", tmp_path / "out", form, **{name: 5})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("given", [None, "mlp_out"])
def test_an_import_can_be_repaired_from_its_files(tmp_path, given):
    planted_store.make(tmp_path / "a", part="mlp_out")
    export_store(tmp_path / "a", tmp_path / "npz")
    import_store(tmp_path / "npz", tmp_path / "back", given)
    shard = tmp_path / "back" / "layer_2" / "shard_00001.safetensors"
    good = shard.read_bytes()
    shard.unlink()
    assert repair_store(tmp_path / "back").stage == "import"
    assert shard.read_bytes() == good
    assert ActivationStore.open(tmp_path / "back").site(2).part == "mlp_out"


def test_a_repair_reads_relative_paths_from_where_the_run_was_started(tmp_path, store, monkeypatch):
    export_store(store.folder, tmp_path / "npz")
    monkeypatch.chdir(tmp_path)
    import_store(Path("npz"), Path("back"))
    shard = tmp_path / "back" / "layer_2" / "shard_00001.safetensors"
    good = shard.read_bytes()
    shard.unlink()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert repair_store(Path("../back")).folder == Path("../back")
    assert shard.read_bytes() == good
    assert Path.cwd() == tmp_path / "elsewhere"


def test_an_import_from_other_files_into_the_same_folder_is_refused(tmp_path, store):
    (first, *_) = export_store(store.folder, tmp_path / "npz")
    import_store(tmp_path / "npz", tmp_path / "back")
    first.unlink()
    with pytest.raises(MismatchError, match="layer_0_shard_00000"):
        import_store(tmp_path / "npz", tmp_path / "back")


def test_a_folder_without_npz_files_is_said_to_be(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.npz files"):
        import_store(tmp_path, tmp_path / "back")


def test_a_store_of_features_is_not_exported_as_activations(tmp_path, store):
    from saefty.saes.base import SaeConfig
    from test_encoding import features

    features(tmp_path / "f", store, {0: SaeConfig("topk", 3, 8, 2).build()})
    with pytest.raises(MismatchError, match="npz holds activations") as error:
        export_store(tmp_path / "f", tmp_path / "npz", "npz")
    assert "parquet or jsonl or dump or neuronpedia" in error.value.then
    with pytest.raises(MismatchError, match="²"):  # a digit, but no number
        export_store(tmp_path / "f", tmp_path / "out", "parquet", ["²"])
    assert not (tmp_path / "out").exists()
