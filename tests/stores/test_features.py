import numpy as np
import pytest

from saefty import fsio
from saefty.errors import IntegrityError
from saefty.stores import index
from saefty.stores.activations import ROW_COLUMNS
from saefty.stores.base import EXAMPLES, StoreWriter
from saefty.stores.features import KIND, FeatureStore, commit_features
from saefty.stores.index import build_index
from saefty.tensorfile import TensorFile

# Five tokens of three examples (the last has none), four latents.
Z = np.array(
    [[0, 2, 1, 0], [0, 0, 0, 0], [3, 0, 0, 4], [0, 5, 0, 0], [1, 0, 0, 0]], dtype=np.float32
)
SIGNED = Z * np.array([1, 1, -1, -1, 1], dtype=np.float32)[:, None]
OWNER = [0, 0, 1, 1, 1]


def csr_of(z):
    order = [np.argsort(-np.abs(row), kind="stable")[: (row != 0).sum()] for row in z]
    return {
        "indptr": np.concatenate([[0], np.cumsum([len(ids) for ids in order])]),
        "ids": np.concatenate(order).astype(np.uint32),
        "values": np.concatenate([row[ids] for row, ids in zip(z, order, strict=True)]),
    }


def store_of(tmp_path, z):
    writer = StoreWriter(tmp_path, KIND, "f")
    records = []
    for piece, (start, end) in enumerate([(0, 2), (2, 5)]):
        rows = {name: np.zeros(end - start, kind) for name, kind in ROW_COLUMNS.items()}
        rows["example"] = np.array(OWNER[start:end])
        records.append(commit_features(writer, piece, {1: csr_of(z[start:end])}, rows, {}))
    fsio.commit_text(
        tmp_path / EXAMPLES, '{"example_id": "a"}\n{"example_id": "b"}\n{"example_id": "c"}\n'
    )
    name = build_index(tmp_path, 1, 2, 4)
    facts = {"layers": [1], "sites": {"1": "1"}, "d_sae": {"1": 4}, "saes": {"1": None}}
    writer.finish(records, facts, [EXAMPLES, name])
    return FeatureStore.open(tmp_path)


@pytest.fixture
def store(tmp_path):
    return store_of(tmp_path, Z)


@pytest.fixture
def signed(tmp_path_factory):
    """The same tokens, with some latents negative."""
    return store_of(tmp_path_factory.mktemp("signed"), SIGNED)


def test_a_store_knows_whether_its_codes_are_signed(store, signed):
    assert signed.signed(1)
    assert not store.signed(1)


def test_a_signed_latent_is_found_by_magnitude_and_keeps_its_sign(signed):
    assert signed.csr(1).toarray().tolist() == SIGNED.tolist()
    rows, values = signed.tokens_of(1, 0)
    assert (rows.tolist(), values.tolist()) == ([2, 4], [-3.0, 1.0])
    rows, values = signed.tokens_of(1, 1)
    assert (rows.tolist(), values.tolist()) == ([3, 0], [-5.0, 2.0])


@pytest.mark.parametrize("how", ["max", "mean", "sum", "last"])
def test_pooling_reads_magnitudes_so_that_the_two_ends_do_not_cancel(signed, how):
    magnitudes = np.abs(SIGNED)
    groups = [magnitudes[:2], magnitudes[2:], np.zeros((1, 4))]
    reduce = {"max": np.max, "mean": np.mean, "sum": np.sum, "last": lambda z, axis: z[-1]}[how]
    wanted = np.array([reduce(group, axis=0) for group in groups])
    np.testing.assert_allclose(signed.pooled(1, how).toarray(), wanted, rtol=1e-6)


@pytest.mark.parametrize("how", ["max", "mean", "sum", "last"])
def test_an_example_that_lies_in_two_pieces_is_pooled_whole(tmp_path, monkeypatch, how):
    monkeypatch.setattr(f"{__name__}.OWNER", [0, 1, 1, 1, 2])
    z = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    wanted = [np.abs(z[:1]), np.abs(z[1:4]), np.abs(z[4:])]
    reduce = {"max": np.max, "mean": np.mean, "sum": np.sum, "last": lambda z, axis: z[-1]}[how]
    found = store_of(tmp_path, z).pooled(1, how)
    np.testing.assert_allclose(found.toarray(), [reduce(a, axis=0) for a in wanted], rtol=1e-6)


def test_an_index_that_became_another_file_is_read_anew(store):
    assert store.tokens_of(1, 0)[0].tolist() == [2, 4]
    path = store.folder / "layer_1/index.safetensors"
    held = path.read_bytes()
    path.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        store.tokens_of(1, 0)
    path.write_bytes(held[:-1] + b"x")
    with pytest.raises(IntegrityError, match="is damaged"):
        store.tokens_of(1, 0)
    path.unlink()
    path.write_bytes(held)
    assert store.tokens_of(1, 0)[0].tolist() == [2, 4]


def test_the_store_gives_back_the_latents(store):
    assert store.csr(1).toarray().tolist() == Z.tolist()
    assert store.n_tokens == 5


def test_values_descend_within_a_token(store):
    file = store.file("layer_1/shard_00000.safetensors")
    assert file.array("ids").tolist() == [1, 2]
    assert file.array("values").tolist() == [2.0, 1.0]


def test_the_index_finds_a_latents_tokens_strongest_first(store):
    rows, values = store.tokens_of(1, 0)
    assert (rows.tolist(), values.tolist()) == ([2, 4], [3.0, 1.0])
    rows, values = store.tokens_of(1, 1, top=1)
    assert (rows.tolist(), values.tolist()) == ([3], [5.0])
    assert len(store.tokens_of(1, 3)[0]) == 1


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max", [[0, 2, 1, 0], [3, 5, 0, 4], [0, 0, 0, 0]]),
        ("sum", [[0, 2, 1, 0], [4, 5, 0, 4], [0, 0, 0, 0]]),
        ("mean", [[0, 1, 0.5, 0], [4 / 3, 5 / 3, 0, 4 / 3], [0, 0, 0, 0]]),
        ("last", [[0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]),
    ],
)
def test_pooling_equals_the_same_by_hand(store, how, expected):
    np.testing.assert_allclose(store.pooled(1, how).toarray(), expected, rtol=1e-6)


def test_the_index_of_a_random_store_equals_a_dense_search(tmp_path):
    rng = np.random.default_rng(0)
    z = rng.random((200, 30)).astype(np.float32) * (rng.random((200, 30)) < 0.2)
    writer = StoreWriter(tmp_path, KIND, "f")
    for piece in range(4):
        part = z[piece * 50 : piece * 50 + 50]
        rows = {name: np.zeros(50, kind) for name, kind in ROW_COLUMNS.items()}
        commit_features(writer, piece, {0: csr_of(part)}, rows, {})
    build_index(tmp_path, 0, 4, 30)
    found_at = TensorFile(tmp_path / "layer_0/index.safetensors")
    for latent in range(30):
        begin, end = found_at.array("f_indptr")[latent : latent + 2]
        found = found_at.array("f_rows")[begin:end]
        expected = np.argsort(-z[:, latent], kind="stable")[: (z[:, latent] > 0).sum()]
        assert found.tolist() == expected.tolist()


def test_a_latent_out_of_range_is_refused(store):
    with pytest.raises(ValueError, match=r"not in 0\.\.3"):
        store.tokens_of(1, 4)


def test_an_index_ordered_a_few_latents_at_a_time_is_the_same_file(tmp_path, monkeypatch):
    rng = np.random.default_rng(1)
    z = rng.integers(0, 4, (60, 20)).astype(np.float32)  # many equal values
    z[:, 7] = 0  # a latent that never fires
    z[:, 8] = 1 + rng.random(60)  # and one that always does
    writer = StoreWriter(tmp_path, KIND, "f")
    for piece in range(3):
        rows = {name: np.zeros(20, kind) for name, kind in ROW_COLUMNS.items()}
        code = csr_of(z[20 * piece :][:20])
        commit_features(writer, piece, {0: code, 1: csr_of(np.zeros_like(z[:20]))}, rows, {})
    path = tmp_path / build_index(tmp_path, 0, 3, 20)
    at_once = path.read_bytes()
    monkeypatch.setattr(index, "ENTRIES_AT_ONCE", 50)
    path.unlink()
    build_index(tmp_path, 0, 3, 20)
    assert path.read_bytes() == at_once
    written = path.stat().st_mtime_ns
    build_index(tmp_path, 0, 3, 20)
    assert path.stat().st_mtime_ns == written  # a resumed run leaves it alone
    empty = TensorFile(tmp_path / build_index(tmp_path, 1, 3, 20))
    assert empty.array("f_rows").shape == (0,)
