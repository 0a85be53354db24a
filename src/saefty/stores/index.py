"""Where each latent fired: the rows of a feature store turned round, in bounded memory.

    blocks   [n] uint64          checksums of what follows (`stores.blocks`)
    f_indptr [d_sae + 1] int64   where each latent's entries begin
    f_rows   [nnz] int64         the rows on which it fired, strongest first
    f_values [nnz] float32       its values there

The entries of a layer may be many times larger than memory. They are sorted by one key of 64 bits,
the latent and then how weak the value is: the shards are read once and their entries put aside in
buckets of neighbouring keys, each small enough to be sorted in memory; a bucket that is not is put
aside again by further bits of the key. The buckets' file has no name, so that nothing is left of
it however the process ends. The index is the same whatever the memory.
"""

import errno
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int, UInt64

from saefty import fsio
from saefty.stores.blocks import BLOCK, TABLE, blocks_in, checksums
from saefty.tensorfile import TensorFile, reserve

ENTRIES_AT_ONCE = 1 << 21
"""Entries that are held in memory together, at about 60 bytes each."""

MOST_BITS = 12  # of a key that are looked at together: 4,096 buckets
VALUE_BITS = 32
ENTRY = np.dtype([("row", "<i8"), ("latent", "<u4"), ("value", "<f4")])
Segment = tuple[int, int]
"""Where some entries begin in the file of buckets, and how many they are."""


def build_index(folder: Path, layer: int | str, n_shards: int, d_sae: int) -> str:
    """Write the index of a layer by latent; return its name.

    Args:
        folder: The store's folder, all of whose pieces are committed.
        layer: The layer, or the key of a further SAE of it.
        n_shards: Pieces of the store.
        d_sae: Latents of the layer's SAE.

    Raises:
        DiskError: If the disk is full; besides the index, its buckets take 16 bytes an entry.
    """
    shards = [folder / f"layer_{layer}/shard_{i:05d}.safetensors" for i in range(n_shards)]
    nnz = sum(TensorFile(path).shape("ids")[0] for path in shards)
    name = f"layer_{layer}/index.safetensors"
    arrays: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
        "f_indptr": (np.int64, (d_sae + 1,)),
        "f_rows": (np.int64, (nnz,)),
        "f_values": (np.float32, (nnz,)),
    }
    n_blocks = blocks_in(sum(math.prod(n) * np.dtype(kind).itemsize for kind, n in arrays.values()))
    arrays[TABLE] = np.uint64, (n_blocks,)
    counts, done = np.zeros(d_sae, np.int64), 0

    def counted() -> Iterator[np.ndarray]:
        for entries in _entries(shards):
            np.add(counts, np.bincount(entries["latent"], minlength=d_sae), out=counts)
            yield entries

    with (
        fsio.staged(folder / name) as temporary,
        tempfile.TemporaryFile(dir=temporary.parent, buffering=0) as buckets,
    ):
        header = {"kind": "index", "layer": layer, "block": BLOCK}
        places = reserve(temporary, arrays, header)
        # Not through a memory map: there a full disk would be a signal, not an error.
        with open(temporary, "r+b", buffering=0) as file:
            free = VALUE_BITS + max(d_sae - 1, 0).bit_length()
            for entries in _sorted(counted(), nnz, free, _Buckets(buckets)):
                _write(file, places["f_rows"] + 8 * done, entries["row"])
                _write(file, places["f_values"] + 4 * done, entries["value"])
                done += len(entries)
            _write(file, places["f_indptr"], np.concatenate([[0], np.cumsum(counts)]))
            # The first of the widest arrays by its name, so nothing but the header is before it.
            _write(file, places[TABLE], checksums(temporary, places[TABLE] + 8 * n_blocks))
    return name


def _entries(shards: Iterable[Path]) -> Iterator[np.ndarray]:
    """Yield the entries of all shards in the order of their rows, a bounded number at a time."""
    held, filled, first_row = np.empty(ENTRIES_AT_ONCE, ENTRY), 0, 0
    for path in shards:
        shard = TensorFile(path)
        indptr, ids, values = (shard.array(name) for name in ("indptr", "ids", "values"))
        begin = 0
        while begin < len(ids):
            end = min(len(ids), begin + len(held) - filled)
            here = held[filled : filled + end - begin]
            low = int(np.searchsorted(indptr, begin, side="right")) - 1
            high = int(np.searchsorted(indptr, end, side="left"))
            taken = np.diff(np.clip(indptr[low : high + 1], begin, end))
            here["row"] = np.repeat(np.arange(first_row + low, first_row + high), taken)
            here["latent"], here["value"] = ids[begin:end], values[begin:end]
            filled, begin = filled + end - begin, end
            if filled == len(held):
                yield held
                filled = 0
        first_row += len(indptr) - 1
    yield held[:filled]


def _sorted(
    parts: Iterable[np.ndarray], count: int, free: int, buckets: "_Buckets"
) -> Iterator[np.ndarray]:
    """Yield entries by rising key, those of one key in the order in which they come.

    Args:
        parts: The entries, a bounded number at a time; they are equal above the free bits.
        count: How many they are.
        free: In how many of the key's last bits they may differ.
        buckets: Where they are put aside if they are too many.
    """
    if count <= ENTRIES_AT_ONCE:
        entries, filled = np.empty(count, ENTRY), 0
        for part in parts:
            entries[filled : filled + len(part)] = part
            filled += len(part)
        yield entries[_order(_keys(entries))]
    elif free == 0:
        yield from parts
    else:
        # Half as large as would do, because latents fire at very different rates.
        bits = min((2 * count // ENTRIES_AT_ONCE).bit_length(), MOST_BITS, free)
        for segments in buckets.put_aside(parts, free - bits, bits):
            held = sum(length for _, length in segments)
            if held:
                yield from _sorted(buckets.read(segments), held, free - bits, buckets)


class _Buckets:
    """A file of entries, appended to bucket by bucket.

    Args:
        file: The file, without a buffer.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._end = file, 0

    def put_aside(self, parts: Iterable[np.ndarray], shift: int, bits: int) -> list[list[Segment]]:
        """Write entries by `bits` bits of their keys above `shift` others; return where each is."""
        segments: list[list[Segment]] = [[] for _ in range(1 << bits)]
        for part in parts:
            bucket = (_keys(part) >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
            bucket = bucket.astype(np.uint16)  # which NumPy sorts by counting
            order = np.argsort(bucket, kind="stable")
            ends = np.cumsum(np.bincount(bucket, minlength=1 << bits))
            _write(self._file, self._end, part[order])
            for own, begin, end in zip(segments, [0, *ends], ends, strict=False):
                if end > begin:
                    own.append((self._end + int(begin) * ENTRY.itemsize, int(end - begin)))
            self._end += part.nbytes
        return segments

    def read(self, segments: Sequence[Segment]) -> Iterator[np.ndarray]:
        """Yield the entries of a bucket in the order in which they came."""
        count = sum(length for _, length in segments)
        held, filled = np.empty(min(count, ENTRIES_AT_ONCE), ENTRY), 0
        for place, length in segments:
            if filled + length > len(held):
                yield held[:filled]
                filled = 0
            _read(self._file, place, held[filled : filled + length])
            filled += length
        yield held[:filled]


def _keys(entries: np.ndarray) -> UInt64[np.ndarray, "entries"]:
    """Return what the index is ordered by: the latent, then the value's falling magnitude."""
    # The bits of floats above zero are in the order of their values.
    magnitude = entries["value"].view(np.uint32) & np.uint32(0x7FFFFFFF)
    latent = entries["latent"].astype(np.uint64) << np.uint64(VALUE_BITS)
    return latent | (magnitude ^ np.uint32(0xFFFFFFFF))


def _order(keys: UInt64[np.ndarray, "entries"]) -> Int[np.ndarray, "entries"]:
    """Return the stable order of keys, several times as fast as NumPy's own stable sort."""
    order = np.argsort(keys)
    keys = keys[order]
    equal = keys[1:] == keys[:-1]
    if equal.any():
        tied = np.zeros(len(keys), dtype=bool)
        tied[1:] = equal
        tied[:-1] |= equal
        groups = np.cumsum(np.concatenate([[0], ~equal]))[tied]
        order[tied] = np.sort(groups * len(keys) + order[tied]) - groups * len(keys)
    return order


def _write(file: BinaryIO, at: int, values: np.ndarray) -> None:
    data = np.ascontiguousarray(values).view(np.uint8).data
    while data:
        written = os.pwrite(file.fileno(), data, at)
        data, at = data[written:], at + written


def _read(file: BinaryIO, at: int, into: np.ndarray) -> None:
    data = into.view(np.uint8).data
    while data:
        got = os.preadv(file.fileno(), [data], at)
        if not got:
            raise OSError(errno.EIO, "the file of buckets is shorter than what was written")
        data, at = data[got:], at + got
