"""Guards whose files are damaged, edited, or lie."""

import copy
import json

import numpy as np
import pytest

from guard_cases import TEXTS, rewrite
from saefty import fsio
from saefty.errors import (
    IntegrityError,
    MismatchError,
    SaeftyError,
    UnsafeArtifactError,
)
from saefty.guards.files import read_guard
from saefty.guards.scoring import load_guard
from saefty.tensorfile import TensorFile, pack


def test_a_record_that_was_edited_says_what_to_do(copied):
    path = copied("words") / "guard.json"
    path.write_text(path.read_text().replace("a probe of the tests", "a better probe"))
    with pytest.raises(IntegrityError, match="is damaged") as caught:
        read_guard(path.parent)
    assert "Copy the guard's folder again" in caught.value.then


def test_a_guard_without_hashes_of_its_texts_says_what_to_do(copied):
    folder = copied("words")
    replace_arrays(folder, fitted_on=None)
    with pytest.raises(IntegrityError, match="another version of saefty wrote it") as caught:
        read_guard(folder)
    assert "saefty probe --save" in caught.value.then


def replace_arrays(folder, **arrays) -> None:
    """Put other arrays into a guard's weights, with the checksum that belongs to them."""
    file = TensorFile(folder / "guard.safetensors")
    held = {name: np.array(file.array(name)) for name in file.names}
    data = pack({k: v for k, v in {**held, **arrays}.items() if v is not None}, {"format": "np"})
    put_weights(folder, data)


def put_weights(folder, data: bytes) -> None:
    checksum = fsio.commit_bytes(folder / "guard.safetensors", data)
    rewrite(folder, lambda record: record["files"].update({"guard.safetensors": checksum}))


@pytest.mark.parametrize("name", ["guard.json", "guard.safetensors", "vocabulary.txt"])
def test_a_changed_byte_is_found(name, copied):
    path = copied("words") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        read_guard(path.parent)


@pytest.mark.parametrize("name", ["guard.safetensors", "vocabulary.txt"])
def test_a_missing_file_is_named(name, copied):
    folder = copied("words")
    (folder / name).unlink()
    with pytest.raises(IntegrityError, match=f"{name} is missing"):
        read_guard(folder)


def test_a_guard_of_a_newer_saefty_is_refused_with_both_versions(copied):
    folder = copied("words")
    rewrite(folder, lambda record: record.update(version=2, saefty="9.0"))
    with pytest.raises(MismatchError, match=r"version 2, written by saefty '9.0'.*version 1"):
        read_guard(folder)


def leaves(tree, at=()):
    """Yield the path of every key of a record."""
    for key, value in tree.items():
        yield (*at, key)
        if isinstance(value, dict):
            yield from leaves(value, (*at, key))


def changed(tree, path, change):
    for key in path[:-1]:
        tree = tree[key]
    change(tree, path[-1])


FREE = {("facts", "data"), ("facts", "sources"), ("facts", "left_out"), ("facts", "rates")}
"""Objects whose keys are a user's own names."""


def test_a_record_without_one_of_its_keys_is_refused(copied, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    folder = copied("latents")
    whole = fsio.read_sealed(folder / "guard.json")
    tried = 0
    for path in leaves(whole):
        if any(path[: len(free)] == free and len(path) > len(free) for free in FREE):
            continue
        if path[:2] == ("model", "files") and len(path) > 2:
            continue
        record = copy.deepcopy(whole)
        changed(record, path, lambda tree, key: tree.pop(key))
        fsio.commit_sealed(folder / "guard.json", record)
        with pytest.raises(IntegrityError):
            read_guard(folder)
        tried += 1
    assert tried > 40


@pytest.mark.parametrize("bad", [None, [], {}, "text", -7, 1e308, True, "é" * 99])
def test_a_record_with_any_value_changed_is_read_or_refused_but_never_a_crash(
    bad, copied, monkeypatch
):
    monkeypatch.setattr("os.fsync", lambda _: None)
    folder = copied("latents")
    whole = fsio.read_sealed(folder / "guard.json")
    for path in leaves(whole):
        record = copy.deepcopy(whole)
        changed(record, path, lambda tree, key: tree.update({key: bad}))
        fsio.commit_sealed(folder / "guard.json", record)
        try:
            read_guard(folder)
        except SaeftyError:
            continue


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00" * 7,
        (1 << 62).to_bytes(8, "little") + b"{}",
        (1 << 19).to_bytes(8, "little") + b"{}",
        (8).to_bytes(8, "little") + b"[" * 8,
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"{}",
        b"\x80\x04K\x01.",
    ],
    ids=["empty", "short", "huge", "beyond", "nested", "list", "nothing", "pickle"],
)
def test_bytes_that_are_no_safetensors_are_refused(data, copied):
    folder = copied("dense")
    put_weights(folder, data)
    with pytest.raises(IntegrityError):
        read_guard(folder)


def with_header(entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + b"\0" * 64


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F64", "shape": [1 << 60], "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": [-1], "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": [1], "data_offsets": [0, 1 << 40]},
        {"dtype": "F64", "shape": [1], "data_offsets": [8, 0]},
        {"dtype": "OBJECT", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": "1", "data_offsets": [0, 8]},
        {"dtype": "F64", "shape": [1]},
        [],
    ],
)
def test_headers_that_lie_are_refused(entry, copied):
    folder = copied("dense")
    whole = {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}
    columns = {**whole, "dtype": "I64"}
    put_weights(
        folder,
        with_header({"columns": columns, "center": whole, "scale": whole, "weights": entry}),
    )
    with pytest.raises(IntegrityError):
        read_guard(folder)


@pytest.mark.parametrize(
    ("arrays", "what"),
    [
        ({"weights": np.full(32, np.nan)}, "32 of 32 values of weights are NaN"),
        ({"scale": np.zeros(32)}, "a scale is 0.0"),
        ({"columns": np.arange(-1, 31)}, "columns -1 to 30 do not lie"),
        ({"columns": np.arange(5, 37)}, "columns 5 to 36 do not lie"),
        ({"columns": np.arange(32)[::-1].copy()}, "do not lie in range|not ascending"),
        ({"columns": np.arange(32.0)}, "columns is float64 of the shape"),
        ({"weights": np.zeros(32, np.float32)}, "weights is float32"),
        ({"weights": np.zeros((32, 1))}, "and a row of float64 is wanted"),
        ({"weights": np.zeros(31)}, "there are 32 columns, but 31 of weights"),
        ({"weights": None}, "holds no array 'weights'"),
    ],
)
def test_weights_that_make_no_detector_are_refused(arrays, what, copied):
    folder = copied("dense")
    replace_arrays(folder, **arrays)
    with pytest.raises(IntegrityError, match=what):
        read_guard(folder)


def test_a_vocabulary_of_another_length_is_refused(copied):
    folder = copied("words")
    checksum = fsio.commit_text(folder / "vocabulary.txt", "one\ntwo\n")
    rewrite(folder, lambda record: record["files"].update({"vocabulary.txt": checksum}))
    with pytest.raises(IntegrityError, match="holds 2 words, but the guard reads 28 columns"):
        read_guard(folder)


def test_a_record_too_large_to_be_one_is_not_read(copied):
    path = copied("words") / "guard.json"
    with open(path, "r+b") as file:
        file.truncate(1 << 30)
    with pytest.raises(IntegrityError, match="no guard's record has more than"):
        read_guard(path.parent)


@pytest.mark.parametrize("text", ["", "[]", "null", "{", "[" * 100_000, '{"a": NaN}', '"guard"'])
def test_a_record_that_is_no_object_is_refused(text, copied):
    path = copied("words") / "guard.json"
    path.write_text(text)
    with pytest.raises(IntegrityError):
        read_guard(path.parent)


@pytest.mark.parametrize("name", ["guard.json", "guard.safetensors", "vocabulary.txt"])
def test_a_link_out_of_the_folder_is_refused(name, copied, tmp_path):
    folder = copied("words")
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
    with pytest.raises(UnsafeArtifactError):
        read_guard(folder)


def test_a_link_to_an_sae_outside_is_refused(copied, tmp_path, model):
    folder = copied("latents")
    (folder / "sae").rename(tmp_path / "sae")
    (folder / "sae").symlink_to(tmp_path / "sae")
    with pytest.raises(UnsafeArtifactError):
        load_guard(folder, model).score(TEXTS)
