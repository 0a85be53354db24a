"""From activations to sparse features: one SAE a layer, over pieces of rows from any source.

Rows come from a model's forward passes (`extraction.read_pieces`) or from an activation store
(`stored_pieces`); what is done with them is the same.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saefty.errors import MismatchError
from saefty.reading import Piece, count_masked
from saefty.records import Site
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ROW_COLUMNS, ActivationStore
from saefty.stores.base import StoreWriter
from saefty.stores.features import KIND, FeatureStore, build_index, commit_features

log = logging.getLogger(__name__)

Pieces = Callable[[Collection[int]], Iterable[Piece]]
"""Gives the pieces that are not done yet, when told which are."""

ENCODED_ROWS = 4096
"""Rows encoded at once: enough for the matrix product, little enough for the memory."""


def check_saes(saes: Mapping[int, SparseAutoencoder], d_in: int, where: str) -> None:
    """Refuse SAEs that read activations of another width.

    Raises:
        MismatchError: If an SAE's d_in is not the width of the activations.
    """
    for layer, sae in saes.items():
        if sae.d_in != d_in:
            raise MismatchError(
                f"the SAE of layer {layer} reads activations {sae.d_in} wide, but those of {where} "
                f"are {d_in} wide.",
                then="Use an SAE that was trained on this model, or the model of this SAE.",
            )


def encode_rows(sae: SparseAutoencoder, x: Float[Tensor, "rows d_in"]) -> dict[str, np.ndarray]:
    """Return the latents that fire on each row as CSR: `indptr`, `ids`, `values` (descending)."""
    device = sae.W_dec.device
    codes = [sae.encode_sparse(part.to(device)) for part in x.split(ENCODED_ROWS)] if len(x) else []
    counts = [code.l0.cpu().numpy() for code in codes]
    return {
        "indptr": np.concatenate([[0], np.cumsum(np.concatenate(counts or [np.zeros(0)]))]).astype(
            np.int64
        ),
        "ids": np.concatenate(
            [code.indices.cpu().numpy().astype(np.uint32) for code in codes]
            or [np.zeros(0, np.uint32)]
        ),
        "values": np.concatenate(
            [code.values.float().cpu().numpy() for code in codes] or [np.zeros(0, np.float32)]
        ),
    }


def encode_piece(
    piece: Piece, saes: Mapping[int, SparseAutoencoder]
) -> dict[int, dict[str, np.ndarray]]:
    """Return the code of a piece's rows by each layer's SAE."""
    by_layer = {site.layer: x for site, x in piece.activations.items()}
    return {layer: encode_rows(sae, by_layer[layer]) for layer, sae in saes.items()}


def stored_pieces(
    store: ActivationStore, layers: Collection[int], done: Collection[int] = ()
) -> Iterator[Piece]:
    """Yield the pieces of an activation store that are not done yet."""
    for record in store.pieces:
        index = int(record["piece"])
        if index in done:
            continue
        file = store.file(f"rows/shard_{index:05d}.safetensors")
        rows = {name: np.array(file.array(name)) for name in ROW_COLUMNS}
        x = {store.site(layer): store.shard(layer, index) for layer in layers}
        yield Piece(index, rows, x, {})


def write_features(
    folder: Path,
    fingerprint: str,
    pieces: Pieces,
    saes: Mapping[int, SparseAutoencoder],
    *,
    model_name: str,
    extra: Sequence[str],
) -> FeatureStore:
    """Encode pieces into a folder; those that are there and whole are not made again.

    Args:
        folder: The store's folder, whose lock the caller holds; the example table is in it.
        fingerprint: A checksum of everything the features depend on.
        pieces: Where the activations come from.
        saes: The SAE of each layer.
        model_name: The model the activations come from.
        extra: Further files of the store, such as the example table.

    Returns:
        The complete store, index included.
    """
    writer = StoreWriter(folder, KIND, fingerprint)
    records = writer.done()
    if records:
        log.info("%d pieces are done", len(records))
    for piece in pieces(records):
        code = encode_piece(piece, saes)
        counts = {"masked": dict(piece.masked)}
        records[piece.index] = commit_features(writer, piece.index, code, piece.rows, counts)
    ordered = [records[i] for i in sorted(records)]
    masked = count_masked(ordered)
    indices = [build_index(folder, i, len(ordered), saes[i].d_sae) for i in sorted(saes)]
    layers = sorted(saes)
    sites = {layer: saes[layer].site or Site(layer) for layer in layers}
    facts = {
        "layers": layers,
        "sites": {str(layer): sites[layer].name for layer in layers},
        "d_sae": {str(layer): saes[layer].d_sae for layer in layers},
        "saes": {str(layer): _text(saes[layer].folder) for layer in layers},
        "n_tokens": sum(record["rows"] for record in ordered),
        "nnz": {str(i): sum(record["nnz"][str(i)] for record in ordered) for i in layers},
        "model_name": model_name,
        "masked": masked,
    }
    writer.finish(ordered, facts, [*extra, *indices])
    return FeatureStore(folder)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
