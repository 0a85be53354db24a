"""A dump of dense codes: a folder of `.pt` chunks, read one at a time.

    meta.json                             the number of latents under `SAE_D_FEAT`
    sae_feats_layer<L>_chunk<n>.pt        {"sae_feats": [tokens, latents], "total_tokens_so_far": n}
    layer<L>_chunk<n>.pt                  the same under a shorter name

Chunks are read in the order of their numbers; `total_tokens_so_far` counts the tokens of the chunk
and of all before it, and has to add up. A `.pt` file is opened by a child process that can do
nothing else (`formats.checkpoint`), which turns it into safetensors in a folder of ours; that is
mapped and removed after its turn. The dump itself is never written to.
"""

import contextlib
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int

from saefty import fsio
from saefty.errors import InputError, MismatchError, ResourceError
from saefty.formats.checkpoint import to_safetensors
from saefty.sae_sets import free_memory
from saefty.tensorfile import TensorFile

log = logging.getLogger(__name__)

META, WIDTH = "meta.json", "SAE_D_FEAT"
CODES, TOTAL = "sae_feats", "total_tokens_so_far"
CHUNK = re.compile(r"(sae_feats_)?layer(\d+)_chunk_?(\d+)\.pt")
DTYPES = {"F64", "F32", "F16", "BF16"}
COPIES = 2.2  # of a chunk that the child process holds: its tensor and the bytes to be written
ROWS_BYTES = 1 << 25
UNTOUCHED = "What was read is unchanged."


@dataclass(frozen=True)
class Chunk:
    """One file of a dump, as safetensors."""

    path: Path
    """The `.pt` file."""
    codes: TensorFile
    total: int
    """Tokens of this chunk and all before it, as the file says."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens and latents."""
        return self.codes.shape(CODES)

    @property
    def dtype(self) -> str:
        """The code of the values' type, such as F16."""
        names = {"f8": "F64", "f4": "F32", "f2": "F16"}
        kind = self.codes.array(CODES).dtype
        return "BF16" if self.codes.is_bf16(CODES) else names.get(kind.str[1:], str(kind))

    def blocks(self) -> Iterator[Float[np.ndarray, "tokens d_sae"]]:
        """Yield the codes in blocks of some megabytes; bfloat16 widened to float32, exactly."""
        held = self.codes.array(CODES)
        rows = max(1, ROWS_BYTES // max(held.shape[1] * held.itemsize, 1))
        for first in range(0, len(held), rows):
            yield self._wide(held[first : first + rows])

    def part(
        self, chosen: Int[np.ndarray, "chosen"], *, columns: bool = False
    ) -> Float[np.ndarray, "chosen width"]:
        """Return chosen rows of the matrix, or chosen columns as rows."""
        held = self.codes.array(CODES)
        return self._wide(np.ascontiguousarray(held[:, chosen].T if columns else held[chosen]))

    def _wide(self, block: np.ndarray) -> np.ndarray:
        if self.codes.is_bf16(CODES):
            return (block.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return block


@dataclass(frozen=True)
class DumpFacts:
    """What a dump's last chunk says of a layer: its tokens, and the bytes of one token's codes."""

    n_tokens: int
    row_bytes: int


class FeatureDump:
    """The chunks of one folder.

    Args:
        folder: The dump.
        scratch: A folder of ours for the chunk that is being read.

    Raises:
        InputError: If it holds no chunk, two files for one chunk, or a `meta.json` that says no
            width.
    """

    def __init__(self, folder: Path, scratch: Path) -> None:
        self.folder, self._scratch = folder, scratch
        self._files = _find(folder)
        meta = _meta(folder)
        self._width = None if meta is None else _width(folder, meta)
        self._announced = meta or {}

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers whose chunks are there."""
        return tuple(self._files)

    def files(self, layer: int) -> list[Path]:
        """Return a layer's chunks in order.

        Raises:
            MismatchError: If there are none of that layer.
        """
        if layer not in self._files:
            raise MismatchError(
                f"{self.folder} holds chunks of layers {list(self._files)}, not {layer}.",
                safe=UNTOUCHED,
                then="Set analyze.layers to one of these.",
            )
        return self._files[layer]

    def largest(self, layer: int) -> int:
        """Return the size of a layer's largest file, in bytes."""
        return max(path.stat().st_size for path in self.files(layer))

    def facts(self, layer: int) -> "DumpFacts":
        """Return how many tokens a layer has, as its last chunk says, and how wide they are.

        Raises:
            InputError: If `meta.json` names another number of chunks, as our own export does.
        """
        chunks, there = self._announced.get("chunks"), len(self.files(layer))
        if self._announced.get("layer") == layer and chunks not in (None, there):
            raise InputError(
                f"{self.folder / META} says that layer {layer} has {chunks} chunks, but {there} "
                "are there.",
                safe=UNTOUCHED,
                then="Copy the missing chunks into the folder, or write the dump again.",
            )
        with self.opened(self.files(layer)[-1]) as chunk:
            size = 2 if chunk.dtype == "F16" else 8 if chunk.dtype == "F64" else 4
            return DumpFacts(chunk.total, size * chunk.shape[1])

    def chunks(self, layer: int) -> Iterator[Chunk]:
        """Yield a layer's chunks in order; a chunk is gone when the next one comes.

        Raises:
            InputError: If a file is not such a chunk, or chunks are missing.
            MismatchError: If a chunk has another width or type than `meta.json` or the first.
            ResourceError: If a chunk does not fit into memory.
            UnsafeArtifactError: If a file holds more than tensors.
        """
        before, dtype, width, last = 0, "", self._width, None
        for path in self.files(layer):
            with self.opened(path) as chunk:
                self._check(chunk, before, dtype, width, last)
                dtype, width = chunk.dtype, chunk.shape[1]
                before, last = chunk.total, path
                yield chunk

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[Chunk]:
        """Open one chunk, whatever its shape; only `chunks` tells whether it fits the others.

        Args:
            path: One of `files`.

        Raises:
            InputError: If the file is no chunk.
            ResourceError: If it does not fit into memory.
            UnsafeArtifactError: If it holds more than tensors.
        """
        size, free = path.stat().st_size, free_memory(torch.device("cpu"))
        if COPIES * size > free:
            raise ResourceError(
                f"{path} has {size:,} bytes; to read it takes {COPIES:g} times as much memory, and "
                f"{free:,} bytes are free. Only one chunk is held at a time.",
                safe=UNTOUCHED,
                then="Write the dump in smaller chunks, or use a machine with more memory.",
            )
        converted = self._scratch / f"{fsio.TEMP_PREFIX}{path.stem}.safetensors"
        try:
            to_safetensors(path, converted)
            yield _chunk(path, TensorFile(converted))
        except InputError as error:
            if error.then:
                raise
            raise InputError(
                error.message,
                safe=UNTOUCHED,
                then=f"A chunk is a dictionary of {CODES} and {TOTAL} that torch.save wrote. Copy "
                "the file again, or write the dump anew.",
            ) from None
        finally:
            converted.unlink(missing_ok=True)

    def _check(
        self, chunk: Chunk, before: int, dtype: str, width: int | None, last: Path | None
    ) -> None:
        tokens, wide = chunk.shape
        if width is not None and wide != width:
            source = f"{META} says" if last is None else "the chunks before it have"
            swapped = " Its axes seem to be swapped: tokens come first." if tokens == width else ""
            raise MismatchError(
                f"{chunk.path} holds {wide} latents a token, but {source} {width}.{swapped}",
                safe=UNTOUCHED,
                then=f"Keep dumps of different SAEs in folders of their own, or put {WIDTH} of "
                f"{META} right.",
            )
        if dtype and chunk.dtype != dtype:
            raise MismatchError(
                f"{chunk.path} holds {chunk.dtype} values, but the chunks before it {dtype}.",
                safe=UNTOUCHED,
                then="Write all chunks in one type; figures of a mixture would mean neither.",
            )
        if chunk.total != before + tokens:
            raise InputError(_gap(chunk, before, last), safe=UNTOUCHED, then=_gap_remedy(chunk))


def _gap(chunk: Chunk, before: int, last: Path | None) -> str:
    tokens = chunk.shape[0]
    held = f"the chunks up to {last.name} hold {before:,}" if last else "no chunk comes before it"
    missing = chunk.total - before - tokens
    what = f"{missing:,} tokens are missing" if missing > 0 else f"{-missing:,} are too many"
    return (
        f"{chunk.path} says that {chunk.total:,} tokens are written so far ({TOTAL}), but {held} "
        f"and this one holds {tokens:,}: {what}."
    )


def _gap_remedy(chunk: Chunk) -> str:
    return (
        "Copy the missing chunks into the folder, or write the dump again. To analyse what there "
        f"is, save the chunks anew with {TOTAL} counted over them (tokens of the chunk included)."
        if chunk.total > chunk.shape[0]
        else f"{TOTAL} counts the tokens of the chunk itself and of all before it; save it so."
    )


def _find(folder: Path) -> dict[int, list[Path]]:
    """Return the chunks of each layer, in the order of their numbers."""
    if not folder.is_dir():
        raise InputError(
            f"there is no folder {folder}.", then="Set --dump_dir to the folder of the chunks."
        )
    found: dict[int, dict[int, Path]] = {}
    for path in sorted(folder.iterdir()):
        match = CHUNK.fullmatch(path.name)
        if match is None or not path.is_file():
            continue
        layer, number = int(match[2]), int(match[3])
        other = found.setdefault(layer, {}).setdefault(number, path)
        if other != path:
            raise InputError(
                f"{folder} holds two files for chunk {number} of layer {layer}: {other.name} and "
                f"{path.name}.",
                safe=UNTOUCHED,
                then="Move one of them out of the folder.",
            )
    if not found:
        raise InputError(
            f"{folder} holds no chunk: no file is called sae_feats_layer<L>_chunk<n>.pt or "
            "layer<L>_chunk<n>.pt.",
            then="Set --dump_dir to the folder of the chunks.",
        )
    return {layer: [chunks[i] for i in sorted(chunks)] for layer, chunks in sorted(found.items())}


def _meta(folder: Path) -> dict[str, Any] | None:
    if not (folder / META).exists():
        log.warning("%s holds no %s; its first chunk says how many latents there are", folder, META)
        return None
    meta = fsio.read_json(folder / META)
    return meta if isinstance(meta, dict) else {}


def _width(folder: Path, meta: dict[str, Any]) -> int:
    width = meta.get(WIDTH)
    if isinstance(width, bool) or not isinstance(width, int) or width < 1:
        raise InputError(
            f"{folder / META} has to give the number of latents under {WIDTH}, but it gives "
            f"{width!r}.",
            safe=UNTOUCHED,
            then=f'Write it, such as {{"{WIDTH}": 20480}}, or remove {META}: the first chunk says '
            "it then.",
        )
    return width


def _chunk(path: Path, file: TensorFile) -> Chunk:
    missing = [name for name in (CODES, TOTAL) if name not in file]
    if missing:
        raise InputError(
            f"{path} holds {', '.join(file.names) or 'nothing'}, but a chunk holds {CODES} and "
            f"{TOTAL}; {' and '.join(missing)} is not there."
        )
    shape, total = file.shape(CODES), file.array(TOTAL)
    if len(shape) != 2 or total.size != 1 or total.dtype.kind not in "iu":
        raise InputError(
            f"{path}: {CODES} is [tokens, latents] and {TOTAL} one whole number; they are "
            f"{list(shape)} and {list(total.shape)} of {total.dtype}."
        )
    chunk = Chunk(path, file, int(total.reshape(-1)[0]))
    if chunk.dtype not in DTYPES:
        raise InputError(
            f"{path} holds {chunk.dtype} values; codes are {', '.join(sorted(DTYPES))}."
        )
    return chunk
