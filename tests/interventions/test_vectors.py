"""Vectors on disk: what is written is read back, and what was changed, or cannot be, is refused."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch

import tiny_models
from saefty import fsio
from saefty.errors import ConfigError, IntegrityError, MismatchError, NumericError
from saefty.interventions.vectors import RECORD, TENSOR, SteeringVector, load_vector
from saefty.records import Site

SITE = Site(1, "mlp_out")


@pytest.fixture
def vector():
    values = torch.randn(8, generator=torch.Generator().manual_seed(0))
    return SteeringVector(values, SITE, "caa", {"residual": 3.5}, {"model": "m", "positive": 4})


@pytest.mark.parametrize("name", ["folder", "v.safetensors"])
def test_a_vector_is_read_back_as_it_was_saved(vector, tmp_path, name):
    found = load_vector(vector.save(tmp_path / name))
    assert torch.equal(found.values, vector.values)
    assert (found.site, found.method) == (SITE, "caa")
    assert (found.norms, found.provenance) == ({"residual": 3.5}, {"model": "m", "positive": 4})


def test_norm_and_direction_are_those_of_the_values(vector):
    values = vector.values.double().numpy()
    assert vector.norm == pytest.approx(np.linalg.norm(values), rel=1e-12)
    np.testing.assert_allclose(vector.unit.numpy(), values / np.linalg.norm(values), rtol=1e-6)


def test_the_files_are_read_by_other_tools(vector, tmp_path):
    vector.save(tmp_path / "v")
    np.testing.assert_array_equal(load_file(tmp_path / "v" / TENSOR)["vector"], vector.values)
    np.testing.assert_array_equal(np.load(vector.export(tmp_path / "v.npy")), vector.values)
    bare = load_file(vector.export(tmp_path / "bare.safetensors"))
    assert list(bare) == ["vector"]
    np.testing.assert_array_equal(bare["vector"], vector.values)


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_a_bare_file_needs_its_place(vector, tmp_path, suffix):
    path = vector.export(tmp_path / f"bare{suffix}")
    with pytest.raises(ConfigError, match="bare vector"):
        load_vector(path)
    found = load_vector(path, Site(2))
    assert torch.equal(found.values, vector.values)
    assert found.site == Site(2)


def test_a_bare_file_may_be_placed_by_a_block_s_number(vector, tmp_path):
    path = vector.export(tmp_path / "bare.npy")
    assert load_vector(path, 3).site == Site(3)
    with pytest.raises(ConfigError) as error:
        load_vector(path)
    assert "sf.load_vector(path, sf.Site(20))" in error.value.then


def test_a_bare_bfloat16_row_of_a_matrix_is_one_vector(tmp_path):
    row = torch.randn(1, 8, generator=torch.Generator().manual_seed(1)).bfloat16()
    save_torch({"direction": row}, tmp_path / "d.safetensors")
    found = load_vector(tmp_path / "d.safetensors", Site(0))
    assert torch.equal(found.values, row[0].float())


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0, float("nan"), float("inf")], "2 of the 3 values"), ([0.0, 0.0], "zero in all 2")],
)
def test_what_has_no_direction_is_no_vector(values, message):
    with pytest.raises(NumericError, match=message):
        SteeringVector(torch.tensor(values), SITE, "caa")


def test_a_vector_does_not_change_with_the_tensor_it_was_made_from():
    values = torch.ones(3)
    vector = SteeringVector(values, SITE, "caa")
    values += 1
    assert torch.equal(vector.values, torch.ones(3))


def test_changed_bytes_are_told(vector, tmp_path):
    vector.save(tmp_path)
    data = bytearray((tmp_path / TENSOR).read_bytes())
    data[-1] ^= 1
    (tmp_path / TENSOR).write_bytes(data)
    with pytest.raises(IntegrityError, match="is damaged: its checksum is"):
        load_vector(tmp_path)


def test_a_record_that_was_edited_is_told(vector, tmp_path):
    vector.save(tmp_path)
    path = tmp_path / RECORD
    path.write_text(path.read_text().replace("caa", "cab"))
    with pytest.raises(IntegrityError, match="damaged"):
        load_vector(tmp_path)


def test_a_record_without_a_key_names_it(vector, tmp_path):
    vector.save(tmp_path)
    record = fsio.read_sealed(tmp_path / RECORD)
    del record["site"]
    fsio.commit_sealed(tmp_path / RECORD, record)
    with pytest.raises(IntegrityError, match="lacks site"):
        load_vector(tmp_path)


def test_a_newer_format_is_told(vector, tmp_path):
    vector.save(tmp_path)
    record = fsio.read_sealed(tmp_path / RECORD)
    fsio.commit_sealed(tmp_path / RECORD, {**record, "format": 2})
    with pytest.raises(MismatchError, match="format 2"):
        load_vector(tmp_path)


def test_a_record_of_another_width_is_told(vector, tmp_path):
    vector.save(tmp_path)
    record = fsio.read_sealed(tmp_path / RECORD)
    fsio.commit_sealed(tmp_path / RECORD, {**record, "d_model": 9})
    with pytest.raises(MismatchError, match=r"8 wide, but vector\.json says 9"):
        load_vector(tmp_path)


def test_a_missing_tensor_is_told(vector, tmp_path):
    vector.save(tmp_path)
    (tmp_path / TENSOR).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        load_vector(tmp_path)


def test_a_file_of_several_arrays_or_no_row_is_refused(tmp_path):
    save_file({"a": np.ones(3), "b": np.ones(3)}, tmp_path / "two.safetensors")
    with pytest.raises(IntegrityError, match="2 arrays"):
        load_vector(tmp_path / "two.safetensors", SITE)
    np.save(tmp_path / "matrix.npy", np.ones((2, 3), np.float32))
    with pytest.raises(MismatchError, match=r"\[2, 3\]"):
        load_vector(tmp_path / "matrix.npy", SITE)
    np.save(tmp_path / "words.npy", np.arange(3))
    with pytest.raises(MismatchError, match="int64"):
        load_vector(tmp_path / "words.npy", SITE)


def test_an_object_array_is_not_unpickled(tmp_path):
    np.save(tmp_path / "v.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(IntegrityError, match=r"not a readable \.npy"):
        load_vector(tmp_path / "v.npy", SITE)


def test_where_there_is_nothing_the_message_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="there is no vector at"):
        load_vector(tmp_path / "absent")
    with pytest.raises(ConfigError, match="holds no vector"):
        load_vector(tmp_path)
    with pytest.raises(ConfigError, match="there is no file"):
        load_vector(tmp_path / "absent.npy", SITE)


def test_other_suffixes_are_refused(vector, tmp_path):
    with pytest.raises(ConfigError, match=r"v\.pt"):
        vector.export(tmp_path / "v.pt")
    with pytest.raises(ConfigError, match=r"v\.npy"):
        vector.save(tmp_path / "v.npy")


def test_a_vector_of_another_width_or_place_does_not_fit_the_model(vector):
    model = tiny_models.load("llama")
    with pytest.raises(MismatchError, match="8 wide, but the activations of"):
        vector.check_model(model)
    deep = SteeringVector(torch.ones(tiny_models.D_MODEL), Site(7), "caa")
    with pytest.raises(ConfigError, match="layer 7"):
        deep.check_model(model)
    SteeringVector(torch.ones(tiny_models.D_MODEL), Site(2), "caa").check_model(model)


def test_a_vector_is_never_written_over_something_else(vector, tmp_path):
    vector.save(tmp_path / "v")
    vector.save(tmp_path / "v")
    other = SteeringVector(vector.values + 1, SITE, "caa", {}, {})
    with pytest.raises(ConfigError, match="holds another vector"):
        other.save(tmp_path / "v")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metadata.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds something else: metadata.json"):
        vector.save(tmp_path / "run")
    assert [one.name for one in (tmp_path / "run").iterdir()] == ["metadata.json"]
    assert torch.equal(load_vector(tmp_path / "v").values, vector.values)
