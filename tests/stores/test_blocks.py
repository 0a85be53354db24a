"""An index of which what is read is verified and no more: no damaged value is returned."""

from itertools import pairwise

import numpy as np
import pytest
import xxhash

from saefty import fsio
from saefty.errors import IntegrityError
from saefty.storekeeping import verify_store
from saefty.stores import blocks
from saefty.stores.activations import ROW_COLUMNS
from saefty.stores.base import EXAMPLES, MANIFEST, StoreWriter, check_file
from saefty.stores.features import KIND, FeatureStore, commit_features
from saefty.stores.index import build_index
from saefty.tensorfile import TensorFile, pack

TOKENS, LATENTS, SMALL = 300, 40, 96
INDEX = "layer_0/index.safetensors"


def written(folder, seed=0):
    """Write a store of random codes; return them."""
    rng = np.random.default_rng(seed)
    fires = np.argsort(rng.random((TOKENS, LATENTS)), axis=1)[:, :7]
    z = np.zeros((TOKENS, LATENTS), np.float32)
    np.put_along_axis(z, fires, rng.random(fires.shape, dtype=np.float32) + 0.1, axis=1)
    token, latent = np.nonzero(z)
    code = {"indptr": np.arange(TOKENS + 1) * 7, "ids": latent, "values": z[token, latent]}
    writer = StoreWriter(folder, KIND, "f")
    rows = {name: np.zeros(TOKENS, kind) for name, kind in ROW_COLUMNS.items()}
    record = commit_features(writer, 0, {0: code}, rows, {})
    fsio.commit_text(folder / EXAMPLES, '{"example_id": "one"}\n')
    facts = {"layers": [0], "sites": {"0": "0"}, "d_sae": {"0": LATENTS}, "saes": {"0": None}}
    writer.finish([record], facts, [EXAMPLES, build_index(folder, 0, 1, LATENTS)])
    return z


@pytest.fixture(params=[SMALL, blocks.BLOCK], ids=["many blocks", "one block"])
def codes(request, tmp_path, monkeypatch):
    monkeypatch.setattr("saefty.stores.blocks.BLOCK", request.param)
    monkeypatch.setattr("saefty.stores.index.BLOCK", request.param)
    return written(tmp_path)


@pytest.fixture
def many(tmp_path, monkeypatch):
    monkeypatch.setattr("saefty.stores.blocks.BLOCK", SMALL)
    monkeypatch.setattr("saefty.stores.index.BLOCK", SMALL)
    return written(tmp_path)


def answers(folder, z, latents=range(LATENTS)):
    """Ask for latents of a store opened anew; each is a dense search's, or damage is told."""
    store, told = FeatureStore.open(folder), {}
    for latent in latents:
        try:
            rows, values = store.tokens_of(0, latent)
        except IntegrityError as error:
            told[latent] = str(error)
            continue
        wanted = np.argsort(-z[:, latent], kind="stable")[: (z[:, latent] > 0).sum()]
        assert rows.tolist() == wanted.tolist()
        assert values.tolist() == z[wanted, latent].tolist()
    return told


def flipped(path, place):
    whole = path.read_bytes()
    path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
    return whole


def made_old(folder):
    """Turn the index and manifest into what was written before there were checksums of blocks."""
    file = TensorFile(folder / INDEX)
    arrays = {name: np.array(file.array(name)) for name in ("f_indptr", "f_rows", "f_values")}
    (folder / INDEX).write_bytes(pack(arrays, {"kind": "index", "layer": 0}))
    manifest = fsio.read_sealed(folder / MANIFEST)
    size = (folder / INDEX).stat().st_size
    manifest["extra"][INDEX] = {"bytes": size, "xxh3_128": fsio.digest(folder / INDEX)}
    fsio.commit_sealed(folder / MANIFEST, manifest)


def test_every_answer_is_that_of_a_dense_search(tmp_path, codes):
    assert answers(tmp_path, codes) == {}
    counts = FeatureStore.open(tmp_path).firing_counts(0)
    assert counts.tolist() == (codes > 0).sum(axis=0).tolist()


def test_the_checksums_are_those_of_the_bytes_behind_the_head_and_the_manifest_has_the_heads(
    tmp_path, codes
):
    whole, size = (tmp_path / INDEX).read_bytes(), blocks.BLOCK
    facts = fsio.read_sealed(tmp_path / MANIFEST)["extra"][INDEX]
    start = facts["head"]["bytes"]
    parts = [whole[at : at + size] for at in range(start, len(whole), size)]
    file = TensorFile(tmp_path / INDEX)
    assert file.array("blocks").tolist() == [xxhash.xxh3_64_intdigest(part) for part in parts]
    assert facts["head"]["xxh3_128"] == xxhash.xxh3_128_hexdigest(whole[:start])
    assert start == file.place("f_indptr")[0] == len(whole) - sum(map(len, parts))
    assert facts["xxh3_128"] == xxhash.xxh3_128_hexdigest(whole)


@pytest.mark.parametrize("name", ["f_indptr", "f_rows", "f_values"])
def test_a_flipped_byte_is_told_by_the_latents_of_its_block_and_by_verify(tmp_path, many, name):
    path, file = tmp_path / INDEX, TensorFile(tmp_path / INDEX)
    indptr, start = file.array("f_indptr").tolist(), file.place("f_indptr")[0]
    at = {each: file.place(each)[0] for each in ("f_indptr", "f_rows", "f_values")}
    begin, end = file.place(name)
    for place in range(begin, end, (end - begin) // 4):
        whole = flipped(path, place)
        first = start + (place - start) // SMALL * SMALL  # of the damaged block
        touched = set()
        for latent, (a, b) in enumerate(pairwise(indptr)):
            read = [(at["f_indptr"] + 8 * latent, 16), (at["f_rows"] + 8 * a, 8 * (b - a))]
            read.append((at["f_values"] + 4 * a, 4 * (b - a)))
            if any(one < first + SMALL and one + length > first for one, length in read):
                touched.add(latent)
        told = answers(tmp_path, many)
        assert set(told) == touched
        assert 0 < len(touched) < LATENTS
        for message in told.values():
            assert f"{INDEX} of {tmp_path} is damaged" in message
            assert f"of its bytes {first} to" in message
            assert "saefty store repair" in message
        assert [INDEX in line for line in verify_store(tmp_path)] == [True]
        path.write_bytes(whole)
        assert answers(tmp_path, many) == {}


def test_any_flipped_byte_of_the_head_is_told_whatever_is_asked(tmp_path, codes):
    start = fsio.read_sealed(tmp_path / MANIFEST)["extra"][INDEX]["head"]["bytes"]
    for place in {0, 7, 8, 60, start - 1, *range(9, start, 41)}:
        whole = flipped(tmp_path / INDEX, place)
        told = answers(tmp_path, codes, [3])
        assert f"the checksum of its bytes 0 to {start} is" in told[3]
        (tmp_path / INDEX).write_bytes(whole)


def test_the_whole_index_of_another_store_is_not_read(tmp_path, codes):
    other = tmp_path / "other"
    written(other, seed=1)
    assert (other / INDEX).stat().st_size == (tmp_path / INDEX).stat().st_size
    (tmp_path / INDEX).write_bytes((other / INDEX).read_bytes())
    assert "is damaged" in answers(tmp_path, codes, [5])[5]


def test_a_first_question_reads_the_head_and_three_arrays_blocks_and_the_next_nothing(
    tmp_path, many, monkeypatch
):
    read, seen = blocks._read, []
    monkeypatch.setattr(blocks, "_read", lambda *given: seen.append(given[1:]) or read(*given))
    monkeypatch.setattr(blocks, "_sound", {})
    store = FeatureStore.open(tmp_path)
    store.tokens_of(0, 11, 2)
    head = fsio.read_sealed(tmp_path / MANIFEST)["extra"][INDEX]["head"]["bytes"]
    assert seen[0] == (0, head)
    assert 3 <= len(seen) - 1 <= 6
    assert all(end - begin == SMALL for begin, end in seen[1:])
    seen.clear()
    store.tokens_of(0, 11, 2)
    assert seen == []
    FeatureStore.open(tmp_path).tokens_of(0, 11, 2)
    assert seen == []  # once a process


def test_an_index_without_checksums_of_its_blocks_is_verified_as_a_whole(tmp_path, codes):
    made_old(tmp_path)
    assert answers(tmp_path, codes) == {}
    assert verify_store(tmp_path) == []
    flipped(tmp_path / INDEX, (tmp_path / INDEX).stat().st_size - 1)
    told = answers(tmp_path, codes)
    assert set(told) == set(range(LATENTS))
    assert "its checksum is" in told[0]


def test_an_older_version_still_verifies_the_new_index_as_a_whole(tmp_path, codes):
    facts = fsio.read_sealed(tmp_path / MANIFEST)["extra"][INDEX]
    old = {name: facts[name] for name in ("bytes", "xxh3_128")}
    file = TensorFile(check_file(tmp_path, INDEX, old, cached=False))
    assert len(file.array("f_rows")) == TOKENS * 7


def test_a_block_that_the_disk_does_not_give_is_told(tmp_path, codes, monkeypatch):
    read = blocks._read

    def failing(path, begin, end):
        if begin:
            raise OSError(5, "Input/output error")
        return read(path, begin, end)

    monkeypatch.setattr(blocks, "_read", failing)
    monkeypatch.setattr(blocks, "_sound", {})
    assert "cannot be read: Input/output error" in answers(tmp_path, codes, [0])[0]
