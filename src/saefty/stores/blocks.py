"""Checksums of a large file block by block, so that of what is read all is verified and no more.

A safetensors file has them at its head, as an array before all others:

    blocks [n] uint64   xxh3-64 of each block behind it; the header's `block` says of how many bytes

The head, which is the header and this array, has a checksum of its own in the manifest, beside that
of the whole file. A file without them is verified as a whole before anything of it is read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Shaped, UInt64

from saefty import fsio
from saefty.errors import IntegrityError
from saefty.tensorfile import TensorFile

TABLE = "blocks"
BLOCK = 1 << 16
"""Bytes that are verified together; each such block takes 8 bytes of the head."""

_sound: dict[tuple[str, int, int, int, str], bytearray] = {}


def blocks_in(n_bytes: int) -> int:
    """Return into how many blocks some bytes fall."""
    return -(-n_bytes // BLOCK)


def checksums(path: Path, start: int) -> UInt64[np.ndarray, "blocks"]:
    """Return the checksum of each block of a file from some place on."""
    with open(path, "rb") as file:
        file.seek(start)
        found = [xxhash.xxh3_64_intdigest(block) for block in iter(lambda: file.read(BLOCK), b"")]
    return np.array(found, np.uint64)


def head_facts(path: Path) -> dict[str, Any] | None:
    """Return the size and checksum of a file's head; None if it has no checksums of blocks."""
    if path.suffix != ".safetensors" or TABLE not in (file := TensorFile(path)):
        return None
    end = file.place(TABLE)[1]
    return {"bytes": end, "xxh3_128": fsio.digest_bytes(_read(path, 0, end))}


class BlockFile:
    """A safetensors file, of which what is asked for is verified first, once a process.

    Args:
        path: The file, of the size that was written.
        head: `bytes` and `xxh3_128` of its head; None if the whole file was verified.
        said: How messages call the file.
        then: What they say to do about damage.

    Raises:
        IntegrityError: If the head is damaged or cannot be read.
    """

    def __init__(self, path: Path, head: Mapping[str, Any] | None, *, said: str, then: str) -> None:
        self._path, self._said, self._then = path, said, then
        self._size, self._start, self._state = BLOCK, 0, bytearray()
        if head is None:
            self._open(path)
            return
        self._start = int(head["bytes"])
        status = path.stat()
        key = (str(path), status.st_ino, status.st_mtime_ns, status.st_size, str(head["xxh3_128"]))
        if key not in _sound:
            self._compare(0, self._start, head["xxh3_128"], fsio.digest_bytes)
        file = self._open(path)
        self._size, self._table = int(file.header["block"]), file.array(TABLE)
        self._state = _sound.setdefault(key, bytearray(len(self._table)))

    def _open(self, path: Path) -> TensorFile:
        file = TensorFile(path)
        names = [name for name in file.names if name != TABLE]
        self._arrays = {name: np.asarray(file.array(name)) for name in names}
        self._places = {name: file.place(name)[0] - self._start for name in names}
        return file

    def part(self, name: str, begin: int, end: int) -> Shaped[np.ndarray, "part"]:
        """Return elements begin to end of an array, verified.

        Raises:
            IntegrityError: If a block in which they lie is damaged or cannot be read.
        """
        found = self._arrays[name][begin:end]
        if self._state and len(found):
            at = self._places[name] + begin * found.itemsize
            first, last = at // self._size, (at + found.nbytes - 1) // self._size
            if 0 in self._state[first : last + 1]:
                self._verify(first, last + 1)
        return found

    def _verify(self, first: int, end: int) -> None:
        for i in range(first, end):
            if not self._state[i]:
                begin = self._start + i * self._size
                wanted = f"{int(self._table[i]):016x}"
                self._compare(begin, begin + self._size, wanted, xxhash.xxh3_64_hexdigest)
                self._state[i] = 1

    def _compare(self, begin: int, end: int, wanted: str, digest: Callable[[bytes], str]) -> None:
        try:
            data = _read(self._path, begin, end)
        except OSError as error:
            raise IntegrityError(
                f"{self._said} cannot be read: {error.strerror or error}.",
                then="Check the disk and the file's permissions, then run the same command again.",
            ) from None
        if (found := digest(data)) != wanted:
            raise IntegrityError(
                f"{self._said} is damaged: the checksum of its bytes {begin} to "
                f"{begin + len(data)} is {found}, but {wanted} was written.",
                then=self._then,
            )


def _read(path: Path, begin: int, end: int) -> bytes:
    # Not through a memory map: there a disk that fails would be a signal, not an error.
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        return b"".join(iter(lambda: file.read(end - file.tell()), b""))
