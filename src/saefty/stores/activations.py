"""Activations of tokens on disk: one vector a row and layer, and where each row comes from.

    layer_<i>/shard_<n>.safetensors   `x` [rows, d_in], in the dtype the model computes
    rows/shard_<n>.safetensors        the row table, shared by all layers
    examples.jsonl                    every example that came in, with its text, label and status

Rows lie in the order of the dataset: example by example, token by token. All layers have the same
rows, because they come from the same forward passes and are committed together.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saefty.errors import IntegrityError, MismatchError
from saefty.records import Site
from saefty.stores.base import StoreReader, StoreWriter
from saefty.tensorfile import Bf16

KIND = "activations"
ROW_COLUMNS: dict[str, type[np.generic]] = {
    "example": np.int64,
    "token_pos": np.int32,
    "token_id": np.int32,
    "char_start": np.int32,
    "char_end": np.int32,
    "role": np.int8,
    "modality": np.int8,
}
"""The row table: index of the example, place of the token in it (-1 for pooled rows), its id, its
characters [start, end) in the example's text, and the numbers of its role and modality."""

BLOCK_ROWS = 64
"""Rows that stay together when batches are shuffled: random single rows cost 40 times as much."""

GROUP_ROWS = 16_384
"""Rows that are read at once and permuted in memory."""

UNKNOWN = "unknown"
"""Method and scope of a contrast whose files do not say them."""

RowTable = dict[str, np.ndarray]


def row_files(shard: int, rows: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Return the row table of a shard as the file that holds it."""
    table = {name: rows[name].astype(kind, copy=False) for name, kind in ROW_COLUMNS.items()}
    return {f"rows/shard_{shard:05d}": table}


def commit_activations(
    writer: StoreWriter,
    piece: int,
    activations: Mapping[int, Float[Tensor, "rows d_in"]],
    rows: RowTable,
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """Commit one piece: a shard for each layer and the row table they share.

    Raises:
        ValueError: If the layers do not have the same number of rows as the table.
    """
    n_rows = len(rows["example"])
    files: dict[str, dict[str, np.ndarray | Bf16]] = {
        name: dict(table) for name, table in row_files(piece, rows).items()
    }
    for layer, x in sorted(activations.items()):
        if len(x) != n_rows:
            raise ValueError(f"layer {layer} has {len(x)} rows, but the row table has {n_rows}")
        files[f"layer_{layer}/shard_{piece:05d}"] = {"x": to_disk(x)}
    return writer.commit(piece, files, {"rows": n_rows, **counts})


def to_disk(x: Float[Tensor, "..."]) -> np.ndarray | Bf16:
    """Return a tensor's values as NumPy can write them, bit for bit."""
    x = x.detach().cpu().contiguous()
    return Bf16(_bits(x)) if x.dtype == torch.bfloat16 else x.numpy()


def _bits(x: Float[Tensor, "..."]) -> np.ndarray:
    """Return a tensor's memory as NumPy sees it, which knows bfloat16 by its bits alone."""
    return x.view(torch.uint16).numpy() if x.dtype == torch.bfloat16 else x.numpy()


class ActivationStore(StoreReader):
    """A complete store of activations; open it with `ActivationStore.open(folder)`."""

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder, KIND)
        self.layers: tuple[int, ...] = tuple(self.manifest["layers"])
        self.d_in: int = self.manifest["d_in"]
        self.dtype: str = self.manifest["dtype"]
        self._counts = [int(piece["rows"]) for piece in self.pieces]
        self._starts = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)
        self._check_layers()

    @classmethod
    def open(cls, folder: Path | str) -> "ActivationStore":
        """Open a run's folder.

        Raises:
            IntegrityError: If the store is not complete, or its layers do not have the same shards.
        """
        return cls(folder)

    @property
    def n_rows(self) -> int:
        """Rows of each layer."""
        return int(self._starts[-1])

    @property
    def contrast(self) -> dict[str, str] | None:
        """Method and scope of a store of differences h_on - h_off; None for plain activations."""
        return self.manifest.get("contrast")

    def site(self, layer: int) -> Site:
        """Return the place in the model at which a layer was read."""
        return Site.parse(self.manifest["sites"][str(self._known(layer))])

    def rows(self) -> RowTable:
        """Return the row table of the whole store, as one array a column."""
        shards = [self.file(f"rows/shard_{i:05d}.safetensors") for i in range(len(self.pieces))]
        return {
            name: np.concatenate([shard.array(name) for shard in shards] or [np.zeros(0, kind)])
            for name, kind in ROW_COLUMNS.items()
        }

    def shard(self, layer: int, index: int) -> Float[Tensor, "rows d_in"]:
        """Return one shard of a layer as a tensor over the mapped file, in the dtype on disk."""
        file = self.file(f"layer_{self._known(layer)}/shard_{index:05d}.safetensors")
        if file.shape("x") != (self._counts[index], self.d_in):
            raise IntegrityError(
                f"{file.path} holds {file.shape('x')} values, but the manifest says "
                f"{(self._counts[index], self.d_in)}."
            )
        x = torch.from_numpy(np.asarray(file.array("x")))
        return x.view(torch.bfloat16) if file.is_bf16("x") else x

    def batches(
        self,
        layer: int,
        size: int,
        seed: int | None = None,
        *,
        keep: Bool[np.ndarray, "n_rows"] | None = None,
        start: int = 0,
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Yield one epoch of a layer's rows as float32 batches, without loading the store.

        With a seed, blocks of rows are drawn from all shards in random order and permuted in
        memory; without one, rows come in order. The same arguments give the same batches.

        Args:
            layer: The layer.
            size: Rows in a batch; the last batch holds what is left.
            seed: Order of the rows; None for the order of the dataset.
            keep: Which rows to use; None uses all.
            start: Batches to skip, as if they had been yielded before.
        """
        for x in self.stored_batches(layer, size, seed, keep=keep, start=start):
            yield x.float()

    def stored_batches(
        self,
        layer: int,
        size: int,
        seed: int | None = None,
        *,
        keep: Bool[np.ndarray, "n_rows"] | None = None,
        start: int = 0,
    ) -> Iterator[Float[Tensor, "rows d_in"]]:
        """Yield the same batches as `batches` in the dtype on disk, without computing by torch."""
        for indices in self.batch_rows(size, seed, keep=keep, start=start):
            yield self._fetch(layer, indices)

    def batch_rows(
        self,
        size: int,
        seed: int | None = None,
        *,
        keep: Bool[np.ndarray, "n_rows"] | None = None,
        start: int = 0,
    ) -> Iterator[Int[np.ndarray, "rows"]]:
        """Yield the row numbers of the batches that `batches` yields with these arguments."""
        if keep is not None and len(keep) != self.n_rows:
            raise ValueError(f"keep has {len(keep)} entries for {self.n_rows} rows")
        skip = start * size
        pending: list[np.ndarray] = []
        waiting = 0
        for group in self._groups(seed, keep):
            if skip >= len(group):
                skip -= len(group)
                continue
            pending.append(group[skip:])
            waiting += len(group) - skip
            skip = 0
            if waiting < size:
                continue
            stream = np.concatenate(pending)
            whole = waiting - waiting % size
            yield from stream[:whole].reshape(-1, size)
            pending, waiting = [stream[whole:]], waiting - whole
        if waiting:
            yield np.concatenate(pending)

    def take(self, layer: int, indices: Int[np.ndarray, "rows"]) -> Float[Tensor, "rows d_in"]:
        """Return chosen rows of a layer as float32, in the order asked for."""
        return self._fetch(layer, indices).float()

    def _fetch(self, layer: int, indices: Int[np.ndarray, "rows"]) -> Float[Tensor, "rows d_in"]:
        """Return chosen rows in the dtype on disk.

        They are fetched in the order in which they lie, then put where they belong, by NumPy: half
        the bytes of float32, and no thread but the one that calls.
        """
        out = None
        order = np.argsort(indices, kind="stable")
        rows = indices[order]
        ends = np.searchsorted(rows, self._starts[1:])
        for shard in np.unique(np.searchsorted(self._starts, rows, side="right") - 1):
            these = slice(ends[shard - 1] if shard else 0, ends[shard])
            data = self.shard(layer, int(shard))
            fetched = np.take(_bits(data), rows[these] - self._starts[shard], axis=0)
            part = torch.from_numpy(fetched).view(data.dtype)
            if out is None:
                out = torch.empty(len(rows), self.d_in, dtype=data.dtype)
            elif out.dtype != data.dtype:  # files that were imported may differ
                out, part = out.float(), part.float()
            _bits(out)[order[these]] = _bits(part)
        return torch.empty(0, self.d_in) if out is None else out

    def _groups(
        self, seed: int | None, keep: Bool[np.ndarray, "n_rows"] | None
    ) -> Iterator[Int[np.ndarray, "rows"]]:
        """Yield the row numbers group by group; each group depends on the seed and its index."""
        starts = np.arange(0, self.n_rows, BLOCK_ROWS)
        if seed is not None:
            np.random.default_rng([seed, 0]).shuffle(starts)
        per_group = GROUP_ROWS // BLOCK_ROWS
        for index in range(0, len(starts), per_group):
            blocks = starts[index : index + per_group]
            rows = (blocks[:, None] + np.arange(BLOCK_ROWS)).ravel()
            rows = rows[rows < self.n_rows]
            if keep is not None:
                rows = rows[keep[rows]]
            if seed is not None:
                np.random.default_rng([seed, 1, index]).shuffle(rows)
            yield rows

    def _known(self, layer: int) -> int:
        if layer not in self.layers:
            raise MismatchError(
                f"{self.folder} holds layers {list(self.layers)}, not {layer}.",
                then="Extract that layer, or choose one of these.",
            )
        return layer

    def _check_layers(self) -> None:
        for piece in self.pieces:
            present = {name.partition("/")[0] for name in piece["files"]}
            missing = [i for i in self.layers if f"layer_{i}" not in present]
            if missing:
                raise IntegrityError(
                    f"piece {piece['piece']} of {self.folder} has no shard of layers {missing}, "
                    f"though other layers have one.",
                    then=f"Run saefty store repair {self.folder}.",
                )
