"""Activations, or contrasts of them, into a store: the pieces of a reading, one by one."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from saefty.engine import EngineSection, Report
from saefty.models.base import ModelAdapter, ModelSection, load_model
from saefty.pieces import Piece, PieceReader, PieceTask
from saefty.piecework import Record, count_masked, do_pieces
from saefty.reading import PLAN, Reading, ReadingSection
from saefty.records import Site
from saefty.stores.activations import KIND, ActivationStore, commit_activations
from saefty.stores.base import EXAMPLES, StoreWriter


@dataclass(frozen=True)
class Extraction:
    """What a worker process needs to extract pieces by itself."""

    model: ModelSection
    sites: tuple[Site, ...]
    section: ReadingSection
    folder: Path
    fingerprint: str

    def __call__(self) -> "_ExtractedPiece":
        """Load the model."""
        model = load_model(**self.model.model_dump())
        reader = PieceReader(model, self.sites, self.section)
        return _ExtractedPiece(reader, StoreWriter(self.folder, KIND, self.fingerprint))


@dataclass(frozen=True)
class _ExtractedPiece:
    """Reads a piece, and commits it: which may go on beside the reading of the next."""

    reader: PieceReader
    writer: StoreWriter

    def __call__(self, task: PieceTask, report: Report) -> Record:
        return self.complete(self.begin(task, report))

    def begin(self, task: PieceTask, report: Report) -> Piece:
        return self.reader.read(task, report)

    def complete(self, piece: Piece) -> Record:
        x = {site.layer: values for site, values in piece.activations.items()}
        return commit_activations(self.writer, piece.index, x, piece.rows, piece.counts())


def write_activations(
    folder: Path,
    fingerprint: str,
    model: ModelAdapter,
    reading: Reading,
    sites: Sequence[Site],
    section: ReadingSection,
    engine: EngineSection | None = None,
    reload: ModelSection | None = None,
) -> ActivationStore:
    """Extract activations into a folder; pieces that are there and whole are not made again.

    Args:
        folder: The store's folder, whose lock the caller holds.
        fingerprint: A checksum of everything the activations depend on.
        model: The model.
        reading: The dataset, made ready.
        sites: Where to read, one site a layer.
        section: How to read.
        engine: How the work is shared out; None does it in this process.
        reload: How worker processes load the model; needed for more than one.

    Returns:
        The complete store.
    """
    writer = StoreWriter(folder, KIND, fingerprint)
    reader = PieceReader(model, sites, section)
    work = _ExtractedPiece(reader, writer)
    elsewhere = Extraction(reload, tuple(sites), section, folder, fingerprint) if reload else None
    ordered = do_pieces(writer, reading, work, elsewhere, engine, model.release, reader.check)
    contrast = section.contrast
    facts = {
        "layers": [site.layer for site in sites],
        "sites": {str(site.layer): site.name for site in sites},
        "d_in": model.d_model,
        "dtype": str(section.rows_dtype(model.dtype)).removeprefix("torch."),
        "pooling": section.pooling.name,
        "model_name": model.name,
        "n_rows": sum(record["rows"] for record in ordered),
        "masked": count_masked(ordered),
        "failed": reading.ledger.failed.total(),
        **({} if contrast.method == "none" else {"contrast": contrast.model_dump()}),
    }
    writer.finish(ordered, facts, [EXAMPLES, PLAN])
    return ActivationStore(folder)
