"""Safetensors files with the same bytes for the same content, read through mmap by NumPy alone.

The reference library writes the metadata of a file in an order that changes from process to
process; a store that compares checksums needs one order. The format is eight bytes of header
length, a JSON header, and the arrays (https://github.com/huggingface/safetensors#format).
"""

import json
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
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in sorted(header.items())}
    entries: dict[str, Any] = {"__metadata__": texts}
    blocks, position = [], 0
    bare = {n: a.bits if isinstance(a, Bf16) else a for n, a in arrays.items()}
    # Wide items first: every array then starts at a multiple of its item size.
    for name, bits in sorted(bare.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])):
        block = (
            np.ascontiguousarray(bits).astype(bits.dtype.newbyteorder("<"), copy=False).tobytes()
        )
        entries[name] = {
            "dtype": "BF16"
            if isinstance(arrays[name], Bf16)
            else _CODES[bits.dtype.newbyteorder("<")],
            "shape": list(bits.shape),
            "data_offsets": [position, position + len(block)],
        }
        blocks.append(block)
        position += len(block)
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return b"".join([len(text).to_bytes(8, "little"), text, *blocks])


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
            entries = fsio.parse_json(bytes(self._bytes[8 : self._start]).decode(), str(path))
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

    def array(self, name: str) -> Shaped[np.ndarray, "..."]:
        """Return an array as a view of the mapped file.

        Raises:
            IntegrityError: If the file holds no such array, or not the bytes its header promises.
        """
        if name not in self._entries:
            raise IntegrityError(f"{self.path} holds no array {name!r}, only {self.names}.")
        try:
            entry = self._entries[name]
            begin, end = (self._start + offset for offset in entry["data_offsets"])
            kind = _DTYPES[entry["dtype"]]
            return self._bytes[begin:end].view(kind).reshape(entry["shape"])
        except (KeyError, ValueError, TypeError) as error:
            raise IntegrityError(f"{self.path} is damaged at {name!r}: {error}") from None
