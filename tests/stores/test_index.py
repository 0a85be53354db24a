"""The index by latent, against a plain sort of all entries, at any memory and any interruption."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from saefty import fsio
from saefty.errors import DiskError
from saefty.stores import index
from saefty.stores.index import build_index
from saefty.tensorfile import TensorFile, pack

LATENTS = 70


def write_shards(folder, kind, seed=0):
    """Write shards of uneven sizes; return each entry's row, latent and value."""
    rng = np.random.default_rng(seed)
    found, first = [], 0
    for n, rows in enumerate([40, 0, 1, 130, 25]):
        fires = rng.random((rows, LATENTS)) < rng.random(LATENTS) ** 3
        fires[:, 5] = True  # always on: many entries of one latent
        fires[:, 6] = False
        fires[rows // 2 :, :] &= rng.random((rows - rows // 2, 1)) < 0.7  # rows without a latent
        row, latent = np.nonzero(fires)
        drawn = {
            "distinct": rng.standard_normal(len(row)),
            "tied": rng.integers(1, 4, len(row)) * rng.choice([-1, 1], len(row)),
            "equal": np.ones(len(row)),
        }
        values = drawn[kind].astype(np.float32)
        indptr = np.searchsorted(row, np.arange(rows + 1))
        code = {"indptr": indptr, "ids": latent.astype(np.uint32), "values": values}
        fsio.commit_bytes(folder / f"layer_0/shard_{n:05d}.safetensors", pack(code, {}))
        found.append((first + row, latent, values))
        first += rows
    return (np.concatenate(column) for column in zip(*found, strict=True))


@pytest.mark.parametrize("kind", ["distinct", "tied", "equal"])
@pytest.mark.parametrize("memory", [1 << 21, 900, 64, 9])
def test_the_index_is_a_stable_sort_of_all_entries_whatever_the_memory(
    tmp_path, monkeypatch, kind, memory
):
    rows, latents, values = write_shards(tmp_path, kind)
    monkeypatch.setattr(index, "ENTRIES_AT_ONCE", memory)
    shifts, put_aside = [], index._Buckets.put_aside

    def noted(self, parts, shift, bits):
        shifts.append(shift)
        return put_aside(self, parts, shift, bits)

    monkeypatch.setattr(index._Buckets, "put_aside", noted)
    file = TensorFile(tmp_path / build_index(tmp_path, 0, 5, LATENTS))
    order = np.lexsort((rows, -np.abs(values), latents))
    wanted = np.searchsorted(latents[order], np.arange(LATENTS + 1))
    np.testing.assert_array_equal(file.array("f_indptr"), wanted)
    np.testing.assert_array_equal(file.array("f_rows"), rows[order])
    np.testing.assert_array_equal(file.array("f_values"), values[order])
    assert bool(shifts) == (memory < len(rows))
    if kind == "equal":  # a latent with more entries than are held is cut to its values' last bit
        assert (0 in shifts) == (memory <= 64)
    left = {path.name for path in (tmp_path / "layer_0").iterdir() if "shard" not in path.name}
    assert left == {"index.safetensors"}


def test_the_quick_order_is_the_stable_one():
    rng = np.random.default_rng(1)
    for keys in (rng.integers(0, 50, 5000), np.zeros(7), np.arange(9)[::-1], np.zeros(0)):
        keys = keys.astype(np.uint64) << np.uint64(30)
        np.testing.assert_array_equal(index._order(keys), np.argsort(keys, kind="stable"))


KILLED = """
import os, signal, sys
from pathlib import Path
from saefty.stores import index
index.ENTRIES_AT_ONCE, write, left = 64, index._write, [int(sys.argv[2])]
def dies(*given):
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    write(*given)
index._write = dies
index.build_index(Path(sys.argv[1]), 0, 5, 70)
"""


@pytest.mark.parametrize("writes", [1, 60, 200])
def test_what_is_killed_leaves_no_index_and_the_next_one_is_whole(tmp_path, writes):
    write_shards(tmp_path, "distinct")
    done = subprocess.run(
        [sys.executable, "-c", KILLED, tmp_path, str(writes)], capture_output=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = {path.name for path in (tmp_path / "layer_0").iterdir() if "shard" not in path.name}
    assert len(left) == 1  # the buckets' file has no name
    assert next(iter(left)).startswith(fsio.TEMP_PREFIX)
    assert fsio.remove_temporaries(tmp_path) == 1
    rows, latents, values = write_shards(tmp_path, "distinct")
    file = TensorFile(tmp_path / build_index(tmp_path, 0, 5, LATENTS))
    order = np.lexsort((-np.abs(values), latents))
    np.testing.assert_array_equal(file.array("f_rows"), rows[order])


@pytest.mark.parametrize("writes", [0, 30])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch, writes):
    write_shards(tmp_path, "distinct")
    monkeypatch.setattr(index, "ENTRIES_AT_ONCE", 64)
    pwrite, left = os.pwrite, [writes]

    def full(*given):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*given)

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(DiskError, match="the disk is full"):
        build_index(tmp_path, 0, 5, LATENTS)
    assert all("shard" in path.name for path in (tmp_path / "layer_0").iterdir())
