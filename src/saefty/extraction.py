"""Activations into a store: the pieces of a reading, committed one by one."""

import logging
from collections.abc import Sequence
from pathlib import Path

from saefty.models.base import ModelAdapter
from saefty.reading import PLAN, Reading, ReadingSection, count_masked, read_pieces, write_tables
from saefty.records import Site
from saefty.stores.activations import KIND, ActivationStore, commit_activations
from saefty.stores.base import EXAMPLES, StoreWriter

log = logging.getLogger(__name__)


def write_activations(
    folder: Path,
    fingerprint: str,
    model: ModelAdapter,
    reading: Reading,
    sites: Sequence[Site],
    section: ReadingSection,
) -> ActivationStore:
    """Extract activations into a folder; pieces that are there and whole are not made again.

    Args:
        folder: The store's folder, whose lock the caller holds.
        fingerprint: A checksum of everything the activations depend on.
        model: The model.
        reading: The dataset, made ready.
        sites: Where to read, one site a layer.
        section: How to read.

    Returns:
        The complete store.
    """
    writer = StoreWriter(folder, KIND, fingerprint)
    records = writer.done()
    if records:
        log.info("%d of %d pieces are done", len(records), len(reading.plan.pieces))
    write_tables(folder, reading, EXAMPLES)
    for piece in read_pieces(model, reading, sites, section, records):
        x = {site.layer: values for site, values in piece.activations.items()}
        counts = {"masked": dict(piece.masked)}
        records[piece.index] = commit_activations(writer, piece.index, x, piece.rows, counts)
    ordered = [records[i] for i in sorted(records)]
    pooled = section.pooling.name != "none"
    facts = {
        "layers": [site.layer for site in sites],
        "sites": {str(site.layer): site.name for site in sites},
        "d_in": model.d_model,
        "dtype": "float32" if pooled else str(model.dtype).removeprefix("torch."),
        "pooling": section.pooling.name,
        "model_name": model.name,
        "n_rows": sum(record["rows"] for record in ordered),
        "masked": count_masked(ordered),
    }
    writer.finish(ordered, facts, [EXAMPLES, PLAN])
    return ActivationStore(folder)
