import numpy as np
import pytest
import torch

from saefty.errors import ConfigError, InputError, UnsafeArtifactError
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


DELTA = {"method": "knockout", "scope": "joint"}


def test_a_contrast_is_called_delta_and_keeps_its_method_and_scope(tmp_path, caplog):
    store = planted_store.make(tmp_path / "a", contrast=DELTA)
    export_npz(store, tmp_path / "npz")
    with np.load(tmp_path / "npz/layer_0_shard_00000.npz", allow_pickle=False) as file:
        assert "x" not in file
        np.testing.assert_array_equal(file["delta"], store.shard(0, 0).numpy())
        assert file["contrast"].tolist() == ["knockout", "joint"]
    import_npz(tmp_path / "npz", tmp_path / "b")
    assert ActivationStore.open(tmp_path / "b").contrast == DELTA
    assert not caplog.records


def test_a_delta_of_which_nothing_is_known_is_a_contrast_and_it_is_said(tmp_path, caplog):
    np.savez(tmp_path / "layer_4_shard_00000.npz", delta=np.ones((2, 3), np.float32))
    import_npz(tmp_path, tmp_path / "store")
    unknown = {"method": "unknown", "scope": "unknown"}
    assert ActivationStore.open(tmp_path / "store").contrast == unknown
    assert "do not say of which method and scope" in caplog.text


def test_plain_activations_have_no_contrast(tmp_path):
    export_npz(planted_store.make(tmp_path / "a"), tmp_path / "npz")
    import_npz(tmp_path / "npz", tmp_path / "b")
    assert ActivationStore.open(tmp_path / "b").contrast is None


def test_the_place_in_the_model_comes_back_without_being_asked_for(tmp_path):
    export_npz(planted_store.make(tmp_path / "a", part="post_attn_resid"), tmp_path / "npz")
    with np.load(tmp_path / "npz/layer_2_shard_00000.npz", allow_pickle=False) as file:
        assert file["site"].item() == "blocks.2.hook_post_attn_resid"
    for folder, given in (("b", None), ("c", "post_attn_resid")):
        import_npz(tmp_path / "npz", tmp_path / folder, given)
        again = ActivationStore.open(tmp_path / folder)
        assert [again.site(layer).part for layer in (0, 2)] == ["post_attn_resid"] * 2


@pytest.mark.parametrize(("given", "part"), [(None, "resid_post"), ("mlp_out", "mlp_out")])
def test_files_that_do_not_say_where_they_were_read_are_of_the_place_given(tmp_path, given, part):
    np.savez(tmp_path / "layer_4_shard_00000.npz", x=np.ones((2, 3), np.float32))
    import_npz(tmp_path, tmp_path / "store", given)
    assert ActivationStore.open(tmp_path / "store").site(4).part == part


@pytest.mark.parametrize(
    ("site", "given", "kind", "words"),
    [
        ("blocks.4.hook_mlp_out", "resid_post", InputError,
         r"layer_4_shard_00000.npz was read at mlp_out, but --hook-point is resid_post"),
        ("blocks.3.hook_mlp_out", None, InputError,
         r"is of layer 4 by its name, but was read at blocks.3.hook_mlp_out"),
        (["blocks.4.hook_mlp_out"], None, InputError, r"needs one name for site, .* <U21"),
        ("somewhere", None, ConfigError, "'somewhere' names no place in a model"),
        ("blocks.4.hook_mlp_out", "middle", ConfigError, "'4.middle' names no place in a model"),
    ],
)  # fmt: skip
def test_a_place_that_does_not_fit_is_refused(tmp_path, site, given, kind, words):
    np.savez(tmp_path / "layer_4_shard_00000.npz", x=np.ones((2, 3), np.float32), site=site)
    with pytest.raises(kind, match=words):
        import_npz(tmp_path, tmp_path / "store", given)


def test_shards_of_one_layer_that_were_read_apart_are_refused(tmp_path):
    x = np.ones((2, 3), np.float32)
    np.savez(tmp_path / "layer_4_shard_00000.npz", x=x, site="blocks.4.hook_mlp_out")
    np.savez(tmp_path / "layer_4_shard_00001.npz", x=x)
    with pytest.raises(InputError, match=r"hook_mlp_out, blocks.4.hook_resid_post") as error:
        import_npz(tmp_path, tmp_path / "store")
    assert "layer 4" in error.value.message


def test_activations_and_contrasts_make_no_store_together(tmp_path):
    np.savez(tmp_path / "layer_0_shard_00000.npz", x=np.ones((2, 3), np.float32))
    np.savez(tmp_path / "layer_1_shard_00000.npz", delta=np.ones((2, 3), np.float32))
    words = r"layer_0_shard_00000.npz activations \(x\); layer_1_shard_00000.npz unknown"
    with pytest.raises(InputError, match=words):
        import_npz(tmp_path, tmp_path / "store")


@pytest.mark.parametrize(
    ("column", "values", "words"),
    [
        ("example_id", ["a", "c"], "row 1 is example_id b in layer 0, but c in layer 1"),
        ("token_pos", [0, 2], "row 1 is token_pos 1 in layer 0, but 2 in layer 1"),
    ],
)
def test_layers_of_as_many_but_other_rows_are_refused(tmp_path, column, values, words):
    x = np.ones((2, 3), np.float32)
    rows = {"example_id": np.array(["a", "b"]), "token_pos": np.array([0, 1])}
    np.savez(tmp_path / "layer_0_shard_00000.npz", x=x, **rows)
    np.savez(tmp_path / "layer_1_shard_00000.npz", x=x, **{**rows, column: np.array(values)})
    with pytest.raises(InputError, match=words):
        import_npz(tmp_path, tmp_path / "store")
