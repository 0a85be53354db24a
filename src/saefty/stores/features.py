"""Sparse features on disk: which latents fired on each token, and where each latent fired.

    layer_<i>/shard_<n>.safetensors   CSR over tokens: `indptr` int64, `ids` uint32, `values`
                                      float32, magnitudes descending within a token
    layer_<i>/index.safetensors       the same by latent: `f_indptr`, `f_rows`, `f_values`,
                                      magnitudes descending within a latent; built once, read
                                      through mmap, verified where it is read
    rows/shard_<n>.safetensors        the token table
    examples.jsonl                    every example that came in

A layer's first SAE goes by the layer's number. Further SAEs of the layer, of the same hook point or
of another one, go by `<layer>__<name>`; their folders are `layer_<layer>__<name>`.

Nothing here needs torch. "Fired" means a stored value, which is above zero or, in a signed code,
other than zero; how strongly is its magnitude.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array, vstack

from saefty.errors import MismatchError
from saefty.records import Site
from saefty.stores.activations import ROW_COLUMNS, RowTable, row_files
from saefty.stores.base import StoreReader, StoreWriter
from saefty.stores.blocks import BlockFile
from saefty.tensorfile import Bf16

KIND = "features"
Key = int | str
"""One SAE of a store: its layer, or `<layer>__<name>` for a further SAE of a layer."""

POOLINGS = ("max", "mean", "sum", "last")
_NONE = np.zeros(0, np.int64)


def layer_of(key: Key) -> int:
    """Return the layer of an SAE's key.

    Raises:
        ValueError: If it is no key.

    Example:
        >>> layer_of("12__width_16k"), layer_of(12)
        (12, 12)
    """
    return key if isinstance(key, int) else int(key.partition("__")[0])


def commit_features(
    writer: StoreWriter,
    piece: int,
    codes: Mapping[Key, Mapping[str, np.ndarray]] | Mapping[int, Mapping[str, np.ndarray]],
    rows: RowTable,
    counts: Mapping[str, Any],
) -> dict[str, Any]:
    """Commit one piece: for each SAE a CSR of its tokens, and the token table they share.

    Args:
        writer: The store's writer.
        piece: The piece's index in the plan.
        codes: For each SAE `indptr`, `ids` and `values`.
        rows: The token table.
        counts: What became of the piece's rows.
    """
    files: dict[str, dict[str, np.ndarray | Bf16]] = {
        name: dict(table) for name, table in row_files(piece, rows).items()
    }
    for key, code in sorted(codes.items(), key=lambda item: layer_of(item[0])):
        files[f"layer_{key}/shard_{piece:05d}"] = {
            "indptr": code["indptr"].astype(np.int64, copy=False),
            "ids": code["ids"].astype(np.uint32, copy=False),
            "values": code["values"].astype(np.float32, copy=False),
        }
    nnz = {str(key): len(code["ids"]) for key, code in codes.items()}
    return writer.commit(piece, files, {"rows": len(rows["example"]), "nnz": nnz, **counts})


class FeatureStore(StoreReader):
    """A complete store of sparse features; open it with `FeatureStore.open(folder)`.

    Attributes:
        layers: The layers, each once; also the keys of each layer's first SAE.
        codes: The keys of all SAEs, by layer. Where a method takes a `layer`, it takes any of them.
    """

    def __init__(self, folder: Path | str) -> None:
        super().__init__(folder, KIND)
        self.layers: tuple[int, ...] = tuple(self.manifest["layers"])
        self.codes: tuple[Key, ...] = tuple(self.manifest.get("codes", self.layers))
        self._widths: dict[str, int] = self.manifest["d_sae"]
        self._indices: dict[Key, tuple[tuple[int, ...] | None, BlockFile]] = {}

    @classmethod
    def open(cls, folder: Path | str) -> "FeatureStore":
        """Open a run's folder.

        Raises:
            IntegrityError: If the store is not complete.
        """
        return cls(folder)

    @property
    def n_tokens(self) -> int:
        """Tokens in the store; every layer has them all."""
        return sum(int(piece["rows"]) for piece in self.pieces)

    def d_sae(self, layer: Key) -> int:
        """Return the number of latents of a layer's SAE."""
        return int(self._widths[str(self._known(layer))])

    def site(self, layer: Key) -> Site:
        """Return the place in the model that an SAE reads."""
        return Site.parse(self.manifest["sites"][str(self._known(layer))])

    def sae_folder(self, layer: Key) -> str:
        """Return where an SAE was loaded from."""
        return str(self.manifest["saes"][str(self._known(layer))])

    def published(self, layer: Key) -> dict[str, str]:
        """Return an SAE's `release`, `sae_id` and `neuronpedia_id`, as far as they are known."""
        return dict(self.manifest.get("published", {}).get(str(self._known(layer)), {}))

    def signed(self, layer: Key) -> bool:
        """Return whether a latent of the layer is below zero anywhere."""
        self._known(layer)
        return any(bool((chunk.data < 0).any()) for chunk in self.chunks(layer))

    def tokens(self) -> RowTable:
        """Return the token table of the whole store, as one array a column."""
        shards = [self.file(f"rows/shard_{i:05d}.safetensors") for i in range(len(self.pieces))]
        return {
            name: np.concatenate([shard.array(name) for shard in shards] or [np.zeros(0, kind)])
            for name, kind in ROW_COLUMNS.items()
        }

    def chunks(self, layer: Key) -> Iterator[csr_array]:
        """Yield the latents of a layer shard by shard, as [tokens of the shard, d_sae]."""
        width = self.d_sae(layer)
        for i in range(len(self.pieces)):
            file = self.file(f"layer_{layer}/shard_{i:05d}.safetensors")
            indptr = file.array("indptr")
            parts = (file.array("values"), file.array("ids").astype(np.int32), indptr)
            yield csr_array(parts, shape=(len(indptr) - 1, width))

    def csr(self, layer: Key) -> csr_array:
        """Return the latents of a layer as one sparse matrix [n_tokens, d_sae]."""
        empty = csr_array((0, self.d_sae(layer)), dtype=np.float32)
        return csr_array(vstack([empty, *self.chunks(layer)], format="csr"))

    def tokens_of(
        self, layer: Key, latent: int, top: int | None = None
    ) -> tuple[Int[np.ndarray, "found"], Float[np.ndarray, "found"]]:
        """Return the rows on which a latent fired and its values, those of largest magnitude first.

        Raises:
            ValueError: If the latent is not one of the SAE's.
        """
        if not 0 <= latent < self.d_sae(layer):
            raise ValueError(f"latent {latent} is not in 0..{self.d_sae(layer) - 1}")
        index = self._index(layer)
        begin, end = map(int, index.part("f_indptr", latent, latent + 2))
        end = end if top is None else min(end, begin + top)
        return index.part("f_rows", begin, end), index.part("f_values", begin, end)

    def firing_counts(self, layer: Key) -> Int[np.ndarray, "d_sae"]:
        """Return on how many rows each latent fired."""
        return np.diff(self._index(layer).part("f_indptr", 0, self.d_sae(layer) + 1))

    def pooled(self, layer: Key, how: str = "max") -> csr_array:
        """Return one row an example of the example table: its tokens' magnitudes |z| pooled.

        Magnitudes, so that the two ends of a signed latent do not cancel. Examples without a token
        in the store have an empty row. `max`, `sum` and `mean` are over the example's tokens in the
        store; `last` is its last token.

        Raises:
            ValueError: If `how` is not one of the poolings.
        """
        if how not in POOLINGS:
            raise ValueError(f"pooling is one of {', '.join(POOLINGS)}, not {how!r}")
        example = self.tokens()["example"]
        last = np.zeros(len(example), dtype=bool)
        last[np.flatnonzero(np.diff(example, append=-1))] = True
        pooled, first = [_Entries(_NONE, _NONE, _NONE.astype(np.float32))], 0
        for chunk in self.chunks(layer):
            code = chunk.tocoo()
            here = slice(first, first + chunk.shape[0])
            chosen = last[here][code.row] if how == "last" else slice(None)
            owners = example[here][code.row][chosen]
            entries = _Entries(owners, code.col[chosen].astype(np.int64), np.abs(code.data[chosen]))
            # Piece by piece, so that what is held is what comes out and not all that was stored.
            pooled.append(entries.pooled(how))
            first = here.stop
        # And once more, because an imported store may cut an example between two pieces.
        whole = _Entries(*map(np.concatenate, zip(*pooled, strict=True))).pooled(how)
        shape = (len(self.examples()), self.d_sae(layer))
        total: csr_array = csr_array((whole.values, (whole.rows, whole.cols)), shape=shape)
        if how == "mean":
            tokens = np.bincount(example, minlength=shape[0]).clip(min=1)
            total.data = (total.data / np.repeat(tokens, np.diff(total.indptr))).astype(np.float32)
        return total

    def _index(self, layer: Key) -> BlockFile:
        """Return a layer's index, which is held for as long as the file is the same.

        Opening it would take many times as long as looking a latent up.
        """
        name = f"layer_{layer}/index.safetensors"
        found = _version(self.folder / name)
        held = self._indices.get(layer)
        if held is None or found is None or held[0] != found:
            held = self._indices[layer] = found, self.block_file(name)
        return held[1]

    def _known(self, layer: Key) -> Key:
        if layer not in self.codes:
            raise MismatchError(
                f"{self.folder} holds layers {list(self.codes)}, not {layer}.",
                then="Encode that layer, or choose one of these.",
            )
        return layer


def _version(path: Path) -> tuple[int, ...] | None:
    """Return what tells a file from another one at its place; None if there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns, status.st_size


class _Entries(NamedTuple):
    """Values with their places in a matrix; one place may have several."""

    rows: Int[np.ndarray, "nnz"]
    cols: Int[np.ndarray, "nnz"]
    values: Float[np.ndarray, "nnz"]

    def pooled(self, how: str) -> "_Entries":
        """Return one value a place: the largest with `max`, and else the sum."""
        order = np.lexsort((self.cols, self.rows))
        rows, cols, values = self.rows[order], self.cols[order], self.values[order]
        first = np.ones(len(rows), dtype=bool)
        first[1:] = (np.diff(rows) != 0) | (np.diff(cols) != 0)
        starts = np.flatnonzero(first)
        if how == "max":
            values = np.maximum.reduceat(values, starts) if len(starts) else values
        else:
            values = np.add.reduceat(values, starts) if len(starts) else values
        return _Entries(rows[first], cols[first], values)
