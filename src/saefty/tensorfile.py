"""Safetensors files with the same bytes for the same content, read through mmap by NumPy alone.

The reference library writes the metadata of a file in an order that changes from process to
process; a store that compares checksums needs one order. The format is eight bytes of header
length, a JSON header, and the arrays (https://github.com/huggingface/safetensors#format).
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped, UInt16

from saefty import fsio
from saefty.errors import IntegrityError

MAX_HEADER_BYTES = 1 << 20
ALIGNMENT = 8

_DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # NumPy has no bfloat16: its bits, which torch views as what they are
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "U32": np.dtype("<u4"),
    "U64": np.dtype("<u8"),
    "BOOL": np.dtype("?"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items() if code != "BF16"}


@dataclass(frozen=True)
class Bf16:
    """The bits of a bfloat16 array, which NumPy itself cannot hold."""

    bits: UInt16[np.ndarray, "..."]


def pack(arrays: Mapping[str, np.ndarray | Bf16], header: Mapping[str, Any]) -> bytes:
    """Serialise arrays as one safetensors file.

    Args:
        arrays: The arrays by name.
        header: What they are; values that are not text are written as JSON.

    Returns:
        The file's bytes, which depend on the arguments alone.
    """
    return b"".join(blocks_of(arrays, header))


def blocks_of(
    arrays: Mapping[str, np.ndarray | Bf16], header: Mapping[str, Any]
) -> list[fsio.Block]:
    """Return the bytes of `pack` in blocks; what is large is not copied.

    A block is an array's own memory where it is contiguous and little-endian.
    """
    bare = {n: a.bits if isinstance(a, Bf16) else a for n, a in arrays.items()}
    codes = {
        name: "BF16" if isinstance(arrays[name], Bf16) else _CODES[bits.dtype.newbyteorder("<")]
        for name, bits in bare.items()
    }
    head, places = _layout({n: (codes[n], a.shape) for n, a in bare.items()}, header)
    blocks: list[fsio.Block] = [head]
    for name in places:
        values = np.ascontiguousarray(bare[name])
        values = values.astype(values.dtype.newbyteorder("<"), copy=False)
        blocks.append(values.reshape(-1).view(np.uint8).data)
    return blocks


def reserve(
    path: Path,
    arrays: Mapping[str, tuple[type[np.generic], tuple[int, ...]]],
    header: Mapping[str, Any],
) -> dict[str, int]:
    """Make a safetensors file of zeros, to be filled in place: for arrays larger than memory.

    Args:
        path: A temporary path, as `fsio.staged` gives it.
        arrays: For each array its type and shape.
        header: What they are, as for `pack`.

    Returns:
        For each array where its bytes begin in the file.
    """
    sizes = {name: (_CODES[np.dtype(kind)], shape) for name, (kind, shape) in arrays.items()}
    head, places = _layout(sizes, header)
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(len(head) + max((end for _, end in places.values()), default=0))
    return {name: len(head) + begin for name, (begin, _) in places.items()}


def _layout(
    arrays: Mapping[str, tuple[str, tuple[int, ...]]], header: Mapping[str, Any]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """Return the head of a file, and where each array's bytes lie behind it, in their order."""
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in sorted(header.items())}
    entries: dict[str, Any] = {"__metadata__": texts}
    places, position = {}, 0
    # Wide items first: every array then starts at a multiple of its item size.
    for name, (code, shape) in sorted(
        arrays.items(), key=lambda item: (-_DTYPES[item[1][0]].itemsize, item[0])
    ):
        size = math.prod(shape) * _DTYPES[code].itemsize
        places[name] = (position, position + size)
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [*places[name]]}
        position += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, places


class TensorFile:
    """A safetensors file whose arrays are views of the mapped file; bfloat16 comes as its bits.

    Raises:
        IntegrityError: If the header is not that of a safetensors file of this size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Copy-on-write: never written, but torch takes no read-only memory.
            self._bytes = np.memmap(path, dtype=np.uint8, mode="c")
            length = int(self._bytes[:8].view("<u8")[0])
            if length > min(MAX_HEADER_BYTES, len(self._bytes) - 8):
                raise ValueError(f"a header of {length} bytes")
            self._start = 8 + length
            text = bytes(self._bytes[8 : self._start]).decode()
            entries = fsio.parse_json(text, str(path))
            if not isinstance(entries, dict):
                raise ValueError("its header is no object")
            named = json.loads(text, object_pairs_hook=lambda pairs: [key for key, _ in pairs])
            if len(set(named)) < len(named):
                raise ValueError("its header names an array twice")
            self.header: dict[str, str] = entries.pop("__metadata__", {})
            self._entries: dict[str, Any] = entries
        except (OSError, ValueError, IndexError, AttributeError) as error:
            raise IntegrityError(f"{path} is not a readable safetensors file: {error}") from None

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    @property
    def names(self) -> list[str]:
        """The names of the arrays."""
        return sorted(self._entries)

    def is_bf16(self, name: str) -> bool:
        """Whether an array's values are bfloat16."""
        return str(self._entries[name]["dtype"]) == "BF16"

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape without reading it."""
        return tuple(self._entries[name]["shape"])

    def place(self, name: str) -> tuple[int, int]:
        """Return where an array's bytes begin and end in the file."""
        begin, end = self._entries[name]["data_offsets"]
        return self._start + begin, self._start + end

    def array(self, name: str) -> Shaped[np.ndarray, "..."]:
        """Return an array as a view of the mapped file.

        Raises:
            IntegrityError: If the file holds no such array, or not the bytes its header promises.
        """
        if name not in self._entries:
            raise IntegrityError(f"{self.path} holds no array {name!r}, only {self.names}.")
        try:
            return self._view(self._entries[name])
        except (KeyError, OverflowError, ValueError, TypeError) as error:
            raise IntegrityError(f"{self.path} is damaged at {name!r}: {error}") from None

    def _view(self, entry: Mapping[str, Any]) -> Shaped[np.ndarray, "..."]:
        begin, end = entry["data_offsets"]
        if not 0 <= begin <= end <= len(self._bytes) - self._start:
            raise ValueError(f"its bytes {begin} to {end} do not lie in the file")
        if any(side < 0 for side in entry["shape"]):
            raise ValueError(f"a shape of {entry['shape']}")
        held = self._bytes[self._start + begin : self._start + end]
        return held.view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
