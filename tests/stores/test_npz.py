import numpy as np
import pytest
import torch

from saefty.errors import InputError, UnsafeArtifactError
from saefty.stores.activations import ActivationStore
from saefty.stores.npz import export_npz, import_npz
from stores import planted_store


def test_a_store_survives_export_and_import(tmp_path):
    store = planted_store.make(tmp_path / "a")
    files = export_npz(store, tmp_path / "npz")
    assert files[0].name == "layer_0_shard_00000.npz"
    import_npz(tmp_path / "npz", tmp_path / "b")
    again = ActivationStore.open(tmp_path / "b")
    for layer in (0, 2):
        assert torch.equal(*(torch.cat(list(s.batches(layer, 4))) for s in (store, again)))
    assert [e["label"] for e in again.examples()] == [True, False, None]


def test_exported_columns_mean_what_the_format_says(tmp_path):
    export_npz(planted_store.make(tmp_path / "a", dtype=torch.bfloat16), tmp_path / "npz")
    with np.load(tmp_path / "npz/layer_2_shard_00001.npz", allow_pickle=False) as file:
        assert file["x"].dtype == np.float32
        assert file["example_id"].tolist() == ["e1"] * 7
        assert file["label"].tolist() == [0] * 7
        assert file["token_pos"].tolist() == list(range(7))


def test_the_seeds_array_name_is_read(tmp_path):
    np.savez(tmp_path / "layer_4_shard_00000.npz", delta=np.ones((2, 3), np.float32))
    import_npz(tmp_path, tmp_path / "store")
    assert ActivationStore.open(tmp_path / "store").layers == (4,)


def test_a_file_that_needs_pickle_is_refused(tmp_path):
    np.savez(tmp_path / "layer_0_shard_00000.npz", x=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UnsafeArtifactError, match="without pickle"):
        import_npz(tmp_path, tmp_path / "store")


def test_layers_with_different_rows_are_refused(tmp_path):
    np.savez(tmp_path / "layer_0_shard_00000.npz", x=np.ones((2, 3), np.float32))
    np.savez(tmp_path / "layer_1_shard_00000.npz", x=np.ones((4, 3), np.float32))
    with pytest.raises(InputError, match="layer 1 has 4 rows, but layer 0 has 2"):
        import_npz(tmp_path, tmp_path / "store")
