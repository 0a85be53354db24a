"""From activations to sparse features: by any number of SAEs, over pieces of rows from any source.

Rows come from a model's forward passes (`pieces.PieceReader`) or from an activation store
(`stored_pieces`); what is done with them is the same.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from saefty.engine import Report
from saefty.errors import MismatchError
from saefty.models.base import ModelSection, load_model
from saefty.pieces import Piece, PieceReader, PieceTask
from saefty.piecework import Record, count_masked
from saefty.reading import ReadingSection
from saefty.records import Site
from saefty.releases import named_releases
from saefty.sae_sets import SaeRecord, SaeSet
from saefty.saes.base import SparseAutoencoder
from saefty.stores.activations import ROW_COLUMNS, UNKNOWN, ActivationStore
from saefty.stores.base import StoreWriter
from saefty.stores.features import KIND, FeatureStore, Key, commit_features, layer_of
from saefty.stores.index import build_index

log = logging.getLogger(__name__)

Pieces = Callable[[Collection[int]], Iterable[Piece]]
"""Gives the pieces that are not done yet, when told which are."""

ENCODED_ROWS = 4096
"""Rows encoded at once: enough for the matrix product, little enough for the memory."""


Contrast = Mapping[str, str] | None
"""Method and scope of a contrast h_on - h_off; None for plain activations."""


Saes = Mapping[Key, SaeRecord] | Mapping[Key, SparseAutoencoder] | Mapping[int, SparseAutoencoder]


def check_saes(saes: Saes, d_in: int, where: str, contrast: Contrast = None) -> None:
    """Refuse SAEs that read activations of another width, or another contrast of them.

    Args:
        saes: The SAEs.
        d_in: Width of the activations.
        where: The model or the store that they come from.
        contrast: What the store or the reading holds, where that is a contrast.

    Raises:
        MismatchError: If an SAE's d_in is not the width of the activations, or it was trained on
            plain activations and these are contrasts, or the reverse, or on other contrasts.
    """
    for layer, sae in saes.items():
        if sae.d_in != d_in:
            raise MismatchError(
                f"the SAE of layer {layer} reads activations {sae.d_in} wide, but those of {where} "
                f"are {d_in} wide.",
                then=f"Use an SAE that was trained on this model{named_releases(where)}, or "
                "the model of this SAE.",
            )
        trained = sae.contrast if isinstance(sae, SaeRecord) else sae.metadata.get("contrast")
        if not same_contrast(trained, contrast):
            raise MismatchError(
                f"the SAE of layer {layer} was trained on {in_words(trained)}, but what is read of "
                f"{where} is {in_words(contrast)}.",
                then=_how_to_read_alike(trained),
            )


def check_against_store(saes: Saes, store: ActivationStore) -> None:
    """Refuse SAEs that read another place than a store holds, another width or another contrast.

    Raises:
        MismatchError: If one does.
    """
    check_saes(saes, store.d_in, str(store.folder), store.contrast)
    for key, sae in saes.items():
        held = store.site(layer_of(key))
        if sae.site is not None and sae.site != held:
            raise MismatchError(
                f"the SAE of layer {key} reads {sae.site}, but the store holds {held}.",
                then="Extract that hook point, or train an SAE on this store.",
            )


def in_words(contrast: Contrast) -> str:
    """Return what rows are: plain activations, or which contrast."""
    if contrast is None:
        return "plain activations"
    return f"contrasts h_on - h_off ({contrast['method']}, {contrast['scope']})"


def same_contrast(one: Contrast, other: Contrast) -> bool:
    """Return whether two stores or SAEs are of the same; what is unknown agrees with all."""
    if one is None or other is None:
        return one is other
    return all(one[key] == other[key] or UNKNOWN in (one[key], other[key]) for key in one)


def _how_to_read_alike(trained: Contrast) -> str:
    if trained is None:
        return (
            "Use an SAE that was trained on a store of this contrast (saefty train), or plain "
            "activations: contrast.method=none."
        )
    return (
        "Use it on a store that was extracted with extract.contrast.method="
        f"{trained['method']} extract.contrast.scope={trained['scope']} (eval.sae with eval.store, "
        "encode.store), set encode.contrast likewise, or take an SAE of plain activations."
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


def stored_pieces(
    store: ActivationStore, layers: Collection[int], done: Collection[int] = ()
) -> Iterator[Piece]:
    """Yield the pieces of an activation store that are not done yet."""
    for record in store.pieces:
        if int(record["piece"]) not in done:
            yield stored_piece(store, layers, int(record["piece"]))


def stored_piece(store: ActivationStore, layers: Collection[int], index: int) -> Piece:
    """Return one piece of an activation store."""
    file = store.file(f"rows/shard_{index:05d}.safetensors")
    rows = {name: np.array(file.array(name)) for name in ROW_COLUMNS}
    x = {store.site(layer): store.shard(layer, index) for layer in layers}
    return Piece(index, rows, x, {})


@dataclass(frozen=True)
class Encoding:
    """What a worker process needs to read pieces through a model and encode them by itself."""

    model: ModelSection
    sites: tuple[Site, ...]
    section: ReadingSection
    saes: SaeSet
    folder: Path
    fingerprint: str
    workers: int = 1

    def __call__(self) -> "EncodedPiece":
        """Load the model; the SAEs are loaded when they are asked for."""
        model = load_model(**self.model.model_dump())
        saes = self.saes.placed(model.device, self.workers)
        reader = PieceReader(model, self.sites, self.section)
        return EncodedPiece(reader, saes, StoreWriter(self.folder, KIND, self.fingerprint))


@dataclass(frozen=True)
class EncodedPiece:
    """Reads one piece through a model, encodes it and commits its features."""

    reader: PieceReader
    saes: SaeSet
    writer: StoreWriter

    def __call__(self, task: PieceTask, report: Report) -> Record:
        """Return the piece's record."""
        return encode_and_commit(self.writer, self.reader.read(task, report), self.saes)


@dataclass(frozen=True)
class StoredEncoding:
    """What a worker process needs to encode the pieces of an activation store by itself."""

    store: Path
    saes: SaeSet
    folder: Path
    fingerprint: str
    workers: int = 1

    def __call__(self) -> "EncodedStoredPiece":
        """Open the store; the SAEs are loaded when they are asked for."""
        writer = StoreWriter(self.folder, KIND, self.fingerprint)
        saes = self.saes.placed("cpu", self.workers)
        return EncodedStoredPiece(ActivationStore(self.store), saes, writer)


@dataclass(frozen=True)
class EncodedStoredPiece:
    """Encodes one piece of an activation store, known by its index, and commits its features."""

    store: ActivationStore
    saes: SaeSet
    writer: StoreWriter

    def __call__(self, task: int, report: Report) -> Record:
        """Return the piece's record."""
        report.begin(task)
        piece = stored_piece(self.store, self.saes.layers, task)
        record = encode_and_commit(self.writer, piece, self.saes)
        report.advance(record["rows"])
        return record


def write_features(
    folder: Path,
    fingerprint: str,
    pieces: Pieces,
    saes: Mapping[Key, SparseAutoencoder] | Mapping[int, SparseAutoencoder],
    *,
    model_name: str,
    extra: Sequence[str],
) -> FeatureStore:
    """Encode pieces into a folder; those that are there and whole are not made again.

    Args:
        folder: The store's folder, whose lock the caller holds; the example table is in it.
        fingerprint: A checksum of everything the features depend on.
        pieces: Where the activations come from.
        saes: The SAEs: by layer, further ones of a layer by `<layer>__<name>`.
        model_name: The model the activations come from.
        extra: Further files of the store, such as the example table.

    Returns:
        The complete store, index included.
    """
    chosen = saes if isinstance(saes, SaeSet) else SaeSet.of(saes)
    writer = StoreWriter(folder, KIND, fingerprint)
    records = writer.done()
    if records:
        log.info("%d pieces are done", len(records))
    for piece in pieces(records):
        records[piece.index] = encode_and_commit(writer, piece, chosen)
    ordered = [records[i] for i in sorted(records)]
    return finish_features(writer, ordered, chosen, model_name=model_name, extra=extra)


def encode_and_commit(writer: StoreWriter, piece: Piece, saes: SaeSet) -> Record:
    """Encode one piece and commit its features; return its record."""
    # An SAE is let go of as soon as it has encoded: the set may not hold two.
    code = {
        key: encode_rows(saes[key], _activations(piece, record.site))
        for key, record in saes.records.items()
    }
    return commit_features(writer, piece.index, code, piece.rows, piece.counts())


def finish_features(
    writer: StoreWriter,
    ordered: Sequence[Record],
    saes: SaeSet,
    *,
    model_name: str,
    extra: Sequence[str],
    bos_id: int | None = None,
) -> FeatureStore:
    """Build the index and write the manifest, when all pieces are there.

    Args:
        writer: Of the store.
        ordered: The records of all pieces, in order.
        saes: The SAEs.
        model_name: The model the activations come from.
        extra: Further files of the store, such as the example table.
        bos_id: The token that begins each text, where the store holds it.
    """
    masked = count_masked(ordered)
    folder, known = writer.folder, saes.records
    indices = [build_index(folder, key, len(ordered), one.d_sae) for key, one in known.items()]
    facts: dict[str, Any] = {
        "layers": saes.layers,
        "sites": {str(key): one.site.name for key, one in known.items()},
        "d_sae": {str(key): one.d_sae for key, one in known.items()},
        "saes": {str(key): one.folder for key, one in known.items()},
        "n_tokens": sum(record["rows"] for record in ordered),
        "nnz": {str(key): sum(record["nnz"][str(key)] for record in ordered) for key in known},
        "model_name": model_name,
        "masked": masked,
    }
    if bos_id is not None:
        facts["bos_token_id"] = bos_id
    if len(known) > len(saes.layers):
        facts["codes"] = list(known)
    contrasts = [dict(one.contrast) for one in known.values() if one.contrast]
    if contrasts:
        facts["contrast"] = contrasts[0]  # all read the same rows
    published = {str(key): dict(one.published) for key, one in known.items() if one.published}
    if published:
        facts["published"] = published
    writer.finish(ordered, facts, [*extra, *indices])
    return FeatureStore(folder)


def _activations(piece: Piece, site: Site) -> Float[Tensor, "rows d_in"]:
    """Return what an SAE reads; where a piece holds one place of the layer alone, that."""
    if site in piece.activations:
        return piece.activations[site]
    (only,) = (x for other, x in piece.activations.items() if other.layer == site.layer)
    return only
